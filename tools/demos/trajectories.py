"""Trajectories of an SDE and of its probability-flow ODE in one dimension, with the density behind them.

Left the forward process from the data, a mixture of two normal laws, to noise; right the reverse one from the prior to data, with
exact scores. The SDE's paths wander, the ODE's are smooth and never cross, yet at each time both have the same density. In one
dimension an ODE path keeps its quantile of that density. Eq: S0-C10, S2-E14, S4-E64, S4-E65, S4-E66, S4-E67, S4-E69.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from math import erf
from typing import Any

import numpy as np

from alphabar import kernels
from alphabar.core import samplers, tables
from alphabar.core.mixture import GaussianMixture
from alphabar.core.sde import SDE, VESDE, VPSDE, SubVPSDE
from alphabar.kernels import streams
from alphabar.tools.command import Parser, integer
from alphabar.tools.demos import figures

PROCESSES: dict[str, SDE] = {"vp": VPSDE(), "ve": VESDE(sigma_max=6.0), "subvp": SubVPSDE()}
NAMES = {"vp": "VP", "ve": "VE", "subvp": "sub-VP"}
WEIGHTS, MEANS, STD = (0.3, 0.7), (-2.1, 0.9), 0.35
ODE_QUANTILES, SDE_QUANTILES = np.linspace(0.05, 0.95, 9), np.array([0.06, 0.22, 0.38, 0.54, 0.7, 0.86])  # of the paths drawn
SHOWN = 300  # points of a path
Run = Callable[[np.ndarray], np.ndarray]  # starts (path, 1) to trajectories (time, path, 1)
erf_of = np.vectorize(erf, otypes=[np.float64])


def options(parser: Parser) -> None:
    parser.add_argument(
        "--process", choices=tuple(PROCESSES), default="vp", help="variance preserving (default), exploding, sub-VP"
    )
    parser.add_argument("--steps", type=integer(50, 10**5), default=1000, help="steps of each path (default 1000)")
    parser.add_argument("--samples", type=integer(100, 10**6), default=4000, help="samples behind the numbers (default 4000)")


@dataclass(frozen=True)
class Paths:
    """Trajectories (time, path) with their times, and the ends (N,) of many more."""

    times: np.ndarray
    sde: np.ndarray
    ode: np.ndarray
    sde_ends: np.ndarray
    ode_ends: np.ndarray
    quantile_error: float  # of the ODE paths: the largest change of F_t(x_t) between start and end


@dataclass(frozen=True)
class Found:
    """What is drawn: the process, its forward and its reverse trajectories."""

    name: str
    s: SDE
    forward: Paths
    reverse: Paths


def data() -> GaussianMixture:
    """The law at t = 0."""
    return GaussianMixture(WEIGHTS, np.array(MEANS)[:, None], STD**2)


def law(s: SDE, t: float) -> GaussianMixture:
    """The law of x_t."""
    signal, noise = s.levels(t)
    return data().diffuse(float(signal), float(noise))


def cdf(mixture: GaussianMixture, x: np.ndarray) -> np.ndarray:
    """P(X ≤ x), for a mixture in one dimension."""
    means, variances = mixture.means[:, 0], mixture.covariances[:, 0, 0]
    return 0.5 * (1 + erf_of((x[..., None] - means) / np.sqrt(2 * variances))) @ mixture.weights


def quantiles(mixture: GaussianMixture, u: np.ndarray) -> np.ndarray:
    """The x with P(X ≤ x) = u."""
    far = 10 * float(np.sqrt(mixture.covariance[0, 0]))
    low, high = np.full(u.shape, -far), np.full(u.shape, far)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(mixture, middle) < u
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return middle


def _forward_sde(s: SDE, x: np.ndarray, times: np.ndarray, seed: int) -> np.ndarray:
    """Paths (time, path) through ascending times: x' = (a'/a)·x + √v·z, exact in law at each time."""
    signal, _ = s.levels(times)
    path = [x]
    for i in range(1, len(times)):
        z = kernels.normals(np.empty(x.shape), seed, i, streams.PATH)
        path.append(signal[i] / signal[i - 1] * path[-1] + np.sqrt(s.step_variance(times[i], times[i - 1])) * z)
    return np.array(path)


def measure(process: str, steps: int, samples: int, seed: int) -> Found:
    """Forward and reverse trajectories of the process: a few from chosen quantiles for the picture, many for the numbers."""
    s = PROCESSES[process]
    model, last, clean = data().model(s), law(s, s.T), data()
    grid = s.times(steps, "trailing")
    up, down = np.r_[0.0, grid], np.r_[grid[::-1], 0.0]
    encode, decode = tables.ddim_encode(s, grid=grid), tables.heun(s, grid=grid)
    wander, flow = tables.euler_maruyama(s, grid=grid), len(decode)

    def paths(start: GaussianMixture, end: GaussianMixture, many: np.ndarray, times: np.ndarray, sde: Run, ode: Run) -> Paths:
        wandered = sde(many[:, None])[..., 0]
        at_data = wandered[0 if start is clean else -1]
        shown = [int(np.argmin(np.abs(at_data - x))) for x in quantiles(clean, SDE_QUANTILES)]
        x = np.r_[quantiles(start, ODE_QUANTILES), many]
        flowed = ode(x[:, None])[..., 0]
        change = np.abs(cdf(end, flowed[-1]) - cdf(start, x)).max()
        m = len(ODE_QUANTILES)
        return Paths(times, wandered[:, shown], flowed[:, :m], wandered[-1], flowed[-1, m:], float(change))

    def run_table(table: tables.Table) -> Run:
        return lambda x: samplers.sample(model, table, x, seed, trajectory=True)

    many = clean.sample(samples, seed)[:, 0]
    forward = paths(clean, last, many, up, lambda x: _forward_sde(s, x, up, seed), run_table(encode))
    many = samplers.prior((samples, 1), seed, dtype=np.float64, std=s.prior_std)[:, 0]
    corrected = np.r_[0:flow:2, flow]  # of Heun's states
    reverse = paths(last, clean, many, down, run_table(wander), lambda x: run_table(decode)(x)[corrected])
    return Found(process, s, forward, reverse)


def run(given: Namespace) -> tuple[list[str], Any]:
    """(the numbers as lines, the figure)."""
    found = measure(given.process, given.steps, given.samples, given.seed)
    return table(found), draw(found)


def distance(mixture: GaussianMixture, x: np.ndarray) -> float:
    """Kolmogorov–Smirnov distance between the samples x (N,) and a law in one dimension."""
    u, n = np.sort(cdf(mixture, x)), len(x)
    return float(max((np.arange(1, n + 1) / n - u).max(), (u - np.arange(n) / n).max()))


def prior_gap(s: SDE) -> float:
    """The same distance between the prior of x_T and its exact law."""
    prior = GaussianMixture([1.0], [[0.0]], s.prior_std**2)
    x = np.linspace(-6, 6, 4001) * s.prior_std
    return float(np.abs(cdf(prior, x) - cdf(law(s, s.T), x)).max())


def table(found: Found) -> list[str]:
    """Where the samples end, against the law there."""
    rows = [["end of", "mean", "std", "share below 0", "distance", "samples"]]
    ends = {
        f"{NAMES[found.name]} forward": (law(found.s, found.s.T), found.forward),
        f"{NAMES[found.name]} reverse": (data(), found.reverse),
    }
    for name, (target, paths) in ends.items():
        exact = target.mean[0], np.sqrt(target.covariance[0, 0]), cdf(target, np.zeros(1))[0]
        rows.append([f"{name}: exact", *(f"{v:.4f}" for v in exact), "", ""])
        for kind, x in (("SDE", paths.sde_ends), ("ODE", paths.ode_ends)):
            values = x.mean(), x.std(), (x < 0).mean(), distance(target, x)
            rows.append([f"{name}: {kind}", *(f"{v:.4f}" for v in values), str(len(x))])
    lines = figures.columns(rows)
    chance = 1.63 / len(found.reverse.sde_ends) ** 0.5
    lines.append(f"distance: of Kolmogorov and Smirnov; chance alone gives less than {chance:.4f} in 99 of 100 runs")
    lines.append(f"distance of the prior from the exact law at t = T: {prior_gap(found.s):.2g}")
    lines.append(
        f"quantile kept along the ODE to {found.forward.quantile_error:.2g} forward (Euler), "
        f"{found.reverse.quantile_error:.2g} in reverse (Heun)"
    )
    return lines


def draw(found: Found) -> Any:
    """Density of the data, forward paths, density of the prior, reverse paths, what came out."""
    s, name = found.s, NAMES[found.name]
    page = figures.figure(f"{name}: paths of the SDE wander, those of its ODE run smoothly, through the same densities", 4.6)
    axes = page.subplots(1, 5, sharey=True, gridspec_kw={"width_ratios": (1, 4.6, 1, 4.6, 1), "wspace": 0.02})
    reach = 2.4 * s.prior_std if s.prior_std > 1 else 3.5
    x = np.linspace(-reach, reach, 401)
    at = np.linspace(0, s.T, 161)
    density = np.stack([np.exp(law(s, t).log_prob(x[:, None])) for t in at], axis=1)
    density /= density.max(axis=0)
    for ax, paths, title in (
        (axes[1], found.forward, "forward: data to noise"),
        (axes[3], found.reverse, "reverse: noise to data"),
    ):
        reverse = paths is found.reverse
        ax.pcolormesh(at, x, density, cmap=figures.DENSITY, vmax=1.35, shading="gouraud", rasterized=True)
        every = slice(None, None, max(1, len(paths.times) // SHOWN))
        ax.plot(paths.times[every], paths.sde[every], color=figures.INK, lw=0.6)
        ax.plot(paths.times[every], paths.ode[every], color=figures.ORANGE, lw=1.6)
        ax.set(xlim=(s.T, 0) if reverse else (0, s.T), xlabel="time t" + (", running backwards" if reverse else ""), title=title)
        ax.set_xticks(np.linspace(0, s.T, 5))
    ends = (data(), None), (law(s, s.T), found.forward.sde_ends), (data(), found.reverse.sde_ends)
    for ax, (target, samples), title in zip(axes[::2], ends, ("data", "noise", "result"), strict=True):
        p = np.exp(target.log_prob(x[:, None]))
        if samples is not None:
            bins = np.arange(-reach, reach, np.sqrt(target.covariance[0, 0]) / 7)
            ax.hist(samples, bins, density=True, orientation="horizontal", histtype="stepfilled", color=figures.PALE)
        ax.plot(p, x, color=figures.BLUE, lw=1.6)
        ax.set(xticks=[], xlim=(0, p.max() * 1.15), ylim=(-reach, reach), title=title)
        ax.spines["bottom"].set_visible(False)
    for ax in axes[1:]:
        ax.tick_params(left=False)
    axes[0].set_ylabel("x")
    handles = [axes[1].lines[0], axes[1].lines[-1], axes[0].lines[0], axes[4].patches[0]]
    names = ["SDE", "probability-flow ODE", "exact density, also shaded behind", "ends of SDE paths"]
    page.legend(handles, names, loc="outside lower center", ncols=4)
    return page
