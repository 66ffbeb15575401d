"""Sampler steps, noising and norms as passes over memory: every size and tail, every alignment, past the caches, in parts."""

import sys
from itertools import product
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.kernels import reference

pytest.importorskip("numba")
pytest.importorskip("alphabar.kernels.cpu")

SIZES = (1, 15, 16, 17, 63, 255, 256, 257, 511, 513, 1023, 1024, 1025, 2053)
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"clip": (-0.5, 0.75)},
    {"noise": True},
    {"noise": True, "clip": (-0.5, 0.75), "history": 3, "guidance": True, "store": True},
    {"history": 1, "clip": (-0.5, 0.75), "store": True},
    {"noise": "given", "guidance": True},
)
ROWS = np.random.default_rng(2).uniform(-1, 1, (3, len(reference.ROW)))
LEVELS = np.linspace(1, 0, 11), np.linspace(0, 1, 11)


def module(name: str) -> Any:
    return sys.modules[f"alphabar.kernels.cpu.{name}"]


@pytest.fixture(params=[False, True], ids=["cached", "past"])
def past(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of writing: through the caches, and past them as large results are."""
    monkeypatch.setattr(module("diffusion"), "PAST", 0 if request.param else 1 << 60)


def placed(shape: tuple[int, ...], offset: int, seed: int | None = None) -> np.ndarray:
    """An array that begins ``offset`` bytes after a multiple of 64, between guards that must stay."""
    count = int(np.prod(shape))
    room = np.full(4 * count + 256, 0xA5, np.uint8)
    start = -room.ctypes.data % 64 + 64 + offset
    a = room[start : start + 4 * count].view(np.float32).reshape(shape)
    a[...] = 7 if seed is None else np.random.default_rng(seed).standard_normal(shape)
    return a


def unharmed(a: np.ndarray) -> bool:
    room = a
    while isinstance(room.base, np.ndarray):
        room = room.base
    before, after = room[: a.ctypes.data - room.ctypes.data], room[a.ctypes.data - room.ctypes.data + a.nbytes :]
    return bool((before == 0xA5).all() and (after == 0xA5).all())


def step_of(form: dict[str, Any], shape: tuple[int, ...], offset: int) -> tuple[tuple, dict[str, Any]]:
    x, m = placed(shape, offset, 0), placed(shape, offset, 1)
    options = dict(form, history=tuple(placed(shape, offset, 2 + k) for k in range(form.get("history", 0))), seed=2**40 + 5)
    if "guidance" in form:
        options["guidance"] = placed(shape, offset, 6)
    if form.get("noise") == "given":
        options["noise"] = placed(shape, offset, 7)
    if "store" in form:
        options["store"] = placed(shape, offset)
    return (x, m, ROWS, 1), options


def same_as_defined(args: tuple, options: dict[str, Any], out: np.ndarray) -> bool:
    """Whether a step gives the definition's bits, and writes nowhere else."""
    wanted_store = np.empty_like(out) if "store" in options else None
    wanted = reference.step(*args, **{**options, "store": wanted_store})
    assert kernels.step(*args, **options, out=out) is out
    stored = options.get("store")
    kept = wanted_store is None or np.array_equal(stored, wanted_store)
    return bool(np.array_equal(out, wanted) and kept and unharmed(out) and (stored is None or unharmed(stored)))


@pytest.mark.usefixtures("past")
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(f) or "plain")
def test_steps_of_every_size_and_place(form: dict[str, Any]) -> None:
    for size, batch, offset in product(SIZES, (1, 3), (0, 4, 20, 60)):
        args, options = step_of(form, (batch, size), offset)
        options["first_sample"] = size
        assert same_as_defined(args, options, placed((batch, size), (offset + 8) % 64)), (size, batch, offset)
        assert same_as_defined(args, options, args[0]), (size, batch, offset)


@pytest.mark.usefixtures("past")
@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(f) or "plain")
def test_long_steps_are_shared_out(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for workers, shape in product((1, 2, 3, 7), ((3, 20011), (1, 70001))):
        monkeypatch.setattr(module("diffusion"), "threads", lambda count=workers: count)
        args, options = step_of(form, shape, 16)
        assert same_as_defined(args, options, placed(shape, 4)), (workers, shape)


@pytest.mark.usefixtures("past")
@pytest.mark.parametrize("given", [False, True])
def test_noising_of_every_size_and_place(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [((batch, size), workers) for size, batch in product(SIZES, (1, 3)) for workers in (1,)]
    shapes += [(shape, workers) for shape in ((3, 20011), (1, 70001)) for workers in (1, 2, 3)]
    for (shape, workers), offset in product(shapes, (0, 4, 60)):
        monkeypatch.setattr(module("diffusion"), "threads", lambda count=workers: count)
        x0, t = placed(shape, offset, 0), np.arange(shape[0]) * 5
        eps, options = (placed(shape, 8, 1) if given else None), {"seed": 2**40, "step": 3, "first_sample": 2**32 - 2}
        wanted, noise = reference.q_sample(x0, t, *LEVELS, eps, **options)
        out, eps_out = placed(shape, offset), placed(shape, 24)
        x_t, made = kernels.q_sample(x0, t, *LEVELS, eps, **options, out=out, eps_out=eps_out)
        assert x_t is out and made is eps_out, shape
        assert np.array_equal(out, wanted) and np.array_equal(made, noise) and unharmed(out) and unharmed(eps_out), shape
        assert np.array_equal(kernels.q_sample(x0, t, *LEVELS, eps, **options, out=x0)[0], wanted), shape


@pytest.mark.parametrize("shape", [(1, 70001), (3, 20011), (70, 600), (200, 200)])
def test_normals_are_shared_out(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = reference.normals(np.empty(shape, np.float32), 9, 1, 2, 3)
    for workers, offset in product((1, 2, 3, 7), (0, 4, 60)):
        monkeypatch.setattr(module("random"), "threads", lambda count=workers: count)
        out = placed(shape, offset)
        assert np.array_equal(kernels.normals(out, 9, 1, 2, 3), wanted) and unharmed(out)


def test_arrays_between_the_bytes_of_a_float() -> None:
    """Views of packed records: such an operand is copied, such a result is left to the definition."""
    for offset in (1, 2, 3):
        args, options = step_of(FORMS[3], (2, 300), 0)
        wanted = reference.step(*args, **options)
        shifted, kwargs = step_of(FORMS[3], (2, 300), offset)
        assert not shifted[0].flags.aligned
        assert np.array_equal(kernels.step(*shifted, **{**kwargs, "store": None}), wanted)
        out = placed((2, 300), offset)
        assert kernels.step(*args, **options, out=out) is out
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [(1, 300, 1, 48), (1, 129, 3, 6), (2, 600, 1, 32), (3, 128, 2, 70), (5, 257, 1, 12)])
def test_norms_of_few_samples_are_shared_out_by_rows(case: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits from one worker, that takes whole samples, and from many, that take parts of them."""
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal(case, dtype=np.float32) + 3 for _ in range(2))
    gamma, beta = rng.standard_normal((2, case[-1]), dtype=np.float32)
    modulation = dict(zip(("scale", "shift"), rng.standard_normal((2, case[0], case[-1]), dtype=np.float32), strict=True))
    for extra in ({}, modulation):
        results = []
        for workers in (1, 2, 3, 4, 9):
            monkeypatch.setattr(module("norm"), "threads", lambda count=workers: count)
            y, mean, rstd = kernels.group_norm_silu(x, gamma, beta, 2, **extra)
            back = kernels.group_norm_silu_backward(dy, x, gamma, beta, 2, mean, rstd, **extra)
            cut, tail = (np.ascontiguousarray(a) for a in np.split(x, [5], axis=-1))
            tail_out = np.empty_like(tail)
            of_two = kernels.group_norm_silu(cut, gamma, beta, 2, **extra, tail=tail)
            back_two = kernels.group_norm_silu_backward(
                dy, cut, gamma, beta, 2, mean, rstd, **extra, tail=tail, tail_out=tail_out
            )
            results.append([a for a in (y, mean, rstd, *back, *of_two, *back_two, tail_out) if a is not None])
        for other in results[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))
