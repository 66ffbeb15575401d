"""Statistics of letters: entropies against closed forms and counting by hand, the n-gram model against its definition."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from alphabar.core import ngram, text

P = np.array([[0.7, 0.2, 0.1], [0.05, 0.15, 0.8], [0.5, 0.5, 0.0]])  # a Markov chain of three letters


@pytest.fixture(scope="module")
def markov() -> np.ndarray:
    """400,000 letters of the chain P."""
    u = np.random.default_rng(0).random(400_000)
    cumulative, x, out = np.cumsum(P, axis=1).tolist(), 0, np.empty(len(u), np.uint8)
    for i, v in enumerate(u.tolist()):
        x = 0 if v < cumulative[x][0] else 1 if v < cumulative[x][1] else 2
        out[i] = x
    return out


def stationary() -> np.ndarray:
    values, vectors = np.linalg.eig(P.T)
    pi = np.real(vectors[:, np.argmax(np.real(values))])
    return pi / pi.sum()


def bits_of(p: np.ndarray) -> np.ndarray:
    return -np.sum(np.where(p > 0, p * np.log2(np.where(p > 0, p, 1)), 0), axis=-1)


# ---------------------------------------------------------------------------------------------------------------- entropies


def test_entropies_of_a_markov_chain_are_its_closed_forms(markov: np.ndarray) -> None:
    pi = stationary()
    rate = float(pi @ bits_of(P))
    assert ngram.entropy(markov, 1) == pytest.approx(float(bits_of(pi)), abs=2e-3)
    for n in (2, 3, 4):
        assert ngram.entropy(markov, n) == pytest.approx(rate, abs=3e-3)


def test_entropies_by_counting() -> None:
    x = np.random.default_rng(1).integers(0, 4, 300) ** 2 % 7
    for n in (1, 2, 3, 5):
        grams = Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1))
        heads: Counter = Counter()
        for g, c in grams.items():
            heads[g[:-1]] += c
        want = -sum(c * math.log2(c / heads[g[:-1]]) for g, c in grams.items()) / sum(grams.values())
        assert ngram.entropy(x, n) == pytest.approx(want, rel=1e-12)
        assert ngram.entropy(x, n, states=50) == pytest.approx(want, rel=1e-12)


def test_entropies_that_are_whole() -> None:
    assert ngram.entropy(np.arange(64) % 8, 1) == 3 and ngram.entropy(np.arange(64) % 8, 2) == 0
    assert ngram.entropy(np.zeros(9, np.int64), 1) == 0
    assert ngram.entropy(np.tile([0, 0, 1, 1], 100)[:-3], 2) == pytest.approx(1, abs=1e-4)
    assert ngram.entropy(np.tile([0, 0, 1, 1], 100)[:-3], 3) == 0


# ----------------------------------------------------------------------------------------------------------------- the model


def by_definition(train: list[int], h: tuple[int, ...], w: int, states: int) -> float:
    """P(w|h) by the recursion, counting in the text anew each time."""
    shorter = by_definition(train, h[1:], w, states) if h else 1 / states
    k = len(h)
    followers = [train[i + k] for i in range(len(train) - k) if tuple(train[i : i + k]) == h]
    if not followers:
        return shorter
    kinds = len(set(followers))
    return (followers.count(w) + kinds * shorter) / (len(followers) + kinds)


def test_the_model_is_its_definition() -> None:
    rng = np.random.default_rng(2)
    train, x = rng.integers(0, 3, 60), rng.integers(0, 4, (5, 9))
    for order in (1, 2, 4):
        model = ngram.fit(train, order, states=4)
        want = [
            [by_definition(train.tolist(), tuple(row[max(0, i - order + 1) : i]), row[i], 4) for i in range(9)]
            for row in x.tolist()
        ]
        np.testing.assert_allclose(model.letter_probabilities(x), want, rtol=1e-12)
        np.testing.assert_allclose(model.log_prob(x), np.log(want).sum(axis=1), rtol=1e-12)
        np.testing.assert_allclose(model.bits(x), -np.log2(want).mean(axis=1), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_probabilities_sum_to_one(order: int) -> None:
    model = ngram.fit(np.random.default_rng(3).integers(0, 2, 40) * 2, order, states=3)  # letter 1 never seen
    everything = np.array(list(itertools.product(range(3), repeat=6)))
    p = model.letter_probabilities(everything)
    np.testing.assert_allclose(p[:, -1].reshape(-1, 3).sum(axis=1), 1, rtol=1e-12)
    assert np.exp(model.log_prob(everything)).sum() == pytest.approx(1, rel=1e-12) and p.min() > 0


def test_order_one_has_the_entropy_of_the_letters(markov: np.ndarray) -> None:
    model = ngram.fit(markov, 1)
    counts = np.bincount(markov)
    np.testing.assert_allclose(model.letter_probabilities(np.arange(3)), (counts + 1) / (len(markov) + 3), rtol=1e-12)
    assert model.bits(markov[None])[0] == pytest.approx(ngram.entropy(markov, 1), abs=1e-9)


def test_samples_of_a_markov_chain_score_its_entropy_rate(markov: np.ndarray) -> None:
    train, held_out = markov[:300_000], markov[300_000:]
    rate = float(stationary() @ bits_of(P))
    for order in (2, 3, 6):
        assert ngram.fit(train, order).bits(held_out[None])[0] == pytest.approx(rate, abs=5e-3)
    assert ngram.fit(train, 1).bits(held_out[None])[0] == pytest.approx(float(bits_of(stationary())), abs=5e-3)


def test_a_sample_scores_the_same_in_any_batch(markov: np.ndarray) -> None:
    model = ngram.fit(markov[:1000], 4)
    x = markov[2000:2060].reshape(5, 12)
    np.testing.assert_array_equal(model.bits(x), [model.bits(row[None])[0] for row in x])
    assert model.bits(x.astype(np.int32)).dtype == np.float64 and model.bits(x[:0]).shape == (0,)
    np.testing.assert_array_equal(model.letter_probabilities(x[:, :2]), model.letter_probabilities(x)[:, :2])


def test_the_built_in_text_is_scored_better_by_longer_contexts() -> None:
    train, test = (text.load("kjv", split, 256) for split in ("train", "test"))
    entropies = [ngram.entropy(train.tokens, n) for n in (1, 2, 3)]
    models = [ngram.fit(train.tokens, order, train.states) for order in (1, 3, 6)]
    scores = [float(m.bits(test.windows[:500]).mean()) for m in models]
    assert np.log2(27) > entropies[0] > entropies[1] > entropies[2] > scores[2] > 1
    assert scores[0] == pytest.approx(entropies[0], rel=0.03) and scores[0] > scores[1] > scores[2]
    noise = np.random.default_rng(0).integers(0, 27, (4, 256))
    assert models[2].bits(noise).min() > np.log2(27)


def test_arguments_out_of_range() -> None:
    x = np.array([0, 1, 2, 1])
    for wrong in (
        lambda: ngram.entropy(x, 0),
        lambda: ngram.entropy(x, 5),
        lambda: ngram.fit(x, 5),
        lambda: ngram.fit(x[None], 1),
        lambda: ngram.fit(x, 2, states=2),
        lambda: ngram.fit(x - 1, 2),
        lambda: ngram.fit(np.arange(40), 12),
        lambda: ngram.fit(x[:0], 1),
        lambda: ngram.fit(x, 2).bits(np.array([[3]])),
        lambda: ngram.fit(x, 2).bits(np.array([[-1]])),
        lambda: ngram.fit(x, 2).bits(np.zeros((2, 0), int)),
        lambda: ngram.fit(x, 2).bits(np.int64(1)),
    ):
        with pytest.raises(ValueError, match=r"tokens|states"):
            wrong()
    for odd in (lambda: ngram.entropy(x * 1.0, 1), lambda: ngram.fit(x, 2.0), lambda: ngram.fit(x, 2).bits(x * 1.0)):
        with pytest.raises(TypeError, match=r"tokens|order"):
            odd()
