"""Calls of kernels: bound as Python binds, and the CPU's direct way for the commonest steps."""

import inspect
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.kernels import checks, reference

cpu = pytest.importorskip("alphabar.kernels.cpu")


@pytest.fixture
def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x, m = (rng.standard_normal((3, 5, 7)).astype(np.float32) for _ in range(2))
    return x, m, rng.uniform(-1, 1, (4, 13))


@pytest.mark.parametrize("name", kernels.TABLE)
def test_definition_checks_and_cpu_share_one_signature(name: str) -> None:
    def parameters(f: Any) -> dict[str, Any]:
        return {k: p.default for k, p in inspect.signature(f).parameters.items()}

    assert parameters(getattr(reference, name)) == parameters(getattr(cpu, name)) == parameters(getattr(checks, name))


@pytest.mark.parametrize("shape", [(3, 5, 7), (7,), (0, 4), (40, 32, 32), (21, 150, 151)])
def test_a_direct_step_is_the_step(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    x, m = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    rows = rng.uniform(-1, 1, (4, 13))
    with kernels.use("reference"):
        want = kernels.step(x, m, rows, 2)
    np.testing.assert_array_equal(cpu.step_directly(x, m, rows, 2), want)
    np.testing.assert_array_equal(cpu.step(x, m, rows, 2), want)
    np.testing.assert_array_equal(kernels.step(x, m, rows, 2, seed=2**64 - 1), want)
    read_only = rows.copy()
    read_only.setflags(write=False)
    for other in (read_only, np.asfortranarray(rows), rows[:, ::-1][:, ::-1], rows.astype(">f8")):
        np.testing.assert_array_equal(kernels.step(x, m, other, 2), want)
    assert kernels.step(x, m, rows, 2, out=x) is x
    np.testing.assert_array_equal(x, want)


def test_the_direct_way_takes_nothing_else(operands: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    x, m, rows = operands
    fixed = x.copy()
    fixed.setflags(write=False)
    other = np.empty((3, 7, 5), np.float32)
    arguments = {"x": x, "m": m, "rows": rows, "i": 1}
    changed: list[dict[str, Any]] = [
        *({"x": v} for v in (x.astype(np.float64), fixed, x[:, ::-1], other, x[0, 0, 0], x.astype(">f4"), x.tolist(), None)),
        *({"m": v} for v in (m.astype(np.float64), m[:, ::-1], other, None)),
        *({"rows": v} for v in (rows.astype(np.float32), rows[:, :12], rows[:, ::-1], rows[0], None)),
        *({"i": v} for v in (-1, 4, True, np.int64(1), 1.0, None)),
        *({"out": v} for v in (fixed, other, x.astype(np.float64), x[:, ::-1], 3)),
        *({k: v} for k in ("seed", "stream", "first_sample") for v in (-1, 2**64, True, 0.0)),
        *({"noise": v} for v in (True, False, x)),
        *({k: v} for k, v in (("history", (x,)), ("history", []), ("guidance", x), ("store", x), ("clip", (-1.0, 1.0)))),
    ]
    assert cpu.step_directly(**arguments) is not None
    for change in changed:
        assert cpu.step_directly(**arguments | change) is None, change


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "missing a required argument: 'x'"),
        ((1, 2, 3), {}, "missing a required argument: 'i'"),
        ((1, 2, 3, 4), {"x": 5}, "multiple values for argument 'x'"),
        ((1, 2, 3, 4), {"nothing": 5}, "unexpected keyword argument 'nothing'"),
        ((1,) * 14, {}, "too many positional arguments"),
    ],
)
def test_calls_that_do_not_fit_the_signature(args: tuple, kwargs: dict[str, Any], message: str) -> None:
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            kernels.step(*args, **kwargs)
