"""Launches kernels of a built library: arguments by the kernel's signature, faults as exceptions, traffic by source line."""

import ctypes
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alphabar.kernels.compile import FOLDER

from .building import ORDERS, build, run

_TYPES = {
    **{"f4": np.float32, "f8": np.float64, "b1": np.bool_, "i1": np.int8, "i2": np.int16, "i4": np.int32, "i8": np.int64},
    **{"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64},
}


class Fault(RuntimeError):
    """A kernel broke a rule of CUDA; the text says which, and where."""


class Traffic(NamedTuple):
    """What one access of a kernel moved in a launch. ``via``: the line of a header, where the access stands in one."""

    line: str
    via: str
    kind: str  # "load" or "store"
    memory: str  # "global" or "shared"
    bytes: int  # of one thread's access
    requests: int  # of a warp
    useful: int  # bytes that threads asked for
    sectors: int  # of 32 bytes, of global memory
    passes: int  # through the banks of shared memory
    phases: int  # the fewest passes that accesses of this width take

    @property
    def share(self) -> float:
        """The useful part of the sectors of global memory; above 1 where threads share words."""
        return self.useful / (32 * self.sectors)

    @property
    def conflict(self) -> float:
        """How often the banks are gone through for each time that is needed; 1 is free of conflicts."""
        return self.passes / self.phases


# ------------------------------------------------------------------------------------------------------------------------ symbols


def _symbols(path: Path) -> dict[str, tuple[int, int]]:
    """name -> (address, size) of the variables in a library or object file."""
    rows = (line.split() for line in run(["nm", "-S", "--defined-only", str(path)]).splitlines())
    return {row[3]: (int(row[0], 16), int(row[1], 16)) for row in rows if len(row) == 4 and row[2] in "bBdDuV"}


def _plain(mangled: str) -> str:
    """ "…_E4part" -> "part": the variable's own name in the mangled name of a function's static variable."""
    match = re.search(r"E(\d+)(\w+?)(?:_\d*)?(?:\.\d+)?$", mangled)
    return match[2][: int(match[1])] if match else mangled


# -------------------------------------------------------------------------------------------------------------------- one library


class Module:
    """One kernel file, built for the host."""

    def __init__(self, path: Path, mode: str = "fast") -> None:
        self.checks = mode.endswith("check")
        self.path, self.object = build(path, mode)
        self.library = ctypes.CDLL(str(self.path))
        self.library.cusim_error.restype = ctypes.c_char_p
        self.library.cusim_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self._places: dict[str, list[str]] = {}
        if self.checks:
            self.library.cusim_reports.restype = self.library.cusim_traffic.restype = ctypes.c_char_p
            self.library.cusim_argument.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
            self.library.cusim_dynamic.argtypes = [ctypes.c_size_t]
            for name in ("cusim_static", "cusim_constant"):
                getattr(self.library, name).argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_char_p]
            of_kernels = _symbols(self.object)
            for name, (address, size) in _symbols(self.path).items():
                if name in of_kernels and "5cusim" not in name:
                    local = name.startswith("_ZZ") or re.search(r"\.\d+$", name)
                    declare = self.library.cusim_static if local else self.library.cusim_constant
                    declare(address, size, _plain(name).encode())

    def signature(self, name: str) -> list[str]:
        """The codes of a kernel's parameters: "f4" a float, "pf4" a pointer to floats, …"""
        try:
            function = getattr(self.library, f"cusim_signature_{name}")
        except AttributeError:
            raise AttributeError(f"{self.path.name} has no kernel {name}") from None
        function.restype = ctypes.c_char_p
        return function().decode().split()

    def launch(
        self,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple,
        shared: int = 0,
        order: str = "forward",
        seed: int = 1,
        count: bool = False,
    ) -> None:
        """Run a kernel. Every argument must have exactly its parameter's type; None is null. ``count``: see :meth:`traffic`."""
        signature = self.signature(name)
        if len(args) != len(signature):
            raise TypeError(f"{name}: {len(args)} arguments for {len(signature)} parameters")
        copies: list[tuple[np.ndarray, np.ndarray]] = []
        values = [self._value(name, i, a, code, copies) for i, (a, code) in enumerate(zip(args, signature, strict=True))]
        if self.checks:
            self.library.cusim_forget()
            self.library.cusim_count(int(count))
            for i, (original, copy) in enumerate(copies):
                position = next(k for k, a in enumerate(args) if a is original)
                self.library.cusim_argument(copy.ctypes.data, copy.nbytes, f"argument {position} (array {i})".encode())
            if shared:
                self.library.cusim_dynamic(shared)
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        sizes = (ctypes.c_uint * 6)(*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3])
        self.library.cusim_order(ORDERS.index(order), seed)
        failed = getattr(self.library, f"cusim_launch_{name}")(sizes, ctypes.c_size_t(shared), pointers)
        for original, copy in copies:
            if original.flags.writeable:
                original[...] = copy
        text = self.library.cusim_error().decode()
        if self.checks:
            text += self._with_lines(self.library.cusim_reports().decode())
        if failed or text:
            raise Fault(f"{name}: {text}")

    def _value(self, name: str, i: int, a: Any, code: str, copies: list) -> np.ndarray:
        """The bytes of one argument, as an array of one element."""
        if not code.startswith("p"):
            if code not in _TYPES:
                raise TypeError(f"{name}: parameter {i} is a struct, which a launch cannot fill")
            if type(a) is not _TYPES[code]:
                raise TypeError(f"{name}: argument {i} is {type(a).__name__}, the kernel takes {_TYPES[code].__name__}")
            return np.array([a])
        if a is None:
            return np.zeros(1, np.uintp)
        of_vectors = code.startswith("ps")  # an array of anything that makes up whole structs
        fits = isinstance(a, np.ndarray) and a.flags.c_contiguous
        if not fits or (a.nbytes % int(code[2:]) if of_vectors else a.dtype != _TYPES[code[1:]]):
            kind = f"a {a.dtype} array" if isinstance(a, np.ndarray) else type(a).__name__
            taken = f"array of {code[2:]}-byte structs" if of_vectors else f"{_TYPES[code[1:]].__name__} array"
            raise TypeError(f"{name}: argument {i} is {kind}, the kernel takes a contiguous {taken}")
        if self.checks:
            a = self._copy(a, copies)
        return np.array([a.ctypes.data], np.uintp)

    def _copy(self, a: np.ndarray, copies: list) -> np.ndarray:
        """The array with nothing of the program's beside it, as well aligned as a device's memory would be."""
        for original, copy in copies:
            if original is a:
                return copy
        buffer = np.empty(a.nbytes + 512, np.uint8)
        start = -buffer.ctypes.data % 256 + a.ctypes.data % 16
        copy = buffer[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
        copy[...] = a
        copies.append((a, copy))
        return copy

    def _lines(self, addresses: list[str]) -> dict[str, list[str]]:
        """The place of each instruction: the line where it stands, then those that the functions around it were inlined at."""
        new = [a for a in dict.fromkeys(addresses) if a not in self._places]
        if new:
            text = run(["addr2line", "-a", "-i", "-e", str(self.path), *new])
            for block in re.split(r"^0x", text, flags=re.MULTILINE)[1:]:
                address, *frames = block.splitlines()
                self._places[f"0x{int(address, 16):x}"] = [f.split()[0].rpartition("/")[2] for f in frames]
        return {a: self._places[a] for a in addresses}

    def _line_and_via(self, frames: list[str]) -> tuple[str, str]:
        frames = [f for f in frames if not f.startswith(("cuda.h:", "mutants.h:"))] or frames
        of_kernels = next((f for f in frames if ".cuh:" not in f), frames[0])
        return of_kernels, "" if of_kernels == frames[0] else frames[0]

    def _with_lines(self, text: str) -> str:
        if not text:
            return text
        lines = self._lines(re.findall(r"@(0x[0-9a-f]+)", text))

        def place(match: re.Match) -> str:
            line, via = self._line_and_via(lines[match[1]])
            return f"at {via} (of {line})" if via else f"at {line}"

        return re.sub(r"@(0x[0-9a-f]+)", place, text)

    def traffic(self) -> list[Traffic]:
        """What each access moved in the last launch, which was made in mode ``check`` with ``count``."""
        rows = [line.split() for line in self.library.cusim_traffic().decode().splitlines()]
        lines = self._lines([row[0][1:] for row in rows])
        return [Traffic(*self._line_and_via(lines[row[0][1:]]), *row[1:3], *map(int, row[3:])) for row in rows]


# ----------------------------------------------------------------------------------------------------------------------- a device


@cache
def module(path: Path, mode: str) -> Module:
    """A kernel file, built once."""
    return Module(path, mode)


class Host:
    """What launch code is given as its device: ``xp`` is NumPy, and ``launch`` runs ``<folder>/<file>.cu`` on the host.

    ``traffic=True`` (in mode ``check``) gathers :class:`Traffic` of every launch; ``launched`` lists the kernels.
    """

    xp = np

    def __init__(
        self,
        mode: str = "fast",
        order: str = "forward",
        seed: int = 1,
        traffic: bool = False,
        folder: Path = FOLDER,
        modules: Callable[[Path, str], Module] = module,
    ) -> None:
        self.mode, self.order, self.seed, self.folder = mode, order, seed, folder
        self.launched: list[str] = []
        self.traffic: list[Traffic] = []
        self._count, self._modules = traffic, modules

    def launch(self, file: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared: int = 0) -> None:
        """Run a kernel of ``<file>.cu`` to its end."""
        self.launched.append(name)
        built = self._modules(self.folder / f"{file}.cu", self.mode)
        built.launch(name, grid, block, args, shared, self.order, self.seed, self._count)
        if self._count:
            self.traffic += built.traffic()
