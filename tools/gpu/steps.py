"""Whole training steps and whole trajectories of the U-Net of DDPM for 32×32 images, beside PyTorch eager and compiled.

The network has 35.7 million parameters (128, 256, 256, 256 channels, attention at 16×16). A training step is everything that a
trainer does on the device: draw t and the noise, forward, loss, backward, clipping, AdamW, running average. A trajectory is 50
steps of DDIM. Events around some steps, contestants in turn, medians; nobody reads a number back within them.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from alphabar.core import samplers, schedules, tables
from alphabar.core.captured import Captured
from alphabar.core.data import Dataset
from alphabar.tools import config as configs
from alphabar.tools import families, networks
from alphabar.tools.config import Config
from alphabar.tools.trainer import Trainer

from .correctness import free
from .job import Job, Report, in_checkout, torch_of
from .speed import same_stream

SETTINGS = ("model.channels=128,256,256,256", "model.blocks=2", "model.attention=16", "model.groups=32", "train.warmup=1")
SIDE, COLOURS, KEPT = 32, 3, 512  # the images that steps take their batches from
STEPS = 50  # of DDIM
ROUNDS = 5
ABOUT = 0.25  # seconds of one contestant's turn
COMPILING = {"train": 150.0, "sample": 60.0}  # seconds that a compilation may take


class Case(NamedTuple):
    """One kind of step, in one precision, of one batch; whether the compiled PyTorch is asked too."""

    kind: str
    precision: str
    batch: int
    compiled: bool = True


TRAIN = (  # what is promised comes first, then what shows how cost grows
    Case("train", "bf16", 128),
    *(Case("train", "bf16", n, False) for n in (1, 16, 64, 256)),
    Case("train", "tf32", 128, False),
    Case("train", "fp32", 128, False),
    *(Case("train", "bf16", n) for n in (16, 256)),
)
SAMPLE = (
    Case("sample", "bf16", 1),
    Case("sample", "bf16", 16),
    *(Case("sample", "bf16", n, False) for n in (64, 256)),
    *(Case("sample", p, n, False) for p in ("tf32", "fp32") for n in (1, 16)),
)


def train(job: Job) -> None:
    """Training steps."""
    _run(job, TRAIN)


def sample(job: Job) -> None:
    """Trajectories."""
    _run(job, SAMPLE)


def _run(job: Job, cases: tuple[Case, ...]) -> None:
    torch = torch_of()
    job.report["torch"] = None if torch is None else torch.__version__
    rows = job.report.setdefault("rows", [])
    with same_stream(job.cupy, torch):
        for case in cases:
            if job.over(10.0):
                job.report.setdefault("not_reached", []).append(" ".join(map(str, case)))
                continue
            rows.append(_timed(job, torch, case))
            free(job.cupy)
            job.save()
    job.report["failed"] = [f"{r['kind']} {r['precision']} {r['batch']}: {r['error']}" for r in rows if "error" in r]
    job.report["ok"] = not job.report["failed"]


def _timed(job: Job, torch: ModuleType | None, case: Case) -> Report:
    """Seconds of every contestant; in the place of one that broke its error. The ratio is taken in the same turns."""
    row: Report = {"kind": case.kind, "precision": case.precision, "batch": case.batch}
    contestants: dict[str, Callable[[], Any]] = {}
    errors = row.setdefault("torch_errors", {})
    try:
        contestants["alphabar"] = ours(job.cupy, case)
        for name, make in () if torch is None else theirs(torch, case, job):
            try:
                start = time.monotonic()
                call = make()
                call()  # compiles
                job.cupy.cuda.Device().synchronize()
                row.setdefault("prepared_s", {})[name] = round(time.monotonic() - start, 1)
                contestants[name] = call
            except Exception as e:
                errors[name] = f"{type(e).__name__}: {e}"[:500]
        return row | {"seconds": _seconds(job.cupy, contestants)}
    except Exception as e:
        return row | {"error": f"{type(e).__name__}: {e}"[:1000]}


def _seconds(cupy: ModuleType, contestants: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median of a step for each."""

    def elapsed(call: Callable[[], Any], times: int) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return cupy.cuda.get_elapsed_time(begin, end) * 1e-3 / times

    turns = {}
    for name, call in contestants.items():
        elapsed(call, 3)
        turns[name] = max(1, round(ABOUT / max(elapsed(call, 2), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            found[name].append(elapsed(call, turns[name]))
    return {name: statistics.median(v) for name, v in found.items()}


# ------------------------------------------------------------------------------------------------------------------- contestants


def images(n: int = KEPT) -> Dataset:
    """Random pixels: their values do not change what a step costs."""
    return Dataset(np.random.default_rng(0).integers(0, 256, (n, SIDE, SIDE, COLOURS), np.uint8), name="noise")


def settings(case: Case) -> Config:
    """The configuration of a case's run."""
    given = (*SETTINGS, f"train.batch={case.batch}", f"train.precision={case.precision}")
    config = configs.load(None, list(given))
    return families.of(config).resolved(config, images(1))


def ours(cupy: ModuleType, case: Case) -> Callable[[], Any]:
    """The trainer's own step, or a trajectory of the sampler with its network."""
    trainer = Trainer(settings(case), images(), cupy)
    if case.kind == "train":
        return trainer.advance
    net, table = trainer.net, tables.ddim(trainer.process.levels, STEPS)
    x_T = samplers.prior((case.batch, SIDE, SIDE, COLOURS), xp=cupy)
    predict, kept = net.predict, Captured()
    return lambda: samplers.sample(predict, table, x_T, clip=(-1, 1), captured=kept)


def theirs(torch: ModuleType, case: Case, job: Job) -> Iterator[tuple[str, Callable[[], Callable[[], Any]]]]:
    """(name, maker of the step) of PyTorch's contestants, as many as there is time for."""
    steps = in_checkout("bench.gpu_steps")
    config = settings(case)
    s = schedules.linear(config.diffusion.T)
    net = networks.made("unet", networks.unet_options(config, images(1)), np, "images")
    times = tables.ddim(s, STEPS).times.astype(int)

    def maker(compiled: bool) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            given = images(max(case.batch, 1)).images[: case.batch]
            made = steps.Steps(net, given, s.signal, s.noise, case.precision, compiled=compiled, training=case.kind == "train")
            return made.train if case.kind == "train" else lambda: made.sample(times)

        return make

    yield "eager", maker(False)
    if case.compiled:
        if job.left > COMPILING[case.kind]:
            yield "compiled", maker(True)
        else:
            job.report.setdefault("not_compiled", []).append(" ".join(map(str, case[:3])))
