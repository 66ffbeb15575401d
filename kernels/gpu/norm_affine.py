"""Launchers of what is left of a group norm where the convolution behind it makes it: its statistics, and a x + b by channel."""

from math import prod
from typing import Any

import numpy as np

from .. import reference
from ..bf16 import BF16, unpack
from ..buffers import empty
from . import norm
from .launch import aligned, current, i32

Array = Any

THREADS = 128


def _moments(x: Array, groups: int, tail: Array | None) -> tuple[Array, int]:
    """(partial (B, parts, groups, 2), parts): mean and sum of squared deviations, cut as the norm itself cuts them."""
    device = current()
    samples, places, head = x.shape[0], prod(x.shape[1:-1]), x.shape[-1]
    channels = head if tail is None else head + tail.shape[-1]
    wide = head % 4 == channels % 4 == 0 and aligned(x, tail, bytes_=4 * x.dtype.itemsize)
    plan = norm._plan(samples, places, channels, groups, 4 if wide else 1, 1, norm._most_shared(device), x.dtype.itemsize)
    partial = empty((samples, plan.parts, groups, 2), np.float32, device.xp)
    sizes = map(i32, (places, head, channels, groups, plan.span, plan.lanes, plan.stash))
    args = (x, tail, None, None, None, None, None, partial, None, None, *sizes, np.float32(0), np.int32(0))
    name = f"norm_moments_{'wide' if wide else 'any'}{'_bf16' if x.dtype == BF16 else ''}"
    device.launch("norm", name, (samples * groups // plan.span, plan.parts), (plan.threads,), args, 4 * plan.stash)
    return partial, plan.parts


def _finish(
    partial: Array | None, mean: Array, rstd: Array, affine: tuple, size: int, places: int = 1, parts: int = 1, eps: float = 0.0
) -> None:
    samples, groups = mean.shape
    if samples:
        grid = (-(-samples * groups // (THREADS // 32)),)
        sizes = (i32(n) for n in (samples, groups, size, places, parts))
        current().launch("norm_affine", "norm_affine", grid, (THREADS,), (partial, mean, rstd, *affine, *sizes, np.float32(eps)))


def _channels(x: Array, tail: Array | None) -> int:
    return x.shape[-1] + (0 if tail is None else tail.shape[-1])


def _defined(x: Array, groups: int, eps: float, tail: Array | None) -> tuple[Array, Array]:
    xp = current().xp
    exact = [a if a is None or a.dtype != BF16 else unpack(a) for a in (x, tail)]
    one = xp.ones(_channels(x, tail), np.float32)
    return reference.group_norm_silu(exact[0], one, one, groups, eps, silu=False, tail=exact[1])[1:]


def group_stats(x: Array, groups: int, eps: float = 1e-5, tail: Array | None = None) -> tuple[Array, Array]:
    """(mean, rstd) (B, groups) float32 of x (B, …, C), float32 or bfloat16; with ``tail`` of [x, tail].

    rstd = 1/√(var + eps). They have the bits of those that ``group_norm_silu`` returns for arrays as well aligned.
    """
    return group_affine(x, None, None, groups, eps, tail=tail)[2:]


def norm_affine(
    mean: Array, rstd: Array, gamma: Array, beta: Array, scale: Array | None = None, shift: Array | None = None
) -> tuple[Array, Array]:
    """(a, b) (B, C) with a x + b = ((x − mean)·rstd·γ + β)·(1 + scale) + shift, the group norm before its activation.

    mean, rstd (B, groups); gamma, beta (C,); scale, shift (B, C) or both None; all float32.
    """
    samples, groups = mean.shape
    a, b = (empty((samples, gamma.shape[0]), np.float32, current().xp) for _ in range(2))
    _finish(None, mean, rstd, (gamma, beta, scale, shift, a, b), gamma.shape[0] // groups)
    return a, b


def group_affine(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    groups: int,
    eps: float = 1e-5,
    scale: Array | None = None,
    shift: Array | None = None,
    tail: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """(a, b, mean, rstd): :func:`group_stats` and :func:`norm_affine` with a launch less. Without gamma a and b are None."""
    channels, xp = _channels(x, tail), current().xp
    if x.size == 0 or channels > norm.LARGEST_GROUP * groups:
        mean, rstd = _defined(x, groups, eps, tail)
        a, b = (None, None) if gamma is None else norm_affine(mean, rstd, gamma, beta, scale, shift)
        return a, b, mean, rstd
    mean, rstd = (empty((x.shape[0], groups), np.float32, xp) for _ in range(2))
    a, b = (None if gamma is None else empty((x.shape[0], channels), np.float32, xp) for _ in range(2))
    partial, parts = _moments(x, groups, tail)
    affine = (gamma, beta, scale, shift, a, b)
    _finish(partial, mean, rstd, affine, channels // groups, prod(x.shape[1:-1]), parts, eps)
    return a, b, mean, rstd
