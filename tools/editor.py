"""What `alphabar edit` does with a network: each mode as a job that turns a batch of images into rows of a sheet."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from alphabar import kernels
from alphabar.core import editing, guidance, inpainting, inverse, operators, samplers, tables
from alphabar.kernels import streams
from alphabar.nets import products
from alphabar.nets.unet import UNet
from alphabar.tools.methods import CLIP, Process

Array = Any
ROUNDING = 0.0023  # the deviation of rounding to 8 bits
FLOOR = 0.01  # the least noise of a measurement that the gradient methods are told: rounding to 8 bits, errors of the network
METHODS = {"repaint": 50, "replacement": 100, "ddrm": 100, "pigdm": 100, "moment": 50, "dps": 200}  # and their steps
ONLY = {  # options that go with some methods, and their values where not given
    "jump": (("repaint",), 5),
    "resample": (("repaint",), 5),
    "eta": (("ddrm", "pigdm", "moment"), {"ddrm": 0.85, "pigdm": 1.0, "moment": 1.0}),
    "data_std": (("pigdm",), 0.5),
    "iterations": (("moment",), 1),
    "zeta": (("dps",), 1.0),
}


class Batch:
    """Images (B, H, W, C) in [−1, 1] and the network as it is told of them; ``first`` is the number of the first among all."""

    def __init__(
        self,
        process: Process,
        net: UNet,
        images: Array,
        labels: Array | None,
        weight: float = 0.0,
        seed: int = 0,
        first: int = 0,
        told: Callable[[int], Any] | None = None,
    ) -> None:
        self.process, self.net, self.images, self.seed, self.first = process, net, images, seed, first
        self.labels = labels
        self.weight = weight if labels is not None else 0.0
        self._told = told

    @cached_property
    def model(self) -> samplers.Model:
        """The network, guided where a weight is given, as model(x, t) of the process."""
        predict = self.process.predict(self.net.predict)
        inner = predict if self.labels is None else guidance.classifier_free(predict, self.labels, self.weight, self.net.null)

        def model(x: Array, t: Array) -> Array:
            answer = inner(x, t)
            if self._told is not None:
                self._told(len(x))
            return answer

        return model

    def vjp(self, x: Array, t: Array, u: Callable[[Array], Array]) -> tuple[Array, Array]:
        """(m, uᵀ∂m/∂x) of the model, u a function of m: one prediction, and one backward pass for each branch of the guidance."""
        m = self.model(x, t)
        direction, scaled = self.process.of_answer(u(m)), self.process.input(x, t)

        def back(labels: Array, share: float) -> Array:
            _, gradient = products.vjp(lambda z: self.net(z, t, labels), scaled, direction * direction.dtype.type(share))
            return gradient

        gradient = back(self.labels, 1 + self.weight)
        if self.weight:
            gradient = gradient + back(self.net.params.xp.full(len(x), self.net.null), -self.weight)
        return m, self.process.input(gradient, t)

    def firsts(self) -> "Batch":
        """The first image of each pair, with its class."""
        labels = None if self.labels is None else self.labels[::2]
        return Batch(self.process, self.net, self.images[::2], labels, self.weight, self.seed, self.first, self._told)

    def x_T(self) -> Array:
        """The prior, image by image."""
        size, params = self.net.config["image_size"], self.net.params
        shape = (len(self.images), *size, self.net.config["in_channels"])
        return samplers.prior(shape, self.seed, self.first, xp=params.xp, std=self.process.levels.prior_std)


@dataclass(frozen=True)
class Job:
    """``run(batch)`` gives the rows of the sheet by name; the model is called ``calls`` times for each image.

    The rows in ``compared`` are measured against the row of that name. ``result`` names the rows that are written as images.
    """

    title: str
    calls: int
    run: Callable[[Batch], dict[str, Array]]
    compared: dict[str, str]
    result: tuple[str, ...]
    across: bool = False  # the rows are shown as columns, each image a row


def reconstruct(process: Process, steps: int, label: str) -> Job:
    """Encode and decode."""

    def run(batch: Batch) -> dict[str, Array]:
        options: dict[str, Any] = {"label": label, "prediction": process.prediction, "clip": CLIP}
        again, _ = editing.reconstruct(batch.model, process.levels, batch.images, steps, **options)
        return {"original": batch.images, "decoded": again}

    tables.ddim_encode(process.levels, steps, prediction=process.prediction, label=label)  # an error now rather than later
    return Job(f"DDIM encode and decode, {steps} steps", 2 * steps, run, {"decoded": "original"}, ("decoded",))


def interpolate(process: Process, steps: int, label: str, frames: int) -> Job:
    """Pairs of images, the first half of a batch with the second, and the path between their codes."""

    def run(batch: Batch) -> dict[str, Array]:
        half, a, b = batch.firsts(), batch.images[::2], batch.images[1::2]
        options: dict[str, Any] = {"label": label, "prediction": process.prediction, "clip": CLIP}
        path = editing.interpolate(half.model, process.levels, a, b, frames, steps, **options)
        return {"a": a, **{f"frame {k}": frame for k, frame in enumerate(path)}, "b": b}

    tables.ddim_encode(process.levels, steps, prediction=process.prediction, label=label)
    names = tuple(f"frame {k}" for k in range(frames))
    compared = {names[0]: "a", names[-1]: "b"}
    return Job(f"slerp of DDIM codes, {steps} steps", (2 + frames) * steps // 2, run, compared, names, across=True)


def vary(process: Process, steps: int, strengths: tuple[float, ...], convention: str, eta: float, repeats: int) -> Job:
    """Image to image, at several strengths."""
    s, build = process.levels, partial(tables.ddim, eta=eta)
    grids = [editing.strength_grid(s, strength, steps, convention) for strength in strengths]

    def run(batch: Batch) -> dict[str, Array]:
        rows = {"original": batch.images}
        options: dict[str, Any] = {"convention": convention, "repeats": repeats, "prediction": process.prediction, "clip": CLIP}
        options |= {"seed": batch.seed, "first_sample": batch.first, "sampler": build}
        for strength in strengths:
            rows[f"strength {strength:g}"] = editing.sdedit(batch.model, s, batch.images, strength, steps, **options)
        return rows

    names = tuple(f"strength {strength:g}" for strength in strengths)
    calls = repeats * sum(map(len, grids))
    return Job(f"SDEdit, strength by {convention}", calls, run, dict.fromkeys(names, "original"), names)


def restore(
    process: Process,
    operator: operators.Operator,
    method: str,
    steps: int,
    noise: float,
    settings: dict[str, Any],
    what: str,
    measured: bool = False,
) -> Job:
    """Images from measurements: of the images given, with noise added, or (``measured``) the images given are measurements."""
    s = process.levels
    eta = 1.0 if method in ("repaint", "replacement", "dps") else settings["eta"]
    table = tables.ddim(s, steps, eta, spacing="trailing", prediction=process.prediction)  # η = 1 is DDPM
    solve = _solver(process, operator, method, table, max(noise, ROUNDING) if measured else noise, settings)
    mask = operator.singular != 0 if isinstance(operator, operators.Mask) else None

    def run(batch: Batch) -> dict[str, Array]:
        y = batch.images
        if not measured:
            y = operator(y)
            if noise:
                z = kernels.normals(batch.net.params.xp.empty_like(y), batch.seed, 0, streams.MEASURE, batch.first)
                y = y + y.dtype.type(noise) * z
        x = solve(batch, y)
        if mask is not None:
            y = operator(y)
            if not noise:
                x = batch.net.params.xp.where(batch.net.params.xp.asarray(mask), y, x)
        shown = y if operator.shape_out == operator.shape else operator.pinv(y)
        rows = {"measured": shown, "restored": x}
        return rows if measured else {"original": batch.images, **rows}

    calls = {
        "repaint": int((np.diff(inpainting.repaint_path(len(table), settings["jump"], settings["resample"])) < 0).sum()),
        "moment": len(table) * settings["iterations"],
    }
    compared = {} if measured else {"measured": "original", "restored": "original"}
    title = f"{what}, {method} {steps} steps" + (f", noise {noise:g}" if noise else "")
    return Job(title, calls.get(method, len(table)), run, compared, ("restored",))


def _solver(
    process: Process,
    operator: operators.Operator,
    method: str,
    table: tables.Table,
    noise: float,
    settings: dict[str, Any],
) -> Callable[[Batch, Array], Array]:
    """solve(batch, y) -> x."""
    s, prediction = process.levels, process.prediction

    def solve(batch: Batch, y: Array) -> Array:
        options: dict[str, Any] = {"clip": CLIP, "seed": batch.seed, "first_sample": batch.first}
        x_T = batch.x_T()
        if method in ("repaint", "replacement"):
            path = (settings["jump"], settings["resample"]) if method == "repaint" else (1, 1)
            return inpainting.repaint(batch.model, table, x_T, y, operator.singular, *path, **options)
        if method == "ddrm":
            grid = np.sort(table.t)
            return inverse.ddrm(
                batch.model, s, operator, y, x_T, noise, eta=settings["eta"], grid=grid, prediction=prediction, **options
            )
        if method == "dps":
            return inverse.dps(batch.vjp, table, x_T, operator, y, settings["zeta"], **options)
        told = max(noise, FLOOR)
        if method == "pigdm":
            model = inverse.pigdm(batch.vjp, s, operator, y, told, prediction, settings["data_std"])
        else:
            model = inverse.moment_matching(batch.vjp, s, operator, y, told, prediction, settings["iterations"])
        return samplers.sample(model, table, x_T, **options)

    return solve
