"""Launchers of the optimiser."""

from typing import Any

import numpy as np

from ..buffers import empty
from ..reference.stepping import adamw_row
from .launch import THREADS, aligned, blocks, current, i32

Array = Any

MOST_BLOCKS = 1 << 13  # of a step: each thread first makes the factor of clipping, in double precision
UNDER_WAY = 4  # accesses of a thread at a time
MOST_PARTS = 1024  # of the sum of squares; fixed, so that the order of the sum is


def sum_squares(x: Array) -> Array:
    device = current()
    suffix, width = ("wide", 4) if aligned(x) else ("any", 1)
    parts = empty((max(1, min(-(-x.size // (THREADS * width * UNDER_WAY)), MOST_PARTS)),), np.float64, device.xp)
    total = empty((1,), np.float64, device.xp)
    device.launch("optim", f"squares_{suffix}", (len(parts),), (THREADS,), (x, parts, np.int64(x.size)))
    device.launch("optim", "sum_parts", (1,), (THREADS,), (parts, total, i32(len(parts))))
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
    if norm_sq is not None:
        norm_sq = norm_sq.astype(np.float64, copy=False) if np.isfinite(max_norm) else None
    row = adamw_row(lr, beta1, beta2, weight_decay, step, ema_decay)
    _adamw((param, grad, m, v, ema), norm_sq, max_norm, beta1, beta2, eps, (*row, None, np.int32(0), None))


def adamw_ema_by_table(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    ema: Array,
    rows: Array,
    counter: Array,
    beta1: float,
    beta2: float,
    eps: float,
    norm_sq: Array,
    max_norm: float = float("inf"),
    low: Array | None = None,
) -> None:
    """:func:`adamw_ema` for a captured graph: row ``counter[0]`` of a table instead of the numbers that change.

    rows (steps, 5) float32 on the device, row k from :func:`adamw_row` with step k + 1; past its end the last row is used.
    counter: int32, the steps made so far. Where ``norm_sq`` (1,) float64 is not finite nothing changes, nor does :func:`count`
    count the step. ``low`` (n,) bfloat16, if given, becomes the new weights rounded.
    """
    changing = (*np.zeros(5, np.float32), rows, i32(len(rows) - 1), counter)
    _adamw((param, grad, m, v, ema), norm_sq, max_norm, beta1, beta2, eps, changing, low)


def _adamw(
    flats: tuple[Array, ...],
    norm_sq: Array | None,
    max_norm: float,
    beta1: float,
    beta2: float,
    eps: float,
    changing: tuple,
    low: Array | None = None,
) -> None:
    size = flats[0].size
    if size == 0:
        return
    suffix, width = ("wide", 4) if aligned(*flats) and aligned(low, bytes_=8) else ("any", 1)
    fixed = map(np.float32, (beta1, 1 - beta1, beta2, 1 - beta2, eps))
    args = (*flats, norm_sq, np.float32(max_norm if norm_sq is not None else 1.0), np.int64(size), *fixed, *changing, low)
    current().launch("optim", f"adamw_{suffix}", blocks(-(-size // width), MOST_BLOCKS), (THREADS,), args)


def count(made: Array, skipped: Array | None = None, norm_sq: Array | None = None) -> None:
    """made += 1 on the device, the last kernel of a captured step; where ``norm_sq`` is not finite skipped += 1 instead.

    made, skipped: int32 arrays of one element; norm_sq (1,) float64 as from :func:`sum_squares`.
    """
    current().launch("optim", "count", (1,), (1,), (made, skipped, norm_sq))
