"""Launchers of what a Transformer does to its tokens between the matrix products."""

from math import prod
from typing import Any

import numpy as np

from .. import reference
from ..buffers import empty
from .launch import THREADS, access, aligned, blocks, current, i32
from .rows import FEW_THREADS, MOST_BLOCKS

Array = Any

# Channels of a token that a warp holds in registers, as in the kernels.
HELD = {"wide": 1024, "any": 512}
HELD_BACKWARD = {"wide": 512, "any": 256}
RUN = 16  # tokens summed by one block; fixed, so that the order of the sum is
SHARED = 48 << 10  # bytes of shared memory that every GPU gives a block


def _way(held: dict[str, int], channels: int, *arrays: Array | None) -> str:
    """The end of a kernel's name: whether a token stays in registers, and the floats of an access."""
    suffix = "wide" if access(channels, *arrays) == 4 else "any"
    return f"{'short' if channels <= held[suffix] else 'long'}_{suffix}"


def silu(x: Array, out: Array | None = None) -> Array:
    device = current()
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    if x.size:
        suffix, width = ("wide", 4) if aligned(x, out) else ("any", 1)
        device.launch("tokens", f"silu_{suffix}", blocks(-(-x.size // width)), (THREADS,), (x, out, np.int64(x.size)))
    return out


def silu_backward(dy: Array, x: Array, out: Array | None = None) -> Array:
    device = current()
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    if x.size:
        suffix, width = ("wide", 4) if aligned(dy, x, out) else ("any", 1)
        grid = blocks(-(-x.size // width))
        device.launch("tokens", f"silu_backward_{suffix}", grid, (THREADS,), (dy, x, out, np.int64(x.size)))
    return out


def layer_norm(
    x: Array,
    gamma: Array,
    beta: Array,
    eps: float = 1e-5,
    scale: Array | None = None,
    shift: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    device = current()
    samples, tokens, channels = x.shape
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    mean, rstd = (empty(x.shape[:2], x.dtype, device.xp) for _ in range(2))
    if samples:
        sizes = (i32(samples), i32(tokens), i32(channels), np.float32(eps))
        args = (x, gamma, beta, scale, shift, out, mean, rstd, *sizes)
        way = _way(HELD, channels, x, gamma, beta, scale, shift, out)
        grid = (min(-(-32 * samples * tokens // FEW_THREADS), MOST_BLOCKS),)
        device.launch("tokens", f"layer_norm_{way}", grid, (FEW_THREADS,), args)
    return out, mean, rstd


def layer_norm_backward(
    dy: Array,
    x: Array,
    gamma: Array,
    beta: Array,
    mean: Array,
    rstd: Array,
    scale: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    samples, tokens, channels = x.shape
    each = 8 * channels  # bytes of the two sums that a warp keeps
    if samples == 0 or each > SHARED:
        return reference.layer_norm_backward(dy, x, gamma, beta, mean, rstd, scale, out)
    device = current()
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    dgammas, dbetas = (empty((samples, channels), x.dtype, device.xp) for _ in range(2))
    dgamma, dbeta = (empty((channels,), x.dtype, device.xp) for _ in range(2))
    dscale, dshift = (None if scale is None else empty((samples, channels), x.dtype, device.xp) for _ in range(2))
    runs, warps = -(-tokens // RUN), min(THREADS // 32, SHARED // each)
    parts = empty((samples, runs, 2, channels), x.dtype, device.xp)
    args = (dy, x, gamma, mean, rstd, scale, out, parts, i32(tokens), i32(channels), i32(runs), i32(RUN))
    name = f"layer_norm_backward_{_way(HELD_BACKWARD, channels, dy, x, gamma, scale, out)}"
    device.launch("tokens", name, (int(i32(samples * runs)),), (32 * warps,), args, warps * each)
    grid = (-(-int(i32(samples * channels)) // THREADS),)
    sizes = (i32(samples), i32(channels), i32(runs))
    device.launch(
        "tokens", "layer_norm_fold", grid, (THREADS,), (parts, gamma, beta, scale, dscale, dshift, dgammas, dbetas, *sizes)
    )
    for shares, total in ((dgammas, dgamma), (dbetas, dbeta)):
        device.launch("norm", "norm_sum", (-(-channels // 32),), (32, 16), (shares, total, i32(samples), i32(channels)))
    return out, dgamma, dbeta, dscale, dshift


def add_gated(x: Array, h: Array, gate: Array, out: Array | None = None) -> Array:
    device = current()
    samples, tokens, channels = x.shape
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    if samples:
        suffix, width = ("wide", 4) if channels % 4 == 0 and aligned(x, h, gate, out) else ("any", 1)
        args = (x, h, gate, out, np.int64(i32(samples * tokens)), i32(tokens), i32(channels))
        device.launch("tokens", f"add_gated_{suffix}", blocks(x.size // width), (THREADS,), args)
    return out


def add_gated_backward(dy: Array, h: Array, gate: Array, out: Array | None = None) -> tuple[Array, Array]:
    device = current()
    samples, tokens, channels = dy.shape
    out = empty(dy.shape, dy.dtype, device.xp) if out is None else out
    dgate = empty((samples, channels), dy.dtype, device.xp)
    if samples:
        suffix, width = ("wide", 4) if channels % 4 == 0 and aligned(dy, h, gate, out) else ("any", 1)
        runs, threads = -(-tokens // RUN), min(THREADS, -(-channels // width // 32) * 32)
        parts = empty((samples, runs, channels), dy.dtype, device.xp)
        args = (dy, h, gate, out, parts, i32(tokens), i32(channels), i32(runs), i32(RUN))
        device.launch("tokens", f"add_gated_backward_{suffix}", (int(i32(samples * runs)),), (threads,), args)
        grid = (-(-int(i32(samples * channels)) // THREADS),)
        device.launch("tokens", "sum_runs", grid, (THREADS,), (parts, dgate, i32(samples), i32(channels), i32(runs)))
    return out, dgate


def rotary(x: Array, cos: Array, sin: Array, out: Array | None = None) -> Array:
    device = current()
    samples, tokens, heads, depth = x.shape
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    if samples:
        suffix, width = ("wide", 4) if depth % 8 == 0 and aligned(x, cos, sin, out) else ("any", 1)
        args = (x, cos, sin, out, np.int64(prod(x.shape[:2])), i32(tokens), i32(heads), i32(depth // 2))
        device.launch("tokens", f"rotary_{suffix}", blocks(x.size // (2 * width)), (THREADS,), args)
    return out
