"""Forward noising: one image at a row of times, for the linear and the cosine schedule and a ladder of noise levels.

Below each strip stands the log signal-to-noise ratio ln(a²/n²) of x_t = a·x0 + n·ε. The same image and the same ε throughout.
Eq: S0-E18, S0-E9, S1-C2, S4-C2.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphabar.core import data, forward, schedules
from alphabar.core.levels import Tabulated
from alphabar.tools.command import Parser, UserError, integer
from alphabar.tools.demos import figures

T, COLUMNS = 1000, 9
IMAGES, PIXELS = 512, 1 << 24  # the most that the law of x_T is measured on
SIGMA_MIN, SIGMA_MAX = 0.01, 50.0


def options(parser: Parser) -> None:
    parser.add_argument("--data", default="digits", metavar="DATA", help="HDF5 data set, or a built-in one (default digits)")
    parser.add_argument("--image", type=integer(0), default=0, metavar="K", help="number of the image (default 0)")


@dataclass(frozen=True)
class Strip:
    """One process: levels at the times shown, the image there, and the law of x_T over many images."""

    name: str
    levels: Tabulated
    times: np.ndarray  # (COLUMNS,) in 0..T
    images: np.ndarray  # (COLUMNS, H, W, C), x_t/√(a² + n²)
    end: tuple[float, float]  # mean and deviation of x_T/prior_std
    gap: float  # KL of q(x_T|x_0) from the prior, nats per dimension

    @property
    def log_snr(self) -> np.ndarray:
        """ln(a²/n²) at the times shown."""
        return log_snr(self.levels)[self.times]


def log_snr(levels: Tabulated) -> np.ndarray:
    """ln(a²/n²) at t = 0..T; infinite at clean data."""
    return -2 * np.log(levels.sigma_bar, out=np.full(levels.T + 1, -np.inf), where=levels.sigma_bar > 0)


def share(levels: Tabulated) -> np.ndarray:
    """a²/(a² + n²) at t = 0..T: ᾱ_t of a schedule, 1/(1 + σ_t²) of a ladder."""
    return 1 / (1 + levels.sigma_bar**2)


def measure(source: str, image: int, seed: int) -> list[Strip]:
    """Noise the image, and a few hundred more to the last time."""
    found = data.load(source)
    if image >= len(found):
        raise UserError(f"--image must be below {len(found)}, the number of images in {found.name}, not {image}")
    x0 = np.repeat(data.to_unit(found.images[image : image + 1]), COLUMNS, axis=0)
    many = data.to_unit(found.images[: max(1, min(IMAGES, PIXELS // int(np.prod(found.shape))))])
    eps = np.repeat(forward.q_sample(x0[:1], 1, schedules.linear(T), seed)[1], COLUMNS, axis=0)
    times = np.rint(np.linspace(0, T, COLUMNS)).astype(np.int64)
    processes: dict[str, Tabulated] = {
        "linear": schedules.linear(T),
        "cosine": schedules.cosine(T),
        "VE ladder": schedules.geometric(SIGMA_MIN, SIGMA_MAX, T),
    }
    strips = []
    for name, s in processes.items():
        x_t, _ = forward.q_sample(x0, times, s, eps=eps)
        total = np.sqrt(s.signal**2 + s.noise_variance)[times].astype(np.float32)
        x_T, _ = forward.q_sample(many, s.T, s, seed, step=1)
        end = float(x_T.mean(dtype=np.float64)) / s.prior_std, float(x_T.std(dtype=np.float64)) / s.prior_std
        strips.append(Strip(name, s, times, x_t / total[:, None, None, None], end, _gap(s, float((many**2).mean()))))
    return strips


def _gap(s: Tabulated, second_moment: float) -> float:
    if isinstance(s, schedules.Schedule):
        return schedules.prior_gap(s, second_moment).kl
    return second_moment / (2 * s.prior_std**2)  # two normal laws of one variance


def run(given: Namespace) -> tuple[list[str], Any]:
    """(the numbers as lines, the figure)."""
    strips = measure(given.data, given.image, given.seed)
    return table(strips), draw(strips)


def table(strips: list[Strip]) -> list[str]:
    """ᾱ_t or σ_t and the log-SNR at each time; then the end of each process against its prior."""
    header, rows = ["t"], [[str(t)] for t in strips[0].times]
    for strip in strips:
        ladder = isinstance(strip.levels, schedules.Ladder)
        header += [f"{'sigma' if ladder else 'alpha_bar'} {strip.name}", "ln SNR"]
        level = strip.levels.noise if ladder else strip.levels.alpha_bar
        for row, t, snr in zip(rows, strip.times, strip.log_snr, strict=True):
            row += [f"{level[t]:.4g}", f"{snr:.2f}"]
    ends = [["x_T / prior std", "mean", "std", "gap to the prior, nats/dim"]]
    ends += [[s.name, f"{s.end[0]:.4f}", f"{s.end[1]:.4f}", f"{s.gap:.2g}"] for s in strips]
    return [*figures.columns([header, *rows]), "", *figures.columns(ends)]


def draw(strips: list[Strip]) -> Any:
    """The strips above, a²/(a² + n²) and ln SNR over time below."""
    page = figures.figure("One image, one noise, three processes: all end in pure noise, each at its own pace", 6.3)
    above, below = page.subfigures(2, 1, height_ratios=(1.45, 1))
    grid = above.subplots(len(strips), COLUMNS, squeeze=False)
    colours = (figures.BLUE, figures.ORANGE, figures.GREEN)
    for row, strip, colour in zip(grid, strips, colours, strict=True):
        for ax, image, t, snr in zip(row, strip.images, strip.times, strip.log_snr, strict=True):
            shown = np.clip((image + 1) / 2, 0, 1)
            ax.imshow(shown[..., :3] if shown.shape[-1] >= 3 else shown[..., 0], cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel("clean" if t == 0 else f"{round(snr, 1) + 0.0:+.1f}".replace("-", "−"), labelpad=3, fontsize=8.5)
            for spine in ax.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel(strip.name, color=colour, fontweight="bold")
    for ax, t in zip(grid[0], strips[0].times, strict=True):
        ax.set_title(f"t = {t}", fontsize=8.5, loc="center")
    above.supxlabel("below each image: ln SNR = ln(a²/n²); ladder drawn as x/√(1 + σ²)", fontsize=8.5, color=figures.GREY)
    left, right = below.subplots(1, 2)
    time = np.arange(T + 1)
    for strip, colour in zip(strips, colours, strict=True):
        left.plot(time, share(strip.levels), color=colour, lw=2, label=strip.name)
        right.plot(time[1:], log_snr(strip.levels)[1:], color=colour, lw=2)
    left.set(xlabel="t", ylabel="a²/(a² + n²)", title="Share of the signal: ᾱ of a schedule, 1/(1 + σ²) of a ladder", xlim=(0, T))
    left.legend()
    right.axhline(0, color=figures.GREY, lw=0.8, ls="--")
    right.text(T, 0.3, "as much noise as signal", ha="right", va="bottom", fontsize=8.5, color=figures.GREY)
    right.set(xlabel="t", ylabel="ln SNR", title="Log signal-to-noise ratio", xlim=(0, T))
    return page
