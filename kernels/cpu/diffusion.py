"""The forward process and the sampler's update: one pass over memory, with their noise made on the way.

Work goes by spans of places. Noise is made for a span of one block into the first-level cache, while the operands of that span
come in. Every operand of a place is read before anything is written there, so that ``out`` may be any of the operands.
Operations and their order are those of the definition, each rounded once: the results are the same bits.
"""

import numba
import numpy as np
from numba import prange

from .. import buffers
from ..reference import BLOCK, ROW
from ..streams import FORWARD, SAMPLER
from .jit import Entry, jit, loops
from .lanes import call_ahead, drain, held, load_first, misplaced, prefetch, spread, store_first, store_past
from .random import fill_block, key
from .threads import ELEMENTS, threads
from .vector import FAR, LANES, LINE

MADE, GIVEN = 1, 2
PAST = 48 << 20  # bytes of all operands and results; what is larger is written past the caches, which saves reading it first
SHARED = 24 << 20  # of those that lie in a cache which cores share: FAR for each worker at least, and this in all at most
LONG = 1 << 14  # places of a span without noise to make
_LINE = LINE // 4  # floats of a cache line
_AHEAD = 12 * _LINE  # how many places before their use operands are called from there
_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


@jit(forceinline=True)
def _put(to, j, v, count, past):
    if past:
        store_past(to, j, v)
    else:
        store_first(to, j, v, count)


@jit(forceinline=True)
def _noised(j, count, x0, eps, skip, to_eps, x_t, a, s, made, past, past_eps):
    e = load_first(eps, j - skip, count)
    v = a * load_first(x0, j, count) + s * e
    if made:
        _put(to_eps, j, e, count, past_eps)
    _put(x_t, j, v, count, past)


@jit
def _noised_span(start, end, x0, eps, skip, to_eps, x_t, a, s, made, past):
    """x_t = a·x0 + s·ε on start..end; ε begins at ``skip``, and goes to ``to_eps`` where it has just been made."""
    j, operands = start, (x0, eps, skip, to_eps, x_t, a, s, made)
    if past:
        j = min(end, start + misplaced(x_t, start))
        _noised(start, j - start, *operands, False, False)
    past_eps = past and misplaced(to_eps, j) == 0
    while j + LANES <= end:
        _noised(j, LANES, *operands, past, past_eps)
        j += LANES
    _noised(j, end - j, *operands, False, False)


@jit
def _noised_spans(first, last, size, length, x0, eps, x_t, signal, noise, made, past, words):
    """Spans first..last, where the ``size`` places of each sample are cut into spans of ``length``."""
    z = np.empty(BLOCK, np.float32)
    at_x0, at_eps, at_z, at_x_t = x0.ctypes.data, eps.ctypes.data, z.ctypes.data, x_t.ctypes.data
    parts = (size + length - 1) // length
    for span in range(first, last):
        n, part = span // parts, span % parts
        start = n * size + part * length
        end = min(start + length, (n + 1) * size)
        if made:
            call_ahead(at_x0, start, end)
            fill_block(z, end - start, part, n, words)
            _noised_span(start, end, at_x0, at_z, start, at_eps, at_x_t, signal[n], noise[n], True, past)
        else:
            _noised_span(start, end, at_x0, at_eps, 0, at_eps, at_x_t, signal[n], noise[n], False, past)
    if past:
        drain()


@jit
def _noised_part(worker, workers, size, length, x0, eps, x_t, signal, noise, made, past, step, stream, first_sample, k0, k1):
    spans = signal.size * ((size + length - 1) // length)
    first, last = spans * worker // workers, spans * (worker + 1) // workers
    words = step, stream, first_sample, k0, k1
    _noised_spans(first, last, size, length, x0, eps, x_t, signal, noise, made, past, words)


@loops
def _noised_shared(workers, size, length, x0, eps, x_t, signal, noise, made, past, step, stream, first_sample, k0, k1):
    for worker in prange(workers):
        words = step, stream, first_sample, k0, k1
        _noised_part(worker, workers, size, length, x0, eps, x_t, signal, noise, made, past, *words)


_noised_alone = Entry(_noised_part)


def q_sample(x0, t, signal, noise, eps=None, seed=0, step=0, stream=FORWARD, first_sample=0, out=None, eps_out=None):
    made = eps is None
    if made:
        eps = buffers.empty(x0.shape, x0.dtype) if eps_out is None else eps_out
    elif eps_out is not None:
        eps_out[...] = eps
        eps = eps_out
    x_t = buffers.empty(x0.shape, x0.dtype) if out is None else out
    places = x0.size
    if places:
        past = 3 * x0.nbytes > PAST and x_t is not x0
        levels = signal[t].astype(np.float32), noise[t].astype(np.float32)
        words = int(step), int(stream), int(first_sample), *key(int(seed))
        how = places // x0.shape[0], BLOCK if made else LONG, x0.ravel(), eps.ravel(), x_t.ravel(), *levels, made, past, *words
        if places < ELEMENTS or (workers := threads()) == 1:
            _noised_alone(0, 1, *how)
        else:
            _noised_shared(workers, *how)
    return x_t, eps


@jit(forceinline=True)
def _row(j, count, operands, skip, k, depth, guided, noisy, keep, clip, past, past_store):
    """Row k at ``count`` places from j; the noise begins at ``skip``."""
    x, m, past1, past2, past3, guidance, noise, store, out = operands
    p, q, a, b, e, h1, h2, h3, g, c, u, w, r, low, high = k
    xs, ms = load_first(x, j, count), load_first(m, j, count)
    x0 = p * xs + q * ms
    if clip:
        x0 = held(x0, spread(low), spread(high))
    y = a * xs + b * x0 + e * ms
    if depth > 0:
        y = y + h1 * load_first(past1, j, count)
    if depth > 1:
        y = y + h2 * load_first(past2, j, count)
    if depth > 2:
        y = y + h3 * load_first(past3, j, count)
    if guided:
        y = y + g * load_first(guidance, j, count)
    if noisy:
        y = y + c * load_first(noise, j - skip, count)
    if keep:
        _put(store, j, u * xs + w * x0 + r * ms, count, past_store)
    _put(out, j, y, count, past)


@jit(forceinline=True)
def _along(start, end, operands, skip, k, depth, guided, noisy, keep, clip, past, far):
    """Row k on start..end. Operands that lie ``far`` are called ahead, which the hardware alone does too late."""
    x, m, store, out = operands[0], operands[1], operands[7], operands[8]
    j, how = start, (skip, k, depth, guided, noisy, keep, clip)
    if past:
        j = min(end, start + misplaced(out, start))
        _row(start, j - start, operands, *how, False, False)
    past_store = past and misplaced(store, j) == 0
    while j + LANES <= end:
        if far:
            prefetch(x, j + _AHEAD)
            prefetch(m, j + _AHEAD)
        _row(j, LANES, operands, *how, past, past_store)
        j += LANES
    _row(j, end - j, operands, *how, False, False)


@jit
def _spans(first, last, size, length, operands, k, depth, guided, source, keep, clip, past, words):
    """Spans first..last, where each ``size`` places are cut into spans of ``length``."""
    x, m, past1, past2, past3, guidance, noise, store, out = operands
    z = np.empty(BLOCK, np.float32)
    at = x.ctypes.data, m.ctypes.data, past1.ctypes.data, past2.ctypes.data, past3.ctypes.data, guidance.ctypes.data
    given = *at, noise.ctypes.data, store.ctypes.data, out.ctypes.data
    made = *at, z.ctypes.data, store.ctypes.data, out.ctypes.data
    parts = (size + length - 1) // length
    for span in range(first, last):
        n, part = span // parts, span % parts
        start = n * size + part * length
        end = min(start + length, (n + 1) * size)
        if source == MADE:
            call_ahead(at[0], start, end)
            call_ahead(at[1], start, end)
            fill_block(z, end - start, part, n, words)
            _along(start, end, made, start, k, depth, guided, True, keep, clip, past, False)
        else:
            _along(start, end, given, 0, k, depth, guided, source == GIVEN, keep, clip, past, False)
    if past:
        drain()


@jit
def _coefficients(rows, i, low, high):
    """What a row does: its coefficients and the bounds of x0."""
    r = rows[i]
    return r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], r[8], r[9], r[10], r[11], r[12], low, high


@jit
def _part(
    worker, workers, size, length, places, x, m, past1, past2, past3, guidance, noise, store, out, rows, i, low, high, depth,
    guided, source, keep, clip, past, step, stream, first_sample, k0, k1,
):  # fmt: skip
    """The share of one worker. Arrays and numbers come one by one: a tuple of them takes longer to hand over."""
    k, operands = _coefficients(rows, i, low, high), (x, m, past1, past2, past3, guidance, noise, store, out)
    spans = places // size * ((size + length - 1) // length)
    first, last = spans * worker // workers, spans * (worker + 1) // workers
    words = step, stream, first_sample, k0, k1
    _spans(first, last, size, length, operands, k, depth, guided, source, keep, clip, past, words)


@loops
def _shared(
    workers, size, length, places, x, m, past1, past2, past3, guidance, noise, store, out, rows, i, low, high, depth,
    guided, source, keep, clip, past, step, stream, first_sample, k0, k1,
):  # fmt: skip
    for worker in prange(workers):
        _part(
            worker, workers, size, length, places, x, m, past1, past2, past3, guidance, noise, store, out, rows, i, low, high,
            depth, guided, source, keep, clip, past, step, stream, first_sample, k0, k1,
        )  # fmt: skip


_alone = Entry(_part)


@jit
def _plain_part(start, end, x, m, out, rows, i, low, high, clip, past, far):
    k, at = _coefficients(rows, i, low, high), x.ctypes.data
    operands = at, m.ctypes.data, at, at, at, at, at, at, out.ctypes.data
    if clip:
        _along(start, end, operands, 0, k, 0, False, False, False, True, past, far)
    else:
        _along(start, end, operands, 0, k, 0, False, False, False, False, past, far)
    if past:
        drain()


@loops
def _plain(x, m, out, rows, i, low, high, clip):
    """A step without noise and further operands: few arguments to hand over, which counts where the images lie in the cache."""
    places, nbytes = x.size, 12 * x.size
    workers = 1 if places < ELEMENTS else numba.get_num_threads()
    past, far = nbytes > PAST and out.ctypes.data != x.ctypes.data, FAR * workers < nbytes <= SHARED
    if workers == 1:
        _plain_part(0, places, x, m, out, rows, i, low, high, clip, past, far)
    else:
        length = -(-places // (_LINE * workers)) * _LINE
        for worker in prange(workers):
            start, end = min(worker * length, places), min((worker + 1) * length, places)
            _plain_part(start, end, x, m, out, rows, i, low, high, clip, past, far)


def step_directly(
    x, m, rows, i, history=(), guidance=None, noise=None, clip=None, seed=0, stream=SAMPLER, first_sample=0, out=None, store=None
):
    """The commonest steps, before any other check of the arguments. None where they are not beyond doubt those of such a step."""
    if not (
        noise is None and store is None and guidance is None and clip is None and history == ()
        and type(x) is type(m) is type(rows) is np.ndarray and x.dtype is m.dtype is _FLOAT32 and rows.dtype is _FLOAT64
        and x.flags.carray and m.flags.carray and rows.flags.carray and x.shape and x.shape == m.shape and rows.ndim == 2
        and rows.shape[1] == len(ROW) and type(i) is type(seed) is type(stream) is type(first_sample) is int
        and 0 <= i < rows.shape[0] and 0 <= seed < 2**64 and 0 <= stream < 2**32 and 0 <= first_sample < 2**32
    ):  # fmt: skip
        return None
    if out is None:
        out = buffers.empty(x.shape, _FLOAT32)
    elif not (type(out) is np.ndarray and out.dtype is _FLOAT32 and out.flags.carray and out.shape == x.shape):
        return None
    _plain(x.ravel(), m.ravel(), out.ravel(), rows, i, 0.0, 0.0, False)
    return out


def step(
    x, m, rows, i, history=(), guidance=None, noise=None, clip=None, seed=0, stream=SAMPLER, first_sample=0, out=None, store=None
):
    if out is None:
        out = buffers.empty(x.shape, x.dtype)
    if not rows.flags.carray or rows.dtype != _FLOAT64:
        rows, row = rows[i : i + 1].astype(_FLOAT64), 0
    else:
        row = int(i)
    places, flat, (low, high) = x.size, x.ravel(), (0.0, 0.0) if clip is None else clip
    if not places:
        return out
    depth, guided, keep = len(history), guidance is not None, store is not None
    source = MADE if noise is True else 0 if noise is None else GIVEN
    if not (depth or guided or keep or source):
        _plain(flat, m.ravel(), out.ravel(), rows, row, float(low), float(high), clip is not None)
        return out
    past1 = history[0].ravel() if depth > 0 else flat
    past2 = history[1].ravel() if depth > 1 else flat
    past3 = history[2].ravel() if depth > 2 else flat
    guide, given = guidance.ravel() if guided else flat, noise.ravel() if source == GIVEN else flat
    operands = flat, m.ravel(), past1, past2, past3, guide, given, store.ravel() if keep else flat, out.ravel()
    past = (3 + depth + guided + (source == GIVEN) + keep) * x.nbytes > PAST and out is not x
    workers = 1 if places < ELEMENTS else threads()
    size, length = (places // x.shape[0], BLOCK) if source == MADE else (places, -(-places // (_LINE * workers)) * _LINE)
    how = rows, row, float(low), float(high), depth, guided, source, keep, clip is not None, past
    words = int(i), int(stream), int(first_sample), *key(int(seed))
    if workers == 1:
        _alone(0, 1, size, length, places, *operands, *how, *words)
    else:
        _shared(workers, size, length, places, *operands, *how, *words)
    return out
