"""Analytic-DPM: the variance of the reverse steps that is best for the model at hand, measured once, for every stochastic table.

A step x_t → x' with the true x_0 is N(κ·x_0 + k·x_t, λ²). The model knows x_0 only as x̂_0(x_t), so what it leaves out is, by the
law of total variance, κ²·Var(x_0|x_t), and the best isotropic variance of the step is

    σ*² = λ² + (κ·n/a)²·(1 − n²·Γ),    Γ = E‖∇ log q(x_t)‖²/d = E‖ε_θ(x_t, t)‖²/(d·n²)

with a and n the levels of x_t (√ᾱ_t and √(1−ᾱ_t) for a schedule) and d the elements of a sample. Source: Bao et al. 2022
(Analytic-DPM), Theorem 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, is_native, native, restore, to_numpy
from .convert import coefficients
from .exchange import Array, check_schedule
from .levels import Levels, Tabulated, frozen
from .samplers import answer_of
from .table import Table

Model = Callable[[Array, Array], Array]
Range = tuple[float, float] | None
ESTIMATES = ("gamma", "residual")
ENDS = ("mean", "noise")


@dataclass(frozen=True, eq=False, repr=False)
class Gamma:
    """What :func:`measure_gamma` found: Γ at the times t, with standard errors over the samples.

    Float64 of length K: ``t`` ascending; ``noise`` n at t; ``gamma`` Γ = E‖ε_θ‖²/(d·n²) and ``gamma_error``; ``residual``
    E‖ε − ε_θ‖²/d and ``residual_error``. ``samples`` is their number and ``dimensions`` d. 1 − n²·Γ and the residual are two
    estimates of E Var(ε|x_t): equal for a perfect model; the residual counts the model's error too (Bao et al. 2022, extended
    Analytic-DPM) and has far less noise at high noise levels. Raises ValueError for arrays that do not fit.
    """

    t: np.ndarray
    noise: np.ndarray
    gamma: np.ndarray
    gamma_error: np.ndarray
    residual: np.ndarray
    residual_error: np.ndarray
    samples: int
    dimensions: int

    def __post_init__(self) -> None:
        size = np.size(self.t)
        for f in fields(self)[:6]:
            value = np.array(getattr(self, f.name), np.float64)
            finite = np.isfinite(value) | (f.name.endswith("error") & np.isnan(value))  # one sample has no error
            if value.shape != (size,) or size == 0 or not np.all(finite & ~(value < 0)):
                raise ValueError(f"{f.name} must hold numbers that are finite and not negative, one for each of {size} times")
            object.__setattr__(self, f.name, frozen(value))
        if np.any(np.diff(self.t) <= 0) or not np.all(self.noise > 0):
            raise ValueError("t must ascend strictly and noise be positive")

    def __repr__(self) -> str:
        return f"Gamma({self.t.size} times {self.t[0]:g}..{self.t[-1]:g}, {self.samples} samples of {self.dimensions})"

    def unexplained(self, t: Any, estimate: str = "residual") -> np.ndarray:
        """E Var(ε|x_t) per element, in [0, 1]: 1 − n²·Γ, or by ``estimate`` "residual" E‖ε − ε_θ‖²/d.

        ``t``: numbers within the times measured, interpolated linearly in t between them. Raises ValueError outside.
        """
        if estimate not in ESTIMATES:
            raise ValueError(f"estimate must be one of {ESTIMATES}, not {estimate!r}")
        t = np.asarray(t, np.float64)
        if not np.all((t >= self.t[0]) & (t <= self.t[-1])):
            raise ValueError(f"t must be in {self.t[0]:g}..{self.t[-1]:g}, the times measured, not {t.min():g}..{t.max():g}")
        values = self.residual if estimate == "residual" else 1 - self.noise**2 * self.gamma
        return np.interp(t, self.t, np.clip(values, 0, 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """The record as arrays, for a checkpoint; :meth:`from_arrays` reads them."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)[:6]}
        return {**kept, "counts": np.array([self.samples, self.dimensions], np.int64)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> "Gamma":
        """The record of :meth:`arrays`. Raises KeyError or ValueError for others."""
        samples, dimensions = map(int, np.asarray(arrays["counts"]))
        measured = {f.name: np.asarray(arrays[f.name]) for f in fields(cls)[:6]}
        return cls(**measured, samples=samples, dimensions=dimensions)

    @staticmethod
    def join(parts: Sequence["Gamma"]) -> "Gamma":
        """One record of several, measured at the same times on different samples (of one data set or of its classes)."""
        if not parts:
            raise ValueError("parts must hold at least one record")
        first = parts[0]
        if any(not np.array_equal(p.t, first.t) or p.dimensions != first.dimensions for p in parts):
            raise ValueError("parts must be measured at the same times, on samples of one size")
        total = sum(p.samples for p in parts)

        def pooled(mean: str, error: str) -> tuple[np.ndarray, np.ndarray]:
            m = sum(p.samples * getattr(p, mean) for p in parts) / total
            square = np.zeros_like(m)  # the sum of squared distances from m
            for p in parts:
                within = getattr(p, error) ** 2 * p.samples * (p.samples - 1) if p.samples > 1 else 0.0
                square = square + within + p.samples * (getattr(p, mean) - m) ** 2
            return m, np.sqrt(square / (total * (total - 1))) if total > 1 else np.full_like(m, np.nan)

        return Gamma(
            first.t, first.noise, *pooled("gamma", "gamma_error"), *pooled("residual", "residual_error"), total, first.dimensions
        )


def measure_gamma(
    model: Model,
    x0: Array,
    s: Levels,
    grid: Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
    prediction: str = "eps",
    batch: int = 256,
    draws: int = 1,
    first_sample: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Gamma:
    """Γ at each time of ``grid`` by one pass over the samples x0 (N, …): E‖ε_θ(x_t, t)‖²/(d·n²) with standard errors. Eq: L5.

    model(x, t) returns what ``prediction`` says ("eps", "x0", "v", "score"); a conditional network is measured class by class and
        joined (:meth:`Gamma.join`).
    grid: ascending times in (0, T], by default all times 1..T of a table.
    draws: noises for each sample; that of sample k depends on (seed, draw, place in the grid, first_sample + k) alone, not on
        ``batch``.
    progress: called as progress(model calls done, in all).

    Raises TypeError for an x0 that is no float array, ValueError for a grid out of range.
    """
    check_schedule(s)
    here = native(x0)
    if not is_native(here) or here.dtype.kind != "f" or here.ndim < 1 or here.size == 0:
        raise TypeError("x0 must be a float array (N, …) of at least one sample")
    if batch < 1 or draws < 1:
        raise ValueError(f"batch and draws must be at least 1, not {batch} and {draws}")
    times = _grid(s, grid)
    N, K, d = len(here), times.size, here[0].size
    signal, noise = s.levels(times)
    P, Q = coefficients(prediction, "eps", signal, noise)
    told = times.astype(np.int64) if np.array_equal(times, np.rint(times)) else times
    xp = array_module(here)
    square, residual = np.zeros((2, K, N))  # of each sample, means over the draws
    work = [(draw, k, start) for draw in range(draws) for k in range(K) for start in range(0, N, batch)]
    for done, (draw, k, start) in enumerate(work, 1):
        rows = slice(start, start + batch)
        part = here[rows]
        eps = kernels.normals(xp.empty(part.shape, part.dtype), seed, draw * K + k, streams.PATH, first_sample + start)
        x = float(signal[k]) * part + float(noise[k]) * eps
        m = answer_of(model(restore(x, x0), restore(xp.full(len(part), told[k]), x0)), x, "model")
        answer = float(P[k]) * x.astype(np.float64) + float(Q[k]) * m.astype(np.float64)
        for sums, value in ((square, answer), (residual, answer - eps)):
            sums[k, rows] += to_numpy((value**2).reshape(len(part), -1).mean(axis=1)) / draws
        if progress is not None:
            progress(done, len(work))
    g, r = ((v.mean(axis=1), v.std(axis=1, ddof=1) / np.sqrt(N) if N > 1 else np.full(K, np.nan)) for v in (square, residual))
    return Gamma(times, noise, g[0] / noise**2, g[1] / noise**2, *r, N, d)


def _needs_gamma(gamma: Any) -> None:
    if not isinstance(gamma, Gamma):
        raise TypeError(f"gamma must be a Gamma (measure_gamma makes one), not {type(gamma).__name__}")


def _grid(s: Levels, grid: Any) -> np.ndarray:
    if grid is None:
        if not isinstance(s, Tabulated):
            raise ValueError("grid must be given, the ascending times to measure at: this process has no steps to count")
        return np.arange(1.0, s.T + 1)
    times = np.array(grid, np.float64)
    if times.ndim != 1 or times.size == 0 or not (0 < times[0] and times[-1] <= s.T and np.all(np.diff(times) > 0)):
        raise ValueError(f"grid must ascend strictly within (0, {s.T:g}], not {grid}")
    return times


# ------------------------------------------------------------------------------------------------------------------ the variance


def optimal_variance(lambda2: Any, signal: Any, noise: Any, signal_to: Any, noise_to: Any, unexplained: Any) -> Any:
    """σ*² = λ² + (a'·n/a − √(n'² − λ²))²·E Var(ε|x_t) of the step (a, n) → (a', n'). Eq: L5.

    For a schedule a'/a = 1/√α_t (of a sub-sequence √(ᾱ_to/ᾱ_t)), so this is λ² + (√(β̄_t/α_t) − √(β̄_to − λ²))²·(1 − β̄_t·Γ) with
    β̄ = 1 − ᾱ. ``lambda2`` is λ² in 0..n'², β̃ for DDPM and 0 for DDIM with η = 0; ``unexplained`` is 1 − n²Γ in 0..1. The value is
    at least λ² (``unexplained`` 0: a perfect guess of x_0) and at most that with 1 (nothing known). Float64; arrays broadcast.
    Source: Bao et al. 2022, Theorems 1 and 2.
    """
    lambda2, a, n, a_to, n_to, rest = (
        np.asarray(v, np.float64) for v in (lambda2, signal, noise, signal_to, noise_to, unexplained)
    )
    if np.any(lambda2 < 0) or np.any(lambda2 > n_to**2):
        raise ValueError("lambda2 must be in 0..noise_to²")
    if not np.all((rest >= 0) & (rest <= 1)):
        raise ValueError(f"unexplained must be in 0..1, not {rest.min()}..{rest.max()}")
    if np.any(a <= 0):
        raise ValueError("signal must be positive")
    return lambda2 + (a_to * n / a - np.sqrt(n_to**2 - lambda2)) ** 2 * rest


def variance_bounds(table: Table, data_range: Range = None) -> tuple[np.ndarray, np.ndarray]:
    """(lowest, highest) σ*² of each row (R,): λ², and λ² + (κ·n/a)² or, for data in [lo, hi]^d, λ² + κ²·((hi−lo)/2)² where less.

    They hold for all data (in that range) and any Γ. Raises ValueError as :func:`analytic_table`. Eq: L5.
    Source: Bao et al. 2022, Theorem 2.
    """
    lambda2, kappa = _kernel(table)
    most = kappa**2 * (table.noise / table.signal) ** 2
    if data_range is not None:
        low, high = data_range
        if not low < high:
            raise ValueError(f"data_range must be two numbers low < high, not {data_range}")
        most = np.minimum(most, kappa**2 * ((high - low) / 2) ** 2)
    return lambda2, lambda2 + most


def analytic_table(table: Table, gamma: Gamma, data_range: Range = None, estimate: str = "residual", end: str = "mean") -> Table:
    """``table`` with the noise of each row replaced by the best deviation σ* for the model whose Γ was measured. Eq: L5.

        c = σ*,    σ*² = λ² + κ²·(n/a)²·E Var(ε|x_t), clipped to its bounds;    excess = σ*² − λ²

    λ² is what the row's own kernel has (c² − excess): β̃ for :func:`tables.ddpm` of either variance, η²β̃ for :func:`tables.ddim`,
    so 0 for η = 0 and for :func:`tables.euler`, which become stochastic (Analytic-DDIM). κ is its factor of x_0. Any process.

    data_range: (lo, hi) of the data, by which the variance is bounded too (:func:`variance_bounds`).
    estimate: of E Var(ε|x_t): "residual", or the paper's "gamma", which has less to say the higher the noise is (:class:`Gamma`).
    end: "mean", no noise in the last step: the images end at E[x_0|x_t], without what that leaves out; or "noise", σ* there too,
        with which Gaussian data get their own variance (the last row is then not ``exact``). A table that stops at a noise
        level has σ* in all rows.

    Raises ValueError for a table with history or corrections, one that ascends, or one whose laws are not exact, and for times
    outside those measured.
    """
    _needs_gamma(gamma)
    if end not in ENDS:
        raise ValueError(f"end must be one of {ENDS}, not {end!r}")
    lambda2, kappa = _kernel(table)
    low, high = variance_bounds(table, data_range)
    rest = gamma.unexplained(table.t, estimate)
    best = np.clip(lambda2 + kappa**2 * (table.noise / table.signal) ** 2 * rest, low, high)
    exact = table.exact.copy()
    if table.noise_to[-1] == 0:
        if end == "mean":
            best[-1] = 0.0
        else:
            exact[-1] = False
    words = "".join(f", {word}" for word in (estimate * (estimate != "residual"), "noise at the end" * (end == "noise")) if word)
    return replace(table, name=f"analytic({table.name}{words})", c=np.sqrt(best), excess=best - lambda2, exact=exact)


def _kernel(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """(λ², κ) of each row: with the true x_0 it gives N(κ·x_0 + k·x, λ²)."""
    if not isinstance(table, Table):
        raise TypeError(f"table must be a Table (tables.ddpm(s) for one), not {type(table).__name__}")
    if table.H.any() or not table.exact.all() or not table.descends or np.any(np.diff(table.t) >= 0):
        raise ValueError(f"table must descend in single steps whose laws are exact, such as tables.ddpm's; {table.name} does not")
    if np.any(table.signal == 0):
        raise ValueError("table must start where some signal is left (alpha_bar > 0)")
    kappa = table.B0 - table.Be * table.signal / table.noise
    return np.maximum(table.c**2 - table.excess, 0.0), kappa


# ---------------------------------------------------------------------------------------------------------------- the best path


def step_costs(s: Levels, gamma: Gamma, eta: float = 1.0, estimate: str = "residual") -> np.ndarray:
    """J[i, k] = ½·ln(σ*²/λ²) of the step from gamma.t[k] to gamma.t[i], i < k, else ∞; nats per element (K, K). Eq: L5.

    It is the mean of KL(q_σ(x_i|x_k, x_0)‖p(x_i|x_k)) at the best variance, the only part of the bound that the path between two
    ends decides. ``eta`` in (0, 1] as in :func:`tables.ddim` (1: DDPM); at 0 the bound is infinite.
    """
    check_schedule(s)
    _needs_gamma(gamma)
    if not 0 < eta <= 1:
        raise ValueError(f"eta must be in (0, 1], not {eta}: without noise the bound is infinite")
    a, n = s.levels(gamma.t)
    if np.any(a == 0):
        raise ValueError("gamma must be measured where some signal is left (alpha_bar > 0)")
    rest = gamma.unexplained(gamma.t, estimate)
    with np.errstate(invalid="ignore", divide="ignore"):
        added = (n - a / a[:, None] * n[:, None]) * (n + a / a[:, None] * n[:, None])  # row i: to, column k: from
        lambda2 = (eta * n[:, None] / n) ** 2 * added
        on_eps = a[:, None] * n / a - np.sqrt(n[:, None] ** 2 - lambda2)
        costs = 0.5 * np.log1p(on_eps**2 * rest / lambda2)
    return np.where(np.triu(np.ones(costs.shape, bool), 1), costs, np.inf)


def path_cost(s: Levels, gamma: Gamma, grid: Sequence[float] | np.ndarray, eta: float = 1.0, estimate: str = "residual") -> float:
    """The sum of :func:`step_costs` along ascending times of gamma.t: the bound's part between the two ends, nats per element."""
    _needs_gamma(gamma)
    times = np.asarray(grid, np.float64)
    place = np.searchsorted(gamma.t, times)
    if not np.isin(times, gamma.t).all() or np.any(np.diff(times) <= 0):
        raise ValueError("grid must ascend and hold times that gamma was measured at")
    return float(step_costs(s, gamma, eta, estimate)[place[:-1], place[1:]].sum())


def optimal_path(s: Levels, gamma: Gamma, steps: int, eta: float = 1.0, estimate: str = "residual") -> tuple[np.ndarray, float]:
    """(grid, cost): the ``steps`` ascending times of gamma.t, both ends among them, with the least bound. Eq: L5.

        C_1[k] = 0 at the lowest time only,    C_m[k] = min_{i<k} C_{m−1}[i] + J[i, k]

    The grid is for ``tables.ddpm(s, grid=grid)`` (or ddim with this ``eta``) and :func:`analytic_table`. Raises ValueError unless
    2 ≤ steps ≤ the times measured. Source: Bao et al. 2022, section 4; Watson et al. 2021.
    """
    _needs_gamma(gamma)
    K = gamma.t.size
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)):
        raise TypeError(f"steps must be an int, not {type(steps).__name__}")
    if not 2 <= steps <= K:
        raise ValueError(f"steps must be in 2..{K}, the times measured, not {steps}")
    J = step_costs(s, gamma, eta, estimate)
    cost = np.where(np.arange(K) == 0, 0.0, np.inf)
    came = np.zeros((steps, K), np.int64)
    for m in range(1, steps):
        through = cost[:, None] + J
        came[m] = through.argmin(axis=0)
        cost = through[came[m], np.arange(K)]
    path = [K - 1]
    for m in range(steps - 1, 0, -1):
        path.append(int(came[m, path[-1]]))
    grid = gamma.t[path[::-1]]
    return (grid.astype(np.int64) if np.array_equal(grid, np.rint(grid)) else grid), float(cost[-1])
