"""What the benchmarks compute from their measurements: fits, limits, medians, tables, and the verdict on two trainings."""

import importlib
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphabar.kernels import TABLE
from alphabar.kernels.reference import ROW

fits = importlib.import_module("bench.fits")
tables = importlib.import_module("bench.tables")
timing = importlib.import_module("bench.timing")

FACTORS = st.floats(0.01, 100)


# ---------------------------------------------------------------------------------------------------------------------- fits


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_a_line_is_found_again(intercept: float, slope: float) -> None:
    x = np.array([1.0, 2, 5, 9])
    found = fits.line(x, intercept + slope * x)
    np.testing.assert_allclose([found.intercept, found.slope], [intercept, slope], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found(x), intercept + slope * x, rtol=1e-6, atol=1e-8)


@given(FACTORS, st.floats(-3, 3))
def test_a_power_law_is_found_again(factor: float, exponent: float) -> None:
    x = np.array([8.0, 16, 32, 64])
    found = fits.power(x, factor * x**exponent)
    np.testing.assert_allclose([found.factor, found.exponent], [factor, exponent], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(found(x), factor * x**exponent, rtol=1e-8)


def test_r2_is_the_share_of_the_variance_that_the_line_explains() -> None:
    x, y = np.arange(20.0), np.random.default_rng(0).standard_normal(20) + 0.3 * np.arange(20)
    assert fits.line(x, y).r2 == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert fits.line([1, 2], [3, 5]).r2 == pytest.approx(1) and fits.line([1, 2, 3], [2, 2, 2]).r2 == 1


@given(st.floats(0, 1), FACTORS)
def test_the_serial_share_of_amdahls_law_is_found_again(share: float, seconds: float) -> None:
    n = np.array([1, 2, 4, 8])
    assert fits.serial_share(n, seconds * (share + (1 - share) / n)) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("f", "x", "y"),
    [
        (fits.line, [1, 1], [2, 3]),
        (fits.line, [1], [2]),
        (fits.line, [1, 2, 3], [1, 2]),
        (fits.power, [1, 2], [0, 1]),
        (fits.power, [-1, 2], [1, 1]),
        (fits.serial_share, [2, 4], [1, 1]),
        (fits.serial_share, [1], [1]),
    ],
)
def test_a_fit_refuses_what_it_cannot_fit(f: Any, x: list[float], y: list[float]) -> None:
    with pytest.raises(ValueError):
        f(x, y)


# -------------------------------------------------------------------------------------------------------------------- limits


@pytest.fixture(scope="module")
def limits() -> Any:
    pytest.importorskip("numba")
    return importlib.import_module("bench.limits")


@pytest.fixture
def machine(limits: Any) -> Any:
    falling = tuple(100e9 / (1 + k) for k in range(len(limits.SIZES)))
    return limits.Limits(2, falling, falling, 400e9)


def test_the_bandwidth_is_that_of_the_working_set(limits: Any, machine: Any) -> None:
    for size, triad in zip(limits.SIZES, machine.triad, strict=True):
        assert machine.bandwidth(size) == pytest.approx(triad)
    between = machine.bandwidth(limits.SIZES[0] * 2**0.5)
    assert between == pytest.approx((machine.triad[0] + machine.triad[1]) / 2)
    assert machine.bandwidth(1) == machine.triad[0] and machine.bandwidth(1e12) == machine.triad[-1]


def test_the_slower_limit_counts(limits: Any, machine: Any) -> None:
    size = limits.SIZES[0]
    balanced = machine.flops * size / machine.triad[0]  # operations that take as long as moving the bytes
    assert machine.least(size, balanced / 2) == pytest.approx(size / machine.triad[0])
    assert machine.least(size, balanced * 3) == pytest.approx(3 * size / machine.triad[0])
    assert (machine.bound(size, balanced / 2), machine.bound(size, balanced * 3)) == ("memory", "arithmetic")


def test_the_loops_of_the_limits_compute_what_they_say(limits: Any) -> None:
    a, b, c = np.zeros(1003, np.float32), *np.random.default_rng(0).standard_normal((2, 1003)).astype(np.float32)
    limits._copies(a, b, 2, 3)
    assert np.array_equal(a, b)
    limits._triads(a, b, c, np.float32(0.5), 2, 3)
    np.testing.assert_allclose(a, b + 0.5 * c, rtol=1e-6)
    out = np.zeros(2, np.float32)
    limits._arithmetic(out, np.float32(0.5), 3)
    start = np.array([k + j for k in range(limits.SUMS) for j in range(limits.LANES)], float)
    np.testing.assert_allclose(out, np.sum(start / 8 + 0.875), rtol=1e-6)  # x = (x + 1)/2 three times


def test_the_numbers_of_threads_double_up_to_all(limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, wanted in ((1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))):
        monkeypatch.setattr(limits.threads, "threads", lambda most=most: most)
        assert limits.thread_counts() == wanted


# -------------------------------------------------------------------------------------------------------------------- timing


def test_preempted_rounds_are_dropped_while_three_clean_ones_are_left() -> None:
    noisy = timing.summary([(1.0, True), (2.0, True), (3.0, True), (50.0, False)])
    assert (noisy.median, noisy.fastest, noisy.clean, noisy.rounds) == (2.0, 1.0, 3, 4)
    assert timing.summary([(1.0, True), (2.0, False), (9.0, False)]).median == 2.0


def test_contestants_take_turns() -> None:
    order: list[str] = []
    found = timing.interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    turns = [x for x, before in zip(order, [None, *order], strict=False) if x != before]
    assert turns == ["a", "b"] * 4 and set(found) == {"a", "b"}  # once to count the calls, then three rounds


# -------------------------------------------------------------------------------------------------------------------- tables


def kernel_row(name: str, ours: float, torch: float, in_place: float | None = None) -> dict[str, Any]:
    given = {"kernel": name, "case": "8x8", "alphabar_s": ours, "torch_s": torch, "compiled_s": None}
    given |= {"in_place_s": in_place, "own_in_place_s": None if in_place is None else ours / 2}
    return given | {"bytes": 3e6, "flops": 6e6, "share": 0.5, "bound": "memory", "error": None, "torch_error": None}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_kernels_shows_ratios_and_rates() -> None:
    head, rule, row = tables.kernels([kernel_row("step", 1e-3, 2.5e-3, 2e-3)])
    shown = dict(zip(cells(head), cells(row), strict=True))
    assert len(cells(rule)) == len(cells(head))
    assert (shown["ratio"], shown["ratio in place"], shown["to compiled"]) == ("2.50", "4.00", "–")
    assert (shown["GB/s"], shown["GFLOP/s"], shown["of the limit"]) == ("3.0", "6.0", "50% memory")
    assert (shown["alphabar"], shown["torch"], shown["error"]) == ("1.00 ms", "2.50 ms", "–")


def test_the_summary_takes_geometric_means() -> None:
    rows = [kernel_row("step", 1.0, 2.0, 1.0), kernel_row("step", 1.0, 8.0), kernel_row("silu", 1.0, 1.5)]
    step, silu = (cells(line) for line in tables.summary(rows)[2:])
    assert step == ["step", "2", "4.00", "2.00", "8.00", "–", "2.00", "50%"]
    assert silu[0] == "silu" and silu[6] == "–"
    compiled = cells(tables.summary([row | {"compiled_s": 3.0} for row in rows])[2])
    assert compiled[5:7] == ["3.00", "2.00"]


def test_a_network_is_compared_with_the_fastest_of_pytorch() -> None:
    seconds = {"alphabar": 1.0, "contiguous": 3.0, "channels last": 2.0, "compiled, contiguous": 1.5}
    fastest = seconds | {"alphabar": 0.5}
    row = {"network": "peer", "step": "train", "batch": 32, "seconds": seconds, "fastest": fastest, "flops": 2e9, "share": 0.25}
    head, _, line = tables.networks([row])
    shown = dict(zip(cells(head), cells(line), strict=True))
    assert (
        (shown["ratio"], shown["of the fastest rounds"]) == ("1.50", "3.00")
        and shown["torch compiled, contiguous"] == "1.50 s"
        and shown["GFLOP/s"] == "2"
    )
    assert "torch compiled, channels last" not in shown
    eager = row | {"seconds": {k: seconds[k] for k in ("alphabar", "contiguous", "channels last")}}
    assert cells(tables.networks([row, eager])[3])[6:8] == ["–", "2.00"]


def test_pythons_share_is_what_compiled_calls_leave() -> None:
    """The time of the plan's calls, made longer by a known wait, is not Python's."""
    pytest.importorskip("numba")
    python_share = importlib.import_module("bench.python_share")
    small = ("model.channels=4,8", "model.blocks=1", "model.attention=4", "model.groups=2", "train.steps=9")
    wait, run = 2e-3, python_share.replay._loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_share, "AHEAD", 8)
        patch.setattr(python_share.replay, "_loop", lambda: lambda *arguments: (time.sleep(wait), run(*arguments))[1])
        row = python_share.measured(2, 3, small)
    assert row["seconds"] - row["python"] >= wait and 0 < row["python"] < wait
    assert row["share"] == pytest.approx(row["python"] / row["seconds"])
    assert cells(tables.python([row | {"seconds": 3e-3, "python": 6e-5, "share": 0.02}])[2]) == [
        *("digits", "2", "3.00 ms", "60 µs", "2.0%")
    ]


def test_every_kernel_has_a_colour_in_the_roofline() -> None:
    pictures = importlib.import_module("bench.pictures")
    for name in TABLE:
        assert pictures.family({"kernel": name, "case": "8x8x8x8 kernel=3 cout=8"}) in pictures.FAMILIES
    assert pictures.family({"kernel": "conv2d", "case": "8x8x8x8 kernel=1 cout=8"}) == "other convolutions"


def test_the_verdict_on_two_trainings() -> None:
    pytest.importorskip("torch")
    verdict = importlib.import_module("bench.network_training").verdict
    losses = np.random.default_rng(0).uniform(1, 2, 80)
    found = verdict({"alphabar": list(losses + 0.25), "torch one": list(losses), "torch other": list(losses)})
    last = losses[-50:]
    assert found["final"]["torch one"] == pytest.approx(last.mean())
    assert found["difference"] == pytest.approx({"alphabar": 0.25, "torch one": 0, "torch other": 0})
    assert found["largest"]["alphabar"] == pytest.approx(0.25)
    assert found["standard_error"] == pytest.approx(last.std(ddof=1) / 50**0.5)


def test_a_report_holds_what_was_measured(machine: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = importlib.import_module("bench.report")
    found = report.Found(limits=[machine])
    assert not found
    found.kernels = [kernel_row("step", 1e-3, 2e-3), kernel_row("silu", 1e-3, 1.5e-3)]
    losses = {"alphabar": [1.0, 0.5], "torch contiguous": [1.0, 0.5], "torch channels last": [1.0, 0.5]}
    verdict = {"final": dict.fromkeys(losses, 0.75), "difference": dict.fromkeys(losses, 0.0), "standard_error": 0.1}
    row = {"network": "digits", "batch": 2, "steps": 2, "curves": losses, "largest": dict.fromkeys(losses, 0.0)}
    found.training = [{**row, **verdict}]
    assert found
    paths = report.write(tmp_path, "made", found, "pytest bench")
    assert {p.name for p in paths} == {"made.json", "made.md", "made_roofline.png", "made_training.png"} == set(listed(tmp_path))
    text = (tmp_path / "made.md").read_text(encoding="utf-8")
    assert re.findall("^## (.*)", text, re.M) == ["The same training", "Kernels", "Every case", "Limits of the machine"]
    assert "`pytest bench`" in text and "(made_roofline.png)" in text and "| step | 8x8 | 1.00 ms | 2.00 ms |" in text
    assert json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))["kernels"] == found.kernels


def listed(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()]


# ------------------------------------------------------------------------------------------------------------------- PyTorch


def test_both_sides_of_a_network_take_the_same_steps(tmp_path: Path) -> None:
    """Equal losses after steps of either optimiser say that forward, gradient, clipping and update are the same."""
    for library in ("torch", "diffusers", "safetensors"):
        pytest.importorskip(library)
    peers, steps = (importlib.import_module(f"bench.{m}") for m in ("peers", "steps"))
    folder = peers.saved("digits", tmp_path)
    example = peers.example(folder, 5)
    for form in ("contiguous_format", "channels_last"):
        ours, theirs = steps.Ours(folder, example, 1e-3), steps.Theirs(folder, example, form, 1e-3)
        losses = [(ours.train(), theirs.train()) for _ in range(4)]
        assert losses[-1][0] < losses[0][0] - 0.05
        np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-4)
        row = dict(zip(ROW, ours.rows[steps.ROW], strict=True))
        np.testing.assert_allclose([theirs.a, theirs.b, theirs.c], [row[k] for k in "aec"], rtol=1e-9)
        assert ours.sample().shape == example.x_t.shape == tuple(theirs.sample().movedim(1, -1).shape)


@pytest.mark.parametrize("name", ["q_sample", "step", "silu", "silu_backward", "add_gated", "rotary", "adamw_ema"])
def test_pytorch_without_allocations_computes_the_same(name: str) -> None:
    torch = pytest.importorskip("torch")
    ops, in_place = (importlib.import_module(f"bench.{m}") for m in ("torch_ops", "torch_in_place"))

    def tensors(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(tensors, value))
        return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    def arrays(result: Any, args: tuple, kwargs: dict[str, Any]) -> list[np.ndarray]:
        first = result[0] if isinstance(result, tuple) else result
        return [v.numpy() for v in (*args[:5], kwargs.get("store"), first) if isinstance(v, torch.Tensor)]

    for case in TABLE[name].tests:
        if case.get("noise") == "made" or case.get("guidance") or (name == "q_sample" and not case.get("given")):
            continue  # other noise each time; the timed cases have no guidance
        args, kwargs = TABLE[name].make(np.random.default_rng(0), case, np.float32)
        one, other = ((tensors(args), {k: tensors(v) for k, v in kwargs.items()}) for _ in range(2))
        wanted = arrays(ops.OPS[name](*one[0], **one[1]), *one)
        found = arrays(in_place.timed(name, *other)(), *other)
        for a, b in zip(found[: len(wanted)], wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["conv2d", "conv2d_backward_input", "conv2d_backward_weight", "group_norm_silu"])
def test_either_memory_format_computes_the_same(name: str) -> None:
    torch = pytest.importorskip("torch")
    ops = importlib.import_module("bench.torch_ops")
    for case in TABLE[name].tests:
        args, kwargs = TABLE[name].make(np.random.default_rng(0), case, np.float64)
        args = tuple(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args)
        kwargs = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
        if args[0].ndim != 4:
            continue
        calls = ops.timed(name, ops.channels_last(name, args), kwargs), ops.timed(name, *ops.contiguous(name, args, kwargs))
        one, other = (r if isinstance(r, tuple) else (r,) for r in (call() for call in calls))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-10, atol=1e-10)
