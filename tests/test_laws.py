"""What samplers do to whole laws: Gaussian data to 1e-10 against the papers' recursions, and the weights of a mixture.

A sampler with the exact network of Gaussian data is an affine map of its start and its noise. Run on unit inputs, one for each,
it tells that map, and with it the mean and the variance of its samples without any sampling error.
"""

import itertools

import numpy as np
import pytest

from alphabar.core import langevin, samplers, schedules, tables
from alphabar.core import predictor_corrector as pc
from alphabar.core.sde import VESDE, VPSDE, SubVPSDE

MEAN, VAR = 0.3, 0.25
LINEAR, LADDER = schedules.linear(), schedules.geometric(0.01, 20, 60)
VE, VP, SUB = VESDE(0.01, 20), VPSDE(), SubVPSDE()
PROCESSES = [LINEAR, LADDER, VE, VP, SUB]
STEPS = 25


def levels(s, t):
    """(a, n) from the formulas of the papers, apart from the code under test."""
    t = np.asarray(t, np.float64)
    B = 0.1 * t + 0.5 * 19.9 * t**2
    if s is LINEAR:
        alpha_bar = np.cumprod(np.r_[1.0, 1 - np.linspace(1e-4, 0.02, 1000)])[np.rint(t).astype(int)]
        return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    if s is LADDER:
        return np.ones_like(t), np.r_[0.0, np.geomspace(0.01, 20, 60)][np.rint(t).astype(int)]
    if s is VE:
        return np.ones_like(t), np.sqrt((0.01 * 2000**t) ** 2 - 0.01**2)
    return np.exp(-B / 2), np.sqrt(1 - np.exp(-B)) if s is VP else 1 - np.exp(-B)


def score(x, a, n):
    return -(x - a * MEAN) / (a**2 * VAR + n**2)


def noise_of(x, a, n):
    return -n * score(x, a, n)


def slope(a, n):
    """d score/dx."""
    return -1 / (a**2 * VAR + n**2)


@pytest.fixture
def data(gaussian):
    return gaussian(MEAN, np.sqrt(VAR))


@pytest.fixture(params=PROCESSES, ids=repr)
def s(request):
    return request.param


def law(run, rows, s):
    """(mean, variance) of run(x_T, noise) from x_T ~ N(0, prior_std²): offset, slope and the weight of each row's noise."""
    x, z = np.zeros(rows + 2), np.eye(rows, rows + 2, 2)
    x[1] = 1
    out = run(x, z)
    effect = out[1:] - out[0]
    return out[0], (effect[0] * s.prior_std) ** 2 + np.sum(effect[1:] ** 2)


def table_law(table, s, data):
    return law(lambda x, z: samplers.sample(data.model(s, table.prediction), table, x, noise=z), len(table), s)


def path_of(s, spacing="trailing"):
    """The times of the sampler, T first and clean data last, and their levels."""
    low, T = s.t_min, s.T
    if isinstance(s.T, int):
        up = schedules.timesteps(T, STEPS, spacing)
    else:
        up = {"trailing": low + (T - low) * np.arange(1, STEPS + 1) / STEPS, "linspace": np.linspace(low, T, STEPS)}[spacing]
    t = np.r_[up[::-1], 0.0]
    return t, *levels(s, t)


def chain(s, step, a, n):
    """Mean and variance of x' = (step's mean of x) + std·z from row to row; step(i, x) -> (mean, std)."""
    mean, var = 0.0, s.prior_std**2
    for i in range(len(a) - 1):
        offset, std = step(i, 0.0)
        gain = step(i, 1.0)[0] - offset
        mean, var = offset + gain * mean, gain**2 * var + std**2
    return mean, var


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-10)


# -------------------------------------------------------------------------------------------------- stochastic samplers, Gaussian


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ancestral_sampling(s, data, variance):
    """DDPM's Algorithm 2 for VP, the ancestral step of appendix F for VE; for sub-VP the posterior by Gaussian conditioning.

    The step on the VE side: x + (σ_i² − σ_{i−1}²)·score, noise variance σ_{i−1}²(σ_i² − σ_{i−1}²)/σ_i².
    """
    t, a, n = path_of(s)

    def step(i, x):
        sc, (a0, a1), (n0, n1) = score(x, a[i], n[i]), a[i : i + 2], n[i : i + 2]
        if s in (LADDER, VE):
            added = n0**2 - n1**2
            mean, var = x + added * sc, added if variance == "beta" else n1**2 * added / n0**2
        elif s in (LINEAR, VP):
            alpha = (a0 / a1) ** 2
            mean = (x - (1 - alpha) / np.sqrt(1 - a0**2) * noise_of(x, a0, n0)) / np.sqrt(alpha)
            var = 1 - alpha if variance == "beta" else (1 - a1**2) / (1 - a0**2) * (1 - alpha)
        else:  # x_to = a1·x0 + n1·ε1 and x = k·x_to + √v·z, given x and x0
            k = a0 / a1
            v = n0**2 - k**2 * n1**2
            x0 = (x + n0**2 * sc) / a0
            mean, var = a1 * x0 + k * n1**2 / n0**2 * (x - a0 * x0), v if variance == "beta" else n1**2 * v / n0**2
        return mean, np.sqrt(var) if t[i + 1] > 0 else 0.0

    close(table_law(tables.ddpm(s, STEPS, variance, spacing="trailing"), s, data), chain(s, step, a, n))


@pytest.mark.parametrize("prediction", ["eps", "score", "x0", "v"])
@pytest.mark.parametrize("flow", [False, True])
def test_euler_maruyama(s, data, flow, prediction):
    """x' = x − h·(f·x − g²·score) + g√h·z with f and g of the paper; of the tables their integrals over the step."""
    t, a, n = path_of(s)

    def step(i, x):
        h, now = t[i] - t[i + 1], t[i]
        beta = 0.1 + 19.9 * now
        f, g2 = {
            VE: lambda: (0.0, (0.01 * 2000**now) ** 2 * 2 * np.log(2000)),
            VP: lambda: (-beta / 2, beta),
            SUB: lambda: (-beta / 2, beta * (1 - np.exp(-2 * (0.1 * now + 0.5 * 19.9 * now**2)))),
            LADDER: lambda: (0.0, (n[i] ** 2 - n[i + 1] ** 2) / h),
            LINEAR: lambda: (np.log(a[i] / a[i + 1]) / h, -2 * np.log(a[i] / a[i + 1]) / h),
        }[s]()
        if flow:
            return x - h * (f * x - g2 / 2 * score(x, a[i], n[i])), 0.0
        return x - h * (f * x - g2 * score(x, a[i], n[i])), np.sqrt(g2 * h) if t[i + 1] > 0 else 0.0

    table = tables.euler_maruyama(s, STEPS, prediction=prediction, probability_flow=flow)
    close(table_law(table, s, data), chain(s, step, a, n))


@pytest.mark.parametrize("flow", [False, True])
def test_reverse_diffusion(s, data, flow):
    """Appendix E: x_i = x_{i+1} − f_{i+1}(x_{i+1}) + G²·score + G·z, f and G those of the forward step."""
    t, a, n = path_of(s)

    def step(i, x):
        sc = score(x, a[i], n[i])
        if s in (LADDER, VE):
            f, G2 = 0.0, n[i] ** 2 - n[i + 1] ** 2
        elif s in (LINEAR, VP):
            beta = 1 - (a[i] / a[i + 1]) ** 2
            f, G2 = (np.sqrt(1 - beta) - 1) * x, beta
        else:
            f, G2 = (a[i] / a[i + 1] - 1) * x, n[i] ** 2 - (a[i] / a[i + 1] * n[i + 1]) ** 2
        return x - f + (G2 / 2 if flow else G2) * sc, np.sqrt(G2) if t[i + 1] > 0 and not flow else 0.0

    close(table_law(tables.reverse_diffusion(s, STEPS, probability_flow=flow), s, data), chain(s, step, a, n))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, "hat"])
def test_ddim(s, data, eta):
    """Eq. 12 and 16 of the DDIM paper; on a ladder in x/1, where 1 − ᾱ reads σ²."""
    t, a, n = path_of(s)

    def step(i, x):
        (a0, a1), (n0, n1) = a[i : i + 2], n[i : i + 2]
        eps = noise_of(x, a0, n0)
        hat = np.sqrt(n0**2 - (a0 / a1 * n1) ** 2)
        sigma = (1.0 if eta == "hat" else eta) * n1 / n0 * hat
        mean = a1 * (x - n0 * eps) / a0 + np.sqrt(n1**2 - sigma**2) * eps
        return mean, (hat if eta == "hat" else sigma) if t[i + 1] > 0 else 0.0

    options = {"sigma": "hat"} if eta == "hat" else {"eta": eta}
    close(table_law(tables.ddim(s, STEPS, spacing="trailing", **options), s, data), chain(s, step, a, n))


@pytest.mark.parametrize("corrections", [1, 2])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ddpm"])
def test_predictor_corrector(s, data, predictor, corrections):
    """With norm="level" the corrector x + ε·score + √(2ε)·z, ε = 2α(r·n)², is affine too."""
    t, a, n = path_of(s)
    table = getattr(tables, predictor)(s, STEPS, spacing="trailing")
    rows = STEPS * (1 + corrections)

    def run(x, z):
        zc = z[STEPS:].reshape(STEPS, corrections, -1)
        return pc.sample(data.model(s), table, x, s, norm="level", corrections=corrections, noise=z[:STEPS], corrector_noise=zc)

    mean, var = 0.0, s.prior_std**2
    for i in range(STEPS):
        now = t[i]
        alpha = 1.0 if s in (LADDER, VE) else LINEAR.alpha[int(now)] if s is LINEAR else 1 - (0.1 + 19.9 * now) / 1000
        eps = 2 * alpha * (0.16 * n[i]) ** 2
        for _ in range(corrections):
            mean, var = mean + eps * score(mean, a[i], n[i]), (1 + eps * slope(a[i], n[i])) ** 2 * var + 2 * eps
        k = a[i] / a[i + 1]
        v = n[i] ** 2 - (k * n[i + 1]) ** 2
        gain, std2 = 1 / k + v / k * slope(a[i], n[i]), v * (n[i + 1] / n[i]) ** 2
        if predictor == "ddpm":  # for every process: x' = (x + v·score)/k
            mean = (mean + v * score(mean, a[i], n[i])) / k
        else:
            mean, gain, std2 = (2 - k) * mean + v * score(mean, a[i], n[i]), 2 - k + v * slope(a[i], n[i]), v
        var = gain**2 * var + (std2 if t[i + 1] > 0 else 0)
    close(law(run, rows, s), (mean, var))


@pytest.mark.parametrize("denoise", [True, False])
def test_annealed_langevin(data, denoise):
    """Algorithm 1 of NCSN with α_i = ε·σ_i²/σ_L², and the denoising step of NCSNv2."""
    ladder = schedules.geometric(0.1, 20, 12)
    table = langevin.annealed_langevin(ladder, 20, 2e-3, denoise)
    mean, var = 0.0, 20.0**2
    for sigma in np.geomspace(20, 0.1, 12):
        alpha = 2e-3 * sigma**2 / 0.1**2
        for _ in range(20):
            mean, var = mean + alpha / 2 * score(mean, 1, sigma), (1 + alpha / 2 * slope(1, sigma)) ** 2 * var + alpha
    if denoise:
        mean, var = mean + 0.1**2 * score(mean, 1, 0.1), (1 + 0.1**2 * slope(1, 0.1)) ** 2 * var
    close(table_law(table, ladder, data), (mean, var))


def test_the_sign_of_the_reverse_sde_and_the_time_of_its_score():
    """X60, Eq: S4-E66, S4-E69. dx = σ(t)dw, σ = λ^t, λ = 25, 2000 steps: data variance 0.25 comes back; not with ∇ log p_0."""
    lam, v0 = 25.0, 0.25
    s = VESDE(1 / np.sqrt(2 * np.log(lam)), lam / np.sqrt(2 * np.log(lam)))
    table = tables.euler_maruyama(s, grid=np.arange(1, 2001) / 2000, prediction="score")
    rows = table.rows()

    def final(score_slope):
        v = v0 + s.prior_std**2
        for i in range(len(table)):
            v = (rows[i, 2] + rows[i, 4] * score_slope(table.t[i])) ** 2 * v + rows[i, 9] ** 2
        return v

    assert final(lambda t: -1 / (v0 + s.levels(t)[1] ** 2)) == pytest.approx(v0, abs=1e-3)
    assert final(lambda t: -1 / v0) == pytest.approx(0.125, abs=2e-3)
    assert final(lambda t: 1 / (v0 + s.levels(t)[1] ** 2)) > 1e7


# ------------------------------------------------------------------------------------------------------- the flow, Gaussian


def textbook(name, eps, sigma):
    """The state x̄ at clean data after a method on the path σ̄, from x̄ = 0 and 1: the map that it is."""
    x, past = np.array([0.0, 1.0]), []
    for i, (now, to) in enumerate(itertools.pairwise(sigma)):
        h, k1 = to - now, eps(x, now)
        past = [k1, *past]
        if name == "heun" and to > 0:
            x = x + h / 2 * (k1 + eps(x + h * k1, to))
        elif name == "rk4" and to > 0:
            k2 = eps(x + h / 2 * k1, now + h / 2)
            k3 = eps(x + h / 2 * k2, now + h / 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + eps(x + h * k3, to))
        elif name == "ab2" and i > 0:
            before = sigma[i - 1] - now  # ∫ of the line through two slopes
            x = x + h * k1 + (past[1] - k1) / before * h**2 / 2
        elif name == "ab3" and i > 1:
            nodes = np.array([now, sigma[i - 1], sigma[i - 2]]) - now
            powers = np.linalg.solve(np.vander(nodes, increasing=True).T, h ** np.arange(1, 4) / np.arange(1, 4))
            x = x + sum(w * p for w, p in zip(powers, past, strict=False))
        elif name == "ab3" and i == 1:
            x = x + h * k1 + (past[1] - k1) / (sigma[0] - now) * h**2 / 2
        else:
            x = x + h * k1
    return x


def textbook_dpm(eps, a, n, order):
    """Algorithm 2 of DPM-Solver++ (2M), by its D_i."""
    x, before = np.array([0.0, 1.0]), None
    lam = np.log(a[:-1] / n[:-1])
    for i in range(len(a) - 1):
        x0 = (x - n[i] * eps(x / a[i], n[i] / a[i])) / a[i]
        if i == len(a) - 2:
            return x0
        h = lam[i + 1] - lam[i]
        d = x0
        if order == 2 and i > 0:
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        x, before = n[i + 1] / n[i] * x - a[i + 1] * np.expm1(-h) * d, x0
    return x


@pytest.mark.parametrize("name", ["euler", "heun", "rk4", "ab2", "ab3", "dpm++1", "dpm++2"])
def test_solvers_of_the_flow(s, data, name):
    t, a, n = path_of(s, "linspace")
    if name.startswith("dpm"):
        table = tables.dpm_solver_pp(s, order=int(name[-1]), grid=t[-2::-1])
    elif name.startswith("ab"):
        table = tables.adams_bashforth(s, order=int(name[-1]), grid=t[-2::-1])
    else:
        table = getattr(tables, name)(s, grid=t[-2::-1])

    def eps(xbar, sigma):  # of x0 + σε: the same for every process
        return sigma * (xbar - MEAN) / (VAR + sigma**2)

    out = textbook_dpm(eps, a, n, int(name[-1])) if name.startswith("dpm") else textbook(name, eps, n / a)
    gain = (out[1] - out[0]) / (1 if name.startswith("dpm") else a[0])
    close(table_law(table, s, data), (out[0], (gain * s.prior_std) ** 2))


@pytest.mark.parametrize("name", ["ddpm", "euler_maruyama", "reverse_diffusion"])
@pytest.mark.parametrize("s", [VE, VP, SUB], ids=repr)
def test_stochastic_samplers_reach_the_law_with_the_first_power_of_the_step(s, gaussian, name):
    """Started from the law of x_T, the last variance is that of the data but for O(step), or less; times uniform in ln σ̄."""
    data, errors = gaussian(0.0, np.sqrt(VAR)), []
    a, n = s.levels(s.T)
    low = s.sigma_bar_at(0.02 * s.T)
    for steps in (100, 200, 400):
        grid = s.time(np.minimum(np.geomspace(low, n / a, steps), n / a))
        table = getattr(tables, name)(s, grid=grid)
        rows, v = table.rows(), a**2 * VAR + n**2
        for i in range(len(table) - 1):
            k = data.eps(1.0, table.signal[i], table.noise[i])
            v = (rows[i, 2] + rows[i, 4] * k) ** 2 * v + rows[i, 9] ** 2
        errors.append(abs(v / (table.signal[-1] ** 2 * VAR + table.noise[-1] ** 2) - 1))
    assert np.all(np.log2(np.array(errors[:-1]) / errors[1:]) > 0.85) and errors[-1] < 0.05


# ---------------------------------------------------------------------------------------------------- the weights of a mixture

WEIGHT, SHAPE = 0.2, (4, 1000)
ERROR = np.sqrt(WEIGHT * (1 - WEIGHT) / np.prod(SHAPE))


@pytest.fixture
def modes(mixture):
    """0.2·N(−8, 1) + 0.8·N(8, 1): S0-C5."""
    return mixture([WEIGHT, 1 - WEIGHT], [-8.0, 8.0], [1.0, 1.0])


def check_mixture(x):
    """Weights within 4 standard errors, and inside the modes the right mean and spread."""
    left = x < 0
    assert abs(left.mean() - WEIGHT) < 4 * ERROR
    for side, at in ((left, -8), (~left, 8)):
        assert abs(x[side].mean() - at) < 0.25 and abs(x[side].std() - 1) < 0.15


@pytest.mark.parametrize("name", ["ddpm", "euler_maruyama", "reverse_diffusion", "predictor_corrector"])
@pytest.mark.parametrize("s", [LINEAR, VESDE(0.1, 100), VP, SUB], ids=repr)
def test_stochastic_samplers_keep_the_weights(s, modes, name):
    x = samplers.prior(SHAPE, seed=3, dtype=np.float64, std=s.prior_std)
    if name == "predictor_corrector":
        y = pc.sample(modes.model(s), tables.reverse_diffusion(s, 200), x, s, norm="batch", seed=3)
    else:
        y = samplers.sample(modes.model(s), getattr(tables, name)(s, 200, spacing="trailing"), x, seed=3)
    check_mixture(y)


def test_plain_langevin_loses_the_weights(modes):
    """S0-C5, T1. From a uniform start the share of each mode stays that of its basin, about a half."""
    x = np.random.default_rng(1).uniform(-16, 16, SHAPE)
    y = samplers.sample(lambda x, t: modes.score(x), langevin.langevin(0.1, 1000), x, seed=1)
    assert abs(np.mean(y < 0) - 0.5) < 0.05 and abs(np.mean(y < 0) - WEIGHT) > 0.25
    assert abs(y[y < 0].std() - 1) < 0.1


def test_annealed_langevin_finds_the_weights(modes):
    """S0-C9. Where plain Langevin ends near a half, 30 levels from 30 to 0.5 with 40 steps each find 0.2."""
    ladder = schedules.geometric(0.5, 30, 30)
    x = samplers.prior(SHAPE, seed=2, dtype=np.float64, std=ladder.prior_std)
    y = samplers.sample(modes.model(ladder, "score"), langevin.annealed_langevin(ladder, 40, 0.2 * 0.5**2), x, seed=2)
    assert abs(np.mean(y < 0) - WEIGHT) < 4 * ERROR


def test_following_scores_without_noise_collapses(modes):
    """S4-C13. Without noise all samples run to the two peaks; with it they keep their spread."""
    x = np.random.default_rng(1).uniform(-16, 16, SHAPE)
    table = langevin.langevin(0.1, 200)
    still = samplers.sample(lambda x, t: modes.score(x), table, x, noise=np.zeros((200, *SHAPE)))
    noisy = samplers.sample(lambda x, t: modes.score(x), table, x, seed=1)
    for y, low, high in ((still, 0, 1e-6), (noisy, 0.95, 1.1)):
        for side in (y < 0, y > 0):
            assert low <= y[side].std() < high
    np.testing.assert_allclose(np.abs(still), 8, atol=1e-4)
