"""The same network trained by explicit, implicit, sliced and denoising score matching on a mixture comes to the same score."""

import numpy as np
import pytest

from alphabar.core import score_matching as sm
from alphabar.core.mixture import GaussianMixture
from alphabar.core.traces import jacobian_trace
from alphabar.nets import MLP, AdamW, Tensor, backward, jvp, learning_rate, vjp

LAW = GaussianMixture([0.4, 0.6], [[-1.2, 0.4], [1.0, -0.4]], np.array([[[0.5, 0.1], [0.1, 0.4]], [[0.4, -0.1], [-0.1, 0.6]]]))
SIGMA, BATCH, STEPS = 0.4, 256, 600


def explicit(net, x, step):
    y = net(x)
    value, gradient = sm.explicit(y.data, LAW.score(x))
    y.backward(gradient)
    return value


def implicit(net, x, step):
    """Both columns of the Jacobian in one batch of 2B."""
    directions = np.repeat(np.eye(2), len(x), axis=0)
    y = net(Tensor(np.concatenate([x, x]), tangent=directions))
    trace = (y.tangent.data * directions).sum(1).reshape(2, -1).sum(0)
    value, on_score, on_trace = sm.implicit(y.data[: len(x)], trace)
    backward((y, np.concatenate([on_score, 0 * on_score])), (y.tangent, np.tile(on_trace, 2)[:, None] * directions))
    return value


def sliced(net, x, step, reduced=True):
    v = sm.projections(x.shape, seed=1, step=step, dtype=np.float64)
    y = net(Tensor(x, tangent=v))
    value, on_score, on_product = sm.sliced(y.data, y.tangent.data, v, variance_reduced=reduced)
    backward((y, on_score), (y.tangent, on_product))
    return value


def sliced_plain(net, x, step):
    return sliced(net, x, step, reduced=False)


def denoising(net, x, step):
    noisy, _ = sm.perturb(x, SIGMA, seed=2, step=step)
    y = net(noisy)
    value, gradient = sm.denoising(y.data, x, noisy, SIGMA)
    y.backward(gradient)
    return value


def trained(loss, steps=STEPS):
    net = MLP(2, hidden=(32, 32), seed=1, dtype="float64")
    optimizer = AdamW(net.params, ema_decay=0.99)
    for step in range(steps):
        x = LAW.sample(BATCH, seed=3, first_sample=step * BATCH)
        net.params.zero_grad()
        loss(net, x, step)
        optimizer.step(learning_rate(step, 1e-2, 50, steps, "cosine"))
    net.params.data[...] = optimizer.ema
    return net


def error(net, law):
    """E‖s − ∇log p‖²/E‖∇log p‖² under the law."""
    x = law.sample(20_000, seed=77)
    s, true = net.predict(x), law.score(x)
    return sm.fisher_divergence(s, true) / sm.fisher_divergence(0 * true, true)


LOSSES = {"explicit": explicit, "implicit": implicit, "sliced": sliced, "sliced, plain": sliced_plain, "denoising": denoising}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@each_loss
def test_gradients_of_the_weights_are_those_of_the_batch_mean(loss):
    net, x, h = MLP(2, hidden=(8,), seed=1, dtype="float64"), LAW.sample(16), 1e-5
    loss(net, x, 0)
    gradient, direction = net.params.grad.copy(), np.random.default_rng(0).standard_normal(net.params.data.shape)
    ends = []
    for sign in (1, -1):
        net.params.data += sign * h * direction
        ends.append(loss(net, x, 0).mean())
        net.params.data -= sign * h * direction
    assert gradient @ direction == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


def test_traces_of_a_network():
    net, x, h = MLP(2, hidden=(16,), seed=1, dtype="float64"), LAW.sample(9), 1e-6
    want = sum((net.predict(x + h * e) - net.predict(x - h * e))[:, i] / (2 * h) for i, e in enumerate(np.eye(2)))
    np.testing.assert_allclose(jacobian_trace(lambda x, v: jvp(net, x, v)[1], x), want, atol=1e-8)
    np.testing.assert_allclose(jacobian_trace(lambda x, u: vjp(net, x, u)[1], x), want, atol=1e-8)


@each_loss
def test_training_reaches_the_score(loss):
    net = trained(loss)
    if loss is denoising:  # the score of the noised density, and not that of the data
        assert error(net, LAW.convolve(SIGMA)) < 0.04
        assert error(net, LAW) > 0.08
    else:
        assert error(net, LAW) < 0.04
        assert error(net, LAW.convolve(SIGMA)) > 0.08
