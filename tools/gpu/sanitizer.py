"""NVIDIA's compute-sanitizer over the small cases: one process for each of its tools, all at once, beside the other sections."""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .job import Report

TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": ("--report-api-errors", "no"),  # stray accesses are asked for, not what a library tries on the driver
    "racecheck": (),
    "initcheck": (),
    "synccheck": (),
}
FAULT = 99  # the exit code of a finding


def program() -> str | None:
    """Where compute-sanitizer lies."""
    return shutil.which("compute-sanitizer") or next(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")), None)


class Watch:
    """The tools at work since they were started. ``watched``: the command that they look at."""

    def __init__(self, watched: list[str], tools: Iterable[str] = TOOLS) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="alphabar-sanitizer-"))
        self._begin = time.monotonic()
        self.running: dict[str, tuple[subprocess.Popen, Path]] = {}
        self.found = program()
        for tool in tools if self.found else ():
            log = self._folder / f"{tool}.log"
            command = [str(self.found), "--tool", tool, "--error-exitcode", str(FAULT), *TOOLS[tool], *watched]
            with log.open("w") as file:
                self.running[tool] = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True), log

    def collect(self, deadline: float) -> Report:
        """What they say; those that are not ready at the deadline are ended, and how far they came is told."""
        if not self.found:
            return {"skipped": "compute-sanitizer is not installed"}
        report: Report = {}
        for tool, (process, log) in self.running.items():
            try:
                code: int | None = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
                process.kill()
                process.wait()
            report[tool] = verdict(code, log.read_text(errors="replace")) | {"after_s": round(time.monotonic() - self._begin, 1)}
        shutil.rmtree(self._folder, ignore_errors=True)
        report["ok"] = not any(r["state"] == "fault" for r in report.values())
        report["failed"] = [tool for tool, r in report.items() if isinstance(r, dict) and r["state"] == "fault"]
        return report


def verdict(code: int | None, text: str) -> dict[str, Any]:
    """ "clean", "fault", "unfinished" or "unsupported", with what the log tells of it."""
    reached = [line for line in text.splitlines() if re.fullmatch(r"[a-z_0-9]+", line)]
    if code is None:
        return {"state": "unfinished", "reached": reached[-1] if reached else "nothing"}
    if code == 0 and "done" in reached:
        return {"state": "clean"}
    if "not supported" in text and not reached:
        return {"state": "unsupported", "log": text[-500:]}
    return {"state": "fault", "reached": reached[-1] if reached else "nothing", "log": text[-4000:]}


def watched(script: Path, gpu: int) -> list[str]:
    """The command for :class:`Watch`: this tool's own small cases."""
    return [sys.executable, str(script), "--touch", "--gpu", str(gpu)]
