"""Where samples come from: images, or text, by the path that a configuration names."""

from typing import Any

from alphabar.core import data, text
from alphabar.core.text import Text
from alphabar.tools import config as configs
from alphabar.tools.config import Config

BUILT_IN = (*data.BUILT_IN, *text.BUILT_IN)
UNITS = {"images": "images", "text": "windows"}  # what the samples are called


def load(config: Config, split: str | None = None, path: str | None = None) -> Any:
    """The data set of a configuration, another split of it, or other data like it. DataError for what cannot be used."""
    d = config.data
    split, path = split or d.split, path or d.path
    return text.load(path, split, d.length) if configs.data_kind(config) == "text" else data.load(path, split)


def kind(samples: Any) -> str:
    """What a data set holds: "images" or "text"."""
    return "text" if isinstance(samples, Text) else "images"


def described(samples: Any) -> str:
    """The number of samples and the size of one, in words."""
    return f"{len(samples):,} {UNITS[kind(samples)]} {'×'.join(map(str, samples.shape))}"
