"""GroupNorm with scale, shift and SiLU: two passes over each sample, which stays in the cache between them.

A sample is cut into chunks of RUN rows. Sums over a chunk are kept per channel in float32; chunks, then samples, are
added in their order in float64, whatever the number of threads. Many samples are shared out whole; of few, the chunks are:
first all are summed, then all are written.
"""

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .lanes import exp, fma, load_first, store_first
from .threads import ELEMENTS, alone_below, threads
from .vector import LANES, F

RUN = 128  # rows of a chunk


@jit(forceinline=True)
def _moments_of(x, i, step, pivot, sums, channels, c, count):
    k = load_first(pivot, c, count)
    a, b = load_first(x, i, count) - k, load_first(x, i + step, count) - k
    d, e = load_first(x, i + 2 * step, count) - k, load_first(x, i + 3 * step, count) - k
    s, q = (a + b) + (d + e), fma(a, a, b * b) + fma(d, d, e * e)
    store_first(sums, c, load_first(sums, c, count) + s, count)
    store_first(sums, channels + c, load_first(sums, channels + c, count) + q, count)


@jit(forceinline=True)
def _moment_of(x, i, pivot, sums, channels, c, count):
    a = load_first(x, i, count) - load_first(pivot, c, count)
    store_first(sums, c, load_first(sums, c, count) + a, count)
    store_first(sums, channels + c, fma(a, a, load_first(sums, channels + c, count)), count)


@jit
def _moments(x, rows, channels, pivot, sums):
    """sums += Σ (x − pivot), Σ (x − pivot)² over the rows, per channel."""
    whole, rest = channels - channels % LANES, channels % LANES
    for p in range(0, rows - 3, 4):
        i = p * channels
        for c in range(0, whole, LANES):
            _moments_of(x, i + c, channels, pivot, sums, channels, c, LANES)
        if rest:
            _moments_of(x, i + whole, channels, pivot, sums, channels, whole, rest)
    for p in range(rows - rows % 4, rows):
        i = p * channels
        for c in range(0, whole, LANES):
            _moment_of(x, i + c, pivot, sums, channels, c, LANES)
        if rest:
            _moment_of(x, i + whole, pivot, sums, channels, whole, rest)


@jit(forceinline=True)
def _apply_to(x, y, i, mean, factor, offset, silu, c, count):
    m, f, o = load_first(mean, c, count), load_first(factor, c, count), load_first(offset, c, count)
    v = fma(load_first(x, i, count) - m, f, o)
    if silu:
        v = v / (exp(F(0) - v) + F(1))
    store_first(y, i, v, count)


@jit
def _apply(x, y, rows, channels, mean, factor, offset, silu):
    """y = act((x − mean)·factor + offset) per channel."""
    whole, rest = channels - channels % LANES, channels % LANES
    for p in range(rows):
        i = p * channels
        for c in range(0, whole, LANES):
            _apply_to(x, y, i + c, mean, factor, offset, silu, c, LANES)
        if rest:
            _apply_to(x, y, i + whole, mean, factor, offset, silu, whole, rest)


@jit
def _pivots(x, groups, pivot):
    """A value of each group, about which its moments are taken."""
    size = pivot.size // groups
    for g in range(groups):
        pivot[g * size : (g + 1) * size] = x[0, g * size]


@jit
def _sum_chunk(x, chunk, pivot, part):
    rows, channels = min(RUN, x.shape[0] - chunk * RUN), x.shape[1]
    part[:] = 0
    _moments(x.ctypes.data + 4 * chunk * RUN * channels, rows, channels, pivot.ctypes.data, part.ctypes.data)


@jit
def _write_chunk(x, y, chunk, lines, silu):
    rows, channels = min(RUN, x.shape[0] - chunk * RUN), x.shape[1]
    at, start = lines.ctypes.data, 4 * chunk * RUN * channels
    mean, factor, offset = at, at + 4 * channels, at + 8 * channels
    _apply(x.ctypes.data + start, y.ctypes.data + start, rows, channels, mean, factor, offset, silu)


@jit
def add_up(parts, total):
    """total = Σ of the sums of chunks or samples, in their order, in float64."""
    for i in range(2):
        to = total[i]
        to[:] = 0
        for chunk in range(parts.shape[0]):
            part = parts[chunk, i]
            for c in range(to.size):
                to[c] += part[c]


@jit
def _statistics(parts, rows, gamma, beta, groups, eps, n, scale, shift, modulated, mean, rstd, lines):
    """From the chunks' sums: mean and rstd of each group, and for each channel mean, factor and offset. ``lines[0]``: pivots."""
    channels = gamma.size
    size = channels // groups
    total = np.empty((2, channels))
    add_up(parts, total)
    for g in range(groups):
        a = b = 0.0
        for c in range(g * size, (g + 1) * size):
            a += total[0, c]
            b += total[1, c]
        a /= rows * size
        variance = max(b / (rows * size) - a * a, 0.0)
        r, centre = 1 / np.sqrt(variance + eps), lines[0, g * size] + a
        mean[g], rstd[g] = centre, r
        for c in range(g * size, (g + 1) * size):
            lines[0, c], lines[1, c] = centre, r
    factor, offset = lines[1], lines[2]
    if modulated:
        for c in range(channels):
            one_plus = F(1) + scale[n, c]
            factor[c], offset[c] = factor[c] * gamma[c] * one_plus, beta[c] * one_plus + shift[n, c]
    else:
        for c in range(channels):
            factor[c], offset[c] = factor[c] * gamma[c], beta[c]


@jit
def _forward_tasks(
    first, last, whole, stage, x, gamma, beta, groups, eps, scale, shift, modulated, silu, y, mean, rstd, lines, parts
):
    """Both stages of whole samples, or one stage of a chunk each."""
    chunks = parts.shape[1]
    for task in range(first, last):
        n, start, end = (task, 0, chunks) if whole else (task // chunks, task % chunks, task % chunks + 1)
        if whole:
            _pivots(x[n], groups, lines[n, 0])
        if stage == 0:
            for chunk in range(start, end):
                _sum_chunk(x[n], chunk, lines[n, 0], parts[n, chunk])
        if whole:
            _statistics(parts[n], x.shape[1], gamma, beta, groups, eps, n, scale, shift, modulated, mean[n], rstd[n], lines[n])
        if whole or stage == 1:
            for chunk in range(start, end):
                _write_chunk(x[n], y[n], chunk, lines[n], silu)


@jit
def _forward_between(stage, x, gamma, beta, groups, eps, scale, shift, modulated, mean, rstd, lines, parts):
    """What comes before a stage of the chunks of all samples."""
    for n in range(x.shape[0]):
        if stage == 0:
            _pivots(x[n], groups, lines[n, 0])
        else:
            _statistics(parts[n], x.shape[1], gamma, beta, groups, eps, n, scale, shift, modulated, mean[n], rstd[n], lines[n])


@loops
def _forward(x, gamma, beta, groups, eps, scale, shift, modulated, silu, y, mean, rstd, lines, parts, whole, tasks, workers):
    for stage in range(1 if whole else 2):
        if not whole:
            _forward_between(stage, x, gamma, beta, groups, eps, scale, shift, modulated, mean, rstd, lines, parts)
        for worker in prange(workers):
            first, last = tasks * worker // workers, tasks * (worker + 1) // workers
            given = x, gamma, beta, groups, eps, scale, shift, modulated, silu
            _forward_tasks(first, last, whole, stage, *given, y, mean, rstd, lines, parts)


def shares(batch, chunks, workers):
    """(whether the workers share out samples and not their chunks, how many of them, workers)."""
    whole = batch % workers == 0 or batch >= 4 * workers or chunks == 1
    return whole, batch if whole else batch * chunks, workers


@alone_below(ELEMENTS, lambda x, *_, **__: x.size)
def group_norm_silu(x, gamma, beta, groups, eps=1e-5, scale=None, shift=None, silu=True, out=None):
    batch, channels = x.shape[0], x.shape[-1]
    y = buffers.empty(x.shape, x.dtype) if out is None else out
    mean, rstd = buffers.empty((2, batch, groups), x.dtype)
    if not x.size:
        mean[...], rstd[...] = np.nan, np.nan
        return y, mean, rstd
    flat = batch, x.size // (batch * channels), channels
    lines = buffers.empty((batch, 3, channels), np.float32)
    parts = buffers.empty((batch, -(-flat[1] // RUN), 2, channels), np.float32)
    extra = (scale, shift, True) if scale is not None else (mean, mean, False)
    made = y.reshape(flat), mean, rstd, lines, parts
    _forward(x.reshape(flat), gamma, beta, groups, float(eps), *extra, silu, *made, *shares(*parts.shape[:2], threads()))
    return y, mean, rstd
