"""A noise-aware classifier p(y|x_t): the way down of the U-Net, a mean over all places, and a linear layer.

Its gradient with respect to x_t guides a sampler (classifier guidance, Dhariwal & Nichol 2021).
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import buffers
from ..kernels.arrays import array_module, is_cupy, native, restore
from . import functions as f
from .autograd import Tensor, backward, fresh_tape, no_grad, record
from .blocks import Level, Projections, ResBlock, dropout_of
from .computing import Computing, computed
from .inputs import check_input, check_times
from .layers import Attention, Conv2d, GroupNorm, Linear, ParameterStore, TimeEmbedding
from .unet_config import attention_levels, check, integers

Array = Any
FIXED = {"attention_up": None, "null_class": False, "freq_shift": 0.0, "time_dtype": "float64"}  # of the U-Net's settings


class NoisyClassifier(Computing):
    """What classifiers p(y|x_t) of noisy data share: a call gives the logits (B, classes)."""

    config: dict[str, Any]
    params: ParameterStore

    def __call__(self, x: Array | Tensor, t: Array, step: int | None = None, first_sample: int = 0) -> Tensor:
        """Logits (B, classes), recorded for a backward pass unless under ``no_grad``."""
        raise NotImplementedError

    def predict(self, x: Array, t: Array) -> Array:
        """The logits as an array that is the caller's to keep, without a tape and without dropout.

        Arguments as for a call; x may be of any library that speaks DLPack, and the answer is of the same kind.
        """
        with no_grad():
            logits = self(native(x), native(t)).data.copy()
        return restore(logits, x)

    def log_prob_gradient(self, x: Array, t: Array, y: Any) -> Array:
        """∇_x log p(y|x_t), of the shape of x, for guidance. Eq: S0-E33.

        x and t as for :meth:`predict`; y (B,) labels or one. No gradient reaches the parameters.
        """
        state = native(x)
        with fresh_tape():
            start = Tensor(state, needs_grad=True)
            logits = self(start, native(t))
            labels, gradient = _labels(y, logits.data), -kernels.softmax(logits.data)
            gradient[array_module(gradient).arange(len(gradient)), labels] += 1
            backward((logits, gradient))
        return restore(start.grad.copy(), x)


class Classifier(NoisyClassifier):
    """Logits over classes for noisy NHWC images and their times. Eq: S0-C14, S3-C10.

    The options are those of :class:`~alphabar.nets.UNet`, and so are the names of the parameters that both have. ``middle``
    follows the lowest resolution. ``classes``: the number of labels, at least 2. With ``zero_init`` the last layer too starts at
    zero: all classes alike.

    Raises TypeError or ValueError where an option is out of range. ``Classifier(**net.config)`` is the same network with its
    initial weights.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 1,
        classes: int = 10,
        channels: Sequence[int] = (32, 64),
        blocks: int = 1,
        attention: Sequence[int] | Sequence[bool] = (),
        middle: str = "attention",
        head_dim: int | None = None,
        groups: int = 8,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = False,
        time_origin: int = 0,
        embedding_size: int | None = None,
        downsample_pad: Sequence[int] = (1, 1),
        zero_init: bool = True,
        seed: int = 0,
        xp: Any = np,
        dtype: str = "float32",
    ) -> None:
        size = [image_size, image_size] if isinstance(image_size, (int, np.integer)) else image_size
        channels = integers("channels", channels)
        config: dict[str, Any] = {
            "image_size": integers("image_size", size),
            "in_channels": in_channels,
            "classes": classes,
            "channels": channels,
            "blocks": blocks,
            "attention": integers("attention", attention),
            "middle": middle,
            "head_dim": head_dim,
            "groups": groups,
            "norm_eps": norm_eps,
            "dropout": dropout,
            "scale_shift": scale_shift,
            "time_origin": time_origin,
            "embedding_size": 4 * sum(channels[:1]) if embedding_size is None else embedding_size,
            "downsample_pad": list(downsample_pad),
            "zero_init": zero_init,
            "seed": seed,
            "dtype": str(np.dtype(dtype)),
        }
        check({**config, **FIXED, "out_channels": 1, "middle_groups": None})
        if classes is None or classes < 2:
            raise ValueError(f"classes must be an integer of at least 2, not {classes}")
        self.config = config
        self.params = ParameterStore(seed, xp, dtype)
        self.projections = Projections()
        self._assemble()
        self.params.build()

    def _assemble(self) -> None:
        c, store = self.config, self.params
        attended, width = attention_levels(c, "attention"), c["channels"][0]

        def block(part: str, j: int, n_in: int, n_out: int, attention: bool) -> tuple[ResBlock, Attention | None]:
            res = ResBlock(self, f"{part}.resnets.{j}", n_in, n_out)
            heads = 1 if c["head_dim"] is None else n_out // c["head_dim"]
            options = (n_out, heads, c["groups"], c["norm_eps"], c["zero_init"])
            return res, Attention(store, f"{part}.attentions.{j}", *options) if attention else None

        self.time = TimeEmbedding(store, "time_embedding", width, c["embedding_size"], origin=c["time_origin"])
        self.conv_in = Conv2d(store, "conv_in", c["in_channels"], width)
        self.down: list[Level] = []
        for i, n in enumerate(c["channels"]):
            part = f"down_blocks.{i}"
            pairs = [block(part, j, n if j else width, n, attended[i]) for j in range(c["blocks"])]
            last = i == len(c["channels"]) - 1
            pad = tuple(c["downsample_pad"])
            resize = None if last else Conv2d(store, f"{part}.downsamplers.0.conv", n, n, stride=2, pad=pad)
            self.down.append(Level(pairs, resize))
            width = n
        places = range(0 if c["middle"] == "none" else 2)
        pairs = [block("mid_block", j, width, width, j == 0 and c["middle"] == "attention") for j in places]
        self.down.append(Level(pairs, None))
        self.norm_out = GroupNorm(store, "norm_out", width, c["groups"], c["norm_eps"])
        self.head = Linear(store, "head", width, c["classes"], zero=c["zero_init"])
        self.projection = Linear(store, "time_emb_proj", c["embedding_size"], self.projections.width)

    @computed
    def __call__(self, x: Array | Tensor, t: Array, step: int | None = None, first_sample: int = 0) -> Tensor:
        """Logits (B, classes), recorded for a backward pass unless under ``no_grad``.

        x (B, H, W, in_channels) of the network's dtype, or a Tensor of it (with ``needs_grad``, with a ``tangent``); t (B,) or
        one number, the paper's times 1..T. ``step`` is the training step (from 0) and turns dropout on, as in the U-Net. Raises
        ValueError or TypeError for arguments that do not fit.
        """
        x = check_input(x, (*self.config["image_size"], self.config["in_channels"]), self.params)
        drop = dropout_of(self, step, first_sample)
        emb = self.projection(f.silu(self.time(check_times(t, x.shape[0], self.params.xp))))
        h = self.conv_in(x)
        for level in self.down:
            for res, attention in level.blocks:
                h = res(h, emb, drop)
                h = h if attention is None else attention(h)
            if level.resize is not None:
                h = level.resize(h)
        return self.head(mean_places(self.norm_out(h)))


def mean_places(x: Tensor) -> Tensor:
    """y[b, c] = mean of x[b, …, c] over all places; x (B, …, C)."""
    xp = array_module(x.data)
    batch, places, channels = x.shape[0], prod(x.shape[1:-1]), x.shape[-1]
    y = xp.einsum("bpc->bc", x.data.reshape(batch, places, channels)) / places

    # each place has the share 1/places
    def pull(dy: Array) -> None:
        dx = buffers.empty((batch, places, channels), dy.dtype, xp)
        dx[...] = (dy / places)[:, None]
        x.receive(dx.reshape(x.shape))

    def push() -> Tensor:
        assert x.tangent is not None
        return mean_places(x.tangent)

    return record(y, (x,), pull, push)


def cross_entropy(logits: Array, y: Any) -> tuple[Array, Array]:
    """(−log p(y) of every sample (B,), nats, with p = softmax(logits); the gradient of the batch mean, (p − onehot(y))/B).

    logits (B, classes) float; y (B,) labels or one. Raises ValueError or TypeError for labels that do not fit.
    """
    z = native(logits)
    if getattr(z, "ndim", 0) != 2 or z.dtype.kind != "f" or 0 in z.shape:
        raise ValueError(f"logits must be floats (B, classes), not of shape {np.shape(z)}")
    value, gradient = kernels.cross_entropy(z, _labels(y, z))
    return restore(value, logits), restore(gradient, logits)


def _labels(y: Any, logits: Array) -> Array:
    """(B,) integers of the library of the logits (B, classes)."""
    xp, (batch, classes) = array_module(logits), logits.shape
    y = native(y)
    y = y if is_cupy(y) else np.asarray(y)
    if y.dtype.kind not in "iu":
        raise TypeError(f"y must be integers, not {y.dtype}")
    if y.shape not in ((), (batch,)):
        raise ValueError(f"y must have shape ({batch},), not {y.shape}")
    if isinstance(y, np.ndarray) and y.size and not (0 <= y.min() and y.max() < classes):  # labels on a GPU are not waited for
        raise ValueError(f"y must be in 0..{classes - 1}, not {y.min()}..{y.max()}")
    return xp.broadcast_to(xp.asarray(y), (batch,))
