"""The U-Net of DDPM in PyTorch as its users write it: modules, NCHW inside, scaled_dot_product_attention; our names of weights.

Whole steps on a GPU are compared with it, so that the two sides have the same network whatever packages are there.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from alphabar.nets.unet_config import attention_levels

Tensor = torch.Tensor


class Block(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time)))."""

    def __init__(self, n_in: int, n_out: int, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, n_in, eps), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, n_out, eps), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.time = nn.Linear(size, n_out)
        self.conv_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """x + out(attention(q, k, v)) over all places of the normalised x."""

    def __init__(self, width: int, heads: int, groups: int, eps: float) -> None:
        super().__init__()
        self.heads, self.group_norm = heads, nn.GroupNorm(groups, width, eps)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, length = x.shape
        tokens = self.qkv(self.group_norm(x)).reshape(batch, 3, self.heads, width // self.heads, height * length)
        q, k, v = (z.transpose(2, 3) for z in tokens.unbind(1))
        o = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(o.transpose(2, 3).reshape(x.shape))


class UNet(nn.Module):
    """What :class:`alphabar.nets.UNet` of this ``config`` computes, NCHW; ε(x, t, y). Of its variants the plain ones alone."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        c = self.config = config
        plain = {"scale_shift": False, "dropout": 0.0, "attention_up": None, "middle": "attention", "middle_groups": None}
        if other := [k for k, v in plain.items() if c[k] != v]:
            raise ValueError(f"this twin knows no other {', '.join(other)} than the plain one")
        channels, size, groups, eps = c["channels"], c["embedding_size"], c["groups"], c["norm_eps"]
        levels = attention_levels(c, "attention")
        half = channels[0] // 2
        self.omega: Tensor
        self.register_buffer("omega", torch.exp(-math.log(10000) * torch.arange(half).double() / (half - c["freq_shift"])))
        self.linear_1, self.linear_2 = nn.Linear(channels[0], size), nn.Linear(size, size)
        rows = 0 if c["classes"] is None else c["classes"] + c["null_class"]
        self.label: Any = nn.Embedding(rows, size) if rows else None
        self.conv_in = nn.Conv2d(c["in_channels"], channels[0], 3, padding=1)

        def attend(width: int) -> Attention:
            return Attention(width, 1 if c["head_dim"] is None else width // c["head_dim"], groups, eps)

        def pair(n_in: int, n_out: int, attention: bool) -> nn.ModuleList:
            return nn.ModuleList([Block(n_in, n_out, size, groups, eps), *([attend(n_out)] if attention else [])])

        width, skips = channels[0], [channels[0]]
        self.down: Any = nn.ModuleList()
        self.shrink: Any = nn.ModuleList()
        for i, n in enumerate(channels):
            pairs = nn.ModuleList()
            for _ in range(c["blocks"]):
                pairs.append(pair(width, n, levels[i]))
                width = n
                skips.append(n)
            self.down.append(pairs)
            if i < len(channels) - 1:
                self.shrink.append(nn.Conv2d(n, n, 3, stride=2))
                skips.append(n)
        self.middle: Any = nn.ModuleList(
            [Block(width, width, size, groups, eps), attend(width), Block(width, width, size, groups, eps)]
        )
        self.up: Any = nn.ModuleList()
        self.grow: Any = nn.ModuleList()
        for i, n in reversed(list(enumerate(channels))):
            pairs = nn.ModuleList()
            for _ in range(c["blocks"] + 1):
                pairs.append(pair(width + skips.pop(), n, levels[i]))
                width = n
            self.up.append(pairs)
            if i:
                self.grow.append(nn.Conv2d(n, n, 3, padding=1))
        self.norm_out, self.conv_out = nn.GroupNorm(groups, width, eps), nn.Conv2d(width, c["out_channels"], 3, padding=1)

    def features(self, t: Tensor) -> Tensor:
        """Sines and cosines of the times."""
        angle = (t.double() - self.config["time_origin"])[:, None] * self.omega
        pair = [angle.sin(), angle.cos()]
        return torch.cat(pair[::-1] if self.config["flip_sin_to_cos"] else pair, 1).float()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.linear_2(F.silu(self.linear_1(self.features(t).to(self.linear_1.weight.dtype))))
        if self.label is not None:
            emb = emb + self.label(y)
        emb = F.silu(emb)
        before, after = self.config["downsample_pad"]

        h = self.conv_in(x)
        skips = [h]
        for i, pairs in enumerate(self.down):
            for block, *attention in pairs:
                h = block(h, emb)
                h = attention[0](h) if attention else h
                skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](F.pad(h, (before, after, before, after)))
                skips.append(h)
        first, attention, last = self.middle
        h = last(attention(first(h, emb)), emb)
        for i, pairs in enumerate(self.up):
            for block, *attention in pairs:
                h = block(torch.cat([h, skips.pop()], 1), emb)
                h = attention[0](h) if attention else h
            if i < len(self.grow):
                h = self.grow[i](F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(h)))

    @torch.no_grad()
    def load(self, net: Any) -> "UNet":
        """Take the weights of one of our networks with the same configuration; returns itself."""
        given = {name: torch.from_numpy(np.asarray(a)) for name, a in net.params.arrays().items()}

        def put(module: Any, name: str) -> None:
            w = given.pop(f"{name}.weight")
            turned = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[w.ndim]  # HWIO to OIHW, (in, out) to (out, in)
            module.weight.copy_(w if isinstance(module, nn.Embedding) else w.permute(turned))
            if f"{name}.bias" in given:
                module.bias.copy_(given.pop(f"{name}.bias"))

        all_times = [given.pop(f"time_emb_proj.{kind}") for kind in ("weight", "bias")]
        columns = {name: (at, width) for name, at, width in net.projections.blocks}

        def put_block(block: Any, name: str) -> None:
            for part in ("norm1", "conv1", "norm2", "conv2", "conv_shortcut"):
                if getattr(block, part) is not None:
                    put(getattr(block, part), f"{name}.{part}")
            at, width = columns[name]
            block.time.weight.copy_(all_times[0][:, at : at + width].T)
            block.time.bias.copy_(all_times[1][at : at + width])

        def put_attention(module: Any, name: str) -> None:
            put(module.group_norm, f"{name}.group_norm")
            put(module.out, f"{name}.to_out.0")
            parts = [[given.pop(f"{name}.to_{z}.{kind}") for z in "qkv"] for kind in ("weight", "bias")]
            module.qkv.weight.copy_(torch.cat([w.permute(3, 2, 0, 1) for w in parts[0]]))
            module.qkv.bias.copy_(torch.cat(parts[1]))

        put(self.linear_1, "time_embedding.linear_1")
        put(self.linear_2, "time_embedding.linear_2")
        if self.label is not None:
            put(self.label, "class_embedding")
        put(self.conv_in, "conv_in")
        put(self.norm_out, "conv_norm_out")
        put(self.conv_out, "conv_out")
        for way, side in (("down", self.down), ("up", self.up)):
            for i, pairs in enumerate(side):
                for j, (block, *attention) in enumerate(pairs):
                    put_block(block, f"{way}_blocks.{i}.resnets.{j}")
                    if attention:
                        put_attention(attention[0], f"{way}_blocks.{i}.attentions.{j}")
        for i, conv in enumerate(self.shrink):
            put(conv, f"down_blocks.{i}.downsamplers.0.conv")
        for i, conv in enumerate(self.grow):
            put(conv, f"up_blocks.{i}.upsamplers.0.conv")
        put_block(self.middle[0], "mid_block.resnets.0")
        put_attention(self.middle[1], "mid_block.attentions.0")
        put_block(self.middle[2], "mid_block.resnets.1")
        if given:
            raise ValueError(f"weights that this twin has no place for: {', '.join(given)}")
        return self
