"""Data on its way to the device while the device works: copied ahead on a stream of its own, and taken when its turn comes."""

from collections import deque
from typing import Any

import numpy as np

from .arrays import array_module

Array = Any


class _Slot:
    """Room for one upload: pinned memory of the host, and arrays on the device."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.host: list[np.ndarray] = []
        self.device: list[Array] = []
        self.copied = self.taken = None  # events: the copy to the device, and the one out of its arrays, are done

    def fits(self, arrays: tuple[np.ndarray, ...]) -> bool:
        return [(a.shape, a.dtype) for a in arrays] == [(a.shape, a.dtype) for a in self.host]

    def make(self, arrays: tuple[np.ndarray, ...]) -> None:
        """Room for arrays of these shapes. The current stream is that of the uploads: so the memory is not another stream's."""
        self.host = [_pinned(self.xp, a) for a in arrays]
        self.device = [self.xp.empty(a.shape, a.dtype) for a in arrays]


def _pinned(xp: Any, like: np.ndarray) -> np.ndarray:
    memory = xp.cuda.alloc_pinned_memory(max(like.nbytes, 1))
    return np.frombuffer(memory, like.dtype, like.size).reshape(like.shape)


class Uploads:
    """A queue of batches for the device of the array ``like``: :meth:`put` on the host, :meth:`take` on the device.

    The host may be many steps ahead of a GPU. A batch is written over only when the copy out of it is done: the host waits where
    its memory is still being sent, the stream of the uploads where the device's is still being read; the device itself waits for
    nothing but the upload that it needs. ``depth``: batches that can be on their way. On the CPU these are plain copies.
    """

    def __init__(self, like: Array, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        xp: Any = array_module(like)
        self._xp, self._depth = xp, depth
        self._stream = None if xp is np else xp.cuda.Stream(non_blocking=True)
        self._free = deque(_Slot(xp) for _ in range(depth))
        self._waiting: deque[Any] = deque()

    def __len__(self) -> int:
        """Batches that were put and not yet taken."""
        return len(self._waiting)

    def put(self, *arrays: np.ndarray) -> None:
        """Start to copy NumPy arrays to the device; they are the caller's again at once. RuntimeError where ``depth`` wait."""
        if len(self._waiting) == self._depth:
            raise RuntimeError(f"{self._depth} batches are waiting to be taken: depth allows no more")
        if self._stream is None:
            self._waiting.append([a.copy() for a in arrays])
            return
        slot = self._free.popleft()
        if slot.copied is not None:
            slot.copied.synchronize()
        with self._stream:
            if slot.taken is not None:
                self._stream.wait_event(slot.taken)
            if not slot.fits(arrays):
                slot.make(arrays)
            for a, host, device in zip(arrays, slot.host, slot.device, strict=True):
                host[...] = a
                device.data.copy_from_host_async(host.ctypes.data, host.nbytes, self._stream)
            slot.copied = self._stream.record(self._xp.cuda.Event(block=True, disable_timing=True))
        self._waiting.append(slot)

    def take(self, *into: Array) -> None:
        """Make contiguous arrays of the device hold the batch that was put first. RuntimeError where there is none.

        ValueError unless shapes and dtypes are those of the batch. It is done on the current stream, and the host does not wait.
        """
        if not self._waiting:
            raise RuntimeError("no batch is waiting: put one first")
        first = self._waiting[0]
        arrays = first if self._stream is None else first.device
        wanted, found = ([(a.shape, np.dtype(a.dtype)) for a in of] for of in (arrays, into))
        if wanted != found or not all(a.flags.c_contiguous for a in into):
            raise ValueError(f"into must be contiguous arrays of the batch's shapes and dtypes {wanted}, not {found}")
        self._waiting.popleft()
        if self._stream is None:
            for to, a in zip(into, arrays, strict=True):
                to[...] = a
            return
        stream = self._xp.cuda.get_current_stream()
        stream.wait_event(first.copied)
        for to, a in zip(into, arrays, strict=True):
            to.data.copy_from_device_async(a.data, a.nbytes, stream)
        first.taken = stream.record(self._xp.cuda.Event(disable_timing=True))
        self._free.append(first)
