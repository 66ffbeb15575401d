"""A stand-in for CuPy on the host: NumPy inside, but as strict as CuPy about what is a device array and what is not.

A NumPy array that meets a device array in an operator, a function or an index is a TypeError, and so is the silent way back
(``numpy.asarray``); ``asarray`` and ``get`` are the only doors. Memory comes from pools, and there are streams and graphs:
:mod:`tests.fake_cuda`. While a graph is captured arrays may be made (``empty``) and looked at, nothing may be computed.
"""

import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests import fake_cuda

IN_PLACE = frozenset(("byteswap", "fill", "itemset", "partition", "put", "resize", "setfield", "sort"))


def unwrap(v: Any) -> Any:
    if isinstance(v, ndarray):
        return v.host
    if isinstance(v, np.ndarray):
        raise TypeError("a NumPy array meets a CuPy array")
    if isinstance(v, (tuple, list)):
        return type(v)(map(unwrap, v))
    return v


def _arrays(v: Any) -> "Iterator[ndarray]":
    if isinstance(v, ndarray):
        yield v
    elif isinstance(v, (tuple, list)):
        for part in v:
            yield from _arrays(part)


def wrap(v: Any, name: str = "a function", inputs: Any = ()) -> Any:
    """What a function of ``inputs`` returned: a view of one of them, or a new array."""
    if not isinstance(v, (np.ndarray, np.generic)):
        return v
    host = np.asarray(v)
    for a in _arrays(inputs):
        if host.size and np.may_share_memory(host, a.host):
            return ndarray(host, a.memory)
    fake_cuda.refuse(name)
    return stored(host)


def stored(host: np.ndarray) -> "ndarray":
    """A copy in the device's memory."""
    made = empty(host.shape, host.dtype, host.strides if host.flags.forc and not host.flags.c_contiguous else None)
    made.host[...] = host
    return made


def empty(shape: Any, dtype: Any = np.float64, strides: Any = None) -> "ndarray":
    shape, dtype = np.broadcast_to(0, shape).shape, np.dtype(dtype)
    memory = fake_cuda.alloc(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize).mem
    return ndarray(np.ndarray(shape, dtype, memory.raw, 0, strides), memory)


def settle(name: str, changes: Any = None) -> None:
    """The work that a function may need is done before it runs on the host. ``changes``: what it is to write to, if anything."""
    if changes is not None:
        fake_cuda.refuse(name)
    fake_cuda.current().finish()


class ndarray:
    __array_ufunc__ = None  # NumPy's operators leave the work to ours

    def __init__(self, host: Any, memory: Any = None) -> None:
        self.host = np.asarray(host)
        self.memory = memory

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    @property
    def data(self) -> Any:
        offset = 0 if self.memory is None else self.host.ctypes.data - self.memory.raw.ctypes.data
        return fake_cuda.MemoryPointer(self.memory or types.SimpleNamespace(raw=self.host), offset)

    def get(self) -> np.ndarray:
        settle("a copy to the host", self)
        return self.host.copy()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.host, name)
        if not callable(value):
            return wrap(value, name, self)

        def method(*a: Any, **k: Any) -> Any:
            settle(name, self if name in IN_PLACE or k.get("out") is not None else None)
            return wrap(value(*unwrap(a), **{key: unwrap(v) for key, v in k.items()}), name, (self, *a))

        return method

    def __getitem__(self, key: Any) -> "ndarray":
        settle("an index")
        found = self.host[unwrap(key)]
        if isinstance(found, np.generic):  # a view without axes, to CuPy
            found = self.host[(*(unwrap(key) if isinstance(key, tuple) else (unwrap(key),)), ...)]
        return wrap(found, "an index", self)

    def __setitem__(self, key: Any, value: Any) -> None:
        settle("an assignment", self)
        self.host[unwrap(key)] = unwrap(value)

    def __len__(self) -> int:
        return len(self.host)

    def __bool__(self) -> bool:
        settle("a truth value", self)
        return bool(self.host)

    def __float__(self) -> float:
        settle("a number for the host", self)
        return float(self.host)

    def __int__(self) -> int:
        settle("a number for the host", self)
        return int(self.host)


def operator(name: str) -> Any:
    changes = name.startswith("__i") and name != "__invert__"

    def method(self: ndarray, *others: Any) -> Any:
        settle(name, self if changes else None)
        result = getattr(self.host, name)(*map(unwrap, others))
        if changes:
            return self
        return result if result is NotImplemented else wrap(result, name)

    return method


NAMES = "add sub mul truediv floordiv mod pow matmul and or xor rshift lshift"
for op in NAMES.split():
    for prefix in ("", "r", "i"):
        setattr(ndarray, f"__{prefix}{op}__", operator(f"__{prefix}{op}__"))
for op in "neg pos abs invert lt le gt ge eq ne".split():
    setattr(ndarray, f"__{op}__", operator(f"__{op}__"))
ndarray.__module__ = "cupy"


class Module(types.ModuleType):
    ndarray = ndarray
    cuda = fake_cuda.cuda
    get_default_memory_pool = staticmethod(fake_cuda.get_default_memory_pool)
    empty = staticmethod(empty)

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value

        def function(*a: Any, **k: Any) -> Any:
            settle(name, True if k.get("out") is not None or name == "copyto" else None)
            inputs = (*a, *k.values())
            return wrap(value(*unwrap(a), **{key: unwrap(v) for key, v in k.items()}), name, inputs)

        return function

    @staticmethod
    def empty_like(a: ndarray, dtype: Any = None) -> ndarray:
        return empty(a.shape, a.dtype if dtype is None else dtype)

    @staticmethod
    def asarray(a: Any, dtype: Any = None) -> ndarray:
        if isinstance(a, ndarray):
            return a if dtype is None or a.dtype == dtype else a.astype(dtype)
        fake_cuda.refuse("a copy from the host")
        return stored(np.array(a, dtype=dtype))


cupy = Module("cupy")
