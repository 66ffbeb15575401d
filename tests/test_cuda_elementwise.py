"""The CUDA kernels between the large ones, those of captured graphs, and the choice of them, on the host."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alphabar.kernels import elementwise as chosen
from alphabar.kernels import gpu, use
from alphabar.kernels.bf16 import BF16, pack, unpack
from alphabar.kernels.compile import FOLDER, source
from alphabar.kernels.gpu import elementwise, launch
from alphabar.kernels.reference.random import cos_sin, minus_2_log
from tests import cuda_audit, cusim, fake_cupy
from tests.cuda_arrays import aligned, normal
from tests.cuda_cases import CASES
from tests.cusim.probes import shifted, unwritten

pytestmark = [
    pytest.mark.skipif(not cusim.available(), reason="g++ is not installed"),
    pytest.mark.usefixtures("nothing_is_left_unwritten"),
]
FILES = [FOLDER / f"{name}.cu" for name in ("elementwise", "optim", "stepping", "random", "forward", "step", "conv")]


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    cusim.prepare(FILES)
    cusim.prepare(FILES[:3], ("check",))


@pytest.mark.parametrize("order", cusim.ORDERS)
@pytest.mark.parametrize("name", CASES)
def test_launcher_does_what_numpy_does(name: str, order: str) -> None:
    with gpu.on(cusim.Host("fast", order, 3)) as device:
        CASES[name](aligned)
        CASES[name](shifted)
    assert device.launched or "empty" in name or " 0" in name or "(0" in name


@pytest.mark.parametrize("order", ["forward", "random"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_breaks_no_rule(name: str, order: str) -> None:
    with gpu.on(cusim.Host("check", order)):
        CASES[name](aligned)
        CASES[name](shifted)


def test_wide_kernels_run_where_sizes_and_addresses_allow(host: cusim.Host) -> None:
    for shape, place, suffix in (((2, 6, 8), aligned, "wide"), ((2, 6, 8), shifted, "any"), ((2, 6, 6), aligned, "any")):
        host.launched.clear()
        x, emb = place(normal(0, *shape)), place(normal(1, shape[0], 2 * shape[2]))
        elementwise.concat(x, x), elementwise.channels(emb, shape[2], shape[2]), elementwise.add_channels(x, emb, 0, x)
        elementwise.add_columns(x[:, 0].copy() if place is aligned else place(x[:, 0]), 0, emb)
        assert host.launched == [f"{k}_{suffix}" for k in ("concat", "channels", "add_channels", "add_columns")], host.launched


@pytest.mark.parametrize("order", cusim.ORDERS)
def test_sums_have_the_same_bits_in_any_order(order: str) -> None:
    x, index = normal(0, 2, 3000, 36), np.random.default_rng(1).integers(0, 5, 6000)
    results = []
    for device in (cusim.Host(), cusim.Host("fast", order, 9)):
        with gpu.on(device):
            results.append((elementwise.sum_places(x), elementwise.sum_into_rows(x.reshape(6000, 36), index, 5)))
        assert "sum_slices" in device.launched
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a, b)


def test_no_byte_of_a_sector_is_wasted() -> None:
    device = cusim.Host("check", traffic=True)
    x, wide, image = (aligned(normal(k, *shape)) for k, shape in enumerate([(2, 40, 64), (2, 40, 128), (1, 4, 4, 32)]))
    with gpu.on(device):
        elementwise.fill(x, 1), elementwise.add(x, x, x), elementwise.concat(x, wide), elementwise.channels(wide, 32, 64)
        elementwise.add_columns(x, 64, wide), elementwise.add_channels(x, aligned(normal(4, 2, 96)), 32, x)
        elementwise.sum_places(x), elementwise.upsample(image), elementwise.upsample_backward(image)
        index = np.array([1, 0, 1, 2])
        elementwise.take_rows(x[0], index), elementwise.sum_into_rows(x[0, :4], index, 4)
    wide_accesses = [r for r in device.traffic if r.bytes == 16 and r.via.startswith("common.cuh") and r.memory == "global"]
    assert {r.kind for r in wide_accesses} == {"load", "store"}
    assert all(r.share >= 1 for r in wide_accesses), wide_accesses


def test_nor_of_bf16() -> None:
    device = cusim.Host("check", traffic=True)
    x, wide, image = (aligned(pack(normal(k, *shape))) for k, shape in enumerate([(2, 40, 64), (2, 40, 128), (1, 4, 4, 32)]))
    numbers = aligned(normal(3, 2, 40, 64))
    with gpu.on(device):
        elementwise.fill(x, 1), elementwise.add(x, x, x), elementwise.concat(x, wide), elementwise.channels(wide, 32, 64)
        elementwise.sum_places(x), elementwise.upsample(image), elementwise.upsample_backward(image)
        elementwise.cast(numbers, x), elementwise.cast(x, numbers), elementwise.weighted_sum(1, numbers, 2, numbers, numbers)
    accesses = [r for r in device.traffic if r.via.startswith("common.cuh") and r.memory == "global"]
    assert {(r.kind, r.bytes) for r in accesses} == {(kind, size) for kind in ("load", "store") for size in (8, 16)}
    assert all(r.share >= 1 for r in accesses), accesses
    assert all(r.conflict == 1 for r in device.traffic if r.memory == "shared")


# --------------------------------------------------------------------------------------------------------------- the choice


class Hosted(cusim.Host):
    xp = fake_cupy.cupy

    def launch(self, file: str, name: str, grid: tuple, block: tuple, args: tuple, shared: int = 0) -> None:
        super().launch(file, name, grid, block, tuple(map(fake_cupy.unwrap, args)), shared)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosted]:
    """Arrays of a stand-in for CuPy, and a device that takes them."""
    cupy = fake_cupy.cupy
    runtime = SimpleNamespace(getDevice=lambda: 0)
    monkeypatch.setattr(cupy, "cuda", SimpleNamespace(runtime=runtime), raising=False)
    monkeypatch.setitem(__import__("sys").modules, "cupy", cupy)
    monkeypatch.setattr(launch, "_address", lambda a: fake_cupy.unwrap(a).ctypes.data)
    monkeypatch.setattr(elementwise, "empty", lambda shape, dtype, xp: xp.asarray(unwritten(shape, dtype, np)))
    with gpu.on(Hosted()) as hosted:
        yield hosted


def calls(xp: Any) -> dict[str, Any]:
    """Every function of the module once; those that return nothing give what they have written."""
    x, wide, emb = (xp.asarray(normal(k, *shape)) for k, shape in enumerate([(2, 4, 4, 8), (2, 4, 4, 12), (2, 20)]))
    index = xp.asarray(np.array([1, 0, 2, 1]))
    made = {
        "zeros": chosen.zeros((3, 5), np.float32, xp),
        "add": chosen.add(x, x),
        "concat": chosen.concat(x, wide),
        "channels": chosen.channels(wide, 4, 8),
        "add_channels": chosen.add_channels(x, emb, 4),
        "sum_places": chosen.sum_places(x),
        "take_rows": chosen.take_rows(emb, xp.asarray(np.array([[1], [0]]))),
        "upsample": chosen.upsample(x),
        "upsample_backward": chosen.upsample_backward(x),
        "weighted_sum": chosen.weighted_sum(3, x, -2, x),
        "cast": chosen.cast(chosen.cast(x, BF16), np.float32),
    }
    chosen.add_columns(x, 4, wide)
    optional = {
        "sum_into_rows": chosen.sum_into_rows(xp.asarray(normal(4, 4, 8)), index, 3),
        "time_features": chosen.time_features(xp.asarray(np.array([1.0, 9.0])), 0.0, np.ones(3, np.float32), False),
    }
    return {**made, "add_columns": wide, **{k: v for k, v in optional.items() if v is not None}}


def test_arrays_on_a_gpu_go_to_the_kernels(device: Hosted) -> None:
    ours = calls(fake_cupy.cupy)
    with use("reference"):
        theirs = calls(np)
    t, x = np.array([[1.0], [9.0]]), normal(4, 4, 8)
    theirs["time_features"] = np.concatenate([np.sin(t).repeat(3, axis=1), np.cos(t).repeat(3, axis=1)], axis=1)
    theirs["sum_into_rows"] = np.stack([x[1], x[0] + x[3], x[2]])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name].get(), value, rtol=1e-6, atol=1e-6, err_msg=name)
    kernels = {name for name in cusim.kernels(FOLDER / "elementwise.cu") if name.endswith("_wide")} | {"time_features"}
    assert set(device.launched) - {"fill_any"} >= kernels - {"fill_wide"}


def test_other_arrays_and_the_definitions_keep_to_the_library(device: Hosted) -> None:
    with use("reference"):
        ours, theirs = calls(fake_cupy.cupy), calls(np)
    assert ours.keys() == theirs.keys() and not ours.keys() & {"sum_into_rows", "time_features"}
    x = fake_cupy.cupy.asarray(normal(0, 4, 4, 8).astype(np.float64))
    assert np.array_equal(chosen.add(x, x).get(), 2 * x.get())
    assert not device.launched


def calls_in_bf16(xp: Any) -> dict[str, Any]:
    x, wide = (xp.asarray(pack(normal(k, *shape))) for k, shape in enumerate([(2, 4, 4, 8), (2, 4, 4, 16)]))
    return {
        "zeros": chosen.zeros((3, 6), BF16, xp),
        "add": chosen.add(x, x),
        "add, over it": chosen.add(chosen.channels(x, 0, 8), x, chosen.channels(x, 0, 8)),
        "concat": chosen.concat(x, wide),
        "channels": chosen.channels(wide, 8, 8),
        "sum_places": chosen.sum_places(x),
        "upsample": chosen.upsample(x),
        "upsample_backward": chosen.upsample_backward(x),
        "cast": chosen.cast(x, np.float32),
        "cast, there": chosen.cast(x, np.float32, xp.asarray(normal(2, 2, 4, 4, 8))),
        "not cast": chosen.cast(x, BF16),
    }


def test_so_do_arrays_of_bf16(device: Hosted) -> None:
    ours = calls_in_bf16(fake_cupy.cupy)
    x, wide = unpack(pack(normal(0, 2, 4, 4, 8))), unpack(pack(normal(1, 2, 4, 4, 16)))
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    theirs = {
        "zeros": np.zeros((3, 6)),
        **dict.fromkeys(("add", "add, over it"), 2 * x),
        "concat": np.concatenate([x, wide], axis=-1),
        "channels": wide[..., 8:],
        "sum_places": x.sum(axis=(1, 2)),
        "upsample": doubled,
        "upsample_backward": x.reshape(2, 2, 2, 2, 2, 8).sum(axis=(2, 4)),
        **dict.fromkeys(("cast", "cast, there", "not cast"), x),
    }
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        made = ours[name].get()
        assert made.dtype == (np.float32 if "sum_p" in name or name.startswith("cast") else BF16)
        made, close = (unpack(made), 2.0**-8) if made.dtype == BF16 else (made, 1e-6)
        np.testing.assert_allclose(made, value, rtol=close, atol=1e-6, err_msg=name)
    assert {"add_wide_bf16", "sum_places_wide_bf16", "upsample_backward_wide_bf16", "to_float_wide"} <= set(device.launched)
    copies = {"concat_wide", "channels_wide", "upsample_wide"}  # of half as many floats
    assert copies <= set(device.launched) and {"fill_wide", "fill_any"} & set(device.launched)


def test_bits_are_not_taken_for_integers(device: Hosted) -> None:
    x, numbers = (fake_cupy.cupy.asarray(a) for a in (pack(normal(0, 4, 4, 8)), normal(1, 4, 4, 8)))
    refused = {
        "some of the arrays": lambda: chosen.add(x, x, numbers),
        "not contiguous": lambda: chosen.add(x[:, ::2], x[:, ::2]),
        "no kernel": lambda: chosen.add_columns(x, 0, x),
        "no such sum": lambda: chosen.weighted_sum(1, x, 1, x),
    }
    for name, call in refused.items():
        with pytest.raises(TypeError, match="bfloat16 is for some of a GPU's own kernels"):
            call()
            pytest.fail(name)
    with use("reference"), pytest.raises(TypeError, match="bfloat16 is for some"):
        chosen.sum_places(x)
    for wrong, dtype in ((numbers, np.float64), (numbers.astype(np.float64), BF16)):
        with pytest.raises(TypeError, match="a cast is from float32 to bfloat16"):
            chosen.cast(wrong, dtype)
    assert not device.launched


def test_every_number_of_16_bits_and_what_lies_between(host: cusim.Host) -> None:
    every = np.arange(1 << 16, dtype=BF16)
    numbers = elementwise.cast(every, np.empty(every.size, np.float32))
    assert np.array_equal(numbers.view(np.uint32), every.astype(np.uint32) << 16)
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        between = (every.astype(np.uint32) << 16 | np.uint32(lower)).view(np.float32)
        for x, out in ((between, every.copy()), (shifted(between), shifted(every))):
            made, number = elementwise.cast(x, out), ~np.isnan(between)
            assert np.array_equal(made[number], pack(between)[number]) and np.isnan(unpack(made[~number])).all()


OLDER = """#define __CUDA_ARCH__ 750
#include "common.cuh"
extern "C" __global__ void pairs(const float* x, unsigned* out) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}
"""


def test_pairs_on_gpus_without_the_instruction(tmp_path: Path) -> None:
    (tmp_path / "common.cuh").write_text((FOLDER / "common.cuh").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "older.cu").write_text(OLDER)
    x, out = normal(0, 512), np.zeros(256, np.uint32)
    x[5] = np.nan
    cusim.Module(tmp_path / "older.cu").launch("pairs", (2,), (128,), (x, out))
    made = out.view(BF16)
    assert np.isnan(unpack(made[5:6])) and np.array_equal(np.delete(made, 5), np.delete(pack(x), 5))


# ---------------------------------------------------------------------------------------------------------- captured graphs


def test_replays_with_a_counter_have_the_bits_of_calls_with_numbers(host: cusim.Host) -> None:
    x, levels = normal(0, 3, 50), (np.linspace(1, 0.1, 9), np.linspace(0, 1, 9))
    rows = np.random.default_rng(1).uniform(-1, 1, (6, 13))
    state, want_state, t, key = x.copy(), x.copy(), np.array([2, 5, 8]), {"seed": 7, "stream": 3, "first_sample": 4}
    counter = np.array([2], np.int32)
    for k in range(2, 6):
        want = gpu.normals(np.empty_like(x), step=k, **key), *gpu.q_sample(x, t, *levels, step=k, **key)
        want_state = gpu.step(want_state, x, rows, k, (x,), noise=True, clip=(-1, 1), **key)
        with gpu.counted(counter):  # the same numbers each time
            made = gpu.normals(np.empty_like(x), step=0, **key), *gpu.q_sample(x, t, *levels, step=0, **key)
            state = gpu.step(state, x, rows, 0, (x,), noise=True, clip=(-1, 1), **key)
        gpu.count(counter)
        for a, b in zip((*made, state), (*want, want_state), strict=True):
            assert np.array_equal(a, b)
    assert counter == 6


def test_a_counter_moves_rows_without_noise(host: cusim.Host) -> None:
    x, rows = normal(0, 2, 40), np.random.default_rng(1).uniform(-1, 1, (4, 13))
    with gpu.counted(np.array([3], np.int32)):
        made = gpu.step(x, x, rows, 0)
    assert np.array_equal(made, gpu.step(x, x, rows, 3))


def test_a_counter_is_one_int32() -> None:
    for wrong in (np.zeros(2, np.int32), np.zeros(1, np.int64)):
        with pytest.raises(ValueError, match="counter must be an int32 array of one element"), gpu.counted(wrong):
            pass
    assert launch.counter() is None


# ------------------------------------------------------------------------------------------------------ epilogues


@pytest.mark.parametrize("place", [aligned, shifted])
@pytest.mark.parametrize("cout", [8, 5])
def test_a_convolution_adds_what_is_given_in_one_kernel(cout: int, place: Any, host: cusim.Host) -> None:
    x, w = place(normal(0, 3, 5, 4, 8)), place(normal(1, 3, 3, 8, cout))
    bias, shift, residual = place(normal(2, cout)), place(normal(3, 3, cout)), place(normal(4, 3, 5, 4, cout))
    plain = gpu.conv2d(x, w, out=place(residual))
    host.launched.clear()
    want = plain + bias + shift[:, None, None] + residual
    into = place(residual)
    assert gpu.conv2d(x, w, bias, shift=shift, residual=into, out=into) is into  # the residual's memory takes the result
    np.testing.assert_array_equal(into, want)
    np.testing.assert_array_equal(gpu.conv2d(x, w, shift=shift, out=place(residual)), plain + shift[:, None, None])
    suffix = "wide" if place is aligned and cout == 8 else "any"
    assert host.launched == [f"conv_forward_{suffix}"] * 2


# ------------------------------------------------------------------------------------------------------ normals


ALL_WORDS = """
#include "random.cuh"
extern "C" __global__ void all_radii(unsigned from, float* radius) {
  unsigned k = blockIdx.x * blockDim.x + threadIdx.x;
  radius[k] = root_of_minus(log_2((from + k) << 8 | k % 256));
}
extern "C" __global__ void all_angles(unsigned from, unsigned octant, float* c, float* s) {
  unsigned k = blockIdx.x * blockDim.x + threadIdx.x;
  float2 angle = cos_sin(octant << 29 | (from + k) << 5 | k % 32);
  c[k] = angle.x, s[k] = angle.y;
}
"""


@pytest.fixture
def all_words(tmp_path: Path) -> Path:
    for name in ("common.cuh", "random.cuh"):
        (tmp_path / name).write_text((FOLDER / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "words.cu").write_text('#include "common.cuh"\n' + ALL_WORDS.lstrip())
    return tmp_path / "words.cu"


def test_every_word_has_the_radius_and_the_angle_of_the_definition(all_words: Path) -> None:
    module, n = cusim.Module(all_words), 1 << 20
    k, made, other = np.arange(n, dtype=np.uint32), np.empty(n, np.float32), np.empty(n, np.float32)
    for from_ in range(0, 1 << 24, n):
        module.launch("all_radii", (n // 256,), (256,), (np.uint32(from_), made))
        radius = np.sqrt(minus_2_log((np.uint32(from_) + k) << np.uint32(8) | k % np.uint32(256)))
        assert np.array_equal(made.view(np.uint32), radius.view(np.uint32))  # -0 where u is 1
        octant = from_ // n % 8
        module.launch("all_angles", (n // 256,), (256,), (np.uint32(from_), np.uint32(octant), made, other))
        angle = cos_sin(np.uint32(octant << 29) | (np.uint32(from_) + k) << np.uint32(5) | k % np.uint32(32))
        for ours, defined in zip((made, other), angle, strict=True):
            assert np.array_equal(ours.view(np.uint32), defined.view(np.uint32))


def test_the_root_is_the_librarys_own_sequence(all_words: Path) -> None:
    """Rounding to the nearest is promised for the library's root: without its test of the range, ours takes the same steps."""
    library = 'extern "C" __global__ void root(float* x) { *x = __fsqrt_rn(*x); }'
    ours = '#include "random.cuh"\nextern "C" __global__ void root(float* x) { *x = root_of_minus(*x); }'
    try:
        compiler = cuda_audit.Nvrtc()
    except FileNotFoundError as e:
        pytest.skip(str(e))
    for architecture in cuda_audit.ARCHITECTURES:
        steps = []
        for text in (library, ours):
            all_words.write_text(f'#include "common.cuh"\n{text}')
            cubin, _ = compiler.compile(source(all_words), "root.cu", architecture)
            (all_words.parent / "root.cubin").write_bytes(cubin)
            assembly = cuda_audit._tool("nvdisasm", "-c", str(all_words.parent / "root.cubin"))
            operations = re.findall(r"\b(MUFU\.RSQ|FMUL|FFMA|CALL)\b", assembly.partition(".text.root:")[2])
            steps.append(tuple(operations[operations.index("MUFU.RSQ") :][:6]))
        assert set(steps[1]) == {"MUFU.RSQ", "FMUL", "FFMA"} and len(steps[1]) == 5, steps
        assert [o for o in steps[0] if o != "CALL"][:5] == list(steps[1]), steps
