"""``python -m tests.cusim``: runs CUDA kernels on the host. See README.md."""

import argparse
import sys
import time
from pathlib import Path

from . import coverage, mutation, traffic
from .building import ORDERS, available
from .launching import Fault, Host
from .probes import Project, registry, script, unwritten_is_nan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cusim",
        description="Runs CUDA kernels on the host, through g++, without a GPU.",
        epilog="Without SCRIPT the cases of the project's kernels are run. A SCRIPT is a Python file whose functions take one "
        "argument named device and call device.launch(file, kernel, grid, block, args, shared=0); the .cu files lie beside it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "compute, in three orders of the threads"),
        ("check", "watch every access: races, bounds, alignment, unwritten shared memory, cp.async"),
        ("traffic", "sectors per request and bank conflicts of each source line"),
        ("coverage", "lines and branches that ran"),
        ("mutate", "change the kernels in small ways: which changes are noticed?"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "script", nargs="?", type=Path, metavar="SCRIPT", help="a Python file (default: the project's kernels)"
        )
        command.add_argument("--only", default="", metavar="TEXT", help="what to run: names that contain TEXT")
        if name in ("run", "check"):
            orders = ORDERS if name == "run" else ("forward", "random")
            command.add_argument(
                "--order", choices=ORDERS, nargs="+", default=orders, help="orders of threads (default: %(default)s)"
            )
        if name == "traffic":
            command.add_argument("--bad", action="store_true", help="only wasted sectors and bank conflicts")
        if name == "mutate":
            command.add_argument("--files", nargs="+", default=(), metavar="FILE", help="sources to change (default: all)")
            command.add_argument("--sample", type=int, metavar="N", help="only so many mutants, always the same ones")
            command.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; the next call goes on")
            command.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
            command.add_argument("--fresh", action="store_true", help="forget what earlier calls found")
            command.add_argument("--explained", type=Path, default=mutation.EXPLAINED, help="reasons for survivors, TOML")
            command.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    return parser


def _compute(project: Project, mode: str, orders: list[str]) -> int:
    failed = 0
    for order in orders:
        start, bad = time.perf_counter(), 0
        for i, probe in enumerate(project.probes):
            try:
                probe.call(Host(mode, order, seed=i + 1, folder=project.folder))
            except (Fault, AssertionError) as e:
                bad += 1
                print(f"{probe.name}, {order}: {str(e).strip() or 'wrong result'}")
        print(f"{order}: {len(project.probes) - bad} of {len(project.probes)} are right, {time.perf_counter() - start:.1f} s")
        failed += bad
    return int(failed > 0)


def _coverage(project: Project) -> int:
    found = coverage.measure(project)
    print(coverage.table(found))
    return int(any(lines.missed for lines in found.values()))


def _mutate(project: Project, given: argparse.Namespace) -> int:
    start = time.perf_counter()
    run = mutation.Run(project, given.files, print)
    chosen = mutation.sample(run.mutants, given.sample) if given.sample else run.mutants
    reasons = mutation.explained(given.explained)
    verdicts = mutation.judge(run, chosen, given.fresh, given.seconds, given.workers, reasons)
    text = mutation.table(verdicts, reasons)
    print(text)
    left = mutation.survivors(verdicts, reasons)
    for m, v in left:
        seen = "never reached" if v.by == "unreached" else "no bit differs" if v.same_bits else "within the tolerance"
        print(f"{m.file}:{m.line} {m.before} -> {m.after} ({m.nth}), {seen}: {m.text}")
    whole = len(verdicts) == len(run.mutants)
    old = mutation.stale(verdicts, reasons) if whole else []
    for key in old:
        print("explained, but noticed or no more:", key)
    print(f"{len(verdicts)} of {len(chosen)} mutants, {time.perf_counter() - start:.0f} s")
    if given.out:
        given.out.write_text(mutation.report(verdicts, reasons), encoding="utf-8")
    return int(bool(left or old or len(verdicts) < len(chosen)))


def main(words: list[str] | None = None) -> int:
    """Run a command; 0 where nothing is wrong, 1 where something is, 2 where it cannot be run."""
    given = _parser().parse_args(words)
    if not available():
        print("g++ is not installed", file=sys.stderr)
        return 2
    try:
        project = script(given.script) if given.script else registry(tests=given.command in ("run", "coverage", "mutate"))
    except (OSError, ValueError) as e:
        print(e, file=sys.stderr)
        return 2
    project = Project(project.folder, tuple(p for p in project.probes if given.only in p.name))
    with unwritten_is_nan():
        if given.command in ("run", "check"):
            return _compute(project, "fast" if given.command == "run" else "check", list(given.order))
        if given.command == "traffic":
            rows = traffic.measure(project)
            wasted = [r for r in rows if (r.share < 1 if r.memory == "global" else r.conflict > 1)]
            print(traffic.table(wasted if given.bad else rows))
            return 0
        if given.command == "coverage":
            return _coverage(project)
        return _mutate(project, given)


if __name__ == "__main__":
    sys.exit(main())
