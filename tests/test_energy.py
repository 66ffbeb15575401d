"""Energy-based models: the normaliser against closed forms and scipy, and a score that does not see it."""

import numpy as np
import pytest
from scipy import integrate

from alphabar.core.energy import ebm_log_prob, ebm_score, log_partition, quadratic_log_partition
from alphabar.core.mixture import GaussianMixture

A1, A2 = np.array([[2.5]]), np.array([[2.0, 0.6], [0.6, 0.5]])
LAW = GaussianMixture([0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], np.array([[[0.4, 0.1], [0.1, 0.3]], [[0.5, -0.2], [-0.2, 0.6]]]))


def quadratic(A):
    return lambda x: 0.5 * np.einsum("ni,ij,nj->n", x - 0.3, A, x - 0.3)


@pytest.mark.parametrize("rule", ["trapezoid", "gauss"])
@pytest.mark.parametrize("A", [A1, A2], ids=["1d", "2d"])
def test_normaliser_of_a_quadratic_energy(A, rule):  # S4-E53: Z = √((2π)^d/|A|)
    closed = quadratic_log_partition(A)
    assert closed == pytest.approx(0.5 * np.log((2 * np.pi) ** len(A) / np.linalg.det(A)), rel=1e-13)
    z = log_partition(quadratic(A), [(-15, 15)] * len(A), points=200, rule=rule)
    assert z == pytest.approx(closed, abs=1e-9)
    shifted = log_partition(lambda x: quadratic(A)(x) - 2000, [(-15, 15)] * len(A), points=200, rule=rule)
    assert shifted == pytest.approx(closed + 2000, abs=1e-9)  # e^{2000} overflows


@pytest.mark.parametrize("rule", ["trapezoid", "gauss"])
def test_normaliser_of_a_double_well_is_that_of_scipy(rule):
    def f(x):
        return (x[:, 0] ** 2 - 1) ** 2 + 0.3 * x[:, 0]

    z, _ = integrate.quad(lambda x: np.exp(-f(np.array([[x]]))[0]), -4, 4, epsabs=1e-13)
    assert log_partition(f, [(-4, 4)], rule=rule) == pytest.approx(np.log(z), abs=1e-10)


@pytest.mark.parametrize("rule", ["trapezoid", "gauss"])
def test_unequal_sides_of_a_box(rule):  # a box is cut off at its ends, which the trapezoid counts by half
    z = log_partition(lambda x: x[:, 0], [(0, 2), (0, 5)], rule=rule)
    assert z == pytest.approx(np.log(5 * (1 - np.exp(-2))), abs=1e-5 if rule == "trapezoid" else 1e-12)


def test_density_of_an_energy():  # S4-E54: any unnormalised −log p gives p back
    def energy(x):
        return 3.7 - LAW.log_prob(x)

    z = log_partition(energy, [(-8, 8), (-8, 8)], points=300)
    assert z == pytest.approx(-3.7, abs=1e-10)
    x = LAW.sample(20)
    np.testing.assert_allclose(ebm_log_prob(energy, x, z), LAW.log_prob(x), rtol=1e-9)


def test_score_needs_no_normaliser():  # S4-E55, S4-C10
    x, h = LAW.sample(20), 1e-6

    for constant in (0.0, 5.0):

        def energy(x, constant=constant):
            return constant - LAW.log_prob(x)

        def gradient(x, energy=energy):
            return np.stack([(energy(x + h * e) - energy(x - h * e)) / (2 * h) for e in np.eye(2)], axis=1)

        np.testing.assert_allclose(ebm_score(x, gradient=gradient), LAW.score(x), atol=1e-7)
    seen = []

    def vjp(x, u):
        seen.append(u)
        return u[:, None] * (x - 0.3) @ A2

    np.testing.assert_allclose(ebm_score(x, vjp=vjp), -(x - 0.3) @ A2)
    np.testing.assert_array_equal(seen, np.ones((1, 20)))


def test_score_of_an_energy_network():
    products = pytest.importorskip("alphabar.nets.products")
    from alphabar.nets import MLP

    net = MLP(2, hidden=(16,), features_out=1, dtype="float64")
    x, h = LAW.sample(10), 1e-6
    score = ebm_score(x, vjp=lambda x, u: products.vjp(net, x, u[:, None])[1])
    want = [-(net.predict(x + h * e) - net.predict(x - h * e))[:, 0] / (2 * h) for e in np.eye(2)]
    np.testing.assert_allclose(score, np.transpose(want), atol=1e-8)


def test_wrong_arguments_are_named():
    energy = quadratic(A1)
    x = np.zeros((3, 2))
    cases = [
        (lambda: log_partition(energy, [(1, 0)]), "box must be"),
        (lambda: log_partition(energy, [(0, 1)] * 3), "box must be"),
        (lambda: log_partition(energy, [(0, 1)], rule="simpson"), "rule must be one of"),
        (lambda: log_partition(energy, [(0, 1)], points=1), "points must be at least 2"),
        (lambda: log_partition(lambda x: x, [(0, 1)]), "energy must return shape"),
        (lambda: quadratic_log_partition([1.0, 2.0]), "symmetric matrix"),
        (lambda: quadratic_log_partition(-A2), "positive definite"),
        (lambda: ebm_score(x, gradient=lambda x: x[:, 0]), "shape of x"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for arguments in ({}, {"gradient": abs, "vjp": max}):
        with pytest.raises(TypeError, match="one of gradient and vjp"):
            ebm_score(x, **arguments)
