"""The results of a benchmark run as a Markdown table and as JSON, with the machine and the versions behind them."""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import exp, log
from pathlib import Path
from typing import Any

import pytest

ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
PACKAGES = ("alphabar", "numpy", "numba", "llvmlite", "torch", "cupy-cuda13x", "cupy-cuda12x")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment() -> dict[str, Any]:
    """What the numbers were measured on."""
    from alphabar.kernels.cpu import threads
    from alphabar.tools.runs import commit

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "threads": threads.threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {p: v for p in PACKAGES if (v := _version(p))},
        "commit": commit(),
    }


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines, one row for each kernel and case."""
    lines = [
        "| kernel | case | alphabar | torch | compiled | ratio | ratio to compiled | GB/s | GFLOP/s | error | torch's error |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        rate = 1 / r["alphabar_s"]
        lines.append(
            f"| {r['kernel']} | {r['case']} | {_time(r['alphabar_s'])} | {_time(r['torch_s'])} | {_time(r['compiled_s'])} "
            f"| {_number(r['ratio'], '.2f')} | {_number(r['ratio_compiled'], '.2f')} | {r['bytes'] * rate / 1e9:.1f} "
            f"| {r['flops'] * rate / 1e9:.1f} | {_number(r['error'], '.1e')} | {_number(r['torch_error'], '.1e')} |"
        )
    return lines


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: the geometric mean of each kernel's ratios, with the range over its cases."""
    lines = ["| kernel | cases | ratio to torch (geometric mean) | lowest | highest |", "|---|---:|---:|---:|---:|"]
    for name in dict.fromkeys(r["kernel"] for r in rows):
        ratios = [r["ratio"] for r in rows if r["kernel"] == name]
        mean = exp(sum(map(log, ratios)) / len(ratios))
        lines.append(f"| {name} | {len(ratios)} | {mean:.2f} | {min(ratios):.2f} | {max(ratios):.2f} |")
    return lines


def write(folder: Path, name: str, rows: list[dict[str, Any]], command: str) -> list[Path]:
    """NAME.json and NAME.md in ``folder``; returns the paths."""
    env = environment()
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / f"{name}.json", folder / f"{name}.md"
    data.write_text(json.dumps({"command": command, "environment": env, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    packages = ", ".join(f"{p} {v}" for p, v in env["packages"].items())
    head = [
        f"# Kernels against PyTorch, {env['date']}",
        "",
        f"{env['processor']}, {env['threads']} threads each, {env['system']}, Python {env['python']}; {packages}.",
        f"Commit {env['commit']}. Made by `{command}`.",
        "",
        "float32. Contestants take turns in one process; medians over the rounds, warm-up not counted. Ratio = torch's time over",
        "ours: above 1 we are faster. malloc keeps freed memory (no page faults for torch's temporaries); our outputs come from",
        "a pool. Error: relative L2 distance to the definition in float64, the largest over the outputs; where noise is made in",
        "the kernel it is measured with the same noise given.",
        "",
    ]
    text.write_text("\n".join([*head, *summary(rows), "", *table(rows)]) + "\n", encoding="utf-8")
    return [data, text]
