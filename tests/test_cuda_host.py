"""The CUDA kernels and their launchers, run on the host: the same ``.cu`` files through g++, in three orders of their threads."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphabar.kernels import TABLE, accuracy, buffers, gpu, reference
from alphabar.kernels.compile import FOLDER
from alphabar.kernels.gpu import attend, conv, diffusion, discrete, launch, norm, optim, tokens
from alphabar.kernels.streams import SAMPLER
from tests import cusim

pytestmark = pytest.mark.skipif(not cusim.available(), reason="g++ is not installed")
LAUNCHERS = (attend, conv, diffusion, discrete, norm, optim, tokens)
FILES = sorted(FOLDER.glob("*.cu"))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    cusim.prepare(FILES)


def unwritten(shape: tuple[int, ...], dtype: Any, xp: Any) -> np.ndarray:
    return np.full(shape, np.nan if np.dtype(dtype).kind == "f" else -7, dtype)


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element that no thread writes must show."""
    for module in LAUNCHERS:
        monkeypatch.setattr(module, "empty", unwritten)


@pytest.fixture
def host() -> Iterator[cusim.Host]:
    with gpu.on(cusim.Host()) as device:
        yield device


def launcher(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    return getattr(gpu, name)(*args, **kwargs)


def shifted(a: np.ndarray) -> np.ndarray:
    """A copy that begins 4 bytes past a multiple of 16."""
    if a.dtype != np.float32:
        return a
    buffer = np.empty(a.size + 8, np.float32)
    start = (-buffer.ctypes.data // 4) % 4 + 1
    copy = buffer[start : start + a.size].reshape(a.shape)
    copy[...] = a
    return copy


def shifted_launcher(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    new_args, new_kwargs = accuracy.map_arrays(shifted, (args, kwargs))
    result = getattr(gpu, name)(*new_args, **new_kwargs)
    for old, new in [*zip(args, new_args, strict=True), *((kwargs[k], new_kwargs[k]) for k in kwargs)]:
        if isinstance(old, np.ndarray):
            old[...] = new  # what the kernel wrote in place
    return result


@pytest.mark.parametrize("name", TABLE)
def test_a_launcher_has_the_parameters_of_its_definition(name: str) -> None:
    ours, defined = (inspect.signature(getattr(m, name)).parameters for m in (gpu, reference))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [(p.name, p.default, p.kind) for p in defined.values()]


@pytest.mark.parametrize("order", cusim.ORDERS)
@pytest.mark.parametrize("name", TABLE)
def test_kernel_is_its_definition(name: str, order: str) -> None:
    kernel = TABLE[name]
    for seed, case in enumerate(accuracy.all_cases(kernel)):
        with gpu.on(cusim.Host("fast", order, seed + 1)):
            for error in accuracy.errors(kernel, case, launcher, seed):
                assert error.within, (case, error)


@pytest.mark.parametrize("name", TABLE)
def test_kernel_takes_arrays_that_are_not_aligned(name: str, host: cusim.Host) -> None:
    kernel = TABLE[name]
    for case in accuracy.all_cases(kernel):
        for error in accuracy.errors(kernel, case, shifted_launcher):
            assert error.within, (case, error)
    assert not [launched for launched in host.launched if launched.endswith("_wide")]


def test_the_cases_reach_every_kernel_of_every_file(host: cusim.Host) -> None:
    for kernel in TABLE.values():
        for case in accuracy.all_cases(kernel):
            for call in (launcher, shifted_launcher):
                call(kernel.name, *accuracy.arguments(kernel, case))
    exported = {name for path in FILES for name in cusim.kernels(path)}
    assert exported == set(host.launched)


@pytest.mark.parametrize("order", cusim.ORDERS)
def test_the_same_call_gives_the_same_bits_in_any_order(order: str) -> None:
    for name in (
        "group_norm_silu_backward",
        "conv2d_backward_weight",
        "attention_backward",
        "layer_norm_backward",
        "sum_squares",
    ):
        case = TABLE[name].tests[1]
        results = []
        for device in (cusim.Host(), cusim.Host("fast", order, 5)):
            with gpu.on(device):
                results.append(launcher(name, *accuracy.arguments(TABLE[name], case)))
        a, b = (r if isinstance(r, tuple) else (r,) for r in results)
        assert all(np.array_equal(p, q) for p, q in zip(a, b, strict=True) if p is not None)


# ------------------------------------------------------------------------------------------------------------- random numbers


GOLDEN = json.loads((Path(__file__).parent / "data" / "noise_hashes.json").read_text())["cases"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: "x".join(map(str, c["shape"])))
def test_normals_have_the_golden_bits(case: dict[str, Any], host: cusim.Host) -> None:
    out = np.empty(case["shape"], np.float32)
    gpu.normals(out, case["seed"], case["step"], case["stream"], case["first_sample"])
    assert hashlib.sha256(out.astype("<f4").tobytes()).hexdigest() == case["sha256"]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 255, 256, 257, 259, 511, 512, 1020, 1023, 1024, 1025, 1279, 2048, 5000])
def test_normals_of_any_sample_size_have_the_bits_of_the_definition(size: int, host: cusim.Host) -> None:
    ours, defined = (np.full((3, size), np.nan, np.float32) for _ in range(2))
    key = {"seed": 2**63 + size, "step": 2**32 - 1, "stream": 4, "first_sample": 2**32 - 2}
    assert gpu.normals(ours, **key) is ours
    assert np.array_equal(ours.view(np.uint32), reference.normals(defined, **key).view(np.uint32))


def test_a_million_normals_have_the_bits_of_the_definition(host: cusim.Host) -> None:
    ours, defined = (np.empty((1, 1 << 20), np.float32) for _ in range(2))
    gpu.normals(ours, 3), reference.normals(defined, 3)
    assert np.array_equal(ours.view(np.uint32), defined.view(np.uint32))


def test_the_noise_that_a_kernel_makes_is_that_of_normals(host: cusim.Host) -> None:
    zero = np.zeros((2, 6, 7, 5), np.float32)
    z = gpu.normals(zero.copy(), 9, 4, SAMPLER, 3)
    rows = np.zeros((5, 13))
    rows[4, 9] = 1  # c, the factor of z
    assert np.array_equal(gpu.step(zero, zero, rows, 4, noise=True, seed=9, first_sample=3), z)
    levels = (np.zeros(3), np.ones(3))
    x_t, eps = gpu.q_sample(zero, np.array([1, 2]), *levels, seed=9, step=4, stream=SAMPLER, first_sample=3)
    assert np.array_equal(x_t, z) and np.array_equal(eps, z)


# ------------------------------------------------------------------------------------------------------------------ edges


def test_step_may_write_over_what_it_reads(host: cusim.Host) -> None:
    rng = np.random.default_rng(0)
    x, m, y1, y2 = (rng.standard_normal((2, 40)).astype(np.float32) for _ in range(4))
    rows = rng.uniform(-1, 1, (3, 13))
    store = np.empty_like(x)
    want = reference.step(x, m, rows, 1, (y1, y2), store=store)
    got = gpu.step(x, m, rows, 1, (y1, y2), out=x, store=y2)
    assert got is x
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y2, store, rtol=1e-5, atol=1e-6)


def test_a_device_counter_moves_the_row_and_the_noise(host: cusim.Host) -> None:
    rng = np.random.default_rng(0)
    x, m = (rng.standard_normal((2, 64)).astype(np.float32) for _ in range(2))
    rows = rng.uniform(-1, 1, (4, 13)).astype(np.float32)
    out = np.empty_like(x)
    sizes, limits = (np.int32(32), np.int32(16), np.int32(64)), (np.int32(0), np.float32(0), np.float32(0))
    draw = (np.uint32(8), np.uint32(0), np.uint32(SAMPLER), np.uint32(0))
    counter = np.array([2], np.int32)
    args = (x, m, rows, np.int32(1), np.uint32(1), counter, None, None, None, None, None, *limits, out, None, *sizes, *draw)
    host.launch("step", "step_made_wide", (1,), (64,), args)
    assert np.array_equal(out, gpu.step(x, m, rows, 3, noise=True, seed=8))


def test_a_time_without_a_level_gives_nan(host: cusim.Host) -> None:
    levels = np.ones(4), np.ones(4)
    x_t, _ = gpu.q_sample(np.ones((3, 8), np.float32), np.array([0, 4, -1]), *levels)
    assert np.isfinite(x_t[0]).all() and np.isnan(x_t[1:]).all()


def test_times_of_any_integer_dtype(host: cusim.Host) -> None:
    x, levels = np.ones((2, 8), np.float32), (np.arange(5.0), np.zeros(5))
    for dtype in ("uint8", "int16", "int32", "uint64"):
        x_t, _ = gpu.q_sample(x, np.array([3, 1], dtype), *levels)
        assert np.array_equal(x_t[:, 0], [3, 1])


def test_what_is_not_a_number_stays_so(host: cusim.Host) -> None:
    x, one = np.full((1, 8), np.nan, np.float32), np.ones((1, 8), np.float32)
    rows = np.zeros((1, 13))
    rows[0, [0, 3]] = 1  # x' = clip(x)
    assert np.isnan(gpu.step(x, one, rows, 0, clip=(-1, 1))).all()
    flats = [np.ones(8, np.float32) for _ in range(5)]
    gpu.adamw_ema(*flats, 1e-3, 0.9, 0.99, 1e-8, 0, 1, 0.9, norm_sq=np.array([np.nan]), max_norm=1.0)
    assert np.isnan(flats[0]).all() and np.isnan(flats[4]).all()


def test_the_gradient_norm_may_be_beyond_float32(host: cusim.Host) -> None:
    ours, defined = ([np.ones(8, np.float32) for _ in range(5)] for _ in range(2))
    ours[1] *= 1e30
    defined[1] *= 1e30
    rest = (1e-3, 0.9, 0.99, 1e-8, 0, 1, 0.9, np.array([8e60]), 1.0)
    gpu.adamw_ema(*ours, *rest)
    reference.adamw_ema(*defined, *rest)
    for a, b in zip(ours, defined, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_attention_of_heads_too_long_for_the_kernel_is_the_definition(host: cusim.Host) -> None:
    rng = np.random.default_rng(0)
    q, k, v, do = (rng.standard_normal((1, 5, 1, 300)).astype(np.float32) for _ in range(4))
    o, lse = gpu.attention(q, k, v)
    assert np.array_equal(o, reference.attention(q, k, v)[0])
    for a, b in zip(gpu.attention_backward(do, q, k, v, o, lse), reference.attention_backward(do, q, k, v, o, lse), strict=True):
        assert np.array_equal(a, b)
    assert not host.launched


def test_scores_far_apart_do_not_overflow(host: cusim.Host) -> None:
    q, k, v = (np.zeros((1, 70, 1, 4), np.float32) for _ in range(3))
    q[..., 0], k[0, :, 0, 0], v[0, :, 0, 0] = 200, np.linspace(-200, 200, 70), np.arange(70)
    o, lse = gpu.attention(q, k, v)
    want, want_lse = reference.attention(*(a.astype(np.float64) for a in (q, k, v)))
    np.testing.assert_allclose(o, want, rtol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


def test_statistics_of_data_far_from_zero_do_not_cancel(host: cusim.Host) -> None:
    x = (1000 + np.random.default_rng(0).standard_normal((2, 16, 16, 8))).astype(np.float32)
    _, mean, rstd = gpu.group_norm_silu(x, np.ones(8, np.float32), np.zeros(8, np.float32), 2)
    _, want_mean, want_rstd = reference.group_norm_silu(x.astype(np.float64), np.ones(8), np.zeros(8), 2)
    np.testing.assert_allclose(mean, want_mean, rtol=2e-7)
    np.testing.assert_allclose(rstd, want_rstd, rtol=1e-5)


def test_results_come_from_the_pool(host: cusim.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in LAUNCHERS:
        monkeypatch.setattr(module, "empty", buffers.empty)
    args, kwargs = accuracy.arguments(TABLE["conv2d"], TABLE["conv2d"].tests[1])
    pool = buffers.Pool()
    with pool:
        first = gpu.conv2d(*args, **kwargs).ctypes.data
        held = pool.nbytes
        assert gpu.conv2d(*args, **kwargs).ctypes.data == first and pool.nbytes == held > 0


def test_too_many_elements_are_refused() -> None:
    x = np.broadcast_to(np.float32(0), (2**20, 2**16))
    with pytest.raises(ValueError, match=r"2\^31"), gpu.on(cusim.Host()):
        gpu.normals(x, 0)


# ---------------------------------------------------------------------------------------------------- the device's arguments


def test_a_table_that_cannot_change_is_sent_once() -> None:
    class Library:
        """Counts what is sent to a device."""

        sent = 0
        __name__ = "library"

        class cuda:
            class runtime:
                @staticmethod
                def getDevice() -> int:
                    return 0

        def asarray(self, a: np.ndarray) -> list[np.ndarray]:
            self.sent += 1
            return [a]

    device = cusim.Host()
    library = device.xp = Library()  # type: ignore[assignment, misc]
    frozen, open_ = np.ones((3, 13)), np.ones((3, 13))
    frozen.setflags(write=False)
    for _ in range(3):
        launch.table(device, frozen)
    assert library.sent == 1 and len(launch._tables) == 1
    launch.table(device, open_), launch.table(device, open_)
    assert library.sent == 3
    del frozen
    assert not launch._tables


def test_arguments_must_have_the_type_of_their_parameter(host: cusim.Host) -> None:
    out, sizes, draw = np.empty(4, np.float32), (np.int32(1), np.int32(1), np.int32(4)), (np.uint32(0),) * 5
    host.launch("random", "normals_any", (1,), (32,), (out, *sizes, *draw))
    with pytest.raises(TypeError, match="argument 1 is int, the kernel takes int32"):
        host.launch("random", "normals_any", (1,), (32,), (out, 1, *sizes[1:], *draw))
    with pytest.raises(TypeError, match="argument 0 is a float64 array"):
        host.launch("random", "normals_any", (1,), (32,), (out.astype(np.float64), *sizes, *draw))
    with pytest.raises(TypeError, match="8 arguments for 9"):
        host.launch("random", "normals_any", (1,), (32,), (out, *sizes, *draw[1:]))
    with pytest.raises(AttributeError, match="no kernel"):
        host.launch("random", "normal", (1,), (32,), ())
