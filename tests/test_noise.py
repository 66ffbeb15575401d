"""The generator: known answers, the same bits everywhere, and the law of what it makes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from alphabar import kernels
from alphabar.kernels import counter, reference, streams

numba = pytest.importorskip("numba")

HASHES = json.loads((Path(__file__).parent / "data" / "noise_hashes.json").read_text())["cases"]
BACKENDS = ("auto", "reference")


def digest(z: np.ndarray) -> str:
    """SHA-256 of float32 values in C order, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(z, "<f4").tobytes()).hexdigest()


def draw(shape: Any, seed: int = 0, dtype: Any = np.float32, **words: int) -> np.ndarray:
    return kernels.normals(np.empty(shape, dtype), seed, **words)


# -- bits

KNOWN = [  # Random123, kat_vectors: counter, key, result
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("count", "key", "result"), KNOWN)
def test_philox_known_answers(count: tuple, key: tuple, result: str) -> None:
    words = reference.philox(tuple(np.array([c], np.uint32) for c in count), key)
    assert " ".join(f"{int(w[0]):08x}" for w in words) == result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", HASHES, ids=lambda c: f"seed{c['seed']}-{'x'.join(map(str, c['shape']))}")
def test_golden_hashes(backend: str, case: dict[str, Any]) -> None:
    words = {k: case[k] for k in ("seed", "step", "stream", "first_sample")}
    with kernels.use(backend):
        assert digest(draw(case["shape"], **words)) == case["sha256"]
    assert digest(draw(case["shape"], dtype=np.float64, **words)) == case["sha256"]


def test_normals_follow_from_the_words() -> None:
    """Box–Muller in float64 on the raw words, in the order of the definition."""
    z = draw((2, 1500), seed=2**33 + 5, step=7, stream=3, first_sample=9)
    for n in range(2):
        for e in (0, 1, 255, 256, 511, 512, 800, 1023, 1024, 1279, 1280, 1499):
            count = (256 * (e // 1024) + e % 256, 9 + n, 7, 3)
            words = [int(w[0]) for w in reference.philox(tuple(np.array([c], np.uint32) for c in count), (5, 2))]
            pair, half = divmod((e // 256) % 4, 2)
            r, a = words[2 * pair], words[2 * pair + 1]
            angle = np.pi / 4 * ((a >> 5) & 0xFFFFFF) * 2.0**-24
            octant = a >> 29
            cos, sin = (np.sin(angle), np.cos(angle)) if octant & 1 else (np.cos(angle), np.sin(angle))
            direction = (-sin if octant & 4 else sin) if half else (-cos if octant & 2 else cos)
            want = np.sqrt(-2 * np.log(((r >> 8) + 1) * 2.0**-24)) * direction
            assert abs(z[n, e] - want) < 2e-6 * (1 + abs(want))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(64, 8, 8, 1), (64, 700), (64, 1024), (64, 1100)])
def test_noise_does_not_depend_on_the_split(backend: str, shape: tuple[int, ...]) -> None:
    with kernels.use(backend):
        whole = draw(shape, 3, step=5, first_sample=10)
        single = np.concatenate([draw((1, *shape[1:]), 3, step=5, first_sample=10 + n) for n in range(64)])
        resumed = np.concatenate(
            [draw((37, *shape[1:]), 3, step=5, first_sample=10), draw((27, *shape[1:]), 3, step=5, first_sample=47)]
        )
    assert np.array_equal(whole, single) and np.array_equal(whole, resumed)


def test_noise_does_not_depend_on_backend_or_threads() -> None:
    with kernels.use("reference"):
        defined = draw((9, 2053), 8, step=2)
    for count in {1, numba.config.NUMBA_NUM_THREADS}:
        numba.set_num_threads(count)
        assert np.array_equal(draw((9, 2053), 8, step=2), defined)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_element_does_not_depend_on_the_size_of_its_sample(backend: str) -> None:
    with kernels.use(backend):
        whole = draw((3, 4000), 1)
        for size in (1, 2, 63, 64, 255, 256, 257, 511, 512, 513, 768, 769, 1023, 1024, 1025, 1280, 2048, 3999):
            assert np.array_equal(draw((3, size), 1), whole[:, :size])
    assert np.array_equal(draw((3, 40, 100), 1).reshape(3, 4000), whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_words_wrap_and_the_ends_of_all_ranges_work(backend: str) -> None:
    with kernels.use(backend):
        z = draw((2, 5), 2**64 - 1, step=2**32 - 1, stream=2**32 - 1, first_sample=2**32 - 1)
        assert np.isfinite(z).all()
        assert np.array_equal(z[1:], draw((1, 5), 2**64 - 1, step=2**32 - 1, stream=2**32 - 1, first_sample=0))
        assert draw((0, 5)).shape == (0, 5) and draw((5, 0)).shape == (5, 0)


def test_the_kernels_use_the_noise_of_normals() -> None:
    x = np.zeros((5, 1300), np.float32)
    rows = np.zeros((4, len(reference.ROW)))
    rows[3, reference.ROW.index("c")] = 1
    made = kernels.step(x, x, rows, 3, noise=True, seed=6, first_sample=2)
    assert np.array_equal(made, draw(x.shape, 6, step=3, stream=streams.SAMPLER, first_sample=2))
    one = np.ones(2)
    x_t, eps = kernels.q_sample(x, np.ones(5, int), one, one, seed=6, step=3, first_sample=2)
    assert np.array_equal(x_t, eps)
    assert np.array_equal(eps, draw(x.shape, 6, step=3, stream=streams.FORWARD, first_sample=2))


def test_each_use_has_its_own_stream() -> None:
    used = [v for k, v in vars(streams).items() if k.isupper()]
    assert len(set(used)) == len(used) >= 8


# -- law


def z_score(observed: float, expected: float, deviation: float) -> float:
    return abs(observed - expected) / deviation


@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_moments_and_distribution(seed: int) -> None:
    z = draw((200, 5000), seed).astype(np.float64).ravel()
    n = z.size
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert z_score((z**power).mean(), expected, np.sqrt(variance / n)) < 4.5
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert 4 < np.abs(z).max() < 6


def test_tails_are_those_of_the_normal_law() -> None:
    z = np.abs(draw((1000, 4096), 9).ravel())
    for edge in (2.0, 3.0, 4.0):
        p = 2 * stats.norm.sf(edge)
        assert z_score((z > edge).mean(), p, np.sqrt(p * (1 - p) / z.size)) < 4.5


def test_samples_steps_streams_seeds_and_places_are_independent() -> None:
    size = 100_000
    rows = [
        draw((2, size), 0),
        draw((1, size), 0, step=1),
        draw((1, size), 0, stream=1),
        draw((1, size), 1),
        draw((1, size), 2**32),
    ]
    z = np.concatenate(rows).astype(np.float64)
    for values in (z, np.abs(z) - np.sqrt(2 / np.pi)):
        correlation = np.asarray(np.corrcoef(values))
        off = correlation[np.triu_indices(len(z), 1)]
        assert np.abs(off).max() * np.sqrt(size) < 4.5
    for lag in (1, 2, 255, 256, 512, 768, 1024):  # the four words of a counter lie 256 apart
        product = z[:, lag:] * z[:, :-lag]
        assert np.abs(product.mean(axis=1)).max() * np.sqrt(size - lag) < 4.5
        product = (z[:, lag:] ** 2 - 1) * (z[:, :-lag] ** 2 - 1) / 2
        assert np.abs(product.mean(axis=1)).max() * np.sqrt(size - lag) < 4.5


# -- uniforms, integers, permutations


def test_uniforms() -> None:
    u = counter.uniform(100_001, 5, 2, streams.TIMES)
    assert u.shape == (100_001,) and 0 <= u.min() and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    assert np.array_equal(counter.uniform(7, 5, 2, streams.TIMES), u[:7])
    for place in ((5, 2**31), (2**40 + 3, 7), (2**64 - 1, 0)):  # a few are made by another way than many
        for sample in (0, 9, 2**32 - 1):
            many = counter.bits(100, *place, streams.TIMES, sample)
            assert all(np.array_equal(counter.bits(n, *place, streams.TIMES, sample), many[:n]) for n in (0, 1, 2, 31, 32, 33))
    assert not np.array_equal(counter.uniform(7, 5, 3, streams.TIMES), u[:7])


def test_integers_cover_their_range_evenly() -> None:
    k = counter.integers(60_000, 1, 7, 5, 2, streams.TIMES)
    assert k.min() == 1 and k.max() == 6
    assert stats.chisquare(np.bincount(k)[1:]).pvalue > 1e-4


def test_permutations() -> None:
    p = counter.permutation(1000, 5, 2, streams.ORDER)
    assert np.array_equal(np.sort(p), np.arange(1000)) and not np.array_equal(p, np.arange(1000))
    assert not np.array_equal(p, counter.permutation(1000, 5, 3, streams.ORDER))
    firsts = np.bincount([counter.permutation(5, 5, step, streams.ORDER)[0] for step in range(4000)], minlength=5)
    assert stats.chisquare(firsts).pvalue > 1e-4
