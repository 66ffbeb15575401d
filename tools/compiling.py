"""No silent pause while kernels are compiled: a bar for those compiled ahead, a line for one that is compiled when it is met."""

import sys
import threading
import time
from collections.abc import Sequence

from alphabar.kernels import warm
from alphabar.tools.config import DISCRETE, GAUSSIAN
from alphabar.tools.progress import Progress

AFTER = 0.5  # seconds of compiling before anything is said
WHAT = "compiling kernels for this machine, once"

SHARED = (warm.ELEMENTWISE, "normals", "conv2d", "attention", "silu")
OPTIMISER = ("sum_squares", "adamw_ema")
LOSS = {False: ("squared_error",), True: ("cross_entropy", "softmax")}  # of states that are discrete
OF_WORDS = ("cross_entropy",)
TOKENS = ("layer_norm", "add_gated", "rotary")
NETWORK = {"unet": ("group_norm_silu",), "transformer": TOKENS, "word-diffusion": TOKENS}


def needed(network: str, method: str, training: bool) -> list[str]:
    """The kernels that a kind of network and a method are made of."""
    process = ("categorical",) if method in DISCRETE else ("q_sample", "step")
    families = (*SHARED, *NETWORK[network], *process)
    if training:
        families += (*OPTIMISER, *LOSS[method in DISCRETE], *(OF_WORDS if network == "word-diffusion" else ()))
        families += (warm.STEPPING,) if method in GAUSSIAN else ()
    return [name for name in warm.NAMES if name.startswith(families) and (training or "backward" not in name)]


def ahead(names: Sequence[str], quiet: bool = False) -> None:
    """Compile those of the CPU's kernels ``names`` that this machine has not compiled yet, on all of its cores."""
    if warm.keeps():
        show(warm.pending(names), warm.processes(), quiet)


def show(names: Sequence[str], processes: int, quiet: bool) -> list[str]:
    """Compile kernels ahead behind a bar; returns the names of those that are ready."""
    ready: list[str] = []
    if names and not quiet:
        many = f", in {min(processes, len(names))} processes" if min(processes, len(names)) > 1 else ""
        print(f"compiling {len(names)} kernels for this machine, once{many} …", file=sys.stderr, flush=True)
    with Progress("compiling", len(names), 0, quiet or not names, "kernel") as bar:
        for name in warm.compiled(names, processes):
            ready.append(name)
            bar.note(name)
            bar.advance()
    return ready


class Told:
    """Says on stderr that kernels are being compiled, for ``kernels.compiling``: once, or their names on a terminal."""

    def __init__(self, program: str, quiet: bool = False) -> None:
        self._program, self._quiet = program, quiet
        self._depth = 0
        self._spent = self._start = 0.0
        self._said = False
        self._timer: threading.Timer | None = None

    def begin(self, name: str) -> None:
        """A kernel is being compiled, alone or as a part of another."""
        self._depth += 1
        if self._depth > 1 or self._quiet:
            return
        self._start = time.monotonic()
        self._timer = threading.Timer(max(0.0, AFTER - self._spent), self._say, (name,))
        self._timer.daemon = True
        self._timer.start()

    def end(self, name: str) -> None:
        """It is ready."""
        self._depth -= 1
        if self._depth or self._timer is None:
            return
        self._timer.cancel()
        self._timer.join()  # so that what it says stands before what comes next
        self._spent += time.monotonic() - self._start
        if self._said and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _say(self, name: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{WHAT}: {name} …", end="", file=sys.stderr, flush=True)
        elif not self._said:
            print(f"alphabar {self._program}: {WHAT} …", file=sys.stderr, flush=True)
        self._said = True
