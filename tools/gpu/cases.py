"""The registry's cases at a GPU's size: arrays of 256 MiB, which no L2 cache holds, filled on the device itself."""

from collections.abc import Iterable
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from alphabar import kernels
from alphabar.kernels import accuracy
from alphabar.kernels.registry import Arguments, Case, Kernel

from .job import map_all

BYTES = 256 << 20
BALANCE = 12.0  # operations a byte; kernels above it are bound by arithmetic, and larger arrays tell nothing new
TABLED = ("step", "q_sample", "categorical_posterior", "categorical_q_sample")  # kernels that take a table of float64
FIRST = ("step", "q_sample", "group_norm_silu", "adamw_ema", "group_norm_silu_backward")  # what is promised comes first


def label(case: Case) -> str:
    """ "32x32x32x64 kernel=3 cout=64" for a case of the registry."""
    rest = " ".join(f"{k}={v}" for k, v in case.items() if k != "shape")
    return f"{'x'.join(map(str, case['shape']))} {rest}".strip()


def bound_by_memory(kernel: Kernel, case: Case) -> bool:
    """Whether the operations a byte are few."""
    return kernel.flops(case) <= BALANCE * kernel.moved(case)


def enlarged(kernel: Kernel, case: Case, nbytes: int | None = None) -> Case:
    """The case with so long a batch that the array of its shape (all arrays together, of a convolution) is of BYTES at least."""
    first, *rest = case["shape"]
    moved = kernel.moved(case)
    held = moved if "cout" in case else min(4 * prod(case["shape"]), moved)
    return {**case, "shape": (first * max(1, -(-(nbytes or BYTES) // held)), *rest)}


def large(kernel: Kernel) -> list[Case]:
    """The benchmarks' cases, those bound by memory enlarged; one of each kind of sample. The chief one (:func:`chief`) first."""
    found: dict[Any, Case] = {}
    for case in kernel.benches:
        case = enlarged(kernel, case) if bound_by_memory(kernel, case) else case
        batch = () if bound_by_memory(kernel, case) else case["shape"][:1]
        kind = (batch, case["shape"][1:], *sorted((k, str(v)) for k, v in case.items() if k != "shape"))
        found.setdefault(kind, case)
    cases = list(found.values())
    return sorted(cases, key=lambda c: c is not chief(cases))


def chief(cases: list[Case]) -> Case:
    """The case that stands for a kernel: the last one, or the last whose only option is noise made in the kernel."""
    return next((c for c in reversed(cases) if c.keys() == {"shape", "noise"} and c["noise"] == "made"), cases[-1])


def ordered(table: dict[str, Kernel]) -> list[tuple[Kernel, Case, bool]]:
    """(kernel, case, whether it is the chief one), in the order of their worth.

    The chief cases, those of FIRST before the others; then what memory bounds; then what arithmetic does.
    """
    names = sorted(table, key=lambda n: FIRST.index(n) if n in FIRST else len(FIRST))
    every = [(table[n], case, i == 0) for n in names for i, case in enumerate(large(table[n]))]
    return sorted(every, key=lambda row: (not row[2], not bound_by_memory(*row[:2])))


def small(table: dict[str, Kernel]) -> Iterable[tuple[Kernel, Case]]:
    """The benchmarks' cases as the registry has them, where they are not among the large ones."""
    return ((k, c) for k in table.values() for c in k.benches if c not in large(k))


class DeviceRandom:
    """The generator that the registry's makers ask, its normals on the device: those of the kernel. The rest is NumPy's."""

    def __init__(self, cupy: ModuleType, seed: int = 0) -> None:
        self._cupy, self._seed, self._count = cupy, seed, 0
        self._host = np.random.default_rng(seed)

    def standard_normal(self, shape: Any) -> Any:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self._count += 1
        out = self._cupy.empty(shape, np.float32)
        return kernels.normals(out, self._seed, self._count) if shape else out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


def arguments(cupy: ModuleType, kernel: Kernel, case: Case, seed: int = 0) -> Arguments:
    """A case's arguments on the device; tables of coefficients stay on the host, as schedules and samplers hand them over."""

    def send(a: Any) -> Any:
        if not isinstance(a, np.ndarray):
            return a
        if a.ndim and a.dtype == np.float64 and kernel.name in TABLED:
            a.setflags(write=False)
            return a
        return cupy.asarray(a)

    try:
        args, kwargs = kernel.make(DeviceRandom(cupy, seed), case, np.float32)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a maker that mixes its normals with arrays of the host
        args, kwargs = kernel.make(np.random.default_rng(seed), case, np.float32)
    return map_all(send, args), map_all(send, kwargs)


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
