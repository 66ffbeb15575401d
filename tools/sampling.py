"""Drawing images from a trained network: shared by the trainer's sheets and by the sampling program."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from alphabar.core import guidance, samplers, schedules, tables
from alphabar.core.data import to_uint8
from alphabar.kernels.arrays import to_numpy
from alphabar.nets.unet import UNet

SAMPLERS: dict[str, Callable[..., tables.Table]] = {
    "ddim": tables.ddim,
    "ddpm": tables.ddpm,
    "euler": tables.euler,
    "heun": tables.heun,
    "dpm++": tables.dpm_solver_pp,
    "ab": tables.adams_bashforth,
}


def table(
    s: schedules.Schedule, sampler: str, steps: int, eta: float = 0.0, prediction: str = "eps", spacing: str | None = None
) -> tables.Table:
    """The table of a sampler by name. ValueError for steps or spacing out of range, or an eta where it means nothing."""
    if eta and sampler != "ddim":
        raise ValueError(f"eta goes with the sampler ddim, not with {sampler}")
    options: dict[str, Any] = {"eta": eta} if sampler == "ddim" else {}
    if spacing is not None:
        options["spacing"] = spacing
    return SAMPLERS[sampler](s, steps, prediction=prediction, **options)


def draw(
    net: UNet,
    rows: tables.Table,
    labels: np.ndarray | None,
    n: int,
    seed: int = 0,
    weight: float = 0.0,
    batch: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[np.ndarray]:
    """``n`` images as blocks uint8 (≤ batch, H, W, C). Image k follows from (seed, k, labels[k]) alone.

    labels (n,), or None for a network without classes, or for one with classes the null class. weight: that of classifier-free
    guidance. progress(images): called after each row of the table with the number of images in the batch. Raises ValueError where
    a sample is not a number.
    """
    xp, shape = net.params.xp, (*net.config["image_size"], net.config["out_channels"])
    for start in range(0, n, batch):
        size = min(batch, n - start)
        if labels is None:
            model: Callable[[Any, Any], Any] = net.predict
        else:
            model = guidance.classifier_free(net.predict, xp.asarray(labels[start : start + size]), weight, net.null)
        x = samplers.sample(
            model,
            rows,
            samplers.prior((size, *shape), seed, start, xp=xp),
            seed=seed,
            clip=(-1.0, 1.0),
            first_sample=start,
            progress=None if progress is None else partial(_count, progress, size),
        )
        yield to_numpy(to_uint8(x))


def _count(progress: Callable[[int], Any], images: int, done: int, rows: int) -> None:
    progress(images)
