"""Analytic-DPM: the best variance of the reverse steps against the two fixed ones, few steps at a time. Eq: L5.

Of Gaussian data the law of the samples is known (:func:`frechet.variances`), and so is Γ; of a trained network Γ is measured.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from alphabar.core import analytic, metrics, schedules, tables
from alphabar.core.analytic import Gamma
from alphabar.core.levels import Schedule
from alphabar.core.table import Table
from alphabar.tools.demos import figures
from alphabar.tools.reproductions import frechet
from alphabar.tools.reproductions.network import Network
from alphabar.tools.reproductions.report import Check, Picture, Section, Settings, grid, number, steps_axis

STD, FEW = 0.05, 5
STEPS, PATH_STEPS, NETWORK_STEPS = (5, 10, 20, 50, 100, 1000), (5, 10, 20, 50, 100), (5, 10, 20)
Builder = Callable[[Schedule, int, Gamma], Table]
KINDS: dict[str, Builder] = {
    "β̃": lambda s, n, _: tables.ddpm(s, n),
    "β": lambda s, n, _: tables.ddpm(s, n, "beta"),
    "optimal": lambda s, n, gamma: analytic.analytic_table(tables.ddpm(s, n), gamma),
    "η = 0": lambda s, n, _: tables.ddim(s, n),
    "η = 0, optimal": lambda s, n, gamma: analytic.analytic_table(tables.ddim(s, n), gamma),
}
COLOURS = {"β̃": "#3b8e5a", "β": "#d9632b", "optimal": "#1f5ea8", "η = 0": "#8a8a8a", "η = 0, optimal": "#1e1e1e"}


def exact_gamma(s: Schedule, data: np.ndarray) -> Gamma:
    """Γ of Gaussian data with these variances: the mean of 1/(a²λ + n²). Eq: L5."""
    t = np.arange(1.0, s.T + 1)
    a, n = s.levels(t)
    total = a[:, None] ** 2 * data + n[:, None] ** 2
    zero = np.zeros(s.T)
    return Gamma(t, n, (1 / total).mean(axis=1), zero, (a[:, None] ** 2 * data / total).mean(axis=1), zero, 1, len(data))


def deviations() -> dict[str, float]:
    """What S = 5 steps leave of data N(0, 0.05²), by the variance of the steps. Eq: L5."""
    s, data = schedules.linear(), np.array([STD**2])
    gamma = exact_gamma(s, data)
    found = {name: KINDS[name](s, FEW, gamma) for name in ("β̃", "β", "optimal")}
    found["optimal, last step too"] = analytic.analytic_table(tables.ddpm(s, FEW), gamma, end="noise")
    return {name: float(np.sqrt(frechet.variances(table, data)[0])) for name, table in found.items()}


def distances(steps: tuple[int, ...], dimensions: int = frechet.DIMENSIONS) -> dict[str, list[float]]:
    """Fréchet distance of the Gaussian data of :mod:`frechet` for every kind of variance and S."""
    s, data = schedules.linear(), frechet.spectrum(dimensions)
    gamma = exact_gamma(s, data)
    return {
        name: [frechet.distance(frechet.variances(build(s, n, gamma), data), data) for n in steps]
        for name, build in KINDS.items()
    }


def paths(steps: tuple[int, ...], dimensions: int = frechet.DIMENSIONS) -> dict[int, tuple[float, float, np.ndarray]]:
    """(bound's part between the ends by a uniform path, by the best one, the best one) for each S, nats per dimension."""
    s = schedules.linear()
    gamma = exact_gamma(s, frechet.spectrum(dimensions))
    found = {}
    for n in steps:
        uniform = np.rint(np.linspace(1, s.T, n))
        best, cost = analytic.optimal_path(s, gamma, n)
        found[n] = analytic.path_cost(s, gamma, uniform), cost, best
    return found


def divergence(table: Table, gamma: Gamma) -> float:
    """Σ E KL(q(x'|x_t, x_0) ‖ p(x'|x_t)) over all rows but the last: the bound between the ends, bits per dimension. Eq: L5.

        KL = ½·(ln(σ²/λ²) + (λ² + κ²·(n/a)²·E Var(ε|x_t))/σ² − 1)

    σ² is the row's variance and λ² that of its kernel; the least is at the optimal variance, where the last two terms cancel.
    """
    low, high = (v[:-1] for v in analytic.variance_bounds(table))
    own = table.c[:-1] ** 2
    missed = low + (high - low) * gamma.unexplained(table.t[:-1])
    return float(0.5 * (np.log(own / low) + missed / own - 1).sum() / np.log(2))


def trained(
    network: Network, steps: tuple[int, ...], images: int, samples: int, times: int, seed: int
) -> tuple[Gamma, dict[str, list[float]], dict[str, list[float]]]:
    """(Γ of training images, Fréchet distance of pixels to them, bound), the last two by kind and S; no class told. Eq: L5."""
    x0, _ = network.images("train")
    s = network.s
    asked = np.concatenate([tables.ddpm(s, n).t for n in steps])
    at = np.unique(np.r_[np.rint(np.linspace(1, s.T, times)), asked])
    gamma = analytic.measure_gamma(network.model(), network.xp.asarray(x0[:images]), s, at, seed)
    found: dict[str, list[float]] = {name: [] for name in ("β̃", "β", "optimal")}
    bounds: dict[str, list[float]] = {name: [] for name in found}
    for name in found:
        for n in steps:
            table = KINDS[name](s, n, gamma)
            bounds[name].append(divergence(table, gamma))
            x = network.sample(table, samples, seed)
            found[name].append(metrics.frechet_distance_of_samples(x.reshape(samples, -1), x0.reshape(len(x0), -1)))
    return gamma, found, bounds


def run(settings: Settings) -> Section:
    """Deviation, distances, paths, and a network's Γ. Eq: L5."""
    five = deviations()
    last = five["optimal, last step too"]
    steps, path_steps = settings.size(STEPS, STEPS[:4]), settings.size(PATH_STEPS, PATH_STEPS[:3])
    found, routes = distances(steps), paths(path_steps)
    few = tuple(n for n in steps if n <= 100)
    checks = [
        Check(
            f"data N(0, {STD}²), S = {FEW}: the optimal variance gives {STD}, β̃ and β do not",
            f"{last:.5f}; β̃ {number(five['β̃'])}, β {number(five['β'])}",
            abs(last - STD) < 1e-4 and min(abs(five[k] - STD) for k in ("β̃", "β")) > 0.03,
        ),
        _best(
            f"{frechet.DIMENSIONS} dimensions: with the optimal variance samples are nearest to the data at every S ≤ 100",
            {name: row[: len(few)] for name, row in found.items()},
            few,
        ),
        Check(
            "the best path of S steps has a smaller bound than the uniform one",
            "; ".join(f"S = {n}: {b:.3f} against {u:.3f}" for n, (u, b, _) in routes.items()),
            all(b < u for u, b, _ in routes.values()),
        ),
    ]
    blocks = [
        f"Here: data N(0, {STD}²) with the exact score and Γ, linear β, T = 1000, S = {FEW}. By convention the last step "
        "adds no noise, so that samples end at E[x0|x1] and lack what that leaves out; with noise there too the deviation "
        "is that of the data.",
        grid([["S = 5", *five], ["deviation of the samples", *(f"{v:.5f}" for v in five.values())]]),
        f"The Gaussian data of the Fréchet table, {frechet.DIMENSIONS} dimensions. Γ is one number for all dimensions, so "
        "it is exact for isotropic data only: with it DDPM comes near DDIM with η = 0, and DDIM with its own optimal "
        "noise is ahead of both.",
        grid([["Fréchet distance", *(f"S = {n}" for n in steps)], *([name, *map(number, row)] for name, row in found.items())]),
        "The path: the S of 1000 times, both ends among them, with the least sum of KL terms, by dynamic programming.",
        grid(
            [
                ["S", *map(str, routes)],
                ["uniform, nats per dimension", *(f"{u:.4f}" for u, _, _ in routes.values())],
                ["best", *(f"{b:.4f}" for _, b, _ in routes.values())],
                ["its times", *(", ".join(map(str, p)) if len(p) <= 10 else "…" for _, _, p in routes.values())],
            ]
        ),
    ]
    drawn = [
        Picture("analytic", draw(found, steps, routes), "Left the Fréchet distance by variance, right the best paths of S steps.")
    ]
    net = settings.network
    if net is not None:
        own = net.steps(settings.size(NETWORK_STEPS, NETWORK_STEPS[:1]))
        sizes = settings.size((128, 200, 25), (16, 12, 5))
        gamma, pixels, bounds = trained(net, own, *sizes, settings.seed)
        checks += [
            _best("network: with the Γ measured the bound is lowest at every S", bounds, own),
            _best("network: with the Γ measured samples are nearest to the data at every S", pixels, own),
        ]
        shown = gamma.t[:: max(1, len(gamma.t) // 8)]
        at = np.searchsorted(gamma.t, shown)
        rest = 1 - gamma.noise**2 * gamma.gamma
        blocks += [
            f"Network: {net.name}, told no class; Γ on {sizes[0]} training images. First the bound between the ends, by "
            f"the Γ measured; then {sizes[1]} samples of each kind, x̂0 clipped to the range of the data: Fréchet's "
            "distance between the normal laws of pixels, no FID, with one bias by the number of samples in all rows. "
            "Where clipping holds samples in the range, β̃ is about as good for the pixels as the optimal variance, "
            "though far worse for the bound.",
            grid([["bits per dimension", *(f"S = {n}" for n in own)], *([k, *map(number, row)] for k, row in bounds.items())]),
            grid(
                [
                    ["Fréchet distance of pixels", *(f"S = {n}" for n in own)],
                    *([name, *map(number, row)] for name, row in pixels.items()),
                ]
            ),
            "Two estimates of one thing, what is left unexplained of ε; the second has far less noise.",
            grid(
                [
                    ["t", *(f"{t:g}" for t in shown)],
                    ["1 − n²Γ", *(number(v) for v in rest[at])],
                    ["its standard error", *(number(v) for v in (gamma.noise**2 * gamma.gamma_error)[at])],
                    ["E‖ε − ε_θ‖²/d", *(number(v) for v in gamma.residual[at])],
                ]
            ),
        ]
        drawn.append(
            Picture(
                "analytic_network",
                draw_network(gamma, pixels, own),
                "Left what the network leaves unexplained, right distances of pixels.",
            )
        )
    claim = (
        "Analytic-DPM (L5; the documents name it only): the best variance of a reverse step follows from Γ = E‖score‖²/d, "
        "measured once, and it pays most with few steps."
    )
    return Section(claim, blocks, checks, drawn)


def _best(claim: str, found: dict[str, list[float]], steps: tuple[int, ...]) -> Check:
    rows = np.array([found[name] for name in ("β̃", "β", "optimal")])
    told = "; ".join(f"S = {n}: {', '.join(map(number, column))}" for n, column in zip(steps, rows.T, strict=True))
    return Check(f"{claim} (β̃, β, optimal)", told, bool((rows[2] < rows[:2].min(axis=0)).all()))


def draw(found: dict[str, list[float]], steps: tuple[int, ...], routes: dict[int, tuple[float, float, np.ndarray]]) -> Any:
    """Distances over S, and the best paths."""
    page = figures.figure("With few steps the optimal variance beats both fixed ones", 4.2)
    left, right = page.subplots(1, 2)
    for name, row in found.items():
        left.plot(steps, row, "o--" if "η" in name else "o-", color=COLOURS[name], lw=1.7, ms=4.5, label=name)
    left.set(yscale="log", ylabel="Fréchet distance", title=f"Gaussian data, {frechet.DIMENSIONS} dimensions")
    steps_axis(left, steps)
    left.legend(title="variance of the steps")
    for k, (n, (_, _, path)) in enumerate(routes.items()):
        right.plot(path, np.full(n, k), "o", color=figures.BLUE, ms=3.2)
        right.plot(np.linspace(1, 1000, n), np.full(n, k - 0.25), "|", color=figures.GREY, ms=7)
    right.set(
        xlabel="t",
        title="times of the best path (dots) and of the uniform one",
        yticks=range(len(routes)),
        ylim=(-0.6, len(routes) - 0.6),
    )
    right.set_yticklabels([f"S = {n}" for n in routes])
    return page


def draw_network(gamma: Gamma, pixels: dict[str, list[float]], steps: tuple[int, ...]) -> Any:
    """The measured Γ, and distances of pixels."""
    page = figures.figure("The network's own Γ, measured once, and what it does for few steps", 3.9)
    left, right = page.subplots(1, 2)
    left.errorbar(
        gamma.t,
        1 - gamma.noise**2 * gamma.gamma,
        2 * gamma.noise**2 * gamma.gamma_error,
        fmt="o",
        ms=3.5,
        color=figures.GREY,
        label="1 − n²Γ, two standard errors",
    )
    left.plot(gamma.t, gamma.residual, "o-", ms=3.5, color=figures.BLUE, label="E‖ε − ε_θ‖²/d")
    left.set(xlabel="t", title="the part of ε that the network leaves unexplained")
    left.legend()
    for name, row in pixels.items():
        right.plot(steps, row, "o-", color=COLOURS[name], lw=1.7, ms=4.5, label=name)
    right.set(ylim=(0, None), ylabel="Fréchet distance of pixels", title="samples against the training images")
    steps_axis(right, steps)
    right.legend(title="variance of the steps")
    return page
