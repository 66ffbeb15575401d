"""The U-Net of DDPM (Ho et al. 2020, appendix B) and its common variants; it can express diffusers' UNet2DModel exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.arrays import is_cupy, native, restore
from . import functions as f
from .autograd import Tensor, no_grad, recording
from .inputs import check_input, check_times
from .layers import Attention, Conv2d, Embedding, GroupNorm, Linear, ParameterStore, TimeEmbedding
from .unet_config import attention_levels, check, integers

Array = Any


@dataclass(frozen=True)
class _Dropout:
    """What a mask depends on besides the layer."""

    rate: float
    seed: int
    step: int
    first_sample: int


class _Projections:
    """All residual blocks' projections of the time embedding as one linear layer; a block reads its columns."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, int, int]] = []  # name, first column, columns
        self.width = 0

    def take(self, name: str, columns: int) -> int:
        at = self.width
        self.blocks.append((name, at, columns))
        self.width += columns
        return at


class _ResBlock:
    """y = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time))); or the time scales and shifts norm2's output."""

    def __init__(self, net: Any, name: str, n_in: int, n_out: int) -> None:  # net: a UNet, or another network of its blocks
        c, store = net.config, net.params
        self.modulate = c["scale_shift"]
        self.layer = len(net.projections.blocks)
        self.at = net.projections.take(name, 2 * n_out if self.modulate else n_out)
        self.norm1 = GroupNorm(store, f"{name}.norm1", n_in, c["groups"], c["norm_eps"])
        self.conv1 = Conv2d(store, f"{name}.conv1", n_in, n_out)
        self.norm2 = GroupNorm(store, f"{name}.norm2", n_out, c["groups"], c["norm_eps"])
        self.conv2 = Conv2d(store, f"{name}.conv2", n_out, n_out, zero=c["zero_init"])
        self.shortcut = Conv2d(store, f"{name}.conv_shortcut", n_in, n_out, kernel=1) if n_in != n_out else None

    def __call__(self, x: Tensor, emb: Tensor, drop: _Dropout | None) -> Tensor:
        h = self.conv1(self.norm1(x))
        if self.modulate:
            h = self.norm2(h, emb, self.at)
        else:
            h = self.norm2(f.add_columns(h, emb, self.at, inplace=True))
        if drop is not None:
            h = f.dropout(h, drop.rate, drop.seed, drop.step, self.layer, drop.first_sample)
        return f.add(x if self.shortcut is None else self.shortcut(x), self.conv2(h), inplace=True)


class _Level:
    """The blocks at one resolution: residual blocks, each with or without attention, and the change of size at the end."""

    def __init__(self, blocks: list[tuple[_ResBlock, Attention | None]], resize: Conv2d | None) -> None:
        self.blocks, self.resize = blocks, resize


class UNet:
    """A U-Net ε(x, t, y) on NHWC images.

    Levels i = 0.. have ``channels[i]`` channels and images of ``image_size``/2^i; on the way down each has ``blocks`` residual
    blocks, on the way up ``blocks`` + 1, each of which takes one stored activation of the way down beside its input.

    image_size: side, or (height, width); every level but the last must halve evenly.
    attention: sides of the images (heights, where the two differ) at which blocks have self-attention, or one bool for each
        level. ``attention_up``: the same for the way up, by default as on the way down.
    middle: "attention" (block, attention, block), "plain" (two blocks) or "none"; ``middle_groups`` are the groups of its
        attention's norm (default: ``groups``; 0: no norm).
    head_dim: channels of one attention head; None is one head of all channels.
    classes: number of labels; label ``classes`` is the null class (no condition) unless ``null_class`` is False.
    scale_shift: the time scales and shifts the second norm of a block (Dhariwal & Nichol 2021) instead of being added before it.
    time_origin: the network sees t − time_origin: 1 for weights that were trained with times from 0. ``flip_sin_to_cos`` puts
        the cosines first; ``freq_shift`` and ``time_dtype`` as in :func:`~alphabar.nets.layers.time_features`; ``embedding_size``
        is by default 4·channels[0].
    downsample_pad: (1, 1) or (0, 1), zeros before and after each image axis.
    dropout: rate, before each block's second convolution; active where a call names its training ``step``.
    zero_init: start the last convolution of the network, of each residual block and of each attention at zero, as DDPM does.
    seed: key of the initial weights and of dropout. xp: numpy or cupy. dtype: "float32" or "float64".

    Raises ValueError where an option is out of range. ``UNet(**net.config)`` is the same network with its initial weights.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        in_channels: int = 1,
        out_channels: int | None = None,
        channels: Sequence[int] = (32, 64),
        blocks: int = 2,
        attention: Sequence[int] | Sequence[bool] = (),
        attention_up: Sequence[int] | Sequence[bool] | None = None,
        middle: str = "attention",
        middle_groups: int | None = None,
        head_dim: int | None = None,
        groups: int = 8,
        norm_eps: float = 1e-5,
        classes: int | None = None,
        null_class: bool = True,
        dropout: float = 0.0,
        scale_shift: bool = False,
        time_origin: int = 0,
        flip_sin_to_cos: bool = False,
        freq_shift: float = 0.0,
        time_dtype: str = "float64",
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
            "out_channels": in_channels if out_channels is None else out_channels,
            "channels": channels,
            "blocks": blocks,
            "attention": integers("attention", attention),
            "attention_up": None if attention_up is None else integers("attention_up", attention_up),
            "middle": middle,
            "middle_groups": middle_groups,
            "head_dim": head_dim,
            "groups": groups,
            "norm_eps": norm_eps,
            "classes": classes,
            "null_class": null_class,
            "dropout": dropout,
            "scale_shift": scale_shift,
            "time_origin": time_origin,
            "flip_sin_to_cos": flip_sin_to_cos,
            "freq_shift": freq_shift,
            "time_dtype": time_dtype,
            "embedding_size": 4 * sum(channels[:1]) if embedding_size is None else embedding_size,
            "downsample_pad": list(downsample_pad),
            "zero_init": zero_init,
            "seed": seed,
            "dtype": str(np.dtype(dtype)),
        }
        check(config)
        self.config = config
        self.dropout = dropout
        self.params = ParameterStore(seed, xp, dtype)
        self.projections = _Projections()
        self._assemble()
        self.params.build()

    def _assemble(self) -> None:
        c, store = self.config, self.params
        channels, n_emb = c["channels"], c["embedding_size"]
        last = len(channels) - 1
        down, up = (attention_levels(c, key) for key in ("attention", "attention_up"))

        def attend(name: str, width: int, groups: int | None = c["groups"]) -> Attention:
            heads = 1 if c["head_dim"] is None else width // c["head_dim"]
            return Attention(store, name, width, heads, groups, c["norm_eps"], c["zero_init"])

        def block(part: str, j: int, n_in: int, n_out: int, attention: bool) -> tuple[_ResBlock, Attention | None]:
            res = _ResBlock(self, f"{part}.resnets.{j}", n_in, n_out)
            return res, attend(f"{part}.attentions.{j}", n_out) if attention else None

        self.time = TimeEmbedding(
            store, "time_embedding", channels[0], n_emb, c["flip_sin_to_cos"], c["freq_shift"], c["time_dtype"], c["time_origin"]
        )
        rows = 0 if c["classes"] is None else c["classes"] + c["null_class"]
        self.label = Embedding(store, "class_embedding", rows, n_emb) if rows else None
        self.conv_in = Conv2d(store, "conv_in", c["in_channels"], channels[0])

        width, skips = channels[0], [channels[0]]
        self.down: list[_Level] = []
        for i, n in enumerate(channels):
            part = f"down_blocks.{i}"
            pairs = []
            for j in range(c["blocks"]):
                pairs.append(block(part, j, width, n, down[i]))
                width = n
                skips.append(n)
            resize = None
            if i < last:
                resize = Conv2d(store, f"{part}.downsamplers.0.conv", n, n, stride=2, pad=tuple(c["downsample_pad"]))
                skips.append(n)
            self.down.append(_Level(pairs, resize))

        self.middle: list[tuple[_ResBlock, Attention | None]] = []
        if c["middle"] != "none":
            for j in range(2):
                res = _ResBlock(self, f"mid_block.resnets.{j}", width, width)
                attention = None
                if j == 0 and c["middle"] == "attention":
                    groups = c["groups"] if c["middle_groups"] is None else c["middle_groups"] or None
                    attention = attend("mid_block.attentions.0", width, groups)
                self.middle.append((res, attention))

        self.up: list[_Level] = []
        for i, n in enumerate(reversed(channels)):
            part = f"up_blocks.{i}"
            pairs = []
            for j in range(c["blocks"] + 1):
                pairs.append(block(part, j, width + skips.pop(), n, up[last - i]))
                width = n
            resize = Conv2d(store, f"{part}.upsamplers.0.conv", n, n, upsample=True) if i < last else None
            self.up.append(_Level(pairs, resize))

        self.norm_out = GroupNorm(store, "conv_norm_out", width, c["groups"], c["norm_eps"])
        self.conv_out = Conv2d(store, "conv_out", width, c["out_channels"], zero=c["zero_init"])
        self.projection = Linear(store, "time_emb_proj", n_emb, self.projections.width)

    @property
    def null(self) -> int:
        """The label that stands for no condition."""
        if self.config["classes"] is None or not self.config["null_class"]:
            raise ValueError("this network has no null class")
        return self.config["classes"]

    def __call__(
        self, x: Array | Tensor, t: Array, y: Array | None = None, step: int | None = None, first_sample: int = 0
    ) -> Tensor:
        """The network's output, recorded for a backward pass unless under ``no_grad``.

        x (B, H, W, in_channels) of the network's dtype, or a Tensor of it (with ``needs_grad`` for the gradient of the input,
        with a ``tangent`` v for the Jacobian–vector product J v, which is the output's ``tangent``);
        t (B,) the paper's times 1..T, integers or floats; y (B,) labels, None for the null class. ``step`` is the training step
        (from 0) and turns dropout on: its masks depend on the network's seed, the step and the place in the batch, counted from
        ``first_sample``. Returns (B, H, W, out_channels). Raises ValueError or TypeError for arguments that do not fit.
        """
        x = x if isinstance(x, Tensor) else Tensor(x)
        check_input(x.data, (*self.config["image_size"], self.config["in_channels"]), self.params)
        batch = x.shape[0]
        drop = None
        if self.dropout:
            if step is not None:
                drop = _Dropout(self.dropout, self.config["seed"], step, first_sample)
            elif recording() and self.conv_in.weight.needs_grad:
                raise ValueError("a network with dropout needs step=, the training step; evaluate it by predict or under no_grad")

        emb = self.time(check_times(t, batch, self.params.xp))
        if self.label is not None:
            emb = f.add(emb, self.label(self._labels(y, batch)))
        elif y is not None:
            raise ValueError("y is given, but the network has no classes")
        emb = self.projection(f.silu(emb))

        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for res, attention in level.blocks:
                h = res(h, emb, drop)
                h = h if attention is None else attention(h)
                skips.append(h)
            if level.resize is not None:
                h = level.resize(h)
                skips.append(h)
        for res, attention in self.middle:
            h = res(h, emb, drop)
            h = h if attention is None else attention(h)
        for level in self.up:
            for res, attention in level.blocks:
                h = res(f.concat(h, skips.pop()), emb, drop)
                h = h if attention is None else attention(h)
            if level.resize is not None:
                h = level.resize(h)
        return self.conv_out(self.norm_out(h))

    def predict(self, x: Array, t: Array, y: Array | None = None) -> Array:
        """The network's output as an array that is the caller's to keep, without a tape and without dropout.

        Arguments as for a call; x may be of any library that speaks DLPack, and the answer is of the same kind.
        """
        with no_grad():
            out = self(native(x), native(t), native(y)).data.copy()  # the buffer itself may belong to a pool
        return restore(out, x)

    def _labels(self, y: Any, batch: int) -> Array:
        xp, c = self.params.xp, self.config
        if y is None:
            if not c["null_class"]:
                raise ValueError(f"y must be given, labels in 0..{c['classes'] - 1}: the network has no null class")
            return xp.full(batch, c["classes"])
        y = y if is_cupy(y) else np.asarray(y)
        if y.dtype.kind not in "iu":
            raise TypeError(f"y must be integers, not {y.dtype}")
        if y.shape != (batch,):
            raise ValueError(f"y must have shape ({batch},), not {y.shape}")
        rows = c["classes"] + c["null_class"]
        if isinstance(y, np.ndarray) and y.size and not (0 <= y.min() and y.max() < rows):  # labels on a GPU are not waited for
            raise ValueError(f"y must be in 0..{rows - 1}, not {y.min()}..{y.max()}")
        return xp.asarray(y)
