"""The differentiable functions: forward and backward side by side, for NumPy and CuPy arrays alike, NHWC.

Gradients carry a ``d``: dy is ∂L/∂y. A function's ``pull(dy)`` gives its inputs their share; what it computes stands above it.
"""

from functools import lru_cache
from math import prod
from statistics import NormalDist
from typing import Any

from .. import kernels
from ..kernels import buffers, streams
from ..kernels.arrays import array_module
from .autograd import Tensor, record

Array = Any
Pad = tuple[int, int] | None


def conv2d(x: Tensor, w: Tensor, b: Tensor | None = None, stride: int = 1, upsample: bool = False, pad: Pad = None) -> Tensor:
    """y = w * x + b; x (B, H, W, Cin), w (k, k, Cin, Cout) with k 1 or 3, b (Cout,); ``upsample`` doubles x first.

    w and b need gradients both or neither.
    """
    kernel = w.shape[0]
    y = kernels.conv2d(x.data, w.data, None if b is None else b.data, stride, upsample, pad)

    # y is linear in x and in w: dx and dw are the two transposes, db the sum over all places.
    def pull(dy: Array) -> None:
        if w.needs_grad:
            dw, db = kernels.conv2d_backward_weight(x.data, dy, kernel, stride, upsample, pad)
            w.receive(dw)
            if b is not None:
                b.receive(db)
        if x.needs_grad:
            x.receive(kernels.conv2d_backward_input(dy, w.data, x.shape, stride, upsample, pad))

    return record(y, (x, w) if b is None else (x, w, b), pull)


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """y = x w + b; x (B, in), w (in, out), b (out,). The product is the 1×1 convolution of a 1×1 image."""
    image, matrix = (x.shape[0], 1, 1, x.shape[1]), (1, 1, *w.shape)
    y = kernels.conv2d(x.data.reshape(image), w.data.reshape(matrix), b.data).reshape(x.shape[0], w.shape[1])

    # dw = xᵀ dy, db = Σ_B dy, dx = dy wᵀ
    def pull(dy: Array) -> None:
        dy = dy.reshape(x.shape[0], 1, 1, w.shape[1])
        if w.needs_grad:
            dw, db = kernels.conv2d_backward_weight(x.data.reshape(image), dy, 1)
            w.receive(dw.reshape(w.shape))
            b.receive(db)
        if x.needs_grad:
            x.receive(kernels.conv2d_backward_input(dy, w.data.reshape(matrix), image).reshape(x.shape))

    return record(y, (x, w, b), pull)


def silu(x: Tensor) -> Tensor:
    """y = x·σ(x), any shape."""
    xp = array_module(x.data)
    s = 1 / (1 + xp.exp(-xp.clip(x.data, -80, None)))  # exp of more than 80 would leave float32

    # σ' = σ(1 − σ), so dy/dx = σ + x·σ(1 − σ) = σ·(1 + x·(1 − σ))
    def pull(dy: Array) -> None:
        x.receive(dy * (s * (1 + x.data * (1 - s))))

    return record(x.data * s, (x,), pull)


def group_norm_silu(
    x: Tensor, gamma: Tensor, beta: Tensor, groups: int, eps: float, silu: bool = True, emb: Tensor | None = None, at: int = 0
) -> Tensor:
    """y = silu(v), v = n·(1 + scale) + shift, n = x̂·γ + β, x̂ normalised over each group of channels; x (B, …, C).

    ``emb`` (B, E) holds scale in its columns at..at+C and shift in the next C; without it v = n.
    """
    channels = x.shape[-1]
    scale = shift = None
    if emb is not None:
        scale, shift = emb.data[:, at : at + channels], emb.data[:, at + channels : at + 2 * channels]
    y, mean, rstd = kernels.group_norm_silu(x.data, gamma.data, beta.data, groups, eps, scale, shift, silu)

    # mean and rstd are all that is kept: the kernel recomputes v, and with g = dn·γ, ⟨·⟩ the mean over a group,
    # ∂mean and ∂rstd take the components of g along 1 and x̂ away: dx = rstd·(g − ⟨g⟩ − x̂⟨g·x̂⟩).
    def pull(dy: Array) -> None:
        dx, dgamma, dbeta, dscale, dshift = kernels.group_norm_silu_backward(
            dy, x.data, gamma.data, beta.data, groups, mean, rstd, scale, shift, silu
        )
        gamma.receive(dgamma)
        beta.receive(dbeta)
        x.receive(dx)
        if emb is not None:
            emb.receive(dscale, at=(slice(None), slice(at, at + channels)))
            emb.receive(dshift, at=(slice(None), slice(at + channels, at + 2 * channels)))

    return record(y, (x, gamma, beta) if emb is None else (x, gamma, beta, emb), pull)


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

    return record(o.reshape(shape), (q, k, v), pull)


def add(a: Tensor, b: Tensor, inplace: bool = False) -> Tensor:
    """y = a + b of equal shapes. ``inplace`` writes y over b: only where what made b does not need b for its own gradient."""
    xp = array_module(a.data)
    y = xp.add(a.data, b.data, out=b.data if inplace else buffers.empty(a.shape, a.data.dtype, xp))

    # both derivatives are 1
    def pull(dy: Array) -> None:
        a.receive(dy)
        b.receive(dy)

    return record(y, (a, b), pull)


def add_columns(x: Tensor, emb: Tensor, at: int, inplace: bool = False) -> Tensor:
    """y[b, …, c] = x[b, …, c] + emb[b, at + c]; x (B, …, C), emb (B, E). ``inplace`` as in :func:`add`, over x."""
    xp = array_module(x.data)
    batch, channels = x.shape[0], x.shape[-1]
    part = (slice(None), slice(at, at + channels))
    y = x.data if inplace else buffers.empty(x.shape, x.data.dtype, xp)
    xp.add(x.data, emb.data[part].reshape(batch, *(1,) * (len(x.shape) - 2), channels), out=y)

    # one number of emb goes to all places of a channel: its gradient is the sum over them
    def pull(dy: Array) -> None:
        if emb.needs_grad:
            emb.receive(xp.einsum("bpc->bc", dy.reshape(batch, prod(x.shape[1:-1]), channels)), at=part)
        x.receive(dy)

    return record(y, (x, emb), pull)


def concat(a: Tensor, b: Tensor) -> Tensor:
    """y = [a, b] along the channels; a (B, …, C1), b (B, …, C2)."""
    xp = array_module(a.data)
    n = a.shape[-1]
    y = buffers.empty((*a.shape[:-1], n + b.shape[-1]), a.data.dtype, xp)
    y[..., :n] = a.data
    y[..., n:] = b.data

    # each gets its own channels back, contiguous because the kernels before it want that
    def pull(dy: Array) -> None:
        for x, part in ((a, dy[..., :n]), (b, dy[..., n:])):
            dx = buffers.empty(x.shape, dy.dtype, xp)
            dx[...] = part
            x.receive(dx)

    return record(y, (a, b), pull)


def embedding(table: Tensor, index: Array) -> Tensor:
    """y[b] = table[index[b]]; table (rows, E), index (B,) integers of the same array library."""
    xp = array_module(table.data)

    # d table[r] = Σ_{b: index[b] = r} dy[b] = onehotᵀ dy: a product, since a scatter by atomics would not repeat bit for bit
    def pull(dy: Array) -> None:
        onehot = (index[:, None] == xp.arange(table.shape[0])).astype(dy.dtype)
        dw, _ = kernels.conv2d_backward_weight(onehot[:, None, None], dy[:, None, None], 1)
        table.receive(dw[0, 0])

    return record(table.data[index], (table,), pull)


@lru_cache(maxsize=64)
def _quantile(p: float) -> float:
    return NormalDist().inv_cdf(p)


def dropout(x: Tensor, rate: float, seed: int, step: int, layer: int, first_sample: int = 0) -> Tensor:
    """y = x·mask/(1 − rate), each element kept with probability 1 − rate; 0 <= rate < 1.

    The mask is z < Φ⁻¹(1 − rate) of the engine's normals with key ``seed`` and counter (element, sample, step, DROPOUT +
    256·layer): it depends on nothing else, so a resumed run and another backend draw the same.
    """
    xp = array_module(x.data)
    z = buffers.empty(x.shape, x.data.dtype, xp)
    kernels.normals(z, seed, step, streams.DROPOUT + 256 * layer, first_sample)
    mask = z < _quantile(1 - rate)
    factor = 1 / (1 - rate)

    # y is linear in x: the same mask and factor
    def pull(dy: Array) -> None:
        x.receive(dy * mask * factor)

    return record(x.data * mask * factor, (x,), pull)
