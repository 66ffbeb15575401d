"""The kinds of network that a checkpoint may hold, and how one is built from a configuration or from a checkpoint."""

from collections.abc import Mapping
from typing import Any, Protocol

from alphabar.core.data import Dataset
from alphabar.nets.autograd import Tensor
from alphabar.nets.layers import ParameterStore
from alphabar.nets.transformer import Transformer
from alphabar.nets.unet import UNet
from alphabar.nets.word_diffusion import WordDiffusion
from alphabar.tools.command import from_environment
from alphabar.tools.config import Config, ConfigError

Array = Any


class Network(Protocol):
    """What the tools ask of a network, whatever its kind."""

    config: dict[str, Any]
    params: ParameterStore
    compute: str

    @property
    def computes(self) -> str:
        """What ``compute`` comes to on its device."""

    @property
    def null(self) -> int:
        """The label that stands for no condition."""

    def __call__(self, x: Any, t: Any, y: Any = None, step: int | None = None) -> Tensor: ...

    def predict(self, x: Any, t: Any, y: Any = None) -> Array: ...


LAW = "law"  # the group of a checkpoint's arrays that its process is made of, besides its configuration
KINDS: dict[str, Any] = {"unet": UNet, "transformer": Transformer, "word-diffusion": WordDiffusion}  # as a checkpoint names them


def kind_of(net: Network) -> str:
    """The name of a network's kind."""
    return next(name for name, cls in KINDS.items() if type(net) is cls)


def build(kind: str, options: Mapping[str, Any], xp: Any) -> Any:
    """A network of a kind, such as that of a checkpoint. ValueError or TypeError where there is none with these options."""
    if kind not in KINDS:
        raise ValueError(f"network must be one of {', '.join(KINDS)}, not {kind!r}")
    return KINDS[kind](**options, xp=xp)


def made(kind: str, options: Mapping[str, Any], xp: Any, what: str) -> Any:
    """A network for ``what``, as a configuration asks for it. ConfigError where its settings do not fit."""
    try:
        return build(kind, options, xp)
    except ValueError as e:
        if from_environment(e):
            raise
        raise ConfigError(f"these settings make no network for {what}: {e}") from e


def compute_in(net: Network, precision: str) -> str | None:
    """Let a network compute in one of ``COMPUTE``. A line to tell the user where that comes to something else, else None."""
    net.compute = precision
    if net.computes == precision:
        return None
    if net.computes == "fp32":
        return f"precision   float32, not {precision}: that is for a GPU"
    return f"precision   {net.computes}: {precision} is for U-Nets"


def unet_options(config: Config, data: Dataset, inside: int | None = None, out: int | None = None) -> dict[str, Any]:
    """Arguments of a U-Net for this configuration and these images, of ``inside`` channels to ``out`` (as many as they have)."""
    m, (height, width, channels) = config.model, data.shape
    return {
        "image_size": (height, width),
        "in_channels": inside or channels,
        **({"out_channels": out} if out else {}),
        "channels": m.channels,
        "blocks": m.blocks,
        "attention": tuple(side or height >> (len(m.channels) - 1) for side in m.attention),
        "groups": m.groups,
        "dropout": m.dropout,
        "scale_shift": m.scale_shift,
        "classes": classes(config, data),
        "seed": config.train.seed,
    }


def transformer_options(config: Config, data: Any, length: int, states: int, out: int) -> dict[str, Any]:
    """Arguments of a transformer for this configuration that reads ``length`` states and answers ``out`` numbers for each."""
    m = config.model
    return {
        "length": length,
        "states": states,
        "out": out,
        "width": m.width,
        "layers": m.layers,
        "heads": m.heads,
        "positions": m.positions,
        "classes": classes(config, data),
        "dropout": m.dropout,
        "seed": config.train.seed,
    }


def classes(config: Config, data: Any) -> int | None:
    """How many classes a network learns; None for none."""
    return len(data.classes) if config.model.conditional and data.labels is not None else None
