"""A pool of work arrays: memory that was used once is used again, without asking the system for pages anew.

An array of a pool is leased: it stays valid as long as it or a view of it is referenced, and then its memory goes back to the
pool. A training step frees and asks for the same sizes each time, so that after the first ones no allocation happens, and what a
kernel needs only while it runs lies in memory that the one before it has left in the cache. CuPy has a pool of its own.
"""

from contextvars import ContextVar
from math import prod
from typing import Any

import numpy as np

from .device_memory import out_of_memory

ALIGN = 64  # bytes
SHAPES = 1 << 12  # whose blocks' size is remembered
KEPT = 1 << 27  # bytes that are kept outside of any ``with pool:``


class Block(np.ndarray):
    """A piece of a pool's memory."""

    __slots__ = ()


class _Shelf(list[Block]):
    """The free blocks of one size."""

    __slots__ = ("size",)
    size: int


class _Lease(np.ndarray):
    """The use of a block by one array. Views of a lease (whose slots are empty) are no leases."""

    __slots__ = ("block", "shelf")
    block: Block
    shelf: _Shelf

    def __del__(self) -> None:
        try:
            self.shelf.append(self.block)
        except AttributeError:
            pass


def _size(nbytes: int) -> int:
    """Bytes of the block for an array of ``nbytes``: at most one eighth more, so that like sizes share blocks."""
    step = max(ALIGN, 1 << max(0, nbytes.bit_length() - 4))
    return -(-max(nbytes, 1) // step) * step


class Pool:
    """Work arrays in blocks that are reused. ``with pool:`` makes it the one that kernels and networks take theirs from.

    Any thread may let go of an array. ``limit``: bytes that the pool never exceeds; what does not fit is allocated beside it.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.nbytes = 0  # of all blocks, leased or free
        self._limit = limit
        self._free: dict[int, _Shelf] = {}  # by size
        self._known: dict[tuple, _Shelf] = {}  # by shape and dtype
        self._token: Any = None

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An uninitialised array, aligned to a cache line."""
        shelf = self._known.get((shape, dtype))
        if shelf is None:
            shelf = self._shelf(shape, dtype)
        try:
            block = shelf.pop()
        except IndexError:
            if self._limit is not None and not self._fits(shelf.size):
                return np.empty(shape, dtype)
            block = self._allocated(shelf.size)
        lease = _Lease(shape, dtype, block)
        lease.block, lease.shelf = block, shelf
        return lease.view(np.ndarray)

    def new(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """As :meth:`empty`, in a block that no array has used before."""
        shelf = self._shelf(shape, dtype)
        shelf.append(self._allocated(shelf.size))
        return self.empty(shape, dtype)

    def _shelf(self, shape: tuple[int, ...], dtype: Any) -> _Shelf:
        size = _size(prod(shape) * np.dtype(dtype).itemsize)
        shelf = self._free.get(size)
        if shelf is None:
            shelf = _Shelf()
            shelf.size = size
            shelf = self._free.setdefault(size, shelf)
        if len(self._known) >= SHAPES:
            self._known.clear()
        self._known[shape, dtype] = shelf
        return shelf

    def for_weights(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Room for another form of weights, which plans may keep."""
        return self.empty(shape, dtype)

    def _allocated(self, size: int) -> Block:
        raw = np.empty(size + ALIGN, np.uint8)
        start = -raw.ctypes.data % ALIGN
        self.nbytes += size
        return raw[start : start + size].view(Block)

    def _fits(self, size: int) -> bool:
        """Whether a new block stays within the limit, once free blocks are given up where they must be."""
        assert self._limit is not None
        if self.nbytes + size > self._limit >= size:
            self.clear()
        return self.nbytes + size <= self._limit

    def leases(self, root: Any) -> bool:
        """Whether ``root``, the base of all bases of an array, is the use of one of this pool's blocks."""
        return isinstance(root, _Lease) and hasattr(root, "block") and self._free.get(root.shelf.size) is root.shelf

    def clear(self) -> None:
        """Give up all blocks that are free."""
        for size, shelf in list(self._free.items()):
            while shelf:
                shelf.pop()
                self.nbytes -= size

    def __enter__(self) -> "Pool":
        if self._token is not None:
            raise RuntimeError("this pool is already in use")
        self._token = _active.set(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _active.reset(self._token)
        self._token = None


_active: ContextVar[Pool] = ContextVar("pool", default=Pool(KEPT))  # noqa: B039  meant to be shared


def into(out: Any, y: Any) -> Any:
    """``out`` with ``y`` written to it, or ``y`` itself where there is no ``out``."""
    if out is None:
        return y
    out[...] = y
    return out


def for_weights(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As :func:`empty`, for what a kernel makes of its weights alone: a plan keeps it until they change."""
    return _active.get().for_weights(shape, dtype)


def empty(shape: tuple[int, ...], dtype: Any, xp: Any = np) -> Any:
    """An uninitialised array; NumPy's from the active pool. OutOfDeviceMemory where a GPU has no room for it."""
    if xp is np:
        return _active.get().empty(shape, dtype)
    try:
        return xp.empty(shape, dtype)
    except Exception as e:
        found = out_of_memory(e)
        if found is None:
            raise
        raise found from e
