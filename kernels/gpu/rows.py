"""Launchers of the softmax over the last axis and its gradient."""

from typing import Any

import numpy as np

from ..buffers import empty
from .launch import THREADS, access, current, i32

Array = Any

# As in cuda/rows.cuh: columns of a row that 8 lanes hold in their registers, and a warp; a longer row has a block.
HELD = {"wide": (64, 1024), "any": (64, 512)}
EACH = 8  # floats that a thread of a block takes at a time
FEW_THREADS, MOST_THREADS = 64, 1024  # of a block: small ones, so that a few rows reach many processors
MOST_BLOCKS = 1 << 14


def team(rows: int, columns: int, *arrays: Array) -> tuple[str, tuple[int], tuple[int]]:
    """(the end of the kernel's name, grid, block) for rows that are shared as their length asks for."""
    suffix = "wide" if access(columns, *arrays) == 4 else "any"
    for lanes, most in zip((8, 32), HELD[suffix], strict=True):
        if columns <= most:
            return f"{lanes}_{suffix}", (min(-(-lanes * rows // FEW_THREADS), MOST_BLOCKS),), (FEW_THREADS,)
    threads = max(THREADS, min(MOST_THREADS, -(-columns // (32 * EACH)) * 32))
    return f"block_{suffix}", (min(rows, 2**31 - 1),), (threads,)


def softmax(x: Array, out: Array | None = None) -> Array:
    device = current()
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    if x.size:
        rows, columns = x.size // x.shape[-1], x.shape[-1]
        name, grid, block = team(rows, columns, x, out)
        device.launch("softmax", f"softmax_{name}", grid, block, (x, out, np.int64(rows), i32(columns)))
    return out


def softmax_backward(dy: Array, y: Array, out: Array | None = None) -> Array:
    device = current()
    out = empty(y.shape, y.dtype, device.xp) if out is None else out
    if y.size:
        rows, columns = y.size // y.shape[-1], y.shape[-1]
        name, grid, block = team(rows, columns, dy, y, out)
        device.launch("softmax", f"softmax_backward_{name}", grid, block, (dy, y, out, np.int64(rows), i32(columns)))
    return out
