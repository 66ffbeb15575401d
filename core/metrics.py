"""Figures of merit of samples: the Fréchet distance of normal laws, error per dimension, and how cost grows with steps."""

from typing import Any, NamedTuple

import numpy as np

from ..kernels.arrays import to_numpy
from .exchange import Array, flat


def frechet_distance(mean_1: Any, covariance_1: Any, mean_2: Any, covariance_2: Any) -> float:
    """‖μ1 − μ2‖² + tr(Σ1 + Σ2 − 2(Σ1Σ2)^½), the squared 2-Wasserstein distance of two normal laws. Eq: S2-C18.

    Means (d,), covariances (d, d) symmetric and positive semi-definite, singular ones too. FID is this for features of images.
    Raises ValueError where shapes do not match.
    """
    m1, m2 = (np.asarray(to_numpy(m), np.float64) for m in (mean_1, mean_2))
    c1, c2 = (np.asarray(to_numpy(c), np.float64) for c in (covariance_1, covariance_2))
    if m1.ndim != 1 or m2.shape != m1.shape or c1.shape != (m1.size, m1.size) or c2.shape != c1.shape:
        raise ValueError(
            f"means must be (d,) and covariances (d, d) of one d, not {m1.shape}, {c1.shape} and {m2.shape}, {c2.shape}"
        )
    values, vectors = np.linalg.eigh(c1)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ c2 @ root), 0)).sum()  # tr (Σ1Σ2)^½
    return float(max(np.sum((m1 - m2) ** 2) + np.trace(c1) + np.trace(c2) - 2 * overlap, 0.0))


def frechet_distance_of_samples(x: Array, y: Array) -> float:
    """:func:`frechet_distance` of the normal laws with the samples' means and (unbiased) covariances. Eq: S2-C18.

    x (n, d), y (m, d). Raises ValueError unless both hold at least two samples.
    """
    laws = []
    for name, samples in (("x", x), ("y", y)):
        a = np.asarray(to_numpy(samples), np.float64)
        if a.ndim != 2 or len(a) < 2:
            raise ValueError(f"{name} must have shape (n, d) with n >= 2, not {a.shape}")
        laws += [a.mean(axis=0), np.atleast_2d(np.cov(a, rowvar=False))]
    return frechet_distance(*laws)


def per_dimension_mse(x: Array, y: Array) -> np.ndarray:
    """mean (x − y)² over the elements of each sample (B,), float64: the reconstruction error of DDIM's Table 2. Eq: S2-T2.

    x, y (B, …) of one shape; ValueError if not.
    """
    a, b = (np.asarray(to_numpy(v), np.float64) for v in (x, y))
    if a.shape != b.shape or a.ndim < 1:
        raise ValueError(f"x and y must be (B, …) of one shape, not {a.shape} and {b.shape}")
    return flat((a - b) ** 2).mean(axis=1)


class LinearCost(NamedTuple):
    """cost ≈ intercept + slope·steps; ``r2`` is the share of the variance that the line explains."""

    intercept: float
    slope: float
    r2: float


def fit_linear_cost(steps: Any, cost: Any) -> LinearCost:
    """The least-squares line of ``cost`` (time, calls) over ``steps``. Eq: S2-C21, S2-F4.

    Raises ValueError unless there are at least two different numbers of steps, each with its cost.
    """
    x, y = (np.asarray(v, np.float64) for v in (steps, cost))
    if x.ndim != 1 or x.shape != y.shape or np.unique(x).size < 2:
        raise ValueError(f"steps and cost must be lists of one length with two different steps at least, not {x} and {y}")
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2))
    intercept = float(y.mean() - slope * x.mean())
    spread = float(np.sum((y - y.mean()) ** 2))
    left = float(np.sum((y - intercept - slope * x) ** 2))
    return LinearCost(intercept, slope, 1 - left / spread if spread > 0 else 1.0)
