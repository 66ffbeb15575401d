"""The numbers of one reverse step under the laws that need only O(K) work, and the times at which a discrete chain stops."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..kernels.arrays import array_module
from .exchange import Array
from .levels import timesteps
from .transitions import Absorbing, Transitions, Uniform


def fused(law: Transitions, states: int) -> bool:
    """True where :func:`rows_of` describes the step p_θ(x_s|x_t) for logits of so many states."""
    return isinstance(law, Absorbing) or (isinstance(law, Uniform) and states == law.K)


def rows_of(law: Transitions, s: Any, t: Any) -> np.ndarray:
    """(…, 4) float64: (keep, spread, C, D) of the steps t → s < t, arrays of ints. Eq: S4-E28, L9.

        uniform     w_j = (keep·[j = x_t] + spread)·(C·p̃_j + D):  keep = ᾱ_t/ᾱ_s, spread = (1 − keep)/K, C = ᾱ_s, D = (1 − ᾱ_s)/K
        absorbing   x_t stays unless it is the mask; then w_j = C·p̃_j, w_mask = D:  C = ᾱ_s − ᾱ_t, D = 1 − ᾱ_s

    w is p_θ(x_s|x_t) but for its sum. The step 1 → 0 of the uniform law is p̃ itself, (0, 1, 1, 0); where nothing is forgotten
    up to t x_t stays, (1, 0, 0, 1).
    """
    s, t = np.broadcast_arrays(np.asarray(s), np.asarray(t))
    if not isinstance(law, (Uniform, Absorbing)):
        raise TypeError(f"law must be Uniform or Absorbing, not {type(law).__name__}")
    to, now = law.keep[s], law.keep[t]
    if isinstance(law, Absorbing):
        return np.stack([np.zeros(s.shape), np.zeros(s.shape), to - now, 1 - to], axis=-1)
    lost = np.where(t - s == 1, law.beta[t], 1 - np.divide(now, to, out=np.zeros(s.shape), where=to > 0))
    rows = np.stack([1 - lost, lost / law.K, to, (1 - to) / law.K], axis=-1)
    rows[t == 1] = (0, 1, 1, 0)
    rows[now == 1] = (1, 0, 0, 1)
    return rows


def without_mask(logits: Array, law: Transitions) -> Array:
    """The logits with probability 0 for the mask of an absorbing law, where they have a column for it."""
    if not isinstance(law, Absorbing) or law.mask >= logits.shape[-1]:
        return logits
    xp = array_module(logits)
    return xp.where(xp.arange(logits.shape[-1]) == law.mask, logits.dtype.type(-np.inf), logits)


def grid_of(law: Transitions, steps: int | None = None, grid: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """The ascending times (S,) int64 of a chain that starts from T: ``grid``, or ``steps`` evenly spaced, T by default.

    Raises ValueError or TypeError unless ``grid`` ascends within 1..T and ends at T, or ``steps`` is an int in 1..T.
    """
    if steps is not None and grid is not None:
        raise ValueError("give steps or grid, not both")
    if grid is None:
        return timesteps(law.T, law.T if steps is None else steps, "trailing")
    times = np.asarray(grid)
    if times.dtype.kind not in "iu" or times.ndim != 1 or times.size == 0:
        raise TypeError(f"grid must be a list of ints, not {grid!r}")
    times = times.astype(np.int64)
    if times[0] < 1 or times[-1] != law.T or np.any(np.diff(times) <= 0):
        raise ValueError(f"grid must ascend within 1..{law.T} and end at {law.T}, not {times.tolist()}")
    return times
