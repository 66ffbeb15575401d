"""Gradients against finite differences: one direction tells all inputs at once."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .autograd import Tensor

Array = Any


def directional_derivatives(
    f: Callable[..., Tensor], inputs: list[np.ndarray], seed: int = 0, h: float = 1e-3
) -> tuple[float, float]:
    """(⟨u, Jv⟩ by differences of f, ⟨Jᵀu, v⟩ by the backward pass) for J the derivative of ``f(*tensors)`` at ``inputs``.

    v has the entries ±1/√n, each sign at random, so that all n numbers of all inputs weigh the same; u is normal. Jv is
    Richardson's combination of two central differences, (4·D(h/2) − D(h))/3, of error O(h⁴). inputs: float64 arrays.
    """
    if any(a.dtype != np.float64 for a in inputs):
        raise TypeError(f"inputs must be float64, not {[str(a.dtype) for a in inputs]}")
    rng = np.random.default_rng(seed)
    n = sum(a.size for a in inputs)
    v = [rng.choice([-1.0, 1.0], a.shape) / np.sqrt(n) for a in inputs]

    def value(s: float) -> Array:
        return f(*(Tensor(a + s * d) for a, d in zip(inputs, v, strict=True))).data.copy()

    def central(s: float) -> Array:
        return (value(s) - value(-s)) / (2 * s)

    tensors = [Tensor(a.copy(), needs_grad=True) for a in inputs]
    out = f(*tensors)
    u = rng.standard_normal(out.shape)
    out.backward(u)
    numeric = float((u * (4 * central(h / 2) - central(h))).sum() / 3)
    analytic = sum(float((t.grad * d).sum()) for t, d in zip(tensors, v, strict=True) if t.grad is not None)
    return numeric, analytic


def gradcheck(f: Callable[..., Tensor], *inputs: np.ndarray, seed: int = 0, h: float = 1e-3, tolerance: float = 1e-8) -> None:
    """Raise AssertionError unless the backward pass of ``f`` agrees with differences of f to ``tolerance``, relatively."""
    numeric, analytic = directional_derivatives(f, list(inputs), seed, h)
    if not abs(numeric - analytic) <= tolerance * max(abs(numeric), abs(analytic), 1.0):
        raise AssertionError(f"by differences {numeric!r}, by the backward pass {analytic!r}")
