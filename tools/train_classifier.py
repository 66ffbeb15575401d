"""Train a classifier p(class|x_t) of the noised images of a run, for classifier guidance of its samples."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import alphabar
from alphabar import kernels
from alphabar.core import data, forward
from alphabar.core.data import Dataset, to_unit
from alphabar.kernels.arrays import to_numpy
from alphabar.nets import checkpoint
from alphabar.nets.checkpoint import CheckpointError
from alphabar.nets.classifier import Classifier, cross_entropy
from alphabar.nets.optim import AdamW, learning_rate
from alphabar.tools import config as configs
from alphabar.tools import runs
from alphabar.tools.command import Failure, Parser, UserError, device, integer, program, real
from alphabar.tools.config import Config, ConfigError
from alphabar.tools.methods import Process
from alphabar.tools.progress import Progress
from alphabar.tools.trainer import check_kind, load_weights, network_options

KIND = "alphabar-classifier"
QUARTERS = 4
MEASURED = 512  # images that the accuracy is measured on
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
    path = Path(path)
    arrays, meta = checkpoint.load(path)
    if meta.get("kind") != KIND:
        raise CheckpointError(path, f"is of kind {meta.get('kind')!r}, want {KIND!r}")
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
    parser = Parser(prog="alphabar train-classifier", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder or checkpoint: its data and its way of noising them")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the classifier (default: classifier.h5 beside the checkpoints)")
    parser.add_argument("--data", metavar="FILE", help="another data set with the same classes")
    parser.add_argument("--steps", type=integer(1, 10**9), default=1000, help="training steps (default: 1000)")
    parser.add_argument("--batch", type=integer(1, 1 << 20), default=128, help="images a step (default: 128)")
    parser.add_argument("--lr", type=real(0.0, 10.0), default=1e-3, help="learning rate (default: 1e-3)")
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="the one number that all randomness follows from")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    o = parser.parse_args(argv)
    xp, _ = device(o.device)
    found, _, meta = runs.read(o.run)
    check_kind(found, meta)
    try:
        config = configs.from_dict(meta["config"])
    except ConfigError as e:
        raise CheckpointError(found, f"its configuration cannot be used: {e}") from e
    images = data.load(o.data or config.data.path, config.data.split)
    if images.labels is None:
        raise UserError(f"{images.name} has no labels: there is nothing to classify")
    net = _network(config, images, o.seed, xp)
    process = Process(config)
    optimiser = _train(net, process, config, images, o)
    held_out = _test_split(o.data or config.data.path, images)
    with net.params.using(optimiser.ema):
        accuracy = _accuracy(net, process, held_out, o.seed)
    path = o.out or (found.parent.parent if found.parent.name == "ckpt" else found.parent) / "classifier.h5"
    _save(path, net, optimiser, config, images, o.steps, accuracy)
    if not o.quiet:
        for k, share in enumerate(accuracy):
            low, high = (i * process.levels.T / QUARTERS for i in (k, k + 1))
            print(f"accuracy    {share:6.1%} at t in {low:g}..{high:g} (images of the split {held_out.split})")
        print(f"classifier  {path}")
    return 0


def _network(config: Config, images: Dataset, seed: int, xp: Any) -> Classifier:
    own = network_options(config, images)
    shared = {k: own[k] for k in ("image_size", "in_channels", "channels", "attention", "groups", "dropout", "scale_shift")}
    try:
        return Classifier(**shared, classes=len(images.classes), seed=seed, xp=xp)
    except ValueError as e:
        raise ConfigError(f"the run's settings make no classifier: {e}") from e


def _train(net: Classifier, process: Process, config: Config, images: Dataset, o: Any) -> AdamW:
    """AdamW on the cross-entropy of noised images, all times alike."""
    optimiser, pool, xp = AdamW(net.params, max_norm=1.0, ema_decay=0.999, weight_decay=0.01), kernels.Pool(), net.params.xp
    with Progress("training", o.steps, 0, o.quiet) as bar:
        for k in range(o.steps):
            with pool:
                batch, labels, _ = images.batch(k, o.batch, o.seed, config.data.flip)
                x, times = _noised(process, to_unit(xp.asarray(batch)), o.seed, k)
                logits = net(x, times, step=k)
                value, gradient = cross_entropy(logits.data, xp.asarray(labels))
                loss = float(value.mean())
                net.params.zero_grad()
                logits.backward(gradient)
                norm = optimiser.step(learning_rate(k, o.lr, min(100, o.steps // 5), o.steps, "cosine"))
            if not math.isfinite(loss + norm):
                raise Failure(f"step {k + 1}: the loss is {loss}, the norm of its gradient {norm}")
            bar.note(f"loss {loss:.4f}")
            bar.advance()
    return optimiser


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


def _accuracy(net: Classifier, process: Process, images: Dataset, seed: int) -> list[float]:
    """The share of noised images read right, by quarters of the times."""
    size = min(MEASURED, len(images))
    batch, labels, _ = images.batch(0, size, seed)
    x, times = _noised(process, to_unit(net.params.xp.asarray(batch)), seed, 1 << 31)
    right = to_numpy(net.predict(x, times)).argmax(axis=1) == labels
    quarter = np.minimum((times * QUARTERS / process.levels.T).astype(int), QUARTERS - 1)
    return [float(right[quarter == k].mean()) if np.any(quarter == k) else math.nan for k in range(QUARTERS)]


def _save(
    path: Path, net: Classifier, optimiser: AdamW, config: Config, images: Dataset, steps: int, accuracy: list[float]
) -> None:
    store = net.params
    arrays = {f"weights/{n}": a for n, a in store.arrays().items()}
    with store.using(optimiser.ema):
        arrays |= {f"ema/{n}": a for n, a in store.arrays().items()}
    meta = {
        "kind": KIND,
        "alphabar": alphabar.__version__,
        "step": steps,
        "config": configs.to_dict(config),
        "model": net.config,
        "data": {"name": images.name, "sha256": images.sha256, "shape": list(images.shape), "classes": list(images.classes)},
        "accuracy": [None if math.isnan(a) else a for a in accuracy],
    }
    try:
        checkpoint.save(path, arrays, meta)
    except OSError as e:
        raise Failure(f"{path}: {e.strerror or e}") from e


if __name__ == "__main__":
    raise SystemExit(main())
