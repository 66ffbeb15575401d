"""The kernels against their definitions: every backend, every case of the registry, and what holds for all of them.

Truth is the definition run in float64 on the float32 arguments. The budget is twice PyTorch's own error in float32, or a few
units in the last place where PyTorch has more luck than that.
"""

import importlib
import inspect
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphabar import kernels
from alphabar.kernels import TABLE, Pool, backend_for, dispatch, reference
from alphabar.kernels.reference import ROW

numba = pytest.importorskip("numba")
cpu = pytest.importorskip("alphabar.kernels.cpu")

FACTOR = 2.0
FLOOR = 4 * 2.0**-24  # relative, of the norm
DRAWS = ("categorical", "categorical_posterior", "categorical_q_sample")  # integers come out
BITS = ("q_sample", "step", *(name for name, k in TABLE.items() if k.bits))  # the definition's bits, not only its value

CASES = [pytest.param(name, case, id=f"{name}-{i}") for name, k in TABLE.items() for i, case in enumerate(k.tests)]


def mapped(f: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(mapped(f, v) for v in value)
    if isinstance(value, dict):
        return {k: mapped(f, v) for k, v in value.items()}
    return f(value) if isinstance(value, np.ndarray) else value


def arguments(name: str, case: Any, dtype: Any = np.float32) -> tuple[tuple, dict[str, Any]]:
    args, kwargs = TABLE[name].make(np.random.default_rng(3), case, dtype)
    for empty in (args[0] if name == "normals" else None, kwargs.get("store")):
        if empty is not None:
            empty[...] = 0
    return args, kwargs


def exact(value: Any) -> Any:
    return mapped(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a.copy(), value)


def outputs(call: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> list[np.ndarray]:
    """What a call computes: what it returns, and what it changes in place; the arguments themselves are left alone."""
    args, kwargs = mapped(np.copy, args), mapped(np.copy, kwargs)
    result = call(*args, **kwargs)
    values = [args[0], *args[2:5]] if name == "adamw_ema" else list(result) if isinstance(result, tuple) else [result]
    return [v for v in (*values, kwargs.get("store"), kwargs.get("tail_out")) if v is not None]


def public(name: str, args: tuple, kwargs: dict[str, Any]) -> list[np.ndarray]:
    return outputs(getattr(kernels, name), name, args, kwargs)


def defined(name: str, args: tuple, kwargs: dict[str, Any]) -> list[np.ndarray]:
    return outputs(getattr(reference, name), name, args, kwargs)


def relative(a: np.ndarray, b: np.ndarray, least: float = 1e-30) -> float:
    return float(np.linalg.norm((a - b).ravel())) / max(float(np.linalg.norm(b.ravel())), least)


def same_bits(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return len(first) == len(second) and all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------------------------- PyTorch


@pytest.fixture(scope="module")
def torch_call() -> Any:
    """A kernel's call in PyTorch, on NumPy arguments. Noise made in a kernel is handed over: PyTorch has other bits."""
    torch = pytest.importorskip("torch")
    module = importlib.import_module("bench.torch_ops")

    def call(name: str, args: tuple, kwargs: dict[str, Any]) -> list[np.ndarray]:
        kwargs = dict(kwargs)
        words = {k: kwargs[k] for k in ("seed", "first_sample") if k in kwargs}
        if name == "step" and kwargs["noise"] is True:
            kwargs["noise"] = reference.normals(np.empty_like(args[0]), step=args[3], **words)
        if name == "q_sample" and kwargs["eps"] is None:
            kwargs["eps"] = reference.normals(np.empty_like(args[0]), step=kwargs["step"], stream=1, **words)
        args, kwargs = mapped(np.copy, args), mapped(np.copy, kwargs)
        result = module.OPS[name](*mapped(torch.from_numpy, args), **mapped(torch.from_numpy, kwargs))
        values = [args[0], *args[2:5]] if name == "adamw_ema" else list(result) if isinstance(result, tuple) else [result]
        return [np.asarray(v) for v in (*values, kwargs.get("store"), kwargs.get("tail_out")) if v is not None]

    return call


COMPARED = [p for p in CASES if not TABLE[str(p.values[0])].bits]


@pytest.mark.parametrize(("name", "case"), COMPARED)
def test_definitions_agree_with_pytorch(torch_call: Any, name: str, case: Any) -> None:
    args, kwargs = arguments(name, case, np.float64)
    ours, theirs = defined(name, args, kwargs), torch_call(name, args, kwargs)
    if 0 in case["shape"] and name.startswith("group_norm_silu"):
        ours, theirs = ours[:1], theirs[:1]  # moments of nothing
    assert len(ours) == len(theirs)
    largest = max((np.abs(b).max() for b in theirs if b.size), default=0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * largest)


WAYS = [(p, way) for p in COMPARED for way in ("default", "high") if way == "default" or TABLE[str(p.values[0])].slack]


@pytest.mark.parametrize(("name", "case", "precision"), [pytest.param(*p.values, way, id=f"{p.id}-{way}") for p, way in WAYS])
def test_cpu_is_within_the_error_budget(torch_call: Any, name: str, case: Any, precision: str) -> None:
    args, kwargs = arguments(name, case)
    slack = 0.0 if "high" in (precision, kwargs.get("precision")) else TABLE[name].slack
    with kernels.precision(precision):
        ours = public(name, args, kwargs)
    truth = defined(name, exact(args), exact(kwargs))
    theirs, truths = torch_call(name, args, kwargs), torch_call(name, exact(args), exact(kwargs))
    for a, b, t, tt in zip(ours, truth, theirs, truths, strict=True):
        assert a.shape == b.shape and a.flags.c_contiguous
        assert a.dtype == (np.float64 if name == "sum_squares" else np.float32)
        few = 1.0 if a.size <= 16 else 1e-30  # all of so few may be small because terms of the size of 1 cancel
        assert relative(a, b, few) <= max(FLOOR, FACTOR * relative(t, tt, few), slack / 2)
        if slack:
            assert np.abs(a - b).max(initial=0) <= slack * np.abs(b).max(initial=0)


@pytest.mark.parametrize(("name", "case"), [p for p in CASES if p.values[0] in BITS])
def test_sampler_kernels_give_the_bits_of_the_definition(name: str, case: Any) -> None:
    args, kwargs = arguments(name, case)
    ours = public(name, args, kwargs)
    assert same_bits(ours, defined(name, args, kwargs))
    assert all(a.flags.c_contiguous and a.dtype == (np.int32 if name in DRAWS else np.float32) for a in ours)


# --------------------------------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", TABLE)
def test_backends_carry_the_signatures_of_the_definitions(name: str) -> None:
    def parameters(f: Any) -> list[tuple[str, Any]]:
        return [(k, p.default) for k, p in inspect.signature(f).parameters.items()]

    wanted = parameters(getattr(reference, name))
    assert parameters(getattr(cpu, name)) == wanted
    assert parameters(getattr(kernels, name)) == wanted
    assert [k for k, _ in parameters(getattr(kernels.dispatch.checks, name))] == [k for k, _ in wanted]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_float32_runs_on_the_cpu_backend_and_float64_on_the_definition(name: str, case: Any) -> None:
    for dtype, backend in ((np.float32, "cpu"), (np.float64, "reference")):
        args, kwargs = arguments(name, case, dtype)
        if name == "categorical_q_sample":  # has no array of floats but its table
            backend = "cpu"
        bound = inspect.signature(getattr(reference, name)).bind(*args, **kwargs)
        bound.apply_defaults()
        assert backend_for(name, bound.arguments) == backend
        with kernels.use("reference"):
            assert backend_for(name, bound.arguments) == "reference"


@pytest.mark.parametrize("name", TABLE)
def test_float64_gives_float64(name: str) -> None:
    args, kwargs = arguments(name, TABLE[name].tests[0], np.float64)
    assert all(a.dtype == (np.int32 if name in DRAWS else np.float64) for a in public(name, args, kwargs))
    assert same_bits(public(name, args, kwargs), defined(name, args, kwargs))


def strided(a: np.ndarray) -> np.ndarray:
    """The same values in memory with gaps."""
    room = np.full((*a.shape, 2), np.nan if a.dtype.kind == "f" else -1, a.dtype)
    room[..., 0] = a
    return room[..., 0]


@pytest.mark.parametrize(("name", "case"), [p for p in CASES if p.values[0] not in ("normals", "adamw_ema")])
def test_inputs_need_not_be_contiguous(name: str, case: Any) -> None:
    args, kwargs = arguments(name, case)
    kwargs.pop("store", None)
    wanted = public(name, args, kwargs)
    written = {k: v for k, v in kwargs.items() if k in dispatch._RESULTS}
    given_args, given_kwargs = mapped(strided, args), mapped(strided, kwargs) | written
    result = getattr(kernels, name)(*given_args, **given_kwargs)
    got = [v for v in (*(result if isinstance(result, tuple) else (result,)), *written.values()) if v is not None]
    assert same_bits(got, wanted)


@pytest.mark.parametrize("name", ["normals", "adamw_ema"])
def test_written_arrays_may_have_gaps_or_are_refused(name: str) -> None:
    args, kwargs = arguments(name, TABLE[name].tests[1])
    if name == "normals":
        with pytest.raises(ValueError, match="out must be C-contiguous"):
            kernels.normals(strided(args[0]), *args[1:], **kwargs)
        return
    wanted = defined(name, args, kwargs)
    gaps = mapped(strided, args)
    kernels.adamw_ema(*gaps, **kwargs)
    for a, b in zip([gaps[0], *gaps[2:5]], wanted, strict=True):
        assert relative(a, b) < 1e-6


def unset(a: np.ndarray) -> np.ndarray:
    return np.full_like(a, np.nan if a.dtype.kind == "f" else -7)


def takes_out(name: str) -> bool:
    return name != "normals" and "out" in inspect.signature(getattr(reference, name)).parameters


@pytest.mark.parametrize(("name", "case"), [p for p in CASES if takes_out(str(p.values[0]))])
def test_results_go_where_out_says(name: str, case: Any) -> None:
    args, kwargs = arguments(name, case)
    wanted = public(name, args, kwargs)
    place = 1 if name in ("squared_error", "cross_entropy") else 0  # the gradient goes there
    out = unset(wanted[place])
    result = getattr(kernels, name)(*args, **kwargs, out=out)
    assert (result[place] if isinstance(result, tuple) else result) is out
    assert same_bits([out], [wanted[place]])
    gaps = strided(unset(out))
    getattr(kernels, name)(*args, **kwargs, out=gaps)  # goes to the definition: the value, not the bits
    assert relative(gaps, wanted[place], 1.0) < 1e-4


@pytest.mark.parametrize(("name", "case"), [p for p in CASES if p.values[0] == "step"])
def test_step_in_place(name: str, case: Any) -> None:
    args, kwargs = arguments(name, case)
    wanted = public(name, args, kwargs)
    x, m, history = args[0].copy(), args[1].copy(), mapped(np.copy, kwargs["history"])
    assert kernels.step(x, m, *args[2:], **{**kwargs, "history": history}, out=x) is x
    assert same_bits([x, *([kwargs["store"]] if "store" in kwargs else [])], wanted)
    if "store" in kwargs and history:  # the slot of the oldest output may be given away in the same call
        oldest = history[-1]
        kernels.step(args[0], m, *args[2:], **{**kwargs, "history": history, "store": oldest})
        assert same_bits([oldest], wanted[1:])


def test_q_sample_gives_the_noise_it_used() -> None:
    args, kwargs = arguments("q_sample", {"shape": (3, 2053)})
    eps_out = np.empty_like(args[0])
    x_t, eps = kernels.q_sample(*args, **kwargs, eps_out=eps_out)
    assert eps is eps_out
    again, same = kernels.q_sample(*args, **{**kwargs, "eps": eps})
    assert same is eps and np.array_equal(again, x_t)
    into = np.empty_like(eps)
    assert kernels.q_sample(*args, **{**kwargs, "eps": eps}, eps_out=into)[1] is into and np.array_equal(into, eps)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64])
def test_q_sample_takes_any_integers(kind: Any) -> None:
    (x0, _, signal, noise), kwargs = arguments("q_sample", {"shape": (3, 40)})
    t = np.array([1, 100, 37])
    assert same_bits(
        public("q_sample", (x0, t.astype(kind), signal, noise), kwargs), public("q_sample", (x0, t, signal, noise), kwargs)
    )


# ----------------------------------------------------------------------------------------------- threads, batches, work arrays

LARGER = {
    "normals": {"shape": (5, 7001)},
    "q_sample": {"shape": (5, 7001)},
    "step": {"shape": (5, 7001), "noise": "made", "clip": True, "history": 3, "store": True, "guidance": True},
    "group_norm_silu": {"shape": (7, 19, 11, 24), "groups": 4, "modulated": True},
    "group_norm_silu_backward": {"shape": (7, 19, 11, 24), "groups": 4, "modulated": True},
    "conv2d": {"shape": (7, 13, 11, 20), "kernel": 3, "cout": 37},
    "conv2d_backward_input": {"shape": (7, 13, 11, 20), "kernel": 3, "cout": 37},
    "conv2d_backward_weight": {"shape": (29, 13, 11, 20), "kernel": 3, "cout": 37},
    "attention": {"shape": (3, 130, 2, 20)},
    "attention_backward": {"shape": (3, 130, 2, 20)},
    "categorical": {"shape": (5, 400, 27), "holes": 0.3},
    "categorical_posterior": {"shape": (5, 400, 27)},
    "categorical_q_sample": {"shape": (5, 40, 30, 27)},
    "silu": {"shape": (5, 9, 1024)},
    "silu_backward": {"shape": (5, 9, 1024)},
    "layer_norm": {"shape": (7, 133, 40), "modulated": True},
    "layer_norm_backward": {"shape": (7, 133, 40), "modulated": True},
    "add_gated": {"shape": (7, 133, 40)},
    "add_gated_backward": {"shape": (7, 133, 40)},
    "rotary": {"shape": (7, 33, 5, 32)},
    "squared_error": {"shape": (5, 9001), "weighted": True},
    "cross_entropy": {"shape": (5, 90, 100)},
    "softmax": {"shape": (5, 90, 100)},
    "softmax_backward": {"shape": (5, 90, 100)},
    "sum_squares": {"shape": (300_001,)},
    "adamw_ema": {"shape": (300_001,)},
}
SUMS = {
    **dict.fromkeys(("group_norm_silu_backward", "layer_norm_backward"), (0, 3, 4)),
    **dict.fromkeys(("squared_error", "cross_entropy"), (0,)),  # gradients of the batch mean
    **dict.fromkeys(("conv2d_backward_weight", "sum_squares", "adamw_ema"), ()),
}


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the number of workers that the loops share their work among."""

    def setter(count: int) -> None:
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("alphabar.kernels.cpu.") and hasattr(module, "threads"):
                if callable(module.threads):
                    monkeypatch.setattr(module, "threads", lambda: count)

    return setter


@pytest.mark.parametrize("name", TABLE)
def test_bits_do_not_depend_on_the_threads(workers: Any, name: str) -> None:
    args, kwargs = arguments(name, LARGER[name])
    wanted = public(name, args, kwargs)
    for count in {1, numba.config.NUMBA_NUM_THREADS}:
        numba.set_num_threads(count)
        assert same_bits(public(name, args, kwargs), wanted)
    for count in (1, 3, 8):
        workers(count)
        assert same_bits(public(name, args, kwargs), wanted)


@pytest.mark.parametrize("name", TABLE)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    args, kwargs = arguments(name, LARGER[name])
    batch, size = args[0].shape[0], args[0].shape
    kept: Any = SUMS.get(name, range(len(public(name, args, kwargs))))

    def part(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a[2:]) if a.ndim and a.shape[0] == batch and a.ndim + (a.shape == (batch,)) > 1 else a

    cut_args, cut_kwargs = mapped(part, args), mapped(part, kwargs)
    if name == "conv2d_backward_input":
        cut_args = (*cut_args[:2], (batch - 2, *args[2][1:]))
    if "first_sample" in kwargs:
        cut_kwargs["first_sample"] += 2
    whole, cut = public(name, args, kwargs), public(name, cut_args, cut_kwargs)
    assert size[0] > 2
    for i in kept:
        assert np.array_equal(whole[i][2:], cut[i])


@pytest.mark.parametrize("name", TABLE)
def test_work_arrays_come_from_the_pool(name: str) -> None:
    args, kwargs = arguments(name, LARGER[name])
    pool, addresses, held = Pool(), [], []
    run = getattr(kernels, name)
    for _ in range(3):
        with pool:
            result = run(*mapped(np.copy, args), **mapped(np.copy, kwargs))
        results = result if isinstance(result, tuple) else (result,)
        inside = name not in ("normals", "sum_squares", "adamw_ema")
        addresses.append({r.ctypes.data for r in results if r is not None} if inside else set())
        held.append(pool.nbytes)
        del result, results
    assert addresses[0] == addresses[1] == addresses[2]
    assert held[0] == held[1] == held[2]


def test_a_pool_hands_out_each_array_once_and_is_not_entered_twice() -> None:
    args, kwargs = arguments("conv2d", LARGER["conv2d"])
    pool = Pool()
    with pool:
        first = kernels.conv2d(*args, **kwargs)
        second = kernels.conv2d(*args, **kwargs)
        assert not np.shares_memory(first, second) and np.array_equal(first, second)
        with pytest.raises(RuntimeError, match="already in use"), pool:
            pass


# ---------------------------------------------------------------------------------------------------------- all sorts of shapes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(
        [
            (3, 1, False, None),
            (3, 2, False, None),
            (3, 2, False, (0, 1)),
            (3, 1, True, None),
            (1, 1, False, None),
            (1, 2, False, None),
            (3, 1, False, (2, 0)),
            (3, 2, False, (1, 0)),
            (1, 1, True, None),
            (1, 1, False, (1, 0)),
        ]
    ),
)
def test_convolutions_of_all_sorts(batch: int, height: int, width: int, cin: int, cout: int, options: Any) -> None:
    kernel, stride, upsample, pad = options
    case = {
        "shape": (batch, height, width, cin),
        "kernel": kernel,
        "cout": cout,
        "stride": stride,
        "upsample": upsample,
        "pad": pad,
    }
    if min(reference.conv_output_size(n, kernel, stride, upsample, pad) for n in (height, width)) < 1:
        return
    for name in ("conv2d", "conv2d_backward_input", "conv2d_backward_weight"):
        args, kwargs = arguments(name, case)
        sizes = defined(name, mapped(np.abs, exact(args)), mapped(np.abs, exact(kwargs)))  # of the terms of each sum
        for a, b, size in zip(public(name, args, kwargs), defined(name, exact(args), exact(kwargs)), sizes, strict=True):
            assert a.shape == b.shape and (np.abs(a - b) <= 1e-6 * size + 1e-30).all()


# few channels in and out, a pixel, many columns and few places, many places and few weights, odd channels, rows of few channels
DIRECT = [
    ((1, 32, 32, 3), 64, 3, 1, False),
    ((3, 5, 7, 64), 3, 3, 1, False),
    ((2, 9, 8, 32), 1, 3, 2, False),
    ((2, 9, 8, 1), 32, 3, 1, True),
    ((70, 5, 5, 4), 64, 3, 2, False),
    ((1, 1, 1, 3), 4, 3, 1, False),
    ((30, 1, 1, 40), 288, 1, 1, False),
    ((1, 16, 16, 64), 64, 3, 2, False),
    ((40, 8, 8, 64), 96, 1, 2, False),
    ((2, 7, 5, 33), 37, 3, 1, True),
    ((3, 9, 43, 5), 64, 3, 2, False),
    ((1, 1, 1, 80), 96, 1, 1, False),
    ((1, 1, 1, 17), 70, 1, 1, False),
]


@pytest.mark.parametrize(("shape", "cout", "kernel", "stride", "upsample"), DIRECT)
def test_every_way_of_the_direct_convolution(
    workers: Any, shape: tuple[int, ...], cout: int, kernel: int, stride: int, upsample: bool
) -> None:
    case = {"shape": shape, "kernel": kernel, "cout": cout, "stride": stride, "upsample": upsample}
    with kernels.precision("high"):
        for name in ("conv2d", "conv2d_backward_input", "conv2d_backward_weight"):
            args, kwargs = arguments(name, case)
            sizes, got = defined(name, mapped(np.abs, exact(args)), mapped(np.abs, exact(kwargs))), public(name, args, kwargs)
            for a, b, size in zip(got, defined(name, exact(args), exact(kwargs)), sizes, strict=True):
                assert a.shape == b.shape and (np.abs(a - b) <= 1e-6 * size + 1e-30).all()
            for count in (1, 3, 16):
                workers(count)
                assert same_bits(public(name, args, kwargs), got)
            if name != "conv2d_backward_weight":
                first = args[0][-1:]
                alone = (first, args[1], (1, *shape[1:])) if name == "conv2d_backward_input" else (first, args[1])
                assert np.array_equal(public(name, alone, kwargs)[0][0], got[0][-1])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 300),
    st.integers(1, 6),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 53),
)
def test_norms_of_all_sorts(batch: int, places: int, groups: int, size: int, modulated: bool, silu: bool, tail: int) -> None:
    case = {"shape": (batch, places, 1, groups * size), "groups": groups, "modulated": modulated, "silu": silu}
    if 0 < tail < groups * size:
        case["tail"] = tail
    for name in ("group_norm_silu", "group_norm_silu_backward"):
        args, kwargs = arguments(name, case)
        args[0][...] += 3
        if "tail" in kwargs and name == "group_norm_silu":
            kwargs["tail"] += 3
        for a, b in zip(public(name, args, kwargs), defined(name, exact(args), exact(kwargs)), strict=True):
            if places * size > 1:  # the deviation of a single value is rounding error
                assert a.shape == b.shape and np.abs(a - b).max() <= 2e-5 * (1 + np.abs(b).max())


def test_a_norm_of_two_arrays_has_the_bits_of_the_norm_of_one() -> None:
    """Where their boundary is one of vectors too, all sums run in the same order."""
    case = {"shape": (3, 150, 1, 96), "groups": 6, "modulated": True}
    for name in ("group_norm_silu", "group_norm_silu_backward"):
        args, kwargs = arguments(name, case)
        cut, more = arguments(name, {**case, "tail": 32})
        both = public(name, cut, more)
        if "tail_out" in more:
            both[0] = np.concatenate((both[0], both.pop()), axis=-1)
        assert same_bits(both, public(name, args, kwargs))


def test_norm_of_large_offsets() -> None:
    """Mean 1000, deviation 1: the squares must not be taken of the raw values."""
    x = (np.random.default_rng(0).standard_normal((2, 16, 16, 8)) + 1000).astype(np.float32)
    one, zero = np.ones(8, np.float32), np.zeros(8, np.float32)
    y, mean, rstd = kernels.group_norm_silu(x, one, zero, 2, silu=False)
    want, m, r = reference.group_norm_silu(x.astype(np.float64), one.astype(np.float64), zero.astype(np.float64), 2, silu=False)
    assert np.abs(y - want).max() < 2e-4 and np.abs(mean / m - 1).max() < 1e-6 and np.abs(rstd / r - 1).max() < 1e-5


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 2), st.integers(1, 120), st.integers(1, 3), st.integers(1, 40), st.sampled_from([None, 0.0, 1.5, -0.4]))
def test_attentions_of_all_sorts(batch: int, length: int, heads: int, depth: int, scale: float | None) -> None:
    for name in ("attention", "attention_backward"):
        args, kwargs = arguments(name, {"shape": (batch, length, heads, depth), "scale": scale})
        for a, b in zip(public(name, args, kwargs), defined(name, exact(args), exact(kwargs)), strict=True):
            assert a.shape == b.shape and np.abs(a - b).max() <= 2e-5 * (1 + np.abs(b).max())


def test_attention_of_huge_scores() -> None:
    q = np.full((1, 3, 1, 4), 100, np.float32)
    o, lse = kernels.attention(q, q, q)
    assert np.allclose(o, q, rtol=1e-6) and np.allclose(lse, 20000 + np.log(3))


LOSSES = ("squared_error", "cross_entropy", "softmax", "softmax_backward")


@pytest.mark.parametrize(
    "name", ["conv2d", "group_norm_silu", "attention", "step", "q_sample", *LOSSES, "sum_squares", "adamw_ema"]
)
def test_nan_is_seen(name: str) -> None:
    args, kwargs = arguments(name, LARGER[name])
    args[1 if name == "adamw_ema" else 0].reshape(-1)[5] = np.nan
    if name == "adamw_ema":
        kwargs["norm_sq"] = reference.sum_squares(args[1])
    assert any(np.isnan(a).any() for a in public(name, args, kwargs))


def test_losses_and_softmax_in_place() -> None:
    for name, place in (
        ("squared_error", 0),
        ("cross_entropy", 0),
        ("softmax", 0),
        ("softmax_backward", 0),
        ("softmax_backward", 1),
    ):
        for case in TABLE[name].tests:
            args, kwargs = arguments(name, case)
            wanted = public(name, args, kwargs)
            args = tuple(a.copy() for a in args)
            result = getattr(kernels, name)(*args, **kwargs, out=args[place])
            got = result if isinstance(result, tuple) else (result,)
            assert got[-1] is args[place] and same_bits(list(got), wanted)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 300), st.floats(0, 0.95), st.sampled_from([1.0, 30.0]))
def test_rows_of_all_sorts(rows: int, columns: int, holes: float, spread: float) -> None:
    rng = np.random.default_rng(rows * columns)
    x = (spread * rng.standard_normal((rows, columns))).astype(np.float32)
    x[:, 1:][rng.random((rows, columns - 1)) < holes] = -np.inf
    label = x.argmax(axis=1)
    for ours, wanted in (
        (kernels.softmax(x), reference.softmax(x.astype(np.float64))),
        (kernels.cross_entropy(x, label)[0], reference.cross_entropy(x.astype(np.float64), label)[0]),
        (kernels.cross_entropy(x, label)[1], reference.cross_entropy(x.astype(np.float64), label)[1]),
    ):
        assert np.abs(ours - wanted).max() < 2e-6
    y = kernels.softmax(x)
    assert not y[np.isneginf(x)].any()
    np.testing.assert_allclose(y.sum(axis=1, dtype=np.float64), 1, rtol=1e-6)


def test_cross_entropy_of_huge_logits_and_impossible_labels() -> None:
    z = np.array([[0, 1000, -1000], [-np.inf, 0, 0], [5e4, 5e4, -np.inf]], np.float32)
    value, gradient = kernels.cross_entropy(z, np.array([1, 0, 1]))
    assert np.array_equal(value[:2], [0, np.inf]) and value[2] == pytest.approx(np.log(2), rel=1e-6)
    np.testing.assert_allclose(gradient * 3, [[0, 0, 0], [-1, 0.5, 0.5], [0.5, -0.5, 0]], atol=1e-6)
    with np.errstate(invalid="ignore"):
        assert np.isnan(kernels.softmax(np.full((1, 20), -np.inf, np.float32))).all()


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64])
def test_labels_of_any_integers(kind: Any) -> None:
    (z, labels), _ = arguments("cross_entropy", {"shape": (2, 40, 27)})
    assert same_bits(public("cross_entropy", (z, labels.astype(kind)), {}), public("cross_entropy", (z, labels), {}))


# ---------------------------------------------------------------------------------------------------------------- bad arguments

X = np.zeros((2, 4, 4, 8), np.float32)
W = np.zeros((3, 3, 8, 5), np.float32)
Y = np.zeros((2, 4, 4, 5), np.float32)
C = np.zeros(8, np.float32)
Q = np.zeros((2, 5, 2, 4), np.float32)
ROWS = np.zeros((3, len(ROW)))
LEVELS = np.ones(11)
FLAT = np.zeros(7, np.float32)
STATES = np.zeros((2, 4, 4), np.int32)
LAW = np.full((3, 4), 0.5)
T = np.array([1, 2])
LABELS = np.zeros((2, 4, 4), np.int64)

BAD: list[tuple[str, tuple, dict[str, Any], type[Exception], str]] = [
    ("normals", ([1.0], 0), {}, TypeError, "out must be an array, not list"),
    ("normals", (np.zeros(3, np.int32), 0), {}, TypeError, "out must be of a float dtype"),
    ("normals", (X, -1), {}, ValueError, "seed must be in"),
    ("normals", (X, 1.5), {}, TypeError, "seed must be an integer"),
    ("normals", (X, 2**64), {}, ValueError, "seed"),
    ("normals", (X, 0), {"step": 2**32}, ValueError, "step"),
    ("normals", (X, 0), {"stream": True}, TypeError, "stream"),
    ("normals", (X, 0), {"first_sample": -1}, ValueError, "first_sample"),
    ("normals", (np.float32(0), 0), {}, TypeError, "out"),
    ("normals", (np.zeros((), np.float32), 0), {}, ValueError, "batch axis"),
    ("normals", (X.transpose(1, 0, 2, 3), 0), {}, ValueError, "C-contiguous"),
    ("q_sample", (X, np.array([1, 11]), LEVELS, LEVELS), {}, ValueError, "t must be in 0..10"),
    ("q_sample", (X, np.array([-1, 1]), LEVELS, LEVELS), {}, ValueError, "t must be in 0..10"),
    ("q_sample", (X, np.array([1.0, 2.0]), LEVELS, LEVELS), {}, TypeError, "t must be integers"),
    ("q_sample", (X, np.array([1, 2, 3]), LEVELS, LEVELS), {}, ValueError, "t has shape"),
    ("q_sample", (X, T, LEVELS, LEVELS[1:]), {}, ValueError, "signal has shape"),
    ("q_sample", (X, T, LEVELS, LEVELS), {"eps": X[:1]}, ValueError, "eps has shape"),
    ("q_sample", (X, T, LEVELS, LEVELS), {"eps": X.astype(np.float64)}, TypeError, "eps is float64"),
    ("step", (X, X[:1], ROWS, 0), {}, ValueError, "m has shape"),
    ("step", (X, X.astype(np.float64), ROWS, 0), {}, TypeError, "m is float64"),
    ("step", (X, X, ROWS[:, :5], 0), {}, ValueError, "rows must have 13 columns"),
    ("step", (X, X, ROWS, 3), {}, ValueError, "i must be in"),
    ("step", (X, X, ROWS, -1), {}, ValueError, "i must be in"),
    ("step", (X, X, ROWS, 0), {"history": (X, X, X, X)}, ValueError, "at most 3"),
    ("step", (X, X, ROWS, 0), {"history": (X[:1],)}, ValueError, r"history\[0\] has shape"),
    ("step", (X, X, ROWS, 0), {"history": None}, TypeError, "history must be a tuple of arrays, not NoneType"),
    ("step", (X, X, ROWS, 0), {"clip": 1}, ValueError, "clip must be"),
    ("step", (X, X, ROWS, 0), {"out": np.broadcast_to(X, X.shape)}, ValueError, "out must be writable"),
    ("normals", (np.broadcast_to(X, X.shape), 0), {}, ValueError, "out must be writable"),
    ("step", (X, X, ROWS, 0), {"noise": X[:1]}, ValueError, "noise has shape"),
    ("step", (X, X, ROWS, 0), {"noise": False}, TypeError, "noise"),
    ("step", (X, X, ROWS, 0), {"clip": (1, -1)}, ValueError, "clip"),
    ("step", (X, X, ROWS, 0), {"guidance": X[0]}, ValueError, "guidance"),
    ("step", (X, X, ROWS, 0), {"out": X[:1]}, ValueError, "out has shape"),
    ("step", (X, X, ROWS, 0), {"store": X.astype(np.float64)}, TypeError, "store"),
    ("group_norm_silu", (X, C, C, 3), {}, ValueError, "groups must divide the 8 channels"),
    ("group_norm_silu", (X, C, C, 0), {}, ValueError, "groups must be in"),
    ("group_norm_silu", (X, C[1:], C, 2), {}, ValueError, "gamma has shape"),
    ("group_norm_silu", (X, C, C, 2), {"eps": 0}, ValueError, "eps must be positive"),
    ("group_norm_silu", (X, C, C, 2), {"scale": np.zeros((2, 8), np.float32)}, ValueError, "scale and shift come together"),
    ("group_norm_silu", (X[0, 0], C, C, 2), {}, ValueError, "at least 3 dimensions"),
    ("group_norm_silu", (X, C, C, 2), {"tail": X}, ValueError, r"gamma has shape \(8,\), want \(16,\)"),
    ("group_norm_silu", (X, C, C, 2), {"tail": X[:1]}, ValueError, "tail has shape"),
    ("group_norm_silu", (X, C, C, 2), {"tail": X[0]}, ValueError, "tail must have 4 dimensions"),
    ("group_norm_silu", (X, C, C, 2), {"tail": X[..., :0]}, ValueError, "x and tail must each have channels, not 8 and 0"),
    ("group_norm_silu", (X, C, C, 2), {"tail": X.astype(np.float64)}, TypeError, "tail is float64"),
    ("group_norm_silu", (X, C, C, 3), {"tail": X}, ValueError, "groups must divide the 16 channels of x and tail"),
    ("group_norm_silu", (X[..., :3], C, C, 2), {"tail": X[..., 3:], "out": X[..., 3:]}, ValueError, "out has shape"),
    ("group_norm_silu_backward", (X, X, C, C, 2, C, C), {}, ValueError, "mean has shape"),
    ("group_norm_silu_backward", (X, X, C, C, 2, C, C), {"tail_out": X}, ValueError, "tail and tail_out come together"),
    ("group_norm_silu_backward", (X, X[..., :3], C, C, 2, C, C), {"tail": X[..., 3:]}, ValueError, "tail and tail_out come"),
    ("conv2d", (X, W[:2, :2]), {}, ValueError, "the kernel must be 1x1 or 3x3"),
    ("conv2d", (X, W[:, :, 1:]), {}, ValueError, "w has shape"),
    ("conv2d", (X[0], W), {}, ValueError, "x must have 4 dimensions"),
    ("conv2d", (X, W), {"stride": 3}, ValueError, "stride must be 1 or 2"),
    ("conv2d", (X, W), {"stride": 2, "upsample": True}, ValueError, "upsample goes with stride 1"),
    ("conv2d", (X, W), {"stride": 2.0}, TypeError, "stride must be an integer, not float"),
    ("conv2d", (X, W), {"pad": (3, 0)}, ValueError, "pad must be"),
    ("conv2d", (X, W), {"pad": 1}, ValueError, "pad must be"),
    ("conv2d", (X, W, C), {}, ValueError, "bias has shape"),
    ("conv2d", (X[:, :1, :1], W), {"pad": (0, 0)}, ValueError, "too small"),
    ("conv2d", (X, W.astype(np.float64)), {}, TypeError, "w is float64"),
    ("conv2d", (X, W), {"out": X}, ValueError, "out has shape"),
    ("conv2d_backward_input", (Y, W, (2, 4, 4, 7)), {}, ValueError, "input_shape"),
    ("conv2d_backward_input", (Y, W, 8), {}, ValueError, "input_shape"),
    ("conv2d_backward_input", (Y, W, (2, 5, 4, 8)), {}, ValueError, "dy has shape"),
    ("conv2d_backward_weight", (X, Y[:1], 3), {}, ValueError, "dy has shape"),
    ("conv2d_backward_weight", (X, Y, 2), {}, ValueError, "the kernel must be"),
    ("attention", (Q, Q[:, :4], Q), {}, ValueError, "k has shape"),
    ("attention", (Q[:, :0], Q[:, :0], Q[:, :0]), {}, ValueError, "at least 1"),
    ("attention_backward", (Q, Q, Q, Q, Q, np.zeros((2, 5, 2), np.float32)), {}, ValueError, "lse has shape"),
    ("attention_backward", (Q, Q, Q, Q, None, np.zeros((2, 2, 5), np.float32)), {}, TypeError, "o must be an array"),
    ("categorical", (STATES, 0), {}, TypeError, "log_weights must be of a float dtype"),
    ("categorical", (FLAT, 0), {}, ValueError, r"log_weights must be \(B, ..., K\)"),
    ("categorical", (X[..., :0], 0), {}, ValueError, "log_weights must be"),
    ("categorical", (X, 0), {"out": X[..., 0]}, TypeError, "out must be int32, not float32"),
    ("categorical", (X, 0), {"out": STATES[:1]}, ValueError, "out has shape"),
    ("categorical", (X, -1), {}, ValueError, "seed must be in"),
    ("categorical_posterior", (X, STATES[:1], LAW, 0), {}, ValueError, "x_t has shape"),
    ("categorical_posterior", (X, STATES * 1.0, LAW, 0), {}, TypeError, "x_t must be integers, not float64"),
    ("categorical_posterior", (X, STATES + 8, LAW, 0), {}, ValueError, "x_t must be in 0..7, not 8..8"),
    ("categorical_posterior", (X, STATES + 9, LAW, 0), {"mask": 8}, ValueError, "x_t must be in 0..8"),
    ("categorical_posterior", (X, STATES - 1, LAW, 0), {}, ValueError, "x_t must be in 0..7, not -1"),
    ("categorical_posterior", (X, STATES, LAW[:, :3], 0), {}, ValueError, "rows must have 4 columns"),
    ("categorical_posterior", (X, STATES, -LAW, 0), {}, ValueError, "rows must be finite and at least 0"),
    ("categorical_posterior", (X, STATES, LAW * np.nan, 0), {}, ValueError, "rows must be finite and at least 0"),
    ("categorical_posterior", (X, STATES, LAW, 3), {}, ValueError, "index must be in"),
    ("categorical_posterior", (X, STATES, LAW, 0), {"mask": None}, TypeError, "mask must be an integer"),
    ("categorical_posterior", (X, STATES, LAW, 0), {"step": -1}, ValueError, "step must be in"),
    ("categorical_q_sample", (STATES, T, LEVELS, 0), {}, ValueError, "states must be in"),
    ("categorical_q_sample", (STATES + 5, T, LEVELS, 5), {}, ValueError, "x0 must be in 0..4, not 5"),
    ("categorical_q_sample", (STATES, T + 9, LEVELS, 5), {}, ValueError, "t must be in 0..10, not 10..11"),
    ("categorical_q_sample", (STATES, T[:1], LEVELS, 5), {}, ValueError, "t has shape"),
    ("categorical_q_sample", (STATES, T, np.ones(11, int), 5), {}, TypeError, "keep must be of a float dtype"),
    ("categorical_q_sample", (X, T, LEVELS, 5), {}, TypeError, "x0 must be integers"),
    ("squared_error", (X, X[:1]), {}, ValueError, "target has shape"),
    ("squared_error", (X, X.astype(np.float64)), {}, TypeError, "target is float64"),
    ("squared_error", (np.float32(1), np.float32(1)), {}, TypeError, "output must be an array"),
    ("squared_error", (X[:, :0], X[:, :0]), {}, ValueError, "output must be .B, .... with at least 1 element"),
    ("squared_error", (X, X), {"weight": C}, ValueError, "weight has shape"),
    ("squared_error", (X, X), {"weight": np.ones(2)}, TypeError, "weight is float64"),
    ("squared_error", (X, X), {"out": X[:1]}, ValueError, "out has shape"),
    ("cross_entropy", (X, LABELS[:1]), {}, ValueError, "labels has shape"),
    ("cross_entropy", (X, LABELS + 8), {}, ValueError, "labels must be in 0..7, not 8..8"),
    ("cross_entropy", (X, LABELS - 1), {}, ValueError, "labels must be in 0..7, not -1..-1"),
    ("cross_entropy", (X, X[..., 0]), {}, TypeError, "labels must be integers, not float32"),
    ("cross_entropy", (X[..., :0], LABELS), {}, ValueError, r"logits must be \(..., K\)"),
    ("cross_entropy", (X, LABELS), {"out": X[:1]}, ValueError, "out has shape"),
    ("softmax", (X[..., :0],), {}, ValueError, r"x must be \(..., K\)"),
    ("softmax", (np.zeros((), np.float32),), {}, ValueError, r"x must be \(..., K\)"),
    ("softmax", (STATES,), {}, TypeError, "x must be of a float dtype"),
    ("softmax_backward", (X[:1], X), {}, ValueError, "dy has shape"),
    ("softmax_backward", (X, X), {"out": X.astype(np.float64)}, TypeError, "out is float64"),
    ("sum_squares", (np.arange(3),), {}, TypeError, "x must be of a float dtype"),
    ("adamw_ema", (FLAT, FLAT[1:], FLAT, FLAT, FLAT, 1, 0.9, 0.9, 1e-8, 0, 1, 0.9), {}, ValueError, "grad has shape"),
    ("adamw_ema", (FLAT, FLAT, FLAT, FLAT, FLAT, 1, 1.0, 0.9, 1e-8, 0, 1, 0.9), {}, ValueError, "beta1"),
    ("adamw_ema", (FLAT, FLAT, FLAT, FLAT, FLAT, 1, 0.9, 0.9, 1e-8, 0, 0, 0.9), {}, ValueError, "step must be in"),
    ("adamw_ema", (FLAT, FLAT, FLAT, FLAT, FLAT, 1, 0.9, 0.9, 1e-8, 0, 1, 1.1), {}, ValueError, "ema_decay"),
    ("adamw_ema", (FLAT, FLAT, FLAT, FLAT, FLAT, 1, 0.9, 0.9, 1e-8, 0, 1, 0.9), {"max_norm": 0}, ValueError, "max_norm"),
    ("adamw_ema", (FLAT, FLAT, FLAT, FLAT, FLAT, 1, 0.9, 0.9, 1e-8, 0, 1, 0.9), {"norm_sq": FLAT}, ValueError, "norm_sq"),
    ("adamw_ema", (FLAT, FLAT, FLAT, FLAT, FLAT, 1, 0.9, 0.9, 1e-8, 0, 1, 0.9, 3.0), {}, TypeError, "norm_sq must be an array"),
    ("sum_squares", (), {}, TypeError, "missing"),
    ("sum_squares", (FLAT, FLAT), {}, TypeError, "too many positional"),
    ("sum_squares", (FLAT,), {"y": 1}, TypeError, "unexpected keyword"),
    ("sum_squares", (FLAT,), {"x": FLAT}, TypeError, "multiple values"),
]


@pytest.mark.parametrize(("name", "args", "kwargs", "error", "match"), BAD)
def test_bad_arguments_are_named(name: str, args: tuple, kwargs: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        getattr(kernels, name)(*args, **kwargs)


@pytest.mark.parametrize("name", [name for name in TABLE if name != "normals"])
def test_arguments_that_are_only_read_may_be_read_only(name: str) -> None:
    """Broadcast, frozen and memory-mapped arrays, and those of libraries whose arrays never change."""

    def locked(a: np.ndarray) -> np.ndarray:
        a = a.copy()
        a.setflags(write=False)
        return a

    parameters = list(inspect.signature(getattr(kernels, name)).parameters)
    written = dispatch._WRITTEN.get(name, dispatch._RESULTS)
    for case in TABLE[name].tests:
        results = []
        for change in (np.copy, locked):
            args, kwargs = arguments(name, case)
            given = dict(zip(parameters, args, strict=False)) | kwargs
            given = {k: v if k in written else mapped(change, v) for k, v in given.items()}
            result = getattr(kernels, name)(**given)
            results.append([*(result if isinstance(result, tuple) else (result,)), *(given.get(k) for k in written)])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None) and (a is None or np.array_equal(a, b))


def test_lists_stand_for_tuples() -> None:
    past = np.ones((6, 2), np.float32).T  # not contiguous, and to be copied inside a list too
    x, rows = np.ones((2, 6), np.float32), np.ones((1, len(ROW)))
    want = kernels.step(x, x, rows, 0, (past.copy(),), clip=(-1, 1))
    assert np.array_equal(kernels.step(x, x, rows, 0, [past], clip=[-1, 1]), want)
    assert np.array_equal(kernels.conv2d(X, W, pad=[0, 1]), kernels.conv2d(X, W, pad=(0, 1)))


def test_bad_backends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend must be one of"), kernels.use("cuda"):
        pass
    token = dispatch._choice.set("fast")
    try:
        with pytest.raises(ValueError, match="ALPHABAR_KERNELS must be one of"):
            kernels.sum_squares(FLAT)
    finally:
        dispatch._choice.reset(token)


# --------------------------------------------------------------------------------------------------------- threads and the cache


def test_thread_count_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = sys.modules["alphabar.kernels.cpu.threads"]
    monkeypatch.delenv("ALPHABAR_THREADS", raising=False)
    assert 1 <= policy.wanted() == policy.available() <= (os.cpu_count() or 1)
    monkeypatch.setenv("ALPHABAR_THREADS", "3")
    assert policy.wanted() == 3
    for bad in ("0", "two", "-1"):
        monkeypatch.setenv("ALPHABAR_THREADS", bad)
        with pytest.raises(ValueError, match="ALPHABAR_THREADS must be a positive integer"):
            policy.wanted()


PROBE = """
import hashlib, numpy as np, numba
from alphabar import kernels
x = np.linspace(-1, 1, 2 * 5 * 6 * 8, dtype=np.float32).reshape(2, 5, 6, 8)
w = np.linspace(-1, 1, 9 * 8 * 8, dtype=np.float32).reshape(3, 3, 8, 8)
y, dw = kernels.conv2d(x, w), kernels.conv2d_backward_weight(x, x, 3)[0]
z = kernels.normals(np.empty((3, 2053), np.float32), 5)
bits = hashlib.sha256(z.tobytes() + kernels.categorical(8 * x, 5).tobytes()).hexdigest()
more = hashlib.sha256(y.tobytes() + dw.tobytes()).hexdigest()
sums = np.abs(y).sum(dtype=float), np.abs(dw).sum(dtype=float)
print(bits, more, *sums, numba.threading_layer(), numba.get_num_threads())
"""


def probe(**environment: str) -> list[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "ALPHABAR_"))}
    done = subprocess.run([sys.executable, "-c", PROBE], env=env | environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_other_thread_layers_give_the_same_bits() -> None:
    assert probe(NUMBA_THREADING_LAYER="workqueue", ALPHABAR_THREADS="1") == [*probe()[:4], "workqueue", "1"]


def test_a_plain_machine_gives_the_same_noise_and_nearly_the_same_sums() -> None:
    """Code for a machine without wide vectors: other tiles, and no fused multiply-add."""
    usual, plain = probe(), probe(NUMBA_CPU_NAME="generic")
    assert plain[0] == usual[0]
    assert [float(v) for v in plain[2:4]] == pytest.approx([float(v) for v in usual[2:4]], rel=1e-6)


def test_kernels_work_where_nothing_can_be_cached() -> None:
    code = "import tempfile\ndef refuse(*_, **__): raise OSError\ntempfile.TemporaryFile = refuse\n"
    code += "from alphabar.kernels.cpu import kept\nimport numpy as np\nfrom alphabar.kernels import sum_squares\n"
    code += "print(kept.folders(), sum_squares(np.ones(5, np.float32))[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["()", "5.0"]


def test_layer_norm_of_large_offsets() -> None:
    x = (np.random.default_rng(0).standard_normal((2, 9, 64)) + 1000).astype(np.float32)
    one, zero = np.ones(64, np.float32), np.zeros(64, np.float32)
    y, mean, rstd = kernels.layer_norm(x, one, zero)
    want, m, r = reference.layer_norm(x.astype(np.float64), one.astype(np.float64), zero.astype(np.float64))
    assert np.abs(y - want).max() < 2e-4 and np.abs(mean / m - 1).max() < 1e-6 and np.abs(rstd / r - 1).max() < 1e-5


def test_rotary_in_place() -> None:
    args, _ = arguments("rotary", TABLE["rotary"].tests[3])
    wanted, x = kernels.rotary(*args), args[0].copy()
    assert kernels.rotary(x, *args[1:], out=x) is x and np.array_equal(x, wanted)


@pytest.mark.parametrize(
    ("words", "error", "call"),
    [
        ("x must be .B, T, C.", ValueError, lambda x, c: kernels.layer_norm(x[:, :, :0], c[:0], c[:0])),
        ("x must have 3 dimensions", ValueError, lambda x, c: kernels.layer_norm(x[0], c, c)),
        ("gamma has shape", ValueError, lambda x, c: kernels.layer_norm(x, c[:4], c)),
        ("eps must be positive", ValueError, lambda x, c: kernels.layer_norm(x, c, c, 0)),
        ("scale and shift come together", ValueError, lambda x, c: kernels.layer_norm(x, c, c, scale=x[:, 0])),
        ("mean has shape", ValueError, lambda x, c: kernels.layer_norm_backward(x, x, c, c, x[0], x[0])),
        ("gate has shape", ValueError, lambda x, c: kernels.add_gated(x, x, c)),
        ("h is float64", TypeError, lambda x, c: kernels.add_gated(x, x.astype(float), x[:, 0])),
        ("dy has shape", ValueError, lambda x, c: kernels.silu_backward(x[:1], x)),
        ("x must be of a float dtype", TypeError, lambda x, c: kernels.silu(x.astype(int))),
        ("x must be .B, T, heads, d.", ValueError, lambda x, c: kernels.rotary(x[..., None], x[0, :, :0], x[0, :, :0])),
        ("cos has shape", ValueError, lambda x, c: kernels.rotary(x[:, :, None], x[0, :, :3], x[0, :, :3])),
    ],
)
def test_tokens_that_do_not_fit_are_refused(words: str, error: type[Exception], call: Any) -> None:
    with pytest.raises(error, match=words):
        call(np.ones((2, 3, 8), np.float32), np.ones(8, np.float32))
