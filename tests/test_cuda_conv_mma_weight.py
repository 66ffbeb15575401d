"""The convolution's weight gradient on the tensor cores, run on the host: against float64, of operands that need no rounding."""

import re
from typing import Any

import numpy as np
import pytest

from alphabar.kernels import gpu
from alphabar.kernels.compile import FOLDER
from alphabar.kernels.gpu import conv_mma_weight
from tests import cusim
from tests.cuda_arrays import aligned
from tests.cuda_conv_mma_weight_cases import (
    CONVS,
    KINDS,
    LONG,
    Array,
    Conv,
    Place,
    activated,
    case,
    gradient,
    normals,
    one_multiprocessor,
    stored,
    within,
)
from tests.cusim.probes import shifted

pytestmark = [
    pytest.mark.skipif(not cusim.available(), reason="g++ is not installed"),
    pytest.mark.usefixtures("nothing_is_left_unwritten"),
]


def tf32(a: Array) -> Array:
    """To 10 bits of significand, ties away from zero."""
    return ((a.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def compare(conv: Conv, kind: str, seed: int = 0) -> None:
    """Products are exact, and what is left is the rounding of a sum in float32."""
    x, dy = normals(conv, seed)
    sizes = gradient(conv, np.abs(x), np.abs(dy))
    found = conv_mma_weight.backward_weight(stored(x, kind), stored(dy, kind), *conv.rule)
    within(found, gradient(conv, x, dy), *(2e-6 * s for s in sizes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", CONVS)
def test_the_gradient_is_that_of_the_definition(of: str, kind: str, host: cusim.Host) -> None:
    for place in (aligned, shifted):
        case(CONVS[of], kind, place)


def test_shapes_drawn_at_random(host: cusim.Host) -> None:
    rng = np.random.default_rng(6)
    for seed in range(30):
        batch, height, width, cin, cout = (int(2 ** rng.uniform(0, high)) for high in (3, 4, 4, 6, 7))
        kernel, stride, upsample = int(rng.choice([1, 3])), int(rng.integers(1, 3)), bool(rng.integers(2))
        compare(Conv((batch, height, width, cin), cout, kernel, stride, upsample), KINDS[rng.integers(2)], seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["parts of channels and of tiles", "three channels out", "doubled", "odd points"])
def test_each_activated_input_is_rounded_once(of: str, kind: str, host: cusim.Host) -> None:
    activated(CONVS[of], kind, aligned)


def test_float32_is_rounded_to_the_nearest_tf32_but_not_for_the_bias(host: cusim.Host) -> None:
    conv = Conv((2, 6, 7, 24), 12)
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for shape in (conv.x, conv.dy))
    want = gradient(conv, tf32(x), tf32(dy))[0], dy.sum(axis=(0, 1, 2), dtype=np.float64)
    sizes = gradient(conv, np.abs(x), np.abs(dy))
    within(conv_mma_weight.backward_weight(x, dy, 3), want, 2e-6 * sizes[0], 2e-7 * sizes[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", LONG)
def test_a_slice_of_many_tiles(of: str, kind: str, host: cusim.Host) -> None:
    conv = LONG[of]
    with one_multiprocessor():
        compare(conv, kind)
        p = conv_mma_weight.plan(*conv.dy[:3], conv.x[3], conv.cout, conv.kernel, conv.stride, 2 if kind == "bf16" else 4)
    assert p.slices == 1 and p.share > conv_mma_weight.STAGES + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", cusim.ORDERS)
def test_any_order_of_threads_gives_the_same_bits(order: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    for of in ("parts of channels and of tiles", "odd", "halved", "points"):
        conv = CONVS[of]
        x, dy = normals(conv)
        a, b = (rng.standard_normal((conv.x[0], conv.x[3])).astype(np.float32) for _ in range(2))
        found = []
        for device in (cusim.Host(), cusim.Host("fast", order, 7)):
            with gpu.on(device):
                found.append(conv_mma_weight.backward_weight(stored(x, kind), stored(dy, kind), *conv.rule, norm=(a, b, True)))
        assert all(np.array_equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("order", "place"), [("forward", aligned), ("random", shifted)])
def test_no_rule_is_broken(order: str, place: Place, kind: str) -> None:
    with gpu.on(cusim.Host("check", order)):
        for conv in CONVS.values():
            case(conv, kind, place)


def test_no_rule_is_broken_in_a_slice_of_many_tiles() -> None:
    with gpu.on(cusim.Host("check", "random")), one_multiprocessor():
        for of in ("many tiles", "many tiles of points"):
            for kind in KINDS:
                compare(LONG[of], kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv", [Conv((2, 16, 16, 64), 128), Conv((8, 4, 4, 64), 64), Conv((2, 16, 24, 64), 64, 3, 2)])
def test_no_access_wastes_sectors_or_banks(conv: Conv, kind: str) -> None:
    device = cusim.Host("check", traffic=True)
    with gpu.on(device), one_multiprocessor():
        compare(conv, kind)
    moved = [r for r in device.traffic if r.memory == "global" and r.bytes >= 8]
    assert {r.kind for r in moved} == {"load", "store"} and all(r.share >= 1 for r in moved), moved
    products = [
        r for r in device.traffic if r.memory == "shared" and r.kind == "load" and r.bytes == (16 if kind == "bf16" else 4)
    ]
    assert sum(r.requests for r in products) > 500
    assert all(r.conflict == 1 for r in products if r.requests > 100), products


SIZES = [
    *((128, n, n, c, d, k, 1) for n, c, d in ((32, 128, 128), (16, 256, 256), (8, 512, 256), (4, 256, 256)) for k in (1, 3)),
    *((128, 32, 32, c, d, 3, 1) for c, d in ((3, 128), (128, 3), (64, 64), (32, 32))),
    *((32, n, n, 64, 64, 3, s) for n in (28, 14, 7, 64, 256) for s in (1, 2)),
    *((b, n, n, 2000, 20, k, 2) for b in (1, 300) for n in (1, 2) for k in (1, 3)),
    *((1, 1, 1000, c, 2000, k, 2) for c in (1, 2000) for k in (1, 3)),
    (1, 2000, 1, 1024, 1024, 3, 1),
]


@pytest.mark.parametrize(("itemsize", "normed"), [(2, False), (2, True), (4, False)])
@pytest.mark.parametrize("sizes", SIZES)
def test_plans_fit_and_fill_a_gpu(sizes: tuple[int, ...], itemsize: int, normed: bool) -> None:
    batch, rows, cols, cin, cout, kernel, stride = sizes
    p = conv_mma_weight.plan(batch, rows, cols, cin, cout, kernel, stride, itemsize, normed)
    cut = p.cut
    places = cut.images * cut.tall * cut.broad
    tiles = -(-batch // cut.images) * -(-rows // cut.tall) * -(-cols // cut.broad)
    assert cut.shared <= conv_mma_weight.MOST_SHARED and cut.depth % 16 == 0 and places <= cut.depth < places + 16
    assert p.slices * p.share >= tiles > (p.slices - 1) * p.share
    assert max(cut.tall, cut.broad) * stride + kernel < 1 << 10 and cut.images < 1 << 11  # packed in words
    blocks, work = p.inputs * p.outputs * p.slices, tiles * cut.depth
    assert blocks >= 100 or work * p.inputs * p.outputs < 100 * 512
    if rows % 8 == cols % 8 == 0 and stride == 1 and min(cin, cout) >= 32 and itemsize == 2:
        assert places == cut.depth >= 32 and cut.conflict == 1


def test_the_constants_of_the_launcher_are_those_of_the_kernels() -> None:
    text = (FOLDER / "conv_mma_weight.cu").read_text()
    constants = dict(re.findall(r"(\w+) = (\d+)[,;]", "\n".join(re.findall(r"^const int .*", text, re.MULTILINE))))
    for name in ("THREADS", "WARPS", "STAGES", "COLUMNS", "GAP"):
        assert int(constants[name]) == getattr(conv_mma_weight, name)


def test_sizes_beyond_what_a_kernel_counts_are_told(host: cusim.Host) -> None:
    big: Any = np.broadcast_to(np.uint16(0), (1 << 16, 256, 128, 8))
    with pytest.raises(ValueError, match="too many: the limit is 2\\^31 - 1"):
        conv_mma_weight.backward_weight(big, big, 3)
