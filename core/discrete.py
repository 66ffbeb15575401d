"""The forward process of discrete states and its posteriors: multinomial diffusion and D3PM, one element at a time.

States are integers 0..K−1 in arrays (B, …), every element on its own; ``law`` is one of :mod:`alphabar.core.transitions`. Times
s < t are an int or (B,) integers, s = 0 clean data. Arrays are NumPy, CuPy or of any library with ``__dlpack__``, answered in
kind. Laws are log-probabilities (B, …, K) in which an exact zero is −inf.
"""

from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module
from . import categorical
from .exchange import Array, check_times, exchanged
from .transition import check_law
from .transitions import Transitions
from .transitions_closed import Forgetting


@exchanged
def q_sample(x0: Array, t: Any, law: Transitions, seed: int = 0, step: int = 0, first_sample: int = 0) -> Array:
    """x_t ~ q(x_t|x_0) = C(x_0Q̄_t), int32 (B, …). Eq: S4-E26, S4-E31.

    Drawn from (seed, step, first_sample + place in the batch), the stream of the forward process.
    """
    check_law(law)
    categorical.states(x0, law.K, "x0", 1)
    if isinstance(law, Forgetting):
        return _forget(x0, t, law, law.keep, 0, seed, step, first_sample)
    return kernels.categorical(law.log_rows(0, x0, t, np.float32), seed, step, streams.FORWARD, first_sample)


@exchanged
def q_step(x: Array, t: Any, law: Transitions, seed: int = 0, step: int | None = None, first_sample: int = 0) -> Array:
    """x_t ~ q(x_t|x_{t−1} = x) = C(xQ_t), int32 (B, …), t in 1..T. Eq: S4-E25, S4-E30.

    ``step`` numbers the noise and defaults to t where t is an int, so that a chain of steps under one seed draws afresh each
    time; else 0.
    """
    check_law(law)
    t = check_times(t, 1, law.T)
    if step is None:
        step = t if isinstance(t, int) else 0
    if isinstance(law, Forgetting):
        return _forget(x, t, law, 1 - law.beta, 1, seed, step, first_sample)
    return kernels.categorical(law.log_rows(t - 1, x, t, np.float32), seed, step, streams.FORWARD, first_sample)


def _forget(x: Array, t: Any, law: Forgetting, keep: np.ndarray, low: int, seed: int, step: int, first_sample: int) -> Array:
    xp = array_module(categorical.states(x, law.K, "x", 1))
    t = check_times(t, low, law.T, len(x))
    t = xp.full(len(x), t, np.int64) if isinstance(t, int) else xp.asarray(t)
    return kernels.categorical_q_sample(x, t, xp.asarray(keep), law.K, law.mask, seed, step, streams.FORWARD, first_sample)


@exchanged
def q_posterior(x0: Array, x_t: Array, t: Any, law: Transitions, s: Any = None, dtype: Any = np.float64) -> Array:
    """ln q(x_s|x_t, x_0), (B, …, K), s = t−1 unless given. Eq: S4-E11, S4-E27, S4-E32.

        q(x_s|x_t, x_0) = (x_t(Q_{s+1}…Q_t)ᵀ ⊙ x_0Q̄_s)/(x_0Q̄_t x_tᵀ)

    Where x_t cannot come from x_0 every entry is −inf. Raises ValueError unless 0 <= s < t.
    """
    check_law(law)
    if categorical.states(x0, law.K, "x0", 1).shape != x_t.shape:
        raise ValueError(f"x_t must have the shape of x0, {x0.shape}, not {x_t.shape}")
    s, t = _earlier(s, t, law)
    return categorical.normalised(law.log_columns(s, t, x_t, dtype) + law.log_rows(0, x0, s, dtype))


@exchanged
def reverse_from_x0(logits: Array, x_t: Array, t: Any, law: Transitions, s: Any = None) -> Array:
    """ln p_θ(x_s|x_t), (B, …, K), from a network's logits (B, …, D) of p̃(x_0|x_t); s = t−1 unless given. Eq: S4-E28.

        p_θ(x_s|x_t) ∝ Σ_x̃0 q(x_s, x_t|x̃0)·p̃(x̃0|x_t) = q(x_t|x_s)·Σ_x̃0 q(x_s|x̃0)·p̃(x̃0|x_t)

    States D..K−1 have p̃ = 0; where D counts the mask, its logit should be −inf. For the uniform law this is θ_post(x_t, x̂_0) of
    E27 with x̂_0 = p̃; it is not the mixture Σ q(x_s|x_t, x̃0)·p̃(x̃0). The step 1 → 0 alone is p̃ itself, p(x_0|x_1) = C(x̂_0),
    on the states that x_1 can come from (with a mask: what is not masked stays); from t > 1 the formula holds at s = 0 too, as it
    must for the p̃ that fits it at t−1. Float dtype of the logits. Source: Austin et al. 2021, section 3.3; Hoogeboom et al. 2021.
    """
    check_law(law)
    if logits.shape[:-1] != x_t.shape:
        raise ValueError(f"logits must have shape {(*x_t.shape, 'D')} to go with x_t, not {logits.shape}")
    s, t = _earlier(s, t, law)
    log_p = law.log_push(logits, s)
    back = law.log_columns(s, t, x_t, log_p.dtype)
    first: Any = t == 1 if isinstance(t, int) else (t == 1).reshape(-1, *(1,) * (back.ndim - 1))
    xp = array_module(back)
    return categorical.normalised(log_p + xp.where(first & (back > -np.inf), back.dtype.type(0), back))


def prior(shape: tuple[int, ...], law: Transitions, seed: int = 0, first_sample: int = 0, xp: Any = np) -> Array:
    """x_T ~ ``law.prior``, int32 of ``shape`` (B, …), an array of ``xp``; sample k depends on (seed, first_sample + k) alone."""
    check_law(law)
    log_p = xp.asarray(categorical.log(law.prior), np.float32)
    return kernels.categorical(xp.broadcast_to(log_p, (*shape, law.K)), seed, 0, streams.PRIOR, first_sample)


def _earlier(s: Any, t: Any, law: Transitions) -> tuple[Any, Any]:
    t = check_times(t, 1, law.T)
    s = t - 1 if s is None else check_times(s, 0, law.T)
    if isinstance(s, (int, np.ndarray)) and isinstance(t, (int, np.ndarray)) and np.any(np.greater_equal(s, t)):
        raise ValueError(f"s must be below t = {t}, not {s}")
    return s, t
