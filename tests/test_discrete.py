"""The discrete forward process: posteriors and reverse laws by enumeration of all paths, draws by their frequencies, and the
errata of the discrete pages of S4 (ids as in ``alphabar equations``)."""

import itertools
import sys

import numpy as np
import pytest
from scipy.linalg import expm
from scipy.special import logsumexp

from alphabar import kernels
from alphabar.core import categorical, discrete, rates
from alphabar.core.transitions import Absorbing, Dense, DiscretizedGaussian, NearestNeighbour, Uniform, neighbour_rates
from tests import fake_cupy

K, T = 3, 4
BETA = [0.0, 0.2, 0.35, 0.5, 0.7]
RATES = neighbour_rates([[0.0], [1.0], [2.5]], 1)


def log(p):
    with np.errstate(divide="ignore"):
        return np.log(p)


def shares(w):
    total = w.sum(axis=-1, keepdims=True)
    return np.divide(w, total, out=np.zeros_like(w), where=total > 0)


def tv(p, q):
    return 0.5 * np.abs(p - q).sum(axis=-1)


def uniform(beta):
    return [[1 - (K - 1) / K * beta if i == j else beta / K for j in range(K)] for i in range(K)]


def absorbing(m):
    return lambda beta: [
        [float(i == j) if i == m else (1 - beta) * (i == j) + beta * (j == m) for j in range(K)] for i in range(K)
    ]


def gaussian(beta):
    w = [np.exp(-4 * n**2 / ((K - 1) ** 2 * beta)) for n in range(K)]
    off = np.array([[w[abs(i - j)] * (i != j) for j in range(K)] for i in range(K)]) / (w[0] + 2 * sum(w[1:]))
    return off + np.diag(1 - off.sum(axis=1))


def dense(zeros):
    rng = np.random.default_rng(5)
    Q = rng.random((T + 1, K, K)) * (rng.random((T + 1, K, K)) >= zeros) + 0.1 * np.eye(K)
    return Q / Q.sum(axis=2, keepdims=True)


END = rates.reciprocal(T)
FAMILIES = {  # law, and its Q_1, …, Q_T written down here
    "uniform": (Uniform(K, BETA), [uniform(b) for b in BETA[1:]]),
    "uniform to the end": (Uniform(K, END), [uniform(b) for b in END[1:]]),
    "absorbing": (Absorbing(K, BETA), [absorbing(K - 1)(b) for b in BETA[1:]]),
    "absorbing in state 0 to the end": (Absorbing(K, END, mask=0), [absorbing(0)(b) for b in END[1:]]),
    "gaussian": (DiscretizedGaussian(K, BETA), [gaussian(b) for b in BETA[1:]]),
    "neighbours": (NearestNeighbour(RATES, BETA), [expm(b * RATES) for b in BETA[1:]]),
    "dense": (Dense(dense(0)), dense(0)[1:]),
    "dense with zeros": (Dense(dense(0.4)), dense(0.4)[1:]),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
PAIRS = [(s, t) for t in range(1, T + 1) for s in range(t)]


class Paths:
    """Every path (x_0, …, x_T) and its probability given x_0: sums over paths answer every question about a law."""

    def __init__(self, steps):
        self.paths = np.array(list(itertools.product(range(K), repeat=T + 1)))
        self.mass = np.prod([np.asarray(Q)[self.paths[:, t], self.paths[:, t + 1]] for t, Q in enumerate(steps)], axis=0)

    def joint(self, s, t):
        """q(x_s = i, x_t = j|x_0 = k) as [k, j, i]."""
        out = np.zeros((K, K, K))
        np.add.at(out, tuple(self.paths[:, [0, t, s]].T), self.mass)
        return out


def all_pairs():
    """x_0 and x_t, (K, K) each."""
    return np.meshgrid(np.arange(K), np.arange(K), indexing="ij")


# --------------------------------------------------------------------------------------------------------------------- posteriors


@every_family
def test_the_posterior_is_bayes_rule_over_all_paths(family):
    """S4-E11, S4-E27, S4-E32 for all (x_0, x_t, t) and all s < t."""
    law, steps = family
    paths, (x0, x_t) = Paths(steps), all_pairs()
    for s, t in PAIRS:
        joint = paths.joint(s, t)
        got = discrete.q_posterior(x0, x_t, t, law, s)
        assert got.dtype == np.float64 and ((got == -np.inf) == (joint == 0)).all()
        np.testing.assert_allclose(np.exp(got), shares(joint), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(np.exp(law.log_rows(0, np.arange(K), t)), joint.sum(axis=2), rtol=1e-12, atol=1e-15)
        if s == t - 1:
            np.testing.assert_array_equal(got, discrete.q_posterior(x0, x_t, t, law))


@every_family
def test_a_batch_of_times_is_each_sample_alone(family):
    law, _ = family
    rng = np.random.default_rng(2)
    s, t = np.array(PAIRS).T
    x0, x_t = rng.integers(0, K, (2, len(t), 5))
    logits = rng.standard_normal((len(t), 5, K))
    posterior, reverse = discrete.q_posterior(x0, x_t, t, law, s), discrete.reverse_from_x0(logits, x_t, t, law, s)
    stepwise = discrete.reverse_from_x0(logits, x_t, t, law)
    for i in range(len(t)):
        one = slice(i, i + 1)
        a, b = int(s[i]), int(t[i])
        np.testing.assert_allclose(posterior[one], discrete.q_posterior(x0[one], x_t[one], b, law, a), rtol=1e-13, atol=1e-13)
        alone = discrete.reverse_from_x0(logits[one], x_t[one], b, law, a)
        np.testing.assert_allclose(reverse[one], alone, rtol=1e-13, atol=1e-13)
        alone = discrete.reverse_from_x0(logits[one], x_t[one], b, law)
        np.testing.assert_allclose(stepwise[one], alone, rtol=1e-13, atol=1e-13)


def test_the_multinomial_posterior_is_the_printed_product():
    """S4-E27: θ̃ = [α_t x_t + (1−α_t)/K] ⊙ [ᾱ_{t−1}x_0 + (1−ᾱ_{t−1})/K]."""
    law, (x0, x_t) = Uniform(K, BETA), all_pairs()
    one_hot = np.eye(K)
    for t in range(1, T + 1):
        a, before = 1 - law.beta[t], law.keep[t - 1]
        theta = (a * one_hot[x_t] + (1 - a) / K) * (before * one_hot[x0] + (1 - before) / K)
        np.testing.assert_allclose(np.exp(discrete.q_posterior(x0, x_t, t, law)), shares(theta), rtol=1e-13)


def test_a_pair_that_cannot_be_has_no_posterior():
    law = Absorbing(4, rates.linear(5, 0.1, 0.4))
    x0, x_t = np.array([[0, 0, 0, 3]]), np.array([[0, 3, 1, 3]])
    got = np.exp(discrete.q_posterior(x0, x_t, 3, law))
    np.testing.assert_allclose(got.sum(axis=-1), [[1, 1, 0, 1]], rtol=1e-14)
    assert (got[0, 0] == np.eye(4)[0]).all() and (got[0, 3] == np.eye(4)[3]).all()


# ----------------------------------------------------------------------------------------------------------- the reverse from x̂_0


@every_family
@pytest.mark.parametrize("D", [K, K - 1])
def test_l7_the_reverse_is_the_normalised_sum_over_x0(family, D):
    """p_θ(x_s|x_t) ∝ Σ_x̃0 q(x_s, x_t|x̃0)·p̃(x̃0|x_t) over all paths; p̃ itself at t = 1; never the mixture of posteriors."""
    law, steps = family
    paths, rng = Paths(steps), np.random.default_rng(3)
    logits = 2 * rng.standard_normal((50, K, D))
    x_t = np.tile(np.arange(K), (50, 1))
    p = np.zeros((50, K, K))
    p[..., :D] = shares(np.exp(logits))
    furthest = 0.0
    for s, t in PAIRS:
        got = np.exp(discrete.reverse_from_x0(logits, x_t, t, law, s))
        joint = paths.joint(s, t)
        if t == 1:
            np.testing.assert_allclose(got, shares(p * (joint.sum(axis=2).T > 0)), rtol=1e-12, atol=1e-15)
            continue
        np.testing.assert_allclose(got, shares(np.einsum("njk,kji->nji", p, joint)), rtol=1e-11, atol=1e-15)
        mixture = np.einsum("njk,kji->nji", p, shares(joint))
        furthest = max(furthest, tv(got, mixture).max())
    assert furthest > 0.05


def test_the_uniform_reverse_is_the_posterior_at_the_predicted_x0():
    """S4-E28: p(x_{t−1}|x_t) = C(θ_post(x_t, x̂_0)), and p(x_0|x_1) = C(x̂_0)."""
    law, rng = Uniform(K, BETA), np.random.default_rng(4)
    logits, x_t = rng.standard_normal((2, 20, 5, K))[0], rng.integers(0, K, (20, 5))
    x_hat = shares(np.exp(logits))
    np.testing.assert_allclose(np.exp(discrete.reverse_from_x0(logits, x_t, 1, law)), x_hat, rtol=1e-13)
    for t in range(2, T + 1):
        a, before = 1 - law.beta[t], law.keep[t - 1]
        theta = (a * np.eye(K)[x_t] + (1 - a) / K) * (before * x_hat + (1 - before) / K)
        np.testing.assert_allclose(np.exp(discrete.reverse_from_x0(logits, x_t, t, law)), shares(theta), rtol=1e-13)


@every_family
def test_a_certain_x0_gives_its_posterior(family):
    law, _ = family
    x0, x_t = all_pairs()
    logits = log(np.eye(K))[x0]
    for s, t in PAIRS:
        if t > 1:
            got = discrete.reverse_from_x0(logits, x_t, t, law, s)
            np.testing.assert_allclose(np.exp(got), np.exp(discrete.q_posterior(x0, x_t, t, law, s)), rtol=1e-12, atol=1e-15)


def test_what_is_not_masked_stays():
    law, rng = Absorbing(5, rates.reciprocal(6)), np.random.default_rng(6)
    x_t = rng.integers(0, 5, (8, 9))
    logits = rng.standard_normal((8, 9, 4))
    for t in range(1, 7):
        for s in range(t):
            got = np.exp(discrete.reverse_from_x0(logits, x_t, t, law, s))
            if t < 6:  # at t = T all is masked
                np.testing.assert_array_equal(got[x_t < 4], np.eye(5)[x_t[x_t < 4]])
            masked = got[x_t == 4]
            p, left = shares(np.exp(logits[x_t == 4])), s / t  # of what is masked at t, the share s/t is at s
            np.testing.assert_allclose(masked, np.c_[(1 - left) * p, np.full(len(p), left)], rtol=1e-12, atol=1e-15)


@every_family
def test_float32_logits_give_float32_laws(family):
    law, rng = family[0], np.random.default_rng(7)
    logits, x_t = 5 * rng.standard_normal((6, 4, K)), rng.integers(0, K, (6, 4))
    for t in (1, 3, T):
        want = discrete.reverse_from_x0(logits, x_t, t, law)
        got = discrete.reverse_from_x0(logits.astype(np.float32), x_t, t, law)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert discrete.q_posterior(x_t, x_t, t, law, dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize("name", ["uniform", "absorbing", "gaussian", "neighbours"])
def test_extreme_logits_stay_finite_where_they_can(name):
    law = FAMILIES[name][0]
    x_t, logits = np.tile(np.arange(K), (2, 1)), np.array([[[5000.0, -5000.0, -4000.0]] * 3, [[0.0, -1e-3, -3e4]] * 3])
    for t in range(1, T + 1):
        for values in (logits, logits.astype(np.float32)):
            got = discrete.reverse_from_x0(values, x_t, t, law)
            assert not np.isnan(got).any()
            np.testing.assert_allclose(np.exp(got).sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_wrong_guess_of_256_grey_levels_is_weighed_right(dtype):
    """x̂_0 all but certain of a level that is far from x_t: the odds of e^−80 decide, against products in log space throughout."""
    law = DiscretizedGaussian(256, rates.linear(40))
    x_t = np.array([[255, 128, 40]])
    logits = np.zeros((1, 3, 256), dtype)
    logits[..., 0] = 80
    log_p = categorical.log_softmax(logits[0].astype(np.float64))
    for t in range(2, 16):
        log_p = logsumexp(log_p[:, :, None] + law.log_rows(t - 2, np.arange(256), t - 1), axis=1)
        want = categorical.log_softmax(log_p + law.log_columns(t - 1, t, x_t)[0])
        got = discrete.reverse_from_x0(logits, x_t, t, law)[0]
        assert got.dtype == dtype and not np.isnan(got).any()
        assert tv(np.exp(got), np.exp(want)).max() < (1e-4 if dtype == np.float32 else 1e-12)


# -------------------------------------------------------------------------------------------------------------------------- draws


def z_scores(x, p):
    """How far the counts of the states in x (N,) are from N·p, in standard deviations; infinite where p = 0 is drawn."""
    n = x.size
    count = np.bincount(x.reshape(-1), minlength=len(p))
    assert count.size == len(p) and (count[p == 0] == 0).all()
    p, count = p[p > 0], count[p > 0]
    return (count - n * p) / np.sqrt(np.maximum(n * p * (1 - p), 1e-9))


@every_family
def test_q_sample_draws_from_the_marginal(family):
    law, steps = family
    paths = Paths(steps)
    for k in range(K):
        for t in range(T + 1):
            x = discrete.q_sample(np.full((300, 100), k), t, law, seed=11, step=5 * t + k)
            assert x.dtype == np.int32 and x.shape == (300, 100)
            assert np.abs(z_scores(x, paths.joint(t, t)[k].sum(axis=1))).max() < 4


@every_family
def test_a_chain_of_q_steps_ends_in_the_marginal(family):
    law, steps = family
    paths, x = Paths(steps), np.full((300, 100), 1)
    for t in range(1, T + 1):
        before, x = x, discrete.q_step(x, t, law, seed=3)
        assert np.abs(z_scores(x, paths.joint(t, t)[1].sum(axis=1))).max() < 4
        for k in np.unique(before):
            assert np.abs(z_scores(x[before == k], np.asarray(steps[t - 1])[k])).max() < 4


@every_family
def test_draws_do_not_depend_on_the_batch(family):
    law, _ = family
    rng = np.random.default_rng(8)
    x0, t = rng.integers(0, K, (12, 30)).astype(np.uint8), rng.integers(1, T + 1, 12)
    whole, stepped = discrete.q_sample(x0, t, law, seed=9, step=4), discrete.q_step(x0, t, law, seed=9, step=4)
    for cut in (slice(0, 5), slice(5, 12)):
        part = discrete.q_sample(x0[cut], t[cut], law, seed=9, step=4, first_sample=cut.start)
        np.testing.assert_array_equal(part, whole[cut])
        part = discrete.q_step(x0[cut], t[cut], law, seed=9, step=4, first_sample=cut.start)
        np.testing.assert_array_equal(part, stepped[cut])
    assert (discrete.q_sample(x0, t, law, seed=9, step=5) != whole).any()
    start = discrete.prior((12, 30), law, seed=2)
    np.testing.assert_array_equal(discrete.prior((7, 30), law, seed=2, first_sample=5), start[5:])


@every_family
def test_the_prior_is_drawn_from(family):
    law, _ = family
    x = discrete.prior((400, 50), law, seed=1)
    assert x.dtype == np.int32 and np.abs(z_scores(x, law.prior)).max() < 4


def test_time_0_is_clean_data():
    x0 = np.random.default_rng(0).integers(0, K, (5, 6))
    for law, _ in FAMILIES.values():
        np.testing.assert_array_equal(discrete.q_sample(x0, 0, law), x0)


# ------------------------------------------------------------------------------------------------------------------------ errata


def test_x41_the_path_probability_takes_no_second_end_factor(three_states):
    """S4-E4 and E6 for states: the forward product is whole; q(x_T) belongs to the reverse factorisation."""
    c = three_states
    law = Dense(c.Q)
    one = [np.exp(law.log_rows(t - 1, c.paths[t - 1], t)) for t in (1, 2, 3)]
    q = c.q0[c.paths[0]] * np.prod([rows[np.arange(81), c.paths[t]] for t, rows in enumerate(one, 1)], axis=0)
    marginal = [np.exp(law.log_push(np.log(c.q0)[None], t))[0] for t in range(4)]
    assert q.sum() == pytest.approx(1, abs=1e-14)
    assert (q * marginal[3][c.paths[3]]).sum() == pytest.approx(0.362, abs=5e-4)
    back = 1.0
    for t in (1, 2, 3):  # q(x_{t−1}|x_t) is the mean over x_0 of the posteriors, by q(x_0|x_t)
        x0, x_t = np.indices((3, 3))
        given = shares((c.q0[:, None] * law.cumulative(t)).T)  # q(x_0|x_t)
        reverse = np.einsum("jk,kji->ji", given, np.exp(discrete.q_posterior(x0, x_t, t, law)))
        back = back * reverse[c.paths[t], c.paths[t - 1]]
    assert np.abs(marginal[3][c.paths[3]] * back - q).max() < 2e-17


def test_x43_the_kl_is_between_reverse_laws(three_states):
    """S4-E29: KL(q(x_{t−1}|x_t, x_0)‖p_θ(x_{t−1}|x_t)) sums to the bound 1.825070; with q(x_t|x_{t−1}, x_0), it is 1.6104."""
    c = three_states
    law, (x0, x_t) = Dense(c.Q), np.indices((3, 3))
    joint = [c.q0[:, None] * law.cumulative(t) for t in range(4)]
    ends = c.q0 @ categorical.kl(law.log_rows(0, np.arange(3), 3), np.log(np.tile(c.prior, (3, 1))))
    ends -= np.sum(joint[1] * np.log(c.P[1]).T)
    right, printed = ends, ends
    for t in (2, 3):
        model = np.log(c.P[t])[x_t]
        right += np.sum(joint[t] * categorical.kl(discrete.q_posterior(x0, x_t, t, law), model))
        forward = law.log_rows(t - 1, x0, t)  # of x_{t−1}, in the first place
        printed += np.sum(joint[t - 1].sum(axis=0)[:, None] * law.matrix(t) * categorical.kl(forward, model))
    assert right == pytest.approx(1.825070, abs=5e-7) and printed == pytest.approx(1.6104, abs=5e-5)


def test_x49_the_noise_is_shared_among_the_states():
    """S4-E25: "β_t ⋆ ?" is β_t/K."""
    K, beta = 4, 0.3
    x = np.eye(K)[1]
    assert ((1 - beta) * x + beta).sum() == pytest.approx(1.9)
    right = (1 - beta) * x + beta / K
    assert right.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.exp(Uniform(K, [0, beta]).log_rows(0, np.array([1]), 1)[0]), right, rtol=1e-14)


def test_x50_the_posterior_has_no_second_x_t():
    """S4-E27: with the typed leading "x_t ⊙" the law collapses on x_t, 0.404 in total variation from Bayes' rule."""
    K, a, before = 4, 0.7, 0.5
    law = Uniform(K, rates.from_alpha_bar([1, before, a * before]))
    x0, x_t = np.array([0]), np.array([2])
    bayes = shares(law.matrix(2)[:, 2] * law.cumulative(1)[0])
    theta = (a * np.eye(K)[2] + (1 - a) / K) * (before * np.eye(K)[0] + (1 - before) / K)
    printed = shares(np.eye(K)[2] * theta)
    assert (printed == np.eye(K)[2]).all() and tv(printed, bayes) == pytest.approx(0.404, abs=5e-4)
    assert tv(shares(theta), bayes) < 1e-15
    assert tv(np.exp(discrete.q_posterior(x0, x_t, 2, law)[0]), bayes) < 1e-15


def test_x52_the_posterior_takes_the_cumulative_matrix():
    """S4-E32: x_0Q_{t−1}ᵀ is x_0Q̄_{t−1}; the missing bar and the transpose are wrong each alone."""
    law, t, m = Absorbing(4, [0, 0.2, 0.3, 0.4]), 3, 3
    x0, x_t = np.eye(4)[0], np.eye(4)[m]
    Q, before, below = law.matrix(t), law.cumulative(t - 1), law.cumulative(t)[0, m]
    bayes = shares(Q[:, m] * before[0])
    printed, no_bar, transposed, right = (
        (x_t @ Q.T) * (x0 @ M) / below for M in (law.matrix(t - 1).T, law.matrix(t - 1), before.T, before)
    )
    assert printed.sum() == pytest.approx(0.422, abs=5e-4) and tv(printed, bayes) == pytest.approx(0.373, abs=5e-4)
    assert tv(no_bar, bayes) == pytest.approx(0.148, abs=5e-4) and tv(transposed, bayes) == pytest.approx(0.331, abs=5e-4)
    assert right.sum() == pytest.approx(1, abs=1e-15) and tv(right, bayes) < 1e-15
    assert tv(np.exp(discrete.q_posterior(np.array([0]), np.array([m]), t, law)[0]), bayes) < 1e-15


# ---------------------------------------------------------------------------------------------------------------- kinds, refusals


@every_family
def test_arrays_of_other_libraries(family, monkeypatch):
    """torch in, torch out; and no NumPy array meets a CuPy one, by the stand-in's strictness."""
    torch = pytest.importorskip("torch")
    law, rng = family[0], np.random.default_rng(9)
    x0, x_t = rng.integers(0, K, (2, 5, 2))
    t, logits = np.array([1, 3, T, T, 2]), rng.standard_normal((5, 2, K))
    calls = [
        lambda f: discrete.q_sample(f(x0), f(t), law, seed=1),
        lambda f: discrete.q_sample(f(x0), 2, law, seed=1),
        lambda f: discrete.q_step(f(x0), f(t), law, seed=1),
        lambda f: discrete.q_posterior(f(x0), f(x_t), f(t), law),
        lambda f: discrete.q_posterior(f(x0), f(x_t), 3, law, s=1),
        lambda f: discrete.reverse_from_x0(f(logits), f(x_t), f(t), law),
        lambda f: discrete.reverse_from_x0(f(logits), f(x_t), f(t), law, s=f(t - 1)),
    ]
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.cupy)
    for call in calls:
        with kernels.use("reference"):
            want = call(np.asarray)
            got = call(torch.from_numpy)
            assert isinstance(got, torch.Tensor) and np.array_equal(got.numpy(), want)
            got = call(fake_cupy.cupy.asarray)
            assert isinstance(got, fake_cupy.ndarray) and np.array_equal(got.get(), want)


def test_what_is_refused():
    law, x, logits = Uniform(K, BETA), np.zeros((2, 3), np.int32), np.zeros((2, 3, K))
    for call, error, message in [
        (lambda: discrete.q_sample(x, 1, BETA), TypeError, "law must be one of core.transitions"),
        (lambda: discrete.q_sample(logits, 1, law), TypeError, "x0 must be an integer array"),
        (lambda: discrete.q_sample(x + K, 1, law), ValueError, r"x0 must be in 0\.\.2"),
        (lambda: discrete.q_sample(x, T + 1, law), ValueError, r"t must be in 0\.\.4"),
        (lambda: discrete.q_sample([0, 1], 1, law), TypeError, "x0 must be an array"),
        (lambda: discrete.q_step(x, 0, law), ValueError, r"t must be in 1\.\.4"),
        (lambda: discrete.q_posterior(x, x[:1], 2, law), ValueError, "x_t must have the shape of x0"),
        (lambda: discrete.q_posterior(x, x, 2, law, s=2), ValueError, "s must be below t = 2, not 2"),
        (lambda: discrete.q_posterior(x, x, 0, law), ValueError, r"t must be in 1\.\.4"),
        (lambda: discrete.reverse_from_x0(logits[:1], x, 2, law), ValueError, "logits must have shape"),
        (lambda: discrete.reverse_from_x0(np.zeros((2, 3, K + 1)), x, 2, law), ValueError, r"must have 1\.\.3"),
        (lambda: discrete.reverse_from_x0(logits, x, np.array([2, 1]), law, s=1), ValueError, "s must be below t"),
        (lambda: discrete.prior((2, 3), BETA), TypeError, "law must be"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_times_of_any_integer_dtype():
    x = np.arange(K).repeat(2)[:T, None] % K
    t = np.arange(1, T + 1)
    for law in (DiscretizedGaussian(K, BETA), NearestNeighbour(RATES, BETA), Uniform(K, BETA)):
        wanted = discrete.q_posterior(x, x, t, law)
        for dtype in ("u1", "u8", ">i2"):
            np.testing.assert_array_equal(discrete.q_posterior(x, x, t.astype(dtype), law), wanted)
            np.testing.assert_array_equal(
                discrete.q_posterior(x, x, t.astype(dtype), law, np.zeros(T, "i8")), discrete.q_posterior(x, x, t, law, 0)
            )


def test_what_is_not_x0_is_named():
    law = Uniform(K, BETA)
    for x0 in (np.full((2, 1), K), np.zeros((2, 1))):
        for call in (lambda x0=x0: discrete.q_sample(x0, 1, law), lambda x0=x0: discrete.q_posterior(x0, x0, 1, law)):
            with pytest.raises((TypeError, ValueError), match="x0 must be"):
                call()
