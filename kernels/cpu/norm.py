"""GroupNorm with scale, shift and SiLU: two passes over each sample, which stays in the cache between them.

A sample is cut into chunks of RUN rows. Sums over a chunk are kept per channel in float32; chunks, then samples, are
added in their order in float64, whatever the number of threads. Many samples are shared out whole; of few, the chunks are:
first all are summed, then all are written. Channels may lie in two arrays, the later ones in ``tail``: each pass then goes over
a chunk of the one and of the other. Without a tail the caller gives x in its place, and no channel is left for it.
"""

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .lanes import fma, load_first, sigmoid, store_first
from .threads import ELEMENTS, alone_below, threads
from .vector import LANES, F

RUN = 128  # rows of a chunk
LINES = 3  # of the work on a sample, before the sums of its chunks: mean, factor and offset of each channel


@jit(forceinline=True)
def _moments_of(x, i, step, four, pivot, sums, line, c, count):
    k = load_first(pivot, c, count)
    a = load_first(x, i, count) - k
    s, q = a, a * a
    if four:
        b = load_first(x, i + step, count) - k
        d, e = load_first(x, i + 2 * step, count) - k, load_first(x, i + 3 * step, count) - k
        s, q = (a + b) + (d + e), fma(a, a, b * b) + fma(d, d, e * e)
    store_first(sums, c, load_first(sums, c, count) + s, count)
    store_first(sums, line + c, load_first(sums, line + c, count) + q, count)


@jit
def _moments(x, rows, width, pivot, sums, line):
    """sums += Σ (x − pivot), Σ (x − pivot)² over the rows, per channel; the second sums lie ``line`` after the first."""
    whole, rest = width - width % LANES, width % LANES
    p = 0
    while p < rows:
        i, four = p * width, p + 4 <= rows
        if four:
            for c in range(0, whole, LANES):
                _moments_of(x, i + c, width, True, pivot, sums, line, c, LANES)
        else:
            for c in range(0, whole, LANES):
                _moments_of(x, i + c, width, False, pivot, sums, line, c, LANES)
        if rest:
            _moments_of(x, i + whole, width, four, pivot, sums, line, whole, rest)
        p += 4 if four else 1


@jit(forceinline=True)
def _apply_to(x, i, y, j, m, f, o, silu, count):
    v = fma(load_first(x, i, count) - m, f, o)
    if silu:
        v = v * sigmoid(v)
    store_first(y, j, v, count)


@jit(forceinline=True)
def _apply_of(x, i, width, y, j, step, four, mean, factor, offset, silu, c, count):
    m, f, o = load_first(mean, c, count), load_first(factor, c, count), load_first(offset, c, count)
    _apply_to(x, i, y, j, m, f, o, silu, count)
    if four:
        _apply_to(x, i + width, y, j + step, m, f, o, silu, count)
        _apply_to(x, i + 2 * width, y, j + 2 * step, m, f, o, silu, count)
        _apply_to(x, i + 3 * width, y, j + 3 * step, m, f, o, silu, count)


@jit
def _apply(x, width, y, step, rows, mean, factor, offset, silu):
    """y = act((x − mean)·factor + offset) per channel; rows of x are ``width`` apart, those of y ``step``."""
    whole, rest = width - width % LANES, width % LANES
    p = 0
    while p < rows:
        i, j, four = p * width, p * step, p + 4 <= rows
        if four:
            for c in range(0, whole, LANES):
                _apply_of(x, i + c, width, y, j + c, step, True, mean, factor, offset, silu, c, LANES)
        else:
            for c in range(0, whole, LANES):
                _apply_of(x, i + c, width, y, j + c, step, False, mean, factor, offset, silu, c, LANES)
        if rest:
            _apply_of(x, i + whole, width, y, j + whole, step, four, mean, factor, offset, silu, whole, rest)
        p += 4 if four else 1


@jit
def fill_groups(values, line):
    """line[c] = the value of the group of channel c."""
    size = line.size // values.size
    for g in range(values.size):
        v = values[g]
        for c in range(g * size, (g + 1) * size):
            line[c] = v


@jit
def _pivots(x, tail, groups, pivot):
    """A value of each group, about which its moments are taken."""
    size, own = pivot.size // groups, x.shape[1]
    for g in range(groups):
        first = g * size
        v = x[0, first] if first < own else tail[0, first - own]
        for c in range(first, first + size):
            pivot[c] = v


@jit
def _sum_chunk(x, tail, chunk, pivot, part):
    start, own, line = chunk * RUN, x.shape[1], pivot.size
    rows = min(RUN, x.shape[0] - start)
    part[:] = 0
    _moments(x.ctypes.data + 4 * start * own, rows, own, pivot.ctypes.data, part.ctypes.data, line)
    if line > own:
        at = tail.ctypes.data + 4 * start * (line - own)
        _moments(at, rows, line - own, pivot.ctypes.data + 4 * own, part.ctypes.data + 4 * own, line)


@jit
def _write_chunk(x, tail, y, chunk, lines, silu):
    start, own, line = chunk * RUN, x.shape[1], y.shape[1]
    rows = min(RUN, x.shape[0] - start)
    mean, to = lines.ctypes.data, y.ctypes.data + 4 * start * line
    factor, offset = mean + 4 * line, mean + 8 * line
    _apply(x.ctypes.data + 4 * start * own, own, to, line, rows, mean, factor, offset, silu)
    if line > own:
        at, skip = tail.ctypes.data + 4 * start * (line - own), 4 * own
        _apply(at, line - own, to + skip, line, rows, mean + skip, factor + skip, offset + skip, silu)


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
def parts_of(work, slot, lines):
    """(lines of one number for each channel, sums of the chunks) of one sample."""
    rows = work[slot]
    return rows[:lines], rows[lines:].reshape((rows.shape[0] - lines) // 2, 2, rows.shape[1])


@jit
def _statistics(parts, rows, gamma, beta, groups, eps, n, scale, shift, modulated, mean, rstd, lines):
    """From the chunks' sums: mean and rstd of each group, and for each channel mean, factor and offset. ``lines[0]``: pivots."""
    channels = gamma.size
    size = channels // groups
    total = np.empty((2, channels))
    add_up(parts, total)
    share = 1 / (rows * size)
    for g in range(groups):
        a = b = 0.0
        for c in range(g * size, (g + 1) * size):
            a += total[0, c]
            b += total[1, c]
        a *= share
        variance = max(b * share - a * a, 0.0)
        mean[g], rstd[g] = lines[0, g * size] + a, 1 / np.sqrt(variance + eps)
    factor, offset = lines[1], lines[2]
    fill_groups(mean, lines[0])
    fill_groups(rstd, factor)
    if modulated:
        for c in range(channels):
            one_plus = F(1) + scale[n, c]
            factor[c], offset[c] = factor[c] * gamma[c] * one_plus, beta[c] * one_plus + shift[n, c]
    else:
        for c in range(channels):
            factor[c], offset[c] = factor[c] * gamma[c], beta[c]


@jit
def _forward_tasks(
    first, last, whole, stage, x, tail, gamma, beta, groups, eps, scale, shift, modulated, silu, y, moments, work, slot
):
    """Both stages of whole samples, or one stage of a chunk each."""
    chunks, rows = (work.shape[1] - LINES) // 2, x.shape[1]
    for task in range(first, last):
        n, start, end = (task, 0, chunks) if whole else (task // chunks, task % chunks, task % chunks + 1)
        lines, parts = parts_of(work, slot if whole else n, LINES)
        if whole:
            _pivots(x[n], tail[n], groups, lines[0])
        if stage == 0:
            for chunk in range(start, end):
                _sum_chunk(x[n], tail[n], chunk, lines[0], parts[chunk])
        if whole:
            of = gamma, beta, groups, eps, n, scale, shift, modulated, moments[0, n], moments[1, n]
            _statistics(parts, rows, *of, lines)
        if whole or stage == 1:
            for chunk in range(start, end):
                _write_chunk(x[n], tail[n], y[n], chunk, lines, silu)


@jit
def _forward_between(stage, x, tail, gamma, beta, groups, eps, scale, shift, modulated, moments, work):
    """What comes before a stage of the chunks of all samples."""
    for n in range(x.shape[0]):
        lines, parts = parts_of(work, n, LINES)
        if stage == 0:
            _pivots(x[n], tail[n], groups, lines[0])
        else:
            of = gamma, beta, groups, eps, n, scale, shift, modulated, moments[0, n], moments[1, n]
            _statistics(parts, x.shape[1], *of, lines)


@loops
def _forward(x, tail, gamma, beta, groups, eps, scale, shift, modulated, silu, y, moments, work, whole, tasks, workers):
    for stage in range(1 if whole else 2):
        if not whole:
            _forward_between(stage, x, tail, gamma, beta, groups, eps, scale, shift, modulated, moments, work)
        for worker in prange(workers):
            first, last = tasks * worker // workers, tasks * (worker + 1) // workers
            given = x, tail, gamma, beta, groups, eps, scale, shift, modulated, silu
            _forward_tasks(first, last, whole, stage, *given, y, moments, work, np.int64(worker))


def shares(batch, chunks, workers):
    """(whether the workers share out samples and not their chunks, how many of them, workers)."""
    whole = batch % workers == 0 or batch >= 4 * workers or chunks == 1
    return whole, batch if whole else batch * chunks, workers


def flattened(x, places):
    """x (B, …, C) as (B, places, C)."""
    return x.reshape(x.shape[0], places, x.shape[-1])


@alone_below(ELEMENTS, lambda x, *_, **__: x.size)
def group_norm_silu(x, gamma, beta, groups, eps=1e-5, scale=None, shift=None, silu=True, out=None, tail=None):
    batch, channels = x.shape[0], gamma.size
    y = buffers.empty((*x.shape[:-1], channels), x.dtype) if out is None else out
    moments = buffers.empty((2, batch, groups), x.dtype)
    mean, rstd = moments
    if not y.size:
        mean[...], rstd[...] = np.nan, np.nan
        return y, mean, rstd
    places = y.size // (batch * channels)
    flat = flattened(x, places)
    chunks = -(-places // RUN)
    whole, tasks, workers = shares(batch, chunks, threads())
    work = buffers.empty((workers if whole else batch, LINES + 2 * chunks, channels), np.float32)
    extra = (scale, shift, True) if scale is not None else (mean, mean, False)
    made = flattened(y, places), moments, work
    given = flat, flat if tail is None else flattened(tail, places), gamma, beta, groups, float(eps)
    _forward(*given, *extra, silu, *made, whole, tasks, workers)
    return y, mean, rstd
