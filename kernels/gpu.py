"""The kernels on a GPU: for each one a launcher with the name and the parameters of its definition in :mod:`.reference`.

A launcher turns shapes into a grid, wraps each scalar in the NumPy type of the kernel's parameter, and starts kernels of
``cuda/*.cu``. It meets the GPU only through a *device*: an object with ``xp``, an array library, and ``launch(file, kernel, grid,
block, args, shared)``. So the same launchers run on the host where a test puts another device in its place (:func:`on`).

Sums are made in a fixed order without atomics: the same call gives the same bits.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from math import prod
from typing import Any

import numpy as np

from . import reference
from .buffers import empty
from .compile import Cuda, require_gpu
from .reference import BLOCK, RUN, conv_output_size, conv_padding
from .streams import FORWARD, SAMPLER

__all__ = [
    "adamw_ema",
    "attention",
    "attention_backward",
    "conv2d",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "group_norm_silu",
    "group_norm_silu_backward",
    "normals",
    "on",
    "q_sample",
    "require_gpu",
    "step",
    "sum_squares",
]

Array = Any
Device = Any

THREADS = 256
MOST_BLOCKS = 4096  # of a kernel that strides over the grid: several for each place on the largest GPU
_device: ContextVar[Device | None] = ContextVar("device", default=None)
_cuda = cache(Cuda)


def _current() -> Device:
    return _device.get() or _cuda()


@contextmanager
def on(device: Device) -> Iterator[Device]:
    """Launch on ``device`` inside the block."""
    token = _device.set(device)
    try:
        yield device
    finally:
        _device.reset(token)


# ----------------------------------------------------------------------------------------------------------- arguments of kernels


def _i32(value: int) -> np.int32:
    if value >= 2**31:
        raise ValueError(f"{value} elements along the axes that a GPU kernel counts together are too many: the limit is 2^31 - 1")
    return np.int32(value)


def _u32(value: int) -> np.uint32:
    return np.uint32(value & 0xFFFFFFFF)


def _blocks(threads: int) -> tuple[int]:
    return (min(-(-threads // THREADS), MOST_BLOCKS),)


def _aligned(*arrays: Array | None, bytes_: int = 16) -> bool:
    """Whether every array begins at a multiple of ``bytes_``, as an access of that size demands."""
    return all((a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr) % bytes_ == 0 for a in arrays if a is not None)


_tables: dict[tuple[int, int], Array] = {}


def _table(device: Device, values: Array) -> Array:
    """``values`` as float32 on the device. A host array that cannot be written to is sent once for as long as it lives."""
    xp = device.xp
    if xp is np or not isinstance(values, np.ndarray):
        return xp.asarray(values, dtype=np.float32)
    if values.flags.writeable or not values.flags.owndata:
        return xp.asarray(values.astype(np.float32))
    key = (id(values), xp.cuda.runtime.getDevice())
    if key not in _tables:
        _tables[key] = xp.asarray(values.astype(np.float32))
        weakref.finalize(values, _tables.pop, key, None)
    return _tables[key]


# -------------------------------------------------------------------------------------------------- random numbers and diffusion


def _walk(samples: int, size: int, *arrays: Array | None) -> tuple[tuple[int], tuple, str] | None:
    """(grid, (items, lanes, size), suffix of the kernel) of a walk over (samples, size) in fours; None where nothing is to do."""
    if samples * size == 0:
        return None
    lanes = RUN // 4 * (size // BLOCK) + min(RUN // 4, -(-(size % BLOCK) // 4))
    suffix = "wide" if size % 4 == 0 and _aligned(*arrays) else "any"
    return _blocks(samples * lanes), (_i32(samples * lanes), _i32(lanes), _i32(size)), suffix


def normals(out: Array, seed: int, step: int = 0, stream: int = SAMPLER, first_sample: int = 0) -> Array:
    walk = _walk(out.shape[0], prod(out.shape[1:]), out)
    if walk:
        grid, sizes, suffix = walk
        draw = (_u32(seed), _u32(seed >> 32), _u32(step), _u32(stream), _u32(first_sample))
        _current().launch("random", f"normals_{suffix}", grid, (THREADS,), (out, *sizes, *draw))
    return out


def q_sample(
    x0: Array,
    t: Array,
    signal: Array,
    noise: Array,
    eps: Array | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = FORWARD,
    first_sample: int = 0,
    out: Array | None = None,
    eps_out: Array | None = None,
) -> tuple[Array, Array]:
    device = _current()
    made = eps is None
    out = empty(x0.shape, x0.dtype, device.xp) if out is None else out
    if made and eps_out is None:
        eps_out = empty(x0.shape, x0.dtype, device.xp)
    walk = _walk(x0.shape[0], prod(x0.shape[1:]), x0, eps, out, eps_out)
    if walk:
        grid, sizes, suffix = walk
        levels = (
            device.xp.asarray(t, dtype=np.int64),
            _table(device, signal),
            _table(device, noise),
            _i32(len(signal)),
        )
        draw = (_u32(seed), _u32(seed >> 32), _u32(step), _u32(stream), _u32(first_sample))
        name = f"q_sample_{'made' if made else 'given'}_{suffix}"
        device.launch("forward", name, grid, (THREADS,), (x0, *levels, eps, out, eps_out, *sizes, *draw))
    return out, eps if eps_out is None else eps_out


def step(
    x: Array,
    m: Array,
    rows: Array,
    i: int,
    history: tuple = (),
    guidance: Array | None = None,
    noise: Any = None,
    clip: tuple[float, float] | None = None,
    seed: int = 0,
    stream: int = SAMPLER,
    first_sample: int = 0,
    out: Array | None = None,
    store: Array | None = None,
) -> Array:
    device = _current()
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    made, given = noise is True, None if noise is True else noise
    past = (*history, None, None, None)[:3]
    # only noise that is made here needs to know where a sample begins
    samples = x.shape[0] if made or x.size >= 2**31 else 1
    walk = _walk(samples, x.size // max(samples, 1), x, m, *past, guidance, given, out, store)
    if walk:
        grid, sizes, suffix = walk
        low, high = clip or (0.0, 0.0)
        whole = not isinstance(rows, np.ndarray) or not rows.flags.writeable
        table, row = (_table(device, rows), i) if whole else (_table(device, rows[i : i + 1]), 0)
        limits = (np.int32(clip is not None), np.float32(low), np.float32(high))
        draw = (_u32(seed), _u32(seed >> 32), _u32(stream), _u32(first_sample))
        name = f"step_{'made' if made else 'none' if noise is None else 'given'}_{suffix}"
        args = (x, m, table, np.int32(row), _u32(i), None, *past, guidance, given, *limits, out, store, *sizes, *draw)
        device.launch("step", name, grid, (THREADS,), args)
    return out


# ----------------------------------------------------------------------------------------------------------------- normalisation

NORM_THREADS = 512
SECTOR = 8  # floats in the 32 bytes that memory gives at once


def _norm_plan(x: Array, groups: int, *arrays: Array | None) -> tuple[tuple[int], tuple[int], int, tuple]:
    """(grid, block, width of an access, (places, channels, groups, groups of a block)) for x (B, ..., C)."""
    channels = x.shape[-1]
    size, places = channels // groups, prod(x.shape[1:-1])
    width = next(w for w in (4, 2, 1) if size % w == 0 and _aligned(x, *arrays, bytes_=4 * w))
    span = next((s for s in range(1, groups + 1) if groups % s == 0 and s * size >= SECTOR), groups)
    if span * size // width > NORM_THREADS // 2:
        span = 1
    work = places * span * size // width
    threads = next((n for n in (64, 128, 256) if work <= 8 * n), NORM_THREADS)
    if span > 1:
        threads = max(threads, -(-span * size // width // 32) * 32)
    return (x.shape[0] * groups // span,), (threads,), width, (_i32(places), _i32(channels), _i32(groups), _i32(span))


def group_norm_silu(
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    eps: float = 1e-5,
    scale: Array | None = None,
    shift: Array | None = None,
    silu: bool = True,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    if x.size == 0:
        return reference.group_norm_silu(x, gamma, beta, groups, eps, scale, shift, silu, out)
    device = _current()
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    mean, rstd = (empty((x.shape[0], groups), x.dtype, device.xp) for _ in range(2))
    grid, block, width, sizes = _norm_plan(x, groups, gamma, beta, scale, shift, out)
    args = (x, gamma, beta, scale, shift, out, mean, rstd, *sizes, np.float32(eps), np.int32(silu))
    device.launch("norm", f"norm_forward_{width}", grid, block, args)
    return out, mean, rstd


def group_norm_silu_backward(
    dy: Array,
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    mean: Array,
    rstd: Array,
    scale: Array | None = None,
    shift: Array | None = None,
    silu: bool = True,
    out: Array | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    if x.size == 0:
        return reference.group_norm_silu_backward(dy, x, gamma, beta, groups, mean, rstd, scale, shift, silu, out)
    device = _current()
    samples, channels = x.shape[0], x.shape[-1]
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    dgammas, dbetas = (empty((samples, channels), x.dtype, device.xp) for _ in range(2))
    dgamma, dbeta = (empty((channels,), x.dtype, device.xp) for _ in range(2))
    dscale, dshift = (None if scale is None else empty((samples, channels), x.dtype, device.xp) for _ in range(2))
    grid, block, width, sizes = _norm_plan(x, groups, dy, gamma, beta, scale, shift, out)
    args = (dy, x, gamma, beta, mean, rstd, scale, shift, out, dgammas, dbetas, dscale, dshift, *sizes, np.int32(silu))
    device.launch("norm", f"norm_backward_{width}", grid, block, args)
    for parts, total in ((dgammas, dgamma), (dbetas, dbeta)):
        device.launch("norm", "norm_sum", (-(-channels // 32),), (32, 16), (parts, total, _i32(samples), _i32(channels)))
    return out, dgamma, dbeta, dscale, dshift


# ------------------------------------------------------------------------------------------------------------------- convolution

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
    _i32(batch * max(height * width, rows * cols))
    _i32(kernel * kernel * factor * factor * max(cin, cout) + DEPTH)
    before = conv_padding(kernel, pad)[0]
    return rows, cols, tuple(map(_i32, (batch, height, width, cin, rows, cols, cout, kernel, stride, before, factor)))


def _tiles(n: int) -> int:
    return -(-n // TILE)


def _conv_suffix(cin: int, cout: int, *arrays: Array | None) -> str:
    return "wide" if cin % 4 == 0 and cout % 4 == 0 and _aligned(*arrays) else "any"


def conv2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
) -> Array:
    device = _current()
    kernel, _, cin, cout = w.shape
    rows, cols, sizes = _conv_shape(x.shape, cout, kernel, stride, upsample, pad)
    out = empty((x.shape[0], rows, cols, cout), x.dtype, device.xp) if out is None else out
    if out.size:
        grid = (_tiles(x.shape[0] * rows * cols), _tiles(cout))
        name = f"conv_forward_{_conv_suffix(cin, cout, x, w, bias, out)}"
        device.launch("conv", name, grid, (THREADS,), (x, w, bias, out, *sizes))
    return out


def conv2d_backward_input(
    dy: Array,
    w: Array,
    input_shape: tuple[int, ...],
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
) -> Array:
    device = _current()
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
) -> tuple[Array, Array]:
    device = _current()
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
    device.launch("conv", name, (_tiles(lines), _tiles(cout), count), (THREADS,), (x, dy, slices, _i32(per_slice), *sizes))
    args = (slices, out, dbias, _i32(count), np.int64(lines * cout), _i32(cout))
    device.launch("conv", "conv_sum", _blocks((lines + 1) * cout), (THREADS,), args)
    return out, dbias


# --------------------------------------------------------------------------------------------------------------------- attention

WARPS = THREADS // 32
KEYS = 32  # tokens of a tile
LARGEST_HEAD = 256  # features; larger heads go to the definition


def _attention_plan(q: Array, matrices: int) -> tuple[int, tuple[int], int]:
    """(features of the kernel, grid, bytes of shared memory) of a kernel that keeps ``matrices`` rows for each own token."""
    samples, tokens, heads, d = q.shape
    features = next(n for n in (32, 64, 128, LARGEST_HEAD) if d <= n)
    own = WARPS * (4 if features <= 64 else 2)
    _i32(samples * tokens * heads)
    return features, (samples * heads * -(-tokens // own),), 4 * (2 * KEYS * (d | 1) + matrices * own * d)


def attention(q: Array, k: Array, v: Array, scale: float | None = None, out: Array | None = None) -> tuple[Array, Array]:
    samples, tokens, heads, d = q.shape
    if d > LARGEST_HEAD:
        return reference.attention(q, k, v, scale, out)
    device = _current()
    out = empty(q.shape, q.dtype, device.xp) if out is None else out
    lse = empty((samples, heads, tokens), q.dtype, device.xp)
    if samples:
        features, grid, shared = _attention_plan(q, 1)
        sizes = (_i32(tokens), _i32(heads), _i32(d), np.float32(d**-0.5 if scale is None else scale))
        device.launch("attention", f"attention_forward_{features}", grid, (THREADS,), (q, k, v, out, lse, *sizes), shared)
    return out, lse


def attention_backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, scale: float | None = None
) -> tuple[Array, Array, Array]:
    samples, tokens, heads, d = q.shape
    if d > LARGEST_HEAD:
        return reference.attention_backward(do, q, k, v, o, lse, scale)
    device = _current()
    dq, dk, dv = (empty(q.shape, q.dtype, device.xp) for _ in range(3))
    if samples:
        delta = empty(lse.shape, lse.dtype, device.xp)
        args = (do, o, delta, _i32(samples), _i32(tokens), _i32(heads), _i32(d))
        device.launch("attention", "attention_delta", (-(-samples * tokens * heads // WARPS),), (THREADS,), args)
        features, grid, shared = _attention_plan(q, 2)
        sizes = (_i32(tokens), _i32(heads), _i32(d), np.float32(d**-0.5 if scale is None else scale))
        inputs = (do, q, k, v, lse, delta)
        device.launch("attention", f"attention_dq_{features}", grid, (THREADS,), (*inputs, dq, *sizes), shared)
        device.launch("attention", f"attention_dkv_{features}", grid, (THREADS,), (*inputs, dk, dv, *sizes), shared)
    return dq, dk, dv


# --------------------------------------------------------------------------------------------------------------------- optimiser

MOST_PARTS = 1024  # of the sum of squares; fixed, so that the order of the sum is


def sum_squares(x: Array) -> Array:
    device = _current()
    suffix, width = ("wide", 4) if _aligned(x) else ("any", 1)
    parts = empty((max(1, min(-(-x.size // (THREADS * width)), MOST_PARTS)),), np.float64, device.xp)
    total = empty((1,), np.float64, device.xp)
    device.launch("optim", f"squares_{suffix}", (len(parts),), (THREADS,), (x, parts, np.int64(x.size)))
    device.launch("optim", "sum_parts", (1,), (THREADS,), (parts, total, _i32(len(parts))))
    return total


def adamw_ema(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    ema: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float,
    norm_sq: Array | None = None,
    max_norm: float = float("inf"),
) -> None:
    if param.size == 0:
        return
    if norm_sq is not None:
        norm_sq = norm_sq.astype(np.float64, copy=False) if np.isfinite(max_norm) else None
    suffix, width = ("wide", 4) if _aligned(param, grad, m, v, ema) else ("any", 1)
    # every difference from 1 is taken in double precision, before the rounding to float32
    rates = (
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        1 - beta2**step,
        ema_decay,
        1 - ema_decay,
    )
    limit = max_norm if norm_sq is not None else 1.0
    args = (param, grad, m, v, ema, norm_sq, np.float32(limit), np.int64(param.size), *map(np.float32, rates))
    _current().launch("optim", f"adamw_{suffix}", _blocks(-(-param.size // width)), (THREADS,), args)
