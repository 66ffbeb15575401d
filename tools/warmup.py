"""`alphabar warmup`: compile every kernel that training and sampling need, so that no later command has to wait."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alphabar.kernels import warm
from alphabar.tools import compiling
from alphabar.tools.command import Failure, Parser, device, integer, program
from alphabar.tools.progress import Progress

EXAMPLES = """examples:
  alphabar warmup                    once after an installation, or while an image of a container is built
  alphabar warmup --again            compile anew what is there
  alphabar warmup --device cuda      the GPU's kernels

Compiled code is kept in NUMBA_CACHE_DIR, else beside the installed sources, else in the user's folder for caches. It belongs to
this version of the sources and to this kind of processor; another one's is never taken.
"""


@program("warmup")
def main(argv: Sequence[str] | None = None) -> int:
    """Compile; returns the exit code."""
    parser = Parser(prog="alphabar warmup", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument("--processes", type=integer(1, 64), metavar="N", help="compile so many at a time (default: one a core)")
    parser.add_argument("--again", action="store_true", help="compile what is compiled already, too")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    o = parser.parse_args(argv)
    _, where = device(o.device)
    return _cpu(o) if where == "cpu" else _gpu(o, where)


def _cpu(o: Any) -> int:
    from alphabar.kernels.cpu import kept

    if not kept.folders():
        raise Failure("there is no folder to keep compiled code in: name one by NUMBA_CACHE_DIR")
    folder = kept.folders()[0]
    if o.again:
        kept.forget()
    names, start = warm.pending(), time.perf_counter()
    compiling.show(names, o.processes or warm.processes(), o.quiet)
    seconds = time.perf_counter() - start
    left = warm.pending()
    for name in left:  # what went wrong in another process shows here
        warm.run(name)
        kept.mark(name)
    if not o.quiet:
        count = len(warm.NAMES)
        done = f"{len(names)} of {count} kernels compiled in {seconds:.0f} s" if names else f"{count} kernels are ready"
        print(f"{done}: {_mebibytes(folder)} in {folder}")
    return 0


def _gpu(o: Any, where: str) -> int:
    from alphabar.kernels.compile import FOLDER, Cuda

    cuda, start = Cuda(), time.perf_counter()
    files = sorted(path.stem for path in FOLDER.glob("*.cu"))
    with Progress("compiling", len(files), 0, o.quiet, "file") as bar:
        for file in files:
            bar.note(f"{file}.cu")
            cuda.module(file).compile()
            bar.advance()
    if not o.quiet:
        folder = os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache"
        print(f"{len(files)} files of kernels ready in {time.perf_counter() - start:.0f} s on {where}; kept in {folder}")
    return 0


def _mebibytes(folder: Path) -> str:
    return f"{sum(p.stat().st_size for p in folder.glob('*')) / 2**20:.1f} MiB"


if __name__ == "__main__":
    raise SystemExit(main())
