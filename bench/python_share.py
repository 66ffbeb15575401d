"""What Python costs of a training step: the trainer's whole step, and how much of it compiled calls take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from alphabar.core import data
from alphabar.kernels.cpu import replay
from alphabar.tools import config as configs
from alphabar.tools import families
from alphabar.tools.batches import AHEAD
from alphabar.tools.trainer import Trainer

WARM_UP = 5


@contextmanager
def clocked() -> Iterator[list[float]]:
    """The seconds of every run of compiled calls by plans that are made within the block. The clock's own count as Python's."""
    seconds: list[float] = []
    loop = replay._loop

    def timed() -> Callable[..., int]:
        run, now = loop(), time.perf_counter

        def call(*arguments: int) -> int:
            start = now()
            failed = run(*arguments)
            seconds.append(now() - start)
            return failed

        return call

    replay._loop = timed  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        replay._loop = loop


def measured(batch: int, rounds: int, settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """Seconds of a step of the default digits run, and of them outside of compiled calls.

    A round is as many steps as have their batches made at once. Each of its steps counts with its median over the rounds, so
    that the mean over the round has what the batches cost, and not what else the machine was doing.
    """
    digits = data.load("digits")
    config = configs.load(None, [f"train.batch={batch}", *settings])
    times = np.empty((rounds, AHEAD, 2))  # whole, outside of compiled calls
    with clocked() as compiled:
        trainer = Trainer(families.of(config).resolved(config, digits), digits)
        for _ in range(WARM_UP):
            trainer.step()
        for place in np.ndindex(rounds, AHEAD):
            compiled.clear()
            start = time.perf_counter()
            trainer.step()
            whole = time.perf_counter() - start
            times[place] = whole, whole - sum(compiled)
    whole, python = np.median(times, axis=0).mean(axis=0).tolist()
    return {"network": "digits", "batch": batch, "seconds": whole, "python": python, "share": python / whole}
