"""Attention on CUDA, run on the host: heads of every size, accesses without waste, plans that fit."""

import re

import numpy as np
import pytest

from alphabar.kernels import TABLE, accuracy, gpu
from alphabar.kernels.compile import FOLDER
from alphabar.kernels.gpu import attend
from tests import cusim

pytestmark = [
    pytest.mark.skipif(not cusim.available(), reason="g++ is not installed"),
    pytest.mark.usefixtures("nothing_is_left_unwritten"),
]
SHAPES = [(2, 16, 8, 8), (1, 65, 3, 16), (3, 33, 2, 32), (1, 130, 1, 64), (1, 70, 1, 128), (9, 64, 16, 8)]


def within(shape: tuple[int, ...], seed: int = 0, **case: float) -> None:
    for name in ("attention", "attention_backward"):
        errors = accuracy.errors(TABLE[name], {"shape": shape, **case}, lambda n, a, k: getattr(gpu, n)(*a, **k), seed)
        assert all(e.within for e in errors), (name, shape, errors)


def test_shapes_drawn_at_random(host: cusim.Host) -> None:
    rng = np.random.default_rng(2)
    for seed in range(40):
        shape = (int(rng.integers(1, 4)), int(2 ** rng.uniform(0, 7.5)), int(rng.integers(1, 4)), int(2 ** rng.uniform(0, 8)))
        within(shape, seed, scale=0.2)
    assert len(set(host.launched)) == 3 * len(attend.HEADS)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_access_wastes_sectors_or_banks(shape: tuple[int, ...]) -> None:
    device = cusim.Host("check", traffic=True)
    with gpu.on(device):
        within(shape)
    rows = [row for row in device.traffic if row.bytes == 16]
    assert {(row.memory, row.kind) for row in rows} >= {("global", "load"), ("shared", "load"), ("shared", "store")}
    assert all(row.share >= 1 for row in rows if row.memory == "global"), rows
    rows = [row for row in device.traffic if row.memory == "shared" and (row.bytes == 16) == (row.kind == "load")]
    assert all(row.conflict == 1 for row in rows if row.requests > 16), rows


@pytest.mark.parametrize("samples", [1, 32, 256])
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 1024])
@pytest.mark.parametrize(("heads", "d"), [(1, 128), (4, 32), (16, 8), (4, 64), (1, 256), (2, 5)])
def test_plans_fit_and_spread(samples: int, tokens: int, heads: int, d: int) -> None:
    q = np.broadcast_to(np.float32(0), (samples, tokens, heads, d))
    for own, weights, rows_of in ((1, 1, attend.FORWARD_ROWS), (2, 1, attend.BACKWARD_ROWS), (2, 2, attend.BACKWARD_ROWS)):
        features, (blocks,), (threads,), shared = attend._attention_plan(q, own, weights, rows_of)
        warps, rows = threads // 32, 4 * rows_of[attend.HEADS.index(features)]
        assert d <= features and shared <= attend.MOST_SHARED and threads in (32, 64, 128)
        assert blocks * warps * rows >= samples * heads * tokens
        assert warps == 1 or blocks >= attend.ENOUGH or shared * 2 > attend.MOST_SHARED


def test_the_rows_of_the_launcher_are_those_of_the_kernels() -> None:
    made = re.findall(r"^ATTENTION\((\d+), (\d+), (\d+)\)$", (FOLDER / "attention.cu").read_text(), re.MULTILINE)
    assert tuple(zip(*(map(int, row) for row in made), strict=True)) == (attend.HEADS, attend.FORWARD_ROWS, attend.BACKWARD_ROWS)
