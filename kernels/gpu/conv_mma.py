"""Launchers of the convolution on the tensor cores: float32 arrays with their products in TF32, or arrays of bfloat16.

How a call is run follows from its sizes and addresses alone, see :func:`plan`.
"""

from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..bf16 import BF16
from ..buffers import empty
from ..reference import conv_output_size, conv_padding
from .launch import aligned, current, i32

Array = Any
Norm = tuple[Array, Array, bool]  # (a, b, silu): x' = a x + b with a, b (B, Cin) float32, or its silu

MULTIPROCESSORS = 132  # of an H100
SLAB = 64  # bytes of channels of a line that a step of the sum takes
ZEROS = 128  # bytes that stand for what lies beyond an image's edge
KEPT = 128  # bytes of a block's own
MOST_SHARED = 98 << 10  # so two blocks stay resident on an H100, and one on every GPU since sm_80


class Block(NamedTuple):
    """A kind of block: the lines and columns that it makes, threads, groups of warps that share the sum, steps held at once."""

    name: str
    lines: int
    threads: int
    groups: int
    stages: int


LARGE, SMALL, SPLIT = Block("large", 128, 256, 1, 4), Block("small", 64, 128, 1, 4), Block("split", 64, 512, 4, 3)


class Plan(NamedTuple):
    """How a convolution is run: by "run", "gathered" or "any", in blocks of a kind."""

    way: str
    block: Block
    shared: int

    @property
    def name(self) -> str:
        """The end of the kernel's name."""
        return "any" if self.way == "any" else f"{self.way}_{self.block.name}"


def block_of(lines: int, columns: int, slabs: int) -> Block:
    """The blocks that make ``lines`` x ``columns`` from ``slabs`` of channels.

    Large where that gives every multiprocessor one and columns fill more than half of them, else small; or split, where even
    small ones are no more than the multiprocessors, and there are slabs for all groups.
    """
    large, small = (-(-lines // b.lines) * -(-columns // b.lines) for b in (LARGE, SMALL))
    if columns > SMALL.lines and large >= MULTIPROCESSORS:
        return LARGE
    return SPLIT if small <= MULTIPROCESSORS and slabs >= SPLIT.groups else SMALL


def plan(lines: int, columns: int, slabs: int, width: int | None, wide: bool) -> Plan:
    """How to make ``lines`` x ``columns`` from ``slabs`` of channels.

    ``wide``: the read channels can be reached 16 bytes at a time, and a slab lies in one array; else "any" fetches elements.
    ``width`` is that of the images where a 3 x 3 kernel keeps their size, else None: "run" brings the pixels under a tile once
    for all nine taps, where two slabs of them fit in shared memory. "gathered" brings them for each tap.
    """
    if not wide:
        return Plan("any", SMALL, _shared(SMALL, None))
    block = block_of(lines, columns, slabs)
    if width is not None and (shared := _shared(block, width)) <= MOST_SHARED:
        return Plan("run", block, shared)
    return Plan("gathered", block, _shared(block, None))


def _shared(block: Block, width: int | None) -> int:
    """Bytes of shared memory: weights, and lines or two runs of them."""
    tile = block.stages * block.lines * SLAB
    lines = tile if width is None else ZEROS + 2 * (block.lines + 2 * width + 2) * SLAB
    return KEPT + block.groups * (tile + lines)


def _whole(dtype: np.dtype, channels: int) -> bool:
    """Whether rows of so many channels are whole chunks of 16 bytes."""
    return channels * dtype.itemsize % 16 == 0


def _slabs(dtype: np.dtype, channels: int) -> int:
    return -(-channels * dtype.itemsize // SLAB)


def _suffix(dtype: np.dtype) -> str:
    return "bf16" if dtype == BF16 else "tf32"


def _launch(
    name: str, dtype: np.dtype, way: Plan, arrays: tuple, source: tuple, result: tuple, rule: tuple[int, ...], wide: bool
) -> None:
    """``source`` (batch, height, width, channels, first), ``result`` (rows, cols, columns), ``rule``: as in the kernels' Conv."""
    batch, height, width, channels, _ = source
    rows, cols, columns = result
    kernel, *_, copies, phases = rule
    i32(batch * max(height * width, rows * cols) + 2 * width + 256)
    i32((kernel * copies) ** 2 * channels + SLAB)
    i32((kernel**2 * channels + 128) * (columns + 128))
    lines = batch * -(-rows // phases) * -(-cols // phases)
    tiles = -(-lines // way.block.lines) * -(-columns // way.block.lines)
    sizes = tuple(map(i32, (*source, *result, *rule, wide)))
    suffix = _suffix(dtype)
    grid = (int(i32(tiles)), 1, phases**2)
    block = (way.block.threads,)
    current().launch(f"conv_mma_{suffix}", f"conv_{name}_{suffix}_{way.name}", grid, block, (*arrays, *sizes), shared=way.shared)


def forward(
    x: Array,
    w: Array,
    bias: Array | None = None,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    shift: Array | None = None,
    residual: Array | None = None,
    norm: Norm | None = None,
    tail: Array | None = None,
) -> Array:
    """y = conv(x') + bias + shift + residual, as :func:`alphabar.kernels.reference.conv2d` has it.

    x, w and residual are all float32, whose products are then of operands rounded to TF32, or all bfloat16; bias (Cout,) and
    shift (B, Cout) float32. The sum is in float32. y is like x, or float32 where ``out`` is. ``norm`` = (a, b, silu): x' is
    a[n, c] x + b[n, c], or silu of it, rounded like x; padding is zeros of x'. ``tail``: more channels, which follow those of x.
    """
    kernel, _, channels, columns = w.shape
    batch, height, width, first = x.shape
    rows, cols = (conv_output_size(n, kernel, stride, upsample, pad) for n in (height, width))
    out = empty((batch, rows, cols, columns), x.dtype, current().xp) if out is None else out
    if not out.size:
        return out
    before, after = conv_padding(kernel, pad)
    a, b, silu = norm or (None, None, False)
    one_slab = tail is None or first * x.dtype.itemsize % SLAB == 0
    whole = one_slab and _whole(x.dtype, channels) and _whole(x.dtype, first) and aligned(x, tail, a, b)
    keeps = kernel == 3 and stride == 1 and not upsample and before == after == 1
    way = plan(batch * rows * cols, columns, _slabs(x.dtype, channels), width if keeps else None, whole)
    wide = _whole(x.dtype, columns) and aligned(w, bias, shift, residual, out)
    into = (out, None) if out.dtype == x.dtype else (None, out)
    arrays = (x, tail, w, a, b, i32(silu), bias, shift, residual, *into)
    rule = (kernel, stride, -before, 1, int(upsample), 0, 1, 1)
    _launch("forward", x.dtype, way, arrays, (batch, height, width, channels, first), (rows, cols, columns), rule, wide)
    return out


def backward_input(
    dy: Array,
    w: Array,
    input_shape: tuple[int, ...],
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
) -> Array:
    """dx as :func:`alphabar.kernels.reference.conv2d_backward_input` has it; dy, w, dx all float32 (by TF32) or all bfloat16."""
    kernel, _, columns, channels = w.shape
    batch, rows, cols, _ = input_shape
    _, height, width, _ = dy.shape
    out = empty(tuple(input_shape), dy.dtype, current().xp) if out is None else out
    if not out.size:
        return out
    before, after = conv_padding(kernel, pad)
    keeps = kernel == 3 and stride == 1 and not upsample and before == after == 1
    whole = _whole(dy.dtype, channels) and aligned(dy, w)
    way = plan(prod(input_shape[:3]), columns, _slabs(dy.dtype, channels), width if keeps else None, whole)
    factor = 2 if upsample else 1
    phases = stride if whole and not upsample else 1
    rule = (kernel, factor, before, -1, stride - 1, stride - 1, factor, phases)
    wide = _whole(dy.dtype, columns) and aligned(out)
    _launch("input", dy.dtype, way, (dy, w, out), (batch, height, width, channels, channels), (rows, cols, columns), rule, wide)
    return out
