"""Score matching: explicit, implicit, sliced, denoising, and over many noise levels.

Each loss returns (value of every sample (B,), gradients of the batch mean with respect to the network's outputs). As in the
documents a value is ½‖·‖² SUMMED over the elements of a sample, not their mean (which :mod:`alphabar.core.losses` takes), for the
exact relations between these losses hold for the sum. Arrays (B, …) of one shape and float dtype.
"""

from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module
from .exchange import Array, exchanged, flat, lift
from .traces import projections

__all__ = [
    "denoising",
    "explicit",
    "fisher_divergence",
    "implicit",
    "ncsn",
    "perturb",
    "projections",
    "sliced",
    "sliced_fisher",
]
WEIGHTS = ("sigma2", "one")


def _like(score: Array, **others: Array) -> None:
    if score.dtype.kind != "f" or score.ndim < 1 or score.size == 0:
        raise ValueError(f"score must be a float array (B, …) that is not empty, not {score.dtype} of shape {score.shape}")
    for name, value in others.items():
        if value.shape != score.shape:
            raise ValueError(f"{name} has shape {value.shape}, want {score.shape} like score")
        if value.dtype != score.dtype:
            raise TypeError(f"{name} is {value.dtype}, score is {score.dtype}: want one float dtype")


def _sum(x: Array) -> Array:
    return flat(x).sum(axis=1)


def _along(v: Array, u: Array) -> Array:
    """vᵀu of each sample, (B, 1, …)."""
    return _sum(v * u).reshape(-1, *(1,) * (v.ndim - 1))


@exchanged
def explicit(score: Array, target: Array) -> tuple[Array, Array]:
    """(½‖s − ∇log p‖² (B,), gradient): explicit score matching, ``target`` being ∇ log p(x). Eq: S0-E2, S0-E3, S0-E12, S4-E56."""
    _like(score, target=target)
    difference = score - target
    return 0.5 * _sum(difference**2), difference / len(score)


@exchanged
def fisher_divergence(score: Array, target: Array, weights: Array | None = None) -> float:
    """½ Σ_b w_b·‖s_b − t_b‖², the Fisher divergence E_p ½‖s − ∇log p‖². Eq: S0-E3, S0-E12, S4-E56.

    Without ``weights`` they are 1/B: a Monte-Carlo estimate at samples of p. Weights (B,) p(x)·dx make it a quadrature.
    """
    value, _ = explicit(score, target)
    if weights is None:
        return float(value.mean())
    if weights.shape != value.shape:
        raise ValueError(f"weights must have shape {value.shape}, not {weights.shape}")
    return float((weights * value).sum())


@exchanged
def implicit(score: Array, trace: Array) -> tuple[Array, Array, Array]:
    """(½‖s‖² + tr ∇s (B,), gradient for s, gradient for the trace (B,)). Eq: S0-E4, S0-P1, S4-E57, S4-C11.

    ``trace`` (B,), e.g. of :func:`traces.jacobian_trace`. Its mean differs from that of :func:`explicit` by ½E‖∇log p‖², whatever
    s is, provided that p·s vanishes at infinity (integration by parts).
    """
    _like(score)
    if trace.shape != score.shape[:1]:
        raise ValueError(f"trace must have shape {score.shape[:1]}, not {trace.shape}")
    xp = array_module(score)
    return 0.5 * _sum(score**2) + trace, score / len(score), xp.full(trace.shape, 1 / len(score), trace.dtype)


@exchanged
def sliced(score: Array, product: Array, v: Array, variance_reduced: bool = True) -> tuple[Array, Array, Array]:
    """(vᵀ∇s v + ½‖s‖² (B,), gradient for s, gradient for the product). Eq: S0-E5, S0-P2, S4-E60, S0-C3.

    product = (∇s)·v for directions v with E[vvᵀ] = I (:func:`projections`): one product a sample where the exact trace takes d.
    ``variance_reduced=False`` has ½(vᵀs)² in the place of ½‖s‖²; both have the expectation of :func:`implicit`.
    """
    _like(score, product=product, v=v)
    curvature = _sum(v * product)
    if variance_reduced:
        return curvature + 0.5 * _sum(score**2), score / len(score), v / len(score)
    along = _along(v, score)
    return curvature + 0.5 * along.reshape(-1) ** 2, along * v / len(score), v / len(score)


@exchanged
def sliced_fisher(score: Array, target: Array, v: Array) -> tuple[Array, Array]:
    """(½(vᵀ∇log p − vᵀs)² (B,), gradient): the sliced Fisher divergence, ``target`` being ∇ log p(x). Eq: S4-E59."""
    _like(score, target=target, v=v)
    along = _along(v, score - target)
    return 0.5 * along.reshape(-1) ** 2, along * v / len(score)


def _sigma(sigma: Any, batch: int) -> Any:
    if np.ndim(sigma) > 1 or (np.ndim(sigma) == 1 and len(sigma) != batch):
        raise ValueError(f"sigma must be a number or have shape ({batch},), not {np.shape(sigma)}")
    if not bool((sigma > 0) if np.ndim(sigma) == 0 else (sigma > 0).all()):
        raise ValueError(f"sigma must be positive, not {sigma}")
    return sigma


@exchanged
def perturb(
    x0: Array, sigma: Any, seed: int = 0, step: int = 0, first_sample: int = 0, eps: Array | None = None
) -> tuple[Array, Array]:
    """(x̃, ε) with x̃ = x0 + σε, a sample of q_σ(x̃|x0) = N(x0, σ²I). Eq: S0-E9, S0-C7.

    sigma: a number or (B,). ε is ``eps`` (like x0) or drawn from (seed, step, first_sample + place in the batch), as by q_sample.
    """
    if x0.dtype.kind != "f" or x0.ndim < 1:
        raise TypeError(f"x0 must be a float array (B, …), not {x0.dtype} of shape {x0.shape}")
    if eps is None:
        eps = kernels.normals(array_module(x0).empty(x0.shape, x0.dtype), seed, step, streams.FORWARD, first_sample)
    elif eps.shape != x0.shape:
        raise ValueError(f"eps has shape {eps.shape}, want {x0.shape} like x0")
    return x0 + lift(_sigma(sigma, len(x0)), x0) * eps, eps


@exchanged
def denoising(score: Array, x0: Array, x_noisy: Array, sigma: Any) -> tuple[Array, Array]:
    """(½‖s − (x0 − x̃)/σ²‖² (B,), gradient) at x̃ = x_noisy; sigma a number or (B,). Eq: S0-E11, S0-E13, S0-E14, S0-P3.

    Its minimiser is the score of the NOISED density q_σ, not that of the data. Its mean exceeds that of :func:`explicit` under
    q_σ by ½(d/σ² − E‖∇log q_σ‖²), whatever s is.
    """
    return _scaled(score, x0, x_noisy, sigma, squared=False)


@exchanged
def ncsn(score: Array, x0: Array, x_noisy: Array, sigma: Any, weight: str = "sigma2") -> tuple[Array, Array]:
    """(λ(σ)·½‖s − (x0 − x̃)/σ²‖² (B,), gradient): denoising over a batch that mixes noise levels sigma (B,). Eq: S0-E15, S0-C8.

    weight: "sigma2" λ = σ², with which every level counts alike ((x0 − x̃)/σ ~ N(0, I): a zero network has d/2), or "one".
    Levels that are equally frequent in the batch make the mean of the losses of the single levels.
    """
    if weight not in WEIGHTS:
        raise ValueError(f"weight must be one of {WEIGHTS}, not {weight!r}")
    return _scaled(score, x0, x_noisy, sigma, squared=weight == "sigma2")


def _scaled(score: Array, x0: Array, x_noisy: Array, sigma: Any, squared: bool) -> tuple[Array, Array]:
    _like(score, x0=x0, x_noisy=x_noisy)
    level = lift(_sigma(sigma, len(score)), score)
    if squared:
        rest = level * score + (x_noisy - x0) / level
        return 0.5 * _sum(rest**2), level * rest / len(score)
    rest = score + (x_noisy - x0) / level**2
    return 0.5 * _sum(rest**2), rest / len(score)
