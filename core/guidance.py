"""Guidance: classifier-free and by a classifier.

The weight w is that of Ho & Salimans 2022: ε̃ = (1+w)·ε_c − w·ε_u, so w = 0 is the conditional model and w = −1 the
unconditional one. Much code has the scale 1 + w instead.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels import counter, streams
from ..kernels.arrays import array_module, native, restore
from .convert import score_from_eps
from .exchange import Array, exchanged, level_columns
from .levels import Levels

Model = Callable[[Array, Array], Array]


def classifier_free_eps(eps_cond: Array, eps_uncond: Array, w: float) -> Array:
    """ε̃ = (1+w)·ε_c − w·ε_u = ε_c + w·(ε_c − ε_u): the noise of p(x|c)·p(c|x)^w. Eq: S0-E37, S0-C15, S3-E14."""
    return (1 + w) * eps_cond - w * eps_uncond


def classifier_free(predict: Callable[[Array, Array, Array], Array], y: Any, w: float, null: Any) -> Model:
    """A model(x, t): (1+w)·predict(x, t, y) − w·predict(x, t, null), both in one batch of 2B. Eq: S0-E37, S3-E14.

    y: an int or (B, …), the conditions of the samples; ``null``: the condition that stands for none, a number or an array that
    broadcasts to y. At w = 0 only the conditional half runs and at w = −1 only the unconditional one. Any linear prediction
    (ε, x0, v, score) may be guided so. Raises ValueError where y does not match the batch.
    """

    def model(x: Array, t: Array) -> Array:
        xn, tn, yn = native(x), native(t), native(y)
        xp = array_module(xn)
        batch = xn.shape[0]
        cond = xp.asarray(yn)
        cond = xp.full(batch, int(cond), np.int64) if cond.ndim == 0 else cond
        if cond.shape[0] != batch:
            raise ValueError(f"y must be one condition or {batch} of them (the batch), not shape {cond.shape}")
        uncond = xp.empty_like(cond)
        uncond[...] = xp.asarray(native(null))
        if w == 0:
            return predict(x, t, restore(cond, x))
        if w == -1:
            return predict(x, t, restore(uncond, x))
        both = predict(*(restore(xp.concatenate(pair), x) for pair in ((xn, xn), (tn, tn), (cond, uncond))))
        out = native(both)
        if np.shape(out)[:1] != (2 * batch,):
            raise ValueError(f"predict must return {2 * batch} samples for the doubled batch, not shape {np.shape(out)}")
        return restore(classifier_free_eps(out[:batch], out[batch:], w), both)

    return model


@exchanged
def drop_condition(y: Array, null: Any, p: float, seed: int = 0, step: int = 0) -> Array:
    """``y`` (B, …) with each condition replaced by ``null`` with probability p, for classifier-free training. Eq: S3-C11.

    Which are dropped depends on (seed, step, place in the batch) alone. Raises ValueError unless 0 ≤ p ≤ 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], not {p}")
    xp = array_module(y)
    dropped = xp.asarray(counter.uniform(y.shape[0], seed, step, streams.DROP) < p)
    return xp.where(dropped.reshape(-1, *(1,) * (y.ndim - 1)), xp.asarray(null, dtype=y.dtype), y)


@exchanged
def classifier_guided_eps(eps: Array, gradient: Array, t: Any, s: Levels, w: float = 1.0) -> Array:
    """ε̃ = ε − w·√(1−ᾱ_t)·∇_x log p(c|x_t), t an int or (B,) in 0..T. Eq: S0-E33, S3-C10.

    ``gradient`` is that of a classifier trained on noisy x_t. With the conditional ε, w is w + 1 with the unconditional.
    """
    return eps - w * level_columns(s, t, eps)[1] * gradient


@exchanged
def implicit_classifier_score(eps_cond: Array, eps_uncond: Array, t: Any, s: Levels) -> Array:
    """∇_x log p(c|x_t) = ∇ log p(x_t|c) − ∇ log p(x_t) = −(ε_c − ε_u)/√(1−ᾱ_t), t in 1..T. Eq: S0-E34, S0-E36."""
    return score_from_eps(eps_cond - eps_uncond, t, s)
