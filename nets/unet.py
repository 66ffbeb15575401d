"""The U-Net of DDPM (Ho et al. 2020, appendix B) and its common variants; it can express diffusers' UNet2DModel exactly."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..kernels import dispatch
from ..kernels.bf16 import BF16
from . import functions as f
from .autograd import Tensor
from .blocks import Dropout, Level, Projections, ResBlock, dropout_of
from .computing import computed
from .conditional import Conditional
from .inputs import check_input, check_times
from .layers import Attention, Conv2d, Embedding, GroupNorm, Linear, ParameterStore, TimeEmbedding, norm_conv
from .plans import Plans
from .unet_config import attention_levels, check, integers

Array = Any


class UNet(Conditional):
    """A U-Net ε(x, t, y) on NHWC images. Eq: S4-E81.

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
    ``net.compute``: "fp32", "tf32" or "bf16", see :class:`~alphabar.nets.computing.Computing`.
    """

    takes_bf16 = True

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
        self.params = ParameterStore(seed, xp, dtype)
        self.projections = Projections()
        self._assemble()
        self.params.build()
        self.plans = Plans(self.params)

    def _assemble(self) -> None:
        c, store = self.config, self.params
        channels, n_emb = c["channels"], c["embedding_size"]
        last = len(channels) - 1
        down, up = (attention_levels(c, key) for key in ("attention", "attention_up"))

        def attend(name: str, width: int, groups: int | None = c["groups"]) -> Attention:
            heads = 1 if c["head_dim"] is None else width // c["head_dim"]
            return Attention(store, name, width, heads, groups, c["norm_eps"], c["zero_init"])

        def block(part: str, j: int, n_in: int, n_out: int, attention: bool) -> tuple[ResBlock, Attention | None]:
            res = ResBlock(self, f"{part}.resnets.{j}", n_in, n_out)
            return res, attend(f"{part}.attentions.{j}", n_out) if attention else None

        self.time = TimeEmbedding(
            store, "time_embedding", channels[0], n_emb, c["flip_sin_to_cos"], c["freq_shift"], c["time_dtype"], c["time_origin"]
        )
        self.label = Embedding(store, "class_embedding", self.label_rows, n_emb) if self.label_rows else None
        self.conv_in = Conv2d(store, "conv_in", c["in_channels"], channels[0])

        width, skips = channels[0], [channels[0]]
        self.down: list[Level] = []
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
            self.down.append(Level(pairs, resize))

        self.middle: list[tuple[ResBlock, Attention | None]] = []
        if c["middle"] != "none":
            for j in range(2):
                res = ResBlock(self, f"mid_block.resnets.{j}", width, width)
                attention = None
                if j == 0 and c["middle"] == "attention":
                    groups = c["groups"] if c["middle_groups"] is None else c["middle_groups"] or None
                    attention = attend("mid_block.attentions.0", width, groups)
                self.middle.append((res, attention))

        self.up: list[Level] = []
        for i, n in enumerate(reversed(channels)):
            part = f"up_blocks.{i}"
            pairs = []
            for j in range(c["blocks"] + 1):
                pairs.append(block(part, j, width + skips.pop(), n, up[last - i]))
                width = n
            resize = Conv2d(store, f"{part}.upsamplers.0.conv", n, n, upsample=True) if i < last else None
            self.up.append(Level(pairs, resize))

        self.norm_out = GroupNorm(store, "conv_norm_out", width, c["groups"], c["norm_eps"])
        self.conv_out = Conv2d(store, "conv_out", width, c["out_channels"], zero=c["zero_init"])
        self.projection = Linear(store, "time_emb_proj", n_emb, self.projections.width)

    @computed
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
        x = check_input(x, (*self.config["image_size"], self.config["in_channels"]), self.params)
        batch = x.shape[0]
        drop = dropout_of(self, step, first_sample)
        times, labels = check_times(t, batch, self.params.xp), self.labels(y, batch)
        if drop is not None or x.needs_grad or x.tangent is not None:
            return self._body(x, times, labels, drop)
        inputs = (x.data, times) if labels is None else (x.data, times, labels.astype("int64", copy=False))
        return self.plans(self._body, *inputs)

    def _body(self, x: Array | Tensor, times: Array, labels: Array | None = None, drop: Dropout | None = None) -> Tensor:
        emb = self.time(times)
        if self.label is not None:
            emb = f.add(emb, self.label(labels))
        emb = self.projection(f.silu(emb))

        x = x if isinstance(x, Tensor) else Tensor(x)
        if self.params.low is not None and x.tangent is None and dispatch.chosen() == "auto":
            x = f.cast(x, BF16)
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
                h = res(h, emb, drop, skips.pop())
                h = h if attention is None else attention(h)
            if level.resize is not None:
                h = level.resize(h)
        return norm_conv(self.norm_out, self.conv_out, h, dtype=self.params.dtype)
