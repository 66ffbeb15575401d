"""Diffusion-LM: words as embeddings that a Gaussian diffusion noises, trained end to end. Embedding, rounding, losses, bound.

    w → x_0 ~ N(Emb(w), σ_0²·I) → x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε,      p_θ(w|x_0) = ∏_i softmax(logits(x_0))_{w_i}

Words are integers (B, …) in 0..K−1, embeddings (K, d), states (B, …, d); the network predicts x_0. Samplers, clamping, control
and infilling stand in :mod:`alphabar.core.diffusion_lm_sampler`. Source: Li et al. 2022.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, native, restore, to_numpy
from . import bound
from .categorical import states
from .chain import Chain, Model
from .exchange import Array, check_schedule, check_times, exchanged, flat, float_array
from .levels import Tabulated
from .losses import weighted_loss
from .vq import vector_quantize

SIGMA0 = 1e-4
BLOCK = 1 << 22  # the most one-hot elements that are held at once


# ------------------------------------------------------------------------------------------------------ embedding and rounding


def embedding_of(w: Any, embedding: Any) -> tuple[Array, Array]:
    """(words, embeddings) as native arrays that go together; TypeError or ValueError for others."""
    table = float_array(embedding, "embedding")
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"embedding must be (K, d) with no empty axis, not shape {table.shape}")
    return states(native(w), len(table), "w", axes=1), table


def embed(
    w: Array, embedding: Array, sigma0: float = SIGMA0, seed: int = 0, step: int = 0, first_sample: int = 0
) -> tuple[Array, Array]:
    """(x_0, Emb(w)), x_0 ~ q(x_0|w) = N(Emb(w), σ_0²·I), both (B, …, d) of the dtype and kind of ``embedding``. Eq: L7, S4-M2.

    The noise depends on (seed, step, first_sample + place in the batch) alone. σ_0 = 10⁻⁴ is the paper's; its code has
    √(1−ᾱ_1), which keeps the rounding loss from being met by words that stand close together. Raises ValueError or TypeError
    for words outside 0..K−1 or a negative σ_0.
    """
    if not 0 <= sigma0 < np.inf:
        raise ValueError(f"sigma0 must be 0 or positive, not {sigma0}")
    words, table = embedding_of(w, embedding)
    mean = table[words]
    z = kernels.normals(array_module(mean).empty_like(mean), seed, step=step, stream=streams.EMBED, first_sample=first_sample)
    return restore(mean + mean.dtype.type(sigma0) * z, embedding), restore(mean, embedding)


@exchanged
def embedding_gradient(gradient: Array, w: Array, K: int) -> Array:
    """The gradient (K, d) for the embeddings from that for Emb(w) (B, …, d): the sum over the places of each word."""
    words = states(w, K, "w")
    if gradient.shape[:-1] != words.shape:
        raise ValueError(f"gradient must have shape {(*words.shape, 'd')} to go with w, not {gradient.shape}")
    xp = array_module(gradient)
    of_places, place = gradient.reshape(-1, gradient.shape[-1]), words.reshape(-1)
    total = xp.empty((K, of_places.shape[1]), gradient.dtype)
    rows = max(1, BLOCK // max(place.size, 1))
    for start in range(0, K, rows):  # as products with one-hot rows, whose sums have one order on every device
        at = xp.arange(start, min(start + rows, K))[:, None] == place
        total[start : start + rows] = at.astype(gradient.dtype) @ of_places
    return total


@exchanged
def rounding_logits(x: Array, embedding: Array, bias: Array | None = None, sigma: float | None = None) -> Array:
    """Logits (B, …, K) of p_θ(w|x_0): x·e_k + b_k, or with ``sigma`` −‖x − e_k‖²/(2σ²). Eq: L7, S4-M2.

    The first is the paper's linear layer, whose weights may be the embeddings. The second is p(w|x_0) exactly where words are
    alike beforehand and x_0 ~ N(Emb(w), σ²·I); the term −‖x‖²/(2σ²), which all words share, is left out.
    """
    table = float_array(embedding, "embedding")
    if table.ndim != 2 or x.ndim < 1 or x.shape[-1] != table.shape[1]:
        raise ValueError(f"embedding must be (K, d) to go with x (…, d), not {table.shape} and {x.shape}")
    if bias is not None and sigma is not None:
        raise ValueError("bias goes without sigma, which makes its own")
    if sigma is None:
        return x @ embedding.T if bias is None else x @ embedding.T + bias
    if not 0 < sigma < np.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    return (x @ embedding.T - (embedding * embedding).sum(axis=1) / 2) * (1 / sigma**2)


@exchanged
def nearest_words(x: Array, embedding: Array) -> Array:
    """argmin_k ‖x − e_k‖², int32 (B, …) for x (B, …, d), embedding (K, d): the smallest where several are as near. Eq: L7."""
    return vector_quantize(x, embedding)[1].astype(np.int32)


def clamp(x: Array, embedding: Array) -> Array:
    """x (B, …, d) with every vector replaced by the nearest embedding. Eq: L7."""
    return vector_quantize(x, embedding)[0]


# ------------------------------------------------------------------------------------------------------------------------ losses


@exchanged
def rounding_loss(logits: Array, w: Array) -> tuple[Array, Array]:
    """(−log p_θ(w|x_0) of each sample, mean over its words, nats (B,); gradient of the batch mean). Eq: L7, S4-M2.

    logits (B, …, K) float, w (B, …) integers. The gradient (softmax − one-hot)/(B·words) is with respect to the logits.
    """
    K = float_array(logits, "logits").shape[-1] if logits.ndim else 1
    w = states(w, K, "w")
    if logits.ndim < 2 or logits.shape[:-1] != w.shape or w.size == 0:
        raise ValueError(f"w must have the shape of logits but its last axis, {logits.shape[:-1]}, not empty; not {w.shape}")
    value, gradient = kernels.cross_entropy(logits, w)
    return flat(value).mean(axis=1), gradient


@exchanged
def denoising_loss(output: Array, x0: Array, mean: Array, t: Any, weight: Any = None) -> tuple[Array, Array, Array, Array]:
    """‖x̂_0 − x_0‖² at t ≥ 2, ‖Emb(w) − x̂_0‖² at t = 1, as (value (B,), gradients for x̂_0, x_0 and Emb(w)). Eq: L7, S4-M2.

    output x̂_0(x_t, t), x0 and mean = Emb(w) (B, …, d) of one dtype; t an int or (B,) in 1..T; ``weight`` None, a number or (B,).
    μ_θ(x_1, 1) is x̂_0, since β̃_1 = 0. Values are means over the elements of a sample, gradients those of the batch mean. The
    part of x_0 in x_t is not in them: √ᾱ_t times the network's gradient for x_t has to be added.
    """
    if mean.shape != x0.shape or mean.dtype != x0.dtype:
        raise ValueError(f"mean is {mean.dtype} {mean.shape}, want {x0.dtype} {x0.shape} like x0")
    xp = array_module(output)
    times = check_times(t, 1, np.iinfo(np.int64).max, len(x0) if x0.ndim else None)
    first = (xp.asarray(times) == 1).reshape(-1, *(1,) * (x0.ndim - 1))
    value, gradient = weighted_loss(output, xp.where(first, mean, x0), weight)
    zero = xp.zeros_like(gradient)
    return value, gradient, xp.where(first, zero, -gradient), xp.where(first, -gradient, zero)


@exchanged
def prior_loss(x0: Array, s: Tabulated) -> tuple[Array, Array]:
    """(‖√ᾱ_T·x_0‖² of each sample, mean over its elements (B,); gradient of the batch mean). Eq: L7, S4-M2.

    The part of KL(q(x_T|x_0)‖N(0, I)) that depends on x_0, twice: it keeps the embeddings from growing past the noise.
    """
    if x0.ndim < 1 or x0.size == 0:
        raise ValueError(f"x0 must be (B, …), not empty, not of shape {x0.shape}")
    factor = float(s.signal[-1] ** 2)
    return factor * flat(x0 * x0).mean(axis=1), x0 * (2 * factor / x0.size)


class EndToEnd(NamedTuple):
    """The loss of Diffusion-LM and its gradients, those of the batch mean."""

    value: Array  # (B,), the sum of the next three
    denoising: Array
    rounding: Array
    prior: Array
    output: Array  # gradient for x̂_0 (B, …, d)
    logits: Array  # for the rounding logits (B, …, K)
    x0: Array  # for x_0 (B, …, d), but for the paths through x_t and the logits
    mean: Array  # for Emb(w) (B, …, d), but for the path through x_0


def end_to_end_loss(
    output: Array, x0: Array, mean: Array, logits: Array, w: Array, t: Any, s: Tabulated, weight: Any = None
) -> EndToEnd:
    """L = E[‖x̂_0 − x_0‖² (t ≥ 2), ‖Emb(w) − μ_θ(x_1, 1)‖² (t = 1)] + ‖√ᾱ_T·x_0‖² − log p_θ(w|x_0). Eq: L7, S4-M2.

    (x0, mean) of :func:`embed`, output = x̂_0(x_t, t) at x_t = ``forward.q_sample(x0, t, s)``, logits of x0, w the words.
    Each term is a mean over the elements, or words, of a sample; ``weight`` (None, a number or (B,)) multiplies the first. What
    flows on: into x̂_0's network (and from it √ᾱ_t·∂/∂x_t to x_0), into the rounding layer (and from it to x_0), from x_0 to
    Emb(w), from Emb(w) by :func:`embedding_gradient`. Source: Li et al. 2022, Eq. 2 and appendix E.
    """
    check_schedule(s, Tabulated)
    check_times(t, 1, s.T)
    denoising, d_output, d_x0, d_mean = denoising_loss(output, x0, mean, t, weight)
    rounding, d_logits = rounding_loss(logits, w)
    prior, of_prior = prior_loss(x0, s)
    return EndToEnd(denoising + rounding + prior, denoising, rounding, prior, d_output, d_logits, d_x0 + of_prior, d_mean)


# ------------------------------------------------------------------------------------------------------------------------- bound


def word_bound(
    model: Model,
    w: Array,
    embedding: Array,
    c: Chain,
    sigma0: float,
    logits: Callable[[Array], Array] | None = None,
    draws: int = 1,
    seed: int = 0,
    first_sample: int = 0,
) -> np.ndarray:
    """A bound on −log p_θ(w) of each sample, nats float64 (B,), by one draw of x_0 and ``draws`` of each x_t. Eq: L7, S4-M2.

        −log p_θ(w) ≤ E_q[−log p_θ(w|x_0) + log q(x_0|w) + L(x_0)],   L(x_0) ≥ −log p_θ(x_0) of :func:`bound.vlb_terms`

    E log q(x_0|w) = −(D/2)·ln(2πe·σ_0²) exactly, D elements a sample. logits(x_0) is the rounding layer, by default
    :func:`rounding_logits` with sigma = σ_0. The chain's ``decoder_variance`` should be near σ_0² plus the error of x̂_0(x_1, 1):
    far from it the bound costs ½·ln of their ratio for every element. Source: Li et al. 2022, appendix E.
    """
    if not 0 < sigma0 < np.inf:
        raise ValueError(f"sigma0 must be positive and finite, not {sigma0}")
    x0, _ = embed(w, embedding, sigma0, seed, first_sample=first_sample)
    scores = rounding_logits(x0, embedding, sigma=sigma0) if logits is None else logits(x0)
    words = np.asarray(to_numpy(w))
    rounding = rounding_loss(np.asarray(to_numpy(scores), np.float64), words)[0] * words[:1].size
    nats = bound.vlb_terms(model, x0, c, draws=draws, seed=seed, first_sample=first_sample).nats
    return rounding + nats - 0.5 * native(x0)[:1].size * np.log(2 * np.pi * np.e * sigma0**2)
