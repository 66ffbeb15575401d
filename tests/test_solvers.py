"""The fast solvers: orders of accuracy, laws of the stochastic ones, states on every process, grids, EDM, thresholding."""

import ast
import dataclasses
import itertools
import textwrap

import numpy as np
import pytest

from alphabar.core import convert, grids, samplers, schedules, tables
from alphabar.core.rows import Rows, flow, levels_at
from alphabar.core.sde import EDM, VESDE, VPSDE, SubVPSDE

LINEAR = schedules.linear()
LADDER = schedules.geometric(0.01, 60, 200)
PROCESSES = [LINEAR, LADDER, VESDE(0.01, 60), VPSDE(), SubVPSDE(), EDM()]
X = np.random.default_rng(2).standard_normal((4, 3))
SIGMAS = np.array([0.05, 0.2, 0.5, 1.1, 2.0, 3.3, 6.0, 11.0, 25.0, 40.0])
MEAN, STD = 0.3, 0.5


def made(name, **options):
    return lambda s, **where: getattr(tables, name)(s, **(options | where))


SOLVERS = {
    "euler": made("euler"),
    "euler-churn": made("euler", churn=4.0, s_tmin=0.1, s_tmax=20),
    "euler_ancestral": made("euler_ancestral", eta=0.7),
    "heun": made("heun"),
    "heun-churn": made("heun", churn=4.0, s_tmin=0.1, s_tmax=20, s_noise=1.05),
    "kdpm2": made("kdpm2"),
    "kdpm2-churn": made("kdpm2", churn=40.0, s_tmin=0.1, s_tmax=20),
    "rk4": made("rk4"),
    "ab3": made("adams_bashforth", order=3),
    "ab3-full": made("adams_bashforth", order=3, full_order_start=True),
    "ab4-full": made("adams_bashforth", order=4, full_order_start=True),
    "lms": made("lms"),
    "deis3": made("deis", order=3),
    "plms": made("plms"),
    "dpm2M": made("dpm_solver", final="data"),
    "dpm3S": made("dpm_solver", order=3, method="singlestep", final="data"),
    "dpm++2S": made("dpm_solver_pp", method="singlestep"),
    "dpm++3S": made("dpm_solver_pp", order=3, method="singlestep", solver_type="heun"),
    "dpm++3M": made("dpm_solver_pp", order=3, taylor=True),
    "sde++2M": made("sde_dpm_solver_pp"),
    "sde++half": made("dpm_solver_pp", eta=0.5, solver_type="heun"),
    "unipc3": made("unipc", order=3),
    "unipc2bh1": made("unipc", variant="bh1"),
}


def run(table, model, x=X, **options):
    return samplers.sample(model, table, x, **options)


def noise_for(table, seed=3):
    return np.random.default_rng(seed).standard_normal((len(table), *X.shape))


def predictor(data, s, prediction):
    """The exact network of any kind, F by its own formula: (x0 − c_skip·x/a)/c_out."""
    if prediction[0] != "F":
        return data.model(s, prediction)
    sigma_data = float(prediction[2:] or 0.5)

    def model(x, t):
        a, n = (v.reshape(-1, *(1,) * (x.ndim - 1)) for v in s.levels(t))
        sigma = n / a
        skip, out = sigma_data**2 / (sigma**2 + sigma_data**2), sigma * sigma_data / np.hypot(sigma, sigma_data)
        return (data.x0(x, a, n) - skip * x / a) / out

    return model


# --------------------------------------------------------------------------------------------------------- on every process


@pytest.mark.parametrize("name", SOLVERS)
def test_the_states_of_x_over_a_depend_on_sigma_alone(mixture, name):
    """At the same σ̄ every process has the same ODE and SDE in x/a, so samplers agree on all of them."""
    data = mixture([0.35, 0.65], [-0.7, 0.5], [0.2, 0.35])
    paths = []
    for s in PROCESSES:
        table = SOLVERS[name](s, sigmas=SIGMAS)
        a = np.r_[table.signal[0], table.signal_to].reshape(-1, 1, 1)
        x = 40 * X * a[0]
        paths.append(run(table, data.model(s), x, noise=noise_for(table), trajectory=True) / a)
    for path in paths[1:]:
        np.testing.assert_allclose(path, paths[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("s", PROCESSES, ids=repr)
def test_every_solver_samples_every_process(gaussian, s):
    """Close to the exact flow with 30 steps, by any spacing of σ̄ and for pndm too, whose middles are in t."""
    data = gaussian(MEAN, STD)
    for name, make in {**SOLVERS, "pndm": made("pndm")}.items():
        table = make(s, steps=30, spacing="karras")
        x = data.flow(X, 1.0, 1.0, table.signal[0], table.noise[0])
        got = run(table, data.model(s), x, noise=np.zeros((len(table), *X.shape)))
        if not table.c.any():
            np.testing.assert_allclose(
                got, data.flow(x, table.signal[0], table.noise[0]), atol=0.2 if name == "euler" else 0.08, err_msg=name
            )
        assert np.all(np.isfinite(got))


@pytest.mark.parametrize("prediction", ["x0", "v", "score", "F", "F:0.8"])
@pytest.mark.parametrize("name", SOLVERS)
def test_any_prediction_gives_the_same_samples(gaussian, name, prediction):
    data = gaussian(MEAN, STD)
    one, other = (SOLVERS[name](LINEAR, sigmas=SIGMAS, prediction=p) for p in ("eps", prediction))
    z = noise_for(one)
    for options in ({}, {"clip": (-0.4, 0.6)}, {"clip": (-0.4, 0.6), "rederive_eps": False}, {"threshold": (0.6, 1.5)}):
        want = run(one, data.model(LINEAR), noise=z, **options)
        got = run(other, predictor(data, LINEAR, prediction), noise=z, **options)
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------- orders of accuracy


def orders(make, data, counts):
    """Slopes of the largest error at the end, or before the last jump to clean data."""
    errors, model = [], data.model(LINEAR)
    for steps in counts:
        table = make(LINEAR, steps=steps)
        k = len(table) if table.stops else len(table) - 1
        exact = data.flow(X, table.signal[0], table.noise[0], table.signal_to[k - 1], table.noise_to[k - 1])
        errors.append(np.max(np.abs(run(table, model, trajectory=True)[k] - exact)))
    return np.diff(-np.log(errors)) / np.diff(np.log(counts))


SINGLE = {"method": "singlestep", "final": "lowest", "spacing": "logsnr"}
MULTI = {"final": "lowest", "spacing": "logsnr"}
ORDERS = {
    "euler": (made("euler", spacing="karras"), 1),
    "ddim": (made("ddim", spacing="karras"), 1),
    "heun": (made("heun", spacing="karras"), 2),
    "kdpm2": (made("kdpm2", spacing="karras"), 2),
    "rk4": (made("rk4", spacing="karras"), 4),
    "dpm1": (made("dpm_solver", order=1, **MULTI), 1),
    "dpm2M": (made("dpm_solver", **MULTI), 2),
    "dpm3M": (made("dpm_solver", order=3, **MULTI), 2),  # the second derivative counts by half, as in general use
    "dpm2S": (made("dpm_solver", **SINGLE), 2),
    "dpm2S-heun": (made("dpm_solver", solver_type="heun", **SINGLE), 2),
    "dpm3S": (made("dpm_solver", order=3, **SINGLE), 3),
    "dpm++2M": (made("dpm_solver_pp", **MULTI), 2),
    "dpm++2M-heun": (made("dpm_solver_pp", solver_type="heun", **MULTI), 2),
    "dpm++2S": (made("dpm_solver_pp", **SINGLE), 2),
    "dpm++3S": (made("dpm_solver_pp", order=3, **SINGLE), 3),
    "deis2": (made("deis", **MULTI), 2),
    "unipc1": (made("unipc", order=1, **MULTI), 2),
    "unipc2": (made("unipc", lower_order_final=False, **MULTI), 3),
    "unip1": (made("unipc", order=1, corrector=False, **MULTI), 1),
    "unip2": (made("unipc", corrector=False, **MULTI), 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_observed_orders(gaussian, name):
    make, order = ORDERS[name]
    np.testing.assert_allclose(orders(make, gaussian(MEAN, 0.8), (61, 121, 241)), order, atol=0.12)


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (made("adams_bashforth", order=3, full_order_start=True, spacing="karras"), 2.85),
        (made("adams_bashforth", order=3, full_order_start=True, spacing="logsnr"), 2.8),
        (made("adams_bashforth", order=4, full_order_start=True, spacing="karras"), 3.8),
        (made("deis", order=3, full_order_start=True, **MULTI), 2.9),
        (made("deis", order=4, full_order_start=True, **MULTI), 3.9),
        (made("unipc", order=3, lower_order_final=False, **MULTI), 3.65),
        (made("pndm", spacing="trailing"), 1.9),
        (made("plms", spacing="trailing"), 1.9),
    ],
)
def test_orders_that_are_reached_from_below_or_passed(gaussian, make, least):
    assert np.all(orders(make, gaussian(MEAN, 0.8), (100, 200)) >= least)


def test_a_start_of_full_order_matters_where_the_start_does():
    """On dx̄ = ε dσ̄ with ε = x̄ all steps count alike: the low-order start limits AB3 and AB4 to 2."""

    def slopes(**options):
        errors = []
        for steps in (40, 80, 160):
            table = tables.adams_bashforth(EDM(), sigmas=np.linspace(0.5, 1.5, steps + 1), **options)
            end = run(table, lambda x, t: x, trajectory=True)[-2]  # at σ = 0.5
            errors.append(np.max(np.abs(end - X * np.exp(-1.0))))
        return np.log2(np.array(errors[:-1]) / errors[1:])

    np.testing.assert_allclose(slopes(order=3), 2, atol=0.15)
    np.testing.assert_allclose(slopes(order=4), 2, atol=0.1)
    np.testing.assert_allclose(slopes(order=3, full_order_start=True), 3, atol=0.15)
    assert np.all(slopes(order=4, full_order_start=True) > 3.9)


def test_a_wrong_weight_that_keeps_the_laws_shows_in_the_samples(gaussian):
    """1e-6 moved from the output now to a stored one passes the laws, which know no order; the samples tell."""
    data = gaussian(MEAN, STD)
    for name in ("heun", "ab3", "deis3", "dpm2M", "dpm3S", "dpm++2S", "dpm++3M", "unipc3", "plms"):
        table = SOLVERS[name](LINEAR, sigmas=SIGMAS)
        row = int(np.flatnonzero(table.H[:, 0])[-1])
        kind = "B0" if table.history == "x0" else "Be"
        H, now = table.H.copy(), getattr(table, kind).copy()
        H[row, 0] += 1e-6
        now[row] -= 1e-6
        wrong = dataclasses.replace(table, H=H, **{kind: now})
        moved = np.max(np.abs(run(wrong, data.model(LINEAR)) - run(table, data.model(LINEAR))))
        assert moved > 1e-9  # against diffusers 1e-11 is asked, in tests/test_peer_samplers.py


# ---------------------------------------------------------------------------------------------------------- stochastic samplers


def law(table, data, s):
    """(mean, variance) of the samples for x_T ~ N(0, prior_std²), from runs on unit inputs: the sampler is affine."""
    count = len(table)
    x, z = np.zeros(count + 2), np.eye(count, count + 2, 2)
    x[1] = 1
    out = samplers.sample(data.model(s), table, x, noise=z)
    effect = out[1:] - out[0]
    return out[0], (effect[0] * s.prior_std) ** 2 + np.sum(effect[1:] ** 2)


def moments(step, s, sigma, a):
    """The same by recursion over x̄ = x/a from the mean and variance of the prior: step(i, x̄) -> (mean, std)."""
    mean, var = 0.0, (s.prior_std / a) ** 2
    for i in range(len(sigma) - 1):
        offset, std = step(i, 0.0)
        gain = step(i, 1.0)[0] - offset
        mean, var = offset + gain * mean, gain**2 * var + std**2
    return mean, var


def gaussian_eps(x, sigma):
    return sigma * (x - MEAN) / (STD**2 + sigma**2)


@pytest.mark.parametrize("s", PROCESSES, ids=repr)
@pytest.mark.parametrize("eta", [0.5, 1.0, 3.0])
def test_law_of_euler_ancestral(gaussian, s, eta):
    sigma = np.r_[SIGMAS[::-1], 0.0]

    def step(i, x):
        now, to = sigma[i : i + 2]
        up = min(to, eta * np.sqrt(to**2 * (now**2 - to**2) / now**2))
        return x + (np.sqrt(to**2 - up**2) - now) * gaussian_eps(x, now), up

    table = tables.euler_ancestral(s, eta=eta, sigmas=SIGMAS)
    np.testing.assert_allclose(law(table, gaussian(MEAN, STD), s), moments(step, s, sigma, table.signal[0]), rtol=1e-9)


@pytest.mark.parametrize("s", PROCESSES, ids=repr)
@pytest.mark.parametrize("name", ["euler", "heun", "kdpm2"])
def test_law_of_churn(gaussian, s, name):
    """Karras et al., Algorithm 2: γ, σ̂ = σ + γσ, x̂ = x + √(σ̂² − σ²)·S_noise·z, then the step from σ̂."""
    sigma = np.r_[SIGMAS[::-1], 0.0]
    settings = {"churn": 3.0, "s_tmin": 0.1, "s_tmax": 12.0, "s_noise": 1.1}

    def step(i, x):
        now, to = sigma[i : i + 2]
        gamma = min(3.0 / 10, 2**0.5 - 1) if 0.1 <= now <= 12 else 0.0
        hat = now + gamma * now
        slope = gaussian_eps(x, hat)
        guess = x + (to - hat) * slope
        gain = 1 + (to - hat) * hat / (STD**2 + hat**2)
        if name == "heun" and to > 0:
            guess = x + (to - hat) / 2 * (slope + gaussian_eps(guess, to))
            gain = 1 + (to - hat) / 2 * (hat / (STD**2 + hat**2) + to / (STD**2 + to**2) * gain)
        if name == "kdpm2" and to > 0:
            middle = np.sqrt(hat * to)
            there = 1 + (middle - hat) * hat / (STD**2 + hat**2)
            guess = x + (to - hat) * gaussian_eps(x + (middle - hat) * slope, middle)
            gain = 1 + (to - hat) * middle / (STD**2 + middle**2) * there
        return guess, abs(gain) * 1.1 * np.sqrt(hat**2 - now**2)

    table = getattr(tables, name)(s, sigmas=SIGMAS, **settings)
    assert (~table.asks).sum() == 7 and table.evaluations == (10 if name == "euler" else 19)
    np.testing.assert_allclose(law(table, gaussian(MEAN, STD), s), moments(step, s, sigma, table.signal[0]), rtol=1e-9)


@pytest.mark.parametrize("s", PROCESSES, ids=repr)
@pytest.mark.parametrize(("order", "eta"), [(1, 1.0), (2, 1.0), (2, 0.4)])
def test_law_of_sde_dpm_solver(gaussian, s, order, eta):
    """The published update in (α, σ), as a linear map of (x, x0 of the row before), its covariance carried along."""
    table = tables.dpm_solver_pp(s, order=order, eta=eta, sigmas=SIGMAS, lower_order_final=False)
    a, n = np.r_[table.signal, 1.0], np.r_[table.noise, 0.0]
    mean, cov = np.zeros(2), np.diag([s.prior_std**2, 0.0])
    for i in range(10):
        total = a[i] ** 2 * STD**2 + n[i] ** 2
        k, k0 = a[i] * STD**2 / total, MEAN * n[i] ** 2 / total  # x0 = k·x + k0
        if i == 9:
            mean, cov = np.array([k * mean[0] + k0, 0]), np.diag([k**2 * cov[0, 0], 0])
            break
        h = np.log(a[i + 1] / n[i + 1]) - np.log(a[i] / n[i])
        data = a[i + 1] * (1 - np.exp(-(1 + eta) * h))
        r = 0 if order == 1 or i == 0 else h / (2 * (np.log(a[i] / n[i]) - np.log(a[i - 1] / n[i - 1])))
        M = np.array([[n[i + 1] / n[i] * np.exp(-eta * h) + data * (1 + r) * k, -data * r], [k, 0]])
        mean, cov = M @ mean + np.array([data * (1 + r) * k0, k0]), M @ cov @ M.T
        cov[0, 0] += n[i + 1] ** 2 * (1 - np.exp(-2 * eta * h))
    np.testing.assert_allclose(law(table, gaussian(MEAN, STD), s), (mean[0], cov[0, 0]), rtol=1e-9)


def test_identities_of_the_stochastic_solvers():
    for eta in (0.0, 0.3, 1.0):
        one, two = tables.euler_ancestral(LINEAR, 12, eta, "trailing"), tables.ddim(LINEAR, 12, eta, "trailing")
        np.testing.assert_allclose(one.rows(), two.rows(), atol=1e-12)
    times = schedules.timesteps(1000, 12, "trailing")  # SDE-DPM-Solver++ 1 is DDPM but for the noise to the power of the step
    sde, ddpm = tables.sde_dpm_solver_pp(LINEAR, order=1, grid=times), tables.ddim(LINEAR, 12, 1.0, "trailing")
    np.testing.assert_allclose(sde.c[:-1], ddpm.c[:-1], rtol=1e-12)
    np.testing.assert_allclose(sde.rows()[:, [2, 4, 9]], ddpm.rows()[:, [2, 4, 9]], atol=1e-11)


# ------------------------------------------------------------------------------------------------------ tables and their rows


def test_a_row_without_use_for_the_model_does_not_ask_it(gaussian):
    table = tables.heun(LINEAR, 6, churn=2.0)
    assert table.evaluations == 11 and len(table) == 11 + (~table.asks).sum() and not table.asks[0] == 0
    asked, told = [], []

    def model(x, t):
        asked.append(t[0])
        return x * 0.1

    run(table, model, progress=lambda done, of: told.append((done, of)), guidance=lambda x, t: 0 * x)
    assert asked == table.t[table.asks].tolist() and told[-1] == (len(table), len(table))
    up = table.noise_to * table.signal > table.noise * table.signal_to
    assert np.array_equal(up, ~table.asks) and np.all(table.c[up] > 0)


def test_only_outputs_that_are_read_are_kept(monkeypatch):
    kept = []
    step = samplers.kernels.step

    def counting(*args, **options):
        kept.append(options["store"] is not None)
        return step(*args, **options)

    monkeypatch.setattr(samplers.kernels, "step", counting)
    for table in (tables.euler(LINEAR, 6), tables.heun(LINEAR, 6), tables.pndm(LINEAR, 9), tables.unipc(LINEAR, 7, 3)):
        kept.clear()
        run(table, lambda x, t: 0.1 * x)
        assert kept == (table.last_read > np.arange(len(table))).tolist()
    assert sum(kept) == 5  # the step to clean data takes x0 alone


def test_reading_far_back():
    """PNDM's first multistep row reads the outputs of rows 0, 4 and 8."""
    table = tables.pndm(LINEAR, 6)
    np.testing.assert_array_equal(table.back[12], [4, 8, 12])
    np.testing.assert_array_equal(table.back[13], [1, 5, 9])
    changed = table.back.copy()
    for row, k, value, law_ in ((0, 0, 0, "back must be at least 1"), (12, 2, 13, "before the first stored output")):
        bad = changed.copy()
        bad[row, k] = value
        with pytest.raises(ValueError, match=f"row {row}: .*{law_}"):
            dataclasses.replace(table, back=bad)


def test_a_table_that_stops_says_so():
    table = tables.dpm_solver(LINEAR, 8)
    assert table.stops and (table.signal_to[-1], table.noise_to[-1]) == tuple(LINEAR.levels(1))
    with pytest.raises(ValueError, match="row 7: the last row must end at clean data"):
        dataclasses.replace(table, stops=False)
    with pytest.raises(ValueError, match="row 7: a table that stops early"):
        dataclasses.replace(tables.dpm_solver(LINEAR, 8, final="data"), stops=True)


def test_only_a_row_that_adds_noise_alone_may_go_up():
    table = tables.euler(LINEAR, 5, churn=2.0)
    row = int(np.flatnonzero(~table.asks)[0])
    for column, value in (("c", 0.0), ("B0", 1e-6), ("Be", 1e-6)):
        changed = getattr(table, column).copy()
        changed[row] = value
        with pytest.raises(ValueError, match=f"row {row}: the noise-to-signal level must move one way"):
            dataclasses.replace(table, **{column: changed})


def test_rows_refuse_what_no_row_can_do():
    path = levels_at(LINEAR, [900, 700, 500, 300, 100, 1, 0])
    book = Rows(path[0])
    x, eps = book.x, book.ask()
    with pytest.raises(ValueError, match="a row asks the model once"):
        book.ask()
    book.go(path[1], flow(x, path[0], path[1], eps), c=0.1)
    with pytest.raises(ValueError, match="row 1 needs the state from before row 0"):
        book.go(path[2], flow(x, path[0], path[2], book.ask()))
    book, known = Rows(path[0]), []
    for now, to in itertools.pairwise(path):
        known.append(book.ask())
        book.go(to, flow(book.x, now, to, sum(known[1:], known[0]) / len(known)))
    with pytest.raises(ValueError, match="row 4 reads 4 stored outputs"):
        book.table("mean", "eps")
    book = Rows(path[0])
    book.go(path[-1], flow(book.x, path[0], path[-1], 1.000001 * book.ask()))  # a weight that is off is refused, not mended
    with pytest.raises(ValueError, match="law fails"):
        book.table("off", "eps")


def test_the_new_sampler_of_the_documentation_is_of_order_2(gaussian):
    """Ten lines in the docstring of :mod:`alphabar.core.tables`, run as they stand there."""
    text = tables.__doc__
    source = textwrap.dedent(text[text.index("    def exponential_midpoint") :])
    assert len(ast.parse(source).body[0].body) == 4 and len(source.strip().splitlines()) <= 12
    names = {"np": np, "grids": grids, "Rows": Rows, "flow": flow, "levels_at": levels_at, "pairwise": itertools.pairwise}
    exec(source, names)
    observed = orders(lambda s, steps: names["exponential_midpoint"](s, steps), gaussian(MEAN, 0.8), (60, 120, 240))
    np.testing.assert_allclose(observed, 2, atol=0.1)
    table = names["exponential_midpoint"](LINEAR, 20)
    want = tables.kdpm2(LINEAR, 20, "logsnr")
    np.testing.assert_allclose(table.rows(), want.rows(), rtol=1e-9, atol=1e-12)


# -------------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("s", PROCESSES, ids=repr)
def test_spacings_in_sigma(s):
    low, high = s.sigma_bar_at([s.t_min, s.T])
    for rho in (1.0, 3.0, 7.0, 40.0):
        sigma = s.sigma_bar_at(grids.sigma_times(s, 9, "karras", rho))
        np.testing.assert_allclose(np.diff(sigma ** (1 / rho)), (high ** (1 / rho) - low ** (1 / rho)) / 8, rtol=1e-8)
        np.testing.assert_allclose(sigma[[0, -1]], [low, high], rtol=1e-12)
    for spacing in ("logsnr", "exponential"):
        sigma = s.sigma_bar_at(grids.sigma_times(s, 9, spacing))
        np.testing.assert_allclose(np.diff(np.log(sigma)), np.log(high / low) / 8, rtol=1e-8)
    table = tables.heun(s, 9, "karras", rho=3.0)
    np.testing.assert_array_equal(np.unique(table.t), grids.sigma_times(s, 9, "karras", 3.0))
    assert "rho=3" in table.name and "rho" not in tables.heun(s, 9, "karras").name


def test_lists_of_sigmas():
    for given in (SIGMAS, SIGMAS[::-1], np.r_[SIGMAS[::-1], 0.0], np.r_[0.0, SIGMAS], list(SIGMAS)):
        table = tables.heun(LINEAR, sigmas=given)
        np.testing.assert_allclose(np.unique(table.noise / table.signal), SIGMAS, rtol=1e-12)
    for given, message in (
        ([], "sigmas must be a list"),
        ([1.0, 1.0], "run one way strictly"),
        ([3.0, 1.0, 2.0], "run one way strictly"),
        ([-1.0, 2.0], "positive"),
        ([0.0], "positive"),
        ([1.0, np.nan], "sigmas must be a list"),
        ([1.0, 1e6], "sigma must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            tables.euler(LINEAR, sigmas=given)
    with pytest.raises(ValueError, match="grid or sigmas, not both"):
        tables.ddim(LINEAR, grid=[1, 2], sigmas=[1.0])
    for options, message in (({"rho": 0.0}, "rho must be"), ({"steps": 0}, "steps must be")):
        with pytest.raises(ValueError, match=message):
            tables.euler(LINEAR, **({"steps": 5} | options), spacing="karras")


def test_arguments_are_checked():
    for call, message in (
        (lambda: tables.dpm_solver(LINEAR, order=4), "order must be 1, 2 or 3"),
        (lambda: tables.dpm_solver(LINEAR, method="both"), "method must be one of"),
        (lambda: tables.dpm_solver(LINEAR, solver_type="euler"), "solver_type must be one of"),
        (lambda: tables.dpm_solver(LINEAR, final="zero"), "final must be 'data' or 'lowest'"),
        (lambda: tables.dpm_solver(LINEAR, grid=[1]), "final='lowest' needs times above"),
        (lambda: tables.dpm_solver_pp(LINEAR, eta=-1), "eta must be at least 0"),
        (lambda: tables.dpm_solver_pp(LINEAR, eta=1, method="singlestep"), "eta goes with method 'multistep'"),
        (lambda: tables.unipc(LINEAR, order=4), "order must be 1, 2 or 3"),
        (lambda: tables.unipc(LINEAR, variant="bh3"), "variant must be"),
        (lambda: tables.deis(LINEAR, order=5), "order must be 1, 2, 3 or 4"),
        (lambda: tables.lms(LINEAR, order=0), "order must be 1, 2, 3 or 4"),
        (lambda: tables.pndm(LINEAR, 3), "steps must be at least 4"),
        (lambda: tables.euler_ancestral(LINEAR, eta=-0.1), "eta must be at least 0"),
        (lambda: tables.heun(LINEAR, churn=-1), "churn must be"),
        (lambda: tables.heun(LINEAR, churn=np.inf), "churn must be"),
        (lambda: tables.heun(LINEAR, churn=1, s_noise=-1), "s_noise must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for name in tables.__all__[1:]:
        with pytest.raises(TypeError, match="s must be a Schedule"):
            getattr(tables, name)(1000)
    flat = schedules.zero_terminal_snr(schedules.scaled_linear())
    for name in ("heun", "kdpm2", "rk4", "lms", "deis", "pndm", "plms", "dpm_solver", "unipc", "euler_ancestral"):
        with pytest.raises(ValueError, match="no signal is left"):
            getattr(tables, name)(flat, 10, spacing="trailing")
    with pytest.raises(ValueError, match="no signal is left"):
        tables.ddim(flat, 10, spacing="karras")


# ---------------------------------------------------------------------------------------------------------------------- EDM


def test_edm_is_the_process_whose_time_is_sigma():
    s = EDM()
    assert (s.T, s.t_min, s.prior_std) == (80, 0.002, 80) and s.levels(3.0) == (1, 3)
    F, G = s.increments(5.0, 4.0)
    assert F == 0 and G == pytest.approx(10)  # ∫2σ dσ by its value at the start
    table = tables.heun(s, 18, "karras")
    i = np.arange(18)
    paper = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(table.t[::2], paper, rtol=1e-12)
    assert table.evaluations == 35
    up = tables.heun(s, 18, "karras", churn=40)
    np.testing.assert_allclose(up.noise_to[0], 80 * np.sqrt(2))  # beyond σ_max, as in the paper
    capped = tables.heun(LINEAR, 18, "karras", churn=40)
    assert np.all(capped.noise / capped.signal <= LINEAR.sigma_bar[-1] * (1 + 1e-12)) and capped.asks[0]
    for bad in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="sigma_min and sigma_max"):
            EDM(*bad)
    with pytest.raises(ValueError, match="at least 0"):
        s.levels(-1.0)


def test_preconditioning_gives_unit_variances():
    """Karras et al., appendix B.6: for data of deviation σ_data the input and the target of F have variance 1."""
    rng = np.random.default_rng(0)
    for sigma in (0.01, 0.4, 7.0):
        c = convert.preconditioning(sigma, 0.35)
        x0, eps = 0.35 * rng.standard_normal(400_000), rng.standard_normal(400_000)
        x = x0 + sigma * eps
        target = (x0 - c.skip * x) / c.out
        for v in (c.into * x, target):
            assert abs(np.var(v) - 1) < 4 * np.sqrt(2 / v.size)
        assert abs(np.mean(target * x)) < 4 * np.std(x) / np.sqrt(v.size)  # the skip is the best linear guess
        assert c.weight * c.out**2 == pytest.approx(1) and c.noise == pytest.approx(np.log(sigma) / 4)
        s = EDM()
        got = convert.training_target(x0[:, None], eps[:, None], np.full(x0.size, sigma), s, "F:0.35")
        np.testing.assert_allclose(got[:, 0], target, rtol=1e-9, atol=1e-9)
    for bad in ((0.0, 0.5), (1.0, 0.0)):
        with pytest.raises(ValueError, match="sigma"):
            convert.preconditioning(*bad)


@pytest.mark.parametrize("s", PROCESSES, ids=repr)
def test_conversions_of_F(s):
    a, n = s.levels(0.3 * s.T if s is not LADDER else 60)
    rng = np.random.default_rng(1)
    x0, eps = rng.standard_normal((2, 50))
    x, sigma = a * x0 + n * eps, n / a
    c = convert.preconditioning(sigma, 0.7)
    kinds = {"x0": x0, "eps": eps, "v": a * eps - n * x0, "score": -eps / n, "F:0.7": (x0 - c.skip * x / a) / c.out}
    for source, target in itertools.product(kinds, kinds):
        P, Q = convert.coefficients(source, target, a, n)
        np.testing.assert_allclose(P * x + Q * kinds[source], kinds[target], rtol=1e-7, atol=1e-7)
    P, Q = convert.coefficients("F", "F:0.7", a, n)
    one = convert.preconditioning(sigma)
    np.testing.assert_allclose(P * x + Q * (x0 - one.skip * x / a) / one.out, kinds["F:0.7"], rtol=1e-7, atol=1e-9)


def test_F_has_no_singular_level():
    for level in ((1.0, 0.0), (0.0, 1.0), (0.6, 0.8)):
        for target in ("x0", "eps", "v"):
            assert np.all(np.isfinite(convert.coefficients("F", target, *level)))
    np.testing.assert_allclose(convert.coefficients("F:1", "v", 0.6, 0.8), (0, -1), atol=1e-15)  # F is −v where σ_data = 1
    for bad in ("F:", "F:-1", "F:x", "G", "G:1", None):
        with pytest.raises(ValueError, match="source must be one of"):
            convert.coefficients(bad, "x0", 0.6, 0.8)


@pytest.mark.parametrize("s", [EDM(), LINEAR], ids=repr)
def test_a_network_of_the_papers_form_samples_through_edm_model(gaussian, s):
    data = gaussian(MEAN, STD)

    def network(x, c_noise):  # exact: from the scaled input and ln(σ)/4 alone
        sigma = np.exp(4 * c_noise).reshape(-1, 1)
        c = convert.preconditioning(sigma)
        return (data.x0(x / c.into, 1.0, sigma) - c.skip * (x / c.into)) / c.out

    for kind in (np.float32, np.float64):
        table, reference = (tables.heun(s, 12, "karras", prediction=p) for p in ("F", "eps"))
        got = run(table, convert.edm_model(network, s), (s.prior_std * X).astype(kind))
        assert got.dtype == kind
        want = run(reference, data.model(s), s.prior_std * X)
        np.testing.assert_allclose(
            got, want, rtol=1e-9 if kind == np.float64 else 2e-3, atol=1e-9 if kind == np.float64 else 2e-4
        )


# ------------------------------------------------------------------------------------------------------------ thresholding


def test_dynamic_thresholding_is_the_papers_rule():
    x0 = np.random.default_rng(4).standard_normal((6, 5, 5, 3)) * np.array([0.2, 0.5, 1, 2, 4, 8]).reshape(-1, 1, 1, 1)
    got = samplers.thresholded(x0, 0.9)
    for x, y in zip(x0, got, strict=True):
        s = max(1.0, np.quantile(np.abs(x), 0.9))
        np.testing.assert_allclose(y, np.clip(x, -s, s) / s, rtol=1e-12)
    assert np.all(np.abs(got) <= 1)
    np.testing.assert_allclose(samplers.thresholded(x0, 0.9, 1.0), np.clip(x0, -1, 1))
    assert samplers.thresholded(x0.astype(np.float32)).dtype == np.float32
    assert samplers.thresholded(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_pp", "unipc", "ddpm"])
def test_a_threshold_of_one_is_a_static_clip(gaussian, name):
    table, data = getattr(tables, name)(LINEAR, 12), gaussian(0.5, 1.5)
    options = {"noise": noise_for(table), "trajectory": True}
    clipped = run(table, data.model(LINEAR), 3 * X, clip=(-1, 1), **options)
    np.testing.assert_allclose(run(table, data.model(LINEAR), 3 * X, threshold=(0.7, 1.0), **options), clipped, atol=1e-12)
    assert np.max(np.abs(run(table, data.model(LINEAR), 3 * X, threshold=0.7, **options) - clipped)) > 1e-3


def test_thresholding_with_guidance_bounds_the_guided_x0(gaussian):
    table, data = tables.ddim(LINEAR, 12, prediction="v"), gaussian(MEAN, STD)
    pull = lambda x, t: 2.0 - x  # noqa: E731
    got = run(table, data.model(LINEAR, "v"), guidance=pull, threshold=0.5)
    x = X
    for i, t in enumerate(table.t):
        a, n = LINEAR.levels(t)
        score = -data.eps(x, a, n) / n + pull(x, t)
        x0 = samplers.thresholded((x + n**2 * score) / a, 0.5)
        x = table.signal_to[i] * x0 + table.noise_to[i] * (x - a * x0) / n
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-10)


def test_thresholds_are_checked():
    table = tables.ddim(LINEAR, 3)
    for bad in (0.0, 1.5, (0.9, 0.5), (0.9,), (0.5, 1, 2)):
        with pytest.raises(ValueError, match="threshold must be"):
            run(table, lambda x, t: x, threshold=bad)
    for options in ({"clip": (-1, 1)}, {"rederive_eps": False}):
        with pytest.raises(ValueError, match="threshold goes without"):
            run(table, lambda x, t: x, threshold=0.9, **options)
