"""A stand-in for CuPy on the host: NumPy inside, but as strict as CuPy about what is a device array and what is not.

A NumPy array that meets a device array in an operator, a function or an index is a TypeError, and so is the silent way back
(``numpy.asarray``); ``asarray`` and ``get`` are the only doors.
"""

import types
from typing import Any

import numpy as np


def unwrap(v: Any) -> Any:
    if isinstance(v, ndarray):
        return v.host
    if isinstance(v, np.ndarray):
        raise TypeError("a NumPy array meets a CuPy array")
    if isinstance(v, (tuple, list)):
        return type(v)(map(unwrap, v))
    return v


def wrap(v: Any) -> Any:
    return ndarray(v) if isinstance(v, (np.ndarray, np.generic)) else v


class ndarray:
    __array_ufunc__ = None  # NumPy's operators leave the work to ours

    def __init__(self, host: Any) -> None:
        self.host = np.asarray(host)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def get(self) -> np.ndarray:
        return self.host.copy()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self.host, name)
        if callable(value):
            return lambda *a, **k: wrap(value(*unwrap(a), **{key: unwrap(v) for key, v in k.items()}))
        return wrap(value)

    def __getitem__(self, key: Any) -> "ndarray":
        return ndarray(self.host[unwrap(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[unwrap(key)] = unwrap(value)

    def __len__(self) -> int:
        return len(self.host)

    def __bool__(self) -> bool:
        return bool(self.host)

    def __float__(self) -> float:
        return float(self.host)


def operator(name: str) -> Any:
    def method(self: ndarray, *others: Any) -> Any:
        result = getattr(self.host, name)(*map(unwrap, others))
        if name.startswith("__i") and name != "__invert__":
            return self
        return result if result is NotImplemented else wrap(result)

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

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value
        return lambda *a, **k: wrap(value(*unwrap(a), **{key: unwrap(v) for key, v in k.items()}))

    @staticmethod
    def asarray(a: Any, dtype: Any = None) -> ndarray:
        return ndarray(np.array(a.host if isinstance(a, ndarray) else a, dtype=dtype))


cupy = Module("cupy")
