"""`alphabar gpu-check`: try on this machine's GPU everything that a machine without one cannot show, and write down what it says.

    alphabar gpu-check                       or, in a checkout: python tools/gpu_check.py
    python tools/gpu_check.py --only noise kernels --out results
    python tools/gpu_check.py --train --data photos.h5      whole training and sampling steps, and whole trainings

Writes gpu_DEVICE.json, .md and .png (with --train gpu_DEVICE_train.* and sheets of samples). Each section runs in a process of
its own: one that breaks, hangs or is out of time costs the others nothing. In a checkout only NumPy and CuPy need be installed:
where `alphabar` cannot be imported, a link of that name in a temporary folder leads to the checkout. PyTorch, where it is
installed with CUDA, is timed beside our kernels; h5py is needed for the networks, matplotlib for the picture.
"""

import argparse
import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

SCRIPT = Path(__file__).resolve()
ROOT = SCRIPT.parents[1]


def _make_importable() -> None:
    """Let `import alphabar` and `import bench` find this checkout, here and in the programs that this one starts."""
    try:
        import alphabar  # noqa: F401
    except ModuleNotFoundError:
        folder = Path(tempfile.mkdtemp(prefix="alphabar-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        (folder / "alphabar").symlink_to(ROOT, target_is_directory=True)
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    sys.path += [] if str(ROOT) in sys.path else [str(ROOT)]


_make_importable()

from alphabar.kernels.compile import require_gpu  # noqa: E402
from alphabar.tools.gpu import correctness, machine, plan, report, sanitizer, speed, verdicts  # noqa: E402
from alphabar.tools.gpu.job import Job, Report  # noqa: E402


def _networks(job: Job) -> None:
    from alphabar.tools.gpu import networks  # needs h5py

    networks.run(job)


def _train(job: Job) -> None:
    from alphabar.tools.gpu import training

    training.run(job)


def _steps(job: Job) -> None:
    from alphabar.tools.gpu import steps

    steps.train(job)


def _trajectories(job: Job) -> None:
    from alphabar.tools.gpu import steps

    steps.sample(job)


def _runs(job: Job) -> None:
    from alphabar.tools.gpu import runs

    runs.run(job)


RUNS: dict[str, Callable[[Job], None]] = {
    "build": machine.build,
    "noise": correctness.noise,
    "kernels": correctness.small,
    "networks": _networks,
    "large": correctness.large,
    "speed": speed.run,
    "train": _train,
    "steps": _steps,
    "trajectories": _trajectories,
    "runs": _runs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; returns 0 if all is well, 1 if a check failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="alphabar gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    default = ROOT / "bench" / "results"
    parser.add_argument("--out", type=Path, default=default, metavar="FOLDER", help="where to write (default: %(default)s)")
    every = (*plan.NAMES, *plan.WHOLE_NAMES)
    parser.add_argument("--only", nargs="+", choices=every, metavar="SECTION", help=", ".join(every))
    parser.add_argument("--train", action="store_true", help=f"the sections {', '.join(plan.WHOLE_NAMES)} in place of the others")
    parser.add_argument("--data", type=Path, metavar="FILE", help="with --train: an HDF5 data set to train on besides digits")
    parser.add_argument("--gpu", type=int, default=0, metavar="N", help="number of the GPU (default: 0)")
    parser.add_argument("--commit", help="commit to write down (default: from git)")
    parser.add_argument("--seconds", type=float, default=plan.SECONDS, help="be done after so long (default: %(default)g)")
    # for the processes that this program starts: one section, its time and the file of its report; what the sanitizer watches
    parser.add_argument("--section", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sheets", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--touch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.only = options.only or (plan.WHOLE_NAMES if options.train else plan.NAMES)
    if options.data is not None:
        options.data = options.data.absolute()
        if not options.data.is_file():
            print(f"alphabar gpu-check: error: --data {options.data}: there is no such file", file=sys.stderr)
            return 2
    try:
        cupy = require_gpu(options.gpu)
    except RuntimeError as e:
        print(f"alphabar gpu-check: error: {e}", file=sys.stderr)
        return 2
    with cupy.cuda.Device(options.gpu):
        if options.touch:
            correctness.touch(cupy)
            return 0
        if options.section:
            job = Job(
                cupy, time.monotonic() + options.seconds, options.part, options.gpu, data=options.data, sheets=options.sheets
            )
            one(options.section, job)
            return 0
        return everything(cupy, options)


def one(name: str, job: Job) -> None:
    """Run a section; whatever stops it is part of its report."""
    try:
        RUNS[name](job)
    except Exception as e:
        job.report |= {"ok": False, "error": f"{type(e).__name__}: {e}"[:2000]}
        if isinstance(e, ImportError):
            job.report |= {"ok": None, "error": None, "skipped": str(e)}
    job.save()


GRACE = 15.0  # seconds after its deadline that a section has to come to its end


def apart(name: str, seconds: float, gpu: int, data: Path | None = None, sheets: Path | None = None) -> Report:
    """Run a section in a process of its own; what it has written counts, however it ends."""
    with tempfile.TemporaryDirectory() as folder:
        part, log = Path(folder) / "part.json", Path(folder) / "log"
        command = [sys.executable, str(SCRIPT), "--section", name, "--seconds", f"{seconds:.1f}", "--gpu", str(gpu)]
        for option, value in (("--data", data), ("--sheets", sheets)):
            command += [] if value is None else [option, str(value)]
        ended = ""
        with log.open("w") as file:
            process = subprocess.Popen([*command, "--part", str(part)], stdout=file, stderr=subprocess.STDOUT)
            try:
                if code := process.wait(seconds + GRACE):
                    ended = f"its process ended with {code}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ended = f"did not come to an end in {seconds + GRACE:.0f} s"
        found: Report = json.loads(part.read_text()) if part.exists() else {}
        if ended:
            found |= {"ok": False, "error": ended, "log": log.read_text(errors="replace")[-3000:]}
        return found


def everything(cupy: ModuleType, options: argparse.Namespace) -> int:
    """All chosen sections in their order, the sanitizer beside the first of them; the report is written after each."""
    begin = time.monotonic()
    found: Report = {"environment": machine.environment(cupy, options.gpu, options.commit or machine.commit())}
    limits = plan.limits(options.only, options.seconds)
    numbers = report.paths(options.out, found["environment"]["device"], whole(limits))[0].absolute()
    numbers.parent.mkdir(parents=True, exist_ok=True)
    watch = sanitizer.Watch(sanitizer.watched(SCRIPT, options.gpu)) if "sanitizer" in limits else None
    for name, limit in limits.items():
        start, deadline = time.monotonic(), begin + limit
        if name == "sanitizer":
            assert watch is not None
            found[name] = watch.collect(deadline)
        elif deadline - start < 1:
            found[name] = {"skipped": "no time left"}
        else:
            left = max(1.0, deadline - start - GRACE / 3)
            found[name] = apart(name, left, options.gpu, options.data, numbers.with_suffix(""))
        found[name]["took_s"] = round(time.monotonic() - start, 1)
        _say(name, found[name])
        write(found, options.out)
    failed = [name for name in limits if found[name].get("ok") is False]
    for v in (v for v in found["promises"] if v["met"] is not None):
        print(f"{verdicts.word(v['met']):>12}  {v['line']}: {v['found']}")
    print(f"wrote {numbers} after {time.monotonic() - begin:.0f} s; ", end="")
    print(f"failed: {', '.join(failed)}" if failed else "all well")
    return 1 if failed else 0


def _say(name: str, part: Report) -> None:
    good = part.get("ok", True)
    words = [part.get(k) for k in ("error", "skipped", "stopped")]
    said = "; ".join(str(w) for w in words if w) or ("FAILED" if good is False else "ok")
    print(f"{name}: {said} ({part['took_s']:.1f} s)", flush=True)
    for failure in (part.get("failed") or [])[:8]:
        print(f"  {json.dumps(failure)[:300]}", flush=True)


def whole(names: Iterable[str]) -> bool:
    """Whether these sections are those of --train."""
    return bool({*plan.WHOLE_NAMES} & {*names}) and not {*plan.NAMES} & {*names}


def write(found: Report, out: Path) -> None:
    """The JSON file, the Markdown file and, where speeds are known and matplotlib is there, the picture."""
    device = found["environment"]["device"]
    numbers, text, drawing = report.paths(out, device, whole(found))
    found["promises"] = verdicts.verdicts(found)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    numbers.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    picture = None
    try:
        if found.get("speed", {}).get("rows") and "limits" in found["speed"]:
            from alphabar.tools.gpu.picture import roofline

            roofline(drawing, found["speed"], device)
            picture = drawing.name
        elif whole(found) and any(found.get(name, {}).get("rows") for name in ("steps", "trajectories")):
            from alphabar.tools.gpu.picture import growth

            growth(drawing, found, device)
            picture = drawing.name
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
    command = "python tools/gpu_check.py" + (" --train" if whole(found) else "")
    text.write_text(report.markdown(found, picture, command), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
