"""Pictures of the reports: every kernel's case under what a copy and a product reach, and how whole steps grow with the batch."""

from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#7f7f7f")
FAMILIES = {  # label -> what the names of its kernels start with
    "noise and steps": ("normals", "q_sample", "step"),
    "norms": ("group_norm", "layer_norm"),
    "convolution": ("conv2d",),
    "attention, softmax": ("attention", "softmax"),
    "optimiser": ("sum_squares", "adamw"),
    "draws of states": ("categorical",),
    "elementwise, losses": (),
}


def family(kernel: str) -> str:
    """Which of FAMILIES a kernel belongs to: the last where none knows it."""
    return next((label for label, names in FAMILIES.items() if any(map(kernel.startswith, names))), list(FAMILIES)[-1])


def roofline(path: Path, speed: dict[str, Any], device: str) -> None:
    """Draw it. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in speed["rows"] if "seconds" in r and r["flops"] and r["size"] != "small"]
    copy, product = speed["limits"]["copy_bytes_per_s"], speed["limits"].get("product_flops_per_s")
    fig, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    x = np.geomspace(0.05, 2000, 200)
    roof = x * copy if product is None else np.minimum(x * copy, product)
    above = "" if product is None else f"; product {product / 1e12:.1f} TFLOP/s"
    ax.plot(x, roof / 1e12, color="black", lw=1.2, label=f"copy {copy / 1e9:.0f} GB/s{above}")
    for (label, _), colour in zip(FAMILIES.items(), COLOURS, strict=True):
        own = [r for r in rows if family(r["kernel"]) == label]
        if not own:
            continue
        intensity = [r["flops"] / r["bytes"] for r in own]
        for key, mark in (("eager_s", "_"), ("compiled_s", "x")):
            theirs = [(i, r["flops"] / r[key] / 1e12) for i, r in zip(intensity, own, strict=True) if r.get(key)]
            ax.plot(*(zip(*theirs, strict=True) if theirs else ([], [])), mark, color=colour, ms=6, alpha=0.7)
        ax.plot(intensity, [r["flops_per_s"] / 1e12 for r in own], "o", color=colour, ms=5, mec="white", mew=0.5, label=label)
    ax.plot([], [], "_", color="gray", label="PyTorch, eager")
    ax.plot([], [], "x", color="gray", label="PyTorch, compiled")
    ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title=f"{device}: cases of 256 MiB, float32")
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="lower right")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def growth(path: Path, report: dict[str, Any], device: str) -> None:
    """Draw images a second of whole steps over the batch, for each contestant. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"steps": "training step", "trajectories": "50 DDIM steps"}
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for ax, (section, title) in zip(axes, titles.items(), strict=True):
        rows = [r for r in report.get(section, {}).get("rows", ()) if "seconds" in r and r["precision"] == "bf16"]
        for name, mark in (("alphabar", "o-"), ("eager", "_--"), ("compiled", "x")):
            own = sorted((r["batch"], r["batch"] / r["seconds"][name]) for r in rows if name in r["seconds"])
            ax.plot(
                *(zip(*own, strict=True) if own else ([], [])), mark, label=name if name == "alphabar" else f"PyTorch, {name}"
            )
        ax.set(xscale="log", yscale="log", xlabel="batch", ylabel="images a second", title=f"{title}, bf16")
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8)
    fig.suptitle(device)
    fig.savefig(path, dpi=120)
    plt.close(fig)
