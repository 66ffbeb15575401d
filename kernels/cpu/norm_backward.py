"""The gradients of GroupNorm with scale, shift and SiLU, in chunks of rows as the forward pass takes them."""

from math import prod

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .lanes import exp, fma, load_first, spread, store_first
from .norm import RUN, add_up, shares
from .threads import ELEMENTS, alone_below, threads
from .vector import LANES, F


@jit(forceinline=True)
def _slope(dx, dy, x, i, count, m, f, o, silu):
    """dv, which goes to dx, and x − mean."""
    h, d = load_first(x, i, count) - m, load_first(dy, i, count)
    if silu:
        v = fma(h, f, o)
        sig = spread(F(1)) / (exp(F(0) - v) + F(1))
        d = d * (sig * fma(v, F(1) - sig, spread(F(1))))
    store_first(dx, i, d, count)
    return d, h


@jit(forceinline=True)
def _slopes_of(dx, dy, x, i, step, two, mean, factor, offset, silu, sums, channels, c, count):
    m, f, o = load_first(mean, c, count), load_first(factor, c, count), load_first(offset, c, count)
    s, h = _slope(dx, dy, x, i, count, m, f, o, silu)
    q = s * h
    if two:
        d, h = _slope(dx, dy, x, i + step, count, m, f, o, silu)
        s, q = s + d, fma(d, h, q)
    store_first(sums, c, load_first(sums, c, count) + s, count)
    store_first(sums, channels + c, load_first(sums, channels + c, count) + q, count)


@jit
def _slopes(dx, dy, x, rows, channels, mean, factor, offset, silu, sums):
    """dx = dv, and sums += Σ dv, Σ dv·(x − mean) over the rows, per channel."""
    whole, rest = channels - channels % LANES, channels % LANES
    for p in range(0, rows, 2):
        i, two = p * channels, p + 1 < rows
        if two:
            for c in range(0, whole, LANES):
                _slopes_of(dx, dy, x, i + c, channels, True, mean, factor, offset, silu, sums, channels, c, LANES)
        else:
            for c in range(0, whole, LANES):
                _slopes_of(dx, dy, x, i + c, channels, False, mean, factor, offset, silu, sums, channels, c, LANES)
        if rest:
            _slopes_of(dx, dy, x, i + whole, channels, two, mean, factor, offset, silu, sums, channels, whole, rest)


@jit(forceinline=True)
def _combine_of(dx, x, i, mean, factor, b, c0, c, count):
    h = load_first(x, i, count) - load_first(mean, c, count)
    rest = fma(load_first(b, c, count), h, load_first(c0, c, count))
    store_first(dx, i, fma(load_first(factor, c, count), load_first(dx, i, count), rest), count)


@jit
def _combine(dx, x, rows, channels, mean, factor, b, c0):
    """dx = factor·dx + b·(x − mean) + c0 per channel."""
    whole, rest = channels - channels % LANES, channels % LANES
    for p in range(rows):
        i = p * channels
        for c in range(0, whole, LANES):
            _combine_of(dx, x, i + c, mean, factor, b, c0, c, LANES)
        if rest:
            _combine_of(dx, x, i + whole, mean, factor, b, c0, whole, rest)


@jit
def _lines(gamma, beta, groups, mean, rstd, n, scale, shift, modulated, lines):
    """For each channel its mean, factor, offset, and the factor without rstd."""
    channels = gamma.size
    size = channels // groups
    for g in range(groups):
        for c in range(g * size, (g + 1) * size):
            lines[0, c], lines[1, c] = mean[g], rstd[g]
    factor, offset, by = lines[1], lines[2], lines[3]
    for c in range(channels):
        by[c], offset[c] = gamma[c], beta[c]
    if modulated:
        for c in range(channels):
            one_plus = F(1) + scale[n, c]
            by[c], offset[c] = by[c] * one_plus, offset[c] * one_plus + shift[n, c]
    for c in range(channels):
        factor[c] *= by[c]


@jit
def _slopes_chunk(dx, dy, x, chunk, lines, silu, part):
    rows, channels = min(RUN, x.shape[0] - chunk * RUN), x.shape[1]
    at, start = lines.ctypes.data, 4 * chunk * RUN * channels
    part[:] = 0
    of = dx.ctypes.data + start, dy.ctypes.data + start, x.ctypes.data + start
    _slopes(*of, rows, channels, at, at + 4 * channels, at + 8 * channels, silu, part.ctypes.data)


@jit
def _combine_chunk(dx, x, chunk, lines):
    rows, channels = min(RUN, x.shape[0] - chunk * RUN), x.shape[1]
    at, start, line = lines.ctypes.data, 4 * chunk * RUN * channels, 4 * channels
    of = dx.ctypes.data + start, x.ctypes.data + start
    _combine(*of, rows, channels, at, at + line, at + 4 * line, at + 5 * line)


@jit
def _projections(parts, rows, gamma, beta, groups, rstd, n, scale, modulated, dscale, dshift, lines, total):
    """From the chunks' sums, in ``total``: Σ dn and Σ dn·x̂ per channel; and the two lines of :func:`_combine`."""
    channels = gamma.size
    size = channels // groups
    add_up(parts, total)
    for g in range(groups):
        r = np.float64(rstd[g])
        g_mean = gh_mean = 0.0
        for c in range(g * size, (g + 1) * size):
            total[1, c] *= r
            g_mean += total[0, c] * lines[3, c]
            gh_mean += total[1, c] * lines[3, c]
        g_mean /= rows * size
        gh_mean /= rows * size
        for c in range(g * size, (g + 1) * size):
            lines[4, c], lines[5, c] = -r * r * gh_mean, -r * g_mean
    if modulated:
        for c in range(channels):
            dshift[n, c] = total[0, c]
            dscale[n, c] = total[1, c] * gamma[c] + total[0, c] * beta[c]
            total[0, c] *= F(1) + scale[n, c]
            total[1, c] *= F(1) + scale[n, c]


@jit
def _backward_tasks(
    first,
    last,
    whole,
    stage,
    dy,
    x,
    gamma,
    beta,
    groups,
    mean,
    rstd,
    scale,
    shift,
    modulated,
    silu,
    dx,
    dscale,
    dshift,
    lines,
    parts,
    totals,
):
    """Both stages of whole samples, or one stage of a chunk each."""
    chunks = parts.shape[1]
    for task in range(first, last):
        n, start, end = (task, 0, chunks) if whole else (task // chunks, task % chunks, task % chunks + 1)
        if whole:
            _lines(gamma, beta, groups, mean[n], rstd[n], n, scale, shift, modulated, lines[n])
        if stage == 0:
            for chunk in range(start, end):
                _slopes_chunk(dx[n], dy[n], x[n], chunk, lines[n], silu, parts[n, chunk])
        if whole:
            extra = n, scale, modulated, dscale, dshift
            _projections(parts[n], x.shape[1], gamma, beta, groups, rstd[n], *extra, lines[n], totals[n])
        if whole or stage == 1:
            for chunk in range(start, end):
                _combine_chunk(dx[n], x[n], chunk, lines[n])


@jit
def _backward_between(
    stage, gamma, beta, groups, rows, mean, rstd, scale, shift, modulated, dscale, dshift, lines, parts, totals
):
    """What comes before a stage of the chunks of all samples."""
    for n in range(parts.shape[0]):
        if stage == 0:
            _lines(gamma, beta, groups, mean[n], rstd[n], n, scale, shift, modulated, lines[n])
        else:
            extra = n, scale, modulated, dscale, dshift
            _projections(parts[n], rows, gamma, beta, groups, rstd[n], *extra, lines[n], totals[n])


@jit
def _sum_samples(totals, dgamma, dbeta):
    total = np.empty(totals.shape[1:])
    add_up(totals, total)
    dbeta[:] = total[0]
    dgamma[:] = total[1]


@loops
def _backward(
    dy,
    x,
    gamma,
    beta,
    groups,
    mean,
    rstd,
    scale,
    shift,
    modulated,
    silu,
    dx,
    dgamma,
    dbeta,
    dscale,
    dshift,
    lines,
    parts,
    totals,
    whole,
    tasks,
    workers,
):
    for stage in range(1 if whole else 2):
        if not whole:
            given = gamma, beta, groups, x.shape[1], mean, rstd, scale, shift, modulated
            _backward_between(stage, *given, dscale, dshift, lines, parts, totals)
        for worker in prange(workers):
            first, last = tasks * worker // workers, tasks * (worker + 1) // workers
            of = dy, x, gamma, beta, groups, mean, rstd, scale, shift, modulated, silu
            _backward_tasks(first, last, whole, stage, *of, dx, dscale, dshift, lines, parts, totals)
    _sum_samples(totals, dgamma, dbeta)


@alone_below(ELEMENTS, lambda dy, *_, **__: dy.size)
def group_norm_silu_backward(dy, x, gamma, beta, groups, mean, rstd, scale=None, shift=None, silu=True, out=None):
    batch, channels = x.shape[0], x.shape[-1]
    dx = buffers.empty(x.shape, x.dtype) if out is None else out
    dgamma, dbeta = buffers.empty((2, channels), x.dtype)
    dscale = dshift = None
    modulated = scale is not None
    if modulated:
        dscale, dshift = buffers.empty((2, batch, channels), x.dtype)
    flat = batch, prod(x.shape[1:-1]), channels
    lines = buffers.empty((batch, 6, channels), np.float32)
    parts = buffers.empty((batch, -(-flat[1] // RUN), 2, channels), np.float32)
    totals = buffers.empty((batch, 2, channels), np.float64)
    given = dy.reshape(flat), x.reshape(flat), gamma, beta, groups, mean, rstd
    extra = (scale, shift, True) if modulated else (mean, mean, False)
    made = dx.reshape(flat), dgamma, dbeta, *((dscale, dshift) if modulated else (mean, mean))
    _backward(*given, *extra, silu, *made, lines, parts, totals, *shares(*parts.shape[:2], threads()))
    return dx, dgamma, dbeta, dscale, dshift
