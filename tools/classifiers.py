"""What classifiers of noised images and of noised text share: how they are trained, measured, and kept in a file."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import alphabar
from alphabar import kernels
from alphabar.kernels.arrays import to_numpy
from alphabar.nets import checkpoint
from alphabar.nets.checkpoint import CheckpointError
from alphabar.nets.classifier import NoisyClassifier, cross_entropy
from alphabar.nets.optim import AdamW, learning_rate
from alphabar.tools import config as configs
from alphabar.tools.command import Failure
from alphabar.tools.config import Config
from alphabar.tools.progress import Progress

Array = Any
Batch = tuple[Array, np.ndarray, Array]  # (what the network reads, times, labels)
KIND = "alphabar-classifier"
QUARTERS = 4
MEASURED = 512  # samples that the accuracy is measured on
MEASURE_STEP = 1 << 31  # the step whose noise it is measured with


def fit(net: NoisyClassifier, batch: Callable[[int], Batch], o: Any) -> AdamW:
    """AdamW on the cross-entropy of the batches of steps 0, 1, …; ``o`` has steps, lr and quiet. Failure where it diverges."""
    optimiser, pool, xp = AdamW(net.params, max_norm=1.0, ema_decay=0.999, weight_decay=0.01), kernels.Pool(), net.params.xp
    with Progress("training", o.steps, 0, o.quiet) as bar:
        for k in range(o.steps):
            with pool:
                x, times, labels = batch(k)
                logits = net(x, times, step=k)
                value, gradient = cross_entropy(logits.data, xp.asarray(labels))
                loss = float(value.mean())
                net.params.zero_grad()
                logits.backward(gradient)
                norm = optimiser.step(learning_rate(k, o.lr, min(100, o.steps // 5), o.steps, "cosine"))
            if not math.isfinite(loss + norm):
                raise Failure(f"step {k + 1}: the loss is {loss}, the norm of its gradient {norm}")
            bar.note(f"loss {loss:.4f}")
            bar.advance()
    return optimiser


def by_quarters(net: NoisyClassifier, batch: Batch, T: float) -> list[float]:
    """The share of noised samples read right, by quarters of the times 0..T; NaN where a quarter has none."""
    x, times, labels = batch
    right = to_numpy(net.predict(x, times)).argmax(axis=1) == labels
    quarter = np.minimum((times * QUARTERS / T).astype(int), QUARTERS - 1)
    return [float(right[quarter == k].mean()) if np.any(quarter == k) else math.nan for k in range(QUARTERS)]


def said(accuracy: list[float], T: float, of: str) -> list[str]:
    """The lines that tell an accuracy by quarters."""
    ends = [(k * T / QUARTERS, (k + 1) * T / QUARTERS) for k in range(QUARTERS)]
    return [
        f"accuracy    {share:6.1%} at t in {low:g}..{high:g} ({of})" for share, (low, high) in zip(accuracy, ends, strict=True)
    ]


def beside(checkpoint_file: Path) -> Path:
    """Where the classifier of a run is kept unless a place is given."""
    inside = checkpoint_file.parent.name == "ckpt"
    return (checkpoint_file.parent.parent if inside else checkpoint_file.parent) / "classifier.h5"


def save(
    path: Path,
    net: NoisyClassifier,
    optimiser: AdamW,
    config: Config,
    data: Mapping[str, Any],
    steps: int,
    accuracy: list[float],
    arrays: Mapping[str, Array] | None = None,
    **more: Any,
) -> None:
    """Write a classifier with raw and averaged weights, the run's configuration and what is known of its data."""
    store = net.params
    kept = {f"weights/{n}": a for n, a in store.arrays().items()} | dict(arrays or {})
    with store.using(optimiser.ema):
        kept |= {f"ema/{n}": a for n, a in store.arrays().items()}
    meta = {
        "kind": KIND,
        "alphabar": alphabar.__version__,
        "step": steps,
        "config": configs.to_dict(config),
        "model": net.config,
        "data": dict(data),
        "accuracy": [None if math.isnan(a) else a for a in accuracy],
        **more,
    }
    try:
        checkpoint.save(path, kept, meta)
    except OSError as e:
        raise Failure(f"{path}: {e.strerror or e}") from e


def read(path: str | Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(path, arrays, meta) of a classifier's file. CheckpointError with the reason if it is none."""
    path = Path(path)
    arrays, meta = checkpoint.load(path)
    if meta.get("kind") != KIND:
        raise CheckpointError(path, f"is of kind {meta.get('kind')!r}, want {KIND!r}")
    return path, arrays, meta
