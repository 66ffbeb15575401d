"""The hybrid loss against PyTorch on dense matrices, finite differences and closed forms; stratified training times."""

import sys

import numpy as np
import pytest

from alphabar.core import discrete, rates
from alphabar.core.discrete_losses import hybrid_loss, step_kl, stratified_times
from alphabar.core.discrete_rows import rows_of
from alphabar.core.transitions import Absorbing, Dense, DiscretizedGaussian, NearestNeighbour, Uniform, neighbour_rates
from tests import fake_cupy

T = 8
BETA = np.r_[0.0, np.linspace(0.05, 0.9, T)]


def random_law(K):
    Q = np.random.default_rng(5).random((T + 1, K, K)) + 3 * np.eye(K)
    return Dense(Q / Q.sum(axis=2, keepdims=True))


LAWS = {
    "uniform": (Uniform(5, BETA), 5),
    "uniform, to the end": (Uniform(5, rates.reciprocal(T)), 5),
    "uniform, few clean states": (Uniform(5, BETA), 3),
    "absorbing": (Absorbing(5, rates.reciprocal(T)), 4),
    "absorbing, not to the end": (Absorbing(5, BETA), 3),
    "absorbing, mask among the logits": (Absorbing(5, BETA, mask=1), 5),
    "gaussian": (DiscretizedGaussian(5, BETA / 5), 5),
    "gaussian, few clean states": (DiscretizedGaussian(5, BETA / 5), 3),
    "neighbours": (NearestNeighbour(neighbour_rates(np.random.default_rng(3).random((5, 2)), 2), BETA), 5),
    "dense": (random_law(5), 5),
    "dense, few clean states": (random_law(5), 4),
}


def batch(law, D, seed=0, samples=24, length=6):
    """(logits, x0, x_t, t) with every t in it."""
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, D, (samples, length))
    if getattr(law, "mask", D) < D:
        clean[clean == law.mask] = (law.mask + 1) % D
    t = 1 + np.arange(samples) % law.T
    return 2 * rng.standard_normal((samples, length, D)), clean, discrete.q_sample(clean, t, law, seed), t


def torch_loss(z, x0, x_t, t, law, lam):
    """The loss of each sample written down from the matrices, with nothing cancelled."""
    torch = pytest.importorskip("torch")
    D, mask, values = z.shape[-1], getattr(law, "mask", None), []
    if mask is not None and mask < D:
        z = z.masked_fill(torch.arange(D) == mask, -torch.inf)
    p = z.softmax(-1)
    for n, now in enumerate(t.tolist()):
        Q, Q_bar, Q_all = (torch.tensor(m) for m in (law.matrix(now), law.cumulative(now - 1), law.cumulative(now)))
        a = Q.T[torch.as_tensor(x_t[n]).long()]
        possible = (Q_all.T[torch.as_tensor(x_t[n]).long()] > 0)[:, :D]
        P, q = p[n] @ Q_bar[:D], Q_bar[torch.as_tensor(x0[n])]
        r = (a > 0) * P if now == 1 else a * P
        r, c = r / r.sum(-1, keepdim=True), a * q / (a * q).sum(-1, keepdim=True)
        term = torch.where(c > 0, c * (torch.where(c > 0, c, 1).log() - torch.where(c > 0, r, 1).log()), 0).sum(-1)
        kept = torch.where(possible, p[n], 0)
        ce = -(kept / kept.sum(-1, keepdim=True)).gather(-1, torch.as_tensor(x0[n])[:, None])[:, 0].log()
        values.append(law.T * (term + lam * ce).mean())
    return torch.stack(values)


@pytest.mark.parametrize("lam", [0.0, 0.3])
@pytest.mark.parametrize("name", LAWS)
def test_value_and_gradient_are_those_of_torch_on_the_matrices(name, lam):
    torch = pytest.importorskip("torch")
    law, D = LAWS[name]
    z, x0, x_t, t = batch(law, D)
    value, gradient = hybrid_loss(z, x0, x_t, t, law, lam)
    leaf = torch.tensor(z, requires_grad=True)
    wanted = torch_loss(leaf, x0, x_t, t, law, lam)
    wanted.mean().backward()
    np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("lam", [0.0, 0.3])
@pytest.mark.parametrize("name", LAWS)
def test_gradient_is_that_of_the_batch_mean(name, lam):
    law, D = LAWS[name]
    z, x0, x_t, t = batch(law, D)
    _, gradient = hybrid_loss(z, x0, x_t, t, law, lam)
    direction, h = np.random.default_rng(1).standard_normal(z.shape), 1e-5
    ends = [hybrid_loss(z + sign * h * direction, x0, x_t, t, law, lam)[0].mean() for sign in (1, -1)]
    assert np.sum(gradient * direction) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-7)


@pytest.mark.parametrize("name", LAWS)
def test_float32_is_as_good_as_its_logits(name):
    law, D = LAWS[name]
    z, x0, x_t, t = batch(law, D, samples=400)
    z = z.astype(np.float32)
    value, gradient = hybrid_loss(z, x0, x_t, t, law, 0.01)
    exact, slope = hybrid_loss(z.astype(np.float64), x0, x_t, t, law, 0.01)
    assert value.dtype == gradient.dtype == np.float32
    np.testing.assert_allclose(value, exact, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6 * np.abs(slope).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LAWS)
def test_certain_networks_give_finite_losses(name, dtype):
    """Logits so far apart that probabilities underflow: the loss is a distance of logits, its gradient at most its factor."""
    law, D = LAWS[name]
    z, x0, x_t, t = batch(law, D, samples=240)
    value, gradient = hybrid_loss((1e4 * z).astype(dtype), x0, x_t, t, law, 0.01)
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(gradient)) and value.max() > 100
    assert np.abs(gradient).max() <= law.T * 1.01 / x0.size * 1.001
    place, first, clean, noisy = np.arange(D), t == 1, x0[t == 1], x_t[t == 1]  # at t = 1 it is p̃ less x_0, though p̃(x_0) is 0
    allowed = z[first] if law.name != "absorbing" else np.where(place == law.mask, -np.inf, z[first])
    wrong = (allowed.argmax(axis=-1) != clean) & ((law.name != "absorbing") | (noisy == getattr(law, "mask", -1)))
    pulled = np.take_along_axis(gradient[first], clean[..., None], axis=-1)[..., 0][wrong]
    assert len(pulled)
    np.testing.assert_allclose(pulled, -law.T * 1.01 / x0.size, rtol=1e-6)


def test_the_closed_forms_are_those_of_the_matrices():
    for law, D in ((Uniform(5, BETA), 5), (Absorbing(5, rates.reciprocal(T)), 4)):
        dense = Dense(np.stack([np.eye(5), *(law.matrix(t) for t in range(1, T + 1))]), law.prior)
        z, x0, x_t, t = batch(law, D)
        for ours, theirs in zip(hybrid_loss(z, x0, x_t, t, law, 0.1), hybrid_loss(z, x0, x_t, t, dense, 0.1), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-14)
        s = t // 2
        np.testing.assert_allclose(step_kl(z, x0, x_t, t, law, s), step_kl(z, x0, x_t, t, dense, s), rtol=1e-10, atol=1e-14)


def test_the_absorbing_loss_is_a_weighted_cross_entropy_of_the_masked():
    """With β_t = 1/(T−t+1) the weight of T·L_t is T/t; what is not masked has no loss and no gradient."""
    law = Absorbing(5, rates.reciprocal(T))
    z, x0, x_t, t = batch(law, 4)
    value, gradient = hybrid_loss(z, x0, x_t, t, law)
    masked = x_t == law.mask
    assert 0.1 < masked.mean() < 0.9 and np.all(gradient[~masked] == 0)
    cross = -np.take_along_axis(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)), x0[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(value, T / t * (cross * masked).mean(axis=1), rtol=1e-12)
    mixed, _ = hybrid_loss(z, x0, x_t, t, law, 0.25)
    np.testing.assert_allclose(mixed, T * ((1 / t[:, None] + 0.25) * cross * masked).mean(axis=1), rtol=1e-12)


def test_the_mask_may_be_any_state():
    """A relabelling of the states changes nothing, nor does a logit for the mask."""
    last, first = Absorbing(5, BETA), Absorbing(5, BETA, mask=0)
    z, x0, x_t, t = batch(last, 4)
    moved = np.concatenate([np.full((*x0.shape, 1), 3.0), z], axis=-1)
    value, gradient = hybrid_loss(z, x0, x_t, t, last, 0.1)
    there, slope = hybrid_loss(moved, x0 + 1, (x_t + 1) % 5, t, first, 0.1)
    np.testing.assert_allclose(there, value, rtol=1e-13)
    np.testing.assert_allclose(slope[..., 1:], gradient, atol=1e-16)
    assert np.all(slope[..., 0] == 0)


@pytest.mark.parametrize("name", ["uniform", "dense"])
def test_the_term_is_zero_where_the_prediction_is_x0_and_only_there(name):
    law, D = LAWS[name]
    x0, x_t = (v.reshape(1, -1).repeat(T, 0) for v in np.indices((D, law.K)).reshape(2, -1))
    t = np.arange(1, T + 1)
    sure = np.where(np.arange(D) == x0[..., None], 0.0, -np.inf)
    np.testing.assert_allclose(step_kl(sure, x0, x_t, t, law), 0, atol=1e-13)
    for other in range(1, D):
        off = np.roll(np.where(np.arange(D) == x0[..., None], 0.0, -40.0), other, axis=-1)
        assert step_kl(off, x0, x_t, t, law).min() > 1e-4
    for scale in (1e-2, 1e-4):  # and quadratic near it: half the slope of a distance is none
        near = step_kl(np.where(np.arange(D) == x0[..., None], 0.0, np.log(scale)), x0, x_t, t, law)
        assert np.all(near[0] > 0.9 * scale) and np.all((near[1:] > 0) & (near[1:] < 30 * scale))


@pytest.mark.parametrize("name", LAWS)
def test_terms_are_never_negative(name):
    law, D = LAWS[name]
    z, x0, x_t, t = batch(law, D, samples=200)
    assert step_kl(z, x0, x_t, t, law).min() > -1e-14


def test_the_loss_is_the_term_and_its_cross_entropy():
    law, D = LAWS["dense"]
    z, x0, x_t, t = batch(law, D)
    terms = step_kl(z, x0, x_t, t, law)
    np.testing.assert_allclose(hybrid_loss(z, x0, x_t, t, law)[0], T * terms.mean(axis=1), rtol=1e-12)
    first = t == 1
    log_p = np.take_along_axis(discrete.reverse_from_x0(z, x_t, t, law), x0[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(terms[first], -log_p[first], rtol=1e-12)
    posterior = discrete.q_posterior(x0, x_t, t, law)
    reverse = discrete.reverse_from_x0(z, x_t, t, law)
    q = np.exp(posterior)[~first]
    np.testing.assert_allclose(terms[~first], (q * (posterior - reverse)[~first]).sum(axis=-1), rtol=1e-9, atol=1e-14)


def test_the_best_prediction_knows_the_other_letters_alone(words):
    """For t ≥ 2 the minimum of the expected loss is a letter's law given the others, not its posterior; at t = 1 it is that."""
    p = np.array([[0.4, 0.05, 0.05], [0.1, 0.15, 0.05], [0.02, 0.08, 0.1]])
    law = Uniform(3, BETA)
    oracle = words(p, law)
    x0, x_t = (v.repeat(n, axis=a) for v, n, a in ((oracle.words[:, None], 9, 1), (oracle.states[None], 9, 0)))
    x0, x_t = x0.reshape(-1, 2), x_t.reshape(-1, 2)
    for t, best in ((1, True), (4, True)):
        weight = (oracle.p[:, None] * oracle.noised(t)).reshape(-1, 1, 1)
        z = oracle.model(x_t, np.full(len(x_t), float(t)))
        _, gradient = hybrid_loss(z, x0, x_t, t, law)
        total = np.zeros((9, 2, 3))
        np.add.at(total, np.tile(np.arange(9), 9), weight * gradient)
        assert (np.abs(total).max() < 1e-15) == best
        wrong = z + np.log(law.cumulative(t).T[x_t] if t > 1 else 1 / law.cumulative(t).T[x_t])
        total[:] = 0
        np.add.at(total, np.tile(np.arange(9), 9), weight * hybrid_loss(wrong, x0, x_t, t, law)[1])
        assert np.abs(total).max() > 1e-5


def test_rows_are_the_reverse_step():
    rng = np.random.default_rng(2)
    for law, D in ((Uniform(4, BETA), 4), (Absorbing(4, BETA), 3)):
        z, x = rng.standard_normal((6, 1, D)), np.arange(4).repeat(2)[:6].reshape(6, 1)
        p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
        for s, t in ((0, 1), (3, 4), (0, T), (2, 7)):
            keep, spread, C, D_ = rows_of(law, s, t)
            if isinstance(law, Uniform):
                w = (keep * (np.arange(4) == x[..., None]) + spread) * (C * p + D_)
            else:
                w = np.where(
                    x[..., None] == 3, np.concatenate([C * p, np.full((6, 1, 1), D_)], axis=-1), np.arange(4) == x[..., None]
                )
            wanted = np.exp(discrete.reverse_from_x0(z, x, t, law, s))
            np.testing.assert_allclose(w / w.sum(axis=-1, keepdims=True), wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_nothing_is_lost_where_nothing_is_forgotten(lam):
    law = Uniform(4, [0.0, 0.0, 0.0, 0.3])
    z, x = np.random.default_rng(3).standard_normal((4, 1, 4)), np.arange(4)[:, None]
    for t in (1, 2):
        value, gradient = hybrid_loss(z, x, x, t, law, lam)
        np.testing.assert_array_equal(value, 0)
        np.testing.assert_array_equal(gradient, 0)
        keep, spread, C, D = rows_of(law, t - 1, t)
        w = np.exp(discrete.reverse_from_x0(z, x, t, law))
        np.testing.assert_allclose(w, (keep * np.eye(4)[x] + spread) * (C + D), rtol=1e-12)
    value, _ = hybrid_loss(z, x, x, 3, law, lam)
    assert (value > 0).all()


# -------------------------------------------------------------------------------------------------------------------- the door


def test_logits_of_another_byte_order():
    rng = np.random.default_rng(4)
    for law, D in ((Uniform(4, BETA), 4), (Absorbing(4, BETA), 3), (DiscretizedGaussian(4, BETA), 4)):
        z, x = rng.standard_normal((5, 3, D)), rng.integers(0, 3, (5, 3))
        x_t = discrete.q_sample(x, 3, law)
        wanted, found = hybrid_loss(z, x, x_t, 3, law), hybrid_loss(z.astype(">f8"), x.astype(">i4"), x_t, 3, law)
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_array_equal(a, b)
        pushed = discrete.reverse_from_x0(z.astype(">f8"), x_t, 3, law)
        np.testing.assert_array_equal(pushed, discrete.reverse_from_x0(z, x_t, 3, law))


def test_torch_tensors_are_answered_in_kind():
    torch = pytest.importorskip("torch")
    law, D = LAWS["uniform"]
    z, x0, x_t, t = batch(law, D)
    wanted = hybrid_loss(z, x0, x_t, t, law, 0.1)
    given = (torch.tensor(v) for v in (z, x0, np.asarray(x_t), t))
    for ours, theirs in zip(hybrid_loss(*given, law, 0.1), wanted, strict=True):
        assert isinstance(ours, torch.Tensor)
        np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("name", LAWS)
def test_arrays_on_a_device_meet_no_array_of_the_host(name, monkeypatch):
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    law, D = LAWS[name]
    z, x0, x_t, t = batch(law, D)
    wanted = (*hybrid_loss(z, x0, x_t, t, law, 0.1), step_kl(z, x0, x_t, t, law))
    given = [cupy.asarray(v) for v in (z, x0, x_t)]
    for times in (t, cupy.asarray(t)):
        for ours, theirs in zip((*hybrid_loss(*given, times, law, 0.1), step_kl(*given, times, law)), wanted, strict=True):
            assert isinstance(ours, fake_cupy.ndarray)
            np.testing.assert_array_equal(ours.get(), theirs)


def test_wrong_arguments_are_named():
    law, D = LAWS["uniform"]
    z, x0, x_t, t = batch(law, D)
    cases = [
        (TypeError, "logits must be float32 or float64", (z.astype(np.float16), x0, x_t, t, law)),
        (ValueError, "D in 1..5", (np.zeros((*x0.shape, 6)), x0, x_t, t, law)),
        (TypeError, "x0 must be", (z, x0 * 1.0, x_t, t, law)),
        (ValueError, "x0 must have shape", (z, x0[:, :2], x_t, t, law)),
        (ValueError, r"x_t must be in 0\.\.4", (z, x0, x_t + 5, t, law)),
        (ValueError, r"x0 must be in 0\.\.2", (z[..., :3], x0, x_t, t, law)),
        (ValueError, r"t must be in 1\.\.8", (z, x0, x_t, 0, law)),
        (ValueError, "t must be an int or have shape", (z, x0, x_t, t[:3], law)),
        (TypeError, "law must be", (z, x0, x_t, t, np.eye(5))),
        (ValueError, "cross_entropy must be", (z, x0, x_t, t, law, -1.0)),
        (ValueError, "must not be empty", (z[:0], x0[:0], x_t[:0], t[:0], law)),
    ]
    for error, match, arguments in cases:
        with pytest.raises(error, match=match):
            hybrid_loss(*arguments)
    with pytest.raises(ValueError, match="s must be below t"):
        step_kl(z, x0, x_t, 3, law, 3)


# ------------------------------------------------------------------------------------------------------------------------ times


def test_stratified_times_are_uniform_at_every_place():
    draws = np.stack([stratified_times(8, 20, seed=3, step=i) for i in range(4000)])
    assert draws.min() == 1 and draws.max() == 20
    for column in draws.T:
        counts = np.bincount(column, minlength=21)[1:]
        assert ((counts - 200) ** 2 / 200).sum() < 50  # chi-square of 19 degrees of freedom: 1 in 10 000


def test_stratified_times_fill_the_range():
    for n, T_ in ((40, 20), (7, 1000), (20, 20)):
        for step in range(20):
            counts = np.bincount(stratified_times(n, T_, step=step), minlength=T_ + 1)[1:]
            for parts in (1, 2, 4):
                if T_ % parts == 0:
                    assert np.ptp(counts.reshape(parts, -1).sum(axis=1)) <= 1
    assert stratified_times(0, 5).shape == (0,) and stratified_times(3, 1).tolist() == [1, 1, 1]
    np.testing.assert_array_equal(stratified_times(9, 50, 4, 7), stratified_times(9, 50, 4, 7))
    assert not np.array_equal(stratified_times(9, 50, 4, 7), stratified_times(9, 50, 4, 8))
    with pytest.raises(ValueError, match="T must be at least 1"):
        stratified_times(4, 0)


def test_stratified_times_have_the_smaller_variance():
    """Of the batch mean of a term that depends on t: unbiased, and for one that is linear n times smaller than by chance."""
    t = np.arange(1, 101)
    rng = np.random.default_rng(0)
    for f, share in ((t / 100, 1.2 / 16), (1 / t, 0.6)):
        means = np.array([f[stratified_times(16, 100, step=i) - 1].mean() for i in range(2000)])
        alone = f[rng.integers(0, 100, (2000, 16))].mean(axis=1)
        assert abs(means.mean() - f.mean()) < 4 * means.std() / np.sqrt(2000)
        assert means.var() < share * alone.var()
