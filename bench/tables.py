"""Markdown tables of what the benchmarks found. Ratio = PyTorch's time over alphabar's: above 1 alphabar is faster."""

from collections.abc import Iterable, Sequence
from math import exp, log
from statistics import median
from typing import Any

Row = dict[str, Any]


def time(seconds: float | None) -> str:
    """ "12 µs", "3.45 ms", "1.23 s"; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def number(value: float | None, form: str) -> str:
    """The number as ``form`` says; a dash for None."""
    return "–" if value is None else format(value, form)


def ratio(theirs: float | None, ours: float | None) -> str:
    """theirs/ours with two digits; a dash where there is none."""
    return number(None if theirs is None or ours is None else theirs / ours, ".2f")


def mean(ratios: Sequence[float]) -> float:
    """The geometric mean."""
    return exp(sum(map(log, ratios)) / len(ratios))


def lines(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """A Markdown table whose first ``words`` columns are words and whose others are numbers."""
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


# -- kernels


def kernels(rows: Sequence[Row]) -> list[str]:
    """One line for each kernel and case."""
    times, ratios = ("alphabar", "torch", "compiled"), ("ratio", "to compiled")
    bare = ("alphabar in place", "torch in place", "ratio in place")
    head = ("kernel", "case", *times, *ratios, *bare, "GB/s", "GFLOP/s", "of the limit", "error", "torch's error")

    def cells(r: Row) -> list[str]:
        ours = r["alphabar_s"]
        return [
            r["kernel"],
            r["case"],
            time(ours),
            time(r["torch_s"]),
            time(r["compiled_s"]),
            ratio(r["torch_s"], ours),
            ratio(r["compiled_s"], ours),
            time(r["own_in_place_s"]),
            time(r["in_place_s"]),
            ratio(r["in_place_s"], r["own_in_place_s"]),
            f"{r['bytes'] / ours / 1e9:.1f}",
            f"{r['flops'] / ours / 1e9:.1f}",
            f"{r['share']:.0%} {r['bound']}",
            number(r["error"], ".1e"),
            number(r["torch_error"], ".1e"),
        ]

    return lines(head, map(cells, rows), words=2)


def summary(rows: Sequence[Row]) -> list[str]:
    """One line for each kernel: the geometric means of its ratios, the range of the first, and the median share of the limit."""
    means = ("ratio to torch (geometric mean)", "lowest", "highest", "to compiled", "both in place")
    head = ("kernel", "cases", *means, "of the limit")

    def of(pairs: Iterable[tuple[float | None, float | None]]) -> str:
        found = [theirs / ours for theirs, ours in pairs if theirs is not None and ours is not None]
        return f"{mean(found):.2f}" if found else "–"

    def cells(name: str) -> list[str]:
        own = [r for r in rows if r["kernel"] == name]
        ratios = [r["torch_s"] / r["alphabar_s"] for r in own]
        return [
            name,
            str(len(own)),
            *(f"{v:.2f}" for v in (mean(ratios), min(ratios), max(ratios))),
            of((r["compiled_s"], r["alphabar_s"]) for r in own),
            of((r["in_place_s"], r["own_in_place_s"]) for r in own),
            f"{median(r['share'] for r in own):.0%}",
        ]

    return lines(head, map(cells, dict.fromkeys(r["kernel"] for r in rows)))


# -- networks

FORMATS = ("contiguous", "channels last")


def networks(rows: Sequence[Row]) -> list[str]:
    """One line for each network, batch and step; the ratio is that to the fastest of PyTorch's contestants."""
    compiled = tuple(f"compiled, {form}" for form in FORMATS)
    columns = (*FORMATS, *(c for c in compiled if any(c in r["seconds"] for r in rows)))
    head = ("network", "step", "batch", "alphabar", *(f"torch {c}" for c in columns))
    head = (*head, "ratio", "of the fastest rounds", "GFLOP/s", "of the limit")

    def cells(r: Row) -> list[str]:
        seconds = r["seconds"]
        ours = seconds["alphabar"]
        ratios = (ratio(min(v for k, v in s.items() if k != "alphabar"), s["alphabar"]) for s in (seconds, r["fastest"]))
        times = (time(seconds.get(c)) for c in ("alphabar", *columns))
        rates = (f"{r['flops'] / ours / 1e9:.0f}", f"{r['share']:.0%}")
        return [r["network"], r["step"], str(r["batch"]), *times, *ratios, *rates]

    return lines(head, map(cells, rows), words=2)


def errors(rows: Sequence[Row]) -> list[str]:
    """Relative L2 distances to float64 of each network's output and gradients."""
    head = ("network", "float32 of", "batch", "output", "all gradients", "worst gradient of a parameter")
    every = (
        [r["network"], who, str(r["batch"]), *(f"{e[k]:.1e}" for k in ("output", "gradient", "worst"))]
        for r in rows
        for who, e in r["errors"].items()
    )
    return lines(head, every, words=2)


def memory(rows: Sequence[Row]) -> list[str]:
    """Peak memory and the time with the malloc that a process starts with."""
    head = ("network", "step", "batch", "contestant", "peak, MB", "above the imports, MB", "a step, malloc as it is")

    def megabytes(value: int | None) -> str:
        return number(None if value is None else value / 1e6, ",.0f")

    every = (
        [r["network"], r["step"], str(r["batch"]), who, megabytes(f["peak"]), megabytes(f["above"]), time(f["seconds"])]
        for r in rows
        for who, f in r["found"].items()
    )
    return lines(head, every, words=4)


def training(rows: Sequence[Row]) -> list[str]:
    """Final losses after the same training."""
    head = ("network", "contestant", "batch", "steps", "final loss", "difference to torch", "largest difference of a step")

    def cells(r: Row, who: str) -> list[str]:
        final = f"{r['final'][who]:.5f} ± {r['standard_error']:.5f}"
        apart = (f"{r['difference'][who]:+.1e}", f"{r['largest'][who]:.1e}")
        return [r["network"], who, str(r["batch"]), str(r["steps"]), final, *apart]

    return lines(head, (cells(r, who) for r in rows for who in r["final"]), words=2)


def python(rows: Sequence[Row]) -> list[str]:
    """What Python costs of a training step."""
    head = ("network", "batch", "a step", "Python", "share")
    every = ([r["network"], str(r["batch"]), time(r["seconds"]), time(r["python"]), f"{r['share']:.1%}"] for r in rows)
    return lines(head, every)
