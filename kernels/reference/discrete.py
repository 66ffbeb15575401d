"""Draws of categorical laws by their definition: the same states from the same logits on every backend.

Everything that decides a draw of float32 weights is an operation that is rounded once: an exponential of such operations, sums in
a fixed order, and a descent through the same sums. float64 weights are drawn in float64, with the library's exponential.
"""

from typing import Any

import numpy as np

from .. import buffers
from ..arrays import array_module
from ..streams import FORWARD, SAMPLER
from .random import words

Array = Any

CHUNK = 32  # weights that are summed as one tree
LEAST = -64.0  # logarithm of a weight, relative to the largest, below which it is exactly 0
SECOND = 1 << 31  # added (modulo 2^32) to the stream of an element's second word


def uniform(r: Array) -> Array:
    """(⌊r/2⁹⌋ + ½)·2⁻²³ of uint32 words: float32 values in (0, 1), exact."""
    xp = array_module(r)
    return (r >> xp.uint32(9)).astype(xp.float32) * xp.float32(2.0**-23) + xp.float32(2.0**-24)


def exp_below_0(x: Array) -> Array:
    """e^x for x ≤ 0 in float32 operations that are each rounded once: within 2 units in the last place; 0 below ``LEAST``."""
    xp = array_module(x)
    f32 = xp.float32
    far = x < f32(LEAST)
    x = xp.where(far, f32(0), x)
    t = x * f32(1.44269504088896341) + f32(12582912)  # 1.5·2²³: the sum is rounded to an integer n, which its low bits hold
    n = t - f32(12582912)
    r = (x - n * f32(0.693359375)) - n * f32(-2.12194440e-4)  # x − n·ln 2
    p = f32(1.9875691500e-4) * r + f32(1.3981999507e-3)
    for k in (8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + f32(k)
    y = ((p * (r * r)) + r) + f32(1)
    scale = ((t.view(xp.uint32) + xp.uint32(127)) << xp.uint32(23)).view(f32)  # 2^n
    return xp.where(far, f32(0), y * scale)


def _sums(log_weights: Array) -> tuple[list[Array], Array, Array]:
    """(levels, prefix, weights) of rows (N, K): the weights relative to the row's largest, and their sums in the fixed order.

    ``levels``: arrays (N, chunks, n) for n = 32, 16, …, 1: the weights, then sums of the two halves of the level before.
    ``prefix`` (N, chunks): sums of whole chunks, one after the other; its last column is the sum of the row.
    """
    xp = array_module(log_weights)
    rows, columns = log_weights.shape
    chunks = -(-columns // CHUNK)
    with np.errstate(invalid="ignore", over="ignore"):  # ∞ − ∞ makes the NaN that gives −1
        x = log_weights - log_weights.max(axis=1, keepdims=True)
        e = exp_below_0(x) if x.dtype == np.float32 else xp.exp(x)
        level = xp.zeros((rows, chunks * CHUNK), x.dtype)
        level[:, :columns] = e
        level = level.reshape(rows, chunks, CHUNK)
        levels = [level]
        while level.shape[2] > 1:
            half = level.shape[2] // 2
            level = level[:, :, :half] + level[:, :, half:]
            levels.append(level)
        prefix = level[:, :, 0].copy()
        for c in range(1, chunks):
            prefix[:, c] = prefix[:, c - 1] + level[:, c, 0]
    return levels, prefix, e


def _descend(levels: list[Array], prefix: Array, r: Array) -> Array:
    """The column where the running sum passes r: chunk by chunk, then down the tree of that chunk; −1 where it never does."""
    xp = array_module(r)
    passed = r[:, None] < prefix
    found, chunk = passed.any(axis=1), passed.argmax(axis=1)
    row = xp.arange(len(r))
    with np.errstate(invalid="ignore"):
        r = xp.where(chunk > 0, r - prefix[row, chunk - 1], r)
        place = xp.zeros_like(chunk)
        for level in levels[-2::-1]:
            half = level.shape[2] // 2
            left, right = level[row, chunk, place], level[row, chunk, place + half]
            go = (r >= left) & (right > 0)  # never to a side without weight
            r, place = xp.where(go, r - left, r), xp.where(go, place + half, place)
    return xp.where(found, CHUNK * chunk + place, -1)


def _result(states: Array, shape: tuple[int, ...], out: Array | None) -> Array:
    if out is None:
        out = buffers.empty(shape, np.int32, array_module(states))
    out[...] = states.reshape(shape)
    return out


def _rows(logits: Array) -> Array:
    """(elements, columns) in float64 or float32."""
    return logits.reshape(-1, logits.shape[-1]).astype(np.float64 if logits.dtype == np.float64 else np.float32, copy=False)


def _two(shape: tuple[int, ...], seed: int, step: int, stream: int, first_sample: int, xp: Any) -> tuple[Array, Array]:
    """The two words of every element of ``shape``."""
    streams = stream, (stream + SECOND) & 0xFFFFFFFF
    first, second = (words(shape, seed, step, s, first_sample, xp).reshape(-1) for s in streams)
    return first, second


def _evenly(r: Array, states: int) -> Array:
    """⌊r·states/2³²⌋."""
    xp = array_module(r)
    return ((r.astype(xp.uint64) * xp.uint64(states)) >> xp.uint64(32)).astype(xp.int64)


def categorical(
    log_weights: Array, seed: int, step: int = 0, stream: int = SAMPLER, first_sample: int = 0, out: Array | None = None
) -> Array:
    """States drawn with probabilities ∝ exp(log_weights) over the last axis. Eq: S4-E24.

    log_weights (B, …, K), unnormalised, −inf for a state that is never drawn; out (B, …) int32. A row without a finite largest
    weight, or with a NaN, gives −1. Element e of a sample takes one uniform, from the word that :func:`normals` would take.
    The weights are w = exp(log_weights − max), in chunks of 32 (the last one filled up with zeros). A chunk is summed by halves,
    s[i] = w[i] + w[i + 16], then 8, 4, 2, 1; chunks one after the other. u times the whole is sought among the running sums of
    the chunks, then down the tree of its chunk, always to a side that has weight.
    """
    xp = array_module(log_weights)
    shape = log_weights.shape[:-1]
    if 0 in shape:
        return _result(xp.empty(0, np.int32), shape, out)
    levels, prefix, _ = _sums(_rows(log_weights))
    u = uniform(words(shape, seed, step, stream, first_sample, xp).reshape(-1)).astype(prefix.dtype)
    return _result(_descend(levels, prefix, u * prefix[:, -1]), shape, out)


def categorical_posterior(
    logits: Array,
    x_t: Array,
    rows: Array,
    index: int,
    mask: int = -1,
    seed: int = 0,
    step: int | None = None,
    stream: int = SAMPLER,
    first_sample: int = 0,
    out: Array | None = None,
) -> Array:
    """x_s drawn from q(x_s|x_t, x̂_0) mixed over x̂_0 with p̃ = softmax(logits), for a uniform or an absorbing law. Eq: S4-E28.

    With (keep, spread, C, D) = rows[index]; uniform (mask < 0): w_j = (keep·[j = x_t] + spread)·(C·p̃_j + D) over the D columns
    of the logits. Absorbing (mask ≥ 0): x_t stays unless it is the mask; else w_j = C·p̃_j and w_mask = D (a column of the mask
    itself is left out of the softmax). logits (B, …, K); x_t (B, …) integers; rows (R, 4) ≥ 0; out (B, …) int32, perhaps x_t.
    ``step`` is ``index`` unless given.

    An element takes two words: the first, of ``stream``, chooses among the parts of the mixture (stay, a state of the softmax,
    any state; or a state of the softmax, the mask), the second, of ``stream`` + 2³¹, draws in the part as :func:`categorical`
    does. So logits are not read where an absorbing law leaves the state as it is. The answer is −1 where a draw needs logits
    that have no finite largest or hold a NaN, where nothing has weight, and where x_t is not a state of a uniform law.
    """
    xp = array_module(logits)
    shape, columns = x_t.shape, logits.shape[-1]
    if 0 in shape:
        return _result(xp.empty(0, np.int32), shape, out)
    flat, x = _rows(logits), x_t.reshape(-1).astype(np.int64)
    if 0 <= mask < columns:
        flat = flat.copy()
        flat[:, mask] = -np.inf
    real = flat.dtype.type
    keep, spread, c, d = (real(float(k)) for k in rows[index])
    first, second = _two(shape, seed, index if step is None else step, stream, first_sample, xp)
    levels, prefix, e = _sums(flat)
    whole = prefix[:, -1]
    u = uniform(first).astype(real)
    drawn = _descend(levels, prefix, uniform(second).astype(real) * whole)
    if mask >= 0:
        v = u * (c + d)
        moved = xp.where(v < c, drawn, xp.where(v < c + d, mask, -1))
        return _result(xp.where(x == mask, moved, x), shape, out)
    known = (x >= 0) & (x < columns)
    own = e[xp.arange(len(x)), xp.where(known, x, 0)]
    stay = keep * (c * own + d * whole)
    soft = stay + (spread * c) * whole
    all_ = soft + ((spread * d) * real(columns)) * whole
    v = u * all_
    state = xp.where(v < stay, x, xp.where(v < soft, drawn, xp.where(v < all_, _evenly(second, columns), -1)))
    return _result(xp.where(known, state, -1), shape, out)


def categorical_q_sample(
    x0: Array,
    t: Array,
    keep: Array,
    states: int,
    mask: int = -1,
    seed: int = 0,
    step: int = 0,
    stream: int = FORWARD,
    first_sample: int = 0,
    out: Array | None = None,
) -> Array:
    """x_t of a uniform or an absorbing law: x0 with probability keep[t], else any of ``states`` or the mask. Eq: S4-E26.

    x0 (B, …) integers; t (B,) integers; keep (T+1,), ᾱ_t; mask < 0 for the uniform law; out (B, …) int32, perhaps x0 itself.
    An element stays where the uniform of its word is below keep[t] in float32; the new state is ⌊r·states/2³²⌋ of its second
    word r, the one of ``stream`` + 2³¹.
    """
    xp = array_module(x0)
    first, second = _two(x0.shape, seed, step, stream, first_sample, xp)
    level = keep[t].astype(np.float32).reshape(-1, 1)
    stays = (uniform(first).reshape(len(t), -1) < level).reshape(-1) if x0.size else xp.empty(0, bool)
    other = mask if mask >= 0 else _evenly(second, states)
    return _result(xp.where(stays, x0.reshape(-1).astype(np.int64), other), x0.shape, out)
