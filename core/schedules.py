"""Noise schedules: β_t, α_t = 1 − β_t and ᾱ_t = α_1…α_t as float64 tables of length T+1 whose index 0 is clean data; ladders σ_t.

Time counts t = 1..T as in the papers; ᾱ_0 = 1. The signal level is √ᾱ_t and the noise level √(1−ᾱ_t).
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .levels import SPACINGS, Ladder, Levels, Schedule, timesteps, whole_steps

__all__ = [
    "SPACINGS",
    "Ladder",
    "Levels",
    "PriorGap",
    "Schedule",
    "cosine",
    "from_betas",
    "from_sigmas",
    "geometric",
    "linear",
    "prior_gap",
    "scaled_linear",
    "sigmoid",
    "sqrt",
    "timesteps",
    "zero_terminal_snr",
]

LARGE_GAP = 0.01  # nats per dimension between q(x_T) and the prior, from which a builder warns


class PriorGap(NamedTuple):
    """How far q(x_T) is from N(0, I)."""

    signal: float  # √ᾱ_T, the share of the data that is left in x_T
    kl: float  # KL(q(x_T|x_0) ‖ N(0, I)), nats per dimension
    bits: float  # the same in bits per dimension


def prior_gap(s: Schedule, second_moment: float = 1.0) -> PriorGap:
    """The gap between q(x_T|x_0) and the prior: KL = ½(ᾱ_T·E[x_0²] − ᾱ_T − ln(1−ᾱ_T)) per dimension. Eq: S4-E22, S0-C12, S1-C2.

    ``second_moment`` is E[x_0²] of one element of the data.
    """
    _needs_schedule(s)
    last = float(s.alpha_bar[-1])
    kl = 0.5 * (last * second_moment - last - np.log1p(-last))
    return PriorGap(float(s.signal[-1]), float(kl), float(kl / np.log(2)))


def _needs_schedule(s: Schedule) -> None:
    if not isinstance(s, Schedule):
        raise TypeError(f"s must be a Schedule (schedules.linear() for one), not {type(s).__name__}")


def from_betas(betas: Sequence[float] | np.ndarray, name: str = "custom") -> Schedule:
    """The schedule with β_1..β_T = ``betas`` (T values in (0, 1)). Eq: S0-E17.

    Warns (UserWarning) when ᾱ_T is so large that x_T is far from the N(0, I) that samplers start from.
    """
    return _build(betas, name)


def _build(betas: Sequence[float] | np.ndarray, name: str) -> Schedule:
    values = np.asarray(betas, np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"betas must be a list of T >= 1 values, not an array of shape {values.shape}")
    s = Schedule(np.r_[0.0, values], name)
    gap = prior_gap(s)
    if gap.kl > LARGE_GAP:
        warnings.warn(
            f"{name}: alpha_bar[{s.T}] = {s.alpha_bar[-1]:.3g}, so x_T keeps {gap.signal:.2g} of the data, {gap.kl:.2g} nats "
            "per dimension from the prior N(0, I); use more steps, larger betas or rescale=True",
            UserWarning,
            stacklevel=3,
        )
    return s


def _factor(T: int, rescale: bool) -> float:
    return 1000 / T if rescale else 1.0


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = False) -> Schedule:
    """β_t linear from ``beta_start`` to ``beta_end``. Eq: S1-E23.

    The two ends belong to T = 1000. For another T, ``rescale=True`` multiplies every β by 1000/T, which keeps ᾱ_T near its value
    there; without it ᾱ_T changes, with a warning where the gap to the prior grows large. Source: Ho et al. 2020, section 4.
    """
    return _build(np.linspace(beta_start, beta_end, whole_steps(T)) * _factor(T, rescale), "linear")


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, rescale: bool = False) -> Schedule:
    """√β_t linear between the roots of the two ends; ``rescale`` as in :func:`linear`. Source: Rombach et al. 2022."""
    return _build(np.linspace(beta_start**0.5, beta_end**0.5, whole_steps(T)) ** 2 * _factor(T, rescale), "scaled_linear")


def sigmoid(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = False) -> Schedule:
    """β_t = beta_start + (beta_end − beta_start)/(1 + e^{−u}), u linear from −6 to 6; ``rescale`` as in :func:`linear`."""
    u = np.linspace(-6, 6, whole_steps(T))
    return _build((beta_start + (beta_end - beta_start) / (1 + np.exp(-u))) * _factor(T, rescale), "sigmoid")


def cosine(T: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """β_t = min(1 − f(t)/f(t−1), max_beta), f(t) = cos²((t/T + offset)/(1 + offset)·π/2). Source: Nichol & Dhariwal 2021."""
    f = np.cos((np.arange(whole_steps(T) + 1) / T + offset) / (1 + offset) * np.pi / 2) ** 2
    return _build(np.minimum(1 - f[1:] / f[:-1], max_beta), "cosine")


def sqrt(T: int = 1000, s: float = 1e-4, max_beta: float = 0.999) -> Schedule:
    """ᾱ_t = 1 − √(t/T + s), β_t at most max_beta, for diffusion of embeddings: much noise from the first step on.

    The formula is negative at t = T, where β is max_beta. s in [0, 1). The paper has T = 2000; its code divides ᾱ by 1 − √s, so
    that ᾱ_0 = 1 belongs to the formula. Eq: L7. Source: Li et al. 2022 (Diffusion-LM), appendix A.
    """
    if not 0 <= s < 1:
        raise ValueError(f"s must be in [0, 1), not {s}")
    alpha_bar = np.r_[1.0, np.maximum(1 - np.sqrt(np.arange(1, whole_steps(T) + 1) / T + s), 0)]
    ratio = np.divide(alpha_bar[1:], alpha_bar[:-1], out=np.zeros(T), where=alpha_bar[:-1] > 0)
    return _build(np.minimum(1 - ratio, max_beta), "sqrt")


def zero_terminal_snr(s: Schedule) -> Schedule:
    """``s`` with √ᾱ shifted and stretched so that ᾱ_T = 0 and ᾱ_1 stays. Source: Lin et al. 2024, Algorithm 1.

    At t = T the noise tells nothing about x_0, so samplers need a model that predicts x0 or v there.
    """
    _needs_schedule(s)
    root = s.signal[1:]
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    return Schedule(np.r_[0.0, 1 - alpha_bar / np.r_[1.0, alpha_bar[:-1]]], f"zero_terminal_snr({s.name})")


def from_sigmas(sigmas: Sequence[float] | np.ndarray, name: str = "custom") -> Ladder:
    """The ladder of these noise levels, given in either order: all positive, no two equal. Eq: S0-E9, S4-E63."""
    values = np.asarray(sigmas, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.all(values > 0):
        raise ValueError(f"sigmas must be a list of positive numbers, not {sigmas!r}")
    return Ladder(np.r_[0.0, values if values[0] <= values[-1] else values[::-1]], name)


def geometric(sigma_min: float = 0.01, sigma_max: float = 1.0, T: int = 10) -> Ladder:
    """The ladder of T noise levels with a constant ratio from ``sigma_min`` to ``sigma_max``. Eq: S0-C9, S4-E63.

    The defaults are those of Song & Ermon 2019, section 5; for images in [−1, 1] a larger σ_max spans the data (see
    :func:`alphabar.core.langevin.ncsnv2_settings`).
    """
    if not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    if whole_steps(T) < 2:
        raise ValueError(f"T must be at least 2, for both ends are levels (from_sigmas takes one alone), not {T}")
    return Ladder(np.r_[0.0, np.geomspace(sigma_min, sigma_max, T)], "geometric")
