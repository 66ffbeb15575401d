"""Attention and its gradients, one head of one sample per task, by blocks of rows: the T x T matrix is never held whole.

The products run on the register tiles of :mod:`.vector`; keys and values are packed once per head, as they are and turned.
"""

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .threads import PRODUCTS, alone_below, threads
from .vector import COLS, NARROW, ROWS, F, column_tile, exp, row_tile

_BLOCK = 4 * ROWS  # rows of the attention matrix held at a time


@jit
def _pack(panels, x, n, start, count, h):
    """Panels (P, count, COLS) of rows start..start+count of one head: panel p holds its columns p·COLS.., then zeros."""
    depth = x.shape[3]
    for p in range(panels.shape[0]):
        width = min(COLS, depth - p * COLS)
        for i in range(count):
            row, to = x[n, start + i, h][p * COLS : p * COLS + width], panels[p, i]
            for j in range(width):
                to[j] = row[j]
            for j in range(width, COLS):
                to[j] = F(0)


@jit
def _pack_turned(panels, x, n, h):
    """Panels (P, depth, COLS) of the transpose of one head; zeros after its last row."""
    length, depth = x.shape[1], x.shape[3]
    for p in range(panels.shape[0]):
        count = min(COLS, length - p * COLS)
        panel = panels[p]
        for j in range(count):
            row = x[n, p * COLS + j, h]
            for i in range(depth):
                panel[i, j] = row[i]
        for i in range(depth):
            for j in range(count, COLS):
                panel[i, j] = F(0)


@jit
def _product(first, step, rows, depth, panels, to, table, zeros):
    """to (rows, P·COLS) = the matrix whose row i lies at address first + i·step, times packed panels (P, depth, COLS).

    ``to`` has room for whole tiles; rows past the end read the zeros.
    """
    source, target = table[0], table[1]
    width = to.shape[1]
    for i in range(to.shape[0]):
        source[i] = first + i * step if i < rows else zeros.ctypes.data
        target[i] = to.ctypes.data + 4 * i * width
    for p in range(panels.shape[0]):
        for i in range(0, rows, ROWS):
            rows_at, to_at = source[i:].ctypes.data, target[i:].ctypes.data
            row_tile(rows_at, 0, 1, depth, panels[p].ctypes.data, zeros.ctypes.data, to_at, 4 * p * COLS)


@jit
def _add_product(sums, left, count, panels, table):
    """sums (M, P, NARROW, COLS) += leftᵀ · panels (P, count, COLS), over the first ``count`` rows of ``left``."""
    source = table[0]
    for i in range(count):
        source[i] = left[i].ctypes.data
    for p in range(panels.shape[0]):
        for m in range(sums.shape[0]):
            column_tile(source.ctypes.data, 4 * NARROW * m, count, panels[p].ctypes.data, sums[m, p].ctypes.data)


@jit(fastmath={"nnan", "nsz", "reassoc"})
def _largest(row):
    top = row[0]
    for j in range(row.size):
        top = row[j] if row[j] > top else top
    return top


@jit(fastmath={"reassoc", "contract", "nsz"})
def _exponentials(row, scale, shift):
    """row = exp(scale·row − shift) in place; returns the sum."""
    total = F(0)
    for j in range(row.size):
        e = exp(row[j] * scale - shift)
        row[j] = e
        total += e
    return total


@jit(fastmath={"reassoc", "contract", "nsz"})
def _dot(a, b):
    total = F(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@loops
def _attend(q, k, v, scale, out, lse, turned, plain, scores, results, tables, zeros, workers):
    batch, length, heads, depth = q.shape
    for worker in prange(workers):
        keys, vals, score, result, table = turned[worker, 0], plain[worker], scores[worker, 0], results[worker], tables[worker]
        for task in range(batch * heads * worker // workers, batch * heads * (worker + 1) // workers):
            n, h = task // heads, task % heads
            _pack_turned(keys, k, n, h)
            _pack(vals, v, n, 0, length, h)
            for start in range(0, length, _BLOCK):
                rows = min(_BLOCK, length - start)
                _product(q[n, start, h].ctypes.data, 4 * heads * depth, rows, depth, keys, score, table, zeros)
                for i in range(rows):
                    row = score[i][:length]
                    top = _largest(row) * scale if scale >= 0 else -_largest(-row) * scale
                    total = _exponentials(row, scale, top)
                    lse[n, h, start + i] = top + np.log(total)
                    by = F(1) / total
                    for j in range(length):
                        row[j] *= by
                _product(score.ctypes.data, 4 * score.shape[1], rows, length, vals, result, table, zeros)
                for i in range(rows):
                    to, made = out[n, start + i, h], result[i]
                    for j in range(depth):
                        to[j] = made[j]


def _room(length, depth, workers):
    """For each worker two turned heads, one head as it is, two blocks of scores, one of results, some addresses; and zeros."""
    wide, deep = -(-length // COLS), -(-depth // COLS)
    turned = buffers.empty((workers, 2, wide, depth, COLS), np.float32)
    plain = buffers.empty((workers, deep, length, COLS), np.float32)
    scores = buffers.empty((workers, 2, _BLOCK, wide * COLS), np.float32)
    results = buffers.empty((workers, _BLOCK, deep * COLS), np.float32)
    tables = buffers.empty((workers, 2, _BLOCK), np.int64)
    zeros = buffers.empty((max(length, depth, COLS),), np.float32)
    zeros[...] = 0
    return turned, plain, scores, results, tables, zeros


def _scale(q, scale):
    return F(q.shape[-1] ** -0.5 if scale is None else scale)


@alone_below(PRODUCTS, lambda q, *_, **__: 2 * q.size * q.shape[1])
def attention(q, k, v, scale=None, out=None):
    batch, length, heads, depth = q.shape
    workers = threads()
    if out is None:
        out = buffers.empty(q.shape, q.dtype)
    lse = buffers.empty((batch, heads, length), q.dtype)
    turned, plain, scores, results, tables, zeros = _room(length, depth, workers)
    _attend(q, k, v, _scale(q, scale), out, lse, turned, plain, scores, results, tables, zeros, workers)
    return out, lse


@jit
def _unpack(x, n, h, sums, scale):
    """One head of x = scale · the matrix in tiles ``sums`` (M, P, NARROW, COLS)."""
    for i in range(x.shape[1]):
        to = x[n, i, h]
        for p in range(sums.shape[1]):
            made = sums[i // NARROW, p, i % NARROW]
            for j in range(min(COLS, to.size - p * COLS)):
                to[p * COLS + j] = scale * made[j]


@loops
def _differentiate(do, q, k, v, o, lse, scale, dq, dk, dv, turned, plain, scores, results, sums, blocks, tables, zeros, workers):
    batch, length, heads, depth = q.shape
    for worker in prange(workers):
        turned_keys, turned_values, keys = turned[worker, 0], turned[worker, 1], plain[worker]
        p, ds, result, table = scores[worker, 0], scores[worker, 1], results[worker], tables[worker]
        block = blocks[worker]
        for task in range(batch * heads * worker // workers, batch * heads * (worker + 1) // workers):
            n, h = task // heads, task % heads
            _pack_turned(turned_keys, k, n, h)
            _pack_turned(turned_values, v, n, h)
            _pack(keys, k, n, 0, length, h)
            sum_k, sum_v = sums[worker, 0], sums[worker, 1]
            sum_k[:] = F(0)
            sum_v[:] = F(0)
            for start in range(0, length, _BLOCK):
                rows = min(_BLOCK, length - start)
                step = 4 * heads * depth
                _product(q[n, start, h].ctypes.data, step, rows, depth, turned_keys, p, table, zeros)
                _product(do[n, start, h].ctypes.data, step, rows, depth, turned_values, ds, table, zeros)
                for i in range(rows):
                    here, slope = p[i][:length], ds[i][:length]
                    _exponentials(here, scale, lse[n, h, start + i])
                    mean = _dot(do[n, start + i, h], o[n, start + i, h])
                    for j in range(length):
                        slope[j] = here[j] * (slope[j] - mean)
                _product(ds.ctypes.data, 4 * ds.shape[1], rows, length, keys, result, table, zeros)
                for i in range(rows):
                    to, made = dq[n, start + i, h], result[i]
                    for j in range(depth):
                        to[j] = scale * made[j]
                _pack(block, do, n, start, rows, h)
                _add_product(sum_v, p, rows, block, table)
                _pack(block, q, n, start, rows, h)
                _add_product(sum_k, ds, rows, block, table)
            _unpack(dk, n, h, sum_k, scale)
            _unpack(dv, n, h, sum_v, F(1))


@alone_below(PRODUCTS, lambda do, *_, **__: 5 * do.size * do.shape[1])
def attention_backward(do, q, k, v, o, lse, scale=None):
    _, length, _, depth = q.shape
    workers = threads()
    dq, dk, dv = (buffers.empty(q.shape, q.dtype) for _ in range(3))
    turned, plain, scores, results, tables, zeros = _room(length, depth, workers)
    deep = -(-depth // COLS)
    sums = buffers.empty((workers, 2, -(-length // NARROW), deep, NARROW, COLS), np.float32)
    blocks = buffers.empty((workers, deep, _BLOCK, COLS), np.float32)
    _differentiate(
        do, q, k, v, o, lse, _scale(q, scale), dq, dk, dv, turned, plain, scores, results, sums, blocks, tables, zeros, workers
    )
    return dq, dk, dv
