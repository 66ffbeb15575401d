"""Categorical laws in log space: PyTorch's numbers, exact zeros without warnings, and the shapes and kinds that are refused."""

import numpy as np
import pytest

from alphabar.core import categorical

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.standard_normal((4, 5, 6))


def with_zeros():
    logits = LOGITS.copy()
    logits[0, 0, [1, 4]] = -np.inf
    logits[3, 2, :5] = -np.inf
    return categorical.log_softmax(logits)


def test_log_softmax_is_that_of_torch():
    torch = pytest.importorskip("torch")
    for logits in (LOGITS, LOGITS * 300, LOGITS + 1e6, LOGITS.astype(np.float32)):
        want = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
        got = categorical.log_softmax(logits)
        assert got.dtype == logits.dtype
        off = 2e-6 if logits.dtype == np.float32 else 1e-13
        np.testing.assert_allclose(got, want, rtol=off, atol=off)


def test_an_impossible_state_has_probability_exactly_0():
    log_p = with_zeros()
    assert (log_p[0, 0, [1, 4]] == -np.inf).all() and (log_p[3, 2] == [-np.inf] * 5 + [0]).all()
    np.testing.assert_allclose(np.exp(log_p).sum(axis=-1), 1, rtol=1e-14)
    nothing = categorical.log_softmax(np.full((2, 3), -np.inf))
    assert (nothing == -np.inf).all()


def test_log_prob_of_every_state_sums_to_one():
    """S4-E24: C(x|p) = ∏_{i=1}^K p_i^{[x=i]}; with the product to n instead of K, states would be left out."""
    log_p = with_zeros()
    mass = sum(np.exp(categorical.log_prob(np.full((4, 5), k), log_p)) for k in range(6))
    np.testing.assert_allclose(mass, 1, rtol=1e-14)
    x = RNG.integers(0, 6, (4, 5))
    one_hot = np.eye(6)[x]
    np.testing.assert_allclose(np.exp(categorical.log_prob(x, log_p)), np.prod(np.exp(log_p) ** one_hot, axis=-1), rtol=1e-13)
    assert (categorical.log_prob(x.astype(np.uint8), log_p[0, 1]) == log_p[0, 1][x]).all()  # one law for all


def test_kl_and_entropy_are_those_of_torch():
    torch = pytest.importorskip("torch")
    log_q, log_p = categorical.log_softmax(LOGITS), categorical.log_softmax(LOGITS[::-1] * 0.5)
    law_q, law_p = (torch.distributions.Categorical(logits=torch.from_numpy(v)) for v in (log_q, log_p.copy()))
    np.testing.assert_allclose(categorical.kl(log_q, log_p), torch.distributions.kl_divergence(law_q, law_p), rtol=1e-12)
    np.testing.assert_allclose(categorical.entropy(log_q), law_q.entropy(), rtol=1e-12)
    assert (categorical.kl(log_q, log_q) == 0).all() and (categorical.kl(log_q, log_p) > 0).all()


def test_kl_counts_an_exact_zero_as_one():
    log_q = with_zeros()
    assert np.isfinite(categorical.kl(log_q, categorical.log_softmax(LOGITS))).all()
    assert (categorical.kl(log_q, log_q) == 0).all()
    assert np.isinf(categorical.kl(categorical.log_softmax(LOGITS), log_q)[[0, 3], [0, 2]]).all()
    assert categorical.entropy(log_q)[3, 2] == 0
    certain = np.array([-np.inf, 0.0, -np.inf])
    assert categorical.kl(certain, np.log([0.25, 0.5, 0.25])) == pytest.approx(np.log(2))


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    logits, x = torch.from_numpy(LOGITS), torch.from_numpy(RNG.integers(0, 6, (4, 5)))
    log_p = categorical.log_softmax(logits)
    for result in (log_p, categorical.log_prob(x, log_p), categorical.kl(log_p, log_p), categorical.entropy(log_p)):
        assert isinstance(result, torch.Tensor)
    np.testing.assert_array_equal(log_p.numpy(), categorical.log_softmax(LOGITS))


def test_what_is_refused():
    log_p, x = categorical.log_softmax(LOGITS), np.zeros((4, 5), np.int32)
    for call, error, message in [
        (lambda: categorical.log_softmax(x), TypeError, "logits must be a float array"),
        (lambda: categorical.log_prob(x + 0.5, log_p), TypeError, "x must be an integer array"),
        (lambda: categorical.log_prob(x + 6, log_p), ValueError, r"x must be in 0\.\.5"),
        (lambda: categorical.log_prob(x - 1, log_p), ValueError, r"x must be in 0\.\.5"),
        (lambda: categorical.log_prob(x[:3], log_p), ValueError, "log_p must have shape"),
        (lambda: categorical.kl(log_p, x), TypeError, "log_p must be a float array"),
        (lambda: categorical.kl(log_p, log_p[..., :5]), ValueError, "log_p must have 6 states"),
        (lambda: categorical.entropy([0.5, 0.5]), TypeError, "log_p must be an array"),
    ]:
        with pytest.raises(error, match=message):
            call()
