"""Wall time of sampling over the number of steps: the claim is a straight line. Eq: S2-F4, S2-C21, S0-C21, S2-C4."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from alphabar.core import metrics, samplers, schedules, tables
from alphabar.core.levels import Levels
from alphabar.core.mixture import GaussianMixture
from alphabar.tools.demos import figures
from alphabar.tools.reproductions.report import Check, Picture, Section, Settings, grid, number

Clock = Callable[[], float]
STEPS, NETWORK_STEPS = (10, 20, 50, 100, 200), (10, 20, 50, 100)
STRAIGHT = 0.98  # R² of a line
DIMENSIONS = 64


def measure(
    model: samplers.Model, s: Levels, x_T: Any, steps: tuple[int, ...], repeats: int, clock: Clock = time.perf_counter
) -> tuple[list[float], list[int]]:
    """(the shortest time of ``repeats`` runs, the calls of the model in one run) for each S, η = 0. Eq: S2-F4.

    The runs take turns, so that what else the machine does falls on all S alike; one more run before them is not counted.
    """
    calls = 0

    def counted(x: Any, t: Any) -> Any:
        nonlocal calls
        calls += 1
        return model(x, t)

    rows = [tables.ddim(s, n) for n in steps]
    samplers.sample(counted, rows[0], x_T)
    shortest, counts = [np.inf] * len(steps), [0] * len(steps)
    for _ in range(repeats):
        for i, table in enumerate(rows):
            calls, begun = 0, clock()
            samplers.sample(counted, table, x_T)
            shortest[i], counts[i] = min(shortest[i], clock() - begun), calls
    return shortest, counts


def run(settings: Settings) -> Section:
    """Time and calls over S, with the fitted line. Eq: S2-F4, S2-C21."""
    law = GaussianMixture(np.ones(10), np.random.default_rng(settings.seed).normal(size=(10, DIMENSIONS)), 0.1)
    s = schedules.linear()
    steps = settings.size(STEPS, STEPS[:3])
    size = settings.size(256, 64)
    x_T = samplers.prior((size, DIMENSIONS), settings.seed, dtype=np.float64)
    found = {
        f"exact mixture, {size} samples of {DIMENSIONS}": (steps, *measure(law.model(s), s, x_T, steps, settings.size(5, 2)))
    }
    net = settings.network
    if net is not None:
        own, size = net.steps(settings.size(NETWORK_STEPS, NETWORK_STEPS[:2])), settings.size(16, 2)
        timed = measure(net.model(), net.s, net.prior(size, settings.seed), own, settings.size(2, 1))
        found[f"network, {size} images of {'×'.join(map(str, net.shape))}"] = (own, *timed)
    checks, rows = [], [["model", "S", "calls", "time", "time a step"]]
    for name, (counts, seconds, calls) in found.items():
        line = metrics.fit_linear_cost(counts, seconds)
        checks.append(
            Check(f"{name}: as many calls of the network as steps", ", ".join(map(str, calls)), list(calls) == list(counts))
        )
        checks.append(
            Check(
                f"{name}: time is linear in S",
                f"R² = {line.r2:.4f}, {1e3 * line.slope:.3g} ms a step, {1e3 * line.intercept:+.2g} ms at S = 0",
                line.r2 > STRAIGHT and line.slope > 0,
                "a straight line in the figure; its numbers are not in the text",
            )
        )
        rows += [
            [name, str(n), str(c), f"{number(1e3 * t)} ms", f"{number(1e3 * t / n)} ms"]
            for n, t, c in zip(counts, seconds, calls, strict=True)
        ]
    claim = "DDIM, Figure 4 (S2-F4, S2-C21, S0-C21): the time to sample grows linearly with the number of steps."
    blocks = ["Here: wall time on the machine at hand, the shortest of a few runs that take turns; DDIM, η = 0.", grid(rows)]
    return Section(claim, blocks, checks, [Picture("time", draw(found), "Time over S, with the least-squares lines.")])


def draw(found: dict[str, tuple[tuple[int, ...], list[float], list[int]]]) -> Any:
    """A panel for each model."""
    page = figures.figure("The time to sample is a straight line over the number of steps", 3.8)
    axes = page.subplots(1, len(found), squeeze=False)[0]
    for ax, colour, (name, (steps, seconds, _)) in zip(axes, (figures.BLUE, figures.ORANGE), found.items(), strict=False):
        line = metrics.fit_linear_cost(steps, seconds)
        ends = np.array([0, steps[-1] * 1.05])
        ax.plot(ends, 1e3 * (line.intercept + line.slope * ends), color=figures.GREY, lw=1)
        ax.plot(steps, 1e3 * np.array(seconds), "o", color=colour, ms=6)
        ax.set(xlabel="steps S", ylabel="milliseconds", title=f"{name}: R² = {line.r2:.4f}", xlim=(0, None), ylim=(0, None))
        ax.grid(color=figures.PALE, lw=0.6)
        ax.set_axisbelow(True)
    return page
