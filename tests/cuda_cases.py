"""Calls of the GPU's launchers that the registry of kernels does not list: sums and copies, and what serves captured graphs.

Each case runs launchers on arrays that ``place`` has put somewhere, and compares with NumPy.
"""

from collections.abc import Callable, Iterator

import numpy as np

from alphabar.kernels import bf16, reference
from alphabar.kernels.gpu import elementwise, optim, stepping, transpose
from alphabar.kernels.reference import stepping as definitions
from tests import (
    cuda_attention_cases,
    cuda_bf16_cases,
    cuda_conv_mma_cases,
    cuda_conv_mma_weight_cases,
    cuda_norm_affine_cases,
    cuda_sampling_cases,
)
from tests.cuda_arrays import Place, normal

Case = Callable[[Place], None]
SHAPES = {
    "one": (1, 1, 1),
    "odd": (3, 5, 7),
    "wide": (2, 40, 64),
    "few channels": (2, 300, 4),
    "many channels": (2, 9, 260),
    "long": (1, 1500, 12),
    "batch": (70, 3, 8),
    "slices": (1, 4100, 33),
    "empty": (2, 0, 4),
}


def sums_and_copies(shape: tuple[int, ...], place: Place) -> None:
    """Bits of NumPy, also where the result goes over an argument."""
    batch, places, channels = shape
    a, b = place(normal(0, *shape)), place(normal(1, *shape))
    total = a + b
    assert np.array_equal(elementwise.add(a, b, place(np.empty_like(a))), total)
    into = place(b)
    assert elementwise.add(a, into, into) is into and np.array_equal(into, total)
    elementwise.fill(into, 2.5)
    assert (into == 2.5).all()

    for at, more in ((4, 8), (3, 9)):
        wide = place(normal(2, batch, places, channels + more))
        want = wide.copy()
        want[..., at : at + channels] += a
        elementwise.add_columns(a, at, wide)
        assert np.array_equal(wide, want)
        assert np.array_equal(elementwise.concat(a, wide), np.concatenate([a, wide], axis=-1))
        assert np.array_equal(elementwise.channels(wide, at, channels), wide[..., at : at + channels])
        emb = place(normal(3, batch, channels + more))
        want = a + emb[:, None, at : at + channels]
        assert np.array_equal(elementwise.add_channels(a, emb, at, place(np.empty_like(a))), want)
        over = place(a)
        assert elementwise.add_channels(over, emb, at, over) is over and np.array_equal(over, want)


def sums_over_places(shape: tuple[int, ...], place: Place) -> None:
    x = place(normal(4, *shape))
    want, size = x.sum(axis=1, dtype=np.float64), np.abs(x).sum(axis=1).max(initial=0)
    np.testing.assert_allclose(elementwise.sum_places(x), want, rtol=0, atol=3e-7 * size)


def rows_of_tables(rows: int, count: int, width: int, place: Place) -> None:
    """Rows read and summed, by indices that leave rows out and by one index."""
    x, table = place(normal(5, count, width)), place(normal(6, rows, width))
    for index in (np.random.default_rng(7).integers(0, rows, count), np.full(count, rows - 1, np.int32)):
        assert np.array_equal(elementwise.take_rows(table, index), table[index])
        want = np.zeros((rows, width))
        np.add.at(want, index, x)
        size = np.abs(x).sum(axis=0).max(initial=0)
        np.testing.assert_allclose(elementwise.sum_into_rows(x, index, rows), want, rtol=0, atol=3e-7 * size)
    beyond = elementwise.take_rows(table, np.array([[0, rows], [-1, 0]]))
    assert np.isnan(beyond[[0, 1], [1, 0]]).all() and np.array_equal(beyond[0, 0], table[0])


def features_of_times(place: Place) -> None:
    """To the rounding of float32, for angles small and large, negative, and not finite."""
    t = np.array([0.0, 1, 2.5, 1000, -37.5, 3e6, 2e9, -2.1e9, np.inf, np.nan])
    for dtype in (np.float32, np.float64):
        omega = np.exp(-np.arange(21) / 3).astype(dtype)
        angle = ((t - 1).astype(dtype)[:, None] * omega).astype(np.float64)
        with np.errstate(invalid="ignore"):
            sine, cosine = np.sin(angle), np.cos(angle)
        for cos_first in (False, True):
            want = np.concatenate([cosine, sine] if cos_first else [sine, cosine], axis=1)
            made = elementwise.time_features(t, 1, omega, cos_first)
            np.testing.assert_allclose(made, want, rtol=0, atol=2.0**-25)


def doubled_images(batch: int, height: int, width: int, channels: int, place: Place) -> None:
    x = place(normal(8, batch, height, width, channels))
    assert np.array_equal(elementwise.upsample(x), x.repeat(2, axis=1).repeat(2, axis=2))
    dy = place(normal(9, batch, 2 * height, 2 * width, channels))
    want = dy.reshape(batch, height, 2, width, 2, channels).sum(axis=(2, 4), dtype=np.float64)
    np.testing.assert_allclose(elementwise.upsample_backward(dy), want, rtol=0, atol=1e-6)


def steps_of_the_optimiser(size: int, place: Place) -> None:
    """Steps by a table and a counter have the bits of steps by numbers; a gradient that is not finite changes nothing."""
    rates = [(1e-3 / (k + 1), 0.9, 0.99, 0.1, k + 1, k / (k + 1)) for k in range(3)]
    ours, theirs = ([place(np.abs(normal(i, size))) for i in range(5)] for _ in range(2))
    table = np.stack([optim.adamw_row(*r) for r in rates])
    made, skipped = np.zeros(1, np.int32), np.zeros(1, np.int32)
    low = place(np.zeros(size, bf16.BF16))
    for k in (0, 1, None, 2, 2):  # None: the gradient is not finite; behind the table its last row goes on
        gradient = place(normal(20 + (k or 0), size))
        ours[1], theirs[1] = gradient, gradient
        norm_sq = reference.sum_squares(gradient) if k is not None else np.array([np.inf])
        optim.adamw_ema_by_table(*ours, table, made, 0.9, 0.99, 1e-8, norm_sq, 0.5, low if k != 0 else None)
        optim.count(made, skipped, norm_sq)
        if k is not None:
            lr, beta1, beta2, decay, step, ema = rates[k]
            optim.adamw_ema(*theirs, lr, beta1, beta2, 1e-8, decay, step, ema, norm_sq, 0.5)
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a, b)
        assert np.array_equal(low, bf16.pack(ours[0]) if k != 0 else np.zeros(size, bf16.BF16))
    assert (made, skipped) == (4, 1)
    optim.count(made)
    assert made == 5


def sums_of_squares(size: int, place: Place) -> None:
    x = place(normal(10, size))
    np.testing.assert_allclose(optim.sum_squares(x), [np.square(x, dtype=np.float64).sum()], rtol=1e-14)


def levels_and_examples(shape: tuple[int, ...], place: Place) -> None:
    """Bits of the definition, at the first step of a training and at a late one, for seeds of one word and of two."""
    rng = np.random.default_rng(11)
    rows, images = place(normal(12, 1001, 6)), rng.integers(0, 256, shape, np.uint8)
    for seed, step in ((0, 0), (2**40 + 3, 2**31 - 1)):
        made: list[list[np.ndarray]] = []
        for of in (stepping, definitions):
            t, levels = np.full(shape[0], np.nan), place(np.full((6, shape[0]), np.nan, np.float32))
            x, target = (place(np.full(shape, np.nan, np.float32)) for _ in range(2))
            at = np.array([step], np.int32)
            of.draw_levels(rows, at, seed, t, levels)
            of.example(images, levels, at, seed, x, target)
            made.append([t, levels, x, target])
        assert all(np.array_equal(a, b) for a, b in zip(*made, strict=True))


def verdicts(batch: int, place: Place) -> None:
    """A step that counts is in the tally; none is that is not finite, nor any after it until that was read."""
    values, made = place(np.abs(normal(13, batch))), np.zeros(2, np.int32)
    tally, mean = np.zeros(4), values.mean(dtype=np.float64)
    bad = values.copy()
    bad[-1] = np.inf
    for value, square, want in ((values, 4.0, 1), (values, 9.0, 2), (bad, 1.0, 2), (values, 1.0, 2)):
        norm_sq = np.array([square])
        stepping.verdict(place(value), norm_sq, made[1:], tally)
        stepping.count(made[:1], made[1:], norm_sq)
        assert made[0] == want == tally[1]
        assert norm_sq[0] == square if made[1] == 0 else np.isnan(norm_sq[0])
        np.testing.assert_allclose(tally, [want * mean, want, mean, want + 1.0], rtol=1e-14)
    made[1] = 0
    for square in (np.inf, np.nan):
        norm_sq = np.array([square])
        stepping.verdict(values, norm_sq, made[1:], tally)
        assert np.isnan(norm_sq[0]) and tally[1] == 2


def transposes(rows: int, columns: int, place: Place) -> None:
    """Bits of NumPy, of float32 and of bfloat16."""
    x = normal(14, rows, columns)
    for a in (place(x), place(bf16.pack(x))):
        assert np.array_equal(transpose.transpose(a, rows, (columns, rows)), a.T)
        into = place(np.empty((columns, 1, rows), a.dtype))
        assert transpose.transpose(a, rows, into.shape, into) is into and np.array_equal(into[:, 0], a.T)


def all_cases() -> Iterator[tuple[str, Case]]:
    for name, shape in SHAPES.items():
        yield f"sums and copies, {name}", lambda place, s=shape: sums_and_copies(s, place)  # type: ignore[misc]
        yield f"sums over places, {name}", lambda place, s=shape: sums_over_places(s, place)  # type: ignore[misc]
    for sizes in ((1, 1, 1), (6, 700, 8), (3, 40, 1030), (5, 30, 7), (4, 0, 8)):
        yield f"rows of tables {sizes}", lambda place, s=sizes: rows_of_tables(*s, place)  # type: ignore[misc]
    yield "features of times", features_of_times
    for sizes in ((1, 1, 1, 1), (2, 3, 5, 8), (1, 4, 3, 5), (0, 4, 4, 4)):
        yield f"doubled images {sizes}", lambda place, s=sizes: doubled_images(*s, place)  # type: ignore[misc]
    for size in (1, 1000, 1003):
        yield f"steps of the optimiser {size}", lambda place, s=size: steps_of_the_optimiser(s, place)  # type: ignore[misc]
    for size in (
        0,
        3,
        4096,
        12288,
        20482,
    ):  # one block, rounds of four accesses, what is left of a round and of four
        yield f"sums of squares {size}", lambda place, s=size: sums_of_squares(s, place)  # type: ignore[misc]

    for sizes in ((1, 8, 8, 1), (5, 7, 5, 3), (300, 1, 1, 1), (2, 2053), (3, 40, 36)):
        yield f"levels and examples {sizes}", lambda place, s=sizes: levels_and_examples(s, place)  # type: ignore[misc]
    for batch in (1, 33, 700):
        yield f"verdicts {batch}", lambda place, n=batch: verdicts(n, place)  # type: ignore[misc]
    for sizes in ((1, 1), (32, 32), (33, 65), (70, 4), (64, 132), (0, 4)):
        yield f"transposes {sizes}", lambda place, s=sizes: transposes(*s, place)  # type: ignore[misc]
    yield from cuda_bf16_cases.all_cases()
    yield from cuda_sampling_cases.all_cases()
    yield from cuda_norm_affine_cases.all_cases()


def of_tensor_cores() -> Iterator[tuple[str, Case]]:
    """Those of kernels that have test files of their own, in which all orders and the checker run."""
    yield from cuda_attention_cases.all_cases()
    yield from cuda_conv_mma_cases.all_cases()
    yield from cuda_conv_mma_weight_cases.all_cases()


CASES: dict[str, Case] = dict(all_cases())
EVERY = CASES | dict(of_tensor_cores())
