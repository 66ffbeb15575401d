"""The analogue of DDIM's Table 2: encode, decode, and the mean squared error per dimension over S.

Of a mixture in one dimension with its exact network the error is an integral over the data; of a trained network it is the mean
over held-out images. Both conventions of the time told while encoding. Eq: S2-T2, T2, S2-C17, S2-C5.
"""

from typing import Any

import numpy as np

from alphabar.core import editing, paper_tables, schedules
from alphabar.core.mixture import GaussianMixture
from alphabar.tools.demos import figures
from alphabar.tools.reproductions.network import Network
from alphabar.tools.reproductions.report import NONE, Check, Picture, Section, Settings, grid, number, steps_axis

STEPS = tuple(paper_tables.DDIM_RECONSTRUCTION)
LABELS = ("current", "target")
SLOPES = (-2.1, -1.0)
WEIGHTS, MEANS, STDS = (0.3, 0.7), (-0.7, 0.4), (0.15, 0.25)
NODES, REACH = 1601, 3.0


def mixture() -> GaussianMixture:
    """The data of the closed form."""
    return GaussianMixture(WEIGHTS, np.array(MEANS)[:, None], np.array(STDS) ** 2)


def exact(steps: tuple[int, ...], label: str) -> list[float]:
    """E[(x − decode(encode(x)))²] over the mixture, by quadrature. Eq: S2-T2."""
    law, s = mixture(), schedules.linear()
    x = np.linspace(-REACH, REACH, NODES)[:, None]
    p = np.exp(law.log_prob(x))
    p /= p.sum()
    return [float(p @ editing.reconstruct(law.model(s), s, x, n, label)[1]) for n in steps]


def trained(network: Network, steps: tuple[int, ...], label: str, images: int) -> list[float]:
    """The mean error over held-out images, each with its own class told both ways. Eq: S2-T2."""
    x, labels = network.images("test", images)
    x0, model = network.xp.asarray(x), network.model(labels)
    return [float(editing.reconstruct(model, network.s, x0, n, label)[1].mean()) for n in steps]


def slopes(steps: tuple[int, ...], errors: list[float]) -> np.ndarray:
    """d ln error/d ln S between neighbours."""
    return np.diff(np.log(errors)) / np.diff(np.log(steps))


def fitted(steps: tuple[int, ...], errors: list[float]) -> float:
    """The least-squares slope of ln error over ln S."""
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def _ratios(current: list[float], target: list[float]) -> str:
    found = np.divide(current, target)
    return f"{found[0]:.1f} (few steps) to {found[-1]:.1f} (many)"


def run(settings: Settings) -> Section:
    """The table and its claims. Eq: S2-T2, S2-C17."""
    published = {n: e for n, e in paper_tables.DDIM_RECONSTRUCTION.items() if n <= 200}  # beyond they are rounded to one digit
    paper = f"monotone; slope {fitted(tuple(published), list(published.values())):.2f} over S = 10…200"
    steps = settings.size(STEPS, STEPS[:4])
    rows: dict[str, dict[int, float]] = {"published, CIFAR-10 test set": dict(paper_tables.DDIM_RECONSTRUCTION)}
    checks, lines = [], []
    for label in LABELS:
        lines.append((f"mixture, {label} label", steps, exact(steps, label), SLOPES))
    if settings.network is not None:
        own = settings.network.steps(settings.size((10, 20, 50, 100), (10, 20)))
        images = settings.size(32, 4)
        for label in LABELS:
            lines.append((f"network, {label} label", own, trained(settings.network, own, label, images), SLOPES))
    for name, counts, errors, (low, high) in lines:
        rows[name] = dict(zip(counts, errors, strict=True))
        slope, each = fitted(counts, errors), slopes(counts, errors)
        found = f"slope {slope:.2f}, between neighbours {each.min():.2f} to {each.max():.2f}"
        checks.append(
            Check(
                f"{name}: error falls with S, slope in [{low:g}, {high:g}]",
                found,
                bool((each < 0).all() and low <= slope <= high),
                paper,
            )
        )
    better = [f"{_ratios(lines[0][2], lines[1][2])} times for the mixture"]
    if len(lines) > 2:
        better.append(f"{_ratios(lines[2][2], lines[3][2])} times for the network")
    header = ["per-dimension MSE", *(f"S = {n}" for n in STEPS)]
    cells = [[name, *(number(row[n]) if n in row else NONE for n in STEPS)] for name, row in rows.items()]
    blocks = [
        "Here: the mixture 0.3·N(−0.7, 0.15²) + 0.7·N(0.4, 0.25²) with its exact network, linear β, T = 1000; the "
        "expected error by quadrature over the data. DDIM with η = 0 up and down the same uniform sub-sequence, S steps "
        "each way. *Current* tells the network the time it stands at (guided-diffusion), *target* the one it steps to "
        "(diffusers)."
        + (
            ""
            if settings.network is None
            else f" Network: {settings.network.name}, {settings.size(32, 4)} held-out images, no guidance, nothing clipped."
        ),
        grid([header, *cells]),
        f"Telling the target makes the error smaller by {', '.join(better)}. Euler's method there and back has an error of "
        "order 1/S, so the squared error tends to 1/S²; the published slopes are flatter, as those of a network are where "
        "its own roughness, not the step, sets the error.",
    ]
    claim = "DDIM, Table 2 (S2-T2, S2-C17): images come back from their codes, and the more closely the more steps."
    caption = "Error of encoding and decoding over S, with lines ∝ 1/S and ∝ 1/S²."
    return Section(claim, blocks, checks, [Picture("reconstruction", draw(rows), caption)])


def draw(rows: dict[str, dict[int, float]]) -> Any:
    """All rows over S."""
    page = figures.figure("DDIM's codes give their images back, the more closely the more steps", 4.4)
    ax = page.subplots()
    styles = [(figures.INK, "o-"), (figures.BLUE, "o--"), (figures.BLUE, "o-"), (figures.ORANGE, "s--"), (figures.ORANGE, "s-")]
    for (name, row), (colour, style) in zip(rows.items(), styles, strict=False):
        ax.plot(list(row), list(row.values()), style, color=colour, lw=1.8, ms=4.5, label=name)
    for slope, start, name in ((-1, 1.2e-3, "∝ 1/S"), (-2, 2.2e-5, "∝ 1/S²")):
        ends = np.array([200, 700])
        values = start * (ends / 200.0) ** slope
        ax.plot(ends, values, color=figures.GREY, lw=1.2, ls=":")
        ax.text(ends[0] / 1.04, values[0], name, color=figures.GREY, ha="right", va="center", fontsize=9)
    ax.set_yscale("log")
    ax.set(ylabel="mean squared error per dimension", ylim=(1.5e-6, 0.2))
    steps_axis(ax, STEPS, "steps S, each way")
    ax.legend()
    return page
