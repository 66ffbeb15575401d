"""Options and the report of the benchmarks: tables at the end of the run and, with --write, files under bench/results/."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import report

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("alphabar")
    group.addoption("--compiled", action="store_true", help="also time torch.compile of each operation and network")
    group.addoption("--rounds", type=int, default=7, help="interleaved rounds of each comparison")
    group.addoption("--long", action="store_true", help="also train the networks for 200 steps in both libraries")
    group.addoption("--write", metavar="NAME", help="write NAME.json, NAME.md and the pictures into bench/results/")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[report.FOUND] = report.Found()


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """The same threads for all, and a malloc that keeps what torch's temporaries free."""
    from alphabar.kernels.cpu import threads
    from bench import timing

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads.threads())
    timing.keep_freed_memory()


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest, machine: None) -> Any:
    """What the machine can do at most with all threads, measured ahead of what is compared with it."""
    from bench.limits import measured

    found = request.config.stash[report.FOUND]
    found.limits = measured()
    return found.limits[-1]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash[report.FOUND]
    if not found:
        return
    terminalreporter.section("alphabar against PyTorch (ratio above 1: alphabar is faster)")
    for line in report.lines(found):
        terminalreporter.write_line(line)
    if name := config.getoption("--write"):
        command = "python -m pytest " + shlex.join(map(str, config.invocation_params.args))
        for path in report.write(RESULTS, name, found, command):
            terminalreporter.write_line(f"wrote {path.relative_to(RESULTS.parents[1])}")
