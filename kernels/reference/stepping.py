"""What a captured training step does beside its network, by definition: what changes from step to step is read from arrays."""

from typing import Any

import numpy as np

from .. import counter
from ..arrays import array_module
from ..buffers import empty
from ..streams import FORWARD, TIMES
from .random import normals

Array = Any

# What belongs to the level of one sample, in the order in which every backend reads it:
#   x = scale·(signal·x0 + noise·ε),  target = on_x0·x0 + on_eps·ε,  weight·mean|F(x) − target|²
LEVEL = ("signal", "noise", "scale", "on_x0", "on_eps", "weight")


def draw_levels(rows: Array, step: Array, seed: int, t: Array, levels: Array) -> None:
    """t_k = 1 + ⌊u_k·T⌋ for every sample k of a batch, and the row of its level: levels[:, k] = rows[t_k].

    rows (T+1, columns) float32, of which row 0 is never drawn; step (1,) int32, the training step; u_k the numbers of
    :func:`alphabar.core.forward.random_times`, whose bits the times have. Written: t (B,) float64, levels (columns, B) float32.
    """
    xp = array_module(rows)
    drawn = xp.asarray(counter.integers(len(t), 1, len(rows), seed, int(step[0]), TIMES))
    t[...] = drawn
    levels[...] = rows[drawn].T


def example(images: Array, levels: Array, step: Array, seed: int, x: Array, target: Array) -> None:
    """x = scale·(signal·x0 + noise·ε) and target = on_x0·x0 + on_eps·ε of x0 = u/127.5 − 1, in one pass.

    images u (B, …) uint8; levels (6, B) float32, rows as in ``LEVEL`` (the last is not read here); ε of (seed, step, place in
    the batch), step (1,) int32. Written: x, target float32 like images. Every operation is rounded once: the same bits
    everywhere.
    """
    xp = array_module(images)
    signal, noise, scale, on_x0, on_eps = (row.reshape(-1, *(1,) * (images.ndim - 1)) for row in levels[:5])
    x0 = images.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)
    eps = normals(empty(x.shape, x.dtype, xp), seed, int(step[0]), FORWARD)
    x[...] = scale * (signal * x0 + noise * eps)
    target[...] = on_x0 * x0 + on_eps * eps


def verdict(value: Array, norm_sq: Array, skipped: Array, tally: Array) -> None:
    """Whether a step counts: its mean loss and the gradient's norm are finite, and no step before it has failed unread.

    value (B,) float32, the losses; norm_sq (1,) float64, Σ grad²; skipped (1,) int32, steps refused so far. Where it counts
    tally (4,) float64 takes it in: + its mean loss, + 1, its mean loss, √norm_sq. Else norm_sq becomes NaN, with which
    :func:`adamw_ema_by_table` changes nothing and :func:`count` counts the step as skipped.
    """
    mean, square = float(value.astype(np.float64).sum()) / len(value), float(norm_sq[0])
    if int(skipped[0]) == 0 and np.isfinite(mean) and np.isfinite(square):
        xp = array_module(tally)
        tally[...] = xp.asarray([float(tally[0]) + mean, float(tally[1]) + 1, mean, np.sqrt(square)])
    else:
        norm_sq[...] = np.nan


def adamw_row(lr: float, beta1: float, beta2: float, weight_decay: float, step: int, ema_decay: float) -> np.ndarray:
    """What of :func:`adamw_ema` changes from step to step: 1 − lr·weight_decay, lr/(1 − β1^step), 1 − β2^step, decay, 1 − decay.

    Every difference from 1 is taken in double precision, before the rounding to float32.
    """
    return np.array([1 - lr * weight_decay, lr / (1 - beta1**step), 1 - beta2**step, ema_decay, 1 - ema_decay], np.float32)


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
) -> None:
    """:func:`adamw_ema` by row ``counter[0]`` of a table in place of the numbers that change; past its end by the last row.

    rows (n, 5) float32, each from :func:`adamw_row`; counter (1,) int32. Where norm_sq (1,) float64 is not finite nothing
    changes.
    """
    if not np.isfinite(float(norm_sq[0])):
        return
    xp = array_module(param)
    keep, rate, bias2, decay, rest = map(float, rows[min(int(counter[0]), len(rows) - 1)])
    clip = min(1.0, max_norm / (float(norm_sq[0]) ** 0.5 + 1e-6)) if np.isfinite(max_norm) else 1.0
    grad = grad * param.dtype.type(clip)
    m[...] = beta1 * m + (1 - beta1) * grad
    v[...] = beta2 * v + (1 - beta2) * grad * grad
    param[...] = keep * param - rate * (m / (xp.sqrt(v / bias2) + eps))
    ema[...] = decay * ema + rest * param


def count(made: Array, skipped: Array, norm_sq: Array) -> None:
    """made += 1, the last of a step; where norm_sq (1,) float64 is not finite skipped += 1 instead. Both (1,) int32."""
    to = made if np.isfinite(float(norm_sq[0])) else skipped
    to += 1
