"""A short training run on the device through the public program."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from .job import Job

STEPS = 60


def run(job: Job) -> None:
    """60 steps of the default digits; the last lines of its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "alphabar.tools.cli", "train", "--steps", str(STEPS), "--device", f"cuda:{job.gpu}"]
        try:
            done = subprocess.run(
                [*command, "--out", folder, "--name", "gpu"],
                capture_output=True,
                text=True,
                timeout=max(1.0, job.left),
                check=False,
                cwd=folder,
            )
        except subprocess.TimeoutExpired as e:
            job.report |= {"ok": False, "error": f"not finished after {e.timeout:.0f} s"}
            return
        metrics = next(Path(folder).rglob("metrics.jsonl"), None)
        lines = metrics.read_text().splitlines() if metrics else []
    missing = "ModuleNotFoundError" in done.stderr
    if missing:
        job.report["skipped"] = done.stderr.strip().splitlines()[-1]
    job.report |= {
        "ok": done.returncode == 0 or missing,
        "exit_code": done.returncode,
        "metrics": [json.loads(line) for line in lines[-3:]],
        "stderr": done.stderr[-2000:],
    }
