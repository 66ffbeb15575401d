"""Plain Langevin dynamics loses the shares of the modes, annealed Langevin dynamics finds them.

Both follow exact scores of 0.2·N((−5, −5), I) + 0.8·N((5, 5), I), from the same uniform start and for as many steps. Between the
modes the density is next to nothing, so the plain chain leaves each particle in the half where it started. The annealed chain
begins where noise joins the modes. Eq: S0-C5, S0-C9, S0-E16, S4-C13, S4-C14, S4-E62, S4-E63.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphabar.core import samplers, schedules
from alphabar.core.langevin import annealed_langevin, langevin
from alphabar.core.mixture import GaussianMixture
from alphabar.kernels import counter, streams
from alphabar.tools.command import Parser, integer
from alphabar.tools.demos import figures

MODE, BOX, WEAK = 5.0, 8.0, 0.2
SIGMA_MIN, SIGMA_MAX, LEVELS = 0.1, 20.0, 10
ALPHA, EPSILON = 0.1, 0.002  # of the plain step; of the annealed ones at the smallest level
SHOWN = 1200  # particles in the picture


def options(parser: Parser) -> None:
    parser.add_argument("--particles", type=integer(100, 10**6), default=4000, help="chains of each kind (default 4000)")
    parser.add_argument("--steps", type=integer(1, 10**5), default=100, help="steps at each of the ten levels (default 100)")


@dataclass(frozen=True)
class Chains:
    """Where the particles of one sampler stand, and the share of them on the weak mode's side after each step."""

    name: str
    particles: np.ndarray  # (N, 2)
    shares: np.ndarray  # (steps + 1,)

    @property
    def share(self) -> float:
        """The share at the end."""
        return float(self.shares[-1])

    @property
    def spread(self) -> float:
        """The deviation of one coordinate about its mode."""
        side = np.where(self.particles.sum(axis=1, keepdims=True) < 0, -MODE, MODE)
        return float(np.sqrt(((self.particles - side) ** 2).mean()))

    @property
    def standard_error(self) -> float:
        """Of the share."""
        return float(np.sqrt(self.share * (1 - self.share) / len(self.particles)))


def mixture() -> GaussianMixture:
    """The two modes."""
    return GaussianMixture([WEAK, 1 - WEAK], [[-MODE, -MODE], [MODE, MODE]], 1.0)


def measure(particles: int, steps: int, seed: int) -> list[Chains]:
    """Exact samples, plain and annealed Langevin with LEVELS·steps steps each."""
    law, ladder = mixture(), schedules.geometric(SIGMA_MIN, SIGMA_MAX, LEVELS)
    start = (2 * counter.uniform(2 * particles, seed, 0, streams.PRIOR) - 1).reshape(particles, 2) * BOX
    kinds = {
        "plain": (langevin(ALPHA / 2, LEVELS * steps), lambda x, t: law.score(x)),
        "annealed": (annealed_langevin(ladder, steps, EPSILON), law.model(ladder, "score")),
    }
    exact = law.sample(particles, seed)
    found = [Chains("exact samples", exact, np.array([_shares(exact)]))]
    for name, (table, model) in kinds.items():
        path = samplers.sample(model, table, start, seed, trajectory=True)
        found.append(Chains(f"{name} Langevin", path[-1], _shares(path)))
    return found


def _shares(x: np.ndarray) -> np.ndarray:
    return (x.sum(axis=-1) < 0).mean(axis=-1)


def run(given: Namespace) -> tuple[list[str], Any]:
    """(the numbers as lines, the figure)."""
    found = measure(given.particles, given.steps, given.seed)
    return table(found), draw(found, given.steps)


def table(found: list[Chains]) -> list[str]:
    """The share of the weak mode by each sampler."""
    rows = [["", "steps", "share of the weak mode", "standard error", "spread of a mode"]]
    rows.append(["density", "", f"{WEAK:.4f}", "", "1.000"])
    for one in found:
        rows.append([one.name, str(len(one.shares) - 1), f"{one.share:.4f}", f"{one.standard_error:.4f}", f"{one.spread:.3f}"])
    return figures.columns(rows)


def draw(found: list[Chains], steps: int) -> Any:
    """The particles above, the share of the weak mode over the steps below."""
    page = figures.figure("Plain Langevin keeps the shares of its start, annealed Langevin finds those of the density", 6.0)
    above, below = page.subfigures(2, 1, height_ratios=(1.6, 1))
    colours = (figures.INK, figures.ORANGE, figures.BLUE)
    axes = above.subplots(1, 3, sharex=True, sharey=True)
    for ax, one, colour in zip(axes, found, colours, strict=True):
        ax.scatter(*one.particles[:SHOWN].T, s=3, color=colour, alpha=0.35, lw=0)
        ax.set_title(one.name, color=colour, fontweight="bold")
        ax.set(aspect="equal", xlim=(-9, 9), ylim=(-9, 9), xticks=(-5, 0, 5), yticks=(-5, 0, 5), xlabel="x₁")
        for side, share in ((-1, one.share), (1, 1 - one.share)):
            ax.text(side * MODE, side * (MODE - 3.4), f"{share:.1%}", ha="center", va="center", fontsize=11, fontweight="bold")
    axes[0].set_ylabel("x₂")
    ax = below.subplots()
    for one, colour in zip(found[1:], colours[1:], strict=True):
        ax.plot(one.shares, color=colour, lw=1.6, label=one.name)
    ax.axhline(WEAK, color=figures.INK, lw=1, ls="--", label=f"the density: {WEAK:g}")
    for level in range(LEVELS):
        ax.axvline(level * steps, color=figures.PALE, lw=0.8, zorder=0)
        sigma = SIGMA_MAX * (SIGMA_MIN / SIGMA_MAX) ** (level / (LEVELS - 1))
        ax.text((level + 0.5) * steps, 0.03, f"σ = {sigma:.2g}", ha="center", fontsize=8.5, color=figures.GREY)
    ax.set(
        xlim=(0, LEVELS * steps), ylim=(0, 0.65), xlabel="step (levels σ of the annealed chain)", ylabel="share of the weak mode"
    )
    ax.legend(ncols=3, loc="upper right")
    return page
