"""Every kernel of the registry over its large cases, beside PyTorch.

    python -m pytest bench/bench_kernels.py                   # the table on the terminal
    python -m pytest bench --compiled --write cpu             # all benchmarks, with torch.compile, and into bench/results/

In each round PyTorch's contestants run first (in pytest-benchmark's untimed set-up), then our kernel, whose seconds per call
pytest-benchmark reports: all are measured in turn under the same conditions.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the benchmarks compare with PyTorch")  # before our kernels set their OpenMP pool up

from alphabar import kernels  # noqa: E402
from alphabar.kernels import TABLE, reference  # noqa: E402
from bench import report, timing, torch_in_place, torch_ops  # noqa: E402
from bench.limits import Limits  # noqa: E402

CLOCK = timing.Clock()
CASES = [(name, i) for name, k in TABLE.items() for i in range(len(k.benches))]
SAMPLES = 8  # of the batch that the errors are measured on


def label(case: Mapping[str, Any]) -> str:
    """ "32x32x32x64 kernel=3 cout=64" for a case of the registry."""
    rest = " ".join(f"{k}={v}" for k, v in case.items() if k != "shape")
    return f"{'x'.join(map(str, case['shape']))} {rest}".strip()


def outputs(name: str, result: Any, args: tuple) -> list[np.ndarray]:
    """The arrays a call has computed: what it returned, or what it changed in place."""
    values = args[:5] if name == "adamw_ema" else result if isinstance(result, tuple) else (result,)
    return [np.asarray(v) for v in values if v is not None]


def to_torch(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(to_torch, value))
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def cast(value: Any, dtype: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(cast(v, dtype) for v in value)
    return value.astype(dtype) if getattr(value, "dtype", None) == np.float32 else value


def arguments(name: str, case: Mapping[str, Any], dtype: Any, made: bool) -> tuple[tuple, dict[str, Any]]:
    """Arguments of one call; without ``made`` the noise that the kernel would make is given instead (for the errors)."""
    args, kwargs = TABLE[name].make(np.random.default_rng(0), case, np.float32)
    if not made and name in ("q_sample", "step"):
        key = "eps" if name == "q_sample" else "noise"
        if kwargs[key] is (None if name == "q_sample" else True):
            kwargs[key] = np.random.default_rng(1).standard_normal(args[0].shape).astype(np.float32)
    return tuple(cast(v, dtype) for v in args), {k: cast(v, dtype) for k, v in kwargs.items()}


def errors(name: str, case: dict[str, Any]) -> tuple[float | None, float | None]:
    """Relative L2 errors of our float32 kernel and of torch's float32 against the definition in float64, over a smaller batch."""
    if TABLE[name].bits:  # the definition is float32 itself
        return None, None
    batch, *rest = case["shape"]
    small = case | {"shape": (min(batch, SAMPLES), *rest) if rest else (batch,)}
    args, kwargs = arguments(name, small, np.float64, made=False)
    truth = outputs(name, getattr(reference, name)(*args, **kwargs), args)
    args, kwargs = arguments(name, small, np.float32, made=False)
    t_args, t_kwargs = tuple(map(to_torch, args)), {k: to_torch(v) for k, v in kwargs.items()}
    ours = outputs(name, getattr(kernels, name)(*args, **kwargs), args)
    theirs = outputs(name, torch_ops.OPS[name](*t_args, **t_kwargs), t_args)

    def worst(found: list[np.ndarray]) -> float:
        return max(float(np.linalg.norm(f - t) / np.linalg.norm(t)) for f, t in zip(found, truth, strict=True))

    return worst(ours), worst(theirs)


def opponents(name: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """PyTorch's eager contestants: in either memory format where there are images, and without allocations where it can."""
    args, kwargs = tuple(map(to_torch, args)), {k: to_torch(v) for k, v in kwargs.items()}
    found = {"torch": torch_ops.timed(name, torch_ops.channels_last(name, args), kwargs)}
    if (other := torch_ops.contiguous(name, args, kwargs)) is not None:
        found["contiguous"] = torch_ops.timed(name, *other)
    if (bare := torch_in_place.timed(name, args, kwargs)) is not None:
        found["in place"] = bare
    return found


def room(name: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays for the results, by the parameters that take them, where the arguments do not name any."""
    takes = [k for k in list(signature(getattr(kernels, name)).parameters)[len(args) :] if k in ("out", "eps_out")]
    return dict(zip(takes, outputs(name, getattr(kernels, name)(*args, **kwargs), args), strict=False))


def compiled(name: str, args: tuple, kwargs: dict[str, Any]) -> Callable[[], object] | None:
    """torch.compile's contestant; None where PyTorch cannot build it (its fused AdamW)."""
    torch.compiler.reset()
    args, kwargs = tuple(map(to_torch, args)), {k: to_torch(v) for k, v in kwargs.items()}
    call = torch_ops.timed(name, torch_ops.channels_last(name, args), kwargs, compiled=True)
    try:
        call()
    except torch._dynamo.exc.TorchDynamoException:
        return None
    return call


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("name", "i"), CASES, ids=[f"{n}-{label(TABLE[n].benches[i])}" for n, i in CASES])
def test_kernel(name: str, i: int, benchmark: Any, request: pytest.FixtureRequest, limits: Limits) -> None:
    case = dict(TABLE[name].benches[i])
    args, kwargs = arguments(name, case, np.float32, made=True)
    pool, kernel = kernels.Pool(), getattr(kernels, name)

    def alphabar() -> None:
        with pool:
            kernel(*args, **kwargs)

    contestants = opponents(name, args, kwargs)
    if request.config.getoption("--compiled") and (call := compiled(name, args, kwargs)) is not None:
        contestants["compiled"] = call
    if "in place" in contestants:
        options = kwargs | room(name, args, kwargs)
        contestants["alphabar in place"] = lambda: kernel(*args, **options)
    rounds = request.config.getoption("--rounds")
    times = {k: t.median for k, t in timing.against(benchmark, CLOCK, contestants, alphabar, rounds).items()}
    error, torch_error = errors(name, case)
    moved, flops = TABLE[name].moved(case), TABLE[name].flops(case)
    row = {
        "kernel": name,
        "case": label(case),
        "alphabar_s": times["alphabar"],
        "torch_s": min(times[k] for k in ("torch", "contiguous") if k in times),
        "formats_s": {"channels last": times["torch"], "contiguous": times["contiguous"]} if "contiguous" in times else None,
        "in_place_s": times.get("in place"),
        "own_in_place_s": times.get("alphabar in place"),
        "compiled_s": times.get("compiled"),
        "bytes": moved,
        "flops": flops,
        "share": limits.least(moved, flops) / times["alphabar"],
        "bound": limits.bound(moved, flops),
        "error": error,
        "torch_error": torch_error,
    }
    benchmark.extra_info.update(row)
    request.config.stash[report.FOUND].kernels.append(row)
    floor = 1e-5 if TABLE[name].slack and case.get("precision") != "high" else 1e-6
    assert error is None or error <= max(2 * (torch_error or 0), floor)
