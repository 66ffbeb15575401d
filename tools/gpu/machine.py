"""The machine: what a report says of it, and what its compiler makes of the kernel files."""

import hashlib
import json
import platform
import time
from types import ModuleType
from typing import Any

import numpy as np

from alphabar.kernels.compile import FOLDER, source
from alphabar.kernels.gpu import launch

from .job import ROOT, Job, Report, torch_of

PACKAGES = ("numba", "h5py", "scipy", "matplotlib", "torch", "triton")


def environment(cupy: ModuleType, gpu: int, commit: str | None) -> Report:
    """The device, the versions of what runs on it, the commit and the hash of the kernels' sources."""
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(gpu)
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
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
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "sources_sha256": hashlib.sha256("".join(source(f) for f in sorted(FOLDER.glob("*.cu"))).encode()).hexdigest(),
    }


def commit() -> str | None:
    """The commit of the checkout, where git is there and what reads it is installed."""
    try:
        from alphabar.tools import runs
    except ImportError:
        return None
    return runs.commit()


def version(package: str) -> str | None:
    """The installed version; None where it is not there."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as found

    try:
        return found(package)
    except PackageNotFoundError:
        return None


def build(job: Job) -> None:
    """Compile every file; the seconds each took."""
    device, seconds = launch.current(), job.report.setdefault("seconds_of_files", {})
    job.report["torch_sees_the_gpu"] = torch_of() is not None
    failed = job.report.setdefault("failed", {})
    for path in sorted(FOLDER.glob("*.cu")):
        start = time.monotonic()
        try:
            device.module(path.stem).compile()
        except Exception as e:  # the other files are worth having all the same
            failed[path.name] = f"{type(e).__name__}: {e}"[:2000]
        seconds[path.name] = round(time.monotonic() - start, 2)
        job.save()
    job.report["ok"] = not failed


class Recorder:
    """A device that keeps what is launched on another one: {(file, kernel): {(threads of a block, bytes of shared memory)}}."""

    def __init__(self, device: Any) -> None:
        self.device, self.xp = device, device.xp
        self.launched: dict[tuple[str, str], set[tuple[int, int]]] = {}

    def launch(self, file: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared: int = 0) -> None:
        """Launch on the device."""
        self.launched.setdefault((file, name), set()).add((int(np.prod(block)), int(shared)))
        self.device.launch(file, name, grid, block, args, shared)


def resources(job: Job, recorder: Recorder) -> list[Report]:
    """Registers, local memory and resident warps of every kernel that was launched, as the driver reports them."""
    budgets = json.loads((ROOT / "tests" / "data" / "cuda_budgets.json").read_text())
    occupancy = job.cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
    rows = []
    for (file, name), shapes in sorted(recorder.launched.items()):
        kernel = recorder.device.kernel(file, name)
        threads, shared = max(shapes)
        rows.append(
            {
                "kernel": name,
                "registers": kernel.num_regs,
                "budget": budgets.get(name, {}).get("registers"),
                "local_bytes": kernel.local_size_bytes,
                "threads": threads,
                "dynamic_bytes": shared,
                "warps": occupancy(kernel.kernel.ptr, threads, shared) * -(-threads // 32),
            }
        )
    return rows
