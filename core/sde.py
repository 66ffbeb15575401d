"""The forward SDEs dx = f(t)·x dt + g(t) dw whose marginals x_t = a(t)·x0 + n(t)·ε are known: VE, VP and sub-VP.

They are :class:`Levels` in continuous time, so every sampler table, loss and conversion takes them. ``T`` is the time at the end:
1 as in the paper, or 1000 for the time unit of a network that counts steps, where VPSDE(T=1000) is the limit of the linear
DDPM schedule. Source: Song et al. 2021 (score SDE), section 3 and appendices B, C.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.arrays import restore
from .exchange import Array, float_array, lift, real_times
from .levels import SPACINGS, Levels, whole_steps

__all__ = ["EDM", "SDE", "VESDE", "VPSDE", "SubVPSDE"]


class SDE(Levels):
    """dx = f(t)·x dt + g(t) dw on t in [0, T]. Eq: S0-C10, S4-C17, S4-C19.

    Samplers ask the model about times from ``t_min`` on, as in the paper's experiments: below, the score has no limit.
    """

    @abstractmethod
    def drift_factor(self, t: Any) -> np.ndarray:
        """f(t) = d ln a/dt, float64 of the shape of t."""

    @abstractmethod
    def diffusion(self, t: Any) -> np.ndarray:
        """g(t) with g² = dn²/dt − 2f·n², float64 of the shape of t."""

    @abstractmethod
    def _fraction(self, sigma: np.ndarray) -> np.ndarray:
        """t/T where n/a = sigma."""

    def drift(self, x: Array, t: Any) -> Array:
        """f(t)·x. Eq: S4-E64.

        x (B, …) float, an array of any library; t a number or (B,) in [0, T].
        """
        a = float_array(x, "x")
        return restore(lift(self.drift_factor(real_times(t, self, a.shape[0] if a.ndim else None)), a) * a, x)

    def increments(self, t: Any, t_to: Any) -> tuple[np.ndarray, np.ndarray]:
        """((t − t_to)·f(t), (t − t_to)·g(t)²): what the Euler–Maruyama scheme takes for the integrals."""
        h = self.check(t) - self.check(t_to)
        return h * self.drift_factor(t), h * self.diffusion(t) ** 2

    def time(self, sigma: Any) -> np.ndarray:
        """The time at which σ̄ = sigma, in closed form: the inverse of :meth:`levels`."""
        sigma, top = np.asarray(sigma, np.float64), float(self.sigma_bar_at(self.T))
        if not np.all((sigma >= 0) & (sigma <= top)):
            raise ValueError(f"sigma must be in 0..{top}, not {sigma.min()}..{sigma.max()}")
        return np.where(sigma == top, 1.0, np.minimum(self._fraction(sigma), 1.0)) * self.T

    def times(self, steps: int, spacing: str) -> np.ndarray:
        """``steps`` ascending times between t_min and T, float64.

        leading    t_min + (T − t_min)·k/S, k = 0..S−1: starts below T
        linspace   both ends kept
        trailing   t_min + (T − t_min)·k/S, k = 1..S
        quadratic  t_min + (T − t_min)·(k/S)², k = 1..S: dense near the data
        """
        steps = whole_steps(steps, "steps")
        k = np.arange(steps)
        parts = {
            "leading": lambda: k / steps,
            "linspace": lambda: np.linspace(0, 1, steps),
            "trailing": lambda: (k + 1) / steps,
            "quadratic": lambda: ((k + 1) / steps) ** 2,
        }
        if spacing not in parts:
            raise ValueError(f"spacing must be one of {SPACINGS}, not {spacing!r}")
        part = parts[spacing]()
        return self.t_min * (1 - part) + self.T * part

    def _check_T(self) -> None:
        if not 0 < self.T < np.inf:
            raise ValueError(f"T must be positive and finite, not {self.T}")


@dataclass(frozen=True)
class VESDE(SDE):
    """dx = g dw, g = σ(t)·√(2 ln(σ_max/σ_min)/T), σ(t) = σ_min·(σ_max/σ_min)^(t/T). Eq: S4-E64, S4-E65.

    Exactly: a = 1, n² = σ²(t) − σ²(0), so that n = 0 at clean data (the published code takes σ(t) itself, an error of σ_min²).
    The prior is N(0, n(T)²). dx = λ^t dw is the case σ_min = 1/√(2 ln λ), σ_max = λ·σ_min, T = 1.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    T: float = 1.0
    name = "vesde"

    def __post_init__(self) -> None:
        self._check_T()
        if not 0 < self.sigma_min < self.sigma_max < np.inf:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return 1e-5 * self.T

    @property
    def prior_std(self) -> float:  # type: ignore[override]
        """n(T)."""
        return float(self.levels(self.T)[1])

    @property
    def _growth(self) -> float:
        return float(np.log(self.sigma_max / self.sigma_min))

    def levels(self, t: Any) -> tuple[np.ndarray, np.ndarray]:
        """(1, σ_min·√(e^(2ut) − 1)), u = ln(σ_max/σ_min)/T."""
        t = self.check(t)
        return np.ones_like(t), self.sigma_min * np.sqrt(np.expm1(2 * self._growth / self.T * t))

    def sigma(self, t: Any) -> np.ndarray:
        """σ(t) = σ_min·(σ_max/σ_min)^(t/T); n² = σ²(t) − σ_min²."""
        return self.sigma_min * np.exp(self._growth / self.T * self.check(t))

    def drift_factor(self, t: Any) -> np.ndarray:
        return np.zeros_like(self.check(t))

    def diffusion(self, t: Any) -> np.ndarray:
        return self.sigma(t) * np.sqrt(2 * self._growth / self.T)

    def _fraction(self, sigma: np.ndarray) -> np.ndarray:
        return np.log1p((sigma / self.sigma_min) ** 2) / (2 * self._growth)


@dataclass(frozen=True)
class EDM(SDE):
    """dx = √(2σ) dw with the time t = σ itself: x_t = x0 + σ·ε. Source: Karras et al. 2022.

    T = ``sigma_max``, and samplers ask from ``sigma_min`` on; "karras" is the spacing of the paper. Levels beyond σ_max exist
    too, since a sampler with churn goes there. A network of the paper's form comes in by :func:`alphabar.core.convert.edm_model`.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name = "edm"
    sigma_limit = np.inf

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < np.inf:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, not {self.sigma_min} and {self.sigma_max}"
            )

    @property
    def T(self) -> float:  # type: ignore[override]
        return self.sigma_max

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.sigma_min

    @property
    def prior_std(self) -> float:  # type: ignore[override]
        """σ_max."""
        return self.sigma_max

    def check(self, t: Any) -> np.ndarray:
        t = np.asarray(t, np.float64)
        if not np.all((t >= 0) & (t < np.inf)):
            raise ValueError(f"t must be finite and at least 0, not {t.min()}..{t.max()}")
        return t

    def levels(self, t: Any) -> tuple[np.ndarray, np.ndarray]:
        """(1, t)."""
        t = self.check(t)
        return np.ones_like(t), t

    def time(self, sigma: Any) -> np.ndarray:
        """σ̄ itself."""
        return self.check(sigma)

    def drift_factor(self, t: Any) -> np.ndarray:
        return np.zeros_like(self.check(t))

    def diffusion(self, t: Any) -> np.ndarray:
        return np.sqrt(2 * self.check(t))

    def _fraction(self, sigma: np.ndarray) -> np.ndarray:
        return sigma / self.sigma_max


class _Decaying(SDE):
    """f = −½β(t) with β linear in t: the signal e^(−B/2), B = ∫β. All of VP and sub-VP but the noise."""

    beta_min: float
    beta_max: float
    prior_std = 1.0

    def __post_init__(self) -> None:
        self._check_T()
        if not (0 <= self.beta_min <= self.beta_max < np.inf and self.beta_max > 0):
            given = f"{self.beta_min} and {self.beta_max}"
            raise ValueError(f"beta_min and beta_max must satisfy 0 <= beta_min <= beta_max and 0 < beta_max, not {given}")

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return 1e-3 * self.T

    def beta(self, t: Any) -> np.ndarray:
        """β(t) = (β_min + (β_max − β_min)·t/T)/T, in units of this time."""
        return (self.beta_min + (self.beta_max - self.beta_min) / self.T * self.check(t)) / self.T

    def beta_integral(self, t: Any) -> np.ndarray:
        """B(t) = ∫_0^t β."""
        u = self.check(t) / self.T
        return u * (self.beta_min + (self.beta_max - self.beta_min) / 2 * u)

    def drift_factor(self, t: Any) -> np.ndarray:
        return -self.beta(t) / 2

    def _when(self, B: np.ndarray) -> np.ndarray:
        """t/T where ∫β = B."""
        root = np.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * B)
        total = self.beta_min + root
        return np.divide(2 * B, total, out=np.zeros_like(B), where=total > 0)


@dataclass(frozen=True)
class VPSDE(_Decaying):
    """dx = −½β x dt + √β dw, the limit of DDPM as its steps shrink. Eq: S0-C10, S4-C19.

    Exactly: a = e^(−B/2), n² = 1 − e^(−B), B = ∫β; β grows from β_min to β_max per 1/T of time.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    name = "vpsde"

    def levels(self, t: Any) -> tuple[np.ndarray, np.ndarray]:
        """(e^(−B/2), √(1 − e^(−B)))."""
        B = self.beta_integral(t)
        return np.exp(-B / 2), np.sqrt(-np.expm1(-B))

    def diffusion(self, t: Any) -> np.ndarray:
        return np.sqrt(self.beta(t))

    def _fraction(self, sigma: np.ndarray) -> np.ndarray:
        return self._when(np.log1p(sigma**2))


@dataclass(frozen=True)
class SubVPSDE(_Decaying):
    """dx = −½β x dt + √(β(1 − e^(−2B))) dw: the signal of VP with less noise on the way. Eq: S4-C19.

    Exactly: a = e^(−B/2), n = 1 − e^(−B), B = ∫β. Source: Song et al. 2021 (score SDE), section 3.4.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    T: float = 1.0
    name = "subvpsde"

    def levels(self, t: Any) -> tuple[np.ndarray, np.ndarray]:
        """(e^(−B/2), 1 − e^(−B))."""
        B = self.beta_integral(t)
        return np.exp(-B / 2), -np.expm1(-B)

    def diffusion(self, t: Any) -> np.ndarray:
        return np.sqrt(self.beta(t) * -np.expm1(-2 * self.beta_integral(t)))

    def _fraction(self, sigma: np.ndarray) -> np.ndarray:
        return self._when(2 * np.arcsinh(sigma / 2))
