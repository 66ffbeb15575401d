"""The training loss of discrete diffusion with its gradient, the same term without one for the bound, and training times.

Logits (B, …, D) are a network's unnormalised log p̃(x_0|x_t) of the states 0..D−1; the others (a mask) have probability 0. Terms
are nats. Uniform and absorbing laws cost O(K) an element, every other law what its ``log_push`` and ``pull`` cost.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import counter, streams
from ..kernels.arrays import array_module, is_native, to_numpy
from .categorical import kl, log_prob, log_softmax, normalised, states
from .discrete_rows import fused, rows_of, without_mask
from .exchange import Array, check_times, exchanged, flat
from .transition import FLOATS, check_law
from .transitions import Absorbing, Transitions, Uniform

TINY = 1e-300  # stands for a probability of 0 in a divisor or a logarithm, where its weight is 0 too
FLOOR = -690.0  # and its logarithm

Result = tuple[Array, Any]  # the term of every element (N,) float64, and its gradient (N, D) or None


def stratified_times(n: int, T: int, seed: int = 0, step: int = 0) -> np.ndarray:
    """n training times (n,) int64 in 1..T that fill the range evenly, from one uniform number of (seed, step).

        t_i = 1 + ⌊T·((u + i/n) mod 1)⌋,    u ~ U[0, 1)

    Each t_i alone is uniform on 1..T, so a batch mean stays unbiased, and its variance falls: every stretch of times gets its
    share of the batch, up to one. Source: Kingma et al. 2021, appendix I.1.
    """
    if n < 0 or T < 1:
        raise ValueError(f"n must not be negative and T must be at least 1, not {n} and {T}")
    u = counter.uniform(1, seed, step, streams.TIMES)[0]
    place = (u + np.arange(n) / max(n, 1)) % 1.0
    return np.minimum(1 + np.floor(T * place).astype(np.int64), T)


@exchanged
def hybrid_loss(
    logits: Array, x0: Array, x_t: Array, t: Any, law: Transitions, cross_entropy: float = 0.0
) -> tuple[Array, Array]:
    """(T·(L_t + λ·CE) of each sample (B,), gradient of the batch mean with respect to the logits). Eq: L9, S4-E28, S4-E29.

        L_t = KL(q(x_{t−1}|x_t, x_0)‖p_θ(x_{t−1}|x_t)), t ≥ 2;    −log p_θ(x_0|x_1), t = 1;    CE = −log p̃(x_0|x_t)

    Means over the elements of a sample, nats; λ = ``cross_entropy``. With t uniform on 1..T and λ = 0 the expectation is the
    bound per element less its prior term. p_θ(x_{t−1}|x_t) ∝ Σ_x̃0 q(x_{t−1}, x_t|x̃_0)·p̃(x̃_0|x_t), and p_θ(x_0|x_1) is p̃.
    In it and in CE p̃ counts on the states from which x_t can come: so an element that the absorbing law has not masked, which
    shows its x_0, has no loss and no gradient.

    The best p̃ for L_t, t ≥ 2, is an element's law given the other elements of x_t: its own x_t counts in q. CE and t = 1 ask for
    the law given all of x_t. Where all x̃0 lead to x_t with one chance, as under a mask, the two are the same.

    logits (B, …, D) float32 or float64, D ≤ K; x0, x_t (B, …) integers, x_t possible from x0; t an int or (B,) in 1..T. Raises
    ValueError or TypeError where they do not match. Source: Austin et al. 2021, Eq. 5; Hoogeboom et al. 2021.
    """
    if not 0 <= cross_entropy < np.inf:
        raise ValueError(f"cross_entropy must be 0 or positive, not {cross_entropy}")
    batch, size = check_elements(logits, x0, x_t, law)
    if batch == 0 or size == 0:
        raise ValueError(f"logits must not be empty, but has shape {logits.shape}")
    times = _per_sample(t, 1, law.T, batch)
    terms, gradient = _terms(logits, x0, x_t, times - 1, times, law, cross_entropy, law.T / (batch * size))
    return (law.T * terms.mean(axis=1)).astype(logits.dtype), gradient.reshape(logits.shape)


@exchanged
def step_kl(logits: Array, x0: Array, x_t: Array, t: Any, law: Transitions, s: Any = None) -> Array:
    """KL(q(x_s|x_t, x_0)‖p_θ(x_s|x_t)) of every element (B, …) float64 nats, 0 where p̃ is x_0. Eq: S4-E29, S4-E28, L9.

    s < t is t−1 by default; at s = 0 it is −log p_θ(x_0|x_t). Arguments as in :func:`hybrid_loss`.
    """
    batch, _ = check_elements(logits, x0, x_t, law)
    times = _per_sample(t, 1, law.T, batch)
    to = times - 1 if s is None else _per_sample(s, 0, law.T - 1, batch)
    if np.any(to >= times):
        raise ValueError(f"s must be below t = {t}, not {s}")
    terms, _ = _terms(logits.astype(np.float64, copy=False), x0, x_t, to, times, law, 0.0, None)
    return terms.reshape(x0.shape)


def check_elements(logits: Any, x0: Any, x_t: Any, law: Any) -> tuple[int, int]:
    """(B, elements a sample); TypeError or ValueError unless logits, x0 and x_t go together under ``law``."""
    check_law(law)
    if not is_native(logits) or logits.dtype.newbyteorder("=") not in FLOATS:
        raise TypeError(f"logits must be float32 or float64, not {getattr(logits, 'dtype', type(logits).__name__)}")
    if logits.ndim < 2 or not 1 <= logits.shape[-1] <= law.K:
        raise ValueError(f"logits must be (B, …, D) with D in 1..{law.K}, not of shape {logits.shape}")
    for name, x, K in (("x0", x0, logits.shape[-1]), ("x_t", x_t, law.K)):
        if states(x, K, name, 1).shape != logits.shape[:-1]:
            raise ValueError(f"{name} must have shape {logits.shape[:-1]} to go with logits, not {x.shape}")
    return logits.shape[0], int(np.prod(x0.shape[1:]))


def _per_sample(t: Any, low: int, high: int, batch: int) -> np.ndarray:
    """The times (B,) on the host, where the coefficients stand."""
    return np.broadcast_to(to_numpy(check_times(to_numpy(t), low, high, batch)), batch)


def _terms(
    logits: Array, x0: Array, x_t: Array, s: np.ndarray, t: np.ndarray, law: Transitions, lam: float, scale: float | None
) -> Result:
    """KL + λ·CE of every element (B, n), and ``scale`` times its gradient (N, D) unless ``scale`` is None."""
    batch, D = logits.shape[0], logits.shape[-1]
    logits = without_mask(logits, law)
    if not fused(law, D):
        terms, gradient = _general(logits, x0, x_t, s, t, law, lam, scale)
        return flat(terms), gradient
    path: Callable[..., Result] = _absorbing if isinstance(law, Absorbing) else _uniform
    xp, size = array_module(logits), int(np.prod(x0.shape[1:]))
    rows = xp.asarray(np.repeat(rows_of(law, s, t), size, axis=0).T)
    terms, gradient = path(logits.reshape(-1, D), x0.reshape(-1), x_t.reshape(-1), rows, law, lam, scale)
    return terms.reshape(batch, size), gradient


def _softmax(z: Array) -> tuple[Array, Array]:
    """(softmax of z (N, D), log Σ exp z (N,) float64)."""
    xp, p = array_module(z), kernels.softmax(z)
    largest = xp.arange(z.shape[0]), z.argmax(axis=1)
    return p, z[largest].astype(np.float64) - xp.log(p[largest].astype(np.float64))


def _absorbing(z: Array, x0: Array, x_t: Array, rows: Array, law: Absorbing, lam: float, scale: float | None) -> Result:
    """Of the masked elements alone: (w + λ)·(−log p̃(x_0)), w = (ᾱ_s − ᾱ_t)/(1 − ᾱ_t)."""
    xp = array_module(z)
    masked = xp.flatnonzero(x_t == law.mask)
    _, _, C, D = rows[:, masked]
    weight = C / xp.maximum(C + D, TINY) + lam
    value, of_mean = kernels.cross_entropy(z[masked], x0[masked])
    terms = xp.zeros(z.shape[0], np.float64)
    terms[masked] = weight * value
    if scale is None:
        return terms, None
    gradient = xp.zeros_like(z)
    gradient[masked] = of_mean * (scale * masked.size * weight).astype(z.dtype)[:, None]
    return terms, gradient


def _uniform(z: Array, x0: Array, x_t: Array, rows: Array, law: Uniform, lam: float, scale: float | None) -> Result:
    """With a_j = keep·[j = x_t] + spread, P_j = C·p̃_j + D and Q_j = C·[j = x_0] + D,

        KL = log(Zp/Zq) − Σ_j c_j·log(P_j/Q_j),    Zp = Σ a_j P_j,  Zq = Σ a_j Q_j,  c_j = a_j Q_j/Zq,
        ∂KL/∂p̃_j = C·g_j,    p̃_j·g_j = a_j·p̃_j/Zp − c_j·p̃_j/P_j

    where x_0 and x_t alone differ from the other states, for which c_j/P_j = spread/(Zq·(1 + p̃_j·C/D)). These two are float64.
    C = 0 where x_t shows its x_0: there is no loss.
    """
    xp, dtype = array_module(z), z.dtype
    keep, spread, C, D = rows
    p, log_total = _softmax(z)
    place = xp.arange(z.shape[0])
    log_p0 = z[place, x0] - log_total
    p0 = xp.exp(xp.maximum(log_p0, FLOOR))
    pt = xp.exp(xp.maximum(z[place, x_t] - log_total, FLOOR))
    same = x0 == x_t
    P0, Pt, Q0, Qt = C * p0 + D, C * pt + D, C + D, xp.where(same, C + D, D)
    Zp, Zq = keep * Pt + spread, xp.maximum(keep * Qt + spread, TINY)
    c0, ct = (spread + keep * same) * Q0 / Zq, xp.where(same, 0.0, (keep + spread) * Qt / Zq)

    ratio = 1 + p * xp.where(D > 0, C / xp.maximum(D, TINY), 0.0).astype(dtype)[:, None]
    ratio[place, x0] = ratio[place, x_t] = 1
    others = xp.log(ratio).sum(axis=1, dtype=np.float64)
    terms = xp.log(Zp / Zq) - spread * D / Zq * others - c0 * xp.log(P0 / Q0) - ct * xp.log(Pt / xp.maximum(Qt, TINY))
    if lam:
        terms -= xp.where(C > 0, lam * log_p0, 0.0)
    if scale is None:
        return terms, None
    g = (spread / Zp).astype(dtype)[:, None] - xp.where(D > 0, spread / Zq, 0.0).astype(dtype)[:, None] / ratio
    g *= p
    g[place, x_t] = pt * ((keep + spread) / Zp - ct / Pt)
    g[place, x0] = p0 * ((spread + keep * same) / Zp - c0 / P0)
    g -= p * g.sum(axis=1, keepdims=True)
    g *= (scale * C).astype(dtype)[:, None]
    if lam:
        p[place, x0] -= 1
        g += p * (scale * lam * (C > 0)).astype(dtype)[:, None]
    return terms, g


def _general(
    logits: Array, x0: Array, x_t: Array, s: np.ndarray, t: np.ndarray, law: Transitions, lam: float, scale: float | None
) -> Result:
    """Any law, in float64: r ∝ a·P and c ∝ a·Q; ∂KL/∂logit_k = p̃_k·Σ_j q(x_s=j|x_0=k)·(r_j − c_j)/P_j."""
    xp, D = array_module(logits), logits.shape[-1]
    log_p = log_softmax(logits.astype(np.float64, copy=False))
    lift = (-1, *(1,) * (logits.ndim - 1))
    s, t = xp.asarray(s), xp.asarray(t)
    log_a = law.log_columns(s, t, x_t)
    last = (t == 1).reshape(lift)
    log_a = xp.where(last & (log_a > -np.inf), 0.0, log_a)  # p_θ(x_0|x_1) is p̃ itself
    log_P = law.log_push(log_p, s)
    log_c, log_r = normalised(log_a + law.log_rows(0, x0, s)), normalised(log_a + log_P)
    terms = kl(log_c, log_r)
    if lam:
        possible = normalised(xp.where(law.log_columns(0, t, x_t)[..., :D] > -np.inf, log_p, -np.inf))
        terms = terms - lam * log_prob(x0, possible)
    if scale is None:
        return terms, None
    excess = xp.exp(log_r) - xp.exp(log_c)
    gradient = xp.exp(log_p) * law.pull(excess / xp.exp(xp.maximum(log_P, FLOOR)), s, D)
    gradient = xp.where((s == 0).reshape(lift), excess[..., :D], gradient)
    if lam:
        gradient += lam * (xp.exp(possible) - (xp.arange(D) == x0[..., None]))
    return terms, (scale * gradient).astype(logits.dtype)
