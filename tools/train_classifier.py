"""Train a classifier p(class|x_t) of the noised images, or of the noised text, of a run, for the guidance of its samples."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alphabar.core import data, forward
from alphabar.core.data import Dataset, to_unit
from alphabar.nets.checkpoint import CheckpointError
from alphabar.nets.classifier import Classifier
from alphabar.tools import classifiers, networks, properties, runs, word_classifier
from alphabar.tools import config as configs
from alphabar.tools.command import Parser, UserError, device, integer, output, program, real
from alphabar.tools.config import Config, ConfigError
from alphabar.tools.methods import Process
from alphabar.tools.trainer import check_kind, load_weights

EXAMPLES = """examples:
  alphabar train-classifier runs/digits-001                         the classes of its images
  alphabar train-classifier runs/kjv-001 --property word:god        text with this word, for a network of method diffusion-lm
  alphabar train-classifier runs/kjv-001 --property words:8-10 --out short.h5
"""
Array = Any


class Noisy(NamedTuple):
    """A trained classifier and the process whose states it knows."""

    net: Classifier
    process: Process
    classes: tuple[str, ...]

    def gradient(self, y: Any) -> Callable[[Array, Array], Array]:
        """gradient(x, t) = ∇_x log p(y|x_t) at states x of the process, for :mod:`alphabar.core.guidance`."""

        def of(x: Array, t: Array) -> Array:
            inner = self.net.log_prob_gradient(self.process.input(x, t), t, y)
            return self.process.input(inner, t)  # the network reads the state times a factor: the gradient has it too

        return of


def load(path: str | Path, xp: Any = np) -> Noisy:
    """The classifier of a file that this program wrote, with averaged weights. CheckpointError with the reason if it is none."""
    path, arrays, meta = classifiers.read(path)
    if "property" in meta:
        raise CheckpointError(path, f"is a classifier of text ({meta['property']}), not of images")
    try:
        process, net = Process(configs.from_dict(meta["config"])), Classifier(**meta["model"], xp=xp)
        classes = tuple(map(str, meta["data"]["classes"]))
    except (TypeError, ValueError, KeyError) as e:
        raise CheckpointError(path, f"its classifier cannot be built: {e}") from e
    load_weights(path, net, arrays, "ema")  # type: ignore[arg-type]
    return Noisy(net, process, classes)


@program("train-classifier")
def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    parser = Parser(prog="alphabar train-classifier", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder or checkpoint: its data and its way of noising them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the classifier (default: classifier.h5 beside the checkpoints)")
    parser.add_argument("--data", metavar="FILE", help="another data set with the same classes, or another text")
    parser.add_argument("--property", metavar="WHAT", help=f"what to look for in a window of text: {properties.FORMS}")
    parser.add_argument("--steps", type=integer(1, 10**9), default=1000, help="training steps (default: 1000)")
    parser.add_argument("--batch", type=integer(1, 1 << 20), default=128, help="images or windows a step (default: 128)")
    parser.add_argument("--lr", type=real(0.0, 10.0), default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="the one number that all randomness follows from")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    o = parser.parse_args(argv)
    if o.out is not None:
        output(o.out)
    xp, _ = device(o.device)
    found, _, meta = runs.read(o.run)
    check_kind(found, meta)
    try:
        config = configs.from_dict(meta["config"])
    except ConfigError as e:
        raise CheckpointError(found, f"its configuration cannot be used: {e}") from e
    if config.method in configs.EMBEDDED:
        return word_classifier.train(o, found, config, xp)
    if o.property is not None:
        raise UserError(f"--property goes with networks of method {', '.join(configs.EMBEDDED)}, not with {config.method}")
    process = Process(config)  # before the data: it refuses the methods that this is not for
    images = data.load(o.data or config.data.path, config.data.split)
    if images.labels is None:
        raise UserError(f"{images.name} has no labels: there is nothing to classify")
    net = _network(config, images, o.seed, xp)
    optimiser = classifiers.fit(net, lambda k: _batch(process, images, config.data.flip, xp, o, k), o)
    held_out = _test_split(o.data or config.data.path, images)
    with net.params.using(optimiser.ema):
        size = min(classifiers.MEASURED, len(held_out))
        accuracy = classifiers.by_quarters(net, _measured(process, held_out, size, xp, o.seed), process.levels.T)
    path = o.out or classifiers.beside(found)
    known = {"name": images.name, "sha256": images.sha256, "shape": list(images.shape), "classes": list(images.classes)}
    classifiers.save(path, net, optimiser, config, known, o.steps, accuracy)
    if not o.quiet:
        print("\n".join(classifiers.said(accuracy, process.levels.T, f"images of the split {held_out.split}")))
        print(f"classifier  {path}")
    return 0


def _network(config: Config, images: Dataset, seed: int, xp: Any) -> Classifier:
    own = networks.unet_options(config, images)
    shared = {k: own[k] for k in ("image_size", "in_channels", "channels", "attention", "groups", "dropout", "scale_shift")}
    try:
        return Classifier(**shared, classes=len(images.classes), seed=seed, xp=xp)
    except ValueError as e:
        raise ConfigError(f"the run's settings make no classifier: {e}") from e


def _batch(process: Process, images: Dataset, flip: bool, xp: Any, o: Any, k: int) -> classifiers.Batch:
    """The noised images of step ``k``, all times alike."""
    batch, labels, _ = images.batch(k, o.batch, o.seed, flip)
    return (*_noised(process, to_unit(xp.asarray(batch)), o.seed, k), labels)


def _measured(process: Process, images: Dataset, size: int, xp: Any, seed: int) -> classifiers.Batch:
    batch, labels, _ = images.batch(0, size, seed)
    return (*_noised(process, to_unit(xp.asarray(batch)), seed, classifiers.MEASURE_STEP), labels)


def _noised(process: Process, x0: Array, seed: int, step: int) -> tuple[Array, np.ndarray]:
    """(what the network reads, times) of one batch, times uniform, from (seed, step) alone."""
    times = forward.random_times(len(x0), process.levels, seed, step)
    x_t, _ = forward.q_sample(x0, times, process.levels, seed=seed, step=step)
    return process.input(x_t, times), times


def _test_split(path: str, images: Dataset) -> Dataset:
    try:
        return data.load(path, "test")
    except data.DataError:
        return images


if __name__ == "__main__":
    raise SystemExit(main())
