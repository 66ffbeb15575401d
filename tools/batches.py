"""What the host makes for training steps: images, labels with conditions already dropped, the optimiser's numbers as a row.

Each step's batch is packed in one piece of memory. Several are made at once: a training step leaves nothing of Python's in the
caches of a CPU, and the first batch that is made after it takes ten times as long as one that is made right after another.
"""

from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from alphabar.core import forward
from alphabar.core.levels import Tabulated
from alphabar.kernels import counter, stepping, streams
from alphabar.kernels.buffers import ALIGN
from alphabar.nets.optim import AdamW, learning_rate
from alphabar.tools.config import Config, Train
from alphabar.tools.methods import Process
from alphabar.tools.networks import Network

Array = Any
AHEAD = 128  # batches that are made at once,
ROOM = 1 << 20  # but no more bytes than these, unless one has more


class Batches:
    """The batches of one training, in the order of its steps: ``batches.of(k, lr)`` has all that step ``k`` reads, packed.

    ``ahead``: steps whose batches are made at once, as far as ROOM allows. The optimiser's numbers are foreseen with them, and
    made anew where learning rate, number of updates or settings turn out to be others. Of a process without a table of levels
    the host draws the times, and sends the levels too.
    """

    def __init__(self, config: Config, data: Any, process: Process, net: Network, optimiser: AdamW, ahead: int = AHEAD) -> None:
        self._config, self._data, self._process, self._net, self._optimiser = config, data, process, net, optimiser
        size = config.train.batch
        parts: dict[str, tuple[tuple[int, ...], Any]] = {"images": ((size, *data.shape), np.uint8), "row": ((1, 5), np.float32)}
        if net.config["classes"] is not None:
            parts["labels"] = ((size,), np.int64)
        if not isinstance(process.levels, Tabulated):
            parts |= {"t": ((size,), np.float64), "levels": ((len(stepping.LEVEL), size), np.float32)}
        self._parts, self.nbytes = parts, sum(_room(*part) for part in parts.values())  # bytes of one batch
        memory = np.zeros((max(1, min(ahead, ROOM // self.nbytes)), self.nbytes), np.uint8)
        self._packed, self._parts_of_all = list(memory), self.laid_out(memory)
        self._numbers: list[tuple[float, ...]] = [()] * len(memory)  # that the rows were made of
        self._steps = range(0)  # whose batches these are

    def laid_out(self, memory: Array) -> SimpleNamespace:
        """The parts of a batch as arrays in its memory (…, nbytes); None for those that it does not have."""
        found, at = SimpleNamespace(labels=None, t=None, levels=None), 0
        for name, (shape, dtype) in self._parts.items():
            nbytes = prod(shape) * np.dtype(dtype).itemsize
            setattr(found, name, memory[..., at : at + nbytes].view(dtype).reshape(*memory.shape[:-1], *shape))
            at += _room(shape, dtype)
        return found

    def of(self, k: int, lr: float) -> np.ndarray:
        """The memory of step ``k``, whose update is the optimiser's next one, at this learning rate; good until the next call."""
        if k not in self._steps:
            self._make(k)
        place = k - self._steps.start
        self._number(place, lr, self._optimiser.count)
        return self._packed[place]

    def _make(self, first: int) -> None:
        """The batches of step ``first`` and of those that follow it."""
        steps, self._steps = range(first, first + len(self._packed)), range(0)
        t, made, count = self._config.train, self._parts_of_all, self._optimiser.count
        for i, k in enumerate(steps):
            made.images[i], labels, _ = self._data.batch(k, t.batch, t.seed, self._config.data.flip)
            if made.labels is not None:
                made.labels[i] = labels
            if made.t is not None:
                made.t[i], weight = self._process.times(t.batch, t.seed, k)
                made.levels[i] = levels(self._process, made.t[i], weight)
            self._number(i, rate(t, k), count + i)
        if made.labels is not None and t.p_uncond:  # as guidance.drop_condition, which is told of one step
            made.labels[counter.uniforms_of_steps(t.batch, t.seed, steps, streams.DROP) < t.p_uncond] = self._net.null
        self._steps = steps

    def _number(self, place: int, lr: float, count: int) -> None:
        """The numbers of the update after ``count`` others."""
        o = self._optimiser
        numbers = lr, *o.betas, o.weight_decay, count + 1, o.decay(count)
        if self._numbers[place] != numbers:
            self._parts_of_all.row[place], self._numbers[place] = stepping.adamw_row(*numbers), numbers


def rate(train: Train, k: int) -> float:
    """The learning rate of step ``k``."""
    return learning_rate(k, train.lr, min(train.warmup, train.steps // 5), train.steps, train.decay)


def levels(process: Process, times: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """The levels of times (n,), (6, n) float32 in the order of :data:`alphabar.kernels.stepping.LEVEL`."""
    zero, one = np.zeros(len(times), np.float32), np.ones(len(times), np.float32)
    s, prediction = process.levels, process.prediction
    of_x0, of_eps = ((one, zero), (zero, one))
    targets = (forward.training_target(*pair, times, s, prediction) for pair in (of_x0, of_eps))  # linear in both
    return np.stack([*s.levels(times), process.input(one, times), *targets, one if weight is None else weight]).astype(np.float32)


def _room(shape: tuple[int, ...], dtype: Any) -> int:
    return -(-prod(shape) * np.dtype(dtype).itemsize // ALIGN) * ALIGN
