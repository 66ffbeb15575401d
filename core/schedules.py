"""Noise schedules: β_t, α_t = 1 − β_t and ᾱ_t = α_1…α_t as float64 tables of length T+1 whose index 0 is clean data.

Time counts t = 1..T as in the papers; ᾱ_0 = 1. The signal level is √ᾱ_t and the noise level √(1−ᾱ_t).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

SPACINGS = ("leading", "linspace", "trailing", "quadratic")
LARGE_GAP = 0.01  # nats per dimension between q(x_T) and the prior, from which a builder warns


@dataclass(frozen=True, eq=False)
class Schedule:
    """A noise schedule. Eq: S0-E17, S0-E18, S1-E3, S3-E2, S3-E7.

    ``beta`` has length T+1 with beta[0] = 0. Derived, all float64 of the same length: ``alpha`` = 1 − β, ``alpha_bar`` = ∏ α,
    ``signal`` = √ᾱ, ``noise`` = √(1−ᾱ), ``beta_tilde`` = (1−ᾱ_{t−1})/(1−ᾱ_t)·β_t (a variance; 0 at t = 1). Raises ValueError
    unless 0 < β_t < 1 for t = 1..T; β_T = 1 is taken too, a chain that ends in pure noise (zero terminal signal).
    """

    beta: np.ndarray
    name: str = "custom"

    def __post_init__(self) -> None:
        beta = np.array(self.beta, np.float64)
        if beta.ndim != 1 or beta.size < 2 or beta[0] != 0:
            raise ValueError(f"beta must have shape (T+1,) with T >= 1 and beta[0] = 0, not shape {beta.shape}")
        bad = ~((beta[1:] > 0) & (beta[1:] < 1))
        bad[-1] &= beta[-1] != 1
        if bad.any():
            t = 1 + int(np.flatnonzero(bad)[0])
            raise ValueError(f"beta must lie in (0, 1), but beta[{t}] = {beta[t]}")
        beta.setflags(write=False)
        object.__setattr__(self, "beta", beta)

    @property
    def T(self) -> int:
        """The number of steps of the forward process."""
        return self.beta.size - 1

    @cached_property
    def alpha(self) -> np.ndarray:
        return _frozen(1 - self.beta)

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        return _frozen(np.cumprod(self.alpha))

    @cached_property
    def signal(self) -> np.ndarray:
        return _frozen(np.sqrt(self.alpha_bar))

    @cached_property
    def noise(self) -> np.ndarray:
        return _frozen(np.sqrt(self.noise_variance))

    @cached_property
    def noise_variance(self) -> np.ndarray:
        """1 − ᾱ_t, summed in logarithms, which keeps the digits that 1 − ᾱ loses at small t."""
        with np.errstate(divide="ignore"):
            return _frozen(-np.expm1(np.cumsum(np.log1p(-self.beta))))

    @cached_property
    def beta_tilde(self) -> np.ndarray:
        rest = self.noise_variance
        return _frozen(np.r_[0.0, rest[:-1] / rest[1:] * self.beta[1:]])

    @cached_property
    def sigma_bar(self) -> np.ndarray:
        """σ̄_t = √((1−ᾱ_t)/ᾱ_t), the noise level of x/√ᾱ: the time variable of the probability-flow ODE. Eq: S2-E14."""
        with np.errstate(divide="ignore"):
            return _frozen(self.noise / self.signal)

    def levels(self, t: Any) -> tuple[np.ndarray, np.ndarray]:
        """(signal, noise) at times t in [0, T], float64; between whole times σ̄ is interpolated linearly in t."""
        t = np.asarray(t, np.float64)
        if not np.all((t >= 0) & (t <= self.T)):
            raise ValueError(f"t must be in 0..{self.T}, not {t.min()}..{t.max()}")
        whole = np.rint(t).astype(np.int64)
        signal, noise = self.signal[whole], self.noise[whole]
        between = t != whole
        if np.any(between):
            sigma = np.interp(t, np.arange(self.T + 1), self.sigma_bar)
            between_signal = 1 / np.sqrt(1 + sigma**2)
            signal, noise = np.where(between, between_signal, signal), np.where(between, sigma * between_signal, noise)
        return signal, noise

    def time(self, sigma: Any) -> np.ndarray:
        """The time at which σ̄ = sigma: the inverse of :meth:`levels`."""
        sigma = np.asarray(sigma, np.float64)
        if not np.all((sigma >= 0) & (sigma <= self.sigma_bar[-1])):
            raise ValueError(f"sigma must be in 0..{self.sigma_bar[-1]}, not {sigma.min()}..{sigma.max()}")
        return np.interp(sigma, self.sigma_bar, np.arange(self.T + 1.0))

    def __repr__(self) -> str:
        return f"Schedule({self.name}, alpha_bar[{self.T}]={self.alpha_bar[-1]:.4g})"


def _frozen(a: np.ndarray) -> np.ndarray:
    a.setflags(write=False)
    return a


class PriorGap(NamedTuple):
    """How far q(x_T) is from N(0, I)."""

    signal: float  # √ᾱ_T, the share of the data that is left in x_T
    kl: float  # KL(q(x_T|x_0) ‖ N(0, I)), nats per dimension
    bits: float  # the same in bits per dimension


def prior_gap(s: Schedule, second_moment: float = 1.0) -> PriorGap:
    """The gap between q(x_T|x_0) and the prior: KL = ½(ᾱ_T·E[x_0²] − ᾱ_T − ln(1−ᾱ_T)) per dimension. Eq: S4-E22, S0-C12, S1-C2.

    ``second_moment`` is E[x_0²] of one element of the data.
    """
    last = float(s.alpha_bar[-1])
    kl = 0.5 * (last * second_moment - last - np.log1p(-last))
    return PriorGap(float(s.signal[-1]), float(kl), float(kl / np.log(2)))


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


def _steps(T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, (int, np.integer)):
        raise TypeError(f"T must be an int, not {type(T).__name__}")
    if T < 1:
        raise ValueError(f"T must be at least 1, not {T}")
    return int(T)


def _factor(T: int, rescale: bool) -> float:
    return 1000 / T if rescale else 1.0


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = False) -> Schedule:
    """β_t linear from ``beta_start`` to ``beta_end``. Eq: S1-E23.

    The two ends belong to T = 1000. For another T, ``rescale=True`` multiplies every β by 1000/T, which keeps ᾱ_T near its value
    there; without it ᾱ_T changes, with a warning where the gap to the prior grows large. Source: Ho et al. 2020, section 4.
    """
    return _build(np.linspace(beta_start, beta_end, _steps(T)) * _factor(T, rescale), "linear")


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, rescale: bool = False) -> Schedule:
    """√β_t linear between the roots of the two ends; ``rescale`` as in :func:`linear`. Source: Rombach et al. 2022."""
    return _build(np.linspace(beta_start**0.5, beta_end**0.5, _steps(T)) ** 2 * _factor(T, rescale), "scaled_linear")


def sigmoid(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, rescale: bool = False) -> Schedule:
    """β_t = beta_start + (beta_end − beta_start)/(1 + e^{−u}), u linear from −6 to 6; ``rescale`` as in :func:`linear`."""
    u = np.linspace(-6, 6, _steps(T))
    return _build((beta_start + (beta_end - beta_start) / (1 + np.exp(-u))) * _factor(T, rescale), "sigmoid")


def cosine(T: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """β_t = min(1 − f(t)/f(t−1), max_beta), f(t) = cos²((t/T + offset)/(1 + offset)·π/2). Source: Nichol & Dhariwal 2021."""
    f = np.cos((np.arange(_steps(T) + 1) / T + offset) / (1 + offset) * np.pi / 2) ** 2
    return _build(np.minimum(1 - f[1:] / f[:-1], max_beta), "cosine")


def zero_terminal_snr(s: Schedule) -> Schedule:
    """``s`` with √ᾱ shifted and stretched so that ᾱ_T = 0 and ᾱ_1 stays. Source: Lin et al. 2024, Algorithm 1.

    At t = T the noise tells nothing about x_0, so samplers need a model that predicts x0 or v there.
    """
    root = s.signal[1:]
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    return Schedule(np.r_[0.0, 1 - alpha_bar / np.r_[1.0, alpha_bar[:-1]]], f"zero_terminal_snr({s.name})")


def timesteps(T: int, steps: int = 50, spacing: str = "leading") -> np.ndarray:
    """``steps`` of the times 1..T, ascending and unique (int64): the sub-sequence τ of a sampler. Eq: S0-C20, S2-C16, S4-E43.

    leading    k·⌊T/S⌋ + 1, k = 0..S−1 (starts below T: x_T is taken for a sample of a smaller time)
    linspace   round(linspace(0, T−1, S)) + 1, both ends kept
    trailing   round(k·T/S), k = 1..S: ends at T
    quadratic  max(⌊T·i²/S²⌋, τ_{i−1} + 1), i = 1..S: dense near the data, ends at T
    """
    T = _steps(T)
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise TypeError(f"steps must be an int, not {type(steps).__name__}")
    if not 1 <= steps <= T:
        raise ValueError(f"steps must be in 1..{T} (T), not {steps}")
    k = np.arange(steps, dtype=np.int64)
    if spacing == "leading":
        return k * (T // steps) + 1
    if spacing == "linspace":
        return np.rint(np.linspace(0, T - 1, steps)).astype(np.int64) + 1
    if spacing == "trailing":
        return np.rint((k + 1) * (T / steps)).astype(np.int64)
    if spacing == "quadratic":
        floor = T * (k + 1) ** 2 // int(steps) ** 2
        return np.maximum.accumulate(np.maximum(floor - k, 1)) + k
    raise ValueError(f"spacing must be one of {SPACINGS}, not {spacing!r}")
