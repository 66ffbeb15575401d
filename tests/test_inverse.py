"""Linear inverse problems on Gaussian data, whose posterior is known: what is exact, and how far the rest is from it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from alphabar import nets
from alphabar.core import inverse, operators, samplers, schedules, tables
from alphabar.core.mixture import GaussianMixture

LINEAR = schedules.linear()
RNG = np.random.default_rng(0)
D = 4
ROOT = RNG.standard_normal((D, D))
COVARIANCE = ROOT @ ROOT.T / D + 0.1 * np.eye(D)
MEAN = np.array([0.3, -0.2, 0.1, 0.4])
DATA = GaussianMixture([1.0], MEAN[None], COVARIANCE[None])
ISOTROPIC = GaussianMixture([1.0], MEAN[None], 0.25)
MATRIX = RNG.standard_normal((2, D))
OPERATOR = operators.matrix(MATRIX)
NOISE = 0.2
MEASURED = MATRIX @ DATA.sample(1, seed=5)[0] + NOISE * RNG.standard_normal(2)
PRECISE = tables.rk4(LINEAR, 15, spacing="karras")  # 57 calls; its own error is far below the samples'


def exact_vjp(data: GaussianMixture, s: Any, prediction: str = "eps") -> inverse.Vjp:
    """The products of the perfect network: its Jacobian is linear in the Hessian of log q, which is symmetric."""

    def vjp(x, t, u):
        a, n = (float(v) for v in s.levels(t[0]))
        m = data.predict(x, a, n, prediction)
        v = u(m)
        bent = data.diffuse(a, n).score_jvp(x, v)
        return m, {"eps": -n * bent, "x0": (v + n**2 * bent) / a, "v": -n / a * v - (n / a) * bent}[prediction]

    return vjp


def posterior(data: GaussianMixture, noise: float, y: np.ndarray = MEASURED) -> tuple[np.ndarray, np.ndarray]:
    """(mean, covariance) of x0 given y."""
    C, m = data.covariances[0], data.means[0]
    gain = C @ MATRIX.T @ np.linalg.inv(MATRIX @ C @ MATRIX.T + noise**2 * np.eye(2))
    return m + gain @ (y - MATRIX @ m), C - gain @ MATRIX @ C


def law(run: Callable[[np.ndarray], np.ndarray], d: int = D) -> tuple[np.ndarray, np.ndarray]:
    """(mean, covariance) of run(x_T), x_T ~ N(0, I), without sampling: for Gaussian data a deterministic run is affine in x_T."""
    x = run(np.vstack([np.zeros((1, d)), np.eye(d)]))
    slope = (x[1:] - x[0]).T
    return x[0], slope @ slope.T


def prior(n: int, seed: int = 1) -> np.ndarray:
    return samplers.prior((n, D), seed=seed, dtype=np.float64)


def measured(n: int, y: np.ndarray = MEASURED) -> np.ndarray:
    return np.tile(y, (n, 1))


def z_scores(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    return float(np.abs((x.mean(axis=0) - mean) / np.sqrt(np.diag(covariance) / len(x))).max())


def test_the_products_of_the_oracle() -> None:
    x, v, h = RNG.standard_normal((3, D)), RNG.standard_normal((3, D)), 1e-5
    for prediction in ("eps", "x0", "v"):
        model, t = DATA.model(LINEAR, prediction), np.full(3, 300)
        m, back = exact_vjp(DATA, LINEAR, prediction)(x, t, lambda m: v)
        np.testing.assert_allclose(m, model(x, t))
        np.testing.assert_allclose(back, (model(x + h * v, t) - model(x - h * v, t)) / (2 * h), rtol=1e-6, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------- guided by a gradient


def test_moment_matching_draws_from_the_posterior_of_correlated_data() -> None:
    model = inverse.moment_matching(exact_vjp(DATA, LINEAR), LINEAR, OPERATOR, measured(2000), NOISE, iterations=2)
    x = samplers.sample(model, PRECISE, prior(2000))
    mean, covariance = posterior(DATA, NOISE)
    assert z_scores(x, mean, covariance) < 4
    spread = np.sqrt((np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2) / len(x))
    assert np.all(np.abs(np.cov(x.T) - covariance) < 4 * spread)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_guided_scores_are_those_of_the_posterior(prediction: str) -> None:
    """x_t given y is Gaussian too: its score in closed form, for moment matching on any data and for ΠGDM on isotropic ones."""
    x, t = RNG.standard_normal((6, D)), np.full(6, 400)
    a, n = (float(v) for v in LINEAR.levels(400))
    for data, guided in (
        (DATA, inverse.moment_matching),
        (ISOTROPIC, inverse.moment_matching),
        (ISOTROPIC, inverse.pigdm),
    ):
        options: dict[str, Any] = {"iterations": 2} if guided is inverse.moment_matching else {"data_std": 0.5}
        vjp = exact_vjp(data, LINEAR, prediction)
        model = guided(vjp, LINEAR, OPERATOR, measured(6), NOISE, prediction, **options)
        mean, covariance = posterior(data, NOISE)
        exact = GaussianMixture([1.0], mean[None], covariance[None]).predict(x, a, n, prediction)
        np.testing.assert_allclose(model(x, t), exact, rtol=1e-8, atol=1e-9)
    unlike = inverse.pigdm(exact_vjp(DATA, LINEAR), LINEAR, OPERATOR, measured(6), NOISE)
    mean, covariance = posterior(DATA, NOISE)
    assert np.abs(unlike(x, t) - GaussianMixture([1.0], mean[None], covariance[None]).predict(x, a, n)).max() > 0.02


def test_the_law_converges_to_the_posterior() -> None:
    """Without sampling error: the covariance at the order of the solver, the mean down to √ᾱ_T, the gap to the prior."""
    mean, covariance = posterior(DATA, NOISE)
    vjp, errors = exact_vjp(DATA, LINEAR), []
    for steps in (8, 16, 32):
        model = inverse.moment_matching(vjp, LINEAR, OPERATOR, measured(D + 1), NOISE, iterations=2)
        m, c = law(lambda x, k=steps, f=model: samplers.sample(f, tables.rk4(LINEAR, k, spacing="karras"), x))
        errors.append(np.abs(c - covariance).max())
        assert np.abs(m - mean).max() < 2e-3
    assert errors[2] < 2e-4 and errors[0] > 10 * errors[1] > 100 * errors[2]
    m, c = law(lambda x: samplers.sample(inverse.pigdm(vjp, LINEAR, OPERATOR, measured(D + 1), NOISE), PRECISE, x))
    assert 0.01 < np.abs(m - mean).max() < 0.2, "ΠGDM takes the data for isotropic"
    iso = inverse.pigdm(exact_vjp(ISOTROPIC, LINEAR), LINEAR, OPERATOR, measured(D + 1), NOISE, data_std=0.5)
    mean, covariance = posterior(ISOTROPIC, NOISE)
    m, c = law(lambda x: samplers.sample(iso, PRECISE, x))
    np.testing.assert_allclose(m, mean, atol=2e-3)
    np.testing.assert_allclose(c, covariance, atol=2e-3)


def test_pigdm_without_noise_and_with_a_mask() -> None:
    op = operators.Mask([1, 0, 1, 0], (D,))
    y = np.array([[0.7, 0, -0.3, 0]]).repeat(300, 0)
    model = inverse.pigdm(exact_vjp(ISOTROPIC, LINEAR), LINEAR, op, y, 0.0, data_std=0.5)
    x = samplers.sample(model, PRECISE, prior(300))
    np.testing.assert_allclose(x[:, ::2], y[:, ::2], atol=0.02)
    assert z_scores(x[:, 1::2], MEAN[1::2], 0.25 * np.eye(2)) < 4


def test_conjugate_gradients_stop_where_nothing_is_left() -> None:
    """More iterations than y has elements, and a y that is met already: no division of 0 by 0."""
    x, t = RNG.standard_normal((3, D)), np.full(3, 500)
    few, many = (
        inverse.moment_matching(exact_vjp(DATA, LINEAR), LINEAR, OPERATOR, measured(3), NOISE, iterations=k) for k in (2, 9)
    )
    np.testing.assert_allclose(many(x, t), few(x, t), rtol=1e-7, atol=1e-9)
    met = OPERATOR(DATA.predict(x, *LINEAR.levels(500), "x0"))
    model = inverse.moment_matching(exact_vjp(DATA, LINEAR), LINEAR, OPERATOR, met, NOISE, iterations=3)
    np.testing.assert_allclose(model(x, t), DATA.model(LINEAR)(x, t), atol=1e-10)


def test_dps_comes_nearer_but_is_not_the_posterior() -> None:
    """A heuristic: the residual falls, the mean comes nearer; the law depends on ζ, and a large one shakes it."""
    mean, covariance = posterior(DATA, NOISE)
    table, y = tables.ddpm(LINEAR, 100, spacing="trailing"), measured(1000)
    distance, residual, variance = {}, {}, {}
    for zeta in (0.0, 0.1, 0.3, 3.0):
        x = inverse.dps(exact_vjp(DATA, LINEAR), table, prior(1000), OPERATOR, y, zeta)
        distance[zeta] = float(np.abs(x.mean(axis=0) - mean).max())
        residual[zeta] = float(np.sqrt(((OPERATOR(x) - y) ** 2).mean()))
        variance[zeta] = float((x.var(axis=0) / np.diag(covariance)).max())
    plain = samplers.sample(DATA.model(LINEAR), table, prior(1000))
    np.testing.assert_allclose(residual[0.0], np.sqrt(((OPERATOR(plain) - y) ** 2).mean()), rtol=1e-12)
    assert residual[0.3] < 0.5 * residual[0.0] and distance[0.3] < 0.2 < distance[0.0]
    assert variance[3.0] > 5


def test_dps_is_the_row_and_a_step_against_the_gradient() -> None:
    table, x, y, h = tables.ddpm(LINEAR, grid=[300]), RNG.standard_normal((2, D)), measured(2), 1e-6
    model = DATA.model(LINEAR)

    def miss(x):
        x0 = DATA.predict(x, *LINEAR.levels(300), "x0")
        return np.linalg.norm(y - OPERATOR(x0), axis=1)

    gradient = np.stack([(miss(x + h * e) - miss(x - h * e)) / (2 * h) for e in np.eye(D)], axis=1)
    out = inverse.dps(exact_vjp(DATA, LINEAR), table, x, OPERATOR, y, 0.7)
    np.testing.assert_allclose(out, samplers.sample(model, table, x) - 0.7 * gradient, rtol=1e-6, atol=1e-8)


# -------------------------------------------------------------------------------------------------------------------------- DDRM


def test_ddrm_without_noise_is_exact_where_the_coordinates_are_independent() -> None:
    """Isotropic data, η = 0: what is measured comes out exactly, the rest is DDIM's, whose error falls as 1/steps."""
    y = MATRIX @ np.array([0.5, 0.1, -0.4, 0.9])
    mean, covariance = posterior(ISOTROPIC, 0.0, y)
    errors = []
    for steps in (50, 200):
        run = lambda x, k=steps: inverse.ddrm(  # noqa: E731
            ISOTROPIC.model(LINEAR), LINEAR, OPERATOR, measured(len(x), y), x, 0.0, k, eta=0.0
        )
        x = run(np.zeros((1, D)))
        np.testing.assert_allclose(OPERATOR(x)[0], y, rtol=1e-12)
        base = run(np.vstack([np.zeros((1, D)), np.eye(D)]))
        # the noise of measured coordinates is drawn anew at each step and gone at the last: x_0 is affine in x_T, row by row
        slope = OPERATOR.to_spectrum(base[1:] - base[0])[:, 2:]
        errors.append(abs(np.trace(slope.T @ slope) / 2 / 0.25 - 1))
    assert errors[1] < 0.03 and 3 < errors[0] / errors[1] < 5
    x = inverse.ddrm(ISOTROPIC.model(LINEAR), LINEAR, OPERATOR, measured(2000, y), prior(2000), 0.0, 300, eta=0.0)
    assert z_scores(OPERATOR.to_spectrum(x)[:, 2:], OPERATOR.to_spectrum(mean[None])[0, 2:], 0.25 * np.eye(2)) < 4
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.04)


def test_ddrm_elsewhere_is_an_approximation() -> None:
    """With η > 0 the variance falls short (x̂0 stands for x0), with noise in y too; the mean is near the posterior's."""
    mean, covariance = posterior(ISOTROPIC, NOISE)
    x = inverse.ddrm(ISOTROPIC.model(LINEAR), LINEAR, OPERATOR, measured(2000), prior(2000), NOISE, 100, eta=0.85)
    ratio = x.var(axis=0) / np.diag(covariance)
    assert np.abs(x.mean(axis=0) - mean).max() < 0.05 and np.all((ratio > 0.5) & (ratio < 0.85))
    mean, covariance = posterior(DATA, NOISE)
    x = inverse.ddrm(DATA.model(LINEAR), LINEAR, OPERATOR, measured(2000), prior(2000), NOISE, 100, eta=0.85)
    assert np.abs(x.mean(axis=0) - mean).max() < 0.1, "correlated data: a bias that more steps do not remove"


def test_ddrm_rows_keep_the_marginals_of_true_x0() -> None:
    """Given x0, and y = x0 + σ_y/s·n by coordinate, each kind of row ends at variance σ² about x0 (Kawar et al., Theorem 3.2)."""
    for eta in (0.0, 0.5, 1.0):
        for eta_b in (0.3, 1.0):
            for own, sigma, sigma_to in ((np.inf, 2.0, 1.5), (0.0, 2.0, 1.5), (0.4, 2.0, 1.5), (1.8, 2.0, 1.5), (9.0, 2.0, 1.5)):
                on_v, on_w, on_z = (float(k[0]) for k in inverse._ddrm_row(np.array([own]), sigma, sigma_to, eta, eta_b))
                spread = (on_v * sigma) ** 2 + (0 if np.isinf(own) else (on_w * own) ** 2) + on_z**2
                np.testing.assert_allclose(spread, sigma_to**2, rtol=1e-12)


def test_ddrm_starts_from_what_is_measured() -> None:
    """w + √(σ² − σ_y²/s²)·z where that is possible, σ·z where y says less than the level, or nothing."""
    op, seen = operators.Product((3,), [np.diag([2.0, 0.01, 0.0])]), []

    def watch(x, t):
        seen.append(x.copy())
        return np.zeros_like(x)

    z, y = RNG.standard_normal((4, 3)), RNG.standard_normal((4, 3))
    inverse.ddrm(watch, LINEAR, op, y, z, NOISE, grid=[100, 300])
    a, n = (float(v) for v in LINEAR.levels(300))
    v, noise, w = (op.to_spectrum(x) for x in (seen[0] / a, z, y))
    sigma = n / a
    np.testing.assert_allclose(abs(v[:, 0]), abs(w[:, 0] / 2 + np.sqrt(sigma**2 - 0.1**2) * noise[:, 0]), rtol=1e-10)
    np.testing.assert_allclose(v[:, 1:], sigma * noise[:, 1:], rtol=1e-10)


def test_ddrm_of_images_keeps_what_is_measured() -> None:
    rng = np.random.default_rng(0)
    shape = (4, 4, 3)
    x0 = rng.uniform(-1, 1, (3, *shape)).astype(np.float32)
    for op in (operators.Mask(rng.integers(0, 2, (4, 4, 1)), shape), operators.box(shape, 2), operators.grey(shape)):
        x = inverse.ddrm(lambda x, t: x * x.dtype.type(0.9), LINEAR, op, op(x0), samplers.prior(x0.shape), clip=(-1, 1))
        assert x.dtype == np.float32
        np.testing.assert_allclose(op(x), op(x0), atol=3e-6)
        if isinstance(op, operators.Mask):
            assert np.array_equal(op(x), op(x0))


# --------------------------------------------------------------------------------------------------------------------- throughout


def solvers(vjp: inverse.Vjp, model: samplers.Model) -> dict[str, Callable[..., np.ndarray]]:
    table = tables.ddim(LINEAR, 5, 1.0)

    def guided(f: Callable[..., samplers.Model]) -> Callable[..., np.ndarray]:
        return lambda x, y, first: samplers.sample(f(vjp, LINEAR, OPERATOR, y, NOISE), table, x, seed=4, first_sample=first)

    return {
        "ddrm": lambda x, y, first: inverse.ddrm(model, LINEAR, OPERATOR, y, x, NOISE, 5, seed=4, first_sample=first),
        "dps": lambda x, y, first: inverse.dps(vjp, table, x, OPERATOR, y, seed=4, first_sample=first),
        "pigdm": guided(inverse.pigdm),
        "moment_matching": guided(inverse.moment_matching),
    }


@pytest.mark.parametrize("name", ["ddrm", "dps", "pigdm", "moment_matching"])
def test_a_sample_depends_on_its_number_only(name: str) -> None:
    run = solvers(exact_vjp(ISOTROPIC, LINEAR), ISOTROPIC.model(LINEAR))[name]
    x, y = prior(6), RNG.standard_normal((6, 2))
    whole = run(x, y, 0)
    np.testing.assert_allclose(np.concatenate([run(x[i:j], y[i:j], i) for i, j in ((0, 1), (1, 4), (4, 6))]), whole, rtol=1e-10)
    assert not np.any(run(x, y, 6) == whole)


@pytest.mark.parametrize("name", ["ddrm", "dps", "pigdm", "moment_matching"])
def test_torch_arrays(name: str) -> None:
    torch = pytest.importorskip("torch")

    def model(x, t):
        assert isinstance(x, torch.Tensor)
        return torch.tanh(x)

    def vjp(x, t, u):
        m = model(x, t)
        v = u(m)
        assert isinstance(v, torch.Tensor)
        return m, v * (1 - m**2)

    run = solvers(vjp, model)[name]
    x, y = prior(3), measured(3)
    out = run(torch.from_numpy(x), torch.from_numpy(y), 0)
    own = solvers(lambda x, t, u: (np.tanh(x), u(np.tanh(x)) * (1 - np.tanh(x) ** 2)), lambda x, t: np.tanh(x))[name]
    assert isinstance(out, torch.Tensor)
    np.testing.assert_allclose(out.numpy(), own(x, y, 0), rtol=1e-9, atol=1e-9)


def test_through_a_network() -> None:
    net = nets.MLP(D, hidden=(16,), times=True, seed=1, dtype="float64")
    t = np.full(2, 300)

    def vjp(x, t, u):
        return net.predict(x, t), nets.vjp(lambda z: net(z, t), x, u(net.predict(x, t)))[1]

    x, h = RNG.standard_normal((2, D)), 1e-6
    out = inverse.dps(vjp, tables.ddpm(LINEAR, grid=[300]), x, OPERATOR, measured(2), 0.5)
    a, n = (float(v) for v in LINEAR.levels(300))

    def miss(x):
        return np.linalg.norm(measured(2) - OPERATOR((x - n * net.predict(x, t)) / a), axis=1)

    gradient = np.stack([(miss(x + h * e) - miss(x - h * e)) / (2 * h) for e in np.eye(D)], axis=1)
    plain = samplers.sample(net.predict, tables.ddpm(LINEAR, grid=[300]), x)
    np.testing.assert_allclose(out, plain - 0.5 * gradient, rtol=1e-6, atol=1e-8)


def test_a_ladder_and_a_schedule_without_signal() -> None:
    s = schedules.geometric(0.02, 10.0, 60)
    model = inverse.moment_matching(exact_vjp(DATA, s), s, OPERATOR, measured(D + 1), NOISE, iterations=2)
    mean, covariance = posterior(DATA, NOISE)
    m, c = law(lambda x: samplers.sample(model, tables.heun(s, 60), x * s.prior_std))
    np.testing.assert_allclose(m, mean, atol=0.02)
    np.testing.assert_allclose(c, covariance, atol=0.02)
    x = inverse.ddrm(DATA.model(s), s, OPERATOR, measured(3), prior(3) * s.prior_std, 0.0, 20)
    np.testing.assert_allclose(OPERATOR(x), measured(3), rtol=1e-9)
    with pytest.raises(ValueError, match="ddrm cannot start where no signal is left"):
        zero = schedules.zero_terminal_snr(LINEAR)
        inverse.ddrm(DATA.model(LINEAR, "x0"), zero, OPERATOR, measured(3), prior(3), spacing="trailing", prediction="x0")


def test_wrong_arguments() -> None:
    vjp, model, x, y = exact_vjp(DATA, LINEAR), DATA.model(LINEAR), prior(2), measured(2)
    table, t = tables.ddpm(LINEAR, 3), np.full(2, 5)
    for call, message in (
        (lambda: inverse.ddrm(model, LINEAR, OPERATOR, y, x, -1), "sigma_y must be finite and not negative, not -1"),
        (lambda: inverse.ddrm(model, LINEAR, OPERATOR, y, x, eta=2), r"eta must be in \[0, 1\], not 2"),
        (lambda: inverse.ddrm(model, LINEAR, OPERATOR, y, x, eta_b=-1), r"eta_b must be in \[0, 1\], not -1"),
        (lambda: inverse.ddrm(model, LINEAR, OPERATOR, y[:1], x), r"y must have shape \(2, 2\), not \(1, 2\)"),
        (lambda: inverse.ddrm(model, LINEAR, OPERATOR, y, x[:, :3]), r"the operator takes samples of shape \(4,\)"),
        (lambda: inverse.dps(vjp, tables.heun(LINEAR, 3), x, OPERATOR, y), "table must not store outputs"),
        (lambda: inverse.dps(vjp, table, x, OPERATOR, y, -1), "zeta must be finite and not negative"),
        (lambda: inverse.pigdm(vjp, LINEAR, OPERATOR, y, data_std=0), "data_std must be positive and finite"),
        (lambda: inverse.pigdm(vjp, LINEAR, OPERATOR, y[:, :1])(x, t), "y must have shape"),
        (lambda: inverse.moment_matching(vjp, LINEAR, OPERATOR, y, iterations=0), "iterations must be at least 1"),
        (lambda: inverse.pigdm(lambda x, t, u: (u(x), x[:1]), LINEAR, OPERATOR, y)(x, t), "vjp must return floats of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: inverse.ddrm(model, LINEAR, MATRIX, y, x), "operator must be an Operator"),
        (lambda: inverse.ddrm(model, 1, OPERATOR, y, x), "s must be a Schedule"),
        (lambda: inverse.dps(vjp, LINEAR, x, OPERATOR, y), "table must be a Table"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
