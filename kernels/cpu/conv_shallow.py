"""Convolution of few input channels to many: the shifts of a row are read as one run of floats, from lines copied beforehand.

Each worker copies the lines of a band of output rows, with margins of zeros, into the nearest cache. The places of a tile lie
side by side there, so that no table of addresses is needed. Each sum runs over the taps in their order, whatever the band.
"""

import numpy as np
from numba import prange

from .jit import jit, loops
from .tiles import line_tile
from .vector import COLS, NARROW, F

_ROOM = 1 << 13  # floats of the lines of a band of several rows, at most
_TASKS = 8  # for each worker, where rows are to be had for it


@jit
def _copy_line(to, source, begin):
    """to = source from ``begin`` on; zeros around are left as they are."""
    for j in range(source.size):
        to[begin + j] = source[j]


@loops
def _convolve(x, panels, bias, biased, out, step, before, side, in_place, band, workers):
    """out = the sum over side x side taps, the first ``before`` pixels ahead of a place, places ``step`` apart."""
    batch, height, width, depth = x.shape
    rows, cols, channels = out.shape[1], out.shape[2], out.shape[3]
    bands = (rows + band - 1) // band
    columns, run = channels // COLS, side * depth
    line = max((cols - 1) * step + side, before + width) * depth
    wide, pace, pixel = width * depth, 4 * step * depth, 4 * channels
    column_step, row_step = (4 * COLS, 4 * channels) if in_place else (4 * COLS * side * run, 4 * COLS)
    source = x.reshape(-1)
    for worker in prange(workers):
        lines = np.zeros(((band - 1) * step + side, line), np.float32)
        first = np.zeros(channels, np.float32)
        if biased:
            first[:] = bias
        for task in range(batch * bands * worker // workers, batch * bands * (worker + 1) // workers):
            n, top = task // bands, task % bands * band
            count = min(band, rows - top)
            for i in range((count - 1) * step + side):
                row = top * step + i - before
                if 0 <= row < height:
                    at = (n * height + row) * wide
                    _copy_line(lines[i], source[at : at + wide], before * depth)
                else:
                    lines[i] = F(0)
            for i in range(count):
                left, to = lines[i * step].ctypes.data, out.ctypes.data + ((n * rows + top + i) * cols) * pixel
                for start in range(0, cols, NARROW):
                    place = min(start, cols - NARROW)  # the last tile makes some results again, to the same bits
                    for column in range(columns):
                        line_tile(
                            left + place * pace,
                            pace,
                            4 * line,
                            side,
                            run,
                            panels.ctypes.data + column * column_step,
                            row_step,
                            first.ctypes.data + 4 * COLS * column,
                            to + place * pixel + 4 * COLS * column,
                            pixel,
                        )


def suits(cols, channels, period, reach, side):
    """Whether rows of ``cols`` places of so many output channels are whole tiles, of one class (:mod:`.conv_places`)."""
    return period == 1 and cols >= NARROW and channels % COLS == 0 and sum(reach) + 1 == side


def convolve(x, panels, bias, biased, out, step, before, side, in_place, workers):
    """out = the sum of ``side`` shifts each way from −``before`` on, by ``panels`` as :mod:`.conv` orders them, and the bias."""
    rows, cols = out.shape[1:3]
    line = ((cols - 1) * step + side) * x.shape[3]
    band = max(1, min((_ROOM // line - side) // step + 1, -(-out.shape[0] * rows // (_TASKS * workers)), rows))
    _convolve(x, panels, bias, biased, out, step, before, side, in_place, band, workers)
