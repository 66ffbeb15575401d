"""The convolution's weight gradient on the tensor cores: calls that reach all of its kernels, whose sums float32 holds exactly.

All numbers are small integers or their halves: bfloat16 and TF32 hold the operands, also where x is normalised, and float32 every
sum. A result is right to the last bit or its kernel is wrong.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import numpy as np

from alphabar.kernels import reference
from alphabar.kernels.bf16 import BF16, pack, unpack
from alphabar.kernels.gpu import conv_mma_weight
from tests.cuda_arrays import Place

Array = np.ndarray
KINDS = ("bf16", "tf32")


class Conv(NamedTuple):
    """x (B, H, W, Cin), and how it is convolved to ``cout`` channels; ``tail`` of Cin lie in a second array."""

    x: tuple[int, int, int, int]
    cout: int
    kernel: int = 3
    stride: int = 1
    upsample: bool = False
    pad: tuple[int, int] | None = None
    tail: int = 0

    @property
    def rule(self) -> tuple[int, int, bool, tuple[int, int] | None]:
        return self.kernel, self.stride, self.upsample, self.pad

    @property
    def dy(self) -> tuple[int, int, int, int]:
        rows, cols = (reference.conv_output_size(n, *self.rule) for n in self.x[1:3])
        return self.x[0], rows, cols, self.cout


CONVS = {
    "whole tiles": Conv((2, 8, 8, 32), 32),
    "parts of channels and of tiles": Conv((1, 6, 5, 40), 136),
    "images in a tile": Conv((3, 4, 4, 16), 8),
    "odd": Conv((2, 7, 9, 3), 5),
    "three channels in": Conv((1, 5, 6, 3), 40),
    "three channels out": Conv((1, 9, 4, 24), 3),
    "halved": Conv((2, 8, 8, 16), 24, 3, 2),
    "halved, padded after": Conv((1, 7, 10, 8), 8, 3, 2, pad=(0, 1)),
    "doubled": Conv((2, 3, 4, 8), 16, 3, upsample=True),
    "doubled and halved": Conv((1, 3, 5, 8), 4, 3, 2, True),
    "no padding": Conv((2, 6, 6, 8), 8, 3, pad=(0, 0)),
    "points": Conv((2, 6, 7, 80), 48, 1),
    "odd points": Conv((2, 5, 5, 6), 7, 1),
    "points halved": Conv((1, 9, 6, 8), 16, 1, 2, pad=(0, 1)),
    "points doubled": Conv((1, 4, 4, 8), 8, 1, upsample=True, pad=(1, 0)),
    "images of a place": Conv((40, 1, 1, 8), 8),
    "one": Conv((1, 1, 1, 1), 1, 1),
    "two arrays": Conv((2, 5, 4, 48), 16, tail=32),
    "two arrays of odd channels": Conv((1, 5, 4, 11), 8, 3, 2, tail=4),
    "two arrays of points": Conv((1, 6, 6, 24), 8, 1, tail=8),
    "empty": Conv((0, 4, 4, 8), 16),
}
LONG = {  # for a block that goes through all of their tiles
    "many tiles": Conv((2, 20, 18, 32), 32),
    "many tiles halved": Conv((5, 12, 16, 36), 40, 3, 2),
    "many tiles of points": Conv((3, 14, 14, 48), 96, 1),
    "many tiles of many channels": Conv((9, 9, 9, 130), 24),
}


@contextmanager
def one_multiprocessor() -> Iterator[None]:
    """Inside, there is one slice: a block goes through all tiles."""
    conv_mma_weight.plan.cache_clear()
    with mock.patch.object(conv_mma_weight, "MULTIPROCESSORS", 1):
        yield
    conv_mma_weight.plan.cache_clear()


def gradient(conv: Conv, x: Array, dy: Array) -> tuple[Array, Array]:
    """By the definition, in float64."""
    return reference.conv2d_backward_weight(x.astype(np.float64), dy.astype(np.float64), *conv.rule)


def parts(conv: Conv, x: Array) -> tuple[Array, Array | None]:
    """x as one array, or two."""
    if not conv.tail:
        return x, None
    first, tail = np.split(x, [conv.x[3] - conv.tail], axis=3)
    return np.ascontiguousarray(first), np.ascontiguousarray(tail)


def case(conv: Conv, kind: str, place: Place, seed: int = 0) -> None:
    """As it is; normalised, into given arrays; and added to what is there."""
    rng = np.random.default_rng(seed)
    x, dy = rng.integers(-8, 9, conv.x).astype(np.float32), rng.integers(-4, 5, conv.dy).astype(np.float32)
    a = rng.choice(np.float32([0.5, 1, -2]), (conv.x[0], conv.x[3]))
    b = rng.integers(-7, 8, a.shape).astype(np.float32)

    def put(value: Array | None) -> Array | None:
        return None if value is None else place(pack(value) if kind == "bf16" else value)

    (first, tail), grad = map(put, parts(conv, x)), put(dy)
    plain, normed = gradient(conv, x, dy), gradient(conv, a[:, None, None] * x + b[:, None, None], dy)
    made = conv_mma_weight.backward_weight(first, grad, *conv.rule, tail=tail)
    assert all(np.array_equal(p, q) and p.dtype == np.float32 for p, q in zip(made, plain, strict=True))

    out, norm = place(np.full_like(made[0], np.nan)), (place(a), place(b), False)
    dw, dbias = conv_mma_weight.backward_weight(first, grad, *conv.rule, out, norm, tail=tail)
    assert dw is out and np.array_equal(dw, normed[0]) and np.array_equal(dbias, normed[1])

    into = place(np.full_like(dw, 3)), place(np.full_like(dbias, -1))
    dw, dbias = conv_mma_weight.backward_weight(first, grad, *conv.rule, norm=norm, into=into, tail=tail)
    assert dw is into[0] and dbias is into[1]
    assert np.array_equal(dw, normed[0] + 3) and np.array_equal(dbias, normed[1] - 1)


def normals(conv: Conv, seed: int = 0) -> tuple[Array, Array]:
    """x and dy that bfloat16 and TF32 hold."""
    rng = np.random.default_rng(seed)
    x, dy = (unpack(pack(rng.standard_normal(shape).astype(np.float32))) for shape in (conv.x, conv.dy))
    return x, dy


def stored(a: Array, kind: str) -> Array:
    return pack(a) if kind == "bf16" else a


def within(got: tuple[Array, Array], want: tuple[Array, Array], *bounds: Array) -> None:
    for a, b, most in zip(got, want, bounds, strict=True):
        assert a.dtype == np.float32 and a.shape == b.shape
        assert (np.abs(a - b) <= most + 1e-30).all()


def activated(conv: Conv, kind: str, place: Place) -> None:
    """Each x' = silu(a x + b) is rounded once to what the products take: that is all that is lost."""
    rng = np.random.default_rng(3)
    x, dy = normals(conv, 2)
    a, b = (rng.standard_normal((conv.x[0], conv.x[3])).astype(np.float32) for _ in range(2))
    v = x.astype(np.float64) * a[:, None, None] + b[:, None, None]
    v /= 1 + np.exp(-v)
    norm = place(a), place(b), True
    found = conv_mma_weight.backward_weight(place(stored(x, kind)), place(stored(dy, kind)), *conv.rule, norm=norm)
    sizes = gradient(conv, np.abs(v) + 1e-4, np.abs(dy))
    unit = 2.0**-8 if kind == "bf16" else 2.0**-11
    within(found, gradient(conv, v, dy), 1.02 * unit * sizes[0], 2e-6 * sizes[1])


def long(conv: Conv, kind: str, place: Place) -> None:
    with one_multiprocessor():
        case(conv, kind, place)


def all_cases() -> Iterator[tuple[str, Callable[[Place], None]]]:
    for kind in KINDS:
        for name, conv in CONVS.items():
            yield f"weight gradient in {kind}, {name}", lambda place, c=conv, k=kind: case(c, k, place)  # type: ignore[misc]
        for name in ("parts of channels and of tiles", "odd points"):
            yield f"activated {kind}, {name}", lambda place, c=CONVS[name], k=kind: activated(c, k, place)  # type: ignore[misc]
        for name in ("many tiles", "many tiles of points"):
            yield f"weight gradient in {kind}, {name}", lambda place, c=LONG[name], k=kind: long(c, k, place)  # type: ignore[misc]


def at_sizes_of_networks(place: Place) -> None:
    """Calls of the size of training steps, for a device that only writes down what is launched."""
    for dtype in (np.dtype(np.float32), BF16):
        for size, cin, cout in ((32, 128, 128), (16, 256, 256), (32, 3, 128)):
            x = place(np.zeros((128, size, size, cin), dtype))
            for kernel, stride in ((3, 1), (3, 2), (1, 1)):
                dy = place(np.zeros((128, size // stride, size // stride, cout), dtype))
                conv_mma_weight.backward_weight(x, dy, kernel, stride)
