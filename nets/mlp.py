"""A multilayer perceptron on vectors, with or without time: scores, denoisers and energies in low dimension."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..kernels.arrays import native, restore
from . import functions as f
from .autograd import Tensor, no_grad
from .computing import Computing, computed
from .inputs import check_input, check_sizes, check_times
from .layers import Linear, ParameterStore, time_features
from .unet_config import integers

Array = Any
ACTIVATIONS = {"silu": f.silu, "tanh": f.tanh}


def _check(c: dict[str, Any]) -> None:
    """Raise TypeError or ValueError for a configuration that makes no network."""
    sizes = {k: c[k] for k in ("features_in", "features_out", "time_channels")}
    check_sizes(sizes | {f"hidden[{i}]": n for i, n in enumerate(c["hidden"])})
    if isinstance(c["seed"], bool) or not isinstance(c["seed"], (int, np.integer)):
        raise TypeError(f"seed must be an integer, not {c['seed']!r}")
    if c["time_channels"] % 2:
        raise ValueError(f"time_channels must be even, not {c['time_channels']}")
    if not isinstance(c["time_scale"], (int, float, np.number)):
        raise TypeError(f"time_scale must be a number, not {c['time_scale']!r}")
    if not (c["time_scale"] > 0 and np.isfinite(c["time_scale"])):
        raise ValueError(f"time_scale must be positive and finite, not {c['time_scale']}")
    if c["activation"] not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, not {c['activation']!r}")


class MLP(Computing):
    """y = W_n·act(… act(W_1·[x, φ(t)] + b_1) …) + b_n on vectors x (B, features_in).

    hidden: widths of the hidden layers; () is one linear layer.
    features_out: by default features_in; 1 for an energy E(x), whose score −∇E is ``-vjp(net, x, ones)[1]``.
    times: whether the network reads a time; then φ are ``time_channels`` sines and cosines of ``time_scale``·t
        (:func:`~alphabar.nets.layers.time_features`): 1000 for continuous times in [0, 1], 1 for 1..T.
    activation: "silu" or "tanh". zero_init: start the last layer at zero.
    seed: key of the initial weights. xp: numpy or cupy. dtype: "float32" or "float64".

    Raises TypeError or ValueError where an option is out of range. ``MLP(**net.config)`` is the same network with its initial
    weights.
    """

    def __init__(
        self,
        features_in: int,
        hidden: Sequence[int] = (64, 64),
        features_out: int | None = None,
        times: bool = False,
        time_channels: int = 32,
        time_scale: float = 1.0,
        activation: str = "silu",
        zero_init: bool = False,
        seed: int = 0,
        xp: Any = np,
        dtype: str = "float32",
    ) -> None:
        config: dict[str, Any] = {
            "features_in": features_in,
            "hidden": integers("hidden", hidden),
            "features_out": features_in if features_out is None else features_out,
            "times": bool(times),
            "time_channels": time_channels,
            "time_scale": time_scale,
            "activation": activation,
            "zero_init": bool(zero_init),
            "seed": seed,
            "dtype": str(np.dtype(dtype)),
        }
        _check(config)
        for key in ("features_in", "features_out", "time_channels", "seed"):
            config[key] = int(config[key])
        config["time_scale"] = float(time_scale)
        self.config = config
        self.params = ParameterStore(config["seed"], xp, dtype)
        first = config["features_in"] + (config["time_channels"] if times else 0)
        widths = [first, *config["hidden"], config["features_out"]]
        last = len(widths) - 2
        self.layers = [
            Linear(self.params, f"layers.{i}", n_in, n_out, zero=i == last and config["zero_init"])
            for i, (n_in, n_out) in enumerate(pairwise(widths))
        ]
        self.activation = ACTIVATIONS[activation]
        self.params.build()

    @computed
    def __call__(self, x: Array | Tensor, t: Array | None = None) -> Tensor:
        """The network's output (B, features_out), recorded for a backward pass unless under ``no_grad``.

        x (B, features_in) of the network's dtype, or a Tensor of it (with ``needs_grad``, with a ``tangent``); t (B,) or one
        number, integers or floats, where the network has ``times``. Raises ValueError or TypeError for arguments that do not fit.
        """
        x = check_input(x, (self.config["features_in"],), self.params)
        if self.config["times"]:
            x = f.concat(x, Tensor(self._time_features(t, x.shape[0])))
        elif t is not None:
            raise ValueError("t is given, but the network has no times")
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)

    def predict(self, x: Array, t: Array | None = None) -> Array:
        """The network's output as an array that is the caller's to keep, without a tape.

        Arguments as for a call; x may be of any library that speaks DLPack, and the answer is of the same kind.
        """
        with no_grad():
            out = self(native(x), native(t)).data
        return restore(out, x)

    def _time_features(self, t: Any, batch: int) -> Array:
        if t is None:
            raise ValueError("t must be given: the network has times")
        c = self.config
        scaled = check_times(t, batch, self.params.xp) * c["time_scale"]
        return time_features(scaled, c["time_channels"]).astype(self.params.dtype)
