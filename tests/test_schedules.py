"""Noise schedules: golden values, closed forms, the grids of times."""

import warnings
from fractions import Fraction

import numpy as np
import pytest

from alphabar.core import schedules

BUILDERS = {
    "linear": schedules.linear,
    "scaled_linear": schedules.scaled_linear,
    "sigmoid": schedules.sigmoid,
    "cosine": schedules.cosine,
    "sqrt": schedules.sqrt,
}


def test_linear_schedule_has_the_values_of_the_papers(linear):
    golden = {1: 0.9999, 2: 0.99978009, 100: 0.89701815, 250: 0.52408537, 500: 0.07858724, 750: 0.00335055, 1000: 4.03582977e-5}
    for t, value in golden.items():
        assert linear.alpha_bar[t] == pytest.approx(value, rel=2e-6)
    assert linear.beta_tilde[2] == pytest.approx(5.4531876e-5, rel=1e-7)
    assert linear.beta_tilde[1000] == pytest.approx(0.01999998, rel=1e-6)
    assert linear.beta[1] == 1e-4 and linear.beta[1000] == 0.02


@pytest.mark.parametrize("name", BUILDERS)
def test_columns_have_length_T_plus_1_and_begin_with_clean_data(name):
    s = BUILDERS[name]()
    assert s.T == 1000
    for column in (s.beta, s.alpha, s.alpha_bar, s.signal, s.noise, s.noise_variance, s.beta_tilde, s.sigma_bar):
        assert column.shape == (1001,) and column.dtype == np.float64 and not column.flags.writeable
    assert (s.beta[0], s.alpha[0], s.alpha_bar[0], s.signal[0], s.noise[0]) == (0, 1, 1, 1, 0)
    assert np.all(np.diff(s.alpha_bar) < 0) and np.all(np.diff(s.sigma_bar) > 0)
    np.testing.assert_allclose(s.signal**2 + s.noise**2, 1, atol=1e-15)
    np.testing.assert_allclose(s.beta_tilde[1:], (1 - s.alpha_bar[:-1]) / (1 - s.alpha_bar[1:]) * s.beta[1:], rtol=1e-10)
    assert np.all(s.beta_tilde[1:] < s.beta[1:]) and s.beta_tilde[1] == 0


def test_noise_variance_is_exact_where_one_minus_alpha_bar_is_not(linear):
    exact, product = [], Fraction(1)
    for beta in linear.beta[1:60]:
        product *= 1 - Fraction(beta)
        exact.append(float(1 - product))
    np.testing.assert_allclose(linear.noise_variance[1:60], exact, rtol=5e-16)
    assert np.max(np.abs((1 - linear.alpha_bar[1:60]) / exact - 1)) > 1e-14


def test_scaled_linear_and_sigmoid_follow_their_formulas():
    s = schedules.scaled_linear(T=1000, beta_start=0.00085, beta_end=0.012)
    np.testing.assert_allclose(np.diff(np.sqrt(s.beta[1:]), 2), 0, atol=1e-15)
    s = schedules.sigmoid()
    logit = np.log((s.beta[1:] - 1e-4) / (0.02 - s.beta[1:]))
    np.testing.assert_allclose(logit, np.linspace(-6, 6, 1000), atol=1e-9)


def test_cosine_follows_its_alpha_bar_until_beta_is_bounded():
    s = schedules.cosine()
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(s.alpha_bar[:-1], (f / f[0])[:-1], rtol=1e-9)
    assert s.beta[-1] == 0.999 and s.beta[1:-1].max() < 0.999


@pytest.mark.parametrize("T", [1, 2, 7, 1000, 2000])
def test_sqrt_follows_its_alpha_bar_until_beta_is_bounded(T):
    s = schedules.sqrt(T)
    formula = 1 - np.sqrt(np.arange(T + 1) / T + 1e-4)
    assert formula[-1] < 0 and s.beta[-1] == 0.999
    np.testing.assert_allclose(s.alpha_bar[1:-1], formula[1:-1], rtol=1e-10)
    assert s.alpha_bar[-1] == pytest.approx(0.001 * s.alpha_bar[-2]) and np.all(s.beta[1:-1] < 0.999)


def test_sqrt_where_the_formula_is_negative_ahead_of_the_end():
    s = schedules.sqrt(20, s=0.2)
    assert np.all(s.beta[16:] == 0.999) and np.all(s.beta[1:16] < 0.999) and np.all(np.diff(s.alpha_bar) < 0)
    for wrong in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="s must be in"):
            schedules.sqrt(20, s=wrong)


def test_prior_gap_is_the_kl_to_the_prior(linear):
    for x0, s in ((1.0, linear), (0.3, linear), (2.0, schedules.cosine())):
        m, v = s.signal[-1] * x0, 1 - s.alpha_bar[-1]
        z = np.linspace(-12, 12, 40001)
        p, q = (np.exp(-((z - u) ** 2) / (2 * w)) / np.sqrt(2 * np.pi * w) for u, w in ((m, v), (0, 1)))
        gap = schedules.prior_gap(s, second_moment=x0**2)
        assert gap.kl == pytest.approx(np.sum(p * np.log(p / q)) * (z[1] - z[0]), abs=1e-12)
        assert gap.bits == pytest.approx(gap.kl / np.log(2)) and gap.signal == s.signal[-1]
    assert schedules.prior_gap(linear).kl == pytest.approx(2.018e-5, rel=1e-3)


@pytest.mark.parametrize("T", [50, 100, 200])
def test_a_large_gap_to_the_prior_is_said_aloud(T):
    with pytest.warns(UserWarning, match=rf"alpha_bar\[{T}\] = 0\.\d+"):
        s = schedules.linear(T)
    assert s.alpha_bar[-1] > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rescaled = schedules.linear(T, rescale=True)
        schedules.linear()
        schedules.scaled_linear()
    np.testing.assert_allclose(rescaled.beta, s.beta * (1000 / T), rtol=1e-15)
    assert schedules.prior_gap(rescaled).kl < 1e-4


def test_the_warning_points_to_the_caller():
    for call in (lambda: schedules.linear(100), lambda: schedules.from_betas([0.1, 0.1])):
        with pytest.warns(UserWarning) as record:
            call()
        assert record[0].filename == __file__


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.2], [-0.1], [0.1, np.nan], [1.0, 0.1]])
def test_betas_outside_the_unit_interval_are_refused(betas):
    with pytest.raises(ValueError, match=r"beta must lie in \(0, 1\), but beta\["):
        schedules.from_betas(betas)


def test_bad_lengths_are_refused():
    for T, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="T must be"):
            schedules.linear(T)
    for bad in ([], 0.1, [[0.1, 0.1]]):
        with pytest.raises(ValueError, match="betas must be a list of T >= 1 values"):
            schedules.from_betas(bad)
    with pytest.raises(ValueError, match=r"beta must lie"):
        schedules.linear(10, rescale=True)  # 0.02 · 100 > 1


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_pure_noise():
    base = schedules.scaled_linear()
    s = schedules.zero_terminal_snr(base)
    assert s.alpha_bar[-1] == 0 and s.noise[-1] == 1 and np.isinf(s.sigma_bar[-1])
    assert s.signal[1] == pytest.approx(base.signal[1], rel=1e-14)
    ratio = (s.signal[1:-1]) / (base.signal[1:-1] - base.signal[-1])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


def test_levels_and_time_are_inverse_and_whole_times_are_exact(linear):
    a, n = linear.levels(np.arange(1001))
    assert np.array_equal(a, linear.signal) and np.array_equal(n, linear.noise)
    t = np.random.default_rng(0).uniform(0, 1000, 500)
    a, n = linear.levels(t)
    np.testing.assert_allclose(a**2 + n**2, 1, atol=1e-15)
    np.testing.assert_allclose(linear.time(n / a), t, rtol=1e-12)
    low = np.floor(t).astype(int)
    np.testing.assert_allclose(n / a, linear.sigma_bar[low] + (t - low) * np.diff(linear.sigma_bar)[low], rtol=1e-12)
    for bad in (-0.1, 1000.5, np.nan):
        with pytest.raises(ValueError, match=r"t must be in 0\.\.1000"):
            linear.levels(bad)
    with pytest.raises(ValueError, match="sigma must be"):
        linear.time(1e4)


# --------------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize("T", [1, 2, 7, 10, 37, 200, 1000])
def test_every_grid_is_a_strictly_ascending_subset_of_1_to_T(T, spacing):
    for steps in range(1, T + 1) if T < 1000 else (1, 2, 3, 16, 50, 300, 333, 400, 640, 799, 998, 999, 1000):
        tau = schedules.timesteps(T, steps, spacing)
        assert tau.shape == (steps,) and tau.dtype == np.int64
        assert tau[0] >= 1 and tau[-1] <= T and np.all(np.diff(tau) > 0), (steps, tau)
        if spacing in ("trailing", "quadratic") or (spacing == "linspace" and steps > 1):
            assert tau[-1] == T
        if steps == T:
            assert np.array_equal(tau, np.arange(1, T + 1))


def test_grids_follow_their_formulas():
    assert schedules.timesteps(10, 3, "leading").tolist() == [1, 4, 7]
    assert schedules.timesteps(10, 4, "linspace").tolist() == [1, 4, 7, 10]
    assert schedules.timesteps(10, 3, "trailing").tolist() == [3, 7, 10]
    for T, steps in ((1000, 50), (1000, 300), (20, 19)):
        tau, previous = schedules.timesteps(T, steps, "quadratic"), 0
        for i in range(1, steps + 1):
            previous = max(T * i * i // steps**2, previous + 1)
            assert tau[i - 1] == previous
    assert schedules.timesteps(3, 3).tolist() == [1, 2, 3]
    assert len(schedules.timesteps(1000)) == 50


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
def test_a_respaced_chain_keeps_the_marginals(linear, spacing):
    tau = schedules.timesteps(1000, 25, spacing)
    kept = np.r_[1.0, linear.alpha_bar[tau]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = schedules.from_betas(1 - kept[1:] / kept[:-1])
    np.testing.assert_allclose(s.alpha_bar, kept, rtol=1e-12)


def test_bad_grids_are_refused():
    for steps in (0, -1, 11):
        with pytest.raises(ValueError, match=r"steps must be in 1\.\.10 \(T\), not"):
            schedules.timesteps(10, steps)
    with pytest.raises(TypeError, match="steps must be an int"):
        schedules.timesteps(10, 2.0)
    with pytest.raises(ValueError, match="spacing must be one of"):
        schedules.timesteps(10, 2, "log")
