"""Group normalisation on CUDA, run on the host: slabs that a block keeps and slabs in parts, two arrays behind one another."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from alphabar.kernels import gpu, reference
from alphabar.kernels.bf16 import BF16, pack
from alphabar.kernels.compile import FOLDER
from alphabar.kernels.gpu import norm
from tests import cuda_bf16_cases, cusim
from tests.cuda_arrays import aligned
from tests.cusim.probes import shifted

pytestmark = [
    pytest.mark.skipif(not cusim.available(), reason="g++ is not installed"),
    pytest.mark.usefixtures("nothing_is_left_unwritten"),
]
KEPT = {"norm_forward_wide", "norm_backward_wide", "norm_sum"}


def problem(shape: tuple[int, ...], groups: int, modulated: bool = True, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    b, channels = shape[0], shape[-1]
    p: dict[str, Any] = {
        "x": 2 * normal(*shape) + 0.5,
        "gamma": 1 + normal(channels) / 4,
        "beta": normal(channels),
        "groups": groups,
    }
    return p | ({"scale": normal(b, channels) / 4, "shift": normal(b, channels)} if modulated else {})


def exactly(p: dict[str, Any]) -> dict[str, Any]:
    return {k: v.astype(np.float64) if isinstance(v, np.ndarray) else v for k, v in p.items()}


def both(p: dict[str, Any], head: int | None = None, silu: bool = True) -> None:
    """The kernels' results, with the channels of x cut in two after ``head`` if given, are those of the definition."""
    dy = np.random.default_rng(9).standard_normal(p["x"].shape).astype(np.float32)
    exact = exactly(p)
    want = reference.group_norm_silu(**exact, silu=silu)
    wants = reference.group_norm_silu_backward(dy.astype(np.float64), **exact, mean=want[1], rstd=want[2], silu=silu)
    cut, cut_back = dict(p), {}
    if head is not None:
        cut["x"], cut["tail"] = (np.ascontiguousarray(a) for a in np.split(p["x"], [head], axis=-1))
        cut_back["tail_out"] = np.full_like(cut["tail"], np.nan)
    got = gpu.group_norm_silu(**cut, silu=silu)
    gots = gpu.group_norm_silu_backward(dy, **cut, **cut_back, mean=got[1], rstd=got[2], silu=silu)
    if head is not None:
        gots = (np.concatenate([gots[0], cut_back["tail_out"]], axis=-1), *gots[1:])
    for a, b in zip((*got, *gots), (*want, *wants), strict=True):
        if a is not None:
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=4e-6 * np.abs(b).max())


# heads and tails whose group lies in both, alone in its vector, or in parts; and those that are read a float at a time
TAILS = [((2, 5, 3, 24), 3, 12), ((2, 9, 16), 8, 4), ((1, 48, 48, 24), 3, 20), ((3, 4, 14), 7, 5), ((1, 50, 60, 10), 5, 3)]


@pytest.mark.parametrize("order", cusim.ORDERS)
@pytest.mark.parametrize(("shape", "groups", "head"), TAILS)
def test_two_arrays_are_one(shape: tuple[int, ...], groups: int, head: int, order: str) -> None:
    with gpu.on(cusim.Host("fast", order, 3)):
        both(problem(shape, groups), head)


@pytest.mark.parametrize(("shape", "groups", "head"), TAILS)
def test_two_arrays_break_no_rule(shape: tuple[int, ...], groups: int, head: int) -> None:
    with gpu.on(cusim.Host("check", "random")):
        both(problem(shape, groups, modulated=False), head, silu=False)


def test_shapes_drawn_at_random(host: cusim.Host) -> None:
    rng = np.random.default_rng(1)
    for seed in range(60):
        size, groups, places = (int(2 ** rng.uniform(low, high)) for low, high in ((0, 6), (0, 5), (3, 9)))
        both(problem((int(rng.integers(1, 4)), places, size * groups), groups, bool(seed % 2), seed), silu=seed % 3 > 0)
    assert len(set(host.launched)) == 13  # all of the file


def test_shapes_drawn_at_random_in_bf16(host: cusim.Host) -> None:
    rng = np.random.default_rng(2)
    for seed in range(60):
        size, groups, places = (int(2 ** rng.uniform(low, high)) for low, high in ((0, 6), (0, 5), (3, 10)))
        shape, place = (int(rng.integers(1, 4)), places, size * groups), (aligned, shifted)[seed % 5 == 0]
        head = int(rng.integers(1, size * groups)) if seed % 7 == 0 and size * groups > 1 else None
        cuda_bf16_cases.norm(shape, groups, head, place, bool(seed % 2), seed % 3 > 0, seed)
    kernels = {name for name in cusim.kernels(FOLDER / "norm.cu") if name.endswith("_bf16")} | {"norm_sum"}
    assert set(host.launched) == kernels and len(kernels) == 13


def test_bf16_is_kept_in_half_the_room(host: cusim.Host) -> None:
    """Of 32 x 32 places a sector of x and one of dy are 64 KiB: two blocks find room, and all is read once."""
    for arrays in (1, 2):
        plan = norm._plan(128, 32 * 32, 128, 32, 4, arrays, norm.MOST_KEPT, 2)
        assert plan.parts == 1 and plan.shared - 4 * plan.stash == 64 << 10 and plan.shared <= norm.TWO_RESIDENT
    cuda_bf16_cases.norm((2, 32, 32, 32), 4, None, aligned)
    assert set(host.launched) == {"norm_forward_wide_bf16", "norm_backward_wide_bf16", "norm_sum"}


def test_samples_are_taken_as_many_at_a_time_as_the_cache_holds(host: cusim.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem((5, 48, 48, 8), 1)
    both(p)
    assert host.launched == ["norm_moments_wide", "norm_apply_wide", "norm_sums_wide", "norm_gradient_wide", "norm_sum"]
    host.launched.clear()
    monkeypatch.setattr(norm, "CACHED", 48 * 48 * 8 * 4)
    norm._plan.cache_clear()
    both(p)
    assert host.launched == 2 * ["norm_moments_wide", "norm_apply_wide"] + 3 * ["norm_sums_wide", "norm_gradient_wide"] + [
        "norm_sum"
    ]
    norm._plan.cache_clear()


def test_a_gpu_with_less_shared_memory_takes_parts(host: cusim.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem((2, 8, 8, 32), 8)
    both(p)
    assert set(host.launched) == KEPT
    monkeypatch.setattr(norm, "TWO_RESIDENT", 4096)
    monkeypatch.setattr(norm, "_most_shared", lambda device: 4096)
    norm._plan.cache_clear()
    both(p)
    assert not set(host.launched[-3:]) & KEPT - {"norm_sum"}
    norm._plan.cache_clear()


@pytest.mark.parametrize("shape", [(3, 6, 7, 32), (1, 48, 48, 32)])
def test_the_result_may_take_the_place_of_an_argument(shape: tuple[int, ...], host: cusim.Host) -> None:
    p = problem(shape, 2)
    dy = p["x"] ** 2
    y, mean, rstd = gpu.group_norm_silu(**p)
    dx = gpu.group_norm_silu_backward(dy, **p, mean=mean, rstd=rstd)[0]
    assert gpu.group_norm_silu_backward(dy, **p, mean=mean, rstd=rstd, out=dy)[0] is dy
    assert np.array_equal(dy, dx)
    assert gpu.group_norm_silu(**p, out=p["x"])[0] is p["x"]
    assert np.array_equal(p["x"], y)


@pytest.mark.parametrize("shape", [(3, 6, 7, 32), (1, 64, 64, 32)])
def test_the_result_may_take_the_place_of_an_argument_in_bf16(shape: tuple[int, ...], host: cusim.Host) -> None:
    p = problem(shape, 2)
    p["x"], dy = pack(p["x"]), pack(p["x"] ** 2)
    y, mean, rstd = gpu.group_norm_silu(**p)
    dx = gpu.group_norm_silu_backward(dy, **p, mean=mean, rstd=rstd)[0]
    assert gpu.group_norm_silu_backward(dy, **p, mean=mean, rstd=rstd, out=dy)[0] is dy
    assert np.array_equal(dy, dx)
    assert gpu.group_norm_silu(**p, out=p["x"])[0] is p["x"]
    assert np.array_equal(p["x"], y)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 16, 16, 64), 32), ((2, 8, 8, 96), 32), ((2, 8, 8, 32), 32), ((1, 48, 48, 40), 8), ((160, 2, 8, 64), 32)],
)
def test_every_request_fills_its_sectors(shape: tuple[int, ...], groups: int) -> None:
    device = cusim.Host("check", traffic=True)
    with gpu.on(device):
        both(problem(shape, groups))
    rows = [row for row in device.traffic if row.memory == "global" and row.bytes == 16]
    assert {row.kind for row in rows} == {"load", "store"}
    assert all(row.share >= 1 for row in rows), rows
    kept = [row for row in device.traffic if row.memory == "shared" and row.bytes == 16]
    assert all(row.conflict == 1 for row in kept), kept


@pytest.mark.parametrize(("shape", "groups"), [((1, 16, 16, 64), 32), ((2, 8, 8, 96), 32), ((1, 64, 64, 48), 12)])
def test_every_request_of_bf16_fills_its_sectors(shape: tuple[int, ...], groups: int) -> None:
    device = cusim.Host("check", traffic=True)
    with gpu.on(device):
        cuda_bf16_cases.norm(shape, groups, None, aligned)
    rows = [row for row in device.traffic if row.memory == "global" and row.bytes in (8, 16)]
    assert {(row.kind, row.bytes) for row in rows} == {("load", 8), ("store", 8), ("load", 16)}
    assert all(row.share >= 1 for row in rows), rows
    kept = [row for row in device.traffic if row.memory == "shared" and row.bytes == 8]
    assert all(row.conflict == 1 for row in kept), kept


@pytest.mark.parametrize("side", [8, 48])
def test_one_value_far_from_the_rest_costs_no_accuracy(side: int, host: cusim.Host) -> None:
    for place in (0, 5, -1):
        p = problem((1, side, side, 8), 2)
        p["x"][..., :4] = 1
        p["x"].reshape(-1, 8)[place] = 1000
        _, mean, rstd = gpu.group_norm_silu(**p)
        _, want_mean, want_rstd = reference.group_norm_silu(
            **{k: v.astype(np.float64) if k != "groups" else v for k, v in p.items()}
        )
        np.testing.assert_allclose(mean, want_mean, rtol=1e-6)
        np.testing.assert_allclose(rstd, want_rstd, rtol=2e-6)


def test_a_group_too_wide_for_the_kernels_goes_to_the_definition(host: cusim.Host) -> None:
    p = problem((1, 1, 1, norm.LARGEST_GROUP + 1), 1)
    y, mean, rstd = gpu.group_norm_silu(**p)
    assert np.array_equal(y, reference.group_norm_silu(**p)[0])
    ours, defined = (m.group_norm_silu_backward(y, **p, mean=mean, rstd=rstd) for m in (gpu, reference))
    assert np.array_equal(ours[0], defined[0]) and not host.launched


@pytest.mark.parametrize("head", [None, 5])
def test_nor_do_the_kernels_take_such_a_group_of_bf16(head: int | None, host: cusim.Host) -> None:
    cuda_bf16_cases.norm((2, 1, norm.LARGEST_GROUP + 1), 1, head, aligned)
    assert not host.launched
    p = problem((0, 4, 4, 8), 2)
    y, mean, rstd = gpu.group_norm_silu(**p | {"x": pack(p["x"])})
    assert y.dtype == BF16 and y.shape == (0, 4, 4, 8) and mean.dtype == rstd.dtype == np.float32


BATCHES = [1, 4, 32, 256]
IMAGES = [
    (8, 256, 32),
    (16, 128, 32),
    (28, 32, 8),
    (32, 64, 32),
    (32, 96, 32),
    (64, 128, 32),
    (64, 200, 8),
    (256, 64, 32),
    (512, 128, 32),
]


@pytest.mark.parametrize("most", [48 << 10, 99 << 10, norm.MOST_KEPT])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("side", "channels", "groups"), IMAGES)
def test_plans_fit_and_fill_a_gpu(side: int, channels: int, groups: int, batch: int, most: int) -> None:
    for width, arrays, item in product((1, 4), (1, 2), (2, 4)):
        plan = norm._plan(batch, side * side, channels, groups, width, arrays, most, item)
        blocks = plan.samples * groups // plan.span * plan.parts
        row = plan.span * channels // groups
        assert plan.shared <= most and groups % plan.span == 0 and row % width == 0 and item * row >= 4 * norm.SECTOR
        assert plan.parts <= min(norm.MOST_PARTS, side * side) and 1 <= plan.samples <= batch
        cached = 4 * norm.CACHED // item
        assert plan.parts == 1 or plan.samples in (1, batch) or plan.samples * side * side * channels * arrays <= cached
        elements = row * side * side // plan.parts  # of a block: a few of its accesses take as long as a launch
        assert blocks >= norm.ENOUGH // 2 or elements <= norm.LONG
