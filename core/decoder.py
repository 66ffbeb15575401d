"""The last step of the generative chain: the likelihood of clean data x_0 under p_θ(x_0|x_1) = N(mean, std²).

For 8-bit data the normal law is integrated over the cell of each value, which makes a probability; for other data its density
counts. Everything is float64 on the host.
"""

from typing import Any

import numpy as np

from ..kernels.arrays import to_numpy
from .exchange import Array, flat

VALUES = 256
DECODERS = ("discrete", "gaussian")
ON_GRID = 1e-3  # how far from a value x may lie, in cells: float32 rounding is 1e-5 of a cell


def gaussian_log_prob(x: Array, mean: Array, variance: Any) -> np.ndarray:
    """log N(x; mean, variance·I) of each sample, nats (B,). Eq: S0-E19, S1-E9, S2-E10, S4-E5.

    x (B, …); mean and variance broadcast to it. Raises ValueError for a variance that is not positive.
    """
    x, mean, variance = (np.asarray(to_numpy(v), np.float64) for v in (x, mean, variance))
    if not np.all(variance > 0):
        raise ValueError(f"variance must be positive, not {variance.min()}")
    terms = (x - mean) ** 2 / variance + np.log(2 * np.pi * variance)
    _like(terms, x)
    return -0.5 * flat(terms).sum(axis=1)


def discrete_log_prob(x: Array, mean: Array, variance: Any, values: int = VALUES) -> np.ndarray:
    """log P(x) of each sample, nats (B,): N(mean, variance) over the cells around ``values`` equally spaced numbers in [−1, 1].

        P(x) = ∏_i ∫_{δ₋(x_i)}^{δ₊(x_i)} N(y; mean_i, variance) dy,    δ± = x ± 1/255, open to ±∞ at x = ±1

    Over the 256 values of an element the probabilities sum to one. x (B, …) holds such values (:func:`alphabar.core.data.to_unit`
    makes them); mean and variance broadcast to it. Raises ValueError where x lies between the values. Eq: S1-E8, S0-E23.
    Source: Ho et al. 2020, Eq. 13.
    """
    if values < 2:
        raise ValueError(f"values must be at least 2, not {values}")
    x, mean, variance = (np.asarray(to_numpy(v), np.float64) for v in (x, mean, variance))
    if not np.all(variance > 0):
        raise ValueError(f"variance must be positive, not {variance.min()}")
    place = (x + 1) * ((values - 1) / 2)
    k = np.rint(place)
    if not np.all((np.abs(place - k) < ON_GRID) & (k >= 0) & (k < values)):
        raise ValueError(f"x must hold the {values} values 2k/{values - 1} - 1: 8-bit data in [-1, 1], without noise")
    half, std = 1 / (values - 1), np.sqrt(variance)
    x = 2 * half * k - 1
    low = np.where(k == 0, -np.inf, (x - half - mean) / std)
    high = np.where(k == values - 1, np.inf, (x + half - mean) / std)
    mass = log_normal_mass(low, high)
    _like(mass, x)
    return flat(mass).sum(axis=1)


def _like(terms: np.ndarray, x: np.ndarray) -> None:
    if terms.shape != x.shape or x.ndim < 1:
        raise ValueError(f"x must be (B, …), and mean and variance broadcast to its shape {x.shape}, not to {terms.shape}")


def log_normal_mass(low: Any, high: Any) -> np.ndarray:
    """ln(Φ(high) − Φ(low)) for low < high, Φ the standard normal distribution: right to the last digits in both tails."""
    from scipy.special import log_ndtr

    low, high = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
    right = low > 0  # where Φ is near 1, the mirrored interval keeps the digits
    low, high = np.where(right, -high, low), np.where(right, -low, high)
    top = log_ndtr(high)
    with np.errstate(divide="ignore"):
        return top + np.log(-np.expm1(log_ndtr(low) - top))
