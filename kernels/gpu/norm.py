"""Launchers of group normalisation."""

from math import prod
from typing import Any

import numpy as np

from .. import reference
from ..buffers import empty
from .launch import access, current, i32

Array = Any

NORM_THREADS = 512
SECTOR = 8  # floats in the 32 bytes that memory gives at once


def _norm_plan(x: Array, groups: int, *arrays: Array | None) -> tuple[tuple[int], tuple[int], int, tuple]:
    """(grid, block, width of an access, (places, channels, groups, groups of a block)) for x (B, ..., C)."""
    channels = x.shape[-1]
    size, places = channels // groups, prod(x.shape[1:-1])
    width = access(size, x, *arrays)
    span = next((s for s in range(1, groups + 1) if groups % s == 0 and s * size >= SECTOR), groups)
    if span * size // width > NORM_THREADS // 2:
        span = 1
    work = places * span * size // width
    threads = next((n for n in (64, 128, 256) if work <= 8 * n), NORM_THREADS)
    if span > 1:
        threads = max(threads, -(-span * size // width // 32) * 32)
    return (x.shape[0] * groups // span,), (threads,), width, (i32(places), i32(channels), i32(groups), i32(span))


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
    device = current()
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
    device = current()
    samples, channels = x.shape[0], x.shape[-1]
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    dgammas, dbetas = (empty((samples, channels), x.dtype, device.xp) for _ in range(2))
    dgamma, dbeta = (empty((channels,), x.dtype, device.xp) for _ in range(2))
    dscale, dshift = (None if scale is None else empty((samples, channels), x.dtype, device.xp) for _ in range(2))
    grid, block, width, sizes = _norm_plan(x, groups, dy, gamma, beta, scale, shift, out)
    args = (dy, x, gamma, beta, mean, rstd, scale, shift, out, dgammas, dbetas, dscale, dshift, *sizes, np.int32(silu))
    device.launch("norm", f"norm_backward_{width}", grid, block, args)
    for parts, total in ((dgammas, dgamma), (dbetas, dbeta)):
        device.launch("norm", "norm_sum", (-(-channels // 32),), (32, 16), (parts, total, i32(samples), i32(channels)))
    return out, dgamma, dbeta, dscale, dshift
