"""Plans of a network's runs: recorded once for each form of a call, made again by all later calls of that form.

The answer and the gradients are those of the plain run, bit for bit; what no plan can repeat is run plainly.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels import buffers
from ..kernels.plan import Plan, circumstances
from .autograd import Tensor, backward, on_own_tape, record, recording
from .layers import ParameterStore

Array = Any
Body = Callable[..., Tensor]
KEPT = 4  # plans of a network; the one that was used longest ago goes first


class _Pending:
    """A forward pass whose backward pass may come: what it left in the plan's memory must stay while this lives."""

    __slots__ = ("__weakref__",)


class _Run:
    """One form of a call: its plan, the plan's one or two stretches, and where inputs, output and its gradient lie."""

    def __init__(self, params: ParameterStore, taped: bool) -> None:
        self.plan = Plan((params.data, params.grad), None if taped else params.data)  # training changes the weights at each step
        self.inputs: tuple[Array, ...] = ()
        self.out: Array = None
        self.dout: Array = None
        self.forward: Callable[[], None] | None = None
        self.backward: Callable[[], None] | None = None
        self.pending: Callable[[], _Pending | None] = lambda: None
        self.calls = 0


class Plans:
    """The plans of one network. ``plans(body, *inputs)`` is ``body(*inputs)``: arrays of NumPy in, a Tensor out.

    ``body`` computes by compiled functions alone, from its inputs and the parameters, and is the same at each call.
    """

    def __init__(self, params: ParameterStore) -> None:
        self._params = params
        self._runs: OrderedDict[tuple, _Run] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all plans' memory."""
        return sum(run.plan.memory.nbytes for run in self._runs.values())

    def refusals(self) -> list[str]:
        """Why forms of calls that were made could not be repeated."""
        return [run.plan.refused for run in self._runs.values() if run.plan.refused is not None]

    def __call__(self, body: Body, *inputs: Array) -> Tensor:
        state = self._state()
        if state is None or not all(a.size for a in inputs) or not self._lock.acquire(blocking=False):
            return body(*inputs)
        try:
            key = (state, *((a.shape, a.dtype) for a in inputs))
            run = self._run(key, state[0])
            run.calls += 1
            if run.plan.refused is not None or run.pending() is not None:
                return body(*inputs)
            if run.backward is not None or (run.forward is not None and not state[0]):
                return self._again(run, state, body, inputs)
            if run.calls & (run.calls - 1):  # recorded before, but no backward pass came: try again less and less often
                return body(*inputs)
            if run.forward is not None:
                calls, run = run.calls, _Run(self._params, state[0])
                self._runs[key], run.calls = run, calls
            try:
                return self._first(run, state, body, inputs)
            except BaseException:
                del self._runs[key]
                raise
        finally:
            self._lock.release()

    def arrays(self, kind: Any, body: Callable[..., tuple[Array, ...]], *inputs: Array | None) -> tuple[Array, ...]:
        """As a call, for a ``body`` that goes forward and back itself and returns arrays; an input may be None.

        ``kind`` tells one body from another. It is recorded in one piece, with the gradients of the parameters that it leaves.
        """
        state, given = self._state(), [a for a in inputs if a is not None]
        plain = state is None or not state[0] or not all(type(a) is np.ndarray and a.size for a in given)
        if plain or not self._lock.acquire(blocking=False):
            return body(*inputs)
        try:
            key = (state, kind, *(None if a is None else (a.shape, a.dtype) for a in inputs))
            run = self._run(key, True)
            if run.plan.refused is not None:
                return body(*inputs)
            if run.forward is not None:
                for to, a in zip(run.inputs, given, strict=True):
                    np.copyto(to, a)
                run.forward()
            else:
                try:
                    self._record(run, body, inputs)
                except BaseException:
                    del self._runs[key]
                    raise
            return tuple(self._kept(a) for a in run.out)
        finally:
            self._lock.release()

    def _record(self, run: _Run, body: Callable[..., tuple[Array, ...]], inputs: tuple[Array, ...]) -> None:
        """The plain run of a body that returns arrays, recorded."""
        own = [None if a is None else run.plan.memory.empty(a.shape, a.dtype) for a in inputs]
        run.inputs = tuple(a for a in own if a is not None)
        for to, a in zip(own, inputs, strict=True):
            if to is not None:
                np.copyto(to, a)
        with run.plan.recorded() as stretch:
            run.out = body(*own)
        if not all(run.plan.knows(a) for a in run.out):
            stretch.refuse("a result lies in memory that is not the plan's")
        run.forward = stretch

    @staticmethod
    def _kept(a: Array) -> Array:
        """A copy of an array of a plan's memory, for the caller to keep."""
        y = buffers.empty(a.shape, a.dtype)
        np.copyto(y, a)
        return y

    def _run(self, key: tuple, taped: bool) -> _Run:
        """The run of this form, now the one used last."""
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = _Run(self._params, taped)
            while len(self._runs) > KEPT:
                self._runs.popitem(last=False)
        self._runs.move_to_end(key)
        return run

    def _state(self) -> tuple | None:
        """What a run depends on besides its inputs, first whether it is recorded on a tape; None where there can be no plan."""
        form, around = self._params.form(), circumstances()
        if form is None or around is None:
            return None
        taped = recording()
        return None if taped and not on_own_tape() else (taped, around, form)

    def _first(self, run: _Run, state: tuple, body: Body, inputs: tuple[Array, ...]) -> Tensor:
        """The plain run, recorded."""
        run.inputs = tuple(run.plan.memory.empty(a.shape, a.dtype) for a in inputs)
        for to, a in zip(run.inputs, inputs, strict=True):
            np.copyto(to, a)
        with run.plan.recorded() as stretch:
            out = body(*run.inputs)
        if run.plan.refused is not None:
            return out
        run.forward, run.out = stretch, out.data
        if state[0]:
            run.dout = run.plan.memory.empty(out.shape, out.data.dtype)
        return self._answer(run, state, body, out)

    def _again(self, run: _Run, state: tuple, body: Body, inputs: tuple[Array, ...]) -> Tensor:
        for to, a in zip(run.inputs, inputs, strict=True):
            np.copyto(to, a)
        assert run.forward is not None
        run.forward()
        return self._answer(run, state, body, None)

    def _answer(self, run: _Run, state: tuple, body: Body, recorded: Tensor | None) -> Tensor:
        """The output as a tensor of its own. Its gradient goes back through what was recorded, or by the plan."""
        y = self._kept(run.out)
        leaf = self._params.leaf() if state[0] else None
        if leaf is None:
            return Tensor(y)
        pending = _Pending()
        run.pending = weakref.ref(pending)

        def pull(dy: Array) -> None:
            self._back(run, state, body, recorded, dy)
            _ = pending  # lives as long as this may be called

        return record(y, (leaf,), pull)

    def _back(self, run: _Run, state: tuple, body: Body, recorded: Tensor | None, dy: Array) -> None:
        np.copyto(run.dout, dy)
        if self._state() != state:  # threads, precision or what wants gradients has changed since: go back plainly
            again = body(*run.inputs) if recorded is None else recorded
            if again.needs_grad:
                backward((again, run.dout))
        elif recorded is not None:
            try:
                with run.plan.recorded() as stretch:
                    backward((recorded, run.dout))
            except BaseException:
                self._runs = OrderedDict((key, r) for key, r in self._runs.items() if r is not run)
                raise
            if run.plan.refused is None:
                run.backward = stretch
        else:
            assert run.backward is not None
            run.backward()
