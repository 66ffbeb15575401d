"""The decoders of L_0: the cells of 8-bit values hold all the probability, and tails keep their digits."""

import numpy as np
import pytest
from scipy import integrate, stats

from alphabar.core import data, decoder


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """All 256 values, one a sample."""
    return data.to_unit(np.arange(256, dtype=np.uint8)[:, None])


@pytest.mark.parametrize("mean", [-30.0, -1.0, -0.999, 0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("variance", [1e-8, 1e-4, 1e-2, 1.0, 1e4])
def test_the_probabilities_of_all_values_sum_to_one(values: np.ndarray, mean: float, variance: float) -> None:
    log_prob = decoder.discrete_log_prob(values, mean, variance)
    assert log_prob.shape == (256,) and log_prob.dtype == np.float64 and np.all(np.isfinite(log_prob)) and log_prob.max() <= 0
    assert np.exp(log_prob).sum() == pytest.approx(1, abs=1e-12)


def test_a_cell_is_the_integral_of_the_density(values: np.ndarray) -> None:
    mean, variance = 0.1234, 0.05**2
    law = stats.norm(mean, 0.05)
    for k in (1, 100, 143, 200, 254):
        x = 2 * k / 255 - 1
        mass, _ = integrate.quad(law.pdf, x - 1 / 255, x + 1 / 255, epsabs=0, epsrel=1e-13)
        assert decoder.discrete_log_prob(values[k : k + 1], mean, variance)[0] == pytest.approx(np.log(mass), rel=1e-10)
    ends = decoder.discrete_log_prob(values[[0, 255]], mean, variance)
    np.testing.assert_allclose(ends, [law.logcdf(-1 + 1 / 255), law.logsf(1 - 1 / 255)], rtol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("z", [0.0, 3.0, 12.0, 40.0, 1e3, 1e6])
def test_far_tails_keep_their_digits(sign: int, z: float) -> None:
    """ln(Φ(z + w) − Φ(z)) = −z²/2 − ln√(2π) + ln ∫_0^w e^{−zy − y²/2} dy: an integral without cancellation."""
    w = 0.3 / (1 + z)
    inside, _ = integrate.quad(lambda y: np.exp(-z * y - y * y / 2), 0, w, epsabs=0, epsrel=1e-13)
    want = -z * z / 2 - 0.5 * np.log(2 * np.pi) + np.log(inside)
    low, high = (z, z + w) if sign > 0 else (-z - w, -z)
    assert decoder.log_normal_mass(low, high) == pytest.approx(want, rel=1e-9)


def test_narrow_cells_are_the_density_times_their_width(values: np.ndarray) -> None:
    """For a wide law the discrete decoder is the Gaussian one plus ln(2/255) an element."""
    x = values[10:250].reshape(80, 3)
    mean = np.random.default_rng(0).normal(0, 0.5, (80, 3))
    discrete, density = decoder.discrete_log_prob(x, mean, 4.0), decoder.gaussian_log_prob(x, mean, 4.0)
    np.testing.assert_allclose(discrete, density + 3 * np.log(2 / 255), atol=3e-5)


def test_samples_add_up_and_variances_broadcast() -> None:
    rng = np.random.default_rng(1)
    x = data.to_unit(rng.integers(0, 256, (4, 3, 2), np.uint8))
    mean, variance = rng.normal(0, 0.5, (4, 3, 2)), rng.uniform(0.01, 0.1, (4, 1, 1))
    for log_prob in (decoder.discrete_log_prob, decoder.gaussian_log_prob):
        parts = [log_prob(x[k].reshape(-1, 1), mean[k].reshape(-1, 1), variance[k, 0, 0]).sum() for k in range(4)]
        np.testing.assert_allclose(log_prob(x, mean, variance), parts, rtol=1e-13)
    want = stats.norm(mean, np.sqrt(variance)).logpdf(x).reshape(4, -1).sum(axis=1)
    np.testing.assert_allclose(decoder.gaussian_log_prob(x, mean, variance), want, rtol=1e-13)


def test_fewer_values() -> None:
    two = np.array([[-1.0], [1.0]])
    assert np.exp(decoder.discrete_log_prob(two, 0.2, 0.3, values=2)).sum() == pytest.approx(1, abs=1e-14)
    np.testing.assert_allclose(decoder.discrete_log_prob(two, 0.0, 1.0, values=2), np.log(0.5), rtol=1e-14)


def test_what_is_refused() -> None:
    x = np.zeros((2, 3))
    with pytest.raises(ValueError, match="x must hold the 256 values"):
        decoder.discrete_log_prob(x, 0.0, 1.0)
    with pytest.raises(ValueError, match="x must hold the 256 values"):
        decoder.discrete_log_prob(x + 257 / 255, 0.0, 1.0)
    for log_prob in (decoder.discrete_log_prob, decoder.gaussian_log_prob):
        with pytest.raises(ValueError, match="variance must be positive, not 0"):
            log_prob(x + 1, 0.0, 0.0)
    with pytest.raises(ValueError, match="values must be at least 2"):
        decoder.discrete_log_prob(x, 0.0, 1.0, values=1)
