"""Training losses. Each returns (value of every sample (B,), gradient of their batch mean with respect to the network output).

A value is the mean over the elements of a sample (the papers' ‖·‖² divided by the number of elements), so that it does not grow
with the image.
"""

from typing import Any

import numpy as np

from .. import kernels
from ..kernels.arrays import array_module, restore
from .exchange import Array, check_times, exchanged, flat
from .forward import ddim_sigma
from .levels import Tabulated


@exchanged
def weighted_loss(output: Array, target: Array, weight: Any = None) -> tuple[Array, Array]:
    """(w·mean|output − target|² per sample, its gradient 2w(output − target)/(B·d)). Eq: S0-E30, S0-E45, S1-E21, S2-E5.

    output, target (B, …) of one shape and float dtype, d elements a sample; ``weight`` None, a number or (B,), for instance
    ``eps_loss_weight(t, s)``. Raises ValueError or TypeError where the two do not match.
    """
    if output.shape != target.shape or output.ndim < 1:
        raise ValueError(f"output has shape {output.shape}, want {target.shape} to go with target")
    if output.dtype != target.dtype or output.dtype.kind != "f":
        raise TypeError(f"output is {output.dtype}, target is {target.dtype}: want one float dtype")
    batch = output.shape[0]
    if output.size == 0:
        raise ValueError(f"output must not be empty, but has shape {output.shape}")
    if weight is None:
        return kernels.squared_error(output, target)
    if np.ndim(weight) > 1 or (np.ndim(weight) == 1 and len(weight) != batch):
        raise ValueError(f"weight must be a number or have shape ({batch},), not {np.shape(weight)}")
    if getattr(weight, "shape", None) != (batch,) or weight.dtype != output.dtype:
        xp = array_module(output)
        weights = xp.empty(batch, output.dtype)
        weights[...] = xp.asarray(weight)
        weight = weights
    return kernels.squared_error(output, target, weight)


def simple_loss(output: Array, eps: Array) -> tuple[Array, Array]:
    """L_simple = E‖ε − ε_θ(x_t, t)‖²: weight 1 at every t. Eq: S0-E44, S1-E22, S3-E10, S4-E21, S4-E41."""
    return weighted_loss(output, eps)


def eps_loss_weight(t: Any, s: Tabulated, variance: str = "posterior") -> Any:
    """β_t²/(2σ_t²·α_t·(1−ᾱ_t)), with which ‖ε − ε_θ‖² is the term L_{t−1} of the bound.

    Eq: S0-E30, S1-E19, S1-E20, S1-E21, S4-E18, S4-E19, S4-E20, S4-E72.

    σ_t² = β̃_t ("posterior", t ≥ 2 since β̃_1 = 0) or β_t ("beta", t ≥ 1). t an int or an integer array; float64. It multiplies
    the squared norm: of the mean over d elements it makes L_{t−1}/d.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance must be 'posterior' or 'beta', not {variance!r}")
    var = s.beta_tilde if variance == "posterior" else s.beta
    low = 2 if variance == "posterior" else 1
    values = np.r_[[0.0] * low, s.beta[low:] ** 2 / (2 * var[low:] * s.alpha[low:] * s.noise_variance[low:])]
    return _at(values, t, low)


def ddim_loss_weight(t: Any, s: Tabulated, eta: float = 1.0) -> Any:
    """γ_t of the theorem L_vlb(σ) = Σ γ_t·E‖ε − ε_θ‖² + C for σ = ddim_sigma(η), t ≥ 2, η > 0. Eq: S0-E46, S0-P11, S2-C9.

        γ_t = (1−ᾱ_t)/(2σ_t²ᾱ_t)·(√ᾱ_{t−1} − √(ᾱ_t(1−ᾱ_{t−1}−σ_t²)/(1−ᾱ_t)))²

    At η = 1 it is :func:`eps_loss_weight`. (The value printed in the paper's appendix B is not this coefficient.)
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta must be in (0, 1], not {eta}")
    times = np.arange(2, s.T + 1)
    var = ddim_sigma(times, times - 1, s, eta) ** 2
    ab, rest, rest_to = s.alpha_bar[2:], s.noise_variance[2:], s.noise_variance[1:-1]
    values = rest / (2 * var * ab) * (s.signal[1:-1] - np.sqrt(ab * (rest_to - var) / rest)) ** 2
    return _at(np.r_[0.0, 0.0, values], t, 2)


def min_snr_weight(t: Any, s: Tabulated, gamma: float = 5.0, prediction: str = "eps") -> Any:
    """min(SNR_t, γ) on x0's squared error, as the weight on that of ``prediction``; SNR = ᾱ/(1−ᾱ). Source: Hang et al. 2023."""
    snr = np.r_[np.inf, s.alpha_bar[1:] / s.noise_variance[1:]]
    scales = {"x0": np.ones_like(snr), "eps": snr, "v": snr + 1}
    if prediction not in scales:
        raise ValueError(f"prediction must be one of {tuple(scales)}, not {prediction!r}")
    return _at(np.r_[0.0, np.minimum(snr[1:], gamma) / scales[prediction][1:]], t, 1)


def p2_weight(t: Any, s: Tabulated, k: float = 1.0, gamma: float = 1.0, prediction: str = "eps") -> Any:
    """1/(k + SNR_t)^γ on the squared error of ε, as the weight on that of ``prediction``; SNR = ᾱ/(1−ᾱ). Eq: S0-E45, S2-C9.

    γ = 0 is weight 1 on ε. t an int or an integer array in 1..T; float64. Source: Choi et al. 2022 (P2 weighting).
    """
    if not k > 0 or not gamma >= 0:
        raise ValueError(f"k must be positive and gamma not negative, not {k} and {gamma}")
    snr = s.alpha_bar[1:] / s.noise_variance[1:]
    scales = {"eps": np.ones_like(snr), "x0": snr, "v": snr / (snr + 1)}
    if prediction not in scales:
        raise ValueError(f"prediction must be one of {tuple(scales)}, not {prediction!r}")
    return _at(np.r_[0.0, scales[prediction] / (k + snr) ** gamma], t, 1)


def _at(values: np.ndarray, t: Any, low: int) -> Any:
    times = check_times(t, low, len(values) - 1)
    return float(values[times]) if isinstance(times, int) else restore(array_module(times).asarray(values)[times], t)


@exchanged
def normal_kl(mean_p: Array, var_p: Any, mean_q: Array, var_q: Any) -> Array:
    """KL(p‖q) = ½ Σ (v_p/v_q + (μ_q − μ_p)²/v_q − 1 + ln v_q/v_p) of each sample, nats (B,). Eq: S0-E26, S0-E25, S1-E11, S1-E18.

    Normal laws with independent elements. Means (B, …); variances positive numbers or arrays that broadcast to them.
    """
    xp = array_module(mean_p)
    if any(bool((xp.asarray(v) <= 0).any()) for v in (var_p, var_q)):
        raise ValueError("var_p and var_q must be positive")
    ratio = xp.asarray(var_p / var_q, dtype=mean_p.dtype)
    terms = ratio + (mean_q - mean_p) ** 2 / var_q - 1 - xp.log(ratio)
    if terms.shape != mean_p.shape or mean_p.ndim < 1:
        raise ValueError(f"mean_p must be (B, …), and the others broadcast to its shape {mean_p.shape}, not to {terms.shape}")
    return 0.5 * flat(terms).sum(axis=1)
