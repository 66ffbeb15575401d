"""GroupNorm with scale, shift and SiLU, one sample per task: a sample is read twice while it stays in the cache.

Sums are kept for each channel and folded into groups; eight rows go into them at a time, so that the sums are loaded and stored
once for eight rows. Sums over the batch are added in the order of the samples, whatever the number of threads. Rows of a work
array are taken by index: unpacking it (``a, b = w``) keeps the compiler from vectorising what follows.
"""

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .threads import ELEMENTS, alone_below, threads
from .vector import F, sigmoid

_ROWS = 8
_RUN = 128  # rows summed in float32 before they go into a float64 sum
_FAST = {"contract", "nsz", "arcp"}


@jit(fastmath=_FAST)
def _moments(x, pivot, s, q):
    """s, q = Σ (x − pivot), Σ (x − pivot)² over the rows, per channel."""
    rows, channels = x.shape
    s[:] = F(0)
    q[:] = F(0)
    whole = rows - rows % _ROWS
    for p in range(0, whole, _ROWS):
        x0, x1, x2, x3, x4, x5, x6, x7 = x[p], x[p + 1], x[p + 2], x[p + 3], x[p + 4], x[p + 5], x[p + 6], x[p + 7]
        for c in range(channels):
            k = pivot[c]
            v0, v1, v2, v3 = x0[c] - k, x1[c] - k, x2[c] - k, x3[c] - k
            v4, v5, v6, v7 = x4[c] - k, x5[c] - k, x6[c] - k, x7[c] - k
            s[c] += ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))
            q[c] += ((v0 * v0 + v1 * v1) + (v2 * v2 + v3 * v3)) + ((v4 * v4 + v5 * v5) + (v6 * v6 + v7 * v7))
    for p in range(whole, rows):
        row = x[p]
        for c in range(channels):
            v = row[c] - pivot[c]
            s[c] += v
            q[c] += v * v


@jit(fastmath=_FAST)
def _apply(y, x, mean, factor, offset, silu):
    """y = act((x − mean)·factor + offset) per channel."""
    rows, channels = x.shape
    for p in range(rows):
        xs, ys = x[p], y[p]
        if silu:
            for c in range(channels):
                v = (xs[c] - mean[c]) * factor[c] + offset[c]
                ys[c] = v * sigmoid(v)
        else:
            for c in range(channels):
                ys[c] = (xs[c] - mean[c]) * factor[c] + offset[c]


@loops
def _forward(x, gamma, beta, groups, eps, scale, shift, modulated, silu, y, mean, rstd, work, sums, workers):
    batch, rows, channels = x.shape
    size = channels // groups
    for worker in prange(workers):
        w = work[worker]
        pivot, s, q, factor, offset = w[0], w[1], w[2], w[3], w[4]
        total, square = sums[worker, 0], sums[worker, 1]
        for n in range(batch * worker // workers, batch * (worker + 1) // workers):
            xs = x[n]
            total[:] = 0
            square[:] = 0
            for c in range(channels):
                pivot[c] = xs[0, c - c % size]
            for p in range(0, rows, _RUN):
                _moments(xs[p : p + _RUN], pivot, s, q)
                for c in range(channels):
                    total[c] += s[c]
                    square[c] += q[c]
            for g in range(groups):
                a = b = 0.0
                for c in range(g * size, (g + 1) * size):
                    a += total[c]
                    b += square[c]
                a /= rows * size
                variance = max(b / (rows * size) - a * a, 0.0)
                r, centre = 1 / np.sqrt(variance + eps), pivot[g * size] + a
                mean[n, g], rstd[n, g] = centre, r
                for c in range(g * size, (g + 1) * size):
                    k, o = r * gamma[c], beta[c]
                    if modulated:
                        k, o = k * (F(1) + scale[n, c]), o * (F(1) + scale[n, c]) + shift[n, c]
                    pivot[c], factor[c], offset[c] = centre, k, o
            _apply(y[n], xs, pivot, factor, offset, silu)


@alone_below(ELEMENTS, lambda x, *_, **__: x.size)
def group_norm_silu(x, gamma, beta, groups, eps=1e-5, scale=None, shift=None, silu=True, out=None):
    batch, channels, workers = x.shape[0], x.shape[-1], threads()
    y = buffers.empty(x.shape, x.dtype) if out is None else out
    mean, rstd = buffers.empty((batch, groups), x.dtype), buffers.empty((batch, groups), x.dtype)
    if not x.size:
        mean[...], rstd[...] = np.nan, np.nan
        return y, mean, rstd
    work = buffers.empty((workers, 5, channels), np.float32)
    sums = buffers.empty((workers, 2, channels), np.float64)
    extra = (scale, shift, True) if scale is not None else (mean, mean, False)
    flat = (batch, -1, channels)
    made = y.reshape(flat), mean, rstd
    _forward(x.reshape(flat), gamma, beta, groups, float(eps), *extra, silu, *made, work, sums, workers)
    return y, mean, rstd


@jit(fastmath=_FAST)
def _slopes(dv, dy, x, mean, factor, offset, s, q, silu):
    """dv = dy·act'(v) with v = (x − mean)·factor + offset, and per channel s = Σ dv, q = Σ dv·(x − mean)."""
    rows, channels = x.shape
    s[:] = F(0)
    q[:] = F(0)
    for p in range(rows):
        xs, ys, to = x[p], dy[p], dv[p]
        if silu:
            for c in range(channels):
                v = (xs[c] - mean[c]) * factor[c] + offset[c]
                sig = sigmoid(v)
                to[c] = ys[c] * (sig * (F(1) + v * (F(1) - sig)))
        else:
            for c in range(channels):
                to[c] = ys[c]
    whole = rows - rows % 4
    for p in range(0, whole, 4):
        x0, x1, x2, x3, d0, d1, d2, d3 = x[p], x[p + 1], x[p + 2], x[p + 3], dv[p], dv[p + 1], dv[p + 2], dv[p + 3]
        for c in range(channels):
            k = mean[c]
            s[c] += (d0[c] + d1[c]) + (d2[c] + d3[c])
            q[c] += (d0[c] * (x0[c] - k) + d1[c] * (x1[c] - k)) + (d2[c] * (x2[c] - k) + d3[c] * (x3[c] - k))
    for p in range(whole, rows):
        xs, ds = x[p], dv[p]
        for c in range(channels):
            s[c] += ds[c]
            q[c] += ds[c] * (xs[c] - mean[c])


@jit(fastmath=_FAST)
def _combine(dx, x, mean, a, b, c0):
    """dx = a·dx + b·(x − mean) + c0 per channel."""
    for p in range(x.shape[0]):
        xs, to = x[p], dx[p]
        for c in range(x.shape[1]):
            to[c] = a[c] * to[c] + (b[c] * (xs[c] - mean[c]) + c0[c])


@loops
def _backward(
    dy, x, gamma, beta, groups, mean, rstd, scale, shift, modulated, silu, dx, dgamma, dbeta, dscale, dshift, work, parts, workers
):
    batch, rows, channels = x.shape
    size = channels // groups
    for worker in prange(workers):
        w = work[worker]
        centre, factor, offset, by, s, q, b, c0 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
        for n in range(batch * worker // workers, batch * (worker + 1) // workers):
            xs, to = x[n], dx[n]
            total, product = parts[n, 0], parts[n, 1]
            total[:] = 0
            product[:] = 0
            for c in range(channels):
                one_plus, extra = (F(1) + scale[n, c], shift[n, c]) if modulated else (F(1), F(0))
                centre[c] = mean[n, c // size]
                by[c] = gamma[c] * one_plus
                factor[c] = rstd[n, c // size] * by[c]
                offset[c] = beta[c] * one_plus + extra
            for p in range(0, rows, _RUN):
                _slopes(to[p : p + _RUN], dy[n][p : p + _RUN], xs[p : p + _RUN], centre, factor, offset, s, q, silu)
                for c in range(channels):
                    total[c] += s[c]
                    product[c] += q[c]
            for g in range(groups):
                r = rstd[n, g]
                g_mean = gh_mean = 0.0
                for c in range(g * size, (g + 1) * size):
                    product[c] *= r
                    g_mean += total[c] * by[c]
                    gh_mean += product[c] * by[c]
                g_mean /= rows * size
                gh_mean /= rows * size
                for c in range(g * size, (g + 1) * size):
                    b[c], c0[c] = -r * r * gh_mean, -r * g_mean
            _combine(to, xs, centre, factor, b, c0)
            if modulated:
                for c in range(channels):
                    dshift[n, c] = total[c]
                    dscale[n, c] = product[c] * gamma[c] + total[c] * beta[c]
                    total[c] *= F(1) + scale[n, c]
                    product[c] *= F(1) + scale[n, c]
    for c in range(channels):
        total_c = product_c = 0.0
        for n in range(batch):
            total_c += parts[n, 0, c]
            product_c += parts[n, 1, c]
        dbeta[c], dgamma[c] = total_c, product_c


@alone_below(ELEMENTS, lambda dy, *_, **__: dy.size)
def group_norm_silu_backward(dy, x, gamma, beta, groups, mean, rstd, scale=None, shift=None, silu=True, out=None):
    batch, channels, workers = x.shape[0], x.shape[-1], threads()
    dx = buffers.empty(x.shape, x.dtype) if out is None else out
    dgamma, dbeta = buffers.empty((channels,), x.dtype), buffers.empty((channels,), x.dtype)
    dscale = dshift = None
    modulated = scale is not None
    if modulated:
        dscale, dshift = buffers.empty((batch, channels), x.dtype), buffers.empty((batch, channels), x.dtype)
    work = buffers.empty((workers, 8, channels), np.float32)
    parts = buffers.empty((batch, 2, channels), np.float64)
    flat = (batch, int(np.prod(x.shape[1:-1])), channels)
    given = dy.reshape(flat), x.reshape(flat), gamma, beta, groups, mean, rstd
    extra = (scale, shift, True) if modulated else (mean, mean, False)
    made = dx.reshape(flat), dgamma, dbeta, *((dscale, dshift) if modulated else (mean, mean))
    _backward(*given, *extra, silu, *made, work, parts, workers)
    return dx, dgamma, dbeta, dscale, dshift
