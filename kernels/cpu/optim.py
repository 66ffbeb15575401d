"""The optimiser's loops over flat buffers: Σ x² and AdamW with clipping and the running average in one pass."""

import numpy as np
from numba import prange

from .. import buffers
from .jit import jit, loops
from .threads import ELEMENTS, alone_below
from .vector import F

_CHUNK = 1 << 15  # one partial sum, whatever the number of threads


@jit(fastmath={"reassoc", "contract"})
def _squares(x):
    s = 0.0
    for j in range(x.size):
        s += np.float64(x[j]) * np.float64(x[j])
    return s


@loops
def _sum_squares(x, partial, total):
    for k in prange(partial.size):
        partial[k] = _squares(x[k * _CHUNK : (k + 1) * _CHUNK])
    whole = 0.0
    for k in range(partial.size):
        whole += partial[k]
    total[0] = whole


@alone_below(ELEMENTS, lambda x: x.size)
def sum_squares(x):
    partial, total = (buffers.empty((n,), np.float64) for n in (max(1, -(-x.size // _CHUNK)), 1))
    _sum_squares(x.reshape(-1), partial, total)
    return total


@jit(fastmath={"contract"})
def _update(p, g, m, v, ema, clip, b1, b2, shrink, rate, correction, eps, decay):
    c1, c2, rest = F(1) - b1, F(1) - b2, F(1) - decay
    for j in range(p.size):
        gj = g[j] * clip
        mj = b1 * m[j] + c1 * gj
        vj = b2 * v[j] + c2 * gj * gj
        pj = shrink * p[j] - rate * (mj / (F(np.sqrt(vj / correction)) + eps))
        m[j] = mj
        v[j] = vj
        p[j] = pj
        ema[j] = decay * ema[j] + rest * pj


@loops
def _adamw(p, g, m, v, ema, clip, b1, b2, shrink, rate, correction, eps, decay):
    numbers = F(clip), F(b1), F(b2), F(shrink), F(rate), F(correction), F(eps), F(decay)
    chunks = (p.size + _CHUNK - 1) // _CHUNK
    for k in prange(chunks):
        a, b = k * _CHUNK, min(p.size, (k + 1) * _CHUNK)
        _update(p[a:b], g[a:b], m[a:b], v[a:b], ema[a:b], *numbers)


@loops
def _adamw_by_table(p, g, m, v, ema, rows, counter, b1, b2, eps, norm_sq, max_norm):
    row = rows[min(np.int64(counter[0]), rows.shape[0] - 1)]
    clip = min(1.0, max_norm / (np.sqrt(norm_sq[0]) + 1e-6)) if np.isfinite(max_norm) else 1.0
    numbers = F(clip), F(b1), F(b2), row[0], row[1], row[2], F(eps), row[3]
    chunks = (p.size + _CHUNK - 1) // _CHUNK if np.isfinite(norm_sq[0]) else 0
    for k in prange(chunks):
        a, b = k * _CHUNK, min(p.size, (k + 1) * _CHUNK)
        _update(p[a:b], g[a:b], m[a:b], v[a:b], ema[a:b], *numbers)


@alone_below(ELEMENTS, lambda param, *_, **__: param.size)
def adamw_ema(param, grad, m, v, ema, lr, beta1, beta2, eps, weight_decay, step, ema_decay, norm_sq=None, max_norm=float("inf")):
    clip = 1.0
    if norm_sq is not None and np.isfinite(max_norm):
        clip = np.minimum(1.0, max_norm / (np.sqrt(norm_sq[0]) + 1e-6))
    numbers = clip, beta1, beta2, 1 - lr * weight_decay, lr / (1 - beta1**step), 1 - beta2**step, eps, ema_decay
    _adamw(param, grad, m, v, ema, *map(float, numbers))


@alone_below(ELEMENTS, lambda param, *_, **__: param.size)
def adamw_ema_by_table(param, grad, m, v, ema, rows, counter, beta1, beta2, eps, norm_sq, max_norm=float("inf")):
    _adamw_by_table(param, grad, m, v, ema, rows, counter, float(beta1), float(beta2), float(eps), norm_sq, float(max_norm))
