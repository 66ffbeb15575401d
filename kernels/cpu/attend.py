"""Attention and its gradients, by blocks of COLS queries against chunks of keys: the T x T matrix is never held.

A chunk of that matrix is held with keys along the rows and queries along the lanes: the softmax then runs down the rows. Where
the sums over queries need keys along the lanes, it is turned in registers. Results do not depend on the number of workers.

Weights are not taken relative to the largest score, but to a shift that need only be near to it: 0 where keys and queries are
small enough, else the largest score of the first chunk, moved where a later one is far above it.
"""

import numpy as np
from numba import prange

from .. import buffers
from .attend_tiles import (
    bounded_score_tile,
    bounded_weight_tile,
    copy_rows,
    finish,
    largest_sizes,
    row_dots,
    score_tile,
    slope_tile,
    sum_tile,
    turn_part,
    weight_tile,
    within,
)
from .jit import jit, loops
from .threads import PRODUCTS, alone_below, threads
from .vector import COLS, LANES, NARROW, F, turn

_CHUNK = 4 * COLS  # keys at a time, forwards
_SLOPES = COLS  # and backwards
_TASKS = 4  # forwards, for each worker at least, where queries are to be had for it
_PARTS = 4  # of the queries of a sample, at least where there are so many: the sums over queries are made in each
_FAR = F(20.0)  # the largest size of scores whose shift may be 0, and how far the largest one may be from its shift


@jit(inline="always")
def _up(n, unit):
    return (n + unit - 1) // unit * unit


@jit(inline="always")
def _rows(room, start):
    """What lies behind ``start`` floats, as rows of COLS floats."""
    return room[start:].reshape((room.size - start) // COLS, COLS)


@jit
def _pack(at, step, count, depth, to, width):
    """``count`` rows of ``depth`` floats, ``step`` bytes apart, as rows of ``width`` floats: zeros behind."""
    for c in range(0, depth, LANES):
        copy_rows(at + 4 * c, step, count, min(LANES, depth - c), to + 4 * c, 4 * width, min(LANES, width - c))


@jit
def _pack_tiles(at, step, count, depth, to, width):
    """As :func:`_pack`, and the last row again up to a whole tile."""
    _pack(at, step, count, depth, to, width)
    for i in range(count, (count + NARROW - 1) // NARROW * NARROW):
        _pack(at + (count - 1) * step, step, 1, depth, to + 4 * i * width, width)


@jit
def _sizes(keys, step, count, depth, to):
    for c in range(0, depth, LANES):
        largest_sizes(keys + 4 * c, step, count, min(LANES, depth - c), to + 4 * c)


@jit
def _turn_block(at, step, count, depth, factors, to):
    """The transpose of ``count`` rows of ``depth`` floats, times one of LANES like factors, as ``depth`` rows of COLS floats."""
    for i in range(0, COLS, LANES):
        rows, start = max(1, min(LANES, count - i)), at + min(i, count - 1) * step
        for c in range(0, depth, LANES):
            turn_part(start + 4 * c, step, rows, min(LANES, depth - c), factors, to + 4 * (c * COLS + i), 4 * COLS, LANES)


@jit
def _turn_back(sums, count, depth, factors, to, step):
    """The transpose of ``depth`` rows of COLS floats, times COLS factors, as ``count`` rows of ``depth`` floats."""
    for i in range(0, count, LANES):
        for c in range(0, depth, LANES):
            cols, wide = min(LANES, count - i), min(LANES, depth - c)
            at = sums + 4 * (c * COLS + i)
            turn_part(at, 4 * COLS, wide, cols, factors + 4 * i, to + i * step + 4 * c, step, wide)


@jit
def _scores(keys, step, count, depth, panel, bounded, shift, to, tops, sums, spare):
    """Weights of ``count`` keys by COLS queries into ``to``, their sums, and, unless they are bounded, the largest scores."""
    tops[:] = F(-1e30)
    sums[:] = F(0)
    at, by, top, total = panel.ctypes.data, shift.ctypes.data, tops.ctypes.data, sums.ctypes.data
    for i in range(0, count, NARROW):
        if i + NARROW > count:
            total = spare.ctypes.data
        if bounded:
            bounded_score_tile(keys + i * step, step, depth, at, by, to[i].ctypes.data, top, total)
        else:
            score_tile(keys + i * step, step, depth, at, by, to[i].ctypes.data, top, total)
    for i in range(count // NARROW * NARROW, count):
        for j in range(COLS):
            sums[j] += to[i, j]


@jit
def _moved(shift, tops, total, result, first):
    """Move the shift of the scores where they are too far above it (or below, with the first keys); whether it did."""
    far = False
    for j in range(COLS):
        far |= tops[j] > shift[j] + _FAR or (first and tops[j] < shift[j] - _FAR)
    if far:
        for j in range(COLS):
            to = tops[j] if first else max(tops[j], shift[j])
            by = np.exp(shift[j] - to)
            shift[j] = to
            total[j] *= by
            for m in range(result.shape[0]):
                result[m, j] *= by
    return far


@loops
def _attend(q, k, v, scale, out, lse, pieces, rooms, workers):
    batch, length, heads, depth = q.shape
    tall, width = _up(length, NARROW), _up(depth, NARROW)
    step = 4 * heads * depth
    tasks, blocks = batch * heads * pieces, (length + COLS - 1) // COLS
    for worker in prange(workers):
        keys = rooms[worker].ctypes.data
        values = keys + 4 * tall * width
        rows_of = _rows(rooms[worker], 2 * tall * width)
        shift, tops, sums, total, spare, factor = rows_of[:6]
        panel, result, weight = rows_of[6 : 6 + depth], rows_of[6 + depth : 6 + depth + width], rows_of[6 + depth + width :]
        sizes = rows_of[6 + depth + width + _CHUNK].ctypes.data
        factor[:] = scale
        of_head = -1
        for task in range(tasks * worker // workers, tasks * (worker + 1) // workers):
            head, piece = task // pieces, task % pieces
            n, h = head // heads, head % heads
            if head != of_head:
                of_head = head
                _pack_tiles(k[n, 0, h].ctypes.data, step, length, depth, keys, width)
                _pack(v[n, 0, h].ctypes.data, step, length, depth, values, width)
                _sizes(keys, 4 * width, length, depth, sizes)
            for block in range(blocks * piece // pieces, blocks * (piece + 1) // pieces):
                start = block * COLS
                rows = min(COLS, length - start)
                _turn_block(q[n, start, h].ctypes.data, step, rows, depth, factor.ctypes.data, panel.ctypes.data)
                bounded = within(sizes, depth, panel.ctypes.data, _FAR)
                result[:] = F(0)
                total[:] = F(0)
                shift[:] = F(0)
                for begin in range(0, length, _CHUNK):
                    count = min(_CHUNK, length - begin)
                    at = keys + 4 * begin * width
                    _scores(at, 4 * width, count, depth, panel, bounded, shift, weight, tops, sums, spare)
                    while not bounded and _moved(shift, tops, total, result, begin == 0):
                        _scores(at, 4 * width, count, depth, panel, bounded, shift, weight, tops, sums, spare)
                    for j in range(COLS):
                        total[j] += sums[j]
                    for m in range(0, width, NARROW):
                        at = values + 4 * (begin * width + m)
                        sum_tile(at, 4 * width, count, weight.ctypes.data, result[m].ctypes.data)
                finish(shift.ctypes.data, total.ctypes.data, lse[n, h, start:].ctypes.data, rows)
                _turn_back(result.ctypes.data, rows, depth, total.ctypes.data, out[n, start, h].ctypes.data, step)


def _scale(q, scale):
    return F(q.shape[-1] ** -0.5 if scale is None else scale)


@alone_below(PRODUCTS, lambda q, *_, **__: 2 * q.size * q.shape[1])
def attention(q, k, v, scale=None, out=None):
    batch, length, heads, depth = q.shape
    workers = threads()
    if out is None:
        out = buffers.empty(q.shape, q.dtype)
    lse = buffers.empty((batch, heads, length), q.dtype)
    pieces = max(1, min(-(-length // COLS), -(-_TASKS * workers // max(1, batch * heads))))
    tall, width = -(-length // NARROW) * NARROW, -(-depth // NARROW) * NARROW
    # for each worker keys and values, six rows of moments, queries, results, weights, sizes of the keys
    room = 2 * tall * width + COLS * (6 + depth + width + _CHUNK + depth)
    rooms = buffers.empty((workers, room), np.float32)
    _attend(q, k, v, _scale(q, scale), out, lse, pieces, rooms, workers)
    return out, lse


@jit
def _turn_chunk(rows, count, to):
    """Squares of COLS rows of COLS floats: the transpose of ``count`` rows of COLS floats."""
    for i in range(0, count, LANES):
        for j in range(0, COLS, LANES):
            turn(rows[i, j:].ctypes.data, 4 * COLS, to[i // COLS * COLS + j, i % COLS :].ctypes.data, 4 * COLS)


@loops
def _differentiate(do, q, k, v, o, lse, scale, dq, dk, dv, parts, tasks, rooms, sums, workers):
    batch, length, heads, depth = q.shape
    tall, width = _up(length, NARROW), _up(depth, NARROW)
    step = 4 * heads * depth
    split, blocks = tasks // max(1, batch * heads), (length + COLS - 1) // COLS
    for worker in prange(workers):
        keys = rooms[worker].ctypes.data
        values = keys + 4 * tall * width
        queries = values + 4 * tall * width
        slopes = queries + 4 * COLS * width
        rows_of = _rows(rooms[worker], 2 * (tall + COLS) * width)
        shift, mean, scales, ones = rows_of[:4]
        result, rows_of = rows_of[4 : 4 + width], rows_of[4 + width :]
        weight, slope, turned_weight, turned_slope = rows_of[: 4 * _SLOPES].reshape(4, _SLOPES, COLS)
        rows_of = rows_of[4 * _SLOPES :]
        of_q, of_do, sizes = rows_of.ctypes.data, rows_of[depth].ctypes.data, rows_of[2 * depth].ctypes.data
        scales[:] = scale
        ones[:] = F(1)
        of_head = -1
        for task in range(tasks * worker // workers, tasks * (worker + 1) // workers):
            head = task // split
            n, h = head // heads, head % heads
            if head != of_head:
                of_head = head
                _pack_tiles(k[n, 0, h].ctypes.data, step, length, depth, keys, width)
                _pack_tiles(v[n, 0, h].ctypes.data, step, length, depth, values, width)
                _sizes(keys, 4 * width, length, depth, sizes)
            for part in range(task % split, task % split + 1 if split > 1 else parts):
                slot = task if split > 1 else 2 * worker + min(part, 1)
                sum_k, sum_v = sums[slot]
                sum_k[:] = F(0)
                sum_v[:] = F(0)
                for block in range(blocks * part // parts, blocks * (part + 1) // parts):
                    start = block * COLS
                    rows = min(COLS, length - start)
                    at_q, at_do, at_o = q[n, start, h].ctypes.data, do[n, start, h].ctypes.data, o[n, start, h].ctypes.data
                    _turn_block(at_q, step, rows, depth, scales.ctypes.data, of_q)
                    _turn_block(at_do, step, rows, depth, ones.ctypes.data, of_do)
                    bounded = within(sizes, depth, of_q, _FAR)
                    _pack(at_q, step, rows, depth, queries, width)
                    _pack(at_do, step, rows, depth, slopes, width)
                    for i in range(0, rows, LANES):
                        row_dots(at_do + i * step, at_o + i * step, step, rows - i, depth, mean[i:].ctypes.data)
                    shift[:] = F(0)
                    _pack(lse[n, h, start:].ctypes.data, 0, 1, rows, shift.ctypes.data, COLS)
                    result[:] = F(0)
                    for begin in range(0, length, _SLOPES):
                        count = min(_SLOPES, length - begin)
                        for i in range(0, count, NARROW):
                            at, by = keys + 4 * (begin + i) * width, shift.ctypes.data
                            if bounded:
                                bounded_weight_tile(at, 4 * width, depth, of_q, by, weight[i].ctypes.data)
                            else:
                                weight_tile(at, 4 * width, depth, of_q, by, weight[i].ctypes.data)
                            at, by = values + 4 * (begin + i) * width, mean.ctypes.data
                            slope_tile(at, 4 * width, depth, of_do, by, weight[i].ctypes.data, slope[i].ctypes.data)
                        _turn_chunk(weight, count, turned_weight)
                        _turn_chunk(slope, count, turned_slope)
                        for m in range(0, width, NARROW):
                            sum_tile(keys + 4 * (begin * width + m), 4 * width, count, slope.ctypes.data, result[m].ctypes.data)
                            for p in range((count + COLS - 1) // COLS):
                                to = begin // COLS + p
                                sum_tile(
                                    slopes + 4 * m, 4 * width, rows, turned_weight[p * COLS].ctypes.data, sum_v[to, m].ctypes.data
                                )
                                sum_tile(
                                    queries + 4 * m, 4 * width, rows, turned_slope[p * COLS].ctypes.data, sum_k[to, m].ctypes.data
                                )
                    _turn_back(result.ctypes.data, rows, depth, scales.ctypes.data, dq[n, start, h].ctypes.data, step)
                if split == 1 and part > 0:
                    _add(sums[2 * worker], sums[2 * worker + 1])
            if split == 1:
                _write(sums[2 * worker, 0], n, h, scales, dk)
                _write(sums[2 * worker, 1], n, h, ones, dv)
    if split > 1:
        for head in prange(batch * heads):
            n, h = head // heads, head % heads
            made = sums[head * parts]
            for part in range(1, parts):
                _add(made, sums[head * parts + part])
            factors = _rows(rooms[0], 2 * (tall + COLS) * width)[2:4]
            _write(made[0], n, h, factors[0], dk)
            _write(made[1], n, h, factors[1], dv)


@jit
def _add(sums, more):
    to, row = sums.reshape(-1), more.reshape(-1)
    for i in range(to.size):
        to[i] += row[i]


@jit
def _write(sums, n, h, factors, to):
    """One head of ``to``: the sums (P, width, COLS) turned back, times the factors."""
    length, depth = to.shape[1], to.shape[3]
    for p in range(sums.shape[0]):
        start = p * COLS
        at, step = to[n, start, h].ctypes.data, 4 * to.shape[2] * depth
        _turn_back(sums[p].ctypes.data, min(COLS, length - start), depth, factors.ctypes.data, at, step)


@alone_below(PRODUCTS, lambda do, *_, **__: 5 * do.size * do.shape[1])
def attention_backward(do, q, k, v, o, lse, scale=None):
    batch, length, heads, depth = q.shape
    workers = threads()
    dq, dk, dv = (buffers.empty(q.shape, q.dtype) for _ in range(3))
    blocks = -(-length // COLS)
    parts = min(blocks, -(-_PARTS // heads))  # whatever the batch and the workers: so are the bits
    tasks = batch * heads * (1 if batch * heads >= 2 * workers else parts)
    tall, width = -(-length // NARROW) * NARROW, -(-depth // NARROW) * NARROW
    # for each worker keys, values, blocks of q and do; four rows of moments, results, chunks, blocks turned, sizes of the keys
    room = 2 * (tall + COLS) * width + COLS * (4 + width + 4 * _SLOPES + 3 * depth)
    rooms = buffers.empty((workers, room), np.float32)
    sums = buffers.empty((2 * workers if tasks == batch * heads else tasks, 2, blocks, width, COLS), np.float32)
    _differentiate(do, q, k, v, o, lse, _scale(q, scale), dq, dk, dv, parts, tasks, rooms, sums, workers)
    return dq, dk, dv
