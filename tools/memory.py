"""What would fit: the memory of a training run by its batch, from steps of two small batches."""

import dataclasses
import gc
from types import ModuleType
from typing import Any

from alphabar.kernels.device_memory import OutOfDeviceMemory, memory_told
from alphabar.tools.config import Config
from alphabar.tools.trainer import Trainer

SPARE = 0.95  # of the memory that is free, which a run may take
PROBES = (2, 4, 16)  # images of the smaller batch, as many as a hundredth of the batch in question allows


def nbytes(config: Config, data: Any, xp: ModuleType, batch: int) -> int:
    """Bytes that a run with this batch holds after a step: weights, gradient, moments, average, work arrays."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=batch))
    with memory_told():
        trainer = Trainer(config, data, xp)
        trainer.step()
    return 5 * trainer.net.params.data.nbytes + trainer.work_nbytes


def largest_batch(config: Config, data: Any, xp: ModuleType, free: int) -> int:
    """The largest batch whose training takes ``free`` bytes at most, by the line through two small ones; 0 where none does.

    OutOfDeviceMemory where not even the small ones fit.
    """
    small = max(n for n in PROBES if n == PROBES[0] or 100 * n <= config.train.batch)
    one, two = (nbytes(config, data, xp, n) for n in (small, 2 * small))
    of_image = max(1.0, (two - one) / small)
    return max(0, int((SPARE * free - (one - of_image * small)) / of_image))


def advice(config: Config, data: Any, xp: Any, failed: OutOfDeviceMemory, where: str) -> str:
    """One line for a run that did not fit, once nothing of it is left: what it asked for, and which batch would fit."""
    gc.collect()
    xp.get_default_memory_pool().free_all_blocks()
    batch, words = config.train.batch, f"{where}: {failed}"
    try:
        fits = min(largest_batch(config, data, xp, xp.cuda.runtime.memGetInfo()[0]), batch - 1)
    except OutOfDeviceMemory:
        fits = 0
    if fits < 1:
        return f"{words}; no batch below {batch} would fit either: make the network smaller (model.channels, model.blocks)"
    lower = "" if config.train.precision == "bf16" else "; train.precision=bf16 takes less"
    return f"{words}; train.batch={batch} does not fit, some {fits} would{lower}"
