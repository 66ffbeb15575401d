"""Convolution on the tensor cores: calls that reach all of its kernels, whose sums float32 holds exactly.

All numbers are quarters of small integers, so bfloat16 and TF32 hold the operands, and float32 every sum: a result is right to
the last bit or its kernel is wrong. Where x is normalised, a is a power of two and b such a quarter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from alphabar.kernels import reference
from alphabar.kernels.bf16 import BF16, pack, unpack
from alphabar.kernels.gpu import conv_mma
from alphabar.kernels.gpu.launch import aligned
from tests.cuda_arrays import Place

Array = np.ndarray
KINDS = ("bf16", "tf32")


class Conv(NamedTuple):
    """x (B, H, W, Cin) to ``cout`` channels; ``tail`` of Cin lie in a second array."""

    x: tuple[int, int, int, int]
    cout: int
    kernel: int = 3
    stride: int = 1
    upsample: bool = False
    pad: tuple[int, int] | None = None
    tail: int = 0
    block: conv_mma.Block = conv_mma.SMALL

    @property
    def rule(self) -> dict[str, Any]:
        return {"stride": self.stride, "upsample": self.upsample, "pad": self.pad}


CONVS = {
    "one": Conv((1, 1, 1, 1), 1, 1),
    "one line": Conv((1, 1, 1, 8), 8),
    "run": Conv((2, 8, 8, 64), 40),
    "run in part": Conv((1, 5, 7, 40), 24),
    "run over images": Conv((5, 3, 5, 16), 72),
    "run of large blocks": Conv((1, 10, 12, 40), 72, block=conv_mma.LARGE),
    "run of few columns": Conv((1, 6, 5, 16), 3),
    "points": Conv((2, 6, 5, 48), 8, 1),
    "points of large blocks": Conv((1, 10, 12, 72), 136, 1, block=conv_mma.LARGE),
    "halved": Conv((1, 9, 7, 24), 16, 3, 2),
    "halved, padded after": Conv((2, 6, 8, 16), 16, 3, 2, pad=(0, 1)),
    "points halved": Conv((1, 7, 6, 8), 8, 1, 2),
    "a column halved": Conv((2, 5, 1, 8), 8, 3, 2),
    "halved in large blocks": Conv((1, 15, 17, 24), 24, 3, 2, block=conv_mma.LARGE),
    "doubled": Conv((1, 4, 5, 16), 16, upsample=True),
    "doubled and halved": Conv((1, 5, 4, 8), 8, 3, 2, True),
    "no padding": Conv((1, 6, 5, 16), 8, pad=(0, 0)),
    "wide padding": Conv((1, 2, 3, 16), 8, pad=(2, 3)),
    "three channels in": Conv((2, 5, 6, 3), 16),
    "three channels out": Conv((1, 5, 6, 8), 3),
    "odd": Conv((1, 7, 6, 5), 7, 3, 2),
    "odd doubled": Conv((1, 3, 4, 5), 7, upsample=True),
    "odd points": Conv((3, 4, 5, 33), 9, 1),
    "two arrays": Conv((2, 5, 4, 96), 16, tail=32),
    "two arrays halved": Conv((2, 5, 4, 96), 16, 3, 2, tail=64),
    "two arrays that share a slab": Conv((1, 5, 4, 16), 8, tail=8),
    "run of split blocks": Conv((1, 7, 9, 168), 40, block=conv_mma.SPLIT),
    "split run of few slabs": Conv((2, 3, 4, 40), 24, block=conv_mma.SPLIT),
    "split run of two arrays": Conv((1, 5, 4, 96), 16, tail=32, block=conv_mma.SPLIT),
    "split points": Conv((2, 6, 7, 136), 40, 1, block=conv_mma.SPLIT),
    "split and halved": Conv((1, 5, 6, 168), 24, 3, 2, block=conv_mma.SPLIT),
    "empty": Conv((0, 4, 4, 8), 8),
}
NOT_ALIGNED = ("one", "run in part", "halved", "doubled", "two arrays")


def quarters(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-8, 9, shape).astype(np.float32) / 4


def stored(a: Array, kind: str) -> Array:
    return pack(a) if kind == "bf16" else a


def numbers(a: Array) -> Array:
    return (unpack(a) if a.dtype == BF16 else a).astype(np.float64)


@contextmanager
def blocks(kind: conv_mma.Block) -> Iterator[None]:
    """Inside, blocks of this kind are taken."""
    with mock.patch.object(conv_mma, "block_of", lambda *_: kind):
        yield


def padded_sum(conv: Conv, x: Array, w: Array) -> Array:
    """The sums of products in float64."""
    return reference.conv2d(x.astype(np.float64), w.astype(np.float64), **conv.rule)


def parts(conv: Conv, x: Array) -> tuple[Array, Array | None]:
    """x as one array, or two."""
    if not conv.tail:
        return x, None
    first, tail = np.split(x, [conv.x[3] - conv.tail], axis=3)
    return np.ascontiguousarray(first), np.ascontiguousarray(tail)


def forward(conv: Conv, kind: str, place: Place, seed: int = 0) -> None:
    """With bias, shift, residual and norm, and without; results in float32, and over the residual."""
    rng = np.random.default_rng(seed)
    batch, *_, cin = conv.x
    x, w = quarters(rng, *conv.x), quarters(rng, conv.kernel, conv.kernel, cin, conv.cout)
    bias, shift = quarters(rng, conv.cout), quarters(rng, batch, conv.cout)
    a, b = 2.0 ** rng.integers(-1, 2, (batch, cin)).astype(np.float32), quarters(rng, batch, cin)
    plain = padded_sum(conv, x, w)
    normed = padded_sum(conv, a[:, None, None] * x + b[:, None, None], w)
    residual = quarters(rng, *plain.shape)

    def put(value: Array | None) -> Array | None:
        return None if value is None else place(stored(value, kind))

    first, tail = map(put, parts(conv, x))
    given: dict[str, Any] = conv.rule | {"tail": tail}
    weights, norm = put(w), (place(a), place(b), False)
    with blocks(conv.block):
        out = place(np.full(plain.shape, np.nan, np.float32))
        more: dict[str, Any] = {"shift": place(shift), "residual": put(residual), "norm": norm}
        assert conv_mma.forward(first, weights, place(bias), out=out, **more, **given) is out
        assert np.array_equal(out, normed + bias + shift[:, None, None] + residual)
        over = put(residual)
        assert conv_mma.forward(first, weights, None, out=over, residual=over, **given) is over
        assert np.array_equal(over, stored((plain + residual).astype(np.float32), kind))


def backward_input(conv: Conv, kind: str, place: Place, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    w = quarters(rng, conv.kernel, conv.kernel, conv.x[3], conv.cout)
    rows, cols = (reference.conv_output_size(n, conv.kernel, **conv.rule) for n in conv.x[1:3])
    dy = quarters(rng, conv.x[0], rows, cols, conv.cout)
    want = reference.conv2d_backward_input(dy.astype(np.float64), w.astype(np.float64), conv.x, **conv.rule)
    with blocks(conv.block):
        dx = conv_mma.backward_input(place(stored(dy, kind)), place(stored(w, kind)), conv.x, **conv.rule)
    assert np.array_equal(dx, stored(want.astype(np.float32), kind))


def normalised(kind: str) -> None:
    """x' = silu(a x + b), rounded like x: the sums of what float64 makes of it, but on an edge of the rounding."""
    rng = np.random.default_rng(1)
    for conv in (CONVS["run over images"], CONVS["doubled"], CONVS["three channels in"]):
        x, w = (rng.standard_normal(s).astype(np.float32) for s in (conv.x, (3, 3, conv.x[3], conv.cout)))
        a, b = (rng.standard_normal((conv.x[0], conv.x[3])).astype(np.float32) for _ in range(2))
        given, weights = (numbers(stored(v, kind)) for v in (x, w))
        v = a[:, None, None] * given + b[:, None, None]
        v = (v / (1 + np.exp(-v))).astype(np.float32)
        want = padded_sum(conv, *(rounded(v, kind), rounded(weights.astype(np.float32), kind)))
        out = np.full(want.shape, np.nan, np.float32)
        conv_mma.forward(stored(x, kind), stored(w, kind), out=out, norm=(a, b, True), **conv.rule)
        step = 2.0**-7 if kind == "bf16" else 2.0**-10
        assert np.abs(out - want).max() <= step * np.abs(v).max() * np.abs(w).max()


def rounded(a: Array, kind: str) -> Array:
    """What the products see of float32: bfloat16 to nearest even, or TF32 (10 bits of significand, ties away from zero)."""
    if kind == "bf16":
        return unpack(pack(a))
    return ((np.ascontiguousarray(a).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def all_cases() -> Iterator[tuple[str, Callable[[Place], None]]]:
    """All calls; of arrays that are not aligned, which one kernel takes, a few."""

    def case(call: Callable[[Conv, str, Place], None], name: str, kind: str) -> Callable[[Place], None]:
        def run(place: Place) -> None:
            if name in NOT_ALIGNED or aligned(place(np.zeros(4, np.float32))):
                call(CONVS[name], kind, place)

        return run

    for kind in KINDS:
        for name, conv in CONVS.items():
            yield f"convolution in {kind}, {name}", case(forward, name, kind)
            if not conv.tail:
                yield f"its gradient in {kind}, {name}", case(backward_input, name, kind)
        yield f"convolution of a norm in {kind}", lambda _, k=kind: normalised(k)  # type: ignore[misc]


def at_sizes_of_networks(place: Place) -> None:
    """Calls of the size of training steps and of sampling, for a device that only writes down what is launched."""
    for dtype in (np.dtype(np.float32), BF16):
        for batch, size, cin, cout in ((128, 32, 128, 128), (128, 16, 256, 256), (1, 32, 128, 128)):
            x, w = place(np.zeros((batch, size, size, cin), dtype)), place(np.zeros((3, 3, cin, cout), dtype))
            point = place(np.zeros((1, 1, cin, cout), dtype))
            for weights, stride in ((w, 1), (w, 2), (point, 1)):
                y = conv_mma.forward(x, weights, stride=stride)
                conv_mma.backward_input(place(np.zeros(y.shape, dtype)), weights, x.shape, stride)
