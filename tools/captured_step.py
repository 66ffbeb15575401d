"""A training step in one piece: recorded once, then only started. The host makes the batch; all the rest follows from arrays.

A batch (:mod:`alphabar.tools.batches`) holds images as bytes, labels and the optimiser's numbers. The piece draws the times and
their levels (:mod:`alphabar.kernels.stepping`), noises the images, goes through the network forward and back, and updates the
weights and their average, unless loss or gradient is not finite: then nothing changes from that step on until it is looked at.
On a GPU the host neither waits nor reads, and the next batch is on its way while a step runs.
"""

import weakref
from typing import Any, NamedTuple

import numpy as np

from alphabar import kernels
from alphabar.core.levels import Tabulated
from alphabar.kernels import buffers, stepping
from alphabar.kernels.arrays import to_numpy
from alphabar.kernels.dispatch import chosen
from alphabar.kernels.graphs import Graph
from alphabar.kernels.uploads import Uploads
from alphabar.nets.optim import AdamW
from alphabar.tools.batches import AHEAD, Batches, levels
from alphabar.tools.config import Config
from alphabar.tools.methods import Process
from alphabar.tools.networks import Network

Array = Any


class Told(NamedTuple):
    """What the device has counted: steps made; of those since :meth:`CapturedStep.forget` the sum of their mean losses and their
    number; the last one's loss and norm of the gradient."""

    made: int
    total: float
    steps: int
    loss: float
    norm: float


def captured(config: Config, data: Any, process: Process, net: Network, optimiser: AdamW) -> "CapturedStep | None":
    """The step of a training of images under Gaussian noise; None where it cannot be one piece.

    A learned variance and times drawn by the losses so far are computed on the host, and dropout is drawn by Python.
    """
    if process.learned or process.history is not None or net.config["dropout"] or net.params.dtype != np.float32:
        return None
    return CapturedStep(config, data, process, net, optimiser)


class CapturedStep:
    """Steps of one training, numbered from 0; who starts them counts them.

    ``rows``: what belongs to the levels t = 0..T (:data:`alphabar.kernels.stepping.LEVEL`); of a process without a table the
    levels come with the batch.
    """

    def __init__(self, config: Config, data: Any, process: Process, net: Network, optimiser: AdamW) -> None:
        self._net, self._optimiser, self._seed = net, optimiser, config.train.seed
        xp, s = net.params.xp, process.levels
        self.waits = xp is np  # whether a step is over when :meth:`start` returns
        self._batches = Batches(config, data, process, net, optimiser, AHEAD if self.waits else 1)
        self._memory = xp.zeros(self._batches.nbytes, np.uint8)
        self._sent = self._batches.laid_out(self._memory)  # what a step reads
        self._weighted = process.weighting != "simple"
        self._rows: Array = None
        if isinstance(s, Tabulated):
            times = np.arange(1, s.T + 1)
            table = np.zeros((s.T + 1, len(stepping.LEVEL)), np.float32)
            table[1:] = levels(process, times, process.weight(times)).T
            self._rows = xp.asarray(table)
        self._counters, self._tally = xp.zeros(2, np.int32), xp.zeros(4, np.float64)  # made, skipped
        self._uploads: Uploads | None = None
        self._graph: Graph | None = None
        self._form: tuple | None = None
        self._counted: int | None = None  # what the device's counter says once the steps under way are done
        self._ahead: tuple[int, int, float] | None = None  # step, updates and rate of the batch that is on its way

    @property
    def nbytes(self) -> int:
        """Bytes of work arrays."""
        return 0 if self._graph is None else self._graph.nbytes

    @property
    def kept(self) -> bool:
        """Whether steps are now made by starting what was kept of an earlier one."""
        return self._graph is not None and self._graph.kept

    @property
    def refused(self) -> str | None:
        """Why steps are not made in one piece though they could be, or None."""
        return None if self._graph is None else self._graph.refused

    def ready(self) -> bool:
        """Whether the next step can be made so: not by the kernels' definitions, nor with parameters that are not the store's."""
        store = self._net.params
        form = store.form() if self.waits else (id(store.data), id(store.grad), id(store.low))
        if form is None or chosen() != "auto":
            return False
        if self._graph is None or form != self._form:
            lasting = (self._memory, self._counters, self._tally, store.data, store.grad, *self._optimiser.state().values())
            lasting += tuple(a for a in (self._rows, store.low) if a is not None)
            me = weakref.proxy(self)  # a graph that held this would keep a GPU's memory until the next collection of cycles
            self._graph, self._form = Graph(lambda: me._body(), self._memory, lasting), form
        return True

    def start(self, k: int, lr: float) -> None:
        """Start step ``k`` at a learning rate, once :meth:`ready`."""
        assert self._graph is not None
        if self._counted != k:
            self._counters[...] = self._net.params.xp.asarray(np.array([k, 0], np.int32))
            self._counted = k
        if self.waits:
            self._memory[...] = self._batches.of(k, lr)
        else:
            self.send(k, lr)
            assert self._uploads is not None
            self._uploads.take(self._memory)
            self._ahead = None
        self._graph()
        self._counted = k + 1

    def send(self, k: int, lr: float) -> None:
        """Send the batch of step ``k`` to the GPU, beside the work that it does, unless it is there."""
        wanted = k, self._optimiser.count, lr
        if self._ahead == wanted:
            return
        if self._uploads is None:
            self._uploads = Uploads(self._memory)
        while len(self._uploads):  # of a step that is not made
            self._uploads.take(self._memory)
        self._uploads.put(self._batches.of(k, lr))
        self._ahead = wanted

    @property
    def started(self) -> bool:
        """Whether steps have been started that :meth:`reset` has not been told of."""
        return self._counted is not None

    def told(self) -> Told:
        """What the device has counted; on a GPU this waits for the steps under way."""
        counters, tally = self._counters, self._tally
        if not self.waits:
            counters, tally = to_numpy(counters), to_numpy(tally)
        (made, _), (total, steps, loss, norm) = counters.tolist(), tally.tolist()
        return Told(made, total, int(steps), loss, norm)

    def forget(self) -> None:
        """Count losses anew from here."""
        self._tally.fill(0)

    def reset(self) -> None:
        """Forget the steps that were started: the next one begins with what weights, average and moments are now."""
        self._counted = None

    def _body(self) -> None:
        """The step: kernels alone."""
        sent, store, o, seed = self._sent, self._net.params, self._optimiser, self._seed
        xp, made, skipped = store.xp, self._counters[:1], self._counters[1:]
        t, of_level = sent.t, sent.levels
        if self._rows is not None:
            t, of_level = (
                buffers.empty((len(sent.images),), np.float64, xp),
                buffers.empty((self._rows.shape[1], len(sent.images)), np.float32, xp),
            )
            stepping.draw_levels(self._rows, made, seed, t, of_level)
        x, target = (buffers.empty(sent.images.shape, np.float32, xp) for _ in range(2))
        stepping.example(sent.images, of_level, made, seed, x, target)
        store.zero_grad()
        output = self._net(x, t, sent.labels)
        value, gradient = kernels.squared_error(output.data, target, of_level[-1] if self._weighted else None)
        output.backward(gradient)
        norm_sq = kernels.sum_squares(store.grad)
        stepping.verdict(value, norm_sq, skipped, self._tally)
        flats = store.data, store.grad, o.m, o.v, o.ema
        stepping.adamw_ema_by_table(*flats, sent.row, made, *o.betas, o.eps, norm_sq, o.max_norm, store.low)
        stepping.count(made, skipped, norm_sq)
