"""A run folder: config.toml, env.json, metrics.jsonl, samples/, loss.png, ckpt/ — and the lock that keeps a second trainer out.

runs/<name>/config.toml     the resolved configuration
            env.json        versions, machine, threads, commit and command line of every start
            metrics.jsonl   one line a log step
            samples/        previews and the last sheet: .png of images, .txt of text
            loss.png        the curve
            ckpt/step_*.h5  the newest checkpoints
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import alphabar
from alphabar.nets import checkpoint
from alphabar.tools import config as configs
from alphabar.tools import pictures
from alphabar.tools.command import UserError
from alphabar.tools.config import Config
from alphabar.tools.files import replacing

LIBRARIES = ("numpy", "numba", "llvmlite", "h5py", "pillow", "tqdm", "threadpoolctl", "cupy-cuda12x", "cupy-cuda13x")
VARIABLES = ("ALPHABAR_", "OMP_", "GOMP_", "NUMBA_", "OPENBLAS_", "MKL_")


class Run:
    """An open run folder, locked for this process until ``close``."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints, self.samples = path, path / "ckpt", path / "samples"
        try:
            for folder in (path, self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise UserError(f"{path}: the run folder cannot be used ({e.strerror or e})") from e
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self._lock, 20, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise UserError(f"{path}: another trainer{f' (process {owner})' if owner else ''} is at work here") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        checkpoint.sweep(self.checkpoints)

    def close(self) -> None:
        """Release the lock. The system does the same when the process ends in any way."""
        os.close(self._lock)

    def begin(self, config: Config, device: str, step: int) -> None:
        """Write config.toml, add this start to env.json, drop the metrics of steps after ``step``."""
        _replace(self.path / "config.toml", configs.to_toml(config))
        starts = []
        with contextlib.suppress(OSError, ValueError):
            starts = json.loads((self.path / "env.json").read_text())["starts"]
        _replace(self.path / "env.json", json.dumps({"starts": [*starts, environment(device, step)]}, indent=1) + "\n")
        kept = [m for m in self.metrics() if m["step"] <= step]
        _replace(self.path / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in kept))

    def log(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; it is in the file when this returns."""
        with open(self.path / "metrics.jsonl", "a") as f:
            f.write(json.dumps(record, allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a torn last line is passed over."""
        return metrics(self.path)

    def save(self, arrays: dict[str, Any], meta: dict[str, Any], keep: int) -> Path:
        """Write the checkpoint of meta["step"] and delete old ones."""
        path = checkpoint.save(checkpoint.step_path(self.checkpoints, meta["step"]), arrays, meta)
        checkpoint.prune(self.checkpoints, keep)
        return path

    def draw_curve(self) -> None:
        """Draw loss.png from the metrics."""
        lines = self.metrics()
        if lines:
            picture = pictures.curve([m["step"] for m in lines], [m["loss"] for m in lines], f"{self.path.name}: training loss")
            pictures.write(picture, self.path / "loss.png")


def metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the metrics of a run folder; what is torn is passed over."""
    found = []
    with contextlib.suppress(OSError), open(path / "metrics.jsonl", errors="replace") as f:
        for line in f:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("loss"), float):
                    found.append(record)
    return found


def _replace(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def environment(device: str, step: int) -> dict[str, Any]:
    """What the numbers of a run may depend on besides its configuration."""
    from threadpoolctl import threadpool_info

    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "from_step": step,
        "command": shlex.join(sys.argv),
        "alphabar": alphabar.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "libraries": versions,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": device,
        "threads": [{k: p.get(k) for k in ("user_api", "internal_api", "num_threads")} for p in threadpool_info()],
        "variables": {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
    }


def commit() -> str | None:
    """The commit of the checkout that this package lies in; None where it lies in none, or git is not there."""
    root = Path(alphabar.__file__).parent
    if not (root / ".git").exists():
        return None
    try:
        out = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def new_folder(parent: Path, stem: str) -> Path:
    """Make and return the next free ``parent/stem-NNN``."""
    stem = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "run"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        taken = [int(m.group(1)) for p in parent.iterdir() if (m := re.fullmatch(re.escape(stem) + r"-(\d{1,9})", p.name))]
        for k in range(max(taken, default=0) + 1, 10**9):
            with contextlib.suppress(FileExistsError):
                (parent / f"{stem}-{k:03d}").mkdir()
                return parent / f"{stem}-{k:03d}"
    except OSError as e:
        raise UserError(f"{parent}: no run folder can be made here ({e.strerror or e})") from e
    raise UserError(f"{parent}: no free name {stem}-NNN")


def latest(parent: Path, names: Sequence[str] | None = None) -> Path | None:
    """The run folder with the most recently written checkpoint among ``names`` (all by default)."""
    folders = [parent / n for n in names] if names is not None else sorted(parent.iterdir()) if parent.is_dir() else []
    dated = [(found[0][1].stat().st_mtime_ns, f) for f in folders if (found := checkpoint.listing(f / "ckpt"))]
    return max(dated)[1] if dated else None


def read(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(file, arrays, meta) of a checkpoint file, of a run folder's newest valid one, or of the latest run in a folder of runs."""
    if not path.is_dir():
        return path, *checkpoint.load(path)
    run = path if (path / "ckpt").is_dir() or checkpoint.listing(path) else latest(path) or path
    return checkpoint.newest(run / "ckpt" if (run / "ckpt").is_dir() else run)
