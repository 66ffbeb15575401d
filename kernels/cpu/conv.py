"""Convolution and its two gradients as matrix products whose left rows are gathered by address: no unrolled or padded copy.

All three share one geometry (:mod:`.conv_places`). Doubling by nearest neighbour and stride 2 (backwards) cost only the products
that differ: 16 in place of 36, for example. Where channels are few, the shifts of a row that lie side by side are read as one
run. Each sum runs in an order that depends on the shapes only, not on the threads. What suits Winograd's products, rows of few
channels or a single pixel goes there.
"""

import numpy as np
from numba import prange

from .. import buffers
from ..precisions import high
from ..reference import conv_output_size
from . import conv_row, conv_shallow, conv_weights, elementwise, winograd
from .conv_places import SHALLOW, addresses, geometry, of_runs, places_of, with_margins
from .jit import jit, loops
from .threads import PRODUCTS, alone_below, threads
from .tiles import DOTS, FEW, SHORT, asking_tile, dot_tile, row_tile, short_tile, turn_tile
from .vector import COLS, LANES, ROWS, F

_BLOCKS = 8  # row tiles whose addresses are made together, at most
_PLACES = _BLOCKS * ROWS
_NEAR = 1 << 12  # floats of weights that stay in the nearest cache
_PACKED = 64  # rows of a weight panel that are packed by one task


@jit
def _turn(panel, rows, low, high):
    """panel[low:high] += the same columns of the rows, turned."""
    width, depth = rows.shape
    whole_width, whole = width // LANES * LANES, low + (high - low) // LANES * LANES
    for k in range(low, whole, LANES):
        for j in range(0, whole_width, LANES):
            turn_tile(rows[j, k:].ctypes.data, 4 * depth, panel[k, j:].ctypes.data)
    for k in range(low, high):
        to = panel[k]
        for j in range(whole_width if k < whole else 0, width):
            to[j] += rows[j, k]


@loops(prepares=True)
def _pack_weights(w, first, lengths, starts, members, panels, backward, few):
    """The weights of every class in the order of the tiles that read them; turned if ``backward``; zeros past the last column.

    (class, column tile, tap, depth, COLS) for the row tile, (class, column tile, run, FEW, run · depth) for the dot tile.
    """
    depth, channels = (w.shape[2], w.shape[1]) if backward else (w.shape[1], w.shape[2])
    size = FEW if few else COLS
    columns = (channels + size - 1) // size
    taps = starts.size - 1
    pieces = (depth + _PACKED - 1) // _PACKED
    for task in prange(taps * columns * pieces):
        tap, column, low = task // (columns * pieces), task // pieces % columns, task % pieces * _PACKED
        q = 0
        while first[q + 1] <= tap:
            q += 1
        inside, local, high = first[q + 1] - first[q], tap - first[q], min(low + _PACKED, depth)
        own, width = members[starts[tap] : starts[tap + 1]], min(size, channels - column * size)
        start = (first[q] * columns + column * inside) * size * depth
        if few:
            run, member = local // lengths[q], local % lengths[q]
            for j in range(size):
                to = panels[start + ((run * size + j) * lengths[q] + member) * depth :]
                for k in range(low, high):
                    made = F(0)
                    if j < width:
                        for i in own:
                            made += w[i, column * size + j, k] if backward else w[i, k, column * size + j]
                    to[k] = made
            continue
        panel = panels[start + local * depth * size : start + (local + 1) * depth * size].reshape(depth, size)
        panel[low:high] = F(0)
        for i in own:
            if backward:
                _turn(panel, w[i, column * size : column * size + width], low, high)
            else:
                for k in range(low, high):
                    to, row = panel[k], w[i, k, column * size : column * size + width]
                    for j in range(width):
                        to[j] += row[j]


@jit(inline="always")
def _spill(flat, edge, to, row, rows, column, width, bias, at):
    """Copy the part of a tile that lies inside the output, ``width`` columns from ``column`` on, and add a bias."""
    for m in range(rows):
        start = (to[row + m] - flat.ctypes.data) // 4 + column
        for j in range(width):
            flat[start + j] = edge[m, j] + bias[at + j]


@jit
def _share(low, high, start, unit, count):
    """Which of ``count`` tasks of cost ``unit`` each, the first of which begins at ``start``, begin in [low, high)."""
    begin, end = (low - start + unit - 1) // unit, (high - start + unit - 1) // unit
    return min(max(begin, 0), count), min(max(end, 0), count)


@loops
def _gather(x, panels, bias, biased, out, period, step, margin, first, shifts, lengths, dense, in_place, few, workers):
    batch, height, width, depth = x.shape
    rows, cols, channels = out.shape[1], out.shape[2], out.shape[3]
    size = FEW if few else COLS
    columns = (channels + size - 1) // size
    grids = np.empty((period * period, 3), np.int64)
    cost, most, tiles = 0, 0, 0
    for q in range(period * period):
        high, wide = (rows - q // period + period - 1) // period, (cols - q % period + period - 1) // period
        grids[q, 0], grids[q, 1], grids[q, 2] = high, wide, batch * high * wide
        most = max(most, first[q + 1] - first[q])
        tiles += (batch * high * wide + ROWS - 1) // ROWS
    block = max(1, min(_BLOCKS, tiles // (4 * workers))) * ROWS
    for q in range(period * period):
        cost += (grids[q, 2] + block - 1) // block * columns * (first[q + 1] - first[q])
    made = out.reshape(-1)
    for worker in prange(workers):
        table = np.empty((most, _PLACES), np.int64)
        at_row, at_col, pixel = np.empty(_PLACES, np.int64), np.empty(_PLACES, np.int64), np.empty(_PLACES, np.int64)
        edge, to_edge = np.empty((ROWS, size), np.float32), np.empty(ROWS, np.int64)
        zeros, none, start_sums = (
            np.zeros(most * depth, np.float32),
            np.zeros(size, np.float32),
            np.zeros(columns * size, np.float32),
        )
        if biased:
            start_sums[:channels] = bias
        for m in range(ROWS):
            to_edge[m] = edge[m].ctypes.data
        to = np.empty(_PLACES, np.int64)
        low, high, begun = cost * worker // workers, cost * (worker + 1) // workers, 0
        for q in range(period * period):
            phase_row, phase_col = q // period, q % period
            inside, length = first[q + 1] - first[q], lengths[q]
            runs, deep = inside // length, length * depth
            for task in range((grids[q, 2] + block - 1) // block):
                begin, end = _share(low, high, begun, inside, columns)
                begun += columns * inside
                if begin >= end:
                    continue
                start = task * block
                count = min(block, grids[q, 2] - start)
                places_of(at_row, at_col, pixel, start, count, grids[q], period, phase_row, phase_col, rows, cols)
                for m in range(count):
                    to[m] = out.ctypes.data + 4 * channels * pixel[m]
                if step != period or margin or height != rows or width != cols:
                    places_of(at_row, at_col, pixel, start, count, grids[q], step, margin, margin, height, width)
                base, zero, tap = x.ctypes.data, zeros.ctypes.data, first[q]
                if dense:
                    of_runs(table, shifts, tap, runs, length, pixel, count, base, zero, width, depth)
                else:
                    addresses(table, shifts, tap, runs, at_row, at_col, pixel, count, base, zero, height, width, depth)
                coming, pace = x.ctypes.data + 4 * depth * (pixel[count - 1] + step), 4 * ROWS * step * step // runs
                # Few weights stay in the cache beside a row of tiles; else the rows do beside one panel.
                rows_at_once = ROWS if (end - begin) * size * inside * depth <= _NEAR else count
                for top in range(0, count, rows_at_once):
                    for column in range(begin, end):
                        wide, offset = min(size, channels - column * size), 4 * size * column
                        if in_place:
                            panel, row_step = panels.ctypes.data + offset, 4 * channels
                        else:
                            panel = panels.ctypes.data + 4 * (first[q] * columns + column * inside) * size * depth
                            row_step = 4 * size
                        begin_sum, row = start_sums.ctypes.data + offset, top
                        while row < min(top + rows_at_once, count):
                            rest, rows_at = count - row, table.ctypes.data + 8 * row
                            if few:
                                dot_tile(rows_at, 8 * _PLACES, runs, deep, panel, edge.ctypes.data)
                                _spill(made, edge, to, row, min(DOTS, rest), column * size, wide, start_sums, column * size)
                                row += DOTS
                                continue
                            tall = ROWS if rest > 2 * SHORT else SHORT
                            whole = wide == size and tall <= rest
                            to_at, move = (to.ctypes.data + 8 * row, offset) if whole else (to_edge.ctypes.data, 0)
                            if tall == ROWS and column == begin and runs == 1:
                                ahead = coming + 4 * depth * row * step * step
                                asking_tile(
                                    rows_at, 8 * _PLACES, runs, deep, panel, row_step, begin_sum, to_at, move, ahead, pace
                                )
                            elif tall == ROWS:
                                row_tile(rows_at, 8 * _PLACES, runs, deep, panel, row_step, begin_sum, to_at, move)
                            else:
                                short_tile(rows_at, 8 * _PLACES, runs, deep, panel, row_step, begin_sum, to_at, move)
                            if not whole:
                                _spill(made, edge, to, row, min(tall, rest), column * size, wide, none, 0)
                            row += tall


def _few(channels, depth):
    """Whether dot tiles make the results: the lanes of a vector are on the summed channels."""
    return channels <= COLS // 2 and depth % LANES == 0


def _gathered(x, w, bias, out, stride, upsample, pad, backward):
    channels, depth = out.shape[3], x.shape[3]
    few = _few(channels, depth)
    dense = not few and depth < SHALLOW
    period, step, reach, first, shifts, lengths, starts, members = geometry(w.shape[0], stride, upsample, pad, backward, dense)
    shallow = dense and conv_shallow.suits(out.shape[2], channels, period, reach, lengths[0])
    margin = 0
    if dense and not shallow and reach != (0, 0):
        rows, cols = (-(-n // period) for n in out.shape[1:3])
        x, margin = with_margins(x, reach, step, rows, cols), reach[0]
    in_place = not few and not backward and period == 1 and channels % COLS == 0
    panels = w.reshape(-1)
    if not in_place:
        size = FEW if few else COLS
        panels = buffers.for_weights((len(shifts) * -(-channels // size) * size * depth,), np.float32)
        _pack_weights(w.reshape(-1, *w.shape[2:]), first, lengths, starts, members, panels, backward, few)
    has, bias = bias is not None, panels if bias is None else bias
    if shallow:
        conv_shallow.convolve(x, panels, bias, has, out, step, reach[0], lengths[0], in_place, threads())
        return out
    _gather(x, panels, bias, has, out, period, step, margin, first, shifts, lengths, dense, in_place, few, threads())
    return out


@alone_below(PRODUCTS, lambda x, w, *_, **__: x.size * w.size // max(1, x.shape[3]))
def conv2d(x, w, bias=None, stride=1, upsample=False, pad=None, out=None, shift=None, residual=None, precision=None):
    kernel = w.shape[0]
    if out is None:
        rows, cols = (conv_output_size(n, kernel, stride, upsample, pad) for n in x.shape[1:3])
        out = buffers.empty((x.shape[0], rows, cols, w.shape[3]), x.dtype)
    fast = not high(precision) and not (upsample and residual is not None)
    if fast and winograd.suits(x.shape, w.shape[3], kernel, stride, upsample, pad):
        return winograd.convolve(x, w, bias, out, upsample, shift=shift, residual=residual)
    if not _few(w.shape[3], w.shape[2]) and conv_row.suits(x.shape, kernel, upsample, pad):
        conv_row.forward(x, w, bias, out)
    else:
        _gathered(x, w, bias, out, stride, upsample, pad, False)
    if shift is not None and out.size:
        flat = out.reshape(out.shape[0], -1, out.shape[3])
        elementwise.add_channels(flat, shift, 0, flat)
    if residual is not None:
        elementwise.add(out, residual, out)
    return out


@alone_below(PRODUCTS, lambda dy, w, *_, **__: dy.size * w.size // max(1, dy.shape[3]))
def conv2d_backward_input(dy, w, input_shape, stride=1, upsample=False, pad=None, out=None, precision=None):
    if out is None:
        out = buffers.empty(tuple(input_shape), dy.dtype)
    if not high(precision) and winograd.suits(input_shape, w.shape[3], w.shape[0], stride, upsample, pad):
        return winograd.convolve(dy, w, None, out, upsample, backward=True)
    if not _few(w.shape[2], w.shape[3]) and conv_row.suits(input_shape, w.shape[0], upsample, pad):
        return conv_row.backward_input(dy, w, out)
    return _gathered(dy, w, None, out, stride, upsample, pad, True)


@alone_below(PRODUCTS, lambda x, dy, kernel, *_, **__: dy.size * x.shape[3] * kernel**2)
def conv2d_backward_weight(x, dy, kernel, stride=1, upsample=False, pad=None, out=None, precision=None):
    if out is None:
        out = buffers.empty((kernel, kernel, x.shape[3], dy.shape[3]), x.dtype)
    dbias = buffers.empty((dy.shape[3],), x.dtype)
    if not high(precision) and winograd.suits(x.shape, dy.shape[3], kernel, stride, upsample, pad):
        return winograd.gradient(x, dy, out, dbias, upsample)
    if conv_row.suits(x.shape, kernel, upsample, pad):
        return conv_row.backward_weight(x, dy, out, dbias)
    return conv_weights.gradient(x, dy, out, dbias, kernel, stride, upsample, pad)
