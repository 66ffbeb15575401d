"""The engine's Transformer in PyTorch, from the same equations and the same weights."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


class TorchTransformer:
    """``net``'s function, with its weights as leaves ``self.w``."""

    def __init__(self, net: Any, dtype: torch.dtype | None = None) -> None:
        self.c = net.config
        kind = getattr(torch, self.c["dtype"]) if dtype is None else dtype
        self.kind = kind
        self.w = {k: torch.tensor(np.asarray(v), dtype=kind, requires_grad=True) for k, v in net.params.arrays().items()}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.w[f"{name}.weight"].T, self.w[f"{name}.bias"])

    def norm(self, name: str, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        n = F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)
        return n * (1 + scale[:, None]) + shift[:, None]

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, heads, d) turned by its places, with complex numbers."""
        d = x.shape[-1]
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * 10000.0 ** (
            -torch.arange(0, d, 2, dtype=torch.float64) / d
        )
        pair = torch.complex(x[..., : d // 2], x[..., d // 2 :])
        pair = pair * torch.polar(torch.ones_like(angle), angle)[:, None].to(pair.dtype)
        return torch.cat([pair.real, pair.imag], -1)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        b, length, width = x.shape
        heads = self.c["heads"]
        q, k, v = (self.linear(f"{name}.to_{z}", x).reshape(b, length, heads, width // heads) for z in "qkv")
        if self.c["positions"] == "rotary":
            q, k = self.turned(q), self.turned(k)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.linear(f"{name}.to_out.0", o.transpose(1, 2).reshape(b, length, width))

    def trunk(self, x: torch.Tensor, t: Any, y: Any = None) -> torch.Tensor:
        width = self.c["width"]
        angle = torch.as_tensor(np.asarray(t, np.float64)).expand(len(x))[:, None] * 10000.0 ** (
            -torch.arange(width // 2, dtype=torch.float64) / (width // 2)
        )
        emb = torch.cat([torch.sin(angle), torch.cos(angle)], 1).to(self.kind)
        emb = self.linear("time_embedding.linear_2", F.silu(self.linear("time_embedding.linear_1", emb)))
        if y is not None:
            emb = emb + self.w["class_embedding.weight"][torch.as_tensor(y)]
        emb = self.linear("time_emb_proj", F.silu(emb))
        *blocks, last = emb.split([6 * width] * self.c["layers"] + [2 * width], 1)
        if self.c["positions"] == "learned":
            x = x + self.w["positions.weight"]
        for i, part in enumerate(blocks):
            scale1, shift1, gate1, scale2, shift2, gate2 = (v for v in part.chunk(6, 1))
            h = self.attention(f"blocks.{i}.attention", self.norm(f"blocks.{i}.norm1", x, scale1, shift1))
            x = x + gate1[:, None] * h
            h = self.linear(f"blocks.{i}.mlp.up", self.norm(f"blocks.{i}.norm2", x, scale2, shift2))
            x = x + gate2[:, None] * self.linear(f"blocks.{i}.mlp.down", F.silu(h))
        return self.norm("norm_out", x, *last.chunk(2, 1))

    def __call__(self, x: Any, t: Any, y: Any = None) -> torch.Tensor:
        h = self.linear("linear_in", x) if self.c["features_in"] else F.embedding(torch.as_tensor(x), self.w["embedding.weight"])
        return self.linear("linear_out", self.trunk(h, t, y))
