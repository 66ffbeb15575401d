"""The differentiable functions: forward and backward side by side, for NumPy and CuPy arrays alike, NHWC.

Gradients carry a ``d``: dy is ∂L/∂y. A function's ``pull(dy)`` gives its inputs their share; what it computes stands above it.
Where an input carries a tangent, ``push()`` makes the output's, ẏ = J·ẋ, from recorded functions: the tangent has a gradient too.

On a GPU images may be bfloat16 (the bits): conv2d, conv1x1, group_norm_silu, attention, add, concat and dropout answer in kind.
Their parameters and ``emb`` are float32, and the gradients of these; convolutions read the weights rounded.
"""

from collections.abc import Callable
from functools import lru_cache
from math import prod
from statistics import NormalDist
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import buffers, elementwise, fused, streams
from ..kernels.arrays import array_module
from ..kernels.bf16 import BF16
from ..kernels.reference import conv_output_size
from . import tangents
from .autograd import Tensor, record
from .tangents import total, zero_or

Array = Any
Pad = tuple[int, int] | None


def cast(x: Tensor, dtype: Any) -> Tensor:
    """x in another dtype: float32, or bfloat16 (BF16, the bits), rounded to nearest even. No tangents."""
    if x.data.dtype == dtype:
        return x

    # the derivative is 1 but for the rounding
    def pull(dy: Array) -> None:
        x.receive(elementwise.cast(dy, x.data.dtype))

    return record(elementwise.cast(x.data, dtype), (x,), pull)


def _weights(w: Tensor, like: Array) -> Array:
    """The values of ``w`` in the dtype of ``like``: for bfloat16 those that a store keeps, of other tensors rounded now."""
    if like.dtype != BF16:
        return w.data
    low = getattr(w, "low", None)
    return elementwise.cast(w.data, BF16) if low is None else low


def conv2d(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    pad: Pad = None,
    emb: Tensor | None = None,
    at: int = 0,
    residual: Tensor | None = None,
    dtype: Any = None,
) -> Tensor:
    """y = w * x + b + emb[:, at + k] + residual; x (B, H, W, Cin), w (k, k, Cin, Cout) with k 1 or 3, b (Cout,), emb (B, E).

    ``upsample`` doubles x first. ``dtype``: of y, float32 where x is bfloat16 and y is not to be.
    """
    kernel, weights = w.shape[0], _weights(w, x.data)
    bias, shift = None if b is None else b.data, None if emb is None else elementwise.channels(emb.data, at, w.shape[3])
    added = None if residual is None else residual.data
    out = None
    if dtype is not None and x.data.dtype != dtype:
        size = (conv_output_size(n, kernel, stride, upsample, pad) for n in x.shape[1:3])
        out = buffers.empty((x.shape[0], *size, w.shape[3]), dtype, array_module(x.data))
    y = kernels.conv2d(x.data, weights, bias, stride, upsample, pad, out, shift, added)

    # y is linear in x and in w: dx and dw are the two transposes, db the sum over all places, that of emb over a sample's.
    def pull(dy: Array) -> None:
        if out is not None:
            dy = elementwise.cast(dy, x.data.dtype)
        if emb is not None and emb.needs_grad:
            emb.receive(elementwise.sum_places(dy), at)
        if residual is not None:
            residual.receive(dy)
        if w.needs_grad or (b is not None and b.needs_grad):
            dw, db = kernels.conv2d_backward_weight(x.data, dy, kernel, stride, upsample, pad)
            w.receive(dw)
            if b is not None:
                b.receive(db)
        if x.needs_grad:
            x.receive(kernels.conv2d_backward_input(dy, weights, x.shape, stride, upsample, pad))

    # ẏ = w * ẋ + (ẇ * x + ḃ) + the others' own
    def push() -> Tensor:
        of_x = of_w = of_emb = None
        if x.tangent is not None:
            of_x = conv2d(x.tangent, w, None, stride, upsample, pad)
        if w.tangent is not None or (b is not None and b.tangent is not None):
            of_w = conv2d(x, zero_or(w.tangent, w), None if b is None else b.tangent, stride, upsample, pad)
        if emb is not None and emb.tangent is not None:
            of_emb = add_columns(Tensor(array_module(y).zeros_like(y)), emb.tangent, at)
        return total(of_x, of_w, of_emb, None if residual is None else residual.tangent)

    return record(y, tuple(z for z in (x, w, b, emb, residual) if z is not None), pull, push)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """y = x w + b; x (…, in), w (in, out), b (out,). The product is the 1×1 convolution of images of one pixel."""
    image, matrix = (prod(x.shape[:-1]), 1, 1, x.shape[-1]), (1, 1, *w.shape)
    bias = None if b is None else b.data
    y = kernels.conv2d(x.data.reshape(image), w.data.reshape(matrix), bias).reshape(*x.shape[:-1], w.shape[1])

    # dw = xᵀ dy, db = Σ dy, dx = dy wᵀ
    def pull(dy: Array) -> None:
        dy = dy.reshape(*image[:3], w.shape[1])
        if w.needs_grad or (b is not None and b.needs_grad):
            dw, db = kernels.conv2d_backward_weight(x.data.reshape(image), dy, 1)
            w.receive(dw.reshape(w.shape))
            if b is not None:
                b.receive(db)
        if x.needs_grad:
            x.receive(kernels.conv2d_backward_input(dy, w.data.reshape(matrix), image).reshape(x.shape))

    # ẏ = ẋ w + (x ẇ + ḃ)
    def push() -> Tensor:
        of_x = of_w = None
        if x.tangent is not None:
            of_x = linear(x.tangent, w)
        if w.tangent is not None or (b is not None and b.tangent is not None):
            of_w = linear(x, zero_or(w.tangent, w), None if b is None else b.tangent)
        return total(of_x, of_w)

    return record(y, (x, w) if b is None else (x, w, b), pull, push)


def silu(x: Tensor) -> Tensor:
    """y = x·σ(x), any shape."""

    # σ' = σ(1 − σ), so dy/dx = σ + x·σ(1 − σ) = σ·(1 + x·(1 − σ))
    def pull(dy: Array) -> None:
        x.receive(kernels.silu_backward(dy, x.data))

    def push() -> Tensor:
        return tangents.silu_tangent(x, total(x.tangent))

    return record(kernels.silu(x.data), (x,), pull, push)


def tanh(x: Tensor) -> Tensor:
    """y = tanh(x), any shape."""
    y = array_module(x.data).tanh(x.data)

    # dy/dx = 1 − y²
    def pull(dy: Array) -> None:
        x.receive(dy * (1 - y * y))

    def push() -> Tensor:
        return tangents.tanh_tangent(x, y, total(x.tangent))

    return record(y, (x,), pull, push)


def conv1x1(x: Tensor, tail: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """y = w * [x, tail] + b, which is w₁ * x + w₂ * tail + b; x (B, H, W, C1), tail (B, H, W, C2), w (1, 1, C1 + C2, Cout)."""
    own, weights = x.shape[-1], _weights(w, x.data)
    head, rest = weights[:, :, :own], weights[:, :, own:]
    if fused.joins(x.data, tail.data, weights):
        y = fused.conv1x1(x.data, tail.data, weights, b.data)
    else:
        y = kernels.conv2d(tail.data, rest, residual=kernels.conv2d(x.data, head, b.data))

    # each half by itself, into its own rows of dw
    def pull(dy: Array) -> None:
        if w.needs_grad or b.needs_grad:
            dw = buffers.empty(w.shape, w.data.dtype, array_module(dy))
            _, db = kernels.conv2d_backward_weight(x.data, dy, 1, out=dw[:, :, :own])
            kernels.conv2d_backward_weight(tail.data, dy, 1, out=dw[:, :, own:])
            w.receive(dw)
            b.receive(db)
        for z, part in ((x, head), (tail, rest)):
            if z.needs_grad:
                z.receive(kernels.conv2d_backward_input(dy, part, z.shape))

    # ẏ = w * [ẋ, ṫail] + (ẇ * [x, tail] + ḃ)
    def push() -> Tensor:
        of_x = of_w = None
        if x.tangent is not None or tail.tangent is not None:
            of_x = conv2d(concat(zero_or(x.tangent, x), zero_or(tail.tangent, tail)), w)
        if w.tangent is not None or b.tangent is not None:
            of_w = conv2d(concat(x, tail), zero_or(w.tangent, w), b.tangent)
        return total(of_x, of_w)

    return record(y, (x, tail, w, b), pull, push)


def group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    emb: Tensor | None = None,
    at: int = 0,
    tail: Tensor | None = None,
) -> Tensor:
    """y = silu(v), v = n·(1 + scale) + shift, n = x̂·γ + β, x̂ normalised over each group of channels; x (B, …, C).

    ``emb`` (B, E) holds scale in its columns at..at+C and shift in the next C; without it v = n. ``tail`` (B, …, C2) holds the
    channels that follow those of x (B, …, C − C2): y is that of [x, tail].
    """
    channels = gamma.shape[0]
    after = None if tail is None else tail.data
    scale = shift = None
    if emb is not None:
        scale, shift = (elementwise.channels(emb.data, i, channels) for i in (at, at + channels))
    y, mean, rstd = kernels.group_norm_silu(x.data, gamma.data, beta.data, groups, eps, scale, shift, silu, None, after)

    # mean and rstd are all that is kept: the kernel recomputes v, and with g = dn·γ, ⟨·⟩ the mean over a group,
    # ∂mean and ∂rstd take the components of g along 1 and x̂ away: dx = rstd·(g − ⟨g⟩ − x̂⟨g·x̂⟩).
    def pull(dy: Array) -> None:
        dtail = None if after is None else buffers.empty(after.shape, dy.dtype, array_module(dy))
        dx, dgamma, dbeta, dscale, dshift = kernels.group_norm_silu_backward(
            dy, x.data, gamma.data, beta.data, groups, mean, rstd, scale, shift, silu, None, after, dtail
        )
        gamma.receive(dgamma)
        beta.receive(dbeta)
        x.receive(dx)
        if tail is not None:
            tail.receive(dtail)
        if emb is not None:
            emb.receive(dscale, at)
            emb.receive(dshift, at + channels)

    # ẏ = silu'(v)·v̇
    def push() -> Tensor:
        whole, of_whole = x, x.tangent
        if tail is not None:
            whole = concat(x, tail)
            if x.tangent is not None or tail.tangent is not None:
                of_whole = concat(zero_or(x.tangent, x), zero_or(tail.tangent, tail))
        hat = None if of_whole is None else tangents.normalised_tangent(whole, of_whole, groups, mean, rstd)
        dot = modulated_tangent(lambda g, b: group_norm_silu(whole, g, b, groups, eps, False), hat, gamma, beta, emb, at)
        return tangents.silu_tangent(group_norm_silu(whole, gamma, beta, groups, eps, False, emb, at), dot) if silu else dot

    return record(y, tuple(z for z in (x, gamma, beta, emb, tail) if z is not None), pull, push)


def norm_conv2d(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float,
    w: Tensor,
    b: Tensor,
    silu: bool = True,
    scaled: tuple[Tensor, int] | None = None,
    tail: Tensor | None = None,
    added: tuple[Tensor, int] | None = None,
    residual: Tensor | None = None,
    dtype: Any = None,
) -> Tensor:
    """conv2d(group_norm_silu(x), w, b) of stride 1: in one, where :func:`alphabar.kernels.fused.taken` says so, else one by one.

    ``scaled`` and ``added`` are (emb, at) of the norm and of the convolution; the other arguments are theirs by name. In one, the
    normalised image is not kept for the backward pass either: it is made again while the gradient of w is.
    """
    of_norm: tuple[Tensor | None, int] = scaled or (None, 0)
    of_conv: tuple[Tensor | None, int] = added or (None, 0)
    inputs = tuple(z for z in (x, gamma, beta, w, b, of_norm[0], of_conv[0], residual, tail) if z is not None)
    after = None if tail is None else tail.data
    if not fused.taken(x.data, w.data, after) or any(z.tangent is not None for z in inputs):
        normed = group_norm_silu(x, gamma, beta, groups, eps, silu, *of_norm, tail)
        return conv2d(normed, w, b, 1, False, None, *of_conv, residual, dtype)
    channels, weights = gamma.shape[0], _weights(w, x.data)
    scale = shift = more = out = None
    if scaled is not None:
        scale, shift = (elementwise.channels(scaled[0].data, scaled[1] + i, channels) for i in (0, channels))
    if added is not None:
        more = elementwise.channels(added[0].data, added[1], w.shape[3])
    if dtype is not None and x.data.dtype != dtype:
        out = buffers.empty((*x.shape[:3], w.shape[3]), dtype, array_module(x.data))
    y, norm = fused.norm_conv2d(
        x.data,
        gamma.data,
        beta.data,
        groups,
        eps,
        scale,
        shift,
        silu,
        weights,
        b.data,
        out,
        more,
        None if residual is None else residual.data,
        after,
    )

    # those of conv2d and of group_norm_silu, one after the other
    def pull(dy: Array) -> None:
        if out is not None:
            dy = elementwise.cast(dy, x.data.dtype)
        if added is not None and added[0].needs_grad:
            added[0].receive(elementwise.sum_places(dy), added[1])
        if residual is not None:
            residual.receive(dy)
        if w.needs_grad or b.needs_grad:
            dw, db = fused.backward_weight(x.data, dy, norm, silu, after)
            w.receive(dw)
            b.receive(db)
        dn = kernels.conv2d_backward_input(dy, weights, (*x.shape[:3], channels))
        dtail = None if after is None else buffers.empty(after.shape, after.dtype, array_module(after))
        dx, dgamma, dbeta, dscale, dshift = kernels.group_norm_silu_backward(
            dn, x.data, gamma.data, beta.data, groups, norm.mean, norm.rstd, scale, shift, silu, None, after, dtail
        )
        gamma.receive(dgamma)
        beta.receive(dbeta)
        x.receive(dx)
        if tail is not None:
            tail.receive(dtail)
        if scaled is not None:
            scaled[0].receive(dscale, scaled[1])
            scaled[0].receive(dshift, scaled[1] + channels)

    return record(y, inputs, pull)


def modulated_tangent(
    norm: Callable[[Tensor, Tensor], Tensor], hat: Tensor | None, gamma: Tensor, beta: Tensor, emb: Tensor | None, at: int
) -> Tensor:
    """v̇ of v = n·(1 + scale) + shift, n = x̂·γ + β = ``norm(γ, β)``, from ``hat`` = x̂' and the tangents of γ, β and emb."""
    of_x = of_affine = of_emb = None
    # ṅ = x̂'·γ + (x̂·γ̇ + β̇)
    if hat is not None:
        of_x = tangents.scale_columns(hat, gamma)
    if gamma.tangent is not None or beta.tangent is not None:
        of_affine = norm(zero_or(gamma.tangent, gamma), zero_or(beta.tangent, beta))
    dot = None if of_x is None and of_affine is None else total(of_x, of_affine)
    # v̇ = ṅ·(1 + scale) + (n·ṡcale + ṡhift)
    if emb is not None:
        if dot is not None:
            dot = total(dot, tangents.scale_columns(dot, emb, at))
        if emb.tangent is not None:
            of_emb = tangents.scale_columns(norm(gamma, beta), emb.tangent, at)
            of_emb = add_columns(of_emb, emb.tangent, at + gamma.shape[0])
    return total(dot, of_emb)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """o = softmax(scale·q kᵀ) v for each head over all places; q, k, v (B, …, C) with C = heads·d; scale defaults to 1/√d."""
    shape = q.shape
    tokens = (shape[0], prod(shape[1:-1]), heads, shape[-1] // heads)
    o, lse = kernels.attention(*(z.data.reshape(tokens) for z in (q, k, v)), scale)

    # P = softmax(S), S = scale·q kᵀ: dv = Pᵀ do; dP = do vᵀ; softmax gives dS = P∘(dP − Σ_k P∘dP), and that sum is
    # Σ_d do∘o; dq = scale·dS k, dk = scale·dSᵀ q. P comes back from lse, so no T×T array is kept.
    def pull(do: Array) -> None:
        saved = (z.data.reshape(tokens) for z in (q, k, v))
        for z, dz in zip((q, k, v), kernels.attention_backward(do.reshape(tokens), *saved, o, lse, scale), strict=True):
            z.receive(dz.reshape(shape))

    # ȯ = Ṗ v + P v̇ with Ṡ = scale·(q̇ kᵀ + q k̇ᵀ) and Ṗ = P∘(Ṡ − Σ_k P∘Ṡ). Here the T×T arrays are kept.
    def push() -> Tensor:
        factor = tokens[-1] ** -0.5 if scale is None else scale
        qh, kh, vh = tangents.split_heads(q, heads, factor), tangents.split_heads(k, heads), tangents.split_heads(v, heads)
        p = tangents.softmax(tangents.matmul_turned(qh, kh))
        of_q = of_k = of_v = of_p = None
        if q.tangent is not None:
            of_q = tangents.matmul_turned(tangents.split_heads(q.tangent, heads, factor), kh)
        if k.tangent is not None:
            of_k = tangents.matmul_turned(qh, tangents.split_heads(k.tangent, heads))
        if of_q is not None or of_k is not None:
            of_p = tangents.matmul(tangents.softmax_tangent(p, total(of_q, of_k)), vh)
        if v.tangent is not None:
            of_v = tangents.matmul(p, tangents.split_heads(v.tangent, heads))
        return tangents.join_heads(total(of_p, of_v), shape)

    return record(o.reshape(shape), (q, k, v), pull, push)


def add(a: Tensor, b: Tensor, inplace: bool = False) -> Tensor:
    """y = a + b of equal shapes. ``inplace`` writes y over b: only where what made b does not need b for its own gradient.

    Tangents are never written over: they may be shared.
    """
    y = elementwise.add(a.data, b.data, out=b.data if inplace else None)

    # both derivatives are 1
    def pull(dy: Array) -> None:
        a.receive(dy)
        b.receive(dy)

    def push() -> Tensor:
        return total(a.tangent, b.tangent)

    return record(y, (a, b), pull, push)


def add_columns(x: Tensor, emb: Tensor, at: int, inplace: bool = False) -> Tensor:
    """y[b, …, c] = x[b, …, c] + emb[b, at + c]; x (B, …, C), emb (B, E). ``inplace`` as in :func:`add`, over x."""
    y = elementwise.add_channels(x.data, emb.data, at, out=x.data if inplace else None)

    # one number of emb goes to all places of a channel: its gradient is the sum over them
    def pull(dy: Array) -> None:
        if emb.needs_grad:
            emb.receive(elementwise.sum_places(dy), at)
        x.receive(dy)

    def push() -> Tensor:
        return total(x.tangent) if emb.tangent is None else add_columns(zero_or(x.tangent, x), emb.tangent, at)

    return record(y, (x, emb), pull, push)


def concat(a: Tensor, b: Tensor) -> Tensor:
    """y = [a, b] along the channels; a (B, …, C1), b (B, …, C2)."""
    n, m = a.shape[-1], b.shape[-1]

    # each gets its own channels back, contiguous because the kernels before it want that
    def pull(dy: Array) -> None:
        for x, at, count in ((a, 0, n), (b, n, m)):
            if x.needs_grad:
                x.receive(elementwise.channels(dy, at, count))

    def push() -> Tensor:
        return concat(zero_or(a.tangent, a), zero_or(b.tangent, b))

    return record(elementwise.concat(a.data, b.data), (a, b), pull, push)


def embedding(table: Tensor, index: Array) -> Tensor:
    """y[b, …] = table[index[b, …]]; table (rows, E), index (B, …) integers of the same array library."""
    rows, size = table.shape

    # d table[r] = Σ_{b: index[b] = r} dy[b], without a kernel as onehotᵀ dy: a scatter by atomics would not repeat bit for bit
    def pull(dy: Array) -> None:
        if (dw := elementwise.sum_into_rows(dy, index, rows)) is None:
            onehot = (index.reshape(-1, 1) == array_module(dy).arange(rows)).astype(dy.dtype)
            dw = kernels.conv2d_backward_weight(onehot[:, None, None], dy.reshape(-1, 1, 1, size), 1)[0][0, 0]
        table.receive(dw)

    def push() -> Tensor:
        return embedding(total(table.tangent), index)

    return record(elementwise.take_rows(table.data, index), (table,), pull, push)


@lru_cache(maxsize=64)
def _quantile(p: float) -> float:
    return NormalDist().inv_cdf(p)


def dropout(x: Tensor, rate: float, seed: int, step: int, layer: int, first_sample: int = 0) -> Tensor:
    """y = x·mask/(1 − rate), each element kept with probability 1 − rate; 0 <= rate < 1.

    The mask is z < Φ⁻¹(1 − rate) of the engine's normals with key ``seed`` and counter (element, sample, step, DROPOUT +
    256·layer): it depends on nothing else, so a resumed run and another backend draw the same.
    """
    if x.data.dtype == BF16:  # which array code cannot compute with
        return cast(dropout(cast(x, np.float32), rate, seed, step, layer, first_sample), BF16)
    xp = array_module(x.data)
    z = buffers.empty(x.shape, x.data.dtype, xp)
    kernels.normals(z, seed, step, streams.DROPOUT + 256 * layer, first_sample)
    mask = z < _quantile(1 - rate)
    factor = 1 / (1 - rate)

    # y is linear in x: the same mask and factor
    def pull(dy: Array) -> None:
        x.receive(dy * mask * factor)

    def push() -> Tensor:
        return dropout(total(x.tangent), rate, seed, step, layer, first_sample)

    return record(x.data * mask * factor, (x,), pull, push)
