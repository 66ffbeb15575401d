"""Traces of Jacobians: exact against closed forms, Hutchinson's against its mean, variance and error bar; calls are counted."""

import numpy as np
import pytest

from alphabar.core.mixture import GaussianMixture
from alphabar.core.traces import hutchinson_trace, jacobian, jacobian_trace, projections

RNG = np.random.default_rng(4)
J = RNG.standard_normal((6, 6))
X = RNG.standard_normal((5, 2, 3))


class Counted:
    """x -> J x as Jacobian-vector products; counts its calls."""

    def __init__(self, matrix=J):
        self.matrix, self.calls = matrix, 0

    def __call__(self, x, v):
        self.calls += 1
        return (v.reshape(len(v), -1) @ self.matrix.T).reshape(v.shape)


LAW = GaussianMixture([0.4, 0.6], RNG.standard_normal((2, 4)), [0.5, 1.5])


def test_exact_trace_and_jacobian_take_d_calls():  # S0-C3, S4-E78, S4-E79, S4-C12
    product = Counted()
    np.testing.assert_allclose(jacobian_trace(product, X), np.full(5, np.trace(J)), rtol=1e-12)
    assert product.calls == 6
    np.testing.assert_allclose(jacobian(product, X), np.broadcast_to(J, (5, 6, 6)), rtol=1e-12)
    assert product.calls == 12
    x = LAW.sample(7)
    np.testing.assert_allclose(jacobian_trace(LAW.score_jvp, x), LAW.score_divergence(x), rtol=1e-11)
    h, columns = 1e-6, np.eye(4)
    want = np.stack([(LAW.score(x + h * e) - LAW.score(x - h * e)) / (2 * h) for e in columns], axis=2)
    np.testing.assert_allclose(jacobian(LAW.score_jvp, x), want, atol=1e-7)


@pytest.mark.parametrize("law", ["rademacher", "normal"])
def test_hutchinson_is_unbiased_with_the_stated_variance(law):  # S0-C3, S4-E58: one call a projection, not d
    product, M = Counted(), 50
    x = np.zeros((400, 2, 3))
    mean, error = hutchinson_trace(product, x, seed=1, projections=M, law=law)
    assert product.calls == M and mean.shape == error.shape == (400,)
    S = (J + J.T) / 2
    variance = 2 * np.sum(S**2) - (2 * np.sum(np.diag(S) ** 2) if law == "rademacher" else 0)
    assert abs(mean.mean() - np.trace(J)) < 4 * np.sqrt(variance / (M * 400))
    assert np.mean(error**2) * M == pytest.approx(variance, rel=0.1)  # 20 000 draws of heavy tail
    assert np.mean(np.abs(mean - np.trace(J)) < 2 * error) == pytest.approx(0.95, abs=0.03)


def test_rademacher_is_exact_for_a_diagonal_jacobian():
    diagonal = np.diag(np.arange(1.0, 7.0))
    mean, error = hutchinson_trace(Counted(diagonal), X, projections=3)
    np.testing.assert_allclose(mean, 21, rtol=1e-14)
    np.testing.assert_allclose(error, 0, atol=1e-13)
    mean, error = hutchinson_trace(Counted(diagonal), X)
    assert np.all(mean == 21) and np.all(np.isnan(error))


def test_products_from_either_side_do():  # S4-E58, S4-E80: vᵀ(∇s)v = vᵀ∇(vᵀs)
    for law in ("rademacher", "normal"):
        right, _ = hutchinson_trace(Counted(J), X, seed=3, projections=4, law=law)
        left, _ = hutchinson_trace(Counted(J.T), X, seed=3, projections=4, law=law)
        np.testing.assert_allclose(left, right, rtol=1e-12)


def test_directions_are_counters_of_sample_and_number():
    whole, _ = hutchinson_trace(Counted(), X, seed=5, projections=3)
    part, _ = hutchinson_trace(Counted(), X[2:4], seed=5, projections=3, first_sample=2)
    np.testing.assert_array_equal(part, whole[2:4])
    steps = [hutchinson_trace(Counted(), X, seed=5, step=j)[0] for j in range(3)]
    np.testing.assert_allclose(np.mean(steps, axis=0), whole, rtol=1e-12)
    again, _ = hutchinson_trace(Counted(), X, seed=5, projections=3)
    np.testing.assert_array_equal(again, whole)


@pytest.mark.parametrize("law", ["rademacher", "normal"])
def test_projections_have_unit_covariance(law):
    n = 40_000
    v = projections((n, 3), seed=2, step=4, law=law)
    assert v.dtype == np.float32
    if law == "rademacher":
        assert set(np.unique(v)) == {-1, 1}
        np.testing.assert_array_equal(v, np.sign(projections((n, 3), seed=2, step=4)))
    outer = v[:, :, None] * v[:, None, :].astype(np.float64)
    assert np.all(np.abs(v.mean(0)) < 4 / np.sqrt(n))
    assert np.all(np.abs(outer.mean(0) - np.eye(3)) <= 4 * np.sqrt((1 + np.eye(3)) / n))
    np.testing.assert_array_equal(projections((5, 3), seed=2, step=4, law=law, first_sample=7), v[7:12])
    assert not np.array_equal(projections((n, 3), seed=2, step=5, law=law), v)


def test_arrays_of_torch_in_and_out():
    torch = pytest.importorskip("torch")
    matrix, x = torch.tensor(J), torch.tensor(X)

    def jvp(x, v):
        assert isinstance(v, torch.Tensor)
        return (v.reshape(len(v), -1) @ matrix.T).reshape(v.shape)

    trace = jacobian_trace(jvp, x)
    estimate, error = hutchinson_trace(jvp, x, projections=2)
    assert all(isinstance(a, torch.Tensor) for a in (trace, estimate, error, jacobian(jvp, x)))
    np.testing.assert_allclose(trace.numpy(), np.trace(J), rtol=1e-12)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="law must be one of"):
        hutchinson_trace(Counted(), X, law="uniform")
    with pytest.raises(ValueError, match="projections must be at least 1"):
        hutchinson_trace(Counted(), X, projections=0)
    with pytest.raises(ValueError, match="jvp must return an array of shape"):
        jacobian_trace(lambda x, v: v[:, 0], X)
    with pytest.raises(TypeError, match="x must be a float array"):
        jacobian_trace(Counted(), np.arange(6).reshape(1, 6))
