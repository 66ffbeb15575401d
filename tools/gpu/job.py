"""What a section works with: the device's library, its time, and a report that is written whenever there is something new."""

import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
Report = dict[str, Any]


@dataclass
class Job:
    """One section's run. ``deadline``: the monotonic time after which nothing new is begun; ``path``: where the report goes.

    ``data``: a data set to train on besides; ``sheets``: how the files of pictures of samples begin.
    """

    cupy: ModuleType
    deadline: float
    path: Path | None = None
    gpu: int = 0
    report: Report = field(default_factory=dict)
    data: Path | None = None
    sheets: Path | None = None

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def over(self, needed: float = 0.0) -> bool:
        """Whether there is no time for what takes ``needed`` seconds; the report then says so."""
        if self.left > needed:
            return False
        self.report["stopped"] = "no time left"
        return True

    def save(self) -> None:
        """Write the report as it is: what follows may end the process."""
        if self.path is not None:
            draft = self.path.with_suffix(".draft")
            draft.write_text(json.dumps(self.report, indent=1, default=float) + "\n", encoding="utf-8")  # NumPy's scalars
            os.replace(draft, self.path)


def in_checkout(name: str) -> ModuleType:
    """A module that is part of the checkout, not of the installed package: `bench.torch_ops`."""
    return importlib.import_module(name)


def torch_of() -> ModuleType | None:
    """PyTorch, if it is there and sees the GPU. Only the benchmarks' own module imports it."""
    try:
        torch: ModuleType = in_checkout("bench.torch_ops").torch
    except (ImportError, OSError):
        return None
    return torch if torch.cuda.is_available() else None


def map_all(f: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``f`` applied to every array in it, of NumPy or CuPy, in tuples and dicts too."""
    if isinstance(value, tuple):
        return tuple(map_all(f, v) for v in value)
    if isinstance(value, dict):
        return {k: map_all(f, v) for k, v in value.items()}
    return f(value) if hasattr(value, "dtype") and not isinstance(value, np.generic) else value
