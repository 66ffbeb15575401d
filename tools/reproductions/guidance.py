"""Fidelity against diversity over the guidance weight w: two normal classes in closed form, and a network's classes by a judge.

ε̃ = (1 + w)·ε_c − w·ε_u; w = 0 is the conditional model, the scale of much code is 1 + w. Eq: S0-C13, S0-E37, S0-E35, S3-C12.
"""

from typing import Any, NamedTuple

import numpy as np

from alphabar.core import samplers, schedules, tables
from alphabar.core.guidance import classifier_free_eps
from alphabar.core.mixture import GaussianMixture
from alphabar.tools.demos import figures
from alphabar.tools.reproductions.judge import Judge, diversity
from alphabar.tools.reproductions.network import Network
from alphabar.tools.reproductions.report import Check, Picture, Section, Settings, grid

WEIGHTS = (-0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
MEAN, STD = 1.0, 1.0  # the classes N(±1, 1), equally likely
NODES, REACH = 1201, 6.0
ODE_STEPS, STEPS = 60, 25
NETWORK_WEIGHTS = (-0.5, -0.25, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
ERROR = 0.01  # of the curves of a few hundred samples


class Law(NamedTuple):
    """A law on a line: nodes, their shares, and the density at the nodes."""

    x: np.ndarray
    p: np.ndarray
    density: np.ndarray

    @property
    def deviation(self) -> float:
        return float(np.sqrt(self.p @ (self.x - self.p @ self.x) ** 2))

    @property
    def fidelity(self) -> float:
        """The mean of p(c|x)."""
        return float(self.p @ posterior(self.x))


def posterior(x: np.ndarray) -> np.ndarray:
    """p(c|x) of the class at +1."""
    return 1 / (1 + np.exp(-2 * MEAN * x / STD**2))


def guided_ode(w: float, steps: int = ODE_STEPS) -> Law:
    """The law that the guided probability-flow ODE brings N(0, 1) to, by quadrature over x_T. Eq: S0-E37, S2-E14.

    On a line the flow keeps the order of its paths, so the density is that of x_T divided by dx_0/dx_T.
    """
    s = schedules.linear()
    own, both = (GaussianMixture(np.ones(len(m)), np.array(m)[:, None], STD**2).model(s) for m in ([MEAN], [-MEAN, MEAN]))
    start = np.linspace(-REACH, REACH, NODES)
    x = samplers.sample(lambda x, t: classifier_free_eps(own(x, t), both(x, t), w), tables.rk4(s, steps), start[:, None])[:, 0]
    p = np.exp(-(start**2) / 2)
    return Law(x, p / p.sum(), p / np.sqrt(2 * np.pi) / np.gradient(x, start))


def tilted(w: float) -> Law:
    """p(x|c)·p(c|x)^w, what the guided score at t = 0 belongs to. Eq: S0-E35."""
    x = np.linspace(MEAN - 9 * STD, MEAN + 9 * STD, 4 * NODES)
    log = -((x - MEAN) ** 2) / (2 * STD**2) + w * np.log(posterior(x))
    p = np.exp(log - log.max())
    p /= p.sum()
    return Law(x, p, p / (x[1] - x[0]))


class Samples(NamedTuple):
    """What a judge says of a network's samples over w."""

    accuracy: list[float]  # read as the class asked for
    diversity: list[float]  # mean distance within a class, that of real images 1


def trained(network: Network, weights: tuple[float, ...], images: int, seed: int) -> tuple[Samples, Judge, float] | None:
    """(samples' scores, the judge, its accuracy on held-out images); None where the network knows no classes. Eq: S0-C13."""
    known, labels = network.images("train")
    held, truth = network.images("test")
    if labels is None or truth is None:
        return None
    judge = Judge(known, labels)
    classes = np.unique(labels)
    real = diversity(known, labels)
    table, asked = tables.ddim(network.s, min(STEPS, network.s.T)), np.resize(classes, images)
    found = Samples([], [])
    for w in weights:
        x = network.sample(table, images, seed, asked, w)
        found.accuracy.append(float((judge.read(x) == asked).mean()))
        found.diversity.append(float((diversity(x, asked) / real).mean()))
    return found, judge, float((judge.read(held) == truth).mean())


def run(settings: Settings) -> Section:
    """The curves. Eq: S0-C13, S3-C12."""
    laws = {w: guided_ode(w) for w in WEIGHTS}
    tilts = {w: tilted(w) for w in WEIGHTS}
    fidelity, spread = ([getattr(law, name) for law in laws.values()] for name in ("fidelity", "deviation"))
    checks = [
        _trade("two normal classes, guided ODE", fidelity, spread, "deviation"),
        _trade(
            "two normal classes, density p(x|c)·p(c|x)^w",
            [t.fidelity for t in tilts.values()],
            [t.deviation for t in tilts.values()],
            "deviation",
        ),
    ]
    rows = [["w", *(f"{w:g}" for w in WEIGHTS)]]
    for name, found in (("guided ODE", laws), ("p(x|c)·p(c|x)^w", tilts)):
        rows.append([f"{name}: mean p(c|x)", *(f"{law.fidelity:.4f}" for law in found.values())])
        rows.append([f"{name}: deviation", *(f"{law.deviation:.4f}" for law in found.values())])
    blocks = [
        "Here: classes N(±1, 1), equally likely, exact ε_c and ε_u, linear β, T = 1000. The law of the guided ODE by "
        f"carrying N(0, 1) through {ODE_STEPS} Runge–Kutta steps; beside it the density whose score the guided score is at "
        "t = 0. They are not the same law (the noised tilted density is not the tilted noised one), yet trade alike.",
        grid(rows),
    ]
    net, samples = settings.network, None
    if net is not None:
        images = settings.size(200, 10)
        weights = settings.size(NETWORK_WEIGHTS, (-0.5, 4.0))
        result = trained(net, weights, images, settings.seed)
        if result is None:
            blocks.append(f"Network: {net.name} knows no classes, so there is nothing to guide to.")
        else:
            samples, judge, real = result
            checks.append(
                _trade(
                    "network: accuracy of the judge, diversity in the class, to 0.01",
                    samples.accuracy,
                    samples.diversity,
                    "diversity",
                    error=ERROR,
                )
            )
            error = 100 * np.sqrt(0.25 / images)
            blocks += [
                f"Network: {net.name}, {images} samples, every class in turn, DDIM of {min(STEPS, net.s.T)} steps, η = 0. "
                f"Judge: {judge.name}, which reads {real:.1%} of the held-out images right; the error of an accuracy is at "
                f"most {error:.1f} %. Diversity: the mean distance of two images of a class, that of real ones 1.",
                grid(
                    [
                        ["w", *(f"{w:g}" for w in weights)],
                        ["accuracy", *(f"{v:.1%}" for v in samples.accuracy)],
                        ["diversity", *(f"{v:.3f}" for v in samples.diversity)],
                    ]
                ),
            ]
    claim = "Guidance (S0-C13, S3-C12): the larger w, the more faithful to the class the samples are, and the less diverse."
    shown = None if samples is None else (settings.size(NETWORK_WEIGHTS, (-0.5, 4.0)), samples)
    return Section(
        claim,
        blocks,
        checks,
        [Picture("guidance", draw(laws, tilts, shown), "Densities under guidance, and the trade of fidelity for diversity.")],
    )


def _trade(what: str, fidelity: list[float], spread: list[float], name: str, error: float = 0.0) -> Check:
    """Both curves run one way, but for steps back of at most ``error``."""
    up, down = np.diff(fidelity), np.diff(spread)
    ends = fidelity[-1] > fidelity[0] and spread[-1] < spread[0]
    found = f"{fidelity[0]:.3f} to {fidelity[-1]:.3f}, {name} {spread[0]:.3f} to {spread[-1]:.3f}"
    return Check(f"{what}: fidelity up, {name} down with w", found, bool(ends and (up > -error).all() and (down < error).all()))


def draw(laws: dict[float, Law], tilts: dict[float, Law], samples: tuple[tuple[float, ...], Samples] | None) -> Any:
    """Densities, the curves over w, the network's."""
    from matplotlib import colormaps

    page = figures.figure("Guidance trades diversity for fidelity", 3.9)
    axes = page.subplots(1, 2 if samples is None else 3)
    shades = colormaps["Blues"](np.linspace(0.35, 1, len(laws)))
    for (w, law), shade in zip(laws.items(), shades, strict=True):
        axes[0].plot(law.x, law.density, color=shade, lw=1.5, label=f"w = {w:g}".replace("-", "−"))
    axes[0].set(xlim=(-3, 5), ylim=(0, None), xlabel="x", ylabel="density", title="guided ODE, classes N(±1, 1)")
    axes[0].legend(fontsize=7.5, handlelength=1.2, loc="upper left")
    weights = list(laws)
    for found, style, name in ((laws, "o-", "guided ODE"), (tilts, "s:", "p(x|c)·p(c|x)$^w$")):
        axes[1].plot(weights, [v.fidelity for v in found.values()], style, color=figures.BLUE, ms=4, label=f"mean p(c|x), {name}")
        axes[1].plot(
            weights, [v.deviation for v in found.values()], style, color=figures.ORANGE, ms=4, label=f"deviation, {name}"
        )
    axes[1].set(xlabel="w", title="the same in two numbers", ylim=(0, 1.75))
    axes[1].legend(fontsize=7.5)
    if samples is not None:
        told, scores = samples
        axes[2].plot(told, scores.accuracy, "o-", color=figures.BLUE, ms=4, label="accuracy of the judge")
        axes[2].plot(told, scores.diversity, "o-", color=figures.ORANGE, ms=4, label="diversity, real images 1")
        axes[2].set(xlabel="w", title="trained network", ylim=(0, 1.4))
        axes[2].legend(fontsize=7.5)
    for ax in axes[1:]:
        ax.grid(axis="y", color=figures.PALE, lw=0.6)
    return page
