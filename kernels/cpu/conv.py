"""Convolution and its two gradients as matrix products whose left rows are gathered by address: no unrolled or padded copy.

All three share one geometry. Along an axis, the places that a sum is made for split into ``period`` classes; place
``a·period + phase`` of a class reads the source at ``a·step + shift`` for the shifts of that class, and each shift carries the
sum of the kernel taps that meet there. Doubling by nearest neighbour and stride 2 (backwards) thus cost only the products that
differ: 16 in place of 36, for example. Where channels are few, the shifts of a row that lie side by side are read as one run.
Each sum runs in a fixed order that depends on the shapes only, not on the threads.
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
from .tiles import (
    DOTS,
    FEW,
    SHORT,
    asking_tile,
    column_tile,
    copy_rows,
    dot_tile,
    pack_tile,
    row_tile,
    short_tile,
    turn_tile,
)
from .vector import COLS, LANES, NARROW, ROWS, F

_FAR = -(1 << 30)
_BLOCKS = 8  # row tiles whose addresses are made together, at most
_PLACES = _BLOCKS * ROWS
_SHALLOW = 16  # below so many channels the shifts of a row are read as one run
_DEPTH = 256  # places of one packed panel in the weight gradient, at most
_ROOM = 1 << 15  # floats of the rows that are packed beside it
_SLICE = 4  # column tiles of input channels in one task of the weight gradient,
_LONG_SLICE = 32  # or up to so many where there is one tap: the gradient is packed for each slice anew
_CHUNK = 256  # at least so many places in each partial sum over the places,
_CHUNKS = 8, 64  # and at most so many of those: more where the weights are few
_FEW_WEIGHTS = 1 << 20
_FOLD = 1 << 12  # sums that one task adds over the chunks
_NEAR = 1 << 12  # floats of weights that stay in the nearest cache
_PACE = 8  # floats of what comes next that are asked for at each step of a product
_PACKED = 64  # rows of a weight panel that are packed by one task


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
def _geometry(kernel, stride, upsample, pad, backward, merged):
    """The classes and taps as integer tables: (period, step, reach, first, shifts, lengths, starts, members).

    Class ``q`` (row phase · period + column phase) has the taps first[q]..first[q+1]; tap i reads at shifts[i] = (row, column)
    and carries the sum of the kernel places members[starts[i]..starts[i+1]] (row · kernel + column). Its taps come in runs of
    lengths[q] that lie side by side in a row of the source: of one, unless ``merged``. All shifts lie in −reach[0]..reach[1].
    """
    before, _ = conv_padding(kernel, pad)
    period, step, classes = _axis(kernel, before, stride, upsample, backward)
    first, shifts, lengths, starts, members = [0], [], [], [0], []
    for rows, cols in product(classes, classes):
        for (dr, us), (dc, vs) in product(rows.items(), cols.items()):
            shifts.append((dr, dc))
            members += [u * kernel + v for u, v in product(us, vs)]
            starts.append(len(members))
        side_by_side = list(cols) == list(range(min(cols, default=0), max(cols, default=-1) + 1))
        lengths.append(len(cols) if merged and rows and cols and side_by_side else 1)
        if len(shifts) == first[-1]:  # no tap meets this class: one that reads outside of every image
            shifts.append((_FAR, _FAR))
            starts.append(len(members))
        first.append(len(shifts))
    tables = [np.array(a, np.int64) for a in (first, np.reshape(shifts, (-1, 2)), lengths, starts, members)]
    for table in tables:
        table.setflags(write=False)
    every = [shift for phase in classes for shift in phase]
    return period, step, (max(0, -min(every)), max(0, *every, 0)), *tables


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


@jit
def _places(rows, cols, pixels, place, count, grid, step, first_row, first_col, height, width):
    """``count`` places of a grid (rows, columns) from ``place`` on, ``step`` apart in images of height x width: their rows and
    columns there, and the pixels that they are."""
    n, rest = place // (grid[0] * grid[1]), place % (grid[0] * grid[1])
    a, b = rest // grid[1], rest % grid[1]
    for i in range(count):
        rows[i], cols[i] = first_row + a * step, first_col + b * step
        pixels[i] = (n * height + rows[i]) * width + cols[i]
        b += 1
        if b == grid[1]:
            a, b = a + 1, 0
            if a == grid[0]:
                n, a = n + 1, 0


@jit
def _addresses(table, shifts, low, taps, rows, cols, pixels, count, base, zero, height, width, size):
    """Where the pixels at shifts[low], … of each place lie: in the source, of pixels of ``size`` floats, or at zeros."""
    for t in range(taps):
        dr, dc = shifts[low + t, 0], shifts[low + t, 1]
        move = dr * width + dc
        for i in range(count):
            r, c = rows[i] + dr, cols[i] + dc
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            table[t, i] = base + 4 * size * (pixels[i] + move) if inside else zero
        for i in range(count, table.shape[1]):
            table[t, i] = zero


@jit
def _inside(table, shifts, low, runs, length, pixels, count, base, zero, width, size):
    """:func:`_addresses` of runs of ``length`` pixels in a source with margins, which hold all of them."""
    for t in range(runs):
        dr, dc = shifts[low + t * length, 0], shifts[low + t * length, 1]
        first = zero if dr == _FAR else base + 4 * size * (dr * width + dc)
        each = 0 if dr == _FAR else 4 * size
        for i in range(count):
            table[t, i] = first + each * pixels[i]
        for i in range(count, table.shape[1]):
            table[t, i] = zero


@loops
def _pad(x, wide, before):
    """Copy images into larger ones: zeros around."""
    height, width, size = x.shape[1], x.shape[2], x.shape[3]
    rows = wide.shape[1]
    for task in prange(x.shape[0] * rows):
        n, r = task // rows, task % rows - before
        to = wide[n, r + before].reshape(-1)
        begin = before * size
        end = begin + width * size if 0 <= r < height else begin
        to[:begin] = F(0)
        if end > begin:
            row = x[n, r].reshape(-1)
            for j in range(row.size):
                to[begin + j] = row[j]
        to[end:] = F(0)


def _with_margins(x, reach, step, rows, cols):
    """x with the margins that shifts of ``reach`` read from (rows, cols) places ``step`` apart, and room for a vector behind."""
    batch, height, width, depth = x.shape
    high, wide = (max(n, (m - 1) * step + reach[1] + 1) + reach[0] for n, m in ((height, rows), (width, cols)))
    room = buffers.empty((batch * high * wide * depth + LANES,), np.float32)
    padded = room[: room.size - LANES].reshape(batch, high, wide, depth)
    if x.size:
        _pad(x, padded, reach[0])
    return padded


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
                _places(at_row, at_col, pixel, start, count, grids[q], period, phase_row, phase_col, rows, cols)
                for m in range(count):
                    to[m] = out.ctypes.data + 4 * channels * pixel[m]
                if step != period or margin or height != rows or width != cols:
                    _places(at_row, at_col, pixel, start, count, grids[q], step, margin, margin, height, width)
                base, zero, tap = x.ctypes.data, zeros.ctypes.data, first[q]
                if dense:
                    _inside(table, shifts, tap, runs, length, pixel, count, base, zero, width, depth)
                else:
                    _addresses(table, shifts, tap, runs, at_row, at_col, pixel, count, base, zero, height, width, depth)
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


def _gathered(x, w, bias, out, stride, upsample, pad, backward):
    channels, depth = out.shape[3], x.shape[3]
    few = channels <= COLS // 2 and depth % LANES == 0
    dense = not few and depth < _SHALLOW
    period, step, reach, first, shifts, lengths, starts, members = _geometry(w.shape[0], stride, upsample, pad, backward, dense)
    margin = 0
    if dense and reach != (0, 0):
        rows, cols = (-(-n // period) for n in out.shape[1:3])
        x, margin = _with_margins(x, reach, step, rows, cols), reach[0]
    in_place = not few and not backward and period == 1 and channels % COLS == 0
    panels = w.reshape(-1)
    if not in_place:
        size = FEW if few else COLS
        panels = buffers.for_weights((len(shifts) * -(-channels // size) * size * depth,), np.float32)
        _pack_weights(w.reshape(-1, *w.shape[2:]), first, lengths, starts, members, panels, backward, few)
    has, bias = bias is not None, panels if bias is None else bias
    _gather(x, panels, bias, has, out, period, step, margin, first, shifts, lengths, dense, in_place, few, threads())
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
                    _places(at_row, at_col, pixel, start, count, grid, period, phase_row, phase_col, rows, cols)
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
                    _places(at_row, at_col, pixel, start, count, grid, step, margin, margin, height, width)
                    base, zero = x.ctypes.data, zeros.ctypes.data
                    turn, turns, marked_end = 0, channels // _PACE, marked[count - 1] + 4 * channels
                    for i in range(1 if dense else first[q + 1] - first[q]):
                        if dense:
                            runs, n = (first[q + 1] - first[q]) // length, length * depth
                            for j in range(runs):
                                _inside(table, shifts, first[q] + j * length, 1, length, pixel, count, base, zero, width, depth)
                                copy_rows(table.ctypes.data, count, n, left.ctypes.data + 4 * j * n, 4 * left.shape[1])
                            for j in range(count):
                                table[0, j] = left.ctypes.data + 4 * j * left.shape[1]
                            filled, offset, here = (runs * n + NARROW - 1) // NARROW, 0, origin + q * unit
                        else:
                            low = first[q] + i
                            _addresses(table, shifts, low, 1, at_row, at_col, pixel, count, base, zero, height, width, depth)
                            filled, offset, here = used, 4 * NARROW * part * each, origin + low * unit
                        for column in range(columns):
                            from_panel = panel[column].ctypes.data
                            for m in range(filled):
                                to_sums = sums.ctypes.data + 4 * (here + m * tile + column * apart[0])
                                left_at, marks_at = offset + 4 * NARROW * m, marked_end + 4 * _PACE * turn * count
                                ahead, pace = (marks_at, 4 * _PACE) if turn < turns else (from_panel, 0)
                                column_tile(table.ctypes.data, left_at, count, from_panel, to_sums, apart[1], ahead, pace)
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


@alone_below(PRODUCTS, lambda x, dy, kernel, *_, **__: dy.size * x.shape[3] * kernel**2)
def conv2d_backward_weight(x, dy, kernel, stride=1, upsample=False, pad=None, out=None, precision=None):
    if out is None:
        out = buffers.empty((kernel, kernel, x.shape[3], dy.shape[3]), x.dtype)
    dbias = buffers.empty((dy.shape[3],), x.dtype)
    if not high(precision) and winograd.suits(x.shape, dy.shape[3], kernel, stride, upsample, pad):
        return winograd.gradient(x, dy, out, dbias, upsample)
    dw = out.reshape(-1, *out.shape[2:])
    # With few output channels the two sides change places: dy is gathered for each pixel of x.
    swapped = 2 * _padded_work(kernel, dy.shape[3], x.shape[3]) <= _padded_work(kernel, x.shape[3], dy.shape[3])
    if swapped:
        x, dy = dy, x
    depth, channels, workers = x.shape[3], dy.shape[3], threads()
    dense = depth < _SHALLOW or depth % NARROW != 0
    period, step, reach, first, shifts, lengths, starts, members = _geometry(kernel, stride, upsample, pad, swapped, dense)
    columns, taps, run, each, slices, units = -(-channels // COLS), len(shifts), _DEPTH, _SLICE, 1, period**2
    chunks = max(1, min(dy.size // channels // _CHUNK, max(_CHUNKS[0], min(_CHUNKS[1], _FEW_WEIGHTS // out.size))))
    room = 0
    margin = 0
    if dense:
        rows, cols = (-(-n // period) for n in dy.shape[1:3])
        x, margin = _with_margins(x, reach, step, rows, cols), reach[0]
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
