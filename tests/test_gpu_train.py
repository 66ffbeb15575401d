"""Whole steps and whole trainings of gpu-check: PyTorch's side of them, what is made of the times, and what would fit."""

import importlib
import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from alphabar.core import data, samplers, schedules, tables
from alphabar.kernels.device_memory import OutOfDeviceMemory
from alphabar.nets import UNet
from alphabar.tools import config as configs
from alphabar.tools import families, gpu_check, memory, train
from alphabar.tools.gpu import job, picture, plan, report, runs, steps, verdicts
from tests import hosted

SMALL: dict[str, Any] = {
    "image_size": 16,
    "in_channels": 3,
    "channels": (16, 32, 32),
    "blocks": 2,
    "attention": (8,),
    "groups": 8,
}
OTHER: dict[str, Any] = {"image_size": 8, "channels": (8, 16), "blocks": 1, "attention": (8,), "head_dim": 4, "groups": 4}
SETTINGS = ("model.channels=8,8", "model.blocks=1", "model.attention=4", "model.groups=4")


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    return pytest.importorskip("torch")


# -------------------------------------------------------------------------------------------------------------- PyTorch's side


@pytest.mark.parametrize(
    "options",
    [SMALL | {"classes": 4}, OTHER | {"downsample_pad": (0, 1), "flip_sin_to_cos": True, "time_origin": 1, "freq_shift": 1}],
)
def test_the_twin_in_pytorch_is_our_network(options: dict[str, Any], torch: ModuleType) -> None:
    net = UNet(**options, zero_init=False)
    twin = importlib.import_module("bench.torch_unet").UNet(net.config).load(net)
    shape = (3, *net.config["image_size"], net.config["in_channels"])
    x, t = np.random.default_rng(0).standard_normal(shape).astype(np.float32), np.array([1, 50, 999])
    y = None if net.config["classes"] is None else np.array([0, 4, 2])
    with torch.no_grad():
        theirs = twin(torch.from_numpy(x).movedim(-1, 1), torch.from_numpy(t), None if y is None else torch.from_numpy(y))
    np.testing.assert_allclose(theirs.movedim(1, -1).numpy(), net.predict(x, t, y), rtol=0, atol=2e-5)
    assert sum(p.numel() for p in twin.parameters()) == net.params.count


def test_the_twin_refuses_what_it_does_not_know(torch: ModuleType) -> None:
    with pytest.raises(ValueError, match="scale_shift"):
        importlib.import_module("bench.torch_unet").UNet(UNet(**OTHER, scale_shift=True).config)


def steps_of(net: UNet, torch: ModuleType, precision: str = "fp32", **options: Any) -> Any:
    s = schedules.linear(1000)
    images = np.random.default_rng(1).integers(0, 256, (4, *net.config["image_size"], net.config["in_channels"]), np.uint8)
    return importlib.import_module("bench.gpu_steps").Steps(net, images, s.signal, s.noise, precision, "cpu", **options)


def test_their_trajectory_is_ddim(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    net = UNet(**OTHER, zero_init=False)
    table = tables.ddim(schedules.linear(1000), 10)
    x_T = samplers.prior((4, 8, 8, 1), seed=3)
    monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.from_numpy(x_T).movedim(-1, 1))
    theirs = steps_of(net, torch, training=False).sample(table.times.astype(int))
    ours = samplers.sample(net.predict, table, x_T, clip=(-1, 1))
    np.testing.assert_allclose(theirs.movedim(1, -1).numpy(), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_their_training_learns(precision: str, torch: ModuleType) -> None:
    torch.manual_seed(0)
    made = steps_of(UNet(**OTHER), torch, precision, lr=5e-3)
    losses = [float(made.train()) for _ in range(12)]
    assert np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    assert all(not torch.equal(a, p) for a, p in zip(made.ema, made.parameters, strict=True))


# ------------------------------------------------------------------------------------------------------------------ our side


@pytest.mark.skipif(not hosted.available(), reason="g++ is not installed")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_our_steps_and_trajectories_on_a_device(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = hosted.pretend(monkeypatch)
    for name, value in (
        ("SETTINGS", SETTINGS),
        ("SIDE", 8),
        ("COLOURS", 1),
        ("KEPT", 4),
        ("STEPS", 2),
        ("ROUNDS", 1),
        ("ABOUT", 0),
    ):
        monkeypatch.setattr(steps, name, value)
    monkeypatch.setattr(steps, "torch_of", lambda: None)
    monkeypatch.setattr(steps, "free", lambda cupy: None)
    made = job.Job(device.xp, time.monotonic() + 200)
    steps._run(made, (steps.Case("train", precision, 2), steps.Case("sample", precision, 2)))
    assert made.report["ok"], made.report["failed"]
    assert [(r["kind"], r["precision"], r["batch"]) for r in made.report["rows"]] == [
        (k, precision, 2) for k in ("train", "sample")
    ]
    assert all(r["seconds"]["alphabar"] > 0 for r in made.report["rows"])
    assert any("bf16" in name for name in device.launched) == (precision == "bf16")


def test_pytorchs_contestants(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SETTINGS", SETTINGS), ("SIDE", 8), ("COLOURS", 1), ("KEPT", 4), ("STEPS", 2)):
        monkeypatch.setattr(steps, name, value)
    module = importlib.import_module("bench.gpu_steps")
    kept = module.Steps.__init__
    monkeypatch.setattr(module.Steps, "__init__", lambda self, *a, **k: kept(self, *a, device="cpu", **k))
    for kind in ("train", "sample"):
        plain, compiled = steps.theirs(torch, steps.Case(kind, "fp32", 2), job.Job(np, time.monotonic() + 1e4))
        assert (plain[0], compiled[0]) == ("eager", "compiled")
        assert torch.isfinite(plain[1]()()).all()
        late = job.Job(np, time.monotonic() + 1)
        assert [name for name, _ in steps.theirs(torch, steps.Case(kind, "fp32", 2), late)] == ["eager"]
        assert late.report["not_compiled"] == [f"{kind} fp32 2"]


# ------------------------------------------------------------------------------------------------------------------- reports


def a_report() -> dict[str, Any]:
    def row(kind: str, batch: int, precision: str = "bf16", **seconds: float) -> dict[str, Any]:
        return {"kind": kind, "precision": precision, "batch": batch, "seconds": seconds}

    environment = {"device": "NVIDIA Host", "date": "2026-01-01", "multiprocessors": 1, "memory_bytes": 1 << 30, "driver": 1}
    return {
        "environment": environment | {"nvrtc": "13.0", "commit": "abc"},
        "steps": {
            "ok": True,
            "took_s": 1.0,
            "rows": [
                row("train", 128, alphabar=0.010, eager=0.020, compiled=0.009),
                row("train", 128, "fp32", alphabar=0.5),
                {"kind": "train", "precision": "bf16", "batch": 256, "error": "OutOfDeviceMemory"},
            ],
        },
        "trajectories": {"ok": True, "rows": [row("sample", 1, alphabar=0.05, eager=0.2)]},
        "runs": {
            "ok": None,
            "rows": [
                {"run": "digits", "ok": True, "seconds": 9.0, "last": {"loss": 0.1}, "sheet": "gpu_host_train_digits.png"},
                {"run": "short-fp32", "ok": False, "seconds": 3.0, "last": {"loss": 0.2}, "apart": 0.5, "limit": 1e-3},
                {"run": "other", "ok": None, "skipped": "no time left"},
            ],
        },
    }


def test_the_promises_of_whole_steps() -> None:
    found = {v["line"]: (v["found"], v["met"]) for v in verdicts.verdicts(a_report())}
    assert found["training step, bf16, batch 128: at least 1.3× torch eager"] == ("2.00×", True)
    assert found["training step, bf16, batch 128: at least 1.0× torch compiled"] == ("0.90×", False)
    assert found["50 DDIM steps, bf16, batch 1: at least 3.0× torch eager"] == ("4.00×", True)
    assert found["50 DDIM steps, bf16, batch 16: at least 3.0× torch eager"] == ("–", None)
    assert len(found) == 6


def test_the_report_of_whole_steps(tmp_path: Path) -> None:
    text = report.markdown(a_report(), "gpu_host_train.png", "python tools/gpu_check.py --train")
    assert "| bf16 | 128 | 10.00 | 20.00 | 9.00 | 2.00 | 0.90 | 12,800 |" in text
    assert "| fp32 | 128 | 500.00 | – | – | – | – | 256 |" in text and "| bf16 | 256 |" not in text
    assert "| digits | 9.0 | 0.1000 | – | – | ok |" in text and "![digits](gpu_host_train_digits.png)" in text
    assert (
        "| short-fp32 | 3.0 | 0.2000 | 5.0e-01 | 1.0e-03 | FAILED |" in text
        and "| other | – | – | – | – | no time left |" in text
    )
    picture.growth(tmp_path / "growth.png", a_report(), "NVIDIA Host")
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_the_sections_of_train() -> None:
    assert sum(s.kept for s in plan.WHOLE) <= plan.SECONDS and plan.WHOLE_NAMES <= tuple(gpu_check.RUNS)[-3:]
    assert gpu_check.whole(plan.WHOLE_NAMES) and not gpu_check.whole(plan.NAMES) and not gpu_check.whole(("steps", "noise"))
    paths = report.paths(Path("out"), "NVIDIA H100 80GB HBM3", whole=True)
    assert [p.name for p in paths] == [f"gpu_h100_80gb_hbm3_train.{s}" for s in ("json", "md", "png")]


def test_a_data_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu_check.main(["--train", "--data", str(tmp_path / "none.h5")]) == 2
    assert "there is no such file" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- public program


def test_a_run_of_the_public_program(tmp_path: Path) -> None:
    made = job.Job(np, time.monotonic() + 120)
    settings = ("model.channels=8,8", "model.blocks=1", "train.steps=3", "train.batch=4", "log.every=1", "log.samples=0")
    row = runs._trained(made, tmp_path, "tiny", "cpu", (*settings, "sample.steps=2", "sample.columns=1"))
    assert row["ok"], row
    assert len(row["losses"]) == 3 and row["last"]["step"] == 3 and next((tmp_path / "tiny" / "samples").glob("final_*.png"))
    wrong = runs._trained(made, tmp_path, "wrong", "cpu", ("model.channels=7",))
    assert wrong["ok"] is False and "exit code 2" in wrong["error"] and "channels[0] must be even" in wrong["stderr"]
    late = runs._trained(job.Job(np, time.monotonic()), tmp_path, "late", "cpu", ())
    assert late["ok"] is None and late["skipped"] == "no time left"
    json.dumps([row, wrong, late])


def test_how_far_losses_are_apart() -> None:
    assert runs._apart([1.0, 3.0], [2.0, 2.0]) == 0 and runs._apart([1.1], [1.0]) == pytest.approx(0.1)
    assert runs._apart([1.0], [1.0, 2.0]) == float("inf")


# --------------------------------------------------------------------------------------------------------------- what would fit


def small_run(batch: int) -> Any:
    digits = data.load("digits")
    config = configs.load(None, ["model.channels=8,16", "model.blocks=1", f"train.batch={batch}"])
    return families.of(config).resolved(config, digits), digits


def test_the_largest_batch_is_where_the_memory_ends() -> None:
    config, digits = small_run(500)
    wanted = 40
    free = int(memory.nbytes(config, digits, np, wanted) / memory.SPARE)
    assert memory.largest_batch(config, digits, np, free) == pytest.approx(wanted, rel=0.15)
    assert memory.largest_batch(config, digits, np, 1000) == 0


class Full:
    """A library whose device has ``free`` bytes left."""

    def __init__(self, free: int) -> None:
        class Pool:
            @staticmethod
            def free_all_blocks() -> None: ...

        class Runtime:
            @staticmethod
            def memGetInfo() -> tuple[int, int]:
                return free, free

        self.get_default_memory_pool = Pool
        self.cuda = type("Cuda", (), {"runtime": Runtime})


def test_what_a_run_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config, digits = small_run(500)
    monkeypatch.setattr(memory, "nbytes", lambda config, data, xp, batch: 1000 + 10 * batch)
    said = memory.advice(config, digits, Full(4000), OutOfDeviceMemory(7, 5, 4000), "cuda:0")
    assert said.startswith("cuda:0: ") and "train.batch=500 does not fit, some 280 would" in said and "bf16" in said
    said = memory.advice(config, digits, Full(900), OutOfDeviceMemory(7, 5, 900), "cuda:0")
    assert "no batch below 500 would fit either" in said

    def never(*_: Any) -> int:
        raise OutOfDeviceMemory(1, 0, 1)

    monkeypatch.setattr(memory, "nbytes", never)
    assert "no batch below 500" in memory.advice(config, digits, Full(900), OutOfDeviceMemory(7, 5, 900), "cuda:0")


def test_the_program_ends_with_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def full(*_: Any) -> None:
        raise OutOfDeviceMemory(7, 5, 4000)

    monkeypatch.setattr(train, "Trainer", full)
    monkeypatch.setattr(memory, "advice", lambda config, data, xp, failed, where: f"{where}: {failed.asked} asked")
    assert train.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "alphabar train: error: cpu: 7 asked\n"
