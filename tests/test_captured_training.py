"""Training steps in one piece: the plain step's bits on the CPU, its numbers on a GPU's stand-in, resume, faults, no waiting."""

import json
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import data
from alphabar.kernels import bf16, stepping
from alphabar.kernels.arrays import to_numpy
from alphabar.kernels.graphs import Arena
from alphabar.kernels.uploads import Uploads
from alphabar.nets import checkpoint
from alphabar.tools import config as configs
from alphabar.tools import families, runs, train
from alphabar.tools.trainer import NotFinite, Step, Trainer
from tests import fake_cuda, fake_cupy, hosted
from tests.hosted import HostedDevice

DIGITS = data.load("digits")
SMALL = ["model.channels=4,8", "model.blocks=1", "model.attention=4", "model.groups=2", "train.batch=3", "train.warmup=2"]
METHODS: dict[str, list[str]] = {
    "ddpm": ["train.p_uncond=0.5", "data.flip=true"],
    "v and min_snr": ["diffusion.prediction=v", "train.weighting=min_snr", "model.scale_shift=true"],
    "x0": ["diffusion.prediction=x0", "model.conditional=false"],
    "ncsn": ["method=ncsn", "diffusion.sigma_max=9", "diffusion.levels=6", "train.clip=0"],
    "subvpsde": ["method=subvpsde", "train.weighting=likelihood"],
    "vesde": ["method=vesde", "diffusion.sigma_max=9"],
}
PLAIN: dict[str, list[str]] = {
    "hybrid": ["train.loss=hybrid"],
    "importance": ["train.importance=true"],
    "dropout": ["model.dropout=0.1"],
    "states": ["method=multinomial"],
}
cupy: Any = fake_cupy.cupy


def made(*settings: str, xp: Any = np) -> Trainer:
    config = configs.load(None, [*SMALL, *settings])
    return Trainer(families.of(config).resolved(config, DIGITS), DIGITS, xp)


def arrays(t: Trainer) -> dict[str, np.ndarray]:
    return {name: to_numpy(a).copy() for name, a in t.state()[0].items()}


def same(a: Trainer, b: Trainer) -> bool:
    """Weights, average and moments, by their bits."""
    ours, theirs = arrays(a), arrays(b)
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[n], theirs[n], equal_nan=True) for n in ours)


def near(ours: list[Step], theirs: list[Step], rtol: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose([a.loss, a.grad_norm, a.lr], [b.loss, b.grad_norm, b.lr], rtol=rtol)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostedDevice:
    """A machine that seems to have a GPU."""
    if not hosted.available():
        pytest.skip("g++ is not installed")
    return hosted.pretend(monkeypatch)


# ------------------------------------------------------------------------------------------------------------------ on the CPU


@pytest.mark.parametrize("name", METHODS)
def test_a_captured_step_has_the_bits_of_a_plain_one(name: str) -> None:
    ours, theirs = made(*METHODS[name]), made(*METHODS[name])
    theirs.captured = None
    near([ours.step() for _ in range(5)], [theirs.step() for _ in range(5)], 1e-6)  # losses are added in another order
    assert ours.captured is not None and ours.captured.kept and ours.captured.refused is None
    assert same(ours, theirs) and ours.optimiser.count == theirs.optimiser.count == 5
    assert ours.work_nbytes > 0


@pytest.mark.parametrize("name", PLAIN)
def test_what_cannot_be_captured_goes_plainly(name: str) -> None:
    t = made(*PLAIN[name])
    assert t.captured is None and t.waits and np.isfinite(t.step().loss)


def test_the_definitions_go_plainly_and_captured_steps_follow_them() -> None:
    """One training by both kinds of steps in turn is the one by captured steps, within rounding."""
    mixed, whole = made(), made()
    losses = []
    for k in range(6):
        with kernels.use("reference" if k in (0, 3) else "auto"):
            losses.append(mixed.step())
    assert mixed.captured is not None and mixed.captured.kept
    near(losses, [whole.step() for _ in range(6)], 1e-5)
    assert mixed.report().loss == pytest.approx(np.mean([s.loss for s in losses]), rel=1e-12)


def test_frozen_parameters_and_other_threads_are_noticed() -> None:
    """The step that was kept is made anew where what it depends on has changed."""
    import numba

    ours, theirs = made(), made()
    theirs.captured = None
    before = numba.get_num_threads()
    for k in range(5):
        for t in (ours, theirs):
            t.net.params["conv_in.weight"].needs_grad = k != 2
            numba.set_num_threads(1 if k == 3 else before)
            t.step()
    assert same(ours, theirs)


def test_resume_at_every_step_has_the_bits_of_the_unbroken_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: Callable[..., int]
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = run("whole", "cpu", 5, log__every=1)
    for k in range(1, 5):
        assert stopped_after(k, lambda k=k: train.main(words(f"r{k}", "cpu", 5, log__every=1))) == 128 + signal.SIGTERM
        assert checkpoint.load(last(f"r{k}"))[1]["step"] == k
        assert train.main(["--resume", f"runs/r{k}", "--device", "cpu", "--quiet"]) == 0
        assert last(f"r{k}").read_bytes() == whole


def words(name: str, device: str, steps: int, **changes: object) -> list[str]:
    settings = {"log.samples": 0, "sample.steps": 2, "sample.columns": 1, **{k.replace("__", "."): v for k, v in changes.items()}}
    sets = [word for s in (*SMALL, *(f"{k}={v}" for k, v in settings.items())) for word in ("--set", s)]
    return ["--device", device, "--name", name, "--steps", str(steps), "--quiet", *sets]


def last(name: str) -> Path:
    return checkpoint.listing(Path("runs") / name / "ckpt")[0][1]


def run(name: str, device: str, steps: int, **changes: object) -> bytes:
    """The last checkpoint of a whole run."""
    assert train.main(words(name, device, steps, **changes)) == 0
    return last(name).read_bytes()


def poison(t: Trainer, where: str) -> None:
    """Weights with which the loss is not finite, or the gradient alone."""
    weights = {"conv_in.weight": np.nan}
    if where == "gradient":
        weights = {"conv_norm_out.weight": 0, "conv_norm_out.bias": 0, "conv_out.weight": 1e37, "conv_out.bias": 1e4}
    for name, value in weights.items():
        t.net.params[name].data[...] = value


@pytest.mark.parametrize("where", ["weight", "gradient"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_what_is_not_finite_changes_nothing_and_is_named(where: str, on_gpu: bool, device: HostedDevice) -> None:
    t = made(xp=cupy if on_gpu else np)
    for _ in range(3):
        t.step()
    poison(t, where)
    before, counted = arrays(t), (t.done, t.optimiser.count)
    for _ in range(2):  # it says so each time
        with np.errstate(all="ignore"), pytest.raises(NotFinite, match=r"step 4: .*seed 0; images") as raised:
            if on_gpu:  # some steps later, as a session finds it
                t.advance(), t.advance(), t.advance()
                t.report()
            else:
                t.step()
        assert (t.done, t.optimiser.count) == counted
        assert ("norm of the gradient" if where == "gradient" else "the loss is nan") in str(raised.value)
        found = raised.value.arrays
        assert {"step/x_t", "step/t", "step/rows", "weights/conv_in.weight"} <= found.keys()
        assert any(n.startswith("gradient/") for n in found) == (where == "gradient")
        for name, a in arrays(t).items():
            np.testing.assert_array_equal(a, before[name])
    t.net.params.data[...] = t.optimiser.ema  # which is sound
    assert np.isfinite(t.step().loss) and t.done == 4 and t.optimiser.count == 4


# ------------------------------------------------------------------------------------------------------- on a GPU's stand-in


@pytest.mark.parametrize("name", METHODS)
def test_the_gpu_trains_as_the_cpu_does(name: str, device: HostedDevice) -> None:
    ours, theirs = made(*METHODS[name], xp=cupy), made(*METHODS[name])
    near([ours.step() for _ in range(4)], [theirs.step() for _ in range(4)], 2e-5)
    assert ours.captured is not None and ours.captured.kept and ours.captured.refused is None and not ours.waits
    found = arrays(ours)
    for key, wanted in arrays(theirs).items():
        if not key.startswith(("m/", "v/")):
            np.testing.assert_allclose(found[key], wanted, rtol=0, atol=2e-4)
    assert ours.work_nbytes > 0


def test_x_and_target_have_the_bits_of_the_cpu(device: HostedDevice) -> None:
    """Of one batch, its levels and its step."""
    rng = np.random.default_rng(0)
    rows, images = rng.standard_normal((1001, 6)).astype(np.float32), rng.integers(0, 256, (5, 9, 7, 3), np.uint8)
    results = []
    for xp in (np, cupy):
        t, levels = xp.zeros(5, np.float64), xp.zeros((6, 5), np.float32)
        x, target = (xp.zeros(images.shape, np.float32) for _ in range(2))
        step = xp.asarray(np.array([41], np.int32))
        stepping.draw_levels(xp.asarray(rows), step, 2**35, t, levels)
        stepping.example(xp.asarray(images), levels, step, 2**35, x, target)
        results.append([to_numpy(a) for a in (t, levels, x, target)])
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("order", ["late", "others first"])
@pytest.mark.parametrize("name", ["ddpm", "subvpsde"])
def test_streams_in_any_order_give_the_same_bits(name: str, order: str, device: HostedDevice) -> None:
    """The batch that is sent ahead arrives neither too early nor too late."""
    at_once, other = made(*METHODS[name], xp=cupy), made(*METHODS[name], xp=cupy)
    for _ in range(6):
        at_once.advance()
    with fake_cuda.lazily(order):
        for _ in range(6):
            other.advance()
        assert other.report() == at_once.report()
    assert same(at_once, other)


def test_a_batch_on_its_way_is_sent_anew_for_another_rate(device: HostedDevice) -> None:
    t = made(xp=cupy)
    t.step()
    o, captured = t.optimiser, t.captured
    assert captured is not None and captured.ready()
    captured.start(1, 0.125)
    wanted = stepping.adamw_row(0.125, *o.betas, o.weight_decay, o.count + 1, min(o.ema_decay, (1 + o.count) / (10 + o.count)))
    assert np.array_equal(to_numpy(captured._sent.row)[0], wanted)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the host reads of the device, as it happens."""
    found: list[str] = []
    for name in ("get", "__float__", "__int__", "__bool__"):
        method = getattr(fake_cupy.ndarray, name)

        def noted(self: Any, name: str = name, method: Any = method) -> Any:
            found.append(name)
            return method(self)

        monkeypatch.setattr(fake_cupy.ndarray, name, noted)
    return found


def test_the_host_reads_nothing_between_reports(device: HostedDevice, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And each batch is sent once, while the step before it is under way."""
    t = made(xp=cupy)
    losses, put, sent = [], Uploads.put, []

    def noted(self: Uploads, *batch: np.ndarray) -> None:
        sent.append(t.done)
        put(self, *batch)

    monkeypatch.setattr(Uploads, "put", noted)
    for _ in range(3):
        reads.clear()
        for _ in range(4):
            t.advance()
        assert not reads
        losses.append(t.report().loss)
        assert reads
    assert sent == [0, *range(1, 13)]
    reference = made(xp=cupy)
    every = [reference.step().loss for _ in range(12)]
    np.testing.assert_allclose(losses, np.reshape(every, (3, 4)).mean(axis=1), rtol=1e-14)


def test_a_session_reads_at_its_intervals_and_writes_the_same_lines(
    device: HostedDevice, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    at: set[int] = set()
    advance = Trainer.advance

    def advanced(self: Trainer) -> None:
        if reads and self.done:
            at.add(self.done)
        reads.clear()
        advance(self)
        assert not reads

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", advanced)
        run("gpu", "cuda", 11, log__every=3, log__checkpoints=5)
    assert at == {3, 5, 6, 9, 10}
    run("cpu", "cpu", 11, log__every=3, log__checkpoints=5)
    ours, theirs = (runs.metrics(Path("runs") / name) for name in ("gpu", "cpu"))
    assert [m["step"] for m in ours] == [m["step"] for m in theirs] == [3, 6, 9, 11]
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == list(b)
        np.testing.assert_allclose(
            [a[k] for k in ("loss", "grad_norm", "lr")], [b[k] for k in ("loss", "grad_norm", "lr")], rtol=1e-4
        )
    assert json.loads((Path("runs") / "gpu" / "env.json").read_text())["starts"][0]["device"] == "cuda:0"


def test_a_session_on_a_gpu_names_the_step_at_fault(
    device: HostedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found at the next report, with the arrays of that very step; the checkpoint before it stays the newest."""
    monkeypatch.chdir(tmp_path)
    advance = Trainer.advance

    def poisoned(self: Trainer) -> None:
        if self.done == 4:
            poison(self, "weight")
        advance(self)

    monkeypatch.setattr(Trainer, "advance", poisoned)
    with np.errstate(all="ignore"):
        assert train.main(words("r", "cuda", 12, log__every=10, log__checkpoints=3)) == 1
    err = capsys.readouterr().err
    assert "step 5: the loss is nan" in err and "weights/conv_in.weight" in err and err.count("\n") == 1
    bundle, meta = checkpoint.load(Path("runs/r/crash_step_00000005.h5"))
    assert meta["step"] == 5 and bundle["step/x_t"].shape == (3, 8, 8, 1)
    assert [s for s, _ in checkpoint.listing(Path("runs/r/ckpt"))] == [3]
    config = configs.load(None, [*SMALL, "train.steps=12"])
    assert np.array_equal(bundle["step/rows"], DIGITS.batch(4, 3, config.train.seed)[2])


def test_resume_on_a_gpu_has_the_bits_of_the_unbroken_run(
    device: HostedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in any step, with the batch of the next one on its way already."""
    monkeypatch.chdir(tmp_path)
    whole, advance = run("whole", "cuda", 4, log__every=2), Trainer.advance
    for k in range(1, 4):

        def stopped(self: Trainer, k: int = k) -> None:
            if self.done == k - 1:
                signal.raise_signal(signal.SIGTERM)
            advance(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "advance", stopped)
            assert train.main(words(f"r{k}", "cuda", 4, log__every=2)) == 128 + signal.SIGTERM
        assert checkpoint.load(last(f"r{k}"))[1]["step"] == k
        assert train.main(["--resume", f"runs/r{k}", "--device", "cuda", "--quiet"]) == 0
        assert last(f"r{k}").read_bytes() == whole


@pytest.mark.parametrize("xp", [np, cupy], ids=["cpu", "gpu"])
def test_a_trainer_that_goes_back_makes_the_same_steps(xp: Any, device: HostedDevice) -> None:
    t = made(xp=xp)
    for _ in range(2):
        t.step()
    held, meta = arrays(t), t.state()[1]
    first = [t.step() for _ in range(3)]
    end = arrays(t)
    t.restore("held", held, meta)
    assert [t.step() for _ in range(3)] == first and t.done == 5
    assert all(np.array_equal(a, end[n]) for n, a in arrays(t).items())
    t.restore("held", held, meta)
    t.advance(), t.advance()
    assert t.report().loss == pytest.approx((first[0].loss + first[1].loss) / 2, rel=1e-14)


def test_a_run_moves_to_the_gpu_and_back(device: HostedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps on the CPU, two on the GPU, two on the CPU: the run of six steps within rounding."""
    monkeypatch.chdir(tmp_path)
    even = {"log__every": 1, "train__warmup": 0, "train__decay": "constant", "train__lr": 1e-4}  # whatever the number of steps
    run("whole", "cpu", 6, **even)
    run("moved", "cpu", 2, **even)
    for steps, where in ((4, "cuda"), (6, "cpu")):
        assert train.main(["--resume", "runs/moved", "--device", where, "--steps", str(steps), "--quiet"]) == 0
    ours, theirs = (checkpoint.load(last(name)) for name in ("moved", "whole"))
    assert ours[1]["step"] == theirs[1]["step"] == 6 and ours[1]["optimiser"] == theirs[1]["optimiser"]
    assert ours[0].keys() == theirs[0].keys()
    for name, wanted in theirs[0].items():
        np.testing.assert_allclose(ours[0][name], wanted, rtol=0, atol=2e-5)
    for a, b in zip(*(runs.metrics(Path("runs") / name) for name in ("moved", "whole")), strict=True):
        assert a["step"] == b["step"] and a["lr"] == b["lr"]
        np.testing.assert_allclose([a["loss"], a["grad_norm"]], [b["loss"], b["grad_norm"]], rtol=1e-4)


def test_steps_that_cannot_be_captured_after_all_are_made_call_by_call(
    device: HostedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said once; the same checkpoint."""
    monkeypatch.chdir(tmp_path)
    whole = run("whole", "cuda", 5, log__every=1)
    assert not capsys.readouterr().err

    def refused(self: Any, body: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(Arena, "capture", refused)
    assert run("plain", "cuda", 5, log__every=1) == whole
    err = capsys.readouterr().err
    assert err.count("train: warning: steps are made call by call, not in one piece (RuntimeError: no such thing)") == 1


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_captured_steps_keep_the_rounded_weights_up_to_date(precision: str, device: HostedDevice) -> None:
    ours, theirs = made(f"train.precision={precision}", xp=cupy), made()
    near([ours.step() for _ in range(3)], [theirs.step() for _ in range(3)], 0.05)
    assert ours.captured is not None and ours.captured.refused is None and ours.captured.kept
    store = ours.net.params
    assert (store.low is not None) == (precision == "bf16")
    if store.low is not None:
        assert np.array_equal(to_numpy(store.low), bf16.pack(to_numpy(store.data)))


def test_a_trainer_is_gone_with_its_last_name(device: HostedDevice) -> None:
    """No cycle holds a GPU's memory."""
    t = made(xp=cupy)
    t.step(), t.step()
    assert t.captured is not None
    gone = weakref.ref(t.captured)
    del t
    assert gone() is None
