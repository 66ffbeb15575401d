"""Sampler tables: the laws of the rows, textbook loops as judges, orders of accuracy, limits and refusals."""

import dataclasses
import itertools
import warnings

import numpy as np
import pytest

from alphabar.core import forward, samplers, schedules, tables
from alphabar.core.convert import PREDICTIONS

LINEAR = schedules.linear()
RNG = np.random.default_rng(1)
X_T = RNG.standard_normal((5, 4))
MEAN, STD = 0.3, 0.5


def builder(name, **fixed):
    return lambda s, S, **k: getattr(tables, name)(s, S, **(fixed | k))


BUILDERS = {
    "ddpm": builder("ddpm"),
    "ddpm-beta": builder("ddpm", variance="beta"),
    "ddim-0": builder("ddim"),
    "ddim-0.3": builder("ddim", eta=0.3),
    "ddim-1": builder("ddim", eta=1.0),
    "ddim-hat": builder("ddim", sigma="hat"),
    "ddim_encode": builder("ddim_encode"),
    "euler": builder("euler"),
    "euler-churn": builder("euler", churn=3.0, s_noise=1.1),
    "euler_ancestral": builder("euler_ancestral"),
    "euler_ancestral-2": builder("euler_ancestral", eta=2.0),
    "heun": builder("heun"),
    "heun-churn": builder("heun", churn=3.0, s_noise=0.9),
    "kdpm2": builder("kdpm2"),
    "rk4": builder("rk4"),
    **{f"dpm++{o}": builder("dpm_solver_pp", order=o) for o in (1, 2, 3)},
    **{f"dpm++{o}S": builder("dpm_solver_pp", order=o, method="singlestep") for o in (2, 3)},
    **{f"dpm{o}": builder("dpm_solver", order=o) for o in (1, 2, 3)},
    **{f"dpm{o}S": builder("dpm_solver", order=o, method="singlestep", solver_type="heun") for o in (2, 3)},
    "dpm-data": builder("dpm_solver", order=3, final="data"),
    "dpm++3taylor": builder("dpm_solver_pp", order=3, taylor=True),
    **{f"sde{o}": builder("sde_dpm_solver_pp", order=o) for o in (1, 2, 3)},
    **{f"ab{o}": builder("adams_bashforth", order=o) for o in (1, 2, 3, 4)},
    **{f"ab{o}-full": builder("adams_bashforth", order=o, full_order_start=True) for o in (3, 4)},
    "lms": builder("lms"),
    **{f"deis{o}": builder("deis", order=o) for o in (2, 3, 4)},
    "pndm": builder("pndm"),
    "plms": builder("plms"),
    **{f"unipc{o}{v}": builder("unipc", order=o, variant=v) for o in (1, 2, 3) for v in ("bh1", "bh2")},
}
DOUBLE = ("heun", "kdpm2")  # two rows a step but the last


@pytest.fixture
def data(gaussian):
    return gaussian(MEAN, STD)


# ------------------------------------------------------------------------------------------------------------------------ laws


def law_errors(table):
    """How far the rows are from carrying the level (signal, noise) to (signal_to, noise_to), by a forward pass of moments."""
    past, on_x0 = table.H.sum(axis=1), table.history == "x0"
    on_data = table.A * table.signal + table.B0 + (past if on_x0 else 0)
    on_noise = table.A * table.noise + table.Be + (0 if on_x0 else past)
    size = np.abs(table.H).sum(1) + np.abs(table.A) + np.abs(table.B0) + np.abs(table.Be) + 1
    return (on_data - table.signal_to) / size, (on_noise**2 + table.c**2 - table.noise_to**2 - table.excess) / size


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("schedule", [LINEAR, schedules.cosine(), schedules.scaled_linear()], ids=lambda s: s.name)
def test_rows_carry_the_marginals(name, schedule):
    for spacing in (*schedules.SPACINGS, "karras", "logsnr"):
        for steps in (1, 2, 3, 10, 50, 999) if schedule is LINEAR and spacing == "linspace" else (1, 2, 3, 10):
            if name == "pndm" and steps < 4:
                continue
            table = BUILDERS[name](schedule, steps, spacing=spacing)
            if name in ("ddpm", "ddim-0", "euler", "dpm++2", *DOUBLE):
                assert len(table) == (2 * steps - 1 if name in DOUBLE else steps)
            for error in law_errors(table):
                assert np.max(np.abs(error)) < 2e-14
            assert table.asks.all() or "churn" in name
            told = table.t[table.asks] if "churn" not in name else table.t[:0]
            assert np.all(np.diff(told) <= 0 if table.descends else np.diff(told) >= 0)
            last = (table.signal_to[-1], table.noise_to[-1], table.c[-1])
            if table.stops:
                assert (*last[:2],) == tuple(schedule.levels(1)) and name.startswith("dpm")
            else:
                assert last == (1, 0, 0) if table.descends else last[2] == 0


@pytest.mark.parametrize("name", BUILDERS)
def test_one_coefficient_off_by_a_millionth_is_refused(name):
    table = BUILDERS[name](LINEAR, 8)
    tried = 0
    for row in range(len(table)):
        for column in ("A", "B0", "Be", "c", "excess", "H"):
            for k in range(3 if column == "H" else 1):
                for change in (1e-6, -1e-6):
                    value = np.array(getattr(table, column))
                    value[(row, k) if column == "H" else row] += change
                    with pytest.raises(ValueError, match=rf"row {row}"):
                        dataclasses.replace(table, **{column: value})
                    tried += 1
    assert tried == len(table) * 16


def test_a_table_refuses_broken_paths():
    table = tables.ddim(LINEAR, 10)
    for column, row, value, law in (
        ("signal", 3, 0.5, "start at the level"),
        ("t", 4, 901.0, "descend"),
        ("t", 0, np.nan, "finite"),
        ("c", 2, -0.1, "negative"),
        ("A", 2, np.inf, "finite"),
    ):
        changed = np.array(getattr(table, column))
        changed[row] = value
        with pytest.raises(ValueError, match=law):
            dataclasses.replace(table, **{column: changed})
    cut = {f.name: getattr(table, f.name)[:-1] for f in dataclasses.fields(table)[3:-1]}
    with pytest.raises(ValueError, match=r"row 8: the last row must end at clean data"):
        dataclasses.replace(table, **cut)
    with pytest.raises(ValueError, match=r"B0 must have shape \(10,\)"):
        dataclasses.replace(table, B0=table.B0[:-1])
    with pytest.raises(ValueError, match="prediction must be one of"):
        dataclasses.replace(table, prediction="noise")
    with pytest.raises(ValueError, match="history must be"):
        dataclasses.replace(table, history="v")
    reverse = {f.name: getattr(table, f.name)[::-1] for f in dataclasses.fields(table)[3:-1]}
    with pytest.raises(ValueError):
        dataclasses.replace(table, **reverse)
    with pytest.raises(ValueError, match="read-only"):
        table.B0[0] = 1


def test_inexact_rows_err_with_the_square_of_the_step():
    worst = []
    for steps in (250, 500, 1000):
        table = tables.euler_maruyama(LINEAR, steps)
        assert not table.exact.any()
        inner = slice(0, len(table) * 9 // 10)  # away from clean data, where the step in ln ᾱ is small
        worst.append(max(np.max(np.abs(e[inner])) for e in law_errors(table)))
    np.testing.assert_allclose(np.log2(np.array(worst[:-1]) / worst[1:]), 2, atol=0.15)


# -------------------------------------------------------------------------------------------------------------- textbook loops


def run(table, model, noise=None, clip=None, **options):
    return samplers.sample(model, table, X_T, noise=noise, clip=clip, **options)


def noise_for(table):
    return np.random.default_rng(9).standard_normal((len(table), *X_T.shape))


def textbook_ddim(model, tau, eta, z, clip=None, rederive=True, hat=False):
    """Eq. 12 of the DDIM paper, as printed."""
    ab, x = LINEAR.alpha_bar, X_T
    for i, t in enumerate(tau[::-1]):
        a, prev = ab[t], ab[tau[len(tau) - 2 - i]] if i + 1 < len(tau) else 1.0
        eps = model(x, np.full(len(x), t))
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        if clip is not None:
            x0 = np.clip(x0, *clip)
            eps = (x - np.sqrt(a) * x0) / np.sqrt(1 - a) if rederive else eps
        sigma = eta * np.sqrt((1 - prev) / (1 - a)) * np.sqrt(1 - a / prev)
        last = i + 1 == len(tau)
        std = (0 if last else np.sqrt(1 - a / prev)) if hat else sigma
        x = np.sqrt(prev) * x0 + np.sqrt(max(1 - prev - sigma**2, 0)) * eps + std * z[i]
    return x


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_the_textbook_loop(data, spacing, eta):
    model = data.model(LINEAR)
    for clip, rederive in ((None, True), ((-0.4, 0.6), True), ((-0.4, 0.6), False)):
        table = tables.ddim(LINEAR, 20, eta, spacing)
        z = noise_for(table)
        got = run(table, model, z, clip, rederive_eps=rederive)
        want = textbook_ddim(model, schedules.timesteps(1000, 20, spacing), eta, z, clip, rederive)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


def test_sigma_hat_is_the_textbook_loop(data):
    model, table = data.model(LINEAR), tables.ddim(LINEAR, 20, sigma="hat")
    z = noise_for(table)
    want = textbook_ddim(model, schedules.timesteps(1000, 20), 1.0, z, hat=True)
    np.testing.assert_allclose(run(table, model, z), want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_is_the_textbook_loop(data, variance):
    """Algorithm 2 of the DDPM paper, on all T steps."""
    s, model = LINEAR, data.model(LINEAR)
    table = tables.ddpm(s, variance=variance)
    z, x = noise_for(table), X_T
    for t in range(s.T, 0, -1):
        eps = model(x, np.full(len(x), t))
        std = np.sqrt((s.beta if variance == "beta" else s.beta_tilde)[t]) if t > 1 else 0.0
        x = (x - s.beta[t] / np.sqrt(1 - s.alpha_bar[t]) * eps) / np.sqrt(s.alpha[t]) + std * z[s.T - t]
    np.testing.assert_allclose(run(table, model, z), x, rtol=1e-8, atol=1e-9)


def test_ddpm_clips_by_the_posterior_at_the_bounded_data(data):
    s, model = LINEAR, data.model(LINEAR)
    table = tables.ddpm(s)
    z, x = noise_for(table), X_T
    for t in range(s.T, 0, -1):
        mean, var = forward.p_mean_variance(model(x, np.full(len(x), t)), x, t, s, clip=(-0.3, 0.5))
        x = mean + np.sqrt(var) * z[s.T - t]
    np.testing.assert_allclose(run(table, model, z, (-0.3, 0.5)), x, rtol=1e-8, atol=1e-9)


def sigma_path(table):
    """(times, σ̄ with the final 0) of a table with one row a step."""
    return table.t, np.r_[table.noise / table.signal, 0.0]


def test_euler_heun_are_the_textbook_loops_in_sigma(data):
    eps = lambda xbar, sigma: data.eps(xbar / np.sqrt(1 + sigma**2), 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2))  # noqa: E731
    for spacing in ("linspace", "karras", "leading", "trailing", "quadratic"):
        _, sigma = sigma_path(tables.euler(LINEAR, 13, spacing))
        euler = heun = X_T * np.sqrt(1 + sigma[0] ** 2)
        for now, to in itertools.pairwise(sigma):
            euler = euler + (to - now) * eps(euler, now)
            slope = eps(heun, now)
            guess = heun + (to - now) * slope
            heun = guess if to == 0 else heun + (to - now) / 2 * (slope + eps(guess, to))
        model = data.model(LINEAR)
        np.testing.assert_allclose(run(tables.euler(LINEAR, 13, spacing), model), euler, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(run(tables.heun(LINEAR, 13, spacing), model), heun, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("clip", [None, (-0.2, 0.4)])
def test_dpm_solver_pp_2m_is_the_textbook_loop(data, clip):
    table = tables.dpm_solver_pp(LINEAR, 15, order=2)
    model, x, old, h_old = data.model(LINEAR), X_T, None, None
    for i, t in enumerate(table.times):
        a, n, a_to, n_to = table.signal[i], table.noise[i], table.signal_to[i], table.noise_to[i]
        x0 = (x - n * model(x, np.full(len(x), t))) / a
        x0 = x0 if clip is None else np.clip(x0, *clip)
        if n_to == 0:
            x = x0
            break
        h = np.log(a_to / n_to) - np.log(a / n)
        d = x0 if old is None else (1 + h / (2 * h_old)) * x0 - h / (2 * h_old) * old
        x, old, h_old = n_to / n * x - a_to * np.expm1(-h) * d, x0, h
    np.testing.assert_allclose(run(table, model, clip=clip), x, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_integrates_polynomials_of_its_degree(order):
    """dx̄ = ε(σ̄)dσ̄ with ε a polynomial of degree order − 1 is solved without error, once the history is full."""
    table = tables.adams_bashforth(LINEAR, 12, order, "karras")
    _, sigma = sigma_path(table)
    for degree in range(order):
        for i in range(order - 1, len(table)):
            now = sigma[i - np.arange(order)] / sigma[0]
            change = (table.B0[i] * 0 + table.Be[i] - table.signal_to[i] * sigma[i]) * now[0] ** degree
            change += np.sum(table.H[i, : order - 1] * now[1:] ** degree)
            want = (
                table.signal_to[i] * (sigma[i + 1] ** (degree + 1) - sigma[i] ** (degree + 1)) / (degree + 1) / sigma[0] ** degree
            )
            assert change == pytest.approx(want, rel=1e-7, abs=1e-10)


def test_euler_maruyama_is_the_textbook_loop(data):
    s, model = LINEAR, data.model(LINEAR)
    table = tables.euler_maruyama(s)
    z, x = noise_for(table), X_T
    for t in range(s.T, 0, -1):
        step = -np.log(s.alpha[t])
        score = -model(x, np.full(len(x), t)) / np.sqrt(1 - s.alpha_bar[t])
        x = x + step * x / 2 + step * score + (np.sqrt(step) * z[s.T - t] if t > 1 else 0)
    np.testing.assert_allclose(run(table, model, z), x, rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_ddim_at_eta_one_is_ddpm(steps):
    for spacing in schedules.SPACINGS:
        one, two = tables.ddim(LINEAR, steps, 1.0, spacing).rows(), tables.ddpm(LINEAR, steps, spacing=spacing).rows()
        np.testing.assert_allclose(one, two, rtol=1e-8, atol=1e-9)


def test_euler_is_ddim_and_first_orders_agree():
    ddim = tables.ddim(LINEAR, 30, spacing="trailing").rows()
    for other in (
        tables.euler(LINEAR, 30, "trailing"),
        tables.adams_bashforth(LINEAR, 30, 1, "trailing"),
        tables.dpm_solver_pp(LINEAR, 30, 1, grid=schedules.timesteps(1000, 30, "trailing")),
    ):
        np.testing.assert_allclose(
            other.rows()[:, 2:], ddim[:, 2:] if other.history == "eps" else other.rows()[:, 2:], atol=1e-11
        )
        np.testing.assert_allclose(other.rows()[:, [2, 4, 9]], ddim[:, [2, 4, 9]], atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", [k for k in BUILDERS if k != "ddim_encode"])
def test_any_prediction_gives_the_same_samples(data, name, prediction):
    table = BUILDERS[name](LINEAR, 12)
    other = BUILDERS[name](LINEAR, 12, prediction=prediction)
    z = noise_for(table)
    for clip, rederive in ((None, True), ((-0.2, 0.5), True), ((-0.2, 0.5), False)):
        want = run(table, data.model(LINEAR), z, clip, rederive_eps=rederive)
        got = run(other, data.model(LINEAR, prediction), z, clip, rederive_eps=rederive)
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-9)
        if clip is not None and name.startswith(("ddpm", "ddim")):  # their last row is the bounded x0 itself
            assert np.all((got >= clip[0]) & (got <= clip[1]))


def test_zero_terminal_snr_can_be_sampled_by_a_v_model(data):
    s = schedules.zero_terminal_snr(schedules.scaled_linear())
    for table in (tables.ddim(s, 40, spacing="trailing", prediction="v"), tables.ddpm(s, 40, spacing="trailing", prediction="v")):
        got = run(table, data.model(s, "v"), noise_for(table))
        assert np.all(np.isfinite(got))
    with pytest.raises(ValueError, match="x0 cannot be found from eps where the signal level is 0"):
        tables.ddim(s, 40, spacing="trailing").rows()
    for builder in (tables.heun, tables.dpm_solver_pp, tables.adams_bashforth, tables.euler_maruyama):
        with pytest.raises(ValueError, match="no signal is left"):
            builder(s, 10, spacing="trailing")


# ---------------------------------------------------------------------------------------------------------- orders of accuracy


def orders(builder, data, counts, **options):
    model = data.model(LINEAR)
    errors = []
    for steps in counts:
        table = builder(LINEAR, steps, **options)
        exact = data.flow(X_T, table.signal[0], table.noise[0], table.signal[-1], table.noise[-1])
        errors.append(np.max(np.abs(run(table, model, trajectory=True)[-2] - exact)))  # before the last jump, of σ̄ = 0.01 to 0
    errors = np.array(errors)
    return np.log(errors[:-1] / errors[1:]) / np.log(np.array(counts[1:]) / np.array(counts[:-1]))


def test_first_order_samplers(gaussian):
    data = gaussian(0.3, 0.8)
    np.testing.assert_allclose(orders(tables.euler, data, (40, 80, 160), spacing="karras"), 1, atol=0.06)
    np.testing.assert_allclose(orders(tables.ddim, data, (50, 100, 200), spacing="linspace"), 1, atol=0.15)
    np.testing.assert_allclose(orders(tables.dpm_solver_pp, data, (40, 80, 160), spacing="karras", order=1), 1, atol=0.06)


def test_second_order_samplers(gaussian):
    data = gaussian(0.3, 0.8)
    np.testing.assert_allclose(orders(tables.heun, data, (40, 80, 160), spacing="karras"), 2, atol=0.1)
    np.testing.assert_allclose(orders(tables.dpm_solver_pp, data, (80, 160, 320), spacing="karras", order=2), 2, atol=0.1)
    np.testing.assert_allclose(orders(tables.adams_bashforth, data, (40, 80, 160), spacing="karras", order=2), 2, atol=0.12)


def test_higher_orders(gaussian):
    """Rows before the history is full are of lower order, but of so little curvature here that the order of the rest shows."""
    data = gaussian(0.3, 0.8)
    for order in (3, 4):
        observed = orders(tables.adams_bashforth, data, (80, 160, 320), spacing="karras", order=order)
        np.testing.assert_allclose(observed, order, atol=0.2)


def test_dpm_solver_pp_3m_is_of_order_2_as_published_and_of_order_3_by_taylor(gaussian):
    data = gaussian(0.3, 0.8)
    published = orders(tables.dpm_solver_pp, data, (160, 320, 640), spacing="karras", order=3)
    np.testing.assert_allclose(published, 2, atol=0.1)
    taylor = orders(tables.dpm_solver_pp, data, (80, 160, 320), spacing="karras", order=3, taylor=True)
    np.testing.assert_allclose(taylor, 3, atol=0.1)


# ---------------------------------------------------------------------------------------------------- encoding and consistency


@pytest.mark.parametrize("label", ["target", "current"])
def test_encoding_and_decoding_return_the_data(linear, mixture, label):
    data = mixture([0.4, 0.6], [-1.0, 1.0], [0.3, 0.3])
    model, x0 = data.model(linear), data.sample(400, np.random.default_rng(2))
    errors = []
    for steps in (10, 20, 50, 100, 200, 500):
        grid = {"spacing": "trailing"}
        code = samplers.sample(model, tables.ddim_encode(linear, steps, label=label, **grid), x0)
        back = samplers.sample(model, tables.ddim(linear, steps, **grid), code)
        errors.append(np.mean((back - x0) ** 2))
    slopes = np.diff(np.log(errors)) / np.diff(np.log([10, 20, 50, 100, 200, 500]))
    assert np.all(np.diff(errors) < 0) and np.all(slopes < -1) and np.all(slopes > -2.6)
    assert errors[-1] < 1e-3
    assert abs(np.var(code) - 1) < 0.25  # the codes look like the prior


def test_encoder_labels(linear):
    target, current = tables.ddim_encode(linear, 4), tables.ddim_encode(linear, 4, label="current")
    assert target.times.tolist() == [1, 251, 501, 751] and current.times.tolist() == [1, 1, 251, 501]
    assert not target.descends and target.signal[0] == 1 and target.noise[0] == 0
    v = tables.ddim_encode(linear, 4, prediction="v")
    assert np.all(np.isfinite(v.rows()))
    for bad in ({"label": "next"}, {"prediction": "x0"}, {"prediction": "score"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            tables.ddim_encode(linear, 4, **bad)


def test_samples_of_one_code_agree_across_step_counts(linear, mixture):
    data = mixture([0.4, 0.6], [-1.0, 1.0], [0.3, 0.3])
    code = np.random.default_rng(3).standard_normal(1000)
    best = samplers.sample(data.model(linear), tables.ddim(linear, 1000), code)
    distance, same_mode = [], []
    for steps in (10, 20, 50, 100):
        x = samplers.sample(data.model(linear), tables.ddim(linear, steps, spacing="trailing"), code)
        distance.append(np.mean((x - best) ** 2))
        same_mode.append(np.mean((x > 0) == (best > 0)))
    assert np.all(np.diff(distance) < 0) and same_mode[2] > 0.95


def test_final_laws_of_sampling_gaussian_data(linear, gaussian):
    """The exact variance that each sampler leaves, from the rows alone: x' = (a + e·k)·x + c·z with ε = k·x."""
    data = gaussian(0.0, 1.0)
    for table, want in (
        (tables.ddpm(linear), 0.99107),
        (tables.ddpm(linear, variance="beta"), 0.99990),
        (tables.ddim(linear, 1000), None),
    ):
        rows, v = table.rows(), 1.0
        for i in range(len(table)):
            k = data.eps(1.0, table.signal[i], table.noise[i])
            v = (rows[i, 2] + rows[i, 4] * k) ** 2 * v + rows[i, 9] ** 2
        assert v == pytest.approx(want, abs=1e-5) if want else abs(v - 1) < 1e-2


# -------------------------------------------------------------------------------------------------------------------- refusals


def test_arguments_are_checked(linear):
    for call, message in (
        (lambda: tables.ddim(linear, 0), "steps must be in 1..1000"),
        (lambda: tables.ddim(linear, 1001), "steps must be in 1..1000"),
        (lambda: tables.ddim(linear, 10, eta=1.2), "eta must be in"),
        (lambda: tables.ddim(linear, 10, eta=-0.1), "eta must be in"),
        (lambda: tables.ddim(linear, 10, sigma="beta"), "sigma must be"),
        (lambda: tables.ddim(linear, 10, spacing="cosine"), "spacing must be one of"),
        (lambda: tables.euler(linear, 10, spacing="cosine"), "spacing must be one of"),
        (lambda: tables.ddpm(linear, 10, variance="learned"), "variance must be"),
        (lambda: tables.dpm_solver_pp(linear, 10, order=4), "order must be 1, 2 or 3"),
        (lambda: tables.dpm_solver_pp(linear, 1000), "steps must be below 1000"),
        (lambda: tables.adams_bashforth(linear, 10, order=5), "order must be 1, 2, 3 or 4"),
        (lambda: tables.euler(linear, 10, prediction="G"), "prediction must be one of"),
        (lambda: tables.euler(linear, 10, prediction="F:0"), "prediction must be one of"),
        (lambda: tables.ddim(linear, grid=[]), "grid must be"),
        (lambda: tables.ddim(linear, grid=[3, 3]), "grid must ascend strictly"),
        (lambda: tables.ddim(linear, grid=[0, 3]), "grid must ascend strictly"),
        (lambda: tables.ddim(linear, grid=[5, 1001]), "grid must ascend strictly"),
        (lambda: tables.ddim(linear, grid=[5, np.nan]), "grid must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_grids_of_ones_own(linear, data):
    table = tables.ddim(linear, grid=[1, 5, 50, 300, 1000])
    assert table.times.tolist() == [1000, 300, 50, 5, 1] and table.times.dtype == np.int64
    between = tables.ddim(linear, grid=[0.5, 20.25, 999.5])
    assert between.times.dtype == np.float64 and np.all(np.isfinite(run(between, data.model(linear))))
    assert tables.euler(linear, 1).t.tolist() == [1] and tables.euler(linear, 1, "karras").t == pytest.approx([1000])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny = schedules.from_betas([0.1, 1 / 3, 0.5])
    assert tables.ddim(tiny, grid=[1, 3]).times.tolist() == [3, 1]


def test_names_tell_the_settings(linear):
    assert repr(tables.ddim(linear, 50, 0.5)) == "Table(ddim(steps=50, leading, eta=0.5), 50 rows, model predicts eps)"
    assert "variance=beta" in tables.ddpm(linear, variance="beta").name
    assert "order=2" in tables.dpm_solver_pp(linear).name and "linspace" in tables.dpm_solver_pp(linear).name
