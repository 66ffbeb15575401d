"""Standard normals from counters, bit for bit those of the definition: every operation is rounded once, in the same order.

No fast-math flag may stand here: contraction and reassociation change bits.
"""

import numpy as np
from numba import prange

from ..reference import BLOCK, RUN
from ..streams import SAMPLER
from .jit import jit, loops
from .threads import ELEMENTS, alone_below, threads
from .vector import F, bits_of, float_of

U = np.uint32
S = np.int32
_M0, _M1, _32 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57), np.uint64(32)
_W0, _W1 = U(0x9E3779B9), U(0xBB67AE85)


@jit(inline="always")
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        p0, p1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
        c0, c1, c2, c3 = U(U(p1 >> _32) ^ c1 ^ k0), U(p1), U(U(p0 >> _32) ^ c3 ^ k1), U(p0)
        k0, k1 = U(k0 + _W0), U(k1 + _W1)
    return c0, c1, c2, c3


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
    if size <= RUN:
        for j in range(size):
            r0, r1, r2, r3 = _philox(U(first + U(j)), sample, step, stream, k0, k1)
            x, y = _cos_sin(r1)
            z[j] = _radius(r0) * x
    elif size <= 2 * RUN:
        for j in range(RUN):
            r0, r1, r2, r3 = _philox(U(first + U(j)), sample, step, stream, k0, k1)
            a = _radius(r0)
            x, y = _cos_sin(r1)
            z[j] = a * x
            z[RUN + j] = a * y
    else:
        for j in range(RUN):
            r0, r1, r2, r3 = _philox(U(first + U(j)), sample, step, stream, k0, k1)
            a, d = _radius(r0), _radius(r2)
            x, y = _cos_sin(r1)
            p, q = _cos_sin(r3)
            z[j] = a * x
            z[RUN + j] = a * y
            z[2 * RUN + j] = d * p
            z[3 * RUN + j] = d * q


@jit
def fill_words(w, size, first, sample, step, stream, k0, k1):
    """The first ``size`` words of the block whose first counter is ``first``, into ``w``, which has room for whole runs."""
    for j in range(min(size, RUN)):
        r0, r1, r2, r3 = _philox(U(first + U(j)), sample, step, stream, k0, k1)
        w[j] = r0
        if size > RUN:
            w[RUN + j] = r1
            w[2 * RUN + j] = r2
            w[3 * RUN + j] = r3


@loops
def _normals(out, first_sample, step, stream, k0, k1, workers):
    batch, size = out.shape
    blocks = (size + BLOCK - 1) // BLOCK
    tiles = batch * blocks
    for worker in prange(workers):
        z = np.empty(BLOCK, np.float32)
        for tile in range(tiles * worker // workers, tiles * (worker + 1) // workers):
            n, block = tile // blocks, tile % blocks
            start = block * BLOCK
            count = min(BLOCK, size - start)
            to = out[n][start : start + count]
            sample, counter = U(first_sample + n), U(block * RUN)
            if count == BLOCK or count <= RUN:
                fill(to, count, counter, sample, step, stream, k0, k1)
            else:
                fill(z, count, counter, sample, step, stream, k0, k1)
                for j in range(count):
                    to[j] = z[j]


def key(seed: int) -> tuple[np.uint32, np.uint32]:
    """The two words of the generator's key."""
    return U(seed & 0xFFFFFFFF), U(seed >> 32)


@alone_below(ELEMENTS, lambda out, *_, **__: out.size)
def normals(out, seed, step=0, stream=SAMPLER, first_sample=0):
    if out.size:
        _normals(out.reshape(out.shape[0], -1), int(first_sample), U(step), U(stream), *key(seed), threads())
    return out
