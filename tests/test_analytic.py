"""Analytic-DPM: the law of total variance, Gaussian data, Γ by measurement, bounds, the path of the least bound."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from alphabar.core import analytic, samplers, schedules, tables
from alphabar.core.chain import chain
from alphabar.core.mixture import GaussianMixture
from alphabar.core.sde import VPSDE

RNG = np.random.default_rng(0)
STD = 0.05
TWO = GaussianMixture([0.3, 0.7], [[-1.0], [0.6]], 0.05**2)
PROCESSES = {"linear": schedules.linear(), "ladder": schedules.geometric(0.01, 20.0, 100), "vpsde": VPSDE(T=1000.0)}


def gaussian_gamma(s, std, t=None):
    """Γ of N(0, std²) data, exactly: the score's second moment is 1/(a²·std² + n²)."""
    t = np.arange(1.0, s.T + 1) if t is None else np.asarray(t, np.float64)
    a, n = s.levels(t)
    gamma = 1 / (a**2 * std**2 + n**2)
    return analytic.Gamma(t, n, gamma, 0 * t, a**2 * std**2 * gamma, 0 * t, 1, 1)


def mixture_gamma(s, law):
    """Γ of one-dimensional data by quadrature of score² under the noised law, at every time of a table."""
    t = np.arange(1.0, s.T + 1)
    a, n = s.levels(t)
    gamma = []
    for signal, noise in zip(a, n, strict=True):
        x = np.linspace(-1, 1, 4001)[:, None] * (1.5 * signal + 8 * noise)
        noised = law.diffuse(signal, noise)
        p = np.exp(noised.log_prob(x))
        gamma.append(np.sum(p * noised.score(x)[:, 0] ** 2) / np.sum(p))
    gamma = np.array(gamma)
    return analytic.Gamma(t, n, gamma, 0 * t, np.clip(1 - n**2 * gamma, 0, 1), 0 * t, 1, 1)


def final_std(table, s, std, start=1.0):
    """The deviation that sampling by the table leaves of N(0, std²) data under the perfect model, in closed form."""
    v = start
    for row, a, n, c in zip(table.rows(), table.signal, table.noise, table.c, strict=True):
        v = (row[2] + row[4] * n / (a**2 * std**2 + n**2)) ** 2 * v + c**2
    return np.sqrt(v)


# ------------------------------------------------------------------------------------------------------------------ the variance


def test_the_optimal_variance_is_the_law_of_total_variance():
    """L1: σ*² = λ² + κ²·Var(x_0|x_t), with κ from the kernel of DDIM and the conditional variance of Gaussian data."""
    s, worst = schedules.linear(), 0.0
    for i in (2, 50, 500, 900):
        for var in (0.3, 1.0, 4.0):
            for part in (0.0, 0.5, 1.0):
                lambda2 = part * s.beta_tilde[i]
                total = s.alpha_bar[i] * var + 1 - s.alpha_bar[i]
                rest = 1 - s.noise_variance[i] / total
                got = analytic.optimal_variance(lambda2, s.signal[i], s.noise[i], s.signal[i - 1], s.noise[i - 1], rest)
                kappa = s.signal[i - 1] - np.sqrt(s.noise_variance[i - 1] - lambda2) / s.noise[i] * s.signal[i]
                worst = max(worst, abs(got - (lambda2 + kappa**2 * var * s.noise_variance[i] / total)))
    assert worst < 1e-15


def test_of_unit_data_it_is_beta_and_of_a_point_beta_tilde():
    """L1b, L20: the two fixed choices are the true reverse variances of N(0, 1) data and of a point."""
    s = schedules.linear()
    i = np.arange(2, s.T + 1)
    levels = (s.signal[i], s.noise[i], s.signal[i - 1], s.noise[i - 1])
    unit = analytic.optimal_variance(s.beta_tilde[i], *levels, s.alpha_bar[i])
    np.testing.assert_allclose(unit, s.beta[i], rtol=1e-9)
    np.testing.assert_array_equal(analytic.optimal_variance(s.beta_tilde[i], *levels, 0.0), s.beta_tilde[i])


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps", [3, 10])
def test_the_table_has_the_true_variance_of_every_step(name, steps):
    """Against q(x'|x_t) of Gaussian data by conditioning, averaged: total variance of q minus that of the row's mean."""
    s, std = PROCESSES[name], 0.3
    for build in (
        lambda: tables.ddpm(s, steps),
        lambda: tables.ddpm(s, steps, "beta"),
        lambda: tables.ddim(s, steps, eta=0.6),
        lambda: tables.ddim(s, steps, eta=0.0),
        lambda: tables.ddim(s, steps, sigma="hat"),
        lambda: tables.euler(s, steps),
    ):
        plain = build()
        table = analytic.analytic_table(plain, gaussian_gamma(s, std, np.unique(np.r_[plain.t])))
        for i in range(len(table) - 1):
            a, n = table.signal[i], table.noise[i]
            marginal = a**2 * std**2 + n**2
            row = table.rows()[i]
            on_x = row[2] + row[4] * n / marginal  # the row's mean with the perfect model is on_x·x_t
            want = table.signal_to[i] ** 2 * std**2 + table.noise_to[i] ** 2 - on_x**2 * marginal
            np.testing.assert_allclose(table.c[i] ** 2, want, rtol=1e-8, atol=1e-14)
        assert table.c[-1] == 0 and table.name.startswith("analytic(") and np.array_equal(table.t, plain.t)
        assert np.array_equal(table.rows()[:, [2, 3, 4]], plain.rows()[:, [2, 3, 4]])  # the means are the plain table's


def test_gaussian_data_get_their_deviation_in_five_steps():
    """Target 0.05 at S = 5: β̃ gives 0.0102 and β 0.564."""
    s = schedules.linear()
    gamma = gaussian_gamma(s, STD)
    assert final_std(tables.ddpm(s, 5), s, STD) == pytest.approx(0.0102, abs=5e-5)
    assert final_std(tables.ddpm(s, 5, "beta"), s, STD) == pytest.approx(0.564, abs=5e-4)
    for spacing in ("leading", "linspace", "trailing", "quadratic"):
        for plain in (tables.ddpm(s, 5, spacing=spacing), tables.ddpm(s, 5, "beta", spacing), tables.ddim(s, 5, 0.0, spacing)):
            table = analytic.analytic_table(plain, gamma, end="noise")
            assert final_std(table, s, STD) == pytest.approx(STD, abs=1e-4), table.name
            assert not table.exact[-1] and table.exact[:-1].all()
    # the convention without noise at the end lacks what E[x_0|x_1] leaves out, and nothing else
    mean = final_std(analytic.analytic_table(tables.ddpm(s, 5), gamma), s, STD)
    left_out = STD**2 * s.noise_variance[1] / (s.alpha_bar[1] * STD**2 + s.noise_variance[1])
    assert mean**2 + left_out == pytest.approx(STD**2, rel=1e-6) and abs(mean - STD) < 1.1e-3


def test_samples_have_the_deviation_too():
    """The same by sampling, with what is measured from the model: the residual has the same relative error at all levels."""
    s, n, d = schedules.linear(), 4000, 4
    law = GaussianMixture([1.0], [[0.0] * d], STD**2)
    table = tables.ddpm(s, 5)
    gamma = analytic.measure_gamma(law.model(s), law.sample(n, seed=3), s, grid=table.t[::-1])
    np.testing.assert_allclose(gamma.residual_error / gamma.residual, np.sqrt(2 / (n * d)), rtol=0.1)
    assert np.all((gamma.noise**2 * gamma.gamma_error > gamma.unexplained(gamma.t))[1:])  # where 1 − n²Γ says nothing
    table = analytic.analytic_table(table, gamma, end="noise")
    out = samplers.sample(law.model(s), table, samplers.prior((20000, d), seed=1, dtype=np.float64), seed=2)
    error = STD * np.hypot(1 / np.sqrt(2 * out.size), 1 / np.sqrt(2 * n * d))
    assert out.std() == pytest.approx(STD, abs=4 * error)


def test_the_bounds_hold_and_clip():
    s = schedules.linear()
    values = RNG.uniform(-1, 1, (150, 8))  # data in [−1, 1]^d
    law = GaussianMixture(np.ones(150), values, 0.0)
    for plain in (tables.ddpm(s, 20), tables.ddim(s, 20, eta=0.5), tables.ddim(s, 20, eta=0.0)):
        gamma = analytic.measure_gamma(law.model(s), values, s, grid=plain.t[::-1], draws=2)
        low, high = analytic.variance_bounds(plain)
        _, tight = analytic.variance_bounds(plain, (-1.0, 1.0))
        lambda2 = plain.c**2 - plain.excess
        assert np.array_equal(low, np.maximum(lambda2, 0)) and np.all(low < high) and np.all(tight <= high)
        np.testing.assert_allclose(tight[0] - low[0], (plain.B0[0] - plain.Be[0] * plain.signal[0] / plain.noise[0]) ** 2)
        for estimate in analytic.ESTIMATES:
            table = analytic.analytic_table(plain, gamma, estimate=estimate, end="noise")
            assert np.all((table.c**2 >= low * (1 - 1e-12)) & (table.c**2 <= high * (1 + 1e-12)))
            clipped = analytic.analytic_table(plain, gamma, (-1.0, 1.0), estimate, end="noise")
            np.testing.assert_allclose(clipped.c**2, np.minimum(table.c**2, tight), rtol=1e-12)
    blind = analytic.Gamma(gamma.t, gamma.noise, 0 * gamma.t, 0 * gamma.t, 0 * gamma.t + 1, 0 * gamma.t, 1, 1)  # Γ = 0
    assert np.array_equal(analytic.analytic_table(plain, blind, (-1.0, 1.0), end="noise").c ** 2, np.sqrt(tight) ** 2)
    with pytest.raises(ValueError, match="data_range"):
        analytic.variance_bounds(plain, (1.0, -1.0))


def test_a_table_that_stops_early_has_noise_to_its_end():
    s = schedules.linear()
    whole = tables.ddpm(s, 6)
    cut = {
        f.name: getattr(whole, f.name)[:-1] for f in dataclasses.fields(whole) if isinstance(getattr(whole, f.name), np.ndarray)
    }
    short = dataclasses.replace(whole, **cut, stops=True)
    gamma = gaussian_gamma(s, 0.3)
    table = analytic.analytic_table(short, gamma)
    assert np.array_equal(table.c, analytic.analytic_table(whole, gamma).c[:-1]) and table.c[-1] > 0 and table.exact.all()


def test_tables_that_have_no_such_variance_are_refused():
    s = schedules.linear()
    gamma = gaussian_gamma(s, STD)
    for bad in (
        tables.heun(s, 5),
        tables.adams_bashforth(s, 5),
        tables.dpm_solver_pp(s, 5),
        tables.ddim_encode(s, 5),
        tables.euler_maruyama(s, 5),
    ):
        with pytest.raises(ValueError, match="single steps whose laws are exact"):
            analytic.analytic_table(bad, gamma)
    with pytest.raises(ValueError, match=r"t must be in 1\.\.500"):
        analytic.analytic_table(tables.ddpm(s, 5), gaussian_gamma(s, STD, np.arange(1, 501)))
    for words, options in (("end must be", {"end": "x"}), ("estimate must be", {"estimate": "x"})):
        with pytest.raises(ValueError, match=words):
            analytic.analytic_table(tables.ddpm(s, 5), gamma, **options)
    with pytest.raises(ValueError, match=r"lambda2 must be in 0\.\.noise_to"):
        analytic.optimal_variance(2.0, 0.5, 0.8, 0.9, 0.4, 0.5)


# ------------------------------------------------------------------------------------------------------------------------- Γ


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_gamma_is_that_of_the_law(name, prediction):
    s, grid = PROCESSES[name], np.array([1.0, 10.0, 40.0, 100.0])
    std, d, n = 0.4, 6, 3000
    law = GaussianMixture([1.0], [[0.0] * d], std**2)
    got = analytic.measure_gamma(law.model(s, prediction), law.sample(n), s, grid, prediction=prediction)
    want = gaussian_gamma(s, std, grid)
    assert np.all(np.abs(got.gamma - want.gamma) < 4 * got.gamma_error)
    assert np.all(np.abs(got.residual - want.residual) < 4 * got.residual_error)
    np.testing.assert_allclose(got.gamma_error, want.gamma * np.sqrt(2 / (n * d)), rtol=0.15)  # ‖score‖² is a χ² with d degrees
    assert (got.samples, got.dimensions) == (n, d)


def test_gamma_depends_on_the_samples_and_the_seed_alone():
    s = schedules.linear()
    law = GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], 0.1)
    x0, grid, model = law.sample(50), [1, 200, 900], law.model(s)
    one = analytic.measure_gamma(model, x0, s, grid, seed=4, draws=2)
    told = []
    two = analytic.measure_gamma(model, x0, s, grid, seed=4, draws=2, batch=7, progress=lambda k, n: told.append((k, n)))
    for name in ("gamma", "gamma_error", "residual", "residual_error"):
        np.testing.assert_allclose(getattr(two, name), getattr(one, name), rtol=1e-12)
    assert told == [(k + 1, 48) for k in range(48)]
    parts = [analytic.measure_gamma(model, x0[i : i + 20], s, grid, seed=4, draws=2, first_sample=i) for i in (0, 20, 40)]
    joined = analytic.Gamma.join(parts)
    for name in ("gamma", "gamma_error", "residual", "residual_error"):
        np.testing.assert_allclose(getattr(joined, name), getattr(one, name), rtol=1e-9)
    assert joined.samples == 50
    assert not np.array_equal(analytic.measure_gamma(model, x0, s, grid, seed=5).gamma, one.gamma)
    single = analytic.measure_gamma(model, x0[:1], s, grid)
    assert np.isnan(single.gamma_error).all() and np.isfinite(single.gamma).all()


def test_gamma_goes_through_arrays():
    s = schedules.linear()
    gamma = gaussian_gamma(s, STD, [1.0, 4.0, 9.5])
    again = analytic.Gamma.from_arrays(json.loads(json.dumps({k: v.tolist() for k, v in gamma.arrays().items()})))
    for name, value in gamma.arrays().items():
        assert np.array_equal(again.arrays()[name], value)
    np.testing.assert_allclose(
        gamma.unexplained([1.0, 2.5, 4.0]), np.interp([1, 2.5, 4], gamma.t, 1 - gamma.noise**2 * gamma.gamma)
    )
    with pytest.raises(ValueError, match="gamma must hold numbers"):
        analytic.Gamma(gamma.t, gamma.noise, gamma.gamma[:2], gamma.gamma, gamma.gamma, gamma.gamma, 1, 1)
    with pytest.raises(ValueError, match="t must ascend"):
        analytic.Gamma(gamma.t[::-1], gamma.noise, gamma.gamma, gamma.gamma, gamma.gamma, gamma.gamma, 1, 1)
    with pytest.raises(ValueError, match="same times"):
        analytic.Gamma.join([gamma, gaussian_gamma(s, STD, [1.0, 2.0])])


def test_gamma_of_torch_models():
    torch = pytest.importorskip("torch")
    s, grid = schedules.linear(), [1, 300]
    law = GaussianMixture([1.0], [[0.3, 0.1]], 0.2)
    x0, seen = law.sample(9), []

    def model(x, t):
        seen.extend((type(x), type(t)))
        return torch.from_numpy(law.model(s)(x.numpy(), t.numpy()))

    got = analytic.measure_gamma(model, torch.from_numpy(x0), s, grid, batch=4)
    np.testing.assert_allclose(got.gamma, analytic.measure_gamma(law.model(s), x0, s, grid).gamma, rtol=1e-12)
    assert set(seen) == {torch.Tensor}
    with pytest.raises(ValueError, match="grid must ascend"):
        analytic.measure_gamma(law.model(s), x0, s, [3, 1])
    with pytest.raises(TypeError, match="x0 must be a float array"):
        analytic.measure_gamma(law.model(s), np.zeros((3, 2), np.uint8), s)
    with pytest.raises(ValueError, match="model must return"):
        analytic.measure_gamma(lambda x, t: x[:1], x0, s, grid)
    with pytest.raises(ValueError, match="grid must be given"):
        analytic.measure_gamma(law.model(s), x0, VPSDE())


# ---------------------------------------------------------------------------------------------------------------- the best path


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_cost_is_the_bound_at_the_best_variance(eta):
    """Along any path: the mean KL of the chain's own kernels, term by term, with E‖x_0 − x̂_0‖² of Gaussian data."""
    s, std = schedules.linear(), 0.4
    gamma, grid = gaussian_gamma(s, std), np.array([1, 30, 80, 400, 1000])
    table = analytic.analytic_table(tables.ddim(s, eta=eta, grid=grid), gamma, end="noise")
    best = (table.c**2)[::-1][1:]
    c = chain(s, eta=eta, variance=best, grid=grid)
    error = std**2 * c.noise**2 / (c.signal**2 * std**2 + c.noise**2)

    def bound(variance):
        ratio = c.q_variance[2:] / variance
        return np.sum(0.5 * (c.on_x0[2:] ** 2 * error[2:] / variance + ratio - 1 - np.log(ratio)))

    np.testing.assert_allclose(analytic.path_cost(s, gamma, grid, eta), bound(best), rtol=1e-9)
    for factor in (0.97, 1.03):  # and no other variance does better
        for k in range(len(best)):
            assert bound(best * np.where(np.arange(len(best)) == k, factor, 1)) > bound(best)


@pytest.mark.parametrize("name", ["linear", "ladder"])
def test_the_path_is_the_best_of_all(name):
    s = schedules.from_betas(np.linspace(0.01, 0.8, 10)) if name == "linear" else schedules.geometric(0.02, 8.0, 10)
    gamma = mixture_gamma(s, TWO)
    for eta in (1.0, 0.4):
        for steps in (2, 3, 4, 7, 10):
            grid, cost = analytic.optimal_path(s, gamma, steps, eta)
            paths = [np.array([1, *middle, 10]) for middle in itertools.combinations(range(2, 10), steps - 2)]
            costs = [analytic.path_cost(s, gamma, p, eta) for p in paths]
            assert cost == pytest.approx(min(costs), rel=1e-12) and np.array_equal(grid, paths[int(np.argmin(costs))])


def test_the_path_beats_the_usual_ones():
    s = schedules.linear(200, rescale=True)
    gamma = mixture_gamma(s, TWO)
    all_steps = analytic.path_cost(s, gamma, gamma.t)
    for steps in (5, 10, 50):
        grid, cost = analytic.optimal_path(s, gamma, steps)
        assert grid.dtype == np.int64 and len(grid) == steps and (grid[0], grid[-1]) == (1, 200)
        assert cost == pytest.approx(analytic.path_cost(s, gamma, grid), rel=1e-12)
        usual = [analytic.path_cost(s, gamma, schedules.timesteps(200, steps, "linspace"))]
        quadratic = schedules.timesteps(200, steps, "quadratic")
        usual.append(analytic.path_cost(s, gamma, np.r_[1, quadratic[1:]]))
        assert cost - all_steps < 0.75 * (min(usual) - all_steps)
        assert len(analytic.analytic_table(tables.ddpm(s, grid=grid), gamma)) == steps
    with pytest.raises(ValueError, match="eta must be in"):
        analytic.optimal_path(s, gamma, 5, eta=0.0)
    with pytest.raises(ValueError, match=r"steps must be in 2\.\.200"):
        analytic.optimal_path(s, gamma, 1)
    with pytest.raises(ValueError, match="grid must ascend and hold times"):
        analytic.path_cost(s, gamma, [1.5, 3.0])


def test_of_gaussian_data_every_path_is_as_good():
    """Their reverse conditionals are normal with σ*², so the bound is tight along any path between the same ends."""
    s = schedules.linear()
    gamma = gaussian_gamma(s, STD)
    whole = analytic.path_cost(s, gamma, gamma.t)
    for steps in (2, 5, 50):
        for spacing in ("linspace", "quadratic"):
            grid = np.r_[1, schedules.timesteps(1000, steps, spacing)[1:]]
            assert analytic.path_cost(s, gamma, grid) == pytest.approx(whole, rel=1e-8)
