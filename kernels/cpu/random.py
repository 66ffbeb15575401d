"""Standard normals from counters, bit for bit those of the definition: every operation is rounded once, in the same order.

No fast-math flag may stand here: contraction and reassociation change bits.
"""

import numpy as np
from numba import prange

from ..reference import BLOCK, RUN
from ..streams import SAMPLER
from .jit import Entry, jit, loops
from .threads import ELEMENTS, threads
from .vector import F, bits_of, float_of

U, W = np.uint32, np.uint64
S = np.int32
_M0, _M1, _32, _LOW = W(0xD2511F53), W(0xCD9E8D57), W(32), W(0xFFFFFFFF)
_W0, _W1 = U(0x9E3779B9), U(0xBB67AE85)


@jit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """Four words, each in the low half of 64 bits: what a product leaves in the high half is never cleared, only ignored."""
    for _ in range(10):
        p0, p1 = (c0 & _LOW) * _M0, (c2 & _LOW) * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ W(k0), p1, (p0 >> _32) ^ c3 ^ W(k1), p0
        k0, k1 = U(k0 + _W0), U(k1 + _W1)
    return U(c0), U(c1), U(c2), U(c3)


@jit(inline="always")
def _radius(r):
    """√(−2 ln u) of the word r."""
    b = S(bits_of(F(U(U(r >> U(8)) + U(1)))) - S(0x3F3504F3))
    x = float_of(S((b & S(0x007FFFFF)) + S(0x3F3504F3))) - F(1)
    y = F(7.0376836292e-2) * x + F(-1.1514610310e-1)
    y = y * x + F(1.1676998740e-1)
    y = y * x + F(-1.2420140846e-1)
    y = y * x + F(1.4249322787e-1)
    y = y * x + F(-1.6668057665e-1)
    y = y * x + F(2.0000714765e-1)
    y = y * x + F(-2.4999993993e-1)
    y = y * x + F(3.3333331174e-1)
    z = x * x
    y = (y * x) * z
    q = F(S(S(b >> S(23)) - S(24)))
    y = y + q * F(-2.12194440e-4)
    y = y + F(-0.5) * z
    return F(np.sqrt(F(-2) * ((x + y) + q * F(0.693359375))))


@jit(inline="always")
def _cos_sin(r):
    """(cos θ, sin θ) of the word r: octant from its top 3 bits, angle in it from the next 24."""
    o = U(r >> U(29))
    t = F(U(U(r >> U(5)) & U(0xFFFFFF))) * F(4.6813379e-8)
    z = t * t
    s = F(-1.9515295891e-4) * z + F(8.3321608736e-3)
    s = s * z + F(-1.6666654611e-1)
    s = (s * z) * t + t
    c = F(2.443315711809948e-5) * z + F(-1.388731625493765e-3)
    c = c * z + F(4.166664568298827e-2)
    c = ((c * z) * z + F(-0.5) * z) + F(1)
    odd = (o & U(1)) != 0
    a = s if odd else c
    b = c if odd else s
    a = float_of(S(bits_of(a) ^ S(U((o & U(2)) << U(30)))))
    b = float_of(S(bits_of(b) ^ S(U((o & U(4)) << U(29)))))
    return a, b


@jit
def fill(z, size, first, sample, step, stream, k0, k1):
    """The first ``size`` normals of the block whose first counter is ``first``, into ``z``, which has room for whole runs."""
    c0, c1, c2, c3 = W(first), W(sample), W(step), W(stream)
    if size <= RUN:
        for j in range(size):
            r0, r1, r2, r3 = philox(c0 + W(j), c1, c2, c3, k0, k1)
            x, y = _cos_sin(r1)
            z[j] = _radius(r0) * x
    elif size <= 2 * RUN:
        z0, z1 = z[:RUN], z[RUN : 2 * RUN]
        for j in range(RUN):
            r0, r1, r2, r3 = philox(c0 + W(j), c1, c2, c3, k0, k1)
            a = _radius(r0)
            x, y = _cos_sin(r1)
            z0[j], z1[j] = a * x, a * y
    else:
        z0, z1, z2, z3 = z[:RUN], z[RUN : 2 * RUN], z[2 * RUN : 3 * RUN], z[3 * RUN : BLOCK]
        for j in range(RUN):
            r0, r1, r2, r3 = philox(c0 + W(j), c1, c2, c3, k0, k1)
            a, d = _radius(r0), _radius(r2)
            x, y = _cos_sin(r1)
            p, q = _cos_sin(r3)
            z0[j], z1[j], z2[j], z3[j] = a * x, a * y, d * p, d * q


@jit
def fill_words(w, size, first, sample, step, stream, k0, k1):
    """The first ``size`` words of the block whose first counter is ``first``, into ``w``, which has room for whole runs."""
    c0, c1, c2, c3 = W(first), W(sample), W(step), W(stream)
    if size <= RUN:
        for j in range(size):
            w[j] = philox(c0 + W(j), c1, c2, c3, k0, k1)[0]
    else:
        w0, w1, w2, w3 = w[:RUN], w[RUN : 2 * RUN], w[2 * RUN : 3 * RUN], w[3 * RUN : BLOCK]
        for j in range(RUN):
            w0[j], w1[j], w2[j], w3[j] = philox(c0 + W(j), c1, c2, c3, k0, k1)


@jit
def fill_block(z, count, block, sample, words):
    """The first ``count`` normals of a block of a sample; ``words``: step, stream, first sample and the two words of the key."""
    step, stream, first_sample, k0, k1 = words
    fill(z, count, U(block * RUN), U(first_sample + sample), U(step), U(stream), U(k0), U(k1))


@jit
def _blocks(first, last, out, words):
    size = out.shape[1]
    blocks = (size + BLOCK - 1) // BLOCK
    z = np.empty(BLOCK, np.float32)
    for i in range(first, last):
        n, block = i // blocks, i % blocks
        to = out[n][block * BLOCK : (block + 1) * BLOCK]
        if to.size == BLOCK or to.size <= RUN:
            fill_block(to, to.size, block, n, words)
        else:
            fill_block(z, to.size, block, n, words)
            for j in range(to.size):
                to[j] = z[j]


@jit
def _part(worker, workers, out, step, stream, first_sample, k0, k1):
    blocks = out.shape[0] * ((out.shape[1] + BLOCK - 1) // BLOCK)
    _blocks(blocks * worker // workers, blocks * (worker + 1) // workers, out, (step, stream, first_sample, k0, k1))


@loops
def _shared(workers, out, step, stream, first_sample, k0, k1):
    for worker in prange(workers):
        _part(worker, workers, out, step, stream, first_sample, k0, k1)


_alone = Entry(_part)


def key(seed: int) -> tuple[int, int]:
    """The two words of the generator's key."""
    return seed & 0xFFFFFFFF, seed >> 32


def normals(out, seed, step=0, stream=SAMPLER, first_sample=0):
    if out.size:
        rows, words = out.reshape(out.shape[0], -1), (int(step), int(stream), int(first_sample), *key(int(seed)))
        if out.size < ELEMENTS or (workers := threads()) == 1:
            _alone(0, 1, rows, *words)
        else:
            _shared(workers, rows, *words)
    return out
