"""What the documents say beside their equations: claims, remarks and formulas that have no other test. Comments give the ids."""

import inspect

import numpy as np
import pytest

from alphabar.core import (
    bound,
    convert,
    decoder,
    forward,
    guidance,
    losses,
    metrics,
    paper_tables,
    samplers,
    schedules,
    score_matching,
    tables,
    vq,
)
from alphabar.core.chain import chain
from alphabar.core.mixture import GaussianMixture

S = schedules.linear()
CLASSES = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.25)  # x0 | c ~ N(±1, ½²)


@pytest.fixture
def short():
    """A chain of six steps with much noise in each."""
    with np.errstate(all="ignore"), pytest.warns(UserWarning):
        return schedules.from_betas([0.05, 0.1, 0.2, 0.3, 0.4, 0.5])


def assert_moments(x, mean, var):
    """Of independent normal samples x, within 4 standard errors."""
    assert abs(x.mean() - mean) < 4 * np.sqrt(var / x.size)
    assert abs(x.var() - var) < 4 * var * np.sqrt(2 / x.size)


# ------------------------------------------------------------------------------------------------------------- forward process


def test_the_forward_process_has_no_parameters():  # S1-C1, S2-C7
    for f in (forward.q_step, forward.q_sample, forward.q_posterior, forward.ddim_posterior):
        known = {"x", "x0", "x_t", "t", "t_to", "s", "sigma", "seed", "eps", "step", "first_sample", "out", "eps_out"}
        assert set(inspect.signature(f).parameters) <= known
    for column in (S.beta, S.alpha, S.alpha_bar, S.signal, S.noise, S.beta_tilde):
        assert not column.flags.writeable
    assert {"output", "prediction"} <= set(inspect.signature(forward.p_mean_variance).parameters)  # the reverse one has a network


def test_the_posterior_is_bayes_rule_for_densities():  # S4-E11
    x0, x_t, x = np.random.default_rng(0).standard_normal((3, 5, 1))
    for t in (2, 10, 500, 1000):
        mean, var = forward.q_posterior(x0, x_t, t, S)
        step = decoder.gaussian_log_prob(x_t, np.sqrt(S.alpha[t]) * x, S.beta[t])
        before, now = (decoder.gaussian_log_prob(y, S.signal[k] * x0, S.noise_variance[k]) for y, k in ((x, t - 1), (x_t, t)))
        np.testing.assert_allclose(decoder.gaussian_log_prob(x, mean, var), step + before - now, rtol=1e-9, atol=1e-10)


def test_completing_the_square_gives_the_posterior():  # S4-E71
    t = np.arange(2, S.T + 1)
    precision = S.alpha[t] / S.beta[t] + 1 / S.noise_variance[t - 1]
    one, zero = np.ones((t.size, 1)), np.zeros((t.size, 1))
    on_x, var = forward.q_posterior(zero, one, t, S)
    on_x0, _ = forward.q_posterior(one, zero, t, S)
    np.testing.assert_allclose(var[:, 0], 1 / precision, rtol=1e-11)
    np.testing.assert_allclose(on_x[:, 0], np.sqrt(S.alpha[t]) / S.beta[t] / precision, rtol=1e-11)
    np.testing.assert_allclose(on_x0[:, 0], S.signal[t - 1] / S.noise_variance[t - 1] / precision, rtol=1e-11)


def test_the_gap_to_the_prior_closes_with_alpha_bar():  # S2-C8
    gaps = []
    for T in (50, 200, 500, 1000, 2000):
        beta = np.full(T, 0.01)
        with np.errstate(all="ignore"):
            s = schedules.Schedule(np.r_[0.0, beta])
        gaps.append((s.alpha_bar[-1], schedules.prior_gap(s).kl))
    left, kl = np.array(gaps).T
    assert np.all(np.diff(left) < 0) and np.all(np.diff(kl) < 0) and kl[-1] < 1e-8


@pytest.mark.parametrize("t", [2, 50, 900])
def test_the_two_fixed_variances_are_exact_for_normal_data_and_for_a_point(t):  # S1-C9, S3-C5, S4-E15
    levels = S.signal[t], S.noise[t], S.signal[t - 1], S.noise[t - 1]
    for law, variance in (
        (GaussianMixture([1.0], [[0.0]], 1.0), "beta"),
        (GaussianMixture([1.0], [[0.7]], 0.0), "posterior"),
    ):
        exact = law.reverse_conditional(np.array([[0.4]]), *levels).covariance[0, 0, 0]
        _, ours = forward.p_mean_variance(np.zeros((1, 1)), np.zeros((1, 1)), t, S, variance=variance)
        assert ours == pytest.approx(exact, rel=1e-9)


def test_card_is_ddpm_of_the_residuals():  # L6
    y0, y_t, f = np.random.default_rng(0).standard_normal((3, 4, 2))
    for t in (2, 10, 500, 1000):
        a, now, before = S.alpha[t], S.signal[t], S.signal[t - 1]
        rest = S.noise_variance[t]
        weights = (
            S.beta[t] * before / rest,
            S.noise_variance[t - 1] * np.sqrt(a) / rest,
            1 + (now - 1) * (np.sqrt(a) + before) / rest,
        )
        mean, var = forward.q_posterior(y0 - f, y_t - f, t, S)
        np.testing.assert_allclose(f + mean, weights[0] * y0 + weights[1] * y_t + weights[2] * f, rtol=1e-8, atol=1e-10)
        assert var == S.beta_tilde[t]
        noisy, eps = forward.q_sample(y0 - f, t, S, seed=1)
        np.testing.assert_allclose(f + noisy, now * y0 + (1 - now) * f + S.noise[t] * eps, rtol=1e-12, atol=1e-12)


def test_x42_the_prior_stands_once_in_the_model(short):  # S4-E7
    c = chain(short, grid=[6])
    x, wide = np.linspace(-9, 9, 361), np.linspace(-20, 20, 801)
    ends, starts = np.meshgrid(x, wide)
    path = np.stack([starts.reshape(-1, 1), ends.reshape(-1, 1)])
    density = np.exp(bound.path_log_prob(c, path, lambda x, t: 0.3 * x))
    prior = np.exp(c.prior_log_prob(path))
    h2 = (x[1] - x[0]) ** 2
    assert density.sum() * h2 == pytest.approx(1, abs=1e-9)
    assert np.sum(density * prior) * h2 == pytest.approx(0.2821, abs=5e-5)  # ∫p(x_T)², as printed


# ---------------------------------------------------------------------------------------------------------------------- losses


def test_the_eps_loss_is_denoising_score_matching():  # S0-C11, S1-C7, S1-C10, S1-C11
    x0, wrong = np.random.default_rng(0).standard_normal((2, 3, 8))
    for t in (1, 30, 500, 1000):
        x_t, eps = forward.q_sample(x0, t, S, seed=2)
        score, true = (convert.score_from_eps(e, t, S) for e in (wrong, eps))
        np.testing.assert_allclose(true, (S.signal[t] * x0 - x_t) / S.noise_variance[t], rtol=1e-8, atol=1e-8)
        value, _ = losses.simple_loss(wrong, eps)
        half, _ = score_matching.denoising(score, S.signal[t] * x0, x_t, S.noise[t])
        np.testing.assert_allclose(8 * value, 2 * S.noise_variance[t] * half, rtol=1e-9)
        if t > 1:  # the weight of the bound, as a weight on the score's error
            on_score = losses.eps_loss_weight(t, S) * S.noise_variance[t]
            assert on_score == pytest.approx(S.beta[t] ** 2 / (2 * S.beta_tilde[t] * S.alpha[t]), rel=1e-12)


def test_the_constant_of_another_reverse_variance():  # S1-E11, S4-E16
    x0, eps, wrong = np.random.default_rng(0).standard_normal((3, 2, 5))
    for t in (2, 50, 900):
        x_t, _ = forward.q_sample(x0, t, S, eps=eps)
        right, tilde = forward.q_posterior(x0, x_t, t, S)
        for variance in ("posterior", "beta"):
            model, var = forward.p_mean_variance(wrong, x_t, t, S, variance=variance)
            square = np.sum((right - model) ** 2, axis=1) / (2 * var)
            r = tilde / var
            constant = 0.5 * 5 * (r - 1 - np.log(r))
            np.testing.assert_allclose(losses.normal_kl(right, tilde, model, var), square + constant, rtol=1e-10)
            assert (constant == 0) == (variance == "posterior")


def test_the_surrogate_loss_is_linear_in_its_weights(short):  # S0-E45, S2-E5
    x0, eps = np.random.default_rng(0).standard_normal((2, 6, 4))
    t = np.arange(1, 7)
    x_t, _ = forward.q_sample(x0, t, short, eps=eps)
    output, gamma = 0.3 * x_t, np.array([0.5, 1.0, 2.0, 0.1, 3.0, 0.7])
    simple, slope = losses.simple_loss(output, eps)
    weighted, weighted_slope = losses.weighted_loss(output, eps, gamma)
    doubled, _ = losses.weighted_loss(output, eps, 2 * gamma)
    np.testing.assert_allclose(weighted, gamma * simple, rtol=1e-14)
    np.testing.assert_allclose(weighted_slope, gamma[:, None] * slope, rtol=1e-14)
    np.testing.assert_allclose(doubled.sum(), 2 * weighted.sum(), rtol=1e-14)
    ones, _ = losses.weighted_loss(output, eps, np.ones(6))
    assert ones.sum() == pytest.approx(6 * simple.mean(), rel=1e-14)  # γ = 1 is T times the mean over uniform t


def test_loss_weights_are_positive_and_change_no_variance():  # S2-C9, S0-C18, S2-C1
    t = np.arange(2, S.T + 1)
    x, zero = np.ones((t.size, 1)), np.zeros((t.size, 1))
    _, before = forward.p_mean_variance(zero, x, t, S)
    for eta in (0.1, 0.5, 1.0):
        gamma = losses.ddim_loss_weight(t, S, eta)
        assert gamma.shape == t.shape and np.all(gamma > 0)
        # a positive weight leaves the minimiser at each t where it is
        out = np.linspace(-1, 1, 41)[:, None]
        for k in (0, 500, 998):
            target = np.full_like(out, 0.35)
            plain, weighted = losses.simple_loss(out, target)[0], losses.weighted_loss(out, target, gamma[k])[0]
            assert plain.argmin() == weighted.argmin()
    assert np.all(losses.eps_loss_weight(t, S) > 0)
    _, after = forward.p_mean_variance(zero, x, t, S)
    assert np.array_equal(before, after) and np.array_equal(after[:, 0], S.beta_tilde[2:])


# ------------------------------------------------------------------------------------------------- DDIM: joint laws and kernels


@pytest.mark.parametrize("eta", [0.05, 0.5, 1.0])
def test_ddim_joint_samples_have_the_marginals(short, eta):  # S0-E40, S0-E42, S2-C2, S2-E6, S2-U2, S4-E34..E37
    x0 = np.full((20_000, 4), 0.8)
    path = chain(short, eta=eta).sample_path(x0, seed=3)
    assert np.array_equal(path[0], x0)
    for t in range(1, 7):
        assert_moments(path[t], short.signal[t] * 0.8, short.noise_variance[t])


def test_joint_samples_on_a_subsequence_have_the_marginals(short):  # S4-E44, S4-E45, S0-E48
    x0, tau = np.full((20_000, 4), 0.8), [2, 3, 6]
    path = chain(short, eta=0.4, grid=tau).sample_path(x0, seed=4)
    assert len(path) == 4  # x_0 is the point mass at τ_0 = 0
    for i, t in enumerate(tau, 1):
        assert_moments(path[i], short.signal[t] * 0.8, short.noise_variance[t])
    for t in {1, 2, 3, 4, 5, 6} - set(tau):  # the others are drawn from q(x_t|x_0)
        x_t, _ = forward.q_sample(x0, t, short, seed=4)
        assert_moments(x_t, short.signal[t] * 0.8, short.noise_variance[t])


def test_the_forward_kernel_is_bayes_rule_and_ddpm_at_eta_one(short):  # S2-E8, S2-C2
    x0, before, now = np.random.default_rng(0).standard_normal((3, 50, 1))
    log_prob = decoder.gaussian_log_prob
    for eta in (0.2, 0.7, 1.0):
        c = chain(short, eta=eta)
        for t in range(2, 7):
            mean, var = c.forward_kernel(x0, before, t)
            sigma = float(forward.ddim_sigma(t, t - 1, short, eta))
            back = log_prob(before, *forward.ddim_posterior(x0, now, t, t - 1, short, sigma))
            ends = [log_prob(x, short.signal[k] * x0, short.noise_variance[k]) for x, k in ((now, t), (before, t - 1))]
            np.testing.assert_allclose(log_prob(now, mean, var), back + ends[0] - ends[1], rtol=1e-10, atol=1e-10)
            if eta == 1:
                np.testing.assert_allclose(mean, np.sqrt(short.alpha[t]) * before, rtol=1e-12)
                assert var == pytest.approx(short.beta[t], rel=1e-12)


def test_only_the_forward_process_remembers(short):  # S2-C12, S2-C13, S2-C15
    before, t = np.array([[0.3]]), 4
    means = {}
    for eta in (0.5, 1.0):
        c = chain(short, eta=eta)
        means[eta] = [c.forward_kernel(np.array([[x0]]), before, t)[0][0, 0] for x0 in (-1.0, 1.0)]
    assert abs(means[0.5][0] - means[0.5][1]) > 0.1
    assert means[1.0][0] == pytest.approx(means[1.0][1], abs=1e-12)
    # σ = 0: x_{t−1} is an invertible function of x_t and x_0, so x_t follows from x_{t−1} and x_0 without noise
    x0 = np.array([[0.8]])
    value = [forward.ddim_posterior(x0, np.array([[x]]), t, t - 1, short, 0.0) for x in (0.0, 1.0)]
    slope = (value[1][0] - value[0][0])[0, 0]
    assert value[0][1] == 0 and slope == pytest.approx(short.noise[t - 1] / short.noise[t], rel=1e-12)
    # the generative chain: given x_t, what came before it does not matter
    table, seen = tables.ddim(short, grid=[3, 4, 6], eta=0.5), []

    def model(x, t):
        seen.append(x.copy())
        return 0.1 * x

    z = np.random.default_rng(0).standard_normal((3, 1, 1))
    whole = samplers.sample(model, table, np.array([[1.7]]), noise=z, trajectory=True)
    alone = samplers.sample(model, tables.ddim(short, grid=[3, 4], eta=0.5), whole[1], noise=z[1:], trajectory=True)
    np.testing.assert_array_equal(whole[1:], alone)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_ddim_step_is_the_posterior_at_the_predicted_data(eta):  # S2-A2, S2-E10, S4-E39
    tau = [1, 200, 700, 1000]
    table = tables.ddim(S, grid=tau, eta=eta)
    x, z = np.random.default_rng(0).standard_normal((5, 1)), np.random.default_rng(1).standard_normal((4, 5, 1))
    model = CLASSES.model(S)
    path = samplers.sample(model, table, x, noise=z, trajectory=True)
    steps = list(zip(reversed(tau), [*reversed(tau[:-1]), 0], strict=True))
    for i, (t, t_to) in enumerate(steps):
        x0 = convert.predict_x0_from_eps(path[i], model(path[i], np.full(5, t)), t, S)
        if t_to == 0:
            np.testing.assert_allclose(path[i + 1], x0, rtol=1e-10)
            continue
        sigma = float(forward.ddim_sigma(t, t_to, S, eta))
        mean, _ = forward.ddim_posterior(x0, path[i], t, t_to, S, sigma)
        np.testing.assert_allclose(path[i + 1], mean + sigma * z[i], rtol=1e-10, atol=1e-12)


def test_the_loss_sees_the_marginals_alone(short):  # S2-C11, S4-C6
    x0 = np.repeat(CLASSES.sample(4000, seed=1), 5, axis=0)

    def loss(x_t, t):
        eps = forward.predict_eps_from_x0(x_t, x0, t, short)
        return losses.simple_loss(0.6 * x_t, eps)[0]

    joint = {eta: chain(short, eta=eta).sample_path(x0, seed=int(10 * eta)) for eta in (0.1, 0.5, 1.0)}
    for t in range(1, 7):
        direct = loss(forward.q_sample(x0, t, short, seed=99)[0], t)
        for path in joint.values():
            other = loss(path[t], t)
            assert abs(other.mean() - direct.mean()) < 4 * np.hypot(other.std(), direct.std()) / np.sqrt(len(x0))
    correlations = [np.corrcoef(path[5, :, 0] - short.signal[5] * x0[:, 0], path[6, :, 0])[0, 1] for path in joint.values()]
    assert np.ptp(correlations) > 0.1  # the joint laws differ


# -------------------------------------------------------------------------------------------------------------------- guidance


def test_guidance_trades_diversity_for_fidelity():  # S0-C13, S3-C12
    t = 500
    law = CLASSES.diffuse(S.signal[t], S.noise[t])
    one = GaussianMixture([1.0], [[1.0]], 0.25).diffuse(S.signal[t], S.noise[t])
    x = np.linspace(-9, 9, 9001)[:, None]
    h = x[1, 0] - x[0, 0]
    eps_c, eps_u = (-S.noise[t] * p.score(x) for p in (one, law))
    chance = np.exp(np.log(0.5) + one.log_prob(x) - law.log_prob(x))  # p(c|x)
    variance, fidelity = [], []
    for w in (0, 1, 2, 4):
        score = convert.score_from_eps(guidance.classifier_free_eps(eps_c, eps_u, w), t, S)[:, 0]
        log_density = np.r_[0.0, np.cumsum((score[1:] + score[:-1]) / 2 * h)]
        density = np.exp(log_density - log_density.max())
        density /= density.sum() * h
        direct = np.exp(one.log_prob(x)) * chance**w
        np.testing.assert_allclose(density, direct / (direct.sum() * h), atol=1e-5)
        mean = np.sum(density * x[:, 0]) * h
        variance.append(np.sum(density * (x[:, 0] - mean) ** 2) * h)
        fidelity.append(np.sum(density * chance) * h)
    assert np.all(np.diff(variance) < 0) and np.all(np.diff(fidelity) > 0)
    np.testing.assert_allclose(variance, [0.941, 0.874, 0.818, 0.730], atol=1e-3)
    np.testing.assert_allclose([fidelity[0], fidelity[-1]], [0.539, 0.646], atol=1e-3)


def test_a_classifier_of_clean_data_misguides():  # S0-C14, S3-C10
    t, w, x = 500, 1.0, np.linspace(-2, 2, 41)[:, None]
    a, n = S.signal[t], S.noise[t]
    one, law = GaussianMixture([1.0], [[1.0]], 0.25), CLASSES
    noisy = one.diffuse(a, n).score(x) - law.diffuse(a, n).score(x)  # ∇ log p(c|x_t)
    clean = one.score(x) - law.score(x)  # the gradient of the classifier of clean data, asked at x_t
    eps = -n * one.diffuse(a, n).score(x)
    target = one.diffuse(a, n).score(x) + w * noisy
    right, wrong = (convert.score_from_eps(guidance.classifier_guided_eps(eps, g, t, S, w), t, S) for g in (noisy, clean))
    np.testing.assert_allclose(right, target, rtol=1e-9, atol=1e-9)
    assert np.max(np.abs(wrong - target)) > 5 * np.max(np.abs(noisy))


# --------------------------------------------------------------------------------------------------- tables, metrics, first stage


def test_what_the_slides_say_of_table_1_is_in_it():  # S2-T1, S2-C22, S3-C7
    assert paper_tables.FID_STEPS == (10, 20, 50, 100, 1000)
    for rows in paper_tables.DDIM_FID.values():
        fid = {name: np.array(row) for name, row in rows.items()}
        assert all(row.shape == (5,) and np.all(np.diff(row) < 0) for row in fid.values())  # more steps are better
        every = np.array(list(fid.values()))
        assert np.array_equal(fid["eta=0.0"][:4], every[:, :4].min(axis=0))  # η = 0 is the best up to S = 100
        assert fid["sigma_hat"][4] == every[:, 4].min()  # and σ̂ at S = 1000
        assert np.array_equal(fid["sigma_hat"][:4], every[:, :4].max(axis=0))
        assert fid["eta=1.0"][0] > 1.9 * fid["eta=0.0"][0]  # DDIM far better than DDPM with few steps
    cifar = dict(zip(paper_tables.FID_STEPS, paper_tables.DDIM_FID["CIFAR-10"]["eta=0.0"], strict=True))
    assert (cifar[50], cifar[100], cifar[1000]) == (4.67, 4.16, 4.04)


def test_reconstruction_errors_fall_with_the_steps():  # S2-T2
    quoted = list(paper_tables.DDIM_RECONSTRUCTION.values())
    assert list(paper_tables.DDIM_RECONSTRUCTION) == [10, 20, 50, 100, 200, 500, 1000] and np.all(np.diff(quoted) <= 0)
    x0, model, errors = CLASSES.sample(300, seed=2), CLASSES.model(S), []
    for steps in (10, 50, 200):
        code = samplers.sample(model, tables.ddim_encode(S, steps, "trailing"), x0)
        back = samplers.sample(model, tables.ddim(S, steps, spacing="trailing"), code)
        errors.append(metrics.per_dimension_mse(back, x0).mean())
    assert np.all(np.diff(errors) < 0) and errors[-1] < 1e-2 * errors[0]


def test_per_dimension_mse_is_the_mean_square():
    x, y = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    value = metrics.per_dimension_mse(x, y)
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, [np.mean((a.astype(float) - b) ** 2) for a, b in zip(x, y, strict=True)], rtol=1e-6)
    with pytest.raises(ValueError, match="one shape"):
        metrics.per_dimension_mse(x, y[:2])


def test_frechet_distance_of_normal_laws():  # S2-C18
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    for d in (1, 3, 8):
        m1, m2 = rng.standard_normal((2, d))
        c1, c2 = (a @ a.T for a in rng.standard_normal((2, d, d + 2)))
        want = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * np.real(linalg.sqrtm(c1 @ c2)))
        assert metrics.frechet_distance(m1, c1, m2, c2) == pytest.approx(want, rel=1e-10)
        assert metrics.frechet_distance(m2, c2, m1, c1) == pytest.approx(want, rel=1e-10)
        assert metrics.frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-12)
        assert metrics.frechet_distance(m1, c1, m2, 0 * c2) == pytest.approx(np.sum((m1 - m2) ** 2) + np.trace(c1), rel=1e-12)
    stds = np.array([[0.5, 2.0], [1.0, 0.3]])
    assert metrics.frechet_distance([0, 0], np.diag(stds[0] ** 2), [0, 0], np.diag(stds[1] ** 2)) == pytest.approx(
        np.sum((stds[0] - stds[1]) ** 2), rel=1e-12
    )
    x = rng.standard_normal((40_000, 2)) * stds[0]
    assert metrics.frechet_distance_of_samples(x, rng.standard_normal((40_000, 2)) * stds[1]) == pytest.approx(3.14, rel=0.03)
    with pytest.raises(ValueError, match="of one d"):
        metrics.frechet_distance([0.0], np.eye(1), [0.0, 0.0], np.eye(2))
    with pytest.raises(ValueError, match="n >= 2"):
        metrics.frechet_distance_of_samples(x, x[:1])


def test_the_cost_of_sampling_is_linear_in_the_steps():  # S2-C21, S2-F4: one call of the model a step, and nothing that grows
    steps, calls = (25, 50, 100, 200, 400), []
    for count in steps:
        asked = []
        samplers.sample(lambda x, t, asked=asked: asked.append(t) or 0.1 * x, tables.ddim(S, count), np.ones((2, 3)))
        calls.append(len(asked))
    line = metrics.fit_linear_cost(steps, calls)
    assert line.slope == pytest.approx(1, abs=1e-12) and line.intercept == pytest.approx(0, abs=1e-9) and line.r2 == 1
    x, y = np.random.default_rng(0).standard_normal((2, 30))
    slope, intercept = np.polyfit(x, y, 1)
    assert metrics.fit_linear_cost(x, y) == pytest.approx((intercept, slope, np.corrcoef(x, y)[0, 1] ** 2), rel=1e-9)
    for bad in (([10, 10], [1.0, 2.0]), ([10, 20], [1.0]), (10, 1.0)):
        with pytest.raises(ValueError, match="steps and cost"):
            metrics.fit_linear_cost(*bad)


def test_a_latent_space_has_48_times_fewer_numbers():  # S3-C8, S3-C9
    image = (512, 512, 3)
    latent = vq.latent_shape(image)
    assert latent == (64, 64, 4) and vq.compression(image, latent) == (48, 64, 4096)
    with pytest.raises(ValueError, match="factor must divide 30 and 32"):
        vq.latent_shape((30, 32, 3))
    x = np.random.default_rng(0).standard_normal((400, 4, 4, 1)) * 3

    def encode(x):  # a first stage without loss: 2×2 pixels in 4 channels
        return x.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 2, 2, 4)

    def decode(z):
        return z.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4, 1)

    space = vq.LatentSpace(encode, decode, scale=encode(x).std())
    z = space.to_latent(x)
    assert z.shape == (400, 2, 2, 4) and z.std() == pytest.approx(1, rel=1e-12)
    np.testing.assert_allclose(space.to_image(z), x, rtol=1e-12)
    with pytest.raises(ValueError, match="scale must be"):
        vq.LatentSpace(encode, decode, 0.0)


def test_codes_are_the_nearest_by_brute_force(monkeypatch):  # S3-C8, L3
    rng = np.random.default_rng(0)
    z, codebook = rng.standard_normal((3, 5, 4, 6)), rng.standard_normal((17, 6))
    near, codes = vq.vector_quantize(z, codebook)
    distances = np.sum((z[..., None, :] - codebook) ** 2, axis=-1)
    assert codes.dtype == np.int64 and np.array_equal(codes, distances.argmin(axis=-1))
    assert np.array_equal(near, codebook[codes])
    again, same = vq.vector_quantize(near, codebook)
    assert np.array_equal(again, near) and np.array_equal(same, codes)
    monkeypatch.setattr(vq, "BLOCK", 40)
    assert np.array_equal(vq.vector_quantize(z, codebook)[1], codes)
    with pytest.raises(ValueError, match="of one d"):
        vq.vector_quantize(z, codebook[:, :5])
    with pytest.raises(TypeError, match="one float dtype"):
        vq.vector_quantize(z, codebook.astype(np.float32))


@pytest.mark.parametrize("beta", [0.25, 1.0])
def test_the_gradients_of_the_vq_loss_are_those_of_torch(beta):  # S3-C8, L3
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    z, codebook, decoder_ = rng.standard_normal((4, 3, 2)), rng.standard_normal((5, 2)), rng.standard_normal((2, 2))
    near, codes = vq.vector_quantize(z, codebook)
    value, on_z, on_codes = vq.vq_loss(z, codebook, codes, beta)

    tz, te = torch.tensor(z, requires_grad=True), torch.tensor(codebook, requires_grad=True)
    chosen = te[torch.as_tensor(codes)]
    straight = tz + (chosen - tz).detach()
    target = torch.tensor(z) * 2 + 1
    reconstruction = ((straight @ torch.tensor(decoder_) - target) ** 2).mean()
    commit = ((tz.detach() - chosen) ** 2).mean() + beta * ((tz - chosen.detach()) ** 2).mean()
    (reconstruction + commit).backward()

    on_near = 2 / z.size * (near @ decoder_ - target.numpy()) @ decoder_.T  # of the decoder; straight through to z
    np.testing.assert_allclose(value.mean(), commit.item(), rtol=1e-12)
    np.testing.assert_allclose(on_near + on_z, tz.grad.numpy(), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(on_codes, te.grad.numpy(), rtol=1e-11, atol=1e-13)
    with pytest.raises(ValueError, match="beta must be"):
        vq.vq_loss(z, codebook, codes, -1.0)
    with pytest.raises(ValueError, match="codes must be integers of shape"):
        vq.vq_loss(z, codebook, codes[:2])
