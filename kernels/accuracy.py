"""How far a backend is from the definitions: its float32 results against the definition run in float64.

The budget: at most twice the error of the definition run in float32, and a few units in the last place of the largest value;
or, where a faster sum is taken and the precision asked for is not "high", what the kernel's record allows.
What is defined bit by bit (normals, drawn states) is held to the definition in float32, with a budget of zero.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import reference
from .precisions import high
from .registry import TABLE, Case, Kernel

Call = Callable[
    [str, tuple, dict[str, Any]], Any
]  # (kernel, args, kwargs) -> what the kernel returns; arrays may be changed in place

FACTOR = 2.0
FLOOR = 8 * 2.0**-24  # times the largest exact value
FEW = 16  # so few values may all be small because large terms cancel: there the operands' size counts too


@dataclass(frozen=True)
class Error:
    """One output of one call: the largest errors of the backend and of the definition in float32, and what is allowed."""

    output: int
    ours: float
    plain: float
    limit: float

    @property
    def within(self) -> bool:
        return self.ours <= self.limit


def arguments(kernel: Kernel, case: Case, seed: int = 0) -> tuple[tuple, dict[str, Any]]:
    """The float32 arguments of a case."""
    return kernel.make(np.random.default_rng(seed), case, np.float32)


def map_arrays(f: Callable[[np.ndarray], Any], value: Any) -> Any:
    """``value`` with ``f`` applied to every array in it, in tuples and dicts too."""
    if isinstance(value, tuple):
        return tuple(map_arrays(f, v) for v in value)
    if isinstance(value, dict):
        return {k: map_arrays(f, v) for k, v in value.items()}
    return f(value) if isinstance(value, np.ndarray) else value


def outputs(name: str, result: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arrays a call has computed: what it returned and what it changed in place."""
    values = [args[0], *args[2:5]] if name == "adamw_ema" else list(result) if isinstance(result, tuple) else [result]
    return [v for v in (*values, kwargs.get("store"), kwargs.get("tail_out")) if v is not None]


def _largest(arrays: list[np.ndarray]) -> float:
    return max((float(np.abs(a).max()) for a in arrays if a.size), default=0.0)


@dataclass(frozen=True)
class Expected:
    """A case and what comes of it: the outputs of the definition in float64 (or where bits count, float32) and in float32."""

    args: tuple
    kwargs: dict[str, Any]
    exact: list[np.ndarray]
    plain: list[np.ndarray]
    precision: Any


def _run(name: str, f: Call, args: tuple, kwargs: dict[str, Any], as_type: Any) -> list[np.ndarray]:
    with np.errstate(invalid="ignore"):  # an output that is still to be filled may hold anything
        a, k = map_arrays(lambda v: v.astype(as_type) if v.dtype == np.float32 else v.copy(), (args, kwargs))
    return outputs(name, f(name, a, k), a, k)


def expected(kernel: Kernel, case: Case, seed: int = 0) -> Expected:
    """What the definition makes of a case."""
    args, kwargs = arguments(kernel, case, seed)

    def defined(name: str, a: tuple, k: dict[str, Any]) -> Any:
        return getattr(reference, name)(*a, **k)

    plain = _run(kernel.name, defined, args, kwargs, np.float32)
    exact = plain if kernel.bits else _run(kernel.name, defined, args, kwargs, np.float64)
    return Expected(args, kwargs, exact, plain, case.get("precision"))


def errors(kernel: Kernel, case: Case, call: Call, seed: int = 0) -> list[Error]:
    """The errors of every output of one case. Raises AssertionError where an output has another shape, dtype or a wrong NaN."""
    return compare(kernel, expected(kernel, case, seed), call)


def compare(kernel: Kernel, case: Expected, call: Call) -> list[Error]:
    """The errors of every output of a case whose outcome is known."""
    args, kwargs, exact, plain = case.args, case.kwargs, case.exact, case.plain
    ours = _run(kernel.name, call, args, kwargs, np.float32)
    if len(ours) != len(exact):
        raise AssertionError(f"{kernel.name}: {len(ours)} outputs, not {len(exact)}")
    operands: list[np.ndarray] = []
    map_arrays(operands.append, (args, kwargs))
    found = []
    for i, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        if o.shape != e.shape or o.dtype != p.dtype:
            raise AssertionError(f"{kernel.name}: output {i} is {o.dtype} {o.shape}, not {p.dtype} {e.shape}")
        if e.size == 0:
            continue
        scale = _largest([e])
        if e.size < FEW:
            scale = max(scale, _largest([a for a in operands if a.dtype == np.float32]))
        ours_off, plain_off = (float(np.abs(v - e).max()) for v in (o, p))
        limit = 0.0 if kernel.bits else FACTOR * plain_off + FLOOR * scale
        if not high(case.precision):
            limit = max(limit, kernel.slack * scale)
        found.append(Error(i, ours_off, plain_off, limit))
    return found


def all_cases(kernel: Kernel) -> tuple[Case, ...]:
    """The registry's small cases and those that only a GPU's kernels tell apart: widths of access, long heads, wide groups."""
    return (*kernel.tests, *MORE.get(kernel.name, ()))


_NORMS = ({"shape": (2, 6, 4, 12), "groups": 6}, {"shape": (1, 2, 2, 4100), "groups": 1}, {"shape": (2, 3, 3, 70), "groups": 35})
_HEADS = ({"shape": (2, 70, 1, 24)}, {"shape": (1, 37, 2, 33)}, {"shape": (1, 33, 1, 100)}, {"shape": (1, 20, 1, 200)})
_CONVS = (
    {"shape": (1, 9, 9, 8), "kernel": 3, "cout": 72, "upsample": True},
    {"shape": (5, 16, 16, 4), "kernel": 1, "cout": 8},
    {"shape": (1, 5, 4, 72), "kernel": 1, "cout": 8},
)
_ROWS = ({"shape": (3, 64)}, {"shape": (3, 9001)}, {"shape": (2, 20_000), "holes": 0.5})
_TOKENS = ({"shape": (1, 3, 4100), "modulated": True}, {"shape": (2, 2, 7000)}, {"shape": (2, 35, 1040), "modulated": True})
MORE: dict[str, tuple[Case, ...]] = {
    "group_norm_silu": _NORMS,
    "group_norm_silu_backward": _NORMS,
    "attention": _HEADS,
    "attention_backward": _HEADS,
    "cross_entropy": _ROWS,
    "softmax": _ROWS,
    "softmax_backward": _ROWS,
    "layer_norm": _TOKENS,
    "layer_norm_backward": _TOKENS,
    "add_gated_backward": _TOKENS,
    "conv2d": _CONVS,
    "conv2d_backward_input": _CONVS,
    "conv2d_backward_weight": _CONVS,
}
assert MORE.keys() <= TABLE.keys()
