"""The tool that tries everything on a GPU, driven on the host by a stand-in for CuPy with the host runner behind it."""

import json
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alphabar.kernels import TABLE, dispatch, gpu
from alphabar.kernels.compile import FOLDER
from alphabar.kernels.gpu import launch
from alphabar.tools import gpu_check
from tests import cusim, fake_cupy

FEW = (
    "normals",
    "q_sample",
    "step",
    "categorical_posterior",
    "categorical_q_sample",
    "group_norm_silu_backward",
    "conv2d",
    "adamw_ema",
)


class Event:
    def record(self) -> None:
        pass


class Device:
    def __init__(self, number: int = 0) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class HostedDevice(cusim.Host):
    """Launches with the stand-in's arrays."""

    xp = fake_cupy.cupy

    def launch(self, file: str, name: str, grid: tuple, block: tuple, args: tuple, shared: int = 0) -> None:
        super().launch(file, name, grid, block, tuple(map(fake_cupy.unwrap, args)), shared)


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that seems to have a GPU."""
    if not cusim.available():
        pytest.skip("g++ is not installed")
    cusim.prepare(sorted(FOLDER.glob("*.cu")))
    cupy = fake_cupy.cupy
    properties = {"name": b"host", "major": 9, "minor": 0, "multiProcessorCount": 1, "totalGlobalMem": 1, "l2CacheSize": 1}
    runtime = types.SimpleNamespace(
        getDeviceProperties=lambda n: properties,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
        getDevice=lambda: 0,
    )
    cuda = types.SimpleNamespace(
        runtime=runtime,
        nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)),
        Device=Device,
        Event=Event,
        get_elapsed_time=lambda a, b: 0.5,
        set_allocator=lambda a: None,
    )
    monkeypatch.setattr(cupy, "cuda", cuda, raising=False)
    monkeypatch.setattr(cupy, "__version__", "14", raising=False)
    monkeypatch.setattr(cupy, "copyto", lambda to, a: None, raising=False)
    monkeypatch.setitem(__import__("sys").modules, "cupy", cupy)
    monkeypatch.setattr(launch, "_address", lambda a: fake_cupy.unwrap(a).ctypes.data)
    monkeypatch.setattr(launch, "_cuda", lambda: HostedDevice())
    monkeypatch.setattr(gpu_check, "require_gpu", lambda index: cupy)
    monkeypatch.setattr(gpu_check, "_torch", lambda: None)
    monkeypatch.setattr(gpu_check, "FLUSH", 1024)
    monkeypatch.setattr(gpu_check, "COPY", 1024)
    table = {name: replace(TABLE[name], tests=TABLE[name].tests[:3], benches=TABLE[name].tests[:2]) for name in FEW}
    monkeypatch.setattr(gpu_check, "TABLE", table)
    return cupy


def test_the_sections_run_and_are_written(hosted: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results" / "gpu.json"
    assert gpu_check.main(["--out", str(out), "--only", "noise", "accuracy", "bench", "--commit", "abc"]) == 0
    report = json.loads(out.read_text())
    assert report["environment"]["commit"] == "abc" and report["environment"]["device"] == "host"
    assert report["noise"]["ok"] and report["noise"]["cases"] >= 10
    assert report["accuracy"]["ok"] and 0 < report["accuracy"]["largest_share_of_a_budget"] <= 1
    assert {r["kernel"] for r in report["bench"]["rows"]} == set(FEW)
    assert all(r["seconds"] == pytest.approx(5e-4) for r in report["bench"]["rows"])
    assert "all well" in capsys.readouterr().out


def test_a_wrong_kernel_is_found(
    hosted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def wrong(out: Any, seed: int, step: int, stream: int, first_sample: int) -> Any:
        return gpu.normals(out, seed, step, stream, 0)

    monkeypatch.setitem(dispatch._loaded, ("gpu", "normals"), wrong)
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--out", str(out), "--only", "noise", "accuracy"]) == 1
    report = json.loads(out.read_text())
    assert not report["noise"]["ok"] and not report["accuracy"]["ok"]
    assert {r["kernel"] for r in report["accuracy"]["failed"]} == {"normals"}
    assert "failed: noise, accuracy" in capsys.readouterr().out


def test_a_section_that_breaks_does_not_end_the_others(hosted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cupy: Any, deadline: float) -> None:
        raise ValueError("no memory")

    monkeypatch.setattr(gpu_check, "correct", broken)
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--out", str(out), "--only", "accuracy", "bench"]) == 1
    report = json.loads(out.read_text())
    assert report["accuracy"]["error"] == "ValueError: no memory" and report["bench"]["rows"]


def test_the_calls_that_the_sanitizer_watches(hosted: Any) -> None:
    assert gpu_check.main(["--small"]) == 0


def test_without_a_gpu_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def absent(index: int) -> None:
        raise RuntimeError("no usable GPU: none")

    monkeypatch.setattr(gpu_check, "require_gpu", absent)
    assert gpu_check.main(["--out", str(tmp_path / "gpu.json")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "alphabar gpu-check: error: no usable GPU: none\n" and not captured.out
    assert not list(tmp_path.iterdir())
