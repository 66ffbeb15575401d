"""What a training step works on: a learner owns the network and the process, and tells the trainer losses and gradients."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from alphabar.core import guidance
from alphabar.core.data import to_unit
from alphabar.nets.autograd import Tensor
from alphabar.nets.descent import descend
from alphabar.nets.optim import AdamW
from alphabar.tools import captured_step, networks
from alphabar.tools.captured_step import CapturedStep
from alphabar.tools.config import Config
from alphabar.tools.methods import Process
from alphabar.tools.networks import Network

Array = Any
HISTORY = "importance"  # the group of the losses that the times are drawn by


@dataclass(frozen=True)
class Attempt:
    """The forward pass of one training step, and the backward pass where the two are made as one.

    value (B,): the loss of every sample. roots: the tensors that the backward pass starts from, each with the gradient of the
    mean loss with respect to it; none where that pass has been made already. rows, times: what was taken from the data, and the
    times it was noised to. inputs, outputs: the arrays to look at where something is not finite, in the order of computation.
    kept: what ``learn`` needs of it.
    """

    value: Array
    roots: tuple[tuple[Tensor, Array], ...]
    rows: np.ndarray
    times: np.ndarray
    inputs: Mapping[str, Array] = field(default_factory=dict)
    outputs: Mapping[str, Array] = field(default_factory=dict)
    kept: Any = None


class Learner(ABC):
    """A network, the process whose states it reads, and the loss of a step: a function of (seed, step) and the weights."""

    def __init__(self, config: Config, data: Any, xp: ModuleType, process: Any, net: Network) -> None:
        self.config, self.data, self.xp, self.process, self.net = config, data, xp, process, net

    @property
    def conditional(self) -> bool:
        """Whether the network knows classes."""
        return self.net.config.get("classes") is not None

    @abstractmethod
    def attempt(self, k: int) -> Attempt:
        """The forward pass of step ``k`` (from 0), or forward and backward pass."""

    def learn(self, attempt: Attempt) -> None:  # noqa: B027
        """Take up what the losses of a finished step tell, where later steps depend on it."""

    def captured(self, optimiser: AdamW) -> CapturedStep | None:
        """The whole step in one piece; None where it cannot be."""
        return None

    def state(self) -> dict[str, dict[str, Array]]:
        """What a checkpoint must hold besides network and optimiser: arrays by group and name."""
        return {}

    def load_state(self, group: str, saved: Mapping[str, Any]) -> None:
        """Take up one group of ``state``. ValueError or KeyError where it does not fit."""
        raise KeyError(group)

    def batch(self, k: int) -> tuple[Array, np.ndarray | None, np.ndarray]:
        """(samples on the device, labels, rows) of step ``k``."""
        samples, labels, rows = self.data.batch(k, self.config.train.batch, self.config.train.seed, self.config.data.flip)
        return self.xp.asarray(samples), labels, rows

    def told(self, labels: np.ndarray | None, k: int) -> Array | None:
        """The labels as the network is told them in step ``k``: some of them hidden; None for a network without classes."""
        if not self.conditional:
            return None
        t = self.config.train
        return self.xp.asarray(guidance.drop_condition(labels, self.net.null, t.p_uncond, t.seed, k))


class GaussianLearner(Learner):
    """Images in [−1, 1] under Gaussian noise: a U-Net learns to predict the noise, or what its configuration says."""

    process: Process

    def __init__(self, config: Config, data: Any, xp: ModuleType = np) -> None:
        process = Process(config)  # before the network: its mistakes are the plainer ones
        height, width, channels = data.shape
        options = networks.unet_options(config, data, out=2 * channels if process.learned else None)
        super().__init__(config, data, xp, process, networks.made("unet", options, xp, f"images of {height}×{width}"))

    def attempt(self, k: int) -> Attempt:
        """x0 from the data, an example of the process, the network's answer and its loss. Eq: S1-A1, S4-A1."""
        images, labels, rows = self.batch(k)
        example = self.process.example(to_unit(images), self.config.train.seed, k)
        x_t = self.process.input(example.x_t, example.times)
        loss, wanted = self.process.criterion(example)
        value, output = descend(self.net, loss, wanted, x_t, example.times, self.told(labels, k), k)
        return Attempt(value, (), rows, example.times, {"x_t": x_t}, {"output": output, "loss": value}, example)

    def captured(self, optimiser: AdamW) -> CapturedStep | None:
        """The same step in one piece, where the loss is plain and nothing depends on losses so far."""
        return captured_step.captured(self.config, self.data, self.process, self.net, optimiser)

    def learn(self, attempt: Attempt) -> None:
        """Remember the losses that the times are drawn by."""
        self.process.learn(attempt.kept, attempt.value)

    def state(self) -> dict[str, dict[str, Array]]:
        """The history of the losses, where the times are drawn by it."""
        return {} if self.process.history is None else {HISTORY: self.process.history.state()}

    def load_state(self, group: str, saved: Mapping[str, Any]) -> None:
        """Take up the history of the losses."""
        assert self.process.history is not None
        self.process.history.load_state(saved)
