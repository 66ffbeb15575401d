"""What lies between the large kernels: sums, copies of channels, rows of a table. Each is one call that a plan can repeat."""

import numpy as np
from numba import prange

from .jit import jit, loops
from .threads import ELEMENTS, alone_below
from .vector import F

_CHUNK = 1 << 13
_ROWS = 64  # rows of one task, and rows summed in float32 before they go into a float64 sum
_COLUMNS = 64  # columns of a table in one task


@loops
def _fill(x, value):
    for k in prange((x.size + _CHUNK - 1) // _CHUNK):
        part = x[k * _CHUNK : (k + 1) * _CHUNK]
        for j in range(part.size):
            part[j] = value


@alone_below(ELEMENTS, lambda x, value: x.size)
def fill(x, value):
    _fill(x.reshape(-1), F(value))


@jit
def _sum_of(a, b, y):
    for j in range(y.size):
        y[j] = a[j] + b[j]


@loops
def _add(a, b, y):
    for k in prange((y.size + _CHUNK - 1) // _CHUNK):
        i, j = k * _CHUNK, (k + 1) * _CHUNK
        _sum_of(a[i:j], b[i:j], y[i:j])


@alone_below(ELEMENTS, lambda a, b, out: out.size)
def add(a, b, out):
    """out = a + b; out may be either."""
    _add(a.reshape(-1), b.reshape(-1), out.reshape(-1))


@loops
def _add_columns(x, at, y):
    for k in prange((x.shape[0] + _ROWS - 1) // _ROWS):
        for i in range(k * _ROWS, min(x.shape[0], (k + 1) * _ROWS)):
            row, to = x[i], y[i][at : at + x.shape[1]]
            for j in range(row.size):
                to[j] += row[j]


@alone_below(ELEMENTS, lambda x, at, out: x.size)
def add_columns(x, at, out):
    """out[i, at + j] += x[i, j]."""
    _add_columns(x, at, out)


@loops
def _copy_columns(x, of, y, at, count):
    for k in prange((x.shape[0] + _ROWS - 1) // _ROWS):
        for i in range(k * _ROWS, min(x.shape[0], (k + 1) * _ROWS)):
            row, to = x[i][of : of + count], y[i][at : at + count]
            for j in range(row.size):
                to[j] = row[j]


@alone_below(ELEMENTS, lambda x, of, out, at, count: x.shape[0] * count)
def copy_columns(x, of, out, at, count):
    """out[i, at + j] = x[i, of + j] for j < count."""
    _copy_columns(x, of, out, at, count)


@loops
def _add_channels(x, emb, at, y):
    batch, places, channels = x.shape
    for i in prange(batch * places):
        n, p = i // places, i % places
        row, to, more = x[n, p], y[n, p], emb[n][at : at + channels]
        for c in range(channels):
            to[c] = row[c] + more[c]


@alone_below(ELEMENTS, lambda x, emb, at, out: x.size)
def add_channels(x, emb, at, out):
    """out[n, p, c] = x[n, p, c] + emb[n, at + c]; out may be x."""
    _add_channels(x, emb, at, out)


@jit
def _sum_rows(x, made):
    for i in range(x.shape[0]):
        row = x[i]
        for c in range(row.size):
            made[c] += row[c]


@loops
def _sum_places(x, y, sums, totals):
    batch, places, channels = x.shape
    for n in prange(batch):
        made, total = sums[n], totals[n]
        total[:] = 0
        for start in range(0, places, _ROWS):
            made[:] = F(0)
            _sum_rows(x[n, start : start + _ROWS], made)
            for c in range(channels):
                total[c] += made[c]
        for c in range(channels):
            y[n, c] = total[c]


@alone_below(ELEMENTS, lambda x, out, sums, totals: x.size)
def sum_places(x, out, sums, totals):
    """out[n, c] = Σ_p x[n, p, c]; sums and totals, float32 and float64, are room of the shape of out."""
    _sum_places(x, out, sums, totals)


@loops
def _take_rows(table, index, y):
    for i in prange(index.size):
        row, to = table[index[i]], y[i]
        for j in range(row.size):
            to[j] = row[j]


@alone_below(ELEMENTS, lambda table, index, out: out.size)
def take_rows(table, index, out):
    """out[i] = table[index[i]]."""
    _take_rows(table, index, out)


@loops
def _sum_into_rows(x, index, table):
    width = table.shape[1]
    for k in prange((width + _COLUMNS - 1) // _COLUMNS):
        a, b = k * _COLUMNS, min(width, (k + 1) * _COLUMNS)
        for i in range(table.shape[0]):
            table[i, a:b] = F(0)
        for i in range(index.size):
            row, to = x[i, a:b], table[index[i], a:b]
            for j in range(row.size):
                to[j] += row[j]


@alone_below(ELEMENTS, lambda x, index, out: x.size + out.size)
def sum_into_rows(x, index, out):
    """out[r] = Σ over index[i] = r of x[i], in the order of i."""
    _sum_into_rows(x, index, out)


@loops
def _time_features(t, origin, omega, cos_first, read, y):
    half = omega.size
    for n in prange(t.size):
        read[n] = t[n] - origin
        first, second = (y[n, half:], y[n, :half]) if cos_first else (y[n, :half], y[n, half:])
        for i in range(half):
            angle = np.float64(read[n] * omega[i])
            first[i], second[i] = np.sin(angle), np.cos(angle)


@alone_below(ELEMENTS, lambda t, origin, omega, cos_first, read, out: 32 * out.size)
def time_features(t, origin, omega, cos_first, read, out):
    """out = [sin(ω_i (t − origin)), cos(…)], or the cosines first; read is room for t − origin in the dtype of omega."""
    _time_features(t, float(origin), omega, cos_first, read, out)


DIGEST = 16, 32  # parts of an array, and words for each
DIGESTED = ELEMENTS  # words from which on threads share the work
_FACTOR, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(29)


@jit
def _mix(words, state):
    for j in range(words.size):
        h = (state[j] ^ words[j]) * _FACTOR
        state[j] = h ^ (h >> _SHIFT)


@loops
def digest(x, out):
    """out (DIGEST): what of the words x (64 bits each) tells them from any others. Each word changes one of 512 sums."""
    for k in prange(out.shape[0]):
        state, width = out[k], out.shape[1]
        state[:] = np.uint64(0)
        start, end = x.size * k // out.shape[0], x.size * (k + 1) // out.shape[0]
        for i in range(start, end, width):
            _mix(x[i : min(end, i + width)], state)
