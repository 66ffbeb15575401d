"""What a Transformer does to its tokens between the matrix products, by definition: tokens (B, T, C)."""

from typing import Any

from ..arrays import array_module
from ..buffers import into

Array = Any


def sigmoid(v: Array) -> Array:
    """1/(1 + e^−v)."""
    xp = array_module(v)
    return 1 / (1 + xp.exp(-xp.clip(v, -80, None)))  # exp of more than 80 would leave float32


def silu(x: Array, out: Array | None = None) -> Array:
    """y = x·σ(x), any shape."""
    return into(out, x * sigmoid(x))


def silu_backward(dy: Array, x: Array, out: Array | None = None) -> Array:
    """dx = dy·σ(x)(1 + x(1 − σ(x)))."""
    s = sigmoid(x)
    return into(out, dy * (s * (1 + x * (1 - s))))


def layer_norm(
    x: Array,
    gamma: Array,
    beta: Array,
    eps: float = 1e-5,
    scale: Array | None = None,
    shift: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """y = n·(1 + scale) + shift, n = x̂·γ + β, x̂ = (x − mean)/√(var + eps) over the features of each token.

    x (B, T, C); gamma, beta (C,); scale, shift (B, C) or both None. Returns (y, mean (B, T), rstd (B, T)).
    """
    mean = x.mean(axis=-1)
    var = ((x - mean[..., None]) ** 2).mean(axis=-1)
    rstd = 1 / array_module(x).sqrt(var + x.dtype.type(eps))
    y = (x - mean[..., None]) * rstd[..., None] * gamma + beta
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, None]) + shift[:, None]
    return into(out, y), mean, rstd


def layer_norm_backward(
    dy: Array,
    x: Array,
    gamma: Array,
    beta: Array,
    mean: Array,
    rstd: Array,
    scale: Array | None = None,
    out: Array | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Gradients of :func:`layer_norm`: (dx, dgamma, dbeta, dscale, dshift); the last two are None without scale.

    dn = dy(1 + scale), dscale = Σ_T dy·n, dshift = Σ_T dy; dγ = Σ dn·x̂, dβ = Σ dn; and with g = dn·γ, ⟨·⟩ the mean over the
    features: dx = rstd·(g − ⟨g⟩ − x̂⟨g·x̂⟩).
    """
    x_hat = (x - mean[..., None]) * rstd[..., None]
    dscale = dshift = None
    dn = dy
    if scale is not None:
        dscale = (dy * (x_hat * gamma + beta)).sum(axis=1)
        dshift = dy.sum(axis=1)
        dn = dy * (1 + scale[:, None])
    g = dn * gamma
    inner = g - g.mean(axis=-1, keepdims=True) - x_hat * (g * x_hat).mean(axis=-1, keepdims=True)
    return into(out, rstd[..., None] * inner), (dn * x_hat).sum(axis=(0, 1)), dn.sum(axis=(0, 1)), dscale, dshift


def add_gated(x: Array, h: Array, gate: Array, out: Array | None = None) -> Array:
    """y = x + gate·h; x, h (B, T, C), gate (B, C)."""
    return into(out, x + gate[:, None] * h)


def add_gated_backward(dy: Array, h: Array, gate: Array, out: Array | None = None) -> tuple[Array, Array]:
    """Gradients of :func:`add_gated` but for dx = dy: (dh = gate·dy, dgate = Σ_T dy·h)."""
    return into(out, gate[:, None] * dy), (dy * h).sum(axis=1)


def rotary(x: Array, cos: Array, sin: Array, out: Array | None = None) -> Array:
    """Features i and i + d/2 of every head turned by the angle of their place: (a, b) to (a·cos − b·sin, b·cos + a·sin).

    x (B, T, heads, d) with d even; cos, sin (T, d/2). The gradient is the turn back: with −sin.
    """
    half = x.shape[-1] // 2
    a, b, c, s = x[..., :half], x[..., half:], cos[:, None], sin[:, None]
    return into(out, array_module(x).concatenate((a * c - b * s, b * c + a * s), axis=-1))
