"""The budgets of the kernels, and the table of what they take on three architectures: made from one audit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests import cuda_launches, cuda_limits
from tests.cuda_audit import ARCHITECTURES, Usage
from tests.cuda_launches import Shape

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "tests" / "data" / "cuda_budgets.json"
TABLE = ROOT / "bench" / "results" / "cuda_audit.md"
COMMAND = "python tests/cuda_audit.py --write"
UNIT = 8  # registers that a thread is given at once: fewer than a multiple of it frees none
Usages = Mapping[tuple[str, str], Usage]
Launches = Mapping[str, Mapping[Shape, int]]


def warps(usage: Usage, architecture: str, shapes: Mapping[Shape, int]) -> tuple[int, str]:
    """(fewest resident warps of the shapes that a kernel is launched with, what keeps more away)."""
    return min(
        cuda_limits.resident_warps(architecture, threads, usage.registers, usage.shared + dynamic) for threads, dynamic in shapes
    )


def budgets(usages: Usages, launched: Launches) -> dict[str, dict[str, Any]]:
    """For each kernel: registers and shared bytes at most, 16-byte accesses and resident warps at least."""
    found = {}
    for name in sorted({name for name, _ in usages}):
        own = {a: usages[name, a] for a in ARCHITECTURES}
        line: dict[str, Any] = {
            "registers": -(-max(u.registers for u in own.values()) // UNIT) * UNIT,
            "shared": max(u.shared for u in own.values()),
        }
        wide = {kind: min(getattr(u, kind).get(128, 0) for u in own.values()) for kind in ("loads", "stores")}
        line |= {"wide": wide} if any(wide.values()) else {}
        if name in launched:
            line["warps"] = min(warps(u, a, launched[name])[0] for a, u in own.items())
        found[name] = line
    return found


WORDS = f"""\
# The CUDA kernels as the compiler makes them

Made by `{COMMAND}` with NVRTC 13.0.88 and CuPy's options; no GPU is needed, and nothing here was timed. Tests hold every
kernel to its line in `tests/data/cuda_budgets.json`, and this table to the sources.

No kernel spills registers or uses local memory. Columns with three numbers are for {", ".join(ARCHITECTURES)}.

- **threads, dynamic**: threads of a block and bytes of dynamic shared memory, as the launch code asks for them in the
  registry's benchmark cases; in brackets where only small test cases reach the kernel, a dash where no case of the registry does.
  Of several shapes the one with the fewest resident warps.
- **warps**: resident on a multiprocessor, of 64, by registers, shared memory, threads and blocks.
- **loads, stores**: global accesses in the code for sm_90, of 16/8/4 bytes or fewer.
- **loop**: instructions and bytes of global memory of one thread's pass through the main loop on sm_90. That is the loop that
  moves most, on the shortest way through it that makes the most accesses: options that a call leaves out are included. "whole"
  where no loop touches global memory: one pass through the kernel.
- **limit**: which unit that pass keeps busy longest, and the cycles of the busiest other unit over the memory's: below 1 the
  memory is the limit. An instruction takes one of a multiprocessor's four issue slots, a special function two cycles of
  its unit, a byte its share of the bandwidth of {", ".join(v.device for v in cuda_limits.LIMITS.values())} (data sheets).
  Latency, caches, shared memory and half-rate integer products are left out: a bound, no prediction. "inner loops": the main
  loop holds others, whose passes are not known here (products of matrices, sums over a row).
"""


def markdown(usages: Usages, launched: Launches, small: set[str]) -> str:
    """The table."""
    head = ("kernel", "threads, dynamic", "registers", "static shared", "warps", "loads", "stores", "loop", "limit")
    lines = [WORDS, "| " + " | ".join(head) + " |", "|---|" + "---:|" * 7 + "---|"]
    for name in sorted({name for name, _ in usages}):
        own = [usages[name, a] for a in ARCHITECTURES]
        shape, resident = "–", "–"
        if name in launched:
            found = [warps(u, a, launched[name]) for a, u in zip(ARCHITECTURES, own, strict=True)]
            least = ARCHITECTURES[min(range(len(own)), key=lambda i: found[i][0])]
            threads, dynamic = min(launched[name], key=lambda s: (warps(usages[name, least], least, {s: 1})[0], -s[0], -s[1]))
            shape = f"({threads}, {dynamic})" if name in small else f"{threads}, {dynamic}"
            resident = "/".join(str(n) for n, _ in found)
        work = usages[name, "sm_90"].work
        assert work is not None
        limits = [cuda_limits.bound(a, u.work) for a, u in zip(ARCHITECTURES, own, strict=True) if u.work]
        words = "/".join(dict.fromkeys(word for word, ratio in limits if ratio is not None))
        ratios = "/".join("–" if ratio is None else f"{ratio:.2f}" for _, ratio in limits)
        limit = f"{words} {ratios}" if words else limits[0][0]
        widths = ("/".join(str(getattr(own[1], kind).get(b, 0)) for b in (128, 64, 32)) for kind in ("loads", "stores"))
        numbers = ("/".join(str(u.registers) for u in own), str(max(u.shared for u in own)), resident, *widths)
        loop = f"{work.instructions}, {work.moved} B" + ("" if work.loop else " whole")
        lines.append("| " + " | ".join((f"`{name}`", shape, *numbers, loop, limit)) + " |")
    return "\n".join(lines) + "\n"


def text_of(lines: Mapping[str, Any]) -> str:
    """The budgets as JSON, one kernel a line."""
    return "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in lines.items()) + "\n}\n"


def write(usages: Usages) -> None:
    """Renew both files."""
    launched, small = cuda_launches.launches()
    BUDGETS.write_text(text_of(budgets(usages, launched)), encoding="utf-8")
    TABLE.write_text(markdown(usages, launched, small), encoding="utf-8")
