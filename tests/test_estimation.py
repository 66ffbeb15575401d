"""Fitting a normal law: the documents' pixels, maximality, scipy's conditionals, recovery of a correlation."""

import numpy as np
import pytest
from scipy import optimize, stats

from alphabar.core.estimation import fit_correlation, fit_gaussian_mle, fit_gaussian_moments, pseudo_log_likelihood
from alphabar.core.mixture import GaussianMixture

PIXELS = [121, 137, 108, 149]
RNG = np.random.default_rng(2)
DATA = RNG.standard_normal((200, 3)) @ RNG.standard_normal((3, 3)) + [1.0, -2.0, 5.0]


def test_pixels_of_the_documents():  # S4-E51
    assert fit_gaussian_mle(PIXELS) == pytest.approx((128.75, 242.1875), abs=1e-12)
    assert np.sqrt(fit_gaussian_mle(PIXELS).covariance) == pytest.approx(15.5624, abs=5e-5)
    assert fit_gaussian_mle(PIXELS, unbiased=True).covariance == pytest.approx(322.9167, abs=5e-5)


def test_no_other_mean_and_deviation_has_a_larger_likelihood():  # S4-E52
    def likelihood(mean, var):
        return GaussianMixture([1], [[mean]], var).log_prob(np.array(PIXELS)[:, None]).sum()

    best = likelihood(*fit_gaussian_mle(PIXELS))
    grid = [likelihood(m, sd**2) for m in np.linspace(100, 160, 61) for sd in np.linspace(5, 40, 71)]
    assert best > max(grid) and best - max(grid) < 1e-3
    assert best > likelihood(*fit_gaussian_mle(PIXELS, unbiased=True))


def test_maximum_likelihood_of_vectors_and_its_bias():
    fit = fit_gaussian_mle(DATA)
    np.testing.assert_allclose(fit.covariance, np.cov(DATA.T, bias=True), rtol=1e-12)
    np.testing.assert_allclose(fit_gaussian_mle(DATA, unbiased=True).covariance, np.cov(DATA.T), rtol=1e-12)
    law = GaussianMixture([1], fit.mean[None], fit.covariance[None])
    best = law.log_prob(DATA).sum()
    for _ in range(20):
        other = fit.covariance + 0.01 * np.diag(RNG.uniform(-1, 1, 3))
        assert GaussianMixture([1], fit.mean[None] + 0.01 * RNG.standard_normal(3), other[None]).log_prob(DATA).sum() < best


@pytest.mark.parametrize("x", [PIXELS, DATA, DATA + 1e7], ids=["numbers", "vectors", "far from 0"])
def test_the_two_methods_agree(x):  # S4-C8
    (m, c), (m2, c2) = fit_gaussian_mle(x), fit_gaussian_moments(x)
    np.testing.assert_allclose(m2, m, rtol=1e-12)
    np.testing.assert_allclose(c2, c, rtol=1e-6 if np.max(np.abs(x)) > 1e6 else 1e-12)
    np.testing.assert_allclose(c2, np.cov(np.transpose(x), bias=True), rtol=1e-6)


def test_pseudo_likelihood_is_the_sum_of_the_conditionals():  # log p(x_i|x_rest) = log p(x) − log p(x_rest)
    mean, cov = fit_gaussian_mle(DATA)
    x = DATA[:20]
    joint = stats.multivariate_normal(mean, cov).logpdf(x)
    want = 0
    for i in range(3):
        rest = [j for j in range(3) if j != i]
        want = want + joint - stats.multivariate_normal(mean[rest], cov[np.ix_(rest, rest)]).logpdf(x[:, rest])
    np.testing.assert_allclose(pseudo_log_likelihood(x, mean, cov), want, rtol=1e-11)
    free = np.diag([1.0, 4.0, 9.0])  # independent elements: the likelihood itself
    np.testing.assert_allclose(pseudo_log_likelihood(x, mean, free), stats.multivariate_normal(mean, free).logpdf(x), rtol=1e-12)
    one = pseudo_log_likelihood(x[:, 0], 1.0, 2.0)
    np.testing.assert_allclose(one, stats.norm(1, np.sqrt(2)).logpdf(x[:, 0]), rtol=1e-12)


@pytest.mark.parametrize("rho", [-0.8, 0.1, 0.6])
def test_pseudo_likelihood_recovers_a_correlation(rho):
    cov = np.array([[1, rho], [rho, 1]])
    x = GaussianMixture([1], [[0.0, 0.0]], cov[None]).sample(100_000, seed=1)
    estimate = fit_correlation(x)
    assert abs(estimate.value - rho) < 4 * estimate.error

    def loss(r):
        return -pseudo_log_likelihood(x, 0, [[1, r], [r, 1]]).mean()

    best = optimize.minimize_scalar(loss, bounds=(-0.999, 0.999), method="bounded", options={"xatol": 1e-9}).x
    assert estimate.value == pytest.approx(best, abs=1e-6)


def test_the_correlations_error_is_its_spread():
    rho, n = 0.6, 500
    law = GaussianMixture([1], [[0.0, 0.0]], np.array([[[1, rho], [rho, 1]]]))
    fits = [fit_correlation(law.sample(n, seed=4, first_sample=k * n)) for k in range(400)]
    values, errors = np.transpose(fits)
    assert values.std() == pytest.approx(errors.mean(), rel=0.15)  # 400 draws: 3.5 % standard error
    assert abs(values.mean() - rho) < 4 * values.std() / 20


def test_wrong_arguments_are_named():
    cases = [
        (lambda: fit_gaussian_mle([]), "x must be"),
        (lambda: fit_gaussian_mle([1.0], unbiased=True), "n >= 2"),
        (lambda: fit_gaussian_moments(np.ones((2, 2, 2))), "x must be"),
        (lambda: fit_gaussian_mle([1.0, np.inf]), "x must be finite"),
        (lambda: pseudo_log_likelihood(DATA, 0, np.eye(2)), "covariance must have shape"),
        (lambda: pseudo_log_likelihood(DATA, 0, -np.eye(3)), "positive definite"),
        (lambda: fit_correlation(DATA), r"x must have shape \(n, 2\)"),
        (lambda: fit_correlation([[1.0, 1.0], [2.0, 2.0]]), "on a line"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
