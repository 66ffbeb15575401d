"""Categorical draws: the states of the definition, sixteen elements side by side.

A tile is a block of random words: many small samples, or a part of a large one. Its elements that need their logits are gathered
sixteen at a time, column by column, so that the exponentials, the sums and the trees run down vectors of elements. A tree is kept
as a heap: row n holds the sum of rows n + h and n + 2h, h the largest power of 2 in n; rows 32 to 63 hold the weights.
Operations and their order are those of the definition, each rounded once: no fast-math flag may stand here.
"""

import numpy as np
from numba import prange

from .. import buffers
from ..reference import BLOCK, CHUNK, LEAST, RUN, SECOND
from ..streams import FORWARD, SAMPLER
from .jit import jit, loops
from .random import U, fill_words, key
from .threads import ELEMENTS, alone_below, threads
from .vector import F, bits_of, float_of

S = np.int32
P = np.uint64
LANES = 16
_HALVES = tuple(h * LANES for h in (16, 8, 4, 2, 1))  # of the levels of a tree, largest first
_LEAST = F(LEAST)


@jit(inline="always")
def _exp(x):
    """e^x for x <= 0; 0 below LEAST."""
    far = x < _LEAST
    x = F(0) if far else x
    t = x * F(1.44269504088896341) + F(12582912)
    n = t - F(12582912)
    r = (x - n * F(0.693359375)) - n * F(-2.12194440e-4)
    p = F(1.9875691500e-4) * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    y = ((p * (r * r)) + r) + F(1)
    return F(0) if far else y * float_of(S(S(bits_of(t) + S(127)) << S(23)))


@jit(inline="always")
def _uniform(r):
    return F(U(r >> U(9))) * F(2.0**-23) + F(2.0**-24)


@jit
def _words(w, size, samples, block, first, step, stream, k0, k1):
    """The words of a tile: ``size`` elements of each of ``samples`` samples, of the block ``block`` of each."""
    for n in range(samples):
        fill_words(w[n * size :], size, U(block * RUN), U(first + n), U(step), U(stream), U(k0), U(k1))


@jit(inline="always")
def _gather(logits, elements, hidden, top, heap):
    """LANES rows of ``logits`` as columns of ``heap``, and their largest; of the column ``hidden`` only -inf."""
    columns = logits.shape[1]
    for lane in range(LANES):
        row = logits[elements[lane]]
        largest = F(-np.inf)
        for c in range(heap.shape[0]):
            leaves = heap[c][CHUNK * LANES + lane :]
            part = row[c * CHUNK : min(columns, (c + 1) * CHUNK)]
            for j in range(part.size):
                v = F(-np.inf) if c * CHUNK + j == hidden else part[j]
                largest = v if v > largest else largest
                leaves[j * LANES] = v
        top[lane] = largest


@jit
def _weigh(logits, elements, hidden, top, heap, prefix):
    """The weights and sums of LANES rows of ``logits``, into ``heap`` (chunks, 64·LANES) and ``prefix`` (chunks, LANES)."""
    columns = logits.shape[1]
    if 0 <= hidden < columns:
        _gather(logits, elements, hidden, top, heap)
    else:
        _gather(logits, elements, -1, top, heap)
    for c in range(heap.shape[0]):
        sums = heap[c]
        for j in range(min(CHUNK, columns - c * CHUNK)):
            leaf = sums[(CHUNK + j) * LANES : (CHUNK + j + 1) * LANES]
            for lane in range(LANES):
                leaf[lane] = _exp(leaf[lane] - top[lane])
        for half in _HALVES:
            for i in range(half):
                sums[half + i] = sums[2 * half + i] + sums[3 * half + i]
        root, running = sums[LANES : 2 * LANES], prefix[c]
        for lane in range(LANES):
            running[lane] = prefix[c - 1, lane] + root[lane] if c > 0 else root[lane]


@jit
def _descend(heap, prefix, r, state, chunk):
    """``state``: for each lane the column where its running sum passes r, -1 where it never does; ``chunk`` is work."""
    chunks = prefix.shape[0]
    for lane in range(LANES):
        chunk[lane] = 0
    for c in range(chunks):
        running = prefix[c]
        for lane in range(LANES):
            chunk[lane] += 0 if r[lane] < running[lane] else 1
    for lane in range(LANES):
        c = chunk[lane]
        if c == chunks:
            state[lane] = -1
            continue
        v = r[lane]
        if c > 0:
            v -= prefix[c - 1, lane]
        sums = heap[c][lane:]
        place = P(0)  # unsigned: no index is taken from the end
        for h in (1, 2, 4, 8, 16):
            half = P(h)
            left, right = sums[(half + half + place) * P(LANES)], sums[(half + half + half + place) * P(LANES)]
            go = (v >= left) & (right > F(0))
            v = v - left if go else v
            place = place + half if go else place
        state[lane] = S(place) + S(CHUNK) * S(c)


@jit
def _work(chunks):
    """(heap, prefix, a float of each lane, elements, chunks, states) of one worker; what no weight is written to stays 0."""
    heap, prefix = np.zeros((chunks, 2 * CHUNK * LANES), np.float32), np.empty((chunks, LANES), np.float32)
    return (
        heap,
        prefix,
        np.empty(LANES, np.float32),
        np.empty(LANES, np.int64),
        np.empty(LANES, np.int64),
        np.empty(LANES, np.int32),
    )


@loops
def _categorical(out, logits, size, group, first_sample, step, stream, k0, k1, workers):
    samples = out.size // size
    blocks = (size + BLOCK - 1) // BLOCK
    tiles = (samples + group - 1) // group * blocks
    for worker in prange(workers):
        heap, prefix, top, elements, chunk, state = _work((logits.shape[1] + CHUNK - 1) // CHUNK)
        w = np.empty(2 * BLOCK, np.uint32)
        for tile in range(tiles * worker // workers, tiles * (worker + 1) // workers):
            n, block = tile // blocks * group, tile % blocks
            start, count, many = n * size + block * BLOCK, min(BLOCK, size - block * BLOCK), min(group, samples - n)
            _words(w, count, many, block, first_sample + n, step, stream, k0, k1)
            to = out[start : start + count * many]
            for i in range(0, to.size, LANES):
                for lane in range(LANES):
                    elements[lane] = start + min(i + lane, to.size - 1)
                _weigh(logits, elements, -1, top, heap, prefix)
                for lane in range(LANES):
                    top[lane] = _uniform(w[i + lane]) * prefix[-1, lane]
                _descend(heap, prefix, top, state, chunk)
                for lane in range(min(LANES, to.size - i)):
                    to[i + lane] = state[lane]


def _group(size: int) -> int:
    """Samples of ``size`` elements that make one tile."""
    return max(1, BLOCK // size)


def _into(out, shape):
    return buffers.empty(shape, np.int32) if out is None else out


@alone_below(ELEMENTS, lambda log_weights, *_, **__: 4 * log_weights.size)
def categorical(log_weights, seed, step=0, stream=SAMPLER, first_sample=0, out=None):
    out = _into(out, log_weights.shape[:-1])
    if out.size:
        size = out.size // out.shape[0]
        words = int(first_sample), U(step), U(stream), *key(seed)
        _categorical(out.reshape(-1), log_weights.reshape(out.size, -1), size, _group(size), *words, threads())
    return out


@jit(inline="always")
def _evenly(r, states):
    return S((np.uint64(r) * np.uint64(states)) >> np.uint64(32))


@loops
def _posterior(out, logits, x_t, row, mask, size, group, first_sample, step, stream, second, k0, k1, workers):
    samples, columns = out.size // size, logits.shape[1]
    blocks = (size + BLOCK - 1) // BLOCK
    tiles = (samples + group - 1) // group * blocks
    keep, spread, c, d = row[0], row[1], row[2], row[3]
    move = c + d  # of an absorbing law
    soft, even = spread * c, (spread * d) * F(columns)  # of a uniform law
    for worker in prange(workers):
        heap, prefix, top, elements, chunk, state = _work((columns + CHUNK - 1) // CHUNK)
        w, w2, pending = np.empty(2 * BLOCK, np.uint32), np.empty(2 * BLOCK, np.uint32), np.empty(BLOCK, np.int64)
        for tile in range(tiles * worker // workers, tiles * (worker + 1) // workers):
            n, block = tile // blocks * group, tile % blocks
            start, count, many = n * size + block * BLOCK, min(BLOCK, size - block * BLOCK), min(group, samples - n)
            _words(w, count, many, block, first_sample + n, step, stream, k0, k1)
            _words(w2, count, many, block, first_sample + n, step, second, k0, k1)
            to, x = out[start : start + count * many], x_t[start : start + count * many]
            wanted = 0
            for i in range(to.size):
                if mask < 0:
                    pending[i] = i
                    wanted += 1
                elif x[i] != mask:
                    to[i] = x[i]
                else:
                    v = _uniform(w[i]) * move
                    to[i] = mask if v < move else -1
                    if v < c:
                        pending[wanted] = i
                        wanted += 1
            for p in range(0, wanted, LANES):
                for lane in range(LANES):
                    elements[lane] = start + pending[min(p + lane, wanted - 1)]
                _weigh(logits, elements, mask, top, heap, prefix)
                for lane in range(LANES):
                    top[lane] = _uniform(w2[elements[lane] - start]) * prefix[-1, lane]
                _descend(heap, prefix, top, state, chunk)
                for lane in range(min(LANES, wanted - p)):
                    i = pending[p + lane]
                    found = state[lane]
                    if mask < 0:
                        known = 0 <= x[i] < columns
                        at = P(x[i] if known else 0)
                        whole, own = prefix[-1, lane], heap[at // P(CHUNK), (P(CHUNK) + at % P(CHUNK)) * P(LANES) + P(lane)]
                        a = keep * (c * own + d * whole)
                        b = a + soft * whole
                        total = b + even * whole
                        v = _uniform(w[i]) * total
                        found = found if v < b else _evenly(w2[i], columns)
                        found = x[i] if v < a else found
                        found = found if known & (v < total) else S(-1)
                    to[i] = found


def _effort(logits, x_t, rows, index, mask=-1, *_, **__):
    """Of an absorbing law only what leaves the mask is weighed."""
    c, d = float(rows[index, 2]), float(rows[index, 3])
    share = c / (c + d) if mask >= 0 and c + d > 0 else 1.0
    return 2 * x_t.size + 4 * share * logits.size


@alone_below(ELEMENTS, _effort)
def categorical_posterior(logits, x_t, rows, index, mask=-1, seed=0, step=None, stream=SAMPLER, first_sample=0, out=None):
    out = _into(out, x_t.shape)
    if out.size:
        size = out.size // out.shape[0]
        flat = logits.reshape(out.size, -1), x_t.astype(np.int32, copy=False).reshape(-1)
        second = U((stream + SECOND) & 0xFFFFFFFF)
        words = int(first_sample), U(index if step is None else step), U(stream), second, *key(seed)
        row = np.asarray(rows[index]).astype(np.float32)
        _posterior(out.reshape(-1), *flat, row, int(mask), size, _group(size), *words, threads())
    return out


@loops
def _q_sample(out, x0, level, states, mask, group, first_sample, step, stream, second, k0, k1, workers):
    samples, size = x0.shape
    blocks = (size + BLOCK - 1) // BLOCK
    tiles = (samples + group - 1) // group * blocks
    for worker in prange(workers):
        w, w2 = np.empty(2 * BLOCK, np.uint32), np.empty(2 * BLOCK, np.uint32)
        for tile in range(tiles * worker // workers, tiles * (worker + 1) // workers):
            n, block = tile // blocks * group, tile % blocks
            start, count, many = block * BLOCK, min(BLOCK, size - block * BLOCK), min(group, samples - n)
            _words(w, count, many, block, first_sample + n, step, stream, k0, k1)
            if mask < 0:
                _words(w2, count, many, block, first_sample + n, step, second, k0, k1)
            for k in range(many):
                to, x, stay = out[n + k][start : start + count], x0[n + k][start : start + count], level[n + k]
                u, other = w[k * count : (k + 1) * count], w2[k * count : (k + 1) * count]
                if mask < 0:
                    for i in range(count):
                        to[i] = x[i] if _uniform(u[i]) < stay else _evenly(other[i], states)
                else:
                    for i in range(count):
                        to[i] = x[i] if _uniform(u[i]) < stay else S(mask)


@alone_below(ELEMENTS, lambda x0, *_, **__: x0.size)
def categorical_q_sample(x0, t, keep, states, mask=-1, seed=0, step=0, stream=FORWARD, first_sample=0, out=None):
    out = _into(out, x0.shape)
    if out.size:
        rows = (out.shape[0], out.size // out.shape[0])
        flat = out.reshape(rows), x0.astype(np.int32, copy=False).reshape(rows)
        second = U((stream + SECOND) & 0xFFFFFFFF)
        words = int(first_sample), U(step), U(stream), second, *key(seed)
        _q_sample(*flat, keep[t].astype(np.float32), U(states), int(mask), _group(rows[1]), *words, threads())
    return out
