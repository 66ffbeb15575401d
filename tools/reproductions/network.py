"""A trained network as the parts use it: its noise prediction, its data, and samples of it in small batches."""

from pathlib import Path
from typing import Any

import numpy as np

from alphabar.core import convert, data, guidance, samplers
from alphabar.core.data import to_unit
from alphabar.core.levels import Schedule
from alphabar.core.table import Table
from alphabar.kernels.arrays import to_numpy
from alphabar.tools import trained
from alphabar.tools.command import UserError
from alphabar.tools.methods import Process

Array = Any
CLIP = (-1.0, 1.0)  # of the predicted x0: the range of the data
BATCH = 100


class Network:
    """The network of a checkpoint with averaged weights. UserError where it was not trained as DDPM, whose tables these are."""

    def __init__(self, path: Path, xp: Any = np) -> None:
        found = trained.load(path, False, xp)
        if found.config.method != "ddpm":
            raise UserError(
                f"--checkpoint must be a network of method ddpm, on the schedule of the papers, not {found.config.method}"
            )
        self.file, self.step, self.classes, self.xp = found.path.name, found.step, found.classes, xp
        self.net, self.process = found.net, Process(found.config)
        levels = self.process.levels
        assert isinstance(levels, Schedule)
        self.s = levels
        self.shape = (*self.net.config["image_size"], self.net.config["out_channels"])
        self._source = found.config.data.path

    @property
    def name(self) -> str:
        """File and step, as the report names it."""
        return f"{self.file} (step {self.step:,})"

    def steps(self, wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Those step counts that its schedule has."""
        return tuple(n for n in wanted if n <= self.s.T)

    def images(self, split: str, n: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """(the first ``n`` images in [−1, 1], their classes or None) of the training or the held-out images."""
        found = data.load(self._source, split)
        rows = np.arange(len(found) if n is None else min(n, len(found)))
        known = found.labels is not None and len(self.classes) > 0
        return to_unit(found.images[rows]), found.labels[rows] if known and found.labels is not None else None

    def model(self, labels: np.ndarray | None = None, w: float = 0.0) -> samplers.Model:
        """ε of the network for the classes ``labels`` (none: the null class), guided with the weight w."""
        predict = self.process.predict(self.net.predict)
        inner = predict
        if labels is not None:
            inner = guidance.classifier_free(predict, self.xp.asarray(labels), w, self.net.null)
        kind = self.process.prediction
        if kind == "eps":
            return inner
        return lambda x, t: convert.convert(inner(x, t), x, t, self.s, kind, "eps")

    def prior(self, n: int, seed: int, first: int = 0) -> Array:
        """x_T of ``n`` samples."""
        return samplers.prior((n, *self.shape), seed, first, xp=self.xp)

    def sample(self, table: Table, n: int, seed: int, labels: np.ndarray | None = None, w: float = 0.0) -> np.ndarray:
        """``n`` samples in [−1, 1] by a table for ε, x̂0 clipped to the range of the data."""
        found = []
        for start in range(0, n, BATCH):
            told = None if labels is None else labels[start : min(start + BATCH, n)]
            x_T = self.prior(min(BATCH, n - start), seed, start)
            x = samplers.sample(self.model(told, w), table, x_T, seed, clip=CLIP, first_sample=start)
            found.append(np.clip(to_numpy(x), -1, 1))
        return np.concatenate(found)
