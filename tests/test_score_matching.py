"""Score-matching losses: gradients by finite differences, minimisers and constants in closed form or by quadrature."""

import numpy as np
import pytest

from alphabar.core import score_matching as sm
from alphabar.core.mixture import GaussianMixture

RNG = np.random.default_rng(8)
SHAPE = (4, 3, 2)
S, T, JV, V, X0 = RNG.standard_normal((5, *SHAPE))
SIGMA = np.array([0.1, 0.5, 1.0, 3.0])
NOISY = X0 + SIGMA[:, None, None] * RNG.standard_normal(SHAPE)
TRACE = RNG.standard_normal(4)


def like(constant, output):
    return constant.astype(output.dtype)


LOSSES = {  # each a function of the network's outputs alone, those outputs, and the value of a sample
    "explicit": (lambda s: sm.explicit(s, like(T, s)), (S,), lambda s: 0.5 * np.sum((s - T) ** 2, (1, 2))),
    "implicit": (sm.implicit, (S, TRACE), lambda s, tr: 0.5 * np.sum(s**2, (1, 2)) + tr),
    "sliced, reduced": (
        lambda s, p: sm.sliced(s, p, like(V, s)),
        (S, JV),
        lambda s, p: np.sum(V * p, (1, 2)) + 0.5 * np.sum(s**2, (1, 2)),
    ),
    "sliced": (
        lambda s, p: sm.sliced(s, p, like(V, s), variance_reduced=False),
        (S, JV),
        lambda s, p: np.sum(V * p, (1, 2)) + 0.5 * np.sum(V * s, (1, 2)) ** 2,
    ),
    "sliced fisher": (
        lambda s: sm.sliced_fisher(s, like(T, s), like(V, s)),
        (S,),
        lambda s: 0.5 * np.sum(V * (T - s), (1, 2)) ** 2,
    ),
    "denoising": (
        lambda s: sm.denoising(s, like(X0, s), like(NOISY, s), 0.5),
        (S,),
        lambda s: 0.5 * np.sum((s - (X0 - NOISY) / 0.25) ** 2, (1, 2)),
    ),
    "denoising, levels": (
        lambda s: sm.denoising(s, like(X0, s), like(NOISY, s), SIGMA),
        (S,),
        lambda s: 0.5 * np.sum((s - (X0 - NOISY) / SIGMA[:, None, None] ** 2) ** 2, (1, 2)),
    ),
    "ncsn": (
        lambda s: sm.ncsn(s, like(X0, s), like(NOISY, s), SIGMA),
        (S,),
        lambda s: SIGMA**2 * 0.5 * np.sum((s - (X0 - NOISY) / SIGMA[:, None, None] ** 2) ** 2, (1, 2)),
    ),
    "ncsn, one": (
        lambda s: sm.ncsn(s, like(X0, s), like(NOISY, s), SIGMA, weight="one"),
        (S,),
        lambda s: 0.5 * np.sum((s - (X0 - NOISY) / SIGMA[:, None, None] ** 2) ** 2, (1, 2)),
    ),
}
each_loss = pytest.mark.parametrize(("loss", "outputs", "formula"), LOSSES.values(), ids=LOSSES)


@each_loss
def test_value_is_the_formula_and_gradients_are_those_of_the_batch_mean(loss, outputs, formula):
    value, *gradients = loss(*outputs)
    np.testing.assert_allclose(value, formula(*outputs), rtol=1e-12)
    assert len(gradients) == len(outputs)
    h = 1e-5
    for i, (gradient, output) in enumerate(zip(gradients, outputs, strict=True)):
        assert gradient.shape == output.shape
        direction = RNG.standard_normal(output.shape)
        ends = [loss(*(o + (sign * h * direction if j == i else 0) for j, o in enumerate(outputs)))[0].mean() for sign in (1, -1)]
        assert np.sum(gradient * direction) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-8)


@each_loss
def test_float32_stays_float32(loss, outputs, formula):
    answers = loss(*(o.astype(np.float32) for o in outputs))
    assert all(a.dtype == np.float32 for a in answers)
    for a, want in zip(answers, loss(*outputs), strict=True):
        np.testing.assert_allclose(a, want, rtol=2e-5, atol=2e-5)


def test_arrays_of_torch_in_and_out():
    torch = pytest.importorskip("torch")
    s, x0, noisy, v, tr = (torch.tensor(a) for a in (S, X0, NOISY, V, TRACE))
    for answer in (
        sm.explicit(s, x0),
        sm.implicit(s, tr),
        sm.sliced(s, noisy, v),
        sm.sliced_fisher(s, x0, v),
        sm.denoising(s, x0, noisy, torch.tensor(SIGMA)),
        sm.ncsn(s, x0, noisy, torch.tensor(SIGMA)),
        sm.perturb(x0, torch.tensor(SIGMA)),
    ):
        assert all(isinstance(a, torch.Tensor) for a in answer)
    assert sm.fisher_divergence(s, x0) == pytest.approx(sm.fisher_divergence(S, X0))
    leaf = s.clone().requires_grad_()
    (0.5 * (leaf - (x0 - noisy) / 0.25) ** 2).sum(dim=(1, 2)).mean().backward()
    np.testing.assert_allclose(sm.denoising(s, x0, noisy, 0.5)[1].numpy(), leaf.grad.numpy(), rtol=1e-12)


# ----------------------------------------------------------------------------------------------------- explicit and implicit

LAW = GaussianMixture([0.4, 0.6], [[-1.5], [1.0]], [0.5, 0.8])
GRID = np.linspace(-14, 14, 28001)[:, None]
WEIGHTS = np.exp(LAW.log_prob(GRID)) * (GRID[1, 0] - GRID[0, 0])


def model(theta, x):
    """(s(x), s'(x)) of s = tanh(a·x) + b·x."""
    a, b = theta
    return np.tanh(a * x) + b * x, (a / np.cosh(a * x) ** 2 + b)[:, 0]


def test_fisher_divergence_vanishes_for_the_true_score_alone():  # S0-E2
    assert sm.fisher_divergence(LAW.score(GRID), LAW.score(GRID), WEIGHTS) == 0
    assert sm.fisher_divergence(LAW.score(GRID) + 0.1, LAW.score(GRID), WEIGHTS) == pytest.approx(0.005, rel=1e-9)


def test_monte_carlo_agrees_with_quadrature():  # S0-E3, S4-E56, S4-E57
    n, theta = 100_000, (1.1, -0.9)
    x = LAW.sample(n, seed=1)
    values, _ = sm.explicit(model(theta, x)[0], LAW.score(x))
    exact = sm.fisher_divergence(model(theta, GRID)[0], LAW.score(GRID), WEIGHTS)
    assert sm.fisher_divergence(model(theta, x)[0], LAW.score(x)) == pytest.approx(values.mean())
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(n)
    values, _, _ = sm.implicit(*model(theta, x))
    exact = float((WEIGHTS * sm.implicit(*model(theta, GRID))[0]).sum())
    assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(n)


def test_sliced_fisher_and_sliced_differ_by_a_constant():  # S4-E59 − S4-E60, for each direction v by itself
    law = GaussianMixture(
        [0.3, 0.7], [[-1.0, 0.5], [1.0, -0.5]], np.array([[[0.6, 0.1], [0.1, 0.5]], [[0.5, -0.2], [-0.2, 0.6]]])
    )
    g = np.linspace(-7, 7, 141)
    x = np.stack(np.meshgrid(g, g, indexing="ij"), -1).reshape(-1, 2)
    weights, target = np.exp(law.log_prob(x)) * (g[1] - g[0]) ** 2, law.score(x)
    for v in (np.array([1.0, 0.0]), np.array([0.8, -1.3])):
        direction = np.broadcast_to(v, x.shape)
        gaps = []
        for a, b in ((0.3, -0.5), (1.1, -0.9), (-0.7, 0.2)):
            M = np.array([[a, 0.4], [-0.2, b]])
            s = np.tanh(x @ M.T) + b * x
            product = (1 - np.tanh(x @ M.T) ** 2) * (M @ v) + b * v
            fisher = weights @ sm.sliced_fisher(s, target, direction)[0]
            gaps.append(fisher - weights @ sm.sliced(s, product, direction, variance_reduced=False)[0])
        np.testing.assert_allclose(gaps, 0.5 * weights @ (target @ v) ** 2, atol=1e-7)


def test_variance_reduction_reduces_the_variance():  # S0-E5 against S4-E60
    n, matrix = 20_000, RNG.standard_normal((5, 5))
    x = RNG.standard_normal((n, 5))
    v = sm.projections((n, 5), seed=1, dtype=np.float64)
    reduced, plain = (sm.sliced(x @ matrix.T, v @ matrix.T, v, variance_reduced=r)[0] for r in (True, False))
    assert abs(reduced.mean() - plain.mean()) < 4 * (reduced - plain).std() / np.sqrt(n)
    assert reduced.var() < 0.7 * plain.var()


# ----------------------------------------------------------------------------------------------------------------- denoising


def test_perturbed_samples():  # S0-E9
    n, sigma = 20_000, np.array([0.1, 2.0])
    x0 = np.full((2 * n, 3), 0.7)
    levels = np.repeat(sigma, n)
    noisy, eps = sm.perturb(x0, levels, seed=3)
    np.testing.assert_allclose(noisy, x0 + levels[:, None] * eps, rtol=1e-15)
    for k in range(2):
        part = noisy[k * n : (k + 1) * n] - 0.7
        assert np.all(np.abs(part.mean(0)) < 4 * sigma[k] / np.sqrt(n))
        assert np.all(np.abs(part.var(0) / sigma[k] ** 2 - 1) < 4 * np.sqrt(2 / n))
    np.testing.assert_array_equal(sm.perturb(x0[:5], 1.0, seed=3, first_sample=9)[1], eps[9:14])
    assert not np.array_equal(sm.perturb(x0[:5], 1.0, seed=3, step=1)[1], eps[:5])
    given, same = sm.perturb(x0[:5], 0.5, eps=x0[:5])
    np.testing.assert_array_equal(given, 1.5 * x0[:5])
    assert same is not None and sm.perturb(x0[:5].astype(np.float32), 0.5)[0].dtype == np.float32


NODES, NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(20)
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()
CLEAN, EPS = (m.reshape(-1, 1) for m in np.meshgrid(NODES, NODES))  # x0, ε ~ N(0, 1): exact for polynomials
BOTH = np.outer(NODE_WEIGHTS, NODE_WEIGHTS).reshape(-1)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_minimiser_and_minimum_for_normal_data(sigma):  # S0-E14, S0-E11
    noisy, _ = sm.perturb(CLEAN, sigma, eps=EPS)

    def loss(slope):
        return BOTH @ sm.denoising(slope * noisy, CLEAN, noisy, sigma)[0]

    best = -1 / (1 + sigma**2)
    assert loss(best) == pytest.approx(0.5 / (sigma**2 * (1 + sigma**2)), rel=1e-11)
    for other in (best - 1e-3, best + 1e-3, -1.0):
        assert loss(other) - loss(best) == pytest.approx(0.5 * (other - best) ** 2 * (1 + sigma**2), rel=1e-6)


def test_x01_denoising_finds_the_noised_score_not_that_of_the_data():  # S0-E11 prints ∇log p_data
    n, sigma = 400_000, 0.5
    x0 = GaussianMixture([1], [[0.0]], 1.0).sample(n, seed=1)
    noisy, _ = sm.perturb(x0, sigma, seed=2)
    _, gradient = sm.denoising(np.zeros_like(noisy), x0, noisy, sigma)  # the loss of s = a·x̃ is a parabola in a
    slope = -np.sum(gradient * noisy) / np.mean(noisy**2)
    residual = (x0 - noisy) / sigma**2 - slope * noisy
    error = np.sqrt(np.mean((residual * noisy) ** 2) / n) / np.mean(noisy**2)
    assert abs(slope + 1 / (1 + sigma**2)) < 4 * error
    assert abs(slope + 1) > 40 * error


@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_weight_sigma2_makes_all_levels_alike(sigma, dtype):  # S0-C8: a zero network has d/2 at every level
    n, d = 20_000, 7
    x0 = RNG.standard_normal((n, d)).astype(dtype)
    noisy, _ = sm.perturb(x0, sigma, seed=4)
    value, _ = sm.ncsn(np.zeros_like(x0), x0, noisy, np.full(n, sigma, dtype))
    assert abs(value.mean() - d / 2) < 4 * np.sqrt(d / 2 / n)
    unit = np.sign(RNG.standard_normal((5, d))) * sigma
    np.testing.assert_allclose(sm.ncsn(0 * unit, 0 * unit, unit, sigma)[0], d / 2, rtol=1e-12)
    np.testing.assert_allclose(sm.ncsn(0 * unit, 0 * unit, unit, sigma, weight="one")[0], d / 2 / sigma**2, rtol=1e-12)


@pytest.mark.parametrize("weight", ["sigma2", "one"])
def test_ncsn_is_the_mean_of_the_levels_losses(weight):  # S0-E15
    sigmas, n = np.array([0.05, 0.3, 2.0]), 10
    x0, score = RNG.standard_normal((2, 3 * n, 4))
    levels = np.repeat(sigmas, n)
    noisy, _ = sm.perturb(x0, levels, seed=1)
    whole, gradient = sm.ncsn(score, x0, noisy, levels, weight)
    parts = [slice(k * n, (k + 1) * n) for k in range(3)]
    each = [sm.denoising(score[p], x0[p], noisy[p], float(sigmas[k])) for k, p in enumerate(parts)]
    factor = sigmas**2 if weight == "sigma2" else np.ones(3)
    assert whole.mean() == pytest.approx(np.mean([f * v.mean() for f, (v, _) in zip(factor, each, strict=True)]), rel=1e-12)
    np.testing.assert_allclose(gradient, np.concatenate([f * g / 3 for f, (_, g) in zip(factor, each, strict=True)]), rtol=1e-10)


# ------------------------------------------------------------------------------------------------------------------- errors


def test_wrong_arguments_are_named():
    cases = [
        (lambda: sm.explicit(S, T[:2]), ValueError, "target has shape"),
        (lambda: sm.explicit(S, T.astype(np.float32)), TypeError, "target is float32"),
        (lambda: sm.explicit(S[:0], T[:0]), ValueError, "not empty"),
        (lambda: sm.explicit(S.astype(int), T), ValueError, "score must be a float array"),
        (lambda: sm.explicit([1.0], T), TypeError, "score must be an array"),
        (lambda: sm.fisher_divergence(S, T, TRACE[:3]), ValueError, "weights must have shape"),
        (lambda: sm.implicit(S, S), ValueError, "trace must have shape"),
        (lambda: sm.sliced(S, JV[:, :1], V), ValueError, "product has shape"),
        (lambda: sm.sliced(S, JV, V[:, :1]), ValueError, "v has shape"),
        (lambda: sm.denoising(S, X0, NOISY, 0.0), ValueError, "sigma must be positive"),
        (lambda: sm.denoising(S, X0, NOISY, SIGMA[:3]), ValueError, "sigma must be a number or have shape"),
        (lambda: sm.ncsn(S, X0, NOISY, SIGMA, weight="sigma"), ValueError, "weight must be one of"),
        (lambda: sm.perturb(X0, -1.0), ValueError, "sigma must be positive"),
        (lambda: sm.perturb(X0, 1.0, eps=X0[:2]), ValueError, "eps has shape"),
        (lambda: sm.perturb(X0.astype(int), 1.0), TypeError, "x0 must be a float array"),
        (lambda: sm.projections((2, 3), law="uniform"), ValueError, "law must be one of"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()
