"""Batches of no sample, arrays in another memory order, and arguments that do not fit, at the doors of core."""

import numpy as np
import pytest

from alphabar.core import (
    analytic,
    bound,
    decoder,
    editing,
    flow,
    forward,
    guidance,
    interpolate,
    inverse,
    langevin,
    losses,
    ode,
    operators,
    predictor_corrector,
    samplers,
    schedules,
    score_matching,
    sde,
    tables,
    traces,
)
from alphabar.core.chain import chain
from alphabar.core.mixture import GaussianMixture

S = schedules.linear(50, rescale=True)
VP = sde.VPSDE()
LADDER = schedules.geometric(0.1, 5.0, 12)
LAW = GaussianMixture([0.3, 0.7], [[-1.0] * 16, [1.0] * 16], 0.2)
BOX = operators.box((4, 4, 1), 2)


def net(x, t):
    return 0.3 * x


def vjp(x, t, u):
    return 0.3 * x, 0.3 * u(0.3 * x)


def mixture_model(x, t):
    flat = x.reshape(len(x), 16)
    return LAW.model(S)(flat, t).reshape(x.shape)


ON_BATCHES = {
    "predictor and corrector": lambda x: predictor_corrector.sample(
        net, tables.reverse_diffusion(VP, steps=3), x, VP, norm="batch"
    ),
    "dps": lambda x: inverse.dps(vjp, tables.ddpm(S, 3), x, BOX, BOX(x)),
    "moment matching": lambda x: samplers.sample(inverse.moment_matching(vjp, S, BOX, BOX(x), 0.1), tables.ddim(S, 3), x),
    "ddrm": lambda x: inverse.ddrm(net, S, BOX, BOX(x), x, 0.1, steps=3),
    "mixture": lambda x: samplers.sample(mixture_model, tables.ddim(S, 3), x),
    "interpolate": lambda x: editing.interpolate(net, S, x, x + 1, 3, steps=3),
    "slerp": lambda x: interpolate.slerp(x, x + 1, 0.3),
    "psnr": lambda x: editing.psnr(x, x + 1),
    "hutchinson": lambda x: traces.hutchinson_trace(lambda x, v: 0.3 * v, x, projections=3)[0],
    "rescale": lambda x: guidance.rescale_guidance(x, x + 1, 0.4),
    "kl": lambda x: losses.normal_kl(x, 1.0, x + 1, 2.0),
    "log_prob": lambda x: decoder.gaussian_log_prob(x, 0.0, 1.0),
    "prior": lambda x: bound.prior_kl(x, S),
    "path": lambda x: bound.q_path_log_prob(chain(S, 4), chain(S, 4).sample_path(x)),
}
ON_SAMPLES = {
    "bound": lambda x: bound.vlb_terms(net, x, chain(S, 4)).terms,
    "gamma": lambda x: analytic.measure_gamma(net, x, S, grid=[2, 9]).gamma,
    "flow": lambda x: flow.log_likelihood(net, x, VP, lambda x, t, v: 0.3 * v, trace="hutchinson", projections=2).estimates,
    "perturb": lambda x: score_matching.perturb(x, 0.3)[0],
    "code": lambda x: ode.encode(net, VP, x).x,
}


@pytest.mark.parametrize("name", ON_BATCHES)
def test_a_batch_of_no_sample(name):
    empty = np.empty((0, 4, 4, 1))
    full = np.random.default_rng(0).normal(size=(2, 4, 4, 1))
    got, want = ON_BATCHES[name](empty), ON_BATCHES[name](full)
    assert got.shape == tuple(0 if n == 2 else n for n in want.shape)


@pytest.mark.parametrize("name", ON_BATCHES | ON_SAMPLES)
def test_the_order_of_memory_changes_nothing(name):
    f = (ON_BATCHES | ON_SAMPLES)[name]
    x = np.random.default_rng(0).normal(size=(3, 4, 4, 1))
    for other in (np.asfortranarray(x), np.repeat(x, 2, axis=2)[:, :, ::2], x.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)):
        np.testing.assert_allclose(f(other), f(x), rtol=1e-9, atol=1e-12)


def test_a_torch_tensor_of_channels_first_seen_as_last():
    torch = pytest.importorskip("torch")
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64).permute(0, 2, 3, 1)
    a, b = (bound.vlb_terms(net, v, chain(S, 4)).terms for v in (x, x.contiguous()))
    np.testing.assert_array_equal(a, b)
    got, eps = score_matching.perturb(x, 0.3)
    assert isinstance(got, torch.Tensor) and torch.equal(got, x + 0.3 * eps)


X = np.zeros((3, 4))
GAMMA = analytic.measure_gamma(net, X + 1, S, grid=[2, 9])
REFUSED = [
    (ValueError, "at least one sample", lambda: bound.vlb_terms(net, X[:0], chain(S, 4))),
    (ValueError, "at least one sample", lambda: flow.log_likelihood(net, X[:0], VP, net)),
    (ValueError, "broadcast to its shape", lambda: decoder.gaussian_log_prob(X, X[:, 0].reshape(3, 1, 1), 1.0)),
    (ValueError, "broadcast to its shape", lambda: decoder.discrete_log_prob(X[:, 0] + 1, X[:, :1], 1.0)),
    (ValueError, "broadcast to its shape", lambda: losses.normal_kl(X[:, :1], 1.0, X, 1.0)),
    (ValueError, "t_to below t", lambda: forward.ddim_posterior(X, X, 3, 9, S, 0.1)),
    (ValueError, "t_to below t", lambda: forward.ddim_posterior(X, X, np.array([3, 4, 5]), 1, S, 0.1)),
    (ValueError, "t_to must not be above", lambda: forward.ddim_sigma(3, 9, S)),
    (TypeError, "s must be", lambda: forward.ddim_sigma(9, 3, None)),
    (TypeError, "s must be", lambda: forward.random_times(3, 5)),
    (ValueError, "n must not be negative", lambda: forward.random_times(-1, S)),
    (TypeError, "s must be a Schedule", lambda: schedules.zero_terminal_snr(LADDER)),
    (TypeError, "s must be a Schedule", lambda: schedules.prior_gap(LADDER)),
    (ValueError, "T must be at least 2", lambda: schedules.geometric(0.1, 1.0, T=1)),
    (ValueError, "process of the table", lambda: predictor_corrector.sample(net, tables.reverse_diffusion(VP, steps=3), X, S)),
    (ValueError, "method must be one of", lambda: ode.decode(net, VP, X, method="RK4")),
    (ValueError, "rtol and atol", lambda: ode.decode(net, VP, X, rtol=-1)),
    (TypeError, "levels must be a process", lambda: LAW.model(3)),
    (TypeError, "gamma must be a Gamma", lambda: analytic.analytic_table(tables.ddpm(S, 5), None)),
    (TypeError, "gamma must be a Gamma", lambda: analytic.optimal_path(S, None, 3)),
    (TypeError, "gamma must be a Gamma", lambda: analytic.path_cost(S, None, [2, 9])),
    (ValueError, "parts must hold", lambda: analytic.Gamma.join([])),
    (ValueError, "peak must be positive", lambda: editing.psnr(X, X + 1, peak=0)),
    (ValueError, "std must be positive", lambda: samplers.prior((2, 3), std=-1)),
]


@pytest.mark.parametrize(("error", "words", "call"), REFUSED)
def test_what_does_not_fit_is_named(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_the_corrector_takes_any_table_of_its_process():
    x = np.ones((2, 3))
    for s in (S, LADDER, VP, sde.EDM(0.01, 5.0)):
        for table in (tables.ddpm(s, 4), tables.heun(s, 4), tables.euler(s, 4, spacing="karras")):
            assert predictor_corrector.sample(net, table, x, s).shape == x.shape
    annealed = langevin.annealed_langevin(LADDER, 2, 1e-4)
    assert predictor_corrector.sample(net, annealed, x, LADDER).shape == x.shape
