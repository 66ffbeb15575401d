"""Every kernel of the registry over its large cases, beside PyTorch.

    python -m pytest bench                                    # the table on the terminal
    python -m pytest bench --compiled --write cpu-kernels     # with torch.compile, and into bench/results/

In each round PyTorch's contestants run first (in pytest-benchmark's untimed set-up), then our kernel, whose seconds per call
pytest-benchmark reports: all are measured in turn under the same conditions.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the benchmarks compare with PyTorch")  # before our kernels set their OpenMP pool up

from alphabar import kernels  # noqa: E402
from alphabar.kernels import TABLE, reference  # noqa: E402
from bench import report, timing, torch_ops  # noqa: E402

CLOCK = timing.Clock()
CASES = [(name, i) for name, k in TABLE.items() for i in range(len(k.benches))]


def label(case: Mapping[str, Any]) -> str:
    """ "32x32x32x64 kernel=3 cout=64" for a case of the registry."""
    rest = " ".join(f"{k}={v}" for k, v in case.items() if k != "shape")
    return f"{'x'.join(map(str, case['shape']))} {rest}".strip()


@pytest.fixture(scope="module", autouse=True)
def machine() -> None:
    """The same threads for both, and a malloc that keeps what torch's temporaries free."""
    from alphabar.kernels.cpu import threads

    torch.set_num_threads(threads.threads())
    timing.keep_freed_memory()


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


def arguments(name: str, case: dict[str, Any], dtype: Any, made: bool) -> tuple[tuple, dict[str, Any]]:
    """Arguments of one call; without ``made`` the noise that the kernel would make is given instead (for the errors)."""
    args, kwargs = TABLE[name].make(np.random.default_rng(0), case, np.float32)
    if not made and name in ("q_sample", "step"):
        key = "eps" if name == "q_sample" else "noise"
        if kwargs[key] is (None if name == "q_sample" else True):
            kwargs[key] = np.random.default_rng(1).standard_normal(args[0].shape).astype(np.float32)
    return tuple(cast(v, dtype) for v in args), {k: cast(v, dtype) for k, v in kwargs.items()}


def errors(name: str, case: dict[str, Any]) -> tuple[float | None, float | None]:
    """Relative L2 errors of our float32 kernel and of torch's float32 against the definition in float64."""
    if TABLE[name].bits:  # the definition is float32 itself
        return None, None
    args, kwargs = arguments(name, case, np.float64, made=False)
    truth = outputs(name, getattr(reference, name)(*args, **kwargs), args)
    args, kwargs = arguments(name, case, np.float32, made=False)
    t_args, t_kwargs = tuple(map(to_torch, args)), {k: to_torch(v) for k, v in kwargs.items()}
    ours = outputs(name, getattr(kernels, name)(*args, **kwargs), args)
    theirs = outputs(name, torch_ops.OPS[name](*t_args, **t_kwargs), t_args)

    def worst(found: list[np.ndarray]) -> float:
        return max(float(np.linalg.norm(f - t) / np.linalg.norm(t)) for f, t in zip(found, truth, strict=True))

    return worst(ours), worst(theirs)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("name", "i"), CASES, ids=[f"{n}-{label(TABLE[n].benches[i])}" for n, i in CASES])
def test_kernel(name: str, i: int, benchmark: Any, request: pytest.FixtureRequest) -> None:
    case = dict(TABLE[name].benches[i])
    args, kwargs = arguments(name, case, np.float32, made=True)
    t_args, t_kwargs = tuple(map(to_torch, args)), {k: to_torch(v) for k, v in kwargs.items()}
    pool, ours = kernels.Pool(), getattr(kernels, name)

    def alphabar() -> None:
        with pool:
            ours(*args, **kwargs)

    contestants: dict[str, Callable[[], object]] = {"torch": torch_ops.timed(name, t_args, t_kwargs)}
    if request.config.getoption("--compiled"):
        torch.compiler.reset()
        compiled = torch_ops.timed(name, t_args, t_kwargs, compiled=True)
        try:
            compiled()
            contestants["compiled"] = compiled
        except torch._dynamo.exc.TorchDynamoException:  # PyTorch cannot build it (its fused AdamW): the column stays empty
            pass
    calls = {k: timing.calls_per_batch(f) for k, f in contestants.items()}
    batches: dict[str, list[tuple[float, bool]]] = {k: [] for k in (*contestants, "alphabar")}
    ours_calls = timing.calls_per_batch(alphabar)

    def opponents() -> None:
        for k, f in contestants.items():
            batches[k].append(timing.timed_batch(f, calls[k]))

    def batch() -> None:
        seconds, kept = timing.timed_batch(alphabar, ours_calls)
        batches["alphabar"].append((seconds, kept))
        CLOCK.now += seconds

    benchmark.group = name
    benchmark.pedantic(batch, setup=opponents, rounds=request.config.getoption("--rounds"), warmup_rounds=0)
    times = {k: timing.summary(b).median for k, b in batches.items()}
    error, torch_error = errors(name, case)
    row = {
        "kernel": name,
        "case": label(case),
        "alphabar_s": times["alphabar"],
        "torch_s": times["torch"],
        "compiled_s": times.get("compiled"),
        "ratio": times["torch"] / times["alphabar"],
        "ratio_compiled": times["compiled"] / times["alphabar"] if "compiled" in times else None,
        "bytes": TABLE[name].moved(case),
        "flops": TABLE[name].flops(case),
        "error": error,
        "torch_error": torch_error,
    }
    benchmark.extra_info.update(row)
    request.config.stash[report.ROWS].append(row)
    assert error is None or error <= max(2 * (torch_error or 0), 1e-6)
