"""The tool that tries everything on a GPU, driven on the host by a stand-in for CuPy with the host runner behind it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphabar.kernels import TABLE, dispatch, elementwise, gpu
from alphabar.kernels.compile import FOLDER
from alphabar.tools import gpu_check
from alphabar.tools.gpu import cases, correctness, job, machine, networks, plan, report, sanitizer, speed, sums, verdicts
from tests import cusim, fake_cupy
from tests.hosted import pretend as machine_with_gpu

FEW = (
    *("normals", "q_sample", "step", "categorical_posterior", "categorical_q_sample", "group_norm_silu_backward", "conv2d"),
    *("cross_entropy", "adamw_ema"),
)


def pretend(patch: pytest.MonkeyPatch) -> Any:
    """Make this process's machine one that seems to have a GPU."""
    cusim.prepare(sorted(FOLDER.glob("*.cu")))
    cupy = fake_cupy.cupy
    machine_with_gpu(patch)
    patch.setattr(cupy, "__version__", "14", raising=False)
    patch.setattr(gpu_check, "require_gpu", lambda index: cupy)
    for module in (machine, speed):
        patch.setattr(module, "torch_of", lambda: None)
    for name, value in (("FLUSH", 1024), ("COPY", 1024), ("SIDE", 8)):
        patch.setattr(speed, name, value)
    patch.setattr(cases, "BYTES", 1024)
    table = {name: replace(TABLE[name], tests=TABLE[name].tests[:3], benches=TABLE[name].tests[:2]) for name in FEW}
    for module in (correctness, speed):
        patch.setattr(module, "TABLE", table)
    return cupy


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that seems to have a GPU; every section runs in this process."""
    if not cusim.available():
        pytest.skip("g++ is not installed")
    cupy = pretend(monkeypatch)

    def here(name: str, seconds: float, gpu: int, data: Path | None, sheets: Path | None) -> dict[str, Any]:
        made = job.Job(cupy, time.monotonic() + seconds, None, gpu, data=data, sheets=sheets)
        gpu_check.one(name, made)
        return made.report

    monkeypatch.setattr(gpu_check, "apart", here)
    return cupy


def called(*only: str, out: Path, more: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    code = gpu_check.main(["--out", str(out), "--only", *only, *more])
    return code, json.loads((out / "gpu_host.json").read_text())


def test_the_sections_run_and_are_written(hosted: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results"
    code, found = called("build", "noise", "kernels", "large", "speed", out=out, more=("--commit", "abc"))
    assert code == 0, found
    assert found["environment"]["commit"] == "abc" and found["environment"]["device"] == "NVIDIA Host"
    assert set(found["build"]["seconds_of_files"]) == {f.name for f in FOLDER.glob("*.cu")}
    assert found["noise"]["ok"] and found["noise"]["cases"] >= 10
    for section in ("kernels", "large"):
        assert found[section]["ok"] and 0 < found[section]["largest_share_of_a_budget"] <= 1
    assert {r["kernel"] for r in found["kernels"]["resources"]} >= {"step_made_wide", "step_made_any", "conv_forward_any"}
    rows = found["speed"]["rows"]
    assert {r["kernel"] for r in rows} == set(FEW)
    assert all(r["seconds"]["alphabar"] == pytest.approx(5e-4) for r in rows)
    assert [r["size"] for r in rows] == sorted((r["size"] for r in rows), key=["chief", "large", "small"].index)
    assert [r["kernel"] for r in rows[:2]] == ["step", "q_sample"]
    text = (out / "gpu_host.md").read_text()
    assert "| normals have the bits of the CPU |" in text and "| step_made_wide | 32 |" in text and "gpu_host.png" in text
    assert (out / "gpu_host.png").stat().st_size > 1000
    assert "all well" in capsys.readouterr().out


def test_a_wrong_kernel_is_found(
    hosted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def wrong(out: Any, seed: int, step: int, stream: int, first_sample: int) -> Any:
        return gpu.normals(out, seed, step, stream, 0)

    monkeypatch.setitem(dispatch._loaded, ("gpu", "normals"), wrong)
    code, found = called("noise", "kernels", "large", out=tmp_path)
    assert code == 1
    for section in ("kernels", "large"):
        assert not found[section]["ok"] and {r["kernel"] for r in found[section]["failed"]} == {"normals"}
    assert not found["noise"]["ok"] and found["promises"][0]["met"] is False
    assert "failed: noise, kernels, large" in capsys.readouterr().out


def test_networks_training_and_checkpoints_are_those_of_the_cpu(hosted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "SETTINGS", (*networks.SETTINGS, "train.batch=4", "model.channels=8,8"))
    monkeypatch.setattr(networks, "STEPS", 3)
    monkeypatch.setattr(networks, "CAPTURED", ("adams_bashforth",))
    made = job.Job(hosted, time.monotonic() + 300)
    networks.run(made)
    assert made.report["ok"], made.report["failed"]
    assert len(made.report["rows"]) == len(list(networks.checks()))


def test_a_broken_network_is_found(hosted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dispatch._loaded.get(("gpu", "conv2d")) or gpu.conv2d

    def wrong(*args: Any, **kwargs: Any) -> Any:
        y = right(*args, **kwargs)
        y *= 1.0001
        return y

    monkeypatch.setitem(dispatch._loaded, ("gpu", "conv2d"), wrong)
    monkeypatch.setattr(networks, "checks", lambda every=networks.checks: list(every())[:1])
    made = job.Job(hosted, time.monotonic() + 300)
    networks.run(made)
    assert not made.report["ok"] and made.report["failed"][0]["error"] > 1


def test_sums_and_copies_on_the_device(hosted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in sums.SHAPES:
        made, wanted = sums.there(hosted, shape), sums.wanted(shape)
        assert made.keys() == wanted.keys()
        for name, array in made.items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-5, err_msg=name)
    check = dict(networks.checks())["elementwise functions"]
    error, limit = check(hosted)
    assert error <= limit
    monkeypatch.setattr(elementwise, "upsample", lambda x: x.repeat(2, axis=1).repeat(2, axis=2) * 1.0001)
    error, limit = check(hosted)
    assert error > limit


def test_a_section_that_breaks_does_not_end_the_others(hosted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(of: Any) -> None:
        of.report["calls"] = 3
        raise ValueError("no memory")

    monkeypatch.setitem(gpu_check.RUNS, "kernels", broken)
    code, found = called("kernels", "noise", out=tmp_path)
    assert code == 1 and found["noise"]["ok"]
    assert found["kernels"] == {**found["kernels"], "calls": 3, "ok": False, "error": "ValueError: no memory"}


def test_what_is_not_installed_is_named_and_no_failure(hosted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(of: Any) -> None:
        raise ImportError("No module named 'h5py'")

    monkeypatch.setitem(gpu_check.RUNS, "networks", missing)
    code, found = called("networks", out=tmp_path)
    assert code == 0 and found["networks"]["skipped"] == "No module named 'h5py'"


def test_a_case_that_breaks_costs_only_itself(hosted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("too large")

    monkeypatch.setitem(dispatch._loaded, ("gpu", "q_sample"), broken)
    made = job.Job(hosted, time.monotonic() + 60)
    speed.run(made)
    assert not made.report["ok"] and all(f.startswith("q_sample ") for f in made.report["failed"])
    assert {r["kernel"] for r in made.report["rows"] if "seconds" in r} == set(FEW) - {"q_sample"}


def test_without_time_what_was_not_reached_is_told(hosted: Any) -> None:
    made = job.Job(hosted, time.monotonic() - 1)
    for section in (correctness.small, correctness.large, speed.run):
        section(made)
        assert made.report["stopped"] == "no time left"
    assert any(case.startswith("step ") for case in made.report["not_reached"])


def test_the_calls_that_the_sanitizer_watches(hosted: Any, capsys: pytest.CaptureFixture) -> None:
    assert gpu_check.main(["--touch"]) == 0
    assert capsys.readouterr().out.split() == [*FEW, "done"]


def test_without_a_gpu_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def absent(index: int) -> None:
        raise RuntimeError("no usable GPU: none")

    monkeypatch.setattr(gpu_check, "require_gpu", absent)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err == "alphabar gpu-check: error: no usable GPU: none\n" and not captured.out
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ processes and time


SCRIPT = """
import json, sys, time
part = sys.argv[sys.argv.index("--part") + 1]
open(part, "w").write(json.dumps({"calls": 5, "ok": True}))
print("so far")
"""


@pytest.mark.parametrize(
    ("ending", "told"), [("", None), ("sys.exit(3)", "ended with 3"), ("time.sleep(60)", "did not come to an end in")]
)
def test_a_process_that_dies_or_hangs_leaves_what_it_wrote(
    ending: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 0.0)
    script = tmp_path / "section.py"
    script.write_text(SCRIPT + ending)
    monkeypatch.setattr(gpu_check, "SCRIPT", script)
    found = gpu_check.apart("noise", 2.0, 0)
    assert found["calls"] == 5 and found["ok"] is (told is None)
    assert told is None or (told in found["error"] and "so far" in found["log"])


def test_sections_in_processes_of_their_own(tmp_path: Path) -> None:
    if not cusim.available():
        pytest.skip("g++ is not installed")
    script = tmp_path / "script.py"
    script.write_text(HOSTED)
    command = [sys.executable, str(script), "--out", str(tmp_path / "out"), "--only", "noise", "sanitizer", "large", "--gpu", "0"]
    folders = os.pathsep.join((str(Path(gpu_check.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folders}, timeout=120)
    assert "wrote" in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "gpu_host.json").read_text())
    assert done.returncode == 0 and "all well" in done.stdout, done.stdout + done.stderr
    assert found["noise"]["ok"] and found["large"]["ok"] and found["large"]["calls"] >= len(FEW)
    assert found["sanitizer"]["memcheck"]["state"] == "clean" and found["sanitizer"]["racecheck"]["state"] == "clean"


HOSTED = """
import sys
from pathlib import Path

import pytest

from tests.test_gpu_check import gpu_check, pretend, sanitizer

pretend(pytest.MonkeyPatch())
gpu_check.SCRIPT = Path(__file__).resolve()
program = Path(__file__).with_name("compute-sanitizer")
program.write_text('#!/bin/sh\\nwhile [ "${1#--}" != "$1" ]; do shift 2; done\\nexec "$@"\\n')  # without its own options
program.chmod(0o755)
sanitizer.program = lambda: str(program)
sys.exit(gpu_check.main(sys.argv[1:]))
"""


def test_the_limits_keep_the_time_of_later_sections() -> None:
    limits = plan.limits(plan.NAMES, plan.SECONDS)
    assert plan.SECONDS <= 510 and list(limits) == list(plan.NAMES)
    assert limits["train"] == plan.SECONDS and limits["build"] == next(s.kept for s in plan.SECTIONS)
    assert plan.limits(("noise", "speed"), 300) == {"noise": 300 - 200, "speed": 300}
    tight = plan.limits(("noise", "speed"), 105)
    assert tight["speed"] == 105 and tight["noise"] == pytest.approx(5)
    assert plan.limits((), 10) == {}


def test_a_report_is_written_whole(tmp_path: Path) -> None:
    made = job.Job(fake_cupy.cupy, time.monotonic() + 5, tmp_path / "part.json")
    made.report["rows"] = [1]
    made.save()
    assert json.loads((tmp_path / "part.json").read_text()) == {"rows": [1]} and len(list(tmp_path.iterdir())) == 1
    assert not made.over(1) and made.over(6) and made.report["stopped"]


# ----------------------------------------------------------------------------------------------------------------- the sanitizer


STATES = [
    (0, "==== COMPUTE-SANITIZER\nstep\ndone\n==== ERROR SUMMARY: 0 errors", {"state": "clean"}),
    (0, "step\n", {"state": "fault", "reached": "step"}),
    (99, "step\n==== Invalid __global__ write", {"state": "fault", "reached": "step"}),
    (None, "normals\nstep\n", {"state": "unfinished", "reached": "step"}),
    (1, "==== Error: Device not supported.", {"state": "unsupported"}),
]


@pytest.mark.parametrize(("code", "text", "wanted"), STATES)
def test_what_a_log_of_the_sanitizer_says(code: int | None, text: str, wanted: dict[str, str]) -> None:
    assert wanted.items() <= sanitizer.verdict(code, text).items()


def test_the_sanitizers_run_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    ends = "case $2 in memcheck) echo done;; racecheck) echo step; exit 99;; *) exec sleep 30;; esac"
    program.write_text(f"#!/bin/sh\necho normals\n{ends}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sanitizer, "program", lambda: str(program))
    watch = sanitizer.Watch(["unused"], ("memcheck", "racecheck", "synccheck"))
    found = watch.collect(time.monotonic() + 1)
    states = {tool: found[tool]["state"] for tool in ("memcheck", "racecheck", "synccheck")}
    assert states == {"memcheck": "clean", "racecheck": "fault", "synccheck": "unfinished"}
    assert not found["ok"] and found["failed"] == ["racecheck"]
    monkeypatch.setattr(sanitizer, "program", lambda: None)
    assert sanitizer.Watch(["unused"]).collect(0) == {"skipped": "compute-sanitizer is not installed"}


# ------------------------------------------------------------------------------------------------------------ cases and verdicts


@pytest.mark.parametrize("name", TABLE)
def test_the_large_cases_fill_256_mib_where_memory_is_the_limit(name: str) -> None:
    kernel = TABLE[name]
    large = cases.large(kernel)
    assert large
    for case in large:
        if cases.bound_by_memory(kernel, case):
            assert cases.BYTES <= kernel.moved(case) < 2**33
            assert name not in cases.FIRST or 4 * np.prod(case["shape"]) >= cases.BYTES
    kinds = {(c["shape"][1:], str(sorted(c.items(), key=str)[:-1])) for c in large}
    assert len(kinds) <= len(kernel.benches)


def test_what_is_promised_comes_first() -> None:
    rows = cases.ordered(TABLE)
    chiefs = [kernel.name for kernel, _, first in rows if first]
    assert chiefs[: len(cases.FIRST)] == list(cases.FIRST) and sorted(chiefs) == sorted(TABLE)
    assert [first for *_, first in rows] == sorted((first for *_, first in rows), reverse=True)
    assert next(case for kernel, case, _ in rows if kernel.name == "step").get("noise") == "made"


def row(
    kernel: str, share: float, case: str = "8 noise=made", size: str = "large", compiled: float | None = 1.1
) -> dict[str, Any]:
    seconds = {"alphabar": 1e-3, "copy": 1e-3}
    more = {"eager_s": 2e-3, "compiled_s": compiled and compiled * 1e-3, "tf32_s": None}
    rates = {"bytes": 10**9, "flops": 10**9, "bytes_per_s": 1e12, "share_of_copy": share, "flops_per_s": 1e12}
    return {"kernel": kernel, "case": case, "size": size, "seconds": seconds, **more, **rates}


def met(found: dict[str, Any], words: str) -> bool | None:
    return next(v["met"] for v in verdicts.verdicts(found) if v["line"].startswith(words))


def rows(*made: dict[str, Any]) -> dict[str, Any]:
    return {"speed": {"rows": list(made), "limits": {"copy_bytes_per_s": 3e12, "product_flops_per_s": 5e13}}}


@pytest.mark.parametrize(("kernel", "words", "least"), [(k, w, s) for w, k, _, s in verdicts.SHARES])
def test_the_slowest_large_case_decides(kernel: str, words: str, least: float) -> None:
    small = row(kernel, 0.1, size="small")
    assert met(rows(row(kernel, least), row(kernel, least + 0.1), small), words) is True
    assert met(rows(row(kernel, least - 0.01), row(kernel, least + 0.1)), words) is False
    assert met(rows(small), words) is None and met({}, words) is None
    assert met(rows({"kernel": kernel, "case": "8", "size": "large", "error": "no memory"}), words) is None


def test_a_step_without_noise_is_not_the_promised_one() -> None:
    assert met(rows(row("step", 0.9), row("step", 0.2, "8")), "step, noise") is True


def test_ratios_to_the_compiler() -> None:
    assert met(rows(row("silu", 1, compiled=1.0)), "silu:") is True
    assert met(rows(row("silu", 1, compiled=0.8), row("silu", 1, compiled=1.3)), "silu:") is True
    assert met(rows(row("silu", 1, compiled=0.8), row("silu", 1, compiled=1.2)), "silu:") is False
    assert met(rows(row("silu", 1, compiled=None)), "silu:") is None


def test_right_or_wrong_only_where_all_was_tried() -> None:
    whole = {"calls": 3, "failed": [], "ok": True}
    assert met({"kernels": whole}, "every kernel") is True
    assert met({"kernels": whole | {"stopped": "no time left"}}, "every kernel") is None
    assert met({"kernels": whole | {"ok": False, "failed": [1], "stopped": "no time left"}}, "every kernel") is False
    assert met({"kernels": {"ok": False, "error": "lost"}}, "every kernel") is None
    clean, fault, late = ({"state": s} for s in ("clean", "fault", "unfinished"))
    assert met({"sanitizer": {"memcheck": clean, "racecheck": clean, "initcheck": late, "ok": True}}, "memcheck") is True
    assert met({"sanitizer": {"memcheck": clean, "racecheck": late, "ok": True}}, "memcheck") is None
    assert met({"sanitizer": {"memcheck": clean, "racecheck": clean, "synccheck": fault}}, "memcheck") is False
    assert met({"sanitizer": {"skipped": "not installed"}}, "memcheck") is None


def test_the_report_of_made_up_rows(tmp_path: Path) -> None:
    from alphabar.tools.gpu import picture

    found = rows(
        row("step", 0.91), row("conv2d", 0.2, "32x8 kernel=3", "chief", None), {"kernel": "silu", "case": "8", "error": "no"}
    )
    found["speed"]["rows"][2]["size"] = "small"
    env = {
        "device": "NVIDIA H100 80GB HBM3",
        "date": "2030-01-02T",
        "commit": "abc",
        "multiprocessors": 132,
        "memory_bytes": 2**36,
    }
    found["environment"] = env | {"driver": 1, "nvrtc": "13.0", "cupy": "14", "torch": None}
    found["networks"] = {
        "rows": [{"check": "U-Net", "error": 0.5, "limit": 1.0, "ok": True}, {"check": "x", "raised": "E", "ok": False}]
    }
    text = report.markdown(found, "roof.png", "command")
    assert "| step | 8 noise=made | large | 1000.0 | 1000 | 91% | 1.00 | 2.00 | 1.10 | – |" in text
    assert "| step | 1 | 91% to 91% | 2.00 | 1.10 | 1.10 |" in text
    assert "| step, noise included: at least 85% of a copy | 91.0% | met |" in text
    assert "| AdamW+EMA: at least 90% of a copy | – | not measured |" in text
    assert "| x | – | – | FAILED |" in text and "![Roofline](roof.png)" in text
    picture.roofline(tmp_path / "roof.png", found["speed"], "device")
    assert (tmp_path / "roof.png").stat().st_size > 1000
    numbers, words, drawing = report.paths(tmp_path, env["device"])
    assert numbers.name == "gpu_h100_80gb_hbm3.json" and words.suffix == ".md" and drawing.suffix == ".png"
    assert report.paths(tmp_path / "own.json", "x")[1] == tmp_path / "own.md"


# ------------------------------------------------------------------------------------------------------- PyTorch's contestants


@pytest.fixture
def whole_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """torch.compile with one graph or an error, without the slow code generator behind it."""
    torch = pytest.importorskip("torch")
    compile_ = torch.compile

    def strict(f: Any, **options: Any) -> Any:
        return compile_(f, fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", strict)
    return torch


@pytest.mark.parametrize("name", TABLE)
def test_every_kernel_has_a_compiled_twin(name: str, whole_graphs: Any) -> None:
    torch, ops = whole_graphs, job.in_checkout("bench.torch_ops")
    kernel = TABLE[name]
    case = next((c for c in kernel.benches if c.get("noise") == "made"), kernel.tests[0])
    case = {**case, "shape": (2, *case["shape"][1:])} if case in kernel.benches else case

    def tensors() -> tuple[tuple, dict[str, Any]]:
        args, kwargs = kernel.make(np.random.default_rng(0), case, np.float32)
        return tuple(job.map_all(lambda a: torch.from_numpy(a.copy()), v) for v in (args, kwargs))  # type: ignore[return-value]

    def outcome(compiled: bool) -> list[Any]:
        args, kwargs = tensors()
        torch._dynamo.reset()
        result = ops.timed(name, args, kwargs, compiled=compiled, backend="aot_eager")()
        values = args[:5] if name == "adamw_ema" else result if isinstance(result, tuple) else (result,)
        return [v.detach() for v in values if v is not None]

    eager, compiled = outcome(False), outcome(True)
    drawn = name == "normals" or name.startswith("categorical") or case.get("noise") == "made" or name == "q_sample"
    for a, b in zip(eager, compiled, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not drawn:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
