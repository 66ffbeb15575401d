"""The variational bound on −log p_θ(x_0) of discrete diffusion, for all steps of a chain or a stratified part of them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import counter, streams
from ..kernels.arrays import array_module, restore, to_numpy
from .bound import UNIFORMS, Bound
from .categorical import kl, log
from .discrete_losses import step_kl
from .discrete_rows import grid_of
from .discrete_sampler import Model, answer_of, states_of
from .exchange import Array, flat
from .transitions import Transitions


def prior_kl(x0: Array, law: Transitions) -> np.ndarray:
    """L_T = KL(q(x_T|x_0)‖p(x_T)) of each sample, nats (B,), p the law's prior. Eq: S4-E29, S4-E10.

    ∞ under an absorbing law that leaves elements unmasked at T.
    """
    clean = to_numpy(states_of(x0, "x0", law))
    of_state = kl(law.log_rows(0, np.arange(law.K), law.T), np.broadcast_to(log(law.prior), (law.K, law.K)))
    return flat(of_state[clean]).sum(axis=1)


def vlb_terms(
    model: Model,
    x0: Array,
    law: Transitions,
    steps: int | None = None,
    grid: Sequence[int] | np.ndarray | None = None,
    times: int | None = None,
    draws: int = 1,
    seed: int = 0,
    first_sample: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Bound:
    """The bound's terms at x0 (B, …), by ``draws`` Monte-Carlo draws of x_t ~ q(x_t|x_0) at every time. Eq: S4-E10, S4-E29, L9.

        L = KL(q(x_T|x_0)‖p(x_T)) + Σ_{i=2}^{S} KL(q(x_{τ_{i−1}}|x_{τ_i}, x_0)‖p_θ(x_{τ_{i−1}}|x_{τ_i})) − log p_θ(x_0|x_{τ_1})

    in nats; :attr:`Bound.bits` is bits per dimension, which for text is bits per character, and :attr:`Bound.error` its standard
    error over the samples. It is the bound of the sampler with the same ``steps`` or ``grid``; all T times by default.

    model: as for :func:`alphabar.core.discrete_sampler.sample`.
    times: instead of all S terms compute this many for each sample and draw, at places spaced evenly from a random start, so that
        all have the chance times/S; a hit counts S/times fold: terms and sum keep their expectations.
    progress: called as progress(model calls done, in all).

    The draws of sample k depend on (seed, draw, place of the time, first_sample + k) alone.
    """
    if draws < 1 or (times is not None and times < 1):
        raise ValueError(f"draws and times must be at least 1, not {draws} and {times}")
    clean = states_of(x0, "x0", law)
    if clean.size == 0:
        raise ValueError(f"x0 must have at least one element, but has shape {clean.shape}")
    xp, batch = array_module(clean), len(clean)
    t = np.append(0, grid_of(law, steps, grid))
    S = len(t) - 1
    calls = S if times is None else times
    terms = np.zeros((S + 1, batch))
    terms[S] = prior_kl(clean, law)
    for draw in range(draws):
        if times is None:
            places = np.broadcast_to(np.arange(1, S + 1)[:, None], (S, batch))
        else:
            places = _spread(S, times, batch, seed, draw, first_sample)
        for m, i in enumerate(places):
            now, to = xp.asarray(t[i]), xp.asarray(t[i - 1])
            log_q = law.log_rows(0, clean, now, np.float32)
            x = kernels.categorical(log_q, seed, draw * calls + m, streams.PATH, first_sample)
            logits = answer_of(model(restore(x, x0), restore(now.astype(np.float64), x0)), x, law)
            nats = flat(to_numpy(step_kl(logits, clean, x, now, law, to))).sum(axis=1)
            np.add.at(terms, (i - 1, np.arange(batch)), nats * (S / (calls * draws)))
            if progress is not None:
                progress(draw * calls + m + 1, draws * calls)
    return Bound(t[1:], terms, int(np.prod(clean.shape[1:])))


def _spread(S: int, times: int, batch: int, seed: int, draw: int, first_sample: int) -> np.ndarray:
    """(times, B) places in 1..S, each of a sample's in its own equal share of them."""
    u = counter.uniforms(batch, 1, seed, UNIFORMS - draw, streams.PATH, first_sample)[:, 0]
    return np.minimum(1 + np.floor((np.arange(times)[:, None] + u) * (S / times)).astype(np.int64), S)
