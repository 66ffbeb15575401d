"""What the compiler makes of each kernel, without a GPU: registers, spills, local memory and the width of memory accesses.

NVRTC compiles every ``kernels/cuda/*.cu`` with the options that CuPy gives it; ``cuobjdump`` and ``nvdisasm`` read the outcome.
The budgets in ``data/cuda_budgets.json`` are a gate in the tests. ``python tests/cuda_audit.py`` prints the table.
"""

import argparse
import ctypes
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from alphabar.kernels.compile import FOLDER, source

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
OPTIONS = ("--std=c++17", "-ftz=true", "--device-as-default-execution-space")  # those of cupy.cuda.compiler
RESERVED_SHARED = 1024  # bytes of each block that cuobjdump counts from sm_90 on
WHEELS = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"


@dataclass
class Usage:
    """What one kernel takes on one architecture. ``loads``, ``stores``: global accesses by their bits, {128: 4, 32: 1}."""

    registers: int
    stack: int
    shared: int
    spilled: int
    local: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    instructions: int = 0
    doubles: int = 0

    @property
    def clean(self) -> bool:
        return self.spilled == self.stack == self.local == 0


class Nvrtc:
    """NVIDIA's run-time compiler from its wheel; it needs no driver."""

    def __init__(self) -> None:
        library, builtins = (sorted((WHEELS / "lib").glob(f"lib{name}.so.1*")) for name in ("nvrtc", "nvrtc-builtins"))
        if not library or not builtins:
            raise FileNotFoundError(f"no NVRTC under {WHEELS}: pip install nvidia-cuda-nvrtc==13.0.88")
        ctypes.CDLL(str(builtins[0]), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library[0]))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(self._library.nvrtcGetErrorString(code).decode())

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def compile(self, text: str, name: str, architecture: str) -> tuple[bytes, str]:
        """(cubin, log of the assembler) of a source text. Raises RuntimeError with the compiler's messages."""
        program = ctypes.c_void_p()
        self._check(self._library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None))
        options = [o.encode() for o in (*OPTIONS, f"-arch={architecture}", "--ptxas-options=-v")]
        failed = self._library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = self._text(program, "ProgramLog").rstrip(b"\0").decode()
        try:
            if failed:
                raise RuntimeError(log)
            return self._text(program, "CUBIN"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))


def _tool(name: str, *arguments: str) -> str:
    path = WHEELS / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"no {name} under {WHEELS}: pip install nvidia-cuda-{name}")
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _widths(operations: list[str], prefix: str) -> dict[int, int]:
    counts: dict[int, int] = {}
    for op in operations:
        parts = op.split(".")
        if parts[0] == prefix:
            bits = next((b for b in (128, 64) if str(b) in parts), 32)
            counts[bits] = counts.get(bits, 0) + 1
    return counts


def read_cubin(cubin: bytes, log: str, architecture: str) -> dict[str, Usage]:
    """The usage of every kernel in a compiled file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources = _tool("cuobjdump", "--dump-resource-usage", file.name)
        assembly = _tool("nvdisasm", "-c", file.name)
    spilled = {
        n: int(a) + int(b)
        for n, a, b in re.findall(r"properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    }
    reserved = RESERVED_SHARED if int(architecture[3:]) >= 90 else 0
    found = {}
    for name, row in re.findall(r"Function (\S+?):\s*\n\s*(REG.*)", resources):
        values = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", row)}
        shared = values["SHARED"] - (reserved if values["SHARED"] >= reserved else 0)
        found[name] = Usage(values["REG"], values["STACK"], shared, spilled[name])
    for name, body in re.findall(r"\.text\.(\S+?):\n(.*?)(?=\n\.text\.|\n//-+ \.|\Z)", assembly, re.S):
        if name in found:
            operations = re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", body)
            u = found[name]
            u.instructions = len(operations)
            u.local = sum(op.split(".")[0] in ("LDL", "STL") for op in operations)
            u.doubles = sum(op.split(".")[0] in ("DADD", "DMUL", "DFMA", "DSETP") for op in operations)
            u.loads, u.stores = _widths(operations, "LDG"), _widths(operations, "STG")
    return found


def audit(path: Path, architecture: str, compiler: Nvrtc) -> dict[str, Usage]:
    """Compile a kernel file and read what came out."""
    return read_cubin(*compiler.compile(source(path), path.name, architecture), architecture)


def audit_all(paths: Iterable[Path], architectures: Iterable[str], compiler: Nvrtc) -> dict[tuple[str, str], Usage]:
    """(kernel, architecture) -> usage, two files at a time."""
    jobs = list(product(paths, architectures))
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda job: audit(*job, compiler), jobs)
        return {(name, job[1]): u for job, usages in zip(jobs, found, strict=True) for name, u in usages.items()}


def main() -> int:
    """Print the table of every kernel and architecture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="architectures to compile for (default: %(default)s)")
    parser.add_argument("files", nargs="*", type=Path, default=sorted(FOLDER.glob("*.cu")), help="kernel files (default: all)")
    given = parser.parse_args()
    try:
        compiler = Nvrtc()
        print(f"{'kernel':28} {'arch':7} registers shared spilled local  loads 128/64/32  stores 128/64/32  instructions  double")
        for (name, architecture), u in sorted(audit_all(given.files, given.arch, compiler).items()):
            loads, stores = ("/".join(str(d.get(b, 0)) for b in (128, 64, 32)) for d in (u.loads, u.stores))
            sizes = f"{u.registers:9} {u.shared:6} {u.spilled:7} {u.local + u.stack:5}"
            print(f"{name:28} {architecture:7} {sizes} {loads:>16} {stores:>17} {u.instructions:13} {u.doubles:7}")
    except (FileNotFoundError, RuntimeError) as e:
        print(e, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
