"""`alphabar evaluate`: the likelihood of images or text under a trained network, in bits per dimension or per character."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import alphabar
from alphabar.core import bound, data, flow
from alphabar.core.chain import chain
from alphabar.core.data import Dataset, to_unit
from alphabar.core.text import Text
from alphabar.nets import products
from alphabar.tools import bits, evaluate_states, evaluate_words, sources, trained
from alphabar.tools.command import Failure, Parser, UserError, device, integer, output, program, real
from alphabar.tools.config import DISCRETE, EMBEDDED
from alphabar.tools.files import replacing
from alphabar.tools.methods import CLIP
from alphabar.tools.progress import Progress
from alphabar.tools.trained import Trained

EXAMPLES = """examples:
  alphabar evaluate runs/digits-001 --bits                        the variational bound of 256 test images, term by term
  alphabar evaluate runs/digits-001 --bits --n 360 --terms 20     20 of the 1000 terms for each image, an unbiased estimate
  alphabar evaluate runs/digits-001 --bits --method flow --out flow.json
  alphabar evaluate runs/kjv-001 --bits --n 64 --terms 50         windows of the test text, beside the entropies of its letters
The bound is one on -log2 P of the 8-bit images, with the predicted x0 clipped to [-1, 1]. The flow gives the density of
dequantised images x = (u + U)/128 - 1, U uniform on [0, 1): -log2 p(x)/d + 7 is, in the mean over U, a bound as well.
Image k of the shuffled split and its noise follow from the seed and k alone: --batch and --n change none of the others.
"""
BOUNDS = {  # of methods that have their own
    **dict.fromkeys(DISCRETE, evaluate_states.bound),
    **dict.fromkeys(EMBEDDED, evaluate_words.bound_of_text),
}
Array = Any
Model = Callable[[Array, Array], Array]


@program("evaluate")
def main(argv: Sequence[str] | None = None) -> int:
    """Compute the likelihood of images; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.out is not None:
        output(options.out)
    xp, where = device(options.device)
    network = trained.load(options.checkpoint, options.raw_weights, xp)
    images = _samples(options, network)
    unit, there = sources.UNITS[sources.kind(images)], len(images.windows if isinstance(images, Text) else images)
    n = min(256, there) if options.n is None else options.n
    if n > there:
        raise UserError(f"--n must be at most {there}, the {unit} of the split {options.split}, not {n}")
    rows = data.order(there, n, 0, options.seed)
    labels, given = _labels(options.classes, network, images, rows)
    report: dict[str, Any] = {
        "checkpoint": network.path.name,
        "step": network.step,
        "weights": "raw" if options.raw_weights else "average",
        "trained_by": network.config.method,
        "data": images.name,
        "split": options.split,
        unit: n,
        "dimensions": math.prod(images.shape),
        "given": given,
        "seed": options.seed,
        "draws": options.draws,
        "method": options.method,
        "alphabar": alphabar.__version__,
    }
    try:
        if network.config.method in BOUNDS:
            results, lines = BOUNDS[network.config.method](network, images, rows, labels, options)
        else:
            work = _Work(network, images, rows, labels, options)
            results, lines = work.bound() if options.method == "bound" else work.flow()
    except (ValueError, ImportError) as e:
        raise Failure(f"the likelihood could not be computed: {e}") from e
    report |= results
    if not options.quiet:
        shape = "×".join(map(str, images.shape))
        weights = "" if options.raw_weights else "averaged "
        print(f"{images.name}, {options.split}: {n:,} of {there:,} {unit} {shape}, {given}")
        print(f"{network.path.name}: {weights}weights after {network.step:,} steps of {network.config.method}, on {where}\n")
        print("\n".join(lines))
    if options.out is not None:
        try:
            with replacing(options.out) as temporary:
                temporary.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        except OSError as e:
            raise Failure(f"{options.out} could not be written ({e.strerror or e})") from e
        if not options.quiet:
            print(f"wrote {options.out}")
    return 0


class _Work:
    """The images asked for, in batches, and the two ways to their likelihood."""

    def __init__(self, network: Trained, images: Dataset, rows: np.ndarray, labels: np.ndarray | None, options: Any) -> None:
        self.net, self.images, self.rows, self.labels, self.options = network.net, images, rows, labels, options
        self.process, self.d = network.process, math.prod(images.shape)
        self.predict = self.process.predict(self.net.predict)
        if options.t_min is not None and not 0 < options.t_min < self.process.levels.T:
            raise UserError(f"--t-min must be in (0, {self.process.levels.T:g}), not {options.t_min:g}")

    def batches(self) -> Iterator[tuple[int, np.ndarray, Array]]:
        """(place of the first image, images uint8, their labels or None)."""
        xp, size = self.net.params.xp, self.options.batch
        for start in range(0, len(self.rows), size):
            at = slice(start, start + size)
            yield start, self.images.images[self.rows[at]], None if self.labels is None else xp.asarray(self.labels[at])

    def bound(self) -> tuple[dict[str, Any], list[str]]:
        o, s, xp = self.options, self.process.levels, self.net.params.xp
        try:
            variance, prediction = o.variance, self.process.prediction
            c = chain(s, o.steps, o.eta, variance, o.decoder_variance, prediction, CLIP, t_min=o.t_min)
        except ValueError as e:
            raise UserError(str(e)) from e
        calls = o.draws * (len(c) if o.terms is None or len(c) == 1 else 1 + o.terms)
        parts = []
        with Progress("evaluating", len(self.rows) * calls, 0, o.quiet, "image step") as bar:
            for start, images, y in self.batches():
                x0, model = to_unit(xp.asarray(images)), partial(self.predict, y=y)
                count = partial(_count, bar, len(images))
                parts.append(bound.vlb_terms(model, x0, c, "discrete", o.draws, o.seed, start, o.terms, c.gamma[2:], count))
                if not np.isfinite(parts[-1].nats).all():
                    raise ValueError("the bound of some images is not a number, for the network's answers are none")
        whole = bound.Bound.join(parts)
        results = {
            **bits.report(whole),
            "eta": c.eta,
            "variance": c.variance,
            "decoder_variance": float(c.p_variance[1]),
            "terms_for_each_image": o.terms,
            "decoder": "discrete: 256 values, cells of 2/255 open at the ends",
            "clip": "x0 to [-1, 1]",
        }
        lines = [bits.HEAD]
        lines += [bits.line(term["name"], term["bits"], term["standard_error"]) for term in results["terms"]]
        lines.append(bits.line("bound on -log2 P", whole.bits, whole.error))
        sampled = "" if o.terms is None else f", {o.terms} of the KL terms for each image"
        lines += ["", f"{len(c):,} steps{sampled}, eta {c.eta:g}, variance of p: {variance}; draws: {o.draws}, seed {o.seed}"]
        return results, lines

    def flow(self) -> tuple[dict[str, Any], list[str]]:
        o, s, xp = self.options, self.process.levels, self.net.params.xp
        log_prob, evaluations = np.zeros(len(self.rows)), []
        exact = o.trace == "exact"
        with Progress("evaluating", len(self.rows) * o.draws, 0, o.quiet, "image") as bar:
            for start, images, y in self.batches():
                for draw in range(o.draws):
                    x = xp.asarray(flow.dequantize(images, o.seed, draw, start).astype(self.net.params.data.dtype))
                    answer = flow.log_likelihood(
                        partial(self.predict, y=y),
                        x,
                        s,
                        partial(self._product, y),
                        self.process.prediction,
                        o.trace,
                        o.projections,
                        seed=o.seed,
                        draw=draw,
                        first_sample=start,
                        rtol=o.tolerance,
                        atol=o.tolerance,
                        t_min=o.t_min,
                        progress=lambda calls: bar.note(f"{calls} evaluations of this batch"),
                    )
                    log_prob[start : start + len(images)] += answer.log_prob / o.draws
                    evaluations.append(answer.evaluations)
                    bar.advance(len(images))
        found = flow.bits_per_dimension(log_prob, self.d, flow.OFFSET)
        mean, error = float(found.mean()), float(found.std(ddof=1) / np.sqrt(found.size)) if found.size > 1 else math.nan
        t_min = s.t_min if o.t_min is None else o.t_min
        sigma = float(s.sigma_bar_at(t_min))
        nfe = float(np.mean(evaluations))
        results = {
            "bits_per_dimension": mean,
            "standard_error": bits.number(error),
            "trace": o.trace,
            "projections": None if exact else o.projections,
            "tolerance": o.tolerance,
            "evaluations": nfe,
            "t_min": float(t_min),
            "sigma_min": sigma,
            "dequantisation": "x = (u + U)/128 - 1, U uniform on [0, 1); bits = -log2 p(x)/d + 7",
        }
        how = "exact trace" if exact else f"Hutchinson's trace, {o.projections} projection{'s' if o.projections > 1 else ''}"
        lines = [
            bits.line("-log2 p", mean, error),
            "",
            "of images dequantised to x = (u + U)/128 - 1, U uniform on [0, 1): -log2 p(x)/d + 7",
            f"{how}, tolerance {o.tolerance:g}, {nfe:.0f} evaluations of the network a batch; draws: {o.draws}, seed {o.seed}",
            f"from t = {t_min:g} on, where the noise is {sigma:.2g} of the signal",
        ]
        return results, lines

    def _product(self, y: Array, x: Array, t: Array, v: Array) -> Array:
        """J·v of the network as the process sees it: its input is linear in x."""
        answer = products.jvp(lambda at: self.net(at, t, y), self.process.input(x, t), self.process.input(v, t))[1]
        return answer[..., : x.shape[-1]]  # not that of a learned variance


def _count(bar: Progress, images: int, done: int, calls: int) -> None:
    bar.advance(images)


def _samples(options: Any, network: Trained) -> Any:
    """The images or the text to evaluate."""
    samples = sources.load(network.config, options.split, options.data)
    if samples.shape != network.shape:
        by, wanted = ("×".join(map(str, shape)) for shape in (samples.shape, network.shape))
        raise UserError(f"{samples.name} holds {sources.UNITS[sources.kind(samples)]} of {by}, the network is for {wanted}")
    return samples


def _labels(text: str, network: Trained, images: Dataset, rows: np.ndarray) -> tuple[np.ndarray | None, str]:
    """(the classes given to the network, in words); None for no class."""
    if text == "none" or (text == "labels" and (not network.classes or images.labels is None)):
        return None, "no class given" if network.classes else "of a network without classes"
    if not network.classes:
        raise UserError(f"--class {text}: this network has no classes")
    if text == "labels":
        if images.classes != network.classes:
            raise UserError(f"{images.name} has other classes than the network: give --class none, or one class")
        return images.labels[rows], "each given its class"  # type: ignore[index]
    number = trained.class_number(text, network.classes)
    if number is None:
        raise UserError(f"--class must be labels, none, a number in 0..{len(network.classes) - 1} or a name, not {text!r}")
    return np.full(len(rows), number), f"given the class {network.classes[number]}"


def _parser() -> Parser:
    parser = Parser(prog="alphabar evaluate", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint, run folder (its newest one) or folder of runs")
    parser.add_argument("--bits", action="store_true", required=True, help="the likelihood in bits per dimension")
    parser.add_argument("--method", choices=("bound", "flow"), default="bound", help="variational bound or probability flow")
    parser.add_argument("--data", metavar="FILE", help="HDF5 data set, text file or a built-in name; default: the run's")
    parser.add_argument("--split", choices=tuple(data.SPLITS), default="test", help="default: test")
    parser.add_argument("--n", type=integer(1, 10**9), help="number of images, drawn from the split (default 256, or all)")
    parser.add_argument(
        "--class", dest="classes", default="labels", help="labels (default: each its own), none, or one name or number for all"
    )
    parser.add_argument("--draws", type=integer(1, 10**6), default=1, help="draws of the noise for each image (default 1)")
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0)
    parser.add_argument("--t-min", type=real(0, 1e9), help="time at which the flow starts, or the chain in continuous time")
    parser.add_argument("--batch", type=integer(1, 1 << 20), default=64, help="images at a time (default 64)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the numbers here too")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--raw-weights", action="store_true", help="the last weights instead of their running average")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    of_bound = parser.add_argument_group("of the bound")
    of_bound.add_argument("--steps", type=integer(1, 10**6), help="S of the chain; default: all T, 1000 where time is continuous")
    of_bound.add_argument(
        "--terms", type=integer(1, 10**6), help="KL terms for each image and draw, chosen without bias; default: all"
    )
    of_bound.add_argument("--eta", type=real(1e-6, 1), default=1.0, help="deviation of q: 1 (default) is DDPM's chain")
    of_bound.add_argument("--variance", choices=("posterior", "beta"), default="posterior", help="of p (default posterior)")
    of_bound.add_argument(
        "--decoder-variance", choices=("step", "clipped"), default="step", help="of p(x_0|x_1): beta_1 (default) or beta~_2"
    )
    of_flow = parser.add_argument_group("of the flow")
    of_flow.add_argument("--trace", choices=("hutchinson", "exact"), default="hutchinson", help="exact: one product a dimension")
    of_flow.add_argument("--projections", type=integer(1, 10**6), default=1, help="directions of Hutchinson's trace (default 1)")
    of_flow.add_argument("--tolerance", type=real(1e-12, 1), default=1e-5, help="relative and absolute, of the solver")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
