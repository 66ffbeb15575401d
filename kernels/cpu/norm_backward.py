"""The gradients of GroupNorm with scale, shift and SiLU, in chunks of rows as the forward pass takes them."""

from math import prod

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .lanes import fma, load_first, sigmoid, spread, store_first
from .norm import RUN, add_up, fill_groups, flattened, parts_of, shares
from .threads import ELEMENTS, alone_below, threads
from .vector import LANES, F

MEAN, FACTOR, OFFSET, BY, ALONG, BACK = range(6)  # lines of a sample: one number for each channel
LINES = 6


@jit(forceinline=True)
def _slope(dx, dy, j, x, i, count, m, f, o, silu):
    """dv, which goes to dx, and x − mean."""
    h, d = load_first(x, i, count) - m, load_first(dy, j, count)
    if silu:
        v = fma(h, f, o)
        sig = sigmoid(v)
        d = d * (sig * fma(v, F(1) - sig, spread(F(1))))
    store_first(dx, i, d, count)
    return d, h


@jit(forceinline=True)
def _slopes_of(dx, dy, j, step, x, i, width, four, mean, factor, offset, silu, sums, line, c, count):
    m, f, o = load_first(mean, c, count), load_first(factor, c, count), load_first(offset, c, count)
    s, h = _slope(dx, dy, j, x, i, count, m, f, o, silu)
    q = s * h
    if four:
        d, h = _slope(dx, dy, j + step, x, i + width, count, m, f, o, silu)
        s, q = s + d, fma(d, h, q)
        d, h = _slope(dx, dy, j + 2 * step, x, i + 2 * width, count, m, f, o, silu)
        s, q = s + d, fma(d, h, q)
        d, h = _slope(dx, dy, j + 3 * step, x, i + 3 * width, count, m, f, o, silu)
        s, q = s + d, fma(d, h, q)
    store_first(sums, c, load_first(sums, c, count) + s, count)
    store_first(sums, line + c, load_first(sums, line + c, count) + q, count)


@jit
def _slopes(dx, dy, step, x, width, rows, mean, factor, offset, silu, sums, line):
    """dx = dv, and sums += Σ dv, Σ dv·(x − mean) over the rows, per channel. Rows of dy lie ``step`` apart."""
    whole, rest = width - width % LANES, width % LANES
    p = 0
    while p < rows:
        i, j, four = p * width, p * step, p + 4 <= rows
        if four:
            for c in range(0, whole, LANES):
                _slopes_of(dx, dy, j + c, step, x, i + c, width, True, mean, factor, offset, silu, sums, line, c, LANES)
        else:
            for c in range(0, whole, LANES):
                _slopes_of(dx, dy, j + c, step, x, i + c, width, False, mean, factor, offset, silu, sums, line, c, LANES)
        if rest:
            at = j + whole, step, x, i + whole
            _slopes_of(dx, dy, *at, width, four, mean, factor, offset, silu, sums, line, whole, rest)
        p += 4 if four else 1


@jit(forceinline=True)
def _combine_to(dx, x, i, m, f, a, b, count):
    rest = fma(a, load_first(x, i, count) - m, b)
    store_first(dx, i, fma(f, load_first(dx, i, count), rest), count)


@jit(forceinline=True)
def _combine_of(dx, x, i, width, four, mean, factor, along, back, c, count):
    m, f = load_first(mean, c, count), load_first(factor, c, count)
    a, b = load_first(along, c, count), load_first(back, c, count)
    _combine_to(dx, x, i, m, f, a, b, count)
    if four:
        _combine_to(dx, x, i + width, m, f, a, b, count)
        _combine_to(dx, x, i + 2 * width, m, f, a, b, count)
        _combine_to(dx, x, i + 3 * width, m, f, a, b, count)


@jit
def _combine(dx, x, width, rows, mean, factor, along, back):
    """dx = factor·dx + along·(x − mean) + back per channel."""
    whole, rest = width - width % LANES, width % LANES
    p = 0
    while p < rows:
        i, four = p * width, p + 4 <= rows
        if four:
            for c in range(0, whole, LANES):
                _combine_of(dx, x, i + c, width, True, mean, factor, along, back, c, LANES)
        else:
            for c in range(0, whole, LANES):
                _combine_of(dx, x, i + c, width, False, mean, factor, along, back, c, LANES)
        if rest:
            _combine_of(dx, x, i + whole, width, four, mean, factor, along, back, whole, rest)
        p += 4 if four else 1


@jit
def _lines(gamma, beta, mean, rstd, n, scale, shift, modulated, lines):
    """For each channel its mean, factor, offset, and the factor without rstd."""
    fill_groups(mean, lines[MEAN])
    fill_groups(rstd, lines[FACTOR])
    factor, offset, by = lines[FACTOR], lines[OFFSET], lines[BY]
    if modulated:
        for c in range(gamma.size):
            one_plus = F(1) + scale[n, c]
            by[c], offset[c] = gamma[c] * one_plus, beta[c] * one_plus + shift[n, c]
            factor[c] *= by[c]
    else:
        for c in range(gamma.size):
            by[c], offset[c] = gamma[c], beta[c]
            factor[c] *= gamma[c]


@jit
def _slopes_chunk(dx, dtail, dy, x, tail, chunk, lines, silu, part):
    start, own, line = chunk * RUN, x.shape[1], dy.shape[1]
    rows = min(RUN, x.shape[0] - start)
    mean, sums, of, at = lines.ctypes.data, part.ctypes.data, dy.ctypes.data + 4 * start * line, 4 * start * own
    factor, offset = mean + 4 * FACTOR * line, mean + 4 * OFFSET * line
    part[:] = 0
    _slopes(dx.ctypes.data + at, of, line, x.ctypes.data + at, own, rows, mean, factor, offset, silu, sums, line)
    if line > own:
        at, skip, more = 4 * start * (line - own), 4 * own, line - own
        given = dtail.ctypes.data + at, of + skip, line, tail.ctypes.data + at, more, rows
        _slopes(*given, mean + skip, factor + skip, offset + skip, silu, sums + skip, line)


@jit
def _combine_chunk(dx, dtail, x, tail, chunk, lines):
    start, own, line = chunk * RUN, x.shape[1], lines.shape[1]
    rows = min(RUN, x.shape[0] - start)
    mean, at = lines.ctypes.data, 4 * start * own
    factor, along, back = mean + 4 * FACTOR * line, mean + 4 * ALONG * line, mean + 4 * BACK * line
    _combine(dx.ctypes.data + at, x.ctypes.data + at, own, rows, mean, factor, along, back)
    if line > own:
        at, skip = 4 * start * (line - own), 4 * own
        given = dtail.ctypes.data + at, tail.ctypes.data + at, line - own, rows
        _combine(*given, mean + skip, factor + skip, along + skip, back + skip)


@jit
def _projections(parts, rows, gamma, beta, rstd, n, scale, modulated, modulation, lines, total):
    """From the chunks' sums, in ``total``: Σ dn and Σ dn·x̂ per channel; and the two lines of :func:`_combine`."""
    channels, groups = gamma.size, rstd.size
    size = channels // groups
    room = np.empty((4, channels))
    sums, plain, turned = room[:2], room[2], room[3]
    add_up(parts, sums)
    by = lines[BY]
    for c in range(channels):
        plain[c], turned[c] = sums[0, c] * by[c], sums[1, c] * by[c]
    share = 1 / (rows * size)
    along, back = lines[ALONG], lines[BACK]
    for g in range(groups):
        r = np.float64(rstd[g])
        a = b = 0.0
        for c in range(g * size, (g + 1) * size):
            a += plain[c]
            b += turned[c]
        a, b = -r * (a * share), -r * r * r * (b * share)
        for c in range(g * size, (g + 1) * size):
            along[c], back[c] = b, a
            sums[1, c] *= r
    if modulated:
        for c in range(channels):
            one_plus = F(1) + scale[n, c]
            modulation[1, n, c] = sums[0, c]
            modulation[0, n, c] = sums[1, c] * gamma[c] + sums[0, c] * beta[c]
            total[0, c], total[1, c] = sums[0, c] * one_plus, sums[1, c] * one_plus
    else:
        for c in range(channels):
            total[0, c], total[1, c] = sums[0, c], sums[1, c]


@jit
def _backward_tasks(
    first,
    last,
    whole,
    stage,
    dy,
    x,
    tail,
    gamma,
    beta,
    mean,
    rstd,
    scale,
    shift,
    modulated,
    silu,
    dx,
    dtail,
    modulation,
    work,
    slot,
    totals,
):
    """Both stages of whole samples, or one stage of a chunk each."""
    chunks = (work.shape[1] - LINES) // 2
    for task in range(first, last):
        n, start, end = (task, 0, chunks) if whole else (task // chunks, task % chunks, task % chunks + 1)
        lines, parts = parts_of(work, slot if whole else n, LINES)
        if whole:
            _lines(gamma, beta, mean[n], rstd[n], n, scale, shift, modulated, lines)
        if stage == 0:
            for chunk in range(start, end):
                _slopes_chunk(dx[n], dtail[n], dy[n], x[n], tail[n], chunk, lines, silu, parts[chunk])
        if whole:
            of = gamma, beta, rstd[n], n, scale, modulated, modulation
            _projections(parts, x.shape[1], *of, lines, totals[n])
        if whole or stage == 1:
            for chunk in range(start, end):
                _combine_chunk(dx[n], dtail[n], x[n], tail[n], chunk, lines)


@jit
def _backward_between(stage, gamma, beta, rows, mean, rstd, scale, shift, modulated, modulation, work, totals):
    """What comes before a stage of the chunks of all samples."""
    for n in range(totals.shape[0]):
        lines, parts = parts_of(work, n, LINES)
        if stage == 0:
            _lines(gamma, beta, mean[n], rstd[n], n, scale, shift, modulated, lines)
        else:
            of = gamma, beta, rstd[n], n, scale, modulated, modulation
            _projections(parts, rows, *of, lines, totals[n])


@jit
def _sum_samples(totals, affine):
    total = np.empty(totals.shape[1:])
    add_up(totals, total)
    affine[0, :] = total[1]
    affine[1, :] = total[0]


@loops
def _backward(
    dy,
    x,
    tail,
    gamma,
    beta,
    mean,
    rstd,
    scale,
    shift,
    modulated,
    silu,
    dx,
    dtail,
    affine,
    modulation,
    work,
    totals,
    whole,
    tasks,
    workers,
):
    for stage in range(1 if whole else 2):
        if not whole:
            given = gamma, beta, x.shape[1], mean, rstd, scale, shift, modulated
            _backward_between(stage, *given, modulation, work, totals)
        for worker in prange(workers):
            first, last = tasks * worker // workers, tasks * (worker + 1) // workers
            of = dy, x, tail, gamma, beta, mean, rstd, scale, shift, modulated, silu
            _backward_tasks(first, last, whole, stage, *of, dx, dtail, modulation, work, np.int64(worker), totals)
    _sum_samples(totals, affine)


@alone_below(ELEMENTS, lambda dy, *_, **__: dy.size)
def group_norm_silu_backward(
    dy, x, gamma, beta, groups, mean, rstd, scale=None, shift=None, silu=True, out=None, tail=None, tail_out=None
):
    batch, channels, places = x.shape[0], gamma.size, prod(x.shape[1:-1])
    dx = buffers.empty(x.shape, x.dtype) if out is None else out
    affine = buffers.empty((2, channels), x.dtype)
    modulated = scale is not None
    modulation = buffers.empty((2, batch, channels), x.dtype) if modulated else affine[:, None]
    chunks = -(-places // RUN)
    whole, tasks, workers = shares(batch, chunks, threads())
    work = buffers.empty((workers if whole else batch, LINES + 2 * chunks, channels), np.float32)
    totals = buffers.empty((batch, 2, channels), np.float32)
    flat, flat_dx = flattened(x, places), flattened(dx, places)
    more, flat_dtail = (flat, flat_dx) if tail is None else (flattened(tail, places), flattened(tail_out, places))
    extra = (scale, shift, True) if modulated else (mean, mean, False)
    given = flattened(dy, places), flat, more, gamma, beta, mean, rstd, *extra, silu
    made = flat_dx, flat_dtail, affine, modulation, work, totals
    _backward(*given, *made, whole, tasks, workers)
    return dx, *affine, *(modulation if modulated else (None, None))
