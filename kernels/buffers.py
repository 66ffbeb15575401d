"""A pool of work arrays: inside ``with pool:`` every ``empty`` of a kernel reuses the memory of an earlier step.

A training step asks for the same shapes in the same order each time, so after the first step no allocation happens. Arrays taken
inside the block belong to the pool and are overwritten by the next block: copy out what must live longer.
"""

from contextvars import ContextVar
from typing import Any

import numpy as np

_active: ContextVar["Pool | None"] = ContextVar("pool", default=None)


class Pool:
    """Work arrays by (library, shape, dtype), handed out in turn and all taken back when the ``with`` block ends."""

    def __init__(self) -> None:
        self._shelves: dict[tuple, list] = {}
        self._taken: dict[tuple, int] = {}
        self._token: Any = None

    def empty(self, shape: tuple[int, ...], dtype: Any, xp: Any = np) -> Any:
        key = (xp.__name__, tuple(shape), np.dtype(dtype))
        shelf, i = self._shelves.setdefault(key, []), self._taken.get(key, 0)
        if i == len(shelf):
            shelf.append(xp.empty(shape, dtype))
        self._taken[key] = i + 1
        return shelf[i]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for shelf in self._shelves.values() for a in shelf)

    def __enter__(self) -> "Pool":
        if self._token is not None:
            raise RuntimeError("this pool is already in use")
        self._taken.clear()
        self._token = _active.set(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _active.reset(self._token)
        self._token = None


def into(out: Any, y: Any) -> Any:
    """``out`` with ``y`` written to it, or ``y`` itself where there is no ``out``."""
    if out is None:
        return y
    out[...] = y
    return out


def empty(shape: tuple[int, ...], dtype: Any, xp: Any = np) -> Any:
    """An uninitialised array, from the active pool if there is one."""
    pool = _active.get()
    return xp.empty(shape, dtype) if pool is None else pool.empty(shape, dtype, xp)
