"""How the cost of a small U-Net grows: with the batch, the resolution, the width, the steps of sampling and the threads.

    python -m bench.growth                 # the table
    python -m bench.growth --write         # also into bench/results/growth.md, .json and .png

One quantity at a time moves away from 16×16×3 images, channels (32, 64), one block, attention at the lowest resolution, batch 8.
All points of a quantity take turns; medians. Costs of batch and steps are lines (a part that every call pays, and one for each
image or step); those of resolution and width are power laws; threads follow Amdahl's law with a share that one thread does alone.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alphabar import kernels, nets
from alphabar.core import samplers, schedules, tables
from alphabar.core.losses import simple_loss
from alphabar.kernels.cpu import threads
from bench import fits, limits, report, timing

# isort: split
import numba

RESULTS = Path(__file__).parent / "results"
SIDE, WIDTH, BATCH, STEPS = 16, 32, 8, 10
RANGES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "resolution": (8, 16, 32, 64),
    "width": (16, 32, 64, 128),
    "steps": (5, 10, 20, 40),
    "threads": limits.thread_counts(),
}
LINES, POWERS = ("batch", "steps"), ("resolution", "width")
Task = Callable[[], object]


@dataclass(frozen=True)
class Growth:
    """Seconds at each value of one quantity, of one task."""

    quantity: str
    task: str
    values: tuple[int, ...]
    seconds: tuple[float, ...]

    def fitted(self) -> fits.Line | fits.Power | None:
        """The line or the power law; None for threads."""
        if self.quantity in LINES:
            return fits.line(self.values, self.seconds)
        return fits.power(self.values, self.seconds) if self.quantity in POWERS else None

    def words(self) -> tuple[str, str]:
        """(the fit, its r²) as text."""
        fit = self.fitted()
        if isinstance(fit, fits.Line):
            one = {"batch": "image", "steps": "step"}[self.quantity]
            return f"{1e3 * fit.intercept:.2f} ms + {1e3 * fit.slope:.2f} ms for each {one}", f"{fit.r2:.4f}"
        if isinstance(fit, fits.Power):
            return f"∝ {self.quantity}^{fit.exponent:.2f}", f"{fit.r2:.4f}"
        if len(self.values) < 2:
            return "one thread only", "–"
        share = fits.serial_share(self.values, self.seconds)
        return f"{self.seconds[0] / self.seconds[-1]:.2f} times as fast; {share:.1%} of it by one thread alone", "–"


def tasks(side: int = SIDE, width: int = WIDTH, batch: int = BATCH, steps: int | None = None) -> dict[str, Task]:
    """A training step and a prediction, or with ``steps`` the sampling of a batch, of one network."""
    net = nets.UNet(side, 3, channels=(width, 2 * width), blocks=1, attention=(side // 2,), zero_init=False)
    optimiser, pool, rng = nets.AdamW(net.params, max_norm=1.0), kernels.Pool(), np.random.default_rng(0)
    x, eps = (rng.standard_normal((batch, side, side, 3)).astype(np.float32) for _ in range(2))
    t = rng.integers(1, 1001, batch)

    def train() -> None:
        with pool:
            output = net(x, t)
            _, gradient = simple_loss(output.data, eps)
            net.params.zero_grad()
            output.backward(gradient)
            optimiser.step(1e-5)

    def predict() -> None:
        with pool:
            net.predict(x, t)

    if steps is None:
        return {"training step": train, "prediction": predict}
    table = tables.ddim(schedules.linear(), steps)

    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        with pool:
            return net.predict(x, t)

    return {"sampling": lambda: samplers.sample(model, table, x)}


def _held(count: int, f: Task) -> Task:
    """``f`` with so many threads."""

    def call() -> None:
        kept = threads.threads()
        numba.set_num_threads(count)
        try:
            f()
        finally:
            numba.set_num_threads(kept)

    return call


def _made(quantity: str, value: int) -> dict[str, Task]:
    if quantity == "threads":
        return {name: _held(value, f) for name, f in tasks().items()}
    changed = {"batch": "batch", "resolution": "side", "width": "width", "steps": "steps"}[quantity]
    return tasks(**{changed: value})


def measure(quantity: str, values: Sequence[int], rounds: int) -> list[Growth]:
    """The times of every task at every value."""
    made = {value: _made(quantity, value) for value in values}
    found = []
    for task in made[values[0]]:
        taken = timing.interleaved({str(v): made[v][task] for v in values}, rounds)
        found.append(Growth(quantity, task, tuple(values), tuple(taken[str(v)].median for v in values)))
    return found


def table(found: Sequence[Growth]) -> list[str]:
    """Markdown lines: a line for each quantity and task."""
    lines = ["| grows with | values | task | milliseconds | fit | r² |", "|---|---|---|---|---|---:|"]
    for g in found:
        times = ", ".join(f"{1e3 * s:.3g}" for s in g.seconds)
        lines.append(f"| {g.quantity} | {', '.join(map(str, g.values))} | {g.task} | {times} | " + " | ".join(g.words()) + " |")
    return lines


def draw(path: Path, found: Sequence[Growth]) -> None:
    """One panel for each quantity: points, and the fits as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    quantities = list(dict.fromkeys(g.quantity for g in found))
    fig, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
    for ax, quantity in zip(axes.flat, quantities, strict=False):
        for g, colour in zip((g for g in found if g.quantity == quantity), ("#1f77b4", "#d62728"), strict=False):
            ax.plot(g.values, 1e3 * np.array(g.seconds), "o", color=colour, ms=5, label=g.task)
            fit = g.fitted()
            x = np.geomspace(g.values[0], g.values[-1], 100)
            if fit is not None:
                ax.plot(x, 1e3 * fit(x), color=colour, lw=1, label=g.words()[0])
            elif len(g.values) > 1:
                s = fits.serial_share(g.values, g.seconds)
                ax.plot(x, 1e3 * g.seconds[0] * (s + (1 - s) / x), color=colour, lw=1, label=f"{s:.1%} by one thread alone")
        ax.set(xscale="log", yscale="log", xlabel=quantity, ylabel="ms")
        ax.set_xticks(RANGES[quantity], [str(v) for v in RANGES[quantity]])
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        ax.minorticks_off()
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="upper left")
    for ax in list(axes.flat)[len(quantities) :]:
        ax.axis("off")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def write(folder: Path, found: Sequence[Growth], rounds: int) -> None:
    """growth.md, growth.json and growth.png in ``folder``."""
    env = report.environment()
    draw(folder / "growth.png", found)
    doc = [line.strip() for line in (__doc__ or "").splitlines()[5:]]
    command = f"python -m bench.growth --rounds {rounds} --write"
    text = [f"# How the cost grows, {env['date']}", "", *report.conditions(env, command), *doc, "", *table(found), ""]
    (folder / "growth.md").write_text("\n".join([*text, "![Growth](growth.png)", ""]), encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {"quantity": g.quantity, "task": g.task, "values": g.values, "seconds": g.seconds, "fit": g.words()} for g in found
    ]
    (folder / "growth.json").write_text(json.dumps({"environment": env, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure and print; with --write also write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write bench/results/growth.md, .json and .png")
    options = parser.parse_args()
    timing.keep_freed_memory()
    found = [g for quantity, values in RANGES.items() for g in measure(quantity, values, options.rounds)]
    print(*table(found), sep="\n")
    if options.write:
        write(RESULTS, found, options.rounds)


if __name__ == "__main__":
    main()
