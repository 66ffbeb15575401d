"""`alphabar gpu-check`: try on this machine's GPU everything that a machine without one cannot show, and write it to a JSON file.

    alphabar gpu-check                       or, in a checkout: python tools/gpu_check.py
    python tools/gpu_check.py --only noise accuracy

In a checkout only NumPy and CuPy need be installed: where `alphabar` cannot be imported, a link of that name in a temporary
folder leads to the checkout. PyTorch, where it is installed with CUDA, is timed beside our kernels.
"""

import argparse
import atexit
import contextlib
import hashlib
import importlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def _make_importable() -> None:
    """Let `import alphabar` find this checkout, here and in the programs that this one starts."""
    try:
        import alphabar  # noqa: F401
    except ModuleNotFoundError:
        folder = Path(tempfile.mkdtemp(prefix="alphabar-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        (folder / "alphabar").symlink_to(ROOT, target_is_directory=True)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


_make_importable()

from alphabar import kernels  # noqa: E402
from alphabar.kernels import TABLE, accuracy  # noqa: E402
from alphabar.kernels.compile import FOLDER, require_gpu, source  # noqa: E402
from alphabar.tools.runs import commit  # noqa: E402

SECTIONS = ("noise", "accuracy", "sanitizer", "bench", "train")
SANITIZERS = ("memcheck", "racecheck")
FLUSH = 512 << 20  # bytes written before a timed call: more than any L2 cache holds, and long enough to queue the call meanwhile
ROUNDS, CALLS = 4, 6
TABLED = ("step", "q_sample", "categorical_posterior", "categorical_q_sample")  # kernels that take a table of float64
COPY = 256 << 20  # bytes of the array whose copy is the yardstick

Report = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; returns 0 if all is well, 1 if a check failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="alphabar gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ROOT / "bench" / "results" / "gpu.json"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE", help="JSON file to write (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="number of the GPU (default: 0)")
    parser.add_argument("--commit", help="commit to write down (default: from git)")
    parser.add_argument("--seconds", type=float, default=480.0, help="start nothing long after this time (default: %(default)g)")
    parser.add_argument(
        "--small", action="store_true", help=argparse.SUPPRESS
    )  # the calls that the sanitizer watches, and no file
    options = parser.parse_args(argv)
    try:
        cupy = require_gpu(options.gpu)
    except RuntimeError as e:
        print(f"alphabar gpu-check: error: {e}", file=sys.stderr)
        return 2
    with cupy.cuda.Device(options.gpu):
        if options.small:
            return _small(cupy)
        return _all(cupy, options)


def _all(cupy: ModuleType, options: argparse.Namespace) -> int:
    begin = time.monotonic()
    deadline = begin + options.seconds
    report: Report = {"environment": environment(cupy, options)}
    sections: dict[str, Callable[[], Report]] = {
        "noise": lambda: noise(cupy),
        "accuracy": lambda: correct(cupy, deadline),
        "sanitizer": lambda: sanitizer(options, deadline),
        "bench": lambda: bench(cupy, deadline),
        "train": lambda: train(options, deadline),
    }
    failed = []
    for name in (s for s in SECTIONS if s in options.only):
        start = time.monotonic()
        try:
            report[name] = sections[name]()
        except Exception as e:  # the other sections are worth having all the same
            report[name] = {"ok": False, "error": f"{type(e).__name__}: {e}"}
        report[name]["seconds"] = round(time.monotonic() - start, 2)
        good = report[name].get("ok", True)
        failed += [] if good else [name]
        words = report[name].get("error") or report[name].get("skipped") or ("ok" if good else "FAILED")
        print(f"{name}: {words} ({report[name]['seconds']:.1f} s)", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")  # after each section: a later one may end the process
    print(
        f"wrote {options.out} after {time.monotonic() - begin:.0f} s; {'failed: ' + ', '.join(failed) if failed else 'all well'}"
    )
    return 1 if failed else 0


# ------------------------------------------------------------------------------------------------------------------- the machine


def environment(cupy: ModuleType, options: argparse.Namespace) -> Report:
    """The device, the versions of what runs on it, and the commit."""
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(options.gpu)
    torch = _torch()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": options.commit or commit(),
        "device": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "multiprocessors": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "l2_bytes": properties["l2CacheSize"],
        "driver": runtime.driverGetVersion(),
        "runtime": runtime.runtimeGetVersion(),
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "cupy": cupy.__version__,
        "numpy": np.__version__,
        "torch": None if torch is None else torch.__version__,
        "python": platform.python_version(),
        "sources_sha256": hashlib.sha256("".join(source(f) for f in sorted(FOLDER.glob("*.cu"))).encode()).hexdigest(),
    }


def _torch() -> ModuleType | None:
    """PyTorch, if it is there and sees the GPU. Only the benchmarks' own module imports it."""
    try:
        torch = _twins().torch
    except (ImportError, OSError):
        return None
    return torch if torch.cuda.is_available() else None


def _twins() -> ModuleType:
    """The kernels as PyTorch functions, from the checkout."""
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    return importlib.import_module("bench.torch_ops")


# -------------------------------------------------------------------------------------------------------------------- correctness


def noise(cupy: ModuleType) -> Report:
    """Are the bits of the normals those of every other backend?"""
    cases = json.loads((ROOT / "tests" / "data" / "noise_hashes.json").read_text())["cases"]
    wrong = []
    for case in cases:
        out = cupy.empty(tuple(case["shape"]), cupy.float32)
        kernels.normals(out, case["seed"], case["step"], case["stream"], case["first_sample"])
        if hashlib.sha256(out.get().astype("<f4").tobytes()).hexdigest() != case["sha256"]:
            wrong.append(case)
    return {"ok": not wrong, "cases": len(cases), "wrong": wrong}


def on_gpu(cupy: ModuleType, shift: bool = False) -> accuracy.Call:
    """Calls a public kernel with copies of NumPy arguments on the GPU; with ``shift``, 4 bytes past a multiple of 16."""

    def send(a: np.ndarray) -> Any:
        if not shift or a.dtype != np.float32:
            return cupy.asarray(a)
        return cupy.concatenate([cupy.zeros(1, a.dtype), cupy.asarray(a.ravel())])[1:].reshape(a.shape)

    def call(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        there_args, there_kwargs = accuracy.map_arrays(send, (args, kwargs))
        result = getattr(kernels, name)(*there_args, **there_kwargs)
        for here, there in [*zip(args, there_args, strict=True), *((kwargs[k], there_kwargs[k]) for k in kwargs)]:
            if isinstance(here, np.ndarray):
                here[...] = there.get()  # what the kernel wrote in place
        values = result if isinstance(result, tuple) else (result,)
        back = tuple(None if v is None else v.get() for v in values)
        return back if isinstance(result, tuple) else back[0]

    return call


def label(case: accuracy.Case) -> str:
    """ "32x32x32x64 kernel=3 cout=64" for a case of the registry."""
    rest = " ".join(f"{k}={v}" for k, v in case.items() if k != "shape")
    return f"{'x'.join(map(str, case['shape']))} {rest}".strip()


def correct(cupy: ModuleType, deadline: float) -> Report:
    """Every kernel against its definition in float64: the small cases, also unaligned, then the large ones."""
    rows, worst = [], 0.0
    for name, kernel in TABLE.items():
        small = accuracy.all_cases(kernel)
        trials = [(c, shift) for c in small for shift in (False, True)] + [(c, False) for c in kernel.benches]
        for i, (case, shift) in enumerate(trials):
            if time.monotonic() > deadline - 120 and i >= 2 * len(small):
                continue
            row: Report = {"kernel": name, "case": label(case), "unaligned": shift}
            try:
                found = accuracy.errors(kernel, case, on_gpu(cupy, shift))
                row |= {"errors": [vars(e) for e in found], "ok": all(e.within for e in found)}
                worst = max([worst, *(e.ours / e.limit for e in found if e.limit)])
            except Exception as e:
                row |= {"ok": False, "error": f"{type(e).__name__}: {e}"}
            rows.append(row)
    failed = [r for r in rows if not r["ok"]]
    for row in failed[:20]:
        print(f"  {row['kernel']} {row['case']} unaligned={row['unaligned']}: {row.get('error') or row['errors']}")
    return {"ok": not failed, "calls": len(rows), "largest_share_of_a_budget": worst, "failed": failed, "rows": rows}


def _small(cupy: ModuleType) -> int:
    """Each kernel over its small cases, every array in memory of its own so that a stray access is seen."""
    cupy.cuda.set_allocator(None)
    for kernel in TABLE.values():
        for case in accuracy.all_cases(kernel):
            for shift in (False, True):
                on_gpu(cupy, shift)(kernel.name, *accuracy.arguments(kernel, case))
    cupy.cuda.Device().synchronize()
    return 0


def sanitizer(options: argparse.Namespace, deadline: float) -> Report:
    """NVIDIA's compute-sanitizer over the small cases."""
    program = shutil.which("compute-sanitizer") or next(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"), None)
    if program is None:
        return {"skipped": "compute-sanitizer is not installed"}
    report: Report = {"ok": True}
    for tool in SANITIZERS:
        limit = min(150.0, deadline - time.monotonic() - 60)
        if limit < 20:
            report[tool] = "skipped: no time left"
            continue
        watched = [sys.executable, str(Path(__file__).resolve()), "--small", "--gpu", str(options.gpu)]
        command = [str(program), "--tool", tool, "--error-exitcode", "99", *watched]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            report[tool] = f"not finished after {limit:.0f} s"
            continue
        report[tool] = "clean" if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]
        report["ok"] = report["ok"] and done.returncode == 0
    return report


# ------------------------------------------------------------------------------------------------------------------------- speed


class Clock:
    """Times calls on the GPU: CUDA events around each, the L2 cache overwritten before it."""

    def __init__(self, cupy: ModuleType) -> None:
        self._cupy = cupy
        self._flush = cupy.empty(FLUSH // 4, cupy.float32)
        self._event = cupy.cuda.Event

    def once(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        self._flush.fill(0)
        begin, end = self._event(), self._event()
        begin.record()
        call()
        end.record()
        return begin, end

    def seconds(self, contestants: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """The median for each, taken in turns."""
        for call in contestants.values():
            for _ in range(3):
                call()
        pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, call in contestants.items():
                pairs[name] += [self.once(call) for _ in range(CALLS)]
        self._cupy.cuda.Device().synchronize()
        elapsed = self._cupy.cuda.get_elapsed_time
        return {name: statistics.median(elapsed(*p) for p in found) * 1e-3 for name, found in pairs.items()}


def bench(cupy: ModuleType, deadline: float) -> Report:
    """Time, bandwidth and rate of every large case, beside a copy of the same run and beside PyTorch where it is there."""
    clock = Clock(cupy)
    report: Report = {"copy_bytes_per_s": _copy_rate(cupy, clock), "rows": []}
    torch = _torch()
    with _same_stream(cupy, torch):
        for kernel in TABLE.values():
            for case in kernel.benches:
                if time.monotonic() > deadline - 40:
                    report["stopped"] = "no time left"
                    return report
                report["rows"].append(_timed(cupy, torch, clock, kernel, case, report["copy_bytes_per_s"], deadline))
    print(f"  {'kernel':24} {'case':48} {'us':>8} {'GB/s':>6} {'copy':>5} {'TFLOP/s':>7} {'torch':>6} {'compiled':>8}")
    for r in report["rows"]:
        ratios = [f"{r[k] / r['seconds']:.2f}x" if r.get(k) else "-" for k in ("torch_s", "compiled_s")]
        rate = f"{r['bytes_per_s'] / 1e9:6.0f} {r['share_of_copy']:5.0%} {r['flops_per_s'] / 1e12:7.2f}"
        print(f"  {r['kernel']:24} {r['case']:48} {r['seconds'] * 1e6:8.1f} {rate} {ratios[0]:>6} {ratios[1]:>8}")
    return report


def _copy_rate(cupy: ModuleType, clock: Clock) -> float:
    """Bytes read and written per second by a copy within the device."""
    here, there = (cupy.empty(COPY // 4, cupy.float32) for _ in range(2))
    return 2 * COPY / clock.seconds({"copy": lambda: cupy.copyto(there, here)})["copy"]


def _timed(
    cupy: ModuleType,
    torch: ModuleType | None,
    clock: Clock,
    kernel: kernels.Kernel,
    case: accuracy.Case,
    copy_rate: float,
    deadline: float,
) -> Report:
    host_args, host_kwargs = accuracy.arguments(kernel, case)
    pool = kernels.Pool()

    def send(a: np.ndarray) -> Any:
        if a.ndim and a.dtype == np.float64 and kernel.name in TABLED:
            a.setflags(write=False)  # a table of coefficients, as the schedules and samplers hand it over
            return a
        return cupy.asarray(a)

    args, kwargs = accuracy.map_arrays(send, (host_args, host_kwargs))

    def ours() -> None:
        with pool:
            getattr(kernels, kernel.name)(*args, **kwargs)

    contestants: dict[str, Callable[[], Any]] = {"alphabar": ours}
    row: Report = {"kernel": kernel.name, "case": label(case)}
    if torch is not None:
        for name, make in _opponents(torch, kernel.name, host_args, host_kwargs, deadline).items():
            try:
                call = make()
                call()
                contestants[name] = call
            except Exception as e:
                row[f"{name}_error"] = f"{type(e).__name__}: {e}"[:300]
    times = clock.seconds(contestants)
    seconds = times.pop("alphabar")
    rate = kernel.moved(case) / seconds
    row |= {
        "seconds": seconds,
        "bytes_per_s": rate,
        "share_of_copy": rate / copy_rate,
        "flops_per_s": kernel.flops(case) / seconds,
    }
    return row | {f"{name}_s": s for name, s in times.items()}


def _opponents(
    torch: ModuleType, name: str, args: tuple, kwargs: dict[str, Any], deadline: float
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """PyTorch's contestants, each made when asked for: eager; with TF32 allowed (convolutions); compiled (all but products)."""
    torch_ops = _twins()

    def send(a: np.ndarray) -> Any:
        table = a.ndim == 2 and a.dtype == np.float64 and name in TABLED  # their twins read the row on the host
        return torch.from_numpy(a.copy()) if table else torch.from_numpy(a.copy()).cuda()

    there_args, there_kwargs = accuracy.map_arrays(send, (args, kwargs))

    def with_tf32(allowed: bool) -> Callable[[], Any]:
        call = torch_ops.timed(name, there_args, there_kwargs)

        def run() -> Any:
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
            return call()

        return run

    found: dict[str, Callable[[], Callable[[], Any]]] = {"torch": lambda: with_tf32(False)}
    if name.startswith("conv2d"):
        found["torch_tf32"] = lambda: with_tf32(True)
    if name in ("q_sample", "step", "group_norm_silu", "sum_squares") and time.monotonic() < deadline - 120:
        found["compiled"] = lambda: torch_ops.timed(name, there_args, there_kwargs, compiled=True)
    return found


@contextlib.contextmanager
def _same_stream(cupy: ModuleType, torch: ModuleType | None) -> Iterator[None]:
    """PyTorch's work on CuPy's stream, so that one pair of events times either."""
    if torch is None:
        yield
        return
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        yield
        stream.synchronize()


# -------------------------------------------------------------------------------------------------------------------- a training


def train(options: argparse.Namespace, deadline: float) -> Report:
    """A short training run on the GPU through the public program."""
    limit = min(120.0, deadline - time.monotonic())
    if limit < 10:
        return {"skipped": "no time left"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "alphabar.tools.cli", "train", "--steps", "60", "--device", f"cuda:{options.gpu}"]
        try:
            done = subprocess.run(
                [*command, "--out", folder, "--name", "gpu"],
                capture_output=True,
                text=True,
                timeout=limit,
                check=False,
                cwd=folder,
            )
        except subprocess.TimeoutExpired:
            return {"ok": False, "error": f"not finished after {limit:.0f} s"}
        metrics = next(Path(folder).rglob("metrics.jsonl"), None)
        lines = metrics.read_text().splitlines() if metrics else []
    missing = "ModuleNotFoundError" in done.stderr
    return {
        "ok": done.returncode == 0 or missing,
        **({"skipped": done.stderr.strip().splitlines()[-1]} if missing else {}),
        "exit_code": done.returncode,
        "metrics": [json.loads(line) for line in lines[-3:]],
        "stderr": done.stderr[-2000:],
    }


if __name__ == "__main__":
    sys.exit(main())
