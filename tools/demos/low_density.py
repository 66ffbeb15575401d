"""Scores are learned badly where data are rare, and noise cures it.

Networks are fitted by sliced score matching to samples of two modes, 0.2·N((−5, −5), I) + 0.8·N((5, 5), I), and to the same
samples with noise of the modes' distance. The squared error over a box is compared between the tenth of its points where the
density is lowest and the tenth where it is highest, as the mean over a few networks, each with samples of its own.
Among a law's own samples, which reach into its tails, noise makes that ratio smaller too, but not as small as in the box.
Eq: S0-C4, S0-F1, S0-F2, S0-E5, S0-E10, S4-C14.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphabar.core import score_matching
from alphabar.core.mixture import GaussianMixture
from alphabar.kernels import counter, streams
from alphabar.nets.autograd import Tensor, backward
from alphabar.nets.mlp import MLP
from alphabar.nets.optim import AdamW, learning_rate
from alphabar.tools.command import Parser, integer
from alphabar.tools.demos import figures

MODE, BOX, POINTS = 5.0, 8.0, 81
DISTANCE = 2 * MODE * 2**0.5
BATCH, WARMUP, RATE = 256, 100, 2e-3


def options(parser: Parser) -> None:
    parser.add_argument("--steps", type=integer(200), default=1500, help="training steps of each network (default 1500)")
    parser.add_argument("--networks", type=integer(1), default=4, help="networks for each law (default 4)")
    parser.add_argument("--samples", type=integer(10), default=10000, help="samples that each network sees (default 10000)")


@dataclass(frozen=True)
class Fit:
    """The score of a law and what the networks made of it, on the grid."""

    sigma: float
    law: GaussianMixture
    log_prob: np.ndarray  # (N,)
    true: np.ndarray  # (N, 2)
    learned: np.ndarray  # (N, 2), of the first network
    error: np.ndarray  # (N,), squared, mean over the networks
    at_samples: np.ndarray  # (2,) mean squared error at the law's own samples: lowest and highest tenth of density

    @property
    def tenths(self) -> tuple[np.ndarray, np.ndarray]:
        """Which points have the lowest and the highest density, a tenth of all each."""
        return _tenths(self.log_prob)

    @property
    def low_high(self) -> tuple[float, float]:
        """Mean squared error there."""
        low, high = self.tenths
        return float(self.error[low].mean()), float(self.error[high].mean())

    @property
    def size(self) -> float:
        """The mean of ‖score‖² over the box, to which errors are compared."""
        return float((self.true**2).sum(axis=1).mean())


def _tenths(log_prob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ranked = np.argsort(log_prob, kind="stable")
    return ranked[: len(ranked) // 10], ranked[-(len(ranked) // 10) :]


def grid() -> np.ndarray:
    """The points of the box (N, 2)."""
    along = np.linspace(-BOX, BOX, POINTS)
    return np.stack(np.meshgrid(along, along), axis=-1).reshape(-1, 2)


def train(samples: np.ndarray, sigma: float, scale: float, steps: int, seed: int) -> MLP:
    """A network fitted by sliced score matching to (x + σε)/scale, x of the samples; its score is scale times that of x + σε."""
    net = MLP(samples.shape[1], (128, 128), seed=seed)
    optimiser = AdamW(net.params, ema_decay=0.999)
    for step in range(steps):
        x = samples[counter.integers(BATCH, 0, len(samples), seed, step, streams.ORDER)]
        if sigma:
            x, _ = score_matching.perturb(x, sigma, seed, step)
        v = score_matching.projections(x.shape, seed, step, "rademacher")
        score = net(Tensor(x / np.float32(scale), tangent=v))
        product = score.tangent
        assert product is not None
        _, d_score, d_product = score_matching.sliced(score.data, product.data, v)
        net.params.zero_grad()
        backward((score, d_score), (product, d_product))
        optimiser.step(learning_rate(step, RATE, WARMUP, steps, "cosine"))
    net.params.data[...] = optimiser.ema
    return net


def measure(steps: int, networks: int, samples: int, seed: int) -> list[Fit]:
    """Fit networks to the mixture, and to the mixture with noise of the modes' distance."""
    clean = GaussianMixture([0.2, 0.8], [[-MODE, -MODE], [MODE, MODE]], 1.0)
    points, fits = grid(), []
    for sigma in (0.0, DISTANCE):
        law = clean.convolve(sigma)
        scale = float(np.sqrt(np.trace(law.covariance) / 2))
        true, own = law.score(points), law.sample(20000, seed, step=1)
        own_true, own_tenths = law.score(own), _tenths(law.log_prob(own))
        learned, error, at_samples = [], np.zeros(len(points)), np.zeros(2)
        for k in range(networks):
            net = train(clean.sample(samples, seed + k).astype(np.float32), sigma, scale, steps, seed + k)

            def score(x: np.ndarray, net: MLP = net, scale: float = scale) -> np.ndarray:
                return net.predict((x / scale).astype(np.float32)).astype(np.float64) / scale

            learned.append(score(points))
            error += ((learned[-1] - true) ** 2).sum(axis=1) / networks
            apart = ((score(own) - own_true) ** 2).sum(axis=1)
            at_samples += [apart[tenth].mean() / networks for tenth in own_tenths]
        fits.append(Fit(sigma, law, law.log_prob(points), true, learned[0], error, at_samples))
    return fits


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices as small as these are multiplied sooner by one thread, the more so on busy cores."""
    from alphabar.kernels.cpu.threads import numba, threads

    before = threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def run(given: Namespace) -> tuple[list[str], Any]:
    """(the numbers as lines, the figure)."""
    with one_thread():
        fits = measure(given.steps, given.networks, given.samples, given.seed)
    return table(fits), draw(fits)


def table(fits: list[Fit]) -> list[str]:
    """Mean squared errors of the score in the box and at the law's own samples, by tenths of density."""
    rows = [["mean squared error", "lowest density tenth", "highest", "ratio", "all / mean ‖score‖²"]]
    for fit in fits:
        low, high = fit.low_high
        everywhere = f"{fit.error.mean() / fit.size:.3g}"
        rows.append([f"box, σ = {fit.sigma:.1f}", f"{low:.3g}", f"{high:.3g}", f"{low / high:.3g}", everywhere])
    for fit in fits:
        low, high = fit.at_samples
        rows.append([f"own samples, σ = {fit.sigma:.1f}", f"{low:.3g}", f"{high:.3g}", f"{low / high:.3g}", ""])
    return figures.columns(rows)


def _short(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2f}"


def draw(fits: list[Fit]) -> Any:
    """One row for each law: its score, a learned one, and the error over the box."""
    from matplotlib.colors import LogNorm
    from matplotlib.patheffects import withStroke

    page = figures.figure("A score learned from data is wrong where data are rare; with noise it is right everywhere", 6.2)
    axes = page.subplots(len(fits), 3, sharex=True, sharey=True)
    points = grid().reshape(POINTS, POINTS, 2)
    X, Y = points[..., 0], points[..., 1]
    every = (slice(4, None, 6), slice(4, None, 6))
    shade = None
    for ax, title in zip(axes[0], ("true score", "learned score", "squared error of the learned score"), strict=True):
        ax.set_title(title)
    for row, fit in zip(axes, fits, strict=True):
        log_prob = fit.log_prob.reshape(X.shape)
        longest = np.sqrt((fit.true**2).sum(axis=1)).max()
        for ax, field in zip(row, (fit.true, fit.learned), strict=False):
            ax.contourf(X, Y, np.exp(log_prob - log_prob.max()), 24, cmap=figures.DENSITY, vmax=1.6, zorder=0)
            U, V = (field[:, i].reshape(X.shape)[every] for i in (0, 1))
            ax.quiver(X[every], Y[every], U, V, scale=longest * 7, width=0.006, color=figures.INK)
        relative = np.maximum(fit.error.reshape(X.shape) / fit.size, 1e-9)
        shade = row[2].pcolormesh(X, Y, relative, cmap="YlOrRd", norm=LogNorm(1e-4, 10), shading="gouraud", rasterized=True)
        for tenth, style, pick in zip(fit.tenths, ("--", "-"), (np.max, np.min), strict=True):
            row[2].contour(X, Y, log_prob, [pick(fit.log_prob[tenth])], colors=figures.INK, linestyles=style, linewidths=1.1)
        low, high = fit.low_high
        label = row[2].text(-7.6, 7.5, f"low : high density\n{_short(low / high)} : 1", va="top", fontsize=9, fontweight="bold")
        label.set_path_effects([withStroke(linewidth=3, foreground="white")])
        row[0].set_ylabel(f"data with noise, σ = {fit.sigma:.1f}" if fit.sigma else "data", fontweight="bold")
    for ax in axes.flat:
        ax.set(aspect="equal", xlim=(-BOX, BOX), ylim=(-BOX, BOX), xticks=(-5, 0, 5), yticks=(-5, 0, 5))
    for ax in axes[-1]:
        ax.set_xlabel("x₁")
    bar = page.colorbar(shade, ax=axes[:, 2], shrink=0.8, extend="both")
    bar.set_label("‖learned − true‖² / mean ‖true‖² of the box")
    page.supxlabel(
        "error: outside the dashed line the tenth of the box with the lowest density, inside the full line that with the highest",
        fontsize=8.5,
        color=figures.GREY,
    )
    return page
