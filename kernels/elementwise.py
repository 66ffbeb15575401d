"""Sums and copies between the kernels, for arrays of any library: in float32 compiled for NumPy, kernels for CuPy; else its own.

Unlike the kernels these check nothing: networks call them with arrays that fit. ``empty`` results come from the active pool.
On a GPU arrays may be bfloat16 (:mod:`.bf16`) where that is said; sums of them are made in float32 and rounded once.
"""

import importlib
from functools import cache
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from . import buffers, dispatch, recording
from .arrays import array_module, is_cupy
from .bf16 import BF16, pack, unpack

Array = Any
FEW = 1 << 14  # elements


@cache
def _compiled() -> ModuleType:
    return importlib.import_module(".cpu.elementwise", __package__)


@cache
def _launchers() -> ModuleType:
    return importlib.import_module(".gpu.elementwise", __package__)


def _on_gpu(*arrays: Array, bf16: bool = False) -> bool:
    """Whether the GPU's kernels take these arrays, all float32 or, if there are such kernels, all ``bf16``.

    Raises TypeError for bits of bfloat16 that they do not take: a library would compute with the bits as if with integers.
    """
    for a in arrays:
        if type(a) is np.ndarray or not is_cupy(a):
            return False
    dtype = BF16 if any(a.dtype == BF16 for a in arrays) else np.float32
    taken = dispatch.chosen() == "auto" and all(a.dtype == dtype and a.flags.c_contiguous for a in arrays)
    if dtype == BF16 and not (taken and bf16):
        raise TypeError("bfloat16 is for some of a GPU's own kernels, where all arrays are contiguous and bfloat16")
    if taken:
        recording.refuse("arrays on a GPU")
    return taken


def _fast(*arrays: Array) -> bool:
    """Whether the compiled functions take these arrays."""
    for a in arrays:
        if type(a) is not np.ndarray or a.dtype != np.float32 or not a.flags.c_contiguous or not a.flags.writeable:
            break
    else:
        if dispatch.chosen() == "auto":
            return True
    recording.refuse("arrays of no compiled elementwise function")
    return False


def _gains(*arrays: Array) -> bool:
    """As :func:`_fast`, for functions that give NumPy's bits: where elements are few and nothing is recorded NumPy is faster."""
    return (arrays[-1].size >= FEW or recording.active.get() is not None) and _fast(*arrays)


def fill(a: Array, value: float) -> None:
    """Set all elements to ``value``. Also bfloat16."""
    if _gains(a):
        _compiled().fill(a, value)
    elif _on_gpu(a, bf16=True):
        _launchers().fill(a, value)
    else:
        a.fill(value)


def zeros(shape: tuple[int, ...], dtype: Any, xp: Any = np) -> Array:
    """An array of zeros."""
    a = buffers.empty(shape, dtype, xp)
    fill(a, 0)
    return a


def add(a: Array, b: Array, out: Array = None) -> Array:
    """a + b of one shape; ``out`` may be either. Also bfloat16."""
    xp = array_module(a)
    if out is None:
        out = buffers.empty(a.shape, a.dtype, xp)
    if _gains(a, b, out):
        _compiled().add(a, b, out)
        return out
    if _on_gpu(a, b, out, bf16=True):
        return _launchers().add(a, b, out)
    return xp.add(a, b, out=out)


def weighted_sum(a: float, x: Array, b: float, y: Array, out: Array = None) -> Array:
    """a x + b y of arrays of one shape, both products rounded before they are added; ``out`` may be either."""
    a, b = float(a), float(b)
    if not _on_gpu(x, y, *(() if out is None else (out,))):
        recording.refuse("a weighted sum")
        return buffers.into(out, a * x + b * y)
    return _launchers().weighted_sum(a, x, b, y, buffers.empty(x.shape, x.dtype, array_module(x)) if out is None else out)


def cast(x: Array, dtype: Any, out: Array = None) -> Array:
    """x, float32 or bfloat16, as the other of these (``BF16``), rounded to nearest even; x itself where it is that already."""
    if x.dtype == dtype:
        return x if out is None else buffers.into(out, x)
    if {x.dtype, np.dtype(dtype)} != {BF16, np.dtype(np.float32)}:
        raise TypeError(f"a cast is from float32 to bfloat16 (the bits, {BF16}) or back, not from {x.dtype} to {np.dtype(dtype)}")
    if is_cupy(x) and x.flags.c_contiguous and dispatch.chosen() == "auto":
        recording.refuse("arrays on a GPU")
        return _launchers().cast(x, buffers.empty(x.shape, dtype, array_module(x)) if out is None else out)
    recording.refuse("a change of dtype")
    return buffers.into(out, pack(x) if dtype == BF16 else unpack(x))


def add_columns(x: Array, at: int, out: Array) -> None:
    """out[..., at..] += x."""
    if _gains(x, out):
        _compiled().add_columns(x.reshape(-1, x.shape[-1]), at, out.reshape(-1, out.shape[-1]))
    elif _on_gpu(x, out):
        _launchers().add_columns(x, at, out)
    else:
        part = out[..., at : at + x.shape[-1]]
        part += x


def concat(a: Array, b: Array) -> Array:
    """[a, b] along the last axis. Also bfloat16."""
    if _on_gpu(a, b, bf16=True):
        return _launchers().concat(a, b)
    n, m = a.shape[-1], b.shape[-1]
    y = buffers.empty((*a.shape[:-1], n + m), a.dtype, array_module(a))
    if _gains(a, b, y):
        rows, copy = y.reshape(-1, n + m), _compiled().copy_columns
        copy(a.reshape(-1, n), 0, rows, 0, n)
        copy(b.reshape(-1, m), 0, rows, n, m)
    else:
        y[..., :n] = a
        y[..., n:] = b
    return y


def channels(x: Array, at: int, count: int) -> Array:
    """A copy of x[..., at..at+count]. Also bfloat16."""
    if _on_gpu(x, bf16=True):
        return _launchers().channels(x, at, count)
    y = buffers.empty((*x.shape[:-1], count), x.dtype, array_module(x))
    if _gains(x, y):
        _compiled().copy_columns(x.reshape(-1, x.shape[-1]), at, y.reshape(-1, count), 0, count)
    else:
        y[...] = x[..., at : at + count]
    return y


def add_channels(x: Array, emb: Array, at: int, out: Array = None) -> Array:
    """x[b, …, c] + emb[b, at + c]; ``out`` may be x."""
    xp, shape = array_module(x), (x.shape[0], prod(x.shape[1:-1]), x.shape[-1])
    if out is None:
        out = buffers.empty(x.shape, x.dtype, xp)
    if _gains(x, emb, out):
        _compiled().add_channels(x.reshape(shape), emb, at, out.reshape(shape))
    elif _on_gpu(x, emb, out):
        _launchers().add_channels(x, emb, at, out)
    else:
        xp.add(x.reshape(shape), emb[:, None, at : at + shape[2]], out=out.reshape(shape))
    return out


def sum_places(x: Array) -> Array:
    """Σ over all axes but the first and the last; float32 of bfloat16."""
    if _on_gpu(x, bf16=True):
        return _launchers().sum_places(x)
    flat = x.reshape(x.shape[0], prod(x.shape[1:-1]), x.shape[-1])
    if not _fast(x):
        return array_module(x).einsum("bpc->bc", flat)
    shape = x.shape[0], x.shape[-1]
    y = buffers.empty(shape, np.float32)
    _compiled().sum_places(flat, y, buffers.empty(shape, np.float32), buffers.empty(shape, np.float64))
    return y


def take_rows(table: Array, index: Array) -> Array:
    """table[index]; table (rows, E), index integers of any shape in 0..rows-1, beyond which a GPU gives NaN."""
    if _on_gpu(table) and is_cupy(index):
        return _launchers().take_rows(table, index)
    if recording.active.get() is None or not _fast(table):  # NumPy looks at the range of the index
        return table[index]
    y = buffers.empty((*index.shape, table.shape[1]), np.float32)
    _compiled().take_rows(table, np.ascontiguousarray(index, np.int64).reshape(-1), y.reshape(-1, table.shape[1]))
    return y


def sum_into_rows(x: Array, index: Array, rows: int) -> Array | None:
    """(rows, E): in row r the sum of x[i] over index[i] = r, in their order. None where it is not compiled for these arrays."""
    if _on_gpu(x) and is_cupy(index):
        return _launchers().sum_into_rows(x, index, rows)
    if not _fast(x):
        return None
    y = buffers.empty((rows, x.shape[-1]), np.float32)
    _compiled().sum_into_rows(x.reshape(-1, x.shape[-1]), np.ascontiguousarray(index, np.int64).reshape(-1), y)
    return y


def time_features(t: Array, origin: float, omega: np.ndarray, cos_first: bool) -> Array | None:
    """[sin(ω_i (t − origin)), cos(…)] (B, 2h) float32 for t (B,) float64 and omega (h,); t − origin and its products with ω are
    rounded to the dtype of omega. None where it is not compiled for these arrays."""
    if type(t) is not np.ndarray and is_cupy(t) and dispatch.chosen() == "auto":
        recording.refuse("times on a GPU")
        return _launchers().time_features(array_module(t).ascontiguousarray(t, dtype=np.float64), origin, omega, cos_first)
    if type(t) is not np.ndarray or dispatch.chosen() != "auto":
        recording.refuse("features of the times")
        return None
    if t.dtype != np.float64 or not t.flags.carray:  # one number for all samples, say
        t = t.astype(np.float64)
    y = buffers.empty((len(t), 2 * len(omega)), np.float32)
    _compiled().time_features(t, origin, omega, cos_first, buffers.empty(t.shape, omega.dtype), y)
    return y


def upsample(x: Array) -> Array:
    """Nearest-neighbour doubling of (B, H, W, C) to (B, 2H, 2W, C), where no convolution follows that could read it doubled.

    Also bfloat16.
    """
    if _on_gpu(x, bf16=True):
        return _launchers().upsample(x)
    return x.repeat(2, axis=1).repeat(2, axis=2)


def upsample_backward(dy: Array) -> Array:
    """The transpose of :func:`upsample`: Σ over 2 × 2 places of (B, 2H, 2W, C). Also bfloat16."""
    if _on_gpu(dy, bf16=True):
        return _launchers().upsample_backward(dy)
    return (dy[:, ::2, ::2] + dy[:, ::2, 1::2]) + (dy[:, 1::2, ::2] + dy[:, 1::2, 1::2])
