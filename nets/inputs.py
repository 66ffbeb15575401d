"""What networks ask of their arguments."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..kernels.arrays import array_module, extremes, is_cupy, is_native
from .autograd import Tensor
from .layers import ParameterStore

Array = Any


def check_input(x: Array | Tensor, shape: tuple[int, ...], params: ParameterStore) -> Tensor:
    """x as a Tensor; TypeError or ValueError unless it is (B, *shape) of the library and dtype of the parameters."""
    tensor = x if isinstance(x, Tensor) else Tensor(x)
    x, like = tensor.data, params.data
    if not is_native(x):
        raise TypeError(f"x must be an array, not {type(x).__name__}")
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape:
        raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), not {x.shape}")
    if array_module(x) is not array_module(like):
        raise TypeError(f"x is of {array_module(x).__name__}, the network of {array_module(like).__name__}")
    if x.dtype != like.dtype:
        raise TypeError(f"x is {x.dtype}, the network {like.dtype}: the dtypes must be equal")
    return tensor


def check_times(t: Any, batch: int, xp: Any) -> Array:
    """t, a number or (B,) numbers, as (B,) float64 of ``xp``; TypeError or ValueError where it is neither."""
    t = t if is_cupy(t) else np.asarray(t)
    if t.dtype.kind not in "iuf":
        raise TypeError(f"t must be integers or floats, not {t.dtype}")
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t must have shape ({batch},), not {t.shape}")
    t = xp.asarray(t, "float64")
    return t if t.ndim else xp.broadcast_to(t, (batch,))


def check_labels(y: Any, batch: int, classes: int, null_class: bool, xp: Any) -> Array:
    """y (B,) labels, or None for the null class, as integers of ``xp``; TypeError or ValueError where they do not fit."""
    if y is None:
        if not null_class:
            raise ValueError(f"y must be given, labels in 0..{classes - 1}: the network has no null class")
        return xp.full(batch, classes)
    return check_integers("y", y, (batch,), classes + null_class, xp)


def check_integers(name: str, a: Any, shape: tuple[int | str, ...], count: int, xp: Any) -> Array:
    """``a`` (named) as integers of ``xp``, each in 0..count-1; TypeError or ValueError where they do not fit.

    shape: an axis of any size is given as a letter.
    """
    a = a if is_cupy(a) else np.asarray(a)
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {a.dtype}")
    if a.ndim != len(shape) or any(n != want and isinstance(want, int) for n, want in zip(a.shape, shape, strict=True)):
        raise ValueError(f"{name} must have shape {str(shape).replace(chr(39), '')}, not {a.shape}")
    if isinstance(a, np.ndarray) and a.size:  # values on a GPU are not waited for
        low, high = extremes(a)
        if not (low >= 0 and high < count):
            raise ValueError(f"{name} must be in 0..{count - 1}, not {low}..{high}")
    return xp.asarray(a)


def check_sizes(sizes: Mapping[str, Any], low: int = 1) -> None:
    """TypeError or ValueError unless all values are integers of at least ``low``."""
    for name, n in sizes.items():
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, not {n!r}")
        if n < low:
            raise ValueError(f"{name} must be at least {low}, not {n}")
