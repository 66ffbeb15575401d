"""A plan: the calls of compiled functions that one run made, to be made again for other values of the same shapes.

What a run works on lies in the plan's own memory, or in arrays named beforehand that outlive it (a network's weights), or is a
constant. A call that touches anything else, or a result that no compiled function made, and the run cannot be repeated: the plan
is refused. That catches what is computed in Python on the way, except where it writes into the plan's memory in place.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from . import buffers, dispatch, precisions, recording


@cache
def _replay() -> ModuleType:
    return importlib.import_module(".cpu.replay", __package__)


@cache
def _threads() -> Any:
    return importlib.import_module(".cpu.threads", __package__).threads


def circumstances() -> tuple | None:
    """What a run depends on besides its arguments; None where it cannot be recorded: no compiled functions, or it is already."""
    if dispatch.chosen() != "auto" or recording.active.get() is not None:
        return None
    return _threads()(), precisions.high()


class _Arena(buffers.Pool):
    """A pool that knows its blocks. ``keeping``: those for other forms of weights are used for nothing else, before or after."""

    def __init__(self, keeping: bool) -> None:
        super().__init__()
        self.blocks: list[buffers.Block] = []
        self._keeping = keeping
        self._kept: dict[int, np.ndarray] = {}  # by the root of the array

    def for_weights(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if not self._keeping:
            return self.empty(shape, dtype)
        a = self.new(shape, dtype)
        self._kept[id(_root(a))] = a
        return a

    def changing(self, a: np.ndarray) -> bool:
        """Whether the array lies in this memory and has no part of it to itself."""
        root = _root(a)
        return self.leases(root) and id(root) not in self._kept

    def _allocated(self, size: int) -> buffers.Block:
        block = super()._allocated(size)
        self.blocks.append(block)
        return block


def _root(a: np.ndarray) -> Any:
    """The base of all bases of an array, up to what a pool gave it."""
    root: Any = a
    while type(root) is np.ndarray and root.base is not None:
        root = root.base
    return root


def _extent(a: np.ndarray) -> tuple[int, int]:
    start = a.__array_interface__["data"][0]
    return start, start + a.nbytes


class _Weights:
    """Calls that make other forms of weights. Whether those have changed is told by a digest of all their bits."""

    def __init__(self, values: np.ndarray) -> None:
        self._extent, self._words = _extent(values), values.view(np.uint64)
        self._calls: list[Any] = []
        self._read: list[np.ndarray] = []
        self._digest = np.empty((0, 0), np.uint64)
        self._check: Any = None
        self._make: Any = None
        self._seen = b""

    def take(self, entry: Any, arguments: tuple, memory: _Arena) -> bool:
        """Whether the call is one of these."""
        if not entry.prepares or any(memory.changing(a) for a in arguments if isinstance(a, np.ndarray)):
            return False
        start, end = (at - self._extent[0] for at in _extent(arguments[0]))
        if start < 0 or end > self._words.nbytes:
            return False
        self._calls.append(_replay().call(entry.dispatcher, arguments))
        self._read.append(self._words[start // 8 : -(-end // 8)])
        return True

    def prepare(self) -> None:
        """Make the calls if the values are not those of the last time."""
        if not self._calls:
            return
        if self._check is None:
            replay, compiled = _replay(), importlib.import_module(".cpu.elementwise", __package__)
            self._digest = np.empty((len(self._read), *compiled.DIGEST), np.uint64)
            checks = [replay.call(compiled.digest.dispatcher, pair) for pair in zip(self._read, self._digest, strict=True)]
            few = [words.size < compiled.DIGESTED for words in self._read]
            checks = [c._replace(threads=1) if alone else c for c, alone in zip(checks, few, strict=True)]
            self._make, self._check = replay.Replay(self._calls), replay.Replay(checks)
        self._check()
        found = self._digest.tobytes()
        if found != self._seen:
            self._make()
            self._seen = found


class Plan:
    """Calls in stretches, one for each ``with plan.recorded() as stretch:``; ``stretch()`` makes those of one again.

    ``lasting``: arrays outside of the plan's memory that calls may read and write; they must stay where they are. ``weights``:
    the one of them (float32, of 64 byte lines) whose other forms, which some calls make, are kept and made anew only when its
    values have changed.
    """

    def __init__(self, lasting: tuple[np.ndarray, ...] = (), weights: np.ndarray | None = None) -> None:
        self.memory = _Arena(keeping=weights is not None)
        self.refused: str | None = None  # why it cannot be made again
        self._lasting = lasting
        self.weights = None if weights is None else _Weights(weights)
        self._extents = [_extent(a) for a in lasting]
        self._constants: dict[int, np.ndarray] = {}

    @contextmanager
    def recorded(self) -> Iterator["Stretch"]:
        """Within the block arrays come from the plan's memory, and calls of compiled functions are noted."""
        stretch = Stretch(self)
        token = recording.active.set(stretch)
        try:
            with self.memory:
                yield stretch
        except BaseException:
            self.refused = "it ended with an exception"
            raise
        finally:
            recording.active.reset(token)

    def knows(self, a: np.ndarray) -> bool:
        """Whether the memory of ``a`` will be there, and with what the calls made of it, when they are made again."""
        root = _root(a)
        if self.memory.leases(root) or not a.size:
            return True
        if type(root) is np.ndarray and not root.flags.writeable:
            self._constants[id(root)] = root  # kept, so that its memory is
            return True
        start, end = _extent(a)
        return a.flags.c_contiguous and any(first <= start and end <= last for first, last in self._extents)


class Stretch:
    """The calls of one stretch of a plan, in order."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._calls: list[Any] = []
        self._run: Any = None

    def note(self, entry: Any, arguments: tuple) -> None:
        """Take down a call that was just made."""
        plan, name = self._plan, entry.dispatcher.py_func.__name__
        if plan.refused is not None:
            return
        unknown = [i for i, a in enumerate(arguments) if isinstance(a, np.ndarray) and not plan.knows(a)]
        if unknown:
            self.refuse(f"argument {unknown[0]} of {name} lies in memory that is not the plan's")
            return
        replay = _replay()
        try:
            if plan.weights is None or not plan.weights.take(entry, arguments, plan.memory):
                self._calls.append(replay.call(entry.dispatcher, arguments))
        except replay.NotPlain as e:
            self.refuse(f"{name}: {e}")

    def refuse(self, why: str) -> None:
        """Give the plan up."""
        if self._plan.refused is None:
            self._plan.refused = why

    def __call__(self) -> None:
        """Make the calls again."""
        if self._plan.weights is not None:
            self._plan.weights.prepare()
        if self._run is None:
            self._run = _replay().Replay(self._calls)
        self._run()
