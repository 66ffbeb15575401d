"""The training program: what a run leaves, bit-exact resume, signals, kills, faults, and what is said of mistakes."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from alphabar import kernels
from alphabar.core import data, losses
from alphabar.kernels.arrays import to_numpy
from alphabar.nets import checkpoint
from alphabar.tools import config as configs
from alphabar.tools import families, learner, runs, sampling, train, trainer
from alphabar.tools.config import Sample
from tests import fake_cupy

SETTINGS = {
    "model.channels": "8",
    "model.blocks": "1",
    "model.attention": "4",
    "model.groups": "4",
    "train.batch": "6",
    "train.warmup": "2",
    "train.decay": "cosine",
    "log.every": "1",
    "log.samples": "0",
    "log.checkpoints": "100",
    "sample.steps": "2",
    "sample.columns": "2",
}


@pytest.fixture
def reference() -> Iterator[None]:
    """Every kernel by its definition: nothing to compile, and the same bits on one thread or many."""
    with kernels.use("reference"):
        yield


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """20 images of 4×4 in 3 classes."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "tiny.h5", "w") as f:
        f["images"], f["labels"] = rng.integers(0, 256, (20, 4, 4), np.uint8), np.arange(20) % 3
        f.attrs["classes"] = "red,green,blue"
    return tmp_path / "tiny.h5"


def words(images: Path, name: str = "r", steps: int = 6, **changes: object) -> list[str]:
    settings = {**SETTINGS, **{k.replace("__", "."): str(v) for k, v in changes.items()}}
    sets = [w for k, v in settings.items() for w in ("--set", f"{k}={v}")]
    where = ["--out", str(images.parent / "runs"), "--name", name, "--device", "cpu"]
    return ["--data", str(images), "--steps", str(steps), *where, "--quiet", *sets]


def run_of(images: Path, name: str = "r") -> Path:
    return images.parent / "runs" / name


def last(run: Path) -> Path:
    return checkpoint.listing(run / "ckpt")[0][1]


def each_step(monkeypatch: pytest.MonkeyPatch, before: Callable[[trainer.Trainer], None]) -> None:
    """Call ``before(trainer)`` before every training step."""
    step = trainer.Trainer.step

    def wrapped(self: trainer.Trainer) -> trainer.Step:
        before(self)
        return step(self)

    monkeypatch.setattr(trainer.Trainer, "step", wrapped)


def stopped_at(k: int, number: int = signal.SIGTERM) -> Callable[[trainer.Trainer], None]:
    """The signal arrives while step k is under way."""

    def before(t: trainer.Trainer) -> None:
        if t.done == k - 1:
            os.kill(os.getpid(), number)

    return before


# --------------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_its_folder(images: Path, reference: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = [w for w in words(images, log__samples=3, log__checkpoints=2, log__keep=2) if w != "--quiet"]
    assert train.main(options) == 0
    out, err = capsys.readouterr()
    run = run_of(images)
    assert str(run / "samples/final_00000006.png") in out and "alphabar sample" in out
    assert "20 images 4×4×1, 3 classes" in err
    assert [s for s, _ in checkpoint.listing(run / "ckpt")] == [6, 4]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["final_00000006.png", "step_00000003.png"]
    for picture in (run / "loss.png", *(run / "samples").iterdir()):
        assert min(Image.open(picture).size) > 100
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    assert all(m["loss"] > 0 and m["images_per_s"] > 0 for m in lines)
    (start,) = json.loads((run / "env.json").read_text())["starts"]
    assert start["device"] == "cpu" and start["libraries"]["numpy"] == np.__version__
    resolved = configs.from_dict(tomllib.loads((run / "config.toml").read_text()))
    assert resolved.train.steps == 6 and resolved.model.channels == (8,) and resolved.data.path == str(images)
    meta = checkpoint.load(last(run))[1]
    assert configs.from_dict(meta["config"]) == resolved and meta["step"] == 6
    assert not [p for p in run.rglob("*.tmp")]


def test_the_loss_falls(images: Path) -> None:
    """On the fast kernels, with no other setting changed: the network learns twenty images."""
    assert train.main(words(images, steps=150, train__batch=20, model__channels=16, train__lr=1e-2)) == 0
    lines = runs.metrics(run_of(images))
    early, late = (np.mean([m["loss"] for m in part]) for part in (lines[:5], lines[-20:]))
    assert late < 0.5 * early


def test_config_file_of_a_run_gives_the_same_run(images: Path, reference: None) -> None:
    assert train.main(words(images)) == 0
    again = ["--config", str(run_of(images) / "config.toml"), "--out", str(images.parent / "runs"), "--name", "b", "--quiet"]
    assert train.main([*again, "--device", "cpu"]) == 0
    assert last(run_of(images)).read_bytes() == last(run_of(images, "b")).read_bytes()


@pytest.mark.parametrize(
    "changes", [{"diffusion__prediction": "v", "train__weighting": "min_snr"}, {"diffusion__prediction": "x0"}]
)
def test_other_targets(images: Path, reference: None, changes: dict[str, Any]) -> None:
    assert train.main(words(images, diffusion__schedule="cosine", model__scale_shift="true", **changes)) == 0
    assert np.isfinite([m["loss"] for m in runs.metrics(run_of(images))]).all()


def test_without_labels_or_without_classes(images: Path, reference: None) -> None:
    assert train.main(words(images, model__conditional="false")) == 0
    assert checkpoint.load(last(run_of(images)))[1]["model"]["classes"] is None
    with h5py.File(images, "a") as f:
        del f["labels"]
    assert train.main(words(images, "b")) == 0


def test_runs_get_numbers_of_their_own(images: Path, reference: None) -> None:
    options = words(images, steps=3)
    del options[options.index("--name") : options.index("--name") + 2]
    assert train.main(options) == train.main(options) == 0
    assert sorted(p.name for p in (images.parent / "runs").iterdir()) == ["tiny-001", "tiny-002"]


# ------------------------------------------------------------------------------------------------------------ dry run


def test_dry_run_tells_and_writes_nothing(images: Path, reference: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*words(images), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "channels = [8]" in out and "ms on cpu" in out and "MiB" in out
    count = trainer.Trainer(
        configs.from_words([f"{k}={v}" for k, v in SETTINGS.items()] + [f"data.path={images}"]), _tiny(images)
    )
    assert f"{count.net.params.count:,}" in out
    assert sorted(p.name for p in images.parent.iterdir()) == ["tiny.h5"]
    assert fails(capsys, [*words(images, sample__steps=2000), "--dry-run"], "[sample]: steps")  # as the run itself would


def _tiny(images: Path) -> Any:
    from alphabar.core import data

    return data.load(images)


# ------------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_resume_at_every_step_is_bit_equal(images: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Stopped in any step and resumed: the last checkpoint is the unbroken run's, byte by byte (weights, average, moments)."""
    options: dict[str, Any] = {"model__dropout": 0.1, "data__flip": "true", "train__p_uncond": 0.3}
    with kernels.use(backend):
        assert train.main(words(images, "whole", **options)) == 0
        whole = last(run_of(images, "whole")).read_bytes()
        for k in range(1, 6):
            with monkeypatch.context() as patch:
                each_step(patch, stopped_at(k))
                assert train.main(words(images, f"r{k}", **options)) == 128 + signal.SIGTERM
            run = run_of(images, f"r{k}")
            assert checkpoint.load(last(run))[1]["step"] == k
            assert train.main(["--resume", str(run), "--device", "cpu", "--quiet"]) == 0
            assert last(run).read_bytes() == whole
            assert [m["step"] for m in runs.metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_every_step_alone(images: Path, monkeypatch: pytest.MonkeyPatch, reference: None) -> None:
    """A process for each step, and still the unbroken run."""
    assert train.main(words(images, "whole")) == 0
    each_step(monkeypatch, lambda t: os.kill(os.getpid(), signal.SIGINT))
    assert train.main(words(images)) == 128 + signal.SIGINT
    for step in range(2, 6):
        assert train.main(["--out", str(images.parent / "runs"), "--name", "r", "--resume", "auto", "--quiet"]) == 130
        assert checkpoint.load(last(run_of(images)))[1]["step"] == step
    assert train.main(["--resume", str(run_of(images)), "--quiet"]) == 0
    assert last(run_of(images)).read_bytes() == last(run_of(images, "whole")).read_bytes()


def test_resume_auto_without_a_run_starts_one(images: Path, reference: None) -> None:
    assert train.main([*words(images, steps=3), "--resume", "auto"]) == 0
    assert train.main([*words(images, steps=5), "--resume", "auto"]) == 0
    assert [s for s, _ in checkpoint.listing(run_of(images) / "ckpt")] == [5, 3]


def test_resume_falls_back_to_a_whole_checkpoint(images: Path, reference: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(images, "whole", log__checkpoints=2)) == 0
    assert train.main(words(images, log__checkpoints=2)) == 0
    run = run_of(images)
    last(run).write_bytes(last(run).read_bytes()[:1000])
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b'{"step": 7, "lo')
    assert train.main(["--resume", str(run), "--quiet"]) == 0
    assert "skipped a bad checkpoint" in capsys.readouterr().err
    assert last(run).read_bytes() == last(run_of(images, "whole")).read_bytes()
    assert [m["step"] for m in runs.metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_resume_from_an_older_checkpoint_leaves_the_run_alone(images: Path, reference: None) -> None:
    assert train.main(words(images, log__checkpoints=2)) == 0
    before = {p: p.read_bytes() for p in run_of(images).rglob("*") if p.is_file()}
    older = checkpoint.step_path(run_of(images) / "ckpt", 2)
    assert train.main(["--resume", str(older), "--out", str(images.parent / "runs"), "--name", "fork", "--quiet"]) == 0
    assert {p: p.read_bytes() for p in run_of(images).rglob("*") if p.is_file()} == before
    assert last(run_of(images, "fork")).read_bytes() == last(run_of(images)).read_bytes()


def test_a_finished_run_draws_its_sheet_again(images: Path, reference: None) -> None:
    assert train.main(words(images)) == 0
    sheet = run_of(images) / "samples" / "final_00000006.png"
    first = sheet.read_bytes()
    sheet.unlink()
    assert train.main(["--resume", str(run_of(images)), "--quiet"]) == 0
    assert sheet.read_bytes() == first


def test_resume_refuses_other_data_and_another_network(images: Path, reference: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(images, steps=3)) == 0
    assert fails(capsys, ["--resume", str(run_of(images)), "--set", "model.blocks=2"], "cannot change model.blocks: its")
    assert fails(capsys, ["--resume", str(run_of(images)), "--data", "digits"], "other data (tiny) than digits")
    with h5py.File(images, "a") as f:
        f["images"][0, 0, 0] ^= 1
    assert fails(capsys, ["--resume", str(run_of(images))], "other data")


# ---------------------------------------------------------------------------------------------------------- kills and signals


def start(options: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "ALPHABAR_KERNELS": "reference"}
    command = [sys.executable, "-m", "alphabar.tools.train", *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kill_at_any_instant_and_resume_is_the_unbroken_run(images: Path, reference: None) -> None:
    """kill -9 at random instants of the real program: at most one interval is lost, and the end is the same bits."""
    interval, options = 3, words(images, steps=60, log__checkpoints=3)
    assert train.main(words(images, "whole", steps=60, log__checkpoints=interval)) == 0
    dice, run, kills, told = random.Random(1), run_of(images), 0, 0
    for _ in range(12):
        with start([*options, "--resume", "auto"]) as child:
            deadline = time.monotonic() + 60
            while child.poll() is None and _steps(run) <= told and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(dice.random() * 0.05)
            child.kill()
        kills += child.returncode == -signal.SIGKILL
        told = _steps(run)
        kept = checkpoint.newest(run / "ckpt")[2]["step"] if checkpoint.listing(run / "ckpt") else 0
        assert told - kept <= interval
        if child.returncode == 0 or kills == 4:
            break
    assert kills >= 2
    assert train.main([*options, "--resume", "auto"]) == 0
    assert last(run).read_bytes() == last(run_of(images, "whole")).read_bytes()
    assert not list(run.rglob("*.tmp"))


def _steps(run: Path) -> int:
    found = runs.metrics(run)
    return found[-1]["step"] if found else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_tell(images: Path, number: int) -> None:
    """Also a second signal while the checkpoint is written does no harm."""
    with start([w for w in words(images, steps=100_000) if w != "--quiet"]) as child:
        while not _steps(run_of(images)):
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(number)
        time.sleep(0.002)
        child.send_signal(number)
        err = child.communicate()[1]
    assert child.returncode == 128 + number, err
    assert "go on with: alphabar train --resume" in err and "Traceback" not in err
    assert checkpoint.newest(run_of(images) / "ckpt")[2]["step"] == _steps(run_of(images))


# -------------------------------------------------------------------------------------------------------------------- faults


def test_a_second_trainer_is_refused_and_the_first_unharmed(
    images: Path, monkeypatch: pytest.MonkeyPatch, reference: None, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = []

    def intrude(t: trainer.Trainer) -> None:
        if t.done == 3:
            monkeypatch.undo()
            codes.append(train.main(["--resume", str(run_of(images)), "--quiet"]))

    assert train.main(words(images, "whole", log__checkpoints=2)) == 0
    each_step(monkeypatch, intrude)
    assert train.main(words(images, log__checkpoints=2)) == 0
    assert codes == [2] and f"another trainer (process {os.getpid()}) is at work" in capsys.readouterr().err
    assert last(run_of(images)).read_bytes() == last(run_of(images, "whole")).read_bytes()


@pytest.mark.parametrize("where", ["weight", "gradient", "data"])
def test_what_is_not_finite_stops_the_run_and_is_named(
    images: Path, monkeypatch: pytest.MonkeyPatch, reference: None, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def poison(t: trainer.Trainer) -> None:
        if t.done != 3:
            return
        if where == "weight":
            t.net.params["conv_in.weight"].data[0, 0, 0, 0] = np.nan
        elif where == "data":
            monkeypatch.setattr(learner, "to_unit", lambda u: np.full(u.shape, np.inf, np.float32))
        else:
            weighted = losses.weighted_loss
            monkeypatch.setattr(losses, "weighted_loss", lambda *a: (weighted(*a)[0], weighted(*a)[1] * np.float32(np.inf)))

    each_step(monkeypatch, poison)
    with np.errstate(all="ignore"):
        assert train.main(words(images, log__checkpoints=2)) == 1
    err = capsys.readouterr().err
    named = {"weight": "weights/conv_in.weight", "gradient": "gradient/", "data": "step/x_t"}[where]
    assert "step 4: " in err and "seed 0" in err and named in err and err.count("\n") == 1, err
    run = run_of(images)
    assert checkpoint.newest(run / "ckpt")[2]["step"] == 2
    bundle, meta = checkpoint.load(run / "crash_step_00000004.h5")
    assert meta["step"] == 4 and len(bundle["step/rows"]) == 6 and bundle["step/x_t"].shape == (6, 4, 4, 1)


@pytest.mark.parametrize(("failures", "code"), [(2, 0), (3, 1)])
def test_a_full_disk_stops_the_run_only_when_it_lasts(
    images: Path, monkeypatch: pytest.MonkeyPatch, reference: None, capsys: pytest.CaptureFixture[str], failures: int, code: int
) -> None:
    save, tries = checkpoint.save, []

    def fail(path: Any, *arguments: Any) -> Any:
        tries.append(path)
        if 2 <= len(tries) < 2 + failures:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(path, *arguments)

    monkeypatch.setattr(checkpoint, "save", fail)
    assert train.main(words(images, log__checkpoints=1)) == code
    err = capsys.readouterr().err
    assert err.count("No space left") == failures
    saved = [s for s, _ in checkpoint.listing(run_of(images) / "ckpt")]
    assert saved == ([6, 5, 4] if code == 0 else [1]), saved


# ------------------------------------------------------------------------------------------------------------------ mistakes


def fails(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> bool:
    """Exit code 2 and one line with the message."""
    capsys.readouterr()
    code = train.main([*options, "--device", "cpu", "--quiet"])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.startswith("alphabar train: error: ") and err.count("\n") == 1, (code, out, err)
    assert message in err, err
    return True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "lr=3"], "the nearest is 'train.lr'"),
        (["--set", "train.lr"], "section.key=value"),
        (["--set", "train.lr=nan"], "must be a number"),
        (["--set", "model.groups=7"], "groups must divide"),
        (["--set", "model.attention=5"], "must name sides of images among [8, 4], not [5]"),
        (["--set", "model.channels=8,8,8,8,8"], "these settings make no network for images of 8×8"),
        (["--set", "sample.steps=1001"], "[sample]: steps must be in 1..1000"),
        (["--set", "sample.sampler=ddpm", "--set", "sample.eta=1"], "eta goes with the sampler ddim"),
        (["--set", "diffusion.schedule=cosine", "--set", "diffusion.rescale=true"], "does nothing for the cosine"),
        (["--config", "/no/such.toml"], "No such file"),
        (["--config", "/"], "directory"),
        (["--data", "/no/such.h5"], "No such file"),
        (["--data", "digit"], "the built-in data sets are: digits"),
        (["--data", "/"], "not a regular file"),
        (["--steps", "0"], "--steps"),
        (["--steps", "1e3"], "--steps"),
        (["--steps"], "expected one argument"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**63)], "--seed"),
        (["--seed", "9" * 5000], "--seed"),
        (["--resume", "/no/such"], "No such file"),
        (["--resume", "/"], "no valid checkpoint"),
        (["--resume", __file__], "not a checkpoint"),
        (["--name", ""], "--name"),
        (["--name", "../up"], "--name"),
        (["--name", ".."], "--name"),
        (["--out", "/dev/null", "--name", "x"], "cannot be used"),
        (["--out", "/dev/null"], "no run folder"),
        (["--stepz", "3"], "unrecognized"),
        (["extra"], "unrecognized"),
        (["--step", "3"], "unrecognized"),
        (["--set", "data.path=\udcff"], "printable"),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, options, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "cuda"), ("cuda:99", "cuda:99"), ("cuda:x", "auto, cpu, cuda"), ("tpu", "auto, cpu, cuda"), ("", "auto")],
)
def test_a_device_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "cuda":
        from alphabar.tools import command

        if command._gpu_there():
            pytest.skip("this machine has a GPU")
    assert train.main(["--device", name]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and not list(tmp_path.iterdir())


def test_a_name_that_holds_a_run(images: Path, reference: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(images, steps=3)) == 0
    assert fails(capsys, words(images, steps=3), "holds a run already")


def test_as_a_script_it_is_the_same_program(tmp_path: Path) -> None:
    for command in ([str(Path(train.__file__))], ["-m", "alphabar.tools.cli", "train"]):
        out = subprocess.run([sys.executable, *command, "--set", "a=b"], capture_output=True, text=True, cwd=tmp_path)
        assert out.returncode == 2 and out.stderr.startswith("alphabar train: error: unknown setting 'a'")


@pytest.mark.parametrize(
    ("own", "sampler"),
    [
        (["train.weighting=min_snr"], "dpm++"),
        (["train.loss=hybrid", "train.importance=true", "train.weighting=p2"], "learned"),
        (["method=ncsn", "diffusion.sigma_max=9", "diffusion.levels=6"], "langevin"),
        (["method=multinomial"], "ancestral"),
        (["method=d3pm", "diffusion.states=9"], "ancestral"),
        (["method=d3pm", "diffusion.transition=gaussian", "diffusion.states=9"], "ancestral"),
        (["method=subvpsde", "train.weighting=likelihood"], "pc"),
        (["method=vesde", "diffusion.sigma_max=9", "train.weighting=likelihood", "train.importance=false"], "flow"),
    ],
)
def test_training_and_sampling_on_arrays_that_refuse_numpy(
    reference: None, monkeypatch: pytest.MonkeyPatch, own: list[str], sampler: str
) -> None:
    """The code that runs on a GPU, on a CuPy that is as strict as the real one: the same bits as on NumPy."""
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    settings = [f"{k}={v}" for k, v in SETTINGS.items()] + ["model.channels=8,16", "data.flip=true", *own]

    def run(xp: Any) -> tuple[Any, ...]:
        digits = data.load("digits")
        config = configs.load(None, settings)
        made = trainer.Trainer(families.of(config).resolved(config, digits), digits, xp)
        losses = [made.step().loss for _ in range(3)]
        arrays, _ = made.state()
        chosen = sampling.sampler(made.process, Sample(sampler, 0 if sampler == "flow" else 2, tolerance=0.1))
        with made.averaged() as net:
            images = list(sampling.draw(made.process, net, chosen, np.arange(5), 5, seed=1, weight=1.0, batch=3))
        return np.array(losses), *map(to_numpy, arrays.values()), *images

    for there, here in zip(run(cupy), run(np), strict=True):
        np.testing.assert_array_equal(there, here)
