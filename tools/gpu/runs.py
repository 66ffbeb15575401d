"""Training by the public program on the device: losses beside those of the CPU; digits and the data of --data, with sheets."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from .job import Job, Report

STEPS = 100  # of the comparison with the CPU
APART = 1e-3  # relative difference of the mean losses of those steps, in float32
SHORT = ("model.channels=32,64", "train.warmup=20", "log.every=1", "log.samples=0", "sample.steps=5", "sample.columns=2")
DATA_STEPS = 4000
DATA = ("model.channels=64,128,128", "model.attention=8", "train.lr=5e-4", "train.ema=0.999", "log.samples=0")


def run(job: Job) -> None:
    """All of them, each by a process of its own; a sheet of samples of each whole run lies beside the report."""
    rows: list[Report] = job.report.setdefault("rows", [])
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        cpu = _trained(job, home, "cpu", "cpu", (*SHORT, f"train.steps={STEPS}"))
        for precision, limit in (("fp32", APART), ("tf32", 5 * APART), ("bf16", 20 * APART)):
            row = _trained(
                job, home, f"short-{precision}", _cuda(job), (*SHORT, f"train.steps={STEPS}", f"train.precision={precision}")
            )
            if row["ok"] and cpu["ok"]:
                row |= {"apart": _apart(row["losses"], cpu["losses"]), "limit": limit}
                row["ok"] = row["apart"] <= limit
            rows.append(row)
            job.save()
        rows.append(_trained(job, home, "digits", _cuda(job), ("train.precision=bf16",)))
        if job.data is not None:
            given = (*DATA, f"train.steps={DATA_STEPS}", "train.precision=bf16", f"data.path={job.data}")
            rows.append(_trained(job, home, job.data.stem, _cuda(job), given))
        if job.sheets is not None:
            for row in rows:
                if row["ok"] and not row["run"].startswith("short"):
                    sheet = next((home / row["run"] / "samples").glob("final_*.png"))
                    to = job.sheets.with_name(f"{job.sheets.name}_{row['run']}.png")
                    shutil.copy(sheet, to)
                    row["sheet"] = to.name
    for row in rows:
        row.pop("losses", None)
    job.report["cpu"] = {k: v for k, v in cpu.items() if k != "losses"}
    job.report["failed"] = [r for r in rows if r["ok"] is False]
    job.report["ok"] = not job.report["failed"]


def _cuda(job: Job) -> str:
    return f"cuda:{job.gpu}"


def _trained(job: Job, home: Path, name: str, device: str, settings: tuple[str, ...]) -> Report:
    """One run: seconds, losses by step, the last line of its metrics; ok None where there is no time or something is missing."""
    row: Report = {"run": name, "device": device, "settings": list(settings)}
    if job.over(15.0):
        return row | {"ok": None, "skipped": "no time left"}
    given = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "alphabar.tools.cli", "train", "--device", device, "--out", str(home), "--name", name]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *given], capture_output=True, text=True, timeout=max(1.0, job.left), check=False, cwd=home
        )
    except subprocess.TimeoutExpired as e:
        return row | {"ok": False, "error": f"not finished after {e.timeout:.0f} s"}
    row["seconds"] = round(time.monotonic() - start, 1)
    if "ModuleNotFoundError" in done.stderr:
        return row | {"ok": None, "skipped": done.stderr.strip().splitlines()[-1]}
    if done.returncode:
        return row | {"ok": False, "error": f"exit code {done.returncode}", "stderr": done.stderr[-2000:]}
    lines = [json.loads(line) for line in (home / name / "metrics.jsonl").read_text().splitlines()]
    return row | {"ok": True, "losses": [line["loss"] for line in lines], "last": lines[-1], "stderr": done.stderr[-500:]}


def _apart(ours: list[float], theirs: list[float]) -> float:
    """The relative difference of the mean losses."""
    if len(ours) != len(theirs):
        return float("inf")
    return float(abs(np.mean(ours) / np.mean(theirs) - 1))
