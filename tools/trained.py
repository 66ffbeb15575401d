"""A network as a checkpoint keeps it: what sampling and evaluation begin with."""

from pathlib import Path
from typing import Any, NamedTuple

from alphabar.nets.checkpoint import CheckpointError
from alphabar.tools import config as configs
from alphabar.tools import families, networks, runs
from alphabar.tools.command import from_environment
from alphabar.tools.config import Config
from alphabar.tools.trainer import check_kind, group_of, load_weights


class Trained(NamedTuple):
    """A network with its weights, and what is known of its training."""

    path: Path  # the checkpoint file
    net: Any  # a UNet, or another kind of network
    config: Config
    classes: tuple[str, ...]  # their names; none where the network knows no classes
    step: int
    process: Any  # of its method
    shape: tuple[int, ...]  # of one sample


def load(path: Path, raw_weights: bool, xp: Any) -> Trained:
    """The network of a checkpoint, a run folder or a folder of runs, with averaged or raw weights, on NumPy or CuPy.

    Raises CheckpointError with the file and the reason.
    """
    path, arrays, meta = runs.read(path)
    check_kind(path, meta)
    try:
        config = configs.from_dict(meta["config"])
        net = networks.build(meta.get("network", "unet"), meta["model"], xp)
        names = tuple(map(str, meta["data"]["classes"]))
        shape = tuple(map(int, meta["data"].get("shape") or (*net.config["image_size"], net.config["in_channels"])))
        process = families.of(config).process(config, shape, group_of(arrays, networks.LAW))
    except (TypeError, ValueError, KeyError, IndexError) as e:
        if from_environment(e):
            raise
        raise CheckpointError(path, f"its network or configuration cannot be built: {e}") from e
    load_weights(path, net, arrays, "weights" if raw_weights else "ema")
    classes = names if net.config.get("classes") is not None else ()
    if classes and len(classes) != net.config["classes"]:
        raise CheckpointError(path, f"names {len(classes)} classes, its network has {net.config['classes']}")
    return Trained(path, net, config, classes, meta["step"], process, shape)


def class_number(text: str, classes: tuple[str, ...]) -> int | None:
    """The number of a class given by its name or its number; None where there is no such class."""
    if text in classes:  # before the number: a class may be named "1" and have another number
        return classes.index(text)
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(classes):
        return int(text)
    return None
