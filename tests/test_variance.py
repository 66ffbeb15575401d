"""Learned variance: its range, its loss against PyTorch and differences, sampling with it; importance sampling, P2 weights."""

import numpy as np
import pytest

from alphabar.core import forward, losses, samplers, schedules, tables, variance
from alphabar.core.decoder import discrete_log_prob, gaussian_log_prob
from alphabar.core.sde import VPSDE

RNG = np.random.default_rng(0)
S = schedules.linear(50, rescale=True)


# ------------------------------------------------------------------------------------------------------------------------ range


def test_the_range_runs_from_posterior_to_beta():
    low, high = variance.variance_range(S)
    np.testing.assert_allclose(np.exp(low[2:]), S.beta_tilde[2:], rtol=1e-12)
    np.testing.assert_allclose(np.exp(high[1:]), S.beta[1:], rtol=1e-12)
    assert low[1] == low[2] and low[0] == high[0] == 0  # ln β̃_1 = −∞ is clipped to ln β̃_2
    v, t = RNG.standard_normal((3, 4, 4, 2)), np.array([1, 7, 50])
    for ends, column in ((0.0, low), (1.0, high)):
        np.testing.assert_allclose(variance.range_log_variance(0 * v + ends, t, S)[:, 0, 0, 0], column[t], rtol=1e-12)
    middle = variance.range_log_variance(0 * v + 0.5, 7, S)
    np.testing.assert_allclose(np.exp(middle), np.sqrt(S.beta[7] * S.beta_tilde[7]), rtol=1e-12)
    np.testing.assert_allclose(
        variance.range_log_variance(v, t, S), np.exp(0) * (v.T * high[t] + (1 - v.T) * low[t]).T, rtol=1e-12
    )


def test_a_sub_sequence_has_the_range_of_its_own_steps():
    grid = np.array([2, 10, 31, 50])
    low, high = variance.variance_range(S, grid)
    respaced = schedules.from_betas(1 - S.alpha_bar[grid] / np.r_[1.0, S.alpha_bar[grid[:-1]]])
    np.testing.assert_allclose(np.exp(high[1:]), respaced.beta[1:], rtol=1e-10)
    np.testing.assert_allclose(np.exp(low[2:]), respaced.beta_tilde[2:], rtol=1e-10)
    low, high = variance.variance_range(schedules.geometric(0.1, 5.0, 10))
    assert np.all(low[2:] < high[2:])
    single, upper = variance.variance_range(S, [20])
    assert single[1] == upper[1]
    with pytest.raises(ValueError, match="grid must ascend"):
        variance.variance_range(S, [3, 2])
    with pytest.raises(ValueError, match="grid must be given"):
        variance.variance_range(VPSDE())


# ------------------------------------------------------------------------------------------------------------------------- loss


def example(prediction, t, channels=2):
    """(output, target, x0, x_t, t): 8-bit data, among them the two ends of the range, and an answer that is wrong by a little."""
    t = np.asarray(t)
    u = RNG.integers(0, 256, (len(t), 3, 3, channels)).astype(np.uint8)
    u[:, 0, 0, 0], u[:, 0, 1, 0] = 0, 255
    x0 = 2 * u / 255 - 1
    x_t, eps = forward.q_sample(x0, t, S, seed=1)
    target = forward.training_target(x0, eps, t, S, prediction)
    wrong = target * (1 + 0.1 * RNG.standard_normal(target.shape)) + 0.05 * RNG.standard_normal(target.shape)
    return np.concatenate([wrong, RNG.uniform(-0.2, 1.2, target.shape)], axis=-1), target, x0, x_t, t


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("discrete", [False, True])
def test_the_bound_is_the_kl_of_the_two_gaussians(prediction, discrete):
    """Against the posterior, the general KL and the decoders, computed apart."""
    output, target, x0, x_t, t = example(prediction, [1, 2, 7, 30, 50, 1])
    value, _ = variance.vlb_loss(output, target, t, S, prediction, x0 if discrete else None)
    answer, v = variance.split(output)
    low, high = variance.variance_range(S)
    for i, time in enumerate(t):
        here = slice(i, i + 1)
        log_var = v[here] * high[time] + (1 - v[here]) * low[time]
        x0_hat = forward.convert(answer[here], x_t[here], int(time), S, prediction, "x0")
        mean, var = forward.q_posterior(x0_hat, x_t[here], int(time), S)
        if time == 1:
            log_prob = discrete_log_prob if discrete else gaussian_log_prob
            want = -log_prob(x0[here], x0_hat, np.exp(log_var))
        else:
            true, var = forward.q_posterior(x0[here], x_t[here], int(time), S)
            want = losses.normal_kl(true, np.full_like(true, var), mean, np.exp(log_var))
        np.testing.assert_allclose(value[i], want[0] / x0[0].size, rtol=1e-8)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("hybrid", [False, True])
def test_gradients_are_those_of_torch(discrete, hybrid):
    torch = pytest.importorskip("torch")
    t = [1, 1, 2, 20, 50]
    output, target, x0, _, t = example("eps", t)
    weight = RNG.uniform(0.5, 2, len(t))
    simple_weight = RNG.uniform(0.5, 2, len(t))
    data = x0 if discrete else None
    if hybrid:
        value, gradient = variance.hybrid_loss(output, target, t, S, "eps", data, weight, simple_weight, lam=0.01)
    else:
        value, gradient = variance.vlb_loss(output, target, t, S, "eps", data, weight)

    out = torch.tensor(output, requires_grad=True)
    goal, clean = torch.tensor(target), torch.tensor(x0)
    eps, v = out.chunk(2, dim=-1)
    columns = {k: torch.tensor(a[t]).reshape(-1, 1, 1, 1) for k, a in zip("lh", variance.variance_range(S), strict=True)}
    log_var = v * columns["h"] + (1 - v) * columns["l"]
    # μ̃ − μ_θ = β/(√α·√(1−ᾱ))·(ε_θ − ε), from 1/√α·(x − β/√(1−ᾱ)·ε)
    k = torch.tensor((S.beta / np.sqrt(S.alpha))[t] / S.noise[t]).reshape(-1, 1, 1, 1)
    delta = k * ((eps.detach() if hybrid else eps) - goal)
    kl = 0.5 * (-1 + log_var - columns["l"] + torch.exp(columns["l"] - log_var) + delta**2 * torch.exp(-log_var))
    if discrete:
        mean, std = clean - delta, torch.exp(0.5 * log_var)
        cdf = torch.distributions.Normal(0.0, 1.0).cdf
        high = torch.where(clean > 0.999, torch.ones_like(clean), cdf((clean + 1 / 255 - mean) / std))
        low_p = torch.where(clean < -0.999, torch.zeros_like(clean), cdf((clean - 1 / 255 - mean) / std))
        nll = -torch.log(high - low_p)
    else:
        nll = 0.5 * (delta**2 * torch.exp(-log_var) + log_var + np.log(2 * np.pi))
    bound = torch.where(torch.tensor(t == 1).reshape(-1, 1, 1, 1), nll, kl).mean(dim=(1, 2, 3)) * torch.tensor(weight)
    if hybrid:
        square = ((eps - goal) ** 2).mean(dim=(1, 2, 3)) * torch.tensor(weight * simple_weight)
        bound = square + 0.01 * S.T * bound
    bound.mean().backward()
    np.testing.assert_allclose(value, bound.detach().numpy(), rtol=1e-9)
    np.testing.assert_allclose(gradient, out.grad.numpy(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_gradients_are_the_slopes_of_the_value(prediction):
    output, target, x0, _, t = example(prediction, [1, 2, 9, 50])
    for data in (None, x0):
        _, gradient = variance.vlb_loss(output, target, t, S, prediction, data)
        direction = RNG.standard_normal(output.shape) * np.repeat([1e-3, 1.0], 2)
        h = 1e-5

        def mean(step, data=data, direction=direction):
            return variance.vlb_loss(output + step * direction, target, t, S, prediction, data)[0].mean()

        slope = (mean(h) - mean(-h)) / (2 * h)
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-6)
        _, stopped = variance.vlb_loss(output, target, t, S, prediction, data, stop_mean=True)
        assert not stopped[..., :2].any() and np.array_equal(stopped[..., 2:], gradient[..., 2:])


def test_the_hybrid_loss_keeps_the_bound_away_from_the_mean():
    output, target, x0, _, t = example("eps", [1, 5, 40])
    value, gradient = variance.hybrid_loss(output, target, t, S, "eps", x0, lam=1e-3)
    simple, of_mean = losses.simple_loss(output[..., :2], target)
    bound, of_both = variance.vlb_loss(output, target, t, S, "eps", x0)
    np.testing.assert_allclose(value, simple + 1e-3 * S.T * bound, rtol=1e-12)
    assert np.array_equal(gradient[..., :2], of_mean)
    np.testing.assert_allclose(gradient[..., 2:], 1e-3 * S.T * of_both[..., 2:], rtol=1e-12)
    without, _ = variance.hybrid_loss(output, target, t, S, lam=0.0)
    np.testing.assert_array_equal(without, simple)


def test_descent_on_v_finds_the_best_variance():
    """At a fixed error of the mean the loss is least where Σ = β̃ + δ², and at t = 1 (density) where Σ = δ²."""
    t, offset = np.array([1, 10, 30]), 0.05
    target = RNG.standard_normal((3, 2, 2, 1))
    k = (S.beta / np.sqrt(S.alpha))[t] / S.noise[t]
    want = np.log(np.r_[0.0, S.beta_tilde[2:]][t - 1] * (t > 1) + (k * offset) ** 2)
    low, high = variance.variance_range(S)
    v = (want - low[t]) / (high - low)[t]
    output = np.concatenate([target + offset, np.broadcast_to(v.reshape(3, 1, 1, 1), target.shape)], axis=-1)
    _, gradient = variance.vlb_loss(output, target, t, S)
    scale = np.abs(high - low)[t].max()
    assert np.abs(gradient[..., 1:]).max() < 1e-12 * scale


def test_a_loss_takes_arrays_of_torch_and_float32_and_names_mistakes():
    torch = pytest.importorskip("torch")
    output, target, x0, _, t = example("eps", [1, 2, 30])
    small = [v.astype(np.float32) for v in (output, target, x0)]
    value, gradient = variance.hybrid_loss(
        *map(torch.from_numpy, small[:2]), torch.from_numpy(t), S, x0=torch.from_numpy(small[2])
    )
    want, slope = variance.hybrid_loss(output, target, t, S, x0=x0)
    assert isinstance(value, torch.Tensor) and gradient.dtype == torch.float32
    np.testing.assert_allclose(value.numpy(), want, rtol=2e-5)
    np.testing.assert_allclose(gradient.numpy(), slope, rtol=2e-3, atol=1e-6)
    assert variance.vlb_loss(output[:1], target[:1], 3, S)[0].shape == (1,)
    for words, arguments in (
        ("half of the channels", (output, target[..., :1], t, S)),
        ("the prediction and v", (output[..., :3], target, t, S)),
        (r"t must be in 1\.\.50", (output, target, np.array([0, 1, 2]), S)),
        ("x0 has shape", (output, target, t, S, "eps", x0[:1])),
        ("weight must be a number", (output, target, t, S, "eps", None, np.ones(2))),
    ):
        with pytest.raises(ValueError, match=words):
            variance.vlb_loss(*arguments)


def test_p2_weights_are_their_formula_in_every_prediction():
    t = np.array([1, 10, 50])
    snr = S.alpha_bar[t] / S.noise_variance[t]
    np.testing.assert_allclose(losses.p2_weight(t, S, 1.0, 0.5), 1 / np.sqrt(1 + snr), rtol=1e-12)
    assert np.array_equal(losses.p2_weight(t, S, gamma=0.0), np.ones(3)) and isinstance(losses.p2_weight(4, S), float)
    # one loss: the squared errors of ε, x0 and v of the same answer differ by 1/SNR and by (1 + SNR)/SNR
    x0 = RNG.standard_normal((3, 5))
    x_t, eps = forward.q_sample(x0, t, S, seed=3)
    answer = eps + 0.1
    loss = {}
    for kind in ("eps", "x0", "v"):
        output = forward.convert(answer, x_t, t, S, "eps", kind)
        target = forward.training_target(x0, eps, t, S, kind)
        loss[kind] = losses.weighted_loss(output, target, losses.p2_weight(t, S, prediction=kind))[0]
    np.testing.assert_allclose(loss["x0"], loss["eps"], rtol=1e-9)
    np.testing.assert_allclose(loss["v"], loss["eps"], rtol=1e-9)
    with pytest.raises(ValueError, match="prediction must be one of"):
        losses.p2_weight(t, S, prediction="score")
    with pytest.raises(ValueError, match="k must be positive"):
        losses.p2_weight(t, S, k=0.0)


# --------------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("clip", [None, (-0.7, 0.7)])
def test_the_ends_of_the_range_are_the_two_ddpm_samplers(clip):
    x = samplers.prior((3, 4, 2), seed=1, dtype=np.float64)

    def model(v):
        return lambda x, t: np.concatenate([0.8 * x, np.full_like(x, v)], axis=-1)

    for v, name in ((0.0, "posterior"), (1.0, "beta")):
        for s, steps in ((S, 7), (S, 50), (schedules.geometric(0.05, 3.0, 12), 5)):
            want = samplers.sample(lambda x, t: 0.8 * x, tables.ddpm(s, steps, name), x, seed=5, first_sample=2, clip=clip)
            got = variance.sample_learned(model(v), s, x, steps, seed=5, first_sample=2, clip=clip)
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    rows = RNG.standard_normal((7, 3, 4, 2))
    want = samplers.sample(lambda x, t: 0.8 * x, tables.ddpm(S, 7, "beta"), x, noise=rows)
    np.testing.assert_allclose(variance.sample_learned(model(1.0), S, x, 7, noise=rows), want, rtol=1e-9)


def test_each_element_has_its_own_variance_and_guidance_shifts_by_it():
    x = np.zeros((4000, 1, 2))
    v = np.array([0.2, 1.4])
    low, high = variance.variance_range(S, [10, 30])

    def model(x, t):
        return np.concatenate([0 * x, np.broadcast_to(v, x.shape)], axis=-1)

    table = tables.ddpm(S, grid=[10, 30])
    last = table.A[1] + table.B0[1] / table.signal[1]  # with ε = 0, x0 is x/a
    out = variance.sample_learned(model, S, x, grid=[10, 30], seed=2) / last
    want = v * high[2] + (1 - v) * low[2]
    np.testing.assert_allclose(np.log(out.var(axis=(0, 1))), want, atol=4 * np.sqrt(2 / 4000))
    shifted = variance.sample_learned(model, S, x, grid=[10, 30], seed=2, guidance=lambda x, t: 0 * x + 3.0) / last
    np.testing.assert_allclose(shifted - out, np.broadcast_to(3.0 * np.exp(want), x.shape), rtol=1e-9)
    with pytest.raises(ValueError, match="model must return the prediction and v"):
        variance.sample_learned(lambda x, t: x, S, x, 4)


def test_sampling_with_torch_models():
    torch = pytest.importorskip("torch")
    x = samplers.prior((2, 3, 3, 1), seed=1, dtype=np.float64)
    got = variance.sample_learned(lambda x, t: torch.cat([0.5 * x, x.tanh()], -1), S, torch.from_numpy(x), 5, seed=3)
    want = variance.sample_learned(lambda x, t: np.concatenate([0.5 * x, np.tanh(x)], -1), S, x, 5, seed=3)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------------- which times


def test_times_are_uniform_until_every_time_has_its_history():
    times = variance.ImportanceTimes(8, history=2)
    for step in range(3):
        t, weight = times.times(50, seed=4, step=step)
        assert np.array_equal(t, forward.random_times(50, schedules.from_betas(np.full(8, 0.5)), 4, step))
        assert np.array_equal(weight, np.ones(50))
    for _ in range(2):
        assert not times.warm
        times.update(np.arange(1, 9), np.arange(1.0, 9.0))
    assert times.warm


def test_probabilities_follow_the_second_moment_of_the_last_losses():
    times = variance.ImportanceTimes(3, history=2, uniform=0.1)
    times.update(np.array([1, 1, 1, 2, 3, 3, 2]), np.array([9.0, 3.0, 4.0, -1.0, 2.0, 2.0, 7.0]))
    assert np.array_equal(times.losses, [[3, 4], [-1, 7], [2, 2]])  # the 9 is forgotten
    root = np.sqrt([12.5, 25.0, 4.0])
    np.testing.assert_allclose(times.probabilities, 0.9 * root / root.sum() + 0.1 / 3, rtol=1e-12)


def test_drawn_times_have_their_probabilities_and_weights_undo_them():
    times = variance.ImportanceTimes(20, history=1)
    loss = RNG.uniform(0.1, 5, 20)
    times.update(np.arange(1, 21), loss)
    n = 40_000
    t, weight = times.times(n, seed=1)
    assert t.dtype == np.int64 and (t.min(), t.max()) == (1, 20)
    p, share = times.probabilities, np.bincount(t, minlength=21)[1:] / n
    assert np.all(np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / n))
    weighted = weight * loss[t - 1]
    assert abs(weighted.mean() - loss.mean()) < 4 * weighted.std() / np.sqrt(n)
    assert weighted.std() < 0.01 * loss.std()  # with p ∝ |L| the weighted losses are all alike


def test_a_resumed_history_goes_on_as_the_unbroken_one():
    whole, first = variance.ImportanceTimes(5, 3), variance.ImportanceTimes(5, 3)

    def go(times, steps):
        for k in steps:
            t, _ = times.times(8, seed=7, step=k)
            times.update(t, np.sin(t + k) + 1)

    go(whole, range(20))
    go(first, range(12))
    saved = {k: v.copy() for k, v in first.state().items()}
    go(first, range(12, 14))  # the saved state is a copy
    again = variance.ImportanceTimes(5, 3)
    again.load_state(saved)
    go(again, range(12, 20))
    assert whole.warm and all(np.array_equal(whole.state()[k], again.state()[k]) for k in saved)
    with pytest.raises(ValueError, match="losses is"):
        variance.ImportanceTimes(6, 3).load_state(saved)
    with pytest.raises(ValueError, match=r"counts must be in 0\.\.3"):
        again.load_state({**saved, "counts": saved["counts"] + 9})
    for words, arguments in (
        (r"t must be in 1\.\.5", ([6], [1.0])),
        ("losses must be finite", ([1], [np.nan])),
        ("both have shape", ([1, 2], [1.0])),
    ):
        with pytest.raises(ValueError, match=words):
            whole.update(np.array(arguments[0]), np.array(arguments[1]))
