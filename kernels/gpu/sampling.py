"""Launchers of what a captured row of a sampler needs beside the network and the step."""

from typing import Any

import numpy as np

from ..buffers import empty
from .launch import THREADS, aligned, blocks, current, i32

Array = Any


def tell_time(times: Array, counter: Array, t: Array) -> None:
    """t[k] = times[counter[0]] for every sample k; past the end of ``times`` the last one.

    times (R,), t (B,) float64, counter (1,) int32, on the device. TypeError or ValueError for others.
    """
    for name, a, dtype in (("times", times, np.float64), ("counter", counter, np.int32), ("t", t, np.float64)):
        if a.dtype != dtype or a.ndim != 1:
            raise TypeError(f"{name} must be {np.dtype(dtype)} with one axis, not {a.dtype} of shape {tuple(a.shape)}")
    if not times.size or counter.size != 1:
        raise ValueError(f"there must be times and one counter, not {times.size} and {counter.size}")
    if t.size:
        args = (times, i32(times.size - 1), counter, t, i32(t.size))
        current().launch("sampling", "tell_time", blocks(t.size), (THREADS,), args)


def stack(a: Array, b: Array) -> Array:
    """[a, b] along the first axis: contiguous arrays of one shape (B, …) and one dtype, whose elements are words of 4 bytes.

    TypeError or ValueError for others.
    """
    if a.dtype != b.dtype or a.dtype.itemsize % 4:
        raise TypeError(f"a and b must have one dtype of 4, 8 or 16 bytes, not {a.dtype} and {b.dtype}")
    if a.shape != b.shape or not a.ndim or not (a.flags.c_contiguous and b.flags.c_contiguous):
        raise ValueError(f"a and b must be contiguous and have one shape (B, …), not {tuple(a.shape)} and {tuple(b.shape)}")
    device = current()
    out = empty((2 * a.shape[0], *a.shape[1:]), a.dtype, device.xp)
    if out.size:
        first, second, whole = (v.reshape(-1).view(np.float32) for v in (a, b, out))
        n = first.size
        suffix, width = ("wide", 4) if n % 4 == 0 and aligned(a, b, out) else ("any", 1)
        args = (first, second, whole, np.int64(n))
        device.launch("sampling", f"stack_{suffix}", blocks(-(-2 * n // width)), (THREADS,), args)
    return out
