"""What the tangents of the functions are made of: recorded functions of a value and a direction, each with its gradient.

A dot marks the derivative along the direction: ẋ is the tangent of x. ⟨·⟩ is the mean over a group of channels and all places.
"""

from math import prod
from typing import Any

from .. import kernels
from ..kernels import buffers
from ..kernels.arrays import array_module
from .autograd import Tensor, record

Array = Any


def zero_or(tangent: Tensor | None, like: Tensor) -> Tensor:
    """The tangent, or zeros of the shape of ``like`` where there is none."""
    return Tensor(array_module(like.data).zeros_like(like.data)) if tangent is None else tangent


def total(*terms: Tensor | None) -> Tensor:
    """The sum of the terms that are not None (at least one), all of one shape."""
    first, *others = (x for x in terms if x is not None)
    for other in others:
        first = _sum(first, other)
    return first


def _sum(a: Tensor, b: Tensor) -> Tensor:
    xp = array_module(a.data)

    def pull(dy: Array) -> None:
        a.receive(dy)
        b.receive(dy)

    return record(xp.add(a.data, b.data, out=buffers.empty(a.shape, a.data.dtype, xp)), (a, b), pull)


def scale_columns(x: Tensor, factor: Tensor, at: int = 0) -> Tensor:
    """y[b, …, c] = x[b, …, c]·factor[b, at + c]; x (B, …, C), factor (B, E), or (E,) for all samples alike."""
    xp = array_module(x.data)
    channels = x.shape[-1]
    part = (..., slice(at, at + channels))
    a = factor.data[part].reshape(-1, *(1,) * (len(x.shape) - 2), channels)

    # the factor's gradient is the sum over what it multiplies
    def pull(dy: Array) -> None:
        x.receive(dy * a)
        if factor.needs_grad:
            rows = prod(x.shape[1:-1]) * (1 if len(factor.shape) == 2 else x.shape[0])
            product = (dy * x.data).reshape(a.shape[0], rows, channels)
            factor.receive(product.sum(axis=1, dtype=xp.float64).astype(dy.dtype).reshape(*factor.shape[:-1], channels), at)

    return record(x.data * a, (x, factor), pull)


def sigmoid(x: Array) -> Array:
    """1/(1 + e^−x), of an array."""
    xp = array_module(x)
    return 1 / (1 + xp.exp(-xp.clip(x, -80, None)))  # exp of more than 80 would leave float32


def silu_tangent(x: Tensor, dot: Tensor) -> Tensor:
    """ẏ = silu'(x)·ẋ."""
    s = sigmoid(x.data)
    slope = s * (1 + x.data * (1 - s))

    # σ' = σ(1 − σ), so silu'' = σ(1 − σ)(2 + x(1 − 2σ))
    def pull(dy: Array) -> None:
        dot.receive(dy * slope)
        if x.needs_grad:
            x.receive(dy * dot.data * (s * (1 - s) * (2 + x.data * (1 - 2 * s))))

    return record(slope * dot.data, (x, dot), pull)


def tanh_tangent(x: Tensor, y: Array, dot: Tensor) -> Tensor:
    """ẏ = (1 − y²)·ẋ with y = tanh(x)."""
    slope = 1 - y * y

    # tanh'' = −2y(1 − y²)
    def pull(dy: Array) -> None:
        dot.receive(dy * slope)
        if x.needs_grad:
            x.receive(dy * dot.data * (-2 * y * slope))

    return record(slope * dot.data, (x, dot), pull)


def normalised_tangent(x: Tensor, dot: Tensor, groups: int | None, mean: Array, rstd: Array) -> Tensor:
    """x̂' = rstd·(ẋ − ⟨ẋ⟩ − x̂⟨x̂·ẋ⟩), the tangent of x̂ = (x − mean)·rstd; x (B, …, C), mean and rstd (B, groups).

    ``groups`` None: each token of x (B, T, C) by itself, mean and rstd (B, T).
    """
    xp = array_module(x.data)
    channels = x.shape[-1]
    one, zero = xp.ones(channels, x.data.dtype), xp.zeros(channels, x.data.dtype)

    # with P(a) = a − ⟨a⟩ − x̂⟨x̂·a⟩, rstd·P is its own transpose: the gradient of plain normalisation
    def project(a: Array) -> Array:
        if groups is None:
            return kernels.layer_norm_backward(a, x.data, one, zero, mean, rstd)[0]
        return kernels.group_norm_silu_backward(a, x.data, one, zero, groups, mean, rstd, silu=False)[0]

    if groups is None:
        grouped = (prod(x.shape[:-1]), 1, 1, channels)
    else:
        grouped = (x.shape[0], prod(x.shape[1:-1]), groups, channels // groups)
    centre, r = (v.reshape(grouped[0], 1, grouped[2], 1) for v in (mean, rstd))

    def average(a: Array, b: Array) -> Array:
        return (a * b).mean(axis=(1, 3), keepdims=True, dtype=xp.float64).astype(a.dtype)

    y = project(dot.data)

    # along δ: rstd changes by −rstd²⟨x̂·δ⟩ and x̂ by rstd·P(δ); in ⟨w·rstd·P(ẋ)⟩ that leaves
    # dx = −rstd·(x̂⟨w·y⟩ + ⟨x̂·ẋ⟩·rstd·P(w) + ⟨x̂·w⟩·y)
    def pull(w: Array) -> None:
        projected = project(w)
        dot.receive(projected)
        if x.needs_grad:
            w, v, d, projected, value = (a.reshape(grouped) for a in (w, y, dot.data, projected, x.data))
            h = (value - centre) * r
            dx = h * average(w, v)
            dx += average(h, d) * projected
            dx += average(h, w) * v
            dx *= -r
            x.receive(dx.reshape(x.shape))

    return record(y, (x, dot), pull)


def split_heads(x: Tensor, heads: int, factor: float = 1.0) -> Tensor:
    """factor·x as (B, heads, T, d); x (B, …, C) with C = heads·d."""
    batch, places, channels = x.shape[0], prod(x.shape[1:-1]), x.shape[-1]
    y = x.data.reshape(batch, places, heads, channels // heads).transpose(0, 2, 1, 3) * x.data.dtype.type(factor)

    def pull(dy: Array) -> None:
        x.receive((dy * dy.dtype.type(factor)).transpose(0, 2, 1, 3).reshape(x.shape))

    return record(y, (x,), pull)


def join_heads(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, heads, T, d) as (B, …, C) of this shape."""
    batch, heads, places, d = x.shape

    def pull(dy: Array) -> None:
        x.receive(dy.reshape(batch, places, heads, d).transpose(0, 2, 1, 3))

    return record(x.data.transpose(0, 2, 1, 3).reshape(shape), (x,), pull)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b over the last two axes."""

    # da = dy bᵀ, db = aᵀ dy
    def pull(dy: Array) -> None:
        a.receive(dy @ b.data.swapaxes(-1, -2))
        b.receive(a.data.swapaxes(-1, -2) @ dy)

    return record(a.data @ b.data, (a, b), pull)


def matmul_turned(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ over the last two axes."""

    # da = dy b, db = dyᵀ a
    def pull(dy: Array) -> None:
        a.receive(dy @ b.data)
        b.receive(dy.swapaxes(-1, -2) @ a.data)

    return record(a.data @ b.data.swapaxes(-1, -2), (a, b), pull)


def softmax(s: Tensor) -> Tensor:
    """p = exp(s)/Σ exp(s) over the last axis."""
    p = kernels.softmax(s.data)

    def pull(dp: Array) -> None:
        s.receive(kernels.softmax_backward(dp, p))

    return record(p, (s,), pull)


def softmax_tangent(p: Tensor, dot: Tensor) -> Tensor:
    """ṗ = p·(ṡ − Σ p·ṡ) over the last axis, p the softmax of s."""

    # linear in ṡ and its own transpose there; p stands in it twice
    def pull(w: Array) -> None:
        dot.receive(kernels.softmax_backward(w, p.data))
        if p.needs_grad:
            mean, mean_w = ((p.data * a).sum(axis=-1, keepdims=True) for a in (dot.data, w))
            p.receive(w * (dot.data - mean) - mean_w * dot.data)

    return record(kernels.softmax_backward(dot.data, p.data), (p, dot), pull)
