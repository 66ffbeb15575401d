"""Launchers of attention: of float32 here; of bfloat16, and of float32 where the precision is "tf32", in :mod:`.attend_mma`."""

from typing import Any

import numpy as np

from .. import reference
from ..bf16 import BF16, pack, unpack
from ..buffers import empty, into
from ..precisions import tf32
from . import attend_mma
from .launch import aligned, current, i32

Array = Any

HEADS = (8, 16, 32, 64, 128, 256)  # features that there are kernels for; larger heads go to the definition
FORWARD_ROWS, BACKWARD_ROWS = (4, 4, 4, 4, 4, 2), (4, 4, 4, 4, 2, 2)  # a quarter of a warp's tokens, for each of them
TILE = 32  # tokens
WEIGHTS = TILE + 8  # pitch of a warp's weights
MOST_SHARED = 96 << 10  # bytes of a block
ENOUGH = 264  # blocks: two for each place on a large GPU


def _attention_plan(q: Array, own: int, weights: int, rows_of: tuple[int, ...]) -> tuple[int, tuple[int], tuple[int], int]:
    """(features of the kernel, grid, block, bytes of shared memory).

    A warp keeps ``own`` arrays of its tokens and ``weights`` of products. The warps of a block share tiles: up to four, fewer
    where tokens or blocks are few.
    """
    samples, tokens, heads, d = q.shape
    features = next(n for n in HEADS if d <= n)
    rows, pitch = 4 * rows_of[HEADS.index(features)], features + 4
    i32(samples * tokens * heads)

    def shared(warps: int) -> int:
        return 4 * (2 * TILE * pitch + warps * rows * (own * pitch + weights * WEIGHTS))

    def blocks(warps: int) -> int:
        return samples * heads * -(-tokens // (warps * rows))

    fitting = [w for w in (4, 2, 1) if shared(w) <= MOST_SHARED and (w // 2) * rows < tokens]
    warps = next((w for w in fitting if blocks(w) >= ENOUGH), fitting[-1])
    return features, (blocks(warps),), (32 * warps,), shared(warps)


def _options(q: Array, scale: float | None, arrays: tuple[Array, ...]) -> tuple:
    _, tokens, heads, d = q.shape
    wide = d % 4 == 0 and aligned(q, *arrays)
    return i32(tokens), i32(heads), i32(d), np.float32(d**-0.5 if scale is None else scale), np.int32(wide)


def _on_tensor_cores(q: Array) -> bool:
    return q.dtype == BF16 or tf32()


def attention(q: Array, k: Array, v: Array, scale: float | None = None, out: Array | None = None) -> tuple[Array, Array]:
    samples, tokens, heads, d = q.shape
    if d > HEADS[-1]:
        return _by_definition(q, k, v, scale, out)
    device = current()
    out = empty(q.shape, q.dtype, device.xp) if out is None else out
    lse = empty((samples, heads, tokens), np.float32, device.xp)
    if samples and _on_tensor_cores(q):
        attend_mma.forward(q, k, v, scale, out, lse)
    elif samples:
        features, grid, block, shared = _attention_plan(q, 1, 1, FORWARD_ROWS)
        args = (q, k, v, out, lse, *_options(q, scale, (k, v, out)))
        device.launch("attention", f"attention_forward_{features}", grid, block, args, shared)
    return out, lse


def attention_backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, scale: float | None = None
) -> tuple[Array, Array, Array]:
    if q.shape[-1] > HEADS[-1]:
        return _backward_by_definition(do, q, k, v, o, lse, scale)
    device = current()
    dq, dk, dv = (empty(q.shape, q.dtype, device.xp) for _ in range(3))
    if q.shape[0]:
        delta = empty(lse.shape, lse.dtype, device.xp)
        if _on_tensor_cores(q):
            attend_mma.backward(do, q, k, v, o, lse, scale, delta, dq, dk, dv)
            return dq, dk, dv
        options = _options(q, scale, (k, v, do, dq, dk, dv))
        features, grid, block, shared = _attention_plan(q, 2, 1, BACKWARD_ROWS)
        args = (do, q, k, v, o, lse, delta, dq, *options)
        device.launch("attention", f"attention_dq_{features}", grid, block, args, shared)
        features, grid, block, shared = _attention_plan(q, 2, 2, BACKWARD_ROWS)
        args = (do, q, k, v, lse, delta, dk, dv, *options)
        device.launch("attention", f"attention_dkv_{features}", grid, block, args, shared)
    return dq, dk, dv


def _by_definition(q: Array, k: Array, v: Array, scale: float | None, out: Array | None) -> tuple[Array, Array]:
    if q.dtype != BF16:
        return reference.attention(q, k, v, scale, out)
    o, lse = reference.attention(unpack(q), unpack(k), unpack(v), scale)
    return into(out, pack(o)), lse


def _backward_by_definition(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, scale: float | None
) -> tuple[Array, Array, Array]:
    if q.dtype != BF16:
        return reference.attention_backward(do, q, k, v, o, lse, scale)
    do, q, k, v, o = map(unpack, (do, q, k, v, o))
    dq, dk, dv = reference.attention_backward(do, q, k, v, o, lse, scale)
    return pack(dq), pack(dk), pack(dv)
