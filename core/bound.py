"""The variational bound on −log p_θ(x_0): term by term for a data set, and path by path in its two forms.

    L = L_T + Σ_{i=2}^{S} L_{i−1} + L_0,   in nats; divided by d·ln 2 it is bits per dimension.

Everything about the chains, any sub-sequence of times and any σ, stands in a :class:`alphabar.core.chain.Chain`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels import counter, streams
from ..kernels.arrays import to_numpy
from .chain import Chain, Model
from .decoder import DECODERS, discrete_log_prob, gaussian_log_prob
from .exchange import Array, check_schedule, flat
from .levels import Levels

UNIFORMS = 0xFFFFFFFF  # the step of the stream PATH, counted down by draw, at which the sampled terms are chosen


@dataclass(frozen=True, eq=False, repr=False)
class Bound:
    """The terms of the bound for B samples of d elements. Eq: S1-E8, S4-E10.

    t (S,): the times of the chain. terms (S+1, B): nats; row 0 is L_0 = −log p_θ(x_0|x_1), row i−1 is L_{i−1}, the KL at x_i, and
    row S is L_T = KL(q(x_S|x_0)‖p(x_S)).
    """

    t: np.ndarray
    terms: np.ndarray
    dimensions: int

    def __repr__(self) -> str:
        return f"Bound({self.bits:.5g} ± {self.error:.2g} bits per dimension, {self.terms.shape[1]} samples, S={self.t.size})"

    @property
    def nats(self) -> np.ndarray:
        """The bound for each sample (B,), nats. Eq: S0-E23, S1-E8."""
        return self.terms.sum(axis=0)

    @property
    def decoder(self) -> np.ndarray:
        """L_0 (B,)."""
        return self.terms[0]

    @property
    def prior(self) -> np.ndarray:
        """L_T (B,)."""
        return self.terms[-1]

    @property
    def bits(self) -> float:
        """The mean bound in bits per dimension."""
        return float(self.bits_of(self.nats)[0])

    @property
    def error(self) -> float:
        """The standard error of ``bits`` over the samples: that of the data and of the paths drawn. NaN for one sample."""
        return float(self.bits_of(self.nats)[1])

    @property
    def term_bits(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard error) of each term (S+1,), bits per dimension."""
        return self.bits_of(self.terms)

    def bits_of(self, nats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard error) over the last axis, the samples, in bits per dimension."""
        bits = np.asarray(nats) / (self.dimensions * np.log(2))
        n = bits.shape[-1]
        error = bits.std(axis=-1, ddof=1) / np.sqrt(n) if n > 1 else np.full(bits.shape[:-1], np.nan)
        return bits.mean(axis=-1), error

    @staticmethod
    def join(parts: Sequence["Bound"]) -> "Bound":
        """One record of several batches under one chain."""
        return Bound(parts[0].t, np.concatenate([p.terms for p in parts], axis=1), parts[0].dimensions)


def prior_kl(x0: Array, s: Levels, t: float | None = None) -> np.ndarray:
    """L_T = KL(q(x_t|x_0)‖N(0, prior_std²·I)) of each sample, nats (B,); t is T by default. Eq: S4-E22, S0-C12, S1-C2, S0-E26.

        ½·(a²‖x_0‖²/p² + d·(n²/p² − 1 − ln n²/p²)),    p = prior_std

    No parameter of p_θ is in it (Eq: S1-C5).
    """
    check_schedule(s)
    x = np.asarray(to_numpy(x0), np.float64)
    a, n = (float(v) / s.prior_std for v in s.levels(s.T if t is None else t))
    return 0.5 * (a**2 * (flat(x) ** 2).sum(axis=1) + x[:1].size * ((n - 1) * (n + 1) - 2 * np.log(n)))


def vlb_terms(
    model: Model,
    x0: Array,
    c: Chain,
    decoder: str = "gaussian",
    draws: int = 1,
    seed: int = 0,
    first_sample: int = 0,
    sampled: int | None = None,
    weights: Any = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Bound:
    """The bound's terms at x0 (B, …), by ``draws`` Monte-Carlo draws of x_i ~ q(x_i|x_0) at every time.

    Eq: S0-E23, S0-E24, S0-E25, S0-E26, S0-E27, S0-E43, S1-E8, S1-E11, S4-E10, S4-E16.

        L_{i−1} = KL(q_σ(x_{i−1}|x_i, x_0)‖p_θ(x_{i−1}|x_i)) = ½·(on_x0²‖x_0 − x̂_0‖²/σ_p² + d·(r − 1 − ln r)),    r = σ_q²/σ_p²

    which for σ_p = σ_q is γ_i·‖ε − ε_θ‖² (:attr:`Chain.gamma`). L_0 is by the ``decoder`` "gaussian", a density, or "discrete",
    the probability of 8-bit data (:func:`alphabar.core.decoder.discrete_log_prob`); L_T is exact.

    sampled: instead of all S−1 KL terms compute this many for each sample and draw, chosen with chances ∝ ``weights`` (S−1,),
        lowest time first, uniform by default; a hit counts by the inverse of its chance: terms and sum keep their expectations.
    progress: called as progress(model calls done, in all).

    The noise of sample k depends on (seed, draw, place of the time, first_sample + k) alone.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder must be one of {DECODERS}, not {decoder!r}")
    if draws < 1 or (sampled is not None and sampled < 1):
        raise ValueError(f"draws and sampled must be at least 1, not {draws} and {sampled}")
    clean = np.asarray(to_numpy(x0), np.float64)
    if clean.ndim < 1 or clean.size == 0:
        raise ValueError(f"x0 must be an array (B, …) of at least one sample, not of shape {clean.shape}")
    batch, S = len(clean), len(c)
    terms = np.zeros((S + 1, batch))
    terms[S] = prior_kl(clean, c.levels, c.t[-1])
    per_draw = S if sampled is None or S == 1 else 1 + sampled
    done = 0

    def ask(i: Any, draw: int) -> tuple[np.ndarray, np.ndarray]:
        nonlocal done
        x = c.noised(x0, i, seed, draw, first_sample)
        x0_hat = c.predicted_x0(c.ask(model, x, i), x, i)
        done += 1
        if progress is not None:
            progress(done, draws * per_draw)
        return np.asarray(to_numpy(x), np.float64), x0_hat

    def kl(i: Any, draw: int) -> np.ndarray:
        _, x0_hat = ask(i, draw)
        square = ((clean - x0_hat) ** 2).reshape(batch, -1).sum(axis=1)
        r = c.q_variance[i] / c.p_variance[i]
        return 0.5 * (c.on_x0[i] ** 2 / c.p_variance[i] * square + clean[0].size * (r - 1 - np.log(r)))

    chances = _chances(weights, S)
    for draw in range(draws):
        x, x0_hat = ask(1, draw)
        log_prob = discrete_log_prob if decoder == "discrete" else gaussian_log_prob
        terms[0] -= log_prob(clean, c.mean(x0_hat, x, 1), c.p_variance[1]) / draws
        if S == 1:
            continue
        if sampled is None:
            for i in range(2, S + 1):
                terms[i - 1] += kl(i, draw) / draws
        else:
            for m, i in enumerate(_choose(chances, sampled, batch, seed, draw, first_sample)):
                share = kl(i, draw * sampled + m) / (draws * sampled * chances[i - 2])
                np.add.at(terms, (i - 1, np.arange(batch)), share)
    return Bound(c.t[1:], terms, clean[0].size)


def _chances(weights: Any, S: int) -> np.ndarray:
    w = np.ones(max(S - 1, 0)) if weights is None else np.asarray(weights, np.float64)
    if w.shape != (max(S - 1, 0),) or not np.all((w > 0) & np.isfinite(w)):
        raise ValueError(f"weights must be {S - 1} positive numbers, one for each term between L_0 and L_T")
    return w / w.sum()


def _choose(chances: np.ndarray, sampled: int, batch: int, seed: int, draw: int, first_sample: int) -> np.ndarray:
    """(sampled, B) steps i in 2..S, systematically: one uniform a sample, equal shares of the distribution."""
    u = counter.uniforms(batch, 1, seed, UNIFORMS - draw, streams.PATH, first_sample)[:, 0]
    places = (np.arange(sampled)[:, None] + u) / sampled
    return 2 + np.minimum(np.searchsorted(np.cumsum(chances), places, side="right"), len(chances) - 1)


# ----------------------------------------------------------------------------------------------------------------- path by path


def vlb_markov_form(log_prior: Any, log_p: Any, log_q: Any) -> Any:
    """The bound along paths, from the forward kernels: (B,) nats. Eq: S0-E21, S0-E22, S4-E9, S4-E8.

        −log p(x_T) − Σ_{t=1}^{T} log p_θ(x_{t−1}|x_t)/q(x_t|x_{t−1})

    log_prior (B,), log_p and log_q (T, B), t = 1..T: log-probabilities of any kind of state along B paths.
    """
    return -np.asarray(log_prior) - (np.asarray(log_p) - np.asarray(log_q)).sum(axis=0)


def vlb_posterior_form(log_prior: Any, log_end: Any, log_p: Any, log_posterior: Any) -> Any:
    """The bound along paths, from the posteriors: (B,) nats. Eq: S0-E23, S0-E24, S4-E10.

        −log p(x_T)/q(x_T|x_0) − Σ_{t=2}^{T} log p_θ(x_{t−1}|x_t)/q(x_{t−1}|x_t, x_0) − log p_θ(x_0|x_1)

    As :func:`vlb_markov_form`, to which it is equal on every path (Eq: S0-P7); log_end (B,) is log q(x_T|x_0) and log_posterior
    (T−1, B) has t = 2..T.
    """
    log_p = np.asarray(log_p)
    return -(np.asarray(log_prior) - log_end) - (log_p[1:] - np.asarray(log_posterior)).sum(axis=0) - log_p[0]


def q_path_log_prob(c: Chain, path: np.ndarray, order: str = "forward") -> np.ndarray:
    """log q_σ(x_{1:S}|x_0) of each path (B,), nats. Eq: S1-E1, S2-E6, S2-C6, S4-E1, S4-E4, S4-E6.

    order: "forward" Σ log q_σ(x_i|x_{i−1}, x_0), or "reverse" log q(x_S|x_0) + Σ_{i≥2} log q_σ(x_{i−1}|x_i, x_0): both are equal.
    """
    if order == "forward":
        return c.forward_log_probs(path).sum(axis=0)
    if order == "reverse":
        return c.end_log_prob(path) + c.posterior_log_probs(path).sum(axis=0)
    raise ValueError(f"order must be 'forward' or 'reverse', not {order!r}")


def path_log_prob(c: Chain, path: np.ndarray, model: Model) -> np.ndarray:
    """log p_θ(x_{0:S}) = log p(x_S) + Σ_{i=1}^{S} log p_θ(x_{i−1}|x_i) of each path (B,), nats. Eq: S1-E2, S2-E1, S4-E7."""
    return c.prior_log_prob(path) + c.reverse_log_probs(path, model).sum(axis=0)


def ddim_vlb(c: Chain, path: np.ndarray, model: Model) -> np.ndarray:
    """The integrand of J_σ, log q_σ(x_{1:S}|x_0) − log p_θ(x_{0:S}), in its expanded form (B,), nats. Eq: S2-E11, S0-E43.

    log q(x_S|x_0)/p(x_S) + Σ_{i≥2} log q_σ(x_{i−1}|x_i, x_0)/p_θ(x_{i−1}|x_i) − log p_θ(x_0|x_1)
    """
    log_p = c.reverse_log_probs(path, model)
    return vlb_posterior_form(c.prior_log_prob(path), c.end_log_prob(path), log_p, c.posterior_log_probs(path))


def elbo(c: Chain, path: np.ndarray, model: Model) -> np.ndarray:
    """log p_θ(x_{0:S}) − log q_σ(x_{1:S}|x_0) (B,): over paths its mean is at most log p_θ(x_0). Eq: S2-E2, S0-E21.

    The mean of its exponential is p_θ(x_0) itself (Eq: S0-E20).
    """
    return -ddim_vlb(c, path, model)


def exact_nll_linear_gaussian(x0: Array, gain: Any, offset: Any, variance: Any, prior_variance: float = 1.0) -> np.ndarray:
    """−log p_θ(x_0) (B,), nats, of the chain x_{t−1} = gain_t·x_t + offset_t + √variance_t·z from x_T ~ N(0, prior_variance).

    gain, offset, variance: (T,), t = 1..T, for every element alike. Eq: S0-E20.
    """
    steps = [np.asarray(v, np.float64) for v in (gain, offset, variance)]
    if any(v.ndim != 1 or v.shape != steps[0].shape for v in steps):
        raise ValueError(f"gain, offset and variance must have one shape (T,), not {[v.shape for v in steps]}")
    mean, var = 0.0, float(prior_variance)
    for g, b, v in zip(*(v[::-1] for v in steps), strict=True):
        mean, var = g * mean + b, g**2 * var + v
    return -gaussian_log_prob(x0, mean, var)
