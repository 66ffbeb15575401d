"""The choice of backend: by the array's library and dtype, falling to the reference where no fast kernel takes the arguments.

``ALPHABAR_KERNELS=reference`` in the environment, or ``with use("reference"):``, makes every call run the definition.
"""

import functools
import importlib
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from . import checks, precisions, reference
from .arrays import is_cupy, is_foreign, is_native, native, restore
from .bf16 import BF16
from .recording import refuse
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


# What a kernel writes must be contiguous and aligned as it is; what it only reads is copied where it is not.
_WRITTEN = {"adamw_ema": ("param", "m", "v", "ema")}
_RESULTS = ("out", "store", "eps_out", "tail_out")
_SEQUENCES = ("history", "pad", "input_shape", "clip")  # tuples, which a caller may give as lists
# Coefficient tables (rows, signal and noise levels) and Σ grad² may be float64 beside float32 data.
_TABLES = {
    "q_sample": frozenset(("signal", "noise")),
    "step": frozenset(("rows",)),
    "adamw_ema": frozenset(("norm_sq",)),
    "categorical_posterior": frozenset(("rows",)),
    "categorical_q_sample": frozenset(("keep",)),
}
_BF16 = (  # which the GPU's kernels compute in bfloat16 too, of contiguous arrays
    *("conv2d", "conv2d_backward_input", "conv2d_backward_weight", "attention", "attention_backward"),
    *("group_norm_silu", "group_norm_silu_backward"),
)
_DIRECTLY = {"step": "step_directly"}  # functions of the CPU that look first whether they can take a call as it is
_DTYPES = {name: frozenset(map(np.dtype, k.dtypes)) for name, k in TABLE.items()}
_SCALARS = frozenset((int, float, bool, type(None)))
_PLAIN = _SCALARS | {np.ndarray, tuple}  # types that need no question about DLPack
_FLOAT32 = np.dtype(np.float32)


def chosen() -> str:
    """What :func:`use` or ALPHABAR_KERNELS asks for. ValueError where that, or the precision in force, is none that there is."""
    precisions.high()
    choice = _choice.get()
    if choice not in BACKENDS:
        raise ValueError(f"ALPHABAR_KERNELS must be one of {BACKENDS}, not {choice!r}")
    return choice


def backend_for(name: str, bound: dict[str, Any]) -> str:
    """ "cpu", "gpu" or "reference" for these arguments (a mapping of the kernel's parameter names)."""
    if chosen() == "reference":
        return "reference"
    dtypes, tables = _DTYPES[name], _TABLES.get(name, ())
    first = None
    for k, v in bound.items():
        if type(v) in _SCALARS or k in tables:
            continue
        for a in v if type(v) is tuple else (v,):
            if is_native(a):
                if a.dtype.kind == "f" and a.dtype not in dtypes:
                    return "reference"
                first = a if first is None else first
    if first is None:
        return "reference"
    for k in _WRITTEN.get(name, _RESULTS):
        a = bound.get(k)
        if a is not None and is_native(a) and not (a.flags.c_contiguous and getattr(a.flags, "aligned", True)):
            return "reference"
    return "gpu" if is_cupy(first) else "cpu"


def _contiguous(v: Any) -> Any:
    if type(v) is tuple:
        return tuple(map(_contiguous, v))
    if is_native(v) and not v.flags.c_contiguous:
        return v.copy(order="C")
    return v


def _writable(v: Any) -> Any:
    """As :func:`_contiguous`, and a copy of an array that is read-only or misaligned, which Numba takes for another type."""
    if type(v) is tuple:
        return tuple(map(_writable, v))
    if isinstance(v, np.ndarray) and not v.flags.carray:
        return v.copy(order="C")
    return v


def _to_native(v: Any) -> Any:
    return tuple(map(_to_native, v)) if isinstance(v, tuple) else native(v)


def _as_they_are(given: Iterable[tuple[str, Any]], tables: Collection[str], dtypes: Collection[Any]) -> bool:
    """Whether the CPU's kernel takes all arguments without a copy: one pass that settles most calls."""
    for k, v in given:
        kind = type(v)
        if kind in _SCALARS:
            continue
        if kind is np.ndarray:
            if k in tables:
                if not v.flags.c_contiguous:
                    return False
            elif not v.flags.carray or (v.dtype is not _FLOAT32 and v.dtype.kind == "f" and v.dtype not in dtypes):
                return False
        elif kind is not tuple or (v and not _as_they_are([("", a) for a in v], (), dtypes)):
            return False
    return True


def _refuse_bf16(name: str, given: dict[str, Any]) -> None:
    """TypeError where a definition, which computes with numbers, would be given the bits of bfloat16."""
    for k, v in given.items():
        if is_native(v) and v.dtype == BF16:
            raise TypeError(f"{name} by its definition takes no bfloat16 ({k}): only a GPU's kernel does, of contiguous arrays")


def kernel(name: str) -> Callable[..., Any]:
    """The public function of a kernel: checks the arguments, exchanges foreign arrays, runs the chosen backend."""
    definition = getattr(reference, name)
    signature = inspect.signature(definition)
    check = getattr(checks, name)
    check.__defaults__ = definition.__defaults__  # so that it can be called as the kernel was
    defaults = {k: p.default for k, p in signature.parameters.items()}
    names = tuple(defaults)
    written, tables, dtypes = _WRITTEN.get(name, _RESULTS), _TABLES.get(name, frozenset()), _DTYPES[name]
    sequences = tuple(k for k in _SEQUENCES if k in defaults)
    takes_bf16, on_cpu, directly = name in _BF16, ("cpu", name), ("cpu", _DIRECTLY[name]) if name in _DIRECTLY else None
    forms: dict[tuple, tuple[str, ...]] = {}  # of calls whose arguments have fitted the signature: their names in order

    @functools.wraps(definition)
    def call(*args: Any, **kwargs: Any) -> Any:
        if directly is not None and _choice.get() == "auto":
            try:
                result = (_loaded.get(directly) or _load(*directly))(*args, **kwargs)
            except TypeError:  # arguments that do not fit the signature: said below
                result = None
            if result is not None:
                return result
        said = forms.get((len(args), *kwargs))
        if said is None:
            signature.bind(*args, **kwargs)  # raises what Python raises
            said = forms[len(args), *kwargs] = (*names[: len(args)], *kwargs)
        if _choice.get() == "auto" and _as_they_are(zip(said, (*args, *kwargs.values()), strict=True), tables, dtypes):
            check(*args, **kwargs)
            return (_loaded.get(on_cpu) or _load(*on_cpu))(*args, **kwargs)
        given = defaults | dict(zip(said, (*args, *kwargs.values()), strict=True))
        for k in sequences:
            if type(given[k]) is list:
                given[k] = tuple(given[k])
        foreign = next((v for v in given.values() if type(v) not in _PLAIN and is_foreign(v)), None)
        originals = given
        if foreign is not None:
            given = {k: _to_native(v) for k, v in given.items()}
        check(**given)
        for k in written:
            a = given.get(k)
            if isinstance(a, np.ndarray) and not a.flags.writeable:
                raise ValueError(f"{k} must be writable, not read-only")
        backend = backend_for(name, given)
        if backend == "reference":
            if takes_bf16:
                _refuse_bf16(name, given)
            refuse("a kernel's definition")
            result = definition(**given)
        else:
            run = _loaded.get((backend, name)) or _load(backend, name)
            plain = given.keys() if backend == "gpu" else tables
            ready = {k: v if type(v) in _SCALARS else _contiguous(v) if k in plain else _writable(v) for k, v in given.items()}
            result = run(**ready)
        return result if foreign is None else _restored(result, given, originals, foreign)

    return call


_loaded: dict[tuple[str, str], Callable[..., Any]] = {}


def _load(backend: str, name: str) -> Callable[..., Any]:
    _loaded[backend, name] = run = getattr(importlib.import_module(f".{backend}", __package__), name)
    return run


def _restored(result: Any, natives: dict[str, Any], originals: dict[str, Any], kind: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_restored(r, natives, originals, kind) for r in result)
    for k, v in natives.items():
        if result is v and isinstance(v, np.ndarray):
            return originals[k]
    return restore(result, kind)
