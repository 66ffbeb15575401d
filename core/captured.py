"""The sampler loop on a GPU with its rows as CUDA graphs: a row is one launch, and nothing in the loop waits for the host.

The state, the history, the row's number and its time lie in the device's memory. Each kind of row, which asks the model or does
not, has noise or not, reads and keeps these or those outputs, is a graph of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import kernels
from ..kernels import checks, dispatch, gpu, streams
from ..kernels.arrays import array_module, is_cupy
from ..kernels.gpu import sampling
from ..kernels.graphs import Arena, Graph
from .samplers import Model, answer_of
from .table import Table

Array = Any
Progress = Callable[[int, int], Any]


class Kind(NamedTuple):
    """What rows of one graph have in common. reads, keeps: the places of the history that it reads and that it writes."""

    asks: bool
    noisy: bool
    reads: tuple[int, ...]
    keeps: int | None


def kinds(table: Table) -> tuple[list[Kind], int]:
    """(the kind of every row, places of the history): a row may keep its output where the last one to read it now reads."""
    past, last_read, asks = table.past, table.last_read, table.asks
    rows: list[Kind] = []
    place: dict[int, int] = {}  # of the outputs that later rows read
    spare: set[int] = set()
    places = 0
    for i in range(len(table)):
        reads = tuple(place[i - k] for k in table.back[i, : past[i]])
        spare |= {place.pop(k) for k in [k for k in place if last_read[k] <= i]}
        keeps = None
        if last_read[i] > i:
            if not spare:
                spare.add(places)
                places += 1
            keeps = place[i] = min(spare)
            spare.remove(keeps)
        rows.append(Kind(bool(asks[i]), bool(table.c[i] != 0), reads, keeps))
    return rows, places


def possible(x_T: Array) -> bool:
    """Whether the rows can be graphs: a float32 array of CuPy itself, and kernels that are not asked for their definitions."""
    return is_cupy(x_T) and x_T.dtype == np.float32 and x_T.size > 0 and dispatch.chosen() == "auto"


class _Memory(NamedTuple):
    """What rows work on: the state, the outputs that later rows read, and what tells a row where it stands."""

    x: Array
    history: list[Array]
    times: Array  # of all rows
    t: Array  # of the row, for every sample
    counter: Array
    words: Array  # the seed's two, the first sample


def _row(kind: Kind, model: Model, rows: np.ndarray, clip: tuple[float, float] | None, at: _Memory) -> Callable[[], None]:
    """A row of this kind, the one that the counter stands at."""
    past = tuple(at.history[k] for k in kind.reads)
    store = None if kind.keeps is None else at.history[kind.keeps]
    noise = True if kind.noisy else None

    def row() -> None:
        m = at.x
        if kind.asks:
            sampling.tell_time(at.times, at.counter, at.t)
            m = answer_of(model(at.x, at.t), at.x, "model")
        with gpu.counted(at.counter, at.words):
            kernels.step(at.x, m, rows, 0, past, noise=noise, clip=clip, out=at.x, store=store)
        gpu.count(at.counter)

    return row


class _Loop:
    """One model, one table, one shape. Nothing that it holds refers to it: its memory goes when it goes."""

    def __init__(self, model: Model, table: Table, like: Array, clip: tuple[float, float] | None, rederive_eps: bool) -> None:
        xp = array_module(like)
        self.model, self.table, self.clip, self.rederive_eps = model, table, clip, rederive_eps
        self.kinds, places = kinds(table)
        history = [xp.empty(like.shape, like.dtype) for _ in range(places)]
        times, t = xp.asarray(np.array(table.times, np.float64)), xp.empty(like.shape[0], np.float64)
        self.at = _Memory(xp.empty(like.shape, like.dtype), history, times, t, xp.empty(1, np.int32), xp.empty(3, np.uint32))
        arena, rows = Arena(self.at.x), table.rows(clip is not None, rederive_eps)
        self.graphs = {k: Graph(_row(k, model, rows, clip, self.at), self.at.x, arena=arena) for k in set(self.kinds)}

    def serves(self, model: Model, table: Table, x: Array, clip: Any, rederive_eps: bool) -> bool:
        return (
            model is self.model
            and table is self.table
            and (x.shape, clip, rederive_eps) == (self.at.x.shape, self.clip, self.rederive_eps)
        )

    def run(
        self, x: Array, seed: int, first_sample: int, states: Array | None, progress: Callable[[int, int], Any] | None
    ) -> Array:
        xp = array_module(x)
        checks.counter(seed, 0, streams.SAMPLER, first_sample)
        self.at.x[...] = x
        self.at.counter[...] = 0
        self.at.words[...] = xp.asarray(np.array((seed & 0xFFFFFFFF, seed >> 32, first_sample), np.uint32))
        for i, kind in enumerate(self.kinds):
            self.graphs[kind]()
            if states is not None:
                states[i + 1] = self.at.x
            if progress is not None:
                progress(i + 1, len(self.kinds))
        return self.at.x.copy() if states is None else states


class Captured:
    """The graphs of a sampler, kept for further batches: ``samplers.sample(…, captured=kept)`` with one and the same ``kept``.

    Calls with the same model and table (the same objects), shape and bounds launch the graphs of the first one, whatever their
    state, seed and first sample; another call captures anew. What the model reads besides its arguments, its weights or the
    labels of the batch, may change in place between calls; what it makes of it, such as a copy of its weights in bfloat16, is
    the model's to keep up in place too.
    """

    def __init__(self) -> None:
        self._loop: _Loop | None = None

    @property
    def refused(self) -> str | None:
        """Why rows could not be captured and ran plainly, in one line; None where all were."""
        graphs = [] if self._loop is None else self._loop.graphs.values()
        return next((g.refused for g in graphs if g.refused is not None), None)

    def run(
        self,
        model: Model,
        table: Table,
        x: Array,
        clip: tuple[float, float] | None,
        rederive_eps: bool,
        seed: int,
        first_sample: int,
        states: Array | None,
        progress: Progress | None,
    ) -> Array:
        """The loop of :func:`alphabar.core.samplers.sample` from x; ``states`` takes the trajectory and is then the answer."""
        if self._loop is None or not self._loop.serves(model, table, x, clip, rederive_eps):
            self._loop = None  # its memory may serve the next one
            self._loop = _Loop(model, table, x, clip, rederive_eps)
        return self._loop.run(x, seed, first_sample, states, progress)
