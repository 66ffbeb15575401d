"""Side-by-side timing on a shared, noisy machine: contestants take turns, medians over rounds, the first calls not counted.

Two OpenMP pools (ours and torch's) spin for a while after a parallel region, so a short sleep and one untimed call come before
every timed batch. Blocks in which the process was preempted are dropped as long as enough clean ones remain.
"""

import ctypes
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

SETTLE_S = 0.012  # longer than libgomp's spinning
BATCH_S = 0.03  # one timed batch lasts about this long
MAX_CALLS = 200


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over the clean rounds, the fastest round, and how many rounds were clean."""

    median: float
    fastest: float
    clean: int
    rounds: int


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed: else every large temporary of torch is mapped and unmapped, page by page."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(-4, 0)  # M_MMAP_MAX: nothing through mmap
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


class Clock:
    """A timer for pytest-benchmark that only a measurement moves on: it then reports seconds per call, whatever the batch."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def calls_per_batch(f: Callable[[], object]) -> int:
    """How many calls fill one batch, after two warm-up calls."""
    f()
    f()
    start = time.perf_counter()
    f()
    return max(1, min(MAX_CALLS, int(BATCH_S / max(time.perf_counter() - start, 1e-7))))


def timed_batch(f: Callable[[], object], calls: int) -> tuple[float, bool]:
    """(seconds per call, whether the process kept its cores) of one batch."""
    time.sleep(SETTLE_S)
    f()
    before, start = _preemptions(), time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls, _preemptions() == before


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, Timing]:
    """Time the contestants in turn, ``rounds`` times over."""
    calls = {name: calls_per_batch(f) for name, f in contestants.items()}
    batches: dict[str, list[tuple[float, bool]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, f in contestants.items():
            batches[name].append(timed_batch(f, calls[name]))
    return {name: summary(b) for name, b in batches.items()}


def summary(batches: list[tuple[float, bool]]) -> Timing:
    """Median over the clean batches, or over all where fewer than three are clean."""
    clean = [s for s, kept in batches if kept]
    every = [s for s, _ in batches]
    return Timing(median(clean if len(clean) >= 3 else every), min(every), len(clean), len(every))
