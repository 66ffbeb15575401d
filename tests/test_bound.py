"""The variational bound: every term against its closed form, the two forms path by path, and the likelihood that it bounds."""

import sys

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import bound, data, forward, losses, schedules
from alphabar.core.chain import chain
from alphabar.core.decoder import gaussian_log_prob
from alphabar.core.mixture import GaussianMixture
from alphabar.core.sde import VESDE, VPSDE, SubVPSDE
from tests import fake_cupy

PROCESSES = {
    "schedule": schedules.linear(50, rescale=True),
    "ladder": schedules.geometric(0.02, 20, 40),
    "vpsde": VPSDE(),
    "subvpsde": SubVPSDE(T=1000.0),
    "vesde": VESDE(0.02, 20),
}
CHAINS = {
    "full": (PROCESSES["schedule"], {}),
    "beta": (PROCESSES["schedule"], {"variance": "beta"}),
    "S = 7, eta = 0.4": (PROCESSES["schedule"], {"steps": 7, "eta": 0.4}),
    "wide p, narrow q": (PROCESSES["schedule"], {"steps": 10, "eta": 0.5, "variance": "beta", "spacing": "trailing"}),
    "clipped": (PROCESSES["schedule"], {"decoder_variance": "clipped"}),
    "given": (PROCESSES["schedule"], {"grid": [1, 20, 50], "variance": np.array([0.2, 0.3]), "decoder_variance": 0.05}),
    "ladder": (PROCESSES["ladder"], {"eta": 0.7}),
    "ladder, beta": (PROCESSES["ladder"], {"variance": "beta", "steps": 13}),
    "vpsde": (PROCESSES["vpsde"], {"steps": 20}),
    "subvpsde": (PROCESSES["subvpsde"], {"steps": 20, "variance": "beta"}),
    "vesde": (PROCESSES["vesde"], {"steps": 20, "eta": 0.9, "spacing": "quadratic"}),
}


def of_gaussian(c, mean, var):
    """E over x_0 ~ N(mean, var) and x_t of every term (S+1,) of one element under the exact model, which leaves Var(x_0|x_i)."""
    a, n = c.signal, c.noise
    rest = var * n**2 / (a**2 * var + n**2)
    r = c.q_variance[2:] / c.p_variance[2:]
    kl = 0.5 * (c.on_x0[2:] ** 2 * rest[2:] / c.p_variance[2:] + r - 1 - np.log(r))
    decoder = 0.5 * (np.log(2 * np.pi * c.p_variance[1]) + rest[1] / c.p_variance[1])
    p = c.levels.prior_std**2
    prior = 0.5 * ((a[-1] ** 2 * (var + mean**2) + n[-1] ** 2) / p - 1 - np.log(n[-1] ** 2 / p))
    return np.r_[decoder, kl, prior]


def entropy(var):
    return 0.5 * np.log(2 * np.pi * np.e * var)


# ------------------------------------------------------------------------------------------------------------------ the chains


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.05])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_kernels_keep_the_marginals(name, eta):
    c = chain(PROCESSES[name], 30, eta)
    to, i = np.arange(30), np.arange(1, 31)
    np.testing.assert_allclose(c.on_x0[i] + c.on_x[i] * c.signal[i], c.signal[to], atol=1e-13)
    scale = np.maximum(1, c.noise[to] ** 2)
    np.testing.assert_allclose(((c.on_x[i] * c.noise[i]) ** 2 + c.q_variance[i]) / scale, c.noise[to] ** 2 / scale, atol=1e-13)
    for k in (2, 17, 30):  # the forward kernel carries q(x_{k−1}|x_0) to q(x_k|x_0)
        (at_0, var), (at_1, _) = c.forward_kernel(0.0, 1.0, k), c.forward_kernel(1.0, c.signal[k - 1], k)
        assert at_1 == pytest.approx(c.signal[k], rel=1e-12)
        assert at_0**2 * c.noise[k - 1] ** 2 + var == pytest.approx(c.noise[k] ** 2, rel=1e-12)
        if eta == 1:
            assert at_0 == pytest.approx(c.signal[k] / c.signal[k - 1], rel=1e-12)
            assert var == pytest.approx(c.step_variance[k], rel=1e-10)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_full_chain_is_that_of_the_forward_process(linear, eta):
    c, k = chain(linear, eta=eta), np.arange(2, 1001)
    np.testing.assert_allclose(c.gamma[2:], losses.ddim_loss_weight(k, linear, eta), rtol=1e-10)
    np.testing.assert_allclose(c.q_variance[2:], eta**2 * linear.beta_tilde[2:], rtol=1e-10)
    for t in (2, 500, 1000):
        x0, x = np.array([0.7]), np.array([-1.1])
        mean, var = forward.ddim_posterior(x0, x, t, t - 1, linear, np.sqrt(c.q_variance[t]))
        assert c.mean(x0, x, t) == pytest.approx(mean, rel=1e-9) and c.q_variance[t] == pytest.approx(var)
        if eta == 1:
            assert c.mean(x0, x, t) == pytest.approx(forward.q_posterior(x0, x, t, linear)[0], rel=1e-9)
    assert c.gamma[1] == pytest.approx((1 - linear.alpha_bar[1]) / (2 * c.p_variance[1] * linear.alpha_bar[1]), rel=1e-10)


@pytest.mark.parametrize("name", PROCESSES)
def test_gamma_of_any_levels(name):
    """(n²/(2σ²a²))·(a_to − a·√((n_to² − σ²)/n²))², as the theorem has it."""
    c = chain(PROCESSES[name], 12, 0.6)
    a, n, a_to, n_to, var = c.signal[2:], c.noise[2:], c.signal[1:-1], c.noise[1:-1], c.q_variance[2:]
    want = n**2 / (2 * var * a**2) * (a_to - a * np.sqrt((n_to**2 - var) / n**2)) ** 2
    np.testing.assert_allclose(c.gamma[2:], want, rtol=1e-8)


def test_what_makes_no_chain(linear):
    for options, message in [
        ({"eta": 0.0}, r"eta must be in \(0, 1\]"),
        ({"eta": 1.5}, r"eta must be in \(0, 1\]"),
        ({"steps": 0}, "steps must be in 1..1000"),
        ({"grid": [5, 3]}, "grid must ascend"),
        ({"grid": [0, 3]}, "grid must ascend"),
        ({"variance": "none"}, "variance must be 'posterior', 'beta' or an array"),
        ({"steps": 3, "variance": [1.0]}, "variance must hold 2 positive numbers"),
        ({"steps": 3, "variance": [1.0, -1.0]}, "variance must hold 2 positive numbers"),
        ({"decoder_variance": 0.0}, "decoder_variance must be"),
        ({"decoder_variance": "wide"}, "decoder_variance must be"),
        ({"steps": 1, "decoder_variance": "clipped"}, "needs a chain of at least two steps"),
        ({"prediction": "noise"}, "source must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            chain(linear, **options)
    with pytest.raises(TypeError, match="s must be a Schedule"):
        chain(3)
    with pytest.raises(ValueError, match="x0 cannot be found from eps"):
        chain(schedules.zero_terminal_snr(linear))


# ---------------------------------------------------------------------------------------------------------------------- terms


@pytest.mark.parametrize("name", CHAINS)
def test_every_term_of_gaussian_data_has_its_closed_form(name):
    s, options = CHAINS[name]
    mean, var, d, n = 0.3, 0.4**2, 5, 4000
    law = GaussianMixture([1.0], [[mean] * d], var)
    c = chain(s, **options)
    b = bound.vlb_terms(law.model(s), law.sample(n, 3), c, seed=7)
    got, error = b.terms.mean(axis=1) / d, b.terms.std(axis=1) / np.sqrt(n) / d
    want = of_gaussian(c, mean, var)
    assert b.t.shape == (len(c),) and b.terms.shape == (len(c) + 1, n) and b.dimensions == d
    z = (got - want) / (error + 1e-7)
    assert np.abs(z).max() < 4.5 and np.sqrt(np.mean(z**2)) < 1.5
    assert b.bits == pytest.approx(want.sum() / np.log(2), abs=4.5 * b.error)
    assert b.error == pytest.approx(b.nats.std(ddof=1) / np.sqrt(n) / (d * np.log(2)))
    np.testing.assert_allclose(b.term_bits[0] * np.log(2), got, rtol=1e-10)
    assert want.sum() > entropy(var) - 1e-12


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_a_term_is_the_kl_between_posterior_and_model(linear, variance):
    """Against q_posterior, p_mean_variance and normal_kl, for a model that is wrong; float32 data."""
    rng = np.random.default_rng(0)
    x0, bend = rng.standard_normal((6, 2, 2)).astype(np.float32), np.float32(0.3)

    def model(x, t):
        assert x.dtype == np.float32 and t.dtype == np.int64 and t.shape == (6,)
        return np.sin(3 * x + bend * t[:, None, None] / 1000)

    c = chain(linear, variance=variance, grid=np.arange(1, 1001), decoder_variance="clipped")
    b = bound.vlb_terms(model, x0, c, seed=4, first_sample=2)
    for t in (2, 3, 100, 1000):
        x = c.noised(x0, t, 4, first_sample=2)
        right, var = forward.q_posterior(x0.astype(float), x.astype(float), t, linear)
        mean, var_p = forward.p_mean_variance(
            model(x, np.full(6, t)).astype(float), x.astype(float), t, linear, variance=variance
        )
        np.testing.assert_allclose(b.terms[t - 1], losses.normal_kl(right, var, mean, var_p), rtol=1e-6)
        if variance == "posterior":
            eps = forward.predict_eps_from_x0(x.astype(float), x0.astype(float), t, linear)
            square = ((eps - model(x, np.full(6, t))) ** 2).reshape(6, -1).sum(axis=1)
            np.testing.assert_allclose(b.terms[t - 1], losses.eps_loss_weight(t, linear) * square, rtol=1e-6)
            np.testing.assert_allclose(b.terms[t - 1], c.gamma[t] * square, rtol=1e-6)
    x = c.noised(x0, 1, 4, first_sample=2)
    x0_hat = forward.predict_x0_from_eps(x, model(x, np.ones(6, np.int64)), 1, linear)
    np.testing.assert_allclose(b.decoder, -gaussian_log_prob(x0, x0_hat, linear.beta_tilde[2]), rtol=1e-5)
    np.testing.assert_array_equal(b.prior, bound.prior_kl(x0, linear))


@pytest.mark.parametrize("name", ["schedule", "vesde"])
def test_all_predictions_give_one_bound(name):
    s = PROCESSES[name]
    law = GaussianMixture([0.4, 0.6], [[-0.5, 0.2], [0.4, 0.1]], 0.1)
    x0 = law.sample(50, 1)
    kinds = {k: bound.vlb_terms(law.model(s, k), x0, chain(s, 9, prediction=k)).terms for k in ("eps", "x0", "v", "score")}
    for terms in kinds.values():
        np.testing.assert_allclose(terms, kinds["eps"], rtol=1e-8, atol=1e-10)


def test_clipping_bounds_the_predicted_x0(linear):
    x0 = data.to_unit(np.random.default_rng(0).integers(0, 256, (20, 3), np.uint8))

    def wild(x, t):
        return np.full_like(x, -30)

    free, kept = (bound.vlb_terms(wild, x0, chain(linear, 20, clip=clip)).bits for clip in (None, (-1.0, 1.0)))
    assert kept < free / 10


def test_samples_and_their_noise_do_not_depend_on_the_batch(linear):
    law = GaussianMixture([1.0], [[0.2, -0.1]], 0.3)
    x0, c = law.sample(12, 5), chain(linear, 6, 0.8)
    for options in ({"draws": 2}, {"draws": 2, "sampled": 3}):
        whole = bound.vlb_terms(law.model(linear), x0, c, seed=9, **options)
        parts = [bound.vlb_terms(law.model(linear), x0[a:b], c, seed=9, first_sample=a, **options) for a, b in ((0, 5), (5, 12))]
        joined = bound.Bound.join(parts)
        np.testing.assert_allclose(joined.terms, whole.terms, rtol=1e-12)
        assert joined.bits == pytest.approx(whole.bits) and joined.error == pytest.approx(whole.error)
        other = bound.vlb_terms(law.model(linear), x0, c, seed=10, **options)
        assert np.all(other.decoder != whole.decoder) and np.array_equal(other.prior, whole.prior)
    once = bound.vlb_terms(law.model(linear), x0[:1], c)
    assert np.isnan(once.error) and np.isfinite(once.bits)


def test_more_draws_leave_less_noise(linear):
    law = GaussianMixture([1.0], [[0.0]], 1.0)
    x0, c = np.full((2000, 1), 0.5), chain(linear, 5)
    one, nine = (bound.vlb_terms(law.model(linear), x0, c, draws=k).nats for k in (1, 9))
    assert nine.var() == pytest.approx(one.var() / 9, rel=0.25)
    assert abs(nine.mean() - one.mean()) < 4 * np.sqrt(one.var() / 2000 + nine.var() / 2000)


@pytest.mark.parametrize("weights", [None, np.linspace(3, 0.1, 39)])
def test_sampled_terms_keep_their_expectations(weights):
    s = PROCESSES["ladder"]
    law = GaussianMixture([0.4, 0.6], [[-0.5, 0.2], [0.4, 0.1]], 0.1)
    x0, c, calls = law.sample(4000, 1), chain(s), []
    full = bound.vlb_terms(law.model(s), x0, c)
    some = bound.vlb_terms(law.model(s), x0, c, sampled=8, weights=weights, progress=lambda done, of: calls.append((done, of)))
    assert calls == [(k, 9) for k in range(1, 10)]
    np.testing.assert_array_equal(some.terms[[0, -1]], full.terms[[0, -1]])
    error = np.sqrt((some.terms.var(axis=1) + full.terms.var(axis=1)) / len(x0))
    z = (some.terms.mean(axis=1) - full.terms.mean(axis=1))[1:-1] / error[1:-1]
    assert np.abs(z).max() < 4.5 and np.sqrt(np.mean(z**2)) < 1.5
    assert abs(some.bits - full.bits) < 4.5 * np.hypot(some.error, full.error)
    hits = np.count_nonzero(some.terms[1:-1], axis=0)
    assert hits.max() <= 8 and hits.min() >= (8 if weights is None else 5)
    if weights is None:
        every = bound.vlb_terms(law.model(s), x0[:9], c, sampled=39)
        assert np.all(every.terms[1:-1] > 0)  # systematically: each term once
    noise = []

    def record(x, t):
        a, n = s.levels(t)
        noise.append((x - a[:, None] * x0[:9]) / n[:, None])
        return law.model(s)(x, t)

    twice = bound.vlb_terms(record, x0[:9], c, sampled=3, weights=weights, draws=2)
    assert len({np.round(eps, 6).tobytes() for eps in noise}) == len(noise) == 8  # fresh noise at every call
    assert np.count_nonzero(twice.terms[1:-1], axis=0).max() > 3  # and fresh terms at every draw


def test_arrays_of_other_libraries(linear, monkeypatch):
    """The model gets the library of x0: torch's tensors, and CuPy's arrays (in their stand-in's strictness)."""
    law, c = GaussianMixture([1.0], [[0.2, -0.1]], 0.3), chain(linear, 6)
    x0 = law.sample(5, 2).astype(np.float32)
    want = bound.vlb_terms(law.model(linear), x0, c, seed=3)
    torch = pytest.importorskip("torch")
    model = law.model(linear)
    seen = []
    got = bound.vlb_terms(lambda x, t: (seen.append((type(x), type(t))), model(x, t))[1], torch.from_numpy(x0), c, seed=3)
    np.testing.assert_allclose(got.terms, want.terms, rtol=1e-6)
    assert set(seen) == {(torch.Tensor, torch.Tensor)}
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for sampled in (None, 3):
        with kernels.use("reference"):
            want = bound.vlb_terms(law.model(linear), x0, c, seed=3, sampled=sampled)
            got = bound.vlb_terms(
                lambda x, t: cupy.asarray(model(x.get(), t.get())), cupy.asarray(x0), c, seed=3, sampled=sampled
            )
        np.testing.assert_allclose(got.terms, want.terms, rtol=1e-6)


def test_what_the_bound_refuses(linear):
    law, c = GaussianMixture([1.0], [[0.2, -0.1]], 0.3), chain(linear, 5)
    model, x0 = law.model(linear), law.sample(3)
    for options, message in [
        ({"decoder": "cells"}, "decoder must be one of"),
        ({"draws": 0}, "draws and sampled must be at least 1"),
        ({"sampled": 0}, "draws and sampled must be at least 1"),
        ({"sampled": 2, "weights": [1.0, 2.0]}, "weights must be 4 positive numbers"),
        ({"decoder": "discrete"}, "x must hold the 256 values"),
    ]:
        with pytest.raises(ValueError, match=message):
            bound.vlb_terms(model, x0, c, **options)
    with pytest.raises(TypeError, match="x0 must be a float array"):
        bound.vlb_terms(model, np.zeros((3, 2), np.uint8), c)
    with pytest.raises(ValueError, match=r"model must return an array of shape \(3, 2\)"):
        bound.vlb_terms(lambda x, t: x[:1], x0, c)
    with pytest.raises(ValueError, match=r"path must have shape \(6, B, …\)"):
        bound.elbo(c, np.zeros((5, 2, 2)), model)
    with pytest.raises(ValueError, match="order must be"):
        bound.q_path_log_prob(c, np.zeros((6, 2, 2)), "sideways")


# ------------------------------------------------------------------------------------------------------------------- the prior


def test_x48_the_prior_term_of_the_linear_schedule(linear):
    """S4-E22's 1e−5 is in bits per dimension: 0.0159 nats in all for images with the second moment of CIFAR-10."""
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    moment = np.mean((2 * mean - 1) ** 2 + (2 * std) ** 2)
    images = np.stack([np.full((32, 32, 3), np.sqrt(m)) for m in (moment, 1.0, 0.0)])
    nats = bound.prior_kl(images, linear)
    assert nats[0] == pytest.approx(0.0159, rel=2e-3) and nats[0] / 1e-5 == pytest.approx(1587, rel=1e-3)
    np.testing.assert_allclose(nats / 3072, [5.17e-6, 2.02e-5, 4e-10], rtol=2e-2)
    np.testing.assert_allclose(nats[:2] / 3072 / np.log(2), [7.45e-6, 2.91e-5], rtol=1e-3)
    assert schedules.prior_gap(linear, moment).kl == pytest.approx(nats[0] / 3072, rel=1e-9)


@pytest.mark.parametrize("name", PROCESSES)
def test_prior_kl_is_the_kl_to_the_prior(name):
    s, x0 = PROCESSES[name], np.random.default_rng(0).standard_normal((4, 3, 2))
    for t in (s.T, s.T / 2):
        a, n = (float(v) for v in s.levels(t))
        want = losses.normal_kl(a * x0, n**2, np.zeros_like(x0), s.prior_std**2)
        np.testing.assert_allclose(bound.prior_kl(x0, s, t), want, rtol=1e-9, atol=1e-12)


def test_the_prior_term_falls_with_the_signal():
    steps = [bound.prior_kl(np.ones((1, 1)), schedules.linear(), t)[0] for t in (100, 500, 1000)]
    assert 2 > steps[0] > 10 * steps[1] > 100 * steps[2] > 0


# ---------------------------------------------------------------------------------------------- the likelihood that it bounds


def test_the_bound_is_tight_for_unit_normal_data():
    """p_θ(x_{t−1}|x_t) of N(0, I) data is N(√α·x_t, β): with σ² = β the bound is the entropy at every S."""
    for s in (PROCESSES["schedule"], PROCESSES["vpsde"]):
        for S in (1, 2, 10):
            c = chain(s, S, variance="beta", spacing="trailing")
            assert of_gaussian(c, 0.0, 1.0).sum() == pytest.approx(entropy(1.0), abs=1e-12)
            loose = chain(s, S, variance="posterior", decoder_variance=1.1 * c.p_variance[1], spacing="trailing")
            assert of_gaussian(loose, 0.0, 1.0).sum() > entropy(1.0) + 1e-3


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("family", ["ladder", "vpsde"])
def test_the_bound_of_gaussian_data_converges_at_order_one(family, variance):
    """Terms whose sum the Monte-Carlo bound is shown to have: its gap to the entropy halves as S doubles."""
    var, gaps = 0.5**2, []
    s = VESDE(1e-4, 3000) if family == "ladder" else VPSDE(beta_max=40.0)
    for S in (500, 1000, 2000, 4000):
        low, high = s.sigma_bar_at([s.t_min, s.T])
        grid = np.minimum(s.time(np.geomspace(max(low, 2e-3), high, S)), s.T)
        gaps.append(of_gaussian(chain(s, grid=grid, variance=variance), 0.0, var).sum() - entropy(var))
    gaps = np.array(gaps) - 2 * gaps[-1] + gaps[-2]  # less what the first noise level and the prior leave for S → ∞
    orders = np.log2(gaps[:-1] / gaps[1:])
    assert np.all(gaps > 0) and np.all(np.abs(orders - 1) < 0.06), orders


def test_the_bound_of_a_mixture_comes_down_to_its_likelihood():
    law = GaussianMixture([0.3, 0.7], [[-1.0], [0.8]], [0.04, 0.25])
    x0 = law.sample(4000, 1)
    nll, gaps, errors = -law.log_prob(x0), [], []
    for S in (40, 80, 160, 320):
        s = schedules.geometric(0.02, 60, S)
        gap = bound.vlb_terms(law.model(s), x0, chain(s)).nats - nll
        gaps.append(gap.mean())
        errors.append(gap.std() / np.sqrt(len(x0)))
    ratios = np.array(gaps[:-1]) / gaps[1:]
    assert np.all(np.array(gaps) > 4 * np.array(errors)) and np.all((ratios > 1.7) & (ratios < 2.3))
    assert gaps[-1] < 0.1
    limit = 2 * gaps[-1] - gaps[-2]  # Richardson's: the first order gone
    assert abs(limit) < 4 * np.hypot(2 * errors[-1], errors[-2]) + 0.01


def test_eight_bit_probabilities_sum_to_at_most_one():
    """Σ_x exp(−L(x)) ≤ Σ_x p_θ(x) = 1 over all values of one element, and not far below for the exact model."""
    x0 = data.to_unit(np.arange(256, dtype=np.uint8)[:, None])
    weights = np.exp(-((x0[:, 0] - 0.1) ** 2) / (2 * 0.2**2))
    weights /= weights.sum()
    law, s = GaussianMixture([1.0], [[0.1]], 0.2**2), schedules.geometric(0.004, 30, 120)
    b = bound.vlb_terms(law.model(s), x0, chain(s, clip=(-1.0, 1.0)), decoder="discrete", draws=12)
    assert 0.7 < np.exp(-b.nats).sum() <= 1
    entropy_bits = -np.sum(weights * np.log2(weights))
    assert entropy_bits < np.sum(weights * b.nats) / np.log(2) < entropy_bits + 0.5


# -------------------------------------------------------------------------------------------------------------- path by path


@pytest.mark.parametrize("name", CHAINS)
def test_both_lines_of_the_objective_are_equal_path_by_path(name):
    """S2-E11, S0-E43: log q_σ(x_{1:S}|x_0) − log p_θ(x_{0:S}) by forward kernels, and expanded by posteriors."""
    s, options = CHAINS[name]
    c, x0 = chain(s, **options), np.random.default_rng(2).standard_normal((30, 2))

    def model(x, t):
        return np.tanh(x) * (0.5 + t[:, None] / s.T) + 0.1

    path = c.sample_path(x0, seed=3)
    size = np.abs(c.forward_log_probs(path)).sum(axis=0) + np.abs(c.reverse_log_probs(path, model)).sum(axis=0)
    first = bound.q_path_log_prob(c, path) - bound.path_log_prob(c, path, model)
    np.testing.assert_allclose(
        bound.q_path_log_prob(c, path, "reverse") / size, bound.q_path_log_prob(c, path) / size, atol=1e-12
    )
    np.testing.assert_allclose(bound.ddim_vlb(c, path, model) / size, first / size, atol=1e-12)
    markov = bound.vlb_markov_form(c.prior_log_prob(path), c.reverse_log_probs(path, model), c.forward_log_probs(path))
    np.testing.assert_allclose(markov / size, first / size, atol=1e-12)
    np.testing.assert_array_equal(bound.elbo(c, path, model), -bound.ddim_vlb(c, path, model))
    if s is PROCESSES["schedule"]:
        np.testing.assert_allclose(bound.ddim_vlb(c, path, model), first, atol=1e-9)


def test_paths_have_the_moments_of_q():
    s = PROCESSES["schedule"]
    for eta in (1.0, 0.3):
        c = chain(s, 6, eta)
        path = c.sample_path(np.full((40_000, 1), 0.7), seed=1)[..., 0]
        assert np.all(path[0] == 0.7)
        z = (path.mean(axis=1) - c.signal * 0.7)[1:] / (c.noise[1:] / 200)
        ratio = (path.var(axis=1)[1:] / c.noise[1:] ** 2 - 1) / np.sqrt(2 / 40_000)
        assert np.abs(z).max() < 4 and np.abs(ratio).max() < 4
        covariance = np.mean((path[3] - c.signal[3] * 0.7) * (path[4] - c.signal[4] * 0.7))
        assert covariance == pytest.approx(c.on_x[4] * c.noise[4] ** 2, abs=4 * c.noise[3] * c.noise[4] / 200)


def test_the_terms_are_the_means_of_the_path_forms(linear):
    law, x0 = GaussianMixture([0.4, 0.6], [[-0.5], [0.9]], 0.2), np.full((20_000, 1), 0.4)
    c = chain(linear, 8, 0.6, variance="beta")
    paths = bound.ddim_vlb(c, c.sample_path(x0, seed=5), law.model(linear))
    terms = bound.vlb_terms(law.model(linear), x0, c, seed=6).nats
    assert abs(paths.mean() - terms.mean()) < 4 * np.sqrt((paths.var() + terms.var()) / 20_000)


def linear_gaussian(beta, T):
    """(schedule, chain of p_θ(x_{t−1}|x_t) = N(gain·x_t, variance), its model) as a function of (gain, variance)."""
    s = schedules.Schedule(np.r_[0.0, [beta] * T])

    def make(gain, variance):
        c = chain(s, variance=np.full(T - 1, variance), decoder_variance=variance, prediction="x0")
        factor = np.r_[0.0, (gain - c.on_x[1:]) / c.on_x0[1:]]
        return c, lambda x, t: factor[t].reshape(-1, 1) * x

    return make


def test_exact_likelihood_of_a_linear_gaussian_chain():
    """S0-E20: by the recursion of the marginal, and as the mean of p_θ/q over paths."""
    x0 = np.repeat([[0.0], [0.8], [-1.5]], 20_000, axis=0)
    c, model = linear_gaussian(0.3, 3)(0.8, 0.25)
    log_ratio = bound.elbo(c, c.sample_path(x0, seed=2), model).reshape(3, -1)
    nll = bound.exact_nll_linear_gaussian(x0[::20_000], [0.8] * 3, [0.0] * 3, [0.25] * 3)
    for got, exact in zip(log_ratio, nll, strict=True):
        weights = np.exp(got + exact)
        assert abs(weights.mean() - 1) < 4 * weights.std() / np.sqrt(weights.size) < 0.05
        assert got.mean() + 4 * got.std() / np.sqrt(got.size) < -exact
    mean, var = 0.1, 2.0  # the recursion by hand, T = 2
    for gain, offset, variance in ((0.5, -0.2, 0.3), (0.9, 0.4, 0.1)):
        mean, var = gain * mean + offset, gain**2 * var + variance
    got = bound.exact_nll_linear_gaussian(np.array([[0.3, -0.4]]) - 0.9 * 0.5 * 0.1, [0.9, 0.5], [0.4, -0.2], [0.1, 0.3], 2.0)
    assert got[0] == pytest.approx(-gaussian_log_prob(np.array([[0.3, -0.4]]), mean, var)[0], rel=1e-12)
    with pytest.raises(ValueError, match="one shape"):
        bound.exact_nll_linear_gaussian(x0, [1.0], [0.0, 1.0], [1.0])


def test_x25_the_elbo_is_below_the_likelihood():
    """S2-E2 prints ≤. Data N(0, ¼), β = 0.3, T = 2: means of quadratics, exact over six sigma points of (x_0, x_1, x_2)."""
    make, var = linear_gaussian(0.3, 2), 0.25
    c, _ = make(0.5, 0.5)
    root = np.diag([0.5, np.sqrt(0.3), np.sqrt(0.3)])
    root[1:, 0] = 0.5 * np.sqrt(0.7), 0.5 * 0.7
    root[2, 1] = np.sqrt(0.7 * 0.3)
    points = np.sqrt(3) * np.concatenate([root, -root], axis=1)[..., None]
    best, above = [-np.inf, -np.inf], 0
    for gain in np.linspace(0.02, 1.1, 55):
        for variance in np.linspace(0.02, 1.2, 60):
            c, model = make(gain, variance)
            marginal = gain**2 * (gain**2 + variance) + variance
            likelihood = -0.5 * np.log(2 * np.pi * marginal) - var / (2 * marginal)
            exact = -bound.exact_nll_linear_gaussian([[0.5]], [gain] * 2, [0.0] * 2, [variance] * 2)[0]
            assert exact == pytest.approx(likelihood, rel=1e-10)
            elbo = bound.elbo(c, points, model).mean()
            above += elbo > likelihood
            best = [max(best[0], likelihood), max(best[1], elbo)]
    assert above == 0
    assert best == pytest.approx([-0.7258, -0.8118], abs=5e-5)


# ----------------------------------------------------------------------------------------------------- the enumerable chain


def test_x41_the_path_probability_takes_no_second_end_factor(three_states):
    c = three_states
    q = c.q0[c.paths[0]] * c.forward().prod(axis=0)
    assert q.sum() == pytest.approx(1, abs=1e-14)
    marginal = [c.q0 @ c.Qbar[t] for t in range(4)]
    printed = (q * marginal[3][c.paths[3]]).sum()
    assert printed == pytest.approx(0.362, abs=5e-4)
    back = [marginal[t - 1][c.paths[t - 1]] * c.Q[t][c.paths[t - 1], c.paths[t]] / marginal[t][c.paths[t]] for t in (1, 2, 3)]
    np.testing.assert_allclose(marginal[3][c.paths[3]] * np.prod(back, axis=0), q, rtol=1e-12)


def test_x43_the_kl_is_between_reverse_kernels(three_states):
    """The sum with q(x_{t−1}|x_t, x_0) is the bound; with q(x_t|x_{t−1}, x_0), as printed in S4-E10, it is not."""
    c = three_states
    q = c.q0[c.paths[0]] * c.forward().prod(axis=0)
    log_prior = np.log(c.prior[c.paths[3]])
    direct = q @ bound.vlb_markov_form(log_prior, np.log(c.reverse()), np.log(c.forward()))

    def kl(p, r):
        return np.sum(p * np.log(p / r), axis=-1)

    x0_and_x = [c.q0[:, None] * c.Qbar[t] for t in range(4)]
    ends = c.q0 @ kl(c.Qbar[3], c.prior) - np.sum(x0_and_x[1] * np.log(c.P[1].T))
    right = ends + sum(np.sum(x0_and_x[t] * kl(c.posterior(t), c.P[t][None])) for t in (2, 3))
    printed = ends + sum(
        np.sum(x0_and_x[t - 1][:, :, None] * c.Q[t] * kl(c.Q[t][:, None, :], c.P[t][None])[None]) for t in (2, 3)
    )
    assert direct == pytest.approx(1.825070, abs=5e-7) and right == pytest.approx(direct, abs=1e-12)
    assert printed == pytest.approx(1.6104, abs=5e-5)
    log_posterior = np.log([c.posterior(t)[c.paths[0], c.paths[t], c.paths[t - 1]] for t in (2, 3)])
    log_end = np.log(c.Qbar[3][c.paths[0], c.paths[3]])
    forms = bound.vlb_posterior_form(log_prior, log_end, np.log(c.reverse()), log_posterior)
    np.testing.assert_allclose(
        forms, bound.vlb_markov_form(log_prior, np.log(c.reverse()), np.log(c.forward())), rtol=0, atol=1e-12
    )


def test_the_bound_differs_from_the_kl_of_paths_by_the_entropy_of_the_data(three_states):
    """S4-E9: KL(q(x_{0:T})‖p_θ(x_{0:T})) − L = −H(q(x_0)), whatever p_θ."""
    c = three_states
    q = c.q0[c.paths[0]] * c.forward().prod(axis=0)
    rng = np.random.default_rng(0)
    for _ in range(3):
        p = rng.dirichlet(np.ones(3), (4, 3))
        log_p = np.log([p[t][c.paths[t], c.paths[t - 1]] for t in (1, 2, 3)])
        log_prior = np.log(c.prior[c.paths[3]])
        kl = q @ (np.log(q) - log_prior - log_p.sum(axis=0))
        assert kl - q @ bound.vlb_markov_form(log_prior, log_p, np.log(c.forward())) == pytest.approx(
            c.q0 @ np.log(c.q0), abs=1e-12
        )
