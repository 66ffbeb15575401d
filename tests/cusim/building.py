"""From a ``.cu`` file to a library for the host."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from alphabar.kernels.compile import source

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "random")
HEADERS = ("cuda.h", "hooks.h", "mutants.h")
_DYNAMIC_SHARED = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+)?([\w:]+(?:\s+[\w:]+)*?)\s+(\w+)\s*\[\s*\]\s*;")
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')
_ASM = re.compile(r"\basm\b\s*(?:volatile|__volatile__)?\s*\(")
_OPERAND = re.compile(r'\s*"([=+]?)\w+"\s*\((.*)\)\s*$', re.DOTALL)
_COMPILE = [
    *("g++", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique", "-I", str(HERE)),
    *("-Wno-unknown-pragmas", "-Wno-attributes", *(["-mavx2", "-mfma"] if platform.machine() == "x86_64" else [])),
]
_WATCHED = ["-Og", "-gdwarf-4", "-fsanitize=thread,bounds", "-DCUSIM_CHECK"]
_MODES = {  # flags of a kernel file, parts of the runtime
    "fast": (["-O1"], ("scheduler", "ptx")),
    "check": (_WATCHED, ("scheduler", "ptx", "checker")),
    "coverage": (["-O0", "--coverage", "-DCUSIM_COVERAGE"], ("scheduler", "ptx")),
    "mutants": (["-O1", "-DCUSIM_MUTANTS"], ("scheduler", "ptx")),
    "mutants-check": ([*_WATCHED, "-DCUSIM_MUTANTS"], ("scheduler", "ptx", "checker")),
}


def available() -> bool:
    """Whether this machine can build for the host."""
    return shutil.which("g++") is not None


def cache_folder() -> Path:
    """Where built libraries are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    try:
        folder = base / "alphabar" / "cusim"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"alphabar-cusim-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def run(command: list[str], text: str | None = None, folder: Path | None = None) -> str:
    """What a command prints. RuntimeError with its complaints where it fails."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _cached(name: str, parts: Iterable[str], suffix: str, make: Callable[[Path], object]) -> Path:
    """The file that ``make(path)`` writes, made once for these parts."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = cache_folder() / f"{name}-{digest}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder) / path.name
            make(draft)
            for beside in Path(folder).glob("*.gcno"):
                os.replace(beside, path.with_suffix(".gcno"))
            os.replace(draft, path)
    return path


@cache
def _headers() -> str:
    return "".join((HERE / name).read_text() for name in HEADERS)


@cache
def _runtime(name: str) -> Path:
    """The object file of a part of the runtime."""
    path = HERE / f"{name}.cpp"
    command = [*_COMPILE, "-O2", "-g", "-c", str(path)]
    return _cached(name, (path.read_text(), _headers(), *command), ".o", lambda o: run([*command, "-o", str(o)]))


# --------------------------------------------------------------------------------------------------------------- the two rewrites


def _pieces(text: str, start: int, separator: str) -> tuple[list[str], int]:
    """``text`` from ``start`` to the closing bracket, cut at each ``separator`` outside of brackets; and where it ends."""
    depth, i, first, found = 1, start, start, []
    while i < len(text):
        c = text[i]
        if c == '"':
            i = re.compile(r'"(?:[^"\\]|\\.)*"').match(text, i).end() - 1  # type: ignore[union-attr]
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                return [*found, text[first:i]], i + 1
        elif c == separator and depth == 1:
            found.append(text[first:i])
            first = i + 1
        i += 1
    raise ValueError("an asm statement is not closed")


def _ptx(text: str) -> str:
    """Every ``asm("…" : outputs : inputs)`` as a call of the runner's emulation."""
    done, place = [], 0
    while match := _ASM.search(text, place):
        sections, end = _pieces(text, match.end(), ":")
        call = f"cusim::Ptx({sections[0].strip()})"
        for section in sections[1:3]:
            for operand in _pieces(section.replace("\\\n", " ") + ")", 0, ",")[0]:
                if operand.strip():
                    parts = _OPERAND.match(operand)
                    if not parts:
                        raise ValueError(f"an asm operand that the runner does not know: {operand.strip()}")
                    call += f".{'out' if parts[1] else 'in'}({' '.join(parts[2].split())})"
        newline = "\\\n" if "\\\n" in text[match.start() : end] else "\n"
        missing = text.count("\n", match.start(), end) - call.count("\n")
        done += [text[place : match.start()], call, ".run()", newline * missing]
        place = end
    return "".join(done) + text[place:]


def _for_host(text: str) -> str:
    return _ptx(_DYNAMIC_SHARED.sub(r"CUSIM_DYNAMIC_SHARED(\1, \2);", text))


# ----------------------------------------------------------------------------------------------------------------------- building


@cache
def kernels(path: Path) -> tuple[str, ...]:
    """The names of the kernels in a file: looked for where macros are expanded, since some come out of one."""
    return tuple(_KERNEL.findall(run(["g++", "-E", "-P", "-x", "c++", "-"], source(path))))


def full_text(path: Path) -> str:
    """What g++ is given for a kernel file."""
    exports = "".join(f"CUSIM_EXPORT({name})\n" for name in kernels(path))
    exports += '#ifdef CUSIM_COVERAGE\nextern "C" void __gcov_dump(), __gcov_reset();\n'
    exports += 'extern "C" void cusim_dump() { __gcov_dump(); }\nextern "C" void cusim_reset() { __gcov_reset(); }\n#endif\n'
    return f'#include "cuda.h"\n#line 1 "{path.name}"\n{_for_host(source(path))}\n#line 1 "exports"\n{exports}'


def complaints(path: Path, mode: str) -> list[tuple[str, int]]:
    """(file, line) of every error that the compiler finds in a kernel file."""
    command = [*_COMPILE, *_MODES[mode][0], "-fsyntax-only", "-fmax-errors=0", "-x", "c++", "-"]
    done = subprocess.run(command, input=full_text(path), capture_output=True, text=True)
    wrong = r"^([\w.]+):(\d+):\d+: (?:error|note: .* was not initialized with a constant expression)"
    return [(m[1], int(m[2])) for m in re.finditer(wrong, done.stderr, re.MULTILINE)]


def build(path: Path, mode: str = "fast") -> tuple[Path, Path]:
    """(library, object file) of a kernel file. The object of mode ``coverage`` has its notes beside it."""
    flags, runtime = _MODES[mode]
    text = full_text(path)
    compile_ = [*_COMPILE, *flags, "-c"]

    def compiled_text(target: Path) -> None:
        target.with_suffix(".cpp").write_text(text)
        run([*compile_, str(target.with_suffix(".cpp")), "-o", str(target)])

    compiled = _cached(f"{path.stem}-{mode}", (text, _headers(), *compile_), ".o", compiled_text)
    objects = [compiled, *map(_runtime, runtime)]
    link = ["g++", "-shared", *map(str, objects), "-ldl", *(["--coverage"] if mode == "coverage" else [])]
    return _cached(f"{path.stem}-{mode}", link, ".so", lambda so: run([*link, "-o", str(so)])), compiled


def prepare(files: Iterable[Path], modes: Iterable[str] = ("fast",), workers: int = 2) -> None:
    """Build several files at once, where that is still to be done."""
    for name in {name for mode in modes for name in _MODES[mode][1]}:
        _runtime(name)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: build(*job), [(f, m) for f in files for m in modes]))
