"""The levels of a Gaussian process x_t = a(t)·x0 + n(t)·ε: what every schedule, ladder and SDE is, and all that samplers need.

Time runs from clean data, t = 0 with a = 1 and n = 0, to t = T. Two kinds are tables over t = 0, 1, …, T: a :class:`Schedule`
keeps the variance of unit-variance data (VP: a² + n² = 1), a :class:`Ladder` only adds noise (VE: a = 1). The SDEs of
:mod:`alphabar.core.sde` are the continuous ones.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

SPACINGS = ("leading", "linspace", "trailing", "quadratic")


class Levels(ABC):
    """A process x_t = signal·x0 + noise·ε on t in [0, T]. ``prior_std`` is the deviation of the prior that x_T is drawn from."""

    name: str
    T: float
    prior_std: float
    t_min: float  # the smallest time that a sampler asks the model about, unless given a grid

    @abstractmethod
    def levels(self, t: Any) -> tuple[np.ndarray, np.ndarray]:
        """(signal, noise) at times t in [0, T], float64 of the shape of t."""

    @abstractmethod
    def time(self, sigma: Any) -> np.ndarray:
        """The time at which σ̄ = noise/signal is ``sigma``."""

    @abstractmethod
    def times(self, steps: int, spacing: str) -> np.ndarray:
        """``steps`` ascending times in (0, T] for a sampler, float64; ``spacing`` as in :func:`schedules.timesteps`."""

    def sigma_bar_at(self, t: Any) -> np.ndarray:
        """σ̄ = n/a at times t: the noise level of x/a, the time variable of the probability-flow ODE. Eq: S2-E14."""
        signal, noise = self.levels(t)
        with np.errstate(divide="ignore"):
            return noise / signal

    @property
    def sigma_limit(self) -> float:
        """The largest σ̄ that a sampler may take the state to: that of T."""
        return float(self.sigma_bar_at(self.T))

    def step_variance(self, t: Any, t_to: Any) -> np.ndarray:
        """The variance that the process adds from t_to to t > t_to."""
        return step_variance(*self.levels(t), *self.levels(t_to))

    def increments(self, t: Any, t_to: Any) -> tuple[np.ndarray, np.ndarray]:
        """(F, G) = (∫f, ∫g²) from t_to to t > t_to of the SDE dx = f·x dt + g dw that has these levels.

        F = ln(a_t/a_to); G = v·B/(1 − e^(−B)) with v the :meth:`step_variance` and B = −2F, exact where f = 0 (a ladder: G = v)
        and where g² is a multiple of f (a schedule: G = B). Raises ValueError where no signal is left.
        """
        (a, n), (a_to, n_to) = self.levels(t), self.levels(t_to)
        if np.any(a == 0):
            raise ValueError("t must be where some signal is left (alpha_bar > 0)")
        B = 2 * np.log(a_to / a)
        ratio = np.divide(B, -np.expm1(-B), out=np.ones_like(B), where=B != 0)
        return -B / 2, step_variance(a, n, a_to, n_to) * ratio

    def check(self, t: Any) -> np.ndarray:
        """``t`` as float64; ValueError outside [0, T]."""
        t = np.asarray(t, np.float64)
        if not np.all((t >= 0) & (t <= self.T)):
            raise ValueError(f"t must be in 0..{self.T:g}, not {t.min()}..{t.max()}")
        return t


def step_variance(signal: Any, noise: Any, signal_to: Any, noise_to: Any) -> Any:
    """n_t² − (a_t/a_to)²·n_to²: what one jump t_to → t adds; for VP it is 1 − ᾱ_t/ᾱ_to. Eq: S0-C20, S2-U5."""
    kept = signal / signal_to * noise_to
    return (noise - kept) * (noise + kept)


class Tabulated(Levels):
    """Levels given at t = 0, 1, …, T; between them σ̄ is interpolated linearly in t.

    Float64 of length T+1, index 0 clean data: ``signal``, ``noise``, ``noise_variance``; ``alpha`` and ``beta`` of the single
    step x_t = √α_t·x_{t−1} + √β_t·ε, and ``beta_tilde`` = n_{t−1}²/n_t²·β_t, the variance of q(x_{t−1}|x_t, x_0).
    """

    t_min = 1.0
    T: int
    beta: np.ndarray
    alpha: np.ndarray
    signal: np.ndarray
    noise_variance: np.ndarray

    @cached_property
    def noise(self) -> np.ndarray:
        return frozen(np.sqrt(self.noise_variance))

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        return frozen(self.signal**2)

    @cached_property
    def beta_tilde(self) -> np.ndarray:
        rest = self.noise_variance
        return frozen(np.r_[0.0, rest[:-1] / rest[1:] * self.beta[1:]])

    @cached_property
    def sigma_bar(self) -> np.ndarray:
        """n/a at t = 0..T. Eq: S2-E14."""
        with np.errstate(divide="ignore"):
            return frozen(self.noise / self.signal)

    @abstractmethod
    def _at(self, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(signal, noise) where n/a = sigma."""

    def levels(self, t: Any) -> tuple[np.ndarray, np.ndarray]:
        """(signal, noise) at times t in [0, T], float64; between whole times σ̄ is interpolated linearly in t."""
        t = self.check(t)
        whole = np.rint(t).astype(np.int64)
        signal, noise = self.signal[whole], self.noise[whole]
        between = t != whole
        if np.any(between):
            between_signal, between_noise = self._at(np.interp(t, np.arange(self.T + 1), self.sigma_bar))
            signal, noise = np.where(between, between_signal, signal), np.where(between, between_noise, noise)
        return signal, noise

    def time(self, sigma: Any) -> np.ndarray:
        """The time at which σ̄ = sigma: the inverse of :meth:`levels`."""
        sigma = np.asarray(sigma, np.float64)
        if not np.all((sigma >= 0) & (sigma <= self.sigma_bar[-1])):
            raise ValueError(f"sigma must be in 0..{self.sigma_bar[-1]}, not {sigma.min()}..{sigma.max()}")
        return np.interp(sigma, self.sigma_bar, np.arange(self.T + 1.0))

    def times(self, steps: int, spacing: str) -> np.ndarray:
        return timesteps(self.T, steps, spacing).astype(np.float64)


@dataclass(frozen=True, eq=False, repr=False)
class Schedule(Tabulated):
    """A variance-preserving noise schedule. Eq: S0-E17, S0-E18, S1-E3, S3-E2, S3-E7.

    ``beta`` has length T+1 with beta[0] = 0. Derived, all float64 of the same length: ``alpha`` = 1 − β, ``alpha_bar`` = ∏ α,
    ``signal`` = √ᾱ, ``noise`` = √(1−ᾱ), ``beta_tilde`` = (1−ᾱ_{t−1})/(1−ᾱ_t)·β_t (a variance; 0 at t = 1). Raises ValueError
    unless 0 < β_t < 1 for t = 1..T; β_T = 1 is taken too, a chain that ends in pure noise (zero terminal signal).
    """

    beta: np.ndarray
    name: str = "custom"
    prior_std = 1.0

    def __post_init__(self) -> None:
        beta = np.array(self.beta, np.float64)
        if beta.ndim != 1 or beta.size < 2 or beta[0] != 0:
            raise ValueError(f"beta must have shape (T+1,) with T >= 1 and beta[0] = 0, not shape {beta.shape}")
        bad = ~((beta[1:] > 0) & (beta[1:] < 1))
        bad[-1] &= beta[-1] != 1
        if bad.any():
            t = 1 + int(np.flatnonzero(bad)[0])
            raise ValueError(f"beta must lie in (0, 1), but beta[{t}] = {beta[t]}")
        object.__setattr__(self, "beta", frozen(beta))

    @property
    def T(self) -> int:  # type: ignore[override]
        """The number of steps of the forward process."""
        return self.beta.size - 1

    @cached_property
    def alpha(self) -> np.ndarray:  # type: ignore[override]
        return frozen(1 - self.beta)

    @cached_property
    def alpha_bar(self) -> np.ndarray:
        return frozen(np.cumprod(self.alpha))

    @cached_property
    def signal(self) -> np.ndarray:  # type: ignore[override]
        return frozen(np.sqrt(self.alpha_bar))

    @cached_property
    def noise_variance(self) -> np.ndarray:  # type: ignore[override]
        """1 − ᾱ_t, summed in logarithms, which keeps the digits that 1 − ᾱ loses at small t."""
        with np.errstate(divide="ignore"):
            return frozen(-np.expm1(np.cumsum(np.log1p(-self.beta))))

    def _at(self, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        signal = 1 / np.sqrt(1 + sigma**2)
        return signal, sigma * signal

    def __repr__(self) -> str:
        return f"Schedule({self.name}, alpha_bar[{self.T}]={self.alpha_bar[-1]:.4g})"


@dataclass(frozen=True, eq=False, repr=False)
class Ladder(Tabulated):
    """A ladder of noise levels, x_t = x0 + σ_t·ε: the process of NCSN. Eq: S0-E9, S0-C9, S4-E63.

    ``sigma`` has length T+1 and ascends from sigma[0] = 0; level t = 1 is the smallest, t = T the largest (the study note and the
    paper count the other way, σ_1 > … > σ_L: their σ_i is sigma[T + 1 − i]). The same arrays as a :class:`Schedule`, with α = 1
    and β_t = σ_t² − σ_{t−1}², the variance that step t adds. Raises ValueError unless the levels ascend.
    """

    sigma: np.ndarray
    name: str = "custom"

    def __post_init__(self) -> None:
        sigma = np.array(self.sigma, np.float64)
        if sigma.ndim != 1 or sigma.size < 2 or sigma[0] != 0:
            raise ValueError(f"sigma must have shape (T+1,) with T >= 1 and sigma[0] = 0, not shape {sigma.shape}")
        bad = ~(np.isfinite(sigma[1:]) & (np.diff(sigma) > 0))
        if bad.any():
            t = 1 + int(np.flatnonzero(bad)[0])
            raise ValueError(f"sigma must ascend strictly, but sigma[{t}] = {sigma[t]} follows {sigma[t - 1]}")
        object.__setattr__(self, "sigma", frozen(sigma))

    @property
    def T(self) -> int:  # type: ignore[override]
        """The number of levels."""
        return self.sigma.size - 1

    @property
    def prior_std(self) -> float:  # type: ignore[override]
        """σ_T: the prior of x_T is N(0, σ_T²)."""
        return float(self.sigma[-1])

    @cached_property
    def signal(self) -> np.ndarray:  # type: ignore[override]
        return frozen(np.ones_like(self.sigma))

    @cached_property
    def alpha(self) -> np.ndarray:  # type: ignore[override]
        return self.signal

    @cached_property
    def beta(self) -> np.ndarray:  # type: ignore[override]
        return frozen(np.r_[0.0, np.diff(self.sigma) * (self.sigma[1:] + self.sigma[:-1])])

    @cached_property
    def noise(self) -> np.ndarray:
        return self.sigma

    @cached_property
    def noise_variance(self) -> np.ndarray:  # type: ignore[override]
        return frozen(self.sigma**2)

    def _at(self, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.ones_like(sigma), sigma

    def __repr__(self) -> str:
        return f"Ladder({self.name}, {self.T} levels {self.sigma[1]:.4g}..{self.sigma[-1]:.4g})"


def frozen(a: np.ndarray) -> np.ndarray:
    """``a``, read-only from here on."""
    a.setflags(write=False)
    return a


def whole_steps(T: Any, name: str = "T") -> int:
    """A number of steps as an int; TypeError or ValueError unless it is one of at least 1."""
    if isinstance(T, bool) or not isinstance(T, (int, np.integer)):
        raise TypeError(f"{name} must be an int, not {type(T).__name__}")
    if T < 1:
        raise ValueError(f"{name} must be at least 1, not {T}")
    return int(T)


def timesteps(T: int, steps: int = 50, spacing: str = "leading") -> np.ndarray:
    """``steps`` of the times 1..T, ascending and unique (int64): the sub-sequence τ of a sampler. Eq: S0-C20, S2-C16, S4-E43.

    leading    k·⌊T/S⌋ + 1, k = 0..S−1 (starts below T: x_T is taken for a sample of a smaller time)
    linspace   round(linspace(0, T−1, S)) + 1, both ends kept
    trailing   round(k·T/S), k = 1..S: ends at T
    quadratic  max(⌊T·i²/S²⌋, τ_{i−1} + 1), i = 1..S: dense near the data, ends at T
    """
    T = whole_steps(T)
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
