"""Launchers of the convolution."""

from math import prod
from typing import Any

import numpy as np

from ..buffers import empty
from ..reference import conv_output_size, conv_padding
from .launch import THREADS, aligned, blocks, current, i32

Array = Any

TILE = 64  # lines and columns of the result that a block makes
DEPTH = 16  # and the length of the sum that it holds at a time
ENOUGH_BLOCKS = 256  # below this the sum of the weight gradient is cut into slices; fixed, so that the order of the sum is


def _conv_shape(
    x_shape: tuple[int, ...], cout: int, kernel: int, stride: int, upsample: bool, pad: tuple[int, int] | None
) -> tuple:
    """(rows, cols, the eleven sizes that every kernel takes)."""
    batch, height, width, cin = x_shape
    rows, cols = (conv_output_size(n, kernel, stride, upsample, pad) for n in (height, width))
    factor = 2 if upsample else 1
    i32(batch * max(height * width, rows * cols))
    i32(kernel * kernel * factor * factor * max(cin, cout) + DEPTH)
    before = conv_padding(kernel, pad)[0]
    return rows, cols, tuple(map(i32, (batch, height, width, cin, rows, cols, cout, kernel, stride, before, factor)))


def _tiles(n: int) -> int:
    return -(-n // TILE)


def _conv_suffix(cin: int, cout: int, *arrays: Array | None) -> str:
    return "wide" if cin % 4 == 0 and cout % 4 == 0 and aligned(*arrays) else "any"


def conv2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    shift: Array | None = None,
    residual: Array | None = None,
    precision: str | None = None,
) -> Array:
    device = current()
    kernel, _, cin, cout = w.shape
    rows, cols, sizes = _conv_shape(x.shape, cout, kernel, stride, upsample, pad)
    out = empty((x.shape[0], rows, cols, cout), x.dtype, device.xp) if out is None else out
    if out.size:
        grid = (_tiles(x.shape[0] * rows * cols), _tiles(cout))
        name = f"conv_forward_{_conv_suffix(cin, cout, x, w, bias, shift, residual, out)}"
        device.launch("conv", name, grid, (THREADS,), (x, w, bias, shift, residual, out, *sizes))
    return out


def conv2d_backward_input(
    dy: Array,
    w: Array,
    input_shape: tuple[int, ...],
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    precision: str | None = None,
) -> Array:
    device = current()
    kernel, _, cin, cout = w.shape
    _, _, sizes = _conv_shape(tuple(input_shape), cout, kernel, stride, upsample, pad)
    out = empty(tuple(input_shape), dy.dtype, device.xp) if out is None else out
    if out.size:
        grid = (_tiles(prod(input_shape[:3])), _tiles(cin))
        device.launch("conv", f"conv_input_{_conv_suffix(cin, cout, dy, w, out)}", grid, (THREADS,), (dy, w, out, *sizes))
    return out


def conv2d_backward_weight(
    x: Array,
    dy: Array,
    kernel: int,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    precision: str | None = None,
) -> tuple[Array, Array]:
    device = current()
    cin, cout = x.shape[3], dy.shape[3]
    rows, cols, sizes = _conv_shape(x.shape, cout, kernel, stride, upsample, pad)
    out = empty((kernel, kernel, cin, cout), dy.dtype, device.xp) if out is None else out
    dbias = empty((cout,), dy.dtype, device.xp)
    places, lines = x.shape[0] * rows * cols, kernel * kernel * cin
    if places == 0:
        out[...] = 0
        dbias[...] = 0
        return out, dbias
    tiles = _tiles(lines) * _tiles(cout)
    per_slice = -(-places // max(1, min(ENOUGH_BLOCKS // tiles, places // (4 * DEPTH))))
    per_slice = -(-per_slice // DEPTH) * DEPTH
    count = -(-places // per_slice)
    slices = empty((count, lines + 1, cout), dy.dtype, device.xp)
    name = f"conv_weight_{_conv_suffix(cin, cout, x, dy)}"
    device.launch("conv", name, (_tiles(lines), _tiles(cout), count), (THREADS,), (x, dy, slices, i32(per_slice), *sizes))
    args = (slices, out, dbias, i32(count), np.int64(lines * cout), i32(cout))
    device.launch("conv", "conv_sum", blocks((lines + 1) * cout), (THREADS,), args)
    return out, dbias
