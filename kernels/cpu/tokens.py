"""What a Transformer does to its tokens between the matrix products: one pass over memory each, a row of a token at a time.

Sums over the tokens of a sample are made in runs of _RUN tokens and added in their order, whatever the number of threads.
"""

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .lanes import fma, load_first, spread, store_first
from .threads import ELEMENTS, alone_below, threads
from .vector import LANES, F, sigmoid

_CHUNK = 1 << 13
_RUN = 64  # tokens summed in float32 before they go into a float64 sum
_FAST = {"contract", "nsz", "arcp"}
_SUM = _FAST | {"reassoc"}


@jit(fastmath=_FAST)
def _silu_of(x, y):
    for j in range(x.size):
        y[j] = x[j] * sigmoid(x[j])


@jit(fastmath=_FAST)
def _silu_slope(dy, x, dx):
    for j in range(x.size):
        v = x[j]
        s = sigmoid(v)
        dx[j] = dy[j] * (s * (F(1) + v * (F(1) - s)))


@loops
def _silu(x, y):
    for k in prange((x.size + _CHUNK - 1) // _CHUNK):
        _silu_of(x[k * _CHUNK : (k + 1) * _CHUNK], y[k * _CHUNK : (k + 1) * _CHUNK])


@loops
def _silu_gradient(dy, x, dx):
    for k in prange((x.size + _CHUNK - 1) // _CHUNK):
        a, b = k * _CHUNK, (k + 1) * _CHUNK
        _silu_slope(dy[a:b], x[a:b], dx[a:b])


@alone_below(ELEMENTS, lambda x, *_, **__: x.size)
def silu(x, out=None):
    y = buffers.empty(x.shape, x.dtype) if out is None else out
    _silu(x.reshape(-1), y.reshape(-1))
    return y


@alone_below(ELEMENTS, lambda dy, *_, **__: dy.size)
def silu_backward(dy, x, out=None):
    dx = buffers.empty(x.shape, x.dtype) if out is None else out
    _silu_gradient(dy.reshape(-1), x.reshape(-1), dx.reshape(-1))
    return dx


@jit(fastmath=_SUM)
def _mean(x):
    total = F(0)
    for c in range(x.size):
        total += x[c]
    return total / F(x.size)


@jit(fastmath=_SUM)
def _variance(x, mean):
    total = F(0)
    for c in range(x.size):
        d = x[c] - mean
        total += d * d
    return total / F(x.size)


@jit(fastmath=_FAST)
def _affine(x, mean, rstd, factor, offset, y):
    for c in range(x.size):
        y[c] = (x[c] - mean) * rstd * factor[c] + offset[c]


@jit(fastmath=_FAST)
def _fold(gamma, beta, scale, shift, factor, offset):
    for c in range(gamma.size):
        k = F(1) + scale[c]
        factor[c] = gamma[c] * k
        offset[c] = beta[c] * k + shift[c]


@loops
def _normalise(x, gamma, beta, eps, scale, shift, modulated, y, mean, rstd, work, workers):
    batch, tokens, _ = x.shape
    for worker in prange(workers):
        factor, offset = work[worker, 0], work[worker, 1]
        factor[:] = gamma
        offset[:] = beta
        first, last = batch * tokens * worker // workers, batch * tokens * (worker + 1) // workers
        for i in range(first, last):
            n, t = i // tokens, i % tokens
            if modulated and (i == first or t == 0):
                _fold(gamma, beta, scale[n], shift[n], factor, offset)
            row = x[n, t]
            m = _mean(row)
            r = F(1) / np.sqrt(_variance(row, m) + eps)
            mean[n, t], rstd[n, t] = m, r
            _affine(row, m, r, factor, offset, y[n, t])


@alone_below(ELEMENTS, lambda x, *_, **__: x.size)
def layer_norm(x, gamma, beta, eps=1e-5, scale=None, shift=None, out=None):
    workers = threads()
    y = buffers.empty(x.shape, x.dtype) if out is None else out
    mean, rstd = buffers.empty(x.shape[:2], x.dtype), buffers.empty(x.shape[:2], x.dtype)
    work = buffers.empty((workers, 2, x.shape[2]), x.dtype)
    extra = (scale, shift, True) if scale is not None else (mean, mean, False)
    _normalise(x, gamma, beta, F(eps), *extra, y, mean, rstd, work, workers)
    return y, mean, rstd


@jit(fastmath=_SUM)
def _moments(dy, x, mean, factor):
    """⟨g⟩ and ⟨g·(x − mean)⟩ with g = dy·factor."""
    a, b = F(0), F(0)
    for c in range(x.size):
        g = dy[c] * factor[c]
        a += g
        b += g * (x[c] - mean)
    return a / F(x.size), b / F(x.size)


@jit(fastmath=_FAST)
def _collect(dy, x, mean, rstd, s, q):
    """s += dy, q += dy·x̂."""
    for c in range(x.size):
        s[c] += dy[c]
        q[c] += dy[c] * ((x[c] - mean) * rstd)


@jit(fastmath=_FAST)
def _project(dy, x, mean, rstd, factor, a, b, dx):
    """dx = rstd·(g − ⟨g⟩ − x̂⟨g·x̂⟩), given a = ⟨g⟩ and b = ⟨g·(x − mean)⟩."""
    slope = rstd * rstd * b
    for c in range(x.size):
        dx[c] = rstd * (dy[c] * factor[c] - a - (x[c] - mean) * slope)


@loops
def _normalise_gradient(dy, x, gamma, mean, rstd, scale, modulated, dx, parts, work, workers):
    batch, tokens, channels = x.shape
    runs = parts.shape[1]
    for worker in prange(workers):
        factor = work[worker]
        factor[:] = gamma
        for task in range(batch * runs * worker // workers, batch * runs * (worker + 1) // workers):
            n, run = task // runs, task % runs
            if modulated:
                for c in range(channels):
                    factor[c] = gamma[c] * (F(1) + scale[n, c])
            s, q = parts[n, run, 0], parts[n, run, 1]
            s[:] = F(0)
            q[:] = F(0)
            for t in range(run * _RUN, min(tokens, (run + 1) * _RUN)):
                d, row, m, r = dy[n, t], x[n, t], mean[n, t], rstd[n, t]
                _collect(d, row, m, r, s, q)
                a, b = _moments(d, row, m, factor)
                _project(d, row, m, r, factor, a, b, dx[n, t])


@jit
def _sum_runs(parts, gamma, beta, scale, modulated, dgamma, dbeta, dscale, dshift):
    batch, runs, _, channels = parts.shape
    total_s, total_q = np.zeros(channels), np.zeros(channels)
    for n in range(batch):
        s, q = np.zeros(channels), np.zeros(channels)
        for run in range(runs):
            for c in range(channels):
                s[c] += parts[n, run, 0, c]
                q[c] += parts[n, run, 1, c]
        for c in range(channels):
            factor = 1.0
            if modulated:
                dshift[n, c] = s[c]
                dscale[n, c] = gamma[c] * q[c] + beta[c] * s[c]
                factor = 1.0 + scale[n, c]
            total_s[c] += factor * s[c]
            total_q[c] += factor * q[c]
    for c in range(channels):
        dbeta[c], dgamma[c] = total_s[c], total_q[c]


@alone_below(ELEMENTS, lambda dy, *_, **__: dy.size)
def layer_norm_backward(dy, x, gamma, beta, mean, rstd, scale=None, out=None):
    (batch, tokens, channels), workers, modulated = x.shape, threads(), scale is not None
    dx = buffers.empty(x.shape, x.dtype) if out is None else out
    dgamma, dbeta = buffers.empty((channels,), x.dtype), buffers.empty((channels,), x.dtype)
    dscale, dshift = (buffers.empty((batch, channels), x.dtype) if modulated else None for _ in range(2))
    parts = buffers.empty((batch, -(-tokens // _RUN), 2, channels), x.dtype)
    work = buffers.empty((workers, channels), x.dtype)
    factor = scale if modulated else mean
    _normalise_gradient(dy, x, gamma, mean, rstd, factor, modulated, dx, parts, work, workers)
    made = (dscale, dshift) if modulated else (mean, mean)
    _sum_runs(parts, gamma, beta, factor, modulated, dgamma, dbeta, *made)
    return dx, dgamma, dbeta, dscale, dshift


@jit(forceinline=True)
def _gated(x, h, gate, y, i, c, count):
    store_first(y, i, fma(load_first(gate, c, count), load_first(h, i, count), load_first(x, i, count)), count)


@jit
def _gated_rows(first, last, x, h, gate, y):
    _, tokens, channels = x.shape
    at_x, at_h, at_gate, at_y = x.ctypes.data, h.ctypes.data, gate.ctypes.data, y.ctypes.data
    whole, rest = channels - channels % LANES, channels % LANES
    for row in range(first, last):
        i, k = row * channels, row // tokens * channels
        for c in range(0, whole, LANES):
            _gated(at_x, at_h, at_gate, at_y, i + c, k + c, LANES)
        if rest:
            _gated(at_x, at_h, at_gate, at_y, i + whole, k + whole, rest)


@loops
def _add_gated(x, h, gate, y, rows, workers):
    for worker in prange(workers):
        _gated_rows(rows * worker // workers, rows * (worker + 1) // workers, x, h, gate, y)


@alone_below(ELEMENTS, lambda x, *_, **__: x.size)
def add_gated(x, h, gate, out=None):
    y = buffers.empty(x.shape, x.dtype) if out is None else out
    _add_gated(x, h, gate, y, x.shape[0] * x.shape[1], threads())
    return y


@jit(fastmath=_FAST)
def _gated_slope(dy, h, gate, dh, s):
    for c in range(dy.size):
        s[c] += dy[c] * h[c]
        dh[c] = gate[c] * dy[c]


@loops
def _add_gated_gradient(dy, h, gate, dh, parts):
    batch, tokens, _ = dy.shape
    runs = parts.shape[1]
    for task in prange(batch * runs):
        n, run = task // runs, task % runs
        s = parts[n, run]
        s[:] = F(0)
        for t in range(run * _RUN, min(tokens, (run + 1) * _RUN)):
            _gated_slope(dy[n, t], h[n, t], gate[n], dh[n, t], s)


@alone_below(ELEMENTS, lambda dy, *_, **__: dy.size)
def add_gated_backward(dy, h, gate, out=None):
    batch, tokens, channels = dy.shape
    dh = buffers.empty(dy.shape, dy.dtype) if out is None else out
    dgate = buffers.empty((batch, channels), dy.dtype)
    parts = buffers.empty((batch, -(-tokens // _RUN), channels), dy.dtype)
    _add_gated_gradient(dy, h, gate, dh, parts)
    dgate[...] = parts.sum(axis=1, dtype=np.float64)
    return dh, dgate


@jit(forceinline=True)
def _turn(at, count, apart, half, heads, x, c, s, y):
    """``count`` features of every head, from x[at] on, and those that lie ``half`` further."""
    against = spread(F(0)) - s
    for _ in range(heads):
        a, b = load_first(x, at, count), load_first(x, at + half, count)
        store_first(y, at, fma(a, c, b * against), count)
        store_first(y, at + half, fma(b, c, a * s), count)
        at += apart


@jit
def _turns(first, last, x, cos, sin, y):
    """The tokens first..last of all samples; an angle serves all heads."""
    _, tokens, heads, depth = x.shape
    half, at_x, at_cos, at_sin, at_y = depth // 2, x.ctypes.data, cos.ctypes.data, sin.ctypes.data, y.ctypes.data
    for i in range(first, last):
        at, angle, j = i * heads * depth, i % tokens * half, 0
        while j + LANES <= half:
            c, s = load_first(at_cos, angle + j, LANES), load_first(at_sin, angle + j, LANES)
            _turn(at + j, LANES, depth, half, heads, at_x, c, s, at_y)
            j += LANES
        if j < half:
            c, s = load_first(at_cos, angle + j, half - j), load_first(at_sin, angle + j, half - j)
            _turn(at + j, half - j, depth, half, heads, at_x, c, s, at_y)


@loops
def _rotary(x, cos, sin, y, workers):
    tokens = x.shape[0] * x.shape[1]
    for worker in prange(workers):
        _turns(tokens * worker // workers, tokens * (worker + 1) // workers, x, cos, sin, y)


@alone_below(ELEMENTS, lambda x, *_, **__: x.size)
def rotary(x, cos, sin, out=None):
    y = buffers.empty(x.shape, x.dtype) if out is None else out
    _rotary(x, cos, sin, y, threads())
    return y
