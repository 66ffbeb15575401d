"""The algebra of what a network may predict: ε, x0, v = √ᾱ·ε − √(1−ᾱ)·x0, the score −ε/√(1−ᾱ), and EDM's F.

Given x = signal·x0 + noise·ε, each is linear in x and any other; :func:`coefficients` holds all the conversions.

F is the raw output of a network with the preconditioning of Karras et al. 2022: x0 = c_skip·x̄ + c_out·F(c_in·x̄, c_noise), x̄ =
x/signal. It depends on σ_data, the deviation of the data: "F" means 0.5 as in the paper, "F:0.35" another. :func:`edm_model`
scales what goes into the network.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..kernels.arrays import array_module, native, restore
from .exchange import Array, check_times, column, exchanged, level_columns, lift, real_times
from .levels import Levels, Tabulated

PREDICTIONS = ("eps", "x0", "v", "score")  # and "F"
SIGMA_DATA = 0.5
Model = Callable[[Array, Array], Array]


def check_prediction(value: str, name: str = "prediction") -> float | None:
    """σ_data of a kind "F" or "F:σ_data", None for the others; ValueError for what is no kind."""
    if value in PREDICTIONS:
        return None
    if value == "F":
        return SIGMA_DATA
    try:
        kind, number = value.split(":")
        sigma_data = float(number)
    except (AttributeError, ValueError):
        kind, sigma_data = "", 0.0
    if kind != "F" or not 0 < sigma_data < np.inf:
        raise ValueError(f"{name} must be one of {PREDICTIONS} or 'F', 'F:sigma_data', not {value!r}")
    return sigma_data


def coefficients(source: str, target: str, signal: Any, noise: Any) -> tuple[np.ndarray, np.ndarray]:
    """(P, Q), float64, with target = P·x + Q·source at these levels. Eq: S0-U2, S1-E13, S2-E9, S0-P9.

    A quantity z = z0·x0 + zε·ε is found from x and m by the two equations P·signal + Q·m0 = z0, P·noise + Q·mε = zε.
    Raises ValueError at a level where x and the source do not determine the target: x0 from ε where signal = 0, ε from x0
    where noise = 0.
    """
    sigma_data = {value: check_prediction(value, name) for name, value in (("source", source), ("target", target))}
    a, s = np.broadcast_arrays(np.asarray(signal, np.float64), np.asarray(noise, np.float64))
    if source == target:
        return np.zeros_like(a), np.ones_like(a)
    zero, one = np.zeros_like(a), np.ones_like(a)
    forms = {"x0": (one, zero), "eps": (zero, one), "v": (-s, a), "score": (zero, one)}  # the score is ε·(−1/s)
    for kind, deviation in sigma_data.items():
        if deviation is not None:
            root = np.hypot(s, a * deviation)
            forms[kind] = (s / (deviation * root), -a * deviation / root)
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


def combined(P: Any, x: Array, Q: Any, m: Array) -> Array:
    """P·x + Q·m for numbers of :func:`coefficients`, in the dtype of the arrays; where P is 0 x is not read."""
    return float(Q) * m if P == 0 else float(P) * x + float(Q) * m


@exchanged
def convert(value: Array, x_t: Array, t: Any, s: Levels, source: str, target: str) -> Array:
    """``value`` (a ``source``) as a ``target``; both of "eps", "x0", "v", "score", "F". Eq: S0-U2, S1-E13, S0-P9.

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
    """What the network should return at x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε: ε, x0, v = √ᾱ_t·ε − √(1−ᾱ_t)·x0, −ε/√(1−ᾱ_t) or EDM's F."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        a, n = level_columns(s, t, x0)
        return a * eps - n * x0
    if prediction == "score":
        return score_from_eps(eps, t, s)
    check_prediction(prediction)
    a, n = level_columns(s, t, x0)
    return convert(eps, a * x0 + n * eps, t, s, "eps", prediction)


# ------------------------------------------------------------------------------------------------------------ preconditioning


class Preconditioning(NamedTuple):
    """What surrounds a network F so that its input and its target have deviation 1 at every σ̄: Karras et al. 2022, Table 1."""

    skip: Any  # σ_d²/(σ² + σ_d²)
    out: Any  # σ·σ_d/√(σ² + σ_d²)
    into: Any  # 1/√(σ² + σ_d²)
    noise: Any  # ln(σ)/4, the time that F is told
    weight: Any  # 1/out², the weight of ‖D − x0‖² in the loss that makes ‖F − target‖² uniform


def preconditioning(sigma: Any, sigma_data: float = SIGMA_DATA) -> Preconditioning:
    """D(x̄, σ) = skip·x̄ + out·F(into·x̄, noise) at the noise levels ``sigma`` > 0, float64. Source: Karras et al. 2022, sec. 5."""
    sigma = np.asarray(sigma, np.float64)
    if not np.all(sigma > 0):
        raise ValueError("sigma must be positive")
    if not 0 < sigma_data < np.inf:
        raise ValueError(f"sigma_data must be positive and finite, not {sigma_data}")
    square = sigma**2 + sigma_data**2
    out = sigma * sigma_data / np.sqrt(square)
    return Preconditioning(sigma_data**2 / square, out, 1 / np.sqrt(square), np.log(sigma) / 4, 1 / out**2)


def edm_model(network: Model, s: Levels, sigma_data: float = SIGMA_DATA) -> Model:
    """The model of a network F of EDM for samplers on ``s``: model(x, t) = F(c_in·x/a, ln(σ̄)/4), of the kind "F".

    ``network(x, c_noise)`` gets c_noise (B,) in the dtype of x. Tables for it are built with ``prediction="F"``, or
    ``f"F:{sigma_data}"`` for another σ_data than 0.5; the skip and the scale of the output are then part of their rows. The
    process is that of the network's training, ``EDM()`` of :mod:`alphabar.core.sde`, or any other: only σ̄ counts.
    """

    def model(x: Array, t: Array) -> Array:
        state = native(x)
        a, n = s.levels(real_times(t, s, state.shape[0]))
        around = preconditioning(n / a, sigma_data)
        xp = array_module(state)
        scaled = lift(around.into / a, state) * state
        told = xp.asarray(np.broadcast_to(around.noise, state.shape[:1])).astype(state.dtype)
        return network(restore(scaled, x), restore(told, x))

    return model
