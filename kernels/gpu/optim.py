"""Launchers of the optimiser."""

from typing import Any

import numpy as np

from ..buffers import empty
from .launch import THREADS, aligned, blocks, current, i32

Array = Any

MOST_PARTS = 1024  # of the sum of squares; fixed, so that the order of the sum is


def sum_squares(x: Array) -> Array:
    device = current()
    suffix, width = ("wide", 4) if aligned(x) else ("any", 1)
    parts = empty((max(1, min(-(-x.size // (THREADS * width)), MOST_PARTS)),), np.float64, device.xp)
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
    if param.size == 0:
        return
    if norm_sq is not None:
        norm_sq = norm_sq.astype(np.float64, copy=False) if np.isfinite(max_norm) else None
    suffix, width = ("wide", 4) if aligned(param, grad, m, v, ema) else ("any", 1)
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
    current().launch("optim", f"adamw_{suffix}", blocks(-(-param.size // width)), (THREADS,), args)
