"""Learned variance of the reverse steps: its range, its loss, sampling with it, and times and weights that help its training.

The network answers with twice the channels (…, 2C): the prediction (ε, x0, v or the score) and v, which places the logarithm of
the variance of each element between the two choices of Ho et al. 2020, ln β̃ and ln β. Source: Nichol & Dhariwal 2021.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import counter, streams
from ..kernels.arrays import array_module, native, restore, to_numpy
from . import samplers, tables
from .convert import coefficients
from .decoder import log_normal_mass
from .exchange import Array, check_schedule, check_times, column, exchanged, lift
from .levels import Levels, Tabulated, step_variance
from .losses import weighted_loss

VALUES = 256
LAMBDA = 1e-3


# ------------------------------------------------------------------------------------------------------------------------ range


def variance_range(s: Levels, grid: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """(ln β̃, ln β) of each step of ``grid``, ascending times in (0, T], by default 1..T of a table. Eq: S0-E28, S1-C9, S3-C5.

    Float64 of length S+1, index 0 (clean data) 0. β̃ of the lowest step is 0, so its logarithm is clipped to that of the next one
    (to ln β where there is only one). Of a sub-sequence β is 1 − ᾱ_t/ᾱ_to, and what was learned for T steps serves for S.
    """
    check_schedule(s)
    if grid is None:
        if not isinstance(s, Tabulated):
            raise ValueError("grid must be given, ascending times: this process has no steps to count")
        grid = np.arange(1, s.T + 1)
    a, n = s.levels(np.r_[0.0, np.asarray(grid, np.float64)])
    upper = step_variance(a[1:], n[1:], a[:-1], n[:-1])
    if not np.all(upper > 0):
        raise ValueError("grid must ascend strictly within (0, T]")
    lower = (n[:-1] / n[1:]) ** 2 * upper
    lower[0] = lower[1] if lower.size > 1 else upper[0]
    return np.r_[0.0, np.log(lower)], np.r_[0.0, np.log(upper)]


@exchanged
def range_log_variance(v: Array, t: Any, s: Tabulated) -> Array:
    """ln Σ = v·ln β_t + (1−v)·ln β̃_t of each element; v (B, …), t an int or (B,) in 1..T. Eq: S0-E19, S1-E17.

    v is not confined to [0, 1]. Published code's output is 2v − 1. Source: Nichol & Dhariwal 2021, Eq. 15.
    """
    low, high = (column(ln, t, v, 1) for ln in variance_range(s))
    return v * high + (1 - v) * low


def split(output: Array) -> tuple[Array, Array]:
    """(prediction, v) of a network's answer (B, …, 2C). Raises ValueError for an odd number of channels."""
    if len(output.shape) < 2 or output.shape[-1] % 2:
        raise ValueError(f"output must have shape (B, …, 2C), the prediction and v, not {tuple(output.shape)}")
    half = output.shape[-1] // 2
    return output[..., :half], output[..., half:]


# ------------------------------------------------------------------------------------------------------------------------- loss


@exchanged
def vlb_loss(
    output: Array,
    target: Array,
    t: Any,
    s: Tabulated,
    prediction: str = "eps",
    x0: Array | None = None,
    weight: Any = None,
    stop_mean: bool = False,
) -> tuple[Array, Array]:
    """(L_{t−1}/d of every sample, nats; gradient of the batch mean), Σ_θ by its range. Eq: S0-E25, S0-E26, S1-E11, S1-E8.

        t ≥ 2: KL(q(x_{t−1}|x_t, x_0)‖N(μ_θ, Σ)) = ½ Σ_i (β̃/Σ_i + δ_i²/Σ_i − 1 − ln β̃/Σ_i),    δ = μ̃ − μ_θ = k_t·(target − m)
        t = 1: −log p_θ(x_0|x_1) with mean x̂_0 and variance Σ

    output (B, …, 2C) float, m and v; target (B, …, C) what m predicts, "eps", "x0", "v" or "score" by ``prediction``
    (:func:`forward.training_target`); t (B,) or an int, in 1..T.

    x0: (B, …, C) 8-bit data in [−1, 1]; given, the probability of their 1/255 cells counts at t = 1 (:mod:`decoder`), else the
        density.
    weight: None, a number or (B,), e.g. 1/(T·p_t) of :class:`ImportanceTimes`. T·value·weight has the mean L_vlb/d.
    stop_mean: no gradient through μ_θ, as in :func:`hybrid_loss`.
    """
    mean, v = split(output)
    if mean.shape != target.shape or output.dtype != target.dtype or output.dtype.kind != "f":
        wanted = f"{output.dtype} {mean.shape}: half of the channels of output"
        raise ValueError(f"target is {target.dtype} {target.shape}, want {wanted}")
    if x0 is not None and x0.shape != target.shape:
        raise ValueError(f"x0 has shape {x0.shape}, want {target.shape}")
    xp, batch = array_module(output), len(output)
    d = int(np.prod(target.shape[1:]))
    if batch * d == 0:
        raise ValueError(f"output must not be empty, but has shape {output.shape}")
    t = check_times(t, 1, s.T, batch)
    low, high = (column(ln, t, mean, 1) for ln in variance_range(s))
    gain = column(_gain(s, prediction), t, mean, 1)
    log_var = v * high + (1 - v) * low
    delta = gain * (target - mean)
    square, ratio = delta**2 * xp.exp(-log_var), xp.exp(low - log_var)
    value = 0.5 * (ratio + square - 1 + log_var - low)  # of each element
    by_log_var = 0.5 * (1 - ratio - square)
    by_delta = delta * xp.exp(-log_var)
    first = np.flatnonzero(np.broadcast_to(to_numpy(t), batch) == 1)
    if first.size:
        clean = None if x0 is None else to_numpy(x0[first])
        parts = _decoder(to_numpy(delta[first]), to_numpy(log_var[first]), clean)
        for whole, part in zip((value, by_log_var, by_delta), parts, strict=True):
            whole[first] = xp.asarray(part.astype(output.dtype))
    if np.ndim(weight) > 1 or (np.ndim(weight) == 1 and len(weight) != batch):
        raise ValueError(f"weight must be a number or have shape ({batch},), not {np.shape(weight)}")
    scale = lift(1.0 if weight is None else weight, mean)
    gradient = xp.empty_like(output)
    of_mean, of_v = split(gradient)
    of_mean[...] = 0 if stop_mean else by_delta * (-gain * scale / (batch * d))
    of_v[...] = by_log_var * (high - low) * (scale / (batch * d))
    values = value.reshape(batch, -1).mean(axis=1)
    return values if weight is None else lift(weight, values) * values, gradient


def _gain(s: Tabulated, prediction: str) -> np.ndarray:
    """k_t, t = 0..T: μ̃ − μ_θ = k_t·(target − prediction)."""
    _, on_output = coefficients(prediction, "x0", s.signal[1:], s.noise[1:])
    return np.r_[0.0, s.signal[:-1] * s.beta[1:] / s.noise_variance[1:] * on_output]


def _decoder(delta: np.ndarray, log_var: np.ndarray, x0: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(−log p(x_0), its derivatives by ln Σ and by δ) of each element, δ = x_0 − mean; p a density or of 8-bit cells."""
    delta, log_var = delta.astype(np.float64), log_var.astype(np.float64)
    if x0 is None:
        square = delta**2 * np.exp(-log_var)
        return 0.5 * (square + log_var + np.log(2 * np.pi)), 0.5 * (1 - square), delta * np.exp(-log_var)
    half, std = 1 / (VALUES - 1), np.exp(0.5 * log_var)
    low = np.where(x0 < -1 + half, -np.inf, (delta - half) / std)
    high = np.where(x0 > 1 - half, np.inf, (delta + half) / std)
    log_p = log_normal_mass(low, high)
    dense_low, dense_high = (np.exp(-(z**2) / 2 - log_p) / np.sqrt(2 * np.pi) for z in (low, high))
    moment_low, moment_high = (np.where(np.isinf(z), 0.0, z) * dense for z, dense in ((low, dense_low), (high, dense_high)))
    return -log_p, 0.5 * (moment_high - moment_low), -(dense_high - dense_low) / std


@exchanged
def hybrid_loss(
    output: Array,
    target: Array,
    t: Any,
    s: Tabulated,
    prediction: str = "eps",
    x0: Array | None = None,
    weight: Any = None,
    simple_weight: Any = None,
    lam: float = LAMBDA,
) -> tuple[Array, Array]:
    """(mean|target − prediction|² + λ·T·L_{t−1}/d of every sample, gradient of the batch mean). Eq: S0-E44, S1-E22, S1-C9.

    The bound teaches Σ_θ only: no gradient of it goes through μ_θ. Its terms are nats per element (published code counts bits, so
    that its λ is this one times ln 2). Arguments as for :func:`vlb_loss`; ``weight`` multiplies the whole, ``simple_weight`` the
    first term (:func:`losses.p2_weight`, :func:`losses.min_snr_weight`). Source: Nichol & Dhariwal 2021, Eq. 16.
    """
    mean, _ = split(output)
    value, gradient = vlb_loss(output, target, t, s, prediction, x0, weight, stop_mean=True)
    if weight is not None:
        weight = array_module(output).asarray(weight)
        simple_weight = weight if simple_weight is None else weight * array_module(output).asarray(simple_weight)
    simple, of_mean = weighted_loss(mean, target, simple_weight)
    gradient *= lam * s.T
    split(gradient)[0][...] = of_mean
    return simple + (lam * s.T) * value, gradient


# --------------------------------------------------------------------------------------------------------------------- sampling


def sample_learned(
    model: Callable[[Array, Array], Array],
    s: Levels,
    x_T: Array,
    steps: int | None = None,
    spacing: str = "leading",
    grid: Sequence[float] | np.ndarray | None = None,
    prediction: str = "eps",
    seed: int = 0,
    noise: Array | None = None,
    clip: tuple[float, float] | None = None,
    first_sample: int = 0,
    guidance: Callable[[Array, Array], Array] | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Array:
    """Ancestral sampling with the network's own variance: x' ~ N(μ_θ, Σ_θ), no noise in the last step. Eq: S1-E17, S0-E19.

    model(x, t) returns (B, …, 2C) for x (B, …, C). Steps and times as in :func:`tables.ddpm`, the other arguments as in
    :func:`samplers.sample`, with the same noise: v = 0 everywhere is :func:`tables.ddpm` with variance "posterior", v = 1 is that
    with "beta".

    guidance: guidance(x, t) = w·∇_x log p(c|x_t) at the state, in the mean form μ_θ + Σ_θ·guidance (Dhariwal & Nichol 2021,
        Algorithm 1); :func:`guidance.mean_guided` is that of tables. Eq: S4-E23.
    """
    rows = tables.ddpm(s, steps, variance="posterior", spacing=spacing, grid=grid, prediction=prediction)
    table = replace(rows, name=f"learned({rows.name})", c=np.zeros(len(rows)), excess=rows.excess - rows.c**2)
    low, high = (ln[:0:-1] for ln in variance_range(s, rows.t[::-1]))
    given = None if noise is None else native(noise)
    log_var: Array = None
    shift: Array = None
    row = 0

    def mean_of(x: Array, t: Array) -> Array:
        nonlocal log_var, shift
        state, out = native(x), native(model(x, t))
        want = (*state.shape[:-1], 2 * state.shape[-1])
        if getattr(out, "shape", None) != want:
            raise ValueError(f"model must return the prediction and v, {want}, not {getattr(out, 'shape', type(out).__name__)}")
        mean, v = split(out)
        log_var = v * float(high[row]) + (1 - v) * float(low[row])
        shift = None if guidance is None else native(guidance(x, t))
        return restore(array_module(mean).ascontiguousarray(mean), x)

    def noised(x: Array, i: int) -> Array:
        nonlocal row
        row = i
        if i == 0:
            return x
        state = native(x)
        xp = array_module(state)
        if given is None:
            z = kernels.normals(xp.empty_like(state), seed, i - 1, streams.SAMPLER, first_sample)
        else:
            z = given[i - 1]
        moved = state + xp.exp(0.5 * log_var) * z
        return restore(moved if shift is None else moved + xp.exp(log_var) * shift, x)

    return samplers.sample(mean_of, table, x_T, clip=clip, progress=progress, before=noised)


# ---------------------------------------------------------------------------------------------------------------- which times


class ImportanceTimes:
    """Training times drawn with p_t ∝ √E[L_t²] of the last losses at each t, a share of them uniformly. Eq: S0-E45.

    T: times are 1..T. history: losses kept for each time; until every time has that many, times are uniform. uniform: the share
    that is drawn uniformly always. The whole state is two arrays, ``losses`` (T, history), oldest first, and ``counts`` (T,):
    with them and (seed, step) a run goes on as it would have. Source: Nichol & Dhariwal 2021, Eq. 18.
    """

    def __init__(self, T: int, history: int = 10, uniform: float = 1e-3) -> None:
        if T < 1 or history < 1:
            raise ValueError(f"T and history must be at least 1, not {T} and {history}")
        if not 0 <= uniform <= 1:
            raise ValueError(f"uniform must be in [0, 1], not {uniform}")
        self.uniform = uniform
        self.losses = np.zeros((T, history))
        self.counts = np.zeros(T, np.int64)

    @property
    def warm(self) -> bool:
        """Whether every time has its history."""
        return bool(np.all(self.counts == self.losses.shape[1]))

    @property
    def probabilities(self) -> np.ndarray:
        """p_t, t = 1..T, (T,)."""
        T = len(self.counts)
        root = np.sqrt((self.losses**2).mean(axis=1))
        if not self.warm or not root.sum() > 0:
            return np.full(T, 1 / T)
        return (1 - self.uniform) * root / root.sum() + self.uniform / T

    def times(self, n: int, seed: int = 0, step: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(t, weight) of n samples: int64 in 1..T and 1/(T·p_t), whose product with L_t has the mean of L over all times.

        From (seed, step) and the state alone; before it is warm they are those of :func:`forward.random_times`.
        """
        p = self.probabilities
        u = counter.uniform(n, seed, step, streams.TIMES)
        if np.all(p == p[0]):
            t = 1 + np.floor(u * p.size).astype(np.int64)
        else:
            total = np.cumsum(p)
            t = 1 + np.searchsorted(total / total[-1], u, side="right")
        return t, 1 / (p.size * p[t - 1])

    def update(self, t: Any, losses: Any) -> None:
        """Take in the losses (B,) of times t (B,), unweighted: the terms L_{t−1} of :func:`vlb_loss`, say."""
        t, values = to_numpy(t), np.asarray(to_numpy(losses), np.float64)
        if t.shape != values.shape or t.ndim != 1:
            raise ValueError(f"t and losses must both have shape (B,), not {t.shape} and {values.shape}")
        check_times(t, 1, len(self.counts))
        if not np.isfinite(values).all():
            raise ValueError("losses must be finite")
        for k, value in zip(t - 1, values, strict=True):
            if self.counts[k] == self.losses.shape[1]:
                self.losses[k, :-1] = self.losses[k, 1:]
                self.losses[k, -1] = value
            else:
                self.losses[k, self.counts[k]] = value
                self.counts[k] += 1

    def state(self) -> dict[str, np.ndarray]:
        """Copies of the arrays of the state, to be saved."""
        return {"losses": self.losses.copy(), "counts": self.counts.copy()}

    def load_state(self, arrays: Mapping[str, Any]) -> None:
        """Take up a saved state. Raises ValueError where an array does not fit."""
        for name in ("losses", "counts"):
            own, given = getattr(self, name), np.asarray(arrays[name])
            if given.shape != own.shape or given.dtype != own.dtype:
                raise ValueError(f"{name} is {given.dtype} {given.shape}, want {own.dtype} {own.shape}")
        counts = np.asarray(arrays["counts"])
        if counts.min() < 0 or counts.max() > self.losses.shape[1]:
            raise ValueError(f"counts must be in 0..{self.losses.shape[1]}")
        self.losses, self.counts = np.array(arrays["losses"]), np.array(counts)
