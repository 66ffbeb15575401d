"""What every launcher needs: the device that it meets, sizes and scalars in the types of the kernels, tables."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np

from ..compile import Cuda
from ..recording import NotCapturable, refuse_in_capture

Array = Any
Device = Any

THREADS = 256
MOST_BLOCKS = 1 << 14  # of a kernel that strides over the grid: ten for each place on the largest GPU, lest the last be alone
_device: ContextVar[Device | None] = ContextVar("device", default=None)
_counter: ContextVar[Array | None] = ContextVar("counter", default=None)
_words: ContextVar[Array | None] = ContextVar("words", default=None)
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


@contextmanager
def counted(counter: Array, words: Array | None = None) -> Iterator[Array]:
    """Launch kernels that count their step from ``counter``, an int32 array of one element on the device.

    What :func:`normals`, :func:`q_sample` and the draws of states take as ``step``, and :func:`step` as its row, is then added to
    what the counter holds when the kernel runs. So a graph that was captured once makes new noise, and goes to the next row, each
    time that it is launched; its last kernel is :func:`count`. Beyond the table :func:`step` stays at its last row.

    words: uint32 (3,) on the device: the two words of the seed, the lower first, and the number of the first sample, which
    :func:`step` then reads there. The other kernels that draw cannot: NotCapturable where they are asked to.
    """
    for name, a, dtype, size in (("counter", counter, np.int32, 1), ("words", words, np.uint32, 3)):
        if a is not None and (a.dtype != dtype or a.size != size):
            elements = "one element" if size == 1 else f"{size} elements"
            raise ValueError(f"{name} must be an {np.dtype(dtype)} array of {elements}, not {a.dtype} {tuple(a.shape)}")
    tokens = _counter.set(counter), _words.set(words)
    try:
        yield counter
    finally:
        _counter.reset(tokens[0])
        _words.reset(tokens[1])


def counter() -> Array | None:
    """The counter of :func:`counted`, or None: the null pointer."""
    return _counter.get()


def words() -> Array | None:
    """The words of :func:`counted`, or None."""
    return _words.get()


def i32(value: int) -> np.int32:
    """A size as the kernels take it; ValueError beyond 2^31 - 1."""
    if value >= 2**31:
        raise ValueError(f"{value} elements along the axes that a GPU kernel counts together are too many: the limit is 2^31 - 1")
    return np.int32(value)


def u32(value: int) -> np.uint32:
    """The low word of a number."""
    return np.uint32(value & 0xFFFFFFFF)


def draw(seed: int, step: int, stream: int, first_sample: int) -> tuple[np.uint32, ...]:
    """The words that random numbers depend on besides the sample's place in the batch and the element.

    NotCapturable where they are to be read from the device, which is for :func:`step` alone.
    """
    if _words.get() is not None:
        raise NotCapturable("only step reads its seed from the device")
    return u32(seed), u32(seed >> 32), u32(step), u32(stream), u32(first_sample)


def blocks(threads: int, most: int = MOST_BLOCKS) -> tuple[int]:
    """The grid of a kernel that strides over it."""
    return (min(-(-threads // THREADS), most),)


def _address(a: Array) -> int:
    return a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr


def aligned(*arrays: Array | None, bytes_: int = 16) -> bool:
    """Whether every array begins at a multiple of ``bytes_``, as an access of that size demands."""
    return all(_address(a) % bytes_ == 0 for a in arrays if a is not None)


def access(count: int, *arrays: Array | None) -> int:
    """The floats of one access, 4, 2 or 1, to runs of ``count`` floats of these arrays."""
    return next(w for w in (4, 2, 1) if count % w == 0 and aligned(*arrays, bytes_=4 * w))


_tables: dict[tuple[int, int, Any], Array] = {}


def table(device: Device, values: Array, dtype: Any = np.float32) -> Array:
    """``values`` as ``dtype`` on the device. A host array that cannot be written to is sent once for as long as it lives.

    NotCapturable where it would be sent while a graph is captured: launched again, the graph would not see what it holds then.
    """
    xp = device.xp
    if xp is np or not isinstance(values, np.ndarray):
        return xp.asarray(values, dtype=dtype)
    if values.flags.writeable or not values.flags.owndata:
        refuse_in_capture("a table of the host that may change is sent to the device")
        return xp.asarray(values.astype(dtype))
    key = (id(values), xp.cuda.runtime.getDevice(), dtype)
    if key not in _tables:
        refuse_in_capture("a table of the host is sent to the device for the first time")
        _tables[key] = xp.asarray(values.astype(dtype))
        weakref.finalize(values, _tables.pop, key, None)
    return _tables[key]
