"""Launchers of attention."""

from typing import Any

import numpy as np

from .. import reference
from ..buffers import empty
from .launch import THREADS, current, i32

Array = Any

WARPS = THREADS // 32
KEYS = 32  # tokens of a tile
LARGEST_HEAD = 256  # features; larger heads go to the definition


def _attention_plan(q: Array, matrices: int) -> tuple[int, tuple[int], int]:
    """(features of the kernel, grid, bytes of shared memory) of a kernel that keeps ``matrices`` rows for each own token."""
    samples, tokens, heads, d = q.shape
    features = next(n for n in (32, 64, 128, LARGEST_HEAD) if d <= n)
    own = WARPS * (4 if features <= 64 else 2)
    i32(samples * tokens * heads)
    return features, (samples * heads * -(-tokens // own),), 4 * (2 * KEYS * (d | 1) + matrices * own * d)


def attention(q: Array, k: Array, v: Array, scale: float | None = None, out: Array | None = None) -> tuple[Array, Array]:
    samples, tokens, heads, d = q.shape
    if d > LARGEST_HEAD:
        return reference.attention(q, k, v, scale, out)
    device = current()
    out = empty(q.shape, q.dtype, device.xp) if out is None else out
    lse = empty((samples, heads, tokens), q.dtype, device.xp)
    if samples:
        features, grid, shared = _attention_plan(q, 1)
        sizes = (i32(tokens), i32(heads), i32(d), np.float32(d**-0.5 if scale is None else scale))
        device.launch("attention", f"attention_forward_{features}", grid, (THREADS,), (q, k, v, out, lse, *sizes), shared)
    return out, lse


def attention_backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, scale: float | None = None
) -> tuple[Array, Array, Array]:
    samples, tokens, heads, d = q.shape
    if d > LARGEST_HEAD:
        return reference.attention_backward(do, q, k, v, o, lse, scale)
    device = current()
    dq, dk, dv = (empty(q.shape, q.dtype, device.xp) for _ in range(3))
    if samples:
        delta = empty(lse.shape, lse.dtype, device.xp)
        args = (do, o, delta, i32(samples), i32(tokens), i32(heads), i32(d))
        device.launch("attention", "attention_delta", (-(-samples * tokens * heads // WARPS),), (THREADS,), args)
        features, grid, shared = _attention_plan(q, 2)
        sizes = (i32(tokens), i32(heads), i32(d), np.float32(d**-0.5 if scale is None else scale))
        inputs = (do, q, k, v, lse, delta)
        device.launch("attention", f"attention_dq_{features}", grid, (THREADS,), (*inputs, dq, *sizes), shared)
        device.launch("attention", f"attention_dkv_{features}", grid, (THREADS,), (*inputs, dk, dv, *sizes), shared)
    return dq, dk, dv
