"""Attention on the tensor cores, run on the host: its error beside PyTorch's, heads of every size, orders, accesses, plans."""

import re
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from alphabar.kernels import gpu, precision, reference
from alphabar.kernels.bf16 import BF16, pack, unpack
from alphabar.kernels.compile import FOLDER
from alphabar.kernels.gpu import attend_mma
from tests import cusim
from tests.cuda_arrays import aligned
from tests.cuda_attention_cases import KINDS, SHAPES, all_cases, budget, case, computed, exact, inputs, numbers, rounded
from tests.cusim.probes import shifted

pytestmark = [
    pytest.mark.skipif(not cusim.available(), reason="g++ is not installed"),
    pytest.mark.usefixtures("nothing_is_left_unwritten"),
]
KERNELS = ("forward", "dq", "dkv")
EVERY = {f"attention_{kind}_{kernel}_{n}" for kind, kernel, n in product(KINDS, KERNELS, attend_mma.HEADS)}


@pytest.mark.parametrize("place", [aligned, shifted])
def test_the_cases_reach_every_kernel_and_are_within_the_budget(place: Callable, host: cusim.Host) -> None:
    for _, call in all_cases():
        call(place)
    assert set(host.launched) == EVERY


@pytest.mark.parametrize("shape", [(2, 64, 2, 8), (1, 100, 2, 32), (1, 200, 1, 64), (1, 70, 1, 128), (1, 128, 1, 256)])
def test_the_error_of_bfloat16_is_at_most_twice_that_of_pytorch(shape: tuple[int, ...], host: cusim.Host) -> None:
    torch = pytest.importorskip("torch")
    arrays = inputs(shape, "bf16", seed=3)
    q, k, v, do = (torch.from_numpy(unpack(a)).bfloat16().transpose(1, 2) for a in arrays)
    for a in (q, k, v):
        a.requires_grad_()
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    o.backward(do)
    theirs = [a.detach().transpose(1, 2).double().numpy() for a in (o, q.grad, k.grad, v.grad)]
    ours, want = (
        [numbers(a) for i, a in enumerate(found) if i != 1] for found in (computed(arrays, None, aligned, 1), exact(arrays, None))
    )
    for mine, their, true in zip(ours, theirs, want, strict=True):
        for size in (np.linalg.norm, lambda a: np.abs(a).max()):
            assert size(mine - true) <= 2 * size(their - true)


@pytest.mark.parametrize(("size", "scale"), [(1.0, None), (3.0, 1.0), (1.0, -0.4), (30.0, 1.0), (1.0, 0.0)])
def test_lse_of_bfloat16_is_exact_to_the_rounding_of_float32(size: float, scale: float | None, host: cusim.Host) -> None:
    arrays = inputs((2, 75, 2, 40), "bf16", 4, size)
    q, k = (numbers(a) for a in arrays[:2])
    lse, want = (found[1] for found in (computed(arrays, scale, aligned), exact(arrays, scale)))
    largest = np.abs(np.einsum("bthd,bshd->bhts", q, k)).max() * abs(40**-0.5 if scale is None else scale)
    assert np.abs(lse - want).max() <= 2.0**-22 * (largest + np.log(75))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "scale"), [(1.0, -0.4), (1.0, 0.0), (3.0, 1.0)])
def test_any_scale(kind: str, size: float, scale: float, host: cusim.Host) -> None:
    case((1, 75, 2, 32), kind, scale, aligned, 5, size)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_beyond_what_exp_can_take_stay_finite(kind: str, host: cusim.Host) -> None:
    arrays = inputs((1, 40, 1, 32), kind, 6, 100.0)
    assert all(np.isfinite(numbers(a)).all() for a in computed(arrays, 1.0, aligned))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_drawn_at_random(kind: str, host: cusim.Host) -> None:
    rng = np.random.default_rng(7)
    for seed in range(25):
        shape = (int(rng.integers(1, 4)), int(2 ** rng.uniform(0, 7)), int(rng.integers(1, 4)), int(2 ** rng.uniform(0, 8)))
        case(shape, kind, (None, 0.2)[seed % 2], (aligned, shifted)[seed // 2 % 2], seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 70, 2, 24), (2, 33, 1, 64), (2, 50, 1, 128), (2, 70, 1, 256)])
def test_the_same_bits_in_any_order_of_threads_and_in_any_batch(kind: str, shape: tuple[int, ...]) -> None:
    arrays = inputs(shape, kind, 8)
    found = []
    for seed, order in enumerate(cusim.ORDERS):
        with gpu.on(cusim.Host("fast", order, seed + 1)):
            found.append(computed(arrays, None, aligned, 1))
    with gpu.on(cusim.Host()):  # other numbers of warps to a block
        of_one = [computed([a[i : i + 1] for a in arrays], None, aligned) for i in range(shape[0])]
    found.append([np.concatenate(parts) for parts in zip(*of_one, strict=True)])
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("order", ["forward", "random"])
@pytest.mark.parametrize("place", [aligned, shifted])
def test_no_rule_is_broken(order: str, place: Callable) -> None:
    with gpu.on(cusim.Host("check", order)):
        for _, call in all_cases():
            call(place)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 80, 2, 32), (1, 65, 1, 64), (1, 40, 1, 128), (1, 40, 1, 256)])
def test_no_access_wastes_sectors_or_banks(kind: str, shape: tuple[int, ...]) -> None:
    device = cusim.Host("check", traffic=True)
    with gpu.on(device):
        computed(inputs(shape, kind), None, aligned, 1)
    wide = [row for row in device.traffic if row.memory == "global" and row.bytes == 16]
    assert {row.kind for row in wide} == {"load", "store"}
    assert all(row.share >= 1 for row in wide), wide
    shared = [row for row in device.traffic if row.memory == "shared" and row.bytes > 4]
    assert {row.kind for row in shared} == {"load", "store"}
    assert all(row.conflict == 1 for row in shared), [row for row in shared if row.conflict > 1]


def test_the_precision_chooses_for_float32_and_the_dtype_for_bfloat16() -> None:
    def launched(kind: str, name: str) -> set[str]:
        q, k, v, do = inputs((1, 5, 1, 8), kind)
        with gpu.on(cusim.Host()) as device, precision(name):
            o, lse = gpu.attention(q, k, v)
            gpu.attention_backward(do, q, k, v, o, lse)
        return {re.sub(r"_\d+$", "", n) for n in device.launched}

    for name in ("default", "high", "tf32"):
        assert launched("bf16", name) == {f"attention_bf16_{k}" for k in KERNELS}
    for name in ("default", "high"):
        assert launched("tf32", name) == {f"attention_{k}" for k in KERNELS}
    assert launched("tf32", "tf32") == {f"attention_tf32_{k}" for k in KERNELS}


def test_longer_heads_of_bfloat16_go_to_the_definition(host: cusim.Host) -> None:
    arrays = inputs((1, 6, 1, 260), "bf16")
    made = computed(arrays, None, aligned)
    q, k, v, do = map(unpack, arrays)
    o, lse = reference.attention(q, k, v)
    assert not host.launched
    assert np.array_equal(made[0], pack(o)) and np.array_equal(made[1], lse) and made[1].dtype == np.float32
    want = map(pack, reference.attention_backward(do, q, k, v, unpack(made[0]), lse))
    assert all(a.dtype == BF16 and np.array_equal(a, b) for a, b in zip(made[2:], want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_is_a_small_part_of_the_result(kind: str) -> None:
    arrays = inputs(SHAPES["odd"], kind)
    for want, plain in zip(exact(arrays, None), rounded(arrays, None, kind), strict=True):
        assert 0 < budget(want, plain) < {"bf16": 2.0**-6, "tf32": 2.0**-8}[kind] * np.linalg.norm(want)


@pytest.mark.parametrize("samples", [1, 32, 256])
@pytest.mark.parametrize("tokens", [1, 16, 64, 256, 1024])
@pytest.mark.parametrize(("heads", "d"), [(1, 128), (4, 32), (16, 8), (4, 64), (1, 256), (2, 5)])
def test_plans_fit_and_spread(samples: int, tokens: int, heads: int, d: int) -> None:
    for size, kernel in product((2, 4), KERNELS):
        plan = attend_mma.plan((samples, tokens, heads, d), size, kernel)
        groups = plan.threads // 32 // (2 if kernel == "dkv" and plan.features > 128 else 1)
        assert d <= plan.features and plan.shared <= attend_mma.MOST_SHARED and groups in (1, 2, 4) and plan.stages in (1, 2)
        assert (
            plan.blocks * groups * attend_mma.OWN
            >= samples * heads * tokens
            > (plan.blocks - samples * heads) * groups * attend_mma.OWN
        )
        assert groups == 1 or plan.blocks >= attend_mma.ENOUGH or (size, plan.features) == (4, 256)
        assert groups * attend_mma.OWN < tokens + 2 * attend_mma.OWN


def test_one_head_of_256_features_at_16_by_16_places() -> None:
    """DDPM's attention, batch 128: all places on a large GPU have work, of four or eight warps each."""
    plans = [attend_mma.plan((128, 256, 1, 256), 2, kernel) for kernel in KERNELS]
    assert [(p.blocks, p.threads) for p in plans] == [(512, 128), (512, 128), (512, 256)]


def test_the_plans_are_those_of_the_kernels() -> None:
    text = (FOLDER / "attention_mma.cu").read_text()
    made = re.findall(r"^ATTENTION\((\w+), (\w+), (\d+), (\d+), \d\)$", text, re.MULTILINE)
    assert [(kind, t, int(n)) for kind, t, n, _ in made] == [
        (kind, t, n) for kind, t in zip(KINDS, ("bf16", "float"), strict=True) for n in attend_mma.HEADS
    ]
    assert f"const int OWN = {attend_mma.OWN};" in text
    for kind, _, n, threads in made:
        for kernel in KERNELS:
            plan = attend_mma.plan((1000, 1000, 1, int(n)), 2 if kind == "bf16" else 4, kernel)
            assert plan.threads <= (int(threads) if kernel == "dkv" else 128)
