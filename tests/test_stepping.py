"""What a captured training step is made of, against what a plain step computes; the launchers are tried in cuda_cases."""

from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import data, forward, schedules
from alphabar.kernels import stepping
from alphabar.kernels.graphs import Graph
from alphabar.tools import captured_step
from alphabar.tools import config as configs
from alphabar.tools.methods import Process
from tests import fake_cupy

BACKENDS = pytest.mark.parametrize("backend", ["auto", "reference"])
SETTINGS = {
    "eps": [],
    "v and min_snr": ["diffusion.prediction=v", "train.weighting=min_snr"],
    "x0 and p2": ["diffusion.prediction=x0", "train.weighting=p2"],
    "ladder": ["method=ncsn", "diffusion.sigma_max=9", "diffusion.levels=6"],
    "vpsde": ["method=vpsde", "train.weighting=likelihood"],
    "subvpsde": ["method=subvpsde", "train.weighting=likelihood", "train.importance=false"],
    "vesde": ["method=vesde", "diffusion.sigma_max=9"],
}


def step_of(k: int) -> np.ndarray:
    return np.array([k], np.int32)


@BACKENDS
@pytest.mark.parametrize(("batch", "seed", "k"), [(1, 0, 0), (7, 2**40 + 3, 5), (32, 2**63 - 1, 77), (301, 1, 2**31 - 1)])
def test_times_have_the_bits_of_random_times(backend: str, batch: int, seed: int, k: int) -> None:
    for T in (1, 1000, 4097):
        rows = np.random.default_rng(0).standard_normal((T + 1, 3)).astype(np.float32)
        t, levels = np.full(batch, np.nan), np.full((3, batch), np.nan, np.float32)
        with kernels.use(backend):
            stepping.draw_levels(rows, step_of(k), seed, t, levels)
        want = forward.random_times(batch, schedules.cosine(T), seed, k)
        assert np.array_equal(t, want) and np.array_equal(levels, rows[want].T)


@BACKENDS
@pytest.mark.parametrize("name", SETTINGS)
def test_an_example_has_the_bits_of_the_process(backend: str, name: str) -> None:
    """x, target and weight of the levels are those that the process computes on its own."""
    process, seed, k = Process(configs.load(None, SETTINGS[name])), 2**33 + 1, 12
    for shape in ((5, 8, 8, 1), (3, 33, 32, 2), (1, 7, 3, 1)):
        images = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        want = process.example(data.to_unit(images), seed, k)
        levels = captured_step.levels(process, want.times, want.weight)
        x, target = (np.full(shape, np.nan, np.float32) for _ in range(2))
        with kernels.use(backend):
            stepping.example(images, levels, step_of(k), seed, x, target)
        assert np.array_equal(x, process.input(want.x_t, want.times))
        assert np.array_equal(target, want.target)
        assert np.array_equal(levels[-1], np.ones(shape[0]) if want.weight is None else want.weight.astype(np.float32))


def test_the_bits_of_an_example_do_not_depend_on_the_threads() -> None:
    import numba

    images = np.random.default_rng(2).integers(0, 256, (3, 64, 64, 3), np.uint8)
    levels = np.random.default_rng(3).standard_normal((6, 3)).astype(np.float32)
    made, before = [], numba.get_num_threads()
    for threads in {1, before}:
        numba.set_num_threads(threads)
        try:
            made.append([np.empty(images.shape, np.float32) for _ in range(2)])
            stepping.example(images, levels, step_of(1), 4, *made[-1])
        finally:
            numba.set_num_threads(before)
    for other in made[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(made[0], other, strict=True))


@BACKENDS
def test_a_verdict_holds_until_it_is_read(backend: str) -> None:
    value = np.array([0.5, 1.0, 3.0], np.float32)
    bad, counters, tally = np.array([0.5, np.nan, 1.0], np.float32), np.zeros(2, np.int32), np.zeros(4)
    made, skipped = counters[:1], counters[1:]
    with kernels.use(backend):
        for losses, square, want in ((value, 4.0, [1, 0]), (value, 0.0, [2, 0]), (bad, 1.0, [2, 1]), (value, 1.0, [2, 2])):
            norm_sq = np.array([square])
            stepping.verdict(losses, norm_sq, skipped, tally)
            stepping.count(made, skipped, norm_sq)
            assert counters.tolist() == want
            assert np.isnan(norm_sq[0]) == (want[1] > 0)
        np.testing.assert_allclose(tally, [3.0, 2, 1.5, 0.0], rtol=1e-15)
        skipped[:] = 0
        for square in (np.inf, np.nan):
            norm_sq = np.array([square])
            stepping.verdict(value, norm_sq, skipped, tally)
            assert np.isnan(norm_sq[0]) and tally[1] == 2


@BACKENDS
@pytest.mark.parametrize("max_norm", [0.5, 1e9, float("inf")])
@pytest.mark.parametrize("size", [1, 1000, 70_001])
def test_steps_by_rows_are_steps_by_numbers(backend: str, max_norm: float, size: int) -> None:
    """On the CPU with the bits of adamw_ema; past the table its last row goes on; what is not finite changes nothing."""
    rng = np.random.default_rng(4)
    rates = [(1e-3 / (k + 1), 0.9, 0.99, 0.1, k + 1, k / (k + 1)) for k in range(3)]
    rows = np.stack([stepping.adamw_row(*r) for r in rates])
    ours = [np.abs(rng.standard_normal(size)).astype(np.float32) for _ in range(5)]
    theirs = [a.copy() for a in ours]
    with kernels.use(backend):
        for k in (0, 1, None, 2, 3):
            ours[1][...] = theirs[1][...] = rng.standard_normal(size)
            norm_sq = kernels.sum_squares(ours[1]) if k is not None else np.array([np.nan])
            at = step_of(1 if k is None else k)
            stepping.adamw_ema_by_table(*ours, rows, at, 0.9, 0.99, 1e-8, norm_sq, max_norm)  # type: ignore[call-arg, arg-type]
            if k is not None:
                lr, beta1, beta2, decay, step, ema = rates[min(k, 2)]
                kernels.adamw_ema(*theirs, lr, beta1, beta2, 1e-8, decay, step, ema, norm_sq, max_norm)
            for a, b in zip(ours, theirs, strict=True):
                if backend == "auto":
                    assert np.array_equal(a, b)
                else:
                    np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)


def test_all_of_it_can_be_repeated_by_a_plan() -> None:
    """The calls of a step, recorded and repeated, follow what the arrays hold."""
    rows = np.random.default_rng(5).standard_normal((11, 6)).astype(np.float32)
    images, counters, tally = np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32), np.zeros(4)
    t, levels = np.zeros(2), np.zeros((6, 2), np.float32)
    x, target, flats = *(np.zeros(images.shape, np.float32) for _ in range(2)), [np.ones(32, np.float32) for _ in range(5)]
    row = stepping.adamw_row(0.1, 0.9, 0.99, 0.0, 1, 0.5)[None]
    made, skipped = counters[:1], counters[1:]

    def body() -> None:
        stepping.draw_levels(rows, made, 3, t, levels)
        stepping.example(images, levels, made, 3, x, target)
        value, gradient = kernels.squared_error(x, target, levels[-1])
        norm_sq = kernels.sum_squares(gradient)
        stepping.verdict(value, norm_sq, skipped, tally)
        stepping.adamw_ema_by_table(*flats, row, made, 0.9, 0.99, 1e-8, norm_sq)  # type: ignore[call-arg, arg-type]
        stepping.count(made, skipped, norm_sq)

    graph = Graph(body, images, (rows, images, counters, tally, t, levels, x, target, *flats, row))
    for k in range(3):
        images[...] = np.random.default_rng(k).integers(0, 256, images.shape)
        graph()
        assert graph.kept and graph.refused is None and counters.tolist() == [k + 1, 0]
        assert np.array_equal(t, forward.random_times(2, schedules.cosine(10), 3, k))
        again = np.empty_like(x), np.empty_like(x)
        stepping.example(images, levels, step_of(k), 3, *again)
        assert np.array_equal(x, again[0]) and np.array_equal(target, again[1])


X, T, LEVELS, STEP = np.zeros((2, 3), np.float32), np.zeros(2), np.zeros((6, 2), np.float32), np.zeros(1, np.int32)
ROWS, IMAGES, SQUARE = np.zeros((4, 6), np.float32), np.zeros((2, 3), np.uint8), np.ones(1)
FROZEN = X.copy()
FROZEN.setflags(write=False)
FLATS, REST = [X[0]] * 5, [STEP, 0.9, 0.9, 1e-8, SQUARE]
REFUSED: list[tuple[Any, str, Any]] = [
    (TypeError, "rows must be float32", lambda: stepping.draw_levels(ROWS.astype(float), STEP, 0, T, LEVELS)),
    (ValueError, "at least two rows", lambda: stepping.draw_levels(ROWS[:1], STEP, 0, T, LEVELS)),
    (ValueError, r"levels must have shape \(6, 3\)", lambda: stepping.draw_levels(ROWS, STEP, 0, np.zeros(3), LEVELS)),
    (TypeError, "step must be int32", lambda: stepping.draw_levels(ROWS, np.zeros(1), 0, T, LEVELS)),
    (ValueError, "seed must be in", lambda: stepping.draw_levels(ROWS, STEP, 2**64, T, LEVELS)),
    (TypeError, "t must be an array", lambda: stepping.draw_levels(ROWS, STEP, 0, [1.0, 2.0], LEVELS)),
    (TypeError, "images must be uint8", lambda: stepping.example(X, LEVELS, STEP, 0, X, X)),
    (TypeError, "images must be an array", lambda: stepping.example(3, LEVELS, STEP, 0, X, X)),
    (ValueError, r"target must have shape \(2, 3\)", lambda: stepping.example(IMAGES, LEVELS, STEP, 0, X, X[:1])),
    (ValueError, "x must be contiguous and writable", lambda: stepping.example(IMAGES, LEVELS, STEP, 0, FROZEN, X)),
    (ValueError, "x must be contiguous", lambda: stepping.example(IMAGES, LEVELS, STEP, 0, np.zeros((3, 2), np.float32).T, X)),
    (ValueError, "value must not be empty", lambda: stepping.verdict(X[0, :0], SQUARE, STEP, np.zeros(4))),
    (ValueError, r"tally must have shape \(4,\)", lambda: stepping.verdict(X[0], SQUARE, STEP, np.zeros(3))),
    (ValueError, "rows must not be empty", lambda: stepping.adamw_ema_by_table(*FLATS, np.zeros((0, 5), np.float32), *REST)),
    (ValueError, r"grad must have shape \(3,\)", lambda: stepping.adamw_ema_by_table(X[0], X[0, :2], *FLATS[2:], ROWS, *REST)),
    (TypeError, "made must be int32", lambda: stepping.count(SQUARE, STEP, SQUARE)),
    (TypeError, "different libraries", lambda: stepping.count(STEP, STEP, fake_cupy.cupy.asarray(SQUARE))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words", "call"), REFUSED)
def test_what_does_not_fit_is_named(error: Any, words: str, call: Any) -> None:
    with pytest.raises(error, match=words):
        call()


def test_empty_batches_are_taken() -> None:
    stepping.draw_levels(ROWS, STEP, 0, T[:0], LEVELS[:, :0].copy())
    stepping.example(IMAGES[:0], LEVELS[:, :0].copy(), STEP, 0, X[:0], X[:0])
