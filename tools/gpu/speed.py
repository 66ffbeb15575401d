"""Seconds, bytes and operations a second of every large case, beside a copy and PyTorch's eager and compiled functions.

CUDA events around each call, the L2 cache overwritten before it; what overwrites it also gives the host time to queue the call,
so that no launch is waited for. Contestants take turns within one case; medians.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from alphabar import kernels
from alphabar.kernels import TABLE
from alphabar.kernels.registry import Case, Kernel

from . import cases
from .correctness import free
from .job import Job, Report, in_checkout, map_all, torch_of

FLUSH, TIMES = 512 << 20, 3  # bytes overwritten before a timed call, and how often: 0.5 ms on the fastest GPU
ROUNDS, CALLS = 4, 6
COPY = 256 << 20  # bytes of the array whose copy is the yardstick
SIDE = 4096  # of the product whose rate is the other one
COMPILING = 20.0  # seconds that a compilation may take
Contestants = dict[str, Callable[[], Any]]


class Clock:
    """Times calls on the GPU."""

    def __init__(self, cupy: ModuleType) -> None:
        self._cupy = cupy
        self._flush = cupy.empty(FLUSH // 4, cupy.float32)
        self._event = cupy.cuda.Event

    def _once(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        for _ in range(TIMES):
            self._flush.fill(0)
        begin, end = self._event(), self._event()
        begin.record()
        call()
        end.record()
        return begin, end

    def seconds(self, contestants: Contestants) -> dict[str, float]:
        """The median for each, taken in turns."""
        for call in contestants.values():
            for _ in range(3):
                call()
        pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, call in contestants.items():
                pairs[name] += [self._once(call) for _ in range(CALLS)]
        self._cupy.cuda.Device().synchronize()
        elapsed = self._cupy.cuda.get_elapsed_time
        return {name: statistics.median(elapsed(*p) for p in found) * 1e-3 for name, found in pairs.items()}


def run(job: Job, table: dict[str, Kernel] | None = None) -> None:
    """The chief case of every kernel with all contestants; then the other large ones; then the registry's own sizes."""
    table = table or TABLE
    torch = torch_of()
    clock, rows = Clock(job.cupy), job.report.setdefault("rows", [])
    job.report["torch"] = None if torch is None else torch.__version__
    with same_stream(job.cupy, torch):
        job.report["limits"] = limits(job.cupy, clock)
        large = [(kernel, case, "chief" if first else "large") for kernel, case, first in cases.ordered(table)]
        for kernel, case, kind in (*large, *((k, c, "small") for k, c in cases.small(table))):
            if job.over(5.0):
                job.report.setdefault("not_reached", []).append(f"{kernel.name} {cases.label(case)}")
                continue
            rows.append(
                {"kernel": kernel.name, "case": cases.label(case), "size": kind, **timed(job, torch, clock, kernel, case)}
            )
            free(job.cupy)
            if torch is not None:
                torch.cuda.empty_cache()
            job.save()
    job.report["ok"] = not any("error" in r for r in rows)
    job.report["failed"] = [f"{r['kernel']} {r['case']}: {r['error']}" for r in rows if "error" in r]


def limits(cupy: ModuleType, clock: Clock) -> Report:
    """Bytes a second of a copy, read and written; operations a second of a product in float32 (None where CuPy makes none)."""
    here, there = (cupy.empty(COPY // 4, cupy.float32) for _ in range(2))
    found: Report = {"copy_bytes_per_s": 2 * COPY / clock.seconds({"copy": lambda: cupy.copyto(there, here)})["copy"]}
    try:
        a, b = (kernels.normals(cupy.empty((SIDE, SIDE), cupy.float32), seed) for seed in (1, 2))
        found["product_flops_per_s"] = 2 * SIDE**3 / clock.seconds({"product": lambda: cupy.matmul(a, b)})["product"]
    except Exception as e:
        found |= {"product_flops_per_s": None, "product_error": f"{type(e).__name__}: {e}"[:300]}
    return found


def timed(job: Job, torch: ModuleType | None, clock: Clock, kernel: Kernel, case: Case) -> Report:
    """One case: seconds of every contestant, and of a copy in turn with them; rates of ours. An error in place of what broke."""
    cupy = job.cupy
    try:
        args, kwargs = cases.arguments(cupy, kernel, case)
        call = getattr(kernels, kernel.name)
        pool = kernels.Pool()

        def ours() -> None:
            with pool:
                call(*args, **kwargs)

        here, there = (cupy.empty(COPY // 4, cupy.float32) for _ in range(2))
        contestants: Contestants = {"alphabar": ours, "copy": lambda: cupy.copyto(there, here)}
        ours()
        row: Report = {"bytes": kernel.moved(case), "flops": kernel.flops(case)}
        if torch is not None:
            for name, make in opponents(torch, kernel.name, args, kwargs, job).items():
                try:
                    theirs = make()
                    theirs()
                    contestants[name] = theirs
                except Exception as e:
                    row.setdefault("opponents_errors", {})[name] = f"{type(e).__name__}: {e}"[:300]
        found = clock.seconds(contestants)
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"[:500]}
    rate = row["bytes"] / found["alphabar"]
    return row | {
        "seconds": found,
        "bytes_per_s": rate,
        "share_of_copy": rate * found["copy"] / (2 * COPY),
        "flops_per_s": row["flops"] / found["alphabar"],
        "eager_s": _best(found, "torch"),
        "compiled_s": _best(found, "compiled"),
        "tf32_s": _best(found, "tf32"),
    }


def _best(found: dict[str, float], kind: str) -> float | None:
    """The faster of PyTorch's memory formats."""
    return min((s for name, s in found.items() if name.split()[0] == kind), default=None)


def opponents(
    torch: ModuleType, name: str, args: tuple, kwargs: dict[str, Any], job: Job
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """PyTorch's contestants, each made when asked for: eager and compiled, of images in both memory formats, and with TF32.

    They work on the very arrays that our kernel works on.
    """
    torch_ops = in_checkout("bench.torch_ops")

    def send(a: Any) -> Any:
        if isinstance(a, np.ndarray):
            on_host = a.ndim == 2 and a.dtype == np.float64  # a table of rows: its twin reads the row on the host
            return torch.from_numpy(a.copy()) if on_host else torch.from_numpy(a.copy()).cuda()
        return torch.from_dlpack(a)

    t_args, t_kwargs = map_all(send, args), map_all(send, kwargs)
    forms = {"": (torch_ops.channels_last(name, t_args), t_kwargs)}
    if (other := torch_ops.contiguous(name, t_args, t_kwargs)) is not None:
        forms[" contiguous"] = other

    def maker(form: str, tf32: bool, compiled: bool) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            _allow_tf32(torch, tf32)
            if compiled:
                torch._dynamo.reset()  # else the eighth shape of a function would run uncompiled
            call = torch_ops.timed(name, *forms[form], compiled=compiled)

            def run() -> Any:
                _allow_tf32(torch, tf32)
                return call()

            return run

        return make

    found = {f"torch{form}": maker(form, False, False) for form in forms}
    if name.startswith("conv2d"):
        found |= {f"tf32{form}": maker(form, True, False) for form in forms}
    if job.left > COMPILING * len(forms):
        found |= {f"compiled{form}": maker(form, False, True) for form in forms}
    return found


def _allow_tf32(torch: ModuleType, allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def same_stream(cupy: ModuleType, torch: ModuleType | None) -> Iterator[None]:
    """PyTorch's work on CuPy's stream, so that one pair of events times either."""
    if torch is None:
        yield
        return
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        yield
        stream.synchronize()
