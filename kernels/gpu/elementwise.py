"""Launchers of the sums and copies between the kernels: what :mod:`..elementwise` does, for contiguous float32 arrays on a GPU.

Where that is said arrays may be bfloat16 as well. Nothing is checked but that sizes fit the kernels.
"""

from math import prod
from typing import Any

import numpy as np

from ..bf16 import BF16, pack
from ..buffers import empty
from .launch import THREADS, aligned, blocks, current, i32, table

Array = Any

ENOUGH_BLOCKS = 512  # of a sum over places: below this the places are cut into slices; fixed, so that the order of the sum is
LONGEST = 64  # places that one thread adds up
LEAST = 4  # and so many at least, before the places are cut


def _width(*sizes: int, arrays: tuple[Array, ...]) -> tuple[str, int]:
    """(suffix of the kernel, elements of one access) where all runs of channels have these sizes and starts."""
    low = "_bf16" if arrays[0].dtype == BF16 else ""
    if all(n % 4 == 0 for n in sizes) and all(aligned(a, bytes_=4 * a.dtype.itemsize) for a in arrays):
        return f"wide{low}", 4
    return f"any{low}", 1


def _flat(*arrays: Array) -> tuple[str, int]:
    """As :func:`_width` for the kernels whose accesses are of 16 bytes in any type, and which take any number of elements."""
    low, floats = ("_bf16", 8) if arrays[0].dtype == BF16 else ("", 4)
    return (f"wide{low}", floats) if aligned(*arrays) else (f"any{low}", 1)


def _pairs(*sizes: int, arrays: tuple[Array, ...]) -> int:
    """2 where a copy of these bfloat16 arrays is one of half as many floats, the bits of two in each; else 1."""
    fits = arrays[0].dtype == BF16 and all(n % 2 == 0 for n in sizes) and aligned(*arrays, bytes_=4)
    return 2 if fits else 1


def _as(pairs: int, *arrays: Array) -> tuple[Array, ...]:
    return tuple(a.view(np.float32) for a in arrays) if pairs == 2 else arrays


def _launch(name: str, width: tuple[str, int], size: int, args: tuple) -> None:
    """A kernel that takes ``size`` floats; none where there are none."""
    if size:
        suffix, floats = width
        current().launch("elementwise", f"{name}_{suffix}", blocks(-(-size // floats)), (THREADS,), args)


def fill(out: Array, value: float) -> None:
    """out = value, float32 or bfloat16."""
    number = np.full(1, value, np.float32)
    if _pairs(out.size, arrays=(out,)) == 2:
        out, number = out.reshape(-1).view(np.float32), pack(number).repeat(2).view(np.float32)
    width = ("any_bf16", 1) if out.dtype == BF16 else _width(arrays=(out,))
    _launch("fill", width, out.size, (out, number[0], np.int64(out.size)))


def add(a: Array, b: Array, out: Array) -> Array:
    """out = a + b, float32 or bfloat16; ``out`` may be either."""
    _launch("add", _flat(a, b, out), out.size, (a, b, out, np.int64(out.size)))
    return out


def weighted_sum(a: float, x: Array, b: float, y: Array, out: Array) -> Array:
    """out = a x + b y, each product rounded; ``out`` may be x or y."""
    args = (x, y, out, np.float32(a), np.float32(b), np.int64(out.size))
    _launch("weighted_sum", _flat(x, y, out), out.size, args)
    return out


def cast(x: Array, out: Array) -> Array:
    """out = x, one of them float32 and the other bfloat16."""
    wide = all(aligned(a, bytes_=4 * a.dtype.itemsize) for a in (x, out))
    name = "to_bf16" if out.dtype == BF16 else "to_float"
    _launch(name, ("wide", 4) if wide else ("any", 1), out.size, (x, out, np.int64(out.size)))
    return out


def add_columns(x: Array, at: int, out: Array) -> None:
    """out[..., at..] += x."""
    count, width = x.shape[-1], out.shape[-1]
    args = (x, out, i32(at), i32(width), i32(count), i32(x.size))
    _launch("add_columns", _width(at, count, width, arrays=(x, out)), x.size, args)


def concat(a: Array, b: Array) -> Array:
    """[a, b] along the last axis, float32 or bfloat16."""
    n, m = a.shape[-1], b.shape[-1]
    out = empty((*a.shape[:-1], n + m), a.dtype, current().xp)
    of = _pairs(n, m, arrays=(a, b, out))
    n, m, size, arrays = n // of, m // of, out.size // of, _as(of, a, b, out)
    _launch("concat", _width(n, m, arrays=arrays), size, (*arrays, i32(n), i32(m), i32(size)))
    return out


def channels(x: Array, at: int, count: int) -> Array:
    """A copy of x[..., at..at+count], float32 or bfloat16."""
    width = x.shape[-1]
    out = empty((*x.shape[:-1], count), x.dtype, current().xp)
    of = _pairs(at, count, width, arrays=(x, out))
    sizes, size, arrays = [n // of for n in (at, width, count)], out.size // of, _as(of, x, out)
    _launch("channels", _width(*sizes, arrays=arrays), size, (*arrays, *map(i32, sizes), i32(size)))
    return out


def add_channels(x: Array, emb: Array, at: int, out: Array) -> Array:
    """out[b, …, c] = x[b, …, c] + emb[b, at + c]; ``out`` may be x."""
    count, width = x.shape[-1], emb.shape[-1]
    args = (x, emb, out, i32(at), i32(width), i32(count), i32(prod(x.shape[1:])), i32(x.size))
    _launch("add_channels", _width(at, count, width, arrays=(x, emb, out)), x.size, args)
    return out


def sum_places(x: Array) -> Array:
    """Σ over all axes but the first and the last: threads, then the threads of a block in halves, then slices in order.

    x float32 or bfloat16; the sum is float32.
    """
    device = current()
    batch, places, count = x.shape[0], prod(x.shape[1:-1]), x.shape[-1]
    out = empty((batch, count), np.float32, device.xp)
    if out.size == 0 or places == 0:
        fill(out, 0)
        return out
    suffix, width = _width(count, arrays=(x, out))
    lanes = min(32, 1 << (-(-count // width) - 1).bit_length())
    tiles, lines = -(-count // (width * lanes)), THREADS // lanes
    wanted = max(-(-ENOUGH_BLOCKS // (batch * tiles)), -(-places // (LONGEST * lines)))
    of_slice = -(-places // max(1, min(wanted, places // (LEAST * lines))))
    slices = -(-places // of_slice)
    parts = out if slices == 1 else empty((batch, slices, count), np.float32, device.xp)
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
    """Nearest-neighbour doubling: (B, H, W, C) to (B, 2H, 2W, C), float32 or bfloat16."""
    batch, height, width, count = x.shape
    out = empty((batch, 2 * height, 2 * width, count), x.dtype, current().xp)
    of = _pairs(count, arrays=(x, out))
    count, size, arrays = count // of, x.size // of, _as(of, x, out)
    _launch("upsample", _width(count, arrays=arrays), size, (*arrays, i32(width * count), i32(count), i32(size)))
    return out


def upsample_backward(dy: Array) -> Array:
    """Its transpose: (B, 2H, 2W, C) to (B, H, W, C), the sum over 2 × 2 places; float32 or bfloat16."""
    batch, height, width, count = dy.shape
    out = empty((batch, height // 2, width // 2, count), dy.dtype, current().xp)
    args = (dy, out, i32(width // 2 * count), i32(count), i32(out.size))
    _launch("upsample_backward", _width(count, arrays=(dy, out)), out.size, args)
    return out
