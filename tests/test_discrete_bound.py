"""The discrete bound against the enumeration of every path of words few enough for it, the entropy, and known forms."""

import sys
from itertools import pairwise

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import discrete_bound, rates
from alphabar.core.discrete_bound import prior_kl, vlb_terms
from alphabar.core.discrete_losses import hybrid_loss, step_kl
from alphabar.core.transitions import Absorbing, Dense, DiscretizedGaussian, NearestNeighbour, Uniform, neighbour_rates
from tests import fake_cupy

WORD = np.array([[0.4, 0.05, 0.05], [0.1, 0.15, 0.05], [0.02, 0.08, 0.1]])
LETTER = np.array([0.5, 0.2, 0.3])


def law_of(name, T):
    beta = np.r_[0.0, np.linspace(0.1, 0.9, T)]
    rng = np.random.default_rng(5)
    Q = rng.random((T + 1, 3, 3)) + np.eye(3)
    return {
        "uniform": lambda: Uniform(3, beta),
        "uniform, to the end": lambda: Uniform(3, rates.reciprocal(T)),
        "absorbing": lambda: Absorbing(4, rates.reciprocal(T)),
        "gaussian": lambda: DiscretizedGaussian(3, np.r_[0.0, beta[1:] + 0.3]),
        "neighbours": lambda: NearestNeighbour(neighbour_rates(rng.random((3, 2)), 1), beta),
        "dense": lambda: Dense(Q / Q.sum(axis=2, keepdims=True)),
    }[name]()


NAMES = ("uniform", "uniform, to the end", "absorbing", "gaussian", "neighbours", "dense")


def poor(law):
    """A network that is wrong everywhere: logits that depend on the state, the place and t."""
    table = np.random.default_rng(3).standard_normal((law.T + 1, law.K, 3, 3))

    def model(x, t):
        place = np.arange(x.shape[1]) % 3
        return table[t.astype(int)[:, None], x, place[None]]

    return model


def expected_terms(oracle, grid, model):
    """E_q of every term (S+1,) of the bound: each word, each noisy word, each with its chance."""
    n, m = len(oracle.words), len(oracle.states)
    x0, x_t = oracle.words.repeat(m, axis=0), np.tile(oracle.states, (n, 1))
    times, rows = [0, *grid], []
    for s, t in pairwise(times):
        chance = oracle.p[:, None] * oracle.noised(t)
        live = chance.reshape(-1) > 0
        logits = model(x_t[live], np.full(live.sum(), float(t)))
        rows.append(chance.reshape(-1)[live] @ step_kl(logits, x0[live], x_t[live], t, oracle.law, s).sum(axis=1))
    return np.array([*rows, oracle.p @ prior_kl(oracle.words, oracle.law)])


def paths_bound(oracle, model):
    """E_q[−log p(x_T) − Σ_t log p_θ(x_{t−1}|x_t)/q(x_t|x_{t−1})], the definition, over every path of the T = 3 chain."""
    n, T = len(oracle.states), oracle.law.T
    at = np.ravel_multi_index(tuple(oracle.words.T), (oracle.law.K,) * oracle.L)
    start = np.zeros(n)
    start[at] = oracle.p
    forward = [oracle.product(oracle.law.matrix(t), oracle.states, oracle.states) for t in range(1, T + 1)]
    reverse = [oracle.reverse(t, t - 1, model) for t in range(1, T + 1)]
    path = np.indices((n,) * (T + 1)).reshape(T + 1, -1)
    chance = start[path[0]] * np.prod([forward[t][path[t], path[t + 1]] for t in range(T)], axis=0)
    path, chance = path[:, chance > 0], chance[chance > 0]
    value = -np.log(oracle.prior()[path[T]])
    for t in range(T):
        value += np.log(forward[t][path[t], path[t + 1]]) - np.log(reverse[t][path[t + 1], path[t]])
    return chance @ value


@pytest.mark.parametrize("model", ["exact", "poor"])
@pytest.mark.parametrize("name", NAMES)
def test_the_terms_sum_to_the_enumeration_of_all_paths(words, name, model):
    oracle = words(WORD, law_of(name, 3))
    net = oracle.model if model == "exact" else poor(oracle.law)
    total = expected_terms(oracle, [1, 2, 3], net).sum()
    assert total == pytest.approx(paths_bound(oracle, net), rel=1e-11)
    likelihood = oracle.chain([1, 2, 3], oracle.prior(), net)
    assert total >= -(oracle.p @ np.log(likelihood)) > oracle.entropy - 1e-12


@pytest.mark.parametrize("grid", [[1, 2, 3, 4, 5, 6], [6], [2, 3, 6]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_of_one_letter_the_exact_network_leaves_the_entropy_and_the_prior(words, name, grid):
    """Then the reverse steps are those of q: L = H(x_0) + KL(q(x_T)‖p(x_T)), in any number of steps."""
    oracle = words(LETTER, law_of(name, 6))
    law = oracle.law
    end = oracle.p @ oracle.noised(6)
    live = end > 0
    rest = (end * np.log(np.where(live, end, 1) / np.where(live, law.prior, 1))).sum()
    assert expected_terms(oracle, grid, oracle.model).sum() == pytest.approx(oracle.entropy + rest, rel=1e-10)


@pytest.mark.parametrize("name", ["uniform, to the end", "absorbing"])
def test_the_bound_falls_to_the_entropy_as_steps_grow(words, name):
    gaps = []
    for T in (1, 2, 4, 8, 16, 32, 64):
        oracle = words(WORD, law_of(name, T))
        gaps.append(expected_terms(oracle, range(1, T + 1), oracle.model).sum() - oracle.entropy)
    assert np.all(np.diff(gaps) < 0) and gaps[-1] > 0
    mutual = (WORD * np.log(WORD / (WORD.sum(axis=1, keepdims=True) * WORD.sum(axis=0)))).sum()
    assert gaps[0] == pytest.approx(mutual, rel=1e-10)  # one step draws the letters independently
    assert gaps[-1] < 1.2 * gaps[-2] / 2 < 0.03 * gaps[0]


@pytest.mark.parametrize("grid", [None, [1, 3, 6]], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_monte_carlo_has_the_expected_terms(words, name, grid):
    oracle = words(WORD, law_of(name, 6))
    model = poor(oracle.law)
    rng = np.random.default_rng(1)
    x0 = oracle.words[rng.choice(9, 6000, p=oracle.p)]
    calls = []
    found = vlb_terms(model, x0, oracle.law, grid=grid, seed=4, progress=lambda *a: calls.append(a))
    times = list(range(1, 7)) if grid is None else grid
    wanted = expected_terms(oracle, times, model)
    mean, error = found.term_bits
    assert found.t.tolist() == times and calls == [(i + 1, len(times)) for i in range(len(times))]
    np.testing.assert_array_less(np.abs(mean * 2 * np.log(2) - wanted), 4 * error * 2 * np.log(2) + 1e-12)
    assert abs(found.bits - wanted.sum() / (2 * np.log(2))) < 4 * found.error
    np.testing.assert_allclose(found.decoder, found.terms[0])
    assert found.error < 0.05


@pytest.mark.parametrize("name", ["uniform", "absorbing", "gaussian"])
def test_a_stratified_part_of_the_times_keeps_the_expectation(words, name):
    oracle = words(WORD, law_of(name, 7))
    model = poor(oracle.law)
    x0 = oracle.words[np.random.default_rng(1).choice(9, 6000, p=oracle.p)]
    wanted = expected_terms(oracle, range(1, 8), model)
    for times, draws in ((1, 1), (3, 2), (7, 1)):
        found = vlb_terms(model, x0, oracle.law, times=times, draws=draws, seed=2)
        mean, error = found.term_bits
        np.testing.assert_array_less(np.abs(mean * 2 * np.log(2) - wanted), 4 * error * 2 * np.log(2) + 1e-12)
        assert abs(found.bits - wanted.sum() / (2 * np.log(2))) < 4 * found.error
        assert (np.count_nonzero(found.terms[:-1], axis=0) <= times * draws).all()
    full = vlb_terms(model, x0, oracle.law, seed=2)
    np.testing.assert_allclose(found.terms.sum(axis=0).mean(), full.terms.sum(axis=0).mean(), rtol=0.05)
    assert full.error < vlb_terms(model, x0, oracle.law, times=1, seed=2).error


def test_the_loss_over_all_times_is_the_bound_less_the_prior(words):
    for name in ("uniform", "absorbing", "gaussian"):
        oracle = words(WORD, law_of(name, 6))
        model, law = poor(oracle.law), oracle.law
        n, m = len(oracle.words), len(oracle.states)
        x0, x_t, total = oracle.words.repeat(m, axis=0), np.tile(oracle.states, (n, 1)), 0.0
        for t in range(1, 7):
            chance = (oracle.p[:, None] * oracle.noised(t)).reshape(-1)
            live = chance > 0
            value, _ = hybrid_loss(model(x_t[live], np.full(live.sum(), t)), x0[live], x_t[live], t, law)
            total += chance[live] @ value / 6
        wanted = expected_terms(oracle, range(1, 7), model)
        assert total == pytest.approx(wanted[:-1].sum() / 2, rel=1e-12)


def test_absorbing_terms_are_masked_cross_entropies_over_t(words):
    """Σ_t (1/t)·E[Σ over masked −log p̃(x_0)] with β_t = 1/(T−t+1), and no prior term."""
    oracle = words(WORD, law_of("absorbing", 6))
    model = poor(oracle.law)
    wanted = np.zeros(6)
    for t in range(1, 7):
        logits = model(oracle.states, np.full(len(oracle.states), t))
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chance = oracle.p[:, None] * oracle.noised(t)
        for i in range(2):
            cross = -log_p[:, i][:, oracle.words[:, i]].T * (oracle.states[:, i] == 3)
            wanted[t - 1] += (chance * cross).sum() / t
    found = expected_terms(oracle, range(1, 7), model)
    np.testing.assert_allclose(found[:-1], wanted, rtol=1e-12)
    assert found[-1] == 0


def test_the_absorbing_bound_does_not_depend_on_the_path_of_the_rate(words):
    """A network that does not see t, T large: only the masked share counts, so that two schedules give one bound."""
    table = np.random.default_rng(3).standard_normal((4, 4, 2, 3))
    bits = []
    for beta in (rates.reciprocal(400), rates.from_alpha_bar(np.r_[np.cos(np.arange(400) / 400 * np.pi / 2), 0])):
        oracle = words(WORD, Absorbing(4, beta))
        bits.append(expected_terms(oracle, range(1, 401), lambda x, t: table[x[:, 0], x[:, 1]]).sum())
    assert bits[0] == pytest.approx(bits[1], rel=5e-3)


def test_relabelled_states_have_the_same_bound(words):
    """The uniform law knows no order of the states, nor does the bound; a Gaussian law does."""
    turn = np.array([2, 0, 1])
    sums = {}
    for name in ("uniform", "gaussian"):
        oracle = words(WORD, law_of(name, 4))
        turned = words(WORD[np.ix_(turn, turn)], oracle.law)
        sums[name] = [expected_terms(o, range(1, 5), o.model).sum() for o in (oracle, turned)]
    assert sums["uniform"][0] == pytest.approx(sums["uniform"][1], rel=1e-12)
    assert abs(sums["gaussian"][0] - sums["gaussian"][1]) > 1e-3


def test_the_prior_term():
    beta = np.r_[0.0, np.linspace(0.1, 0.5, 4)]
    law = Uniform(5, beta)
    q = law.cumulative(4)
    wanted = (q * np.log(q * 5)).sum(axis=1)
    x0 = np.array([[0, 3], [4, 1]])
    np.testing.assert_allclose(prior_kl(x0, law), wanted[x0].sum(axis=1), rtol=1e-12)
    assert np.all(prior_kl(x0, Absorbing(5, rates.reciprocal(4))) == 0)
    assert np.all(prior_kl(x0, Absorbing(6, beta)) == np.inf)


def test_draws_and_times_are_independent(words):
    """The variance over paths of one word: that of the terms' sum is the sum of theirs, and four draws leave a quarter."""
    oracle = words(WORD, law_of("uniform", 4))
    model, x0 = poor(oracle.law), np.tile([[1, 2]], (20_000, 1))
    one, four = (vlb_terms(model, x0, oracle.law, draws=n, seed=5) for n in (1, 4))
    assert one.nats.var() == pytest.approx(one.terms.var(axis=1).sum(), rel=0.05)
    assert four.nats.var() == pytest.approx(one.nats.var() / 4, rel=0.05)


def test_arrays_on_a_device_meet_no_array_of_the_host(words, monkeypatch):
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    table = np.random.default_rng(0).standard_normal((4, 2, 3))

    def model(x, t):
        xp = cupy if isinstance(x, fake_cupy.ndarray) else np
        assert isinstance(t, xp.ndarray)
        return xp.asarray(table)[x, xp.asarray(np.arange(2))]

    x0 = np.tile([[1, 2]], (10, 1))
    with kernels.use("reference"):
        for name in NAMES:
            for options in ({}, {"times": 2}):
                found = vlb_terms(model, cupy.asarray(x0), law_of(name, 4), **options)
                np.testing.assert_array_equal(found.terms, vlb_terms(model, x0, law_of(name, 4), **options).terms)


def test_a_batch_may_be_split_and_joined(words):
    oracle = words(WORD, law_of("uniform", 5))
    model, x0 = poor(oracle.law), oracle.words[np.arange(40) % 9]
    for options in ({}, {"times": 2, "draws": 3}):
        whole = vlb_terms(model, x0, oracle.law, seed=9, **options)
        parts = [vlb_terms(model, x0[a:b], oracle.law, seed=9, first_sample=a, **options) for a, b in ((0, 13), (13, 40))]
        np.testing.assert_allclose(discrete_bound.Bound.join(parts).terms, whole.terms, rtol=1e-12)


def test_wrong_arguments_are_named(words):
    oracle = words(WORD, law_of("uniform", 4))
    good = (oracle.model, oracle.words, oracle.law)
    with pytest.raises(ValueError, match="draws and times must be at least 1"):
        vlb_terms(*good, times=0)
    with pytest.raises(ValueError, match="give steps or grid"):
        vlb_terms(*good, steps=2, grid=[4])
    with pytest.raises(ValueError, match="end at 4"):
        vlb_terms(*good, grid=[1, 3])
    with pytest.raises(ValueError, match=r"x0 must be in 0\.\.2"):
        vlb_terms(oracle.model, oracle.words + 1, oracle.law)
    with pytest.raises(TypeError, match="x0 must be"):
        vlb_terms(oracle.model, oracle.words * 1.0, oracle.law)
    with pytest.raises(ValueError, match="at least one element"):
        vlb_terms(oracle.model, oracle.words[:0], oracle.law)


def test_the_prior_term_is_of_states_alone():
    law = Uniform(3, rates.cosine(6))
    for x0 in (np.array([[3]]), np.array([[-1]]), np.array([[1.0]]), [[1]]):
        with pytest.raises((TypeError, ValueError), match="x0 must be"):
            prior_kl(x0, law)
