"""What is run on the runner: the project's registry and tests, or the functions of a file of one's own."""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from alphabar.kernels import TABLE, accuracy, gpu
from alphabar.kernels.bf16 import BF16
from alphabar.kernels.compile import FOLDER
from tests import cuda_arrays, cuda_cases

from .launching import Host

NAN = 0x7FC0  # a bfloat16
TESTS = ("tests.test_cuda_host", "tests.test_cuda_norm", "tests.test_cuda_elementwise")


@dataclass(frozen=True)
class Probe:
    """One thing to run on a device. It raises where a result is wrong."""

    name: str
    call: Callable[[Host], None]


@dataclass(frozen=True)
class Project:
    """Kernel files and what runs them."""

    folder: Path
    probes: tuple[Probe, ...]

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.cu"))


# ----------------------------------------------------------------------------------------------------------- the registry's cases


def unwritten(shape: tuple[int, ...], dtype: Any, xp: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    return np.full(shape, NAN if dtype == BF16 else np.nan if dtype.kind == "f" else -7, dtype)


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Inside, what launchers allocate begins as NaN or -7: an element that no thread writes must show."""
    names = [m.name for m in pkgutil.iter_modules(gpu.__path__)]
    modules = [importlib.import_module(f"{gpu.__name__}.{name}") for name in names]
    patches = [mock.patch.object(m, "empty", unwritten) for m in modules if hasattr(m, "empty")]
    for p in patches:
        p.start()
    try:
        yield
    finally:
        for p in patches:
            p.stop()


def launcher(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a kernel's launch code."""
    return getattr(gpu, name)(*args, **kwargs)


def shifted(a: np.ndarray) -> np.ndarray:
    """A copy that begins one element past a multiple of 16 bytes."""
    if a.dtype not in (np.float32, BF16):
        return a
    in_16 = 16 // a.itemsize
    buffer = np.empty(a.size + 2 * in_16, a.dtype)
    start = (-buffer.ctypes.data // a.itemsize) % in_16 + 1
    copy = buffer[start : start + a.size].reshape(a.shape)
    copy[...] = a
    return copy


def shifted_launcher(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call a kernel's launch code with arrays that are not aligned to 16 bytes."""
    new_args, new_kwargs = accuracy.map_arrays(shifted, (args, kwargs))
    result = getattr(gpu, name)(*new_args, **new_kwargs)
    for old, new in [*zip(args, new_args, strict=True), *((kwargs[k], new_kwargs[k]) for k in kwargs)]:
        if isinstance(old, np.ndarray):
            old[...] = new  # what the kernel wrote in place
    return result


@cache
def _expected(name: str, case: int) -> Any:
    kernel = TABLE[name]
    return accuracy.expected(kernel, accuracy.all_cases(kernel)[case])


def _of_registry(name: str, case: int, call: Any) -> Callable[[Host], None]:
    def probe(device: Host) -> None:
        with gpu.on(device):
            for error in accuracy.compare(TABLE[name], _expected(name, case), call):
                assert error.within, error

    return probe


def _of_case(case: cuda_cases.Case, place: cuda_arrays.Place) -> Callable[[Host], None]:
    def probe(device: Host) -> None:
        with gpu.on(device):
            case(place)

    return probe


def _of_tests() -> Iterator[Probe]:
    """The tests of launch code that take a device and nothing else but parameters."""
    for module in TESTS:
        if importlib.util.find_spec(module) is None:
            continue
        for name, test in inspect.getmembers(importlib.import_module(module), inspect.isfunction):
            if not name.startswith("test_") or "host" not in inspect.signature(test).parameters:
                continue
            marks = [m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
            names = [[n.strip() for n in m.args[0].split(",")] if isinstance(m.args[0], str) else list(m.args[0]) for m in marks]
            parameters = {n for group in names for n in group}
            if {*inspect.signature(test).parameters} != {"host", *parameters} or parameters & {"name"} or "every_kernel" in name:
                continue
            for values in product(*(m.args[1] for m in marks)):
                given = {n: v for group, vs in zip(names, values, strict=True) for n, v in _assigned(group, vs)}
                yield Probe(f"{name}{list(given.values()) or ''}", _of_test(test, given))


def _assigned(names: list[str], values: Any) -> list[tuple[str, Any]]:
    return [(names[0], values)] if len(names) == 1 else list(zip(names, values, strict=True))


def _of_test(test: Callable[..., None], given: dict[str, Any]) -> Callable[[Host], None]:
    def probe(device: Host) -> None:
        with gpu.on(device):
            test(host=device, **given)

    return probe


def registry(tests: bool = True) -> Project:
    """Every case of the project's registry, as it is and with arrays that are not aligned; and the tests of its launch code."""
    probes = [
        Probe(f"{name}[{i}]{' shifted' if call is shifted_launcher else ''}", _of_registry(name, i, call))
        for name, kernel in TABLE.items()
        for i in range(len(accuracy.all_cases(kernel)))
        for call in (launcher, shifted_launcher)
    ]
    probes += [
        Probe(f"{name}{' shifted' if place is shifted else ''}", _of_case(case, place))
        for name, case in cuda_cases.EVERY.items()
        for place in (cuda_arrays.aligned, shifted)
    ]
    return Project(FOLDER, (*probes, *(_of_tests() if tests else ())))


# ----------------------------------------------------------------------------------------------------------------- one's own file


def script(path: Path) -> Project:
    """Every function of a Python file that takes one argument named ``device``; the kernel files lie beside it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    functions = [(n, f) for n, f in vars(loaded).items() if inspect.isfunction(f)]
    probes = tuple(Probe(n, f) for n, f in functions if list(inspect.signature(f).parameters) == ["device"])
    if not probes:
        raise ValueError(f"{path} has no function with one parameter named device")
    return Project(path.resolve().parent, probes)
