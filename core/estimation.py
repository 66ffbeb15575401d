"""Fitting a normal law to points: maximum likelihood, the method of moments, pseudo-likelihood."""

from typing import Any, NamedTuple

import numpy as np

from ..kernels.arrays import to_numpy


class GaussianFit(NamedTuple):
    """A fitted normal law: floats for (n,) data, (d,) and (d, d) float64 for (n, d) data."""

    mean: Any
    covariance: Any


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def _points(x: Any, least: int) -> np.ndarray:
    a = np.asarray(to_numpy(x), np.float64)
    if a.ndim not in (1, 2) or len(a) < least or a.size == 0:
        raise ValueError(f"x must be (n,) or (n, d) with n >= {least}, not of shape {a.shape}")
    if not np.isfinite(a).all():
        raise ValueError("x must be finite")
    return a if a.ndim == 2 else a[:, None]


def _fit(x: Any, mean: np.ndarray, covariance: np.ndarray) -> GaussianFit:
    if np.ndim(x) == 1:
        return GaussianFit(float(mean[0]), float(covariance[0, 0]))
    return GaussianFit(mean, covariance)


def fit_gaussian_mle(x: Any, unbiased: bool = False) -> GaussianFit:
    """The maximum-likelihood normal law: μ = mean, Σ = mean of (x − μ)(x − μ)ᵀ. Eq: S4-E51, S4-E52, S4-C8.

    That Σ is biased by (n − 1)/n; ``unbiased=True`` divides by n − 1 instead of n, which is not the maximiser.
    """
    a = _points(x, 2 if unbiased else 1)
    mean = a.mean(axis=0)
    apart = a - mean
    return _fit(x, mean, apart.T @ apart / (len(a) - unbiased))


def fit_gaussian_moments(x: Any) -> GaussianFit:
    """The normal law with the data's first two moments, Σ = E[xxᵀ] − E[x]E[x]ᵀ: the method of moments. Eq: S4-C8.

    The moments are taken about the first point, which changes nothing but the digits lost. For this family the answer is that of
    :func:`fit_gaussian_mle`.
    """
    a = _points(x, 1)
    about = a - a[0]
    first, second = about.mean(axis=0), about.T @ about / len(a)
    return _fit(x, a[0] + first, second - np.outer(first, first))


def pseudo_log_likelihood(x: Any, mean: Any, covariance: Any) -> np.ndarray:
    """log PL(x) = Σ_i log p(x_i | x_{−i}) of N(mean, covariance), (n,) for x (n, d). Eq: S4-C8.

    With P = covariance⁻¹, x_i given the others is normal with mean x_i − (P(x − mean))_i/P_ii and variance 1/P_ii.
    """
    a, cov = _points(x, 1), np.atleast_2d(np.asarray(covariance, np.float64))
    d = a.shape[1]
    if cov.shape != (d, d):
        raise ValueError(f"covariance must have shape {(d, d)}, not {cov.shape}")
    try:
        np.linalg.cholesky(cov)
    except np.linalg.LinAlgError as e:
        raise ValueError("covariance must be positive definite") from e
    P = np.linalg.inv(cov)
    precision = np.diag(P)
    pull = (a - np.asarray(mean, np.float64)) @ P
    return 0.5 * (np.log(precision / (2 * np.pi)) - pull**2 / precision).sum(axis=1)


def fit_correlation(x: Any) -> Estimate:
    """The ρ in (−1, 1) that maximises Σ log PL of N(0, [[1, ρ], [ρ, 1]]) over points x (n, 2), and its standard error. Eq: S4-C8.

    The slope of the mean of log PL is −2g/(1 − ρ²)², g = ρ³ − cρ² + (m − 1)ρ − c with m = mean(x_1² + x_2²), c = mean(x_1·x_2);
    the error is that of the sandwich formula, sd(g)/(√n·g'). Standardise data of other means and variances first.
    """
    a = _points(x, 2)
    if a.shape[1] != 2:
        raise ValueError(f"x must have shape (n, 2), not {np.shape(x)}")
    squares, products = (a**2).sum(axis=1), a[:, 0] * a[:, 1]
    m, c = squares.mean(), products.mean()
    if not abs(2 * c) < m:
        raise ValueError("x lies on a line x_1 = ±x_2: the maximiser would be ±1")
    roots = np.roots([1, -c, m - 1, -c])
    real = roots.real[(abs(roots.imag) < 1e-7) & (abs(roots.real) < 1)]
    value = max(real, key=lambda r: -np.log(1 - r**2) - (m * (1 + r**2) - 4 * r * c) / (2 * (1 - r**2)))
    each = value**3 - products * value**2 + (squares - 1) * value - products
    return Estimate(float(value), float(each.std() / np.sqrt(len(a)) / (3 * value**2 - 2 * c * value + m - 1)))
