"""The softmax over the last axis and its gradient, by definition."""

from typing import Any

from ..arrays import array_module
from ..buffers import into

Array = Any


def softmax(x: Array, out: Array | None = None) -> Array:
    """y = e^(x − max)/Σ e^(x − max) over the last axis; x (…, K), −inf for a state of probability 0.

    A row without a finite largest element, or with a NaN, is NaN.
    """
    e = array_module(x).exp(x - x.max(axis=-1, keepdims=True))
    return into(out, e / e.sum(axis=-1, keepdims=True))


def softmax_backward(dy: Array, y: Array, out: Array | None = None) -> Array:
    """dx = y·(dy − Σ y·dy), the sum over the last axis; y is the result of :func:`softmax`."""
    return into(out, y * (dy - (y * dy).sum(axis=-1, keepdims=True)))
