"""The likelihood under the probability-flow ODE: closed forms, the error bar of Hutchinson's estimate, dequantisation."""

import builtins
import itertools
import sys

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import bound, convert, flow, schedules
from alphabar.core.chain import chain
from alphabar.core.decoder import gaussian_log_prob, log_normal_mass
from alphabar.core.mixture import GaussianMixture
from alphabar.core.sde import VESDE, VPSDE, SubVPSDE
from alphabar.kernels import counter, streams
from tests import fake_cupy

PROCESSES = {
    "schedule": schedules.linear(),
    "ladder": schedules.geometric(0.01, 80, 60),
    "vpsde": VPSDE(),
    "vesde": VESDE(0.01, 80),
    "subvpsde": SubVPSDE(T=1000.0),
}
COVARIANCES = np.array([[[0.2, 0.1, 0.0], [0.1, 0.3, -0.1], [0.0, -0.1, 0.2]], np.diag([0.1, 0.05, 0.4])])
LAW = GaussianMixture([0.3, 0.7], [[-1.0, 0.5, 0.2], [0.8, -0.2, 0.0]], COVARIANCES)


def likelihood(density, x, s, **options):
    return flow.log_likelihood(density.model(s, "score"), x, s, flow.mixture_jvp(density, s, "score"), "score", **options)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_trace_gives_the_density_of_a_mixture(name):
    """With the exact law at T in the place of the prior, what is left is the solver's tolerance."""
    s, x = PROCESSES[name], LAW.sample(20, 1)
    t_min = 0.02 * s.t_min
    f = likelihood(LAW, x, s, rtol=1e-9, atol=1e-9, t_min=t_min)
    a, n = (float(v) for v in s.levels(s.T))
    exact_end = f.log_prob - gaussian_log_prob(f.x_T, 0.0, s.prior_std**2) + LAW.diffuse(a, n).log_prob(f.x_T)
    np.testing.assert_allclose(exact_end, LAW.convolve(float(s.sigma_bar_at(t_min))).log_prob(x), atol=2e-6)
    np.testing.assert_allclose(f.log_prob, LAW.log_prob(x), atol=0.06)  # the prior's gap: mean and spread of the data over σ̄(T)
    assert f.exact and np.all(f.error == 0) and f.dimensions == 3 and f.t_min == t_min


def test_what_the_truncation_leaves_out():
    """The answer is the density of x + σ̄(t_min)·ε at x; it nears that of the data as σ̄²."""
    s, x = VESDE(0.01, 1000), LAW.sample(30, 2)
    gaps = []
    for t_min in (0.2, 0.1):
        f = likelihood(LAW, x, s, rtol=1e-8, atol=1e-8, t_min=t_min)
        end = gaussian_log_prob(f.x_T, 0.0, s.prior_std**2) - LAW.convolve(s.prior_std).log_prob(f.x_T)
        np.testing.assert_allclose(f.log_prob - end, LAW.convolve(float(s.sigma_bar_at(t_min))).log_prob(x), atol=1e-5)
        gaps.append(np.abs(f.log_prob - end - LAW.log_prob(x)).mean())
    variances = s.sigma_bar_at([0.2, 0.1]) ** 2
    assert gaps[0] / gaps[1] == pytest.approx(variances[0] / variances[1], rel=0.2)


@pytest.mark.parametrize("prediction", convert.PREDICTIONS)
def test_a_linear_model_of_any_prediction_and_dtype(prediction):
    """Gaussian data: ε, x0 and v are linear in x, so J is a number; float32 networks see float32."""
    s, var = PROCESSES["schedule"], 0.3
    law = GaussianMixture([1.0], [[0.0] * 4], var)
    seen = []

    def model(x, t):
        seen.append((x.dtype, t.dtype, t.shape))
        return law.model(s, prediction)(x.reshape(-1, 4), t).reshape(x.shape)

    def jvp(x, t, v):
        assert v.dtype == x.dtype and v.shape == x.shape
        a, n = s.levels(t[0])
        P, Q = convert.coefficients("score", prediction, a, n)
        return ((P - Q / (a**2 * var + n**2)) * v).astype(v.dtype)

    x = law.sample(6, 3).astype(np.float32).reshape(6, 2, 2)
    want = law.log_prob(x.reshape(6, 4))
    f = flow.log_likelihood(model, x, s, jvp, prediction, t_min=0.1, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(f.log_prob, want, atol=2e-3)
    assert set(seen) == {(np.dtype(np.float32), np.dtype(np.float64), (6,))} and f.evaluations == len(seen)
    h = flow.log_likelihood(model, x, s, jvp, prediction, t_min=0.1, rtol=1e-6, atol=1e-6, trace="hutchinson", projections=2)
    np.testing.assert_allclose(h.log_prob, f.log_prob, atol=2e-3)  # vᵀ(cI)v = cd for Rademacher directions
    assert np.all(h.error < 1e-4)
    assert f.x_T.shape == x.shape


@pytest.mark.parametrize("law", ["rademacher", "normal"])
def test_hutchinsons_estimate_lies_within_its_error_bar(law):
    s, x = PROCESSES["schedule"], LAW.sample(200, 4)
    exact = likelihood(LAW, x, s, t_min=0.1)
    h = likelihood(LAW, x, s, t_min=0.1, trace="hutchinson", projections=16, law=law)
    z = (h.log_prob - exact.log_prob) / h.error
    assert not h.exact and h.estimates.shape == (16, 200) and np.all(h.error > 0)
    assert np.abs(z).max() < 5.5 and 0.8 < z.std() < 1.3 and abs(z.mean()) < 4 / np.sqrt(200)
    few = likelihood(LAW, x, s, t_min=0.1, trace="hutchinson", projections=4, law=law)
    assert few.error.mean() / h.error.mean() == pytest.approx(2, rel=0.15)
    one = likelihood(LAW, x[:1], s, t_min=0.1, trace="hutchinson", law=law)
    assert np.isnan(one.error[0]) and np.isfinite(one.log_prob[0])


def test_directions_follow_from_seed_and_sample():
    s, x = PROCESSES["vpsde"], LAW.sample(4, 4)
    options = {"trace": "hutchinson", "projections": 2, "law": "normal", "rtol": 1e-9, "atol": 1e-9}
    whole = likelihood(LAW, x, s, seed=3, **options)
    part = likelihood(LAW, x[2:], s, seed=3, first_sample=2, **options)
    np.testing.assert_allclose(part.estimates, whole.estimates[:, 2:], atol=1e-6)
    assert np.abs(likelihood(LAW, x, s, seed=4, **options).estimates - whole.estimates).min() > 1e-4
    later = likelihood(LAW, x, s, seed=3, draw=1, **{**options, "projections": 1})
    np.testing.assert_allclose(later.estimates[0], whole.estimates[1], atol=1e-6)
    unit = GaussianMixture([1.0], [[0.0] * 3], 1.0)  # stands still: no direction has anything to say
    rest = likelihood(unit, x, s, **options)
    np.testing.assert_allclose(rest.log_prob, unit.convolve(float(s.sigma_bar_at(s.t_min))).log_prob(x), atol=1e-9)
    assert np.all(rest.error < 1e-9)


def test_tolerance_and_method():
    s, x = PROCESSES["vpsde"], LAW.sample(10, 6)
    best = likelihood(LAW, x, s, rtol=1e-10, atol=1e-10, method="DOP853")
    runs = [likelihood(LAW, x, s, rtol=tol, atol=tol) for tol in (1e-2, 1e-4, 1e-6)]
    errors = [np.abs(r.log_prob - best.log_prob).max() for r in runs]
    counts = [r.evaluations for r in runs]
    assert errors[0] > errors[1] > errors[2] < 1e-5 and counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(
    "law",
    [
        GaussianMixture([1.0], [[0.2, -0.3]], np.array([[[0.5, 0.2], [0.2, 0.3]]])),
        GaussianMixture([0.4, 0.6], [[-0.8, 0], [0.5, 0.4]], 0.1),
    ],
    ids=["gaussian", "mixture"],
)
def test_four_ways_to_the_same_bits_per_dimension(law):
    """Closed form, exact trace, Hutchinson within its error bar, and the bound, from above, as its steps grow."""
    x, d = law.sample(400, 8), 2
    want = -law.log_prob(x) / (d * np.log(2))
    s = VESDE(0.01, 100)
    exact = likelihood(law, x, s, rtol=1e-6, atol=1e-6)
    assert np.mean(exact.bits()) == pytest.approx(want.mean(), abs=1e-3)
    np.testing.assert_allclose(exact.bits(), want, atol=0.02)
    h = likelihood(law, x, s, trace="hutchinson", projections=8)
    error = np.sqrt(np.sum((h.error / (d * np.log(2))) ** 2)) / len(x)
    assert abs(np.mean(h.bits()) - np.mean(exact.bits())) < 4 * error < 0.05
    gaps = []
    for S in (80, 160, 320):
        ladder = schedules.geometric(0.02, 60, S)
        b = bound.vlb_terms(law.model(ladder), x, chain(ladder))
        gap = b.nats / (d * np.log(2)) - want
        gaps.append((gap.mean(), gap.std() / np.sqrt(len(x))))
        assert gap.mean() > -3 * gaps[-1][1]
    halves = [a / b for (a, _), (b, _) in itertools.pairwise(gaps)]
    assert np.all(np.abs(np.array(halves) - 2) < 0.5), halves
    (one, e1), (two, e2) = gaps[-2:]
    assert abs(2 * two - one) < 4 * np.hypot(2 * e2, e1)


# ---------------------------------------------------------------------------------------------------------------- 8-bit data


def test_dequantised_values_fill_their_cells():
    u = np.random.default_rng(0).integers(0, 256, (300, 8, 8), np.uint8)
    x = flow.dequantize(u, seed=1)
    inside = (x + 1) * 128 - u
    assert x.shape == u.shape and x.min() >= -1 and x.max() < 1 and inside.min() >= 0 and inside.max() < 1
    assert abs(inside.mean() - 0.5) < 4 * np.sqrt(1 / 12 / inside.size) and inside.var() == pytest.approx(1 / 12, rel=0.03)
    np.testing.assert_array_equal(flow.dequantize(u[100:], seed=1, first_sample=100), x[100:])
    for k in (0, 7):
        np.testing.assert_allclose(inside[k].ravel(), counter.uniform(64, 1, 0, streams.DEQUANTIZE, k), atol=1e-12)
    for other in (flow.dequantize(u, seed=2), flow.dequantize(u, seed=1, draw=1)):
        assert np.mean(other != x) > 0.99
    assert abs(np.corrcoef(inside[:-1].ravel(), inside[1:].ravel())[0, 1]) < 4 / np.sqrt(inside.size)
    with pytest.raises(TypeError, match="images must be a uint8 array"):
        flow.dequantize(x)


def test_seven_bits_are_the_width_of_a_cell():
    """A uniform density on [−1, 1) is 8 bits per value, and −log2 P(u) ≤ E[−log2 p] + 7 (Jensen), nearly equal for smooth p."""
    assert flow.OFFSET == -np.log2(flow.CELL) == 7
    assert flow.bits_per_dimension(np.log(0.5) * 12, 12, flow.OFFSET) == pytest.approx(8)
    assert flow.bits_per_dimension(-3 * np.log(2), 3) == pytest.approx(1)
    u = np.repeat(np.arange(100, 110, dtype=np.uint8), 400)[:, None]
    low, high = u[::400, 0] / 128 - 1, (u[::400, 0] + 1.0) / 128 - 1
    for std in (0.5, 0.02):
        bits = flow.bits_per_dimension(gaussian_log_prob(flow.dequantize(u), -0.2, std**2), 1, flow.OFFSET).reshape(10, 400)
        exact = -log_normal_mass((low + 0.2) / std, (high + 0.2) / std) / np.log(2)
        gap, error = bits.mean(axis=1) - exact, bits.std(axis=1) / 20
        assert np.all(gap > -4 * error) and (std < 0.5 or np.all(gap < 4 * error + 1e-4))


def test_arrays_of_other_libraries(monkeypatch):
    """Model and product get the library of x: torch's tensors, and CuPy's arrays (in their stand-in's strictness)."""
    s, x = PROCESSES["vpsde"], LAW.sample(3, 2).astype(np.float32)
    torch = pytest.importorskip("torch")
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    model, jvp = LAW.model(s, "score"), flow.mixture_jvp(LAW, s, "score")
    tensors = (torch.from_numpy, lambda a: a.numpy() if isinstance(a, torch.Tensor) else a)
    devices = (cupy.asarray, lambda a: a.get())
    for trace in ("exact", "hutchinson"):
        options = {"prediction": "score", "trace": trace, "rtol": 1e-3, "atol": 1e-3, "t_min": 0.02}
        with kernels.use("reference"):
            want = flow.log_likelihood(model, x, s, lambda *a: jvp(*a).astype(np.float32), **options)
            for put, get in (tensors, devices):

                def there_model(x, t, put=put, get=get):
                    return put(model(get(x), get(t)))

                def there_jvp(x, t, v, put=put, get=get):
                    return put(jvp(get(x), get(t), get(v)).astype(np.float32))

                got = flow.log_likelihood(there_model, put(x), s, there_jvp, **options)
                np.testing.assert_allclose(got.log_prob, want.log_prob, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------- refusals


def test_what_the_flow_refuses(monkeypatch):
    s, x = PROCESSES["vpsde"], LAW.sample(3)
    for options, message in [
        ({"trace": "guess"}, "trace must be"),
        ({"projections": 0, "trace": "hutchinson"}, "projections must be at least 1"),
        ({"law": "uniform", "trace": "hutchinson"}, "law must be one of"),
        ({"method": "euler"}, "method must be one of"),
        ({"t_min": 0.0}, "t_min must be in"),
        ({"t_min": 2.0}, "t_min must be in"),
    ]:
        with pytest.raises(ValueError, match=message):
            likelihood(LAW, x, s, **options)
    jvp = flow.mixture_jvp(LAW, s)
    with pytest.raises(TypeError, match="x must be a float array"):
        flow.log_likelihood(LAW.model(s), np.zeros((2, 3), int), s, jvp)
    with pytest.raises(ValueError, match=r"model must return an array of shape \(3, 3\)"):
        flow.log_likelihood(lambda x, t: x[:1], x, s, jvp)
    with pytest.raises(ValueError, match=r"the model's answer at t = 0\.001 is not finite"):
        flow.log_likelihood(lambda x, t: x * np.nan, x, s, jvp)
    with pytest.raises(ValueError, match="jvp must return an array of shape"):
        flow.log_likelihood(LAW.model(s), x, s, lambda x, t, v: v[:1], trace="hutchinson")
    with pytest.raises(ValueError, match=r"the Jacobian of the model at t = 0\.001 is not finite"):
        flow.log_likelihood(LAW.model(s), x, s, lambda x, t, v: v + np.inf)
    with pytest.raises(ValueError, match="cannot end where no signal is left"):
        flow.log_likelihood(LAW.model(s), x, schedules.zero_terminal_snr(schedules.linear()), jvp)
    for name in [m for m in sys.modules if m == "scipy" or m.startswith("scipy.")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def no_scipy(name, *rest, **more):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    with pytest.raises(ImportError, match="pip install scipy"):
        likelihood(LAW, x, s)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_every_prediction_gives_one_likelihood(prediction):
    s, x = PROCESSES["vpsde"], LAW.sample(4, 3)
    jvp = flow.mixture_jvp(LAW, s, prediction)
    found = flow.log_likelihood(LAW.model(s, prediction), x, s, jvp, prediction, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found.log_prob, likelihood(LAW, x, s, rtol=1e-8, atol=1e-8).log_prob, atol=1e-6)
