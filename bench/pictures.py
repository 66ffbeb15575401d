"""Pictures of a benchmark run: the roofline of the kernels, and the losses of the same training."""

from pathlib import Path
from typing import Any

import numpy as np

FAMILIES = {  # kernels by what they do, in the order of the legend
    "noise and steps": ("normals", "q_sample", "step"),
    "norms, activations, tokens": ("group_norm_silu", "layer_norm", "silu", "add_gated", "rotary"),
    "3×3 convolution": (),
    "other convolutions": (),
    "attention": ("attention",),
    "losses and softmax": ("squared_error", "cross_entropy", "softmax"),
    "optimiser": ("sum_squares", "adamw_ema"),
    "draws of states": ("categorical",),
}
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#98df8a", "#9467bd", "#17becf", "#ff7f0e", "#8c564b")


def family(row: dict[str, Any]) -> str:
    """Which of FAMILIES a row of the kernels' table belongs to."""
    name = row["kernel"]
    if name.startswith("conv2d"):
        plain = "kernel=3" in row["case"] and "stride" not in row["case"] and "upsample" not in row["case"]
        return "3×3 convolution" if plain else "other convolutions"
    return next(f for f, names in FAMILIES.items() if any(name == n or name.startswith(f"{n}_") for n in names))


def draw(folder: Path, name: str, found: Any) -> list[tuple[Path, str]]:
    """Draw what there is to draw; returns (path, heading of the section that it belongs to)."""
    import matplotlib

    matplotlib.use("Agg")
    drawn = []
    if found.kernels and found.limits:
        roofline(folder / f"{name}_roofline.png", found.kernels, found.limits[-1])
        drawn.append((folder / f"{name}_roofline.png", "Kernels"))
    if found.training:
        curves(folder / f"{name}_training.png", found.training)
        drawn.append((folder / f"{name}_training.png", "The same training"))
    return drawn


def roofline(path: Path, rows: list[dict[str, Any]], limits: Any) -> None:
    """GFLOP/s over operations a byte: alphabar's points, PyTorch's as ticks joined to them, and the measured roofs."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    x = np.geomspace(0.06, 600, 200)
    roofs = (("cache", max(limits.triad), "-", 5), ("DRAM", limits.triad[-1], "--", -13))
    for where, bandwidth, style, above in roofs:
        ax.plot(x, np.minimum(x * bandwidth, limits.flops) / 1e9, style, color="black", lw=1.2, zorder=1)
        ax.annotate(
            f"triad in {where}: {bandwidth / 1e9:.0f} GB/s",
            (0.075, 0.075 * bandwidth / 1e9),
            xytext=(0, above),
            textcoords="offset points",
            rotation=37,
            rotation_mode="anchor",
            fontsize=8,
        )
    ax.annotate(
        f"multiply-adds: {limits.flops / 1e9:.0f} GFLOP/s ({limits.threads} threads)",
        (limits.flops / max(limits.triad), limits.flops / 1e9),
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=8,
    )
    for (label, _), colour in zip(FAMILIES.items(), COLOURS, strict=True):
        own = [r for r in rows if family(r) == label]
        if not own:
            continue
        intensity = np.array([r["flops"] / r["bytes"] for r in own])
        ours, theirs = (np.array([r["flops"] / r[k] / 1e9 for r in own]) for k in ("alphabar_s", "torch_s"))
        ax.vlines(intensity, theirs, ours, color=colour, lw=0.7, alpha=0.6, zorder=2)
        ax.plot(intensity, theirs, "_", color=colour, ms=6, zorder=2)
        ax.plot(intensity, ours, "o", color=colour, ms=5, mec="white", mew=0.5, zorder=3, label=label)
    ax.plot([], [], "_", color="gray", ms=6, label="PyTorch, the same case")
    ax.set(xscale="log", yscale="log", xlim=(0.06, 600), xlabel="operations a byte", ylabel="GFLOP/s")
    ax.set_title("Every case of every kernel against the measured limits (convolutions counted as direct)", fontsize=10)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="lower right")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """The losses of the same training, smoothed, one panel for each network."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(rows), figsize=(5.5 * len(rows), 3.6), layout="constrained", squeeze=False)
    for ax, row in zip(axes[0], rows, strict=True):
        for (who, losses), style in zip(row["curves"].items(), ("-", "--", ":"), strict=False):
            width = min(10, len(losses))
            smooth = np.convolve(losses, np.full(width, 1 / width), "valid")
            ax.plot(np.arange(width, len(losses) + 1), smooth, style, label=who, lw=1.5)
        ax.set(title=f"{row['network']}, batch {row['batch']}", xlabel="step", ylabel="loss (mean of 10 steps)", yscale="log")
        ax.grid(alpha=0.25, which="both")
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=120)
    plt.close(fig)
