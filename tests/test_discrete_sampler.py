"""Samples of exact networks against enumerated laws; seeds and batches, infilling, temperature, and the door."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from alphabar import kernels
from alphabar.core import discrete, rates
from alphabar.core.discrete_rows import grid_of
from alphabar.core.discrete_sampler import sample
from alphabar.core.transitions import Absorbing, Dense, DiscretizedGaussian, NearestNeighbour, Uniform, neighbour_rates
from tests import fake_cupy

WORD = np.array([[0.4, 0.05, 0.05], [0.1, 0.15, 0.05], [0.02, 0.08, 0.1]])
LETTER = np.array([0.5, 0.2, 0.3])
NAMES = ("uniform", "absorbing", "absorbing, mask first", "gaussian", "neighbours", "dense")


def law_of(name, T):
    beta = np.r_[0.0, np.linspace(0.3, 0.9, T - 1), 1.0]
    rng = np.random.default_rng(5)
    Q = rng.random((T + 1, 3, 3)) + np.eye(3)
    return {
        "uniform": lambda: Uniform(3, beta),
        "absorbing": lambda: Absorbing(4, rates.reciprocal(T)),
        "absorbing, mask first": lambda: Absorbing(4, rates.reciprocal(T), mask=0),
        "gaussian": lambda: DiscretizedGaussian(3, np.r_[0.0, beta[1:] + 0.3]),
        "neighbours": lambda: NearestNeighbour(neighbour_rates(rng.random((3, 2)), 1), 2 * beta),
        "dense": lambda: Dense(Q / Q.sum(axis=2, keepdims=True)),
    }[name]()


class Exact:
    """Words under a law, and their perfect network; with the mask at 0 letters are 1..D and logits have a column for the mask."""

    def __init__(self, words, p, name, T):
        self.law = law_of(name, T)
        self.first = int(name == "absorbing, mask first")
        self.oracle = words(p, Absorbing(4, rates.reciprocal(T)) if self.first else self.law)

    def __call__(self, x, t):
        if not self.first:
            return self.oracle.model(x, t)
        logits = self.oracle.model((x - 1) % 4, t)
        return np.concatenate([np.full((*x.shape, 1), 5.0), logits], axis=-1)

    def counts(self, x):
        """How often each word stands in x (N, L)."""
        return np.bincount(
            np.ravel_multi_index(tuple(x.T - self.first), (self.oracle.D,) * self.oracle.L), minlength=len(self.oracle.p)
        )


def fits(counts, p, level=1e-4):
    """Chi-square: states of chance 0 never, and the others as often as their chance says."""
    assert np.all(counts[p < 1e-12] == 0)
    live = p >= 1e-12
    return live.sum() == 1 or stats.chisquare(counts[live], counts.sum() * p[live] / p[live].sum()).pvalue > level


@pytest.mark.parametrize("grid", [None, [1, 3, 6], [6]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_one_letter_is_drawn_from_the_data_in_any_number_of_steps(words, name, grid):
    net = Exact(words, LETTER, name, 6)
    end = net.oracle.p @ net.oracle.noised(6)
    times = range(1, 7) if grid is None else grid
    np.testing.assert_allclose(net.oracle.chain(times, end), LETTER, rtol=1e-12)  # from x_T ~ q(x_T)
    x = sample(net, net.law, discrete.prior((20_000, 1), net.law, 1), grid=grid, seed=2)
    assert x.dtype == np.int32 and fits(net.counts(x), net.oracle.chain(times, net.oracle.prior()))
    if net.law.name in ("uniform", "absorbing"):  # here the prior is q(x_T)
        assert fits(net.counts(x), LETTER)


@pytest.mark.parametrize("steps", [None, 2, 1])
@pytest.mark.parametrize("name", NAMES)
def test_words_follow_the_chain(words, name, steps):
    net = Exact(words, WORD, name, 5)
    wanted = net.oracle.chain(grid_of(net.law, steps), net.oracle.prior())
    x = sample(net, net.law, discrete.prior((20_000, 2), net.law, 3), steps=steps, seed=4)
    assert fits(net.counts(x), wanted) and not fits(net.counts(x), np.full(9, 1 / 9))


@pytest.mark.parametrize("name", ["uniform", "absorbing"])
def test_one_step_draws_the_letters_independently_and_many_draw_the_words(words, name):
    independent = (WORD.sum(axis=1)[:, None] * WORD.sum(axis=0)).reshape(-1)
    gaps = []
    for T in (1, 2, 4, 8, 16, 32):
        law = Uniform(3, rates.reciprocal(T)) if name == "uniform" else law_of(name, T)
        oracle = words(WORD, law)
        end = oracle.chain(range(1, T + 1), oracle.prior())
        gaps.append(np.abs(end - WORD.reshape(-1)).sum() / 2)
        if T == 1:
            np.testing.assert_allclose(end, independent, rtol=1e-12)
    assert np.all(np.diff(gaps) < 0) and gaps[-1] < 0.06 * gaps[0]


def test_fewer_steps_are_those_of_the_grid(words):
    net = Exact(words, WORD, "uniform", 6)
    x_T = discrete.prior((64, 2), net.law)
    np.testing.assert_array_equal(sample(net, net.law, x_T, steps=3), sample(net, net.law, x_T, grid=[2, 4, 6]))
    np.testing.assert_array_equal(sample(net, net.law, x_T), sample(net, net.law, x_T, grid=np.arange(1, 7)))
    asked = []

    def model(x, t):
        asked.append(t)
        assert t.dtype == np.float64 and t.shape == (64,)
        return net(x, t)

    sample(model, net.law, x_T, grid=[1, 4, 6])
    assert [t[0] for t in asked] == [6.0, 4.0, 1.0]


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_depends_on_its_seed_and_number_alone(words, name, backend):
    net = Exact(words, WORD, name, 5)
    x_T = discrete.prior((50, 2), net.law, 6)
    half = np.array([True, False])[None].repeat(50, 0)
    values = np.full((50, 2), 1)

    def model(x, t):
        return net(x, t).astype(np.float32)

    with kernels.use(backend):
        for known in (None, (values, half)):
            whole = sample(model, net.law, x_T, seed=11, known=known)
            for a, b in ((0, 1), (1, 33), (33, 50)):
                part = None if known is None else (values[a:b], half[a:b])
                np.testing.assert_array_equal(sample(model, net.law, x_T[a:b], seed=11, first_sample=a, known=part), whole[a:b])
        assert not np.array_equal(sample(model, net.law, x_T, seed=12), sample(model, net.law, x_T, seed=11))
    with kernels.use("reference"):
        np.testing.assert_array_equal(sample(model, net.law, x_T, seed=11, known=known), whole)


def test_the_trajectory_and_the_calls_back(words):
    net = Exact(words, WORD, "absorbing", 6)
    x_T = discrete.prior((30, 2), net.law)
    done = []
    path = sample(net, net.law, x_T, steps=4, seed=1, trajectory=True, progress=lambda *a: done.append(a))
    assert path.shape == (5, 30, 2) and done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    np.testing.assert_array_equal(path[0], x_T)
    np.testing.assert_array_equal(path[-1], sample(net, net.law, x_T, steps=4, seed=1))
    for before, after in pairwise(path):
        assert np.all((before == 3) | (after == before))  # what is shown stays
    assert np.all(path[-1] < 3) and np.all(x_T == 3)


# ------------------------------------------------------------------------------------------------------------------- infilling


def test_absorbing_infills_by_the_conditional_law(words):
    """Three letters, the middle one given: the others follow p(x_0, x_2|x_1), but for their own agreement in few steps."""
    p = np.random.default_rng(8).random((3, 3, 3)) ** 3 + 0.01
    p /= p.sum()
    net = Exact(words, p, "absorbing", 40)
    x_T = discrete.prior((20_000, 3), net.law, 5)
    values, mask = np.full(x_T.shape, -7), np.zeros(x_T.shape, bool)
    values[:, 1], mask[:, 1] = 2, True
    x = sample(net, net.law, x_T, seed=6, known=(values, mask))
    assert np.all(x[:, 1] == 2)
    conditional = p[:, 2] / p[:, 2].sum()
    # The chain of the two letters left is that of the conditional law, by definition and by enumeration.
    left = words(conditional, net.law)
    end = left.chain(range(1, 41), left.prior())
    assert np.abs(end - conditional.reshape(-1)).sum() / 2 < 0.01
    counts = np.bincount(x[:, 0] * 3 + x[:, 2], minlength=9)
    assert fits(counts, end) and not fits(counts, p.sum(axis=1).reshape(-1))

    asked = []
    sample(lambda x, t: (asked.append((x, t)), net(x, t))[1], net.law, x_T[:50], seed=6, known=(values[:50], mask[:50]))
    for x, t in asked:  # the time told is that of the state: as many masked as are on average
        np.testing.assert_array_equal(t, np.maximum(1, np.ceil(40 * (x == 3).mean(axis=1) - 1e-9)))
    one = sample(net, net.law, x_T[:5000], seed=7, known=(np.full((5000, 3), 1), np.array([[True, True, False]]).repeat(5000, 0)))
    assert np.all(one[:, :2] == 1) and fits(np.bincount(one[:, 2], minlength=3), p[1, 1] / p[1, 1].sum())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_comes_out_as_it_went_in(words, name):
    net = Exact(words, WORD, name, 6)
    rng = np.random.default_rng(0)
    values, mask = rng.integers(1, 3, (200, 2)), rng.random((200, 2)) < 0.5
    path = sample(net, net.law, discrete.prior((200, 2), net.law, 1), seed=2, known=(values, mask), trajectory=True)
    np.testing.assert_array_equal(path[-1][mask], values[mask])
    if net.law.name == "absorbing":
        assert np.all(path[:, mask] == values[mask])
    else:  # ahead of every row the known part is a draw of q(x_t|x_0)
        assert 0 < np.mean(path[-2][mask] == values[mask]) < 1
    all_known = sample(net, net.law, discrete.prior((200, 2), net.law, 1), known=(values, np.ones_like(mask)))
    np.testing.assert_array_equal(all_known, values)
    free = sample(net, net.law, discrete.prior((200, 2), net.law, 1), seed=2, known=(values, np.zeros_like(mask)))
    np.testing.assert_array_equal(free, sample(net, net.law, discrete.prior((200, 2), net.law, 1), seed=2))


def test_what_is_known_pulls_the_rest(words):
    """Replacement under the uniform law: approximate, but nearer to the conditional law than to the marginal one."""
    oracle = words(WORD, Uniform(3, rates.reciprocal(40)))
    x_T = discrete.prior((8000, 2), oracle.law, 5)
    mask = np.array([[True, False]]).repeat(8000, 0)
    x = sample(oracle.model, oracle.law, x_T, seed=6, known=(np.full(x_T.shape, 2), mask))
    share = np.bincount(x[:, 1], minlength=3) / 8000
    to_conditional = np.abs(share - WORD[2] / WORD[2].sum()).sum()
    assert to_conditional < 0.6 * np.abs(WORD.sum(axis=0) - WORD[2] / WORD[2].sum()).sum()


# ------------------------------------------------------------------------------------------------------------------ temperature


def test_temperature_divides_the_logits(words):
    for name in ("absorbing", "dense"):
        net = Exact(words, LETTER, name, 3)
        x_T = discrete.prior((20_000, 1), net.law, 1)
        hot = sample(net, net.law, x_T, grid=[3], seed=2, temperature=0.5)
        same = sample(lambda x, t, net=net: 2 * net(x, t), net.law, x_T, grid=[3], seed=2)
        np.testing.assert_array_equal(hot, same)
        if name == "absorbing":
            assert fits(net.counts(hot), LETTER**2 / (LETTER**2).sum())
    cold = sample(net, net.law, x_T, grid=[3], temperature=1e-3)
    assert np.mean(cold == 0) > 0.99


# -------------------------------------------------------------------------------------------------------------------- the door


def test_other_libraries_get_their_own_kind(words):
    torch = pytest.importorskip("torch")
    for name in ("uniform", "absorbing", "dense"):
        net = Exact(words, WORD, name, 4)
        x_T = discrete.prior((20, 2), net.law)

        def model(x, t, net=net):
            assert isinstance(x, torch.Tensor) and isinstance(t, torch.Tensor)
            return torch.tensor(net(x.numpy(), t.numpy()))

        ours = sample(model, net.law, torch.tensor(x_T), seed=3)
        assert isinstance(ours, torch.Tensor) and ours.dtype == torch.int32
        np.testing.assert_array_equal(ours.numpy(), sample(net, net.law, x_T, seed=3))


@pytest.mark.parametrize("name", NAMES)
def test_arrays_on_a_device_meet_no_array_of_the_host(name, monkeypatch):
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    law, table = law_of(name, 4), np.random.default_rng(0).standard_normal((4, 2, 3))

    def model(x, t):
        xp = cupy if isinstance(x, fake_cupy.ndarray) else np
        assert isinstance(t, xp.ndarray)
        return xp.asarray(table)[x, xp.asarray(np.arange(2))]

    x_T, known = discrete.prior((10, 2), law), (np.ones((10, 2), int), np.eye(10, 2, dtype=bool))
    with kernels.use("reference"):
        wanted = sample(model, law, x_T, known=known, trajectory=True)
        for given in (known, tuple(map(cupy.asarray, known))):
            found = sample(model, law, cupy.asarray(x_T), known=given, trajectory=True)
            assert isinstance(found, fake_cupy.ndarray)
            np.testing.assert_array_equal(found.get(), wanted)


def test_x_T_is_not_changed_and_may_be_of_any_integers(words):
    net = Exact(words, WORD, "uniform", 4)
    x_T = discrete.prior((20, 2), net.law).astype(np.uint8)
    before = x_T.copy()
    wide = sample(net, net.law, x_T.astype(np.int64), known=(np.ones((20, 2), np.uint8), np.eye(20, 2, dtype=bool)))
    np.testing.assert_array_equal(sample(net, net.law, x_T, known=(np.ones((20, 2), int), np.eye(20, 2, dtype=bool))), wide)
    np.testing.assert_array_equal(x_T, before)
    assert sample(net, net.law, x_T[:0]).shape == (0, 2)


def test_wrong_arguments_are_named(words):
    net = Exact(words, WORD, "uniform", 4)
    law, x_T = net.law, discrete.prior((6, 2), net.law)
    mask = np.ones((6, 2), bool)
    cases = [
        (TypeError, "law must be", (net, np.eye(3), x_T), {}),
        (TypeError, "x_T must be", (net, law, x_T * 1.0), {}),
        (ValueError, r"x_T must be in 0\.\.2", (net, law, x_T + 1), {}),
        (ValueError, "temperature must be positive", (net, law, x_T), {"temperature": 0}),
        (ValueError, "steps must be in", (net, law, x_T), {"steps": 5}),
        (ValueError, "end at 4", (net, law, x_T), {"grid": [1, 3]}),
        (ValueError, "ascend", (net, law, x_T), {"grid": [3, 1, 4]}),
        (TypeError, "list of ints", (net, law, x_T), {"grid": [1.0, 4.0]}),
        (ValueError, "not both", (net, law, x_T), {"grid": [4], "steps": 1}),
        (TypeError, "pair", (net, law, x_T), {"known": x_T}),
        (TypeError, "boolean", (net, law, x_T), {"known": (x_T, mask * 1)}),
        (ValueError, "of shape", (net, law, x_T), {"known": (x_T[:2], mask)}),
        (ValueError, "given part of known", (net, law, x_T), {"known": (x_T + 3, mask)}),
        (TypeError, "model must return an array", (lambda x, t: None, law, x_T), {}),
        (ValueError, "model must return floats", (lambda x, t: x, law, x_T), {}),
        (ValueError, "D in", (lambda x, t: np.zeros((6, 2, 4)), law, x_T), {}),
        (ValueError, "nothing can be drawn", (lambda x, t: np.full((6, 2, 3), np.nan), law, x_T), {}),
        (ValueError, "nothing can be drawn", (lambda x, t: np.full((6, 2, 3), -np.inf), law, x_T), {}),
    ]
    for error, match, arguments, options in cases:
        with pytest.raises(error, match=match):
            sample(*arguments, **options)


def test_grids_of_unsigned_numbers_must_ascend_too():
    law = Uniform(3, rates.cosine(6))
    np.testing.assert_array_equal(grid_of(law, grid=np.array([2, 3, 6], np.uint8)), [2, 3, 6])
    with pytest.raises(ValueError, match="grid must ascend"):
        grid_of(law, grid=np.array([3, 2, 6], np.uint8))
