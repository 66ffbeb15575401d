"""Rates of discrete diffusion: β_t, the chance that a step forgets its state, as float64 tables of length T+1 with β_0 = 0.

The uniform and the absorbing law of :mod:`alphabar.core.transitions` keep ᾱ_t = ∏_{s≤t} (1 − β_s) of x_0; β_T = 1 is allowed,
where nothing is left. To the other laws β_t is a width or a time, and may be above 1.
"""

from collections.abc import Sequence

import numpy as np

from .levels import frozen, whole_steps


def linear(T: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """β_1..β_T linear from ``start`` to ``end``. Source: Austin et al. 2021 (1e-4 to 0.02 for the discretised Gaussian)."""
    return checked(np.r_[0.0, np.linspace(start, end, whole_steps(T))])


def cosine(T: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> np.ndarray:
    """β_t = min(1 − f(t)/f(t−1), max_beta), f(t) = cos((t/T + offset)/(1 + offset)·π/2): the cosine, not its square.

    So ᾱ_t is the signal level √ᾱ_t of the Gaussian schedule (:func:`schedules.cosine`), whose own β serve here as well. Source:
    Hoogeboom et al. 2021, section 4; Austin et al. 2021.
    """
    f = np.cos((np.arange(whole_steps(T) + 1) / T + offset) / (1 + offset) * np.pi / 2)
    return checked(np.r_[0.0, np.minimum(1 - f[1:] / f[:-1], max_beta)])


def reciprocal(T: int = 1000) -> np.ndarray:
    """β_t = 1/(T − t + 1), so that ᾱ_t = 1 − t/T falls linearly to 0. Source: Sohl-Dickstein et al. 2015; Austin et al. 2021."""
    return checked(np.r_[0.0, 1 / np.arange(whole_steps(T), 0, -1)])


def from_alpha_bar(alpha_bar: Sequence[float] | np.ndarray) -> np.ndarray:
    """β_t = 1 − ᾱ_t/ᾱ_{t−1} of ᾱ_0 = 1, …, ᾱ_T: T+1 values that do not rise, positive before T."""
    a = np.asarray(alpha_bar, np.float64)
    if a.ndim != 1 or a.size < 2 or a[0] != 1:
        raise ValueError(f"alpha_bar must be a list of T + 1 >= 2 values that starts with 1, not {alpha_bar!r}")
    if not (np.all(np.diff(a) <= 0) and np.all(a[:-1] > 0) and a[-1] >= 0):
        raise ValueError("alpha_bar must not rise, and must be positive before T")
    return checked(np.r_[0.0, (a[:-1] - a[1:]) / a[:-1]])


def checked(beta: Sequence[float] | np.ndarray, probability: bool = True) -> np.ndarray:
    """``beta`` as a read-only float64 table of length T+1; ValueError unless β_0 = 0 and every β_t is finite and not negative.

    A ``probability`` must also be below 1, but for t = T, where it may be 1.
    """
    b = np.array(beta, np.float64)
    if b.ndim != 1 or b.size < 2 or b[0] != 0:
        raise ValueError(f"beta must have length T + 1 >= 2 and beta[0] = 0, not be {beta!r}")
    last = np.arange(b.size) == b.size - 1
    good = (b >= 0) & ((b < 1) | (last & (b == 1))) if probability else (b >= 0) & (b < np.inf)
    if not good.all():
        t = int(np.flatnonzero(~good)[0])
        wanted = f"in 0..1, and below 1 before T = {b.size - 1}" if probability else "finite and not negative"
        raise ValueError(f"beta[{t}] must be {wanted}, not {b[t]}")
    return frozen(b)
