"""The one sampler loop. What is sampled, and how, stands in the table (:mod:`alphabar.core.tables`)."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, is_native, native, restore
from .convert import coefficients, combined
from .exchange import Array, float_array
from .table import Table

if TYPE_CHECKING:
    from .captured import Captured

Model = Callable[[Array, Array], Array]


def prior(
    shape: tuple[int, ...],
    seed: int = 0,
    first_sample: int = 0,
    dtype: Any = np.float32,
    xp: ModuleType = np,
    std: float = 1.0,
) -> Array:
    """x_T ~ N(0, std²·I) of ``shape`` (B, …), a NumPy array or with ``xp=cupy`` a CuPy one. Eq: S0-C12, S2-C8.

    Sample k depends on (seed, first_sample + k) alone, so a batch may be split in any way. The values are float32 in every dtype.
    ``std`` is the ``prior_std`` of the process: 1 for schedules, σ_T for a ladder (Eq: S4-E65).
    """
    if not 0 < std < np.inf:
        raise ValueError(f"std must be positive and finite, not {std}")
    x = kernels.normals(xp.empty(shape, dtype), seed, step=0, stream=streams.PRIOR, first_sample=first_sample)
    return x if std == 1 else x * x.dtype.type(std)


def sample(
    model: Model,
    table: Table,
    x_T: Array,
    seed: int = 0,
    noise: Array | None = None,
    clip: tuple[float, float] | None = None,
    rederive_eps: bool = True,
    trajectory: bool = False,
    first_sample: int = 0,
    guidance: Callable[[Array, Array], Array] | None = None,
    progress: Callable[[int, int], Any] | None = None,
    before: Callable[[Array, int], Array] | None = None,
    threshold: float | tuple[float, float] | None = None,
    x0: Callable[[Array, Array], Array] | None = None,
    captured: "bool | Captured" = False,
) -> Array:
    """Run ``table`` from x_T, at most one model(x, t) and one kernel a row.

    Eq: S0-E31, S0-E47, S0-E49, S1-A2, S2-A1, S4-A2, S4-E46.

    model: gets the state (to read, not to keep: it is overwritten) and the time t as a (B,) array, int64, or float64 where the
        table stops between whole times; returns an array like the state, of the kind ``table.prediction``.
    x_T (B, …): float array of NumPy, CuPy or any library with ``__dlpack__``; it is not changed, and the answer is of its kind.
    seed, first_sample: row i of sample k draws noise from (seed, i, first_sample + k) and from nothing else.
    noise: (rows, *x_T.shape) to use instead; rows at the end that the table gives no noise may be missing.
    clip: (low, high) bounds of the predicted x0; ε is then re-derived from it unless ``rederive_eps`` is False.
    trajectory: return every state, (rows + 1, *x_T.shape), x_T first, instead of the last one.
    guidance: guidance(x, t) returns a gradient to add to the model's score, e.g. w·∇ log p(c|x_t). Eq: S0-E33.
    progress: called as progress(rows done, rows).
    before: before(x, i) returns the state to go on with ahead of row i, a correction of x or x itself.
    threshold: p, or (p, highest): dynamic thresholding of the predicted x0, see :func:`thresholded`; ε is re-derived from it. It
        replaces ``clip``. The quantile needs the whole sample, so x0 is formed and partly sorted outside the fused kernel, about
        three more passes over the state a row.
    x0: x0(prediction, t) returns the predicted x0 to go on with, for instance the nearest embedding; ε is re-derived from it. It
        comes after guidance and ``threshold``, and ahead of ``clip``.
    captured: capture each kind of row as a CUDA graph, made plainly the first time and captured the second; the numbers are those
        of the plain loop. A :class:`alphabar.core.captured.Captured` keeps the graphs for further batches. The model must then be
        launches on CuPy's current stream alone, the same at every time, and read nothing back to the host; the times come as
        float64. Where it cannot be captured the rows run plainly, as they do for arrays that are not float32 ones of CuPy.
        It goes without noise, guidance, before, threshold and x0.

    Raises TypeError or ValueError for arguments, or an answer of the model, of the wrong shape or dtype.
    """
    if not isinstance(table, Table):
        raise TypeError(f"table must be a Table (tables.ddim(s) for one), not {type(table).__name__}")
    x = start_of(x_T)
    if captured:
        others = {"noise": noise, "guidance": guidance, "before": before, "threshold": threshold, "x0": x0}
        refused = [name for name, value in others.items() if value is not None]
        if refused:
            raise ValueError(f"captured goes without {', '.join(refused)}")
        from . import captured as graphs

        if graphs.possible(x_T):
            kept = captured if isinstance(captured, graphs.Captured) else graphs.Captured()
            return kept.run(model, table, x, clip, rederive_eps, seed, first_sample, _states(table, x, trajectory), progress)
    xp = array_module(x)
    given = None if noise is None else _noise(native(noise), table, x)
    on_output = table.guidance_on_output()
    if threshold is not None:
        if clip is not None or not rederive_eps:
            raise ValueError("threshold goes without clip, and re-derives eps")
        quantile, highest = _limits(threshold)
    if x0 is not None and not rederive_eps:
        raise ValueError("x0 re-derives eps: rederive_eps must be True")
    formed = threshold is not None or x0 is not None
    if formed:
        on_x, on_m = coefficients(table.prediction, "x0", table.signal, table.noise)
        table = dataclasses.replace(table, prediction="x0")
    rows, times, past, asks = table.rows(clip is not None, rederive_eps), table.times, table.past, table.asks
    last_read, keeps = table.last_read, bool(past.any())
    outputs: dict[int, Array] = {}  # of the rows that a later one reads
    spare: list[Array] = []
    states = _states(table, x, trajectory)
    for i in range(len(table)):
        if before is not None:
            x[...] = answer_of(before(restore(x, x_T), i), x, "before")
        m, gradient = x, None
        if asks[i]:
            t = restore(xp.full(x.shape[0], times[i]), x_T)
            state = restore(x, x_T)
            m = answer_of(model(state, t), x, "model")
            gradient = None if guidance is None else answer_of(guidance(state, t), x, "guidance")
            if gradient is not None and (keeps or clip is not None or formed):
                m, gradient = m + float(on_output[i]) * gradient, None  # the stored and the bounded x0 must be guided too
            if formed:
                m = combined(on_x[i], x, on_m[i], m)
            if threshold is not None:
                m = thresholded(m, quantile, highest)
            if x0 is not None:
                m = answer_of(x0(restore(m, x_T), t), x, "x0")
        z = None if table.c[i] == 0 else True if given is None else given[i]
        history = tuple(outputs[i - k] for k in table.back[i, : past[i]])
        for k in [k for k in outputs if last_read[k] <= i]:  # the kernel may write what it keeps over what it reads
            spare.append(outputs.pop(k))
        store = (spare.pop() if spare else xp.empty_like(x)) if last_read[i] > i else None
        options = {"guidance": gradient, "noise": z, "clip": clip, "seed": seed, "first_sample": first_sample}
        kernels.step(x, m, rows, i, history, out=x, store=store, **options)
        if store is not None:
            outputs[i] = store
        if states is not None:
            states[i + 1] = x
        if progress is not None:
            progress(i + 1, len(table))
    return restore(x if states is None else states, x_T)


def _states(table: Table, x: Array, wanted: bool) -> Array | None:
    """Room for the state after every row, the first one written."""
    if not wanted:
        return None
    states = array_module(x).empty((len(table) + 1, *x.shape), x.dtype)
    states[0] = x
    return states


def thresholded(x0: Array, quantile: float = 0.995, highest: float = np.inf) -> Array:
    """x0 bounded to [−b, b] and divided by b, b the ``quantile`` of |x0| in each sample, at least 1 and at most ``highest``.

    Keeps the pixels of strong guidance from saturating. Imagen's p = 0.995 has no ``highest``; diffusers' default is 1, which is
    a static clip. x0 (B, …), NumPy or CuPy. Source: Saharia et al. 2022, section 2.3.
    """
    if x0.size == 0:
        return x0
    xp = array_module(x0)
    b = (
        xp.clip(xp.quantile(xp.abs(x0).reshape(x0.shape[0], -1), quantile, axis=1), 1.0, highest)
        .astype(x0.dtype)
        .reshape(-1, *(1,) * (x0.ndim - 1))
    )
    return xp.clip(x0, -b, b) / b


def _limits(threshold: Any) -> tuple[float, float]:
    """(quantile, highest) of the argument ``threshold``."""
    given = threshold if isinstance(threshold, (tuple, list)) else (threshold, np.inf)
    if len(given) != 2 or not 0 < given[0] <= 1 or not given[1] >= 1:
        raise ValueError(f"threshold must be a quantile in (0, 1], or (quantile, highest) with highest >= 1, not {threshold!r}")
    return float(given[0]), float(given[1])


def start_of(x_T: Any) -> Array:
    """A copy of x_T as a native array; TypeError or ValueError unless it is a float array with a batch axis."""
    x = float_array(x_T, "x_T")
    if x.ndim < 1:
        raise ValueError("x_T must have a batch axis, not shape ()")
    return x.copy(order="C")


def answer_of(value: Any, x: Array, name: str) -> Array:
    """What ``name`` returned, as a native array like x; one of another float dtype is cast (a float64 factor is soon met)."""
    a = native(value)
    if not is_native(a):
        raise TypeError(f"{name} must return an array, not {type(value).__name__}")
    if a.shape != x.shape or a.dtype.kind != "f":
        raise ValueError(f"{name} must return floats of shape {x.shape} like the state, not {a.dtype} of shape {a.shape}")
    if array_module(a) is not array_module(x):
        raise TypeError(f"{name} must return a {array_module(x).__name__} array like the state, not {array_module(a).__name__}")
    return a.astype(x.dtype, copy=False)


def _noise(noise: Any, table: Table, x: Array) -> Array:
    if not is_native(noise):
        raise TypeError(f"noise must be an array, not {type(noise).__name__}")
    needed = 1 + int(np.max(np.flatnonzero(table.c), initial=-1))
    if noise.shape[1:] != x.shape or noise.shape[0] < needed:
        raise ValueError(f"noise must have shape {(len(table), *x.shape)}, at least {needed} rows of it, not {noise.shape}")
    if noise.dtype.kind != "f":
        raise TypeError(f"noise must be of a float dtype, not {noise.dtype}")
    return noise.astype(x.dtype, copy=False)
