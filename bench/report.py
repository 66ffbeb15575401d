"""The results of a benchmark run as Markdown, JSON and pictures, with the machine and the versions behind them."""

import json
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from bench import tables

PACKAGES = ("alphabar", "numpy", "numba", "llvmlite", "torch", "diffusers", "cupy-cuda13x", "cupy-cuda12x")
Rows = list[dict[str, Any]]


@dataclass
class Found:
    """What a run has measured, by kind."""

    kernels: Rows = field(default_factory=list)
    networks: Rows = field(default_factory=list)
    errors: Rows = field(default_factory=list)
    memory: Rows = field(default_factory=list)
    training: Rows = field(default_factory=list)
    python: Rows = field(default_factory=list)
    limits: list[Any] = field(default_factory=list)  # of every number of threads, the largest last

    def __bool__(self) -> bool:
        return any((self.kernels, self.networks, self.errors, self.memory, self.training, self.python))


FOUND: pytest.StashKey[Found] = pytest.StashKey()

CONDITIONS = """\
float32. Contestants take turns in one process; medians over the rounds, warm-up not counted. Ratio = torch's time over ours:
above 1 we are faster; torch is the faster of its two memory formats. malloc keeps freed memory (no page faults for torch's
temporaries); our outputs come from a pool.""".splitlines()

NETWORKS = """\
The same weights in diffusers' UNet2DModel and here. A training step is forward, mean squared error, backward, clipping by the
global norm, AdamW and running average (torch: fused AdamW, multi-tensor clipping and average); a sampling step is the
prediction and the ancestral update with new noise. The ratio is that to the fastest of torch's columns. GFLOP/s count each
convolution as direct (Winograd needs fewer multiplications, so more than the limit is possible), a training step as three
forward passes. "peer" has 16 heads of attention (the default of UNet2DModel), "peer, one head" one, as the networks of
DDPM.""".splitlines()

MEMORY = """\
Each in a process of its own: the peak of the whole process and what of it came after the imports (weights, optimiser,
compiled code and work space), and the median step with the malloc that a process starts with.""".splitlines()

PYTHON = """\
A whole step of the trainer with the default run's digits: the batch, the step, the report of its loss. "Python" is what the step
takes outside of compiled calls; the batches that are made ahead for later steps are counted evenly.""".splitlines()

KERNELS = """\
"In place" is without allocations, where torch can (out=, in-place operations): both write into arrays that are given; otherwise
torch allocates its results and ours come from a pool. GB/s counts each operand once. "Of the
limit": the least time that the measured limits allow over ours, by memory (a triad of as many bytes in the same run) or by
arithmetic (multiply-adds in registers). A convolution counts as direct, so Winograd may pass 100 %; what works in place may
pass a triad, which writes over a third array. Kernels that make noise or draw states work mostly on integers, whose
limit is not measured. Error: relative L2 distance to the definition in float64, the largest over the outputs, of 8 samples at
most; where noise is made in the kernel it is measured with the same noise given.""".splitlines()


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


def conditions(env: dict[str, Any], command: str) -> list[str]:
    """The machine, the versions and the command, as Markdown."""
    packages = ", ".join(f"{p} {v}" for p, v in env["packages"].items())
    return [
        f"{env['processor']}, {env['threads']} threads each, {env['system']}, Python {env['python']}; {packages}.",
        f"Commit {env['commit']}. Made by `{command}`.",
        "",
    ]


def sections(found: Found) -> list[tuple[str, list[str], list[str]]]:
    """(heading, explanation, table) of all that was measured."""
    from bench import limits

    every = [
        ("Networks", NETWORKS, tables.networks(found.networks) if found.networks else []),
        ("The same training", [], tables.training(found.training) if found.training else []),
        ("Errors of the networks against float64", [], tables.errors(found.errors) if found.errors else []),
        ("Memory", MEMORY, tables.memory(found.memory) if found.memory else []),
        ("Python's share of a training step", PYTHON, tables.python(found.python) if found.python else []),
        ("Kernels", KERNELS, tables.summary(found.kernels) if found.kernels else []),
        ("Every case", [], tables.kernels(found.kernels) if found.kernels else []),
        ("Limits of the machine", [], limits.table(found.limits) if found.limits else []),
    ]
    return [section for section in every if section[2]]


def lines(found: Found) -> list[str]:
    """All tables, for the terminal."""
    return [line for heading, _, table in sections(found) for line in (heading, *table, "")]


def write(folder: Path, name: str, found: Found, command: str) -> list[Path]:
    """NAME.json, NAME.md and the pictures in ``folder``; returns the paths."""
    from bench import limits, pictures

    env = environment()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = pictures.draw(folder, name, found)
    text = [f"# alphabar against PyTorch, {env['date']}", "", *conditions(env, command), *CONDITIONS, ""]
    for heading, explanation, table in sections(found):
        text += [f"## {heading}", "", *([*explanation, ""] if explanation else []), *table, ""]
        text += [line for path, of in drawn if of == heading for line in (f"![{heading}]({path.name})", "")]
    rows = {k: getattr(found, k) for k in ("kernels", "networks", "errors", "memory", "training", "python")}
    plain = {"command": command, "environment": env, "limits": limits.plain(found.limits), **rows}
    (folder / f"{name}.json").write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text("\n".join(text[:-1]) + "\n", encoding="utf-8")
    return [folder / f"{name}.json", folder / f"{name}.md", *(path for path, _ in drawn)]
