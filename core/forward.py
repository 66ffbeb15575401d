"""The forward process: q(x_t|x_{t−1}), q(x_t|x_0), the posteriors q(x_{t−1}|x_t, x_0), and the reverse step built on them.

All functions take and return NumPy or CuPy arrays or arrays of any library with ``__dlpack__``, in their own float dtype.
Times t are an int or (B,) integers, 1..T with 0 for clean data.
"""

from typing import Any

import numpy as np

from .. import kernels
from ..kernels import counter, streams
from ..kernels.arrays import array_module, is_native
from .convert import convert, eps_from_score, predict_eps_from_x0, predict_x0_from_eps, score_from_eps, training_target
from .exchange import Array, check_schedule, check_times, column, exchanged, lift, real_times
from .levels import Levels, Tabulated, step_variance

__all__ = [
    "convert",
    "ddim_posterior",
    "ddim_sigma",
    "ddim_sigma_hat",
    "eps_from_score",
    "merge_noise",
    "p_mean_variance",
    "posterior_mean_from_eps",
    "predict_eps_from_x0",
    "predict_x0_from_eps",
    "q_posterior",
    "q_sample",
    "q_step",
    "random_times",
    "score_from_eps",
    "step_variance",
    "training_target",
]


def _noised(
    x: Array,
    t: Any,
    low: int,
    signal: np.ndarray,
    noise: np.ndarray,
    eps: Any,
    seed: int,
    step: int,
    first_sample: int,
    out: Any,
    eps_out: Any,
) -> tuple[Array, Array]:
    xp = array_module(x)
    batch = x.shape[0] if x.ndim else 1  # the kernel refuses an array without a batch axis
    t = check_times(t, low, len(signal) - 1, batch)
    t = xp.full(batch, t, np.int64) if isinstance(t, int) else xp.asarray(t)
    if is_native(eps) and eps.dtype.kind == "f" and x.dtype.kind == "f":
        eps = eps.astype(x.dtype, copy=False)
    options = {"eps": eps, "seed": seed, "step": step, "stream": streams.FORWARD, "first_sample": first_sample}
    return kernels.q_sample(x, t, xp.asarray(signal), xp.asarray(noise), out=out, eps_out=eps_out, **options)


@exchanged
def q_sample(
    x0: Array,
    t: Any,
    s: Levels,
    seed: int = 0,
    eps: Array | None = None,
    step: int = 0,
    first_sample: int = 0,
    out: Array | None = None,
    eps_out: Array | None = None,
) -> tuple[Array, Array]:
    """(x_t, ε) with x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε, or a(t)·x0 + n(t)·ε of any process.

    Eq: S0-E18, S0-U2, S0-E39, S0-E48, S1-E7, S2-E4, S3-E9, S4-E17, S0-E9, S1-E6, S2-U1, S4-E13.

    x0 (B, …) float; t an int or (B,) integers in 0..T, any numbers there where ``s`` is continuous. ε is ``eps`` (like x0) or
    drawn from (seed, step, first_sample + place in the batch). ``out`` and ``eps_out`` receive the results where given. Raises
    ValueError for a t outside 0..T, TypeError for a non-float x0.
    """
    if isinstance(s, Tabulated):
        return _noised(x0, t, 0, s.signal, s.noise, eps, seed, step, first_sample, out, eps_out)
    batch = x0.shape[0] if x0.ndim else 1
    signal, noise = s.levels(np.broadcast_to(real_times(t, s, batch), batch))
    return _noised(x0, np.arange(batch), 0, signal, noise, eps, seed, step, first_sample, out, eps_out)


@exchanged
def q_step(
    x: Array, t: Any, s: Tabulated, seed: int = 0, eps: Array | None = None, step: int | None = None, first_sample: int = 0
) -> tuple[Array, Array]:
    """(x_t, ε) from x = x_{t−1}: x_t = √α_t·x_{t−1} + √β_t·ε. Eq: S0-E17, S0-E38, S1-E1, S1-E4, S3-E1, S4-E2, S4-E12.

    ε here is the noise of this one step, not that of the map x_0 → x_t. ``step`` numbers the noise and defaults to t where t is
    an int, so that a chain of steps under one seed draws fresh noise each time; else 0.
    """
    if step is None:
        times = check_times(t, 1, s.T)
        step = times if isinstance(times, int) else 0
    return _noised(x, t, 1, np.sqrt(s.alpha), np.sqrt(s.beta), eps, seed, step, first_sample, None, None)


def random_times(n: int, s: Levels, seed: int = 0, step: int = 0) -> np.ndarray:
    """n training times that depend on (seed, step) alone. Eq: S1-A1, S4-A1.

    t ~ U{1..T}, int64, for a table; t ~ U[t_min, T), float64, for a continuous process (Eq: S4-E68).
    """
    check_schedule(s)
    if n < 0:
        raise ValueError(f"n must not be negative, not {n}")
    if not isinstance(s, Tabulated):
        return s.t_min + (s.T - s.t_min) * counter.uniform(n, seed, step, streams.TIMES)
    return counter.integers(n, 1, s.T + 1, seed, step, streams.TIMES)


def merge_noise(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    """Two steps y = a₁x + s₁ε₁, z = a₂y + s₂ε₂ in one: (a₁a₂, √(a₂²s₁² + s₂²)); its ε is new. Eq: S1-E5, S3-E3, S3-E4, S4-E70."""
    (a1, s1), (a2, s2) = first, second
    return a1 * a2, float(np.hypot(a2 * s1, s2))


@exchanged
def q_posterior(x0: Array, x_t: Array, t: Any, s: Tabulated) -> tuple[Array, Any]:
    """(μ̃_t, β̃_t): the mean and the variance of q(x_{t−1}|x_t, x_0), t in 1..T.

    Eq: S0-E28, S1-E10, S1-E12, S3-E5, S3-E7, S4-E14, S4-E33, S4-E71.

        μ̃_t = √ᾱ_{t−1}·β_t/(1−ᾱ_t)·x0 + √α_t·(1−ᾱ_{t−1})/(1−ᾱ_t)·x_t,   β̃_t = (1−ᾱ_{t−1})/(1−ᾱ_t)·β_t

    The variance is a float for an int t and (B, 1, …) for (B,) times.
    """
    rest = s.noise_variance
    on_x0 = np.r_[0.0, s.signal[:-1] * s.beta[1:] / rest[1:]]
    on_x = np.r_[0.0, np.sqrt(s.alpha[1:]) * rest[:-1] / rest[1:]]
    return column(on_x0, t, x_t, 1) * x0 + column(on_x, t, x_t, 1) * x_t, column(s.beta_tilde, t, x_t, 1)


@exchanged
def posterior_mean_from_eps(x_t: Array, eps: Array, t: Any, s: Tabulated) -> Array:
    """μ = 1/√α_t·(x_t − β_t/√(1−ᾱ_t)·ε), t in 1..T. Eq: S0-E28, S0-E29, S1-E14, S1-E16, S3-E8, S4-E74, S1-E15, S4-E73.

    ε is the noise of the whole map x_0 → x_t, not that of step t.
    """
    last = s.T + (s.alpha[-1] > 0)  # where α_T = 0 the mean does not follow from ε
    root = np.sqrt(s.alpha[:last])
    on_eps = np.r_[0.0, -s.beta[1:last] / (root[1:] * s.noise[1:last])]
    return column(1 / root, t, x_t, 1) * x_t + column(on_eps, t, x_t, 1) * eps


@exchanged
def p_mean_variance(
    output: Array,
    x_t: Array,
    t: Any,
    s: Tabulated,
    prediction: str = "eps",
    variance: str = "posterior",
    clip: tuple[float, float] | None = None,
) -> tuple[Array, Any]:
    """(μ_θ, σ_t²) of p_θ(x_{t−1}|x_t): the posterior at the predicted x0. Eq: S0-E19, S0-E29, S1-E9, S4-E15, S3-C5.

    ``output`` is the network's answer of the kind ``prediction``; ``variance`` "posterior" gives β̃_t (right for a point mass),
    "beta" gives β_t (right for N(0, I) data): two choices of Ho et al. 2020, section 3.2. ``clip`` bounds the predicted x0.
    """
    values = {"posterior": s.beta_tilde, "beta": s.beta}
    if variance not in values:
        raise ValueError(f"variance must be 'posterior' or 'beta', not {variance!r}")
    x0 = convert(output, x_t, t, s, prediction, "x0")
    if clip is not None:
        x0 = array_module(x0).clip(x0, *clip)
    mean, _ = q_posterior(x0, x_t, t, s)
    return mean, column(values[variance], t, x_t, 1)


# ------------------------------------------------------------------------------------------------------------------------- DDIM


def ddim_sigma(t: Any, t_to: Any, s: Levels, eta: float = 1.0) -> Any:
    """σ = η·√((1−ᾱ_to)/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_to), the noise of the step t → t_to < t. Eq: S0-U1, S2-U3, S2-E16, S3-E13, S4-E48.

    η multiplies the standard deviation (some code has it multiply the variance: there η means the square of this one). η = 1 on
    neighbouring times is √β̃_t. Times in 0..T, arrays or numbers; float64.
    """
    check_schedule(s)
    (_, noise), (_, noise_to) = s.levels(t), s.levels(t_to)
    return eta * (noise_to / noise) * ddim_sigma_hat(t, t_to, s)


def ddim_sigma_hat(t: Any, t_to: Any, s: Levels) -> Any:
    """σ̂ = √(1−ᾱ_t/ᾱ_to), larger than σ(η = 1). Eq: S2-U5."""
    check_schedule(s)
    levels = (*s.levels(t), *s.levels(t_to))
    if np.any(np.greater(t_to, t)):
        raise ValueError(f"t_to must not be above t = {t}, not {t_to}")
    return np.sqrt(step_variance(*levels))


@exchanged
def ddim_posterior(x0: Array, x_t: Array, t: Any, t_to: Any, s: Tabulated, sigma: float) -> tuple[Array, float]:
    """(mean, σ²) of q_σ(x_to|x_t, x_0). Eq: S0-E41, S2-E7, S3-E11, S3-E12, S4-E38, S4-E45, S4-E34.

        mean = √ᾱ_to·x0 + √(1−ᾱ_to−σ²)·(x_t − √ᾱ_t·x0)/√(1−ᾱ_t)

    t in 1..T and t_to < t are ints. Raises ValueError for others, and unless 0 ≤ σ² ≤ 1−ᾱ_to.
    """
    t, t_to = check_times(t, 1, s.T), check_times(t_to, 0, s.T)
    if not (isinstance(t, int) and isinstance(t_to, int) and t_to < t):
        raise ValueError(f"t and t_to must be ints, t_to below t, not {t} and {t_to}")
    rest = s.noise_variance[t_to] - sigma**2
    if sigma < 0 or rest < 0:
        raise ValueError(f"sigma must be in 0..{s.noise[t_to]:.6g} (the noise level at t_to = {t_to}), not {sigma}")
    eps = predict_eps_from_x0(x_t, x0, t, s)
    return lift(s.signal[t_to], x0) * x0 + lift(np.sqrt(rest), x0) * eps, float(sigma**2)
