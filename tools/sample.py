"""`alphabar sample`: draw images from a trained checkpoint, to HDF5 and PNG."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.core.levels import Levels
from alphabar.tools import config as configs
from alphabar.tools import dataset_file, gamma, pictures, sampling, train_classifier, trained
from alphabar.tools.command import Failure, Parser, UserError, device, integer, program, real
from alphabar.tools.config import Config, Sample
from alphabar.tools.methods import Process
from alphabar.tools.progress import Progress
from alphabar.tools.trained import Trained

EXAMPLES = """examples:
  alphabar sample runs/digits-001                                    64 images, every class in turn
  alphabar sample runs/digits-001 --class 3 --n 16 --out threes.png
  alphabar sample runs/digits-001/ckpt/step_00001500.h5 --n 1000 --steps 50 --class all --out digits.h5
  alphabar sample runs/digits-001 --sampler dpm++ --steps 12 --guidance 0.5
  alphabar sample runs/digits-001 --sampler unipc --order 3 --steps 10 --spacing logsnr
  alphabar sample runs/digits-001 --sampler ddpm --steps 25 --analytic --spacing optimal
  alphabar sample runs/digits-001 --guidance 4 --rescale 0.7 --interval 0.2 3
  alphabar sample runs/digits-001 --classifier runs/digits-001/classifier.h5 --classifier-weight 2 --class 8
  alphabar sample runs/digits-002 --sampler pc --steps 200 --set sample.snr=0.2
Image k follows from the seed, k and its class alone: --batch and --n change none of the others.
"""
ROWS, COLUMNS = 20, 20  # of a sheet, at most


@program("sample")
def main(argv: Sequence[str] | None = None) -> int:
    """Draw samples; returns the exit code."""
    options = _parser().parse_args(argv)
    xp, where = device(options.device)
    outputs = _outputs(options.out)
    network = trained.load(options.checkpoint, options.raw_weights, xp)
    path, net, config, classes, step = network
    chosen, process = _chosen(options, config), Process(config)
    by = _by_classifier(options, network, process, xp)
    known = classes or (by.classes if by else ())
    labels = _labels(options.classes, known, options.n)
    if options.guidance and (labels is None or not classes):
        raise UserError("--guidance needs classes to guide to" + ("" if classes else ", and this network has none"))
    if by and labels is None:
        raise UserError("--classifier needs classes to guide to, not --class none")
    weight = chosen.sample.guidance if classes and labels is not None else 0.0
    measured = None
    if options.analytic or options.spacing == "optimal":
        if not options.analytic:
            raise UserError("--spacing optimal goes with --analytic")
        if configs.sampler(chosen) not in sampling.ANALYTIC:  # before the long measurement
            raise UserError(f"--analytic goes with the samplers {', '.join(sampling.ANALYTIC)}, not {configs.sampler(chosen)}")
        measured = gamma.of(network, labels is not None and bool(classes), options.raw_weights, options.quiet)
    classes = known
    how = sampling.guide(chosen.sample, weight)
    if by:
        how = dataclasses.replace(
            how, gradient=by.gradient, classifier_weight=options.classifier_weight, form=options.classifier_form
        )
    try:
        sampler = sampling.sampler(process, chosen.sample, options.spacing, measured)
        sampling.guided(process, net, sampler, None if labels is None else xp.asarray(labels[:1]), how)
    except ValueError as e:
        raise UserError(str(e)) from e
    names = [classes[k] for k in dict.fromkeys(labels.tolist())] if labels is not None else []
    shown = _shown(labels, options.n)
    kept: dict[int, np.ndarray] = {}

    def blocks(bar: Progress) -> Iterator[np.ndarray]:
        at = 0
        what = (process, net, sampler, labels, options.n, options.seed)
        for block in sampling.draw(*what, batch=options.batch, progress=bar.advance, how=how):
            kept.update({k: block[k - at] for k in shown if at <= k < at + len(block)} if ".png" in outputs else {})
            at += len(block)
            yield block

    attributes = {
        "checkpoint": path.name,
        "step": step,
        "weights": "raw" if options.raw_weights else "average",
        "method": config.method,
        **{k: v for k, v in configs.to_dict(chosen)["sample"].items() if k not in ("guidance", "columns")},
        "guidance": weight,
        "seed": options.seed,
        "clip": "none" if chosen.sample.sampler == "flow" else "x0 to [-1, 1], eps re-derived",
    }
    if chosen.sample.threshold:
        attributes["clip"] = f"x0 at the quantile {chosen.sample.threshold:g} of each image, eps re-derived"
    if options.spacing:
        attributes["spacing"] = options.spacing
    if measured is not None:
        attributes["variance"] = f"best, by Gamma of {measured.samples} images at {measured.t.size} times"
    if by:
        attributes["classifier"] = options.classifier.name
        attributes |= {f"classifier_{k}": getattr(options, f"classifier_{k}") for k in ("weight", "form")}
    columns = {} if labels is None else {"labels": labels.astype(np.uint8 if len(classes) <= 256 else np.int32)}
    shape = (options.n, *net.config["image_size"], net.config["in_channels"])
    try:
        with Progress("sampling", options.n * sampler.rows, 0, options.quiet, "image step") as bar:
            if ".h5" in outputs:
                dataset_file.write(outputs[".h5"], shape, blocks(bar), columns, classes, attributes)
            else:
                for _ in blocks(bar):
                    pass
        if ".png" in outputs:
            guides = [f", w = {weight:g}"] * bool(net.config["classes"] and names)
            guides += [f", classifier × {options.classifier_weight:g}"] * bool(by)
            title = f"{path.name}, {sampler.name}{''.join(guides)}, seed {options.seed}"
            tiles = np.stack([kept[k] for k in shown])
            width = len(shown) // min(len(names), ROWS) if names else min(COLUMNS, len(shown))
            pictures.write(pictures.sheet(tiles, width, names[:ROWS], title), outputs[".png"])
    except OSError as e:
        raise Failure(f"the samples could not be written ({e.strerror or e})") from e
    except ValueError as e:
        raise Failure(f"no samples could be drawn: {e}") from e
    if not options.quiet:
        for suffix, out in outputs.items():
            part = f"{len(shown):,} of them, " if suffix == ".png" and len(shown) < options.n else ""
            print(f"wrote {out}: {options.n:,} images {'×'.join(map(str, shape[1:]))}, {part}on {where}")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="alphabar sample", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="checkpoint, run folder (its newest one) or folder of runs")
    parser.add_argument("--sampler", choices=tuple(configs.STEPS), help="default: the run's; langevin is for method ncsn only")
    parser.add_argument(
        "--steps", type=integer(1, 10**6), help="default: the run's, or the sampler's own; of langevin, those at each noise level"
    )
    parser.add_argument("--eta", type=real(0, 1), help="0 is deterministic DDIM, 1 is ancestral (ddim only)")
    parser.add_argument("--order", type=integer(1, 4), help=f"of {', '.join(configs.ORDERS)} (default 2)")
    parser.add_argument(
        "--spacing",
        choices=sampling.SPACINGS,
        help="of the times, or of the noise levels: karras, logsnr; default: the sampler's; optimal goes with --analytic",
    )
    parser.add_argument(
        "--analytic",
        action="store_true",
        help=f"the best variance for this network (Analytic-DPM), of {', '.join(sampling.ANALYTIC)}; what it needs is measured"
        f" once, on {gamma.IMAGES} images of the run, and kept in the checkpoint",
    )
    parser.add_argument(
        "--threshold", type=real(0, 1), metavar="P", help="dynamic thresholding of x0 at this quantile, such as 0.995"
    )
    parser.add_argument(
        "--guidance",
        type=real(-1, 1000),
        metavar="W",
        help="w in (1 + w)·eps_c - w·eps_u: 0 is none; default: the run's, with --classifier 0",
    )
    parser.add_argument("--rescale", type=real(0, 1), metavar="PHI", help="of the guided answer, against over-exposure")
    parser.add_argument(
        "--interval", type=real(0, 1e9), nargs=2, metavar=("LOW", "HIGH"), help="guide only where the noise level n/a is in it"
    )
    parser.add_argument("--classifier", type=Path, metavar="FILE", help="guide by a classifier of alphabar train-classifier")
    parser.add_argument("--classifier-weight", type=real(0, 1000), default=1.0, metavar="W", help="of its gradient (default 1)")
    parser.add_argument(
        "--classifier-form", choices=sampling.FORMS, default="score", help="score (default): any sampler; mean: one with noise"
    )
    parser.add_argument(
        "--class", dest="classes", default="all", help="all (in turn), none, or names or numbers such as 3 or 1,4"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of [sample], e.g. sample.snr=0.2"
    )
    parser.add_argument("--n", type=integer(1, 10**9), default=64, help="number of images (default 64)")
    parser.add_argument("--seed", type=integer(0, 2**64 - 1), default=0)
    parser.add_argument("--batch", type=integer(1, 1 << 20), default=64, help="images at a time: changes speed and memory only")
    parser.add_argument(
        "--out",
        type=Path,
        action="append",
        metavar="FILE",
        help=".h5 or .png, once for each; default: samples.h5 and samples.png",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--raw-weights", action="store_true", help="the last weights instead of their running average")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    return parser


def _outputs(given: list[Path] | None) -> dict[str, Path]:
    outputs: dict[str, Path] = {}
    for path in given or [Path("samples.h5"), Path("samples.png")]:
        suffix = path.suffix.lower()
        if suffix not in (".h5", ".png"):
            raise UserError(f"--out must end in .h5 or .png, not {str(path)!r}")
        if suffix in outputs:
            raise UserError(f"--out names two {suffix} files")
        if not path.parent.is_dir():
            raise UserError(f"--out {path}: there is no folder {path.parent}")
        outputs[suffix] = path
    return outputs


def _chosen(options: Any, config: Config) -> Config:
    """The configuration with what the options say of sampling; another sampler than the run's begins with its own settings."""
    words = list(options.set)
    for word in words:
        if not word.startswith("sample."):
            raise UserError(f"--set takes settings of [sample] here, such as sample.snr=0.2, not {word!r}")
    given = {name: getattr(options, name) for name in ("sampler", "steps", "eta", "order", "threshold", "guidance", "rescale")}
    if options.interval is not None:
        given["interval_low"], given["interval_high"] = options.interval
    if options.classifier is not None and options.guidance is None:
        given["guidance"] = 0.0
    words += [f"sample.{name}={value}" for name, value in given.items() if value is not None]
    old, new = configs.sampler(config), configs.sampler(configs.from_words(words, config))
    if new != old:
        s = config.sample
        steps = s.steps if configs.STEPS[new] == configs.STEPS[old] else 0
        kept = {name: getattr(s, name) for name in ("guidance", "rescale", "interval_low", "interval_high")}
        config = dataclasses.replace(config, sample=Sample(sampler=new, steps=steps, **kept))
    return configs.load(None, words, config)


def _by_classifier(options: Any, network: Trained, process: Process, xp: Any) -> train_classifier.Noisy | None:
    """The classifier asked for; UserError where it was trained on other states or classes."""
    if options.classifier is None:
        for name, usual in (("weight", 1.0), ("form", "score")):
            if getattr(options, f"classifier_{name}") != usual:
                raise UserError(f"--classifier-{name} goes with --classifier")
        return None
    by, net = train_classifier.load(options.classifier, xp), network.net
    for what, mine, theirs in (
        ("images", net.config["image_size"], by.net.config["image_size"]),
        ("channels", net.config["in_channels"], by.net.config["in_channels"]),
        ("classes", network.classes or by.classes, by.classes),
        ("noise levels", _levels_of(process.levels), _levels_of(by.process.levels)),
    ):
        if mine != theirs:
            raise UserError(f"--classifier {options.classifier}: it knows other {what} than this network")
    return by


def _levels_of(s: Levels) -> list[Any]:
    return [type(s), s.T, *np.round(s.levels(np.linspace(s.t_min, s.T, 9)), 9).ravel()]


def _labels(text: str, classes: tuple[str, ...], n: int) -> np.ndarray | None:
    """The classes asked for, in turn: label k = asked[k mod len(asked)]; None for no class."""
    if text == "none" or (text == "all" and not classes):
        return None
    if not classes:
        raise UserError(f"--class {text}: this network has no classes")
    if text == "all":
        asked = list(range(len(classes)))
    else:  # a name may hold a comma
        asked = [_class(part.strip(), classes) for part in ([text] if text in classes else text.split(","))]
    return np.resize(np.array(asked, np.int64), n)


def _class(text: str, classes: tuple[str, ...]) -> int:
    found = trained.class_number(text, classes)
    if found is None:
        raise UserError(f"--class must be all, none, numbers in 0..{len(classes) - 1} or names of classes, not {text!r}")
    return found


def _shown(labels: np.ndarray | None, n: int) -> list[int]:
    """The images on the sheet: a row for each class where there are classes, the first ones otherwise."""
    if labels is None:
        return list(range(min(n, ROWS * COLUMNS)))
    rows = [np.flatnonzero(labels == c) for c in list(dict.fromkeys(labels.tolist()))[:ROWS]]
    width = min(COLUMNS, *map(len, rows)) if len(rows) > 1 else min(COLUMNS, len(rows[0]))
    return [int(k) for row in rows for k in row[:width]]


if __name__ == "__main__":
    raise SystemExit(main())
