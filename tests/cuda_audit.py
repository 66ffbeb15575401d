"""What the compiler makes of each kernel, without a GPU: registers, spills, local memory and the width of memory accesses.

NVRTC compiles every ``kernels/cuda/*.cu`` with the options that CuPy gives it; ``cuobjdump`` and ``nvdisasm`` read the outcome.
The budgets in ``data/cuda_budgets.json`` are a gate in the tests. ``python tests/cuda_audit.py`` prints what each kernel takes,
``--write`` renews the budgets and the table in ``bench/results/cuda_audit.md``.
"""

import argparse
import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from alphabar.kernels.compile import FOLDER, source

sys.path += [root] if (root := str(Path(__file__).resolve().parents[1])) not in sys.path else []

from tests import cuda_sass
from tests.cuda_sass import Instruction, Pass, code, main_pass
from tests.cusim.building import cache_folder

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
    work: Pass | None = None

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Usage":
        """What :func:`dataclasses.asdict` and JSON have made of it."""
        widths = {kind: {int(bits): count for bits, count in values[kind].items()} for kind in ("loads", "stores")}
        return cls(**values | widths | {"work": values["work"] and Pass(**values["work"])})

    @property
    def clean(self) -> bool:
        return self.spilled == self.stack == self.local == 0


class Nvrtc:
    """NVIDIA's run-time compiler from its wheel; it needs no driver."""

    def __init__(self) -> None:
        library, builtins = (sorted((WHEELS / "lib").glob(f"lib{name}.so.1*")) for name in ("nvrtc", "nvrtc-builtins"))
        if not library or not builtins:
            raise FileNotFoundError(f"no NVRTC under {WHEELS}: pip install nvidia-cuda-nvrtc==13.0.88")
        self.name = f"{library[0].name} {library[0].stat().st_size}"
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


def _widths(body: list[Instruction], name: str) -> dict[int, int]:
    return dict(Counter(x.bits for x in body if x.name == name))


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
            instructions, _ = code(body)
            u = found[name]
            u.instructions = len(instructions)
            u.local = sum(x.name in ("LDL", "STL") for x in instructions)
            u.doubles = sum(x.name in ("DADD", "DMUL", "DFMA", "DSETP") for x in instructions)
            u.loads, u.stores = _widths(instructions, "LDG"), _widths(instructions, "STG")
            u.work = main_pass(body)
    return found


def audit(path: Path, architecture: str, compiler: Nvrtc) -> dict[str, Usage]:
    """Compile a kernel file and read what came out; kept under the hash of all that it follows from."""
    text = source(path)
    readers = "".join(Path(f).read_text() for f in (__file__, cuda_sass.__file__))
    parts = (text, path.name, architecture, compiler.name, readers)
    kept = (
        cache_folder() / f"audit-{path.stem}-{architecture}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.json"
    )
    if kept.exists():
        return {name: Usage.of(values) for name, values in json.loads(kept.read_text()).items()}
    found = read_cubin(*compiler.compile(text, path.name, architecture), architecture)
    with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as draft:
        json.dump({name: asdict(usage) for name, usage in found.items()}, draft)
    os.replace(draft.name, kept)
    return found


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
    parser.add_argument("--write", action="store_true", help="renew the budgets and the table, from all files")
    parser.add_argument("files", nargs="*", type=Path, default=sorted(FOLDER.glob("*.cu")), help="kernel files (default: all)")
    given = parser.parse_args()
    try:
        compiler = Nvrtc()
        if given.write:
            from tests import cuda_table

            cuda_table.write(audit_all(sorted(FOLDER.glob("*.cu")), ARCHITECTURES, compiler))
            return 0
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
