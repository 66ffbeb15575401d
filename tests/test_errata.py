"""The errata of the source documents about schedules, the forward process, DDPM, DDIM, guidance and losses, by their ids.

Each case computes a quantity from the formula as the document prints it and through the package, and returns both errors with the
tolerance. The package must be within it; the printed form must be off by more than ten times as much, or not be a number. The ids
are those of ``alphabar equations``.
"""

import warnings

import numpy as np
import pytest

from alphabar.core import forward, guidance, losses, samplers, schedules, tables

S = schedules.linear()
t = 500  # the example time
A, Ap, a, b, bt = S.alpha_bar[t], S.alpha_bar[t - 1], S.alpha[t], S.beta[t], S.beta_tilde[t]
X0, EPS = 0.7, -1.3
X_T = np.sqrt(A) * X0 + np.sqrt(1 - A) * EPS
K = np.sqrt(a) * (1 - Ap) / (a * (1 - Ap) + b)  # Cov(x_{t−1}, x_t | x_0)/Var(x_t | x_0): the exact gain

CASES = {}


def erratum(name):
    def register(f):
        CASES[name] = f
        return f

    return register


def posterior(x0, x_t, t=t):
    """The package's posterior mean, for numbers."""
    return forward.q_posterior(np.array([float(x0)]), np.array([float(x_t)]), t, S)[0][0]


def mean_from_eps(x_t, eps, t=t):
    return forward.posterior_mean_from_eps(np.array([float(x_t)]), np.array([float(eps)]), t, S)[0]


def ddim_mean(x0, x_t, t, t_to, sigma):
    return forward.ddim_posterior(np.array([float(x0)]), np.array([float(x_t)]), t, t_to, S, sigma)[0][0]


def log_normal(x, mean, var):
    return -((x - mean) ** 2) / (2 * var) - 0.5 * np.log(2 * np.pi * var)


def slope(f, x, h=1e-5):
    return (f(x + h) - f(x - h)) / (2 * h)


def final_variance(table, noise=lambda c: c):
    """The variance that sampling leaves of N(0, 1) data under its exact ε = √(1−ᾱ)·x, from the rows x' = a·x + e·m + c·z."""
    v = 1.0
    for row, n in zip(table.rows(), table.noise, strict=True):
        v = (row[2] + row[4] * n) ** 2 * v + noise(row[9]) ** 2
    return v


# ------------------------------------------------------------------------------------------------------------------------- S0


@erratum("X03")  # S0-E25: the KL at one x_t is not its expectation over x_t
def _():
    rng = np.random.default_rng(0)
    x0, eps, z = rng.standard_normal((3, 100_000, 1))
    x_t, _ = forward.q_sample(x0, t, S, eps=eps)
    right, var = forward.q_posterior(x0, x_t, t, S)
    model, _ = forward.p_mean_variance(0.5 * np.sqrt(1 - A) * x_t, x_t, t, S)
    draws = [right + sign * np.sqrt(var) * z for sign in (1, -1)]
    expected = np.mean([log_normal(x, right, var) - log_normal(x, model, var) for x in draws])
    kl = losses.normal_kl(right, var, model, var)
    return np.quantile(kl, 0.95) / expected - 1, kl.mean() / expected - 1, 1e-6


@erratum("X04")  # S0-E26: the printed KL is that to N(0, I)
def _():
    (mp, vp), (mq, vq) = (np.array([1.0, -0.5]), np.array([0.5, 2.0])), (np.array([0.3, 0.2]), np.array([1.5, 0.8]))
    z = np.linspace(-15, 15, 60_001)[:, None]
    exact = np.sum(np.exp(log_normal(z, mp, vp)) * (log_normal(z, mp, vp) - log_normal(z, mq, vq))) * (z[1, 0] - z[0, 0])
    printed = 0.5 * (mp @ mp + vp.sum() - 2 - np.log(vp.prod()))
    return printed - exact, losses.normal_kl(mp[None], vp, mq[None], vq)[0] - exact, 1e-9


@erratum("X04b")  # S0-E26 does not reduce to S0-E27
def _():
    mp, mq, var = np.array([[1.0]]), np.array([[0.3]]), 0.3
    want = 0.7**2 / (2 * var)
    return 0.5 * (1 + var - 1 - np.log(var)) - want, losses.normal_kl(mp, var, mq, var)[0] - want, 1e-12


@erratum("X05")  # S0-E28, S1-E12, S1-E14, S4-E14: √ᾱ_t for √α_t on x_t
def _():
    return np.sqrt(A) * (1 - Ap) / (1 - A) - K, posterior(0, 1) - K, 1e-12


@erratum("X06")  # S0-E28, S0-E29, S0-E31, S1-E14, S4-E73: 1/√ᾱ_t for 1/√α_t
def _():
    exact = np.sqrt(Ap) * X0 + K * (X_T - np.sqrt(A) * X0)
    return (X_T - b / np.sqrt(1 - A) * EPS) / np.sqrt(A) - exact, mean_from_eps(X_T, EPS) - exact, 1e-12


@erratum("X06b")  # the same in the whole sampler: log10 of the final variance
def _():
    log_v = 0.0
    for i in range(S.T, 0, -1):
        grown = 2 * np.log10((1 - S.beta[i]) / np.sqrt(S.alpha_bar[i])) + log_v
        log_v = np.logaddexp(grown * np.log(10), np.log(max(S.beta_tilde[i], 1e-300))) / np.log(10)
    return log_v, final_variance(tables.ddpm(S)) - 1, 2e-2


@erratum("X07")  # S0 l.245: ᾱ_T is almost 0, not almost 1
def _():
    left = schedules.prior_gap(S).signal ** 2
    return left - 1, left, 1e-4


def two_classes():
    """x0 | c ~ N(±1, ¼), p(c) = ½ at time t: (ε_c, ε_u, ∇ log p(c|x), ∇ log p(x|c)p(c|x)², x) for class +1."""
    x, v = 0.3, A * 0.25 + 1 - A
    p_c, p_o = (lambda x, c=c: np.exp(log_normal(x, c * np.sqrt(A), v)) for c in (1, -1))
    p = lambda x: (p_c(x) + p_o(x)) / 2  # noqa: E731
    eps = [-np.sqrt(1 - A) * slope(lambda x, f=f: np.log(f(x)), x) for f in (p_c, p)]
    classifier = slope(lambda x: np.log(p_c(x) / p(x)), x)
    target = slope(lambda x: np.log(p_c(x)) + 2 * np.log(p_c(x) / p(x)), x)
    return *(np.array([e]) for e in eps), classifier, target, p_c, p, x


def score(eps):
    return forward.score_from_eps(eps, t, S)[0]


@erratum("X08")  # S0-E33: the σ_t of classifier guidance is √(1−ᾱ_t), not √β̃_t
def _():
    eps_c, _, classifier, target, *_ = two_classes()
    guided = guidance.classifier_guided_eps(eps_c, np.array([classifier]), t, S, 2.0)
    return score(eps_c - 2.0 * np.sqrt(bt) * classifier) - target, score(guided) - target, 1e-7


@erratum("X09")  # S0-E36: gradients of densities for gradients of their logarithms
def _():
    eps_c, eps_u, _, _, p_c, p, x = two_classes()
    want = slope(lambda x: np.log(p(x)) + 2 * np.log(p_c(x) / p(x)), x)
    printed = score(eps_u) + 2 * (slope(p_c, x) - slope(p, x))
    return printed - want, score(eps_u) + 2 * guidance.implicit_classifier_score(eps_c, eps_u, t, S)[0] - want, 1e-7


@erratum("X10")  # S0-E35: (1+w)ε_c − wε_u belongs to p(x|c)p(c|x)^w, not to p(x)p(c|x)^w
def _():
    eps_c, eps_u, _, target, p_c, p, x = two_classes()
    printed = slope(lambda x: np.log(p(x)) + 2 * np.log(p_c(x) / p(x)), x)
    guided = score(guidance.classifier_free_eps(eps_c, eps_u, 2.0))
    return guided - printed, guided - target, 1e-7


@erratum("X11")  # S0-U1: √(1−ᾱ_t) for √(1−ᾱ_t/ᾱ_{t−1})
def _():
    printed = np.sqrt((1 - Ap) / (1 - A)) * np.sqrt(1 - A)
    return printed - np.sqrt(bt), forward.ddim_sigma(t, t - 1, S) - np.sqrt(bt), 1e-10


@erratum("X11b")  # the same in the ε coefficient of the step at η = 1
def _():
    want = -b / np.sqrt(a * (1 - A))
    printed = np.sqrt(max(1 - Ap - (1 - Ap), 0)) - np.sqrt(Ap * (1 - A) / A)
    return printed - want, tables.ddim(S, 1000, 1.0).rows()[S.T - t, 4] - want, 1e-10


@erratum("X12")  # S0-E44 names the unweighted term L_{t−1}, which has the weight of S0-E30
def _():
    wrong, true = np.array([[0.4]]), np.array([[EPS]])
    bound, _ = losses.weighted_loss(wrong, true, losses.eps_loss_weight(t, S))
    model, var = forward.p_mean_variance(wrong, np.array([[X_T]]), t, S)
    exact = losses.normal_kl(np.array([[posterior(X0, X_T)]]), var, model, var)[0]
    return losses.simple_loss(wrong, true)[0][0] - exact, bound[0] - exact, 1e-9


@erratum("X13")  # S0-E49: ᾱ_τi/ᾱ_τi−1 for ᾱ_τi−1; standard deviation of sampled N(0.7, 0.2²)
def _():
    k = lambda ab: np.sqrt(1 - ab) / (ab * 0.04 + 1 - ab)  # noqa: E731
    printed = 1.0
    for i in range(S.T, 0, -1):
        ratio = S.alpha_bar[i] / S.alpha_bar[i - 1]
        on_x, on_eps = (
            np.sqrt(ratio / S.alpha_bar[i]),
            np.sqrt(1 - ratio) - np.sqrt(ratio * (1 - S.alpha_bar[i]) / S.alpha_bar[i]),
        )
        printed *= abs(on_x + on_eps * k(S.alpha_bar[i]))
    x = np.array([-1.0, 1.0])  # linear, so two points tell mean and deviation

    def model(x, t):
        ab = S.alpha_bar[t]
        return k(ab) * (x - np.sqrt(ab) * 0.7)

    low, high = samplers.sample(model, tables.ddim(S, 1000), x)
    return printed - 0.2, abs((low + high) / 2 - 0.7) + abs((high - low) / 2 - 0.2), 4e-3


@erratum("X13b")  # the coefficient of x0 in one jump 500 → 480
def _():
    want = np.sqrt(S.alpha_bar[480])
    return np.sqrt(S.alpha_bar[500] / S.alpha_bar[480]) - want, tables.ddim(S, grid=[480, 500]).B0[0] - want, 1e-12


@erratum("X14")  # S0 l.362: the ε term points to x_t, against the score, not to the mode
def _():
    x = np.linspace(-2, 2, 9)
    eps = np.sqrt(1 - A) * x  # exact for N(0, 1) data
    towards = forward.score_from_eps(eps, t, S)
    cosine = np.sum(eps * towards) / np.linalg.norm(eps) / np.linalg.norm(towards)
    return cosine - 1, cosine + 1, 1e-12


# ------------------------------------------------------------------------------------------------------------------------- S1


@erratum("X17")  # S1-E12, S1-E14: √(ᾱ_t − 1) for √ᾱ_{t−1}
def _():
    with np.errstate(invalid="ignore"):
        printed = np.sqrt(A - 1) * b / (1 - A)
    want = np.sqrt(Ap) - K * np.sqrt(A)
    return printed - want, posterior(1, 0) - want, 1e-12


@erratum("X19")  # S1-E18..E20: 1/(2‖Σ‖²) for 1/(2σ²)
def _():
    shift = 0.01
    kl = losses.normal_kl(np.array([[shift]]), bt, np.array([[0.0]]), bt)[0]
    return shift**2 / (2 * bt**2) / kl - 1, shift**2 / (2 * bt) / kl - 1, 1e-10


# ------------------------------------------------------------------------------------------------------------------------- S2


def partial_correlation(C, i, j, k):
    rest = C[np.ix_([i, j], [i, j])] - np.outer(C[[i, j], k], C[[i, j], k]) / C[k, k]
    return rest[0, 1] / np.sqrt(rest[0, 0] * rest[1, 1])


@erratum("X26")  # S2 l.68: the forward process becomes non-Markov; the generative chain stays Markov
def _():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = schedules.from_betas([0.1, 1 / 3, 0.5])  # ᾱ = 0.9, 0.6, 0.3
    unit = np.eye(4)  # x_0, ε, z, z as coordinates
    x0, x3 = unit[0], s.signal[3] * unit[0] + s.noise[3] * unit[1]
    chain = [x0, x3]
    for k, now in ((2, 3), (3, 2)):
        sigma = forward.ddim_sigma(now, now - 1, s, 0.5)
        mean, _ = forward.ddim_posterior(x0, chain[-1], now, now - 1, s, float(sigma))
        chain.append(mean + sigma * unit[k])
    L = np.array(chain)
    forwards = partial_correlation(L @ L.T, 1, 0, 2)  # x_3, x_0 given x_2
    rows, G = tables.ddim(s, 3, 0.5).rows(), np.eye(3)
    for i in (1, 2):
        G[i] = (rows[i - 1, 2] + rows[i - 1, 4] * s.noise[4 - i]) * G[i - 1] + rows[i - 1, 9] * np.eye(3)[i]
    assert forwards == pytest.approx(-0.563, abs=1e-3)
    return forwards, partial_correlation(G @ G.T, 2, 0, 1), 1e-10


@erratum("X28")  # S2-U3: parentheses
def _():
    printed = np.sqrt((1 - Ap / (1 - A)) * np.sqrt(1 - A / Ap) + 0j)
    assert 1 - S.alpha_bar[1] / (1 - S.alpha_bar[2]) < 0  # and at t = 2 no real number at all
    return printed.real - np.sqrt(bt), forward.ddim_sigma(t, t - 1, S) - np.sqrt(bt), 1e-10


@erratum("X29")  # S2-U4: x̄(T) has the variance σ̄² + 1, not σ̄
def _():
    variance = (1 / S.signal[-1]) ** 2  # of x_T/√ᾱ_T with x_T ~ N(0, 1)
    return S.sigma_bar[-1] / variance - 1, (S.sigma_bar[-1] ** 2 + 1) / variance - 1, 1e-9


@erratum("X30")  # S2-U5: σ̂ is larger than σ(1), not than 1
def _():
    worst, largest = 0.0, 0.0
    for steps in (10, 100, 1000):
        tau = np.r_[0, schedules.timesteps(S.T, steps, "trailing")]
        hat, one = forward.ddim_sigma_hat(tau[1:], tau[:-1], S), forward.ddim_sigma(tau[1:], tau[:-1], S)
        worst, largest = max(worst, np.max(one - hat)), max(largest, hat.max())
    return 1 - largest, max(worst, 0.0), 1e-12


# ------------------------------------------------------------------------------------------------------------------------- S3


@erratum("X32")  # S3-E5: β̃_t is the variance given x_0 too; without x_0 it is larger
def _():
    given_x_t = 1 - S.alpha[2]  # N(0, 1) data: Cov(x_1, x_2) = √α_2, so Var(x_1|x_2) = 1 − α_2
    v, printed = 1 - S.alpha_bar[1], S.beta_tilde[2]
    given_both = v - S.alpha[2] * v**2 / (S.alpha[2] * v + S.beta[2])
    _, ours = forward.q_posterior(np.zeros(1), np.zeros(1), 2, S)
    return printed / given_x_t - 1, ours / given_both - 1, 1e-9


@erratum("X33")  # S3-E6: noise β̃·z for √β̃·z
def _():
    table = tables.ddpm(S)
    return final_variance(table, noise=lambda c: c**2) - 1, final_variance(table) - 1, 2e-2


@erratum("X34")  # S3 l.37: ε in μ̃ is the noise of the whole map, not of step t
def _():
    x0 = np.random.default_rng(0).standard_normal((1, 100_000))
    before, _ = forward.q_sample(x0, t - 1, S, seed=1, step=0)
    x_t, of_step = forward.q_step(before, t, S, seed=1)
    whole = forward.predict_eps_from_x0(x_t, x0, t, S)
    exact, _ = forward.q_posterior(x0, x_t, t, S)
    rms = [np.sqrt(np.mean((forward.posterior_mean_from_eps(x_t, e, t, S) - exact) ** 2)) for e in (of_step, whole)]
    return *rms, 1e-10


@erratum("X35")  # S3-E10, S3-E14: ε_θ(x_0, t) for ε_θ(x_t, t); error of the best linear predictor
def _():
    x0 = np.random.default_rng(0).standard_normal((1, 1_000_000))
    x_t, eps = forward.q_sample(x0, t, S, seed=1)
    best = [losses.simple_loss(np.mean(eps * x) / np.mean(x * x) * x, eps)[0][0] for x in (x0, x_t)]
    return best[0] - A, best[1] - A, 2e-3


@erratum("X36")  # S3-E3: the merged noise is a new variable
def _():
    want = 1 - a * S.alpha[t - 1]
    _, merged = forward.merge_noise(*((np.sqrt(S.alpha[k]), np.sqrt(S.beta[k])) for k in (t - 1, t)))
    return (np.sqrt(a * (1 - S.alpha[t - 1])) + np.sqrt(1 - a)) ** 2 - want, merged**2 - want, 1e-12


@erratum("X37")  # S3-E11, S3-E12 (and S4-E36..E38 with α = 1 − β): α_t for ᾱ_t; Var(x_{t−1}|x_0)
def _():
    printed = (1 - Ap - bt) * (1 - A) / (1 - a) + bt
    on_x = ddim_mean(0, 1, t, t - 1, np.sqrt(bt))
    return printed - (1 - Ap), on_x**2 * (1 - A) + bt - (1 - Ap), 1e-12


@erratum("X38")  # S3-E13: σ² = ηβ̃ for σ² = η²β̃
def _():
    want = (0.5 * np.sqrt(bt)) ** 2
    return 0.5 * bt / want - 1, forward.ddim_sigma(t, t - 1, S, 0.5) ** 2 / want - 1, 1e-10


@erratum("X39")  # S3-C11: conditional and unconditional swapped
def _():
    eps_c, eps_u, _, target, *_ = two_classes()

    def predict(x, t, y):
        return np.where(y == 1, eps_c, eps_u)

    x, times = np.array([0.3]), np.array([t])
    right = guidance.classifier_free(predict, 1, 2.0, null=0)(x, times)
    swapped = guidance.classifier_free(predict, 0, 2.0, null=1)(x, times)
    return score(swapped) - target, score(right) - target, 1e-7


@erratum("X40")  # S3 l.51: β̃_t = β_t is a choice of variance, not an equality
def _():
    variances = [forward.p_mean_variance(np.zeros(1), np.zeros(1), 2, S, variance=v)[1] for v in ("posterior", "beta")]
    v = 1 - S.alpha_bar[1]
    exact = v - S.alpha[2] * v**2 / (S.alpha[2] * v + S.beta[2])
    return variances[1] / exact - 1, variances[0] / exact - 1, 1e-9


# ------------------------------------------------------------------------------------------------------------------------- S4


@erratum("X44")  # S4-E12: the transition's mean is √α_t·x_{t−1}, not √α_t·x_0
def _():
    x, none = np.ones((1, 1)), np.zeros((1, 1))
    for k in range(1, S.T + 1):
        x, _ = forward.q_step(x, k, S, eps=none)
    return np.sqrt(S.alpha[-1]) - S.signal[-1], x[0, 0] - S.signal[-1], 1e-12


@erratum("X46")  # S4-E17, S4-E18: x_0 from (x_t, ε) without the bars
def _():
    ours = forward.predict_x0_from_eps(np.array([X_T]), np.array([EPS]), t, S)[0]
    return (X_T - np.sqrt(1 - a) * EPS) / np.sqrt(a) - X0, ours - X0, 1e-12


@erratum("X47")  # S4-E19, S4-E20: 1 − α_t for 1 − ᾱ_t in the loss weight
def _():
    delta = 0.37
    exact = (mean_from_eps(X_T, EPS) - mean_from_eps(X_T, EPS + delta)) ** 2 / (2 * bt) / delta**2
    return b * b / (2 * bt * a * (1 - a)) / exact - 1, losses.eps_loss_weight(t, S) / exact - 1, 1e-9


@erratum("X47b")  # S4-E20, S4-E21: the network's input without the bars
def _():
    signal = np.prod(np.sqrt(S.alpha[1 : t + 1]))
    x_t, _ = forward.q_sample(np.ones((1, 1)), t, S, eps=np.zeros((1, 1)))
    return np.sqrt(a) - signal, x_t[0, 0] - signal, 1e-12


@erratum("X48")  # S4-E22: 1e−5 is bits a dimension, not the whole KL
def _():
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])  # of CIFAR-10 in [0, 1]
    gap = schedules.prior_gap(S, np.mean((2 * mean - 1) ** 2 + (2 * std) ** 2))
    return 3072 * gap.kl / 1e-5 - 1, gap.bits / 1e-5 - 1, 0.5


@erratum("X55")  # S4-E41: ε without √(1−ᾱ_t) in the network's input; its variance for unit data
def _():
    unit = np.eye(2)  # x_0 and ε as coordinates
    x_t, _ = forward.q_sample(unit[:1], t, S, eps=unit[1:])
    return A + 1 - 1, np.sum(x_t**2) - 1, 1e-12


@erratum("X56")  # S4-E42: bars missing; the noise left in x_{t−1} by the true ε
def _():
    row = tables.ddim(S, 1000).rows()[S.T - t]
    unit_noise = row[2] * S.noise[t] + row[4]
    return np.sqrt(1 - S.alpha[t - 1]) - np.sqrt(1 - Ap), unit_noise - np.sqrt(1 - Ap), 1e-12


@erratum("X58")  # S4-E50: the network's argument is x_t = x̄/√(σ̄²+1), not x_t/√(σ̄²+1)
def _():
    sigma = S.sigma_bar[t]
    x_bar = X_T / S.signal[t]
    return X_T / np.sqrt(sigma**2 + 1) - X_T, x_bar / np.sqrt(sigma**2 + 1) - X_T, 1e-10


@pytest.mark.parametrize("name", CASES)
def test_erratum(name):
    printed, ours, tolerance = CASES[name]()
    assert abs(ours) <= tolerance
    assert not abs(printed) <= 10 * tolerance
