"""Training losses with their gradients, in one pass over the operands.

Sums over a sample are made in runs of _RUN elements and added in their order, whatever the number of threads.
"""

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .lanes import drain, fma, load_first, spread, store_first, total, with_lane
from .rows import EFFORT, PAIR, WIDE, scale, store_pair, streams, weigh, weigh_pair
from .threads import ELEMENTS, alone_below, threads
from .vector import LANES, F, bits_of, float_of

_RUN = 1 << 12  # elements summed in float32 before they go into a float64 sum


@jit(forceinline=True)
def _difference(j, output, target, gradient, slope, count):
    d = load_first(output, j, count) - load_first(target, j, count)
    store_first(gradient, j, slope * d, count)
    return d


@jit
def _run(j, end, output, target, gradient, slope):
    """gradient = slope·(output − target) on j..end; Σ (output − target)² there."""
    a = b = c = d = spread(F(0))
    while j + 4 * LANES <= end:
        u = _difference(j, output, target, gradient, slope, LANES)
        v = _difference(j + LANES, output, target, gradient, slope, LANES)
        w = _difference(j + 2 * LANES, output, target, gradient, slope, LANES)
        x = _difference(j + 3 * LANES, output, target, gradient, slope, LANES)
        a, b, c, d = fma(u, u, a), fma(v, v, b), fma(w, w, c), fma(x, x, d)
        j += 4 * LANES
    while j < end:
        u = _difference(j, output, target, gradient, slope, end - j)
        a = fma(u, u, a)
        j += LANES
    return total((a + b) + (c + d))


@jit
def _runs(first, last, output, target, weight, weighted, slope, gradient, parts):
    at_output, at_target, at_gradient = output.ctypes.data, target.ctypes.data, gradient.ctypes.data
    size, runs = output.shape[1], parts.shape[1]
    for task in range(first, last):
        n, run = task // runs, task % runs
        start = n * size + run * _RUN
        end = min(start + _RUN, (n + 1) * size)
        k = slope * weight[n] if weighted else slope
        parts[n, run] = _run(start, end, at_output, at_target, at_gradient, k)


@loops
def _squared_error(output, target, weight, weighted, slope, gradient, parts, value, workers):
    batch, size = output.shape
    tasks = parts.size
    for worker in prange(workers):
        first, last = tasks * worker // workers, tasks * (worker + 1) // workers
        _runs(first, last, output, target, weight, weighted, slope, gradient, parts)
    for n in range(batch):
        whole = 0.0
        for run in range(parts.shape[1]):
            whole += parts[n, run]
        mean = whole / size
        value[n] = F(mean) * weight[n] if weighted else F(mean)


@alone_below(ELEMENTS, lambda output, *_, **__: output.size)
def squared_error(output, target, weight=None, out=None):
    batch, weighted = output.shape[0], weight is not None
    gradient = buffers.empty(output.shape, output.dtype) if out is None else out
    value = buffers.empty((batch,), output.dtype)
    if batch:
        shape = batch, output.size // batch
        parts = buffers.empty((batch, -(-shape[1] // _RUN)), np.float64)
        flat = output.reshape(shape), target.reshape(shape), weight if weighted else value, weighted
        _squared_error(*flat, F(2 / output.size), gradient.reshape(shape), parts, value, threads())
    return value, gradient


@jit(inline="always")
def _log(x):
    """ln x of x >= 1 in float64, to 1e-9 of it; NaN stays."""
    bits = bits_of(F(x))
    n = (bits - np.int32(0x3F3504F3)) >> np.int32(23)  # x·2⁻ⁿ lies about 1: from √½ to √2
    m = x * np.float64(float_of(np.int32(np.int32(127) - n) << np.int32(23)))
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13)))))
    return n * 0.6931471805599453 + (2 * s + 2 * s * z * p)


@jit
def _pair_entropies(first, last, logits, labels, rate, gradient, value):
    at_logits, at_gradient, columns = logits.ctypes.data, gradient.ctypes.data, logits.shape[1]
    for n in range(first, last):
        label, start = labels[n], n * columns
        chosen = np.float64(logits[n, label])
        top, whole, a, b = weigh_pair(start, columns, at_logits)
        factor, all_ = F(rate / whole), F(whole)
        a, b = with_lane(a, label, a - all_), with_lane(b, label - LANES, b - all_)
        store_pair(start, columns, at_gradient, a * factor, b * factor)
        value[n] = F(_log(whole) - (chosen - np.float64(top)))


@jit
def _entropies(first, last, logits, labels, rate, gradient, value, past):
    work = np.empty(WIDE if past else 1, np.float32)
    at_logits, at_gradient, columns = logits.ctypes.data, gradient.ctypes.data, logits.shape[1]
    at_work = work.ctypes.data if past else at_gradient
    for n in range(first, last):
        start, row = n * columns, work if past else gradient[n]
        skip = start if past else 0
        chosen = np.float64(logits[n, labels[n]])  # before the gradient, which may lie there, is written
        top, whole = weigh(start, columns, at_logits, at_work, skip)
        row[labels[n]] = F(np.float64(row[labels[n]]) - whole)
        scale(start, columns, at_work, skip, F(rate / whole), at_gradient, past)
        value[n] = F(_log(whole) - (chosen - np.float64(top)))
    if past:
        drain()


@loops
def _cross_entropy(logits, labels, rate, gradient, value, past, workers):
    rows = value.size
    for worker in prange(workers):
        first, last = rows * worker // workers, rows * (worker + 1) // workers
        if logits.shape[1] <= PAIR:
            _pair_entropies(first, last, logits, labels, rate, gradient, value)
        else:
            _entropies(first, last, logits, labels, rate, gradient, value, past)


@alone_below(ELEMENTS, lambda logits, *_, **__: EFFORT * logits.size)
def cross_entropy(logits, labels, out=None):
    gradient = buffers.empty(logits.shape, logits.dtype) if out is None else out
    value = buffers.empty(labels.shape, logits.dtype)
    if value.size:
        shape, past = (value.size, logits.shape[-1]), streams(logits, gradient)
        flat = logits.reshape(shape), labels.astype(np.int64, copy=False).reshape(-1)
        _cross_entropy(*flat, 1 / value.size, gradient.reshape(shape), value.reshape(-1), past, threads())
    return value, gradient
