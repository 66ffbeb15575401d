"""The doors of the elementwise functions: arrays of other libraries, and values gathered by time."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np

from ..kernels.arrays import array_module, extremes, is_foreign, is_native, native, restore, to_numpy
from .levels import Levels, Tabulated

Array = Any
P = ParamSpec("P")
R = TypeVar("R")


def exchanged(f: Callable[P, R]) -> Callable[P, R]:
    """``f`` for arrays of any library that speaks DLPack: NumPy or CuPy inside, the kind of its first argument back.

    Raises TypeError unless that argument is an array and ``s``, where it is a process, of the class that it is annotated with.
    """
    parameters = inspect.signature(f).parameters
    names = tuple(parameters)
    annotation = parameters["s"].annotation if "s" in names else None
    wanted = annotation if isinstance(annotation, type) and issubclass(annotation, Levels) else None
    place = names.index("s") if wanted else len(names)

    @functools.wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        kind = args[0] if args else kwargs.get(names[0])
        if type(kind) is not np.ndarray and not is_foreign(kind) and not isinstance(kind, np.generic) and not is_native(kind):
            if not args and names[0] not in kwargs:
                return f(*args, **kwargs)  # which raises what Python raises
            raise TypeError(f"{names[0]} must be an array, not {type(kind).__name__}")
        if wanted and (len(args) > place or "s" in kwargs):
            check_schedule(args[place] if len(args) > place else kwargs["s"], wanted)
        if not any(map(is_foreign, (*args, *kwargs.values()))):
            return f(*args, **kwargs)
        result: Any = f(*map(native, args), **{k: native(v) for k, v in kwargs.items()})
        return tuple(restore(r, kind) for r in result) if isinstance(result, tuple) else restore(result, kind)

    return call


def check_schedule(s: Any, wanted: type = Levels) -> None:
    """TypeError unless ``s`` is a process of the class wanted."""
    if not isinstance(s, wanted):
        if isinstance(s, Levels):
            raise TypeError(f"s must be a Schedule or a Ladder, whose steps are counted, not {type(s).__name__}")
        raise TypeError(f"s must be a Schedule (schedules.linear() for one), not {type(s).__name__}")


def check_times(t: Any, low: int, high: int, batch: int | None = None) -> Any:
    """``t`` as an int or as a (B,) integer array, all in low..high (an array on a GPU is not read)."""
    t = native(t)
    if not is_native(t):
        t = np.asarray(t)
    if t.dtype.kind not in "iu":
        raise TypeError(f"t must be an int or an array of integers, not {t.dtype}")
    if t.ndim == 0:
        t = int(t)
        if not low <= t <= high:
            raise ValueError(f"t must be in {low}..{high}, not {t}")
        return t
    if t.ndim != 1 or (batch is not None and t.shape[0] != batch):
        raise ValueError(f"t must be an int or have shape ({'B' if batch is None else batch},), not {t.shape}")
    if isinstance(t, np.ndarray) and t.size:
        least, most = extremes(t)
        if not (low <= least and most <= high):
            raise ValueError(f"t must be in {low}..{high}, not {least}..{most}")
    return t


def float_array(value: Any, name: str) -> Array:
    """``value`` as a native array; TypeError unless it is an array of floats."""
    a = native(value)
    if not is_native(a) or a.dtype.kind != "f":
        raise TypeError(f"{name} must be a float array, not {f'of {a.dtype}' if is_native(a) else type(a).__name__}")
    return a


def float_batch(value: Any, name: str, axes: int = 1) -> Array:
    """``value`` as a native array; TypeError unless it is an array of floats with at least so many axes."""
    a = native(value)
    if not is_native(a) or a.dtype.kind != "f" or a.ndim < axes:
        raise TypeError(f"{name} must be a float array (B, …)")
    return a


def flat(x: Array) -> Array:
    """x (B, …) as (B, d), for an empty batch too (which reshape(B, -1) refuses)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def lift(values: Any, x: Array) -> Any:
    """Per-sample float64 values as factors of ``x``: a float, or an array (B, 1, …) of the library and dtype of ``x``."""
    if np.ndim(values) == 0:
        return float(values)
    return array_module(x).asarray(values).astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def column(values: np.ndarray, t: Any, x: Array, low: int = 0) -> Any:
    """``values[t]`` (values of length T+1) as a factor of ``x``; t an int or (B,) integers in low..T."""
    t = check_times(t, low, len(values) - 1, x.shape[0] if x.ndim else None)
    if isinstance(t, int):
        return float(values[t])
    return lift(array_module(t).asarray(values)[t], x)


def level_columns(s: Levels, t: Any, x: Array, low: int = 0) -> tuple[Any, Any]:
    """(signal, noise) at t as factors of ``x``: whole times of a table, any times in [0, T] of a continuous process."""
    if isinstance(s, Tabulated):
        return column(s.signal, t, x, low), column(s.noise, t, x, low)
    signal, noise = s.levels(real_times(t, s, x.shape[0] if x.ndim else None))
    return lift(signal, x), lift(noise, x)


def real_times(t: Any, s: Levels, batch: int | None) -> np.ndarray:
    """``t`` as float64 on the host, a number or (B,), within [0, T]."""
    values = to_numpy(t)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"t must be a number or an array of numbers, not {values.dtype}")
    if values.shape != () and (values.ndim != 1 or (batch is not None and len(values) != batch)):
        raise ValueError(f"t must be a number or have shape ({'B' if batch is None else batch},), not {values.shape}")
    return s.check(values)
