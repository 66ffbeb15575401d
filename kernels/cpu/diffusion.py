"""The forward process and the sampler's update, with their noise made on the way.

Work goes by tiles of one block of normals, which stay in the first-level cache: a tile's sum is built term by term in ``acc``, so
that any set of terms runs through one compiled function, and is written out last, so that ``out`` may be any of the operands.
Operations and their order are those of the definition, each rounded once: the results are the same bits.
"""

import numpy as np
from numba import prange

from .. import buffers
from ..reference import BLOCK, RUN
from ..streams import FORWARD, SAMPLER
from .jit import jit, loops
from .random import U, fill, key
from .threads import ELEMENTS, alone_below, threads
from .vector import F

MADE, GIVEN = 1, 2


@jit
def _forward(x_t, x0, eps, a, s):
    for j in range(x_t.size):
        x_t[j] = a * x0[j] + s * eps[j]


@loops
def _q_sample(x0, a, s, eps, x_t, made, first_sample, step, stream, k0, k1, workers):
    batch, size = x0.shape
    blocks = (size + BLOCK - 1) // BLOCK
    tiles = batch * blocks
    for worker in prange(workers):
        z = np.empty(BLOCK, np.float32)
        for tile in range(tiles * worker // workers, tiles * (worker + 1) // workers):
            n, block = tile // blocks, tile % blocks
            start = block * BLOCK
            count = min(BLOCK, size - start)
            e = eps[n][start : start + count]
            if made:
                fill(z, count, U(block * RUN), U(first_sample + n), step, stream, k0, k1)
                e[:] = z[:count]
            _forward(x_t[n][start : start + count], x0[n][start : start + count], e, a[n], s[n])


@alone_below(ELEMENTS, lambda x0, *_, **__: x0.size)
def q_sample(x0, t, signal, noise, eps=None, seed=0, step=0, stream=FORWARD, first_sample=0, out=None, eps_out=None):
    made = eps is None
    if made:
        eps = buffers.empty(x0.shape, x0.dtype) if eps_out is None else eps_out
    elif eps_out is not None:
        eps_out[...] = eps
        eps = eps_out
    x_t = buffers.empty(x0.shape, x0.dtype) if out is None else out
    if x0.size:
        rows = (x0.shape[0], x0.size // x0.shape[0])
        a, s = signal[t].astype(np.float32), noise[t].astype(np.float32)
        words = int(first_sample), U(step), U(stream), *key(seed)
        _q_sample(x0.reshape(rows), a, s, eps.reshape(rows), x_t.reshape(rows), made, *words, threads())
    return x_t, eps


@jit(inline="always")
def _held(v, low, high):
    v = low if v < low else v
    return high if v > high else v


@jit
def _combine(acc, x, m, k, p, q, clip, low, high):
    """acc = k0·x + k1·x0 + k2·m with x0 = clip(p·x + q·m)."""
    a, b, e = k[0], k[1], k[2]
    if clip:
        for j in range(acc.size):
            acc[j] = a * x[j] + b * _held(p * x[j] + q * m[j], low, high) + e * m[j]
    else:
        for j in range(acc.size):
            acc[j] = a * x[j] + b * (p * x[j] + q * m[j]) + e * m[j]


@jit
def _add(acc, h, term):
    for j in range(acc.size):
        acc[j] += h * term[j]


@loops
def _step(
    x,
    m,
    past1,
    past2,
    past3,
    depth,
    guidance,
    guided,
    noise,
    source,
    store,
    keep,
    out,
    row,
    clip,
    low,
    high,
    first_sample,
    i,
    stream,
    k0,
    k1,
    workers,
):
    batch, size = x.shape
    blocks = (size + BLOCK - 1) // BLOCK
    tiles = batch * blocks
    for worker in prange(workers):
        buffer, z = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        for tile in range(tiles * worker // workers, tiles * (worker + 1) // workers):
            n, block = tile // blocks, tile % blocks
            start = block * BLOCK
            count = min(BLOCK, size - start)
            end = start + count
            acc, xs, ms = buffer[:count], x[n][start:end], m[n][start:end]
            _combine(acc, xs, ms, row[2:5], row[0], row[1], clip, low, high)
            if depth > 0:
                _add(acc, row[5], past1[n][start:end])
            if depth > 1:
                _add(acc, row[6], past2[n][start:end])
            if depth > 2:
                _add(acc, row[7], past3[n][start:end])
            if guided:
                _add(acc, row[8], guidance[n][start:end])
            if source == MADE:
                fill(z, count, U(block * RUN), U(first_sample + n), i, stream, k0, k1)
                _add(acc, row[9], z)
            elif source == GIVEN:
                _add(acc, row[9], noise[n][start:end])
            if keep:
                _combine(z[:count], xs, ms, row[10:13], row[0], row[1], clip, low, high)
                store[n][start:end] = z[:count]
            out[n][start:end] = acc


@alone_below(ELEMENTS, lambda x, *_, **__: x.size)
def step(
    x, m, rows, i, history=(), guidance=None, noise=None, clip=None, seed=0, stream=SAMPLER, first_sample=0, out=None, store=None
):
    if out is None:
        out = buffers.empty(x.shape, x.dtype)
    if not x.size:
        return out
    shape = (x.shape[0], x.size // x.shape[0]) if noise is True else (1, x.size)
    flat = x.reshape(shape)

    def of(a):
        return flat if a is None else a.reshape(shape)

    past = [*map(of, history), flat, flat, flat]
    source = MADE if noise is True else 0 if noise is None else GIVEN
    low, high = (F(0), F(0)) if clip is None else (F(clip[0]), F(clip[1]))
    added = of(guidance), guidance is not None, of(noise if source == GIVEN else None), source
    written = of(store), store is not None, of(out)
    numbers = rows[i].astype(np.float32), clip is not None, low, high
    words = int(first_sample), U(i), U(stream), *key(seed)
    _step(flat, of(m), *past[:3], len(history), *added, *written, *numbers, *words, threads())
    return out
