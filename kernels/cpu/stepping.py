"""What a captured training step is made of beside its network. Numbers that change from step to step are read from arrays.

No fast-math flag may stand on the noising: its bits are those of the definition.
"""

import numpy as np
from numba import prange

from ..reference import BLOCK
from ..streams import FORWARD, TIMES
from .jit import Entry, jit, loops
from .optim import adamw_ema_by_table
from .random import U, W, fill_block, key, philox
from .threads import ELEMENTS, alone_below
from .vector import F

__all__ = ["adamw_ema_by_table", "count", "draw_levels", "example", "verdict"]

_UNIT = np.float32(1 / 127.5)


@jit
def _levels(rows, step, stream, k0, k1, t, levels):
    steps = np.float64(rows.shape[0] - 1)
    for k in range(t.size):
        r0, r1, r2, r3 = philox(W(k // 2), W(0), W(U(step[0])), W(stream), U(k0), U(k1))
        high, low = (r2, r3) if k % 2 else (r0, r1)
        word = (W(high) << W(32)) | W(low)
        level = 1 + np.int64(np.float64(word >> W(11)) * 2.0**-53 * steps)
        t[k] = level
        for c in range(levels.shape[0]):
            levels[c, k] = rows[level, c]


_draw = Entry(_levels)


def draw_levels(rows, step, seed, t, levels):
    _draw(rows, step, TIMES, *key(int(seed)), t, levels)


@jit
def _noised(start, end, images, z, signal, noise, scale, on_x0, on_eps, x, target):
    for j in range(start, end):
        x0, e = F(images[j]) * _UNIT - F(1), z[j - start]
        x[j] = scale * (signal * x0 + noise * e)
        target[j] = on_x0 * x0 + on_eps * e


@loops
def _example(images, levels, step, stream, k0, k1, x, target):
    samples = levels.shape[1]
    size = images.size // samples
    blocks = (size + BLOCK - 1) // BLOCK
    words = step[0], stream, 0, k0, k1
    for task in prange(samples * blocks):
        n, block = task // blocks, task % blocks
        z = np.empty(BLOCK, np.float32)
        start, end = n * size + block * BLOCK, n * size + min(size, (block + 1) * BLOCK)
        fill_block(z, end - start, block, n, words)
        _noised(start, end, images, z, levels[0, n], levels[1, n], levels[2, n], levels[3, n], levels[4, n], x, target)


@alone_below(ELEMENTS, lambda images, *_: images.size)
def example(images, levels, step, seed, x, target):
    _example(images.reshape(-1), levels, step, FORWARD, *key(int(seed)), x.reshape(-1), target.reshape(-1))


@jit
def _verdict(value, norm_sq, skipped, tally):
    whole = 0.0
    for k in range(value.size):
        whole += np.float64(value[k])
    mean, norm = whole / value.size, np.sqrt(norm_sq[0])
    if skipped[0] == 0 and np.isfinite(mean) and np.isfinite(norm):
        tally[0] += mean
        tally[1] += 1.0
        tally[2] = mean
        tally[3] = norm
    else:
        norm_sq[0] = np.nan


verdict = Entry(_verdict)


@jit
def _count(made, skipped, norm_sq):
    if np.isfinite(norm_sq[0]):
        made[0] += 1
    else:
        skipped[0] += 1


count = Entry(_count)
