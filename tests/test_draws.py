"""Categorical draws: the exponential, the law of what is drawn, zeros that stay zero, and rows that have no law."""

import hashlib
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

from alphabar import kernels
from alphabar.kernels import gpu, reference, streams
from tests import cusim

pytest.importorskip("numba")

BACKENDS = ("auto", "reference", "cuda")
NAMES = ("categorical", "categorical_posterior", "categorical_q_sample")


@pytest.fixture(params=BACKENDS)
def draw(request: pytest.FixtureRequest) -> Iterator[Any]:
    """``draw(name, …)`` on each backend; CUDA on the host, where g++ is."""
    if request.param == "cuda":
        if not cusim.available():
            pytest.skip("g++ is not installed")
        with gpu.on(cusim.Host()):
            yield lambda name, *args, **kwargs: getattr(gpu, name)(*args, **kwargs)
        return
    with kernels.use(request.param):
        yield lambda name, *args, **kwargs: getattr(kernels, name)(*args, **kwargs)


def frequencies_fit(states: np.ndarray, p: np.ndarray) -> bool:
    """Chi-square over the states that are expected often, 4.5 standard errors for every state, none where p is 0."""
    counts, n = np.bincount(states.ravel(), minlength=len(p)), states.size
    often = n * p > 10
    rest = [counts[~often].sum()], [n * p[~often].sum()]
    if rest[1][0] < 10:
        rest = [], []
    seen, expected = (np.concatenate(v) for v in ((counts[often], rest[0]), (n * p[often], rest[1])))
    close = np.abs(counts / n - p) <= 4.5 * np.sqrt(p * (1 - p) / n) + 5 / n
    fits = len(seen) < 2 or stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue > 1e-4
    return len(counts) == len(p) and bool(close.all()) and not counts[p == 0].any() and bool(fits)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def posterior_law(p: np.ndarray, x: int, row: tuple[float, ...], mask: int) -> np.ndarray:
    """w of the kernel's docstring, term by term."""
    keep, spread, c, d = row
    if mask < 0:
        w = np.array([(keep * (j == x) + spread) * (c * p[j] + d) for j in range(len(p))])
    elif x != mask:
        w = np.eye(max(mask + 1, len(p)))[x]
    else:
        w = np.array([d if j == mask else c * p[j] if j < len(p) else 0.0 for j in range(max(mask + 1, len(p)))])
    return w / w.sum()


# ------------------------------------------------------------------------------------------------------ exponential and uniforms


def test_the_exponential_is_that_of_numpy_to_two_units_in_the_last_place() -> None:
    x = -np.concatenate([np.linspace(0, 64, 500_001), np.geomspace(1e-30, 1, 20_000)]).astype(np.float32)
    y, exact = reference.exp_below_0(x), np.exp(x.astype(np.float64))
    assert (np.abs(y - exact) <= 1.5 * np.spacing(exact.astype(np.float32))).all()
    assert (np.abs(y - np.exp(x)) <= 2 * np.spacing(np.exp(x))).all()
    assert y.min() > np.finfo(np.float32).tiny


def test_the_exponential_of_the_ends() -> None:
    far = np.array([-np.inf, -1e30, -64.01, -64.0, 0.0, -0.0, np.nan], np.float32)
    assert np.array_equal(reference.exp_below_0(far) > 0, [False, False, False, True, True, True, False])
    assert list(reference.exp_below_0(far)[[0, 1, 4, 5]]) == [0, 0, 1, 1] and np.isnan(reference.exp_below_0(far)[6])


def test_uniforms_lie_inside_the_open_interval_and_are_exact() -> None:
    u = reference.uniform(np.array([0, 511, 512, 2**32 - 1], np.uint32))
    assert u.dtype == np.float32 and list(u.astype(np.float64)) == [2**-24, 2**-24, 3 * 2**-24, 1 - 2**-24]


def test_an_element_takes_the_word_of_its_normal(draw: Any) -> None:
    """Two states of equal weight: the second is drawn where u ≥ ½."""
    states = draw("categorical", np.zeros((2, 1500, 2), np.float32), 2**33 + 5, step=7, stream=3, first_sample=9)
    moved = draw(
        "categorical_q_sample", np.zeros((2, 1500), np.int32), np.zeros(2, int), np.zeros(1), 2**20, -1, 2**33 + 5, 7, 3, 9
    )
    for n in range(2):
        for e in (0, 1, 255, 256, 511, 512, 800, 1023, 1024, 1279, 1280, 1499):
            for stream, value in ((3, states[n, e]), (3 + 2**31, moved[n, e])):
                count = (256 * (e // 1024) + e % 256, 9 + n, 7, stream)
                word = int(reference.philox(tuple(np.array([c], np.uint32) for c in count), (5, 2))[e // 256 % 4][0])
                assert value == (word >> 31 if stream == 3 else word >> 12)


LOGITS = ((np.arange(3 * 700 * 37).reshape(3, 700, 37) * 53 % 127 - 63) / 8).astype(np.float32)
X = (np.arange(3 * 700).reshape(3, 700) * 11 % 37).astype(np.int32)
GOLDEN = {
    "categorical": "d3f2723a5343d84e24c517807ee531644a5d7288eea33b6489b10a0ffdea60a3",
    "uniform": "03eb5140e752924a25fe480d3ef589d0d1cf1c72c71a5f1573391e969ad014b5",
    "absorbing": "f6cb07fa84b120e97ded852c3ce7c9227b5fd78b45b7c8939bbd71a26faa4412",
    "q_sample": "0a5706e3b4ec966213b05de30425c6ad2e17355042281bc34329e594a7984735",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_hashes(draw: Any, name: str) -> None:
    rows = np.array([[0.75, 0.25 / 37, 0.5, 0.5 / 37], [0, 0, 0.25, 0.5]])
    calls = {
        "categorical": ("categorical", LOGITS, 2**40 + 3),
        "uniform": ("categorical_posterior", LOGITS, X, rows, 0, -1, 7),
        "absorbing": ("categorical_posterior", LOGITS, np.where(X < 20, 37, X), rows, 1, 37, 7),
        "q_sample": ("categorical_q_sample", X, np.array([0, 1, 2]), np.array([0.9, 0.5, 0.0]), 37, -1, 3),
    }
    states = draw(*calls[name], step=4, first_sample=2**32 - 1)
    assert hashlib.sha256(states.astype("<i4").tobytes()).hexdigest() == GOLDEN[name]


# --------------------------------------------------------------------------------------------------------------------------- law

CALLS = {"auto": 200_000, "reference": 60_000, "cuda": 6_000}


@pytest.mark.parametrize("columns", [1, 2, 3, 28, 33, 300])
def test_draws_follow_the_law(draw: Any, request: pytest.FixtureRequest, columns: int) -> None:
    rng = np.random.default_rng(columns)
    logits = (2 * rng.standard_normal(columns)).astype(np.float32)
    logits[1:][rng.random(columns - 1) < 0.3] = -np.inf
    n = CALLS[request.node.callspec.params["draw"]] // (1 + columns // 100)
    states = draw("categorical", np.broadcast_to(logits, (4, n // 4, columns)).copy(), 3)
    assert frequencies_fit(states, softmax(logits))


@pytest.mark.parametrize("mask", [-1, 6, 2])
def test_posterior_draws_follow_the_law(draw: Any, request: pytest.FixtureRequest, mask: int) -> None:
    n = CALLS[request.node.callspec.params["draw"]] // 6
    logits = np.array([0.5, -1.0, 2.0, -np.inf, 0.0, 1.0], np.float32)
    p = softmax(logits)
    if mask == 2:  # the logits have a column of the mask: it is left out
        p[2] = 0
        p /= p.sum()
    rows = np.array(
        [(0.6, 0.4 / 6, 0.7, 0.3 / 6), (0.2, 0.8 / 6, 1.0, 0.0)] if mask < 0 else [(0, 0, 0.3, 0.5), (0, 0, 0.4, 0.0)]
    )
    for index in (0, 1):
        for x in range(6 + (mask == 6)):
            given = np.broadcast_to(logits, (2, n // 2, 6)).copy(), np.full((2, n // 2), x, np.int32)
            states = draw("categorical_posterior", *given, rows, index, mask, seed=9)
            assert frequencies_fit(states, posterior_law(p, x, rows[index], mask)), (index, x)


def test_q_sample_draws_follow_the_law(draw: Any, request: pytest.FixtureRequest) -> None:
    n = CALLS[request.node.callspec.params["draw"]] // 2
    x0, t, keep = np.full((4, n // 4), 3, np.int32), np.array([0, 1, 2, 3]), np.array([1.0, 0.7, 0.01, 0.0])
    for mask in (-1, 5):
        states = draw("categorical_q_sample", x0, t, keep, 5, mask, seed=2)
        for k, share in enumerate(keep):
            other = np.full(5, 1 / 5) if mask < 0 else np.eye(6)[5]
            assert frequencies_fit(states[k], share * np.eye(len(other))[3] + (1 - share) * other), (mask, k)


def test_a_rare_part_of_the_mixture_draws_as_finely_as_a_common_one() -> None:
    """One element in a thousand leaves the mask; where it goes has the resolution of a whole word."""
    logits = np.log(np.arange(1, 28, dtype=np.float32))
    x, rows = np.full((1, 200_000), 27, np.int32), np.array([[0, 0, 1e-3, 1 - 1e-3]])
    broadcast = np.broadcast_to(logits, (1, 200_000, 27)).copy()
    states = np.concatenate([kernels.categorical_posterior(broadcast, x, rows, 0, 27, step=k) for k in range(40)])
    left = states[states != 27]
    assert abs(left.size / states.size - 1e-3) < 4.5 * np.sqrt(1e-3 / states.size)
    assert frequencies_fit(left, softmax(logits))


def test_the_two_words_of_an_element_are_independent() -> None:
    shape = (4, 50_000)
    first, second = (reference.uniform(reference.words(shape, 1, 2, s, 3)).ravel() - 0.5 for s in (0, reference.SECOND))
    assert abs(np.corrcoef(first, second)[0, 1]) * np.sqrt(first.size) < 4.5


def test_no_stream_is_another_ones_second() -> None:
    assert all(v < reference.SECOND for k, v in vars(streams).items() if k.isupper())


# --------------------------------------------------------------------------------------------------- zeros and rows without a law


def test_zeros_are_never_drawn(draw: Any) -> None:
    rng = np.random.default_rng(0)
    for columns in (2, 31, 32, 33, 100):
        logits = (30 * rng.standard_normal((3, 200, columns))).astype(np.float32)
        dead = rng.random(logits.shape) < 0.9
        dead[..., 0] &= ~dead.all(-1)
        dead[dead.all(-1), 0] = False
        logits[dead] = -np.inf
        states = draw("categorical", logits, columns)
        assert (states >= 0).all() and not np.take_along_axis(dead, states[..., None], -1).any()


@pytest.mark.parametrize("columns", [1, 5, 70])
@pytest.mark.parametrize("bad", [-np.inf, np.inf, np.nan])
def test_rows_without_a_law_give_minus_one_and_touch_no_other(draw: Any, bad: float, columns: int) -> None:
    logits = np.random.default_rng(0).standard_normal((2, 40, columns)).astype(np.float32)
    x, rows = np.zeros((2, 40), np.int32), np.array([(0.5, 0.1, 0.5, 0.1), (0, 0, 1, 0)])
    good = draw("categorical", logits, 1), draw("categorical_posterior", logits, x, rows, 0, seed=1)
    logits[1, 7] = bad
    for states, want in zip(
        (draw("categorical", logits, 1), draw("categorical_posterior", logits, x, rows, 0, seed=1)), good, strict=True
    ):
        assert states[1, 7] == -1
        states[1, 7] = want[1, 7]
        assert np.array_equal(states, want)
    if np.isnan(bad):
        logits[1, 7] = 0
        logits[1, 7, -1] = bad
        assert draw("categorical", logits, 1)[1, 7] == -1


def test_logits_are_read_only_where_a_masked_state_moves(draw: Any) -> None:
    logits = np.full((2, 300, 5), np.nan, np.float32)
    x = np.random.default_rng(0).integers(0, 6, (2, 300)).astype(np.int32)
    states = draw("categorical_posterior", logits, x, np.array([[0, 0, 0.25, 0.75]]), 0, mask=5)
    assert np.array_equal(states[x != 5], x[x != 5])
    assert set(states[x == 5]) == {5, -1} and abs((states[x == 5] == -1).mean() - 0.25) < 0.2


def test_a_row_of_zero_coefficients_has_no_law(draw: Any) -> None:
    logits, x = np.zeros((1, 4, 3), np.float32), np.array([[0, 1, 2, 2]], np.int32)
    assert (draw("categorical_posterior", logits, x, np.zeros((1, 4)), 0) == -1).all()
    assert list(draw("categorical_posterior", logits, x, np.zeros((1, 4)), 0, mask=2)[0]) == [0, 1, -1, -1]


def test_large_differences_of_weight_do_not_overflow(draw: Any) -> None:
    logits = np.array([[[3e38, -3e38, 0.0]] * 20, [[-3e38, -3e38, -np.inf]] * 20], np.float32)
    states = draw("categorical", logits, 0)
    assert (states[0] == 0).all() and set(states[1]) == {0, 1}


# ---------------------------------------------------------------------------------------------------------------- kinds of arrays


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.int64, np.uint64])
def test_states_of_any_integer_dtype(draw: Any, kind: Any) -> None:
    rows, t, keep = np.array([(0.5, 0.1, 0.5, 0.1)]), np.array([0, 1, 1]), np.array([0.9, 0.5])
    want = draw("categorical_posterior", LOGITS, X, rows, 0, seed=1), draw("categorical_q_sample", X, t, keep, 37)
    got = (
        draw("categorical_posterior", LOGITS, X.astype(kind), rows, 0, seed=1),
        draw("categorical_q_sample", X.astype(kind), t.astype(kind), keep, 37),
    )
    assert all(np.array_equal(a, b) and a.dtype == np.int32 for a, b in zip(got, want, strict=True))


def test_a_draw_may_go_into_the_states_it_replaces(draw: Any) -> None:
    rows, t, keep = np.array([(0.5, 0.1, 0.5, 0.1)]), np.array([0, 1, 1]), np.array([0.9, 0.5])
    for name, args in (("categorical_posterior", (rows, 0)), ("categorical_q_sample", (t, keep, 37))):
        first = (LOGITS,) if name == "categorical_posterior" else ()
        want, x = draw(name, *first, X, *args), X.copy()
        assert draw(name, *first, x, *args, out=x) is x and np.array_equal(x, want)


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_floats_draw_nearly_the_same(dtype: Any) -> None:
    want = kernels.categorical(LOGITS, 1)
    states = kernels.categorical(LOGITS.astype(dtype), 1)
    assert states.dtype == np.int32 and (states != want).mean() < 0.01


def test_tensors_come_and_go() -> None:
    torch = pytest.importorskip("torch")
    states = kernels.categorical(torch.from_numpy(LOGITS), 1)
    assert isinstance(states, torch.Tensor) and np.array_equal(states.numpy(), kernels.categorical(LOGITS, 1))
    moved = kernels.categorical_q_sample(torch.from_numpy(X), torch.tensor([0, 1, 1]), np.array([0.9, 0.5]), 37)
    assert isinstance(moved, torch.Tensor) and moved.dtype == torch.int32


# --------------------------------------------------------------------------------------------------------------- CUDA on the host


@pytest.mark.skipif(not cusim.available(), reason="g++ is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_a_warp_of_many_elements_draws_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = kernels.TABLE[name]
    for enough in (4, 100):
        monkeypatch.setattr(importlib.import_module("alphabar.kernels.gpu.discrete"), "ENOUGH_WARPS", enough)
        for order in cusim.ORDERS:
            for case in table.tests:
                args, kwargs = table.make(np.random.default_rng(0), case, np.float32)
                with gpu.on(cusim.Host("fast", order)):
                    states = getattr(gpu, name)(*args, **kwargs)
                assert np.array_equal(states, getattr(reference, name)(*args, **kwargs))


@pytest.mark.skipif(not cusim.available(), reason="g++ is not installed")
def test_states_and_times_out_of_range_read_nothing_on_a_gpu() -> None:
    """Values on a device are not looked at before the launch: the checker sees every access."""
    logits, rows = np.zeros((1, 4, 5), np.float32), np.array([(0.5, 0.1, 0.5, 0.1)])
    x = np.array([[5, -1, 2**31 - 1, -(2**31)]], np.int32)
    with gpu.on(cusim.Host("check")):
        assert (gpu.categorical_posterior(logits, x, rows, 0) == -1).all()
        assert np.array_equal(gpu.categorical_posterior(logits, x, rows, 0, mask=7), x)
        late = gpu.categorical_q_sample(np.zeros((3, 8), np.int32), np.array([0, 2, -1]), np.ones(2), 5)
    assert (late[0] == 0).all() and (late[1:] == -1).all()
