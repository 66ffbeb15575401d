"""From ``cuda/*.cu`` to what can be launched: the source text, and CuPy's modules, each compiled when it is first used."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .compiling import compiling
from .device_memory import out_of_memory

FOLDER = Path(__file__).parent / "cuda"
_INCLUDE = re.compile(r'^#include "([\w.]+)"[ \t]*$', re.MULTILINE)


def source(path: Path) -> str:
    """The text of a kernel file, each ``#include "…"`` replaced by the file beside it: NVRTC has no include path."""

    def text(match: re.Match) -> str:
        line = match.string.count("\n", 0, match.start()) + 2
        return f'#line 1 "{match[1]}"\n{source(path.parent / match[1])}#line {line} "{path.name}"'

    return _INCLUDE.sub(text, path.read_text(encoding="utf-8"))


def require_gpu(index: int = 0) -> ModuleType:
    """CuPy, once it is sure that it can use GPU ``index``. Raises RuntimeError with one clear line otherwise."""
    try:
        import cupy
    except ImportError as e:
        raise RuntimeError("the GPU needs CuPy: pip install cupy-cuda13x (or cupy-cuda12x for an older driver)") from e
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as e:  # CUDARuntimeError, or an ImportError of the driver's library
        raise RuntimeError(f"no usable GPU: {e}") from e
    if not 0 <= index < count:
        raise RuntimeError(f"there is no GPU {index}: this machine has {count}")
    return cupy


class Cuda:
    """The current CUDA device through CuPy: launches go to CuPy's current stream."""

    def __init__(self) -> None:
        self.xp = require_gpu()
        self._kernels: dict[tuple[str, str, int], Any] = {}
        self._modules: dict[tuple[str, int], Any] = {}

    def kernel(self, file: str, name: str) -> Any:
        """The kernel ``name`` of ``cuda/<file>.cu``, compiled for the current device (CuPy keeps the binary on disk)."""
        index = self.xp.cuda.runtime.getDevice()
        found = self._kernels.get((file, name, index))
        if found is None:
            with compiling(f"{file}.cu"):
                found = self._kernels[file, name, index] = self.module(file).get_function(name)
        return found

    def module(self, file: str) -> Any:
        """The module of ``cuda/<file>.cu``: compiled by its method ``compile``, or when it is first asked for a kernel."""
        key = file, self.xp.cuda.runtime.getDevice()
        found = self._modules.get(key)
        if found is None:
            found = self._modules[key] = self.xp.RawModule(code=source(FOLDER / f"{file}.cu"), options=("--std=c++17",))
        return found

    def launch(self, file: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared: int = 0) -> None:
        """Start a kernel. Scalars are of their parameter's NumPy type: a Python float would arrive as a double. None is null.

        OutOfDeviceMemory where it does not start for want of memory.
        """
        kernel = self.kernel(file, name)
        if shared > 48 << 10 and kernel.max_dynamic_shared_size_bytes < shared:
            kernel.max_dynamic_shared_size_bytes = shared
        try:
            kernel(grid, block, tuple(np.uintp(0) if a is None else a for a in args), shared_mem=shared)
        except Exception as e:
            found = out_of_memory(e)
            if found is None:
                raise
            raise found from e
