"""What networks are built of besides layers: dropout, projections of the time, residual blocks and levels of a U-Net."""

from dataclasses import dataclass
from typing import Any

from . import functions as f
from .autograd import Tensor, recording
from .layers import Attention, Conv2d, GroupNorm, norm_conv


@dataclass(frozen=True)
class Dropout:
    """Dropout of one training step: what a mask depends on besides the layer."""

    rate: float
    seed: int
    step: int
    first_sample: int

    def __call__(self, x: Tensor, layer: int) -> Tensor:
        return f.dropout(x, self.rate, self.seed, self.step, layer, self.first_sample)


def dropout_of(net: Any, step: int | None, first_sample: int) -> Dropout | None:
    """The dropout of a call of ``net`` at a training step; None where the network has none, and where it is only evaluated.

    Raises ValueError where a network with dropout is trained without a step.
    """
    c, params = net.config, net.params
    if not c["dropout"]:
        return None
    if step is not None:
        return Dropout(c["dropout"], c["seed"], step, first_sample)
    if recording() and params[next(iter(params))].needs_grad:
        raise ValueError("a network with dropout needs step=, the training step; evaluate it by predict or under no_grad")
    return None


class Projections:
    """All blocks' projections of the time embedding as one linear layer; a block reads its columns."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, int, int]] = []  # name, first column, columns
        self.width = 0

    def take(self, name: str, columns: int) -> int:
        at = self.width
        self.blocks.append((name, at, columns))
        self.width += columns
        return at


class ResBlock:
    """y = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time))); or the time scales and shifts norm2's output.

    Where a call gives a ``tail``, [x, tail] stands for x; no array of both is made.
    """

    def __init__(self, net: Any, name: str, n_in: int, n_out: int) -> None:
        c, store = net.config, net.params
        self.modulate = c["scale_shift"]
        self.layer = len(net.projections.blocks)
        self.at = net.projections.take(name, 2 * n_out if self.modulate else n_out)
        self.norm1 = GroupNorm(store, f"{name}.norm1", n_in, c["groups"], c["norm_eps"])
        self.conv1 = Conv2d(store, f"{name}.conv1", n_in, n_out)
        self.norm2 = GroupNorm(store, f"{name}.norm2", n_out, c["groups"], c["norm_eps"])
        self.conv2 = Conv2d(store, f"{name}.conv2", n_out, n_out, zero=c["zero_init"])
        self.shortcut = Conv2d(store, f"{name}.conv_shortcut", n_in, n_out, kernel=1) if n_in != n_out else None

    def __call__(self, x: Tensor, emb: Tensor, drop: Dropout | None, tail: Tensor | None = None) -> Tensor:
        time = (emb, self.at)
        scaled, added = (time, None) if self.modulate else (None, time)
        h = norm_conv(self.norm1, self.conv1, x, tail=tail, added=added)
        if (short := self.shortcut) is not None:
            x = short(x) if tail is None else f.conv1x1(x, tail, short.weight, short.bias)
        if drop is None:
            return norm_conv(self.norm2, self.conv2, h, scaled, residual=x)
        return self.conv2(drop(self.norm2(h, *(scaled or ())), self.layer), residual=x)


class Level:
    """The blocks at one resolution: residual blocks, each with or without attention, and the change of size at the end."""

    def __init__(self, blocks: list[tuple[ResBlock, Attention | None]], resize: Conv2d | None) -> None:
        self.blocks, self.resize = blocks, resize
