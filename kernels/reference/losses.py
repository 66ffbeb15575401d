"""Training losses with their gradients, by definition."""

from math import prod
from typing import Any

import numpy as np

from ..arrays import array_module
from ..buffers import into

Array = Any


def squared_error(output: Array, target: Array, weight: Array | None = None, out: Array | None = None) -> tuple[Array, Array]:
    """(w·⟨(o − t)²⟩ of each sample, the gradient of its batch mean, 2w(o − t)/(B·d)). Eq: S0-E30, S0-E45, S1-E21, S2-E5.

    output, target (B, …) with d elements a sample, at least 1; weight (B,) or None for 1; ⟨·⟩ is the mean over a sample. Returns
    (value (B,), gradient like output); ``out``, the gradient's memory, may be ``output``.
    """
    batch, size = output.shape[0], prod(output.shape[1:])
    difference = output - target
    value = array_module(output).square(difference).reshape(batch, size).mean(axis=1)
    slope = 2 / (max(1, batch) * size)
    if weight is None:
        return value, into(out, difference * slope)
    return weight * value, into(out, (weight * slope).reshape(-1, *(1,) * (output.ndim - 1)) * difference)


def cross_entropy(logits: Array, labels: Array, out: Array | None = None) -> tuple[Array, Array]:
    """(−log softmax(logits)[label] of each position, the gradient of their mean, (softmax − onehot)/N). Eq: L7, L9.

    logits (…, K), −inf for a state of probability 0; labels (…) integers in 0..K−1; N positions. Returns (value (…) in nats,
    gradient like logits). A label beyond the range gives NaN on a GPU. A row without a finite largest logit is NaN, too.
    """
    xp, K = array_module(logits), logits.shape[-1]
    z, y = logits.reshape(prod(logits.shape[:-1]), K), labels.reshape(-1)
    known = (y >= 0) & (y < K)
    row, label = xp.arange(y.size), xp.where(known, y, 0).astype(np.int64)
    above = z - z.max(axis=1, keepdims=True)
    p = xp.exp(above)
    total = p.sum(axis=1, keepdims=True)
    value = xp.where(known, xp.log(total[:, 0]) - above[row, label], np.nan).astype(z.dtype, copy=False)
    p /= xp.where(known[:, None], total, np.nan)
    p[row, label] -= 1
    p /= max(1, y.size)
    return value.reshape(labels.shape), into(out, p.reshape(logits.shape))
