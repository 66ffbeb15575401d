"""The network of Diffusion-LM (Li et al. 2022): an embedding of words, a denoiser of embeddings, and the way back to words."""

from typing import Any

import numpy as np

from . import functions as f
from . import token_functions
from .autograd import Tensor
from .computing import computed
from .conditional import Conditional
from .inputs import check_input, check_integers, check_sizes
from .layers import Embedding, Linear, ParameterStore
from .transformer import Trunk, trunk_config

Array = Any


class WordDiffusion(Conditional):
    """Three maps that are trained together, their weights in one store. Eq: L7.

        embed(w)          words (B, length), integers 0..states−1, to vectors (B, length, features): the table's rows
        net(x_t, t, y)    the clean vectors x̂_0 (B, length, features) seen in noisy ones: a Transformer
        logits(x)         x·tableᵀ + bias (B, length, states): the rounding p(w|x) = softmax(logits), tied to the table

    The parts take and give Tensors, so that one ``backward`` of all of them sends gradients through x_t and x_0 to the table::

        mean = net.embed(w)
        x0 = noised(mean, 1, sigma0 * z)                      # token_functions.noised
        out = net(noised(x0, signal[t], noise[t] * eps), t)
        scores = net.logits(x0)
        backward((out, d_out), (x0, d_x0), (mean, d_mean), (scores, d_scores))

    states: number of words; features: numbers of a word's vector, which starts as normals. The other options are those of
    :class:`~alphabar.nets.Transformer`. Raises TypeError or ValueError where an option is out of range.
    ``WordDiffusion(**net.config)`` is the same network with its initial weights.
    """

    def __init__(
        self,
        length: int,
        states: int,
        features: int = 16,
        width: int = 192,
        layers: int = 4,
        heads: int = 6,
        expansion: int = 4,
        positions: str = "rotary",
        classes: int | None = None,
        null_class: bool = True,
        dropout: float = 0.0,
        seed: int = 0,
        xp: Any = np,
        dtype: str = "float32",
    ) -> None:
        check_sizes({"states": states, "features": features} | ({} if classes is None else {"classes": classes}))
        self.config = trunk_config(
            length=length,
            states=int(states),
            features=int(features),
            width=width,
            layers=layers,
            heads=heads,
            expansion=expansion,
            positions=positions,
            classes=None if classes is None else int(classes),
            null_class=bool(null_class),
            dropout=dropout,
            seed=seed,
            dtype=dtype,
        )
        self.params = store = ParameterStore(self.config["seed"], xp, dtype)
        width = self.config["width"]
        self.words = Embedding(store, "embedding", states, features)
        self.bias = store.declare("rounding.bias", (states,))
        self.enter = Linear(store, "linear_in", features, width)
        self.trunk = Trunk(self.config, store, self.label_rows)
        self.head = Linear(store, "linear_out", width, features, zero=True)
        store.build()

    @property
    def table(self) -> Tensor:
        """The words' vectors (states, features)."""
        return self.words.table

    def embed(self, w: Array) -> Tensor:
        """The vectors (B, length, features) of words w (B, length). Raises ValueError or TypeError for words that do not fit."""
        c = self.config
        return self.words(check_integers("w", w, ("B", c["length"]), c["states"], self.params.xp))

    @computed
    def logits(self, x: Array | Tensor) -> Tensor:
        """Scores (B, length, states) of the words at x (B, length, features): x·tableᵀ + bias."""
        return f.linear(self._vectors(x), token_functions.transpose(self.table), self.bias)

    @computed
    def __call__(
        self, x: Array | Tensor, t: Array, y: Array | None = None, step: int | None = None, first_sample: int = 0
    ) -> Tensor:
        """x̂_0 (B, length, features), recorded for a backward pass unless under ``no_grad``.

        x (B, length, features) of the network's dtype, or a Tensor of it, which may depend on :meth:`embed`; t, y, ``step`` and
        ``first_sample`` as for a Transformer. Raises ValueError or TypeError for arguments that do not fit.
        """
        h = self.enter(self._vectors(x))
        return self.head(self.trunk(h, t, self.labels(y, h.shape[0]), step, first_sample))

    def _vectors(self, x: Array | Tensor) -> Tensor:
        x = check_input(x, (self.config["length"], self.config["features"]), self.params)
        return x
