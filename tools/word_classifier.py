"""A classifier of the noised embeddings of a Diffusion-LM run: whether a window of its text has a property. For control."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alphabar.core import text
from alphabar.core.data import DataError
from alphabar.core.text import Text
from alphabar.kernels.arrays import to_numpy
from alphabar.nets.autograd import no_grad
from alphabar.nets.checkpoint import CheckpointError
from alphabar.nets.sequence_classifier import SequenceClassifier
from alphabar.tools import classifiers, properties, trained
from alphabar.tools.command import UserError, from_environment
from alphabar.tools.config import Config, ConfigError
from alphabar.tools.properties import CLASSES, Windows
from alphabar.tools.trained import Trained
from alphabar.tools.trainer import load_weights

Array = Any
EMBEDDING = "run/embedding"  # of the network whose noised embeddings it was trained on
LAYERS = 2  # at most: telling is easier than making


class Steering(NamedTuple):
    """A trained classifier of noised embeddings, the property that it tells, and the embeddings."""

    net: SequenceClassifier
    property: str
    embedding: np.ndarray

    def gradient(self, y: Any) -> Callable[[Array, Array], Array]:
        """gradient(x, t) = ∇_x log p(y|x_t), y (B,) of 0 "no" and 1 "yes"."""
        return lambda x, t: self.net.log_prob_gradient(x, t, y)


def load(path: str | Path, network: Trained) -> Steering:
    """The classifier of a file, with averaged weights, for a network that has these embeddings.

    CheckpointError where it is none, or not one of text; UserError where it was trained on other embeddings or windows.
    """
    path, arrays, meta = classifiers.read(path)
    if "property" not in meta:
        raise CheckpointError(path, "is a classifier of images, not of text")
    try:
        net, name = SequenceClassifier(**meta["model"], xp=network.net.params.xp), str(meta["property"])
        embedding = arrays[EMBEDDING]
    except (TypeError, ValueError, KeyError) as e:
        if from_environment(e):
            raise
        raise CheckpointError(path, f"its classifier cannot be built: {e}") from e
    load_weights(path, net, arrays, "ema")  # type: ignore[arg-type]
    if (net.config["length"],) != network.shape:
        raise UserError(f"--classifier {path}: it knows windows of {net.config['length']} letters, not of {network.shape[0]}")
    if not np.array_equal(embedding, to_numpy(network.net.table.data)):
        raise UserError(f"--classifier {path}: it was trained on the embeddings of another checkpoint, or of its other weights")
    return Steering(net, name, embedding)


def train(o: Any, found: Path, config: Config, xp: Any) -> int:
    """Train one on the noised embeddings of a run's averaged network; returns the exit code."""
    if o.property is None:
        raise UserError(f"--property must say what to look for in the text: {properties.FORMS}")
    asked = properties.parse(o.property)
    network = trained.load(found, False, xp)
    seen = _windows(o.data or config.data.path, config.data.split, network, asked, o.seed)
    m, T = config.model, network.process.levels.T
    try:
        net = SequenceClassifier(
            network.shape[0],
            network.process.features,
            len(CLASSES),
            m.width,
            min(m.layers, LAYERS),
            m.heads,
            positions=m.positions,
            dropout=m.dropout,
            seed=o.seed,
            xp=xp,
        )
    except ValueError as e:
        if from_environment(e):
            raise
        raise ConfigError(f"the run's settings make no classifier: {e}") from e
    optimiser = classifiers.fit(net, lambda k: _batch(network, seen, o.batch, o.seed, k), o)
    try:
        held_out = _windows(o.data or config.data.path, "test", network, asked, o.seed)
    except (UserError, DataError):
        held_out = seen
    with net.params.using(optimiser.ema):
        measured = _batch(network, held_out, classifiers.MEASURED, o.seed, classifiers.MEASURE_STEP)
        accuracy = classifiers.by_quarters(net, measured, T)
    path = o.out or classifiers.beside(found)
    known = {"name": seen.text.name, "sha256": seen.text.sha256, "shape": list(network.shape), "classes": list(CLASSES)}
    embedding = {EMBEDDING: network.net.table.data}
    classifiers.save(path, net, optimiser, config, known, o.steps, accuracy, embedding, property=asked.name)
    if not o.quiet:
        print(f"property    {asked.name}, which {seen.share:.1%} of the windows have; both classes alike in training and below")
        print("\n".join(classifiers.said(accuracy, T, f"windows of the split {held_out.text.split}")))
        print(f"classifier  {path}")
    return 0


def _windows(path: str, split: str, network: Trained, asked: properties.Property, seed: int) -> Windows:
    found: Text = text.load(path, split, network.shape[0])
    return Windows(found, asked, seed)


def _batch(network: Trained, windows: Windows, size: int, seed: int, k: int) -> classifiers.Batch:
    """Noised embeddings of step ``k``, their times spread evenly, and whether they have the property."""
    tokens, labels = windows.batch(k, size)
    with no_grad():
        times, _, _, x_t = network.process.noised(network.net, network.net.params.xp.asarray(tokens), seed, k)
    return x_t.data, times, labels
