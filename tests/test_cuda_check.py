"""Every CUDA kernel under the checker (races, stray and misaligned accesses, unwritten shared memory), and the checker itself."""

from pathlib import Path

import numpy as np
import pytest

from alphabar.kernels import TABLE, accuracy, gpu
from alphabar.kernels.compile import FOLDER
from tests import cusim
from tests.cusim.probes import launcher, shifted_launcher

pytestmark = pytest.mark.skipif(not cusim.available(), reason="g++ is not installed")
FAULTS = Path(cusim.__file__).parent / "faults.cu"
ALL = 0xFFFFFFFF


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    cusim.prepare([*sorted(FOLDER.glob("*.cu")), FAULTS], ("check",))


@pytest.mark.parametrize("order", ["forward", "random"])
@pytest.mark.parametrize("name", TABLE)
def test_kernel_breaks_no_rule(name: str, order: str) -> None:
    with gpu.on(cusim.Host("check", order)):
        for case in accuracy.all_cases(TABLE[name]):
            for call in (launcher, shifted_launcher):
                call(name, *accuracy.arguments(TABLE[name], case))


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("normals", {"shape": (3, 1024)}),
        ("q_sample", {"shape": (3, 1024)}),
        ("q_sample", {"shape": (3, 1024), "given": True}),
        ("step", {"shape": (3, 1024), "noise": "made", "clip": True, "store": True, "history": 3, "guidance": True}),
        ("step", {"shape": (3, 1024), "noise": "given"}),
        ("sum_squares", {"shape": (8192,)}),
        ("layer_norm", {"shape": (2, 8, 256), "modulated": True}),
        ("layer_norm_backward", {"shape": (2, 16, 256), "modulated": True}),
        ("add_gated_backward", {"shape": (2, 16, 256)}),
        ("squared_error", {"shape": (2, 8192)}),
        ("cross_entropy", {"shape": (8, 64)}),
        ("cross_entropy", {"shape": (2, 8192)}),
        ("softmax", {"shape": (4, 1024)}),
        ("softmax_backward", {"shape": (4, 256)}),
        ("adamw_ema", {"shape": (8192,)}),
        ("group_norm_silu", {"shape": (1, 16, 16, 32), "groups": 8}),
        ("group_norm_silu", {"shape": (1, 16, 16, 64), "groups": 32}),
        ("group_norm_silu_backward", {"shape": (1, 16, 16, 32), "groups": 8}),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(f"{k}={w}" for k, w in v.items()),
)
def test_no_byte_of_a_sector_is_wasted(name: str, case: dict) -> None:
    device = cusim.Host("check", traffic=True)
    with gpu.on(device):
        launcher(name, *accuracy.arguments(TABLE[name], case))
    wide = [row for row in device.traffic if row.memory == "global" and row.bytes >= 8 and row.via]
    assert {"load", "store"} & {row.kind for row in wide}
    assert all(row.share >= 1 for row in wide), wide


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("conv2d", {"shape": (1, 8, 8, 16), "kernel": 3, "cout": 64}),
        ("conv2d_backward_input", {"shape": (1, 8, 8, 16), "kernel": 3, "cout": 64}),
        ("conv2d_backward_weight", {"shape": (1, 8, 8, 16), "kernel": 3, "cout": 64}),
        *((n, {"shape": (1, 64, 1, d)}) for n in ("attention", "attention_backward") for d in (32, 64)),
        ("group_norm_silu", {"shape": (1, 8, 8, 64), "groups": 8}),
        ("group_norm_silu_backward", {"shape": (1, 8, 8, 64), "groups": 8}),
        ("layer_norm_backward", {"shape": (1, 8, 64)}),
        ("softmax", {"shape": (2, 2000)}),
        ("sum_squares", {"shape": (5000,)}),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(f"{k}={w}" for k, w in v.items()),
)
def test_shared_memory_is_all_but_free_of_bank_conflicts(name: str, case: dict) -> None:
    device = cusim.Host("check", traffic=True)
    with gpu.on(device):
        launcher(name, *accuracy.arguments(TABLE[name], case))
    rows = [row for row in device.traffic if row.memory == "shared"]
    assert sum(row.passes for row in rows) < 1.1 * sum(row.phases for row in rows)
    assert all(row.conflict <= 2 for row in rows), [row for row in rows if row.conflict > 2]


# ------------------------------------------------------------------------------------------------------------- the checker


def zeros(n: int) -> np.ndarray:
    return np.zeros(n, np.float32)


FAULTY = [
    (
        "beyond_the_end",
        2,
        64,
        lambda: (zeros(100), zeros(100), np.int32(100)),
        0,
        r"out-of-bounds read at faults.cu:5: 0 bytes after",
    ),
    ("missing_atomic", 1, 64, lambda: (zeros(64), zeros(1), np.int32(64)), 0, r"race: .* argument 1 .* faults.cu:10"),
    ("missing_atomic", 64, 1, lambda: (zeros(64), zeros(1), np.int32(64)), 0, r"race: .* argument 1"),
    ("missing_barrier", 1, 64, lambda: (zeros(64),), 0, r"race: .* shared s|read of unwritten shared memory, shared s"),
    ("divergent_barrier", 1, 64, lambda: (zeros(64),), 0, r"divergent barrier|deadlock"),
    ("half_a_warp", 1, 32, lambda: (zeros(32),), 0, r"mask names lanes that have exited|deadlock"),
    ("unwritten_shared", 1, 64, lambda: (zeros(64),), 0, r"read of unwritten shared memory, shared s"),
    ("unwritten_dynamic", 1, 32, lambda: (zeros(32),), 128, r"read of unwritten shared memory, dynamic"),
    ("misaligned", 1, 8, lambda: (zeros(40), zeros(40)), 0, r"16-byte access misaligned at faults.cu"),
    ("beyond_an_array", 1, 32, lambda: (zeros(32), np.int32(5)), 0, r"index 4 lies outside of its array at faults.cu"),
    ("strided", 1, 32, lambda: (zeros(32 * 8), zeros(31), np.int32(32), np.int32(8)), 0, r"out-of-bounds write"),
]


@pytest.mark.parametrize(("name", "grid", "block", "args", "shared", "message"), FAULTY, ids=[f"{f[0]}-{f[1]}" for f in FAULTY])
def test_a_planted_fault_is_named(name: str, grid: int, block: int, args, shared: int, message: str) -> None:
    module = cusim.Module(FAULTS, "check")
    with pytest.raises(cusim.Fault, match=message):
        module.launch(name, (grid,), (block,), args(), shared)


def test_the_checker_goes_on_after_a_fault() -> None:
    module = cusim.Module(FAULTS, "check")
    with pytest.raises(cusim.Fault):
        module.launch("misaligned", (1,), (8,), (zeros(40), zeros(40)))
    x, y = np.arange(256, dtype=np.float32), zeros(32)
    module.launch("strided", (1,), (32,), (x, y, np.int32(32), np.int32(8)))
    assert np.array_equal(y, x[::8])


def test_atomics_do_not_race() -> None:
    total = zeros(1)
    cusim.Module(FAULTS, "check").launch("with_atomic", (4,), (32,), (np.ones(128, np.float32), total, np.int32(128)))
    assert total == 128


def test_wasted_bytes_of_sectors_are_counted() -> None:
    module = cusim.Module(FAULTS, "check")
    module.launch("strided", (2,), (64,), (zeros(128 * 8), zeros(128), np.int32(128), np.int32(8)), count=True)
    assert {(row.kind, row.share) for row in module.traffic()} == {("load", 0.125), ("store", 1.0)}


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [((1,), (1025,), 0, "1 to 1024 threads"), ((1, 65536), (32,), 0, "65535"), ((1,), (32,), 240_000, "shared memory")],
)
def test_limits_of_a_launch(grid: tuple, block: tuple, shared: int, message: str) -> None:
    with pytest.raises(cusim.Fault, match=message):
        cusim.Module(FAULTS, "check").launch("half_a_warp", grid, block, (zeros(32),), shared)
