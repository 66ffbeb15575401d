"""The likelihood of text under a Diffusion-LM: the bound of its Gaussian chain and of the rounding, in bits per character."""

from functools import partial
from typing import Any

import numpy as np

from alphabar.core import bound, diffusion_lm
from alphabar.core.bound import Bound
from alphabar.core.chain import Chain, chain
from alphabar.core.decoder import gaussian_log_prob
from alphabar.core.levels import Schedule
from alphabar.kernels.arrays import to_numpy
from alphabar.nets.autograd import no_grad
from alphabar.tools import bits
from alphabar.tools.command import UserError
from alphabar.tools.evaluate_states import advance, entropies_beside, refuse
from alphabar.tools.progress import Progress
from alphabar.tools.trained import Trained

Array = Any
APART = 5.0  # deviations of the noise between a noised embedding and the middle to its nearest neighbour, from which it is told
SELDOM = 0.01  # of the chance of a term, where the embeddings stand apart: there is little in it


def bound_of_text(
    network: Trained, samples: Any, rows: np.ndarray, labels: np.ndarray | None, o: Any
) -> tuple[dict[str, Any], list[str]]:
    """(numbers, lines) of the bound on −log₂ p_θ(w) of these windows, per character. Eq: L7, S4-M2, S4-E10.

        −log p_θ(w) ≤ E_q[−log p_θ(w|x_0) + (log q(x_0|w) − log p_θ(x_0|x_1)) + Σ_{t≥2} KL + L_T],    x_0 ~ N(Emb(w), σ_0²·I)

    The chain's p_θ has the variance σ_0² in its last step, and at the times at which noise leaves the embeddings apart x̂_0 is the
    one nearest to x_t/√ᾱ_t: there the network has nothing to add. ValueError where the bound is not a number, UserError for
    options that do not go with it. Source: Li et al. 2022, appendix E.
    """
    refuse(o, f"does not go with method {network.config.method}")
    process, net = network.process, network.net
    s, xp, length = process.levels, net.params.xp, network.shape[0]
    if o.steps is not None and o.steps > s.T:
        raise UserError(f"--steps must be in 1..{s.T}, not {o.steps}")
    c = chain(s, o.steps, decoder_variance=process.sigma0**2, prediction="x0")
    told = clear_until(to_numpy(net.table.data), s)
    predict, table = process.predict(net.predict), net.table.data

    def model(x: Array, t: Array) -> Array:
        times = to_numpy(t)
        near = diffusion_lm.clamp(x / xp.asarray(s.signal[times].astype(x.dtype))[:, None, None], table)
        if (times <= told).all():
            return near
        return xp.where(xp.asarray(times <= told)[:, None, None], near, predict(x, t))

    chances = likely_sizes(c, float(to_numpy(table).var(axis=0).mean())) * np.where(c.t[2:] > told, 1, SELDOM)
    some = min(len(c) - 1, o.terms) if o.terms and len(c) > 1 else None
    calls = o.draws * (len(c) if some is None else 1 + some)
    parts, rounding = [], []
    with Progress("evaluating", len(rows) * calls, 0, o.quiet, "sample step") as bar:
        for start in range(0, len(rows), o.batch):
            words = xp.asarray(samples.windows[rows[start : start + o.batch]].astype(np.int32))
            count = partial(advance, bar, len(words))
            one, rounded = _window_bound(network, words, c, model, some, chances, o.draws, o.seed, start, count)
            parts.append(one)
            rounding.append(rounded)
    joined = Bound.join(parts)
    lost = np.concatenate(rounding)
    whole = Bound(joined.t, joined.terms, length)
    whole.terms[0] += lost
    if not np.isfinite(whole.nats).all():
        raise ValueError("the bound is not finite")
    of_rounding, its_error = (float(v) for v in whole.bits_of(lost))
    results = {
        **bits.report(whole, "character"),
        "bits_of_rounding": of_rounding,
        "terms_for_each_sample": o.terms,
        "sigma0": process.sigma0,
        "nearest_until": told,
    }
    lines = [bits.HEAD.replace("bits/dim", "bits/char")]
    lines += [bits.line(term["name"], term["bits"], term["standard_error"]) for term in results["terms"]]
    lines.append(bits.line("bound on -log2 P", whole.bits, whole.error))
    lines.append(bits.line("of which rounding, in L_0", of_rounding, bits.number(its_error)))
    sampled = "" if o.terms is None else f", {o.terms} of the KL terms for each"
    lines += ["", f"{len(c):,} steps{sampled}, x0 the embedding nearest to x_t at t <= {told:g}; draws: {o.draws}, seed {o.seed}"]
    results["entropies"], beside = entropies_beside(samples)
    return results, lines + beside


def clear_until(embedding: np.ndarray, s: Schedule) -> int:
    """The last time t up to which half the least distance of two embeddings is √ᾱ_t/√(1−ᾱ_t) times it ≥ APART; 0 for none."""
    table = embedding.astype(np.float64)
    apart = np.sqrt(((table[:, None] - table[None]) ** 2).sum(axis=-1))[~np.eye(len(table), dtype=bool)].min()
    clear = s.signal[1:] * apart / 2 >= APART * s.noise[1:]
    return int(np.argmin(np.r_[clear, False]))


def likely_sizes(c: Chain, variance: float) -> np.ndarray:
    """The KL terms (S−1,) of i = 2..S but for a factor, were the embeddings normal and their places independent.

    γ_i·v/(v + σ̄_i²), v their variance and σ̄ = √(1−ᾱ)/√ᾱ: x_0 is then left with the variance v·σ̄²/(v + σ̄²).
    """
    return c.gamma[2:] * variance / (variance + (c.noise[2:] / c.signal[2:]) ** 2)


def _window_bound(
    network: Trained,
    words: Array,
    c: Chain,
    model: Any,
    some: int | None,
    chances: Any,
    draws: int,
    seed: int,
    start: int,
    count: Any,
) -> tuple[Bound, np.ndarray]:
    """(the terms of the chain with log q(x_0|w) in L_0, −log p_θ(w|x_0)) of windows numbered from ``start``, nats."""
    net, sigma0 = network.net, network.process.sigma0
    x0, mean = diffusion_lm.embed(words, net.table.data, sigma0, seed, first_sample=start)
    with no_grad():
        logits = net.logits(x0).data
    rounding = diffusion_lm.rounding_loss(np.asarray(to_numpy(logits), np.float64), to_numpy(words))[0] * network.shape[0]
    one = bound.vlb_terms(model, x0, c, "gaussian", draws, seed, start, some, chances, count)
    one.terms[0] += gaussian_log_prob(to_numpy(x0), to_numpy(mean), sigma0**2)
    return one, rounding
