"""`alphabar sample`: draw images from a trained checkpoint, to HDF5 and PNG; or text."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from alphabar.core.levels import Levels
from alphabar.tools import (
    command,
    compiling,
    dataset_file,
    gamma,
    networks,
    pictures,
    sample_options,
    sample_text,
    sampling,
    train_classifier,
    trained,
)
from alphabar.tools import config as configs
from alphabar.tools.command import Failure, UserError, device, program
from alphabar.tools.methods import Process
from alphabar.tools.progress import Progress
from alphabar.tools.trained import Trained

ROWS, COLUMNS = 20, 20  # of a sheet, at most


@program("sample")
def main(argv: Sequence[str] | None = None) -> int:
    """Draw samples; returns the exit code."""
    options = sample_options.parser().parse_args(argv)
    xp, where = device(options.device)
    network = trained.load(options.checkpoint, options.raw_weights, xp)
    said = networks.compute_in(network.net, options.precision or network.config.train.precision)
    if said is not None and not options.quiet:
        print(said, file=sys.stderr, flush=True)
    if where == "cpu":
        compiling.ahead(compiling.needed(networks.kind_of(network.net), network.config.method, training=False), options.quiet)
    kind = configs.data_kind(network.config)
    options.n = options.n or sample_options.N[kind]
    return sample_text.draw(options, network, where) if kind == "text" else _images(options, network, xp, where)


def _images(options: Any, network: Trained, xp: Any, where: str) -> int:
    """Draw images."""
    outputs = command.outputs(options.out, ("samples.h5", "samples.png"))
    if options.infill is not None:
        raise UserError("--infill goes with networks of text, not of images")
    net, process, classes = network.net, network.process, network.classes
    chosen = sample_options.chosen(options, network.config)
    by = _by_classifier(options, network, xp)
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

    attributes = {**sample_options.stated(options, network, chosen), "guidance": weight, "seed": options.seed}
    if isinstance(process, Process):
        attributes["clip"] = "none" if chosen.sample.sampler == "flow" else "x0 to [-1, 1], eps re-derived"
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
    shape = (options.n, *network.shape)
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
            title = f"{network.path.name}, {sampler.name}{''.join(guides)}, seed {options.seed}"
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


def _by_classifier(options: Any, network: Trained, xp: Any) -> train_classifier.Noisy | None:
    """The classifier asked for; UserError where it was trained on other states or classes."""
    if options.classifier is None:
        for name, usual in (("weight", 1.0), ("form", "score")):
            if getattr(options, f"classifier_{name}") != usual:
                raise UserError(f"--classifier-{name} goes with --classifier")
        return None
    if not isinstance(network.process, Process):
        raise UserError(f"--classifier goes with networks that take Gaussian noise off images, not with {network.config.method}")
    by, net = train_classifier.load(options.classifier, xp), network.net
    for what, mine, theirs in (
        ("images", net.config["image_size"], by.net.config["image_size"]),
        ("channels", net.config["in_channels"], by.net.config["in_channels"]),
        ("classes", network.classes or by.classes, by.classes),
        ("noise levels", _levels_of(network.process.levels), _levels_of(by.process.levels)),
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
