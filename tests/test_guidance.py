"""Guidance: identities, the exact scores of a two-class mixture, both forms of a classifier's, dropping of conditions."""

import numpy as np
import pytest

from alphabar.core import forward, guidance, samplers, schedules, tables
from alphabar.core.mixture import GaussianMixture

RNG = np.random.default_rng(0)
NULL = 2


@pytest.fixture
def classes(mixture):
    """x0 | c ~ N(±1, ½²): the conditional laws, and (index 2) the unconditional one."""
    return [mixture([1.0], [-1.0], [0.5]), mixture([1.0], [1.0], [0.5]), mixture([0.5, 0.5], [-1.0, 1.0], [0.5, 0.5])]


@pytest.fixture
def predict(classes, linear):
    def f(x, t, y):
        assert x.shape == t.shape == y.shape and y.dtype == np.int64
        a, n = linear.levels(t)
        return np.choose(y, [c.eps(x, a, n) for c in classes]).astype(x.dtype)

    return f


def test_both_branches_run_in_one_batch(predict):
    x, t, y = RNG.standard_normal(6), np.full(6, 300), np.array([0, 1, 0, 1, 1, 0])
    batches = []

    def counted(x, t, y):
        batches.append((len(x), y.tolist()))
        return predict(x, t, y)

    cond, uncond = predict(x, t, y), predict(x, t, np.full(6, NULL))
    for w in (0.5, 2.0, -0.3):
        out = guidance.classifier_free(counted, y, w, NULL)(x, t)
        np.testing.assert_allclose(out, (1 + w) * cond - w * uncond, rtol=1e-12)
        np.testing.assert_allclose(out - cond, w * (cond - uncond), rtol=1e-9, atol=1e-12)
    assert batches == [(12, [*y.tolist(), *[NULL] * 6])] * 3
    batches.clear()
    assert np.array_equal(guidance.classifier_free(counted, y, 0, NULL)(x, t), cond)
    assert np.array_equal(guidance.classifier_free(counted, y, -1, NULL)(x, t), uncond)
    assert [b[0] for b in batches] == [6, 6]


def test_conditions_may_be_one_number_or_arrays(predict, linear):
    x, t = RNG.standard_normal(4), np.full(4, 100)
    one = guidance.classifier_free(predict, 1, 1.0, NULL)(x, t)
    assert np.array_equal(one, guidance.classifier_free(predict, np.ones(4, np.int64), 1.0, NULL)(x, t))
    embedded = RNG.standard_normal((4, 7))
    out = guidance.classifier_free(lambda x, t, e: x * e.sum(axis=1), embedded, 1.0, np.zeros(7))(x, t)
    np.testing.assert_allclose(out, 2 * x * embedded.sum(axis=1), rtol=1e-12)
    with pytest.raises(ValueError, match="y must be one condition or 4 of them"):
        guidance.classifier_free(predict, [0, 1], 1.0, NULL)(x, t)
    with pytest.raises(ValueError, match="predict must return 8 samples"):
        guidance.classifier_free(lambda x, t, y: x[:4], 1, 1.0, NULL)(x, t)


def test_free_guidance_is_the_score_of_the_sharpened_class(classes, linear):
    """−ε̃/√(1−ᾱ) = ∇ log[p(x|c)·p(c|x)^w]."""
    x, h = np.linspace(-2, 2, 21), 1e-5
    for t, w in ((100, 2.0), (500, 0.5), (800, -0.4)):
        a, n = linear.levels(t)

        def log_density(x, a=a, n=n, w=w):
            p_c, p = classes[1].density(x, a, n), classes[2].density(x, a, n)
            return np.log(p_c) + w * np.log(0.5 * p_c / p)

        slope = (log_density(x + h) - log_density(x - h)) / (2 * h)
        eps = guidance.classifier_free_eps(classes[1].eps(x, a, n), classes[2].eps(x, a, n), w)
        np.testing.assert_allclose(forward.score_from_eps(eps, t, linear), slope, atol=1e-7, rtol=1e-6)
        implicit = guidance.implicit_classifier_score(classes[1].eps(x, a, n), classes[2].eps(x, a, n), t, linear)
        want = classes[1].score(x, a, n) - classes[2].score(x, a, n)
        np.testing.assert_allclose(implicit, want, rtol=1e-10, atol=1e-12)
        # a classifier with the same gradient guides alike, and weight w on ε_c is weight w + 1 on ε_u
        by_classifier = guidance.classifier_guided_eps(classes[1].eps(x, a, n), want, t, linear, w)
        np.testing.assert_allclose(by_classifier, eps, rtol=1e-9, atol=1e-12)
        unconditional = guidance.classifier_guided_eps(classes[2].eps(x, a, n), want, t, linear, w + 1)
        np.testing.assert_allclose(unconditional, eps, rtol=1e-9, atol=1e-12)


def test_larger_weights_sharpen_the_samples(predict, linear):
    x = samplers.prior((4000,), seed=1, dtype=np.float64)
    table = tables.ddim(linear, 50)
    spread, mean = [], []
    for w in (0.0, 1.0, 2.0, 4.0):
        out = samplers.sample(guidance.classifier_free(predict, 1, w, NULL), table, x)
        spread.append(out.std())
        mean.append(out.mean())
    assert np.all(np.diff(spread) < 0) and np.all(np.diff(mean) > 0)
    assert spread[0] == pytest.approx(0.5, abs=0.04) and mean[0] == pytest.approx(1.0, abs=0.04)


def test_conditions_are_dropped_at_their_rate():
    y = RNG.integers(0, 2, 100_000)
    for p in (0.1, 0.2):
        out = guidance.drop_condition(y, NULL, p, seed=3, step=5)
        dropped = out == NULL
        assert abs(dropped.mean() - p) < 4 * np.sqrt(p * (1 - p) / y.size)
        assert np.array_equal(out[~dropped], y[~dropped]) and out.dtype == y.dtype
    assert np.array_equal(out, guidance.drop_condition(y, NULL, 0.2, seed=3, step=5))
    assert not np.array_equal(out, guidance.drop_condition(y, NULL, 0.2, seed=3, step=6))
    assert np.array_equal(guidance.drop_condition(y, NULL, 0.0), y)
    assert np.all(guidance.drop_condition(y, NULL, 1.0) == NULL)
    embedded = guidance.drop_condition(np.ones((500, 3)), np.zeros(3), 0.5)
    assert set(embedded.sum(axis=1)) == {0.0, 3.0}
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\]"):
        guidance.drop_condition(y, NULL, 1.5)


def test_guidance_of_torch_models(predict, linear):
    torch = pytest.importorskip("torch")
    x, t, y = RNG.standard_normal(4), np.full(4, 300), np.array([0, 1, 1, 0])
    seen = []

    def torch_predict(x, t, y):
        seen.extend(map(type, (x, t, y)))
        return torch.from_numpy(predict(x.numpy(), t.numpy(), y.numpy()))

    model = guidance.classifier_free(torch_predict, torch.from_numpy(y), 1.5, NULL)
    out = model(torch.from_numpy(x), torch.from_numpy(t))
    assert isinstance(out, torch.Tensor) and set(seen) == {torch.Tensor}
    np.testing.assert_allclose(out.numpy(), guidance.classifier_free(predict, y, 1.5, NULL)(x, t), rtol=1e-12)
    table = tables.ddim(linear, 5)
    sampled = samplers.sample(model, table, torch.from_numpy(x))
    np.testing.assert_allclose(
        sampled.numpy(), samplers.sample(guidance.classifier_free(predict, y, 1.5, NULL), table, x), rtol=1e-9
    )
    assert isinstance(guidance.drop_condition(torch.from_numpy(y), NULL, 0.5), torch.Tensor)


# ------------------------------------------------------------------------------------------------------- rescale and interval


def test_rescaling_gives_back_the_deviation_of_the_conditional_answer():
    guided, cond = 5 * RNG.standard_normal((3, 4, 4, 2)) + 1, RNG.standard_normal((3, 4, 4, 2))

    def stds(v):
        return v.reshape(3, -1).std(axis=1)

    np.testing.assert_allclose(stds(guidance.rescale_guidance(guided, cond, 1.0)), stds(cond), rtol=1e-12)
    half = guidance.rescale_guidance(guided, cond, 0.5)
    np.testing.assert_allclose(half, (guided + guidance.rescale_guidance(guided, cond, 1.0)) / 2, rtol=1e-12)
    assert np.array_equal(guidance.rescale_guidance(guided, cond, 0.0), guided)
    flat = np.full_like(guided, 2.0)
    assert np.array_equal(guidance.rescale_guidance(flat, cond, 1.0), flat)  # nothing to rescale

    def predict(x, t, y):
        return x * (1 + y.reshape(-1, 1, 1, 1))

    x, t = RNG.standard_normal((3, 4, 4, 2)), np.full(3, 10)
    for w in (2.0, -1.0):
        out = guidance.classifier_free(predict, 1, w, 0, rescale=0.7)(x, t)
        np.testing.assert_allclose(out, guidance.rescale_guidance((1 + w) * 2 * x - w * x, 2 * x, 0.7), rtol=1e-12)
    with pytest.raises(ValueError, match=r"rescale must be in \[0, 1\]"):
        guidance.classifier_free(predict, 1, 1.0, 0, rescale=1.5)
    with pytest.raises(ValueError, match="at least 2 elements"):
        guidance.rescale_guidance(np.ones(3), np.ones(3), 0.5)


def test_rescaling_is_the_listing_of_the_paper():
    """Lin et al. 2024, section 3.4: std over all but the batch, unbiased as PyTorch has it (the ratio is the same)."""
    torch = pytest.importorskip("torch")
    guided, cond = (torch.from_numpy(RNG.standard_normal((2, 3, 5, 5))) for _ in range(2))
    std_pos, std_cfg = (v.std([1, 2, 3], keepdim=True) for v in (cond, guided))
    want = guided * (0.7 * (std_pos / std_cfg) + (1 - 0.7))
    np.testing.assert_allclose(guidance.rescale_guidance(guided, cond, 0.7).numpy(), want.numpy(), rtol=1e-12)


def test_guidance_acts_in_its_interval_of_noise_levels(predict, linear):
    sigma, w = linear.sigma_bar, 2.0
    interval = (sigma[200], sigma[500])  # both ends belong to it
    calls = []

    def counted(x, t, y):
        calls.append(len(x))
        return predict(x, t, y)

    model = guidance.classifier_free(counted, 1, w, NULL, interval=interval, s=linear)
    plain, full = (guidance.classifier_free(predict, 1, v, NULL) for v in (0.0, w))
    x = RNG.standard_normal(4)
    for t, inside in ((199, False), (200, True), (500, True), (501, False)):
        at = np.full(4, t)
        assert np.array_equal(model(x, at), (full if inside else plain)(x, at))
    assert calls == [4, 8, 8, 4]
    mixed = np.array([100, 300, 700, 400])
    np.testing.assert_allclose(model(x, mixed), np.where([0, 1, 0, 1], full(x, mixed), plain(x, mixed)), rtol=1e-12)
    everywhere = guidance.classifier_free(predict, 1, w, NULL, interval=(0.0, np.inf), s=linear)
    assert np.array_equal(everywhere(x, mixed), full(x, mixed))
    with pytest.raises(TypeError, match="s must be a Schedule"):
        guidance.classifier_free(predict, 1, w, NULL, interval=(0, 1))
    with pytest.raises(ValueError, match="lo <= hi"):
        guidance.classifier_free(predict, 1, w, NULL, interval=(2, 1), s=linear)


# -------------------------------------------------------------------------------------------------------------- by a classifier


LAW = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.25)
ONE = GaussianMixture([1.0], [[1.0]], 0.25)


def gradient(s):
    """∇ log p(c = 1|x_t), exactly."""

    def f(x, t):
        a, n = s.levels(t)
        return -(ONE.predict(x, a, n) - LAW.predict(x, a, n)) / n[:, None]

    return f


def chance(x):
    """p(c = 1|x) of clean x."""
    return np.exp(np.log(0.5) + ONE.log_prob(x) - LAW.log_prob(x))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_the_score_form_adds_to_the_score_whatever_is_predicted(prediction, linear):
    x, t = RNG.standard_normal((6, 1)), np.array([2, 40, 333, 500, 700, 999])
    for s in (linear, schedules.geometric(0.1, 10.0, 1000)):
        a, n = s.levels(t)
        out = guidance.classifier_guided(LAW.model(s, prediction), gradient(s), s, 1.7, prediction)(x, t)
        score = forward.convert(out, x, t, s, prediction, "score")
        want = guidance.conditional_score(LAW.predict(x, a, n, "score"), gradient(s)(x, t), 1.7)
        np.testing.assert_allclose(score, want, rtol=1e-8, atol=1e-8)
    # the conditional model with w is the unconditional one with w + 1
    on_cond = guidance.classifier_guided(ONE.model(s, prediction), gradient(s), s, 0.7, prediction)(x, t)
    np.testing.assert_allclose(on_cond, out, rtol=1e-8, atol=1e-8)


def test_the_implicit_classifier_guides_as_classifier_free_guidance_does(predict, linear):
    x, t = RNG.standard_normal(5), np.array([3, 100, 400, 800, 1000])
    slope = guidance.implicit_classifier(predict, 1, NULL, linear)
    np.testing.assert_allclose(slope(x, t), gradient(linear)(x[:, None], t)[:, 0], rtol=1e-9, atol=1e-12)

    def unconditional(x, t):
        return predict(x, t, np.full(len(x), NULL))

    guided = guidance.classifier_guided(unconditional, slope, linear, 3.0)(x, t)
    np.testing.assert_allclose(guided, guidance.classifier_free(predict, 1, 2.0, NULL)(x, t), rtol=1e-9, atol=1e-12)

    def as_v(x, t, y):
        eps = predict(x, t, y)
        return forward.convert(eps, x, t, linear, "eps", "v")

    np.testing.assert_allclose(guidance.implicit_classifier(as_v, 1, NULL, linear, "v")(x, t), slope(x, t), rtol=1e-8, atol=1e-10)


def test_the_guided_flow_has_the_guided_law_at_each_level(linear):
    """The score form is the score of p(x_t)·p(c|x_t)^w, at every level: against the density by quadrature."""
    x = np.linspace(-9, 9, 6001)[:, None]
    h = x[1, 0] - x[0, 0]
    for t, w in ((500, 3.0), (120, 1.5)):
        a, n = linear.signal[t], linear.noise[t]
        times = np.full(len(x), t)
        out = guidance.classifier_guided(LAW.model(linear), gradient(linear), linear, w)(x, times)
        score = forward.score_from_eps(out, t, linear)[:, 0]
        log_p = np.r_[0.0, np.cumsum((score[1:] + score[:-1]) / 2 * h)]
        p, law, one = np.exp(log_p - log_p.max()), LAW.diffuse(a, n), ONE.diffuse(a, n)
        want = np.exp(law.log_prob(x) + w * (np.log(0.5) + one.log_prob(x) - law.log_prob(x)))
        np.testing.assert_allclose(p / (p.sum() * h), want / (want.sum() * h), atol=2e-5)


def test_the_guided_law_has_the_known_variance_and_class_probability(linear):
    """p(x_t|c)·p(c|x_t)^w at t = 500, w = 0, 1, 2, 4, guided from ONE; a classifier of clean data is wrong."""
    t, x = 500, np.linspace(-9, 9, 9001)[:, None]
    times, h = np.full(len(x), t), x[1, 0] - x[0, 0]
    one, law = (p.diffuse(linear.signal[t], linear.noise[t]) for p in (ONE, LAW))
    p_class = np.exp(np.log(0.5) + one.log_prob(x) - law.log_prob(x))

    def law_of(gradient, w):
        out = guidance.classifier_guided(ONE.model(linear), gradient, linear, w)(x, times)
        score = forward.score_from_eps(out, t, linear)[:, 0]
        log_p = np.r_[0.0, np.cumsum((score[1:] + score[:-1]) / 2 * h)]
        p = np.exp(log_p - log_p.max())
        p /= p.sum()
        return np.sum(p * x[:, 0] ** 2) - np.sum(p * x[:, 0]) ** 2, np.sum(p * p_class)

    found = np.array([law_of(gradient(linear), w) for w in (0, 1, 2, 4)])
    np.testing.assert_allclose(found[:, 0], [0.941, 0.874, 0.818, 0.730], atol=1e-3)
    np.testing.assert_allclose(found[[0, -1], 1], [0.539, 0.646], atol=1e-3)
    clean = law_of(lambda x, t: ONE.score(x) - LAW.score(x), 1.0)
    assert abs(clean[0] - found[1, 0]) > 0.3 and abs(clean[1] - found[1, 1]) > 0.05


def test_larger_weights_of_a_classifier_trade_variance_for_fidelity(linear):
    x, table = samplers.prior((3000, 1), seed=1, dtype=np.float64), tables.ddpm(linear, 40)
    for run in (
        lambda w: samplers.sample(guidance.classifier_guided(LAW.model(linear), gradient(linear), linear, w), table, x),
        lambda w: samplers.sample(guidance.mean_guided(LAW.model(linear), gradient(linear), table, w), table, x),
    ):
        out = [run(w) for w in (0.0, 1.0, 3.0, 6.0)]
        # from w = 1, where all are of the class, the variance of a class falls; the share of the class rises throughout
        assert np.all(np.diff([v.var() for v in out]) < 0)
        fidelity = [chance(v).mean() for v in out]
        assert np.all(np.diff(fidelity) > -1e-3) and fidelity[0] < 0.55 and fidelity[-1] > 0.99


def test_the_mean_form_is_algorithm_1(linear):
    """x' ~ N(μ + w·Σ·∇ log p(c|·), Σ), step by step, with the gradient at x_t or at μ, with and without clipping."""
    x_T, w = samplers.prior((5, 1), seed=2, dtype=np.float64), 1.3
    noise = RNG.standard_normal((6, 5, 1))
    for variance in ("posterior", "beta"):
        table = tables.ddpm(linear, 6, variance)
        for at in ("x_t", "mean"):
            for clip in (None, (-0.8, 0.8)):
                model = guidance.mean_guided(LAW.model(linear), gradient(linear), table, w, at, clip)
                x = x_T
                for i, t in enumerate(table.times):
                    told, to = np.full(5, t), np.full(5, table.times[i + 1] if i < 5 else 0)
                    x0 = forward.predict_x0_from_eps(x, LAW.model(linear)(x, told), told, linear)
                    x0 = x0 if clip is None else np.clip(x0, *clip)
                    mean = table.A[i] * x + table.B0[i] * x0
                    if table.c[i]:
                        g = gradient(linear)(x, told) if at == "x_t" else gradient(linear)(mean, to)
                        mean = mean + w * table.c[i] ** 2 * g
                    x = mean + table.c[i] * noise[i]
                got = samplers.sample(model, table, x_T, noise=noise)
                np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)


def test_the_mean_form_on_ddim_keeps_the_model_s_own_eps_where_asked(linear):
    x_T, noise, clip = samplers.prior((5, 1), seed=2, dtype=np.float64), RNG.standard_normal((4, 5, 1)), (-0.5, 0.5)
    table = tables.ddim(linear, 4, eta=0.7)
    for rederive in (True, False):
        unguided = guidance.mean_guided(LAW.model(linear), gradient(linear), table, 0.0, clip=clip, rederive_eps=rederive)
        want = samplers.sample(LAW.model(linear), table, x_T, noise=noise, clip=clip, rederive_eps=rederive)
        np.testing.assert_allclose(samplers.sample(unguided, table, x_T, noise=noise), want, rtol=1e-9, atol=1e-9)


def test_the_mean_form_is_the_score_form_scaled(linear):
    """Where Σ = β the shift is √(1−β) of the score form's."""
    table, x = tables.ddpm(linear, 10, "beta"), RNG.standard_normal((4, 1))
    for i in (0, 4, 8):
        t = np.full(4, table.times[i])
        base = LAW.model(linear)(x, t)
        by_mean = guidance.mean_guided(LAW.model(linear), gradient(linear), table, 1.0)(x, t) - base
        by_score = guidance.classifier_guided(LAW.model(linear), gradient(linear), linear, 1.0)(x, t) - base
        np.testing.assert_allclose(by_mean, by_score * table.signal[i] / table.signal_to[i], rtol=1e-9)


def test_a_wrong_use_of_the_mean_form_is_named(linear):
    model = LAW.model(linear)
    for bad, words in ((tables.heun(linear, 4), "one evaluation each"), (tables.ddim(linear, 4), "must have noise")):
        with pytest.raises(ValueError, match=words):
            guidance.mean_guided(model, gradient(linear), bad)
    table = tables.ddpm(linear, 4)
    with pytest.raises(ValueError, match="at must be one of"):
        guidance.mean_guided(model, gradient(linear), table, at="mu")
    with pytest.raises(ValueError, match="t must be times of"):
        guidance.mean_guided(model, gradient(linear), table)(np.zeros((2, 1)), np.full(2, 7))
    with pytest.raises(TypeError, match="table must be a Table"):
        guidance.mean_guided(model, gradient(linear), linear)


def test_the_conditional_score_of_a_reverse_step():
    """c ← x_{t−1} → x_t, Gaussian: x_t|x_{t−1} ~ N(0.9x, 0.19), c|x_{t−1} ~ N(0.5x, 0.3), x_{t−1} ~ N(0, 1)."""
    x_t, c, x = 0.4, 0.7, np.array([0.3, -1.2])
    given_x_t = GaussianMixture([1.0], [[0.9 * x_t / (0.81 + 0.19)]], 0.19 / (0.81 + 0.19))
    by_class = 0.5 * (c - 0.5 * x) / 0.3
    precision = 1 + 0.81 / 0.19 + 0.25 / 0.3
    mean = (0.9 * x_t / 0.19 + 0.5 * c / 0.3) / precision
    got = guidance.conditional_score(given_x_t.score(x[:, None])[:, 0], by_class)
    np.testing.assert_allclose(got, -(x - mean) * precision, rtol=1e-12)


def test_a_classifier_guides_torch_models(linear):
    torch = pytest.importorskip("torch")
    x, table = samplers.prior((4, 1), seed=3, dtype=np.float64), tables.ddpm(linear, 5)

    def foreign(f):
        return lambda x, t: torch.from_numpy(f(x.numpy(), t.numpy()))

    for build in (
        lambda m, g: guidance.classifier_guided(m, g, linear, 2.0),
        lambda m, g: guidance.mean_guided(m, g, table, 2.0, "mean", (-1, 1)),
    ):
        want = samplers.sample(build(LAW.model(linear), gradient(linear)), table, x)
        got = samplers.sample(build(foreign(LAW.model(linear)), foreign(gradient(linear))), table, torch.from_numpy(x))
        assert isinstance(got, torch.Tensor)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-12)
