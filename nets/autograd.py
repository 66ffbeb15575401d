"""The tape: a tensor remembers the tensors it was made from and how its gradient flows back to them.

Tensors are numbered as they are made, so going back in descending number meets every tensor after all that used it. Gradients
of parameters add up (``+=`` into the store's flat buffer, until ``zero_grad``); those of other tensors live only during the pass,
and each step's intermediates are released as soon as it is done.

A tensor's gradient has the dtype of its data: float32, float64, or the bits of bfloat16, which carry no tangents.

Forward mode: a tensor may carry a ``tangent``, the derivative of its value along one direction. Every function hands it on, and
what it computes for that is recorded like any other value. A backward pass from an output's tangent is then the gradient of the
Jacobian–vector product, second derivatives included.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from heapq import heappop, heappush
from typing import Any

from ..kernels import elementwise, precisions
from ..kernels.arrays import array_module, is_native
from ..kernels.bf16 import BF16

Array = Any
Pull = Callable[[Array], None]
Push = Callable[[], "Tensor"]

_recording: ContextVar[bool] = ContextVar("recording", default=True)
_pushing: ContextVar[bool] = ContextVar("pushing", default=False)  # within a push tangents are values, not carried further
_first: ContextVar[int] = ContextVar("first", default=-1)  # tensors of lower numbers are constants
_numbers = itertools.count()


class no_grad:
    """``with no_grad():`` runs the block without a tape: nothing is kept for a backward pass. Tangents are carried on."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _recording.set(False)

    def __exit__(self, *exc: object) -> None:
        _recording.reset(self._token)


@contextmanager
def fresh_tape() -> Iterator[None]:
    """Run the block on a tape of its own: tensors made before it, parameters included, are constants.

    They get no gradients, and tangents that they carry do not count.
    """
    first, record = _first.set(next(_numbers)), _recording.set(True)
    try:
        yield
    finally:
        _first.reset(first)
        _recording.reset(record)


def recording() -> bool:
    """True where operations are recorded."""
    return _recording.get()


def on_own_tape() -> bool:
    """True outside of :func:`fresh_tape` and of a push."""
    return _first.get() < 0 and not _pushing.get()


class Tensor:
    """An array and, after a backward pass, its gradient. ``Tensor(x, needs_grad=True)`` asks for the gradient of an input.

    ``tangent`` (a Tensor or an array of the shape and dtype of ``data``) starts a forward derivative: each tensor made from this
    one carries the derivative of its value in that direction as its own ``tangent``, or None where that is zero throughout.
    """

    __slots__ = ("_inputs", "_needs_grad", "_number", "_own", "_pull", "_tangent", "data", "grad")

    def __init__(self, data: Array, needs_grad: bool = False, tangent: "Tensor | Array | None" = None) -> None:
        self.data = data
        self.grad: Array = None
        self._needs_grad = needs_grad
        self._own = False  # whether grad may be written to; a gradient received first may be shared with others
        self._pull: Pull | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._number = next(_numbers)
        self._tangent: Tensor | None = None
        if tangent is not None:
            self.tangent = tangent

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass reaches this tensor."""
        return self._needs_grad and self._number >= _first.get()

    @needs_grad.setter
    def needs_grad(self, value: bool) -> None:
        self._needs_grad = value

    @property
    def tangent(self) -> "Tensor | None":
        """The derivative of this value along the direction given; None where it does not depend on it.

        Set it to a Tensor, an array or None. Raises TypeError or ValueError for a tangent that does not fit the data.
        """
        return None if self._tangent is None or self._number < _first.get() else self._tangent

    @tangent.setter
    def tangent(self, value: Any) -> None:
        if value is None:
            self._tangent = None
            return
        tangent = value if isinstance(value, Tensor) else Tensor(value)
        if not is_native(tangent.data) or array_module(tangent.data) is not array_module(self.data):
            raise TypeError(f"tangent must be an array of {array_module(self.data).__name__}, not {type(tangent.data).__name__}")
        if tangent.shape != self.shape or tangent.data.dtype != self.data.dtype:
            raise ValueError(f"tangent is {tangent.data.dtype} {tangent.shape}, want {self.data.dtype} {self.shape}")
        if tangent._tangent is not None:
            raise ValueError("a tangent cannot carry a tangent itself: forward mode is of first order")
        self._tangent = tangent

    def receive(self, g: Array, at: int | None = None) -> None:
        """Add ``g`` to the gradient, or to its columns from ``at`` on (those of the last axis)."""
        if not self.needs_grad:
            return
        if at is None:
            if self.grad is None:
                self.grad, self._own = g, False
            elif self._own:
                elementwise.add(self.grad, g, self.grad)
            else:
                self.grad, self._own = elementwise.add(self.grad, g), True
            return
        if not self._own:
            first, self._own = self.grad, True
            self.grad = elementwise.zeros(self.data.shape, self.data.dtype, array_module(g))
            if first is not None:
                elementwise.add(self.grad, first, self.grad)
        elementwise.add_columns(g, at, self.grad)

    def backward(self, dout: Array) -> None:
        """Carry the gradient ``dout`` of a number with respect to this tensor back to everything that it was made from.

        dout has the shape and dtype of ``data``. Parameters' gradients are added to. Raises RuntimeError where nothing was
        recorded or where a pass has already gone through (its intermediates are released).
        """
        backward((self, dout))


def backward(*roots: tuple[Tensor, Array]) -> None:
    """Carry the gradient of a number back from several tensors at once, each given with its gradient: ``(y, dy), (z, dz), …``.

    One pass, so that values and tangents of the same network share its tape: ``backward((y, dy), (y.tangent, dv))``. Raises as
    :meth:`Tensor.backward`, and TypeError for a root that is no Tensor.
    """
    for y, dy in roots:
        if not isinstance(y, Tensor):
            raise TypeError(f"a root must be a Tensor, not {type(y).__name__} (the tangent of a constant is None)")
        if not y.needs_grad:
            raise RuntimeError("nothing was recorded for this tensor: it was made under no_grad, or needs no gradient")
        if y._pull is _spent:
            _spent(dy)
        if dy.shape != y.data.shape or dy.dtype != y.data.dtype:
            raise ValueError(f"dout is {dy.dtype} {dy.shape}, want {y.data.dtype} {y.data.shape}")
    waiting: list[tuple[int, Tensor]] = []
    met: set[int] = set()

    def reach(x: Tensor) -> None:
        if x._pull is not None and x.grad is not None and x._number not in met:
            met.add(x._number)
            heappush(waiting, (-x._number, x))

    for y, dy in roots:
        y.receive(dy)
        reach(y)
    while waiting:
        y = heappop(waiting)[1]
        pull, inputs, dy = y._pull, y._inputs, y.grad
        y._pull, y._inputs, y.grad = _spent, (), None
        assert pull is not None
        pull(dy)
        for x in inputs:
            reach(x)


def _spent(dy: Array) -> None:
    raise RuntimeError("a backward pass has already gone through this tensor: run the forward pass again")


def record(data: Array, inputs: tuple[Tensor, ...], pull: Pull, push: Push | None = None) -> Tensor:
    """The tensor of ``data`` made from ``inputs``.

    ``pull(dy)`` hands its gradient on with ``x.receive``. ``push()`` is called where an input carries a tangent and returns the
    output's, made from ``x.tangent`` by recorded functions; NotImplementedError where a function has none. What is made under
    ``kernels.precision("tf32")`` has its gradient made so too, whenever the backward pass runs.
    """
    y = Tensor(data)
    if _recording.get() and any(x.needs_grad for x in inputs):
        y._needs_grad, y._inputs, y._pull = True, inputs, _by_tf32(pull) if precisions.tf32() else pull
    if any(x.tangent is not None for x in inputs) and not _pushing.get():
        if any(z.data.dtype == BF16 for z in (y, *inputs)):
            raise NotImplementedError("an input carries a tangent, and bfloat16 has none: compute in float32")
        if push is None:
            raise NotImplementedError("an input carries a tangent, but this function has no rule for tangents")
        token = _pushing.set(True)
        try:
            y._tangent = push()
        finally:
            _pushing.reset(token)
    return y


def _by_tf32(pull: Pull) -> Pull:
    def within(dy: Array) -> None:
        with precisions.precision("tf32"):
            pull(dy)

    return within
