"""The choice of backend: by the array's library and dtype, falling to the reference where no fast kernel takes the arguments.

``ALPHABAR_KERNELS=reference`` in the environment, or ``with use("reference"):``, makes every call run the definition.
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from . import checks, reference
from .arrays import is_cupy, is_foreign, is_native, native, restore
from .registry import TABLE

BACKENDS = ("auto", "reference")
_DEFAULT: str = os.environ.get("ALPHABAR_KERNELS", "auto")
_choice: ContextVar[str] = ContextVar("backend", default=_DEFAULT)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Run the block with ``backend``: "auto" (the fastest that takes the arguments) or "reference"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, not {backend!r}")
    token = _choice.set(backend)
    try:
        yield
    finally:
        _choice.reset(token)


def _floats(values: Iterator[Any]) -> Iterator[Any]:
    for v in values:
        if isinstance(v, tuple):
            yield from _floats(iter(v))
        elif is_native(v) and v.dtype.kind == "f":
            yield v


def backend_for(name: str, bound: dict[str, Any]) -> str:
    """ "cpu", "gpu" or "reference" for these arguments (a mapping of the kernel's parameter names)."""
    if _choice.get() not in BACKENDS:
        raise ValueError(f"ALPHABAR_KERNELS must be one of {BACKENDS}, not {_choice.get()!r}")
    if _choice.get() == "reference":
        return "reference"
    dtypes = TABLE[name].dtypes
    # the coefficient tables (rows, signal, noise levels) and Σ grad² may be float64 beside float32 data
    data = list(
        _floats(
            v for k, v in bound.items() if k not in ("rows", "signal", "norm_sq") and not (k == "noise" and name == "q_sample")
        )
    )
    if not data or any(a.dtype.name not in dtypes for a in data):
        return "reference"
    if not all(
        a.flags.c_contiguous for k in ("out", "store", "eps_out", "param", "m", "v", "ema") if is_native(a := bound.get(k))
    ):
        return "reference"
    return "gpu" if is_cupy(data[0]) else "cpu"


def _contiguous(v: Any) -> Any:
    if isinstance(v, tuple):
        return tuple(_contiguous(x) for x in v)
    if is_native(v) and not v.flags.c_contiguous:
        return v.copy(order="C")
    return v


def _to_native(v: Any) -> Any:
    return tuple(map(_to_native, v)) if isinstance(v, tuple) else native(v)


def kernel(name: str) -> Callable[..., Any]:
    """The public function of a kernel: checks the arguments, exchanges foreign arrays, runs the chosen backend."""
    definition = getattr(reference, name)
    signature = inspect.signature(definition)
    check = getattr(checks, name)

    @functools.wraps(definition)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        foreign = next((v for v in given.values() if is_foreign(v)), None)
        if foreign is not None:
            given = {k: _to_native(v) for k, v in given.items()}
        check(**given)
        backend = backend_for(name, given)
        if backend == "reference":
            result = definition(**given)
        else:
            module = importlib.import_module(f".{backend}", __package__)
            result = getattr(module, name)(**{k: _contiguous(v) for k, v in given.items()})
        if foreign is None:
            return result
        return _restored(result, given, bound.arguments, foreign)

    return call


def _restored(result: Any, natives: dict[str, Any], originals: dict[str, Any], kind: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_restored(r, natives, originals, kind) for r in result)
    for k, v in natives.items():
        if result is v and isinstance(v, np.ndarray):
            return originals[k]
    return restore(result, kind)
