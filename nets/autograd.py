"""The tape: a tensor remembers the tensors it was made from and how its gradient flows back to them.

Tensors are numbered as they are made, so going back in descending number meets every tensor after all that used it. Gradients
of parameters add up (``+=`` into the store's flat buffer, until ``zero_grad``); those of other tensors live only during the pass,
and each step's intermediates are released as soon as it is done.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from heapq import heappop, heappush
from typing import Any

from ..kernels import buffers
from ..kernels.arrays import array_module

Array = Any
Pull = Callable[[Array], None]

_recording: ContextVar[bool] = ContextVar("recording", default=True)
_numbers = itertools.count()


@contextmanager
def no_grad() -> Iterator[None]:
    """Run the block without a tape: nothing is kept for a backward pass."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def recording() -> bool:
    """True where operations are recorded."""
    return _recording.get()


class Tensor:
    """An array and, after a backward pass, its gradient. ``Tensor(x, needs_grad=True)`` asks for the gradient of an input."""

    __slots__ = ("_inputs", "_number", "_own", "_pull", "data", "grad", "needs_grad")

    def __init__(self, data: Array, needs_grad: bool = False) -> None:
        self.data = data
        self.grad: Array = None
        self.needs_grad = needs_grad
        self._own = False  # whether grad may be written to; a gradient received first may be shared with others
        self._pull: Pull | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._number = -1

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    def receive(self, g: Array, at: Any = ...) -> None:
        """Add ``g`` to the gradient (to its part ``at``)."""
        if not self.needs_grad:
            return
        if self.grad is None and at is ...:
            self.grad, self._own = g, False
            return
        if not self._own:
            xp = array_module(g)
            mine = buffers.empty(self.data.shape, self.data.dtype, xp)
            first, self.grad, self._own = self.grad, mine, True
            if first is not None and at is ...:
                xp.add(first, g, out=mine)
                return
            mine[...] = 0 if first is None else first
        part = self.grad[at]  # a view; grad[at] += g would also copy it onto itself
        part += g

    def backward(self, dout: Array) -> None:
        """Carry the gradient ``dout`` of a number with respect to this tensor back to everything that it was made from.

        dout has the shape and dtype of ``data``. Parameters' gradients are added to. Raises RuntimeError where nothing was
        recorded or where a pass has already gone through (its intermediates are released).
        """
        if self._pull is None:
            raise RuntimeError("nothing was recorded for this tensor: it was made under no_grad, or needs no gradient")
        if dout.shape != self.data.shape or dout.dtype != self.data.dtype:
            raise ValueError(f"dout is {dout.dtype} {dout.shape}, want {self.data.dtype} {self.data.shape}")
        self.receive(dout)
        waiting, met = [(-self._number, self)], {self._number}
        while waiting:
            y = heappop(waiting)[1]
            pull, inputs, dy = y._pull, y._inputs, y.grad
            y._pull, y._inputs, y.grad = _spent, (), None
            assert pull is not None
            pull(dy)
            for x in inputs:
                if x._pull is not None and x.grad is not None and x._number not in met:
                    met.add(x._number)
                    heappush(waiting, (-x._number, x))


def _spent(dy: Array) -> None:
    raise RuntimeError("a backward pass has already gone through this tensor: run the forward pass again")


def record(data: Array, inputs: tuple[Tensor, ...], pull: Pull) -> Tensor:
    """The tensor of ``data`` made from ``inputs``; ``pull(dy)`` hands its gradient on with ``x.receive``."""
    y = Tensor(data)
    if _recording.get() and any(x.needs_grad for x in inputs):
        y.needs_grad, y._number, y._inputs, y._pull = True, next(_numbers), inputs, pull
    return y
