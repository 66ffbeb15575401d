"""Diffusion by its definition: the noising of clean data and one row of a sampler."""

from typing import Any

from .. import buffers
from ..arrays import array_module
from ..streams import FORWARD, SAMPLER
from .random import normals

Array = Any

# The columns of one sampler row, in the order in which every backend reads them:
#   x0 = clip(p·x + q·m)
#   x' = a·x + b·x0 + e·m + h1·y_-1 + h2·y_-2 + h3·y_-3 + g·guidance + c·z
#   y  = u·x + w·x0 + r·m                       (what the history keeps of this row)
ROW = ("p", "q", "a", "b", "e", "h1", "h2", "h3", "g", "c", "u", "w", "r")


def q_sample(
    x0: Array,
    t: Array,
    signal: Array,
    noise: Array,
    eps: Array | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = FORWARD,
    first_sample: int = 0,
    out: Array | None = None,
    eps_out: Array | None = None,
) -> tuple[Array, Array]:
    """x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε, with the gather of (√ᾱ_t, √(1−ᾱ_t)) = (signal[t], noise[t]) by t. Eq: S0-U2.

    x0 (B, …); t (B,) integers; signal, noise (T+1,). ε is drawn with (seed, step, stream) unless given. Returns (x_t, ε).
    """
    xp = array_module(x0)
    if eps is None:
        eps = normals(buffers.empty(x0.shape, x0.dtype, xp) if eps_out is None else eps_out, seed, step, stream, first_sample)
    else:
        eps = buffers.into(eps_out, eps)
    column = (x0.shape[0],) + (1,) * (x0.ndim - 1)
    a = signal[t].astype(x0.dtype).reshape(column)
    s = noise[t].astype(x0.dtype).reshape(column)
    return buffers.into(out, a * x0 + s * eps), eps


def step(
    x: Array,
    m: Array,
    rows: Array,
    i: int,
    history: tuple = (),
    guidance: Array | None = None,
    noise: Any = None,
    clip: tuple[float, float] | None = None,
    seed: int = 0,
    stream: int = SAMPLER,
    first_sample: int = 0,
    out: Array | None = None,
    store: Array | None = None,
) -> Array:
    """One row of a sampler table: the only update there is. Columns as in ``ROW``; rows (R, 13).

        x0 = clip(p·x + q·m)
        x' = a·x + b·x0 + e·m + Σ_k h_k·y_{-k} + g·guidance + c·z
        y  = u·x + w·x0 + r·m

    x, m (B, …); ``history`` (y_{-1}, y_{-2}, y_{-3}), at most three. ``noise`` is None (c·z is left out), True (z is made with
    (seed, step = i, stream)) or an array. y goes to ``store`` where that is given. ``out`` may be x itself.
    """
    xp = array_module(x)
    p, q, a, b, e, h1, h2, h3, g, c, u, w, r = (float(k) for k in rows[i])
    x0 = p * x + q * m
    if clip is not None:
        x0 = xp.clip(x0, x.dtype.type(clip[0]), x.dtype.type(clip[1]))
    y = a * x + b * x0 + e * m
    for h, past in zip((h1, h2, h3), history, strict=False):
        y = y + h * past
    if guidance is not None:
        y = y + g * guidance
    if noise is True:
        y = y + c * normals(buffers.empty(x.shape, x.dtype, xp), seed, i, stream, first_sample)
    elif noise is not None:
        y = y + c * noise
    if store is not None:
        store[...] = u * x + w * x0 + r * m
    return buffers.into(out, y)
