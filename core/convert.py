"""The algebra of what a network may predict: ε, x0, v = √ᾱ·ε − √(1−ᾱ)·x0, and the score −ε/√(1−ᾱ).

Given x = signal·x0 + noise·ε, each is linear in x and any other; :func:`coefficients` holds all sixteen conversions.
"""

from typing import Any

import numpy as np

from .exchange import Array, check_times, column, exchanged, level_columns, lift, real_times
from .levels import Levels, Tabulated

PREDICTIONS = ("eps", "x0", "v", "score")


def coefficients(source: str, target: str, signal: Any, noise: Any) -> tuple[np.ndarray, np.ndarray]:
    """(P, Q), float64, with target = P·x + Q·source at these levels. Eq: S0-U2, S1-E13, S2-E9, S0-P9.

    A quantity z = z0·x0 + zε·ε is found from x and m by the two equations P·signal + Q·m0 = z0, P·noise + Q·mε = zε.
    Raises ValueError at a level where x and the source do not determine the target: x0 from ε where signal = 0, ε from x0
    where noise = 0.
    """
    for name, value in (("source", source), ("target", target)):
        if value not in PREDICTIONS:
            raise ValueError(f"{name} must be one of {PREDICTIONS}, not {value!r}")
    a, s = np.broadcast_arrays(np.asarray(signal, np.float64), np.asarray(noise, np.float64))
    if source == target:
        return np.zeros_like(a), np.ones_like(a)
    zero, one = np.zeros_like(a), np.ones_like(a)
    forms = {"x0": (one, zero), "eps": (zero, one), "v": (-s, a), "score": (zero, one)}  # the score is ε·(−1/s)
    (m0, me), (z0, ze) = forms[source], forms[target]
    if m0 is z0:
        P, Q = zero, one
    else:
        det = a * me - s * m0
        if np.any(det == 0):
            level = "noise" if source == "x0" else "signal"
            raise ValueError(f"{target} cannot be found from {source} where the {level} level is 0")
        P, Q = (z0 * me - ze * m0) / det, (a * ze - s * z0) / det
    if source == "score":
        Q = -s * Q
    if target == "score":
        if np.any(s == 0):
            raise ValueError("the score does not exist where the noise level is 0")
        P, Q = -P / s, -Q / s
    return P, Q


@exchanged
def convert(value: Array, x_t: Array, t: Any, s: Levels, source: str, target: str) -> Array:
    """``value`` (a ``source``) as a ``target``; both of "eps", "x0", "v", "score". Eq: S0-U2, S1-E13, S0-P9.

    value, x_t (B, …) of one float dtype; t an int or (B,) integers in 0..T, any numbers there where ``s`` is continuous. Raises
    ValueError where the conversion does not exist (ε from x0 and the score at t = 0; x0 from ε where ᾱ_t = 0).
    """
    if not isinstance(s, Tabulated):
        P, Q = coefficients(source, target, *s.levels(real_times(t, s, x_t.shape[0] if x_t.ndim else None)))
        return lift(P, x_t) * x_t + lift(Q, x_t) * value
    t = check_times(t, 0, s.T, x_t.shape[0] if x_t.ndim else None)
    if isinstance(t, (int, np.ndarray)):
        P, Q = coefficients(source, target, s.signal[t], s.noise[t])
        return lift(P, x_t) * x_t + lift(Q, x_t) * value
    P, Q = (np.r_[np.nan, c] for c in coefficients(source, target, s.signal[1:], s.noise[1:]))
    return column(P, t, x_t) * x_t + column(Q, t, x_t) * value


def predict_x0_from_eps(x_t: Array, eps: Array, t: Any, s: Levels) -> Array:
    """x0 = (x_t − √(1−ᾱ_t)·ε)/√ᾱ_t. Eq: S1-E13, S2-E9, S4-E17, S4-E40."""
    return convert(eps, x_t, t, s, "eps", "x0")


def predict_eps_from_x0(x_t: Array, x0: Array, t: Any, s: Levels) -> Array:
    """ε = (x_t − √ᾱ_t·x0)/√(1−ᾱ_t), t in 1..T. Eq: S0-U2."""
    return convert(x0, x_t, t, s, "x0", "eps")


def score_from_eps(eps: Array, t: Any, s: Levels) -> Array:
    """∇ log q(x_t) = −ε/√(1−ᾱ_t), t in 1..T. Eq: S0-P9, S0-C11."""
    return convert(eps, eps, t, s, "eps", "score")


def eps_from_score(score: Array, t: Any, s: Levels) -> Array:
    """ε = −√(1−ᾱ_t)·∇ log q(x_t). Eq: S0-P9, S0-C11."""
    return convert(score, score, t, s, "score", "eps")


@exchanged
def training_target(x0: Array, eps: Array, t: Any, s: Levels, prediction: str = "eps") -> Array:
    """What the network should return at x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε: ε, x0, v = √ᾱ_t·ε − √(1−ᾱ_t)·x0 or −ε/√(1−ᾱ_t)."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        a, n = level_columns(s, t, x0)
        return a * eps - n * x0
    if prediction == "score":
        return score_from_eps(eps, t, s)
    raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")
