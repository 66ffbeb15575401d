"""The softmax over the last axis and its gradient, a row at a time: it stays in the cache between its two or three passes.

A row's exponentials are summed in runs of _RUN vectors and those added in their order: threads share whole rows.
"""

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .lanes import (
    drain,
    exp_or_0,
    fma,
    largest,
    load,
    load_first,
    load_over,
    misplaced,
    select_below,
    spread,
    store,
    store_first,
    store_past,
    total,
    total_of_both,
)
from .threads import ELEMENTS, alone_below, threads
from .vector import LANES, F

EFFORT = 4  # of a row's element, beside that of an elementwise kernel
PAST = 48 << 20  # bytes of all operands and results, from which on results are written past the caches
PAIR = 2 * LANES  # elements of a row that stays in registers
WIDE = 1 << 12  # elements of a row that is weighed beside the result, where that is written past the caches
_RUN = 64 * LANES  # elements summed in float32 before they go into a float64 sum


@jit(forceinline=True)
def _larger(a, b):
    return select_below(a, b, b, a)


@jit(forceinline=True)
def _top(start, count, x):
    """The largest of x[start : start + count]."""
    none = spread(F(-np.inf))
    a = b = c = d = none
    j, end = start, start + count
    while j + 4 * LANES <= end:
        a, b = _larger(a, load(x, j)), _larger(b, load(x, j + LANES))
        c, d = _larger(c, load(x, j + 2 * LANES)), _larger(d, load(x, j + 3 * LANES))
        j += 4 * LANES
    while j < end:
        a = _larger(a, load_over(x, j, end - j, none))
        j += LANES
    return largest(_larger(_larger(a, b), _larger(c, d)))


@jit(forceinline=True)
def weigh(start, count, x, y, skip):
    """y = e^(x − max) of one row, which in y begins at start - skip; returns (max, Σ y in float64)."""
    top = _top(start, count, x)
    least, whole = spread(F(-np.inf)), 0.0
    shift = spread(top)
    for run in range(start, start + count, _RUN):
        a, j, end = spread(F(0)), run, min(start + count, run + _RUN)
        while j + LANES <= end:
            e = exp_or_0(load(x, j) - shift)
            store(y, j - skip, e)
            a = a + e
            j += LANES
        if j < end:
            e = exp_or_0(load_over(x, j, end - j, least) - shift)
            store_first(y, j - skip, e, end - j)
            a = a + e
        whole += total(a)
    return top, whole


@jit(forceinline=True)
def scale(start, count, x, skip, factor, y, past):
    """y = factor·x of one row, which in x begins at start - skip."""
    j, end = start, start + count
    if past:
        j = min(end, start + misplaced(y, start))
        store_first(y, start, load_first(x, start - skip, j - start) * factor, j - start)
        while j + LANES <= end:
            store_past(y, j, load(x, j - skip) * factor)
            j += LANES
    else:
        while j + LANES <= end:
            store(y, j, load(x, j - skip) * factor)
            j += LANES
    if j < end:
        store_first(y, j, load_first(x, j - skip, end - j) * factor, end - j)


@jit(forceinline=True)
def weigh_pair(start, count, x):
    """As :func:`weigh` for a row of at most two vectors, which it returns instead: (max, Σ, the one, the other)."""
    least = spread(F(-np.inf))
    a = load_over(x, start, count, least)
    if count <= LANES:
        top = largest(a)
        a = exp_or_0(a - spread(top))
        return top, total(a), a, a
    b = load_over(x, start + LANES, count - LANES, least)
    top = largest(_larger(a, b))
    shift = spread(top)
    a, b = exp_or_0(a - shift), exp_or_0(b - shift)
    return top, total_of_both(a, b), a, b


@jit(forceinline=True)
def store_pair(start, count, y, a, b):
    """A row of at most two vectors, a and b."""
    store_first(y, start, a, count)
    if count > LANES:
        store_first(y, start + LANES, b, count - LANES)


@jit
def _pairs(first, last, x, y):
    at_x, at_y, columns = x.ctypes.data, y.ctypes.data, x.shape[1]
    for n in range(first, last):
        _, whole, a, b = weigh_pair(n * columns, columns, at_x)
        factor = F(1 / whole)
        store_pair(n * columns, columns, at_y, a * factor, b * factor)


@jit
def _rows(first, last, x, y, past):
    work = np.empty(WIDE if past else 1, np.float32)
    at_x, at_y, columns = x.ctypes.data, y.ctypes.data, x.shape[1]
    at_work = work.ctypes.data if past else at_y
    for n in range(first, last):
        skip = n * columns if past else 0
        _, whole = weigh(n * columns, columns, at_x, at_work, skip)
        scale(n * columns, columns, at_work, skip, F(1 / whole), at_y, past)
    if past:
        drain()


@loops
def _softmax(x, y, past, workers):
    rows = x.shape[0]
    for worker in prange(workers):
        first, last = rows * worker // workers, rows * (worker + 1) // workers
        if x.shape[1] <= PAIR:
            _pairs(first, last, x, y)
        else:
            _rows(first, last, x, y, past)


def streams(x, y):
    """Whether a row's result is written past the caches: where all is larger than they are, and a row is not."""
    return x.shape[-1] <= WIDE and 2 * x.nbytes >= PAST and y is not x


@alone_below(ELEMENTS, lambda x, *_, **__: EFFORT * x.size)
def softmax(x, out=None):
    y = buffers.empty(x.shape, x.dtype) if out is None else out
    if x.size:
        shape = x.size // x.shape[-1], x.shape[-1]
        _softmax(x.reshape(shape), y.reshape(shape), streams(x, y), threads())
    return y


@jit(forceinline=True)
def _product(a, b, whole, rest):
    """(whole, rest) + a·b, with what the rounding of the product leaves in ``rest``."""
    product = a * b
    return whole + product, rest + fma(a, b, spread(F(0)) - product)


@jit(forceinline=True)
def _mean(start, count, dy, y):
    """Σ y·dy of one row, in float64."""
    mean = 0.0
    for run in range(start, start + count, _RUN):
        a = b = spread(F(0))
        j, end = run, min(start + count, run + _RUN)
        while j + LANES <= end:
            a, b = _product(load(y, j), load(dy, j), a, b)
            j += LANES
        if j < end:
            a, b = _product(load_first(y, j, end - j), load_first(dy, j, end - j), a, b)
        mean += total_of_both(a, b)
    return mean


@jit(forceinline=True)
def _slope(j, count, dy, y, high, low):
    return load_first(y, j, count) * ((load_first(dy, j, count) - high) - low)


@jit
def _pair_slopes(first, last, dy, y, dx):
    at_dy, at_y, at_dx, columns, none = dy.ctypes.data, y.ctypes.data, dx.ctypes.data, y.shape[1], spread(F(0))
    for n in range(first, last):
        j = n * columns
        y1, d1 = load_first(at_y, j, columns), load_first(at_dy, j, columns)
        y2, d2 = y1, d1
        a, b = _product(y1, d1, none, none)
        if columns > LANES:
            y2, d2 = load_first(at_y, j + LANES, columns - LANES), load_first(at_dy, j + LANES, columns - LANES)
            a, b = _product(y2, d2, a, b)
        mean = total_of_both(a, b)
        high = F(mean)
        low = F(mean - np.float64(high))
        store_pair(j, columns, at_dx, y1 * ((d1 - high) - low), y2 * ((d2 - high) - low))


@jit
def _slopes(first, last, dy, y, dx, past):
    at_dy, at_y, at_dx, columns = dy.ctypes.data, y.ctypes.data, dx.ctypes.data, y.shape[1]
    for n in range(first, last):
        j, end = n * columns, (n + 1) * columns
        mean = _mean(j, columns, at_dy, at_y)
        high = F(mean)
        low = F(mean - np.float64(high))  # where y is nearly 1, dy − mean is far smaller than they are
        if past:
            aligned = min(misplaced(at_dx, j), columns)
            store_first(at_dx, j, _slope(j, aligned, at_dy, at_y, high, low), aligned)
            j += aligned
            while j + LANES <= end:
                store_past(at_dx, j, _slope(j, LANES, at_dy, at_y, high, low))
                j += LANES
        else:
            while j + LANES <= end:
                store(at_dx, j, _slope(j, LANES, at_dy, at_y, high, low))
                j += LANES
        if j < end:
            store_first(at_dx, j, _slope(j, end - j, at_dy, at_y, high, low), end - j)
    if past:
        drain()


@loops
def _softmax_gradient(dy, y, dx, past, workers):
    rows = y.shape[0]
    for worker in prange(workers):
        first, last = rows * worker // workers, rows * (worker + 1) // workers
        if y.shape[1] <= PAIR:
            _pair_slopes(first, last, dy, y, dx)
        else:
            _slopes(first, last, dy, y, dx, past)


@alone_below(ELEMENTS, lambda dy, *_, **__: dy.size)
def softmax_backward(dy, y, out=None):
    dx = buffers.empty(y.shape, y.dtype) if out is None else out
    if y.size:
        shape, past = (y.size // y.shape[-1], y.shape[-1]), 3 * y.nbytes >= PAST and dx is not y and dx is not dy
        _softmax_gradient(dy.reshape(shape), y.reshape(shape), dx.reshape(shape), past, threads())
    return dx
