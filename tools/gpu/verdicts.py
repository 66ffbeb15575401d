"""What was promised of the kernels on a GPU, line by line: met, missed or not measured."""

from math import exp, log
from typing import Any

from alphabar.kernels import TABLE

Row = dict[str, Any]
SHARES = (  # (words, kernel, what its case must say, least share of a copy's bandwidth)
    ("step, noise included", "step", "noise=made", 0.85),
    ("q_sample, noise included", "q_sample", "", 0.85),
    ("GroupNorm+SiLU", "group_norm_silu", "", 0.80),
    ("AdamW+EMA", "adamw_ema", "", 0.90),
)

WHOLE = (  # (section, batch, words, least ratio to eager, to compiled)
    ("steps", 128, "training step, bf16, batch 128", 1.3, 1.0),
    ("trajectories", 1, "50 DDIM steps, bf16, batch 1", 3.0, 1.0),
    ("trajectories", 16, "50 DDIM steps, bf16, batch 16", 3.0, 1.0),
)


def verdicts(report: dict[str, Any]) -> list[Row]:
    """One {"line", "found", "met"} for each promise; met None where it was not measured."""
    if {"steps", "trajectories"} & report.keys():
        return _whole(report)
    rows = [r for r in report.get("speed", {}).get("rows", ()) if "seconds" in r]
    large = [r for r in rows if r["size"] != "small"]
    noise = report.get("noise", {})
    lines = [_line("normals have the bits of the CPU", noise.get("ok"), f"{noise['cases']} hashes" if "cases" in noise else "–")]
    for section, words in (("kernels", "every kernel is its definition"), ("large", "so it is at 256 MiB")):
        part = report.get(section, {})
        whole = part.get("ok") is True and "stopped" not in part and "error" not in part
        met = None if "calls" not in part else False if part.get("ok") is False else True if whole else None
        lines.append(_line(words, met, f"{part['calls']} calls, {len(part.get('failed', ()))} wrong" if "calls" in part else "–"))
    lines.append(_sanitized(report.get("sanitizer", {})))
    for words, kernel, option, least in SHARES:
        shares = [r["share_of_copy"] for r in large if r["kernel"] == kernel and option in r["case"]]
        met = all(s >= least for s in shares) if shares else None
        lines.append(_line(f"{words}: at least {least:.0%} of a copy", met, _range(shares)))
    return [*lines, *_compiled(rows)]


def _whole(report: dict[str, Any]) -> list[Row]:
    """Whole steps in bf16 against PyTorch eager and compiled."""
    lines = []
    for section, batch, words, to_eager, to_compiled in WHOLE:
        rows = [r for r in report.get(section, {}).get("rows", ()) if (r["precision"], r["batch"]) == ("bf16", batch)]
        seconds: dict[str, float] = next((r["seconds"] for r in rows if "seconds" in r), {})
        for name, least in (("eager", to_eager), ("compiled", to_compiled)):
            ratio = seconds[name] / seconds["alphabar"] if name in seconds else None
            met = None if ratio is None else ratio >= least
            lines.append(_line(f"{words}: at least {least:.1f}× torch {name}", met, "–" if ratio is None else f"{ratio:.2f}×"))
    return lines


def _compiled(rows: list[Row]) -> list[Row]:
    """Each kernel against torch.compile: the geometric mean over its cases, the slowest case beside it."""
    lines = []
    for name in TABLE:
        ratios = [r["compiled_s"] / r["seconds"]["alphabar"] for r in rows if r["kernel"] == name and r.get("compiled_s")]
        found = f"{mean(ratios):.2f}× (slowest case {min(ratios):.2f}×, {len(ratios)} cases)" if ratios else "–"
        lines.append(_line(f"{name}: at least 1.0× torch.compile", mean(ratios) >= 1 if ratios else None, found))
    return lines


def _sanitized(part: Row) -> Row:
    states = {tool: r["state"] for tool, r in part.items() if isinstance(r, dict)}
    asked = [states.get(tool) for tool in ("memcheck", "racecheck")]
    met = False if "fault" in states.values() else True if asked == ["clean", "clean"] else None
    found = ", ".join(f"{tool} {state}" for tool, state in states.items()) or part.get("skipped", "–")
    return _line("memcheck and racecheck find nothing", met, found)


def _line(words: str, met: bool | None, found: str) -> Row:
    return {"line": words, "found": found, "met": met}


def _range(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{values[0]:.1%}" if len(values) == 1 else f"{min(values):.1%} to {max(values):.1%} in {len(values)} cases"


def mean(ratios: list[float]) -> float:
    """The geometric mean."""
    return exp(sum(map(log, ratios)) / len(ratios))


def word(met: bool | None) -> str:
    """ "met", "missed" or "not measured"."""
    return "not measured" if met is None else "met" if met else "MISSED"
