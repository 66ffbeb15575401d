"""What is left of a group norm where the convolution behind it makes it: calls that reach its kernel in all its ways."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from alphabar.kernels import reference
from alphabar.kernels.bf16 import BF16, pack, unpack
from alphabar.kernels.gpu import norm_affine
from tests.cuda_arrays import Place

Array = np.ndarray
Norm = tuple[tuple[int, ...], int, int | None]
# shape of x, groups, channels of x before its tail; the third, the fifth and the last take their places in parts
NORMS: list[Norm] = [
    ((2, 5, 3, 24), 3, None),
    ((3, 9, 16), 8, 4),
    ((1, 48, 48, 24), 3, 20),
    ((2, 4, 14), 7, 5),
    ((2, 50, 60, 10), 5, None),
    ((1, 7, 96), 2, 40),
    ((1, 4000, 40), 1, None),
]


def arrays(norm: Norm, low: bool, seed: int = 0) -> tuple[Array, dict[str, Any]]:
    """x that bfloat16 holds exactly, whole as float64, and as the kernel takes it."""
    shape, _, head = norm
    x = pack((2 * np.random.default_rng(seed).standard_normal(shape) + 0.5).astype(np.float32))
    exact = unpack(x)
    cut = np.split(x if low else exact, [shape[-1] if head is None else head], axis=-1)
    first, tail = (np.ascontiguousarray(a) for a in cut)
    return exact.astype(np.float64), {"x": first, "tail": None if head is None else tail}


def parameters(batch: int, channels: int, modulated: bool, seed: int = 1) -> list[Array | None]:
    """gamma, beta, scale, shift"""
    rng = np.random.default_rng(seed)
    gamma, beta, scale, shift = (
        rng.standard_normal(s).astype(np.float32) for s in (channels, channels, (batch, channels), (batch, channels))
    )
    return [1 + gamma / 4, beta, *((scale / 4, shift) if modulated else (None, None))]


def case(norm: Norm, low: bool, modulated: bool, place: Place) -> None:
    """All three functions, with the definition in float64."""
    shape, groups, _ = norm
    exact, given = arrays(norm, low)
    x, tail = (a if a is None else place(a) for a in given.values())
    gamma, beta, scale, shift = (a if a is None else place(a) for a in parameters(shape[0], shape[-1], modulated))
    double = [a if a is None else a.astype(np.float64) for a in (gamma, beta, scale, shift)]
    y, *wanted = reference.group_norm_silu(exact, double[0], double[1], groups, 1e-5, double[2], double[3], silu=False)  # type: ignore[arg-type]
    mean, rstd = norm_affine.group_stats(x, groups, 1e-5, tail)
    for got, want in zip((mean, rstd), wanted, strict=True):
        assert got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    a, b = norm_affine.norm_affine(mean, rstd, gamma, beta, scale, shift)
    assert a.dtype == b.dtype == np.float32
    over = (slice(None), *(None,) * (len(shape) - 2))
    np.testing.assert_allclose(exact * a[over] + b[over], y, rtol=0, atol=4e-6 * np.abs(y).max())
    at_once = norm_affine.group_affine(x, gamma, beta, groups, 1e-5, scale, shift, tail)
    assert all(np.array_equal(p, q) for p, q in zip(at_once, (a, b, mean, rstd), strict=True))


def all_cases() -> Iterator[tuple[str, Callable[[Place], None]]]:
    for norm in NORMS:
        for low in (True, False):
            yield f"statistics of a norm {norm} {low}", lambda place, n=norm, k=low: case(n, k, k, place)  # type: ignore[misc]


def at_sizes_of_networks(place: Place) -> None:
    """Calls of the size of training steps, for a device that only writes down what is launched."""
    for dtype in (np.dtype(np.float32), BF16):
        for size, channels in ((32, 128), (16, 256), (8, 512)):
            one = place(np.ones(channels, np.float32))
            norm_affine.group_affine(place(np.zeros((128, size, size, channels), dtype)), one, one, 32)
