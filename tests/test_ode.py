"""The probability-flow ODE: its right-hand sides against DDIM and the VE flow, adaptive decoding and encoding, refusals."""

import sys

import numpy as np
import pytest
from scipy.integrate import solve_ivp

from alphabar.core import ode, samplers, schedules, tables
from alphabar.core.sde import VESDE, VPSDE, SubVPSDE

LINEAR, LADDER = schedules.linear(), schedules.geometric(0.01, 30, 200)
PROCESSES = [LINEAR, LADDER, VESDE(), VPSDE(), SubVPSDE(), VPSDE(T=1000)]
X = np.random.default_rng(1).standard_normal((5, 4))


@pytest.fixture(params=PROCESSES, ids=repr)
def s(request):
    return request.param


# ----------------------------------------------------------------------------------------------------------- right-hand sides


def test_the_network_sees_x_t_itself(linear):
    """X58, Eq: S4-E50, S2-E14: the argument x̄/√(σ² + 1) is x_t; the deck's x_t/√(σ² + 1) is not."""
    seen = []
    rhs = ode.ddim_ode_rhs(lambda x, t: seen.append((x.copy(), t)) or x, linear)
    a = linear.signal[500]
    rhs(X / a, linear.sigma_bar[500])
    x, t = seen[0]
    np.testing.assert_allclose(x, X, rtol=1e-12)
    np.testing.assert_allclose(t, 500, rtol=1e-12)
    assert t.shape == (5,) and np.max(np.abs(x - X / np.sqrt(linear.sigma_bar[500] ** 2 + 1))) > 0.5


def test_euler_in_sigma_is_ddim(linear, gaussian):
    """K5, Eq: S2-E13: x'/√ᾱ' = x/√ᾱ + (σ̄' − σ̄)·ε, step by step the same numbers as DDIM with σ = 0."""
    model = gaussian(0.3, 0.5).model(linear)
    table = tables.ddim(linear, 20)
    path = samplers.sample(model, table, X, trajectory=True)
    rhs = ode.ddim_ode_rhs(model, linear)
    sigma = np.r_[table.noise / table.signal, 0.0]
    for i in range(20):
        xbar = path[i] / table.signal[i]
        step = xbar + (sigma[i + 1] - sigma[i]) * rhs(xbar, sigma[i])
        np.testing.assert_allclose(step, path[i + 1] / table.signal_to[i], rtol=1e-10, atol=1e-12)


def test_the_ddim_ode_is_the_flow_of_the_variance_exploding_process(linear, mixture):
    """L17. ε(x̄/√(σ² + 1)) = −σ·∇ log p_σ(x̄), p_σ the law of x0 + σε: one ODE for VP, VE and sub-VP."""
    data, sigma = mixture([0.4, 0.6], [-1.0, 1.0], [0.3, 0.4]), 1.7
    want = -sigma * data.score(X, 1.0, sigma)
    for process in (linear, VPSDE(), SubVPSDE(), VESDE()):
        np.testing.assert_allclose(ode.ddim_ode_rhs(data.model(process), process)(X, sigma), want, rtol=1e-7)


@pytest.mark.parametrize("prediction", ["eps", "score", "x0", "v"])
def test_any_prediction_gives_the_same_equation(s, gaussian, prediction):
    data, t = gaussian(0.3, 0.5), 0.3 * s.T
    sigma = float(s.sigma_bar_at(t))
    want = ode.ddim_ode_rhs(data.model(s), s)(X, sigma)
    np.testing.assert_allclose(ode.ddim_ode_rhs(data.model(s, prediction), s, prediction)(X, sigma), want, rtol=1e-7, atol=1e-9)
    if s in PROCESSES[2:]:
        a, n = s.levels(t)
        drift = ode.probability_flow_drift(data.model(s, prediction), s, prediction)(X, t)
        score = -data.eps(X, a, n) / n
        np.testing.assert_allclose(drift, s.drift_factor(t) * X - 0.5 * s.diffusion(t) ** 2 * score, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("s", [VESDE(), VPSDE(), SubVPSDE(), VPSDE(T=1000)], ids=repr)
def test_the_drift_in_t_and_the_equation_in_sigma_are_one_flow(s, gaussian):
    """Eq: S4-C18. The drift carries the marginals of Gaussian data: mean a·m, variance a²s² + n²."""
    data = gaussian(0.3, 0.5)
    drift = ode.probability_flow_drift(data.model(s), s)
    t0, t1 = 0.05 * s.T, 0.9 * s.T
    (a0, n0), (a1, n1) = s.levels(t0), s.levels(t1)
    start = a0 * 0.3 + np.sqrt(a0**2 * 0.25 + n0**2) * X
    found = solve_ivp(lambda t, y: drift(y.reshape(X.shape), t).ravel(), (t0, t1), start.ravel(), rtol=1e-9, atol=1e-10)
    want = a1 * 0.3 + np.sqrt(a1**2 * 0.25 + n1**2) * X
    np.testing.assert_allclose(found.y[:, -1].reshape(X.shape), want, rtol=1e-6, atol=1e-7)


def test_drift_takes_a_time_for_each_sample(gaussian):
    torch = pytest.importorskip("torch")
    s, t = VPSDE(), np.linspace(0.1, 1, 5)
    drift = ode.probability_flow_drift(gaussian(0.3, 0.5).model(s), s)
    together = drift(X, t)
    for i in range(5):
        np.testing.assert_allclose(drift(X[i : i + 1], t[i])[0], together[i], rtol=1e-12)
    flow = ode.probability_flow_drift(lambda x, t: 0.5 * x, s)
    got = flow(torch.from_numpy(X).float(), torch.from_numpy(t))
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), ode.probability_flow_drift(lambda x, t: 0.5 * x, s)(X, t), rtol=1e-5, atol=1e-6)


def test_the_prior_of_the_ddim_ode(linear):
    """X29, Eq: S2-U4. x̄(T) has variance σ̄² + 1 = 1/ᾱ_T = 24778.1, not σ̄ = 157.4."""
    got, sigma = ode.ddim_ode_prior(linear), linear.sigma_bar[-1]
    assert got == pytest.approx(24778.1, abs=0.05) and got == pytest.approx(1 / linear.alpha_bar[-1], rel=1e-12)
    assert got == pytest.approx(sigma**2 + 1, rel=1e-12) and sigma == pytest.approx(157.4, abs=0.05)
    x_T = samplers.prior((200_000,), seed=1, dtype=np.float64)
    assert np.var(x_T / linear.signal[-1]) == pytest.approx(got, rel=4 * np.sqrt(2 / x_T.size))
    assert ode.ddim_ode_prior(VESDE()) == pytest.approx(VESDE().prior_std ** 2)


# ------------------------------------------------------------------------------------------------------------ the adaptive solver


def test_decoding_follows_the_known_flow_within_the_tolerance(s, gaussian):
    data, x_T = gaussian(0.3, 0.8), X * s.prior_std
    a, n = s.levels(s.t_min)
    exact = data.flow(x_T, *s.levels(s.T), a, n)
    errors, calls = [], []
    for tolerance in (1e-4, 1e-6, 1e-8):
        found = ode.decode(data.model(s), s, x_T, rtol=tolerance, atol=tolerance, denoise=False)
        errors.append(np.max(np.abs(found.x - exact)))
        calls.append(found.evaluations)
    assert errors[0] < 2e-2 and errors[1] < 2e-4 and errors[2] < 2e-6 and calls[0] < calls[1] < calls[2]
    clean = ode.decode(data.model(s), s, x_T, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(clean.x, data.x0(found.x, a, n), rtol=1e-10)  # the last step is to E[x0|x_t]
    np.testing.assert_allclose(clean.x, data.flow(x_T, *s.levels(s.T)), atol=3e-4)
    assert clean.evaluations == calls[2] + 1


def test_encoding_is_the_way_back(s, mixture):
    data = mixture([0.4, 0.6], [-1.0, 1.0], [0.3, 0.3])
    x0 = data.sample(200, np.random.default_rng(2)).reshape(50, 4)
    code = ode.encode(data.model(s), s, x0, rtol=1e-7, atol=1e-7)
    back = ode.decode(data.model(s), s, code.x, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(back.x, x0, atol=2e-3)
    assert abs(np.std(code.x) / s.prior_std - 1) < 0.15


def test_evaluations_are_calls_of_the_model_and_arrays_keep_their_kind(gaussian):
    torch = pytest.importorskip("torch")
    s, calls = VPSDE(T=1000), []

    def model(x, t):
        assert isinstance(x, torch.Tensor) and x.dtype == torch.float32 and t.shape == (5,) and t.dtype == torch.float64
        assert 1 - 1e-9 <= float(t[0]) <= 1000
        calls.append(1)
        return 0.3 * x

    found = ode.decode(model, s, torch.from_numpy(X).float())
    assert isinstance(found.x, torch.Tensor) and found.x.dtype == torch.float32 and found.evaluations == len(calls)
    high = ode.decode(lambda x, t: 0.3 * x, s, X)
    np.testing.assert_allclose(found.x.numpy(), high.x, rtol=1e-3, atol=1e-3)
    assert ode.encode(lambda x, t: 0.3 * x, s, np.empty((0, 4))).x.shape == (0, 4)


def test_what_cannot_be_solved_is_said(gaussian, monkeypatch):
    s = VPSDE()
    with pytest.raises(RuntimeError, match="not finite at sigma = 152"):
        ode.decode(lambda x, t: np.full_like(x, np.nan), s, X)
    explosion = lambda x, t: -1e6 * np.abs(x) ** 3  # noqa: E731
    with np.errstate(all="ignore"), pytest.raises(RuntimeError, match=r"could not be solved from sigma 152|not finite"):
        ode.decode(explosion, s, np.abs(X))
    with pytest.raises(ValueError, match="no signal is left"):
        ode.decode(lambda x, t: x, schedules.zero_terminal_snr(LINEAR), X, prediction="v")
    with pytest.raises(TypeError, match="x_T must be a float array"):
        ode.decode(lambda x, t: x, s, [1.0])
    with pytest.raises(TypeError, match="x0 must be a float array"):
        ode.encode(lambda x, t: x, s, np.ones((2, 3), int))
    with pytest.raises(TypeError, match="s must be a Schedule"):
        ode.decode(lambda x, t: x, None, X)
    with pytest.raises(TypeError, match="s must be an SDE"):
        ode.probability_flow_drift(lambda x, t: x, LINEAR)
    with pytest.raises(ValueError, match="model must return floats"):
        ode.decode(lambda x, t: x[:1], s, X)
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match="needs scipy"):
        ode.decode(lambda x, t: x, s, X)
