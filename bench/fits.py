"""How a cost grows: a straight line or a power law through measured points, with the share of the variance that it explains."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Line:
    """y = intercept + slope·x."""

    intercept: float
    slope: float
    r2: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.intercept + self.slope * x


@dataclass(frozen=True)
class Power:
    """y = factor·x^exponent; r2 is that of the logarithms."""

    factor: float
    exponent: float
    r2: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.factor * x**self.exponent


def _least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) < 2:
        raise ValueError(f"a fit needs two different x or more and a y for each, not {x.tolist()} and {y.tolist()}")
    slope, intercept = np.polyfit(x, y, 1)
    rest, spread = np.sum((y - intercept - slope * x) ** 2), np.sum((y - y.mean()) ** 2)
    return float(intercept), float(slope), 1.0 if spread == 0 else float(1 - rest / spread)


def line(x: Sequence[float], y: Sequence[float]) -> Line:
    """The least squares line. ValueError for fewer than two different x."""
    return Line(*_least_squares(np.asarray(x, float), np.asarray(y, float)))


def power(x: Sequence[float], y: Sequence[float]) -> Power:
    """The power law that is the least squares line of the logarithms. ValueError where a value is not positive."""
    if min(*x, *y) <= 0:
        raise ValueError(f"a power law needs positive values, not {list(x)} and {list(y)}")
    intercept, slope, r2 = _least_squares(np.log(x), np.log(y))
    return Power(float(np.exp(intercept)), slope, r2)


def serial_share(threads: Sequence[int], seconds: Sequence[float]) -> float:
    """s of Amdahl's law T(n) = T(1)·(s + (1 − s)/n), the least squares one: the share of the work that one thread does alone.

    The first of ``threads`` must be 1. Below 0 where more threads gain more than their number, as larger caches may do.
    """
    n, y = np.asarray(threads, float), np.asarray(seconds, float)
    if n.shape != y.shape or len(n) < 2 or n[0] != 1 or np.any(n[1:] <= 1):
        raise ValueError(f"threads must start with 1 and go on with more, not {list(threads)}")
    gain, left = 1 - 1 / n[1:], y[1:] / y[0] - 1 / n[1:]
    return float(gain @ left / (gain @ gain))
