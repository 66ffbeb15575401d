"""One x_T decoded with different numbers of steps: the same image, the closer the more steps. Eq: S2-C20, S2-F5, S2-C5."""

from typing import Any

import numpy as np

from alphabar.core import samplers, schedules, tables
from alphabar.core.data import to_uint8
from alphabar.core.mixture import GaussianMixture
from alphabar.tools import pictures
from alphabar.tools.demos import figures
from alphabar.tools.reproductions.judge import Judge
from alphabar.tools.reproductions.network import Network
from alphabar.tools.reproductions.report import Check, Picture, Section, Settings, grid, number, steps_axis

PAIRS = (10, 20, 50, 100, 250, 500)  # each with its double: all divide T
LABELLED = (10, 20, 50, 100)
SHEET = (10, 20, 50, 100, 200)
WEIGHTS, MEANS, STD = (0.4, 0.6), (-1.0, 1.0), 0.3
NODES, REACH = 1601, 5.0


def mixture() -> GaussianMixture:
    """The data of the closed form: two modes."""
    return GaussianMixture(WEIGHTS, np.array(MEANS)[:, None], STD**2)


def starts() -> tuple[np.ndarray, np.ndarray]:
    """(nodes (N, 1), weights) of x_T ~ N(0, 1)."""
    x = np.linspace(-REACH, REACH, NODES)
    p = np.exp(-(x**2) / 2)
    return x[:, None], p / p.sum()


def decoded(steps: int) -> np.ndarray:
    """x_0 of every node, η = 0, from t = T for every S."""
    s = schedules.linear()
    return samplers.sample(mixture().model(s), tables.ddim(s, steps, spacing="trailing"), starts()[0])[:, 0]


def exact(pairs: tuple[int, ...]) -> tuple[dict[int, float], dict[int, float]]:
    """(root-mean-square distance of x_0 by S and by 2S steps, share of x_T that end in one mode with S and 1000 steps)."""
    p = starts()[1]
    ends = {n: decoded(n) for n in sorted({*pairs, *(2 * n for n in pairs), *LABELLED, 1000})}
    apart = {n: float(np.sqrt(p @ (ends[n] - ends[2 * n]) ** 2)) for n in pairs}
    alike = {n: float(p @ ((ends[n] > 0) == (ends[1000] > 0))) for n in LABELLED}
    return apart, alike


def slope(apart: dict[int, float]) -> float:
    """d ln distance/d ln S by least squares."""
    return float(np.polyfit(np.log(list(apart)), np.log(list(apart.values())), 1)[0])


def trained(network: Network, steps: tuple[int, ...], images: int, seed: int) -> dict[int, np.ndarray]:
    """Samples (images, H, W, C) for each S from one x_T each; the network is told no class, so x_T alone decides."""
    return {n: network.sample(tables.ddim(network.s, n), images, seed) for n in steps}


def run(settings: Settings) -> Section:
    """Distances, modes, and the sheet. Eq: S2-C20, S2-F5."""
    apart, alike = exact(settings.size(PAIRS, PAIRS[:4]))
    fall = slope(apart)
    few = min(v for n, v in alike.items() if n >= 50)
    checks = [
        Check("mixture: the distance between S and 2S steps falls as 1/S", f"slope {fall:.2f}", -1.2 < fall < -0.8),
        Check("mixture: from S = 50 on more than 95 % of x_T end in the mode of S = 1000", f"at least {few:.2%}", few > 0.95),
    ]
    blocks = [
        "Here: 0.4·N(−1, 0.3²) + 0.6·N(1, 0.3²) with its exact network, η = 0, T = 1000; the mean over x_T ~ N(0, 1) by "
        "quadrature.",
        grid([["S", *map(str, apart)], ["RMS distance to 2S steps", *map(number, apart.values())]]),
        grid([["S", *map(str, alike)], ["ends in the mode of S = 1000", *(f"{v:.2%}" for v in alike.values())]]),
    ]
    drawn = [Picture("consistency", draw(apart), "Distance of x_0 between S and 2S steps from one x_T, exact network.")]
    net = settings.network
    if net is not None:
        steps = net.steps(settings.size(SHEET, SHEET[:2]))
        images = trained(net, steps, settings.size(36, 4), settings.seed)
        last = images[steps[-1]]
        far = {n: float(np.sqrt(((images[n] - last) ** 2).mean())) for n in steps[:-1]}
        chance = float(np.sqrt(((last - np.roll(last, 1, axis=0)) ** 2).mean()))
        rows = [
            ["S", *map(str, far), "two images of unlike x_T"],
            [f"RMS distance to S = {steps[-1]}", *map(number, [*far.values(), chance])],
        ]
        known, labels = net.images("train")
        if labels is not None:
            judge = Judge(known, labels)
            same = {n: float((judge.read(images[n]) == judge.read(last)).mean()) for n in far}
            rows.append([f"read as the class of S = {steps[-1]}", *(f"{v:.0%}" for v in same.values()), ""])
        falls = bool((np.diff(list(far.values())) < 0).all())
        checks.append(
            Check(f"network: the distance to S = {steps[-1]} falls with S", ", ".join(map(number, far.values())), falls)
        )
        found = f"{number(max(far.values()))} against {number(chance)}"
        checks.append(Check("network: one x_T gives one image, nearer than two of unlike x_T", found, max(far.values()) < chance))
        blocks += [f"Network: {net.name}, {len(last)} samples told no class, η = 0.", grid(rows)]
        tiles = np.concatenate([to_uint8(images[n][:12]) for n in steps])
        page = pictures.sheet(
            tiles, min(12, len(last)), [f"S = {n}" for n in steps], f"one x_T in each column; {net.file}, DDIM, eta = 0, no class"
        )
        drawn.append(Picture("consistency_sheet", page, "In each column one x_T, in each row another number of steps."))
    claim = "DDIM, Figure 5 (S2-C20, S2-F5): samples from one x_T share their high-level features whatever the number of steps."
    return Section(claim, blocks, checks, drawn)


def draw(apart: dict[int, float]) -> Any:
    """The distance over S, and x_0 over x_T for some S."""
    from matplotlib.ticker import NullFormatter

    page = figures.figure("One x_T, one image: what changes with the number of steps falls as 1/S", 3.8)
    left, right = page.subplots(1, 2)
    left.plot(list(apart), list(apart.values()), "o-", color=figures.BLUE, lw=1.8, ms=5)
    n = np.array(list(apart), float)
    left.plot(n, apart[PAIRS[2]] * PAIRS[2] / n, color=figures.GREY, lw=1, ls=":", label="1/S")
    left.set(yscale="log", ylabel="RMS distance", ylim=(1e-3, 1e-1), title="x_0 by S and by 2S steps")
    steps_axis(left, list(apart))
    left.yaxis.set_minor_formatter(NullFormatter())
    left.legend()
    x = starts()[0][:, 0]
    for steps, colour in ((10, "#9cbfe2"), (20, "#5b8fc9"), (50, figures.BLUE), (1000, figures.INK)):
        right.plot(x, decoded(steps), color=colour, lw=1.6, label=f"S = {steps}")
    right.set(xlabel="x_T", ylabel="x_0", title="the map from x_T to x_0", xlim=(-3, 3), ylim=(-2, 2))
    right.legend(loc="upper left")
    return page
