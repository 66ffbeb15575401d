"""The 3×3 convolution of stride 1 by Winograd's F(4×4, 3×3): 36 products in the place of 144 for each tile of 4×4 results,
25 where the image is doubled first.

A block of tiles is taken into the products' space, multiplied point by point of that space (36 matrix products) and taken back
while it is in the cache. The weight gradient sums over all tiles at each point, and only then goes back. Results do not depend
on the number of workers. Sums of large and small factors make the error 4 to 15 times that of the direct sum.
"""

import numpy as np
from numba import prange

from .. import buffers
from ..reference import conv_padding
from .jit import jit, loops
from .lanes import call_ahead
from .threads import threads
from .tiles import SHORT, column_tile, row_tile, short_tile
from .vector import COLS, FAR, LANES, NARROW, ROWS, F, turn
from .winograd_transforms import (
    FEWER,
    POINTS,
    TILE,
    add_result,
    read_doubled,
    read_mark,
    read_mark_fewer,
    read_source,
    read_source_fewer,
    transform_flipped,
    transform_flipped_fewer,
    transform_gradient,
    transform_gradient_fewer,
    transform_taps,
    transform_taps_fewer,
    write_halved,
    write_result,
    write_result_fewer,
)

_BLOCK = 2 * ROWS if ROWS == 12 else 4 * ROWS  # tiles that are in the products' space together,
_ALONE = 2 * _BLOCK  # or all of them where they are so few
_TASKS = 8  # for each worker, where columns are to be had for it
_APART = LANES  # floats between two points of that space, so that 36 streams do not meet in one set of the cache
_CHUNK_BYTES = 4 << 20  # of the tiles whose weight gradient is summed together
_SUMS = NARROW * COLS  # sums of one register tile
_PARTS = 8  # partial sums of the bias gradient: fixed, so that the order of the sum is
ZEROS = np.zeros(COLS, np.float32)
ZEROS.setflags(write=False)  # a constant: what lies outside of an image, and where sums begin
_PLAIN, _PLAIN_DOUBLED = 9, 4  # work of a result by the direct sum; of the image that is doubled first,
_WINOGRAD, _WINOGRAD_DOUBLED = 48, 33  # of a tile,
_FACTORS = 20  # and of all weights, as so many tiles
_LEAST = 1 << 23  # multiplications of the direct sum; below, some 30 microseconds, there is nothing to gain for the larger error


def suits(shape, cout, kernel, stride, upsample, pad):
    """Whether x of this shape (B, H, W, C) goes this way to ``cout`` channels: where the count of multiplications says so."""
    if kernel != 3 or stride != 1 or conv_padding(kernel, pad) != (1, 1) or shape[3] % LANES or cout % LANES:
        return False
    factor = 2 if upsample else 1
    batch, height, width = shape[0], factor * shape[1], factor * shape[2]
    tiles = -(-_tiles(batch, height, width) // ROWS) * ROWS
    plain, winograd = (_PLAIN_DOUBLED, _WINOGRAD_DOUBLED) if upsample else (_PLAIN, _WINOGRAD)
    places = batch * height * width
    return plain * places * shape[3] * cout >= _LEAST and winograd * (tiles + _FACTORS) <= plain * places


def _tiles(batch, height, width):
    return batch * -(-height // TILE) * -(-width // TILE)


@loops(prepares=True)
def _factors(w, u, doubled):
    """u (points, …): at each point G w Gᵀ of taps w (3, 3, depth, channels), packed as (columns, depth, COLS)."""
    depth, channels = w.shape[2], w.shape[3]
    step, to_step = 4 * depth * channels, 4 * u.shape[1]
    columns = (channels + COLS - 1) // COLS
    for i in prange(columns * depth):
        column, c = i // depth, i % depth
        for k in range(column * COLS, min(channels, (column + 1) * COLS), LANES):
            at, to = w.ctypes.data + 4 * (c * channels + k), u.ctypes.data + 4 * (i * COLS + k % COLS)
            if doubled:
                transform_taps_fewer(at, step, to, to_step)
            else:
                transform_taps(at, step, to, to_step)


@loops(prepares=True)
def _factors_turned(w, u, doubled, blocks, workers):
    """As :func:`_factors`, of taps w (3, 3, channels, depth) turned by half a turn and with their two channels exchanged."""
    channels, depth = w.shape[2], w.shape[3]
    parts, side = depth // LANES, LANES * LANES
    tasks = channels // LANES * parts
    for worker in prange(workers):
        block = blocks[worker].ctypes.data
        for task in range(tasks * worker // workers, tasks * (worker + 1) // workers):
            k, c = task // parts * LANES, task % parts * LANES
            for tap in range(9):
                turn(w.ctypes.data + 4 * ((tap * channels + k) * depth + c), 4 * depth, block + 4 * tap * side, 4 * LANES)
            for i in range(LANES):
                to = u.ctypes.data + 4 * ((k // COLS * depth + c + i) * COLS + k % COLS)
                if doubled:
                    transform_flipped_fewer(block + 4 * i * LANES, 4 * side, to, 4 * u.shape[1])
                else:
                    transform_flipped(block + 4 * i * LANES, 4 * side, to, 4 * u.shape[1])


@jit(inline="always")
def _tile(t, high, wide):
    """Image, row and column of tile ``t``."""
    rest = t % (high * wide)
    return t // (high * wide), rest // wide * TILE, rest % wide * TILE


@jit
def _call(first, last, high, wide, image, height, line, pixel, further):
    """Ask for the places of tiles first..last of an image, ``further`` down and to the right."""
    for t in range(first, last):
        n, row, col = _tile(t, high, wide)
        for r in range(n * height + row + further, n * height + row + further + TILE):
            call_ahead(image + r * line + (col + further) * pixel, 0, TILE * pixel // 4)


@loops
def _convolve(
    x,
    u,
    bias,
    biased,
    shift,
    shifted,
    residual,
    added,
    out,
    doubled,
    size,
    groups,
    apart,
    to_apart,
    behind,
    far,
    room,
    zeros,
    workers,
):
    """``doubled``: x becomes twice as large first (out is), or out is the sum over the doubled places (x is larger).

    ``groups`` of the columns of one block after the other are tasks; where there is one group, each worker has a range of tiles.
    What is ``far`` is called while products are made: the next block's sources, and the places of this one's results.
    Points of the sources lie ``apart`` in ``room``, from ``behind`` on, those of the products ``to_apart`` from its start on.
    """
    batch, height, width, depth = x.shape
    rows_out, cols_out, channels = out.shape[1], out.shape[2], out.shape[3]
    columns = (channels + COLS - 1) // COLS
    each = (columns + groups - 1) // groups
    high, wide = (max(height, rows_out) + TILE - 1) // TILE, (max(width, cols_out) + TILE - 1) // TILE
    tiles = batch * high * wide
    tasks, shorts = (tiles + size - 1) // size * groups, (tiles + SHORT - 1) // SHORT
    points, onto = u.shape[0], doubled and rows_out > height
    line, to_line, nothing = 4 * width * depth, 4 * cols_out * channels, zeros.ctypes.data
    for worker in prange(workers):
        own, table = room[worker], np.empty((2, points, size), np.int64)
        made, source, first = own.ctypes.data, own[behind:].ctypes.data, own[behind + points * apart :]
        outside = first[channels:].ctypes.data
        for point in range(points):
            for t in range(size):
                table[0, point, t] = source + 4 * (point * apart + t * depth)
                table[1, point, t] = made + 4 * (point * to_apart + t * each * COLS)
        from_tile, to_tile, low, end = 0, tiles, tasks * worker // workers, tasks * (worker + 1) // workers
        if groups == 1:
            from_tile = shorts * worker // workers * SHORT
            to_tile = min(tiles, shorts * (worker + 1) // workers * SHORT)
            low, end = 0, (to_tile - from_tile + size - 1) // size
        at_block = -1
        for task in range(low, end):
            block, begin = task // groups, from_tile + task // groups * size
            from_column = task % groups * each
            to_column = min(columns, from_column + each)
            count = min(size, to_tile - begin)
            if block != at_block:
                at_block = block
                for t in range(count):
                    n, row, col = _tile(begin + t, high, wide)
                    image = x.ctypes.data + n * height * line
                    for c in range(0, depth, LANES):
                        at, to = image + 4 * c, source + 4 * (t * depth + c)
                        if not doubled:
                            read_source(at, row - 1, col - 1, height, width, line, 4 * depth, nothing, to, 4 * apart)
                        elif onto:
                            read_doubled(at, row // 2 - 1, col // 2 - 1, height, width, line, 4 * depth, nothing, to, 4 * apart)
                        else:
                            read_source_fewer(at, row - 1, col - 1, height, width, line, 4 * depth, nothing, to, 4 * apart)
            for point in range(points):
                if far:
                    some, more = begin + size * point // points, begin + size * (point + 1) // points
                    _call(some + size, min(to_tile, more + size), high, wide, x.ctypes.data, height, line, 4 * depth, 1)
                    _call(some, min(to_tile, more), high, wide, out.ctypes.data, rows_out, to_line, 4 * channels, 0)
                for column in range(from_column, to_column):
                    panel = u[point, column * depth * COLS :].ctypes.data
                    t, move = 0, 4 * (column - from_column) * COLS
                    while t < count:
                        rows, to = table[0, point, t:].ctypes.data, table[1, point, t:].ctypes.data
                        if count - t > 2 * SHORT:
                            row_tile(rows, 0, 1, depth, panel, 4 * COLS, nothing, to, move)
                            t += ROWS
                        else:
                            short_tile(rows, 0, 1, depth, panel, 4 * COLS, nothing, to, move)
                            t += SHORT
            of_image = -1
            begin_channel, end_channel = from_column * COLS, min(channels, to_column * COLS)
            for t in range(count):
                n, row, col = _tile(begin + t, high, wide)
                if n != of_image:
                    of_image = n
                    for k in range(begin_channel, end_channel):
                        first[k] = bias[k] if biased else F(0)
                        first[k] += shift[n, k] if shifted else F(0)
                for k in range(begin_channel, end_channel, LANES):
                    at, start = made + 4 * (t * each * COLS + k - begin_channel), n * rows_out * to_line + 4 * k
                    to, plus = out.ctypes.data + start, first[k:].ctypes.data
                    more, step, pixel = residual.ctypes.data + start, 4 * to_apart, 4 * channels
                    if not doubled and not added:
                        write_result(at, step, to, row, col, rows_out, cols_out, to_line, pixel, outside, plus)
                    elif not doubled:
                        add_result(at, step, to, row, col, rows_out, cols_out, to_line, pixel, outside, plus, more, nothing)
                    elif onto:
                        write_result_fewer(at, step, to, row, col, rows_out, cols_out, to_line, pixel, outside, plus)
                    else:
                        write_halved(at, step, to, row // 2, col // 2, rows_out, cols_out, to_line, pixel, outside, plus)


def convolve(x, w, bias, out, upsample=False, backward=False, shift=None, residual=None):
    """out = w * x + bias + shift[n] + residual, or with ``backward`` the gradient of the input where x is that of the output.

    With ``upsample`` there is no residual.
    """
    depth, channels, workers = x.shape[3], out.shape[3], threads()
    columns, points = -(-channels // COLS), FEWER if upsample else POINTS
    u = buffers.for_weights((points, columns * depth * COLS + _APART), np.float32)
    if backward:
        _factors_turned(w, u, upsample, buffers.empty((workers, 9 * LANES * LANES), np.float32), workers)
    else:
        _factors(w, u, upsample)
    tiles = _tiles(x.shape[0], *map(max, zip(x.shape[1:3], out.shape[1:3], strict=True)))
    size = _BLOCK if tiles > _ALONE else -(-tiles // ROWS) * ROWS
    groups = 1 if tiles >= workers * _BLOCK else max(1, min(columns, -(-_TASKS * workers // -(-tiles // size))))
    each = -(-columns // groups)
    groups = -(-columns // each)
    apart, to_apart = size * depth + _APART, size * each * COLS + _APART
    if groups == 1:  # nobody reads a source again: the products of a point take the place of the sources of the point before
        behind = apart = to_apart = max(apart, to_apart)
    else:
        behind = points * to_apart
    far = groups == 1 and not upsample and x.nbytes + out.nbytes > FAR * workers
    room = buffers.empty((workers, behind + points * apart + channels + LANES), np.float32)
    extra = (
        *(room[0] if bias is None else bias, bias is not None),
        *(room if shift is None else shift, shift is not None),
        *(out if residual is None else residual, residual is not None),
    )
    _convolve(x, u, *extra, out, upsample, size, groups, apart, to_apart, behind, far, room, ZEROS, workers)
    return out


@loops
def _into_space(x, dy, doubled, begin, count, sources, marks, apart, to_apart, chunk, zeros, workers):
    """Bᵀ d B and A dy Aᵀ of ``count`` tiles from ``begin`` on: (chunk, depth) and (columns, chunk, COLS) at each point."""
    _, height, width, depth = x.shape
    rows, cols, channels = dy.shape[1], dy.shape[2], dy.shape[3]
    high, wide = (rows + TILE - 1) // TILE, (cols + TILE - 1) // TILE
    line, to_line, nothing = 4 * width * depth, 4 * cols * channels, zeros.ctypes.data
    for worker in prange(workers):
        for t in range(count * worker // workers, count * (worker + 1) // workers):
            n, row, col = _tile(begin + t, high, wide)
            for c in range(0, depth, LANES):
                at, to = x.ctypes.data + n * height * line + 4 * c, sources.ctypes.data + 4 * (t * depth + c)
                if doubled:
                    read_doubled(at, row // 2 - 1, col // 2 - 1, height, width, line, 4 * depth, nothing, to, 4 * apart)
                else:
                    read_source(at, row - 1, col - 1, height, width, line, 4 * depth, nothing, to, 4 * apart)
            for k in range(0, channels, LANES):
                at = dy.ctypes.data + n * rows * to_line + 4 * k
                to = marks.ctypes.data + 4 * ((k // COLS * chunk + t) * COLS + k % COLS)
                if doubled:
                    read_mark_fewer(at, row, col, rows, cols, to_line, 4 * channels, nothing, to, 4 * to_apart)
                else:
                    read_mark(at, row, col, rows, cols, to_line, 4 * channels, nothing, to, 4 * to_apart)


@loops
def _sum_tiles(sums, first, columns, depth, count, sources, marks, apart, to_apart, chunk, tables, workers):
    """sums (points, …) += Σ over ``count`` tiles, at each point of the space as (columns, depth/NARROW, NARROW, COLS)."""
    tasks, parts = sums.shape[0] * columns, depth // NARROW
    for worker in prange(workers):
        rows = tables[worker]
        for task in range(tasks * worker // workers, tasks * (worker + 1) // workers):
            point, column = task // columns, task % columns
            for t in range(count):
                rows[t] = sources.ctypes.data + 4 * (point * apart + t * depth)
            panel = marks.ctypes.data + 4 * (point * to_apart + column * chunk * COLS)
            made = sums[point, column * parts * _SUMS : (column + 1) * parts * _SUMS]
            if first:
                made[:] = F(0)
            for part in range(parts):
                column_tile(rows.ctypes.data, 4 * NARROW * part, count, panel, made[part * _SUMS :].ctypes.data, 4 * COLS)


@loops
def _from_space(sums, dw, doubled):
    depth, channels = dw.shape[2], dw.shape[3]
    columns = (channels + COLS - 1) // COLS
    for i in prange(columns * depth):
        column, c = i // depth, i % depth
        for k in range(column * COLS, min(channels, (column + 1) * COLS), LANES):
            at, to = sums.ctypes.data + 4 * (i * COLS + k % COLS), dw.ctypes.data + 4 * (c * channels + k)
            if doubled:
                transform_gradient_fewer(at, 4 * sums.shape[1], to, 4 * depth * channels)
            else:
                transform_gradient(at, 4 * sums.shape[1], to, 4 * depth * channels)


@loops
def _sum_places(dy, partial, dbias):
    """dbias = Σ over all places, by way of sums over each of some runs of places."""
    parts, places = partial.shape[0], dy.shape[0]
    for part in prange(parts):
        to = partial[part]
        to[:] = F(0)
        for i in range(places * part // parts, places * (part + 1) // parts):
            row = dy[i]
            for k in range(row.size):
                to[k] += row[k]
    dbias[:] = F(0)
    for part in range(parts):
        row = partial[part]
        for k in range(row.size):
            dbias[k] += row[k]


def gradient(x, dy, dw, dbias, upsample=False):
    """dw (3, 3, C, K) and dbias (K,): the gradients of taps and bias where dy is that of the output."""
    depth, channels, workers = x.shape[3], dy.shape[3], threads()
    tiles, points, columns = _tiles(*dy.shape[:3]), FEWER if upsample else POINTS, -(-channels // COLS)
    chunk = min(tiles, max(ROWS, _CHUNK_BYTES // (4 * points * (depth + columns * COLS))))
    apart, to_apart = chunk * depth + _APART, chunk * columns * COLS + _APART
    sources, marks = (buffers.empty((points * step,), np.float32) for step in (apart, to_apart))
    tables = buffers.empty((workers, chunk), np.int64)
    sums = buffers.empty((points, columns * depth * COLS + _APART), np.float32)
    for begin in range(0, tiles, chunk):
        count = min(chunk, tiles - begin)
        _into_space(x, dy, upsample, begin, count, sources, marks, apart, to_apart, chunk, ZEROS, workers)
        _sum_tiles(sums, begin == 0, columns, depth, count, sources, marks, apart, to_apart, chunk, tables, workers)
    _from_space(sums, dw, upsample)
    _sum_places(dy.reshape(-1, channels), buffers.empty((_PARTS, channels), np.float32), dbias)
    return dw, dbias
