"""The differentiable functions of tokens (B, T, C): layer normalisation, gated sums, turns of pairs of features, noising.

As in :mod:`.functions`: dy is ∂L/∂y, ``pull(dy)`` hands it on, ``push()`` makes the tangent ẏ = J·ẋ from recorded functions.
"""

from typing import Any

from .. import kernels
from ..kernels import elementwise
from ..kernels.arrays import array_module
from . import functions, tangents
from .autograd import Tensor, record
from .tangents import total

Array = Any


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, emb: Tensor | None = None, at: int = 0) -> Tensor:
    """y = n·(1 + scale) + shift, n = x̂·γ + β, x̂ each token of x (B, T, C) normalised over its features.

    ``emb`` (B, E) holds scale in its columns at..at+C and shift in the next C; without it y = n.
    """
    channels = x.shape[-1]
    scale = shift = None
    if emb is not None:
        scale, shift = (elementwise.channels(emb.data, i, channels) for i in (at, at + channels))
    y, mean, rstd = kernels.layer_norm(x.data, gamma.data, beta.data, eps, scale, shift)

    # with g = dn·γ and ⟨·⟩ the mean over a token: dx = rstd·(g − ⟨g⟩ − x̂⟨g·x̂⟩)
    def pull(dy: Array) -> None:
        dx, dgamma, dbeta, dscale, dshift = kernels.layer_norm_backward(dy, x.data, gamma.data, beta.data, mean, rstd, scale)
        gamma.receive(dgamma)
        beta.receive(dbeta)
        x.receive(dx)
        if emb is not None:
            emb.receive(dscale, at)
            emb.receive(dshift, at + channels)

    def push() -> Tensor:
        hat = None if x.tangent is None else tangents.normalised_tangent(x, x.tangent, None, mean, rstd)
        return functions.modulated_tangent(lambda g, b: layer_norm(x, g, b, eps), hat, gamma, beta, emb, at)

    return record(y, (x, gamma, beta) if emb is None else (x, gamma, beta, emb), pull, push)


def add_gated(x: Tensor, h: Tensor, emb: Tensor, at: int) -> Tensor:
    """y = x + gate·h, gate the columns at..at+C of emb (B, E); x, h (B, T, C)."""
    gate = elementwise.channels(emb.data, at, x.shape[-1])

    # dx = dy, dh = gate·dy, dgate = Σ_T dy·h
    def pull(dy: Array) -> None:
        dh, dgate = kernels.add_gated_backward(dy, h.data, gate)
        x.receive(dy)
        h.receive(dh)
        emb.receive(dgate, at)

    def push() -> Tensor:
        of_h = None if h.tangent is None else tangents.scale_columns(h.tangent, emb, at)
        of_gate = None if emb.tangent is None else tangents.scale_columns(h, emb.tangent, at)
        return total(x.tangent, of_h, of_gate)

    return record(kernels.add_gated(x.data, h.data, gate), (x, h, emb), pull, push)


def rotary(x: Tensor, heads: int, cos: Array, sin: Array, inplace: bool = False) -> Tensor:
    """Each pair of features (i, i + d/2) of each head turned by the angle of its place and pair: RoFormer (Su et al. 2021).

    x (B, T, C) with C = heads·d; cos, sin (T, d/2) of its dtype. ``inplace`` writes over x: only where what made x does not need
    it for its own gradient.
    """
    split = (*x.shape[:2], heads, x.shape[2] // heads)
    data = x.data.reshape(split)
    y = kernels.rotary(data, cos, sin, data if inplace else None).reshape(x.shape)

    # a rotation's transpose is the turn back
    def pull(dy: Array) -> None:
        x.receive(kernels.rotary(dy.reshape(split), cos, -sin).reshape(x.shape))

    def push() -> Tensor:
        return rotary(total(x.tangent), heads, cos, sin)

    return record(y, (x,), pull, push)


def add_rows(x: Tensor, rows: Tensor) -> Tensor:
    """y[b] = x[b] + rows for every sample; x (B, T, C), rows (T, C)."""

    # the rows' gradient is the sum over the samples
    def pull(dy: Array) -> None:
        rows.receive(dy.sum(axis=0))
        x.receive(dy)

    def push() -> Tensor:
        return total(x.tangent) if rows.tangent is None else add_rows(tangents.zero_or(x.tangent, x), rows.tangent)

    return record(x.data + rows.data, (x, rows), pull, push)


def transpose(x: Tensor) -> Tensor:
    """y = xᵀ of a matrix."""
    xp = array_module(x.data)

    def pull(dy: Array) -> None:
        x.receive(xp.ascontiguousarray(dy.T))

    def push() -> Tensor:
        return transpose(total(x.tangent))

    return record(xp.ascontiguousarray(x.data.T), (x,), pull, push)


def noised(x0: Tensor, signal: Any, noise: Array) -> Tensor:
    """x_t = signal·x_0 + noise; x0 (B, …), signal a number or (B,), noise an array of the shape and dtype of x0."""
    xp = array_module(x0.data)
    factor = xp.asarray(signal, x0.data.dtype)
    factor = factor.reshape(factor.shape + (1,) * (len(x0.shape) - 1 if factor.ndim else 0))

    def pull(dy: Array) -> None:
        x0.receive(factor * dy)

    def push() -> Tensor:
        return noised(total(x0.tangent), signal, xp.zeros_like(noise))

    return record(factor * x0.data + noise, (x0,), pull, push)
