"""The CUDA kernels and their launchers, run on the host: the same ``.cu`` files through g++, in three orders of their threads."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from alphabar.kernels import TABLE, accuracy, buffers, gpu, reference
from alphabar.kernels.compile import FOLDER
from alphabar.kernels.gpu import conv, discrete, elementwise, launch
from alphabar.kernels.recording import NotCapturable
from alphabar.kernels.reference.discrete import uniform
from alphabar.kernels.reference.random import words
from alphabar.kernels.streams import SAMPLER
from tests import cuda_arrays, cuda_cases, cusim
from tests.cusim.probes import launcher, shifted, shifted_launcher

pytestmark = [
    pytest.mark.skipif(not cusim.available(), reason="g++ is not installed"),
    pytest.mark.usefixtures("nothing_is_left_unwritten"),
]
FILES = sorted(FOLDER.glob("*.cu"))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    cusim.prepare(FILES)


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
    for other in cuda_cases.EVERY.values():
        other(cuda_arrays.aligned), other(shifted)
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
        "squared_error",
        "cross_entropy",
        "softmax_backward",
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
    sizes, limits = (np.int32(32), np.int32(16), np.int32(64)), (np.float32(-np.inf), np.float32(np.inf))
    draw = (np.uint32(8), np.uint32(0), np.uint32(SAMPLER), np.uint32(0))
    counter = np.array([2], np.int32)
    row = (np.int32(1), np.int32(3), np.uint32(1))
    args = (x, m, rows, *row, counter, None, None, None, None, None, None, *limits, out, None, *sizes, *draw)
    host.launch("step", "step_made_wide", (1,), (64,), args)
    assert np.array_equal(out, gpu.step(x, m, rows, 3, noise=True, seed=8))


@pytest.mark.parametrize("shape", [(2, 64), (3, 37)])
def test_a_step_reads_its_seed_and_its_samples_from_the_device(shape: tuple[int, int], host: cusim.Host) -> None:
    rng = np.random.default_rng(0)
    x, m = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    rows = rng.uniform(-1, 1, (4, 13)).astype(np.float32)
    seed, counter = (7 << 32) + 8, np.array([2], np.int32)
    with gpu.counted(counter, np.array([8, 7, 5], np.uint32)):
        ours = gpu.step(x, m, rows, 1, noise=True)
        with pytest.raises(NotCapturable, match="only step reads its seed"):
            gpu.normals(np.empty_like(x), 8)
    assert np.array_equal(ours, gpu.step(x, m, rows, 3, noise=True, seed=seed, first_sample=5))
    assert not np.array_equal(ours, gpu.step(x, m, rows, 3, noise=True, seed=8, first_sample=5))
    assert not np.array_equal(ours, gpu.step(x, m, rows, 3, noise=True, seed=seed))
    with (
        pytest.raises(ValueError, match="words must be an uint32 array of 3 elements"),
        gpu.counted(counter, np.zeros(2, np.uint32)),
    ):
        pass


def test_beyond_its_table_a_step_stays_at_the_last_row(host: cusim.Host) -> None:
    rng = np.random.default_rng(0)
    x, m = (rng.standard_normal((2, 64)).astype(np.float32) for _ in range(2))
    rows = rng.uniform(-1, 1, (4, 13)).astype(np.float32)
    last = gpu.step(x, m, rows, 3)
    for beyond in (0, 1, 9):
        with gpu.counted(np.array([3 + beyond], np.int32)):
            assert np.array_equal(gpu.step(x, m, rows, 0), last)


def test_a_device_counter_moves_the_draws_of_states(host: cusim.Host) -> None:
    rng = np.random.default_rng(0)
    logits, x_t = rng.standard_normal((2, 300, 9)).astype(np.float32), rng.integers(0, 9, (2, 300)).astype(np.int32)
    rows, keep, t = rng.uniform(0, 1, (5, 4)), np.linspace(1, 0, 5), np.array([2, 4])
    counter = np.array([2], np.int32)
    with gpu.counted(counter):
        ours = (
            gpu.categorical(logits, 8, step=1),
            gpu.categorical_posterior(logits, x_t, rows, 1, seed=8),
            gpu.categorical_q_sample(x_t, t, keep, 9, seed=8, step=1),
        )
    wanted = (
        gpu.categorical(logits, 8, step=3),
        gpu.categorical_posterior(logits, x_t, rows, 3, seed=8),
        gpu.categorical_q_sample(x_t, t, keep, 9, seed=8, step=3),
    )
    assert all(np.array_equal(a, b) for a, b in zip(ours, wanted, strict=True))
    assert not np.array_equal(ours[0], gpu.categorical(logits, 8, step=1))


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


@pytest.mark.parametrize("columns", [7, 300, 2000])
def test_a_label_that_is_no_state_gives_nan(columns: int, host: cusim.Host) -> None:
    z = np.random.default_rng(0).standard_normal((4, columns)).astype(np.float32)
    labels = np.array([columns - 1, columns, -1, 0])
    value, gradient = gpu.cross_entropy(z, labels)
    want = reference.cross_entropy(z, labels)
    assert np.isnan(want[0][1:3]).all() and np.isnan(want[1][1:3]).all()
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, want[1], atol=1e-7)


@pytest.mark.parametrize("columns", [3, 64, 100, 1024, 1500, 20_000])
def test_losses_and_softmax_may_write_over_what_they_read(columns: int, host: cusim.Host) -> None:
    rng = np.random.default_rng(columns)
    a, b = rng.standard_normal((2, 5, columns)).astype(np.float32)
    y, labels = reference.softmax(b), rng.integers(0, columns, 5)
    for call in (
        lambda out: gpu.squared_error(a if out is None else out, b, out=out)[1],
        lambda out: gpu.cross_entropy(a if out is None else out, labels, out=out)[1],
        lambda out: gpu.softmax(a if out is None else out, out=out),
        lambda out: gpu.softmax_backward(a if out is None else out, y, out=out),
    ):
        assert np.array_equal(call(a.copy()), call(None))


def test_rows_without_a_finite_largest_are_not_numbers(host: cusim.Host) -> None:
    for columns in (7, 300, 2000):
        x = np.full((3, columns), -np.inf, np.float32)
        x[1, 1], x[2, 1] = np.inf, np.nan
        assert np.isnan(gpu.softmax(x)).all() and np.isnan(gpu.cross_entropy(x, np.zeros(3, np.int64))[0]).all()


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


@pytest.mark.parametrize("channels", [24, 30, 1040, 1041])
def test_statistics_of_tokens_far_from_zero_do_not_cancel(channels: int, host: cusim.Host) -> None:
    x = (1000 + np.random.default_rng(0).standard_normal((2, 5, channels))).astype(np.float32)
    _, mean, rstd = gpu.layer_norm(x, np.ones(channels, np.float32), np.zeros(channels, np.float32))
    _, want_mean, want_rstd = reference.layer_norm(x.astype(np.float64), np.ones(channels), np.zeros(channels))
    np.testing.assert_allclose(mean, want_mean, rtol=2e-7)
    np.testing.assert_allclose(rstd, want_rstd, rtol=1e-5)


@pytest.mark.parametrize("size", [256, 512, 768, 1280])
def test_samples_may_end_with_a_run(size: int, host: cusim.Host) -> None:
    """Where a thread's next run begins, the next sample does."""
    rng = np.random.default_rng(0)
    x, m = (rng.standard_normal((3, size)).astype(np.float32) for _ in range(2))
    levels, t = (np.linspace(1, 0.1, 9), np.linspace(0, 0.9, 9)), np.array([3, 1, 8])
    for a, b in zip(gpu.q_sample(x, t, *levels, seed=3), reference.q_sample(x, t, *levels, seed=3), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    rows = rng.uniform(-1, 1, (2, 13))
    np.testing.assert_allclose(
        gpu.step(x, m, rows, 1, noise=True, seed=3), reference.step(x, m, rows, 1, noise=True, seed=3), rtol=1e-5, atol=1e-6
    )


def test_states_among_many_tell_the_weights_apart(host: cusim.Host) -> None:
    """A thousand thresholds to a draw: a weight that is off by 1e-5 of itself moves some of the states."""
    logits = np.zeros((1, 4000, 1000), np.float32)
    logits[..., 500:] = np.r_[-np.linspace(0.25, 6.0, 1000), np.full(3000, -0.3465)].astype(np.float32)[:, None]
    assert np.array_equal(gpu.categorical(logits, 5), reference.categorical(logits, 5))


def test_a_warp_may_draw_several_elements(host: cusim.Host) -> None:
    """As it does where there are more elements than warps are wanted."""
    with mock.patch.object(discrete, "ENOUGH_WARPS", 4), mock.patch.object(discrete, "blocks", lambda _: (1,)):
        for name in ("categorical", "categorical_posterior"):
            for case in TABLE[name].tests:
                for error in accuracy.errors(TABLE[name], case, launcher):
                    assert error.within, (name, case, error)


def test_the_last_warp_may_draw_fewer_elements(host: cusim.Host) -> None:
    for device in (host, cusim.Host("check")):
        with mock.patch.object(discrete, "ENOUGH_WARPS", 1), gpu.on(device):
            for name in ("categorical", "categorical_posterior"):
                assert all(e.within for e in accuracy.errors(TABLE[name], {"shape": (1, 5, 3)}, launcher))


@pytest.mark.parametrize("columns", [5, 70])
def test_a_mask_among_the_columns_is_never_drawn(columns: int, host: cusim.Host) -> None:
    rng = np.random.default_rng(columns)
    logits = rng.standard_normal((2, 300, columns)).astype(np.float32)
    logits[..., 1] += 100  # the only one, were it not the mask
    logits[..., 32:] -= 100
    x_t = np.full((2, 300), 1, np.int32)
    rows = np.array([(0, 0, 0, 0), (0, 0, 0.8, 0.1)])
    drawn = gpu.categorical_posterior(logits, x_t, rows, 1, mask=1, seed=7)
    assert np.array_equal(drawn, reference.categorical_posterior(logits, x_t, rows, 1, mask=1, seed=7))


@pytest.mark.parametrize("mask", [-1, 0, 5])
def test_states_times_and_rows_of_every_kind(mask: int, host: cusim.Host) -> None:
    """States and times that there are not give -1; the mask may be state 0; every row of a table is another."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 40, 5)).astype(np.float32)
    x_t = rng.integers(-2, 8, (6, 40)).astype(np.int32)
    rows = np.array([(0.9, 0.02, 0.3, 0.05), (0.5, 0.1, 0.6, 0.08), (0.2, 0.16, 0.5, 0.1), (0.7, 0.06, 0.2, 0.4)])
    for index in range(4):
        with mock.patch.object(discrete, "ENOUGH_WARPS", 16):
            drawn = gpu.categorical_posterior(logits, x_t, rows, index, mask=mask, seed=index)
        assert np.array_equal(drawn, reference.categorical_posterior(logits, x_t, rows, index, mask=mask, seed=index))
    x0, t = rng.integers(0, 5, (6, 40)).astype(np.int32), np.array([-1, 0, 2, 3, 4, 10**12])
    keep = np.array([1.0, 0.75, 0.5, 0.25])
    drawn = gpu.categorical_q_sample(x0, t, keep, 5, mask=mask, seed=2)
    assert (drawn[[0, 4, 5]] == -1).all()
    assert np.array_equal(drawn[1:4], reference.categorical_q_sample(x0, np.clip(t, 0, 3), keep, 5, mask=mask, seed=2)[1:4])


def test_sums_over_places_of_several_samples_in_slices_and_tiles(host: cusim.Host) -> None:
    x = np.random.default_rng(0).standard_normal((3, 1100, 200)).astype(np.float32)
    for place in (np.copy, shifted):
        np.testing.assert_allclose(elementwise.sum_places(place(x)), x.sum(axis=1, dtype=np.float64), rtol=0, atol=1e-4)


def test_a_draw_at_its_threshold(host: cusim.Host) -> None:
    """The probability to stay is the next number above the uniform: a change of the last bit moves the state."""
    u = uniform(words((6, 1), 11, 4, 0, 0)).ravel()
    keep, x0 = np.nextafter(u, np.float32(1)), np.zeros((6, 1), np.int32)
    options = {"mask": 9, "seed": 11, "step": 4, "stream": 0, "first_sample": 0}
    for table, state in ((keep, 0), (u, 9)):
        drawn = gpu.categorical_q_sample(x0, np.arange(6), table, 9, **options)
        assert (drawn == state).all()
        assert np.array_equal(drawn, reference.categorical_q_sample(x0, np.arange(6), table, 9, **options))


@pytest.mark.parametrize("columns", [6, 40, 64, 300, 1024, 2000])
def test_neighbouring_rows_of_very_different_sizes(columns: int, host: cusim.Host) -> None:
    rng = np.random.default_rng(columns)
    x = rng.standard_normal((9, columns)).astype(np.float32) + 300 * np.arange(9, dtype=np.float32)[:, None]
    x[np.arange(9), rng.integers(0, columns, 9)] += 150
    labels = rng.integers(0, columns, 9)
    np.testing.assert_allclose(gpu.softmax(x), reference.softmax(x.astype(np.float64)), rtol=2e-5, atol=1e-30)
    value, gradient = gpu.cross_entropy(x, labels)
    want = reference.cross_entropy(x.astype(np.float64), labels)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, want[1], rtol=1e-5, atol=1e-7)


def test_more_rows_than_teams(host: cusim.Host) -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 131_080, 3)).astype(np.float32)
    y = gpu.softmax(x)
    np.testing.assert_allclose(y, reference.softmax(x), rtol=1e-6)
    np.testing.assert_allclose(gpu.softmax_backward(dy, y), reference.softmax_backward(dy, y), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gpu.cross_entropy(x, np.zeros(131_080, int))[0], -np.log(y[:, 0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("eps", "norm_sq", "max_norm"), [(0.5, None, 0.0), (0.5, 1e-12, 1e-6), (0.5, 4.0, 1.0), (0.5, 0.5, 1.0)])
def test_small_terms_of_an_optimiser_step(eps: float, norm_sq: float | None, max_norm: float, host: cusim.Host) -> None:
    ours, defined = ([np.full(8, 0.1 * (i + 1), np.float32) for i in range(5)] for _ in range(2))
    for flats, adamw in ((ours, gpu.adamw_ema), (defined, reference.adamw_ema)):
        adamw(
            *flats, 1e-3, 0.9, 0.99, eps, 0, 1, 0.9, norm_sq=None if norm_sq is None else np.array([norm_sq]), max_norm=max_norm
        )
    for a, b in zip(ours, defined, strict=True):
        np.testing.assert_allclose(a, b, rtol=3e-7)


def test_losses_and_norms_of_more_than_one_round(host: cusim.Host) -> None:
    """More samples than a block folds, more runs than a warp has lanes; more elements than all threads take at a time."""
    rng = np.random.default_rng(0)
    output, target, weight = (rng.standard_normal(s).astype(np.float32) for s in ((10, 40_961), (10, 40_961), (10,)))
    value, gradient = gpu.squared_error(output, target, weight)
    want = reference.squared_error(*(a.astype(np.float64) for a in (output, target, weight)))
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, want[1], rtol=1e-5, atol=1e-12)
    x = shifted(rng.standard_normal(2_300_001).astype(np.float32))
    np.testing.assert_allclose(gpu.sum_squares(x), np.square(x.astype(np.float64)).sum(), rtol=1e-12)


def test_results_come_from_the_pool(host: cusim.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "empty", buffers.empty)
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
    assert library.sent == 1
    (key,) = (key for key in launch._tables if key[0] == id(frozen))
    launch.table(device, open_), launch.table(device, open_)
    assert library.sent == 3
    del frozen
    assert key not in launch._tables


def test_arguments_must_have_the_type_of_their_parameter(host: cusim.Host) -> None:
    out, sizes, draw = np.empty(4, np.float32), (np.int32(1), np.int32(1), np.int32(4)), (*(np.uint32(0),) * 5, None)
    host.launch("random", "normals_any", (1,), (32,), (out, *sizes, *draw))
    with pytest.raises(TypeError, match="argument 1 is int, the kernel takes int32"):
        host.launch("random", "normals_any", (1,), (32,), (out, 1, *sizes[1:], *draw))
    with pytest.raises(TypeError, match="argument 0 is a float64 array"):
        host.launch("random", "normals_any", (1,), (32,), (out.astype(np.float64), *sizes, *draw))
    with pytest.raises(TypeError, match="9 arguments for 10"):
        host.launch("random", "normals_any", (1,), (32,), (out, *sizes, *draw[1:]))
    with pytest.raises(AttributeError, match="no kernel"):
        host.launch("random", "normal", (1,), (32,), ())
