"""Right or wrong on the device: the bits of the noise, every kernel against its definition, small cases and large ones."""

import hashlib
import json
import time
from types import ModuleType
from typing import Any

from alphabar import kernels
from alphabar.kernels import TABLE, accuracy, gpu
from alphabar.kernels.gpu import launch
from alphabar.kernels.registry import Case, Kernel

from . import cases, sums
from .job import ROOT, Job, Report, map_all
from .machine import Recorder, resources


def noise(job: Job) -> None:
    """Are the bits of the normals those of every other backend?"""
    golden = json.loads((ROOT / "tests" / "data" / "noise_hashes.json").read_text())["cases"]
    wrong = []
    for case in golden:
        out = job.cupy.empty(tuple(case["shape"]), job.cupy.float32)
        kernels.normals(out, case["seed"], case["step"], case["stream"], case["first_sample"])
        if hashlib.sha256(out.get().astype("<f4").tobytes()).hexdigest() != case["sha256"]:
            wrong.append(case)
    job.report |= {"ok": not wrong, "cases": len(golden), "wrong": wrong}


def _judged(kernel: Kernel, case: Case, found: list[accuracy.Error]) -> Report:
    share = max((e.ours / e.limit for e in found if e.limit), default=0.0)
    row: Report = {"kernel": kernel.name, "case": cases.label(case), "share": share, "ok": all(e.within for e in found)}
    return row if row["ok"] else row | {"errors": [vars(e) for e in found]}


def _count(job: Job, rows: list[Report]) -> None:
    """What the rows say together, printed where something is wrong, and written."""
    failed = [r for r in rows if not r["ok"]]
    worst = max((r.get("share", 0.0) for r in rows), default=0.0)
    job.report |= {"ok": not failed, "calls": len(rows), "largest_share_of_a_budget": worst, "failed": failed}
    job.save()


def small(job: Job, table: dict[str, Kernel] | None = None) -> None:
    """The small cases of every kernel, with arrays on 16 bytes and off them; and what the driver says of the kernels launched."""
    rows: list[Report] = []
    with gpu.on(Recorder(launch.current())) as recorder:
        for kernel in (table or TABLE).values():
            for case in accuracy.all_cases(kernel):
                wanted = accuracy.expected(kernel, case)
                for shift in (False, True):
                    if job.over():
                        return _count(job, rows)
                    try:
                        row = _judged(kernel, case, accuracy.compare(kernel, wanted, cases.on_gpu(job.cupy, shift)))
                    except Exception as e:
                        error = f"{type(e).__name__}: {e}"[:500]
                        row = {"kernel": kernel.name, "case": cases.label(case), "ok": False, "error": error}
                    rows.append(row | ({"unaligned": True} if shift else {}))
            _count(job, rows)
    if hasattr(job.cupy.cuda, "driver"):
        job.report["resources"] = resources(job, recorder)


def large(job: Job, table: dict[str, Kernel] | None = None) -> None:
    """The benchmarks' cases, of 256 MiB where memory is the limit; the definitions too run on the device, by CuPy."""
    rows: list[Report] = []
    skipped: list[str] = []
    for kernel, case, _ in cases.ordered(table or TABLE):
        start = time.monotonic()
        if job.over():
            skipped.append(f"{kernel.name} {cases.label(case)}")
            job.report["not_reached"] = skipped
            continue
        try:
            row = _judged(kernel, case, errors_there(job.cupy, kernel, case))
        except Exception as e:
            row = {"kernel": kernel.name, "case": cases.label(case), "ok": False, "error": f"{type(e).__name__}: {e}"[:500]}
        rows.append(row | {"seconds": round(time.monotonic() - start, 2)})
        free(job.cupy)
        _count(job, rows)
    _count(job, rows)


def errors_there(cupy: ModuleType, kernel: Kernel, case: Case) -> list[accuracy.Error]:
    """As :func:`accuracy.errors`, with arguments, definition and comparison on the device."""
    args, kwargs = cases.arguments(cupy, kernel, case)

    def run(as_type: Any, backend: str) -> list[Any]:
        def own(v: Any) -> Any:
            if isinstance(v, cupy.ndarray):
                return v.astype(as_type) if v.dtype == cupy.float32 else v.copy()
            return cupy.asarray(v) if v.ndim == 1 and backend == "reference" else v  # levels, which a definition indexes by t

        a, k = map_all(own, args), map_all(own, kwargs)
        with kernels.use(backend):
            return accuracy.outputs(kernel.name, getattr(kernels, kernel.name)(*a, **k), a, k)

    ours, plain = run(cupy.float32, "auto"), run(cupy.float32, "reference")
    exact = plain if kernel.bits else run(cupy.float64, "reference")
    found = []
    for i, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        if o.shape != e.shape or o.dtype != p.dtype:
            raise AssertionError(f"output {i} is {o.dtype} {o.shape}, not {p.dtype} {e.shape}")
        scale = float(abs(e).max())
        ours_off, plain_off = (float(abs(v.astype(e.dtype) - e).max()) for v in (o, p))
        limit = 0.0 if kernel.bits else accuracy.FACTOR * plain_off + accuracy.FLOOR * scale
        found.append(accuracy.Error(i, ours_off, plain_off, max(limit, 0.0 if kernel.bits else kernel.slack * scale)))
    if kernel.bits and not all(e.within for e in found):  # CuPy's rounding, or our kernel's? NumPy's is the definition
        return accuracy.errors(kernel, case, cases.on_gpu(cupy))
    return found


def free(cupy: ModuleType) -> None:
    """Give the pool's free memory back."""
    cupy.get_default_memory_pool().free_all_blocks()


def touch(cupy: ModuleType, table: dict[str, Kernel] | None = None) -> None:
    """Each kernel over its small cases, every array in memory of its own so that a stray access is seen: for the sanitizer."""
    cupy.cuda.set_allocator(None)
    for kernel in (table or TABLE).values():
        print(kernel.name, flush=True)
        for case in accuracy.all_cases(kernel):
            for shift in (False, True):
                cases.on_gpu(cupy, shift)(kernel.name, *accuracy.arguments(kernel, case))
    for shape in sums.SHAPES:
        sums.there(cupy, shape)
    cupy.cuda.Device().synchronize()
    print("done", flush=True)
