"""A machine that seems to have a GPU: the stand-in for CuPy in front, the host runner of CUDA kernels behind."""

import sys
import types
from typing import Any

import numpy as np
import pytest

from alphabar.kernels.compile import FOLDER, Cuda
from alphabar.kernels.gpu import launch
from tests import cusim, fake_cuda, fake_cupy
from tests.cusim.launching import module


class _Kernel:
    """A kernel as CuPy has it: called with grid, block and arguments, it goes to the current stream."""

    num_regs, local_size_bytes = 32, 0
    max_dynamic_shared_size_bytes = 48 << 10
    kernel = types.SimpleNamespace(ptr=1)

    def __init__(self, device: "HostedDevice", file: str, name: str) -> None:
        self.device, self.file, self.name = device, file, name

    def __call__(self, grid: tuple, block: tuple, args: tuple, shared_mem: int = 0) -> None:
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise fake_cuda.CUDARuntimeError(1, f"{self.name}: {shared_mem} bytes of shared memory were not allowed")
        memories = [a.memory for a in args if isinstance(a, fake_cupy.ndarray)]
        values = tuple(None if type(a) is np.uintp else fake_cupy.unwrap(a) for a in args)  # a pointer that is no array: null
        device, name = self.device, self.name
        built = module(FOLDER / f"{self.file}.cu", device.mode)

        def run() -> None:
            device.launched.append(name)
            built.launch(name, grid, block, values, shared_mem, device.order)

        fake_cuda.current().give(fake_cuda.Work(name, run, memories))


class HostedDevice(Cuda):
    """The project's own device, with kernels built for the host. ``launched``: the kernels that ran, in order."""

    def __init__(self, mode: str = "fast", order: str = "forward") -> None:
        self.xp: Any = fake_cupy.cupy
        self._kernels, self._modules = {}, {}
        self.mode, self.order = mode, order
        self.launched: list[str] = []

    def module(self, file: str) -> Any:
        """A module as CuPy has it, built when a kernel of it is launched."""
        return types.SimpleNamespace(compile=lambda: None, get_function=lambda name: _Kernel(self, file, name))


def pretend(patch: pytest.MonkeyPatch) -> HostedDevice:
    """Make this process's machine one that seems to have a GPU."""
    device = HostedDevice()
    patch.setitem(sys.modules, "cupy", fake_cupy.cupy)
    patch.setattr(launch, "_cuda", lambda: device)
    return device


def available() -> bool:
    """Whether kernels can be built for the host."""
    return cusim.available()
