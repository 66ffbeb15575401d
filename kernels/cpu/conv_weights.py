"""The gradient of a convolution's weights and bias, by its plain sum: column tiles over the places of every tap."""

import numpy as np
from numba import prange

from .. import buffers
from .conv_places import SHALLOW, addresses, geometry, of_runs, places_of, with_margins
from .jit import jit, loops
from .threads import threads
from .tiles import asking_column_tile, copy_rows, pack_tile
from .vector import COLS, LANES, NARROW, F

_DEPTH = 256  # places of one packed panel, at most
_PACKED = 64  # of its rows that are packed together
_ROOM = 1 << 15  # floats of the rows that are packed beside it
_SLICE = 4  # column tiles of input channels in one task,
_LONG_SLICE = 32  # or up to so many where there is one tap: the gradient is packed for each slice anew
_CHUNK = 256  # at least so many places in each partial sum over the places,
_CHUNKS = 8, 64  # and at most so many of those: more where the weights are few
_FEW_WEIGHTS = 1 << 20
_FOLD = 1 << 12  # sums that one task adds over the chunks
_PACE = 8  # floats of what comes next that are asked for at each step of a product


@jit
def _pack_last(panel, source, table, count, start, width, sums):
    """The panel of the last columns, fewer than COLS: zeros behind."""
    base = source.ctypes.data
    for i in range(count):
        to, at = panel[i], (table[i] - base) // 4 + start
        row = source[at : at + width]
        for j in range(width):
            to[j] = row[j]
            sums[j] += row[j]
        to[width:] = F(0)


@jit
def _add_places(sums, source, low, high, pixel):
    """sums += Σ of the pixels low..high."""
    for start in range(low, high, _DEPTH):
        made = np.zeros(pixel, np.float32)
        for i in range(start, min(start + _DEPTH, high)):
            for k in range(pixel):
                made[k] += source[i * pixel + k]
        for k in range(pixel):
            sums[k] += made[k]


@loops
def _weights(
    x,
    dy,
    sums,
    partial_bias,
    dbias,
    panels,
    lefts,
    period,
    step,
    margin,
    first,
    shifts,
    lengths,
    chunks,
    slices,
    each,
    dense,
    swapped,
    at_once,
    workers,
):
    """Partial sums (chunk, slice, unit, tile, column, NARROW, COLS) of the gradient and (chunk, …) of the bias.

    A unit is a tap, or where the rows are packed (``dense``) a class. ``at_once``: there is one chunk, and ``sums`` is the
    gradient itself (tap, depth, channels). ``swapped``: the places of ``x`` are those that the bias is summed over.
    """
    batch, height, width, depth = x.shape
    rows, cols, channels = dy.shape[1], dy.shape[2], dy.shape[3]
    columns, run, units = panels.shape[1], panels.shape[2], period * period if dense else shifts.shape[0]
    apart = (COLS, 4 * channels) if at_once else (NARROW * COLS, 4 * COLS)  # columns (floats) and rows (bytes) of tiles
    tile = NARROW * (channels if at_once else columns * COLS)
    unit = depth * channels if at_once else each * tile
    deepest = depth * np.max(lengths) + LANES
    source, marks = x.reshape(-1), dy.reshape(-1)
    for worker in prange(workers):
        table, marked, panel, left = np.empty((1, run), np.int64), np.empty(run, np.int64), panels[worker], lefts[worker]
        at_row, at_col, pixel = np.empty(run, np.int64), np.empty(run, np.int64), np.empty(run, np.int64)
        zeros, unused, grid = np.zeros(deepest, np.float32), np.empty(columns * COLS, np.float32), np.empty(2, np.int64)
        for task in range(chunks * slices * worker // workers, chunks * slices * (worker + 1) // workers):
            chunk, part = task // slices, task % slices
            used = each if dense else min(each, depth // NARROW - part * each)
            origin = part * each * tile if at_once else task * units * unit
            for i in range(units):
                sums[origin + i * unit : origin + i * unit + used * tile] = F(0)
            bias = unused
            if part == 0:
                partial_bias[chunk] = F(0)
                if swapped:
                    places = batch * height * width
                    _add_places(partial_bias[chunk], source, places * chunk // chunks, places * (chunk + 1) // chunks, depth)
                else:
                    bias = partial_bias[chunk]
            for q in range(period * period):
                phase_row, phase_col, length = q // period, q % period, lengths[q]
                grid[0], grid[1] = (rows - phase_row + period - 1) // period, (cols - phase_col + period - 1) // period
                places = batch * grid[0] * grid[1]
                end = places * (chunk + 1) // chunks
                for start in range(places * chunk // chunks, end, run):
                    count = min(run, end - start)
                    places_of(at_row, at_col, pixel, start, count, grid, period, phase_row, phase_col, rows, cols)
                    for i in range(count):
                        marked[i] = dy.ctypes.data + 4 * channels * pixel[i]
                    for top in range(0, count, _PACKED):  # a few rows at a time, in the order of memory
                        part_count = min(_PACKED, count - top)
                        for column in range(columns):
                            at = column * COLS
                            own, to = bias[at : at + COLS], panel[column, top:]
                            if at + COLS <= channels:
                                pack_tile(marked[top:].ctypes.data, 4 * at, part_count, to.ctypes.data, own.ctypes.data)
                            else:
                                _pack_last(to, marks, marked[top:], part_count, at, channels - at, own)
                    places_of(at_row, at_col, pixel, start, count, grid, step, margin, margin, height, width)
                    base, zero = x.ctypes.data, zeros.ctypes.data
                    turn, turns, marked_end = 0, channels // _PACE, marked[count - 1] + 4 * channels
                    for i in range(1 if dense else first[q + 1] - first[q]):
                        if dense:
                            runs, n = (first[q + 1] - first[q]) // length, length * depth
                            for j in range(runs):
                                of_runs(table, shifts, first[q] + j * length, 1, length, pixel, count, base, zero, width, depth)
                                copy_rows(table.ctypes.data, count, n, left.ctypes.data + 4 * j * n, 4 * left.shape[1])
                            for j in range(count):
                                table[0, j] = left.ctypes.data + 4 * j * left.shape[1]
                            filled, offset, here = (runs * n + NARROW - 1) // NARROW, 0, origin + q * unit
                        else:
                            low = first[q] + i
                            addresses(table, shifts, low, 1, at_row, at_col, pixel, count, base, zero, height, width, depth)
                            filled, offset, here = used, 4 * NARROW * part * each, origin + low * unit
                        for column in range(columns):
                            from_panel = panel[column].ctypes.data
                            for m in range(filled):
                                to_sums = sums.ctypes.data + 4 * (here + m * tile + column * apart[0])
                                left_at, marks_at = offset + 4 * NARROW * m, marked_end + 4 * _PACE * turn * count
                                ahead, pace = (marks_at, 4 * _PACE) if turn < turns else (from_panel, 0)
                                asking_column_tile(table.ctypes.data, left_at, count, from_panel, to_sums, apart[1], ahead, pace)
                                turn += 1
    if at_once:
        for k in range(dbias.size):
            dbias[k] = partial_bias[0, k]


@loops
def _fold(partial, partial_bias, dw, dbias, first, starts, members, chunks, slices, each, dense, swapped):
    """Add the partial sums to the weights' gradient (kernel², depth, channels); ``swapped`` ones are (…, channels, depth)."""
    depth, channels = (dw.shape[2], dw.shape[1]) if swapped else (dw.shape[1], dw.shape[2])
    columns, size = (channels + COLS - 1) // COLS, partial.size // chunks
    parts = (size + _FOLD - 1) // _FOLD
    for part in prange(parts):
        low, high = part * _FOLD, min((part + 1) * _FOLD, size)
        total = partial[low:high]
        for chunk in range(1, chunks):
            term = partial[chunk * size + low : chunk * size + high]
            for j in range(total.size):
                total[j] += term[j]
    units = first.size - 1 if dense else starts.size - 1
    tiles = partial[:size].reshape(slices, units, each, columns, NARROW, COLS)
    for c in prange(depth):
        if swapped:
            dw[:, :, c] = F(0)
        else:
            dw[:, c] = F(0)
        q = 0
        for tap in range(starts.size - 1):
            while first[q + 1] <= tap:
                q += 1
            row = (tap - first[q]) * depth + c if dense else c % (each * NARROW)
            unit, part = (q, 0) if dense else (tap, c // (each * NARROW))
            for column in range(columns):
                made, width = tiles[part, unit, row // NARROW, column, row % NARROW], min(COLS, channels - column * COLS)
                for i in members[starts[tap] : starts[tap + 1]]:
                    if swapped:
                        for j in range(width):
                            dw[i, column * COLS + j, c] += made[j]
                    else:
                        to = dw[i, c, column * COLS : column * COLS + width]
                        for j in range(width):
                            to[j] += made[j]
    for k in range(dbias.size):
        total_bias = F(0)
        for chunk in range(chunks):
            total_bias += partial_bias[chunk, k]
        dbias[k] = total_bias


def _padded_work(kernel, depth, channels):
    return -(-kernel * kernel * depth // NARROW) * -(-channels // COLS)


def gradient(x, dy, out, dbias, kernel, stride, upsample, pad):
    """out (k, k, C, K) and dbias (K,): the gradients of taps and bias where dy is that of the output."""
    dw = out.reshape(-1, *out.shape[2:])
    # With few output channels the two sides change places: dy is gathered for each pixel of x.
    swapped = 2 * _padded_work(kernel, dy.shape[3], x.shape[3]) <= _padded_work(kernel, x.shape[3], dy.shape[3])
    if swapped:
        x, dy = dy, x
    depth, channels, workers = x.shape[3], dy.shape[3], threads()
    dense = depth < SHALLOW or depth % NARROW != 0
    period, step, reach, first, shifts, lengths, starts, members = geometry(kernel, stride, upsample, pad, swapped, dense)
    columns, taps, run, each, slices, units = -(-channels // COLS), len(shifts), _DEPTH, _SLICE, 1, period**2
    chunks = max(1, min(dy.size // channels // _CHUNK, max(_CHUNKS[0], min(_CHUNKS[1], _FEW_WEIGHTS // out.size))))
    room = 0
    margin = 0
    if dense:
        rows, cols = (-(-n // period) for n in dy.shape[1:3])
        x, margin = with_margins(x, reach, step, rows, cols), reach[0]
        deepest = int(np.diff(first).max()) * depth
        each, room = -(-deepest // NARROW), deepest + LANES
        run = max(NARROW, min(_DEPTH, _ROOM // room))
    else:
        units = taps
        if taps == 1:
            run = _DEPTH // 2
            longest = min(_LONG_SLICE, depth // NARROW)
            while each < longest and chunks * -(-depth // (2 * each * NARROW)) >= 4 * workers:  # tasks enough for all workers
                each *= 2
        slices = -(-depth // (each * NARROW))
    at_once = not dense and not swapped and not upsample and chunks == 1 and channels % COLS == 0
    sums = out.reshape(-1) if at_once else buffers.empty((chunks * slices * units * each * columns * NARROW * COLS,), np.float32)
    partial_bias = buffers.empty((chunks, max(columns * COLS, depth)), np.float32)
    panels = buffers.empty((workers, columns, run, COLS), np.float32)
    lefts = buffers.empty((workers, run, room), np.float32)
    _weights(
        x,
        dy,
        sums,
        partial_bias,
        dbias,
        panels,
        lefts,
        period,
        step,
        margin,
        first,
        shifts,
        lengths,
        chunks,
        slices,
        each,
        dense,
        swapped,
        at_once,
        workers,
    )
    if not at_once:
        _fold(sums, partial_bias, dw, dbias, first, starts, members, chunks, slices, each, dense, swapped)
    return out, dbias
