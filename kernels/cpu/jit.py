"""The decorators of this package: ``jit`` for a function, ``loops`` for one with parallel loops. Compiled code is kept."""

import functools
from typing import Any

from .. import compiling
from ..recording import active
from . import threads  # noqa: F401  sets the number of threads before Numba is imported

# isort: split
import numba
from numba.core import event

from .kept import keep


def jit(f: Any = None, **options: Any) -> Any:
    """``numba.njit`` with this package's options: ``@jit`` or ``@jit(inline="always")``."""
    return functools.partial(jit, **options) if f is None else keep(numba.njit(error_model="numpy", **options)(f))


class Entry:
    """A compiled function as Python calls it; a recorder, where one is active, is told of the call.

    ``prepares``: it makes another form of its first argument, which may be weights, and reads no other arrays but constants.
    """

    __slots__ = ("dispatcher", "prepares")

    def __init__(self, dispatcher: Any, prepares: bool = False) -> None:
        self.dispatcher, self.prepares = dispatcher, prepares

    def __call__(self, *args: Any) -> Any:
        result = self.dispatcher(*args)
        recorder = active.get()
        if recorder is not None:
            recorder.note(self, args)
        return result


def loops(f: Any = None, prepares: bool = False, **options: Any) -> Any:
    """``jit`` with parallel loops, to be called from Python: ``@loops`` or ``@loops(prepares=True, fastmath=…)``."""
    if f is None:
        return functools.partial(loops, prepares=prepares, **options)
    return Entry(jit(f, parallel=True, **options), prepares)


class _Told(event.Listener):
    """Tells :mod:`..compiling` what Numba compiles of this package; what it finds on disk is no such event."""

    def on_start(self, event: event.Event) -> None:
        if name := _name(event):
            compiling.begin(name)

    def on_end(self, event: event.Event) -> None:
        if name := _name(event):
            compiling.end(name)


def _name(event: event.Event) -> str | None:
    f = event.data["dispatcher"].py_func
    module = f.__module__ or ""  # there is none where a function was made by exec
    return f"{module.rpartition('.')[2]}.{f.__name__.strip('_')}" if module.startswith(f"{__package__}.") else None


event.register("numba:compile", _Told())
