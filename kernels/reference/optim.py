"""The optimiser by its definition."""

from typing import Any

import numpy as np

from ..arrays import array_module

Array = Any


def sum_squares(x: Array) -> Array:
    """Σ x², in float64, as an array of one element (so that on a GPU nothing waits for the host)."""
    return array_module(x).square(x.ravel().astype(np.float64)).sum(keepdims=True)


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
    """One step of AdamW (Loshchilov & Hutter 2019), global-norm clipping and the running average, in place over flat buffers.

        g = grad·min(1, max_norm/(√norm_sq + 1e-6));  m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²
        param = (1 − lr·weight_decay)·param − lr/(1−β1^step)·m / (√(v/(1−β2^step)) + eps);  ema = decay·ema + (1−decay)·param

    ``step`` counts from 1. ``norm_sq`` is Σ grad² as from :func:`sum_squares`, or None for no clipping.
    """
    xp = array_module(param)
    if norm_sq is not None and np.isfinite(max_norm):
        grad = grad * xp.minimum(1.0, max_norm / (xp.sqrt(norm_sq) + 1e-6)).astype(param.dtype)
    m[...] = beta1 * m + (1 - beta1) * grad
    v[...] = beta2 * v + (1 - beta2) * grad * grad
    denominator = xp.sqrt(v / (1 - beta2**step)) + eps
    param[...] = (1 - lr * weight_decay) * param - (lr / (1 - beta1**step)) * (m / denominator)
    ema[...] = ema_decay * ema + (1 - ema_decay) * param
