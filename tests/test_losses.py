"""Losses against finite differences, PyTorch and the optimum in closed form; their weights against the bound they come from."""

import numpy as np
import pytest

from alphabar.core import forward, losses

RNG = np.random.default_rng(0)
OUT, TARGET = RNG.standard_normal((2, 4, 5, 3))
WEIGHT = np.array([0.0, 0.5, 1.0, 7.0])


@pytest.mark.parametrize("weight", [None, 2.5, WEIGHT], ids=["none", "number", "array"])
def test_gradient_is_that_of_the_batch_mean(weight):
    value, gradient = losses.weighted_loss(OUT, TARGET, weight)
    assert value.shape == (4,) and gradient.shape == OUT.shape
    w = np.broadcast_to(1.0 if weight is None else weight, 4)
    np.testing.assert_allclose(value, w * ((OUT - TARGET) ** 2).mean(axis=(1, 2)), rtol=1e-13)
    direction, h = RNG.standard_normal(OUT.shape), 1e-5
    ends = [losses.weighted_loss(OUT + s * h * direction, TARGET, weight)[0].mean() for s in (1, -1)]
    assert np.sum(gradient * direction) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_simple_loss_is_that_of_torch(dtype):
    torch = pytest.importorskip("torch")
    out = torch.tensor(OUT.astype(dtype), requires_grad=True)
    loss = torch.nn.functional.mse_loss(out, torch.tensor(TARGET.astype(dtype)))
    loss.backward()
    value, gradient = losses.simple_loss(OUT.astype(dtype), TARGET.astype(dtype))
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(value.mean(), loss.item(), rtol=1e-6)
    np.testing.assert_allclose(gradient, out.grad.numpy(), rtol=1e-6, atol=1e-9)
    value, gradient = losses.simple_loss(out.detach(), torch.tensor(TARGET.astype(dtype)))
    assert isinstance(value, torch.Tensor) and isinstance(gradient, torch.Tensor)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="output has shape"):
        losses.simple_loss(OUT, TARGET[:2])
    with pytest.raises(TypeError, match="one float dtype"):
        losses.simple_loss(OUT, TARGET.astype(np.float32))
    with pytest.raises(ValueError, match="weight must be"):
        losses.weighted_loss(OUT, TARGET, np.ones(3))
    with pytest.raises(ValueError, match="empty"):
        losses.simple_loss(OUT[:0], TARGET[:0])


def test_the_optimum_for_normal_data_is_alpha_bar(linear):
    """x0 ~ N(0, 1): the best ε_θ is √(1−ᾱ)·x_t, with loss ᾱ a dimension."""
    x0 = RNG.standard_normal((40, 20_000))
    for t in (50, 500):
        x_t, eps = forward.q_sample(x0, t, linear, seed=1)
        losses_at = [losses.simple_loss(k * linear.noise[t] * x_t, eps)[0].mean() for k in (0.9, 1.0, 1.1)]
        assert losses_at[1] == pytest.approx(linear.alpha_bar[t], rel=0.01) and losses_at[1] < min(losses_at[0], losses_at[2])


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_eps_loss_weight_makes_the_bound(linear, variance):
    """weight·‖ε − ε_θ‖² is the KL of the two reverse steps, less its constant."""
    x0, eps, wrong = RNG.standard_normal((3, 1, 6))
    for t in (2, 3, 10, 500, 999, 1000):
        x_t, _ = forward.q_sample(x0, t, linear, eps=eps)
        mean, var = forward.p_mean_variance(wrong, x_t, t, linear, variance=variance)
        target, var_q = forward.q_posterior(x0, x_t, t, linear)
        constant = losses.normal_kl(target, var_q, target, var)[0]
        kl = losses.normal_kl(target, var_q, mean, var)[0] - constant
        assert losses.eps_loss_weight(t, linear, variance) * np.sum((eps - wrong) ** 2) == pytest.approx(kl, rel=1e-8)
    many = losses.eps_loss_weight(np.array([2, 500]), linear, variance)
    assert many.shape == (2,) and many[1] == losses.eps_loss_weight(500, linear, variance)
    torch = pytest.importorskip("torch")
    tensor = losses.eps_loss_weight(torch.tensor([2, 500]), linear, variance)
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), many)
    with pytest.raises(ValueError, match=r"t must be in [12]\.\.1000"):
        losses.eps_loss_weight(0 if variance == "beta" else 1, linear, variance)
    with pytest.raises(ValueError, match="variance must be"):
        losses.eps_loss_weight(5, linear, "learned")


def test_normal_kl_is_the_integral():
    z = np.linspace(-14, 14, 100_001)
    for mp, vp, mq, vq in ((0.3, 0.5, -0.2, 1.5), (0.0, 1.0, 0.0, 1.0), (2.0, 0.1, 1.0, 0.4)):
        p, q = (np.exp(-((z - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v) for m, v in ((mp, vp), (mq, vq)))
        want = np.sum(p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300)))) * (z[1] - z[0])
        got = losses.normal_kl(np.full((2, 3), mp), vp, np.full((2, 3), mq), vq)
        np.testing.assert_allclose(got, 3 * want, rtol=1e-8, atol=1e-12)
    with pytest.raises(ValueError, match="positive"):
        losses.normal_kl(OUT, 0.0, TARGET, 1.0)


def test_min_snr_weights_are_one_loss_in_any_prediction(linear):
    x0, eps = RNG.standard_normal((2, 3, 8))
    for t in (5, 100, 400, 900):
        x_t, _ = forward.q_sample(x0, t, linear, eps=eps)
        guess = x0 + 0.1 * RNG.standard_normal(x0.shape)
        snr = linear.alpha_bar[t] / (1 - linear.alpha_bar[t])
        want = min(snr, 5.0) * ((guess - x0) ** 2).mean(axis=1)
        for prediction in ("x0", "eps", "v"):
            out = forward.convert(guess, x_t, t, linear, "x0", prediction)
            target = forward.training_target(x0, eps, t, linear, prediction)
            value, _ = losses.weighted_loss(out, target, losses.min_snr_weight(t, linear, prediction=prediction))
            np.testing.assert_allclose(value, want, rtol=1e-8)
    with pytest.raises(ValueError, match="prediction must be"):
        losses.min_snr_weight(5, linear, prediction="score")
    with pytest.raises(ValueError, match=r"t must be in 1\.\.1000"):
        losses.min_snr_weight(0, linear)
