"""Which lines and branches of device code ran, from gcov. A line of a template counts where any of its instances ran."""

import json
import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from .building import prepare, run
from .launching import Host, Module
from .probes import Project


@dataclass
class Lines:
    """One source file: how often each line ran, and how many of its branches were taken of how many."""

    counts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    branches: dict[int, list[int]] = field(default_factory=dict)  # the most complete instance of each line: [taken, all]

    @property
    def missed(self) -> list[int]:
        return sorted(line for line, count in self.counts.items() if not count)

    @property
    def share(self) -> float:
        return 1 - len(self.missed) / max(1, len(self.counts))


def _read(found: dict[str, Lines], report: dict) -> None:
    for file in report["files"]:
        name = Path(file["file"]).name
        if not name.endswith((".cu", ".cuh")):
            continue
        lines = found.setdefault(name, Lines())
        for row in file["lines"]:
            number = row["line_number"]
            lines.counts[number] += row["count"]
            taken = [b["count"] > 0 for b in row["branches"] if not b["throw"]]
            if taken:
                old = lines.branches.get(number, [0, 1])
                if sum(taken) * old[1] > old[0] * len(taken) or number not in lines.branches:
                    lines.branches[number] = [sum(taken), len(taken)]


def measure(project: Project) -> dict[str, Lines]:
    """Run all probes and read what ran: by file."""
    prepare(project.files, ("coverage",))
    loaded: dict[Path, Module] = {}

    def module(path: Path, _: str) -> Module:
        if path not in loaded:
            loaded[path] = Module(path, "coverage")
            loaded[path].library.cusim_reset()
        return loaded[path]

    for path in project.files:
        module(path, "")
    for probe in project.probes:
        probe.call(Host(folder=project.folder, modules=module))
    found: dict[str, Lines] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        os.environ["GCOV_PREFIX"] = text
        try:
            for built in loaded.values():
                built.library.cusim_dump()
        finally:
            del os.environ["GCOV_PREFIX"]
        for built in loaded.values():
            data = next(folder.rglob(f"{built.object.stem}.gcda"))
            shutil.move(data, folder / data.name)
            shutil.copy(built.object.with_suffix(".gcno"), folder)
            _read(found, json.loads(run(["gcov", "--json-format", "--stdout", "-b", data.name], folder=folder)))
    return dict(sorted(found.items()))


def table(found: dict[str, Lines]) -> str:
    """What ran, as text: a row for each file, then the lines that did not."""
    rows = [f"{'file':20} {'lines':>6} {'run':>7} {'branches':>9} {'taken':>7}  not run"]
    for name, lines in found.items():
        taken, every = (sum(b[k] for b in lines.branches.values()) for k in (0, 1))
        missed = ", ".join(map(str, lines.missed))
        rows.append(f"{name:20} {len(lines.counts):6} {lines.share:7.1%} {every:9} {taken / max(1, every):7.1%}  {missed}")
    return "\n".join(rows)
