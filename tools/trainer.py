"""One training step, and what of it must be saved: everything random is a function of (seed, step)."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NoReturn

import numpy as np

import alphabar
from alphabar import kernels
from alphabar.kernels.arrays import to_numpy
from alphabar.nets.autograd import backward
from alphabar.nets.checkpoint import CheckpointError
from alphabar.nets.optim import AdamW, learning_rate
from alphabar.tools import config as configs
from alphabar.tools import families, networks, sources
from alphabar.tools.config import Config
from alphabar.tools.learner import Attempt
from alphabar.tools.networks import Network

KIND = "alphabar-training"


@dataclass(frozen=True)
class Step:
    """What one step reports."""

    loss: float
    grad_norm: float
    lr: float


class NotFinite(ArithmeticError):
    """A loss or a gradient that is NaN or infinite; ``arrays`` hold what the step worked on."""

    def __init__(self, message: str, arrays: dict[str, Any]) -> None:
        super().__init__(message)
        self.arrays = arrays


class Trainer:
    """A network, its optimiser and the number of steps made. ``step`` makes the next one."""

    def __init__(self, config: Config, data: Any, xp: ModuleType = np) -> None:
        self.config, self.data, self.xp = config, data, xp
        self.learner = families.of(config).learner(config, data, xp)
        t = config.train
        self.optimiser = AdamW(
            self.net.params, weight_decay=t.weight_decay, max_norm=t.clip if t.clip else math.inf, ema_decay=t.ema
        )
        self.pool = kernels.Pool()
        self.done = 0

    @property
    def net(self) -> Network:
        """The network that is trained."""
        return self.learner.net

    @property
    def work_nbytes(self) -> int:
        """Bytes of work arrays: of the steps, and of the network's plans."""
        plans = getattr(self.net, "plans", None)
        return self.pool.nbytes + (0 if plans is None else plans.nbytes)

    @property
    def process(self) -> Any:
        """The process whose states it reads."""
        return self.learner.process

    @property
    def conditional(self) -> bool:
        """Whether the network knows classes."""
        return self.learner.conditional

    def step(self) -> Step:
        """The learner's attempt, and one AdamW step on the gradient of its mean loss.

        Raises NotFinite, with the weights as they were, where the loss or the gradient is not finite.
        """
        t, k = self.config.train, self.done
        with self.pool:
            attempt = self.learner.attempt(k)
            loss = float(attempt.value.sum() / attempt.value.dtype.type(len(attempt.value)))  # .mean() takes three times as long
            if not math.isfinite(loss):
                self._stop(f"the loss is {loss}", attempt, False)
            if attempt.roots:
                self.net.params.zero_grad()
                backward(*attempt.roots)
            lr = learning_rate(k, t.lr, min(t.warmup, t.steps // 5), t.steps, t.decay)
            norm = self.optimiser.step(lr)
            if not math.isfinite(norm):
                self._stop(f"the norm of the gradient is {norm}", attempt, True)
            self.learner.learn(attempt)
        self.done += 1
        return Step(loss, norm, lr)

    def _stop(self, what: str, attempt: Attempt, with_gradient: bool) -> NoReturn:
        named = {f"step/{n}": a for n, a in attempt.inputs.items()}
        named |= {f"weights/{n}": a for n, a in self.net.params.arrays().items()}
        named |= {f"step/{n}": a for n, a in attempt.outputs.items()}
        if with_gradient:
            named |= {f"gradient/{n}": a for n, a in self.net.params.gradients().items()}
        kept = {n: to_numpy(a).copy() for n, a in named.items()}  # in the order of computation
        bad = next((n for n, a in kept.items() if not np.isfinite(a).all()), None)
        raise NotFinite(
            f"step {self.done + 1}: {what} (seed {self.config.train.seed};"
            f" {sources.UNITS[sources.kind(self.data)]} {', '.join(map(str, attempt.rows[:8]))}, …"
            + (f"; the first array that is not finite is {bad})" if bad else ")"),
            {**kept, "step/rows": attempt.rows, "step/t": attempt.times},
        )

    # ------------------------------------------------------------------------------------------------------------ checkpoints

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(arrays, meta) of a checkpoint: weights, running average, moments by parameter, and all that the rest follows from."""
        store, saved = self.net.params, self.optimiser.state()
        arrays = {f"weights/{n}": a for n, a in store.arrays().items()}
        for group, flat in saved.items():
            with store.using(flat):
                arrays |= {f"{group}/{n}": a for n, a in store.arrays().items()}
        for group, own in self.learner.state().items():
            arrays |= {f"{group}/{n}": a for n, a in own.items()}
        meta = {
            "kind": KIND,
            "alphabar": alphabar.__version__,
            "step": self.done,
            "seed": self.config.train.seed,
            "config": configs.to_dict(self.config),
            "network": networks.kind_of(self.net),
            "model": self.net.config,
            "optimiser": {"count": self.optimiser.count, "skipped": self.optimiser.skipped},
            "data": {
                "name": self.data.name,
                "sha256": self.data.sha256,
                "shape": list(self.data.shape),
                "classes": list(self.data.classes),
            },
        }
        return arrays, meta

    def restore(self, path: Any, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint of the same network and data. CheckpointError names what does not fit."""
        check_data(path, meta, self.data)
        load_weights(path, self.net, arrays, "weights")
        moments = self.optimiser.state()
        for group, flat in moments.items():
            with self.net.params.using(flat):
                load_weights(path, self.net, arrays, group)
        self.optimiser.load_state(moments, meta["optimiser"]["count"], meta["optimiser"]["skipped"])
        for group in self.learner.state():
            saved = group_of(arrays, group)
            try:
                if saved:
                    self.learner.load_state(group, saved)
            except (ValueError, KeyError) as e:
                raise CheckpointError(path, f"its {group} does not fit: {e}") from e
        self.done = meta["step"]

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """Within the block the network has the averaged weights."""
        with self.net.params.using(self.optimiser.ema):
            yield self.net


def check_kind(path: Any, meta: Mapping[str, Any]) -> None:
    """CheckpointError unless ``meta`` is that of a training checkpoint, with every entry of its type."""
    wanted = {"step": int, "seed": int, "config": dict, "model": dict, "optimiser": dict, "data": dict}
    if meta.get("kind") != KIND:
        raise CheckpointError(path, f"is of kind {meta.get('kind')!r}, want {KIND!r}")
    for key, kind in wanted.items():
        if not isinstance(meta.get(key), kind):
            raise CheckpointError(path, f"its meta data lack {key!r}")


def check_data(path: Any, meta: Mapping[str, Any], data: Any) -> None:
    """CheckpointError unless ``meta`` is that of a training checkpoint made with these data."""
    check_kind(path, meta)
    if meta["data"].get("sha256") != data.sha256:
        name = meta["data"].get("name")
        known = "" if name == data.name else f" ({name})"
        raise CheckpointError(path, f"was trained on other data{known} than {data.name}")


def load_weights(path: Any, net: Network, arrays: Mapping[str, Any], group: str) -> None:
    """Copy one group of a checkpoint's arrays into a network's parameters. CheckpointError names what does not fit."""
    try:
        net.params.load(group_of(arrays, group))
    except ValueError as e:
        raise CheckpointError(path, f"its {group} do not fit the network: {e}") from e


def group_of(arrays: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The arrays of one group of a checkpoint by their names in it."""
    return {name.partition("/")[2]: a for name, a in arrays.items() if name.startswith(f"{group}/")}
