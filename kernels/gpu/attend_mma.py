"""Launchers of attention on the tensor cores: of bfloat16, and of float32 rounded to TF32."""

from typing import Any, NamedTuple

import numpy as np

from ..bf16 import BF16
from .launch import aligned, current, i32

Array = Any

HEADS = (32, 64, 128, 256)  # features that there are kernels for
OWN = 16  # tokens of a warp
MOST_SHARED = 99 << 10  # bytes: what a block has on the smallest GPU with these products
ENOUGH = 264  # blocks: two for each place on a large GPU


class Plan(NamedTuple):
    """A launch. features: of the kernel; shared: bytes; stages: buffers for the tiles that the warps of a block share."""

    features: int
    blocks: int
    threads: int
    shared: int
    stages: int


def tile(features: int, size: int, back: bool) -> int:
    """Tokens of a tile, of features of ``size`` bytes."""
    return 16 if features * size >= 1024 else 32 if back or features * size >= 512 else 64


def plan(shape: tuple[int, ...], size: int, kernel: str) -> Plan:
    """The launch of ``kernel`` ("forward", "dq" or "dkv") on q of this shape, of elements of ``size`` bytes.

    A block has up to four groups of 16 tokens: fewer where shared memory, tokens or blocks are few. It has a second buffer for
    tiles where that fits beside them.
    """
    samples, tokens, heads, d = shape
    i32(samples * tokens * heads)
    features = next(n for n in HEADS if d <= n)
    pitch, own = features * size + 16, 1 if kernel == "forward" else 2
    of_tiles = 2 * tile(features, size, own == 2) * pitch

    def shared(groups: int, stages: int) -> int:
        return own * groups * OWN * pitch + stages * of_tiles

    def blocks(groups: int) -> int:
        return samples * heads * -(-tokens // (groups * OWN))

    fitting = [n for n in (4, 2, 1) if shared(n, 1) <= MOST_SHARED and (n // 2) * OWN < tokens]
    groups = next((n for n in fitting if blocks(n) >= ENOUGH), fitting[-1])
    stages = 2 if shared(groups, 2) <= MOST_SHARED else 1
    warps = groups * (2 if kernel == "dkv" and features > 128 else 1)  # of long heads one makes dk, another dv
    return Plan(features, blocks(groups), 32 * warps, shared(groups, stages), stages)


def _launch(kernel: str, args: tuple, q: Array, scale: float | None, arrays: tuple[Array, ...]) -> None:
    _, tokens, heads, d = q.shape
    features, blocks, threads, shared, stages = plan(q.shape, q.dtype.itemsize, kernel)
    wide = d * q.dtype.itemsize % 16 == 0 and aligned(*arrays)
    options = i32(tokens), i32(heads), i32(d), np.float32(d**-0.5 if scale is None else scale), np.int32(wide), np.int32(stages)
    name = f"attention_{'bf16' if q.dtype == BF16 else 'tf32'}_{kernel}_{features}"
    current().launch("attention_mma", name, (blocks,), (threads,), (*args, *options), shared)


def forward(q: Array, k: Array, v: Array, scale: float | None, out: Array, lse: Array) -> None:
    """Write ``out`` and ``lse``."""
    _launch("forward", (q, k, v, out, lse), q, scale, (q, k, v, out))


def backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, scale: float | None, delta: Array, *to: Array
) -> None:
    """Write ``delta`` and ``to``: dq, dk, dv."""
    dq, dk, dv = to
    _launch("dq", (do, q, k, v, o, lse, delta, dq), q, scale, (do, q, k, v, o, dq))
    _launch("dkv", (do, q, k, v, lse, delta, dk, dv), q, scale, (do, q, k, v, dk, dv))
