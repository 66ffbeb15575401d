"""Convolutions by cuDNN, through the graphs of nvidia-cudnn-frontend: NHWC, in float32, TF32 or bfloat16.

A convolution and what is added to its result make one graph. Its plan is found once for a shape and kept: the first engine of
cuDNN's heuristics whose sums have a fixed order and are plain ones (no Winograd, no FFT, no partial sums of lower precision), and
that without TF32 is on no tensor cores. Tensors are bare addresses, the work goes to CuPy's current stream, the workspace is an
array like any other: a captured graph holds the call once a first run has found the plan.

cuDNN takes its weights as (Cout, k, k, Cin). They are transposed for each call, which reads and writes them once: they change
from step to step, and a step may be a captured graph.

Each function returns None where cuDNN has no plan, or arrays do not begin at multiples of 16 bytes, as its descriptors promise.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..bf16 import BF16
from ..buffers import empty
from ..recording import refuse_in_capture
from .conv_shape import Shape
from .launch import Device, aligned, current
from .libraries import address, load, number, stream
from .transpose import transpose

Array = Any

MOST_WORKSPACE = 256 << 20  # bytes
X, W, Y, BIAS, SHIFT, RESIDUAL = range(1, 7)  # the tensors of a graph: y = w * x + bias + shift + residual


@dataclass(frozen=True)
class Call:
    """What a plan is for. kind: "forward", "input" or "weight", of which y, x and w is the result."""

    kind: str
    shape: Shape
    low: bool  # bfloat16
    tf32: bool = False  # float32 rounded to TF32
    wide: bool = False  # float32 made of bfloat16
    terms: tuple[int, ...] = ()  # of BIAS, SHIFT, RESIDUAL


@dataclass(frozen=True)
class Plan:
    """A graph that has an engine."""

    graph: Any
    workspace: int  # bytes


class _Own(threading.local):
    """What a thread has of cuDNN: a handle serves one at a time."""

    def __init__(self) -> None:
        self.handles: dict[int, Any] = {}  # by the number of the GPU; None where there is no cuDNN
        self.plans: dict[tuple[int, Call], Plan | None] = {}


_own = _Own()
missing: str | None = None  # why there is no cuDNN
refused: dict[Call, str] = {}  # what has no plan, and why


def available(device: Device) -> bool:
    """Whether this device's arrays can go to cuDNN; :data:`missing` says why not."""
    return device.xp is not np and _handle(device) is not None


def _handle(device: Device) -> Any:
    gpu = number(device)
    if gpu not in _own.handles:
        refuse_in_capture("starting cuDNN")
        _own.handles[gpu] = _started()
    return _own.handles[gpu]


def _started() -> Any:
    global missing
    for library in ("cudart", "nvrtc"):
        load(library)
    try:
        import cudnn

        return cudnn.create_handle()
    except ImportError as e:
        missing = f"nvidia-cudnn-frontend is not installed: {e}"
    except Exception as e:  # of several kinds, by version: no libcudnn, or none that goes with this driver
        missing = f"cuDNN does not start: {e}"
    return None


# ------------------------------------------------------------------------------------------------------------------------- graphs


def _images(batch: int, channels: int, rows: int, cols: int) -> dict[str, list[int]]:
    """An NHWC array as cuDNN counts its axes: N, C, H, W."""
    return {"dim": [batch, channels, rows, cols], "stride": [rows * cols * channels, 1, cols * channels, channels]}


def build(call: Call, **options: Any) -> Plan:
    """The plan of a call; cudnnGraphNotSupportedError or RuntimeError where there is none. ``options`` go to the graph."""
    import cudnn

    s, kinds, note = call.shape, cudnn.data_type, cudnn.numerical_note
    single, data = kinds.FLOAT, kinds.BFLOAT16 if call.low else kinds.FLOAT
    graph = cudnn.pygraph(
        name=f"alphabar_{call.kind}",
        io_data_type=data,
        intermediate_data_type=single,
        compute_data_type=single,
        **options,
    )
    x, y = _images(s.batch, s.cin, s.height, s.width), _images(s.batch, s.cout, s.rows, s.cols)
    w = _images(s.cout, s.cin, s.kernel, s.kernel)
    pads = {"pre_padding": [s.before] * 2, "post_padding": [s.after] * 2, "stride": [s.stride] * 2, "dilation": [1, 1]}

    def tensor(uid: int, layout: dict[str, list[int]], data_type: Any = data) -> Any:
        return graph.tensor(**layout, data_type=data_type, uid=uid, name=f"t{uid}")

    if call.kind == "forward":
        result = graph.conv_fprop(image=tensor(X, x), weight=tensor(W, w), **pads)
        uid, layout = Y, y
        beside = {BIAS: (_images(1, s.cout, 1, 1), single), SHIFT: (_images(s.batch, s.cout, 1, 1), single), RESIDUAL: (y, data)}
        for term in call.terms:
            result.set_data_type(single)
            result = graph.add(a=result, b=tensor(term, *beside[term]))
    elif call.kind == "input":
        result = graph.conv_dgrad(loss=tensor(Y, y), filter=tensor(W, w), **pads)
        uid, layout = X, x
    else:
        result = graph.conv_wgrad(image=tensor(X, x), loss=tensor(Y, y), **pads)
        uid, layout = W, w
    result.set_output(True).set_uid(uid).set_dim(layout["dim"]).set_stride(layout["stride"])
    result.set_data_type(single if call.wide else data)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    barred = [note.NONDETERMINISTIC, note.REDUCED_PRECISION_REDUCTION, note.FFT, note.WINOGRAD]
    barred += [note.WINOGRAD_TILE_4x4, note.WINOGRAD_TILE_6x6, note.WINOGRAD_TILE_13x13]
    if not (call.low or call.tf32):
        barred += [note.TENSOR_CORE, note.DOWN_CONVERT_INPUTS]
    graph.deselect_numeric_notes(barred)
    graph.deselect_workspace_greater_than(MOST_WORKSPACE)
    graph.check_support()
    graph.build_plans()
    return Plan(graph, graph.get_workspace_size())


def _plan(call: Call, device: Device) -> Plan | None:
    key = number(device), call
    if key not in _own.plans:
        refuse_in_capture("planning a convolution by cuDNN")
        import cudnn

        try:
            _own.plans[key] = build(call, handle=_handle(device))
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as e:
            _own.plans[key], refused[call] = None, str(e)
    return _own.plans[key]


def _run(call: Call, tensors: dict[int, Array]) -> bool:
    """Whether cuDNN did it, on the current stream."""
    device = current()
    if not aligned(*tensors.values()):
        return False
    plan = _plan(call, device)
    if plan is None:
        return False
    import cudnn

    handle = _handle(device)
    cudnn.set_stream(handle=handle, stream=stream(device))
    workspace = empty((plan.workspace,), np.uint8, device.xp)
    plan.graph.execute({uid: address(a) for uid, a in tensors.items()}, address(workspace), handle=handle)
    return True


# ------------------------------------------------------------------------------------------------------------- the three passes


def _filter(w: Array, s: Shape) -> Array:
    return transpose(w, s.kernel**2 * s.cin, (s.cout, s.kernel, s.kernel, s.cin))


def forward(
    x: Array, w: Array, bias: Array | None, s: Shape, out: Array, shift: Array | None, residual: Array | None, tf32: bool
) -> Array | None:
    """``out`` = w * x + bias + shift + residual."""
    terms = {term: a for term, a in ((BIAS, bias), (SHIFT, shift), (RESIDUAL, residual)) if a is not None}
    low = x.dtype == BF16
    call = Call("forward", s, low, tf32 and not low, low and out.dtype == np.float32, tuple(terms))
    return out if _run(call, {X: x, W: _filter(w, s), Y: out, **terms}) else None


def backward_input(dy: Array, w: Array, s: Shape, out: Array, tf32: bool) -> Array | None:
    """``out`` = dx."""
    low = dy.dtype == BF16
    call = Call("input", s, low, tf32 and not low)
    return out if _run(call, {Y: dy, W: _filter(w, s), X: out}) else None


def backward_weight(x: Array, dy: Array, s: Shape, out: Array, tf32: bool) -> Array | None:
    """``out`` = dw, float32 also of bfloat16."""
    low = x.dtype == BF16
    made = empty((s.cout, s.kernel, s.kernel, s.cin), np.float32, current().xp)
    call = Call("weight", s, low, tf32 and not low, low)
    return transpose(made, s.cout, out.shape, out) if _run(call, {X: x, Y: dy, W: made}) else None
