"""The forward process: closed forms, moments, the algebra of predictions, and arrays of other libraries."""

import itertools

import numpy as np
import pytest

from alphabar.core import forward, interpolate, schedules
from alphabar.core.convert import PREDICTIONS, coefficients

RNG = np.random.default_rng(0)
X0, EPS = RNG.standard_normal((2, 6, 3, 2))


# ------------------------------------------------------------------------------------------------------------------ sampling q


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_q_sample_mixes_signal_and_noise(linear, dtype):
    x0, eps = X0.astype(dtype), EPS.astype(dtype)
    t = np.array([1, 10, 250, 500, 999, 1000])
    x_t, back = forward.q_sample(x0, t, linear, eps=eps)
    a, n = linear.signal[t][:, None, None], linear.noise[t][:, None, None]
    assert x_t.dtype == dtype and np.array_equal(back, eps)
    np.testing.assert_allclose(x_t, a * x0 + n * eps, rtol=1e-6 if dtype == np.float32 else 1e-14, atol=1e-6)
    one, _ = forward.q_sample(x0, 500, linear, eps=eps)
    np.testing.assert_array_equal(one[3], x_t[3])
    same, _ = forward.q_sample(x0, 0, linear, eps=eps)
    np.testing.assert_array_equal(same, x0)


def test_q_sample_draws_by_seed_step_and_sample(linear):
    x0 = np.zeros((8, 5), np.float32)
    x_t, eps = forward.q_sample(x0, 700, linear, seed=3)
    np.testing.assert_allclose(x_t, np.float32(linear.noise[700]) * eps, rtol=1e-6)
    again, _ = forward.q_sample(x0, 700, linear, seed=3)
    assert np.array_equal(again, x_t)
    split = [forward.q_sample(x0[k : k + 1], 700, linear, seed=3, first_sample=k)[1] for k in range(8)]
    assert np.array_equal(np.concatenate(split), eps)
    for change in ({"seed": 4}, {"seed": 3, "step": 1}, {"seed": 3, "first_sample": 8}):
        assert not np.any(forward.q_sample(x0, 700, linear, **change)[1] == eps)


def test_moments_of_q_sample_and_q_step(linear):
    x = np.full((400, 500), 0.7)
    for t in (1, 300, 1000):
        for (x_t, _), mean, var in (
            (forward.q_sample(x, t, linear, seed=1), linear.signal[t] * 0.7, 1 - linear.alpha_bar[t]),
            (forward.q_step(x, t, linear, seed=1), np.sqrt(1 - linear.beta[t]) * 0.7, linear.beta[t]),
        ):
            assert abs(x_t.mean() - mean) < 4 * np.sqrt(var / x.size)
            assert abs(x_t.var() - var) < 4 * var * np.sqrt(2 / x.size)


def test_a_chain_of_steps_ends_in_the_closed_form_marginal():
    with pytest.warns(UserWarning):
        s = schedules.linear(40)
    x = np.full((300, 200), 1.5)
    for t in range(1, 41):
        x, _ = forward.q_step(x, t, s, seed=5)
    mean, var = s.signal[40] * 1.5, 1 - s.alpha_bar[40]
    assert abs(x.mean() - mean) < 4 * np.sqrt(var / x.size)
    assert abs(x.var() - var) < 4 * var * np.sqrt(2 / x.size)


def test_times_are_checked(linear):
    for t in (-1, 1001, [0, 0, 0, 0, 0, 1001]):
        with pytest.raises(ValueError, match=r"t must be in 0\.\.1000"):
            forward.q_sample(X0, t, linear)
    with pytest.raises(ValueError, match=r"t must be in 1\.\.1000, not 0"):
        forward.q_posterior(X0, X0, 0, linear)
    with pytest.raises(TypeError, match="integers"):
        forward.q_sample(X0, 3.5, linear)
    with pytest.raises(ValueError, match="shape"):
        forward.q_sample(X0, [1, 2], linear)
    with pytest.raises(TypeError, match="x0"):
        forward.q_sample(np.arange(6), 3, linear)


def test_random_times_cover_1_to_T_evenly(linear):
    t = forward.random_times(200_000, linear, seed=2, step=9)
    assert t.dtype == np.int64 and t.min() == 1 and t.max() == 1000
    counts = np.bincount((t - 1) // 100, minlength=10)
    assert np.sum((counts - 20_000) ** 2 / 20_000) < 30  # χ² with 9 degrees of freedom
    assert np.array_equal(t[:10], forward.random_times(10, linear, seed=2, step=9))
    assert not np.array_equal(t[:10], forward.random_times(10, linear, seed=2, step=10))


# ------------------------------------------------------------------------------------------------------------------ posteriors


def test_posterior_and_its_eps_form_agree_for_the_true_noise(linear):
    for t in (1, 2, 10, 500, 1000):
        x_t, _ = forward.q_sample(X0, t, linear, eps=EPS)
        mean, var = forward.q_posterior(X0, x_t, t, linear)
        assert isinstance(var, float) and var == linear.beta_tilde[t]
        np.testing.assert_allclose(forward.posterior_mean_from_eps(x_t, EPS, t, linear), mean, rtol=1e-10, atol=1e-12)
        for prediction in PREDICTIONS:
            output = forward.training_target(X0, EPS, t, linear, prediction)
            got, var = forward.p_mean_variance(output, x_t, t, linear, prediction, variance="beta")
            np.testing.assert_allclose(got, mean, rtol=1e-10, atol=1e-12)
            assert var == linear.beta[t]
    assert forward.q_posterior(X0, X0, 1, linear)[1] == 0
    np.testing.assert_allclose(forward.q_posterior(X0, X0 + 5, 1, linear)[0], X0, rtol=1e-12)


def test_posterior_times_may_differ_by_sample(linear):
    t = np.array([1, 2, 3, 400, 700, 1000])
    mean, var = forward.q_posterior(X0, EPS, t, linear)
    assert var.shape == (6, 1, 1)
    for k in range(6):
        one, v = forward.q_posterior(X0[k : k + 1], EPS[k : k + 1], int(t[k]), linear)
        np.testing.assert_array_equal(mean[k : k + 1], one)
        assert var[k, 0, 0] == v


def test_p_mean_variance_clips_the_predicted_data(linear):
    x_t, _ = forward.q_sample(3 * X0, 300, linear, eps=EPS)
    got, _ = forward.p_mean_variance(EPS, x_t, 300, linear, clip=(-1, 1))
    want, _ = forward.q_posterior(np.clip(3 * X0, -1, 1), x_t, 300, linear)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    with pytest.raises(ValueError, match="variance must be"):
        forward.p_mean_variance(EPS, x_t, 300, linear, variance="learned")


def test_ddim_sigma_at_eta_one_is_the_posterior_deviation(linear):
    t = np.arange(2, 1001)
    np.testing.assert_allclose(forward.ddim_sigma(t, t - 1, linear), np.sqrt(linear.beta_tilde[2:]), rtol=1e-10)
    np.testing.assert_allclose(forward.ddim_sigma(t, t - 1, linear, 0.3), 0.3 * np.sqrt(linear.beta_tilde[2:]), rtol=1e-10)
    np.testing.assert_allclose(forward.ddim_sigma_hat(t, t - 1, linear), np.sqrt(linear.beta[2:]), rtol=1e-10)
    assert np.all(forward.ddim_sigma_hat(t, t // 2, linear) > forward.ddim_sigma(t, t // 2, linear))


def test_ddim_posterior_states_its_bound(linear):
    mean, var = forward.ddim_posterior(X0, EPS, 500, 480, linear, 0.1)
    assert mean.shape == X0.shape and var == pytest.approx(0.01)
    for sigma in (-0.1, 1.0):
        with pytest.raises(ValueError, match="sigma must be in 0"):
            forward.ddim_posterior(X0, EPS, 500, 480, linear, sigma)


# ----------------------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_every_prediction_converts_to_every_other(linear, source, target):
    for t in (1, 30, 500, 1000, np.array([1, 7, 80, 300, 800, 1000])):
        x_t, _ = forward.q_sample(X0, t, linear, eps=EPS)
        have, want = (forward.training_target(X0, EPS, t, linear, kind) for kind in (source, target))
        np.testing.assert_allclose(forward.convert(have, x_t, t, linear, source, target), want, rtol=1e-9, atol=1e-9)


def test_conversions_at_the_ends():
    s = schedules.zero_terminal_snr(schedules.scaled_linear())
    # all noise: v = −x0 and ε = x; ε alone says nothing about x0
    np.testing.assert_array_equal(forward.convert(-X0, EPS, 1000, s, "v", "x0"), X0)
    np.testing.assert_array_equal(forward.convert(-X0, EPS, 1000, s, "v", "eps"), EPS)
    np.testing.assert_array_equal(forward.convert(X0, EPS, 1000, s, "x0", "eps"), EPS)
    np.testing.assert_array_equal(forward.convert(X0, EPS, 1000, s, "x0", "v"), -X0)
    for source in ("eps", "score"):
        with pytest.raises(ValueError, match=f"x0 cannot be found from {source} where the signal level is 0"):
            forward.convert(EPS, EPS, 1000, s, source, "x0")
    # clean data: v = ε and x0 = x
    for source in ("eps", "v", "x0"):
        np.testing.assert_array_equal(forward.convert(X0 if source == "x0" else EPS, X0, 0, s, source, "x0"), X0)
    np.testing.assert_array_equal(forward.convert(EPS, X0, 0, s, "v", "eps"), EPS)
    with pytest.raises(ValueError, match="eps cannot be found from x0 where the noise level is 0"):
        forward.predict_eps_from_x0(X0, X0, 0, s)
    with pytest.raises(ValueError, match="score does not exist"):
        forward.score_from_eps(EPS, 0, s)
    with pytest.raises(ValueError, match=r"t must be in 1\.\.999"):
        forward.posterior_mean_from_eps(X0, EPS, 1000, s)
    with pytest.raises(ValueError, match="source must be one of"):
        coefficients("noise", "x0", 0.5, 0.5)


def test_score_is_the_gradient_of_the_log_density(linear, mixture):
    data = mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.4])
    x, h = np.linspace(-2, 2, 41), 1e-5
    for t in (5, 200, 900):
        a, n = linear.levels(t)
        slope = (np.log(data.density(x + h, a, n)) - np.log(data.density(x - h, a, n))) / (2 * h)
        eps = data.eps(x, a, n)
        np.testing.assert_allclose(forward.score_from_eps(eps, t, linear), slope, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(forward.eps_from_score(slope, t, linear), eps, rtol=1e-6, atol=1e-6)


def test_merged_noise_has_the_variance_of_both(linear):
    for t in (2, 500, 1000):
        steps = [(float(np.sqrt(linear.alpha[k])), float(np.sqrt(linear.beta[k]))) for k in (t - 1, t)]
        a, n = forward.merge_noise(*steps)
        assert a**2 == pytest.approx(linear.alpha[t] * linear.alpha[t - 1], rel=1e-14)
        assert n**2 == pytest.approx(1 - linear.alpha[t] * linear.alpha[t - 1], rel=1e-12)


# ---------------------------------------------------------------------------------------------------- arrays of other libraries


def test_torch_tensors_come_back_as_torch_tensors(linear):
    torch = pytest.importorskip("torch")
    x0, eps = torch.from_numpy(X0.copy()), torch.from_numpy(EPS.copy())
    t = torch.tensor([1, 2, 3, 400, 700, 1000])
    x_t, back = forward.q_sample(x0, t, linear, eps=eps)
    assert isinstance(x_t, torch.Tensor) and x_t.dtype == torch.float64 and torch.equal(back, eps)
    want, _ = forward.q_sample(X0, t.numpy(), linear, eps=EPS)
    np.testing.assert_array_equal(x_t.numpy(), want)
    mean, var = forward.q_posterior(x0, x_t, t, linear)
    assert isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor) and var.shape == (6, 1, 1)
    np.testing.assert_array_equal(mean.numpy(), forward.q_posterior(X0, want, t.numpy(), linear)[0])
    assert isinstance(forward.convert(eps, x_t, 5, linear, "eps", "v"), torch.Tensor)
    assert isinstance(interpolate.slerp(x0, eps, 0.3), torch.Tensor)
    drawn, noise = forward.q_sample(x0.float(), 10, linear, seed=1)
    assert drawn.dtype == torch.float32 and noise.dtype == torch.float32
    with pytest.raises(TypeError, match="detach"):
        forward.q_sample(x0.requires_grad_(), 10, linear)


def test_the_answer_is_of_the_kind_of_the_data_not_of_the_times(linear):
    torch = pytest.importorskip("torch")
    t = torch.tensor([1, 2, 3, 400, 700, 1000])
    for times in (t, t[3]):
        x_t, eps = forward.q_sample(X0, times, linear, eps=torch.from_numpy(EPS))
        mean, _ = forward.q_posterior(x_t=x_t, x0=X0, t=times, s=linear)
        assert all(type(a) is np.ndarray for a in (x_t, eps, mean))
        np.testing.assert_array_equal(x_t, forward.q_sample(X0, np.asarray(times), linear, eps=EPS)[0])
        assert isinstance(forward.q_sample(torch.from_numpy(X0), np.asarray(times), linear)[0], torch.Tensor)


def test_wrong_data_and_schedules_are_named(linear):
    for f, name in ((forward.q_sample, "x0"), (forward.q_step, "x")):
        for bad in ([[1.0, 2.0]], 1.0, None):
            with pytest.raises(TypeError, match=rf"{name} must be an array, not"):
                f(bad, 5, linear)
        with pytest.raises(ValueError, match="batch axis"):
            f(np.array(1.0), 5, linear)
        with pytest.raises(TypeError, match="t must be an int"):
            f(X0, None, linear)
        for bad in (None, 1000):
            with pytest.raises(TypeError, match="s must be a Schedule"):
                f(X0, 5, bad)
    with pytest.raises(TypeError, match="x0 must be an array, not list"):
        forward.q_posterior([1.0], [2.0], 5, linear)
    with pytest.raises(TypeError, match="s must be a Schedule"):
        forward.q_posterior(X0, X0, 5, s=None)


# ------------------------------------------------------------------------------------------------------------------------ slerp


def test_slerp_keeps_the_norm_and_meets_its_ends():
    x, y = RNG.standard_normal((2, 5, 40))
    y *= (np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))[:, None]
    for weight in np.linspace(0, 1, 11):
        z = interpolate.slerp(x, y, weight)
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), np.linalg.norm(x, axis=1), rtol=1e-12)
        angle = np.arccos((x * z).sum(1) / (x * x).sum(1).clip(1e-300))
        whole = np.arccos((x * y).sum(1) / (x * x).sum(1))
        np.testing.assert_allclose(angle, weight * whole, atol=1e-6)
    np.testing.assert_allclose(interpolate.slerp(x, y, 0.0), x, atol=1e-12)
    np.testing.assert_allclose(interpolate.slerp(x, y, 1.0), y, atol=1e-12)


def test_slerp_works_sample_by_sample():
    x, y = RNG.standard_normal((2, 6, 4, 3)).astype(np.float32)
    weights = np.linspace(0, 1, 6)
    together = interpolate.slerp(x, y, weights)
    assert together.dtype == np.float32
    for k in range(6):
        np.testing.assert_array_equal(together[k], interpolate.slerp(x[k : k + 1], y[k : k + 1], weights[k])[0])
    scaled = interpolate.slerp(np.concatenate([x, 100 * x]), np.concatenate([y, y]), 0.4)
    np.testing.assert_array_equal(scaled[:6], interpolate.slerp(x, y, 0.4))  # one sample's length is no matter of another


def test_slerp_of_parallel_opposite_and_zero_vectors_is_linear():
    x = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    y = np.array([[1.0, 2.0], [3.0, 6.0], [-1.0, -2.0], [1.0, 1.0]])
    np.testing.assert_allclose(interpolate.slerp(x, y, 0.25), 0.75 * x + 0.25 * y, rtol=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        interpolate.slerp(x, y[:2], 0.5)
    with pytest.raises(ValueError, match="weight"):
        interpolate.slerp(x, y, [0.1, 0.2])
