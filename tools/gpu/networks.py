"""Whole networks, training, samplers, the elementwise functions and checkpoints on the device, beside the same on the CPU.

A float32 result of the device is held to the same in float64 on the CPU, with four times the error allowed that the CPU makes in
float32. The CPU runs the definitions: nothing to compile, and no Numba needed.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from alphabar import kernels
from alphabar.core import data, guidance, samplers, schedules, tables
from alphabar.core.captured import Captured
from alphabar.kernels.arrays import to_numpy
from alphabar.nets import MLP, Transformer, UNet, backward, checkpoint
from alphabar.tools import config as configs
from alphabar.tools import families, sampling, trainer
from alphabar.tools.config import Sample

from . import sums
from .job import Job, Report

FACTOR, FLOOR = 4.0, 2e-6  # of the CPU's own error, and of the largest norm where that is nearly exact
STEPS = 5
LOSSES = 2e-5  # relative difference of the losses of STEPS steps: rounding grows from step to step
SETTINGS = (
    *("model.channels=16,32", "model.blocks=1", "model.attention=4", "model.groups=4", "train.batch=32", "train.warmup=2"),
    *("log.every=1", "log.samples=0", "log.checkpoints=100", "sample.steps=4", "sample.columns=2"),
)
ROUNDED = {"tf32": 4e-3, "bf16": 3e-2}  # relative errors: some rounding errors of an operand, 2^-11 and 2^-9
CAPTURED = ("ddim", "ddpm", "adams_bashforth")
SAMPLERS = ("ddpm", "ddim", "dpm_solver_pp", "sde_dpm_solver_pp", "unipc", "heun", "pndm", "euler_ancestral")
Check = tuple[str, Callable[[ModuleType], tuple[float, float]]]  # (name, device's library -> (error, the most allowed))


def run(job: Job) -> None:
    """Every check; one that breaks does not end the others."""
    rows: list[Report] = []
    for name, check in checks():
        if job.over():
            break
        row: Report = {"check": name}
        start = time.monotonic()
        try:
            error, limit = check(job.cupy)
            row |= {"error": error, "limit": limit, "ok": error <= limit}
        except Exception as e:
            row |= {"ok": False, "raised": f"{type(e).__name__}: {e}"[:500]}
        rows.append(row | {"seconds": round(time.monotonic() - start, 2)})
        job.report |= {"ok": all(r["ok"] for r in rows), "rows": rows, "failed": [r for r in rows if not r["ok"]]}
        job.save()


def checks() -> Iterator[Check]:
    """Their names and what makes them."""
    for name, make, shapes in networks():
        yield f"{name}, forward and backward", lambda xp, make=make, shapes=shapes: _passes(xp, make, shapes)  # type: ignore[misc]
    _, make, shape = networks()[0]
    for compute, allowed in ROUNDED.items():
        yield (
            f"U-Net in {compute}, forward and backward",
            lambda xp, compute=compute, allowed=allowed: _passes(xp, make, shape, compute, allowed),  # type: ignore[misc]
        )
    for name in CAPTURED:
        yield f"captured rows of {name} have the bits of plain ones", lambda xp, name=name: _captured(xp, name)  # type: ignore[misc]
    yield "elementwise functions", _elementwise
    for name in SAMPLERS:
        yield f"sampler {name}", lambda xp, name=name: _sampler(xp, name)  # type: ignore[misc]
    yield f"{STEPS} training steps and samples of the result", _training
    yield "checkpoint there and back", _checkpoint


def on(xp: ModuleType) -> AbstractContextManager[Any]:
    """The backend of one side: the definitions on the CPU, the kernels on the device."""
    return kernels.use("reference") if xp is np else nullcontext()


def relative(a: Any, b: np.ndarray) -> float:
    """The distance in the L2 norm over that of ``b``. Infinite for what is not a number."""
    size = max(float(np.linalg.norm(b)), 1e-30)
    apart = float(np.linalg.norm(np.ravel(to_numpy(a)).astype(np.float64) - np.ravel(b))) / size
    return apart if np.isfinite(apart) else float("inf")


# --------------------------------------------------------------------------------------------------------------------- networks


def networks() -> list[tuple[str, Callable[..., Any], tuple[int, ...]]]:
    """(name, maker, shape of the input)."""
    common: dict[str, Any] = {"image_size": 16, "in_channels": 3, "channels": (16, 32), "blocks": 1, "groups": 4, "classes": 3}
    return [
        ("U-Net", lambda **o: UNet(**common, attention=(8,), **o), (4, 16, 16, 3)),
        (
            "U-Net with modulated norms",
            lambda **o: UNet(**common, attention=(8,), head_dim=8, scale_shift=True, **o),
            (4, 16, 16, 3),
        ),
        ("Transformer", lambda **o: Transformer(16, features_in=8, width=32, layers=2, heads=4, **o), (4, 16, 8)),
        ("MLP", lambda **o: MLP(8, (32, 32), times=True, **o), (16, 8)),
    ]


def _passes(
    xp: ModuleType, make: Callable[..., Any], shape: tuple[int, ...], compute: str = "fp32", allowed: float | None = None
) -> tuple[float, float]:
    """Output and gradients of one network in float64 on the CPU, in float32 there and by ``compute`` on the device."""
    rng = np.random.default_rng(0)
    x, dy, t = rng.standard_normal(shape), rng.standard_normal(shape), rng.integers(1, 100, shape[0])
    wiggle: list[np.ndarray] = []

    def passed(xp: ModuleType, dtype: str) -> list[np.ndarray]:
        net = make(xp=xp, dtype=dtype)
        if xp is not np:
            net.compute = compute
        if not wiggle:  # layers that start from zero would hide the ones before them
            wiggle.append(0.05 * rng.standard_normal(net.params.data.shape))
        net.params.data += xp.asarray(wiggle[0].astype(dtype))
        net.params.refresh()
        labels = (xp.asarray(np.arange(shape[0]) % 3),) if net.config.get("classes") else ()
        net.params.zero_grad()
        with on(xp):
            y = net(xp.asarray(x.astype(dtype)), xp.asarray(t), *labels)
            backward((y, xp.asarray(dy.astype(dtype))))
        return [to_numpy(y.data), to_numpy(net.params.grad)]

    exact, plain, ours = passed(np, "float64"), passed(np, "float32"), passed(xp, "float32")
    limits = [FACTOR * relative(p, e) + FLOOR if allowed is None else allowed for p, e in zip(plain, exact, strict=True)]
    shares = [relative(o, e) / limit for o, e, limit in zip(ours, exact, limits, strict=True)]
    return max(shares), 1.0


def _training(xp: ModuleType) -> tuple[float, float]:
    """The losses of a few steps of the real trainer on both sides, and samples drawn with the averaged weights."""
    digits = data.load("digits")

    def trained(xp: ModuleType) -> tuple[np.ndarray, np.ndarray]:
        config = configs.load(None, list(SETTINGS))
        made = trainer.Trainer(families.of(config).resolved(config, digits), digits, xp)
        losses = [made.step().loss for _ in range(STEPS)]
        chosen = sampling.sampler(made.process, Sample("ddim", 4))
        with made.averaged() as net:
            images = list(sampling.draw(made.process, net, chosen, np.arange(4), 4, seed=1, batch=4))
        return np.array(losses), np.concatenate(images).astype(np.float64)

    ours, drawn = trained(xp)
    with on(np):
        theirs, wanted = trained(np)
    apart = float(np.abs(drawn - wanted).mean())  # of 255 levels: a few pixels may round to the next one
    return max(float(np.abs(ours / theirs - 1).max()) / LOSSES, apart / 0.5), 1.0


# ------------------------------------------------------------------------------------------------------- samplers, elementwise


def _sampler(xp: ModuleType, name: str) -> tuple[float, float]:
    """One sampler's table on an easy model, bounded and not linear."""
    s = schedules.linear(1000)
    table = getattr(tables, name)(s, steps=12)
    start = np.random.default_rng(1).standard_normal((3, 8, 8, 2))

    def model(x: Any, t: Any) -> Any:
        return x / (1 + x * x)

    def sampled(xp: ModuleType, dtype: str) -> np.ndarray:
        with on(xp):
            return to_numpy(samplers.sample(model, table, xp.asarray(start.astype(dtype)), seed=3))

    exact, plain, ours = sampled(np, "float64"), sampled(np, "float32"), sampled(xp, "float32")
    return relative(ours, exact), FACTOR * relative(plain, exact) + FLOOR


def _captured(xp: ModuleType, name: str) -> tuple[float, float]:
    """Elements of guided samples that differ between rows as graphs, for two batches, and rows as calls."""
    net = UNet(8, channels=(8, 16), blocks=1, groups=4, classes=2, xp=xp)
    net.compute = "bf16"
    table = getattr(tables, name)(schedules.linear(1000), steps=5)
    labels = xp.asarray(np.array([0, 1]))
    model = guidance.classifier_free(net.predict, labels, 1.5, net.null)
    kept, apart = Captured(), 0
    for seed in (1, 2):
        x_T = samplers.prior((2, 8, 8, 1), seed, xp=xp)
        drawn = [samplers.sample(model, table, x_T, seed=seed, clip=(-1, 1), captured=how) for how in (False, kept)]
        plain, rows = map(to_numpy, drawn)
        apart += int((plain.view(np.uint32) != rows.view(np.uint32)).sum())
    if kept.refused is not None:
        raise RuntimeError(f"the capture was refused: {kept.refused}")
    return float(apart), 0.0


def _elementwise(xp: ModuleType) -> tuple[float, float]:
    """Sums and copies between the kernels, the worst of them."""
    worst = 0.0
    for shape in sums.SHAPES:
        made, wanted = sums.there(xp, shape), sums.wanted(shape)
        worst = max([worst, *(relative(a, wanted[name]) for name, a in made.items())])
    return worst, FLOOR


# ---------------------------------------------------------------------------------------------------------------- checkpoints


def _checkpoint(xp: ModuleType) -> tuple[float, float]:
    """A training begun on the device, saved, loaded on the CPU, saved again, loaded on the device: the same bits, and the
    next step the same."""
    digits = data.load("digits")
    config = configs.load(None, list(SETTINGS))
    config = families.of(config).resolved(config, digits)
    made = trainer.Trainer(config, digits, xp)
    made.step()
    first, meta = made.state()
    wanted = {k: to_numpy(v).copy() for k, v in first.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.h5"
        checkpoint.save(path, wanted, meta)
        for library in (np, xp):
            arrays, meta = checkpoint.load(path)
            again = trainer.Trainer(config, digits, library)
            again.restore(path, arrays, meta)
            arrays, meta = again.state()
            checkpoint.save(path, {k: to_numpy(v).copy() for k, v in arrays.items()}, meta)
        back, _ = checkpoint.load(path)
    different = [k for k in wanted if not np.array_equal(wanted[k], back[k])]
    made.step(), again.step()
    apart = relative(again.net.params.data, to_numpy(made.net.params.data).astype(np.float64))
    return len(different) + apart, 1e-6
