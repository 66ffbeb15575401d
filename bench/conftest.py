"""Options and the report of the benchmarks: a table at the end of the run and, with --write, files under bench/results/."""

import shlex
from pathlib import Path

import pytest

from bench import report

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alphabar")
    group.addoption("--compiled", action="store_true", help="also time torch.compile of each operation (slow to build)")
    group.addoption("--rounds", type=int, default=7, help="interleaved rounds of each comparison")
    group.addoption("--write", metavar="NAME", help="write bench/results/NAME.json and NAME.md")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[report.ROWS] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[report.ROWS]
    if not rows:
        return
    name = config.getoption("--write")
    terminalreporter.section("alphabar against PyTorch (ratio above 1: alphabar is faster)")
    for line in report.table(rows):
        terminalreporter.write_line(line)
    if name:
        command = "python -m pytest " + shlex.join(map(str, config.invocation_params.args))
        for path in report.write(RESULTS, name, rows, command):
            terminalreporter.write_line(f"wrote {path.relative_to(RESULTS.parents[1])}")
