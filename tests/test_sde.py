"""VE, VP and sub-VP: marginals against integration, precision near clean data, limits of the discrete chains, refusals."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

from alphabar.core import schedules
from alphabar.core.sde import VESDE, VPSDE, SubVPSDE

PROCESSES = [VESDE(), VPSDE(), SubVPSDE(), VESDE(0.1, 20, T=7), VPSDE(0.5, 8, T=1000), SubVPSDE(0, 12, T=3), VPSDE(3, 3)]


@pytest.fixture(params=PROCESSES, ids=repr)
def s(request):
    return request.param


def test_marginals_are_those_of_the_moment_equations(s):
    """Eq: S4-E64. da/dt = f·a and d(n²)/dt = 2f·n² + g², integrated; at t = T this is L5."""

    def moments(t, y):
        return [s.drift_factor(t) * y[0], 2 * s.drift_factor(t) * y[1] + s.diffusion(t) ** 2]

    t = np.linspace(0, s.T, 9)[1:]
    found = solve_ivp(moments, (0, s.T), [1.0, 0.0], "DOP853", t, rtol=1e-13, atol=1e-16)
    a, n = s.levels(t)
    np.testing.assert_allclose(a, found.y[0], rtol=1e-10)
    np.testing.assert_allclose(n**2, found.y[1], rtol=1e-10)
    assert s.prior_std == pytest.approx(n[-1] if isinstance(s, VESDE) else 1.0)


def test_steps_compose_and_add_what_the_diffusion_adds(s):
    """v(t, r) = ∫_r^t (a_t/a_u)²·g²(u) du, and two steps are one."""
    r, u, t = 0.15 * s.T, 0.4 * s.T, 0.9 * s.T
    a = {v: s.levels(v)[0] for v in (r, u, t)}
    want, _ = quad(lambda v: (a[t] / s.levels(v)[0] * s.diffusion(v)) ** 2, r, t, epsabs=0, epsrel=1e-12)
    assert s.step_variance(t, r) == pytest.approx(want, rel=1e-10)
    both = s.step_variance(t, u) + (a[t] / a[u]) ** 2 * s.step_variance(u, r)
    assert s.step_variance(t, r) == pytest.approx(both, rel=1e-12)
    assert s.step_variance(t, 0) == pytest.approx(s.levels(t)[1] ** 2, rel=1e-13)


@pytest.mark.parametrize("t", [1e-15, 1e-9, 1e-5, 1e-3, 0.1, 1.0])
def test_levels_keep_every_digit_near_clean_data(t):
    with localcontext() as context:
        context.prec = 60
        u, low, high = (Decimal(v) for v in (t, 0.1, 20.0))
        low_sigma = Decimal.from_float(0.01)
        B = u * (low + (high - low) / 2 * u)
        kept = (-B).exp()
        ratio = Decimal(50) / low_sigma
        ve = low_sigma * ((2 * u * ratio.ln()).exp() - 1).sqrt()
        wanted = {
            VPSDE(): (kept.sqrt(), (1 - kept).sqrt()),
            SubVPSDE(): (kept.sqrt(), 1 - kept),
            VESDE(): (Decimal(1), ve),
        }
    for process, (signal, noise) in wanted.items():
        a, n = process.levels(t)
        assert a == pytest.approx(float(signal), rel=5e-15) and n == pytest.approx(float(noise), rel=5e-15)
        assert process.time(process.sigma_bar_at(t)) == pytest.approx(t, rel=2e-14)


def test_time_is_the_inverse_of_the_noise_level(s):
    t = np.r_[0, np.geomspace(1e-6, 1, 50)] * s.T
    np.testing.assert_allclose(s.time(s.sigma_bar_at(t)), t, rtol=1e-12)
    assert s.time(s.sigma_bar_at(s.T)) == s.T and s.time(0) == 0
    for wrong in (-1e-9, 1.001 * s.sigma_bar_at(s.T), np.nan):
        with pytest.raises(ValueError, match="sigma must be in 0"):
            s.time(wrong)


@pytest.mark.parametrize("N", [100, 1000])
def test_vp_is_the_limit_of_ddpm(N):
    """Eq: S0-C10, S4-C19. β_i = β(i/N)/N; the error at t = ½ is O(1/N) (T7: 1.05e-2 and 1.06e-3)."""
    beta = (0.1 + 19.9 * np.arange(1, N + 1) / N) / N
    v = 0.0
    for b in beta[: N // 2]:
        v = (1 - b) * v + b
    error = abs(v - VPSDE().levels(0.5)[1] ** 2)
    assert error == pytest.approx({100: 1.05e-2, 1000: 1.06e-3}[N], rel=0.01)


def test_vp_in_the_unit_of_1000_steps_is_the_linear_schedule(linear):
    s, t = VPSDE(T=1000), np.array([1, 10, 100, 500, 900, 1000])
    assert s.beta(1000) == pytest.approx(linear.beta[-1]) and s.beta(0) == pytest.approx(linear.beta[1])
    np.testing.assert_allclose(s.levels(t)[0] ** 2, linear.alpha_bar[t], rtol=0.12)
    np.testing.assert_allclose(s.levels(t)[1], linear.noise[t], rtol=0.05)
    errors = []
    for k in (20, 40):
        fine = schedules.from_betas(np.linspace(0.1, 20, 1000 * k) / (1000 * k))
        errors.append(np.abs(fine.noise[k * t] / s.levels(t)[1] - 1).max())
    assert errors[1] < 2e-3 and errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_another_unit_of_time_is_the_same_process():
    t = np.linspace(0, 1, 11)
    for kind in (VESDE, VPSDE, SubVPSDE):
        one, many = kind(), kind(T=1000)
        np.testing.assert_allclose(one.levels(t), many.levels(1000 * t), rtol=1e-13)
        np.testing.assert_allclose(one.drift_factor(t) / 1000, many.drift_factor(1000 * t), rtol=1e-13)
        np.testing.assert_allclose(one.diffusion(t) / np.sqrt(1000), many.diffusion(1000 * t), rtol=1e-13)
        assert many.t_min == pytest.approx(1000 * one.t_min)


def test_dx_is_lambda_to_the_t_dw():
    """Eq: S4-E64. Var x(t) − Var x(0) = (λ^{2t} − 1)/(2 ln λ)."""
    lam = 25.0
    s, t = VESDE(1 / np.sqrt(2 * np.log(lam)), lam / np.sqrt(2 * np.log(lam))), np.linspace(0, 1, 6)
    np.testing.assert_allclose(s.diffusion(t), lam**t, rtol=1e-13)
    np.testing.assert_allclose(s.levels(t)[1] ** 2, (lam ** (2 * t) - 1) / (2 * np.log(lam)), rtol=1e-13)
    np.testing.assert_allclose(s.levels(t)[1] ** 2, s.sigma(t) ** 2 - s.sigma(0) ** 2, rtol=1e-12)


def test_the_priors_are_near_the_laws_at_the_end():
    """Eq: S4-E65. KL(p_T ‖ prior) of N(0, 1) data per dimension, in closed form."""
    for s in (VESDE(), VPSDE(), SubVPSDE()):
        a, n = s.levels(s.T)
        ratio = (a**2 + n**2) / s.prior_std**2
        assert 0 <= 0.5 * (ratio - 1 - np.log(ratio)) < 1e-6
    assert VESDE().prior_std == pytest.approx(np.sqrt(50.0**2 - 0.01**2), rel=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_times_lie_between_t_min_and_T(s, steps):
    low, T = s.t_min, s.T
    k = np.arange(1, steps + 1)
    wanted = {
        "leading": low + (T - low) * (k - 1) / steps,
        "linspace": np.linspace(low, T, steps),
        "trailing": low + (T - low) * k / steps,
        "quadratic": low + (T - low) * (k / steps) ** 2,
    }
    for spacing, want in wanted.items():
        got = s.times(steps, spacing)
        np.testing.assert_allclose(got, want, rtol=1e-12)
        assert np.all(np.diff(got) > 0) and low <= got[0] and got[-1] <= T
    assert s.times(steps, "trailing")[-1] == T and s.times(steps, "leading")[0] == low


def test_the_defaults_are_those_of_the_paper():
    assert (VPSDE().beta_min, VPSDE().beta_max, VPSDE().t_min, VPSDE().T) == (0.1, 20.0, 1e-3, 1.0)
    assert SubVPSDE().t_min == 1e-3 and VESDE().t_min == 1e-5 and VPSDE(T=1000).t_min == 1
    assert repr(VPSDE(T=1000)) == "VPSDE(beta_min=0.1, beta_max=20.0, T=1000)" and VESDE() == VESDE(0.01, 50.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_drift_takes_a_time_for_each_sample(s, dtype):
    torch = pytest.importorskip("torch")
    x, t = np.arange(12, dtype=dtype).reshape(3, 2, 2) - 5, np.array([0.1, 0.5, 1.0]) * s.T
    got = s.drift(x, t)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, x * s.drift_factor(t)[:, None, None], rtol=1e-6)
    assert np.array_equal(s.drift(x, 0.5 * s.T)[1], got[1])
    foreign = s.drift(torch.from_numpy(x), torch.from_numpy(t))
    assert isinstance(foreign, torch.Tensor) and np.array_equal(foreign.numpy(), got)


def test_wrong_arguments_are_named(s):
    for t in (-0.1, 1.01 * s.T, np.nan):
        with pytest.raises(ValueError, match="t must be in 0"):
            s.levels(t)
    with pytest.raises(TypeError, match="x must be a float array"):
        s.drift([1.0], 0.1)
    with pytest.raises(ValueError, match=r"t must be a number or have shape \(3,\)"):
        s.drift(np.ones((3, 2)), np.zeros(2))
    with pytest.raises(ValueError, match="spacing must be one of"):
        s.times(3, "even")
    for steps, error in ((0, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="steps must be"):
            s.times(steps, "leading")


@pytest.mark.parametrize(
    ("kind", "arguments", "name"),
    [
        (VESDE, {"sigma_min": 0}, "sigma_min"),
        (VESDE, {"sigma_min": 2, "sigma_max": 2}, "sigma_max"),
        (VESDE, {"T": 0}, "T"),
        (VPSDE, {"beta_min": -1}, "beta_min"),
        (VPSDE, {"beta_min": 0, "beta_max": 0}, "beta_max"),
        (SubVPSDE, {"beta_min": 3, "beta_max": 1}, "beta_max"),
        (SubVPSDE, {"T": np.inf}, "T"),
    ],
)
def test_processes_that_make_no_sense_are_refused(kind, arguments, name):
    with pytest.raises(ValueError, match=name):
        kind(**arguments)
