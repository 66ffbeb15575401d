"""Sums and copies between the kernels: compiled, by NumPy, and by their definitions in float64."""

from collections.abc import Iterator

import numpy as np
import pytest

from alphabar import kernels
from alphabar.kernels import elementwise
from alphabar.kernels.bf16 import BF16

pytest.importorskip("numba")
rng = np.random.default_rng(0)
SHAPES = [(1, 1, 1), (3, 5, 7), (2, 1000, 33), (40, 64, 16), (1, 4096, 64)]


@pytest.fixture(params=["auto", "reference", "few"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compiled for all sizes, by the library, or by whichever is faster."""
    monkeypatch.setattr(elementwise, "FEW", elementwise.FEW if request.param == "few" else 0)
    with kernels.use("reference" if request.param == "reference" else "auto"):
        yield request.param


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_copies_have_numpys_bits(way: str, shape: tuple[int, ...]) -> None:
    a, b, (batch, _, channels) = normal(*shape), normal(*shape), shape
    np.testing.assert_array_equal(elementwise.add(a, b), a + b)
    into = b.copy()
    assert elementwise.add(a, into, into) is into
    np.testing.assert_array_equal(into, a + b)
    wide = normal(*shape[:2], channels + 9)
    want = wide.copy()
    want[..., 4 : 4 + channels] += a
    elementwise.add_columns(a, 4, wide)
    np.testing.assert_array_equal(wide, want)
    np.testing.assert_array_equal(elementwise.concat(a, wide), np.concatenate([a, wide], axis=-1))
    np.testing.assert_array_equal(elementwise.channels(wide, 3, channels), wide[..., 3 : 3 + channels])
    emb = normal(batch, channels + 5)
    want = a + emb[:, None, 2 : 2 + channels]
    np.testing.assert_array_equal(elementwise.add_channels(a, emb, 2), want)
    assert elementwise.add_channels(a, emb, 2, a) is a
    np.testing.assert_array_equal(a, want)
    elementwise.fill(a, 2.5)
    assert (a == 2.5).all() and not elementwise.zeros(shape, np.float32).any()


def test_weighted_sums_have_the_bits_of_two_products_and_a_sum(way: str) -> None:
    x, y = normal(3, 5), normal(3, 5)
    want = np.float32(3.1) * x + np.float32(-2.1) * y
    np.testing.assert_array_equal(elementwise.weighted_sum(np.float64(3.1), x, -2.1, y), want)
    assert elementwise.weighted_sum(3.1, x, -2.1, y, y) is y
    np.testing.assert_array_equal(y, want)
    wide = rng.standard_normal(4)
    np.testing.assert_array_equal(elementwise.weighted_sum(3.1, wide, -2.1, wide), 3.1 * wide + -2.1 * wide)


def test_casts_between_float32_and_the_bits_of_bfloat16(way: str) -> None:
    """Rounded by the formula of the standard, in float64: to a multiple of 2^(e - 7), ties to even."""
    x = np.concatenate([normal(999), np.array([0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8 + 2.0**-20)], np.float32)])
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(x), 2.0**-126).astype(np.float64))) - 7)
    bits = elementwise.cast(x, BF16)
    back = elementwise.cast(bits, "float32")
    assert bits.dtype == BF16 and back.dtype == np.float32
    np.testing.assert_array_equal(back, np.rint(x / unit) * unit)
    assert elementwise.cast(x, np.float32) is x and elementwise.cast(bits, BF16) is bits
    into = np.empty_like(x)
    assert elementwise.cast(x, np.float32, into) is into and elementwise.cast(x, BF16, bits) is bits
    np.testing.assert_array_equal(into, x)
    for a, dtype in ((x, np.float64), (x.astype(np.float64), BF16), (bits, np.int32)):
        with pytest.raises(TypeError, match="a cast is from float32 to bfloat16"):
            elementwise.cast(a, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_over_places_and_into_rows(way: str, shape: tuple[int, ...]) -> None:
    x, rows = normal(*shape), 6
    total = x.sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(elementwise.sum_places(x), total, rtol=0, atol=1e-6 * np.abs(x).sum(axis=1).max())
    x = np.ascontiguousarray(x[:, 0])
    for index in (rng.integers(0, rows, len(x)), np.full(len(x), rows - 1, np.int32)):
        want = np.zeros((rows, x.shape[1]))
        np.add.at(want, index, x)
        made = elementwise.sum_into_rows(x, index, rows)
        assert (made is None) == (way == "reference")
        if made is not None:
            np.testing.assert_allclose(made, want, rtol=0, atol=1e-6 * np.abs(x).sum(axis=0).max())


def test_rows_of_a_table(way: str) -> None:
    table, index = normal(5, 12), rng.integers(0, 5, (3, 4))
    np.testing.assert_array_equal(elementwise.take_rows(table, index), table[index])
    with pytest.raises(IndexError):
        elementwise.take_rows(table, index + 5)


@pytest.mark.parametrize("cos_first", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_of_times(way: str, dtype: type, cos_first: bool) -> None:
    t = np.array([1, 2.5, 1000])
    omega = np.exp(-np.arange(16) / 3).astype(dtype)
    angle = ((t - 1).astype(dtype)[:, None] * omega).astype(np.float64)
    want = np.concatenate([np.cos(angle), np.sin(angle)] if cos_first else [np.sin(angle), np.cos(angle)], axis=1)
    for times in (t, np.broadcast_to(t[1], 3), t[::-1]):
        made = elementwise.time_features(times, 1, omega, cos_first)
        assert (made is None) == (way == "reference")
        if made is not None:
            picked = want if times is t else want[::-1] if times.base is t else want[[1, 1, 1]]
            np.testing.assert_allclose(made, picked, rtol=0, atol=2.0**-25)
            assert made.dtype == np.float32


def test_arrays_that_no_compiled_function_takes_go_to_numpy() -> None:
    a = normal(300, 400)
    for other in (a.astype(np.float64), np.asfortranarray(a), a[:, ::2], np.broadcast_to(a[0], a.shape)):
        np.testing.assert_array_equal(elementwise.add(other, other), other + other)
