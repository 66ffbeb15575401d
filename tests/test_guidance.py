"""Guidance: the identities of classifier-free guidance, the exact scores of a two-class mixture, dropping of conditions."""

import numpy as np
import pytest

from alphabar.core import forward, guidance, samplers, tables

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
