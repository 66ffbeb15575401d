"""Group normalisation by its definition."""

from typing import Any

import numpy as np

from ..arrays import array_module
from ..buffers import into
from .tokens import sigmoid

Array = Any


def _joined(x: Array, tail: Array | None) -> Array:
    return x if tail is None else array_module(x).concatenate((x, tail), axis=-1)


def _grouped(x: Array, groups: int) -> Array:
    return x.reshape(x.shape[0], int(np.prod(x.shape[1:-1])), groups, x.shape[-1] // groups)


def _per_sample(v: Array, ndim: int) -> Array:
    return v.reshape(v.shape[0], *(1,) * (ndim - 2), v.shape[-1])


def _modulated(
    x: Array, gamma: Array, beta: Array, groups: int, mean: Array, rstd: Array, scale: Array | None, shift: Array | None
) -> tuple[Array, Array]:
    """(x̂, v): x̂ = (x − mean)·rstd per group, v = (x̂·γ + β)·(1 + scale) + shift."""
    x_hat = ((_grouped(x, groups) - mean[:, None, :, None]) * rstd[:, None, :, None]).reshape(x.shape)
    v = x_hat * gamma + beta
    if scale is not None:
        v = v * (1 + _per_sample(scale, x.ndim)) + _per_sample(shift, x.ndim)
    return x_hat, v


def group_norm_silu(
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    eps: float = 1e-5,
    scale: Array | None = None,
    shift: Array | None = None,
    silu: bool = True,
    out: Array | None = None,
    tail: Array | None = None,
) -> tuple[Array, Array, Array]:
    """y = silu((x̂·γ + β)·(1 + scale) + shift), x̂ = (x − mean)/√(var + eps) over each group of channels and all places.

    x (B, …, C); gamma, beta (C,); scale, shift (B, C) or both None; without ``silu`` the activation is the identity.
    ``tail`` (B, …, C2) holds channels that follow those of x (B, …, C − C2): the result is that of [x, tail].
    Returns (y (B, …, C), mean (B, groups), rstd (B, groups)).
    """
    x = _joined(x, tail)
    xg = _grouped(x, groups)
    mean = xg.mean(axis=(1, 3))
    var = ((xg - mean[:, None, :, None]) ** 2).mean(axis=(1, 3))
    rstd = 1 / array_module(x).sqrt(var + x.dtype.type(eps))
    _, v = _modulated(x, gamma, beta, groups, mean, rstd, scale, shift)
    return into(out, v * sigmoid(v) if silu else v), mean, rstd


def group_norm_silu_backward(
    dy: Array,
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    mean: Array,
    rstd: Array,
    scale: Array | None = None,
    shift: Array | None = None,
    silu: bool = True,
    out: Array | None = None,
    tail: Array | None = None,
    tail_out: Array | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Gradients of :func:`group_norm_silu`: (dx, dgamma, dbeta, dscale, dshift); the last two are None without scale and shift.

    With v the argument of the activation: dv = dy·σ(v)(1 + v(1 − σ(v)));
    n = x̂γ + β: dn = dv(1 + scale), dscale = Σ dv·n, dshift = Σ dv;
    dγ = Σ dn·x̂, dβ = Σ dn; and with g = dn·γ, ⟨·⟩ the mean over a group: dx = rstd·(g − ⟨g⟩ − x̂⟨g·x̂⟩).
    With ``tail`` dx is that of x alone, and the gradient of the tail goes into ``tail_out``, an array like it.
    """
    own = x.shape[-1]
    x = _joined(x, tail)
    x_hat, v = _modulated(x, gamma, beta, groups, mean, rstd, scale, shift)
    dv = dy
    if silu:
        sig = sigmoid(v)
        dv = dy * (sig * (1 + v * (1 - sig)))
    places = tuple(range(1, x.ndim - 1))
    dscale = dshift = None
    dn = dv
    if scale is not None:
        dscale = (dv * (x_hat * gamma + beta)).sum(axis=places)
        dshift = dv.sum(axis=places)
        dn = dv * (1 + _per_sample(scale, x.ndim))
    every = tuple(range(x.ndim - 1))
    dgamma, dbeta = (dn * x_hat).sum(axis=every), dn.sum(axis=every)
    g, h = _grouped(dn * gamma, groups), _grouped(x_hat, groups)
    g_mean = g.mean(axis=(1, 3), keepdims=True)
    gh_mean = (g * h).mean(axis=(1, 3), keepdims=True)
    dx = (rstd[:, None, :, None] * (g - g_mean - h * gh_mean)).reshape(x.shape)
    if tail is not None:
        into(tail_out, dx[..., own:])
        dx = dx[..., :own].copy()
    return into(out, dx), dgamma, dbeta, dscale, dshift
