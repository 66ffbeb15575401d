"""Launchers of the convolution's weight gradient on the tensor cores."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from ..bf16 import BF16
from ..buffers import empty
from ..reference import conv_output_size, conv_padding
from .launch import THREADS, aligned, blocks, current, i32

Array = Any

WARPS, STAGES, COLUMNS, GAP = 8, 3, 4, 8  # as in the kernel file
MULTIPROCESSORS = 132  # for which the slices are counted; fixed, so that the order of the sum is
MOST_SHARED = 98 << 10  # bytes that every GPU since Ampere gives a block: the same tiles, and bits, on all of them
DEPTHS = (64, 48, 32, 16)  # places of a tile
# What the plans weigh: by count, none was measured.
STAGED = 24  # bytes that a multiprocessor fetches in a cycle,
PRODUCTS = 1300  # products of bfloat16 that it adds up, and
ACTIVATED = 8  # elements of which it makes the SiLU
BARRIER = 150  # cycles of a tile that are none of these


class Cut(NamedTuple):
    """A tile of ``images`` × ``tall`` × ``broad`` places, and how a block holds it; see the kernel file."""

    images: int
    tall: int
    broad: int
    depth: int
    line: int
    picture: int
    across: int
    shared: int  # bytes
    inputs: int  # places of x
    conflict: int  # passes through the banks for each that is needed


@dataclass(frozen=True)
class Plan:
    """``share`` tiles of places to each of ``slices`` slices, for each of ``inputs`` × ``outputs`` blocks of channels."""

    cut: Cut
    share: int
    slices: int
    inputs: int
    outputs: int


def _beyond(least: int, wanted: int, factor: int = 1) -> int:
    """The smallest n ≥ ``least`` with factor·n ≡ wanted modulo 8, so that rows of places one after another are in other banks."""
    return next((n for n in range(least, least + 8) if (factor * n - wanted) % 8 == 0), least)


def _tiles(batch: int, rows: int, cols: int) -> Iterator[tuple[int, int, int]]:
    """(images, tall, broad) of tiles worth a thought: as many lines as fit, and images where a tile holds them whole."""
    for depth in DEPTHS:
        for broad in range(1, min(cols, depth) + 1):
            most = min(rows, depth // broad)
            tall = -(-rows // -(-rows // most))  # lines shared out evenly
            images = min(batch, depth // (tall * broad)) if (tall, broad) == (rows, cols) else 1
            yield -(-batch // -(-batch // images)), tall, broad


def _cuts(batch: int, rows: int, cols: int, kernel: int, stride: int, itemsize: int) -> Iterator[Cut]:
    """Those that fit a block."""
    step = stride if kernel == 3 else 1
    for (images, tall, broad), across in product(_tiles(batch, rows, cols), (4, 2, 1)):
        high, wide = (tall - 1) * step + kernel, (broad - 1) * step + kernel
        depth, inputs = -(-images * tall * broad // 16) * 16, images * high * wide
        apart = _beyond(wide, broad, step) if broad % 8 and tall > 1 else wide
        for line in dict.fromkeys((apart, wide)):  # wide: where there is no room for rows without a use
            picture = _beyond(high * line, tall * broad) if images > 1 and line == apart else high * line
            stage = images * picture * (_channels_in(kernel, across) + GAP) + depth * (_channels_out(across) + GAP)
            shared = -(-(2 * depth + inputs) // 4) * 16 + STAGES * stage * itemsize
            conflict = 1 if broad % 8 == 0 or tall == 1 or (step * line - broad) % 8 == 0 else 2
            if shared <= MOST_SHARED:
                yield Cut(images, tall, broad, depth, line, picture, across, shared, inputs, conflict)
                break


def _channels_in(kernel: int, across: int) -> int:
    return WARPS // across * (16 if kernel == 3 else 64)


def _channels_out(across: int) -> int:
    return across * COLUMNS * 8


@cache
def plan(
    batch: int, rows: int, cols: int, cin: int, cout: int, kernel: int, stride: int, itemsize: int, normed: bool = False
) -> Plan:
    """How the product is cut: the least time by a rough count of what is fetched and multiplied, the first of several alike."""
    best: tuple[float, Plan] | None = None
    lines = 9 if kernel == 3 else 4
    for cut in _cuts(batch, rows, cols, kernel, stride, itemsize):
        most_in, most_out = _channels_in(kernel, cut.across), _channels_out(cut.across)
        inputs, outputs = -(-cin // most_in), -(-cout // most_out)
        fetch = (cut.inputs * min(cin, most_in) + cut.depth * min(cout, most_out)) * itemsize / STAGED
        multiply = cut.conflict * cut.depth * lines * 16 * COLUMNS * 8 * WARPS * itemsize / (2 * PRODUCTS)
        activate = normed * cut.inputs * min(cin, most_in) / ACTIVATED
        tile = max(fetch, multiply) + fetch / 8 + activate + BARRIER
        write = 4 * kernel * kernel * min(cin, most_in) * min(cout, most_out) / STAGED
        count = -(-batch // cut.images) * -(-rows // cut.tall) * -(-cols // cut.broad)
        for slices in range(1, min(count, max(1, 4 * MULTIPROCESSORS // (inputs * outputs))) + 1):
            share = -(-count // slices)
            time = -(-slices * inputs * outputs // MULTIPROCESSORS) * (share * tile + write)
            if best is None or time < best[0]:
                best = time, Plan(cut, share, -(-count // share), inputs, outputs)
    assert best is not None  # 16 places fit with any channels
    return best[1]


def backward_weight(
    x: Array,
    dy: Array,
    kernel: int,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    norm: tuple[Array, Array, bool] | None = None,
    into: tuple[Array, Array] | None = None,
    tail: Array | None = None,
) -> tuple[Array, Array]:
    """(dw (kernel, kernel, Cin, Cout), dbias (Cout,)), float32, of x (B, H, W, Cin) and dy (B, rows, cols, Cout).

    Both bfloat16, or both float32, whose products are then of TF32. ``norm`` (a, b, silu): x' = a x + b, with a and b (B, Cin)
    float32, through SiLU where ``silu`` says so, stands for x, rounded to what the products take. ``into`` (dw, dbias): add to
    these. ``tail``: more channels, which follow those of x.
    """
    device = current()
    batch, height, width, head = x.shape
    cin = head if tail is None else head + tail.shape[3]
    cout = dy.shape[3]
    rows, cols = (conv_output_size(n, kernel, stride, upsample, pad) for n in (height, width))
    factor, before = 2 if upsample else 1, conv_padding(kernel, pad)[0]
    i32(batch * max(height * width, rows * cols))
    if into is not None:
        dw, dbias = into
    else:
        dw = empty((kernel, kernel, cin, cout), np.float32, device.xp) if out is None else out
        dbias = empty((cout,), np.float32, device.xp)
    if dy.size == 0 or x.size == 0:
        if into is None:
            dw[...] = 0
            dbias[...] = 0
        return dw, dbias
    p = plan(batch, rows, cols, cin, cout, kernel, stride, x.dtype.itemsize, norm is not None)
    weights = kernel * kernel * cin * cout
    direct = p.slices == 1 and into is None
    slices = dw if direct else empty((p.slices, weights), np.float32, device.xp)
    columns = empty((p.slices * p.inputs, cout), np.float32, device.xp)
    a, b, silu = (None, None, False) if norm is None else norm
    chunk = 16 // x.dtype.itemsize
    flags = (
        silu,
        cin % chunk == head % chunk == 0 and aligned(x, tail, a, b),
        cout % chunk == 0 and aligned(dy),
        cout % 2 == 0 and aligned(slices, bytes_=8),
    )
    sizes = (batch, height, width, cin, head, rows, cols, cout, stride, before, factor)
    tiles = (*p.cut[:7], p.share)
    name = f"conv_mma_weight_{'bf16' if x.dtype == BF16 else 'tf32'}_{kernel}"
    args = (x, tail, dy, a, b, slices, columns, *map(i32, (*sizes, *tiles)), *map(np.int32, flags))
    device.launch("conv_mma_weight", name, (p.inputs, p.outputs, p.slices), (THREADS,), args, p.cut.shared)
    name = f"conv_mma_weight_sum_{'wide' if weights % 4 == 0 and aligned(slices, dw) else 'any'}"
    left = np.int64(0 if direct else weights)
    sums = (slices, columns, dw, dbias, i32(p.slices), i32(p.slices * p.inputs), left, i32(cout), np.int32(into is not None))
    device.launch("conv_mma_weight", name, blocks(max(int(left) // 4, 32 * cout)), (THREADS,), sums)
    return dw, dbias
