"""Energy-based models p(x) = e^{−f(x)}/Z: the normaliser by quadrature, and the score, which does not need it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..kernels.arrays import array_module, native, restore
from .exchange import Array

Energy = Callable[[np.ndarray], np.ndarray]
RULES = ("gauss", "trapezoid")


def _rule(low: float, high: float, points: int, rule: str) -> tuple[np.ndarray, np.ndarray]:
    if rule == "gauss":
        x, w = np.polynomial.legendre.leggauss(points)
        return low + (high - low) / 2 * (x + 1), w * (high - low) / 2
    w = np.full(points, (high - low) / (points - 1))
    w[[0, -1]] /= 2
    return np.linspace(low, high, points), w


def log_partition(energy: Energy, box: Sequence[tuple[float, float]], points: int = 400, rule: str = "trapezoid") -> float:
    """ln Z, Z = ∫ e^{−f(x)} dx over ``box``, by a product rule of ``points`` nodes an axis. Eq: S4-E53.

    energy: f(x (N, d)) -> (N,). box: (low, high) for each of the d = 1 or 2 axes; what lies outside is not counted, so it must
    hold all of the mass. rule: "trapezoid" (converges exponentially where e^{−f} has died away at the ends) or "gauss"
    (Gauss–Legendre). Raises ValueError for another d, an empty box or an f of the wrong shape.
    """
    sides = [(float(low), float(high)) for low, high in box]
    if len(sides) not in (1, 2) or any(not low < high for low, high in sides):
        raise ValueError(f"box must be one or two pairs (low, high) with low < high, not {box}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, not {rule!r}")
    if points < 2:
        raise ValueError(f"points must be at least 2, not {points}")
    nodes, weights = zip(*(_rule(low, high, points, rule) for low, high in sides), strict=True)
    x = np.stack(np.meshgrid(*nodes, indexing="ij"), axis=-1).reshape(-1, len(sides))
    w = weights[0] if len(sides) == 1 else np.multiply.outer(*weights).reshape(-1)
    f = np.asarray(energy(x), np.float64)
    if f.shape != (len(x),):
        raise ValueError(f"energy must return shape {(len(x),)} for x of shape {x.shape}, not {f.shape}")
    least = f.min()
    return float(np.log(np.sum(w * np.exp(least - f))) - least)


def quadratic_log_partition(A: Any) -> float:
    """ln Z = ½(d·ln 2π − ln|A|) of f = ½(x − μ)ᵀA(x − μ), A (d, d) positive definite. Eq: S4-E53."""
    a = np.asarray(A, np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not np.allclose(a, a.T, rtol=1e-12, atol=0):
        raise ValueError(f"A must be a symmetric matrix (d, d), not {a.tolist()}")
    try:
        root = np.linalg.cholesky(a)
    except np.linalg.LinAlgError as e:
        raise ValueError("A must be positive definite") from e
    return float(0.5 * len(a) * np.log(2 * np.pi) - np.log(np.diag(root)).sum())


def ebm_log_prob(energy: Callable[[Array], Array], x: Array, log_z: float) -> Array:
    """log p(x) = −f(x) − ln Z (B,), nats. Eq: S4-E54."""
    return -energy(x) - log_z


def ebm_score(
    x: Array, gradient: Callable[[Array], Array] | None = None, vjp: Callable[[Array, Array], Array] | None = None
) -> Array:
    """∇ log p(x) = −∇f(x), like x: Z drops out. Eq: S4-E55, S4-C10.

    Give one of ``gradient(x)`` = ∇f(x) and ``vjp(x, u)`` = uᵀ(∂f/∂x) for f(x (B, …)) -> (B,), called once with u = 1 (B,).
    Raises TypeError for none or both, ValueError for an answer that is not shaped like x.
    """
    if (gradient is None) == (vjp is None):
        raise TypeError("give one of gradient and vjp")
    if gradient is not None:
        slope = gradient(x)
    elif vjp is not None:
        a = native(x)
        slope = vjp(x, restore(array_module(a).ones(a.shape[0], a.dtype), x))
    if tuple(slope.shape) != tuple(x.shape):
        raise ValueError(f"the gradient must have the shape of x, {tuple(x.shape)}, not {tuple(slope.shape)}")
    return -slope
