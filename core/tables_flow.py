"""Sampler tables of the probability-flow ODE in σ̄, d(x/a) = ε dσ̄, by one-step methods, Euler to Runge–Kutta. Eq: S2-E14."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import grids
from .grids import RHO, Grid
from .levels import Levels
from .rows import Affine, Level, Rows, flow, levels_at
from .table import Table, table

MOST_CHURN = float(np.sqrt(2) - 1)


def path_of(s: Levels, times: np.ndarray, name: str, last: float = 0.0) -> list[Level]:
    """The levels from the highest time down to ``last``; ValueError where the first has no signal."""
    path = levels_at(s, np.r_[times[::-1], last])
    grids.refuse_pure_noise(path[0].a, name)
    return path


def level_at_sigma(s: Levels, sigma: float) -> Level:
    """The level at which σ̄ = sigma."""
    return levels_at(s, np.atleast_1d(s.time(sigma)))[0]


# ------------------------------------------------------------------------------------------------------------- one step methods


class Churn(NamedTuple):
    """How much noise a step adds ahead of itself: Karras et al. 2022, Algorithm 2."""

    amount: float = 0.0
    low: float = 0.0
    high: float = np.inf
    noise: float = 1.0

    def check(self) -> "Churn":
        for name, value, least in zip(("churn", "s_tmin", "s_tmax", "s_noise"), self, (0, 0, 0, 0), strict=True):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if not self.amount < np.inf:
            raise ValueError(f"churn must be finite, not {self.amount}")
        return self

    def apply(self, rows: Rows, s: Levels, steps: int) -> None:
        """Add the noise of one of ``steps`` steps, a row without an evaluation, where the level is in range."""
        now = rows.level
        gamma = min(self.amount / steps, MOST_CHURN) if self.low <= now.sigma <= self.high else 0.0
        sigma = min((1 + gamma) * now.sigma, s.sigma_limit)
        if sigma > now.sigma:
            to = level_at_sigma(s, sigma)
            added = to.a**2 * (to.sigma - now.sigma) * (to.sigma + now.sigma)
            rows.go(to, (to.a / now.a) * rows.x, c=self.noise * added**0.5, excess=(self.noise**2 - 1) * added)

    def __str__(self) -> str:
        return f", churn={self.amount:g}" if self.amount else ""


Step = Callable[[Rows, Level], object]


def euler_step(rows: Rows, to: Level) -> Affine:
    """Euler's step to ``to``, one row. Returns ε at its start."""
    eps = rows.ask()
    rows.go(to, flow(rows.x, rows.level, to, eps))
    return eps


def heun_step(rows: Rows, to: Level) -> Affine:
    """Euler's step and its correction, two rows; to clean data Euler's alone."""
    x, now = rows.x, rows.level
    eps = euler_step(rows, to)
    if to.n > 0:
        rows.go(to, flow(x, now, to, (eps + rows.ask()) / 2))
    return eps


def runge_kutta_step(rows: Rows, middle: Level, to: Level) -> Affine:
    """The classical step of order 4 through ``middle``, four rows. Returns ε at its start."""
    x, now = rows.x, rows.level
    k1 = rows.ask()
    rows.go(middle, flow(x, now, middle, k1))
    k2 = rows.ask()
    rows.go(middle, flow(x, now, middle, k2))
    k3 = rows.ask()
    rows.go(to, flow(x, now, to, k3))
    k4 = rows.ask()
    rows.go(to, flow(x, now, to, (k1 + 2 * k2 + 2 * k3 + k4) / 6))
    return k1


def rk4_step(s: Levels, rows: Rows, to: Level) -> Affine:
    """The Runge–Kutta step with its middle halfway in σ̄; to clean data Euler's alone."""
    if to.n == 0:
        return euler_step(rows, to)
    return runge_kutta_step(rows, level_at_sigma(s, (rows.level.sigma + to.sigma) / 2), to)


def midpoint_step(s: Levels, rows: Rows, to: Level) -> None:
    """Euler's step to the middle of the two levels in ln σ̄, and from the start with the ε found there; to clean data Euler's."""
    if to.n == 0:
        euler_step(rows, to)
        return
    x, now = rows.x, rows.level
    euler_step(rows, level_at_sigma(s, (now.sigma * to.sigma) ** 0.5))
    rows.go(to, flow(x, now, to, rows.ask()))


def _stepped(
    name: str,
    s: Levels,
    where: tuple[int, str, Grid, Grid, float],
    prediction: str,
    step: Step,
    churn: Churn = Churn(),  # noqa: B008 (it cannot be changed)
) -> Table:
    times, how = grids.times(s, *where)
    path = path_of(s, times, name)
    rows = Rows(path[0])
    churn.check()
    for to in path[1:]:
        churn.apply(rows, s, len(times))
        step(rows, to)
    return rows.table(f"{name}({how}{churn})", prediction)


def euler(
    s: Levels,
    steps: int = 50,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
) -> Table:
    """x'/a' = x/a + (σ̄' − σ̄)·ε, which is x' = a'·x0 + n'·ε: order 1. Eq: S2-E13, S2-E14.

    "linspace" may stop between whole times, so the model then gets floats. The churn as in :func:`heun`.
    """
    noise = Churn(churn, s_tmin, s_tmax, s_noise)
    if not churn:  # the same, without rounding: also where no signal is left
        times, how = grids.times(s, steps, spacing, grid, sigmas, rho)
        path = np.r_[times[::-1], 0.0]
        a, n = s.levels(path)
        return table(f"euler({how})", prediction, path[:-1], a, n, B0=a[1:], Be=n[1:])
    return _stepped("euler", s, (steps, spacing, grid, sigmas, rho), prediction, euler_step, noise)


def heun(
    s: Levels,
    steps: int = 25,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
) -> Table:
    """Euler to σ̄', then x'/a' = x/a + ½(σ̄' − σ̄)·(ε + ε'): order 2, two rows a step, 2·steps − 1 in all (the last is Euler's).

    ``churn`` (S_churn) adds noise ahead of each step whose σ̄ is in [s_tmin, s_tmax], in a row of its own that asks no model:

        σ̂ = (1 + γ)·σ̄,  γ = min(churn/steps, √2 − 1);    x̂/â = x/a + s_noise·√(σ̂² − σ̄²)·z

    and the step then starts from σ̂. A process that ends at T is not taken beyond it. s_noise ≠ 1 stands in the rows' ``excess``.
    Source: Karras et al. 2022, Algorithms 1 and 2. Eq: S2-E14.
    """
    noise = Churn(churn, s_tmin, s_tmax, s_noise)
    return _stepped("heun", s, (steps, spacing, grid, sigmas, rho), prediction, heun_step, noise)


def rk4(
    s: Levels,
    steps: int = 12,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """The classical Runge–Kutta method in σ̄: order 4, four rows a step, 4·steps − 3 in all (the last is Euler's).

        h = σ̄' − σ̄;  k1 = ε(x̄, σ̄), k2 = ε(x̄ + ½h·k1, σ̄ + ½h), k3 = ε(x̄ + ½h·k2, σ̄ + ½h), k4 = ε(x̄ + h·k3, σ̄')
        x̄' = x̄ + h/6·(k1 + 2·k2 + 2·k3 + k4),    x̄ = x/a

    The model is also asked halfway in σ̄ between the times. Eq: S2-E14.
    """
    where = (steps, spacing, grid, sigmas, rho)
    return _stepped("rk4", s, where, prediction, lambda rows, to: rk4_step(s, rows, to))


def kdpm2(
    s: Levels,
    steps: int = 25,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
    churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = np.inf,
    s_noise: float = 1.0,
) -> Table:
    """The midpoint method with its middle in ln σ̄: order 2, two rows a step, 2·steps − 1 in all (the last is Euler's).

        x̄_m = x̄ + (σ̄_m − σ̄)·ε,  σ̄_m = √(σ̄·σ̄');    x̄' = x̄ + (σ̄' − σ̄)·ε(x̄_m, σ̄_m),    x̄ = x/a

    Like DPM-Solver-2, with the plain integral of dσ̄ in place of the exponential one. The churn as in :func:`heun`. Source:
    k-diffusion, ``sample_dpm_2``. Eq: S2-E14.
    """
    noise = Churn(churn, s_tmin, s_tmax, s_noise)
    where = (steps, spacing, grid, sigmas, rho)
    return _stepped("kdpm2", s, where, prediction, lambda rows, to: midpoint_step(s, rows, to), noise)
