"""Langevin tables, step sizes and the rules of NCSNv2, each against its closed form or the paper's own numbers."""

from math import sqrt

import numpy as np
import pytest
from scipy.stats import norm

from alphabar.core import langevin, samplers, schedules
from alphabar.core.sde import VESDE, VPSDE
from alphabar.core.table import Table

LADDER = schedules.geometric()


def noise_for(table, x, seed=9):
    return np.random.default_rng(seed).standard_normal((len(table), *x.shape))


# ------------------------------------------------------------------------------------------------------------------------ plain


def test_plain_langevin_is_the_textbook_loop():
    x = start = np.random.default_rng(0).standard_normal((3, 4))
    table = langevin.langevin(0.2, 30)
    z = noise_for(table, x)
    times = []

    def score(x, t):
        times.append(t)
        return -np.tanh(x) - x / 2

    got = samplers.sample(score, table, start, noise=z)
    for i in range(30):
        x = x + 0.2 * (-np.tanh(x) - x / 2) + sqrt(0.4) * z[i]
    np.testing.assert_allclose(got, x, rtol=1e-12)
    assert isinstance(table, Table) and len(times) == 30 and all(t.shape == (3,) and not t.any() for t in times)


def test_two_seeds_two_paths_and_without_noise_it_is_gradient_ascent():
    """Eq: S0-C2."""
    table, x = langevin.langevin(0.1, 20), np.ones((2, 5))
    score = lambda x, t: -x  # noqa: E731
    one, again, other = (samplers.sample(score, table, x, seed=k) for k in (1, 1, 2))
    assert np.array_equal(one, again) and not np.any(one == other)
    still = samplers.sample(score, table, x, noise=np.zeros((20, 2, 5)))
    np.testing.assert_allclose(still, 0.9**20, rtol=1e-12)


@pytest.mark.parametrize("step", [0.05, 0.2, 1.0])
def test_the_variance_of_the_chain_is_that_of_ula(step):
    """K6, Eq: S4-E62, S0-E16. On N(0, 1) it goes to 1/(1 − ε/2) = 1/(1 − α/4), exactly."""
    table = langevin.langevin(step, 400)
    rows = len(table)
    x, noise = np.r_[np.zeros(rows), 1.0], np.eye(rows, rows + 1)  # one-hot noise: the answers are the weights of the z
    weights = samplers.sample(lambda x, t: -x, table, x, noise=noise)
    assert weights[-1] == pytest.approx((1 - step) ** 400, abs=1e-15)
    assert np.sum(weights[:-1] ** 2) == pytest.approx(1 / (1 - step / 2), rel=1e-8 if step > 0.1 else 1e-6)
    alpha = 2 * step
    v = 1.0
    for _ in range(5000):
        v = (1 - alpha / 2) ** 2 * v + alpha
    assert v == pytest.approx(1 / (1 - alpha / 4), rel=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "score", "x0", "v"])
def test_langevin_at_a_level_of_a_process_keeps_its_law(gaussian, prediction):
    """A chain on q(x_t), t = 400: for Gaussian data the stationary variance is V/(1 − ε/(2V)), V = Var x_t."""
    s, data = VPSDE(T=1000), gaussian(0.0, 0.5)
    a, n = s.levels(400)
    V = a**2 * 0.25 + n**2
    table = langevin.langevin(0.3 * V, 80, s, 400, prediction)
    weights = samplers.sample(data.model(s, prediction), table, np.zeros(81), noise=np.eye(80, 81))
    assert np.sum(weights**2) == pytest.approx(V / (1 - 0.15), rel=1e-9)
    assert np.all(table.t == 400) and table.exact.all() and not table.descends


def test_clip_bounds_the_end_of_the_drift():
    table, x = langevin.langevin(0.5, 1), np.array([[-3.0, 0.2, 4.0]])
    got = samplers.sample(lambda x, t: -x, table, x, clip=(-1, 1), noise=np.zeros((1, 1, 3)))
    np.testing.assert_allclose(got, np.clip(0.5 * x, -1, 1), rtol=1e-14)


def test_wrong_langevin_arguments_are_named():
    s = VPSDE()
    for arguments, name in (
        ((0.0, 5), "step_size"),
        ((np.inf, 5), "step_size"),
        ((0.1, 0), "steps"),
        ((0.1, 5, s), "s and t"),
        ((0.1, 5, None, 0.5), "s and t"),
        ((0.1, 5, s, 1.5), "t must be in"),
        ((0.1, 5, s, 0.0), "where there is noise"),
        ((0.1, 5, None, None, "eps"), "prediction must be 'score'"),
    ):
        with pytest.raises(ValueError, match=name):
            langevin.langevin(*arguments)
    with pytest.raises(TypeError, match="s must be a Schedule"):
        langevin.langevin(0.1, 5, "vp", 0.5)


# --------------------------------------------------------------------------------------------------------------------- annealed


def test_step_sizes_scale_with_the_variance_of_the_level():
    """L4. α_i = ε·σ_i²/σ_L²: α_i/σ_i² is constant and α falls along the chain. Eq: S0-C9."""
    alpha = langevin.annealed_step_sizes(LADDER)
    assert alpha.shape == (11,) and alpha[0] == 0 and alpha[1] == pytest.approx(2e-5) and alpha[-1] == pytest.approx(0.2)
    np.testing.assert_allclose(alpha[1:] / LADDER.sigma[1:] ** 2, 0.2, rtol=1e-12)
    assert np.all(np.diff(alpha) > 0)


@pytest.mark.parametrize("denoise", [True, False])
def test_annealed_langevin_is_algorithm_1(gaussian, denoise):
    """Song & Ermon 2019, with the last denoising step of 2020."""
    data, x = gaussian(0.3, 0.5), np.random.default_rng(0).uniform(size=(2, 3))
    table = langevin.annealed_langevin(LADDER, 7, denoise=denoise)
    z, start = noise_for(table, x), x
    score = data.model(LADDER, "score")
    got = samplers.sample(score, table, start, noise=z)
    sigmas = np.geomspace(1, 0.01, 10)
    draws = iter(z)
    for sigma in sigmas:
        alpha = 2e-5 * sigma**2 / sigmas[-1] ** 2
        for _ in range(7):
            x = x + alpha / 2 * -(x - 0.3) / (0.25 + sigma**2) + np.sqrt(alpha) * next(draws)
    if denoise:
        x = x + sigmas[-1] ** 2 * -(x - 0.3) / (0.25 + sigmas[-1] ** 2)
    np.testing.assert_allclose(got, x, rtol=1e-12)
    assert len(table) == 70 + denoise and table.times.tolist()[:8] == [10] * 7 + [9] and table.times[-1] == 1


def test_the_rows_are_lawful_and_a_wrong_one_is_refused():
    import dataclasses

    table = langevin.annealed_langevin(LADDER, 3)
    assert table.exact.all() and table.descends and (table.signal_to[-1], table.noise_to[-1], table.c[-1]) == (1, 0, 0)
    for column in ("A", "Be", "c", "excess"):
        value = np.array(getattr(table, column))
        value[5] += 1e-6
        with pytest.raises(ValueError, match=r"row 5: the .* law fails"):
            dataclasses.replace(table, **{column: value})
    other = langevin.annealed_langevin(LADDER, 3, prediction="eps")
    x = np.random.default_rng(0).standard_normal((2, 3))
    score = lambda x, t: -np.tanh(x)  # noqa: E731
    eps = lambda x, t: LADDER.sigma[t][:, None] * np.tanh(x)  # noqa: E731
    np.testing.assert_allclose(samplers.sample(eps, other, x, seed=1), samplers.sample(score, table, x, seed=1), rtol=1e-10)


def test_annealing_arguments_are_checked():
    for epsilon in (0.0, -1.0, 4e-4, np.nan):
        with pytest.raises(ValueError, match=r"epsilon must be in \(0, 0\.0004\)"):
            langevin.annealed_langevin(LADDER, 3, epsilon)
    with pytest.raises(ValueError, match="steps_per_level"):
        langevin.annealed_langevin(LADDER, 0)
    for process in (VESDE(), schedules.linear(), None):
        with pytest.raises(TypeError, match="s must be a Schedule"):
            langevin.annealed_langevin(process)


# ------------------------------------------------------------------------------------------------------------------------ NCSNv2


def test_the_variance_after_a_level_is_the_recursion():
    """L3. Song & Ermon 2020, proposition 3, at the published numbers and others."""
    for ratio, step, steps in ((1.1, 0.06, 5), (1.04, 0.3, 1), (1.5, 0.01, 40)):
        v = ratio**2
        for _ in range(steps):
            v = (1 - step) ** 2 * v + 2 * step
        assert langevin.variance_ratio(ratio, step, steps) == pytest.approx(v, rel=1e-12)


def test_the_variance_after_a_level_is_that_of_the_sampler():
    """Data at one point: the table, started from level 2, leaves at level 1 the variance that the formula says."""
    ladder = schedules.from_sigmas([0.1, 0.13])
    table = langevin.annealed_langevin(ladder, 5, 4e-4, denoise=False)
    model = lambda x, t: -x / ladder.sigma[t][0] ** 2  # noqa: E731
    x, noise = np.r_[0.13, np.zeros(10)], np.eye(10, 11, 1)
    noise[:5] = 0  # as if level 2 were left in its own law
    path = samplers.sample(model, table, x, noise=noise, trajectory=True)
    start, weights = path[5][0], path[-1]
    got = (weights[0] / start) ** 2 * 0.13**2 + np.sum(weights[1:] ** 2)
    assert got / 0.1**2 == pytest.approx(langevin.variance_ratio(1.3, 2e-4 / 0.01, 5), rel=1e-10)


def test_the_overlap_of_the_papers_ladder():
    """L15: σ from 50 to 0.01 in 232 levels, D = 3072: γ = 1.0376 and 0.567."""
    ratio = 5000 ** (1 / 231)
    assert ratio == pytest.approx(1.0376, abs=5e-5) and langevin.level_overlap(ratio, 3072) == pytest.approx(0.567, abs=5e-4)
    shift = sqrt(2 * 3072) * (ratio - 1)
    want = norm.cdf(shift + 3 * ratio) - norm.cdf(shift - 3 * ratio)
    assert langevin.level_overlap(ratio, 3072) == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("dim", [5, 10, 64, 3072, 196_608])
@pytest.mark.parametrize("overlap", [0.3, 0.5, 0.9])
def test_the_ratio_solves_its_equation(dim, overlap):
    ratio = langevin.level_ratio(dim, overlap)
    assert ratio > 1 and langevin.level_overlap(ratio, dim) == pytest.approx(overlap, abs=1e-10)


def test_neighbouring_levels_overlap_as_the_rule_says():
    """What the rule stands for: radii of N(0, σ²I) are near N(√D·σ, σ²/2); the share of level i − 1 within 3σ of level i's."""
    dim, ratio = 3072, langevin.level_ratio(3072)
    r = np.sqrt(np.random.default_rng(0).chisquare(dim, 100_000))
    inside = np.abs(ratio * r - sqrt(dim)) < 3 / sqrt(2) * ratio
    assert inside.mean() == pytest.approx(0.5, abs=0.02)


def test_settings_follow_the_paper_for_cifar():
    """Song & Ermon 2020, appendix B: L = 232, T = 5 steps, ε = 6.2e-6 for σ from 50 to 0.01."""
    got = langevin.ncsnv2_settings(max_distance=50.0, dim=3072, levels=232)
    assert got.ladder.T == 232 and got.ladder.sigma[-1] == pytest.approx(50) and got.ratio == pytest.approx(1.0376, abs=1e-4)
    assert got.epsilon / 2 == pytest.approx(6.2e-6, rel=0.01) and got.steps_per_level == 5 and got.ema == 0.999
    step = got.epsilon / 2 / 0.01**2
    for other in (0.8 * step, 1.25 * step):
        assert abs(langevin.variance_ratio(got.ratio, other, 5) - 1) > abs(got.variance_ratio - 1)
    chosen = langevin.ncsnv2_settings(max_distance=50.0, dim=3072)
    assert 200 < chosen.ladder.T < 232 and 0.5 <= langevin.level_overlap(chosen.ratio, 3072) < 0.51
    assert len(langevin.annealed_langevin(got.ladder, got.steps_per_level, got.epsilon)) == 1161


def test_the_largest_distance_is_found():
    rng = np.random.default_rng(0)
    data = rng.standard_normal((300, 4, 4, 1)).astype(np.float32) + 1000
    flat = data.reshape(300, -1).astype(np.float64)
    want = max(np.linalg.norm(flat - row, axis=1).max() for row in flat)
    assert langevin.max_pairwise_distance(data) == pytest.approx(want, rel=1e-12)
    got = langevin.ncsnv2_settings(data, sigma_min=0.05)
    assert got.ladder.prior_std == pytest.approx(want) and got.ladder.sigma[1] == pytest.approx(0.05)


def test_settings_that_cannot_be_made_are_refused():
    for arguments, name in (
        ({}, "data, or both"),
        ({"max_distance": 5.0}, "data, or both"),
        ({"data": np.ones((1, 8))}, "two samples"),
        ({"max_distance": 5.0, "dim": 3}, "dim must be at least 5"),
        ({"max_distance": 5.0, "dim": 8, "sigma_min": 6.0}, "sigma_min"),
        ({"max_distance": 5.0, "dim": 8, "overlap": 1.0}, "overlap"),
        ({"max_distance": 5.0, "dim": 8, "levels": 1}, "levels"),
        ({"max_distance": 5.0, "dim": 8, "steps_per_level": 0}, "steps_per_level"),
    ):
        with pytest.raises(ValueError, match=name):
            langevin.ncsnv2_settings(**arguments)


def test_an_unconditional_network_is_scaled_by_its_level():
    ladder = schedules.geometric(0.1, 1.0, 4)
    model = langevin.noise_scaled_score(lambda x: -x, ladder)
    x, t = np.ones((4, 2, 2), np.float32), np.array([1, 2, 3, 4])
    got = model(x, t)
    np.testing.assert_allclose(got, -1 / ladder.sigma[t][:, None, None] * np.ones((4, 2, 2)), rtol=1e-6)
    assert got.dtype == np.float32
    torch = pytest.importorskip("torch")
    assert isinstance(model(torch.ones(4, 2), torch.tensor([1, 2, 3, 4])), torch.Tensor)
    table = langevin.annealed_langevin(ladder, 2, 0.01)
    assert samplers.sample(model, table, x).shape == x.shape
