"""The networks that are compared: one set of weights in diffusers' format, read by diffusers' UNet2DModel and by alphabar."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alphabar import nets
from alphabar.core import data
from alphabar.nets.diffusers import save_diffusers_unet
from alphabar.tools import networks
from alphabar.tools.config import Config

T = 1000


@dataclass(frozen=True)
class Example:
    """Noisy images (B, H, W, C), their times 1..T, the noise in them and their labels or None."""

    x_t: np.ndarray
    t: np.ndarray
    eps: np.ndarray
    y: np.ndarray | None

    @property
    def batch(self) -> int:
        """How many images."""
        return len(self.x_t)


def _peer_config(head_dim: int | None) -> dict[str, Any]:
    attention = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    return {
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (64, 128, 128, 128),
        "layers_per_block": 2,
        "down_block_types": attention,
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(attention)),
        "norm_num_groups": 32,
        "attention_head_dim": head_dim,
    }


def _save_peer(folder: Path, head_dim: int | None) -> None:
    """UNet2DModel as it is but for the sizes, with PyTorch's own initial weights."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model: Any = UNet2DModel(**_peer_config(head_dim))
    model.save_pretrained(folder)


def _save_digits(folder: Path) -> None:
    """The network of the default training run; its last layer does not start at zero, so that all gradients say something."""
    options = networks.unet_options(Config(), data.load("digits"))
    save_diffusers_unet(nets.UNet(**options, zero_init=False), folder)


SAVE: dict[str, Callable[[Path], None]] = {
    "peer": lambda folder: _save_peer(folder, 8),  # 16 heads: what attention_head_dim is unless it is given
    "peer, one head": lambda folder: _save_peer(folder, None),  # as in the networks of DDPM
    "digits": _save_digits,
}


def saved(name: str, folder: Path) -> Path:
    """The folder with the weights of the network ``name``, inside ``folder``; made where it is not there."""
    at = folder / name.replace(", ", "-").replace(" ", "-")
    if not at.exists():
        SAVE[name](at)
    return at


def ours(folder: Path, dtype: str = "float32") -> nets.UNet:
    """alphabar's network of a folder; the last class is that of no condition."""
    return nets.load_diffusers_unet(folder, dtype=dtype, null_class=(_classes(folder) or 0) > 1)


def theirs(folder: Path) -> Any:
    """diffusers' network of a folder, in training mode (there is no dropout)."""
    from diffusers import UNet2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns at every cast to float64
    return UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).train()


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _classes(folder: Path) -> int | None:
    return _config(folder)["num_class_embeds"]


def example(folder: Path, batch: int, seed: int = 0) -> Example:
    """Random numbers in the place of images: their values do not change what a step costs."""
    c, rng = _config(folder), np.random.default_rng(seed)
    shape = (batch, c["sample_size"], c["sample_size"], c["in_channels"])
    x_t, eps = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    classes = _classes(folder)
    return Example(x_t, rng.integers(1, T + 1, batch), eps, None if classes is None else rng.integers(0, classes, batch))
