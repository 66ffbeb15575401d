"""A noise-aware classifier p(y|x_t) of sequences of vectors: a Transformer, a mean over the places, and a linear layer."""

from typing import Any

import numpy as np

from .autograd import Tensor
from .classifier import NoisyClassifier, mean_places
from .computing import computed
from .inputs import check_input, check_sizes
from .layers import Linear, ParameterStore
from .transformer import Trunk, trunk_config

Array = Any


class SequenceClassifier(NoisyClassifier):
    """Logits over classes for noisy sequences (B, length, features_in), noised embeddings say, and their times. Eq: L7.

    The options are those of :class:`~alphabar.nets.Transformer`. ``classes``: the number of labels, at least 2. The last layer
    starts at zero: all classes alike. Raises TypeError or ValueError where an option is out of range.
    ``SequenceClassifier(**net.config)`` is the same network with its initial weights.
    """

    def __init__(
        self,
        length: int,
        features_in: int,
        classes: int,
        width: int = 192,
        layers: int = 2,
        heads: int = 6,
        expansion: int = 4,
        positions: str = "rotary",
        dropout: float = 0.0,
        seed: int = 0,
        xp: Any = np,
        dtype: str = "float32",
    ) -> None:
        check_sizes({"features_in": features_in})
        check_sizes({"classes": classes}, low=2)
        self.config = trunk_config(
            length=length,
            features_in=int(features_in),
            classes=int(classes),
            width=width,
            layers=layers,
            heads=heads,
            expansion=expansion,
            positions=positions,
            dropout=dropout,
            seed=seed,
            dtype=dtype,
        )
        self.params = store = ParameterStore(self.config["seed"], xp, dtype)
        width = self.config["width"]
        self.enter = Linear(store, "linear_in", features_in, width)
        self.trunk = Trunk(self.config, store)
        self.head = Linear(store, "head", width, classes, zero=True)
        store.build()

    @computed
    def __call__(self, x: Array | Tensor, t: Array, step: int | None = None, first_sample: int = 0) -> Tensor:
        """Logits (B, classes), recorded for a backward pass unless under ``no_grad``.

        x (B, length, features_in) of the network's dtype, or a Tensor of it (with ``needs_grad``, with a ``tangent``); t (B,) or
        one number, the paper's times 1..T. ``step`` is the training step (from 0) and turns dropout on, as in the Transformer.
        Raises ValueError or TypeError for arguments that do not fit.
        """
        x = check_input(x, (self.config["length"], self.config["features_in"]), self.params)
        return self.head(mean_places(self.trunk(self.enter(x), t, None, step, first_sample)))
