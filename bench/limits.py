"""What the machine can do at most: GB/s of copy and triad for working sets from the caches to DRAM, GFLOP/s of multiply-adds.

    python -m bench.limits

A copy moves 2 numbers an element, a triad a = b + s·c 3 (what a cache fetches before it is written over is not counted). Each
thread goes over its own part again and again, so that starting the threads is not part of the limit. Best of the rounds.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from alphabar.kernels.cpu import threads  # sets the number of threads before Numba is imported
from alphabar.kernels.cpu.vector import LANES

# isort: split
import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

SIZES = tuple(2**k for k in range(18, 29))  # bytes of all arrays together: 256 KiB to 256 MiB
SUMS = 10  # independent chains of multiply-adds: more than latency times units, fewer than the registers of any machine
MOVED = 1 << 29  # bytes in one timed call, a few milliseconds
OPERATIONS = 1 << 31  # of each thread in one timed call
ROUNDS = 7


@dataclass(frozen=True)
class Limits:
    """Bytes per second of copy and triad at each of SIZES, and operations per second, of so many threads."""

    threads: int
    copy: tuple[float, ...]
    triad: tuple[float, ...]
    flops: float

    def bandwidth(self, moved: float) -> float:
        """Bytes per second of a triad whose working set is ``moved`` bytes, between the measured sizes by their logarithms."""
        return float(np.interp(np.log(max(moved, 1.0)), np.log(SIZES), self.triad))

    def least(self, moved: float, flops: float) -> float:
        """The seconds below which work of so many bytes and operations cannot come: the slower of the two limits."""
        return max(moved / self.bandwidth(moved), flops / self.flops)

    def bound(self, moved: float, flops: float) -> str:
        """Which limit that is: "memory" or "arithmetic"."""
        return "memory" if moved / self.bandwidth(moved) >= flops / self.flops else "arithmetic"


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _copies(a: Any, b: Any, workers: int, times: int) -> None:
    part = -(-a.size // workers)
    for w in numba.prange(workers):
        to, of = a[w * part : (w + 1) * part], b[w * part : (w + 1) * part]
        for _ in range(times):
            for i in range(to.size):
                to[i] = of[i]


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _triads(a: Any, b: Any, c: Any, s: Any, workers: int, times: int) -> None:
    part = -(-a.size // workers)
    for w in numba.prange(workers):
        low, high = w * part, (w + 1) * part
        to, p, q = a[low:high], b[low:high], c[low:high]
        for _ in range(times):
            for i in range(to.size):
                to[i] = p[i] + s * q[i]


@intrinsic
def _multiply_adds(typingctx: Any, factor: Any, count: Any) -> Any:
    """Sum over SUMS vectors x after ``count`` times x = factor·x + factor, all of them held in registers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        single, wide, number = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
        name = f"llvm.fmuladd.v{LANES}f32"
        known = builder.module.globals
        fma = known[name] if name in known else ir.Function(builder.module, ir.FunctionType(wide, [wide] * 3), name)
        undefined = ir.Constant(wide, ir.Undefined)
        one = builder.insert_element(undefined, args[0], ir.IntType(32)(0))
        factor = builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))
        before, inside = builder.block, builder.function.append_basic_block("inside")
        done = builder.function.append_basic_block("done")
        builder.branch(inside)
        builder.position_at_end(inside)
        i, sums = builder.phi(number), [builder.phi(wide) for _ in range(SUMS)]
        made = [builder.call(fma, [x, factor, factor]) for x in sums]
        after = builder.add(i, number(1))
        i.add_incoming(number(0), before)
        i.add_incoming(after, inside)
        for k, (x, y) in enumerate(zip(sums, made, strict=True)):
            x.add_incoming(ir.Constant(wide, [float(k + j) for j in range(LANES)]), before)
            x.add_incoming(y, inside)
        builder.cbranch(builder.icmp_unsigned("<", after, args[1]), inside, done)
        builder.position_at_end(done)
        total = made[0]
        for y in made[1:]:
            total = builder.fadd(total, y)
        lanes = [builder.extract_element(total, ir.IntType(32)(j)) for j in range(LANES)]
        found = ir.Constant(single, 0.0)
        for lane in lanes:
            found = builder.fadd(found, lane)
        return found

    return types.float32(types.float32, types.int64), codegen


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _arithmetic(out: Any, factor: Any, count: int) -> None:
    for w in numba.prange(out.size):
        out[w] = _multiply_adds(factor, np.int64(count))  # type: ignore[call-arg]


def _best(f: Callable[[int], object], times: int) -> float:
    """Seconds of one of the ``times`` repetitions that ``f(times)`` makes, the fastest round."""
    f(1)  # compiled, and its pages touched
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        f(times)
        found.append((time.perf_counter() - start) / times)
    return min(found)


def measure(workers: int) -> Limits:
    """The limits of ``workers`` threads, in a few seconds."""
    kept, s = threads.threads(), np.float32(0.5)
    numba.set_num_threads(workers)
    try:
        room = np.ones(SIZES[-1] // 4, np.float32)
        copy, triad = [], []
        for size in SIZES:
            half, third, times = size // 8, size // 12, max(1, MOVED // size)
            a, b = room[:half], room[half : 2 * half]
            copy.append(8 * half / _best(partial(_copies, a, b, workers), times))
            x, y, z = (room[k * third : (k + 1) * third] for k in range(3))
            triad.append(12 * third / _best(partial(_triads, x, y, z, s, workers), times))
        out, one = np.zeros(workers, np.float32), 2 * LANES * SUMS  # operations of one pass through the loop
        seconds = _best(partial(_arithmetic, out, s), OPERATIONS // one)
        return Limits(workers, tuple(copy), tuple(triad), one * workers / seconds)
    finally:
        numba.set_num_threads(kept)


def thread_counts() -> tuple[int, ...]:
    """1, 2, 4, … and the number of threads that there are."""
    most = threads.threads()
    return tuple(sorted({2**k for k in range(most.bit_length()) if 2**k <= most} | {most}))


def measured() -> list[Limits]:
    """The limits of every number of threads, the largest last."""
    return [measure(n) for n in thread_counts()]


def table(found: list[Limits]) -> list[str]:
    """Markdown lines: a column for each number of threads."""

    def size(n: int) -> str:
        return f"{n >> 20} MiB" if n >= 1 << 20 else f"{n >> 10} KiB"

    plural = [f"{x.threads} thread{'s' if x.threads > 1 else ''}" for x in found]
    lines = ["| limit | " + " | ".join(plural) + " |", "|---|" + "---:|" * len(found)]
    lines.append("| float32 multiply-adds in registers, GFLOP/s | " + " | ".join(f"{x.flops / 1e9:.0f}" for x in found) + " |")
    for k, n in enumerate(SIZES):
        values = [f"{x.copy[k] / 1e9:.0f}, {x.triad[k] / 1e9:.0f}" for x in found]
        lines.append(f"| copy, triad of {size(n)} in all, GB/s | " + " | ".join(values) + " |")
    return lines


def plain(found: list[Limits]) -> list[dict[str, Any]]:
    """For JSON."""
    return [{"sizes": SIZES, **asdict(x)} for x in found]


if __name__ == "__main__":
    print(*table(measured()), sep="\n")
