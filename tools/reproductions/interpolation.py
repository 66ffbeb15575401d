"""Images decoded from the great circle between two codes x_T: a path with DDIM, none with DDPM. Eq: S2-C23, S4-C7, S2-C5."""

from typing import Any

import numpy as np

from alphabar.core import samplers, schedules, tables
from alphabar.core.data import to_uint8
from alphabar.core.interpolate import slerp
from alphabar.core.mixture import GaussianMixture
from alphabar.kernels.arrays import to_numpy
from alphabar.tools import pictures
from alphabar.tools.demos import figures
from alphabar.tools.reproductions.network import CLIP, Network
from alphabar.tools.reproductions.report import Check, Picture, Section, Settings, grid, number

FRAMES, SHEET, STEPS = (11, 21, 41, 81), 11, 50
DIMENSIONS, PATHS = 64, 12
ETAS = {"η = 0": 0.0, "η = 1": 1.0}


def path(x: Any, y: Any, frames: int, straight: bool = False) -> np.ndarray:
    """(frames, B, …) codes from x to y, on the great circle or the straight line. Eq: S2-C23."""
    weights = np.linspace(0, 1, frames)
    return np.stack([(1 - w) * x + w * y if straight else slerp(x, y, float(w)) for w in weights])


def norms(codes: np.ndarray) -> np.ndarray:
    """‖x‖/√d of each frame and path, (frames, B)."""
    flat = codes.reshape(*codes.shape[:2], -1)
    return np.sqrt((flat**2).mean(axis=-1))


def strides(images: np.ndarray) -> float:
    """The largest distance between neighbours of a path (frames, B, …) divided by that of its ends, the mean over B."""
    flat = images.reshape(*images.shape[:2], -1)
    steps = np.sqrt((np.diff(flat, axis=0) ** 2).sum(axis=-1))
    ends = np.sqrt(((flat[-1] - flat[0]) ** 2).sum(axis=-1))
    return float((steps.max(axis=0) / ends).mean())


def decoded(
    model: samplers.Model, table: tables.Table, codes: Any, seed: int, clip: tuple[float, float] | None = None
) -> np.ndarray:
    """All frames (frames, B, …) decoded, each frame with its own noise where the table has any."""
    flat = codes.reshape(-1, *codes.shape[2:])
    return to_numpy(samplers.sample(model, table, flat, seed, clip=clip)).reshape(codes.shape)


def exact(frames: tuple[int, ...], seed: int) -> tuple[dict[str, tuple[float, float]], dict[str, dict[int, float]]]:
    """(extremes of ‖x_T‖/√d along both kinds of path, largest stride of the images for each number of frames and η)."""
    rng, s = np.random.default_rng(seed), schedules.linear()
    law = GaussianMixture(np.ones(5), rng.normal(0, 0.15, (5, DIMENSIONS)), 0.2)
    x, y = (samplers.prior((PATHS, DIMENSIONS), seed, k * PATHS, np.float64) for k in (0, 1))
    x, y = (v * np.sqrt(DIMENSIONS / (v**2).sum(axis=1, keepdims=True)) for v in (x, y))
    ranges = {}
    for name, straight in (("great circle", False), ("straight line", True)):
        length = norms(path(x, y, SHEET, straight))
        ranges[name] = (float(length.min()), float(length.max()))
    found: dict[str, dict[int, float]] = {}
    for name, eta in ETAS.items():
        table = tables.ddim(s, STEPS, eta)
        found[name] = {n: strides(decoded(law.model(s), table, path(x, y, n), seed)) for n in frames}
    return ranges, found


def trained(network: Network, paths: int, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Decoded paths (SHEET, paths, H, W, C) with η = 0 and with η = 1, told no class."""
    x, y = (to_numpy(network.prior(paths, seed, k * paths)) for k in (0, 1))
    codes = network.xp.asarray(path(x, y, SHEET).astype(np.float32))
    found = {}
    for name, eta in ETAS.items():
        table = tables.ddim(network.s, steps, eta)
        found[name] = np.clip(decoded(network.model(), table, codes, seed, CLIP), -1, 1)
    return found


def run(settings: Settings) -> Section:
    """Norms, strides, and the sheet. Eq: S2-C23, S2-C18."""
    frames = settings.size(FRAMES, FRAMES[:2])
    ranges, found = exact(frames, settings.seed)
    low, high = ranges["great circle"]
    falls = found["η = 0"][frames[-1]] / found["η = 0"][frames[0]]
    stays = found["η = 1"][frames[-1]] / found["η = 1"][frames[0]]
    more = (frames[-1] - 1) / (frames[0] - 1)
    checks = [
        Check(
            "slerp keeps the norm of x_T, a straight line does not",
            f"{low:.6f} to {high:.6f} of √d, the line down to {ranges['straight line'][0]:.2f}",
            low > 1 - 1e-9 and high < 1 + 1e-9 and ranges["straight line"][0] < 0.95,
        ),
        Check(
            f"mixture, η = 0: the path is continuous, {more:g} times the frames make the largest stride as much smaller",
            f"{1 / falls:.2f} times smaller",
            falls < 1.5 / more,
        ),
        Check("mixture, η = 1: there is no path, strides stay", f"{1 / stays:.2f} times smaller", stays > 0.8),
    ]
    blocks = [
        f"Here: a mixture of five normal laws in {DIMENSIONS} dimensions with its exact network, {PATHS} pairs of codes "
        f"with norm √d, {STEPS} steps.",
        grid(
            [
                ["largest stride / distance of the ends", *(f"{n} frames" for n in frames)],
                *([k, *map(number, v.values())] for k, v in found.items()),
            ]
        ),
    ]
    drawn = [Picture("interpolation", draw(found), "The largest stride between neighbours of a path, over the number of frames.")]
    net = settings.network
    if net is not None:
        steps = net.steps((settings.size(STEPS, 10), 1))[0]
        images = trained(net, settings.size(5, 1), steps, settings.seed)
        ratio = {name: strides(x) for name, x in images.items()}
        checks.append(
            Check(
                "network: neighbours on a path are alike with η = 0, not with η = 1",
                ", ".join(f"{k}: {v:.2f} of the ends' distance" for k, v in ratio.items()),
                ratio["η = 0"] < 0.7 * ratio["η = 1"],
            )
        )
        blocks.append(f"Network: {net.name}, told no class, {steps} steps, {SHEET} frames; the same codes for both.")
        images["η = 1"] = images["η = 1"][:, :2]
        tiles = np.concatenate([np.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]) for x in images.values()])
        names = [name.replace("η", "eta") for name, x in images.items() for _ in range(x.shape[1])]
        page = pictures.sheet(to_uint8(tiles), SHEET, names, f"slerp between two x_T; {net.file}, {steps} steps, no class")
        drawn.append(
            Picture(
                "interpolation_sheet",
                page,
                "Each row a path between two codes; above with η = 0, below the first codes again with η = 1.",
            )
        )
    claim = (
        "DDIM (S2-C23, S2-C18, S4-C7): x_T is a code, and interpolating two codes interpolates the images; DDPM's noise "
        "forbids it."
    )
    return Section(claim, blocks, checks, drawn)


def draw(found: dict[str, dict[int, float]]) -> Any:
    """Largest strides over the number of frames."""
    page = figures.figure("The path between two codes is continuous with η = 0, and no path with η = 1", 3.4)
    ax = page.subplots()
    for (name, row), colour in zip(found.items(), (figures.BLUE, figures.ORANGE), strict=True):
        ax.plot(list(row), list(row.values()), "o-", color=colour, lw=1.8, ms=5, label=name)
    n = np.array(list(found["η = 0"]))
    ax.plot(n, found["η = 0"][n[0]] * (n[0] - 1) / (n - 1), color=figures.GREY, lw=1, ls=":", label="1/(frames − 1)")
    ax.set(xscale="log", yscale="log", xlabel="frames of the path", ylabel="largest stride / distance of the ends")
    from matplotlib.ticker import NullFormatter, NullLocator

    ax.set_xticks(n, list(map(str, n)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="y", color=figures.PALE, lw=0.6)
    ax.legend()
    return page
