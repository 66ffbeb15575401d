"""GaussianMixture: its closed forms against scipy, quadrature, finite differences, Bayes' rule and sampling."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from alphabar.core import samplers, schedules, tables
from alphabar.core.mixture import GaussianMixture
from alphabar.kernels import counter, streams

RNG = np.random.default_rng(5)
WEIGHTS = np.array([0.2, 0.5, 0.3])


def matrices(K, d, rng=RNG):
    m = rng.standard_normal((K, d, d))
    return m @ m.swapaxes(1, 2) + 0.3 * np.eye(d)


LAWS = {
    "1d": GaussianMixture([0.4, 0.6], [[-1.5], [1.0]], [0.5, 0.8]),
    "one": GaussianMixture([1.0], RNG.standard_normal((1, 3)), 0.7),
    "isotropic": GaussianMixture(WEIGHTS, 2 * RNG.standard_normal((3, 4)), [0.5, 1.0, 2.0]),
    "full": GaussianMixture(WEIGHTS, 2 * RNG.standard_normal((3, 4)), matrices(3, 4)),
}
LINE = LAWS["1d"]
each_law = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


def points(law, n=40, spread=3.0):
    return spread * np.random.default_rng(1).standard_normal((n, law.dim))


def slope(f, x, v, h=1e-5):
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


def integral(y, x):
    return float(np.sum((y[1:] + y[:-1]) / 2 * np.diff(x)))


# --------------------------------------------------------------------------------------------------------- density and score


@each_law
def test_log_prob_and_responsibilities_are_those_of_scipy(law):
    x = points(law)
    parts = np.stack([stats.multivariate_normal(m, c).logpdf(x) for m, c in zip(law.means, law.covariances, strict=True)])
    parts += np.log(law.weights)[:, None]
    np.testing.assert_allclose(law.log_prob(x), logsumexp(parts, axis=0), rtol=1e-11)
    np.testing.assert_allclose(law.responsibilities(x), np.exp(parts - logsumexp(parts, axis=0)).T, atol=1e-11)


def test_density_integrates_to_one_in_one_and_two_dimensions():  # S0-E6
    x = np.linspace(-15, 15, 4001)
    assert integral(np.exp(LINE.log_prob(x[:, None])), x) == pytest.approx(1, abs=1e-12)
    flat = GaussianMixture([0.3, 0.7], [[-1, 0.5], [1, -0.5]], matrices(2, 2))
    g = np.linspace(-14, 14, 401)
    grid = np.stack(np.meshgrid(g, g, indexing="ij"), -1).reshape(-1, 2)
    assert np.exp(flat.log_prob(grid)).sum() * (g[1] - g[0]) ** 2 == pytest.approx(1, abs=1e-10)


@each_law
def test_score_and_its_jacobian_by_finite_differences(law):  # S0-E1
    x, v = points(law), points(law, spread=1.0)[::-1]
    np.testing.assert_allclose((law.score(x) * v).sum(1), slope(law.log_prob, x, v), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(law.score_jvp(x, v), slope(law.score, x, v), rtol=1e-6, atol=1e-7)
    basis = np.eye(law.dim)
    trace = sum(law.score_jvp(x, np.broadcast_to(e, x.shape))[:, i] for i, e in enumerate(basis))
    np.testing.assert_allclose(law.score_divergence(x), trace, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("weight", [0.2, 0.8])
def test_near_a_mode_density_and_score_are_those_of_its_component(weight):  # S0-E7, S0-E8: separation 8 standard deviations
    law = GaussianMixture([weight, 1 - weight], [[-4.0], [4.0]], 1.0)
    mode = np.array([[-4.0]])
    part = np.log(weight) + stats.norm(-4, 1).logpdf(-4)
    assert abs(np.expm1(law.log_prob(mode)[0] - part)) < 6 * np.exp(-32)  # the other mode's share: e^{−8²/2} ≈ 1e−14
    assert abs(law.score(mode)[0, 0]) < 1e-8
    near = mode + np.array([[0.7]])
    assert law.score(near)[0, 0] == pytest.approx(-0.7, abs=1e-8)
    assert law.responsibilities(near)[0, 0] == pytest.approx(1, abs=1e-10)


@each_law
@pytest.mark.parametrize("distance", [50.0, 1e4, 1e8])
def test_far_from_all_modes_nothing_underflows(law, distance):
    direction = np.ones((1, law.dim)) / np.sqrt(law.dim)
    x = distance * direction
    parts = np.array([stats.multivariate_normal(m, c).logpdf(x[0]) for m, c in zip(law.means, law.covariances, strict=True)])
    k = int(np.argmax(parts + np.log(law.weights)))
    assert distance < 50.5 or law.responsibilities(x)[0, k] == 1
    assert law.log_prob(x)[0] == pytest.approx(logsumexp(parts + np.log(law.weights)), rel=1e-12)
    if law.responsibilities(x)[0, k] == 1:
        want = -np.linalg.solve(law.covariances[k], x[0] - law.means[k])
        np.testing.assert_allclose(law.score(x)[0], want, rtol=1e-10)
        np.testing.assert_allclose(law.score_jvp(x, x)[0], -np.linalg.solve(law.covariances[k], x[0]), rtol=1e-9)
    assert np.isfinite(law.score_divergence(x)).all()


def test_covariances_given_three_ways_are_one_law():
    means = RNG.standard_normal((2, 3))
    laws = [GaussianMixture([1, 3], means, c) for c in (0.6, [0.6, 0.6], np.stack([0.6 * np.eye(3)] * 2))]
    x, v = RNG.standard_normal((2, 20, 3))
    for law in laws[1:]:
        np.testing.assert_allclose(law.log_prob(x), laws[0].log_prob(x), rtol=1e-13)
        np.testing.assert_allclose(law.score_jvp(x, v), laws[0].score_jvp(x, v), rtol=1e-12)
        np.testing.assert_allclose(law.score_divergence(x), laws[0].score_divergence(x), rtol=1e-12)
        np.testing.assert_allclose(law.covariance, laws[0].covariance, rtol=1e-13)
    np.testing.assert_allclose(laws[0].weights, [0.25, 0.75])


def test_work_in_blocks_changes_nothing(monkeypatch):
    law, x = LAWS["full"], points(LAWS["full"])
    t = RNG.uniform(0.1, 0.9, len(x))
    calls = (
        lambda: law.log_prob(x),
        lambda: law.score_jvp(x, x),
        lambda: law.predict(x, t, 1 - t, "v"),
        lambda: law.reverse_conditional(x, t, 1 - t).log_prob(x),
    )
    whole = [f() for f in calls]
    monkeypatch.setattr("alphabar.core.mixture.BLOCK", 7 * law.means.size)
    for f, want in zip(calls, whole, strict=True):
        np.testing.assert_allclose(f(), want, rtol=1e-14)


# ------------------------------------------------------------------------------------------------------------ noised laws


def test_convolution_is_the_integral():  # S0-E10
    sigma, u = 0.7, np.linspace(-12, 12, 20001)
    p = np.exp(LINE.log_prob(u[:, None]))
    x = np.array([-3.0, -0.4, 0.9, 2.5])
    want = [integral(p * stats.norm(u, sigma).pdf(xi), u) for xi in x]
    np.testing.assert_allclose(np.exp(LINE.convolve(sigma).log_prob(x[:, None])), want, rtol=1e-9)


@each_law
def test_diffusing_twice_is_diffusing_once(law):
    x = points(law)
    twice = law.diffuse(0.8, 0.3).diffuse(0.5, 0.6)
    np.testing.assert_allclose(twice.log_prob(x), law.diffuse(0.4, np.hypot(0.15, 0.6)).log_prob(x), rtol=1e-10)
    np.testing.assert_allclose(law.diffuse(0.8, 0.3).mean, 0.8 * law.mean, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(law.diffuse(0.8, 0.3).covariance, 0.64 * law.covariance + 0.09 * np.eye(law.dim), rtol=1e-12)


def test_noise_covers_space_more_evenly():  # S0-C6
    law = GaussianMixture([0.2, 0.8], [[-8.0], [8.0]], 1.0)
    box = np.linspace(-12, 12, 2001)[:, None]
    spread = [np.ptp(law.convolve(sigma).log_prob(box)) for sigma in (0.5, 1, 2, 4, 8, 16)]
    assert np.all(np.diff(spread) < 0) and spread[0] > 20 and spread[-1] < 1


def test_samples_of_the_noised_law_are_easy_to_draw():  # S0-C7, X02: q_σ is sampled by x + σz; what is unknown is its score
    n, sigma = 50_000, 0.8
    law = GaussianMixture([0.3, 0.7], [[-2.0], [1.0]], [0.16, 0.36])
    noised = law.convolve(sigma)

    def distance(x):
        x = np.sort(x)
        sd = np.sqrt(noised.covariances[:, 0, 0])
        cdf = (noised.weights * stats.norm(noised.means[:, 0], sd).cdf(x[:, None])).sum(1)
        return np.abs(cdf - (np.arange(n) + 0.5) / n).max()

    x = law.sample(n, seed=3)[:, 0]
    critical = 1.358 / np.sqrt(n)  # 5 %
    assert distance(x + sigma * np.random.default_rng(0).standard_normal(n)) < critical
    assert distance(noised.sample(n, seed=4)[:, 0]) < critical
    assert distance(x) > 5 * critical


# --------------------------------------------------------------------------------------------------------------- sampling


@each_law
def test_moments_of_the_samples(law):
    n = 40_000
    x = law.sample(n, seed=1)
    assert np.all(np.abs(x.mean(0) - law.mean) < 4 * np.sqrt(np.diag(law.covariance) / n))
    apart = (x - law.mean)[:, :, None] * (x - law.mean)[:, None, :]
    assert np.all(np.abs(apart.mean(0) - law.covariance) < 4 * apart.std(0) / np.sqrt(n))
    # log p under p, whose mean is the negative entropy, meets every component's place and shape
    fresh = law.log_prob(law.sample(n, seed=2))
    own = law.log_prob(x)
    assert abs(own.mean() - fresh.mean()) < 4 * np.sqrt((own.var() + fresh.var()) / n)


def test_shape_of_each_component_in_the_samples():
    law, n = LAWS["full"], 30_000
    far = GaussianMixture(law.weights, 100 * np.arange(3)[:, None] + law.means, law.covariances)
    x = far.sample(n, seed=6)
    k = far.responsibilities(x).argmax(1)
    counts = np.bincount(k, minlength=3)
    assert np.all(np.abs(counts / n - WEIGHTS) < 4 * np.sqrt(WEIGHTS * (1 - WEIGHTS) / n))
    for j in range(3):
        y = np.linalg.solve(np.linalg.cholesky(far.covariances[j]), (x[k == j] - far.means[j]).T)
        assert stats.kstest(y.reshape(-1), stats.norm.cdf).pvalue > 1e-3
        assert np.all(np.abs(np.corrcoef(y) - np.eye(4)) < 4 / np.sqrt(counts[j]))


@each_law
def test_a_sample_depends_on_seed_and_place_alone(law):
    x = law.sample(30, seed=9)
    np.testing.assert_array_equal(law.sample(7, seed=9, first_sample=11), x[11:18])
    assert not np.any(law.sample(30, seed=10) == x) and not np.any(law.sample(30, seed=9, step=1) == x)
    assert law.sample(0).shape == (0, law.dim)


def test_components_are_drawn_with_the_counters_uniforms():
    law = GaussianMixture([0.2, 0.0, 0.5, 0.3, 0.0], np.arange(5.0)[:, None], 0.0)
    u = np.array([counter.uniform(1, 7, 0, streams.DENSITY, sample=k)[0] for k in range(50)])
    np.testing.assert_array_equal(law.sample(50, seed=7)[:, 0], np.select([u < 0.2, u < 0.7], [0, 2], 3))


# ---------------------------------------------------------------------------------------------------- posteriors and models


def test_denoising_is_the_posterior_mean_by_quadrature():
    a, n, u = 0.8, 0.6, np.linspace(-14, 14, 20001)
    p = np.exp(LINE.log_prob(u[:, None]))
    x = np.array([-2.0, 0.1, 1.7])
    weight = [p * stats.norm(a * u, n).pdf(xi) for xi in x]
    want = [integral(w * u, u) / integral(w, u) for w in weight]
    np.testing.assert_allclose(LINE.denoise(x[:, None], a, n)[:, 0], want, rtol=1e-10)


@each_law
def test_predictions_obey_their_algebra(law):
    x = points(law)
    a, n = np.cos(np.linspace(0.1, 1.5, len(x))), np.sin(np.linspace(0.1, 1.5, len(x)))
    eps, x0, v, score = (law.predict(x, a, n, kind) for kind in ("eps", "x0", "v", "score"))
    a, n = a[:, None], n[:, None]
    np.testing.assert_allclose(a * x0 + n * eps, x, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(v, a * eps - n * x0, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(score, -eps / n, rtol=1e-11)
    np.testing.assert_allclose(score[5], law.diffuse(a[5, 0], n[5, 0]).score(x[5:6])[0], rtol=1e-11)
    np.testing.assert_array_equal(law.denoise(x, a[:, 0], n[:, 0]), x0)


def test_predictions_at_both_ends():
    law = LAWS["full"]
    x = points(law)
    np.testing.assert_allclose(law.denoise(x, 1.0, 0.0), x, rtol=1e-12)
    np.testing.assert_allclose(law.predict(x, 1.0, 0.0), 0 * x, atol=1e-14)
    np.testing.assert_allclose(law.predict(x, 1.0, 0.0, "score"), law.score(x), rtol=1e-13)
    np.testing.assert_allclose(law.denoise(x, 0.0, 1.0), np.broadcast_to(law.mean, x.shape), rtol=1e-12)
    np.testing.assert_allclose(law.predict(x, 0.0, 2.0), x / 2, rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_model_answers_in_kind(dtype):
    s, law = schedules.linear(), LAWS["full"]
    x = points(law).astype(dtype)
    model = law.model(s)
    same = model(x, np.full(len(x), 300))
    assert same.dtype == dtype
    np.testing.assert_allclose(same, law.predict(x, s.signal[300], s.noise[300]), rtol=1e-5 if dtype == "float32" else 1e-13)
    t = np.arange(1, len(x) + 1) * 20
    np.testing.assert_allclose(model(x, t)[7:8], model(x[7:8], t[7:8]), rtol=1e-5 if dtype == "float32" else 1e-12)
    torch = pytest.importorskip("torch")
    answer = model(torch.tensor(x), torch.tensor(t))
    assert isinstance(answer, torch.Tensor) and answer.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(answer.numpy(), model(x, t))


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_sampling_with_the_exact_model_recovers_the_law(prediction):
    s, n = schedules.linear(), 4000
    law = GaussianMixture([0.3, 0.7], [[-2.0, 1.0], [1.5, -0.5]], np.array([[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]]]))
    x_T = samplers.prior((n, 2), seed=3, dtype=np.float64)
    x = samplers.sample(law.model(s, prediction), tables.dpm_solver_pp(s, 50, prediction=prediction), x_T)
    share, drawn = (law.responsibilities(x)[:, 0] > 0.5).mean(), law.log_prob(x)
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
    assert abs(drawn.mean() - law.log_prob(law.sample(100_000)).mean()) < 4 * drawn.std() / np.sqrt(n) + 0.01  # 50 steps


# ----------------------------------------------------------------------------------------------------- reverse conditional


@each_law
@pytest.mark.parametrize(("a", "n", "a_to", "n_to"), [(0.6, 0.8, 0.9, np.sqrt(0.19)), (1.0, 2.0, 1.0, 0.5), (0.6, 0.8, 1.0, 0.0)])
def test_reverse_conditional_is_bayes_rule(law, a, n, a_to, n_to):  # S4-E3
    x_t, x_to = points(law), points(law, spread=2.0)[::-1]
    beta = n**2 - (a / a_to * n_to) ** 2
    step = stats.norm(a / a_to * x_to, np.sqrt(beta)).logpdf(x_t).sum(1)
    want = law.diffuse(a_to, n_to).log_prob(x_to) + step - law.diffuse(a, n).log_prob(x_t)
    reverse = law.reverse_conditional(x_t, a, n, a_to, n_to)
    np.testing.assert_allclose(reverse.log_prob(x_to), want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(law.reverse_conditional(x_t, a, n, a_to, n_to, beta).log_prob(x_to), want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(reverse[3].log_prob(x_to[3:4])[0], want[3], rtol=1e-9, atol=1e-9)
    mixed = law.reverse_conditional(x_t, np.r_[np.full(39, a), 0.1], n, a_to, n_to)
    np.testing.assert_allclose(mixed.log_prob(x_to)[:39], want[:39], rtol=1e-9, atol=1e-9)
    assert len(reverse) == len(x_t) and reverse[-1].means.shape == law.means.shape
    drawn = reverse.sample(seed=3)
    np.testing.assert_array_equal(law.reverse_conditional(x_t[5:9], a, n, a_to, n_to).sample(seed=3, first_sample=5), drawn[5:9])
    assert not np.any(drawn == reverse.sample(seed=3, step=0))  # step 0 is the noise of GaussianMixture.sample


def test_reverse_conditional_by_quadrature():  # S4-E3: density, mean and variance of q(x_{t−1}|x_t) of a schedule's step
    s, t = schedules.linear(20, rescale=True), 12
    x_t, u = np.array([[-1.1], [0.3]]), np.linspace(-8, 8, 8001)
    reverse = LINE.reverse_conditional(x_t, s.signal[t], s.noise[t], s.signal[t - 1], s.noise[t - 1], s.beta[t])
    before = np.exp(LINE.diffuse(s.signal[t - 1], s.noise[t - 1]).log_prob(u[:, None]))
    for i in range(2):
        p = before * stats.norm(np.sqrt(s.alpha[t]) * u, np.sqrt(s.beta[t])).pdf(x_t[i, 0])
        p /= integral(p, u)
        np.testing.assert_allclose(np.exp(reverse[i].log_prob(u[:, None])), p, atol=1e-10)
        mean = integral(p * u, u)
        assert reverse.mean[i, 0] == pytest.approx(mean, abs=1e-10)
        assert reverse.covariance[i, 0, 0] == pytest.approx(integral(p * (u - mean) ** 2, u), abs=1e-10)


def test_few_exact_reverse_steps_give_the_law():  # S4-E3: steps of any size, where a normal reverse step would fail
    s, n = schedules.linear(), 20_000
    law = GaussianMixture([0.3, 0.7], [[-2.0], [1.0]], [0.16, 0.36])
    x = law.diffuse(s.signal[-1], s.noise[-1]).sample(n, seed=1)
    for i, (t, t_to) in enumerate([(1000, 500), (500, 200), (200, 0)]):
        x = law.reverse_conditional(x, s.signal[t], s.noise[t], s.signal[t_to], s.noise[t_to]).sample(seed=1, step=i + 1)
    cdf = (law.weights * stats.norm(law.means[:, 0], np.sqrt(law.covariances[:, 0, 0])).cdf(np.sort(x, axis=0))).sum(1)
    assert np.abs(cdf - (np.arange(n) + 0.5) / n).max() < 1.63 / np.sqrt(n)  # 1 %


def test_reverse_step_of_a_mixture_turns_normal_as_the_step_shrinks():  # S3-C2
    law, x_t, u = LINE, np.array([[0.2]]), np.linspace(-9, 9, 20001)
    divergence = []
    for beta in (0.5, 0.2, 0.05, 0.01, 0.002):
        a, n = 0.7 * np.sqrt(1 - beta), np.sqrt((1 - beta) * 0.51 + beta)
        reverse = law.reverse_conditional(x_t, a, n, 0.7, np.sqrt(0.51), beta)
        log_p = reverse[0].log_prob(u[:, None])
        matched = stats.norm(reverse.mean[0, 0], np.sqrt(reverse.covariance[0, 0, 0])).logpdf(u)
        divergence.append(integral(np.exp(log_p) * (log_p - matched), u))
    assert np.all(np.diff(divergence) < 0) and divergence[0] > 1e-3 and 0 <= divergence[-1] < 1e-7


def test_empirical_reverse_posterior_is_a_softmax_over_all_points():  # S1-C3
    data = RNG.standard_normal((30, 2))
    law = GaussianMixture(np.ones(30), data, 0.0)
    x_t, a, n = RNG.standard_normal((5, 2)), 0.6, 0.8
    logits = -((x_t[:, None] - a * data) ** 2).sum(2) / (2 * n**2)
    softmax = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
    to_data = law.reverse_conditional(x_t, a, n)
    np.testing.assert_allclose(to_data.weights, softmax, rtol=1e-11)
    np.testing.assert_allclose(to_data.mean, softmax @ data, rtol=1e-11)
    np.testing.assert_allclose(law.denoise(x_t, a, n), softmax @ data, rtol=1e-11)
    drawn = to_data.sample(seed=2)
    assert all((data == row).all(1).any() for row in drawn)
    step = law.reverse_conditional(x_t, a, n, 0.9, np.sqrt(0.19))  # components are the posteriors q(x_to|x_t, x_0 = point)
    beta = 1 - 0.36 / 0.81
    np.testing.assert_allclose(step[0].covariances[4], 0.19 / 0.64 * beta * np.eye(2), rtol=1e-12)
    fewer = GaussianMixture(np.ones(29), data[:-1], 0.0)
    assert np.abs(fewer.reverse_conditional(x_t, a, n).mean - to_data.mean).max() > 1e-4
    assert np.isfinite(law.diffuse(a, n).log_prob(x_t)).all()
    with pytest.raises(ValueError, match="singular"):
        law.log_prob(x_t)
    with pytest.raises(ValueError, match="singular"):
        to_data.log_prob(x_t)


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], [[0.0], [1.0], [2.0]], 1.0), "weights must be 3"),
        (([1, -1], [[0.0], [1.0]], 1.0), "weights"),
        (([0, 0], [[0.0], [1.0]], 1.0), "weights"),
        (([1, 1], [0.0, 1.0], 1.0), "means must be finite and of shape"),
        (([1, 1], [[0.0], [np.nan]], 1.0), "means"),
        (([1, 1], [[0.0], [1.0]], np.ones((2, 2))), "covariances must be finite: a number"),
        (([1, 1], [[0.0], [1.0]], [1.0, -1.0]), "negative eigenvalue"),
        (([1], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]]), "negative eigenvalue"),
        (([1], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]]), "symmetric"),
    ],
)
def test_what_makes_no_law_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_wrong_arguments_are_named():
    law = LAWS["full"]
    x = points(law)
    cases = [
        (lambda: law.log_prob(x[:, :2]), r"x must have shape \(B, 4\)"),
        (lambda: law.score_jvp(x, x[:3]), "v must have the shape of x"),
        (lambda: law.sample(-1), "n must not be negative"),
        (lambda: law.convolve(-0.1), "noise must be finite and not negative"),
        (lambda: law.diffuse([0.1, 0.2], 0.5), "signal must be a number"),
        (lambda: law.denoise(x, 0.5, np.ones(3)), "noise must be a number or have shape"),
        (lambda: law.predict(x, 0.5, 0.5, "noise"), "prediction must be one of"),
        (lambda: law.model(schedules.linear(), "noise"), "prediction must be one of"),
        (lambda: law.reverse_conditional(x, 0.5, 0.5, 0.0, 0.5), "signal_to must be positive"),
        (lambda: law.reverse_conditional(x, 0.9, 0.1, 0.5, 0.5), "noise_to must be at most"),
        (lambda: law.reverse_conditional(x, 0.5, 0.8).log_prob(x[:2]), "x must have shape"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(IndexError):
        law.reverse_conditional(x, 0.5, 0.8)[len(x)]
