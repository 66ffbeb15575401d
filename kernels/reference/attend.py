"""Attention by its definition."""

from typing import Any

from ..arrays import array_module
from ..buffers import into

Array = Any


def attention(q: Array, k: Array, v: Array, scale: float | None = None, out: Array | None = None) -> tuple[Array, Array]:
    """o = softmax(scale·q kᵀ) v for each head; lse = log Σ exp(scale·q kᵀ). q, k, v (B, T, heads, d); scale defaults to 1/√d.

    Returns (o (B, T, heads, d), lse (B, heads, T)); lse is all that the backward pass needs besides its inputs.
    """
    xp = array_module(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    qh, kh, vh = (z.transpose(0, 2, 1, 3) for z in (q, k, v))
    s = (qh @ kh.swapaxes(-1, -2)) * q.dtype.type(scale)
    top = s.max(axis=-1, keepdims=True)
    p = xp.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    o = ((p / total) @ vh).transpose(0, 2, 1, 3)
    return into(out, xp.ascontiguousarray(o)), (top + xp.log(total))[..., 0]


def attention_backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, scale: float | None = None
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv): with P = exp(scale·q kᵀ − lse), dS = P∘(do vᵀ − Σ_d do∘o): dv = Pᵀdo, dq = scale·dS k, dk = scale·dSᵀ q."""
    xp = array_module(q)
    scale = q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)
    doh, qh, kh, vh, oh = (z.transpose(0, 2, 1, 3) for z in (do, q, k, v, o))
    p = xp.exp((qh @ kh.swapaxes(-1, -2)) * scale - lse[..., None])
    dv = p.swapaxes(-1, -2) @ doh
    ds = p * (doh @ vh.swapaxes(-1, -2) - (doh * oh).sum(axis=-1, keepdims=True))
    dq, dk = (ds @ kh) * scale, (ds.swapaxes(-1, -2) @ qh) * scale
    dq, dk, dv = (xp.ascontiguousarray(z.transpose(0, 2, 1, 3)) for z in (dq, dk, dv))
    return dq, dk, dv
