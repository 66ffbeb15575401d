"""Transition matrices of discrete diffusion: the printed matrices entry by entry, products of steps, and the forms in which laws
are asked for, with what each law stores."""

import sys

import numpy as np
import pytest
from scipy.linalg import expm
from threadpoolctl import threadpool_limits

from alphabar.core import rates, schedules, transitions
from alphabar.core.transitions import Absorbing, Dense, DiscretizedGaussian, NearestNeighbour, Uniform, neighbour_rates
from tests import fake_cupy

RNG = np.random.default_rng(0)
K, T = 6, 7


def random_matrices(rng, zeros=0.0):
    Q = rng.random((T + 1, K, K)) * (rng.random((T + 1, K, K)) >= zeros) + 0.1 * np.eye(K)
    return Q / Q.sum(axis=2, keepdims=True)


def graph(K=K, neighbours=2, seed=1):
    return neighbour_rates(np.random.default_rng(seed).standard_normal((K, 2)), neighbours)


SLOW, FAST = np.r_[0, np.full(T, 0.03)], rates.linear(T, 0.05, 0.6)
LAWS = {
    "uniform": Uniform(K, FAST),
    "uniform to the end": Uniform(K, rates.reciprocal(T)),
    "absorbing": Absorbing(K, FAST),
    "absorbing to the end": Absorbing(K, rates.reciprocal(T)),
    "absorbing in state 2": Absorbing(K, rates.cosine(T), mask=2),
    "gaussian": DiscretizedGaussian(K, FAST),
    "gaussian, slow": DiscretizedGaussian(K, SLOW),
    "neighbours": NearestNeighbour(graph(), FAST),
    "neighbours, slow": NearestNeighbour(graph(), 0.01 * SLOW),
    "dense": Dense(random_matrices(RNG)),
    "dense with zeros": Dense(random_matrices(RNG, 0.5)),
}
DOUBLY = [name for name in LAWS if name.startswith(("uniform", "gaussian", "neighbours"))]
every_law = pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))


def log(p):
    with np.errstate(divide="ignore"):
        return np.log(p)


# ------------------------------------------------------------------------------------------------------------------------- rates


def test_rates_reach_what_they_promise():
    np.testing.assert_allclose(np.cumprod(1 - rates.reciprocal(1000)), 1 - np.arange(1001) / 1000, rtol=0, atol=1e-13)
    assert rates.linear(1000)[[0, 1, 1000]] == pytest.approx([0, 1e-4, 0.02])
    signal = schedules.cosine(1000).signal  # the cosine of states is the square root of the cosine² of images
    np.testing.assert_allclose(np.cumprod(1 - rates.cosine(1000))[:990], signal[:990], rtol=1e-12)
    for beta in (rates.linear(50), rates.cosine(50), rates.reciprocal(50), schedules.linear(50, rescale=True).beta):
        assert beta.shape == (51,) and beta[0] == 0 and not beta.flags.writeable
        np.testing.assert_allclose(rates.from_alpha_bar(np.cumprod(1 - beta)), beta, rtol=1e-10, atol=1e-14)


def test_rates_that_are_refused():
    for call, message in [
        (lambda: rates.linear(2, 0.5, 1.5), r"beta\[2\] must be in 0..1, and below 1 before T = 2, not 1.5"),
        (lambda: rates.linear(2, 1.0, 1.0), r"beta\[1\] must be in 0..1"),
        (lambda: rates.linear(2, -0.1, 0.1), r"beta\[1\]"),
        (lambda: rates.linear(0), "T must be at least 1"),
        (lambda: rates.from_alpha_bar([0.9, 0.5]), "starts with 1"),
        (lambda: rates.from_alpha_bar([1, 0.5, 0.6]), "must not rise"),
        (lambda: rates.from_alpha_bar([1, 0, 0]), "positive before T"),
        (lambda: Uniform(3, [0.1, 0.2]), r"beta\[0\] = 0"),
        (lambda: Uniform(3, [0, np.nan]), r"beta\[1\]"),
        (lambda: DiscretizedGaussian(3, [0, np.inf]), "finite and not negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# --------------------------------------------------------------------------------------------------------- the printed matrices


def test_the_printed_matrices_entry_by_entry():
    """S4-E75, E76, E77 by loops over their cases."""
    K, beta, m = 7, 0.3, 4
    uniform = [[1 - (K - 1) / K * beta if i == j else beta / K for j in range(K)] for i in range(K)]
    absorbing = [[1 if i == j == m else 1 - beta if i == j else beta if j == m else 0 for j in range(K)] for i in range(K)]
    np.testing.assert_allclose(transitions.transition_uniform(K, beta), uniform, rtol=1e-15)
    np.testing.assert_allclose(transitions.transition_absorbing(K, beta, m), absorbing, rtol=1e-15)
    assert (transitions.transition_absorbing(K, beta) == Absorbing(K, [0, beta], mask=K - 1).matrix(1)).all()
    for beta in (0.02, 0.3, 5.0):
        below = sum(np.exp(-4 * n**2 / ((K - 1) ** 2 * beta)) for n in range(-(K - 1), K))
        off = [
            [np.exp(-4 * abs(i - j) ** 2 / ((K - 1) ** 2 * beta)) / below if i != j else 0 for j in range(K)] for i in range(K)
        ]
        gaussian = off + np.diag(1 - np.sum(off, axis=1))
        got = transitions.transition_discretized_gaussian(K, beta)
        np.testing.assert_allclose(got, gaussian, rtol=1e-13)
        assert (got == got.T).all()


@every_law
def test_rows_are_laws(law):
    for s in range(law.T + 1):
        for t in range(s, law.T + 1):
            P = law.between(s, t)
            assert P.dtype == np.float64 and P.shape == (K, K) and (P >= 0).all()
            np.testing.assert_allclose(P.sum(axis=1), 1, rtol=0, atol=2e-15 * K)


@pytest.mark.parametrize("name", DOUBLY)
def test_symmetric_families_are_doubly_stochastic(name):
    law = LAWS[name]
    for t in range(1, T + 1):
        np.testing.assert_allclose(law.matrix(t), law.matrix(t).T, rtol=0, atol=1e-16)
        np.testing.assert_allclose(law.cumulative(t).sum(axis=0), 1, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "law",
    [
        Uniform(5, rates.linear(2000)),
        Absorbing(5, rates.linear(2000), mask=1),
        DiscretizedGaussian(5, rates.linear(2000, 0.05, 0.5)),
        NearestNeighbour(graph(5), rates.linear(2000, 0.05, 0.5)),
    ],
    ids=lambda law: law.name,
)
def test_the_chain_ends_in_its_prior(law):
    np.testing.assert_allclose(law.cumulative(law.T), np.tile(law.prior, (5, 1)), rtol=0, atol=1e-8)
    np.testing.assert_allclose(law.prior @ law.matrix(7), law.prior, rtol=0, atol=1e-15)
    assert law.prior.sum() == 1 and (law.prior == (np.eye(5)[1] if law.name == "absorbing" else 0.2)).all()


# ------------------------------------------------------------------------------------------------------------ products of steps


@every_law
def test_between_is_the_product_of_the_steps(law):
    """S4-E31 in its order: Q̄_t = Q_1Q_2…Q_t."""
    for s in range(T + 1):
        P = np.eye(K)
        for t in range(s, T + 1):
            if t > s:
                P = P @ law.matrix(t)
            np.testing.assert_allclose(law.between(s, t), P, rtol=1e-12, atol=1e-16)
        if s == 0:
            np.testing.assert_array_equal(law.cumulative(T), law.between(0, T))


@pytest.mark.parametrize("name", ["dense", "gaussian"])
def test_the_order_of_the_steps_matters(name):
    law = LAWS[name]
    backwards = np.linalg.multi_dot([law.matrix(t) for t in range(T, 0, -1)])
    assert np.abs(backwards - law.cumulative(T)).max() > 1e-3


def test_multinomial_closed_form_is_the_product_of_its_steps():
    """S4-E26: ᾱ_t x_0 + (1−ᾱ_t)/K; S4-E25 and S4-E75 are one matrix."""
    law = Uniform(27, rates.linear(300, 1e-3, 0.05))
    P = np.eye(27)
    for t in range(1, 301):
        assert np.abs(law.matrix(t) - ((1 - law.beta[t]) * np.eye(27) + law.beta[t] / 27)).max() < 1e-15
        P = P @ law.matrix(t)
        np.testing.assert_allclose(P, law.keep[t] * np.eye(27) + (1 - law.keep[t]) / 27, rtol=0, atol=1e-12)
        np.testing.assert_allclose(P, law.cumulative(t), rtol=0, atol=1e-12)


def test_the_masked_share_grows_linearly_under_reciprocal_rates():
    law = Absorbing(4, rates.reciprocal(1000))
    P = np.eye(4)
    for t in range(1, 1001):
        P = P @ law.matrix(t)
        assert abs(P[0, 3] - t / 1000) < 1e-13 and abs(law.cumulative(t)[0, 3] - t / 1000) < 1e-13
    assert law.keep[-1] == 0 and (law.cumulative(1000) == np.eye(4)[3]).all()


# ------------------------------------------------------------------------------------------------------ rows, columns, push, pull


@every_law
def test_rows_and_columns_are_those_of_the_matrices(law):
    x = RNG.integers(0, K, (9, 2, 3))
    s, t = RNG.integers(0, T + 1, (2, 9))
    s, t = np.minimum(s, t), np.maximum(s, t)
    for earlier, later in ((s, t), (0, t), (s, T), (2, 5), (0, 0), (T, T)):
        a, b = np.broadcast_to(earlier, 9), np.broadcast_to(later, 9)
        want = np.stack([law.between(int(i), int(j)) for i, j in zip(a, b, strict=True)])
        rows, columns = law.log_rows(earlier, x, later), law.log_columns(earlier, later, x)
        assert rows.dtype == columns.dtype == np.float64
        np.testing.assert_allclose(rows, log(np.stack([P[v] for P, v in zip(want, x, strict=True)])), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(columns, log(np.stack([P.T[v] for P, v in zip(want, x, strict=True)])), rtol=1e-12, atol=1e-12)
        single = law.log_rows(earlier, x.astype(np.uint8), later, np.float32)
        assert single.dtype == np.float32
        np.testing.assert_allclose(single, rows, rtol=1e-6, atol=1e-6)


def test_exact_zeros_are_minus_infinity():
    law = LAWS["absorbing in state 2"]
    rows = law.log_rows(0, np.arange(K), 3)
    allowed = np.eye(K, dtype=bool)
    allowed[:, 2] = True
    allowed[2] = np.arange(K) == 2
    assert ((rows > -np.inf) == allowed).all() and (law.log_columns(0, 3, np.arange(K)) == rows.T).all()
    end = LAWS["absorbing to the end"].log_rows(0, np.arange(K), T)
    assert (end == log(np.tile(np.eye(K)[K - 1], (K, 1)))).all()


@every_law
@pytest.mark.parametrize("D", [K, K - 1, 2])
def test_push_and_pull_are_products_with_the_matrix(law, D):
    p = RNG.random((9, 2, D)) * (RNG.random((9, 2, D)) < 0.8)  # not normalised, some exact zeros
    p[0, 0] = 0
    g = RNG.standard_normal((9, 2, K))
    t = RNG.integers(0, T + 1, 9)
    for times in (t, 0, 3, T):
        P = np.stack([law.cumulative(int(i)) for i in np.broadcast_to(times, 9)])
        pushed, pulled = law.log_push(log(p), times), law.pull(g, times, D)
        np.testing.assert_allclose(np.exp(pushed), np.einsum("bnk,bkj->bnj", p, P[:, :D]), rtol=1e-11, atol=1e-15)
        np.testing.assert_allclose(pulled, np.einsum("bkj,bnj->bnk", P[:, :D], g), rtol=1e-11, atol=1e-13)
        assert np.vdot(np.exp(pushed), g) == pytest.approx(np.vdot(p, pulled), rel=1e-11)
        assert (pushed[0, 0] == -np.inf).all()
        single = law.log_push(log(p).astype(np.float32), times)
        assert single.dtype == law.pull(g.astype(np.float32), times).dtype == np.float32
        np.testing.assert_allclose(np.exp(single), np.exp(pushed), rtol=2e-6, atol=1e-12)


@every_law
def test_push_of_probabilities_too_small_for_a_float(law):
    """ln p down to −3000: what is far below the rest stays finite, and exact where nothing near is larger."""
    log_p = np.array([[0.0, -3000.0, -2000.0, -1000.0, -400.0, -2900.0]])
    assert (law.log_push(log_p, 0) == log_p).all()
    for t in (1, T):
        P = law.cumulative(t)
        terms = log_p[0][:, None] + log(P)
        top = terms.max(axis=0)
        safe = np.where(top == -np.inf, 0, top)
        want = np.where(top == -np.inf, top, safe + log(np.exp(terms - safe).sum(axis=0)))
        got = law.log_push(log_p, t)[0]
        assert (got >= (log_p[0] + log(P.diagonal())) * (1 + 1e-14) - 1e-12).all() and not np.isnan(got).any()
        near = want > -700
        np.testing.assert_allclose(got[near], want[near], rtol=1e-12, atol=1e-12)
        assert (got <= want + 1e-9).all()


# ------------------------------------------------------------------------------------------------ the discretised Gaussian, large


@pytest.fixture(scope="module")
def large():
    with threadpool_limits(1):
        return DiscretizedGaussian(256, rates.linear(1000))


@threadpool_limits.wrap(limits=1)
def test_256_states_and_1000_steps_without_a_dense_table(large):
    """Every entry of every Q̄_t against the dense product, relative, and the memory against K²T."""
    assert large.nbytes < 0.07 * 256**2 * 1000 * 8
    P, worst = np.eye(256), 0.0
    for t in range(1, 1001):
        P = P @ large.matrix(t)
        if t % 9 == 1 or t < 4:
            Q = large.cumulative(t)
            seen = P > 1e-290
            worst = max(worst, np.abs(Q[seen] / P[seen] - 1).max())
            assert np.abs(Q.sum(axis=0) - 1).max() < 1e-13 and np.abs(Q.sum(axis=1) - 1).max() < 1e-13
    assert worst < 5e-10
    assert np.abs(large.cumulative(1000) - 1 / 256).max() < 3e-5


def test_logs_of_one_step_do_not_underflow(large):
    row = large.log_rows(0, np.array([0]), 1)[0]
    d = np.arange(1, 256)
    assert np.isfinite(row).all() and large.matrix(1)[0, 255] == 0
    np.testing.assert_allclose(row[2:] - row[1], -4 * (d[1:] ** 2 - 1) / (255**2 * large.beta[1]), rtol=1e-12)


def test_a_batch_of_many_times_is_each_sample_alone(large):
    t = np.array([1, 2, 3, 40, 41, 180, 400, 999, 1000, 3])
    x = RNG.integers(0, 256, (10, 5))
    log_p = np.log(RNG.dirichlet(np.full(256, 0.05), (10, 5)) + 1e-9)
    rows, pushed = large.log_rows(0, x, t), large.log_push(log_p, t)
    for i, time in enumerate(t.tolist()):
        P = large.cumulative(time)
        np.testing.assert_array_equal(rows[i], large.log_rows(0, x[i : i + 1], time)[0])
        np.testing.assert_allclose(pushed[i], log(np.exp(log_p[i]) @ P), rtol=1e-9)
        assert np.isfinite(pushed[i]).all()


def test_short_chains_that_never_mix_stay_exact():
    law = DiscretizedGaussian(40, rates.linear(30))
    P = np.eye(40)
    for t in range(1, 31):
        P = P @ law.matrix(t)
        np.testing.assert_allclose(law.cumulative(t), P, rtol=1e-13)
    still = DiscretizedGaussian(5, [0, 0, 0.2])
    assert (still.matrix(1) == np.eye(5)).all() and (still.cumulative(2) == still.matrix(2)).all()


# ---------------------------------------------------------------------------------------------------------------- the neighbours


def test_neighbour_rates_by_brute_force():
    e, k = np.random.default_rng(3).standard_normal((12, 3)), 4
    near = [sorted(range(12), key=lambda j: (j == i, np.sum((e[i] - e[j]) ** 2)))[:k] for i in range(12)]
    want = [[((j in near[i]) + (i in near[j])) / (2 * k) if i != j else 0 for j in range(12)] for i in range(12)]
    R = neighbour_rates(e, k)
    np.testing.assert_allclose(R - np.diag(R.diagonal()), want, rtol=1e-15)
    np.testing.assert_allclose(R.sum(axis=1), 0, atol=1e-15)
    assert (R == R.T).all() and R.diagonal().mean() == pytest.approx(-1)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0, 60.0])
def test_neighbour_matrices_are_exponentials_of_the_rates(scale):
    R = graph(20, 3)
    law = NearestNeighbour(R, np.r_[0, scale * np.array([0.2, 0.5, 0.3])])
    for s, t, b in ((0, 1, 0.2), (0, 3, 1.0), (1, 3, 0.8), (1, 2, 0.5)):
        np.testing.assert_allclose(law.between(s, t), expm(scale * b * R), rtol=1e-10, atol=1e-14)


def test_small_entries_of_the_neighbour_matrices_keep_their_digits():
    """On a ring the far entries are b^d/d!·(rate)^d to leading order, far below the rounding of an eigenbasis."""
    K, b = 16, 1e-4
    ring = np.roll(np.eye(K), 1, axis=1) / 2 + np.roll(np.eye(K), -1, axis=1) / 2 - np.eye(K)
    P = NearestNeighbour(ring, [0, b]).matrix(1)
    leading = [b**d / np.prod(np.arange(1.0, d + 1)) / 2**d for d in range(8)]
    np.testing.assert_allclose(P[0, :8], leading, rtol=2e-4)
    law = NearestNeighbour(ring, np.r_[0, np.full(400, 0.5)])
    P = np.eye(K)
    for t in range(1, 401):  # from the series to the eigenvectors
        P = P @ law.matrix(t)
        np.testing.assert_allclose(law.cumulative(t), P, rtol=1e-9)


# ---------------------------------------------------------------------------------------------------------- what is stored, kinds


def test_memory_of_the_closed_forms_does_not_grow_with_the_square():
    assert Uniform(256, rates.linear(1000)).nbytes == Absorbing(256, rates.linear(1000)).nbytes == 8 * (2 * 1001 + 256)
    small = NearestNeighbour(graph(64, 4), rates.linear(10)), NearestNeighbour(graph(64, 4), rates.linear(1000))
    assert small[1].nbytes - small[0].nbytes == 8 * 2 * 990
    assert LAWS["dense"].nbytes == 8 * (2 * (T + 1) * K * K + T + 1 + K)


def test_dense_takes_its_prior_and_refuses_what_is_not_a_law():
    Q = random_matrices(RNG)
    assert (Dense(Q, prior=np.eye(K)[0]).prior == np.eye(K)[0]).all()
    np.testing.assert_allclose(Dense(Q).prior, Dense(Q).cumulative(T).mean(axis=0))
    for bad, message in [(Q[:, :3], "shape"), (Q * 1.01, "sum to one"), (Q - 0.2, "sum to one"), (Q[:1], "shape")]:
        with pytest.raises(ValueError, match=message):
            Dense(bad)
    with pytest.raises(ValueError, match="prior must be 6"):
        Dense(Q, prior=np.ones(K))


@every_law
def test_arrays_of_other_libraries(law, monkeypatch):
    """torch in, torch out; and no NumPy array meets a CuPy one, by the stand-in's strictness."""
    torch = pytest.importorskip("torch")
    x, t, s = RNG.integers(0, K, (5, 2)), np.array([1, 3, 3, T, 2]), np.array([0, 1, 3, 2, 2])
    log_p, g = np.log(RNG.random((5, 2, K - 1))), RNG.standard_normal((5, 2, K))
    calls = [
        lambda xp, f: law.log_rows(f(s), f(x), f(t)),
        lambda xp, f: law.log_rows(0, f(x), 3, np.float32),
        lambda xp, f: law.log_columns(f(s), f(t), f(x)),
        lambda xp, f: law.log_push(f(log_p), f(t)),
        lambda xp, f: law.log_push(f(log_p), 2),
        lambda xp, f: law.pull(f(g), f(t), 4),
        lambda xp, f: law.log_rows(s, f(x), t),  # times on the host beside states on the device
    ]
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.cupy)
    for call in calls:
        want = call(np, np.asarray)
        got = call(torch, torch.from_numpy)
        assert isinstance(got, torch.Tensor) and np.array_equal(got.numpy(), want)
        got = call(fake_cupy.cupy, fake_cupy.cupy.asarray)
        assert isinstance(got, fake_cupy.ndarray) and np.array_equal(got.get(), want)


def test_empty_batches():
    for law in LAWS.values():
        assert law.log_rows(0, np.zeros((0, 3), int), 2).shape == (0, 3, K)
        assert law.log_push(np.zeros((0, 3, K)), 2).shape == law.pull(np.zeros((0, 3, K)), np.zeros(0, int)).shape == (0, 3, K)
        assert law.log_push(np.zeros((2, 0, K)), np.array([1, 2])).shape == (2, 0, K)


def test_what_is_refused():
    law, x, log_p = LAWS["uniform"], np.zeros((2, 3), np.int32), np.zeros((2, 3, K))
    for call, error, message in [
        (lambda: Uniform(1, FAST), ValueError, "K must be at least 2, not 1"),
        (lambda: Uniform(3.0, FAST), TypeError, "K must be an int"),
        (lambda: Absorbing(3, FAST, mask=3), ValueError, r"mask must be in 0\.\.2"),
        (lambda: Absorbing(3, FAST, mask=1.0), TypeError, "mask must be an int"),
        (lambda: law.matrix(0), ValueError, r"t must be in 1\.\.7"),
        (lambda: law.matrix(np.array([1])), TypeError, "t must be an int"),
        (lambda: law.between(3, 2), ValueError, r"s must be in 0\.\.2"),
        (lambda: law.log_rows(0, x, T + 1), ValueError, r"t must be in 0\.\.7"),
        (lambda: law.log_rows(0, x, 1.0), TypeError, "t must be an int"),
        (lambda: law.log_rows(3, x, np.array([4, 2])), ValueError, "s must not be above t"),
        (lambda: law.log_rows(0, x, np.array([4, 2, 3])), ValueError, r"shape \(2,\)"),
        (lambda: law.log_rows(0, x + K, 2), ValueError, r"x must be in 0\.\.5"),
        (lambda: law.log_columns(0, 2, x - 1), ValueError, r"x_t must be in 0\.\.5"),
        (lambda: law.log_rows(0, x + 0.5, 2), TypeError, "x must be an integer array"),
        (lambda: law.log_rows(0, np.array(3), 2), TypeError, r"x must be an integer array \(B, …\)"),
        (lambda: law.log_rows(0, x, 2, np.float16), TypeError, "dtype must be float32 or float64"),
        (lambda: law.log_push(x, 2), TypeError, "log_p must be a float32 or float64 array"),
        (lambda: law.log_push(np.zeros((2, K + 1)), 2), ValueError, r"log_p must have 1\.\.6"),
        (lambda: law.pull(log_p[..., 1:], 2), ValueError, r"g must have shape \(B, …, 6\)"),
        (lambda: law.pull(log_p, 2, K + 1), ValueError, r"columns must be in 1\.\.6"),
        (lambda: neighbour_rates(np.zeros(4), 1), ValueError, "embedding must be"),
        (lambda: neighbour_rates(np.zeros((4, 2)), 4), ValueError, r"neighbours must be in 1\.\.3"),
        (lambda: neighbour_rates(np.zeros((4, 2)), 1.5), TypeError, "neighbours must be an int"),
        (lambda: NearestNeighbour(np.zeros((3, 2)), FAST), ValueError, "rates must have shape"),
        (lambda: NearestNeighbour(np.ones((3, 3)), FAST), ValueError, "rates must be symmetric"),
        (lambda: NearestNeighbour(np.kron(np.eye(2), [[-1, 1], [1, -1]]), FAST), ValueError, "must connect all states"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_jumps_for_any_time_end_at_the_uniform_law():
    rates_ = neighbour_rates(np.random.default_rng(0).normal(size=(8, 2)), 4)
    law = NearestNeighbour(rates_, [0.0, 1e15, 1e300, 1e308])
    for t in (1, 2, 3):
        np.testing.assert_allclose(law.cumulative(t), 1 / 8, rtol=1e-9)
