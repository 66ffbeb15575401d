"""Where a convolution reads: the places of each class of results, and the addresses of the pixels that its taps meet there.

Along an axis, the places that a sum is made for split into ``period`` classes; place ``a·period + phase`` of a class reads the
source at ``a·step + shift`` for the shifts of that class, and each shift carries the sum of the kernel taps that meet there.
"""

from functools import lru_cache
from itertools import product

import numpy as np
from numba import prange

from .. import buffers
from ..reference import conv_padding
from .jit import jit, loops
from .vector import LANES, F

_FAR = -(1 << 30)
SHALLOW = 16  # below so many channels the shifts of a row are read as one run


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
def geometry(kernel, stride, upsample, pad, backward, merged):
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
def places_of(rows, cols, pixels, place, count, grid, step, first_row, first_col, height, width):
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
def addresses(table, shifts, low, taps, rows, cols, pixels, count, base, zero, height, width, size):
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
def of_runs(table, shifts, low, runs, length, pixels, count, base, zero, width, size):
    """:func:`addresses` of runs of ``length`` pixels in a source with margins, which hold all of them."""
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


def with_margins(x, reach, step, rows, cols):
    """x with the margins that shifts of ``reach`` read from (rows, cols) places ``step`` apart, and room for a vector behind."""
    batch, height, width, depth = x.shape
    high, wide = (max(n, (m - 1) * step + reach[1] + 1) + reach[0] for n, m in ((height, rows), (width, cols)))
    room = buffers.empty((batch * high * wide * depth + LANES,), np.float32)
    padded = room[: room.size - LANES].reshape(batch, high, wide, depth)
    if x.size:
        _pad(x, padded, reach[0])
    return padded
