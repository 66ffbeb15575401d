"""Small random numbers made on the host from the counter-based generator: uniforms, integers, permutations.

They depend on (seed, step, stream) and the index only, so a resumed run draws what the unbroken run would have drawn.
"""

import numpy as np

from .reference import philox

FEW = 32  # words that are made by integers of Python sooner than by arrays
_MASK = 0xFFFFFFFF


def _two_words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int]:
    """The four words of :func:`philox` as two of 64 bits."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0 << 32 | c1, c2 << 32 | c3


def _few(n: int, seed: int, step: int, stream: int, sample: int) -> list[int]:
    """The words of :func:`bits` as integers of Python."""
    rest, key = (sample & _MASK, step & _MASK, stream & _MASK), (seed & _MASK, seed >> 32 & _MASK)
    return [w for i in range((n + 1) // 2) for w in _two_words((i, *rest), key)][:n]


def bits(n: int, seed: int, step: int, stream: int, sample: int = 0) -> np.ndarray:
    """``n`` uint64 words; word i comes from counter (i // 2, sample, step, stream)."""
    if n <= FEW:
        return np.array(_few(n, seed, step, stream, sample), np.uint64)
    c0 = np.arange((n + 1) // 2, dtype=np.uint32)
    full = [np.full_like(c0, value & 0xFFFFFFFF) for value in (sample, step, stream)]
    r0, r1, r2, r3 = (r.astype(np.uint64) for r in philox((c0, *full), (seed & 0xFFFFFFFF, seed >> 32)))
    return np.stack([(r0 << np.uint64(32)) | r1, (r2 << np.uint64(32)) | r3], axis=1).reshape(-1)[:n]


def uniform(n: int, seed: int, step: int, stream: int, sample: int = 0) -> np.ndarray:
    """``n`` float64 in [0, 1), 53 bits each."""
    if n <= FEW:
        return np.array([(w >> 11) * 2.0**-53 for w in _few(n, seed, step, stream, sample)], np.float64)
    return (bits(n, seed, step, stream, sample) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(n: int, low: int, high: int, seed: int, step: int, stream: int, sample: int = 0) -> np.ndarray:
    """``n`` int64 in [low, high), by scaling (bias below 2^-53·(high − low))."""
    if n <= FEW:
        words = _few(n, seed, step, stream, sample)
        return np.array([low + int((w >> 11) * 2.0**-53 * (high - low)) for w in words], np.int64)
    return low + np.floor(uniform(n, seed, step, stream, sample) * (high - low)).astype(np.int64)


def permutation(n: int, seed: int, step: int, stream: int, sample: int = 0) -> np.ndarray:
    """A permutation of 0..n−1: the order of ``n`` random words."""
    return np.argsort(bits(n, seed, step, stream, sample), kind="stable")


def uniforms(batch: int, n: int, seed: int, step: int, stream: int, first_sample: int = 0) -> np.ndarray:
    """(batch, n) float64 in [0, 1): row k is ``uniform(n, seed, step, stream, first_sample + k)``."""
    return _uniform_rows(n, seed, np.uint64(first_sample) + np.arange(batch, dtype=np.uint64), step, stream)


def uniforms_of_steps(n: int, seed: int, steps: range, stream: int) -> np.ndarray:
    """(len(steps), n) float64 in [0, 1): row i is ``uniform(n, seed, steps[i], stream)``."""
    return _uniform_rows(n, seed, 0, np.array(steps, np.uint64), stream)


def _uniform_rows(n: int, seed: int, *numbers: np.ndarray | int) -> np.ndarray:
    """Row i has the numbers of sample, step and stream i; those that are not arrays are the same for all rows."""
    columns = ((np.asarray(a, np.uint64) & np.uint64(_MASK)).astype(np.uint32)[..., None] for a in numbers)
    words = philox(np.broadcast_arrays(np.arange((n + 1) // 2, dtype=np.uint32), *columns), (seed & _MASK, seed >> 32))
    r0, r1, r2, r3 = (r.astype(np.uint64) for r in words)
    whole = np.stack([(r0 << np.uint64(32)) | r1, (r2 << np.uint64(32)) | r3], axis=-1).reshape(len(r0), 2 * r0.shape[1])[:, :n]
    return (whole >> np.uint64(11)).astype(np.float64) * 2.0**-53
