"""Discrete diffusion: an image and a line of text noised by the laws of multinomial diffusion and D3PM, and how fast they forget.

The grey levels of an image under the uniform, the absorbing and the discretised Gaussian law (the mask is drawn in colour),
letters under the first two. Below stand the mutual information I(x_t; x_0) of one element with its clean value, where that
follows the data's shares, and the probability that it has its clean value. Eq: S4-E26, S4-E31, S4-C5, S4-F1, S4-F2.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphabar.core import data, discrete, rates, text
from alphabar.core.transitions import Absorbing, DiscretizedGaussian, Transitions, Uniform
from alphabar.tools.command import Parser, UserError, integer
from alphabar.tools.demos import figures
from alphabar.tools.discrete_images import levels_of, to_states

T, COLUMNS, POINTS = 1000, 9, 105  # every thirteenth point is a column
LETTERS, MANY = 66, 512  # of the line of text; images that the shares of the levels are counted on
RATES = {"uniform": "cosine", "absorbing": "1/(T−t+1)", "Gaussian": "linear"}


def options(parser: Parser) -> None:
    parser.add_argument("--data", default="digits", metavar="DATA", help="HDF5 data set, or a built-in one (default digits)")
    parser.add_argument("--image", type=integer(0), default=0, metavar="K", help="number of the image (default 0)")
    parser.add_argument("--text", default="kjv", metavar="TEXT", help="text file, or a built-in one (default kjv)")


@dataclass(frozen=True)
class Strip:
    """One law on one kind of data: the example at the times shown, what it knows of x_0, and what it keeps."""

    name: str
    law: Transitions
    states: np.ndarray  # (COLUMNS, …)
    information: np.ndarray  # (POINTS,) bits
    kept: np.ndarray  # (POINTS,)


def times(points: int) -> np.ndarray:
    """Times evenly from 0 to T."""
    return np.rint(np.linspace(0, T, points)).astype(np.int64)


def laws(K: int) -> dict[str, Transitions]:
    """The three families on K ordered states, each with the rates of its paper."""
    return {
        "uniform": Uniform(K, rates.cosine(T)),
        "absorbing": Absorbing(K + 1, rates.reciprocal(T)),
        "Gaussian": DiscretizedGaussian(K, rates.linear(T)),
    }


def memory(law: Transitions, shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """I(x_t; x_0) in bits and Σ_k p_k·q(x_t=k|x_0=k) at POINTS times, where x_0 = k has the probability ``shares``[k]."""
    information, kept = [], []
    for t in times(POINTS):
        q = law.cumulative(int(t))[: shares.size]
        joint, end = shares[:, None] * q, shares @ q
        there = joint > 0
        ratio = np.divide(q, end, out=np.ones_like(q), where=there)
        information.append(float((joint[there] * np.log2(ratio[there])).sum()))
        kept.append(float(shares @ q[:, : shares.size].diagonal()))
    return np.array(information), np.array(kept)


def measure(source: str, image: int, words: str, seed: int) -> tuple[list[Strip], list[Strip]]:
    """The strips of the image and those of the text."""
    found, letters = data.load(source), text.load(words, length=LETTERS)
    if image >= len(found):
        raise UserError(f"--image must be below {len(found)}, the number of images in {found.name}, not {image}")
    K = levels_of(found.images)
    many = to_states(found.images[: min(MANY, len(found))], K)
    pixels = np.repeat(to_states(found.images[image : image + 1], K), COLUMNS, axis=0)
    line = np.repeat(letters.windows[:1].astype(np.int32), COLUMNS, axis=0)
    on_text = {name: law for name, law in laws(letters.states).items() if name != "Gaussian"}
    return (
        [_strip(name, law, pixels, np.bincount(many.ravel(), minlength=K), seed) for name, law in laws(K).items()],
        [_strip(name, law, line, np.bincount(letters.tokens, minlength=letters.states), seed) for name, law in on_text.items()],
    )


def _strip(name: str, law: Transitions, clean: np.ndarray, counts: np.ndarray, seed: int) -> Strip:
    noised = discrete.q_sample(clean, times(COLUMNS), law, seed)
    return Strip(name, law, noised, *memory(law, counts / counts.sum()))


def run(given: Namespace) -> tuple[list[str], Any]:
    """(the numbers as lines, the figure)."""
    images, lines = measure(given.data, given.image, given.text, given.seed)
    return table(images, lines), draw(images, lines, text.ALPHABET)


def table(images: list[Strip], lines: list[Strip]) -> list[str]:
    """I(x_t; x_0) and the probability of the clean value at each time shown."""
    every = (POINTS - 1) // (COLUMNS - 1)
    header, rows = ["t"], [[str(t)] for t in times(POINTS)[::every]]
    for strip, kind in [*((s, "pixels") for s in images), *((s, "letters") for s in lines)]:
        header += [f"{strip.name} {kind}, bits", "kept"]
        for row, bits, kept in zip(rows, strip.information[::every], strip.kept[::every], strict=True):
            row += [f"{bits + 0.0:.3f}", f"{kept:.3f}"]
    return figures.columns([header, *rows])


def draw(images: list[Strip], lines: list[Strip], alphabet: str) -> Any:
    """The strips above, the text in the middle, what is remembered below."""
    page = figures.figure("Noise on whole numbers: other values, a mask, or near values", 7.4)
    above, middle, below = page.subfigures(3, 1, height_ratios=(1.5, 0.62, 1))
    colours = dict(zip(RATES, (figures.BLUE, figures.ORANGE, figures.GREEN), strict=True))
    grid = above.subplots(len(images), COLUMNS, squeeze=False)
    for row, strip in zip(grid, images, strict=True):
        for ax, states in zip(row, strip.states, strict=True):
            ax.imshow(_coloured(states, strip.law))
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set_visible(False)
        row[0].set_ylabel(f"{strip.name}\n{RATES[strip.name]}", color=colours[strip.name], fontweight="bold", fontsize=8.5)
    for ax, t in zip(grid[0], times(COLUMNS), strict=True):
        ax.set_title(f"t = {t}", fontsize=8.5, loc="center")
    for ax, strip in zip(np.atleast_1d(middle.subplots(1, len(lines))), lines, strict=True):
        ax.set_axis_off()
        shown = [(alphabet + "_")[i] for i in range(len(alphabet) + 1)]
        body = "\n".join("".join(shown[i] for i in row) for row in strip.states)
        ax.text(0, 1, body, family="monospace", fontsize=8, va="top", transform=ax.transAxes)
        ax.set_title(f"letters, {strip.name}", color=colours[strip.name], fontweight="bold", fontsize=8.5)
    left, right = below.subplots(1, 2)
    for strip in images:
        left.plot(times(POINTS), strip.information, color=colours[strip.name], lw=2, label=strip.name)
        right.plot(times(POINTS), strip.kept, color=colours[strip.name], lw=2)
    for strip in lines:
        left.plot(times(POINTS), strip.information, color=colours[strip.name], lw=1.2, ls="--")
        right.plot(times(POINTS), strip.kept, color=colours[strip.name], lw=1.2, ls="--")
    left.set(xlabel="t", ylabel="bits", title="I(x_t; x_0) of a pixel (dashed: of a letter)", xlim=(0, T), ylim=(0, None))
    left.legend()
    right.set(xlabel="t", title="Probability of the clean value", xlim=(0, T), ylim=(0, 1))
    return page


def _coloured(states: np.ndarray, law: Transitions) -> np.ndarray:
    """States (H, W, 1) as RGB: grey levels, the mask in colour."""
    masked = isinstance(law, Absorbing)
    grey = np.repeat(states[..., :1] / (law.K - 1 - masked), 3, axis=-1)
    if masked:
        from matplotlib.colors import to_rgb

        grey = np.where(states[..., :1] == law.K - 1, np.array(to_rgb(figures.ORANGE)), grey)
    return grey
