"""Launchers of the sums and copies between the kernels: what :mod:`..elementwise` does, for contiguous float32 arrays on a GPU.

Nothing is checked but that sizes fit the kernels.
"""

from math import prod
from typing import Any

import numpy as np

from ..buffers import empty
from .launch import THREADS, aligned, blocks, current, i32, table

Array = Any

ENOUGH_BLOCKS = 512  # of a sum over places: below this the places are cut into slices; fixed, so that the order of the sum is
LONGEST = 64  # places that one thread adds up
LEAST = 4  # and so many at least, before the places are cut


def _width(*sizes: int, arrays: tuple[Array, ...]) -> tuple[str, int]:
    """(suffix of the kernel, floats of one access) where all runs of channels have these sizes and starts."""
    return ("wide", 4) if all(n % 4 == 0 for n in sizes) and aligned(*arrays) else ("any", 1)


def _launch(name: str, width: tuple[str, int], size: int, args: tuple) -> None:
    """A kernel that takes ``size`` floats; none where there are none."""
    if size:
        suffix, floats = width
        current().launch("elementwise", f"{name}_{suffix}", blocks(-(-size // floats)), (THREADS,), args)


def fill(out: Array, value: float) -> None:
    """out = value."""
    _launch("fill", _width(arrays=(out,)), out.size, (out, np.float32(value), np.int64(out.size)))


def add(a: Array, b: Array, out: Array) -> Array:
    """out = a + b; ``out`` may be either."""
    _launch("add", _width(arrays=(a, b, out)), out.size, (a, b, out, np.int64(out.size)))
    return out


def add_columns(x: Array, at: int, out: Array) -> None:
    """out[..., at..] += x."""
    count, width = x.shape[-1], out.shape[-1]
    args = (x, out, i32(at), i32(width), i32(count), i32(x.size))
    _launch("add_columns", _width(at, count, width, arrays=(x, out)), x.size, args)


def concat(a: Array, b: Array) -> Array:
    """[a, b] along the last axis."""
    n, m = a.shape[-1], b.shape[-1]
    out = empty((*a.shape[:-1], n + m), a.dtype, current().xp)
    _launch("concat", _width(n, m, arrays=(a, b, out)), out.size, (a, b, out, i32(n), i32(m), i32(out.size)))
    return out


def channels(x: Array, at: int, count: int) -> Array:
    """A copy of x[..., at..at+count]."""
    width = x.shape[-1]
    out = empty((*x.shape[:-1], count), x.dtype, current().xp)
    args = (x, out, i32(at), i32(width), i32(count), i32(out.size))
    _launch("channels", _width(at, count, width, arrays=(x, out)), out.size, args)
    return out


def add_channels(x: Array, emb: Array, at: int, out: Array) -> Array:
    """out[b, …, c] = x[b, …, c] + emb[b, at + c]; ``out`` may be x."""
    count, width = x.shape[-1], emb.shape[-1]
    args = (x, emb, out, i32(at), i32(width), i32(count), i32(prod(x.shape[1:])), i32(x.size))
    _launch("add_channels", _width(at, count, width, arrays=(x, emb, out)), x.size, args)
    return out


def sum_places(x: Array) -> Array:
    """Σ over all axes but the first and the last: threads, then the threads of a block in halves, then slices in order."""
    device = current()
    batch, places, count = x.shape[0], prod(x.shape[1:-1]), x.shape[-1]
    out = empty((batch, count), x.dtype, device.xp)
    if out.size == 0 or places == 0:
        fill(out, 0)
        return out
    suffix, floats = _width(count, arrays=(x, out))
    lanes = min(32, 1 << (-(-count // floats) - 1).bit_length())
    tiles, lines = -(-count // (floats * lanes)), THREADS // lanes
    wanted = max(-(-ENOUGH_BLOCKS // (batch * tiles)), -(-places // (LONGEST * lines)))
    of_slice = -(-places // max(1, min(wanted, places // (LEAST * lines))))
    slices = -(-places // of_slice)
    parts = out if slices == 1 else empty((batch, slices, count), x.dtype, device.xp)
    i32(x.size)
    sizes = (i32(places), i32(count), i32(lanes), i32(tiles), i32(slices), i32(of_slice))
    device.launch("elementwise", f"sum_places_{suffix}", (tiles * slices * batch,), (THREADS,), (x, parts, *sizes))
    if slices > 1:
        args = (parts, out, i32(slices), i32(count), i32(out.size))
        device.launch("elementwise", "sum_slices", blocks(out.size), (THREADS,), args)
    return out


def take_rows(rows: Array, index: Array) -> Array:
    """rows[index]; NaN where there is no such row."""
    device = current()
    count, width = rows.shape
    out = empty((*index.shape, width), rows.dtype, device.xp)
    args = (rows, device.xp.asarray(index, dtype=np.int64), out, i32(count), i32(width), i32(out.size))
    _launch("take_rows", _width(width, arrays=(rows, out)), out.size, args)
    return out


def sum_into_rows(x: Array, index: Array, rows: int) -> Array:
    """(rows, E): in row r the sum of x[i] over index[i] = r, in their order, by 256."""
    device = current()
    width = x.shape[-1]
    out = empty((rows, width), x.dtype, device.xp)
    if out.size:
        suffix, floats = _width(width, arrays=(x, out))
        places = device.xp.asarray(index, dtype=np.int64)
        grid = (rows, -(-width // (THREADS * floats)))
        args = (x, places, out, i32(places.size), i32(width))
        device.launch("elementwise", f"sum_into_rows_{suffix}", grid, (THREADS,), args)
    return out


def time_features(t: Array, origin: float, omega: np.ndarray, cos_first: bool) -> Array:
    """[sin(ω_i (t − origin)), cos(…)] (B, 2h) for t (B,) float64, omega (h,) of the host; right for angles below 2^31."""
    device = current()
    half, batch = len(omega), len(t)
    out = empty((batch, 2 * half), np.float32, device.xp)
    if out.size:
        frequencies = table(device, omega, np.float64)
        flags = (np.float64(origin), np.int32(omega.dtype == np.float32), np.int32(cos_first))
        args = (t, frequencies, out, *flags, i32(half), i32(batch * half))
        device.launch("elementwise", "time_features", blocks(batch * half), (THREADS,), args)
    return out


def upsample(x: Array) -> Array:
    """Nearest-neighbour doubling: (B, H, W, C) to (B, 2H, 2W, C)."""
    batch, height, width, count = x.shape
    out = empty((batch, 2 * height, 2 * width, count), x.dtype, current().xp)
    _launch("upsample", _width(count, arrays=(x, out)), x.size, (x, out, i32(width * count), i32(count), i32(x.size)))
    return out


def upsample_backward(dy: Array) -> Array:
    """Its transpose: (B, 2H, 2W, C) to (B, H, W, C), the sum over 2 × 2 places."""
    batch, height, width, count = dy.shape
    out = empty((batch, height // 2, width // 2, count), dy.dtype, current().xp)
    args = (dy, out, i32(width // 2 * count), i32(count), i32(out.size))
    _launch("upsample_backward", _width(count, arrays=(dy, out)), out.size, args)
    return out
