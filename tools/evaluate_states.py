"""The likelihood of discrete states under a trained network: the bound in bits per dimension, of text in bits per character."""

from functools import partial
from typing import Any

import numpy as np

from alphabar.core import discrete_bound, ngram
from alphabar.core.bound import Bound
from alphabar.tools import bits
from alphabar.tools.command import UserError
from alphabar.tools.progress import Progress
from alphabar.tools.trained import Trained

GAUSSIAN_ONLY = {  # options that mean nothing here, and their values where not given
    "method": "bound",
    "t_min": None,
    "eta": 1.0,
    "variance": "posterior",
    "decoder_variance": "step",
    "trace": "hutchinson",
    "projections": 1,
    "tolerance": 1e-5,
}
LONGEST = 3  # letters of the conditional entropies that stand beside the bound of a text


def bound(
    network: Trained, samples: Any, rows: np.ndarray, labels: np.ndarray | None, o: Any
) -> tuple[dict[str, Any], list[str]]:
    """(numbers, lines) of the discrete bound of these rows: of images, or of a text's windows. Eq: S4-E10, S4-E29.

    ValueError where it is not a number, UserError for options that do not go with discrete states.
    """
    refuse(o, f"goes with methods of Gaussian noise, not with {network.config.method}")
    process, xp = network.process, network.net.params.xp
    law, predict = process.law, process.predict(network.net.predict)
    if o.steps is not None and o.steps > law.T:
        raise UserError(f"--steps must be in 1..{law.T}, not {o.steps}")
    text = process.kind == "text"
    source = samples.windows if text else samples.images
    steps = o.steps or law.T
    some = min(steps, o.terms) if o.terms else None
    parts = []
    with Progress("evaluating", len(rows) * o.draws * (some or steps), 0, o.quiet, "sample step") as bar:
        for start in range(0, len(rows), o.batch):
            at = slice(start, start + o.batch)
            y = None if labels is None else xp.asarray(labels[at])
            x0 = process.states(xp.asarray(source[rows[at]]))
            model, count = partial(predict, y=y), partial(advance, bar, len(x0))
            parts.append(discrete_bound.vlb_terms(model, x0, law, steps, None, some, o.draws, o.seed, start, count))
    whole = Bound.join(parts)
    if not np.isfinite(whole.nats).all():
        raise ValueError("the bound is not finite, for at the last time something is left of the data (diffusion.schedule)")
    unit = "character" if text else "dimension"
    results = {**bits.report(whole, unit), "terms_for_each_sample": o.terms, "states": process.K, "law": law.name}
    lines = [bits.HEAD if not text else bits.HEAD.replace("bits/dim", "bits/char")]
    lines += [bits.line(term["name"], term["bits"], term["standard_error"]) for term in results["terms"]]
    lines.append(bits.line("bound on -log2 P", whole.bits, whole.error))
    sampled = "" if o.terms is None else f", {o.terms} of the terms for each"
    lines += ["", f"{steps:,} steps{sampled}, law {law.name} of {law.K} states; draws: {o.draws}, seed {o.seed}"]
    if text:
        results["entropies"], beside = entropies_beside(samples)
        lines += beside
    elif process.K < 256:
        lines.append(f"of images in {process.K} levels")
    return results, lines


def refuse(o: Any, what: str) -> None:
    """UserError for the first option that is given of those that go with other methods."""
    for name, usual in GAUSSIAN_ONLY.items():
        if getattr(o, name) != usual:
            raise UserError(f"--{name.replace('_', '-')} {what}")


def entropies_beside(samples: Any) -> tuple[list[float], list[str]]:
    """(conditional entropies of a text, the lines that set them beside its bound)."""
    longest = min(LONGEST, len(samples.tokens))
    entropies = [ngram.entropy(samples.tokens, n, samples.states) for n in range(1, longest + 1)]
    lines = ["", "for comparison, of this text, bits/char:", f"{'uniform letters':<28} {np.log2(samples.states):>9.4f}"]
    return entropies, lines + [f"{f'letter given {n} before it':<28} {h:>9.4f}" for n, h in enumerate(entropies)]


def advance(bar: Progress, samples: int, done: int, calls: int) -> None:
    """What a bound calls after each call of its model: the bar goes on by so many samples."""
    bar.advance(samples)
