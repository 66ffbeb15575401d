"""Sampling of discrete states from a network of p̃(x_0|x_t): any law, any sub-sequence of times, parts of x_0 given."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, is_native, native, restore, to_numpy
from .categorical import states
from .discrete import q_sample, reverse_from_x0
from .discrete_rows import fused, grid_of, rows_of
from .exchange import Array, flat
from .transition import check_law
from .transitions import Absorbing, Transitions

Model = Callable[[Array, Array], Array]


def sample(
    model: Model,
    law: Transitions,
    x_T: Array,
    steps: int | None = None,
    grid: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    first_sample: int = 0,
    known: tuple[Array, Array] | None = None,
    temperature: float = 1.0,
    trajectory: bool = False,
    progress: Callable[[int, int], Any] | None = None,
) -> Array:
    """x_0 (B, …) int32 by x_s ~ p_θ(x_s|x_t) ∝ Σ_x̃0 q(x_s, x_t|x̃0)·p̃(x̃_0|x_t), down the times from T to 0. Eq: S4-E28, L9.

    The step 1 → 0 draws from p̃ itself, on the states from which x_1 can come. Every element is drawn on its own given x_t: with
    few steps the parts of x_0 agree less, whatever the model.

    model: gets the state (to read) and the time t, (B,) float64; returns logits (B, …, D), unnormalised log p̃, D ≤ K.
    x_T (B, …): integers of NumPy, CuPy or any library with ``__dlpack__``, of the law's prior; the answer is of its kind.
    steps, grid: so many evenly spaced times, or the times themselves, ascending ints that end at T; all T by default.
    seed, first_sample: row i of sample k draws from (seed, i, first_sample + k) and from nothing else.
    known: (values (B, …), mask): where the boolean mask is true x_0 is given. The absorbing law holds it, which is exact, and the
        model is told the time at which as many elements are masked on average as in the state: its p̃ depends on what is masked
        and not on when. For the others x_t is drawn from q(x_t|x_0) there ahead of every row, an approximation. What is given
        comes out as it went in.
    temperature: divides the logits: below 1 the likelier states are drawn more often than the model says.
    trajectory: return every state, (rows + 1, B, …), x_T first, instead of the last one.
    progress: called as progress(rows done, rows).

    Raises TypeError or ValueError for arguments, or an answer of the model, of the wrong shape or dtype. Source: Austin et al.
    2021; Hoogeboom et al. 2021.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature}")
    x = states_of(x_T, "x_T", law)
    xp = array_module(x)
    given, fixed = (None, None) if known is None else _known(known, x, law)
    times = grid_of(law, steps, grid)[::-1]
    ends = np.append(times[1:], 0)
    rows = np.zeros((0, 4))
    path = xp.empty((len(times) + 1, *x.shape), np.int32) if trajectory else None
    if isinstance(law, Absorbing) and given is not None:
        x = xp.where(fixed, given, x)
    for i, (t, s) in enumerate(zip(times.tolist(), ends.tolist(), strict=True)):
        if given is not None and not isinstance(law, Absorbing):
            x = xp.where(fixed, q_sample(given, t, law, seed, i, first_sample), x)
        if path is not None:
            path[i] = x
        told = xp.full(x.shape[0], float(t)) if given is None else _time_of(x, t, law)
        logits = answer_of(model(restore(x, x_T), restore(told, x_T)), x, law)
        logits = logits if temperature == 1 else logits / temperature
        if fused(law, logits.shape[-1]):
            rows = rows if len(rows) else rows_of(law, ends, times)
            mask = law.mask if isinstance(law, Absorbing) else -1
            x = kernels.categorical_posterior(logits, x, rows, i, mask=mask, seed=seed, first_sample=first_sample)
        else:
            weights = reverse_from_x0(logits, x, t, law, s)
            x = kernels.categorical(weights, seed, step=i, stream=streams.SAMPLER, first_sample=first_sample)
        if isinstance(x, np.ndarray) and x.size and x.min() < 0:
            raise ValueError(f"model returned logits of which nothing can be drawn at t = {t} (NaN, or -inf alone)")
        if s == 0 and given is not None:
            x = xp.where(fixed, given, x)
        if progress is not None:
            progress(i + 1, len(times))
    if path is not None:
        path[-1] = x
    return restore(x if path is None else path, x_T)


def states_of(value: Any, name: str, law: Transitions) -> Array:
    """``value`` as a native int32 array; TypeError or ValueError unless it is an array (B, …) of the law's states."""
    check_law(law)
    return states(native(value), law.K, name, 1).astype(np.int32)


def _known(known: Any, x: Array, law: Transitions) -> tuple[Array, Array]:
    """(values, 0 where they are not given; mask) like x."""
    if not isinstance(known, (tuple, list)) or len(known) != 2:
        raise TypeError("known must be a pair (values, mask)")
    xp = array_module(x)
    mask = native(known[1])
    if getattr(mask, "dtype", None) != np.bool_:
        raise TypeError(f"the mask of known must be boolean, not {getattr(mask, 'dtype', type(mask).__name__)}")
    values = native(known[0])
    if getattr(values, "shape", None) != x.shape or mask.shape != x.shape:
        raise ValueError(f"known must hold values and a mask of shape {x.shape} like x_T")
    mask = xp.asarray(mask)
    values = states_of(xp.where(mask, xp.asarray(values), 0), "the given part of known", law)
    return values, mask


def _time_of(x: Array, t: int, law: Transitions) -> Array:
    """The time (B,) to tell the model: t, or under an absorbing law the first at which so many elements of x are masked."""
    xp = array_module(x)
    if not isinstance(law, Absorbing):
        return xp.full(x.shape[0], float(t))
    share = to_numpy(flat(x == law.mask).mean(axis=1))
    return xp.asarray(np.clip(np.searchsorted(1 - law.keep, share - 1e-9), 1, law.T).astype(np.float64))


def answer_of(value: Any, x: Array, law: Transitions) -> Array:
    """What the model returned for the state x (B, …), as native logits (B, …, D)."""
    a = native(value)
    if not is_native(a):
        raise TypeError(f"model must return an array, not {type(value).__name__}")
    if array_module(a) is not array_module(x):
        raise TypeError(f"model must return a {array_module(x).__name__} array like the state, not {array_module(a).__name__}")
    if a.dtype.kind != "f" or a.shape[:-1] != x.shape or not 1 <= a.shape[-1] <= law.K:
        raise ValueError(
            f"model must return floats of shape {(*x.shape, 'D')} with D in 1..{law.K}, not {a.dtype} of shape {a.shape}"
        )
    return a
