"""The problems of the study note, P1 to P12, each computed through the package."""

import numpy as np
import pytest
from scipy import stats

from alphabar.core import bound, forward, losses, schedules, tables
from alphabar.core import score_matching as sm
from alphabar.core.chain import chain
from alphabar.core.mixture import GaussianMixture

LAW = GaussianMixture([0.4, 0.6], [[-1.5], [1.0]], [0.5, 0.8])
S = schedules.linear()
THETAS = ((0.3, -0.5), (1.1, -0.9), (-0.7, 0.2))


def model(theta, x):
    """(s(x), s'(x)) of s = tanh(a·x) + b·x, for x (N, 1)."""
    a, b = theta
    return np.tanh(a * x) + b * x, (a / np.cosh(a * x) ** 2 + b)[:, 0]


def line(low, high, n):
    """Nodes (n, 1) and weights (n,) of the trapezoid rule."""
    x = np.linspace(low, high, n)
    w = np.full(n, x[1] - x[0])
    w[[0, -1]] /= 2
    return x[:, None], w


def test_p01_implicit_score_matching_is_explicit_up_to_a_constant():  # S0-E3, S0-E4
    def gaps(low, high):
        x, w = line(low, high, 56001)
        w = w * np.exp(LAW.log_prob(x))
        target = LAW.score(x)
        return [w @ sm.explicit(model(th, x)[0], target)[0] - w @ sm.implicit(*model(th, x))[0] for th in THETAS]

    x, w = line(-14, 14, 56001)
    constant = sm.fisher_divergence(0 * x, LAW.score(x), w * np.exp(LAW.log_prob(x)))  # ½E‖∇log p‖²
    assert constant == pytest.approx(0.44607791, abs=5e-9)
    np.testing.assert_allclose(gaps(-14, 14), constant, atol=1e-10)
    # without the boundary condition (p·s does not vanish at the ends of [−1, 0.5]) the difference depends on θ, by −[p·s]
    cut = gaps(-1.0, 0.5)
    assert np.ptp(cut) > 0.1
    ends = np.array([[-1.0], [0.5]])
    flux = [np.diff(np.exp(LAW.log_prob(ends)) * model(th, ends)[0][:, 0])[0] for th in THETAS]
    assert np.ptp(np.add(cut, flux)) < 1e-7


@pytest.mark.parametrize("law", ["normal", "rademacher"])
def test_p02_sliced_score_matching_has_the_expectation_of_implicit(law):  # S0-E5, S4-E60
    n, rng = 400_000, np.random.default_rng(1)
    J, s = rng.standard_normal((5, 5)), rng.standard_normal(5)
    v = sm.projections((n, 5), seed=2, law=law, dtype=np.float64)
    score = np.broadcast_to(s, v.shape)
    (exact,), _, _ = sm.implicit(s[None], np.array([np.trace(J)]))
    for reduced in (True, False):
        value, _, _ = sm.sliced(score, v @ J.T, v, variance_reduced=reduced)
        assert abs(value.mean() - exact) < 4 * value.std() / np.sqrt(n)
    along = (v @ s) ** 2
    assert abs(along.mean() - s @ s) < 4 * along.std() / np.sqrt(n)


def test_p03_denoising_score_matching_is_explicit_on_the_noised_density_up_to_a_constant():  # S0-E12, S0-E13
    sigma = 0.7
    noised = LAW.convolve(sigma)
    x, w = line(-14, 14, 28001)
    w = w * np.exp(noised.log_prob(x))
    constant = 0.5 * (1 / sigma**2 - w @ noised.score(x)[:, 0] ** 2)
    assert constant == pytest.approx(0.790210, abs=5e-7)
    x0, w0 = line(-7, 7, 701)
    eps, we = line(-6.5, 6.5, 301)
    both = np.outer(w0 * np.exp(LAW.log_prob(x0)), we * stats.norm.pdf(eps[:, 0])).reshape(-1)
    clean, eps = np.repeat(x0, len(eps), axis=0), np.tile(eps, (len(x0), 1))
    noisy, _ = sm.perturb(clean, sigma, eps=eps)
    for theta in THETAS:
        explicit = sm.fisher_divergence(model(theta, x)[0], noised.score(x), w)
        denoising = both @ sm.denoising(model(theta, noisy)[0], clean, noisy, sigma)[0]
        assert denoising - explicit == pytest.approx(constant, abs=1e-7)


def test_p04_steps_compose_to_the_closed_form():
    mean, std = 1.0, 0.0
    for k in range(1, S.T + 1):
        mean, std = forward.merge_noise((mean, std), (np.sqrt(S.alpha[k]), np.sqrt(S.beta[k])))
        assert abs(mean - S.signal[k]) < 1e-12 and abs(std - S.noise[k]) < 1e-12


def test_p05_unit_variance_stays():
    unit = np.eye(2)
    v = 1.0
    for k in range(1, S.T + 1):
        x_t, _ = forward.q_step(unit[:1] * np.sqrt(v), k, S, eps=unit[1:])
        v = np.sum(x_t**2)
        assert abs(v - 1) < 1e-12


def test_p06_the_negative_log_likelihood_is_below_the_bound(three_states):  # S0-E21
    """Enumerated: T = 3 steps over three states; equal where p_θ(x_{1:T}|x_0) is q(x_{1:T}|x_0)."""
    c = three_states
    x0, x3 = c.paths[0], c.paths[3]
    q = c.q0[x0] * c.forward().prod(axis=0)

    def both(prior, log_p):
        p = prior[x3] * np.exp(log_p).prod(axis=0)
        marginal = np.bincount(x0, p)
        return -c.q0 @ np.log(marginal), q @ bound.vlb_markov_form(np.log(prior[x3]), log_p, np.log(c.forward()))

    nll, vlb = both(c.prior, np.log(c.reverse()))
    assert nll == pytest.approx(1.215190, abs=5e-7) and vlb == pytest.approx(1.825070, abs=5e-7)
    rng = np.random.default_rng(5)
    for _ in range(20):
        P = rng.dirichlet(np.ones(3), (4, 3))
        nll, vlb = both(c.prior, np.log([P[t][c.paths[t], c.paths[t - 1]] for t in (1, 2, 3)]))
        assert nll < vlb
    # the joint q(x_{0:T}) written backwards: p(x_3) = q(x_3), p(x_{t−1}|x_t) = q(x_{t−1}|x_t)
    marginals = [c.q0 @ c.Qbar[t] for t in range(4)]
    backward = [
        marginals[t - 1][c.paths[t - 1]] * c.Q[t][c.paths[t - 1], c.paths[t]] / marginals[t][c.paths[t]] for t in (1, 2, 3)
    ]
    nll, vlb = both(marginals[3], np.log(backward))
    assert vlb == pytest.approx(nll, abs=1e-12) and nll == pytest.approx(-c.q0 @ np.log(c.q0), abs=1e-12)


def test_p07_the_two_forms_of_the_bound_agree_path_by_path():  # S0-E22, S0-E23
    """200 paths of T = 20 steps drawn by q(x_t|x_{t−1}), under a p_θ whose means and variances are arbitrary."""
    s = schedules.Schedule(np.r_[0.0, np.linspace(0.01, 0.2, 20)])
    c = chain(s, variance=0.0121 * np.arange(2, 21), decoder_variance=0.0121)
    rng = np.random.default_rng(7)
    path = [rng.standard_normal((200, 2))]
    for t in range(1, 21):
        path.append(forward.q_step(path[-1], t, s, eps=rng.standard_normal((200, 2)))[0])
    path = np.stack(path)
    log_p = c.reverse_log_probs(path, lambda x, t: np.sin(2 * x) + 0.1 * t[:, None])
    log_prior, log_q = c.prior_log_prob(path), c.forward_log_probs(path)
    for t in (1, 7, 20):
        law = stats.norm(np.sqrt(s.alpha[t]) * path[t - 1], np.sqrt(s.beta[t]))
        np.testing.assert_allclose(log_q[t - 1], law.logpdf(path[t]).sum(axis=1), rtol=1e-9)
    markov = bound.vlb_markov_form(log_prior, log_p, log_q)
    posterior = bound.vlb_posterior_form(log_prior, c.end_log_prob(path), log_p, c.posterior_log_probs(path))
    assert np.ptp(markov) > 10
    np.testing.assert_allclose(posterior, markov, rtol=0, atol=1e-9)


def test_p08_posterior_is_gaussian_conditioning():
    k = np.arange(2, S.T + 1)
    v, al, be = S.noise_variance[k - 1], S.alpha[k], S.beta[k]
    gain = np.sqrt(al) * v / (al * v + be)
    zero, one = np.zeros((k.size, 1)), np.ones((k.size, 1))
    on_x, var = forward.q_posterior(zero, one, k, S)
    on_x0, _ = forward.q_posterior(one, zero, k, S)
    np.testing.assert_allclose(on_x[:, 0], gain, rtol=1e-12)
    np.testing.assert_allclose(on_x0[:, 0], S.signal[k - 1] - gain * S.signal[k], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(var[:, 0], v - gain * np.sqrt(al) * v, rtol=1e-9, atol=1e-15)


def test_p09_the_score_is_minus_the_expected_noise_over_its_level():  # S0-P9
    s, t = schedules.linear(), 500
    a, n = s.signal[t], s.noise[t]
    x_t, h = np.array([[-1.2], [0.1], [0.9]]), 1e-5
    noised = LAW.diffuse(a, n)
    slope = (noised.log_prob(x_t + h) - noised.log_prob(x_t - h)) / (2 * h)
    x0, w = line(-14, 14, 28001)
    joint = w * np.exp(LAW.log_prob(x0)) * stats.norm(a * x0[:, 0], n).pdf(x_t)  # (3, N)
    expected = np.sum(joint * (x_t - a * x0[:, 0]) / n, axis=1) / joint.sum(axis=1)  # E[ε|x_t]
    np.testing.assert_allclose(-expected / n, slope, atol=1e-9)
    eps = LAW.model(s)(x_t, np.full(3, t))
    np.testing.assert_allclose(eps[:, 0], expected, rtol=1e-10)
    np.testing.assert_allclose(forward.score_from_eps(eps, t, s), noised.score(x_t), rtol=1e-12)


def test_p10_ddim_keeps_the_marginals_for_any_sigma():
    rng = np.random.default_rng(3)
    mean, var = S.signal[-1], S.noise_variance[-1]
    for k in range(S.T, 1, -1):
        sigma = S.noise[k - 1] * np.sqrt(rng.random())
        on_x, on_x0 = (
            forward.ddim_posterior(np.array([x0]), np.array([x]), k, k - 1, S, sigma)[0][0] for x0, x in ((0.0, 1.0), (1.0, mean))
        )
        mean, var = on_x0, on_x**2 * var + sigma**2
        assert abs(mean - S.signal[k - 1]) < 1e-9 and abs(var - S.noise_variance[k - 1]) < 1e-9


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.1])
def test_p11_the_bound_is_a_weighted_simple_loss(eta):
    """KL(q_σ ‖ p_θ) at t is γ_t·‖ε − ε_θ‖², γ_t > 0."""
    x0, eps, wrong = np.random.default_rng(1).standard_normal((3, 1, 4))
    assert np.all(losses.ddim_loss_weight(np.arange(2, S.T + 1), S, eta) > 0)
    for k in (2, 3, 50, 500, 1000):
        sigma = float(forward.ddim_sigma(k, k - 1, S, eta))
        x_t, _ = forward.q_sample(x0, k, S, eps=eps)
        guess = forward.predict_x0_from_eps(x_t, wrong, k, S)
        means = [forward.ddim_posterior(x, x_t, k, k - 1, S, sigma)[0] for x in (x0, guess)]
        kl = losses.normal_kl(means[0], sigma**2, means[1], sigma**2)[0]
        assert losses.ddim_loss_weight(k, S, eta) * np.sum((eps - wrong) ** 2) == pytest.approx(kl, rel=1e-8)
    if eta == 1.0:
        k = np.arange(2, S.T + 1)
        np.testing.assert_allclose(losses.ddim_loss_weight(k, S), losses.eps_loss_weight(k, S), rtol=1e-8)
        assert losses.ddim_loss_weight(500, S) == pytest.approx(5.5082e-3, rel=1e-4)
    with pytest.raises(ValueError, match="eta must be in"):
        losses.ddim_loss_weight(5, S, 0.0)


def test_p12_ddim_at_eta_one_has_the_coefficients_of_ddpm():
    rows = tables.ddim(S, 1000, 1.0).rows()[:-1]
    k = np.arange(S.T, 1, -1)
    np.testing.assert_allclose(rows[:, 2], 1 / np.sqrt(S.alpha[k]), rtol=1e-9)
    np.testing.assert_allclose(rows[:, 4], -S.beta[k] / np.sqrt(S.alpha[k] * S.noise_variance[k]), rtol=1e-9)
    np.testing.assert_allclose(rows[:, 9], np.sqrt(S.beta_tilde[k]), rtol=1e-9)
