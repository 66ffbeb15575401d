"""What every launcher needs: the device that it meets, sizes and scalars in the types of the kernels, tables."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np

from ..compile import Cuda

Array = Any
Device = Any

THREADS = 256
MOST_BLOCKS = 4096  # of a kernel that strides over the grid: several for each place on the largest GPU
_device: ContextVar[Device | None] = ContextVar("device", default=None)
_cuda = cache(Cuda)


def current() -> Device:
    """The device that launchers meet: the one of :func:`on`, else the GPU."""
    return _device.get() or _cuda()


@contextmanager
def on(device: Device) -> Iterator[Device]:
    """Launch on ``device`` inside the block."""
    token = _device.set(device)
    try:
        yield device
    finally:
        _device.reset(token)


def i32(value: int) -> np.int32:
    """A size as the kernels take it; ValueError beyond 2^31 - 1."""
    if value >= 2**31:
        raise ValueError(f"{value} elements along the axes that a GPU kernel counts together are too many: the limit is 2^31 - 1")
    return np.int32(value)


def u32(value: int) -> np.uint32:
    """The low word of a number."""
    return np.uint32(value & 0xFFFFFFFF)


def draw(seed: int, step: int, stream: int, first_sample: int) -> tuple[np.uint32, ...]:
    """The words that random numbers depend on besides the sample's place in the batch and the element."""
    return u32(seed), u32(seed >> 32), u32(step), u32(stream), u32(first_sample)


def blocks(threads: int) -> tuple[int]:
    """The grid of a kernel that strides over it."""
    return (min(-(-threads // THREADS), MOST_BLOCKS),)


def _address(a: Array) -> int:
    return a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr


def aligned(*arrays: Array | None, bytes_: int = 16) -> bool:
    """Whether every array begins at a multiple of ``bytes_``, as an access of that size demands."""
    return all(_address(a) % bytes_ == 0 for a in arrays if a is not None)


def access(count: int, *arrays: Array | None) -> int:
    """The floats of one access, 4, 2 or 1, to runs of ``count`` floats of these arrays."""
    return next(w for w in (4, 2, 1) if count % w == 0 and aligned(*arrays, bytes_=4 * w))


_tables: dict[tuple[int, int], Array] = {}


def table(device: Device, values: Array) -> Array:
    """``values`` as float32 on the device. A host array that cannot be written to is sent once for as long as it lives."""
    xp = device.xp
    if xp is np or not isinstance(values, np.ndarray):
        return xp.asarray(values, dtype=np.float32)
    if values.flags.writeable or not values.flags.owndata:
        return xp.asarray(values.astype(np.float32))
    key = (id(values), xp.cuda.runtime.getDevice())
    if key not in _tables:
        _tables[key] = xp.asarray(values.astype(np.float32))
        weakref.finalize(values, _tables.pop, key, None)
    return _tables[key]
