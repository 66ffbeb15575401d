"""U-Nets of the diffusers library, read and written without it: config JSON and safetensors, NCHW layouts only at this door."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..kernels.arrays import to_numpy
from .checkpoint import CheckpointError
from .unet import UNet
from .unet_config import attention_levels

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

# UNet2DModel's own defaults; a config may leave out what it does not change
DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# what this U-Net can take of the options that it has no parameter for
SUPPORTED: dict[str, tuple] = {
    "_class_name": ("UNet2DModel",),
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D", None),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "downsample_padding": (0, 1),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
}
ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # new names, and those of old files


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("reading and writing .safetensors needs the package safetensors: pip install safetensors") from error
    return safetensors.numpy


def _options(config: dict[str, Any], image_size: int | Sequence[int] | None, null_class: bool) -> dict[str, Any]:
    """The arguments of :class:`UNet` for a UNet2DModel's config."""
    c = DEFAULTS | config
    for key, values in SUPPORTED.items():
        if c.get(key, values[0]) not in values:
            raise ValueError(f"{key} = {c[key]!r} is not supported, only {', '.join(map(repr, values))}")
    for key, plain in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
        if wrong := [kind for kind in c[key] if kind not in (plain, f"Attn{plain}")]:
            raise ValueError(f"{key} holds {wrong[0]!r}, only {plain!r} and 'Attn{plain}' are supported")
        if len(c[key]) != len(c["block_out_channels"]):
            raise ValueError(f"{key} must have one entry for each of block_out_channels {c['block_out_channels']}, not {c[key]}")
    size = c["sample_size"] if image_size is None else image_size
    if size is None:
        raise ValueError("the config has no sample_size: pass image_size")
    modulate = c["resnet_time_scale_shift"] == "scale_shift"
    middle_groups = c["attn_norm_num_groups"] or (0 if modulate else None)
    classes = c["num_class_embeds"]
    return {
        "image_size": size,
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "channels": c["block_out_channels"],
        "blocks": c["layers_per_block"],
        "attention": [kind.startswith("Attn") for kind in c["down_block_types"]],
        "attention_up": [kind.startswith("Attn") for kind in reversed(c["up_block_types"])],
        "middle": "none" if c["mid_block_type"] is None else "attention" if c["add_attention"] else "plain",
        "middle_groups": middle_groups,
        "head_dim": c["attention_head_dim"],
        "groups": c["norm_num_groups"],
        "norm_eps": c["norm_eps"],
        "classes": None if classes is None else classes - null_class,
        "null_class": null_class,
        "dropout": c["dropout"],
        "scale_shift": modulate,
        "time_origin": 1,
        "flip_sin_to_cos": c["flip_sin_to_cos"],
        "freq_shift": c["freq_shift"],
        "time_dtype": "float32",
        "embedding_size": c["time_embedding_dim"],
        "downsample_pad": (1, 1) if c["downsample_padding"] == 1 else (0, 1),
    }


def load_diffusers_unet(
    config: str | Path,
    weights: str | Path | None = None,
    dtype: str = "float32",
    xp: Any = np,
    image_size: int | Sequence[int] | None = None,
    null_class: bool = False,
) -> UNet:
    """The network of a diffusers UNet2DModel: same output for NHWC images and the paper's times t = 1..T (its own count from 0).

    config: the folder of a saved model (config.json, diffusion_pytorch_model.safetensors), or the JSON file, and then weights is
    the .safetensors file. image_size replaces the config's sample_size; null_class: its last class embedding means no condition.
    Needs the package safetensors (else ImportError). Raises CheckpointError, with the file's path, for what is not a UNet2DModel
    that this U-Net can express, and where weights and config do not fit.
    """
    config = Path(config)
    if config.is_dir():
        config, weights = config / CONFIG, config / WEIGHTS if weights is None else weights
    if weights is None:
        raise ValueError("weights must be given where config is not a folder")
    try:
        options = _options(json.loads(config.read_text(encoding="utf-8")), image_size, null_class)
        net = UNet(**options, zero_init=False, xp=xp, dtype=dtype)
    except (ValueError, TypeError) as error:
        raise CheckpointError(config, str(error)) from error
    numpy_api = _safetensors()
    try:
        given = numpy_api.load_file(weights)
        net.params.load(_from_diffusers(net, given))
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors has error types of its own
        raise CheckpointError(weights, str(error)) from error
    return net


def _from_diffusers(net: UNet, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our names and layouts. A projection of one block becomes columns of the one projection of all."""
    new_names = {old: new for new, old in ATTENTION.items()}
    ours: dict[str, np.ndarray] = {}
    for name, value in given.items():
        head, _, kind = name.rpartition(".")
        stem, _, leaf = head.rpartition(".")
        ours[f"{stem}.{new_names[leaf]}.{kind}" if leaf in new_names else name] = value
    for kind in ("weight", "bias"):
        names = [f"{block}.time_emb_proj.{kind}" for block, _, _ in net.projections.blocks]
        if missing := [name for name in names if name not in ours]:
            raise ValueError(f"weights do not fit: missing {missing[:5]}")
        ours[f"time_emb_proj.{kind}"] = np.concatenate([ours.pop(name) for name in names])
    for name, value in ours.items():
        if name.endswith(".weight") and name != "class_embedding.weight":
            if value.ndim == 4:  # OIHW to HWIO
                value = value.transpose(2, 3, 1, 0)
            elif value.ndim == 2:
                value = value.T
            if name in net.params and value.ndim == 2 and len(net.params[name].shape) == 4:  # a linear map of pixels
                value = value[None, None]
        ours[name] = value
    return ours


def save_diffusers_unet(net: UNet, folder: str | Path) -> None:
    """Write the network as diffusers' UNet2DModel saves it: a folder with config.json and diffusion_pytorch_model.safetensors.

    The model written counts times from 0. Where the network counts otherwise, its first time layer is turned: sine and cosine of
    ω(t + k) are a rotation of those of ωt. The null class becomes the last class embedding. Needs the package safetensors. Raises
    ValueError for a network that UNet2DModel cannot express.
    """
    numpy_api = _safetensors()
    c = net.config
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if c["middle_groups"] == 0 and not c["scale_shift"] and c["middle"] == "attention":
        raise ValueError("UNet2DModel has no middle attention without norm (middle_groups = 0) unless scale_shift is True")
    middle_groups = c["middle_groups"] or (None if c["middle_groups"] == 0 or not c["scale_shift"] else c["groups"])
    height = c["image_size"][0]

    def kinds(key: str, plain: str) -> list[str]:
        return [f"Attn{plain}" if attend else plain for attend in attention_levels(c, key)]

    config = DEFAULTS | {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == c["image_size"][1] else c["image_size"],
        "in_channels": c["in_channels"],
        "out_channels": c["out_channels"],
        "time_embedding_dim": c["embedding_size"],
        "freq_shift": c["freq_shift"],
        "flip_sin_to_cos": c["flip_sin_to_cos"],
        "down_block_types": kinds("attention", "DownBlock2D"),
        "mid_block_type": None if c["middle"] == "none" else "UNetMidBlock2D",
        "up_block_types": kinds("attention_up", "UpBlock2D")[::-1],
        "block_out_channels": c["channels"],
        "layers_per_block": c["blocks"],
        "downsample_padding": 1 if c["downsample_pad"] == [1, 1] else 0,
        "dropout": c["dropout"],
        "attention_head_dim": c["head_dim"],
        "norm_num_groups": c["groups"],
        "attn_norm_num_groups": middle_groups,
        "norm_eps": c["norm_eps"],
        "resnet_time_scale_shift": "scale_shift" if c["scale_shift"] else "default",
        "add_attention": c["middle"] == "attention",
        "num_class_embeds": None if net.label is None else net.label.table.shape[0],
    }
    numpy_api.save_file(_to_diffusers(net), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _to_diffusers(net: UNet) -> dict[str, np.ndarray]:
    ours = {name: to_numpy(value) for name, value in net.params.arrays().items()}
    ours["time_embedding.linear_1.weight"] = _turned(net, ours["time_embedding.linear_1.weight"])
    weight, bias = ours.pop("time_emb_proj.weight"), ours.pop("time_emb_proj.bias")
    for block, at, columns in net.projections.blocks:
        ours[f"{block}.time_emb_proj.weight"] = weight[:, at : at + columns]
        ours[f"{block}.time_emb_proj.bias"] = bias[at : at + columns]
    for name, value in ours.items():
        if name.endswith(".weight") and name != "class_embedding.weight":
            if any(f".{leaf}." in name for leaf in ATTENTION):
                value = value[0, 0].T
            elif value.ndim == 4:
                value = value.transpose(3, 2, 0, 1)
            elif value.ndim == 2:
                value = value.T
        ours[name] = np.ascontiguousarray(value)
    return ours


def _turned(net: UNet, weight: np.ndarray) -> np.ndarray:
    """The weight of the first time layer for times counted from 0: with θ = ω·(1 − time_origin),

    sin(ωt + θ) = cos θ·sin ωt + sin θ·cos ωt;  cos(ωt + θ) = cos θ·cos ωt − sin θ·sin ωt.
    """
    shift = 1 - net.config["time_origin"]
    if shift == 0:
        return weight
    features = net.time.features(np.array([float(net.config["time_origin"] + shift)]))[0]  # of θ = ω·shift
    half = len(features) // 2
    first, second = weight[:half].astype(np.float64), weight[half:].astype(np.float64)
    if net.config["flip_sin_to_cos"]:
        cosine, sine = features[:half, None], features[half:, None]
        pair = (cosine * first + sine * second, cosine * second - sine * first)
    else:
        sine, cosine = features[:half, None], features[half:, None]
        pair = (cosine * first - sine * second, sine * first + cosine * second)
    return np.concatenate(pair).astype(weight.dtype)
