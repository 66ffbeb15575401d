"""Drawing images from a trained network: shared by the trainer's sheets and by the sampling program."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from alphabar.core import guidance, langevin, ode, predictor_corrector, samplers, tables
from alphabar.core.data import to_uint8
from alphabar.core.levels import Ladder, Levels
from alphabar.core.sde import VESDE
from alphabar.kernels.arrays import to_numpy
from alphabar.nets.unet import UNet
from alphabar.tools.config import SAMPLERS, Sample
from alphabar.tools.methods import Process, own_steps

Array = Any
Model = Callable[[Array, Array], Array]
CLIP = (-1.0, 1.0)  # of the predicted x0: the range of the data

TABLES: dict[str, Callable[..., tables.Table]] = {
    "ddim": tables.ddim,
    "ddpm": tables.ddpm,
    "euler": tables.euler,
    "heun": tables.heun,
    "rk4": tables.rk4,
    "dpm++": tables.dpm_solver_pp,
    "ab": tables.adams_bashforth,
    "em": tables.euler_maruyama,
    "rd": tables.reverse_diffusion,
    "pc": tables.reverse_diffusion,  # its predictor
}


@dataclass(frozen=True)
class Sampler:
    """A sampler with its settings: run(model, x_T, seed=, first_sample=, progress=) -> x_0, ``rows`` steps of progress."""

    name: str
    rows: int
    run: Callable[..., Array]


def sampler(process: Process, settings: Sample, spacing: str | None = None) -> Sampler:
    """The sampler that ``settings`` ask for, on the levels of a process. ValueError for steps or spacing that it cannot take.

    A step count of 0 is the sampler's own. All but "flow" clip the predicted x0 to the range of the data and re-derive ε
    from it; the corrections of "pc" take the network's score as it is.
    """
    s, name, prediction = process.levels, settings.sampler, process.prediction
    if name == "auto":
        name = SAMPLERS[process.name][0]
    steps = settings.steps or own_steps(s, name)
    if settings.eta and name != "ddim":
        raise ValueError(f"eta goes with the sampler ddim, not with {name}")
    if name in ("langevin", "flow"):
        if spacing is not None:
            raise ValueError(f"spacing does not go with the sampler {name}")
        if name == "flow" and settings.steps:
            raise ValueError("steps do not go with the sampler flow, which chooses its own by its tolerance")
    if spacing == "leading" and isinstance(s, (Ladder, VESDE)):
        raise ValueError(f"spacing leading does not go with {process.name}: samples must start at its largest noise level")
    if name == "flow":
        return Sampler(f"flow, tolerance {settings.tolerance:g}", 1, partial(_flow, s, prediction, settings.tolerance))
    if name == "langevin":
        if not isinstance(s, Ladder):
            raise ValueError(f"the sampler langevin needs a ladder of noise levels (method ncsn), not {process.name}")
        epsilon = settings.epsilon or step_size(s, steps)
        rows = langevin.annealed_langevin(s, steps, epsilon, prediction=prediction)
        return Sampler(f"langevin, {s.T} levels of {steps} steps", len(rows), partial(_table, rows))
    options: dict[str, Any] = {"eta": settings.eta} if name == "ddim" else {}
    if spacing is None and name in ("ddim", "ddpm") and process.name != "ddpm":
        spacing = "trailing"  # from T itself
    if spacing is not None:
        options["spacing"] = spacing
    rows = TABLES[name](s, steps, prediction=prediction, **options)
    if name == "pc":
        run = partial(_corrected, rows, s, settings.snr, settings.corrections)
        return Sampler(f"pc {steps} steps", len(rows), run)
    eta = f", eta = {settings.eta:g}" if settings.eta else ""
    return Sampler(f"{name} {steps} steps{eta}", len(rows), partial(_table, rows))


def step_size(ladder: Ladder, steps: int) -> float:
    """ε of annealed Langevin by technique 4 of Song & Ermon 2020. Eq: S4-C16."""
    high, low = float(ladder.sigma[-1]), float(ladder.sigma[1])
    return langevin.ncsnv2_settings(max_distance=high, dim=1, sigma_min=low, steps_per_level=steps, levels=ladder.T).epsilon


def _table(rows: tables.Table, model: Model, x_T: Array, **options: Any) -> Array:
    return samplers.sample(model, rows, x_T, clip=CLIP, **options)


def _corrected(rows: tables.Table, s: Levels, snr: float, corrections: int, model: Model, x_T: Array, **options: Any) -> Array:
    return predictor_corrector.sample(model, rows, x_T, s, snr, corrections, clip=CLIP, **options)


def _flow(s: Levels, prediction: str, tolerance: float, model: Model, x_T: Array, progress: Any = None, **_: Any) -> Array:
    try:
        x = ode.decode(model, s, x_T, prediction, rtol=tolerance, atol=tolerance).x
    except RuntimeError as e:
        raise ValueError(str(e)) from e
    if progress is not None:
        progress(1, 1)
    return x


def draw(
    process: Process,
    net: UNet,
    chosen: Sampler,
    labels: np.ndarray | None,
    n: int,
    seed: int = 0,
    weight: float = 0.0,
    batch: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[np.ndarray]:
    """``n`` images as blocks uint8 (≤ batch, H, W, C). Image k follows from (seed, k, labels[k]) alone.

    labels (n,), or None for a network without classes, or for one with classes the null class. weight: that of classifier-free
    guidance. progress(images): called after each step with the number of images in the batch. Raises ValueError where a sample is
    not a number. (The steps of "flow" are chosen for a whole batch: there an image follows from its batch within the tolerance.)
    """
    xp, shape = net.params.xp, (*net.config["image_size"], net.config["out_channels"])
    predict = process.predict(net.predict)
    for start in range(0, n, batch):
        size = min(batch, n - start)
        model: Model = predict
        if labels is not None:
            model = guidance.classifier_free(predict, xp.asarray(labels[start : start + size]), weight, net.null)
        x = chosen.run(
            model,
            samplers.prior((size, *shape), seed, start, xp=xp, std=process.levels.prior_std),
            seed=seed,
            first_sample=start,
            progress=None if progress is None else partial(_count, progress, size),
        )
        yield to_numpy(to_uint8(x))


def _count(progress: Callable[[int], Any], images: int, done: int, rows: int) -> None:
    progress(images)
