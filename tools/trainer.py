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
from alphabar.nets.optim import AdamW
from alphabar.tools import config as configs
from alphabar.tools import families, networks, sources
from alphabar.tools.batches import rate
from alphabar.tools.captured_step import Told
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
    """A network, its optimiser and the number of steps made. ``step`` makes the next one.

    ``advance`` only starts it, where steps run on a GPU in one piece: then ``done`` counts steps that may still be under way, and
    ``check`` and ``report`` wait for them.
    """

    def __init__(self, config: Config, data: Any, xp: ModuleType = np) -> None:
        self.config, self.data, self.xp = config, data, xp
        self.learner = families.of(config).learner(config, data, xp)
        self.precision_note = networks.compute_in(self.net, config.train.precision)
        t = config.train
        self.optimiser = AdamW(
            self.net.params, weight_decay=t.weight_decay, max_norm=t.clip if t.clip else math.inf, ema_decay=t.ema
        )
        self.pool = kernels.Pool()
        self.done = 0
        self.captured = self.learner.captured(self.optimiser)
        self._lr = 0.0  # of the captured step that was started last
        self._last: Step | None = None  # of a step that was made plainly, until a captured one follows
        self._losses, self._plain_steps = 0.0, 0  # of steps made plainly since the last report

    @property
    def net(self) -> Network:
        """The network that is trained."""
        return self.learner.net

    @property
    def work_nbytes(self) -> int:
        """Bytes of work arrays: of the steps, and of the network's plans."""
        parts = self.pool, getattr(self.net, "plans", None), self.captured
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def process(self) -> Any:
        """The process whose states it reads."""
        return self.learner.process

    @property
    def conditional(self) -> bool:
        """Whether the network knows classes."""
        return self.learner.conditional

    @property
    def waits(self) -> bool:
        """Whether ``advance`` returns when the step is over; on a GPU it need not."""
        return self.captured is None or self.captured.waits

    def step(self) -> Step:
        """The next step: the learner's attempt, and one AdamW step on the gradient of its mean loss.

        Raises NotFinite, with the weights as they were, where the loss or the gradient is not finite.
        """
        self.advance()
        return self._latest(self._settled())

    def advance(self) -> None:
        """Start the next step. What of it is not finite shows in ``check`` and ``report``, at the latest."""
        k, captured = self.done, self.captured
        if captured is None or not captured.ready():
            self.check()
            self._plainly()
            return
        self._lr = rate(self.config.train, k)
        if captured.kept:  # in memory of its own
            captured.start(k, self._lr)
        else:
            with self.pool:
                captured.start(k, self._lr)
        self.optimiser.count += 1
        self._last = None
        self.done += 1
        if not captured.waits:
            captured.send(k + 1, rate(self.config.train, k + 1))

    def check(self) -> None:
        """Wait for the steps under way. Raises NotFinite where one failed: ``done`` is then the number of steps before it."""
        self._settled()

    def report(self) -> Step:
        """The mean loss of the steps since the last report, and the last one's gradient norm and learning rate.

        Waits for the steps under way; raises NotFinite where one failed.
        """
        last, losses, steps = self._latest(self._settled()), self._losses, self._plain_steps
        if self.captured is not None:
            told = self.captured.told()
            losses, steps = losses + told.total, steps + told.steps
            self.captured.forget()
        self._losses, self._plain_steps = 0.0, 0
        return Step(losses / steps, last.grad_norm, last.lr)

    def _settled(self) -> Told | None:
        """:meth:`check`, and what is told of the steps where the last one was captured."""
        if self._last is not None or self.captured is None or not self.captured.started:
            return None
        told = self.captured.told()
        lost = self.done - told.made
        if not lost:
            return told
        self.done, self.optimiser.count = self.done - lost, self.optimiser.count - lost
        self.captured.reset()
        self._plainly()  # raises, and has the arrays to show
        return None

    def _latest(self, told: Told | None) -> Step:
        """The step that was made last; there must be one."""
        if told is None:
            assert self._last is not None
            return self._last
        return Step(told.loss, told.norm, self._lr)

    def _plainly(self) -> None:
        """The next step by calls of their own; as :meth:`step`."""
        k = self.done
        with self.pool:
            attempt = self.learner.attempt(k)
            loss = float(attempt.value.sum() / attempt.value.dtype.type(len(attempt.value)))  # .mean() takes three times as long
            if not math.isfinite(loss):
                self._stop(f"the loss is {loss}", attempt, False)
            if attempt.roots:
                self.net.params.zero_grad()
                backward(*attempt.roots)
            lr = rate(self.config.train, k)
            norm = self.optimiser.step(lr)
            if not math.isfinite(norm):
                self._stop(f"the norm of the gradient is {norm}", attempt, True)
            self.learner.learn(attempt)
        if self.captured is not None:
            self.captured.reset()
        self.done += 1
        self._last = Step(loss, norm, lr)
        self._losses, self._plain_steps = self._losses + loss, self._plain_steps + 1

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
        """(arrays, meta) of a checkpoint: weights, running average, moments by parameter, and all that the rest follows from.

        Waits for the steps under way; raises NotFinite where one failed.
        """
        self.check()
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
        self._last, self._losses, self._plain_steps = None, 0.0, 0
        if self.captured is not None:
            self.captured.reset()
            self.captured.forget()

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
