"""A Transformer on sequences whose blocks are conditioned on the time by scale, shift and gate (DiT, Peebles & Xie 2023)."""

from typing import Any

import numpy as np

from . import functions as f
from . import token_functions
from .autograd import Tensor
from .blocks import Dropout, Projections, dropout_of
from .computing import computed
from .conditional import Conditional
from .inputs import check_input, check_integers, check_sizes, check_times
from .layers import Embedding, LayerNorm, Linear, ParameterStore, SelfAttention, TimeEmbedding

Array = Any
POSITIONS = ("rotary", "learned")


def trunk_config(**c: Any) -> dict[str, Any]:
    """The settings of a :class:`Trunk` in plain types. Raises TypeError or ValueError for one out of range."""
    sizes = ("length", "width", "layers", "heads", "expansion")
    check_sizes({k: c[k] for k in sizes})
    check_sizes({"seed": c["seed"]}, low=0)
    each = 2 if c["positions"] == "rotary" else 1
    if c["width"] % 2 or c["width"] % (each * c["heads"]):
        raise ValueError(f"width must be even and a multiple of {each}·heads = {each * c['heads']}, not {c['width']}")
    if c["positions"] not in POSITIONS:
        raise ValueError(f"positions must be one of {POSITIONS}, not {c['positions']!r}")
    if isinstance(c["dropout"], bool) or not isinstance(c["dropout"], (int, float, np.number)):
        raise TypeError(f"dropout must be a number, not {c['dropout']!r}")
    if not 0 <= c["dropout"] < 1:
        raise ValueError(f"dropout must be in [0, 1), not {c['dropout']}")
    return c | {k: int(c[k]) for k in (*sizes, "seed")} | {"dropout": float(c["dropout"]), "dtype": str(np.dtype(c["dtype"]))}


class Rotary:
    """Turns queries and keys by angles that grow with the place: their products then depend on distances alone.

    Pair i of d/2 turns by 10000^(−2i/d) a place. Source: Su et al. 2021, section 3.2.
    """

    def __init__(self, length: int, depth: int, xp: Any, dtype: Any) -> None:
        angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, depth, 2) / depth)
        self.cos, self.sin = (xp.asarray(v.astype(dtype)) for v in (np.cos(angle), np.sin(angle)))

    def __call__(self, x: Tensor, heads: int) -> Tensor:
        return token_functions.rotary(x, heads, self.cos, self.sin, inplace=True)


class Block:
    """x + g₁·attention(n₁), then x + g₂·mlp(n₂), nᵢ the normalised x·(1 + scaleᵢ) + shiftᵢ; scale, shift and gate by the time."""

    def __init__(self, net: Any, name: str, turn: Rotary | None) -> None:
        c, store = net.config, net.params
        self.width = c["width"]
        self.layer = 2 * len(net.projections.blocks)  # two dropouts a block
        self.at = net.projections.take(name, 6 * self.width)
        self.norm1 = LayerNorm(store, f"{name}.norm1", self.width)
        self.attention = SelfAttention(store, f"{name}.attention", self.width, c["heads"], Linear, turn)
        self.norm2 = LayerNorm(store, f"{name}.norm2", self.width)
        self.up = Linear(store, f"{name}.mlp.up", self.width, c["expansion"] * self.width)
        self.down = Linear(store, f"{name}.mlp.down", c["expansion"] * self.width, self.width)

    def __call__(self, x: Tensor, emb: Tensor, drop: Dropout | None) -> Tensor:
        h = self.attention(self.norm1(x, emb, self.at))
        if drop is not None:
            h = drop(h, self.layer)
        x = token_functions.add_gated(x, h, emb, self.at + 2 * self.width)
        h = self.down(f.silu(self.up(self.norm2(x, emb, self.at + 3 * self.width))))
        if drop is not None:
            h = drop(h, self.layer + 1)
        return token_functions.add_gated(x, h, emb, self.at + 5 * self.width)


class Trunk:
    """The blocks of a Transformer and the last norm: tokens (B, length, width), times and labels to tokens of that shape.

    ``config``: see :func:`trunk_config`; ``label_rows``: the number of labels, 0 for none. Every block begins as the identity:
    its gates are zero.
    """

    def __init__(self, config: dict[str, Any], store: ParameterStore, label_rows: int = 0) -> None:
        c, width = config, config["width"]
        self.config, self.params, self.projections = config, store, Projections()
        self.time = TimeEmbedding(store, "time_embedding", width, width)
        self.label = Embedding(store, "class_embedding", label_rows, width) if label_rows else None
        self.places = turn = None
        if c["positions"] == "learned":
            self.places = store.declare("positions.weight", (c["length"], width), 0.02)
        else:
            turn = Rotary(c["length"], width // c["heads"], store.xp, store.dtype)
        self.blocks = [Block(self, f"blocks.{i}", turn) for i in range(c["layers"])]
        self.at = self.projections.take("norm_out", 2 * width)
        self.norm_out = LayerNorm(store, "norm_out", width)
        self.projection = Linear(store, "time_emb_proj", width, self.projections.width, zero=True)

    def __call__(self, x: Tensor, t: Any, labels: Array | None, step: int | None, first_sample: int) -> Tensor:
        drop = dropout_of(self, step, first_sample)
        emb = self.time(check_times(t, x.shape[0], self.params.xp))
        if self.label is not None:
            emb = f.add(emb, self.label(labels))
        emb = self.projection(f.silu(emb))
        if self.places is not None:
            x = token_functions.add_rows(x, self.places)
        for block in self.blocks:
            x = block(x, emb, drop)
        return self.norm_out(x, emb, self.at)


class Transformer(Conditional):
    """A Transformer (B, length, out) = net(x, t, y) on sequences of states or of vectors.

    length: tokens of a sequence. states: how many; x are integers then, each state with a learned vector. features_in: x are
        vectors of so many numbers instead. out: numbers for each token, by default ``states`` (logits) or ``features_in``.
    width: of a token inside; layers: blocks; heads: of attention; expansion: the MLP of a block is so many times wider.
    positions: "rotary" turns queries and keys by angles (Su et al. 2021), "learned" adds a vector to each place.
    classes: number of labels; label ``classes`` is the null class (no condition) unless ``null_class`` is False.
    dropout: rate, of what attention and MLP add; active where a call names its training ``step``.
    seed: key of the initial weights and of dropout. xp: numpy or cupy. dtype: "float32" or "float64".

    The blocks start as the identity and the last layer at zero. Raises TypeError or ValueError where an option is out of range.
    ``Transformer(**net.config)`` is the same network with its initial weights.
    """

    def __init__(
        self,
        length: int,
        states: int | None = None,
        features_in: int | None = None,
        out: int | None = None,
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
        if (states is None) == (features_in is None):
            raise ValueError(f"one of states and features_in must be given, not {states} and {features_in}")
        given = states if features_in is None else features_in
        counts = {"states": states, "features_in": features_in, "out": given if out is None else out, "classes": classes}
        check_sizes({k: n for k, n in counts.items() if n is not None})
        self.config = trunk_config(
            length=length,
            **{k: None if n is None else int(n) for k, n in counts.items()},
            width=width,
            layers=layers,
            heads=heads,
            expansion=expansion,
            positions=positions,
            null_class=bool(null_class),
            dropout=dropout,
            seed=seed,
            dtype=dtype,
        )
        self.params = store = ParameterStore(self.config["seed"], xp, dtype)
        width = self.config["width"]
        self.embed = Embedding(store, "embedding", states, width) if states is not None else None
        self.enter = Linear(store, "linear_in", features_in, width) if features_in is not None else None
        self.trunk = Trunk(self.config, store, self.label_rows)
        self.head = Linear(store, "linear_out", width, self.config["out"], zero=True)
        store.build()

    @computed
    def __call__(
        self, x: Array | Tensor, t: Array, y: Array | None = None, step: int | None = None, first_sample: int = 0
    ) -> Tensor:
        """The network's output (B, length, out), recorded for a backward pass unless under ``no_grad``.

        x (B, length) integers 0..states−1, or (B, length, features_in) of the network's dtype, or a Tensor of these (with
        ``needs_grad`` for the gradient of the input, with a ``tangent``); t (B,) or one number, the paper's times 1..T; y (B,)
        labels, None for the null class. ``step`` is the training step (from 0) and turns dropout on; its masks depend on the
        network's seed, the step and the place in the batch, counted from ``first_sample``. Raises ValueError or TypeError for
        arguments that do not fit.
        """
        c = self.config
        if self.embed is not None:
            h = self.embed(check_integers("x", x, ("B", c["length"]), c["states"], self.params.xp))
        else:
            assert self.enter is not None
            h = self.enter(check_input(x, (c["length"], c["features_in"]), self.params))
        return self.head(self.trunk(h, t, self.labels(y, h.shape[0]), step, first_sample))
