"""Convolution on the tensor cores, run on the host: sums that are exact, rounded operands, banks, plans, instructions."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphabar.kernels import gpu, reference
from alphabar.kernels.bf16 import BF16, pack
from alphabar.kernels.compile import FOLDER
from alphabar.kernels.gpu import conv_mma
from tests import cuda_audit, cuda_sass, cusim
from tests import cuda_conv_mma_cases as cases
from tests.cuda_conv_mma_cases import CONVS, KINDS, Conv, numbers, quarters, rounded, stored
from tests.cusim.probes import shifted

pytestmark = [
    pytest.mark.skipif(not cusim.available(), reason="g++ is not installed"),
    pytest.mark.usefixtures("nothing_is_left_unwritten"),
]
FILES = [FOLDER / f"conv_mma_{kind}.cu" for kind in KINDS]
ALL = dict(cases.all_cases())


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    cusim.prepare(FILES)


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_sums_are_exact(order: str) -> None:
    """Forward they are in the tests of all kernels, which run these cases too."""
    device = cusim.Host("fast", order, 3)
    with gpu.on(device):
        for case in ALL.values():
            case(np.copy)
            case(shifted)
    made = {name for path in FILES for name in cusim.kernels(path)}
    assert set(device.launched) == made and len(made) == 28


def test_no_access_is_wrong_and_no_bank_waits() -> None:
    """Every access of shared memory takes as few passes as its width needs."""
    for name, case in ALL.items():
        for place in (np.copy, shifted):
            device = cusim.Host("check", traffic=True)
            with gpu.on(device):
                case(place)
            assert all(row.conflict == 1 for row in device.traffic if row.memory == "shared"), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 70)),
    st.integers(1, 70),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.one_of(st.none(), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    st.sampled_from([1, 4, 8]),
    st.sampled_from(KINDS),
)
def test_shapes_drawn_at_random(
    shape: tuple[int, int, int, int],
    cout: int,
    kernel: int,
    stride: int,
    upsample: bool,
    pad: tuple[int, int] | None,
    unit: int,
    kind: str,
) -> None:
    up = -(-cout // unit) * unit
    conv = Conv((*shape[:3], -(-shape[3] // unit) * unit), up, kernel, stride, upsample, pad)
    if any(reference.conv_output_size(n, kernel, stride, upsample, pad) < 1 for n in shape[1:3]):
        return
    with gpu.on(cusim.Host()):
        cases.forward(conv, kind, np.copy)
        cases.backward_input(conv, kind, np.copy)


# ---------------------------------------------------------------------------------------------------------------------- rounding


def normals(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


def test_tf32_rounds_the_operands_and_nothing_else(host: cusim.Host) -> None:
    conv = Conv((2, 9, 7, 40), 24)
    x, w = normals(conv.x, (3, 3, 40, 24))
    size = cases.padded_sum(conv, np.abs(x), np.abs(w)).max()
    y = conv_mma.forward(x, w)
    assert np.abs(y - cases.padded_sum(conv, rounded(x, "tf32"), rounded(w, "tf32"))).max() < 4 * 2.0**-24 * size
    assert np.abs(y - cases.padded_sum(conv, x, w)).max() > 2.0**-15 * size
    dx = conv_mma.backward_input(y, w, conv.x)
    want = reference.conv2d_backward_input(*(rounded(a, "tf32").astype(np.float64) for a in (y, w)), conv.x)
    assert np.abs(dx - want).max() < 2.0**-20 * np.abs(want).max()


def test_bf16_rounds_the_result_once(host: cusim.Host) -> None:
    """From float32 to nearest, so what comes in both precisions differs by that."""
    conv = Conv((2, 9, 7, 40), 24)
    x, w = (pack(a) for a in normals(conv.x, (3, 3, 40, 24)))
    bias, shift = normals((24,), (2, 24))
    out = np.empty((2, 9, 7, 24), np.float32)
    residual = pack(normals(out.shape)[0])
    conv_mma.forward(x, w, bias, out=out, shift=shift, residual=residual)
    want = cases.padded_sum(conv, numbers(x), numbers(w)) + bias + shift[:, None, None] + numbers(residual)
    assert np.abs(out - want).max() < 2.0**-21 * np.abs(want).max()
    assert np.array_equal(conv_mma.forward(x, w, bias, shift=shift, residual=residual), pack(out))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(kind: str, host: cusim.Host) -> None:
    conv = CONVS["run in part"]
    x, w = np.ones(conv.x, np.float32), np.ones((3, 3, conv.x[3], conv.cout), np.float32)
    x[0, 2, 3, 5] = np.inf
    y = numbers(conv_mma.forward(stored(x, kind), stored(w, kind)))
    touched = np.zeros(y.shape, bool)
    touched[0, 1:4, 2:5] = True
    assert np.array_equal(np.isinf(y), touched) and np.isfinite(y[~touched]).all()


# ------------------------------------------------------------------------------------------------------------------ the prologue


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_normalised_once(kind: str) -> None:
    """Each pixel under a block's lines, with a row and a column around them, once for all nine taps; padding stays zero."""
    device = cusim.Host("check", traffic=True)
    batch, _, width, channels = shape = (2, 8, 8, 40)
    rng = np.random.default_rng(0)
    x, w, b = quarters(rng, *shape), quarters(rng, 3, 3, channels, 8), 1 + np.abs(quarters(rng, batch, channels))
    with gpu.on(device):
        made = conv_mma.forward(stored(x, kind), stored(w, kind), norm=(np.ones_like(b), b, False))
    want = cases.padded_sum(Conv(shape, 8), x + b[:, None, None], w)
    assert np.array_equal(made, stored(want.astype(np.float32), kind))
    assert device.launched == [f"conv_forward_{'tf32' if kind == 'tf32' else kind}_run_small"]
    stored_rows = [r for r in device.traffic if r.memory == "shared" and r.kind == "store" and r.via.startswith("common.cuh")]
    pixels = sum(min(64 * i + 64 + width + 1, 128) - max(64 * i - width - 1, 0) for i in range(2))
    assert sum(r.useful for r in stored_rows) == pixels * channels * x.itemsize // (2 if kind == "bf16" else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_norm_of_two_arrays(stride: int, kind: str, host: cusim.Host) -> None:
    rng = np.random.default_rng(2)
    x, tail, w = quarters(rng, 2, 5, 6, 32), quarters(rng, 2, 5, 6, 24), quarters(rng, 3, 3, 56, 16)
    a, b = 2.0 ** rng.integers(-1, 2, (2, 56)).astype(np.float32), quarters(rng, 2, 56)
    whole = np.concatenate([x, tail], axis=3)
    given: dict[str, Any] = {"stride": stride, "norm": (a, b, False)}
    made = conv_mma.forward(stored(x, kind), stored(w, kind), tail=stored(tail, kind), **given)
    assert np.array_equal(made, conv_mma.forward(stored(whole, kind), stored(w, kind), **given))
    want = cases.padded_sum(Conv(whole.shape, 16, 3, stride), a[:, None, None] * whole + b[:, None, None], w)
    assert np.array_equal(made, stored(want.astype(np.float32), kind))


# ----------------------------------------------------------------------------------------------------------- plans and launches


@pytest.mark.parametrize(
    ("call", "want"),
    [
        ((128 * 32 * 32, 128, 4), conv_mma.LARGE),
        ((128 * 132, 128, 4), conv_mma.LARGE),
        ((128 * 131, 128, 4), conv_mma.SMALL),  # 131 large blocks would leave a multiprocessor idle
        ((128 * 66, 256, 8), conv_mma.LARGE),
        ((1 << 20, 64, 4), conv_mma.SMALL),  # half of a large block's columns would be empty
        ((1 << 20, 65, 4), conv_mma.LARGE),
        ((64 * 66, 128, 4), conv_mma.SPLIT),
        ((64 * 66 + 1, 128, 4), conv_mma.SMALL),  # 134 small blocks
        ((64, 512, 3), conv_mma.SMALL),  # no slab for the fourth group
        ((16, 512, 8), conv_mma.SPLIT),
    ],
)
def test_kinds_of_blocks(call: tuple[int, int, int], want: conv_mma.Block) -> None:
    assert conv_mma.block_of(*call) == want


@pytest.mark.parametrize("block", [conv_mma.LARGE, conv_mma.SMALL, conv_mma.SPLIT], ids=lambda b: b.name)
def test_plans_fit(block: conv_mma.Block) -> None:
    """Runs as wide as fit; always 98 KiB at most."""
    widest = {"large": 198, "small": 294, "split": 16}[block.name]
    with cases.blocks(block):
        for width in (1, 16, 17, 64, 198, 199, 294, 295, 1 << 14):
            p = conv_mma.plan(100, 100, 4, width, True)
            assert p.way == ("run" if width <= widest else "gathered") and p.block == block and p.shared <= 98 << 10
        assert conv_mma.plan(100, 100, 4, None, True).name == f"gathered_{block.name}"
        assert conv_mma.plan(100, 100, 4, 8, False) == ("any", conv_mma.SMALL, (32 << 10) + 128)


def test_the_launcher_has_the_constants_of_the_kernels() -> None:
    text = (FOLDER / "conv_mma.cuh").read_text()
    constants = dict(re.findall(r"\b([A-Z]+) = (\d+)[,;]", text))
    assert int(constants["CHUNKS"]) * 16 == conv_mma.SLAB
    assert (int(constants["ZEROS"]), int(constants["KEPT"])) == (conv_mma.ZEROS, conv_mma.KEPT)
    kinds = re.findall(r"typedef Block<(\d), (\d), (\d)> (\w+);", text)
    made = [conv_mma.Block(n.lower(), 32 * int(t), 64 * int(t) * int(g), int(g), int(s)) for t, g, s, n in kinds]
    assert made == [conv_mma.LARGE, conv_mma.SMALL, conv_mma.SPLIT]


def test_a_result_goes_where_it_is_told(host: cusim.Host) -> None:
    x, w = (a.astype(np.float32) for a in (np.ones((1, 4, 4, 8)), np.ones((3, 3, 8, 8))))
    for kind in KINDS:
        made = conv_mma.forward(stored(x, kind), stored(w, kind))
        assert made.dtype == (BF16 if kind == "bf16" else np.float32)
        out = np.empty_like(made)
        assert conv_mma.forward(stored(x, kind), stored(w, kind), out=out) is out and np.array_equal(out, made)
        dx = conv_mma.backward_input(made, stored(w, kind), x.shape)
        assert dx.dtype == made.dtype
        assert conv_mma.backward_input(made, stored(w, kind), x.shape, out=out) is out and np.array_equal(out, dx)


def test_too_many_places_are_refused() -> None:
    x, w = np.broadcast_to(np.float32(0), (2**17, 128, 128, 8)), np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(ValueError, match=r"2\^31"), gpu.on(cusim.Host()):
        conv_mma.forward(x, w, out=np.broadcast_to(np.float32(0), x.shape))


# ------------------------------------------------------------------------------------------------------------------- instructions


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_compiler_makes_products_on_tensor_cores_and_copies_past_the_registers(path: Any, tmp_path: Any) -> None:
    try:
        cubin, _ = cuda_audit.Nvrtc().compile(cuda_audit.source(path), path.name, "sm_90")
        (tmp_path / "cubin").write_bytes(cubin)
        text = cuda_audit._tool("nvdisasm", "-c", str(tmp_path / "cubin"))
    except FileNotFoundError as e:
        pytest.skip(str(e))
    bodies = re.findall(r"\.text\.(\S+?):\n(.*?)(?=\n\.text\.|\n//-+ \.|\Z)", text, re.S)
    assert {name for name, _ in bodies} == set(cusim.kernels(path))
    for name, body in bodies:
        names = [x.name for x in cuda_sass.code(body)[0]]
        tiles = 4 if name.endswith("large") else 2
        assert names.count("HMMA") == 2 * 4 * tiles, name  # a step's: it is one loop
        assert "LDSM" in names and ("LDGSTS" in names or "any" in name), name
