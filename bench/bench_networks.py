"""Whole training and sampling steps of U-Nets beside PyTorch: diffusers' UNet2DModel with the same weights.

    python -m pytest bench/bench_networks.py
    python -m pytest bench --compiled --long --write cpu      # all benchmarks; PyTorch compiles the networks for a long time

"peer" is the U-Net of 64, 128, 128, 128 channels, two blocks, attention at 16×16, on 32×32×3; "digits" that of the default run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the benchmarks compare with PyTorch")
pytest.importorskip("diffusers", reason="PyTorch's side is the UNet2DModel of diffusers")

from bench import network_errors, network_memory, network_training, peers, report, timing  # noqa: E402
from bench.limits import Limits  # noqa: E402
from bench.steps import Ours, Theirs  # noqa: E402

CLOCK = timing.Clock()
FORMATS = {"contiguous": "contiguous_format", "channels last": "channels_last"}
SIZES = (("peer", 32), ("peer", 1), ("peer, one head", 32), ("peer, one head", 1), ("digits", 128), ("digits", 1))
COMPILED = ("peer",)  # one step is compiled for minutes
STEPS = {"train": 3, "sample": 1}  # products: forward, and those of the gradients of inputs and weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the networks are saved."""
    return tmp_path_factory.mktemp("networks")


def forward_flops(at: Path) -> int:
    """Multiplications and additions of the forward pass on one image, as PyTorch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    network = Theirs(at, peers.example(at, 1), "contiguous_format")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.predict()
    return counter.get_total_flops()


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("name", "batch"), SIZES)
def test_step(
    name: str, batch: int, step: str, folder: Path, benchmark: Any, request: pytest.FixtureRequest, limits: Limits
) -> None:
    at = peers.saved(name, folder)
    example = peers.example(at, batch)
    contestants: dict[str, Callable[[], object]] = {}
    for form, attribute in FORMATS.items():
        contestants[form] = getattr(Theirs(at, example, attribute), step)
        if name in COMPILED and request.config.getoption("--compiled"):
            torch.compiler.reset()
            contestants[f"compiled, {form}"] = getattr(Theirs(at, example, attribute, compiled=True), step)
    times = timing.against(benchmark, CLOCK, contestants, getattr(Ours(at, example), step), request.config.getoption("--rounds"))
    flops = forward_flops(at) * batch * STEPS[step]
    row = {
        "network": name,
        "batch": batch,
        "step": step,
        "seconds": {k: t.median for k, t in times.items()},
        "fastest": {k: t.fastest for k, t in times.items()},
        "flops": flops,
        "share": flops / limits.flops / times["alphabar"].median,
    }
    benchmark.group = f"{name}, {step}"
    benchmark.extra_info.update(row)
    request.config.stash[report.FOUND].networks.append(row)


@pytest.mark.parametrize(("name", "batch"), [("peer", 4), ("peer, one head", 4), ("digits", 32)])
def test_errors(name: str, batch: int, folder: Path, request: pytest.FixtureRequest) -> None:
    found = network_errors.errors(peers.saved(name, folder), batch)
    request.config.stash[report.FOUND].errors.append({"network": name, "batch": batch, "errors": found})
    assert max(found["alphabar"]["output"], found["alphabar"]["gradient"]) < 1e-4


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("name", "batch"), [("peer", 32), ("digits", 128)])
def test_memory(name: str, batch: int, step: str, folder: Path, request: pytest.FixtureRequest) -> None:
    at = peers.saved(name, folder)
    engines = {"alphabar": "alphabar", **FORMATS}
    found = {k: network_memory.measured(at, batch, step, engine) for k, engine in engines.items()}
    request.config.stash[report.FOUND].memory.append({"network": name, "batch": batch, "step": step, "found": found})


@pytest.mark.parametrize(("name", "batch"), [("peer", 4), ("digits", 128)])
def test_the_same_training(name: str, batch: int, folder: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("200 training steps in both libraries: --long")
    found = network_training.compare(peers.saved(name, folder), batch)
    request.config.stash[report.FOUND].training.append({"network": name, **found})
    assert abs(found["difference"]["alphabar"]) <= found["standard_error"] / 10
