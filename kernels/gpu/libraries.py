"""How NVIDIA's libraries are found: wheels, conda, a toolkit of the system."""

from functools import cache
from typing import Any

from .launch import Device


@cache
def load(name: str) -> str | None:
    """Load the library of this name ("cudart", "nvrtc", "cublasLt") into the process; its path, or None where it is not found.

    Those that other libraries open by their bare names must be there already, where they lie on no search path.
    """
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib  # with CuPy from 14 on

        return load_nvidia_dynamic_lib(name).abs_path
    except (ImportError, RuntimeError):  # DynamicLibNotFoundError is a RuntimeError
        return None


def number(device: Device) -> int:
    """Which GPU is the current one."""
    return device.xp.cuda.runtime.getDevice()


def stream(device: Device) -> int:
    """The handle of the stream that work goes to."""
    return device.xp.cuda.get_current_stream().ptr


def address(a: Any) -> int:
    """Where a CuPy array begins; 0 for None."""
    return 0 if a is None else a.data.ptr
