"""Categorical laws in log space: arrays (…, K) of log-probabilities, in which an exact zero is −inf. Nothing is added to a log.

All functions take and return NumPy or CuPy arrays or arrays of any library with ``__dlpack__``, in their own float dtype.
"""

from typing import Any

import numpy as np

from ..kernels.arrays import array_module, is_native
from .exchange import Array, exchanged


def log(p: Array) -> Array:
    """ln p with ln 0 = −inf and no warning."""
    with np.errstate(divide="ignore"):
        return array_module(p).log(p)


def shift(log_w: Array) -> Array:
    """The largest of each row (…, 1), 0 where all are −inf: what may be taken off before an exponential."""
    xp = array_module(log_w)
    top = log_w.max(axis=-1, keepdims=True)
    return xp.where(top == -np.inf, xp.zeros_like(top), top)


def log_sum(log_w: Array) -> Array:
    """ln Σ_k e^{log_w_k} over the last axis, kept as (…, 1); −inf where all are."""
    top = shift(log_w)
    return top + log(array_module(log_w).exp(log_w - top).sum(axis=-1, keepdims=True))


def normalised(log_w: Array) -> Array:
    """ln of w/Σw over the last axis; a row of −inf alone stays."""
    xp = array_module(log_w)
    below = log_w - shift(log_w)
    total = log(xp.exp(below).sum(axis=-1, keepdims=True))
    return below - xp.where(total == -np.inf, xp.zeros_like(total), total)


@exchanged
def log_softmax(logits: Array) -> Array:
    """ln p_k = logits_k − ln Σ_j e^{logits_j} over the last axis. A logit of −inf means probability 0; a row of it stays."""
    _check(logits, "logits")
    return normalised(logits)


@exchanged
def log_prob(x: Array, log_p: Array) -> Array:
    """ln C(x|p) = ln ∏_{k=1}^K p_k^{[x=k]} = ln p_x. Eq: S4-E24.

    x (…) integers in 0..K−1 (on a GPU not checked), log_p (…, K) or (K,) -> (…).
    """
    _check(log_p, "log_p")
    x = states(x, log_p.shape[-1], "x")
    xp = array_module(log_p)
    if log_p.ndim == 1:
        return log_p[x]
    if log_p.shape[:-1] != x.shape:
        raise ValueError(f"log_p must have shape {(*x.shape, 'K')} to go with x, not {log_p.shape}")
    return xp.take_along_axis(log_p, x[..., None].astype(np.int64), axis=-1)[..., 0]


@exchanged
def kl(log_q: Array, log_p: Array) -> Array:
    """KL(q‖p) = Σ_k q_k·(ln q_k − ln p_k) over the last axis, nats; 0·ln 0 = 0, and inf where p_k = 0 < q_k. Eq: S4-E29."""
    _check(log_q, "log_q")
    _check(log_p, "log_p")
    if log_p.shape[-1] != log_q.shape[-1]:
        raise ValueError(f"log_p must have {log_q.shape[-1]} states like log_q, not {log_p.shape[-1]}")
    xp = array_module(log_q)
    gone = log_q == -np.inf
    ratio = xp.where(gone, 0, log_q) - xp.where(gone, 0, log_p)
    return (xp.exp(log_q) * ratio).sum(axis=-1)


@exchanged
def entropy(log_p: Array) -> Array:
    """H(p) = −Σ_k p_k·ln p_k over the last axis, nats; 0·ln 0 = 0."""
    _check(log_p, "log_p")
    xp = array_module(log_p)
    return -(xp.exp(log_p) * xp.where(log_p == -np.inf, 0, log_p)).sum(axis=-1)


def states(x: Any, K: int, name: str, axes: int = 0) -> Array:
    """``x`` checked: an array of integers in 0..K−1 (on a GPU the values are not read) with at least so many axes."""
    if not is_native(x) or x.dtype.kind not in "iu" or x.ndim < axes:
        given = f"{x.dtype} of shape {x.shape}" if is_native(x) else type(x).__name__
        raise TypeError(f"{name} must be an integer array{' (B, …)' if axes else ''}, not {given}")
    if isinstance(x, np.ndarray) and x.size and not (x.min() >= 0 and x.max() < K):
        raise ValueError(f"{name} must be in 0..{K - 1}, not {x.min()}..{x.max()}")
    return x


def _check(a: Any, name: str) -> None:
    if not is_native(a) or a.dtype.kind != "f" or a.ndim < 1 or a.shape[-1] < 1:
        raise TypeError(f"{name} must be a float array (…, K)")
