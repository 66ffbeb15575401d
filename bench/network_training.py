"""The same training in alphabar and in PyTorch: the same weights, digits, times and noise, and the losses of both, step by step.

The same arithmetic in another order already makes curves part; how far says PyTorch beside itself in its other memory format. The
noise that the final loss must be within is the standard error of its mean over the last steps.
"""

from pathlib import Path
from typing import Any

import numpy as np

from alphabar.core import data, forward, schedules
from bench import peers
from bench.peers import Example
from bench.steps import Ours, Theirs

STEPS, LAST = 200, 50  # the final loss is the mean over the last steps
LR = 2e-4
FORMATS = {"torch contiguous": "contiguous_format", "torch channels last": "channels_last"}


def batches(folder: Path, batch: int, steps: int) -> list[Example]:
    """Digits of the training set, made as large as the network's images, noised by alphabar's own noise."""
    shape = peers.example(folder, 1).x_t.shape
    digits, s = data.load("digits"), schedules.linear(peers.T)
    made = []
    for k in range(steps):
        images, labels, _ = digits.batch(k, batch)
        times = shape[1] // images.shape[1]
        x0 = data.to_unit(images).repeat(times, axis=1).repeat(times, axis=2).repeat(shape[3], axis=3)
        t = forward.random_times(batch, s, seed=0, step=k)
        x_t, eps = forward.q_sample(np.ascontiguousarray(x0), t, s, seed=0, step=k)
        y = None if peers.example(folder, 1).y is None else np.asarray(labels, np.int64)
        made.append(Example(x_t, t, eps, y))
    return made


def compare(folder: Path, batch: int, steps: int = STEPS) -> dict[str, Any]:
    """Losses of every step and the mean of the last ones, of alphabar and of PyTorch in both formats."""
    given = batches(folder, batch, steps)
    contestants: dict[str, Any] = {"alphabar": Ours(folder, given[0], LR)}
    contestants |= {name: Theirs(folder, given[0], form, LR) for name, form in FORMATS.items()}
    curves: dict[str, list[float]] = {}
    for name, contestant in contestants.items():
        losses = []
        for e in given:
            contestant.load(e)
            losses.append(contestant.train())
        curves[name] = losses
    return {"batch": batch, "steps": steps, "curves": curves, **verdict(curves)}


def verdict(curves: dict[str, list[float]]) -> dict[str, Any]:
    """Final losses (means of the last steps), differences to PyTorch's first format, and the standard error of the mean."""
    names = list(curves)
    last = {name: np.asarray(losses[-LAST:]) for name, losses in curves.items()}
    reference = last[names[1]]
    return {
        "final": {name: float(v.mean()) for name, v in last.items()},
        "difference": {name: float(v.mean() - reference.mean()) for name, v in last.items()},
        "largest": {name: float(np.abs(np.subtract(curves[name], curves[names[1]])).max()) for name in names},
        "standard_error": float(reference.std(ddof=1) / len(reference) ** 0.5) if len(reference) > 1 else 0.0,
    }
