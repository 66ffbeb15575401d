"""Diffusion-LM: losses and gradients by finite differences, rounding by brute force, laws of samples in closed form."""

import itertools
import math
import sys

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import diffusion_lm, diffusion_lm_sampler, forward, samplers, schedules, tables
from alphabar.core.chain import chain
from alphabar.core.diffusion_lm_sampler import Control
from tests import fake_cupy

S = schedules.sqrt(200)
EMBEDDING = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
LAW = np.array([[0.30, 0.05, 0.05], [0.02, 0.02, 0.26], [0.05, 0.20, 0.05]])  # P(w_1, w_2), far from independent


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is the oracle here")


class Words:
    """Two words of the law LAW, embedded with deviation sigma0: every posterior in closed form."""

    def __init__(self, s, sigma0=0.05):
        self.s, self.sigma0 = s, sigma0
        self.pairs = np.array(list(itertools.product(range(3), repeat=2)))  # (9, 2)
        self.vectors = EMBEDDING[self.pairs]  # (9, 2, 2)
        self.p = LAW.reshape(-1)

    def weights(self, x, t):
        """P(w|x_t) (B, 9)."""
        a, n = (v.reshape(-1, 1) for v in self.s.levels(t))
        d = ((x[:, None] - a[..., None, None] * self.vectors) ** 2).reshape(len(x), 9, -1).sum(axis=-1)
        log_w = np.log(self.p) - d / (2 * (a**2 * self.sigma0**2 + n**2))
        w = np.exp(log_w - log_w.max(axis=1, keepdims=True))
        return w / w.sum(axis=1, keepdims=True)

    def x0(self, x, t):
        """E[x_0|x_t] = Σ_w P(w|x_t)·E[x_0|x_t, w]."""
        a, n = (v.reshape(-1, 1, 1) for v in self.s.levels(t))
        mean = np.einsum("bk,kij->bij", self.weights(x, t), self.vectors)
        gain = a * self.sigma0**2 / (a**2 * self.sigma0**2 + n**2)
        return mean + gain * (x - a * mean)

    def log_prob_gradient(self, chosen):
        """∇_x log P(w ∈ chosen|x_t) as gradient(x, t); chosen (9,) booleans."""

        def gradient(x, t):
            a, n = (v.reshape(-1, 1, 1) for v in self.s.levels(t))
            w = self.weights(x, t)
            inside = np.where(chosen, w, 0)
            inside = inside / np.maximum(inside.sum(axis=1, keepdims=True), 1e-300)
            return np.einsum("bk,kij->bij", inside - w, self.vectors) * a / (a**2 * self.sigma0**2 + n**2)

        return gradient


WORDS = Words(S)
DDPM = tables.ddpm(S, prediction="x0")


def assert_law(words, p, significance=4.0):
    """The pairs of words have the law p (3, 3): χ² within so many deviations of its mean."""
    n = len(words)
    counts = np.zeros((3, 3))
    np.add.at(counts, (words[:, 0], words[:, 1]), 1)
    some = p > 0
    assert counts[~some].sum() == 0
    chi2, free = ((counts - n * p)[some] ** 2 / (n * p[some])).sum(), some.sum() - 1
    assert chi2 < free + significance * math.sqrt(2 * free), (chi2, counts / n)


def start(n, seed=0):
    return samplers.prior((n, 2, 2), seed=seed, dtype=np.float64)


# ------------------------------------------------------------------------------------------------------ embedding and rounding


def test_embeddings_have_the_mean_and_the_deviation_asked():
    w = np.random.default_rng(0).integers(0, 3, (5000, 2))
    x0, mean = diffusion_lm.embed(w, EMBEDDING, sigma0=0.1, seed=3, step=2)
    np.testing.assert_array_equal(mean, EMBEDDING[w])
    z = (x0 - mean) / 0.1
    assert abs(z.mean()) < 4 / math.sqrt(z.size) and abs(z.var() - 1) < 4 * math.sqrt(2 / z.size)
    for part in (slice(0, 7), slice(7, 5000)):
        again, _ = diffusion_lm.embed(w[part], EMBEDDING, sigma0=0.1, seed=3, step=2, first_sample=part.start)
        np.testing.assert_array_equal(again, x0[part])
    assert not np.array_equal(diffusion_lm.embed(w, EMBEDDING, 0.1, 3, 3)[0], x0)
    exact, _ = diffusion_lm.embed(w, EMBEDDING, sigma0=0)
    np.testing.assert_array_equal(exact, mean)
    x32, _ = diffusion_lm.embed(w, EMBEDDING.astype(np.float32))
    assert x32.dtype == np.float32 and np.abs(x32 - mean).max() < 1e-3
    _, eps = forward.q_sample(np.zeros_like(mean), 5, S, seed=3, step=2)
    assert abs(np.mean(z * eps)) < 4 / math.sqrt(z.size)  # noise of its own


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
def test_the_gradient_for_embeddings_is_that_of_torch(monkeypatch, block, torch):
    monkeypatch.setattr(diffusion_lm, "BLOCK", block)
    rng = np.random.default_rng(1)
    w, g = rng.integers(0, 5, (4, 6)), rng.standard_normal((4, 6, 3))
    table = torch.zeros((7, 3), dtype=torch.float64, requires_grad=True)
    torch.nn.functional.embedding(torch.tensor(w), table).backward(torch.tensor(g))
    np.testing.assert_allclose(diffusion_lm.embedding_gradient(g, w, 7), table.grad.numpy(), rtol=1e-12)


def test_rounding_by_brute_force(torch):
    rng = np.random.default_rng(2)
    x, table = rng.standard_normal((6, 5, 4)), rng.standard_normal((11, 4))
    distance = ((x[..., None, :] - table) ** 2).sum(axis=-1)
    nearest = distance.argmin(axis=-1)
    words = diffusion_lm.nearest_words(x, table)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(words, nearest)
    np.testing.assert_array_equal(diffusion_lm.clamp(x, table), table[nearest])
    logits = diffusion_lm.rounding_logits(x, table, sigma=0.7)
    softmax = torch.tensor(logits).softmax(-1).numpy()
    np.testing.assert_allclose(softmax, torch.tensor(-distance / (2 * 0.49)).softmax(-1).numpy(), rtol=1e-10)
    bias = rng.standard_normal(11)
    np.testing.assert_allclose(diffusion_lm.rounding_logits(x, table, bias), np.einsum("bld,kd->blk", x, table) + bias)
    np.testing.assert_allclose(diffusion_lm.rounding_logits(x, table), np.einsum("bld,kd->blk", x, table))
    np.testing.assert_array_equal(diffusion_lm.nearest_words(np.zeros((1, 1, 4)), np.ones((3, 4))), [[0]])  # a tie


# ------------------------------------------------------------------------------------------------------------------------ losses


def difference(f, x, h=1e-6):
    """The gradient of the batch mean of f at x, by central differences."""
    g, flat = np.empty_like(x), x.reshape(-1)
    for i in range(x.size):
        kept = flat[i]
        flat[i] = kept + h
        high = f().mean()
        flat[i] = kept - h
        g.reshape(-1)[i] = (high - f().mean()) / (2 * h)
        flat[i] = kept
    return g


@pytest.fixture
def batch():
    rng = np.random.default_rng(4)
    w = rng.integers(0, 5, (4, 3))
    output, x0, mean = rng.standard_normal((3, 4, 3, 2))
    return {
        "output": output,
        "x0": x0,
        "mean": mean,
        "logits": rng.standard_normal((4, 3, 5)),
        "w": w,
        "t": np.array([1, 2, 7, 1]),
    }


def test_the_terms_are_the_papers(batch, torch):
    loss = diffusion_lm.end_to_end_loss(**batch, s=S)
    output, x0, mean, logits, w, t = batch.values()
    target = np.where((t == 1)[:, None, None], mean, x0)
    np.testing.assert_allclose(loss.denoising, ((output - target) ** 2).mean(axis=(1, 2)), rtol=1e-12)
    ce = torch.nn.functional.cross_entropy(torch.tensor(logits).reshape(-1, 5), torch.tensor(w).reshape(-1), reduction="none")
    np.testing.assert_allclose(loss.rounding, ce.numpy().reshape(4, 3).mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(loss.prior, S.alpha_bar[-1] * (x0**2).mean(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(loss.value, loss.denoising + loss.rounding + loss.prior, rtol=1e-12)
    big, scaled = schedules.linear(1000), loss.prior / S.alpha_bar[-1]
    np.testing.assert_allclose(diffusion_lm.prior_loss(x0, big)[0], big.alpha_bar[-1] * scaled, rtol=1e-12)


@pytest.mark.parametrize("weight", [None, 0.3, np.array([0.5, 2.0, 1.0, 0.1])])
def test_gradients_by_finite_differences(batch, weight):
    s = schedules.Schedule(np.r_[0.0, np.full(10, 0.05)]) if weight is None else S
    loss = diffusion_lm.end_to_end_loss(**batch, s=s, weight=weight)
    for name in ("output", "x0", "mean", "logits"):
        want = difference(lambda: diffusion_lm.end_to_end_loss(**batch, s=s, weight=weight).value, batch[name])
        np.testing.assert_allclose(getattr(loss, name), want, atol=1e-9, err_msg=name)
    for t in (1, 5):
        one = diffusion_lm.denoising_loss(batch["output"], batch["x0"], batch["mean"], t, weight)
        many = diffusion_lm.denoising_loss(batch["output"], batch["x0"], batch["mean"], np.full(4, t), weight)
        for a, b in zip(one, many, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_mean_of_the_posterior_at_one_is_the_prediction():  # why the term at t = 1 is ‖Emb(w) − x̂_0‖²
    x, output = np.random.default_rng(0).standard_normal((2, 3, 4))
    mean, var = forward.p_mean_variance(output, x, 1, S, prediction="x0")
    np.testing.assert_allclose(mean, output, rtol=1e-12, atol=1e-12)
    assert var == 0


def test_training_end_to_end_with_torch_gives_the_same_gradient(torch):
    """A linear network trained by autograd, against the chain rule that the docstring tells."""
    rng = np.random.default_rng(5)
    w, t = rng.integers(0, 5, (4, 3)), np.array([1, 9, 60, 200])
    table, matrix, rounding = rng.standard_normal((5, 2)), rng.standard_normal((2, 2)), rng.standard_normal((5, 2))
    x0, mean = diffusion_lm.embed(w, table, sigma0=0.2)
    x_t, eps = forward.q_sample(x0, t, S)
    loss = diffusion_lm.end_to_end_loss(x_t @ matrix, x0, mean, x0 @ rounding.T, w, t, S)
    d_x_t = loss.output @ matrix.T
    d_x0 = loss.x0 + loss.logits @ rounding + S.signal[t][:, None, None] * d_x_t
    ours = diffusion_lm.embedding_gradient(d_x0 + loss.mean, w, 5)

    e = torch.tensor(table, requires_grad=True)
    m = torch.nn.functional.embedding(torch.tensor(w), e)
    x = m + torch.tensor(x0 - mean)
    a, n = (torch.tensor(v[t])[:, None, None] for v in (S.signal, S.noise))
    output = (a * x + n * torch.tensor(eps)) @ torch.tensor(matrix)
    target = torch.where(torch.tensor(t == 1)[:, None, None], m, x)
    ce = torch.nn.functional.cross_entropy((x @ torch.tensor(rounding).T).reshape(-1, 5), torch.tensor(w).reshape(-1))
    total = ((output - target) ** 2).mean() + float(S.alpha_bar[-1]) * (x**2).mean() + ce
    total.backward()
    assert total.item() == pytest.approx(loss.value.mean(), rel=1e-12)
    np.testing.assert_allclose(ours, e.grad.numpy(), rtol=1e-10, atol=1e-14)


def test_arrays_of_a_gpu_stay_there(batch, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.cupy)
    w, t = batch["w"] % 3, batch["t"]
    known, mask, x = w[:, :2], np.array([False, True]), start(4)
    table = tables.ddpm(S, 8, prediction="x0")
    control = Control(lambda x, t: x * -0.5)

    def gradients(f):
        return diffusion_lm.end_to_end_loss(**{k: f(v) for k, v in batch.items()}, s=S)

    def samples(f, **options):
        given = f(known), f(mask)
        return diffusion_lm_sampler.sample(
            lambda x, t: x * 0.9, table, f(x), f(EMBEDDING), known=given, clamp_below=90, **options
        )

    calls = [
        gradients,
        lambda f: diffusion_lm.denoising_loss(f(batch["output"]), f(batch["x0"]), f(batch["mean"]), f(t)),
        lambda f: diffusion_lm.denoising_loss(f(batch["output"]), f(batch["x0"]), f(batch["mean"]), 1),
        lambda f: diffusion_lm.embed(f(w), f(EMBEDDING), 0.1),
        lambda f: (diffusion_lm.embedding_gradient(f(batch["x0"]), f(w), 3),),
        lambda f: (diffusion_lm.rounding_logits(f(x), f(EMBEDDING), sigma=0.5),),
        lambda f: samples(f, control=control),
        lambda f: samples(f, resample=2, jump=2),
        lambda f: samples(f, logits=lambda x: x @ f(EMBEDDING.T)),
    ]
    with kernels.use("reference"):
        for call in calls:
            for got, want in zip(call(fake_cupy.cupy.asarray), call(np.asarray), strict=True):
                assert isinstance(got, fake_cupy.ndarray)
                np.testing.assert_allclose(got.get(), want, rtol=1e-12)


def test_losses_take_torch_arrays_and_keep_float32(batch, torch):
    given = {k: torch.tensor(v, dtype=torch.float32 if v.dtype.kind == "f" else None) for k, v in batch.items()}
    loss = diffusion_lm.end_to_end_loss(**given, s=S)
    assert all(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in loss)
    np.testing.assert_allclose(loss.value, diffusion_lm.end_to_end_loss(**batch, s=S).value, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- laws of samples


def test_the_exact_denoiser_gives_the_law_of_the_words():
    words, x0 = diffusion_lm_sampler.sample(WORDS.x0, DDPM, start(6000), EMBEDDING)
    assert_law(words, LAW)
    assert words.dtype == np.int32 and np.abs(x0 - EMBEDDING[words]).max() < 0.5


def test_samples_do_not_depend_on_the_batch():
    control = Control(WORDS.log_prob_gradient(WORDS.pairs[:, 0] == 1))
    known = np.array([[2, 0]] * 12), np.array([False, True])
    options = {"control": control, "clamp_below": 50, "seed": 4}
    table = tables.ddpm(S, 20, prediction="x0")
    whole, _ = diffusion_lm_sampler.sample(WORDS.x0, table, start(12), EMBEDDING, known=known, **options)
    parts = [
        diffusion_lm_sampler.sample(
            WORDS.x0, table, start(12)[k : k + 4], EMBEDDING, known=(known[0][k : k + 4], known[1]), first_sample=k, **options
        )[0]
        for k in (0, 4, 8)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_samples_of_torch_arrays_are_those_of_numpy(torch):
    x_T, known = start(6), (np.array([[2, 0]] * 6), np.array([False, True]))
    control = Control(lambda x, t: -x / (1 + t.reshape(-1, 1, 1)))
    for resample in (1, 2):
        options = {"known": known, "clamp_below": 60, "resample": resample, "control": control if resample == 1 else None}
        table = tables.ddpm(S, 20, prediction="x0")
        want = diffusion_lm_sampler.sample(lambda x, t: 0.9 * x, table, x_T, EMBEDDING, **options)
        options["known"] = tuple(map(torch.tensor, known))
        got = diffusion_lm_sampler.sample(lambda x, t: 0.9 * x, table, torch.tensor(x_T), torch.tensor(EMBEDDING), **options)
        assert all(isinstance(v, torch.Tensor) for v in got) and got[0].dtype == torch.int32
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-12)


def test_clamped_samples_are_embeddings():
    words, x0 = diffusion_lm_sampler.sample(WORDS.x0, DDPM, start(50), EMBEDDING, clamp_below=math.inf)
    np.testing.assert_array_equal(x0, EMBEDDING[words])
    hook = diffusion_lm_sampler.clamping(EMBEDDING, t_max=10)
    x = np.random.default_rng(0).standard_normal((3, 2, 2))
    assert hook(x, np.full(3, 11)) is x
    np.testing.assert_array_equal(hook(x, np.full(3, 10)), diffusion_lm.clamp(x, EMBEDDING))


def test_clamping_mends_a_poor_network():
    """A network that sees x_0 off by noise: clamped late, its samples stand on embeddings and the law stays."""

    def poor(x, t):
        return 0.8 * WORDS.x0(x, t)

    loose, far = diffusion_lm_sampler.sample(poor, DDPM, start(300), EMBEDDING)
    words, near = diffusion_lm_sampler.sample(poor, DDPM, start(300), EMBEDDING, clamp_below=60)
    assert np.abs(near - EMBEDDING[words]).max() == 0 < 0.3 < np.abs(far - EMBEDDING[loose]).max()


def test_the_x0_of_the_sampler_is_what_the_step_goes_by():
    s, x_T = schedules.linear(), np.random.default_rng(0).standard_normal((3, 4))
    target = np.linspace(-1, 1, 12).reshape(3, 4)
    told = []

    def x0(prediction, t):
        told.append((prediction, t))
        return target

    for table in (tables.ddim(s, 10), tables.ddpm(s, 10), tables.dpm_solver_pp(s, 10)):
        told.clear()
        np.testing.assert_allclose(samplers.sample(lambda x, t: 0 * x, table, x_T, x0=x0), target, atol=1e-12)
        np.testing.assert_allclose(told[0][0], x_T / s.levels(table.t[0])[0], rtol=1e-12)  # ε = 0
        assert told[0][1].shape == (3,) and told[0][1][0] == table.t[0] and len(told) == table.evaluations
    plain = tables.ddpm(s, 20)
    clipped = samplers.sample(lambda x, t: 0.9 * x, plain, x_T, seed=1, clip=(-1, 1))
    by_hook = samplers.sample(lambda x, t: 0.9 * x, plain, x_T, seed=1, x0=lambda p, t: p.clip(-1, 1))
    np.testing.assert_allclose(by_hook, clipped, rtol=1e-10)
    same = samplers.sample(lambda x, t: 0.9 * x, plain, x_T, seed=1, x0=lambda p, t: p)
    np.testing.assert_allclose(same, samplers.sample(lambda x, t: 0.9 * x, plain, x_T, seed=1), rtol=1e-9)
    guided = [
        samplers.sample(lambda x, t: 0.9 * x, plain, x_T, guidance=lambda x, t: 1 - x, **k) for k in ({}, {"x0": lambda p, t: p})
    ]
    np.testing.assert_allclose(*guided, rtol=1e-9)
    bound_to = samplers.sample(lambda x, t: x, plain, x_T, guidance=lambda x, t: 1 - x, x0=lambda p, t: target)
    np.testing.assert_allclose(bound_to, target, atol=1e-12)  # guided first
    with pytest.raises(ValueError, match="rederive_eps must be True"):
        samplers.sample(lambda x, t: x, plain, x_T, x0=x0, rederive_eps=False)
    with pytest.raises(ValueError, match="x0 must return floats of shape"):
        samplers.sample(lambda x, t: x, plain, x_T, x0=lambda p, t: p[:1])


def test_infilling_gives_what_is_known_and_the_rest_its_law():
    """Words that are independent: replacement is then exact, and the free one keeps its law."""
    p = np.outer([0.5, 0.3, 0.2], [0.2, 0.2, 0.6])
    alone = Words(S)
    alone.p = p.reshape(-1)
    known = np.tile([7, 1], (4000, 1)), np.array([False, True])  # what the mask leaves out is not read
    words, _ = diffusion_lm_sampler.sample(alone.x0, DDPM, start(4000), EMBEDDING, known=known)
    assert np.all(words[:, 1] == 1)
    assert_law(words, np.stack([np.zeros(3), p.sum(axis=1), np.zeros(3)], axis=1))


def test_what_is_known_has_the_law_of_the_forward_process():
    w, mask, x = np.tile([1, 2, 0], (3000, 1)), np.array([True, False, True]), np.full((3000, 3, 2), 7.0)
    for i in (0, 100, 199):
        got = diffusion_lm_sampler.infilling(w, mask, EMBEDDING, DDPM, seed=3)(x, i)
        np.testing.assert_array_equal(got[:, 1], 7)
        z = (got - DDPM.signal[i] * EMBEDDING[w])[:, mask] / DDPM.noise[i]
        assert abs(z.mean()) < 4 / math.sqrt(z.size) and abs(z.var() - 1) < 4 * math.sqrt(2 / z.size)
        part = diffusion_lm_sampler.infilling(w[5:9], mask, EMBEDDING, DDPM, seed=3, first_sample=5)(x[5:9], i)
        np.testing.assert_array_equal(part, got[5:9])


def test_resampling_brings_dependent_words_near_their_conditional_law():
    known, want = (np.full((1200, 2), 2), np.array([False, True])), LAW[:, 2] / LAW[:, 2].sum()
    table, off = tables.ddpm(S, 40, prediction="x0"), []
    for resample in (1, 10):
        words, x0 = diffusion_lm_sampler.sample(WORDS.x0, table, start(1200), EMBEDDING, known=known, resample=resample, jump=2)
        off.append(np.abs(np.bincount(words[:, 0], minlength=3) / 1200 - want).max())
        assert np.all(words[:, 1] == 2) and words.dtype == np.int32
    assert off[1] < 0.08 < 0.15 < off[0] < np.abs(LAW.sum(axis=1) - want).max()
    clamped, x0 = diffusion_lm_sampler.sample(
        WORDS.x0, table, start(20), EMBEDDING, known=(known[0][:20], known[1]), resample=2, clamp_below=math.inf
    )
    np.testing.assert_array_equal(x0, EMBEDDING[clamped])


# ----------------------------------------------------------------------------------------------------------------------- control


def test_gradient_steps_reach_the_mode_in_the_closed_form():
    """log p(x|x_t) + log N(y; x, τ²) of Gaussians: "sgd" closes in on the mode by a constant factor."""
    rng = np.random.default_rng(6)
    x, mean, y = rng.standard_normal((3, 4, 5))
    variance, tau2, fluency, rate = 0.3, 0.5, 0.7, 0.2
    mode = (fluency * mean / variance + y / tau2) / (fluency / variance + 1 / tau2)
    for steps in (0, 1, 3, 400):
        got = diffusion_lm_sampler.control_step(x, mean, variance, lambda v: (y - v) / tau2, fluency, steps, rate, "sgd")
        factor = (1 - rate * variance * (fluency / variance + 1 / tau2)) ** steps
        np.testing.assert_allclose(got, mode + factor * (x - mode), rtol=1e-10, atol=1e-12)


def test_adagrad_is_that_of_torch(torch):
    rng = np.random.default_rng(7)
    x, mean, y = rng.standard_normal((3, 4, 5))
    variance, fluency, rate = 0.3, 0.01, 0.1
    got = diffusion_lm_sampler.control_step(x, mean, variance, lambda v: np.tanh(y - v), fluency, 4, rate)
    v = torch.tensor(x, requires_grad=True)
    optimizer = torch.optim.Adagrad([v], lr=rate, eps=1e-10)
    for _ in range(4):
        optimizer.zero_grad()
        down = torch.log(torch.cosh(torch.tensor(y) - v)).sum() + fluency * ((torch.tensor(mean) - v) ** 2 / (2 * variance)).sum()
        down.backward()
        optimizer.step()
    np.testing.assert_allclose(got, v.detach().numpy(), rtol=1e-9)


def test_controlled_gaussian_data_have_the_posterior():
    """x_0 ~ N(0, 1), c = (x_0 + τ·noise = y): with one step of "sgd" of rate 1 samples are of p(x_0|c)."""
    s, y, tau2 = schedules.linear(250, rescale=True), 1.5, 0.25
    table = tables.ddpm(s, prediction="x0")

    def x0(x, t):
        a, n = (v.reshape(-1, 1) for v in s.levels(t))
        return a * x / (a**2 + n**2)

    def gradient(x, t):  # p(c|x_t) = N(y; E[x_0|x_t], Var[x_0|x_t] + τ²)
        a, n = (v.reshape(-1, 1) for v in s.levels(t))
        gain = a / (a**2 + n**2)
        return (y - gain * x) * gain / (n**2 / (a**2 + n**2) + tau2)

    hook = diffusion_lm_sampler.controlling(Control(gradient, 0.0, 1, 1.0, "sgd"), table, seed=2)
    x = samplers.sample(x0, table, samplers.prior((100, 100), seed=2, dtype=np.float64), seed=2, before=hook)
    mean, var = y / (1 + tau2), tau2 / (1 + tau2)
    assert x.mean() == pytest.approx(mean, abs=0.03) and x.var() == pytest.approx(var, rel=0.06)
    free = samplers.sample(x0, table, samplers.prior((100, 100), seed=2, dtype=np.float64), seed=2)
    assert free.mean() == pytest.approx(0, abs=0.04) and free.var() == pytest.approx(1, rel=0.06)


def test_the_mean_that_control_sees_is_that_of_the_step():
    """With steps that pull to the mean alone, fluency·rate = 1, what is left of each state is the mean of its step."""
    s = schedules.linear(50, rescale=True)
    table = tables.ddpm(s, prediction="x0")
    x_T = np.random.default_rng(8).standard_normal((3, 4))
    hook = diffusion_lm_sampler.controlling(Control(lambda x, t: 0 * x, 1.0, 1, 1.0, "sgd"), table, seed=5)
    got = samplers.sample(lambda x, t: np.tanh(x), table, x_T, seed=5, before=hook)
    want = samplers.sample(lambda x, t: np.tanh(x), table, x_T, noise=np.zeros((50, 3, 4)))
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


SAME = WORDS.pairs[:, 0] == WORDS.pairs[:, 1]  # the same word twice: 0.37 of the law


def test_control_samples_the_law_given_the_property():
    """One step of "sgd" of rate 1 without the fluency term, which the step already has: P(w|c)."""
    control = Control(WORDS.log_prob_gradient(SAME), 0.0, 1, 1.0, "sgd")
    words, _ = diffusion_lm_sampler.sample(WORDS.x0, DDPM, start(1500), EMBEDDING, control=control)
    assert_law(words, np.diag(np.diag(LAW)) / np.trace(LAW))


def test_the_papers_control_makes_the_property_certain_and_prefers_likely_words():
    control = Control(WORDS.log_prob_gradient(SAME), rate=0.02)
    words, _ = diffusion_lm_sampler.sample(WORDS.x0, DDPM, start(400), EMBEDDING, control=control)
    counts = np.bincount(words[:, 0], minlength=3)
    assert np.mean(words[:, 0] == words[:, 1]) > 0.99
    assert counts[0] / 400 > LAW[0, 0] / np.trace(LAW) + 0.1  # three ascents a level go to the mode: the law is not P(w|c)


def test_control_leaves_alone_what_it_is_told_to():
    table = tables.ddpm(S, 20, prediction="x0")
    free = samplers.sample(WORDS.x0, table, start(5), seed=1)
    told = []

    def gradient(x, t):
        told.append(int(t[0]))
        return 0 * x + 1

    for control, want in ((Control(gradient, steps=0), []), (Control(gradient, steps=1, t_min=math.inf), [])):
        hook = diffusion_lm_sampler.controlling(control, table, seed=1)
        np.testing.assert_array_equal(samplers.sample(WORDS.x0, table, start(5), seed=1, before=hook), free)
        assert told == want
    hook = diffusion_lm_sampler.controlling(Control(gradient, steps=1, t_min=100), table, seed=1)
    samplers.sample(WORDS.x0, table, start(5), seed=1, before=hook)
    assert told == [t for t in table.times[1:] if t >= 100]


# ------------------------------------------------------------------------------------------------------------------------- bound


def test_the_bound_on_words_holds_and_is_near():
    n, sigma0 = 400, 0.3
    words = Words(S, sigma0)
    rng = np.random.default_rng(9)
    w = words.pairs[rng.choice(9, n, p=words.p)]
    a2, n2 = float(S.alpha_bar[1]), float(S.noise_variance[1])
    c = chain(S, prediction="x0", decoder_variance=sigma0**2 * n2 / (sigma0**2 * a2 + n2))  # Var[x_0|x_1, w]
    nats = diffusion_lm.word_bound(words.x0, w, EMBEDDING, c, sigma0, draws=2)
    exact = -np.log(LAW[w[:, 0], w[:, 1]])
    gap = nats - exact
    error = gap.std() / math.sqrt(n)
    assert nats.shape == (n,) and gap.mean() > -4 * error
    assert gap.mean() < 0.5, (gap.mean(), error)
    worse = diffusion_lm.word_bound(lambda x, t: 0.5 * words.x0(x, t), w, EMBEDDING, c, sigma0)
    assert worse.mean() > nats.mean() + 1
    rounding = lambda x: diffusion_lm.rounding_logits(x, EMBEDDING, sigma=sigma0)  # noqa: E731
    same = diffusion_lm.word_bound(words.x0, w[:5], EMBEDDING, c, sigma0, rounding, draws=2)
    np.testing.assert_allclose(same, nats[:5], rtol=1e-10)
    sure, unsure = (
        diffusion_lm.word_bound(words.x0, w[:5], EMBEDDING, c, sigma0, lambda x, k=k: k * rounding(x)) for k in (1e6, 0)
    )
    np.testing.assert_allclose(unsure - sure, 2 * math.log(3), rtol=1e-9)  # two words of three, each guessed


# ----------------------------------------------------------------------------------------------------------------------- errors


def test_arguments_out_of_range(batch):
    x = np.zeros((2, 2, 2))
    w = np.zeros((2, 2), np.int64)
    storing, still = tables.dpm_solver_pp(S, 10, prediction="x0"), tables.ddim(S, 10, prediction="x0")
    eps, lm, sampler = tables.ddpm(S), diffusion_lm, diffusion_lm_sampler
    gradient = lambda v, t=None: 0 * v  # noqa: E731
    for wrong, why in (
        (lambda: lm.embed(w, EMBEDDING, sigma0=-1), "sigma0"),
        (lambda: lm.embed(w + 3, EMBEDDING), r"w must be in 0\.\.2"),
        (lambda: lm.embed(w, EMBEDDING[0]), "embedding must be"),
        (lambda: lm.embedding_gradient(x, w[:1], 3), "gradient must have shape"),
        (lambda: lm.rounding_logits(x, EMBEDDING, EMBEDDING[:, 0], 1.0), "bias goes without sigma"),
        (lambda: lm.rounding_logits(x, EMBEDDING, sigma=0.0), "sigma must be positive"),
        (lambda: lm.rounding_loss(x, w[:1]), "w must have the shape"),
        (lambda: lm.rounding_loss(x[:0], w[:0]), "not empty"),
        (lambda: lm.rounding_loss(x, w + 2), r"w must be in 0\.\.1"),
        (lambda: lm.denoising_loss(x, x, x[:1], 1), "mean is"),
        (lambda: lm.denoising_loss(x, x, x, 0), "t must be in 1"),
        (lambda: lm.denoising_loss(x, x, x, np.array([1, 0])), "t must be in 1"),
        (lambda: lm.denoising_loss(x[:1], x, x, 1), "output has shape"),
        (lambda: lm.prior_loss(x[:0], S), "not empty"),
        (lambda: lm.word_bound(WORDS.x0, w, EMBEDDING, chain(S, prediction="x0"), 0.0), "sigma0"),
        (lambda: Control(gradient, method="adam"), "method"),
        (lambda: Control(gradient, rate=-1), "rate"),
        (lambda: Control(gradient, fluency=math.nan), "fluency"),
        (lambda: Control(gradient, steps=-1), "steps"),
        (lambda: sampler.control_step(x, x, 0.0, gradient), "variance"),
        (lambda: sampler.control_step(x, x[:1], 1.0, gradient), "mean is"),
        (lambda: sampler.control_step(x, x, 1.0, lambda v: v[:1]), "gradient must return"),
        (lambda: sampler.controlling(Control(gradient), storing), "store outputs"),
        (lambda: sampler.controlling(Control(gradient), still), "must have noise"),
        (lambda: sampler.infilling(w, w == 0, EMBEDDING, storing), "store outputs"),
        (lambda: sampler.infilling(w, w, EMBEDDING, DDPM), "mask"),
        (lambda: sampler.infilling(w, np.ones(3, bool), EMBEDDING, DDPM), "mask"),
        (lambda: sampler.infilling(w + 5, w == 0, EMBEDDING, DDPM), r"w must be in 0\.\.2"),
        (
            lambda: sampler.sample(WORDS.x0, DDPM, x, EMBEDDING, Control(gradient), (w, w == 0), resample=2),
            "resample must be 1 with",
        ),
        (lambda: sampler.sample(WORDS.x0, eps, x, EMBEDDING, None, (w, w == 0), 2, clamp_below=9.0), "resample must be 1 where"),
        (lambda: sampler.sample(WORDS.x0, DDPM, x, EMBEDDING, known=(w[:1], w[:1] == 0)), "known must be the words"),
    ):
        with pytest.raises(ValueError, match=why):
            wrong()
    for odd, why in (
        (lambda: lm.embed(w * 1.0, EMBEDDING), "w must be an integer array"),
        (lambda: lm.embed(w, EMBEDDING.astype(int)), "embedding"),
        (lambda: lm.end_to_end_loss(**batch, s=3), "s must be"),
        (lambda: sampler.controlling(Control(gradient), 3), "table"),
    ):
        with pytest.raises(TypeError, match=why):
            odd()


def test_what_does_not_go_together_is_named():
    rng, s = np.random.default_rng(0), schedules.sqrt(10)
    table, w = rng.normal(size=(6, 4)), rng.integers(0, 6, (3, 5))
    x, scores = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 6))
    run = tables.ddpm(s, 10, prediction="x0")

    def words(logits):
        return diffusion_lm_sampler.sample(lambda x, t: 0.5 * x, run, x, table, logits=logits)

    for call, message in (
        (lambda: diffusion_lm.rounding_logits(x, table.tolist()), "embedding must be a float array"),
        (lambda: diffusion_lm.rounding_logits(x, table[:, :3]), "embedding must be"),
        (lambda: diffusion_lm.rounding_loss(scores, w.tolist()), "w must be"),
        (lambda: diffusion_lm.nearest_words(x, table.tolist()), "codebook must be a float array"),
        (lambda: diffusion_lm.end_to_end_loss(x, x, x, scores, w, 11, s), "t must be in 1..10"),
        (lambda: words(lambda x: 5), "what logits returns must be a float array"),
        (lambda: words(lambda x: x[0]), "logits must return shape"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
