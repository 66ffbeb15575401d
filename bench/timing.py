"""Side-by-side timing on a shared, noisy machine: contestants take turns, medians over rounds, the first calls not counted.

Two OpenMP pools (ours and torch's) spin for a while after a parallel region, so a short sleep and one untimed call come before
every timed batch, unless the call is a long one. Blocks in which the process was preempted are dropped as long as enough clean
ones remain.
"""

import ctypes
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

SETTLE_S = 0.012  # longer than libgomp's spinning
BATCH_S = 0.03  # one timed batch lasts about this long
LONG_S = 0.25  # a call that lasts longer hardly feels the start: it is timed at once
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
    """How many calls fill one batch, after one or two warm-up calls."""
    f()
    for _ in range(2):
        start = time.perf_counter()
        f()
        taken = time.perf_counter() - start
        if taken > LONG_S:
            break
    return max(1, min(MAX_CALLS, int(BATCH_S / max(taken, 1e-7))))


def timed_batch(f: Callable[[], object], calls: int) -> tuple[float, bool]:
    """(seconds per call, whether the process kept its cores) of one batch."""
    time.sleep(SETTLE_S)
    before, start = _preemptions(), time.perf_counter()
    f()
    first = time.perf_counter() - start
    if first > LONG_S:
        return first, _preemptions() == before
    before, start = _preemptions(), time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls, _preemptions() == before


def against(
    benchmark: Any,
    clock: Clock,
    contestants: Mapping[str, Callable[[], object]],
    ours: Callable[[], object],
    rounds: int,
) -> dict[str, Timing]:
    """Time the contestants and ours in turn; pytest-benchmark, whose timer is ``clock``, reports ours (under "alphabar")."""
    calls = {name: calls_per_batch(f) for name, f in contestants.items()}
    batches: dict[str, list[tuple[float, bool]]] = {name: [] for name in (*contestants, "alphabar")}
    ours_calls = calls_per_batch(ours)

    def opponents() -> None:
        for name, f in contestants.items():
            batches[name].append(timed_batch(f, calls[name]))

    def batch() -> None:
        seconds, kept = timed_batch(ours, ours_calls)
        batches["alphabar"].append((seconds, kept))
        clock.now += seconds

    benchmark.pedantic(batch, setup=opponents, rounds=rounds, warmup_rounds=0)
    return {name: summary(b) for name, b in batches.items()}


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
