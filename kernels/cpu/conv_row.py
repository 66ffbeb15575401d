"""The 1×1 convolution of a single pixel, a linear layer of one row: bound by reading the weights, once and in their order.

Each sum adds one product after the other, as the tiles of :mod:`.conv` do: a row alone has the bits that it has among others.
"""

from numba import prange

from ..reference import conv_padding
from .jit import jit, loops
from .threads import threads
from .tiles import turned_sums
from .vector import COLS, LANES, F

_SHARE = 1 << 15  # weights of one task, at least: some 2 microseconds


def suits(shape, kernel, upsample, pad):
    """Whether an image batch x of this shape (B, H, W, C) is one pixel that meets one tap."""
    return kernel == 1 and tuple(shape[:3]) == (1, 1, 1) and not upsample and conv_padding(kernel, pad) == (0, 0)


@jit(fastmath={"contract"})
def _add_rows(to, x, w, low, high):
    """to += x w of the columns low..high, eight rows at a time."""
    whole = x.size // 8 * 8
    to = to[low:high]
    for k in range(0, whole, 8):
        w0, w1, w2, w3 = w[k, low:high], w[k + 1, low:high], w[k + 2, low:high], w[k + 3, low:high]
        w4, w5, w6, w7 = w[k + 4, low:high], w[k + 5, low:high], w[k + 6, low:high], w[k + 7, low:high]
        x0, x1, x2, x3, x4, x5, x6, x7 = x[k], x[k + 1], x[k + 2], x[k + 3], x[k + 4], x[k + 5], x[k + 6], x[k + 7]
        for j in range(to.size):
            made = to[j] + x0 * w0[j] + x1 * w1[j] + x2 * w2[j] + x3 * w3[j]
            to[j] = made + x4 * w4[j] + x5 * w5[j] + x6 * w6[j] + x7 * w7[j]
    for k in range(whole, x.size):
        row, xk = w[k, low:high], x[k]
        for j in range(to.size):
            to[j] += xk * row[j]


@loops
def _forward(x, w, bias, biased, out, tasks):
    for task in prange(tasks):
        low, high = out.size * task // tasks // 64 * 64, out.size * (task + 1) // tasks // 64 * 64
        high = out.size if task == tasks - 1 else high
        for j in range(low, high):
            out[j] = bias[j] if biased else F(0)
        _add_rows(out, x, w, low, high)


@loops(fastmath={"contract"})
def _backward_input(dy, w, out, tasks):
    groups, runs, size = (out.size + COLS - 1) // COLS, dy.size // LANES, dy.size
    for task in prange(tasks):
        for group in range(groups * task // tasks, groups * (task + 1) // tasks):
            low, high = group * COLS, min(out.size, (group + 1) * COLS)
            whole = runs * LANES if high - low == COLS else 0
            out[low:high] = F(0)
            if whole:
                turned_sums(dy.ctypes.data, runs, w[low].ctypes.data, 4 * size, out[low:].ctypes.data)
            for c in range(low, high):
                total, row = out[c], w[c]
                for k in range(whole, size):
                    total += dy[k] * row[k]
                out[c] = total


@loops
def _backward_weight(x, dy, out, dbias, tasks):
    for task in prange(tasks):
        for c in range(x.size * task // tasks, x.size * (task + 1) // tasks):
            to, xc = out[c], x[c]
            for k in range(to.size):
                to[k] = xc * dy[k]
    for k in range(dy.size):
        dbias[k] = dy[k]


def _tasks(weights):
    return max(1, min(threads(), weights // _SHARE))


def forward(x, w, bias, out):
    x, w, y = x.reshape(-1), w.reshape(w.shape[2:]), out.reshape(-1)
    _forward(x, w, x if bias is None else bias, bias is not None, y, _tasks(w.size))
    return out


def backward_input(dy, w, out):
    w = w.reshape(w.shape[2:])
    _backward_input(dy.reshape(-1), w, out.reshape(-1), _tasks(w.size))
    return out


def backward_weight(x, dy, out, dbias):
    dw = out.reshape(out.shape[2:])
    _backward_weight(x.reshape(-1), dy.reshape(-1), dw, dbias, _tasks(dw.size))
    return out, dbias
