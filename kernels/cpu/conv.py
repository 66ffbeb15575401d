"""Convolution and its two gradients as matrix products whose left rows are gathered by address: no unrolled or padded copy.

All three share one geometry. Along an axis, the places that a sum is made for split into ``period`` classes; place
``a·period + phase`` of a class reads the source at ``a·step + shift`` for the shifts of that class, and each shift carries the
sum of the kernel taps that meet there. Doubling by nearest neighbour and stride 2 (backwards) thus cost only the products that
differ: 16 in place of 36, for example. Each sum runs in a fixed order that depends on the shapes only, not on the threads.
"""

from functools import lru_cache
from itertools import product

import numpy as np
from numba import prange

from .. import buffers
from ..precisions import high
from ..reference import conv_output_size, conv_padding
from . import winograd
from .jit import jit, loops
from .threads import PRODUCTS, alone_below, threads
from .vector import COLS, NARROW, ROWS, F, column_tile, row_tile

_FAR = -(1 << 30)
_BLOCKS = 8  # row tiles whose addresses are made together
_PLACES = _BLOCKS * ROWS
_DEPTH = 128  # places of one packed panel in the weight gradient
_SLICE = 4  # column tiles of input channels in one task of the weight gradient,
_LONG_SLICE = 32  # or up to so many where there is one tap: the gradient is packed for each slice anew
_CHUNKS = 8  # at most so many partial sums over the places in the weight gradient
_CHUNK = 1024  # and at least so many places in each


def _axis(kernel, before, stride, upsample, backward):
    """(period, step, [{shift: [taps]} for each phase]) of one image axis."""
    if backward:
        period, step = stride, 2 if upsample else 1
        reads = [[((phase + r + before - u), u) for u in range(kernel) for r in range(step)] for phase in range(period)]
        reads = [[(at // stride, u) for at, u in phase if at % stride == 0] for phase in reads]
    else:
        period, step = 2 if upsample else 1, stride
        reads = [[((phase + u - before) // period, u) for u in range(kernel)] for phase in range(period)]
    classes = []
    for phase in reads:
        shifts = sorted({shift for shift, _ in phase})
        classes.append({shift: [u for at, u in phase if at == shift] for shift in shifts})
    return period, step, classes


@lru_cache(maxsize=256)
def _geometry(kernel, stride, upsample, pad, backward):
    """The classes and taps as integer tables: (period, step, first, shifts, starts, members).

    Class ``q`` (row phase · period + column phase) has the taps first[q]..first[q+1]; tap i reads at shifts[i] = (row, column)
    and carries the sum of the kernel places members[starts[i]..starts[i+1]] (row · kernel + column).
    """
    before, _ = conv_padding(kernel, pad)
    period, step, classes = _axis(kernel, before, stride, upsample, backward)
    first, shifts, starts, members = [0], [], [0], []
    for rows, cols in product(classes, classes):
        for (dr, us), (dc, vs) in product(rows.items(), cols.items()):
            shifts.append((dr, dc))
            members += [u * kernel + v for u, v in product(us, vs)]
            starts.append(len(members))
        if len(shifts) == first[-1]:  # no tap meets this class: one that reads outside of every image
            shifts.append((_FAR, _FAR))
            starts.append(len(members))
        first.append(len(shifts))
    tables = (np.array(a, np.int64) for a in (first, np.reshape(shifts, (-1, 2)), starts, members))
    return period, step, *tables


@jit
def _panel(w, panel, members, column, backward):
    """panel (depth, COLS) = Σ over members of COLS columns of w[member], turned if ``backward``; zeros past the end."""
    depth = panel.shape[0]
    width = min(COLS, (w.shape[1] if backward else w.shape[2]) - column)
    panel[:, :] = F(0)
    for i in range(members.size):
        tap = w[members[i]]
        if backward:
            for j in range(width):
                row = tap[column + j]
                for k in range(depth):
                    panel[k, j] += row[k]
        else:
            for k in range(depth):
                row, to = tap[k][column : column + width], panel[k]
                for j in range(width):
                    to[j] += row[j]


@jit
def _addresses(table, rows, cols, images, count, base, zero, height, width, pixel, dr, dc):
    """Where tap (dr, dc) reads for each place: the address of a pixel of the source, or of zeros outside it."""
    for i in range(count):
        r, c = rows[i] + dr, cols[i] + dc
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        table[i] = base + ((images[i] * height + r) * width + c) * pixel if inside else zero
    for i in range(count, table.size):
        table[i] = zero


@jit
def _places(rows, cols, images, place, count, height, width, step):
    """Row and column times ``step``, and the image, of ``count`` places from ``place`` on in a grid of height x width."""
    n, rest = place // (height * width), place % (height * width)
    a, b = rest // width, rest % width
    for i in range(count):
        rows[i], cols[i], images[i] = a * step, b * step, n
        b += 1
        if b == width:
            a, b = a + 1, 0
            if a == height:
                n, a = n + 1, 0


@jit
def _spill(out, edge, to, row, rows, column):
    """Copy the part of a tile that lies inside the output."""
    flat, width = out.reshape(-1), min(COLS, out.shape[3] - column)
    for m in range(rows):
        start = (to[row + m] - out.ctypes.data) // 4 + column
        for j in range(width):
            flat[start + j] = edge[m, j]


@loops
def _gather(x, w, out, period, step, first, shifts, starts, members, backward, panels, initial, tables, edges, zeros, workers):
    batch, height, width, depth = x.shape
    rows, cols, channels = out.shape[1], out.shape[2], out.shape[3]
    columns = (channels + COLS - 1) // COLS
    taps = shifts.shape[0]
    for i in prange(taps * columns):
        tap, column = i // columns, i % columns
        q = 0
        while first[q + 1] <= tap:
            q += 1
        inside = first[q + 1] - first[q]
        at = first[q] * columns + column * inside + (tap - first[q])
        _panel(w, panels[at], members[starts[tap] : starts[tap + 1]], column * COLS, backward)

    tasks = np.zeros(period * period + 1, np.int64)
    for q in range(period * period):
        places = batch * ((rows - q // period + period - 1) // period) * ((cols - q % period + period - 1) // period)
        tasks[q + 1] = tasks[q] + (places + _PLACES - 1) // _PLACES
    for worker in prange(workers):
        table, edge = tables[worker], edges[worker]
        at_row, at_col, image = np.empty(_PLACES, np.int64), np.empty(_PLACES, np.int64), np.empty(_PLACES, np.int64)
        to, to_edge = table[taps], table[taps + 1]
        for m in range(ROWS):
            to_edge[m] = edge[m].ctypes.data
        for task in range(tasks[-1] * worker // workers, tasks[-1] * (worker + 1) // workers):
            q = 0
            while tasks[q + 1] <= task:
                q += 1
            phase_row, phase_col = q // period, q % period
            high, wide = (rows - phase_row + period - 1) // period, (cols - phase_col + period - 1) // period
            start = (task - tasks[q]) * _PLACES
            count = min(_PLACES, batch * high * wide - start)
            inside = first[q + 1] - first[q]
            _places(at_row, at_col, image, start, count, high, wide, period)
            base = out.ctypes.data
            _addresses(to, at_row, at_col, image, count, base, edge.ctypes.data, rows, cols, 4 * channels, phase_row, phase_col)
            _places(at_row, at_col, image, start, count, high, wide, step)
            base = x.ctypes.data
            for i in range(inside):
                dr, dc = shifts[first[q] + i, 0], shifts[first[q] + i, 1]
                _addresses(table[i], at_row, at_col, image, count, base, zeros.ctypes.data, height, width, 4 * depth, dr, dc)
            for column in range(columns):
                wide_enough = (column + 1) * COLS <= channels
                panel = panels[first[q] * columns + column * inside].ctypes.data
                start_sum = initial[column * COLS :].ctypes.data
                for row in range(0, count, ROWS):
                    rows_at = table.ctypes.data + 8 * row
                    if wide_enough and row + ROWS <= count:
                        to_at = to.ctypes.data + 8 * row
                        row_tile(rows_at, 8 * _PLACES, inside, depth, panel, start_sum, to_at, 4 * column * COLS)
                    else:
                        row_tile(rows_at, 8 * _PLACES, inside, depth, panel, start_sum, to_edge.ctypes.data, 0)
                        _spill(out, edge, to, row, min(ROWS, count - row), column * COLS)


def _gathered(x, w, initial, out, stride, upsample, pad, backward):
    geometry = _geometry(w.shape[0], stride, upsample, pad, backward)
    workers, channels, depth = threads(), out.shape[3], x.shape[3]
    columns, taps = -(-channels // COLS), len(geometry[3])
    panels = buffers.empty((taps * columns, depth, COLS), np.float32)
    sums = buffers.empty((columns * COLS,), np.float32)
    sums[...] = 0
    if initial is not None:
        sums[:channels] = initial
    tables = buffers.empty((workers, taps + 2, _PLACES), np.int64)
    edges = buffers.empty((workers, ROWS, COLS), np.float32)
    zeros = buffers.empty((depth,), np.float32)
    zeros[...] = 0
    _gather(x, w.reshape(-1, *w.shape[2:]), out, *geometry, backward, panels, sums, tables, edges, zeros, workers)
    return out


@loops
def _add(out, shift, shifted, residual, added):
    """out += shift[n] + residual."""
    for n in prange(out.shape[0]):
        for p in range(out.shape[1]):
            to = out[n, p]
            if shifted:
                row = shift[n]
                for k in range(to.size):
                    to[k] += row[k]
            if added:
                more = residual[n, p]
                for k in range(to.size):
                    to[k] += more[k]


@alone_below(PRODUCTS, lambda x, w, *_, **__: x.size * w.size // max(1, x.shape[3]))
def conv2d(x, w, bias=None, stride=1, upsample=False, pad=None, out=None, shift=None, residual=None, precision=None):
    kernel = w.shape[0]
    if out is None:
        rows, cols = (conv_output_size(n, kernel, stride, upsample, pad) for n in x.shape[1:3])
        out = buffers.empty((x.shape[0], rows, cols, w.shape[3]), x.dtype)
    fast = not high(precision) and not (upsample and residual is not None)
    if fast and winograd.suits(x.shape, w.shape[3], kernel, stride, upsample, pad):
        return winograd.convolve(x, w, bias, out, upsample, shift=shift, residual=residual)
    _gathered(x, w, bias, out, stride, upsample, pad, False)
    if (shift is not None or residual is not None) and out.size:
        flat = out.reshape(out.shape[0], -1, out.shape[3])
        rows, more = flat[0] if shift is None else shift, flat if residual is None else residual.reshape(flat.shape)
        _add(flat, rows, shift is not None, more, residual is not None)
    return out


@alone_below(PRODUCTS, lambda dy, w, *_, **__: dy.size * w.size // max(1, dy.shape[3]))
def conv2d_backward_input(dy, w, input_shape, stride=1, upsample=False, pad=None, out=None, precision=None):
    if out is None:
        out = buffers.empty(tuple(input_shape), dy.dtype)
    if not high(precision) and winograd.suits(input_shape, w.shape[3], w.shape[0], stride, upsample, pad):
        return winograd.convolve(dy, w, None, out, upsample, backward=True)
    return _gathered(dy, w, None, out, stride, upsample, pad, True)


@jit
def _pack(panels, marks, rows, cols, images, count, high, wide, period, phase_row, phase_col):
    """Panels (P, depth, COLS) of the gradient at ``count`` places of one class."""
    channels = marks.shape[1]
    for i in range(count):
        mark = marks[(images[i] * high + rows[i] * period + phase_row) * wide + cols[i] * period + phase_col]
        for p in range(panels.shape[0]):
            start, to = p * COLS, panels[p, i]
            width = min(COLS, channels - start)
            source = mark[start : start + width]
            for j in range(width):
                to[j] = source[j]
            for j in range(width, COLS):
                to[j] = F(0)


@jit
def _add_columns(sums, panels, count):
    for p in range(panels.shape[0]):
        made = np.zeros(COLS, np.float32)
        for i in range(count):
            row = panels[p, i]
            for j in range(COLS):
                made[j] += row[j]
        for j in range(COLS):
            sums[p, j] += made[j]


@loops
def _weights(
    x, dy, dw, dbias, period, step, first, shifts, starts, members, chunks, partial, partial_bias, tables, panels, zeros, workers
):
    batch, height, width, stored = x.shape
    rows, cols, channels = dy.shape[1], dy.shape[2], dy.shape[3]
    columns, run, slices, each, depth = panels.shape[1], panels.shape[2], partial.shape[1], partial.shape[3], dw.shape[1]
    marks = dy.reshape(-1, channels)
    for worker in prange(workers):
        table, panel = tables[worker], panels[worker]
        at_row, at_col, image = np.empty(run, np.int64), np.empty(run, np.int64), np.empty(run, np.int64)
        for task in range(chunks * slices * worker // workers, chunks * slices * (worker + 1) // workers):
            chunk, part = task // slices, task % slices
            sums, bias = partial[chunk, part], partial_bias[chunk]
            sums[:] = F(0)
            if part == 0:
                bias[:] = F(0)
            used = min(each, stored // NARROW - part * each)
            for q in range(period * period):
                phase_row, phase_col = q // period, q % period
                high, wide = (rows - phase_row + period - 1) // period, (cols - phase_col + period - 1) // period
                places = batch * high * wide
                end = places * (chunk + 1) // chunks
                for start in range(places * chunk // chunks, end, run):
                    count = min(run, end - start)
                    _places(at_row, at_col, image, start, count, high, wide, 1)
                    _pack(panel, marks, at_row, at_col, image, count, rows, cols, period, phase_row, phase_col)
                    if part == 0:
                        _add_columns(bias, panel, count)
                    _places(at_row, at_col, image, start, count, high, wide, step)
                    base, outside = x.ctypes.data, zeros.ctypes.data
                    for tap in range(first[q], first[q + 1]):
                        dr, dc = shifts[tap, 0], shifts[tap, 1]
                        _addresses(table, at_row, at_col, image, count, base, outside, height, width, 4 * stored, dr, dc)
                        for column in range(columns):
                            for s in range(used):
                                offset = 4 * NARROW * (part * each + s)
                                to = sums[tap, s, column].ctypes.data
                                column_tile(table.ctypes.data, offset, count, panel[column].ctypes.data, to)
    for c in prange(depth):
        part, s, m = c // (each * NARROW), c // NARROW % each, c % NARROW
        dw[:, c] = F(0)
        for tap in range(shifts.shape[0]):
            for i in range(starts[tap], starts[tap + 1]):
                to = dw[members[i], c]
                for chunk in range(chunks):
                    for column in range(columns):
                        made = partial[chunk, part, tap, s, column, m]
                        for j in range(min(COLS, channels - column * COLS)):
                            to[column * COLS + j] += made[j]
    dbias[:] = F(0)
    for chunk in range(chunks):
        for k in range(channels):
            dbias[k] += partial_bias[chunk, k // COLS, k % COLS]


@loops
def _widen(x, wide):
    """Copy pixels into wider pixels, zeros behind."""
    for i in prange(x.shape[0]):
        row, to = x[i], wide[i]
        for j in range(row.size):
            to[j] = row[j]
        for j in range(row.size, to.size):
            to[j] = F(0)


@alone_below(PRODUCTS, lambda x, dy, kernel, *_, **__: dy.size * x.shape[3] * kernel**2)
def conv2d_backward_weight(x, dy, kernel, stride=1, upsample=False, pad=None, out=None, precision=None):
    depth, channels, workers = x.shape[3], dy.shape[3], threads()
    if out is None:
        out = buffers.empty((kernel, kernel, depth, channels), x.dtype)
    dbias = buffers.empty((channels,), x.dtype)
    if not high(precision) and winograd.suits(x.shape, channels, kernel, stride, upsample, pad):
        return winograd.gradient(x, dy, out, dbias, upsample)
    geometry = _geometry(kernel, stride, upsample, pad, False)
    stored = -(-depth // NARROW) * NARROW
    if stored != depth:
        wide = buffers.empty((*x.shape[:3], stored), x.dtype)
        _widen(x.reshape(-1, depth), wide.reshape(-1, stored))
        x = wide
    chunks = max(1, min(_CHUNKS, dy.size // channels // _CHUNK))
    columns, taps, each, run = -(-channels // COLS), len(geometry[3]), _SLICE, _DEPTH
    if taps == 1:
        run = _DEPTH
        longest = min(_LONG_SLICE, -(-depth // NARROW))
        while each < longest and chunks * -(-depth // (2 * each * NARROW)) >= 4 * workers:  # tasks enough for all workers
            each *= 2
    slices = -(-depth // (each * NARROW))
    partial = buffers.empty((chunks, slices, taps, each, columns, NARROW, COLS), np.float32)
    partial_bias = buffers.empty((chunks, columns, COLS), np.float32)
    tables = buffers.empty((workers, run), np.int64)
    panels = buffers.empty((workers, columns, run, COLS), np.float32)
    zeros = buffers.empty((stored,), np.float32)
    zeros[...] = 0
    made = out.reshape(-1, depth, channels), dbias
    _weights(x, dy, *made, *geometry, chunks, partial, partial_bias, tables, panels, zeros, workers)
    return out, dbias
