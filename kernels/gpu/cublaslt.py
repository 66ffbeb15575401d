"""Matrix products by cuBLASLt, through ctypes: 1×1 convolutions and linear layers, in float32, TF32 or bfloat16.

CuPy's own cuBLAS cannot be captured in a graph. Here the handle, the descriptors and the algorithm of a shape are made once and
kept, the workspace is an array like any other, and the work goes to CuPy's current stream.

The algorithm is the first of cuBLASLt's heuristics that sums in float32: of its ways to add up the parts of a cut sum only that
through the workspace is allowed, which has a fixed order and rounds nothing to the result's type. Without TF32 the compute type
is float32, which is no tensor core's.

cuBLASLt counts matrices by columns: an array (rows, columns) is to it a matrix of ``columns`` rows, and y = x w is yᵀ = wᵀ xᵀ.
Each function returns None where cuBLASLt has no algorithm, or arrays do not begin at multiples of 16 bytes.
"""

import ctypes
import threading
from ctypes import byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bf16 import BF16
from ..buffers import empty
from ..recording import refuse_in_capture
from .conv_shape import Shape
from .launch import Device, aligned, current
from .libraries import address, load, number, stream

Array = Any

WORKSPACE = 32 << 20  # bytes: what NVIDIA advises for Hopper
ALIGNMENT = 16  # bytes: what is promised of every array

# cublasLt.h, cublas_api.h, library_types.h
R_32F, R_16BF = 0, 14
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77
OP_N, OP_T = 0, 1
DESC_TRANSA, DESC_TRANSB, DESC_EPILOGUE, DESC_BIAS_POINTER = 3, 4, 7, 8
EPILOGUE_DEFAULT, EPILOGUE_BIAS = 1, 4
PREF_MAX_WORKSPACE_BYTES, PREF_REDUCTION_SCHEME_MASK = 1, 3
PREF_MIN_ALIGNMENT_BYTES = (5, 6, 7, 8)  # of A, B, C, D
REDUCTION_SCHEME_COMPUTE_TYPE = 2


class Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Refused(RuntimeError):
    """A function of cuBLASLt failed."""


@dataclass(frozen=True)
class Call:
    """What a plan is for. kind: "forward", "input" or "weight", of which y = x w, x and w is the result."""

    kind: str
    places: int
    cin: int
    cout: int
    low: bool  # bfloat16
    tf32: bool = False  # float32 rounded to TF32
    wide: bool = False  # float32 made of bfloat16
    bias: bool = False
    residual: bool = False


@dataclass(frozen=True)
class Plan:
    """Descriptors, and the algorithm for them."""

    desc: c_void_p
    layouts: tuple[c_void_p, c_void_p, c_void_p]  # of A, B, and C and D
    algorithm: Algorithm
    beta: float


class _Own(threading.local):
    """What a thread has of cuBLASLt."""

    def __init__(self) -> None:
        self.handles: dict[int, c_void_p | None] = {}  # by the number of the GPU; None where there is no cuBLASLt
        self.plans: dict[tuple[int, Call], Plan | None] = {}


_own = _Own()
missing: str | None = None  # why there is no cuBLASLt
refused: dict[Call, str] = {}  # what has no algorithm, and why
_library: Any = None


def available(device: Device) -> bool:
    """Whether this device's arrays can go to cuBLASLt; :data:`missing` says why not."""
    return device.xp is not np and _handle(device) is not None


def _handle(device: Device) -> c_void_p | None:
    gpu = number(device)
    if gpu not in _own.handles:
        refuse_in_capture("starting cuBLASLt")
        _own.handles[gpu] = _started()
    return _own.handles[gpu]


def _opened() -> Any:
    """libcublasLt."""
    path = load("cublasLt")
    for name in (path,) if path else ("libcublasLt.so.13", "libcublasLt.so.12"):
        try:
            library = ctypes.CDLL(name)
        except OSError as e:
            error = e
        else:
            library.cublasLtGetStatusString.restype = c_char_p
            return library
    raise error


def _started() -> c_void_p | None:
    global missing, _library
    try:
        _library = _library or _opened()
        handle = c_void_p()
        _check("cublasLtCreate", byref(handle))
        return handle
    except (OSError, Refused) as e:
        missing = f"cuBLASLt does not start: {e}"
        return None


def _check(name: str, *args: Any) -> None:
    status = getattr(_library, name)(*args)
    if status:
        raise Refused(f"{name}: {_library.cublasLtGetStatusString(c_int(status)).decode()} ({status})")


# ------------------------------------------------------------------------------------------------------------------------- plans


def _set(setter: str, of: c_void_p, attribute: int, value: Any) -> None:
    _check(setter, of, c_int(attribute), byref(value), c_size_t(ctypes.sizeof(value)))


def _matrix(kind: int, rows: int, columns: int) -> c_void_p:
    """The layout of an array (columns, rows)."""
    layout = c_void_p()
    _check("cublasLtMatrixLayoutCreate", byref(layout), c_int(kind), c_uint64(rows), c_uint64(columns), c_int64(rows))
    return layout


def _build(call: Call, handle: c_void_p) -> Plan:
    data = R_16BF if call.low else R_32F
    result = R_32F if call.wide else data
    x, y, w = (call.cin, call.places), (call.cout, call.places), (call.cout, call.cin)
    # D = op(A) op(B): yᵀ = wᵀ xᵀ, xᵀ = w yᵀ, wᵀ = yᵀ x
    a, b, d, transposed = {
        "forward": (w, x, y, (OP_N, OP_N)),
        "input": (w, y, x, (OP_T, OP_N)),
        "weight": (y, x, w, (OP_N, OP_T)),
    }[call.kind]
    desc, preference, found, count = c_void_p(), c_void_p(), Algorithm(), c_int()
    compute = COMPUTE_32F_FAST_TF32 if call.tf32 else COMPUTE_32F
    _check("cublasLtMatmulDescCreate", byref(desc), c_int(compute), c_int(R_32F))
    for attribute, op in zip((DESC_TRANSA, DESC_TRANSB), transposed, strict=True):
        _set("cublasLtMatmulDescSetAttribute", desc, attribute, c_int(op))
    epilogue = EPILOGUE_BIAS if call.bias else EPILOGUE_DEFAULT
    _set("cublasLtMatmulDescSetAttribute", desc, DESC_EPILOGUE, c_uint32(epilogue))
    layouts = _matrix(data, *a), _matrix(data, *b), _matrix(result, *d)
    _check("cublasLtMatmulPreferenceCreate", byref(preference))
    try:
        for attribute, value in (
            (PREF_MAX_WORKSPACE_BYTES, c_uint64(WORKSPACE)),
            (PREF_REDUCTION_SCHEME_MASK, c_uint32(REDUCTION_SCHEME_COMPUTE_TYPE)),
            *((attribute, c_uint32(ALIGNMENT)) for attribute in PREF_MIN_ALIGNMENT_BYTES),
        ):
            _set("cublasLtMatmulPreferenceSetAttribute", preference, attribute, value)
        several = (*layouts, layouts[2], preference, c_int(1), byref(found), byref(count))
        _check("cublasLtMatmulAlgoGetHeuristic", handle, desc, *several)
    finally:
        _check("cublasLtMatmulPreferenceDestroy", preference)
    if count.value < 1 or found.state:
        raise Refused("cublasLtMatmulAlgoGetHeuristic: no algorithm")
    return Plan(desc, layouts, found, 1.0 if call.residual else 0.0)


def _plan(call: Call, device: Device) -> Plan | None:
    key = number(device), call
    if key not in _own.plans:
        refuse_in_capture("choosing an algorithm of cuBLASLt")
        handle = _handle(device)
        assert handle is not None
        try:
            _own.plans[key] = _build(call, handle)
        except Refused as e:
            _own.plans[key], refused[call] = None, str(e)
    return _own.plans[key]


def _run(call: Call, a: Array, b: Array, out: Array, bias: Array | None = None, residual: Array | None = None) -> Array | None:
    """``out`` = op(a) op(b) + bias + residual on the current stream."""
    device = current()
    if not aligned(a, b, out, bias, residual):
        return None
    plan = _plan(call, device)
    if plan is None:
        return None
    if bias is not None:
        _set("cublasLtMatmulDescSetAttribute", plan.desc, DESC_BIAS_POINTER, c_void_p(address(bias)))
    of_a, of_b, of_d = plan.layouts
    workspace = empty((plan.algorithm.workspace,), np.uint8, device.xp)
    first = c_void_p(address(out if residual is None else residual))
    _check(
        "cublasLtMatmul",
        *(_handle(device), plan.desc, byref(c_float(1.0)), c_void_p(address(a)), of_a, c_void_p(address(b)), of_b),
        *(byref(c_float(plan.beta)), first, of_d, c_void_p(address(out)), of_d, byref(plan.algorithm)),
        *(c_void_p(address(workspace)), c_size_t(plan.algorithm.workspace), c_void_p(stream(device))),
    )
    return out


# ------------------------------------------------------------------------------------------------------------- the three passes


def forward(
    x: Array, w: Array, bias: Array | None, s: Shape, out: Array, shift: Array | None, residual: Array | None, tf32: bool
) -> Array | None:
    """``out`` = x w + bias + residual. None with a shift, and with a bias or residual that is not of the result's type."""
    low = x.dtype == BF16
    if shift is not None or any(a is not None and a.dtype != out.dtype for a in (bias, residual)):
        return None
    wide = low and out.dtype == np.float32
    call = Call("forward", s.places, s.cin, s.cout, low, tf32 and not low, wide, bias is not None, residual is not None)
    return _run(call, w, x, out, bias, residual)


def backward_input(dy: Array, w: Array, s: Shape, out: Array, tf32: bool) -> Array | None:
    """``out`` = dy wᵀ."""
    low = dy.dtype == BF16
    return _run(Call("input", s.places, s.cin, s.cout, low, tf32 and not low), w, dy, out)


def backward_weight(x: Array, dy: Array, s: Shape, out: Array, tf32: bool) -> Array | None:
    """``out`` = xᵀ dy, float32 also of bfloat16."""
    low = x.dtype == BF16
    return _run(Call("weight", s.places, s.cin, s.cout, low, tf32 and not low, low), dy, x, out)
