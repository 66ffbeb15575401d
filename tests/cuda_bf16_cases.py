"""Storage in bfloat16 on the GPU: launchers of sums, copies, casts and group norms, compared with their definitions.

The oracle is float64 on the same bfloat16 numbers with one rounding at the end, or NumPy's bits where float32 has but one way.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from alphabar.kernels import gpu, reference
from alphabar.kernels.bf16 import BF16, pack, unpack
from alphabar.kernels.gpu import elementwise
from tests.cuda_arrays import Place, normal

SHAPES = {  # channels in eights, fours, pairs and odd; a sum over places in slices
    "one": (1, 1, 1),
    "odd": (3, 5, 7),
    "pairs": (3, 5, 6),
    "fours": (70, 3, 12),
    "wide": (2, 40, 64),
    "slices": (1, 4100, 33),
    "empty": (2, 0, 4),
}
NORMS = {  # (shape, groups, channels of x before the tail): slabs that a block keeps or that are in parts, of vectors or numbers
    "kept": ((2, 5, 3, 24), 3, 12),
    "kept, groups within vectors": ((2, 9, 16), 8, None),
    "kept, one at a time": ((3, 4, 14), 7, 5),
    "in parts": ((1, 64, 64, 24), 3, 20),
    "in parts, one at a time": ((1, 50, 100, 10), 5, 3),
}


def packed(seed: int, *shape: int) -> np.ndarray:
    return pack(normal(seed, *shape))


def exact(a: Any) -> Any:
    """An array in float64, bfloat16 by its value."""
    if not isinstance(a, np.ndarray):
        return a
    return (unpack(a) if a.dtype == BF16 else a).astype(np.float64)


def assert_rounded_once(bits: np.ndarray, want: np.ndarray, noise: Any) -> None:
    """Within half a unit of the last place of a bfloat16, and of the ``noise`` of float32 before."""
    assert bits.dtype == BF16 and bits.shape == want.shape
    value = exact(bits)
    largest = np.maximum(np.maximum(np.abs(value), np.abs(want)), 2.0**-126)
    over = np.abs(value - want) - np.exp2(np.floor(np.log2(largest)) - 8) - noise
    assert (over <= 0).all(), over.max()


def sums_and_copies(shape: tuple[int, ...], place: Place) -> None:
    """Also where the result goes over an argument."""
    batch, places, channels = shape
    a, b = place(packed(0, *shape)), place(packed(1, *shape))
    total = pack(unpack(a) + unpack(b))
    assert np.array_equal(elementwise.add(a, b, place(np.empty_like(a))), total)
    into = place(b)
    assert elementwise.add(a, into, into) is into and np.array_equal(into, total)
    elementwise.fill(into, 1 + 2.0**-8 + 2.0**-12)
    assert (unpack(into) == 1 + 2.0**-7).all()
    for at, more in ((4, 8), (2, 6), (3, 9)):
        wide = place(packed(2, batch, places, channels + more))
        assert np.array_equal(elementwise.concat(a, wide), np.concatenate([a, wide], axis=-1))
        assert np.array_equal(elementwise.channels(wide, at, channels), wide[..., at : at + channels])
    sums, numbers = elementwise.sum_places(a), exact(a)
    assert sums.dtype == np.float32
    np.testing.assert_allclose(sums, numbers.sum(axis=1), rtol=0, atol=3e-7 * np.abs(numbers).sum(axis=1).max(initial=0))


def doubled_images(batch: int, height: int, width: int, channels: int, place: Place) -> None:
    x = place(packed(3, batch, height, width, channels))
    assert np.array_equal(elementwise.upsample(x), x.repeat(2, axis=1).repeat(2, axis=2))
    dy = place(packed(4, batch, 2 * height, 2 * width, channels))
    want = exact(dy).reshape(batch, height, 2, width, 2, channels).sum(axis=(2, 4))
    assert_rounded_once(elementwise.upsample_backward(dy), want, 1e-6)


def casts_and_weighted_sums(size: int, place: Place) -> None:
    """Ties, both zeros, infinities and the largest numbers; a NaN stays one."""
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20]
    x = place(np.resize(np.concatenate([np.array(odd, np.float32), normal(5, 41)]), size))
    bits, number = elementwise.cast(x, place(np.zeros(size, BF16))), ~np.isnan(x)
    assert np.array_equal(bits[number], pack(x)[number]) and np.isnan(unpack(bits[~number])).all()
    assert np.array_equal(elementwise.cast(bits, place(x)), unpack(bits), equal_nan=True)
    x, y = place(normal(6, size)), place(normal(7, size))
    want = np.float32(3.1) * x + np.float32(-2.1) * y
    assert np.array_equal(elementwise.weighted_sum(3.1, x, -2.1, y, place(np.empty_like(x))), want)
    assert elementwise.weighted_sum(3.1, x, -2.1, y, y) is y and np.array_equal(y, want)


def norm(
    shape: tuple[int, ...], groups: int, head: int | None, place: Place, modulated: bool = True, silu: bool = True, seed: int = 8
) -> None:
    """Forward and backward, x being cut in two after ``head`` channels if given."""
    rng = np.random.default_rng(seed)
    batch, channels = shape[0], shape[-1]
    made = {
        "gamma": 1 + rng.standard_normal(channels) / 4,
        "beta": rng.standard_normal(channels),
        "scale": rng.standard_normal((batch, channels)) / 4 if modulated else None,
        "shift": rng.standard_normal((batch, channels)) if modulated else None,
    }
    given: dict[str, Any] = {k: v if v is None else place(v.astype(np.float32)) for k, v in made.items()}
    given |= {"groups": groups, "silu": silu}
    x, dy = (pack((2 * rng.standard_normal(shape) + 0.5).astype(np.float32)) for _ in range(2))
    numbers = {k: exact(v) for k, v in given.items()}
    want = reference.group_norm_silu(exact(x), **numbers)
    wants = reference.group_norm_silu_backward(exact(dy), exact(x), **numbers, mean=want[1], rstd=want[2])
    own, tails, outs = place(x), {}, {}
    if head is not None:
        own, tails["tail"] = (place(np.ascontiguousarray(a)) for a in np.split(x, [head], axis=-1))
        outs["tail_out"] = place(np.zeros_like(tails["tail"]))
    y, mean, rstd = gpu.group_norm_silu(own, **given, **tails)
    dx, *sums = gpu.group_norm_silu_backward(place(dy), own, **given, **tails, **outs, mean=mean, rstd=rstd)
    if head is not None:
        dx = np.concatenate([dx, outs["tail_out"]], axis=-1)
    for bits, right in ((y, want[0]), (dx, wants[0])):
        assert_rounded_once(bits, right, 1e-5 * np.abs(right) + 4e-6 * np.abs(right).max())
    for a, b in zip((mean, rstd, *sums), (*want[1:], *wants[1:]), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == np.float32 and a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=4e-6 * np.abs(b).max())


def all_cases() -> Iterator[tuple[str, Callable[[Place], None]]]:
    for name, shape in SHAPES.items():
        yield f"bf16: sums and copies, {name}", lambda place, s=shape: sums_and_copies(s, place)  # type: ignore[misc]
    for sizes in ((1, 1, 1, 1), (2, 3, 5, 8), (1, 4, 3, 6), (1, 2, 2, 5), (0, 4, 4, 4)):
        yield f"bf16: doubled images {sizes}", lambda place, s=sizes: doubled_images(*s, place)  # type: ignore[misc]
    for size in (0, 1, 1000, 1003):
        yield f"bf16: casts and weighted sums {size}", lambda place, n=size: casts_and_weighted_sums(n, place)  # type: ignore[misc]
    for name, (shape, groups, head) in NORMS.items():
        yield f"bf16: norm, {name}", lambda place, p=(shape, groups, head): norm(*p, place)  # type: ignore[misc]


def at_sizes_of_networks(place: Place) -> None:
    """Calls as in a network of 128 channels, of zeros."""
    x, y = (place(np.zeros(s, BF16)) for s in ((32, 32, 32, 128), (32, 32, 32, 256)))
    numbers = place(np.zeros(x.shape, np.float32))
    elementwise.add(x, x, x)
    elementwise.fill(x, 0)
    elementwise.concat(x, x)
    elementwise.channels(y, 0, 128)
    elementwise.sum_places(x)
    elementwise.upsample_backward(x)
    elementwise.upsample(x)
    elementwise.cast(numbers, x)
    elementwise.cast(x, numbers)
    elementwise.weighted_sum(1, numbers, 1, numbers, numbers)
    for side, channels in ((32, 128), (16, 256), (8, 256), (4, 256), (256, 64)):
        batch = 1 if side > 32 else 128
        image = place(np.zeros((batch, side, side, channels), BF16))
        gamma, statistics = np.zeros(channels, np.float32), np.zeros((batch, 32), np.float32)
        gpu.group_norm_silu(image, gamma, gamma, 32)
        gpu.group_norm_silu_backward(image, image, gamma, gamma, 32, statistics, statistics)
