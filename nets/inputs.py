"""What networks ask of their arguments."""

from typing import Any

import numpy as np

from ..kernels.arrays import array_module, is_cupy, is_native
from .layers import ParameterStore

Array = Any


def check_input(x: Array, shape: tuple[int, ...], params: ParameterStore) -> None:
    """TypeError or ValueError unless x is an array (B, *shape) of the library and dtype of the parameters."""
    like = params.data
    if not is_native(x):
        raise TypeError(f"x must be an array, not {type(x).__name__}")
    if x.ndim != len(shape) + 1 or x.shape[1:] != shape:
        raise ValueError(f"x must have shape (B, {', '.join(map(str, shape))}), not {x.shape}")
    if array_module(x) is not array_module(like):
        raise TypeError(f"x is of {array_module(x).__name__}, the network of {array_module(like).__name__}")
    if x.dtype != like.dtype:
        raise TypeError(f"x is {x.dtype}, the network {like.dtype}: the dtypes must be equal")


def check_times(t: Any, batch: int, xp: Any) -> Array:
    """t, a number or (B,) numbers, as (B,) float64 of ``xp``; TypeError or ValueError where it is neither."""
    t = t if is_cupy(t) else np.asarray(t)
    if t.dtype.kind not in "iuf":
        raise TypeError(f"t must be integers or floats, not {t.dtype}")
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t must have shape ({batch},), not {t.shape}")
    return xp.broadcast_to(xp.asarray(t, "float64"), (batch,))
