"""The trace of a Jacobian from Jacobian-vector products: exactly, and by Hutchinson's estimate.

``jvp(x, v)`` returns J·v for the Jacobian J of a function ℝ^d → ℝ^d at each sample x (B, …). A product from the left, uᵀJ, does
as well, since both have the diagonal in common: vᵀ(Jv) = (vᵀJ)v. Each call is one product, so calls count the cost.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, is_native, native, restore
from .exchange import Array, flat, float_batch

Product = Callable[[Array, Array], Array]
LAWS = ("rademacher", "normal")


def projections(
    shape: tuple[int, ...],
    seed: int = 0,
    step: int = 0,
    law: str = "normal",
    first_sample: int = 0,
    dtype: Any = np.float32,
    xp: ModuleType = np,
) -> Array:
    """Random directions v of ``shape`` (B, …) with E[vvᵀ] = I, from (seed, step, first_sample + place). Eq: S0-E5, S0-P2.

    law: "normal" N(0, I), or "rademacher" ±1 with equal chances (the signs of the same normals).
    """
    if law not in LAWS:
        raise ValueError(f"law must be one of {LAWS}, not {law!r}")
    v = kernels.normals(xp.empty(shape, dtype), seed, step, streams.PROJECTION, first_sample)
    return v if law == "normal" else xp.copysign(xp.ones_like(v), v)


_draw = projections  # hutchinson_trace has an argument of that name


def _product(jvp: Product, x: Any, v: Array) -> Array:
    answer = native(jvp(x, restore(v, x)))
    if not is_native(answer) or answer.shape != v.shape:
        got = getattr(answer, "shape", type(answer).__name__)
        raise ValueError(f"jvp must return an array of shape {v.shape} like x, not {got}")
    return answer


def jacobian(jvp: Product, x: Array) -> Array:
    """J (B, d, d), J[b, i, j] = ∂f_i/∂x_j at sample b, by d calls. Eq: S4-E78.

    x (B, …) with d elements a sample. From products uᵀJ it is the transpose.
    """
    a = float_batch(x, "x")
    xp, d = array_module(a), int(np.prod(a.shape[1:]))
    J = xp.empty((a.shape[0], d, d), a.dtype)
    for i in range(d):
        v = xp.zeros((a.shape[0], d), a.dtype)
        v[:, i] = 1
        J[:, :, i] = _product(jvp, x, v.reshape(a.shape)).reshape(a.shape[0], d)
    return restore(J, x)


def jacobian_trace(jvp: Product, x: Array) -> Array:
    """tr J (B,), exactly, by d calls. Eq: S0-E4, S0-C3, S4-E57, S4-E79, S4-C12."""
    a = float_batch(x, "x")
    xp, d = array_module(a), int(np.prod(a.shape[1:]))
    trace = xp.zeros(a.shape[0], a.dtype)
    for i in range(d):
        v = xp.zeros((a.shape[0], d), a.dtype)
        v[:, i] = 1
        trace += _product(jvp, x, v.reshape(a.shape)).reshape(a.shape[0], d)[:, i]
    return restore(trace, x)


def hutchinson_trace(
    jvp: Product,
    x: Array,
    seed: int = 0,
    projections: int = 1,
    law: str = "rademacher",
    step: int = 0,
    first_sample: int = 0,
) -> tuple[Array, Array]:
    """(the mean of vᵀJv over the directions (B,), its standard error (B,)), by ``projections`` calls. Eq: S0-E5, S4-E58, S4-E80.

    Direction j of sample k depends on (seed, step + j, first_sample + k) alone: a later call draws the same ones. With one
    projection the standard error is unknown, NaN. The variance of vᵀJv is 2(‖S‖² − Σ S_ii²) for Rademacher and 2‖S‖² for normal
    directions, S = (J + Jᵀ)/2. Raises ValueError for an unknown law or fewer than one projection.
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, not {projections}")
    a = float_batch(x, "x")
    xp = array_module(a)
    draws = xp.empty((projections, a.shape[0]), a.dtype)
    for j in range(projections):
        v = _draw(a.shape, seed, step + j, law, first_sample, a.dtype, xp)
        draws[j] = flat(v * _product(jvp, x, v)).sum(axis=1)
    mean = draws.mean(axis=0)
    if projections == 1:
        error = xp.full_like(mean, np.nan)
    else:
        error = xp.sqrt(((draws - mean) ** 2).sum(axis=0) / (projections * (projections - 1)))
    return restore(mean, x), restore(error, x)
