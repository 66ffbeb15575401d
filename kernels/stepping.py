"""What a captured training step is made of beside its network. All that changes from step to step is read from arrays.

For NumPy the functions are compiled, and calls of them can be recorded in a plan; for CuPy they are launches alone, so that a
graph can capture them. They return nothing: results go to the arrays given for them.
"""

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from . import dispatch, recording
from .arrays import is_cupy, is_native
from .bf16 import BF16
from .reference.stepping import LEVEL, adamw_row

__all__ = ["LEVEL", "adamw_ema_by_table", "adamw_row", "count", "draw_levels", "example", "verdict"]

Array = Any


@cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f".{backend}.stepping", __package__)


def _backend(*arrays: Array) -> ModuleType:
    on_gpu = is_cupy(arrays[0])
    if any(is_cupy(a) != on_gpu for a in arrays):
        raise TypeError("the arrays are of different libraries")
    if dispatch.chosen() == "reference":
        recording.refuse("a kernel's definition")
        return _module("reference")
    if on_gpu:
        recording.refuse("arrays on a GPU")
    return _module("gpu" if on_gpu else "cpu")


def _check(name: str, a: Any, dtype: Any, shape: tuple[int | None, ...], written: bool = False) -> None:
    """TypeError or ValueError unless ``a`` is a contiguous array of this dtype and shape, where None stands for any size."""
    if not is_native(a):
        raise TypeError(f"{name} must be an array, not {type(a).__name__}")
    if a.dtype != dtype:
        raise TypeError(f"{name} must be {np.dtype(dtype)}, not {a.dtype}")
    if len(a.shape) != len(shape) or any(want is not None and n != want for n, want in zip(a.shape, shape, strict=True)):
        raise ValueError(f"{name} must have shape {shape}, not {tuple(a.shape)}".replace("None", "any"))
    if not a.flags.c_contiguous or (written and isinstance(a, np.ndarray) and not a.flags.writeable):
        raise ValueError(f"{name} must be contiguous{' and writable' * written}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0..2^64-1, not {seed}")


def draw_levels(rows: Array, step: Array, seed: int, t: Array, levels: Array) -> None:
    """t_k = 1 + ⌊u_k·T⌋ for every sample k of a batch, and the row of its level: levels[:, k] = rows[t_k].

    Eq: S1-A1, S4-A1.

    rows (T+1, columns) float32, of which row 0 is never drawn; step (1,) int32, the training step; u_k the numbers of
    :func:`alphabar.core.forward.random_times`, whose bits the times have. Written: t (B,) float64, levels (columns, B) float32.
    Raises TypeError or ValueError for arrays of another dtype or shape.
    """
    _check("rows", rows, np.float32, (None, None))
    if rows.shape[0] < 2:
        raise ValueError(f"rows must have at least two rows, not {rows.shape[0]}")
    _check("step", step, np.int32, (1,))
    _check("t", t, np.float64, (None,), True)
    _check("levels", levels, np.float32, (rows.shape[1], t.shape[0]), True)
    _check_seed(seed)
    if t.shape[0]:
        _backend(rows, step, t, levels).draw_levels(rows, step, seed, t, levels)


def example(images: Array, levels: Array, step: Array, seed: int, x: Array, target: Array) -> None:
    """x = scale·(signal·x0 + noise·ε) and target = on_x0·x0 + on_eps·ε of x0 = u/127.5 − 1, in one pass.

    Eq: S1-A1, S4-A1.

    images u (B, …) uint8; levels (6, B) float32, rows as in ``LEVEL`` (the last is not read here); ε of (seed, step, place in
    the batch), step (1,) int32. Written: x, target float32 like images. Every operation is rounded once: the same bits
    everywhere. Raises TypeError or ValueError for arrays of another dtype or shape.
    """
    if not is_native(images) or not images.ndim:
        raise TypeError("images must be an array (B, …)")
    _check("images", images, np.uint8, images.shape)
    _check("levels", levels, np.float32, (len(LEVEL), images.shape[0]))
    _check("step", step, np.int32, (1,))
    _check("x", x, np.float32, images.shape, True)
    _check("target", target, np.float32, images.shape, True)
    _check_seed(seed)
    if images.size:
        _backend(images, levels, step, x, target).example(images, levels, step, seed, x, target)


def verdict(value: Array, norm_sq: Array, skipped: Array, tally: Array) -> None:
    """Whether a step counts: its mean loss and the gradient's norm are finite, and no step before it has failed unread.

    value (B,) float32, the losses, B at least 1; norm_sq (1,) float64, Σ grad²; skipped (1,) int32, steps refused so far. Where
    it counts tally (4,) float64 takes it in: + its mean loss, + 1, its mean loss, √norm_sq. Else norm_sq becomes NaN, with which
    :func:`adamw_ema_by_table` changes nothing and :func:`count` counts the step as skipped. Raises TypeError or ValueError for
    arrays of another dtype or shape.
    """
    _check("value", value, np.float32, (None,))
    if not value.shape[0]:
        raise ValueError("value must not be empty")
    _check("norm_sq", norm_sq, np.float64, (1,), True)
    _check("skipped", skipped, np.int32, (1,))
    _check("tally", tally, np.float64, (4,), True)
    _backend(value, norm_sq, skipped, tally).verdict(value, norm_sq, skipped, tally)


def adamw_ema_by_table(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    ema: Array,
    rows: Array,
    counter: Array,
    beta1: float,
    beta2: float,
    eps: float,
    norm_sq: Array,
    max_norm: float = float("inf"),
    low: Array | None = None,
) -> None:
    """:func:`adamw_ema` by row ``counter[0]`` of a table in place of the numbers that change; past its end by the last row.

    param, grad, m, v, ema (n,) float32; rows (r, 5) float32, each from :func:`adamw_row`; counter (1,) int32. Where norm_sq (1,)
    float64 is not finite nothing changes. Each backend gives the bits of its ``adamw_ema``. ``low`` (n,) bfloat16, on a GPU
    alone, takes the new weights rounded. Raises TypeError or ValueError for arrays of another dtype or shape.
    """
    for name, a in (("param", param), ("grad", grad), ("m", m), ("v", v), ("ema", ema)):
        _check(name, a, np.float32, (param.size,), a is not grad)
    _check("rows", rows, np.float32, (None, 5))
    if not rows.shape[0]:
        raise ValueError("rows must not be empty")
    _check("counter", counter, np.int32, (1,))
    _check("norm_sq", norm_sq, np.float64, (1,))
    if low is not None:
        _check("low", low, BF16, param.shape)
    beside = {} if low is None else {"low": low}
    _backend(param, grad, m, v, ema, rows, counter, norm_sq).adamw_ema_by_table(
        param, grad, m, v, ema, rows, counter, beta1, beta2, eps, norm_sq, max_norm, **beside
    )


def count(made: Array, skipped: Array, norm_sq: Array) -> None:
    """made += 1, the last of a step; where norm_sq (1,) float64 is not finite skipped += 1 instead. Both (1,) int32.

    Raises TypeError or ValueError for arrays of another dtype or shape.
    """
    _check("made", made, np.int32, (1,), True)
    _check("skipped", skipped, np.int32, (1,), True)
    _check("norm_sq", norm_sq, np.float64, (1,))
    _backend(made, skipped, norm_sq).count(made, skipped, norm_sq)
