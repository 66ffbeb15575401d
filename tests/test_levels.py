"""Ladders and continuous processes wherever a schedule may stand: levels, noising, conversions, times and every sampler table."""

import itertools

import numpy as np
import pytest
from scipy.integrate import quad

from alphabar.core import convert, forward, samplers, schedules, tables
from alphabar.core.levels import Ladder, Levels
from alphabar.core.sde import VESDE, VPSDE, SubVPSDE

LINEAR, LADDER = schedules.linear(), schedules.geometric(0.01, 30, 400)
PROCESSES = [LINEAR, LADDER, VESDE(), VPSDE(), SubVPSDE(), VPSDE(T=1000)]
CONTINUOUS = PROCESSES[2:]
ODE = {
    "ddim": (lambda s, S: tables.ddim(s, grid=tables.euler(s, S, "karras").t[::-1]), 1),
    "euler": (lambda s, S: tables.euler(s, S, "karras"), 1),
    "heun": (lambda s, S: tables.heun(s, S, "karras"), 2),
    "rk4": (lambda s, S: tables.rk4(s, S, "karras"), 4),
    "dpm++1": (lambda s, S: tables.dpm_solver_pp(s, S, 1, "karras"), 1),
    "dpm++2": (lambda s, S: tables.dpm_solver_pp(s, S, 2, "karras"), 2),
    "ab2": (lambda s, S: tables.adams_bashforth(s, S, 2, "karras"), 2),
}
EVERY = {
    **{f"ddpm-{v}": lambda s, S, v=v, **k: tables.ddpm(s, S, v, **k) for v in ("posterior", "beta")},
    **{f"ddim-{eta}": lambda s, S, eta=eta, **k: tables.ddim(s, S, eta, **k) for eta in (0.0, 0.5, 1.0)},
    "ddim-hat": lambda s, S, **k: tables.ddim(s, S, sigma="hat", **k),
    "encode": lambda s, S, **k: tables.ddim_encode(s, S, **k),
    **{f: lambda s, S, f=f, **k: getattr(tables, f)(s, S, **k) for f in ("euler", "heun", "rk4")},
    **{f"dpm++{o}": lambda s, S, o=o, **k: tables.dpm_solver_pp(s, S, o, **k) for o in (1, 2, 3)},
    **{f"ab{o}": lambda s, S, o=o, **k: tables.adams_bashforth(s, S, o, **k) for o in (1, 2, 3, 4)},
    **{f: lambda s, S, f=f, **k: getattr(tables, f)(s, S, **k) for f in ("euler_maruyama", "reverse_diffusion")},
}


@pytest.fixture(params=PROCESSES, ids=repr)
def s(request):
    return request.param


# -------------------------------------------------------------------------------------------------------------------- the ladder


def test_a_geometric_ladder_has_one_ratio():
    """Eq: S0-C9. Level 1 is the smallest; the paper's σ_1 is the last."""
    s = schedules.geometric()
    assert (s.T, s.sigma[0], s.sigma[1], s.sigma[-1]) == (10, 0, 0.01, 1.0) and s.prior_std == 1.0
    np.testing.assert_allclose(s.sigma[2:] / s.sigma[1:-1], 100 ** (1 / 9), rtol=1e-12)
    np.testing.assert_allclose(np.cumsum(s.beta), s.noise_variance, rtol=1e-14)
    np.testing.assert_allclose(s.beta_tilde[1:], s.sigma[:-1] ** 2 * s.beta[1:] / s.sigma[1:] ** 2, rtol=1e-14)
    assert np.all(s.signal == 1) and np.all(s.alpha == 1) and s.sigma_bar[3] == s.sigma[3]
    assert repr(s) == "Ladder(geometric, 10 levels 0.01..1)"


def test_sigmas_come_in_either_order():
    down, up = schedules.from_sigmas([3.0, 1.0, 0.5]), schedules.from_sigmas([0.5, 1.0, 3.0])
    assert np.array_equal(down.sigma, [0, 0.5, 1, 3]) and np.array_equal(down.sigma, up.sigma)
    with pytest.raises(ValueError, match="read-only"):
        down.sigma[1] = 2


@pytest.mark.parametrize("sigmas", [[1.0, 1.0], [1, 3, 2], [0.0, 1.0], [-1.0, 1.0], [], [[1.0]], [1.0, np.inf], [np.nan]])
def test_ladders_that_do_not_ascend_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigma"):
        schedules.from_sigmas(sigmas)


def test_wrong_ladders_are_named():
    with pytest.raises(ValueError, match=r"sigma\[0\] = 0"):
        Ladder(np.array([0.1, 1.0]))
    for low, high in ((1.0, 1.0), (0.0, 1.0), (1.0, np.inf)):
        with pytest.raises(ValueError, match="sigma_min and sigma_max"):
            schedules.geometric(low, high)


# ------------------------------------------------------------------------------------------------------------------ all of them


def test_levels_and_time_are_inverse(s):
    t = np.r_[0.0, np.linspace(s.t_min, s.T, 37)]
    a, n = s.levels(t)
    assert (a[0], n[0]) == (1, 0) and a.dtype == n.dtype == np.float64 and np.all(np.diff(n / a) > 0)
    np.testing.assert_allclose(s.time(s.sigma_bar_at(t)), t, rtol=1e-9)
    assert s.levels(s.T)[0].shape == () and s.levels(np.full((2, 3), s.T))[1].shape == (2, 3)


def test_q_sample_is_signal_x0_plus_noise_eps(s):
    """Eq: S0-E9, S0-E18."""
    rng = np.random.default_rng(0)
    x0, given = rng.standard_normal((5, 3, 2)), rng.standard_normal((5, 3, 2))
    t = np.arange(1, 6) if isinstance(s.T, int) and s.T > 5 else np.linspace(s.t_min, s.T, 5)
    a, n = (v.reshape(5, 1, 1) for v in s.levels(t))
    x_t, eps = forward.q_sample(x0, t, s, eps=given)
    np.testing.assert_allclose(x_t, a * x0 + n * given, rtol=1e-14)
    assert np.array_equal(eps, given)
    one, _ = forward.q_sample(x0, t[2], s, eps=given)
    np.testing.assert_allclose(one[2], x_t[2], rtol=1e-14)
    made, z = forward.q_sample(x0.astype(np.float32), t, s, seed=3, first_sample=7)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, a * x0 + n * z, rtol=2e-6, atol=2e-6)
    alone, _ = forward.q_sample(x0[3:].astype(np.float32), t[3:], s, seed=3, first_sample=10)
    assert np.array_equal(alone, made[3:])


@pytest.mark.parametrize("source", convert.PREDICTIONS)
@pytest.mark.parametrize("target", convert.PREDICTIONS)
def test_conversions_agree_with_the_definitions(s, source, target):
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 4, 3))
    t = np.array([1, 7, 50, 200]) if isinstance(s, type(LINEAR) | Ladder) else np.array([0.01, 0.2, 0.6, 0.9]) * s.T
    a, n = (v[:, None] for v in s.levels(t))
    x_t = a * x0 + n * eps
    kinds = {"x0": x0, "eps": eps, "v": a * eps - n * x0, "score": -eps / n}
    np.testing.assert_allclose(forward.convert(kinds[source], x_t, t, s, source, target), kinds[target], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(forward.training_target(x0, eps, t, s, target), kinds[target], rtol=1e-12)


def test_random_times_are_uniform_and_keyed(s):
    t = forward.random_times(20_000, s, seed=5, step=2)
    low, high = (1, s.T) if isinstance(s, type(LINEAR) | Ladder) else (s.t_min, s.T)
    assert t.min() >= low and t.max() <= high and t.dtype == (np.int64 if isinstance(s, type(LINEAR) | Ladder) else np.float64)
    assert abs(t.mean() - (low + high) / 2) < 4 * (high - low + 1) / np.sqrt(12 * t.size)
    assert np.array_equal(t, forward.random_times(20_000, s, seed=5, step=2))
    assert not np.array_equal(t, forward.random_times(20_000, s, seed=5, step=3))


def test_times_outside_the_process_are_refused(s):
    for t in (-1, s.T + 1):
        with pytest.raises(ValueError, match="t must be in"):
            forward.q_sample(np.ones((2, 2)), t, s)
        with pytest.raises(ValueError, match="t must be in"):
            forward.convert(np.ones((2, 2)), np.ones((2, 2)), t, s, "eps", "x0")


# -------------------------------------------------------------------------------------------------------- the integrals of a step


def test_increments_of_tables_are_the_integrals():
    """F = ln(a_t/a_to); G = B for a schedule and σ_t² − σ_to² for a ladder."""
    t, t_to = np.array([1000, 400, 3, 1]), np.array([999, 250, 1, 0])
    F, G = LINEAR.increments(t, t_to)
    B = -np.log(LINEAR.alpha_bar[t] / LINEAR.alpha_bar[t_to])
    np.testing.assert_allclose(F, -B / 2, rtol=1e-11)
    np.testing.assert_allclose(G, B, rtol=1e-11)
    F, G = LADDER.increments(t[1:] // 2, t_to[1:] // 2)
    assert np.all(F == 0)
    np.testing.assert_allclose(G, LADDER.sigma[t[1:] // 2] ** 2 - LADDER.sigma[t_to[1:] // 2] ** 2, rtol=1e-12)


@pytest.mark.parametrize("s", CONTINUOUS, ids=repr)
def test_increments_of_sdes_are_the_values_at_t(s):
    t, t_to = 0.7 * s.T, 0.65 * s.T
    F, G = s.increments(t, t_to)
    assert pytest.approx((t - t_to) * s.drift_factor(t)) == F and pytest.approx((t - t_to) * s.diffusion(t) ** 2) == G
    general_F, general_G = Levels.increments(s, t, t_to)  # what a table would take
    want, _ = quad(lambda u: float(s.diffusion(u)) ** 2, t_to, t, epsrel=1e-12)
    assert general_G == pytest.approx(want, rel=3e-4 if isinstance(s, SubVPSDE) else 1e-11)
    assert general_F == pytest.approx(quad(lambda u: float(s.drift_factor(u)), t_to, t)[0], abs=1e-12)


def test_increments_need_a_signal():
    with pytest.raises(ValueError, match="some signal is left"):
        schedules.zero_terminal_snr(LINEAR).increments(1000, 900)


# ------------------------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("name", EVERY)
def test_every_table_runs_on_every_process(s, gaussian, name):
    """The constructor asserts the laws of the rows; the samples are those of the data, roughly."""
    data = gaussian(0.3, 0.5)
    for spacing in schedules.SPACINGS:
        for steps in (1, 2, 3, 40):
            table = EVERY[name](s, steps, spacing=spacing)
            rows = {"heun": 2 * steps - 1, "rk4": 4 * steps - 3}.get(name, steps)
            assert len(table) == rows and np.all(np.isfinite(table.rows()))
            assert table.descends == (name != "encode") and np.all(table.t <= s.T)
    table = EVERY[name](s, 60, spacing="trailing")
    x = samplers.prior((4, 500), seed=2, dtype=np.float64, std=s.prior_std) if table.descends else np.full((4, 500), 0.4)
    y = samplers.sample(data.model(s), table, x, seed=2)
    if table.descends:
        assert abs(y.mean() - 0.3) < 0.1 and (name == "ddim-hat" or abs(y.std() - 0.5) < 0.2)
    else:
        assert np.ptp(y) < 1e-9 * s.prior_std


@pytest.mark.parametrize("name", ODE)
def test_flows_carry_gaussian_data_to_their_order(s, gaussian, name):
    """The flow of Gaussian data is known; errors are measured before the last jump to clean data, Euler's for all."""
    build, order = ODE[name]
    data, x = gaussian(0.3, 0.8), np.random.default_rng(1).standard_normal((5, 4)) * s.prior_std
    errors, counts = [], (24, 48, 96) if order == 4 else (80, 160, 320)
    for steps in counts:
        table = build(s, steps)
        exact = data.flow(x, table.signal[0], table.noise[0], table.signal[-1], table.noise[-1])
        errors.append(np.max(np.abs(samplers.sample(data.model(s), table, x, trajectory=True)[-2] - exact)))
    slopes = -np.diff(np.log(errors)) / np.log(2)
    np.testing.assert_allclose(slopes, order, atol=0.2 if order < 4 else 0.45)


def test_runge_kutta_is_the_textbook_loop(s, gaussian):
    data, x = gaussian(0.3, 0.5), np.random.default_rng(1).standard_normal((5, 4)) * s.prior_std
    model, T = data.model(s), s.T

    def slope(xbar, sigma):
        t = s.time(sigma)
        return model(s.levels(t)[0] * xbar, np.full(len(x), t))

    for spacing in ("linspace", "karras", "trailing"):
        table = tables.rk4(s, 7, spacing)
        sigma = s.sigma_bar_at(np.r_[table.t[::4], 0.0])
        y = x / s.levels(T if spacing != "leading" else table.t[0])[0]
        for now, to in itertools.pairwise(sigma[:-1]):
            h = to - now
            k1 = slope(y, now)
            k2 = slope(y + h / 2 * k1, now + h / 2)
            k3 = slope(y + h / 2 * k2, now + h / 2)
            k4 = slope(y + h * k3, to)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        y = y - sigma[-2] * slope(y, sigma[-2])
        np.testing.assert_allclose(samplers.sample(model, table, x), y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("prediction", convert.PREDICTIONS)
def test_any_prediction_gives_the_same_samples(s, gaussian, prediction):
    data, x = gaussian(0.3, 0.5), np.random.default_rng(1).standard_normal((3, 4)) * s.prior_std
    for name in ("rk4", "euler_maruyama", "reverse_diffusion", "ddpm-beta"):
        table, other = EVERY[name](s, 9, spacing="trailing"), EVERY[name](s, 9, spacing="trailing", prediction=prediction)
        z = np.random.default_rng(2).standard_normal((len(table), *x.shape))
        for clip in (None, (-0.2, 0.5)):
            want = samplers.sample(data.model(s), table, x, noise=z, clip=clip)
            got = samplers.sample(data.model(s, prediction), other, x, noise=z, clip=clip)
            np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8)


def test_the_reverse_steps_are_nearly_lawful(s):
    """What one row does to the marginals errs with the square of the step, for the SDE and for its flow."""
    for build in (tables.euler_maruyama, tables.reverse_diffusion):
        for flow in (False, True):
            worst = []
            for steps in (250, 500, 1000):
                grid = s.time(np.geomspace(*s.sigma_bar_at([s.t_min, s.T]), steps))
                table = build(s, grid=np.minimum(np.maximum.accumulate(grid), s.T), probability_flow=flow)
                assert not table.exact.any() and np.any(table.c > 0) != flow
                mean = table.A * table.signal + table.B0 - table.signal_to
                # for data at 0 the flow and the SDE scale noise alike: ε is all of x/n
                left = (table.A + table.Be / table.noise) ** 2 * table.noise**2 + table.c**2 - table.noise_to**2
                worst.append(max(np.max(np.abs(mean[:-1])), np.max(np.abs(left[:-1]) / table.noise[:-1] ** 2)))
            np.testing.assert_allclose(np.log2(np.array(worst[:-1]) / worst[1:]), 2, atol=0.2)
