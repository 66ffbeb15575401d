"""Random numbers by their definition: the counter-based generator and normals whose bits are the same everywhere."""

from typing import Any

import numpy as np

from ..arrays import array_module
from ..streams import SAMPLER

Array = Any

RUN = 256  # elements of one counter word that lie side by side
BLOCK = 4 * RUN  # elements made by RUN counters


def philox(counter: tuple, key: tuple[int, int]) -> tuple:
    """Philox4x32-10 (Salmon et al. 2011): four uint32 words from a counter of four uint32 words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = int(key[0]), int(key[1])
    xp = array_module(c0)
    for _ in range(10):
        p0 = c0.astype(xp.uint64) * xp.uint64(0xD2511F53)
        p1 = c2.astype(xp.uint64) * xp.uint64(0xCD9E8D57)
        h0, l0 = (p0 >> xp.uint64(32)).astype(xp.uint32), p0.astype(xp.uint32)
        h1, l1 = (p1 >> xp.uint64(32)).astype(xp.uint32), p1.astype(xp.uint32)
        c0, c1, c2, c3 = h1 ^ c1 ^ xp.uint32(k0), l1, h0 ^ c3 ^ xp.uint32(k1), l0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def minus_2_log(r: Array) -> Array:
    """−2 ln u with u = (⌊r/2⁸⌋ + 1)·2⁻²⁴ ∈ (0, 1], in float32 operations that are each rounded once: the same bits everywhere."""
    xp = array_module(r)
    f32 = xp.float32
    f = ((r >> xp.uint32(8)) + xp.uint32(1)).astype(f32)  # exact, at most 2^24
    bits = f.view(xp.uint32) - xp.uint32(0x3F3504F3)
    e = (bits >> xp.uint32(23)).astype(f32)
    x = ((bits & xp.uint32(0x007FFFFF)) + xp.uint32(0x3F3504F3)).view(f32) - f32(1)  # f = 2^e (1 + x), √½ ≤ 1 + x < √2
    y = f32(7.0376836292e-2) * x + f32(-1.1514610310e-1)
    for k in (
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        y = y * x + f32(k)
    z = x * x
    y = (y * x) * z
    q = e - f32(24)
    y = y + q * f32(-2.12194440e-4)
    y = y + f32(-0.5) * z
    return f32(-2) * ((x + y) + q * f32(0.693359375))


def cos_sin(r: Array) -> tuple[Array, Array]:
    """(cos θ, sin θ) of a uniform angle: octant from the top 3 bits of r, angle in it from the next 24; single roundings."""
    xp = array_module(r)
    f32 = xp.float32
    octant = r >> xp.uint32(29)
    t = ((r >> xp.uint32(5)) & xp.uint32(0xFFFFFF)).astype(f32) * f32(4.6813379e-8)  # π/4·2⁻²⁴: [0, π/4)
    z = t * t
    s = f32(-1.9515295891e-4) * z + f32(8.3321608736e-3)
    s = s * z + f32(-1.6666654611e-1)
    s = (s * z) * t + t
    c = f32(2.443315711809948e-5) * z + f32(-1.388731625493765e-3)
    c = c * z + f32(4.166664568298827e-2)
    c = ((c * z) * z + f32(-0.5) * z) + f32(1)
    odd = (octant & xp.uint32(1)) != 0
    a, b = xp.where(odd, s, c), xp.where(odd, c, s)
    return xp.where((octant & xp.uint32(2)) != 0, -a, a), xp.where((octant & xp.uint32(4)) != 0, -b, b)


def _four(batch: int, size: int, seed: int, step: int, stream: int, first_sample: int, xp: Any) -> tuple:
    """The four words, each (batch, blocks, lanes), of the counters that make ``size`` elements of each sample."""
    blocks = -(-size // BLOCK)
    lanes = min(RUN, size)
    c0 = (xp.arange(blocks, dtype=xp.uint32)[:, None] * xp.uint32(RUN) + xp.arange(lanes, dtype=xp.uint32)[None, :])[None]
    c0 = xp.broadcast_to(c0, (batch, blocks, lanes))
    c1 = xp.broadcast_to(
        ((np.uint64(first_sample) + xp.arange(batch, dtype=xp.uint64)) & xp.uint64(0xFFFFFFFF)).astype(xp.uint32)[:, None, None],
        c0.shape,
    )
    return philox((c0, c1, xp.full_like(c0, step), xp.full_like(c0, stream)), (seed & 0xFFFFFFFF, seed >> 32))


def words(shape: tuple[int, ...], seed: int, step: int, stream: int, first_sample: int, xp: Any = np) -> Array:
    """One uint32 word for each element of ``shape`` (B, …): element e takes the word that it would take in :func:`normals`."""
    batch, size = shape[0], int(np.prod(shape[1:]))
    if batch == 0 or size == 0:
        return xp.empty(shape, xp.uint32)
    four = _four(batch, size, seed, step, stream, first_sample, xp)
    return xp.stack(four, axis=2).reshape(batch, -1)[:, :size].reshape(shape)


def normals(out: Array, seed: int, step: int = 0, stream: int = SAMPLER, first_sample: int = 0) -> Array:
    """Fill ``out`` (B, …) with standard normals that depend on (seed, sample, step, stream, element) and on nothing else.

    Element e of a sample takes word ⌊e/256⌋ mod 4 of the counter (256·⌊e/1024⌋ + e mod 256, sample, step, stream): both 256
    neighbouring counters on a CPU and four neighbouring counters of a GPU thread write contiguous runs. Words 0, 1 make one
    Box–Muller pair, words 2, 3 the other. The values are float32 bits also where ``out`` is float64.
    """
    xp = array_module(out)
    batch, size = out.shape[0], int(np.prod(out.shape[1:]))
    if batch == 0 or size == 0:
        return out
    r0, r1, r2, r3 = _four(batch, size, seed, step, stream, first_sample, xp)
    radius0, radius1 = xp.sqrt(minus_2_log(r0)), xp.sqrt(minus_2_log(r2))
    (cos0, sin0), (cos1, sin1) = cos_sin(r1), cos_sin(r3)
    z = xp.stack([radius0 * cos0, radius0 * sin0, radius1 * cos1, radius1 * sin1], axis=2)  # (B, blocks, 4, lanes)
    out.reshape(batch, size)[...] = z.reshape(batch, -1)[:, :size]
    return out
