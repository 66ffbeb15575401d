"""Runs the project's CUDA C on the host: the same ``.cu`` files through g++, launched with NumPy arrays.

Two modes. ``fast`` computes, with the threads of a block in a chosen order: forward, reverse or random. ``check`` watches every
memory access and raises :class:`Fault` at a race, an access out of bounds or misaligned, or a read of unwritten shared memory.
Built libraries are kept in the user's cache folder under the hash of all that went into them.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.kernels.compile import FOLDER, source

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")
_DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+([\w:]+)\s+(\w+)\s*\[\s*\]\s*;")
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')
_SCALARS = {"f4": np.float32, "f8": np.float64, "i4": np.int32, "u4": np.uint32, "i8": np.int64, "u8": np.uint64}
_COMPILE = [
    *("g++", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique", "-I", str(HERE)),
    *("-Wno-unknown-pragmas", "-Wno-attributes", *(["-mavx2", "-mfma"] if platform.machine() == "x86_64" else [])),
]
_MODES = {
    "fast": (["-O1"], ("scheduler",)),
    "check": (["-Og", "-gdwarf-4", "-fsanitize=thread", "-DCUSIM_CHECK"], ("scheduler", "checker")),
}


class Fault(RuntimeError):
    """A kernel broke a rule of CUDA; the text says which, and where."""


def available() -> bool:
    """Whether this machine can build for the host."""
    return shutil.which("g++") is not None


# ----------------------------------------------------------------------------------------------------------------------- building


def _cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder = base / "alphabar" / "cusim"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"alphabar-cusim-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _cached(name: str, parts: Iterable[str], suffix: str, make: Any) -> Path:
    """The file that ``make(path)`` writes, made once for these parts."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = _cache_folder() / f"{name}-{digest}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder) / path.name
            make(draft)
            os.replace(draft, path)
    return path


def _headers() -> str:
    return "".join((HERE / name).read_text() for name in ("cuda.h", "hooks.h"))


def _runtime(name: str) -> Path:
    """The object file of a part of the runtime."""
    path = HERE / f"{name}.cpp"
    command = [*_COMPILE, "-O2", "-g", "-c", str(path)]
    return _cached(name, (path.read_text(), _headers(), *command), ".o", lambda o: _run([*command, "-o", str(o)]))


@cache
def kernels(path: Path) -> tuple[str, ...]:
    """The names of the kernels in a file: looked for where macros are expanded, since some come out of one."""
    return tuple(_KERNEL.findall(_run(["g++", "-E", "-P", "-x", "c++", "-"], source(path))))


def build(path: Path, mode: str = "fast") -> tuple[Path, Path]:
    """(library, object file) of a kernel file."""
    flags, runtime = _MODES[mode]
    text = _DYNAMIC_SHARED.sub(r"CUSIM_DYNAMIC_SHARED(\1, \2);", source(path))
    exports = "".join(f"CUSIM_EXPORT({name})\n" for name in kernels(path))
    text = f'#include "cuda.h"\n#line 1 "{path.name}"\n{text}\n#line 1 "exports"\n{exports}'
    compile_ = [*_COMPILE, *flags, "-c"]

    def compiled_text(target: Path) -> None:
        target.with_suffix(".cpp").write_text(text)
        _run([*compile_, str(target.with_suffix(".cpp")), "-o", str(target)])

    compiled = _cached(f"{path.stem}-{mode}", (text, _headers(), *compile_), ".o", compiled_text)
    objects = [compiled, *map(_runtime, runtime)]
    link = ["g++", "-shared", *map(str, objects), "-ldl"]
    return _cached(f"{path.stem}-{mode}", link, ".so", lambda so: _run([*link, "-o", str(so)])), compiled


def prepare(files: Iterable[Path], modes: Iterable[str] = ("fast",), workers: int = 2) -> None:
    """Build several files at once, where that is still to be done."""
    for name in {name for mode in modes for name in _MODES[mode][1]}:
        _runtime(name)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: build(*job), [(f, m) for f in files for m in modes]))


# ---------------------------------------------------------------------------------------------------------------------- launching


def _symbols(path: Path) -> dict[str, tuple[int, int]]:
    """name -> (address, size) of the variables in a library or object file."""
    rows = (line.split() for line in _run(["nm", "-S", "--defined-only", str(path)]).splitlines())
    return {row[3]: (int(row[0], 16), int(row[1], 16)) for row in rows if len(row) == 4 and row[2] in "bBdDuV"}


def _plain(mangled: str) -> str:
    """ "…_E4part" -> "part": the variable's own name in the mangled name of a function's static variable."""
    match = re.search(r"E(\d+)(\w+?)(?:_\d*)?(?:\.\d+)?$", mangled)
    return match[2][: int(match[1])] if match else mangled


Traffic = tuple[str, str, int, float]  # file and line, "load" or "store", bytes of an access, useful share of the sectors


class Module:
    """One kernel file, built for the host."""

    def __init__(self, path: Path, mode: str = "fast") -> None:
        self.mode = mode
        self.path, compiled = build(path, mode)
        self.library = ctypes.CDLL(str(self.path))
        self.library.cusim_error.restype = ctypes.c_char_p
        self.library.cusim_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
        if mode == "check":
            self.library.cusim_reports.restype = self.library.cusim_traffic.restype = ctypes.c_char_p
            self.library.cusim_argument.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
            self.library.cusim_dynamic.argtypes = [ctypes.c_size_t]
            self.library.cusim_static.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_char_p]
            of_kernels = _symbols(compiled)
            for name, (address, size) in _symbols(self.path).items():
                if name in of_kernels and name.startswith("_ZZ") and not name.startswith("_ZZN5cusim"):
                    self.library.cusim_static(address, size, _plain(name).encode())

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
    ) -> None:
        """Run a kernel. Every argument must have exactly the type of its parameter; None is null."""
        signature = self.signature(name)
        if len(args) != len(signature):
            raise TypeError(f"{name}: {len(args)} arguments for {len(signature)} parameters")
        copies: list[tuple[np.ndarray, np.ndarray]] = []
        values = [self._value(name, i, a, code, copies) for i, (a, code) in enumerate(zip(args, signature, strict=True))]
        if self.mode == "check":
            self.library.cusim_forget()
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
        if self.mode == "check":
            text += self._with_lines(self.library.cusim_reports().decode())
        if failed or text:
            raise Fault(f"{name}: {text}")

    def _value(self, name: str, i: int, a: Any, code: str, copies: list) -> np.ndarray:
        """The bytes of one argument, as an array of one element."""
        if not code.startswith("p"):
            if type(a) is not _SCALARS[code]:
                raise TypeError(f"{name}: argument {i} is {type(a).__name__}, the kernel takes {_SCALARS[code].__name__}")
            return np.array([a])
        if a is None:
            return np.zeros(1, np.uintp)
        if not isinstance(a, np.ndarray) or a.dtype != _SCALARS[code[1:]] or not a.flags.c_contiguous:
            kind = f"a {a.dtype} array" if isinstance(a, np.ndarray) else type(a).__name__
            raise TypeError(f"{name}: argument {i} is {kind}, the kernel takes a contiguous {_SCALARS[code[1:]].__name__} array")
        if self.mode == "check":
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

    def _with_lines(self, text: str) -> str:
        def line(match: re.Match) -> str:
            return "at " + _run(["addr2line", "-e", str(self.path), match[1]]).split()[0].rpartition("/")[2]

        return re.sub(r"@(0x[0-9a-f]+)", line, text)

    def traffic(self) -> list[Traffic]:
        """What each access to global memory moved in the last launch in check mode."""
        text = self._with_lines(self.library.cusim_traffic().decode()).replace("at ", "")
        rows = (line.split() for line in text.splitlines())
        return [(line, kind, int(size), int(useful) / (32 * int(sectors))) for line, kind, size, _, sectors, useful in rows]


@cache
def module(file: str, mode: str) -> Module:
    """The kernel file ``kernels/cuda/<file>.cu``, built once."""
    return Module(FOLDER / f"{file}.cu", mode)


class Host:
    """What :mod:`alphabar.kernels.gpu` launches on, with the host in the place of a GPU."""

    xp = np

    def __init__(self, mode: str = "fast", order: str = "forward", seed: int = 1, traffic: bool = False) -> None:
        self.mode, self.order, self.seed = mode, order, seed
        self.launched: list[str] = []
        self.traffic: list[Traffic] = []  # of every launch, where asked for (in check mode)
        self._count = traffic

    def launch(self, file: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared: int = 0) -> None:
        """Run a kernel of ``kernels/cuda/<file>.cu`` to its end."""
        self.launched.append(name)
        built = module(file, self.mode)
        built.launch(name, grid, block, args, shared, self.order, self.seed)
        if self._count:
            self.traffic += built.traffic()
