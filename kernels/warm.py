"""Compiling the CPU's kernels ahead: each runs its small cases once, in several processes, for Numba compiles on one core.

``python -m alphabar.kernels.warm`` is such a process: it reads names of kernels, one a line, and answers each by a line.
"""

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from . import dispatch, elementwise, recording, stepping
from .accuracy import arguments
from .registry import TABLE, Case

ELEMENTWISE = "elementwise"  # the name of what lies between the kernels of the registry
STEPPING = "stepping"  # of what a training step in one piece has beside its network
NAMES = (*TABLE, ELEMENTWISE, STEPPING)
LARGE: dict[str, Case] = {name: {"shape": (2, 1 << 15)} for name in ("normals", "q_sample", "step")}  # not run like small ones
FIRST = ("conv2d", "conv2d_backward_weight", "attention_backward", "attention")  # those that take longest
LAST = ("conv2d_backward_input",)  # what it shares with conv2d should be there by then
MOST = 8  # processes: the longest kernel takes an eighth of all the time, and each process 0.3 GB


def run(name: str) -> None:
    """Run every small case of a kernel, so that its code is compiled, or loaded, for all types that it is used with."""
    with dispatch.use("auto"), np.errstate(all="ignore"):
        if name == ELEMENTWISE:
            _elementwise()
            return
        if name == STEPPING:
            _stepping()
            return
        call = dispatch.kernel(name)
        for case in (*TABLE[name].tests, *([LARGE[name]] if name in LARGE else [])):
            args, kwargs = arguments(TABLE[name], case)
            call(*args, **kwargs)


class _Heedless:
    """A recorder that keeps nothing: while one is active even a few elements go to compiled functions."""

    def note(self, entry: Any, arguments: tuple) -> None:
        pass

    def refuse(self, why: str) -> None:
        pass


def _elementwise() -> None:
    from .cpu.elementwise import DIGEST, digest

    token = recording.active.set(_Heedless())
    try:
        _all_elementwise()
        digest(np.zeros(8, np.uint64), np.zeros(DIGEST, np.uint64))
    finally:
        recording.active.reset(token)


def _all_elementwise() -> None:
    x, index = elementwise.zeros((2, 3, 4), np.float32), np.zeros(2, np.int64)
    rows = elementwise.sum_places(x)
    elementwise.add(x, x)
    elementwise.add_columns(x, 0, x)
    elementwise.concat(x, x)
    elementwise.channels(x, 1, 2)
    elementwise.add_channels(x, rows, 0)
    elementwise.sum_into_rows(elementwise.take_rows(rows, index), index, 2)
    for dtype in (np.float64, np.float32):
        omega = np.ones(2, dtype)
        omega.flags.writeable = False  # as networks keep it
        elementwise.time_features(np.ones(2), 0.0, omega, False)


def _stepping() -> None:
    counters, values, norm_sq = np.zeros(2, np.int32), np.zeros((len(stepping.LEVEL), 1), np.float32), np.zeros(1)
    images, x, flat = np.zeros((1, 4), np.uint8), np.zeros((1, 4), np.float32), np.zeros(4, np.float32)
    made, skipped = counters[:1], counters[1:]
    stepping.draw_levels(np.zeros((2, len(values)), np.float32), made, 0, np.zeros(1), values)
    stepping.example(images, values, made, 0, x, x)
    stepping.verdict(values[0], norm_sq, skipped, np.zeros(4))
    row = np.ones((1, 5), np.float32)
    stepping.adamw_ema_by_table(flat, flat, flat, flat, flat, row, made, 0.9, 0.99, 1e-8, norm_sq)
    stepping.count(made, skipped, norm_sq)


def processes() -> int:
    """How many processes compile well at a time here."""
    from .cpu import threads

    return min(MOST, threads.wanted(), threads.available())


def keeps() -> bool:
    """Whether the CPU's kernels are used, and their code is kept on disk."""
    if dispatch.chosen() == "reference":
        return False
    from .cpu import kept

    return bool(kept.folders())


def pending(names: Iterable[str] = NAMES) -> list[str]:
    """Those of ``names`` that have not been compiled ahead on this machine."""
    from .cpu import kept

    return [name for name in names if not kept.marked(name)]


def compiled(names: Sequence[str], workers: int = 1) -> Iterator[str]:
    """Compile kernels ahead and yield the name of each that is ready. In other processes, where there are to be more than one.

    They leave their code on disk, to be loaded here at the first call; where that cannot be, nothing is gained. A process that
    fails ends without a word: what it left is compiled by whoever calls it, and shows what is wrong.
    """
    from .cpu import kept

    if min(workers, len(names)) < 2:
        for name in names:
            run(name)
            kept.mark(name)
            yield name
        return
    left, ready = iter(sorted(names, key=_turn)), queue.SimpleQueue[str | None]()
    lock = threading.Lock()

    def feed(worker: subprocess.Popen[str]) -> None:
        assert worker.stdin is not None and worker.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended
            while name := _next(left, lock):
                print(name, file=worker.stdin, flush=True)
                if worker.stdout.readline().strip() != name:
                    break
                ready.put(name)
        ready.put(None)

    running: list[subprocess.Popen[str]] = []
    try:
        for _ in range(min(workers, len(names))):
            running.append(_worker())
            threading.Thread(target=feed, args=running[-1:], daemon=True).start()
        busy = len(running)
        while busy:
            done = ready.get()
            if done is None:
                busy -= 1
            else:
                yield done
    finally:
        for worker in running:
            worker.kill()
            worker.wait()


def _turn(name: str) -> int:
    return FIRST.index(name) if name in FIRST else len(FIRST) + (name in LAST)


def _next(left: Iterator[str], lock: threading.Lock) -> str | None:
    with lock:
        return next(left, None)


def _worker() -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "ALPHABAR_KERNELS"}
    environment |= {"ALPHABAR_THREADS": "2", "NUMBA_NUM_THREADS": "2"}  # what is shared among workers is compiled, too
    command, pipe = [sys.executable, "-m", __name__], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)


def main() -> None:
    """Compile what the lines of stdin name."""
    from .cpu import kept

    for line in sys.stdin:
        name = line.strip()
        run(name)
        kept.mark(name)
        print(name, flush=True)


if __name__ == "__main__":
    main()
