"""What each kernel demands of its arguments: shapes, dtypes, ranges. Run first, so that no backend meets a bad call.

Each function has the parameters of the kernel of the same name and raises ValueError or TypeError naming the argument and its
value.
"""

from typing import Any

import numpy as np

from .arrays import array_module, extremes, is_cupy, is_native
from .bf16 import BF16
from .precisions import check as check_precision
from .reference import ROW, conv_output_size

Array = Any


def _array(name: str, a: Any, ndim: int | None = None, float_: bool = True, low: bool = False) -> None:
    """``low``: the bits of bfloat16 will do, of an array on a GPU."""
    if not is_native(a):
        raise TypeError(f"{name} must be an array, not {type(a).__name__}")
    if float_ and a.dtype.kind != "f" and not (low and a.dtype == BF16 and is_cupy(a)):
        hint = ": the bits of bfloat16 are computed with on a GPU alone" if low and a.dtype == BF16 else ""
        raise TypeError(f"{name} must be of a float dtype, not {a.dtype}{hint}")
    if ndim is not None and a.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, not shape {a.shape}")


def _same(name: str, a: Any, like: str, b: Array, shape: tuple[int, ...] | None = None) -> None:
    """``a`` (named) has the library, the dtype and, unless another is given, the shape of ``b``."""
    want = b.shape if shape is None else shape
    if type(a) is np.ndarray and a.dtype is b.dtype and a.shape == want and a.dtype.kind == "f" and type(b) is np.ndarray:
        return
    _array(name, a, low=b.dtype == BF16)
    if a.shape != want:
        raise ValueError(f"{name} has shape {a.shape}, want {want} to go with {like}")
    if array_module(a) is not array_module(b):
        raise TypeError(f"{name} and {like} are arrays of different libraries")
    if a.dtype != b.dtype:
        raise TypeError(f"{name} is {_said(a)}, {like} is {_said(b)}: the dtypes must be equal")


def _said(a: Array) -> str:
    return "bfloat16" if a.dtype == BF16 else str(a.dtype)


def _beside(name: str, a: Any, like: str, b: Array, shape: tuple[int, ...]) -> None:
    """As :func:`_same` for what is float32 beside bfloat16: statistics, biases, gradients of weights."""
    if type(b) is np.ndarray or b.dtype != BF16:
        _same(name, a, like, b, shape)
        return
    _array(name, a)
    if a.shape != shape:
        raise ValueError(f"{name} has shape {a.shape}, want {shape} to go with {like}")
    if array_module(a) is not array_module(b):
        raise TypeError(f"{name} and {like} are arrays of different libraries")
    if a.dtype != np.float32:
        raise TypeError(f"{name} is {a.dtype}, {like} is bfloat16: beside that {name} must be float32")


def _perhaps(name: str, a: Any, like: str, b: Array, shape: tuple[int, ...]) -> None:
    if a is not None:
        _beside(name, a, like, b, shape)


def _optional(name: str, a: Any, like: str, b: Array, shape: tuple[int, ...] | None = None) -> None:
    if a is not None:
        _same(name, a, like, b, shape)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is int and low <= value < high:
        return
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if not low <= value < high:
        raise ValueError(f"{name} must be in [{low}, {high}), not {value}")


def _states(name: str, a: Any, shape: tuple[int, ...], like: str, largest: int) -> None:
    """``a`` holds integers 0..largest and has ``shape``; values on a GPU are not looked at."""
    _array(name, a, float_=False)
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, not {a.dtype}")
    if a.shape != shape:
        raise ValueError(f"{name} has shape {a.shape}, want {shape} to go with {like}")
    if array_module(a) is np and a.size:
        low, high = extremes(a)
        if not (low >= 0 and high <= largest):
            raise ValueError(f"{name} must be in 0..{largest}, not {low}..{high}")


def _drawn(out: Any, shape: tuple[int, ...], like: str, b: Array) -> None:
    """``out`` can take the states drawn: int32 of this shape, of the library of ``b``."""
    if out is None:
        return
    _array("out", out, float_=False)
    if out.dtype != np.int32:
        raise TypeError(f"out must be int32, not {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}, want {shape} to go with {like}")
    if array_module(out) is not array_module(b):
        raise TypeError(f"out and {like} are arrays of different libraries")


def _logits(name: str, a: Any) -> None:
    _array(name, a)
    if a.ndim < 2 or a.shape[-1] < 1 or a.shape[-1] >= 2**24:
        raise ValueError(f"{name} must be (B, ..., K) with K in 1..2^24 - 1, not shape {a.shape}")


def _mask(mask: Any) -> None:
    _integer("mask", mask, -(2**31), 2**31)


def counter(seed: Any, step: Any, stream: Any, first_sample: Any) -> None:
    """The key and the counter words of the generator."""
    if type(seed) is type(step) is type(stream) is type(first_sample) is int and (
        0 <= seed < 2**64 and 0 <= step < 2**32 and 0 <= stream < 2**32 and 0 <= first_sample < 2**32
    ):
        return
    _integer("seed", seed, 0, 2**64)
    _integer("step", step, 0, 2**32)
    _integer("stream", stream, 0, 2**32)
    _integer("first_sample", first_sample, 0, 2**32)


def normals(out: Array, seed: int, step: int, stream: int, first_sample: int) -> None:
    _array("out", out)
    if out.ndim < 1:
        raise ValueError("out must have a batch axis, not shape ()")
    if not out.flags.c_contiguous:
        raise ValueError("out must be C-contiguous")
    counter(seed, step, stream, first_sample)


def q_sample(
    x0: Array,
    t: Array,
    signal: Array,
    noise: Array,
    eps: Any,
    seed: int,
    step: int,
    stream: int,
    first_sample: int,
    out: Any,
    eps_out: Any,
) -> None:
    _array("x0", x0)
    if x0.ndim < 1:
        raise ValueError("x0 must have a batch axis, not shape ()")
    _array("t", t, 1, float_=False)
    if t.dtype.kind not in "iu":
        raise TypeError(f"t must be integers, not {t.dtype}")
    if t.shape[0] != x0.shape[0]:
        raise ValueError(f"t has shape {t.shape}, want ({x0.shape[0]},) to go with x0")
    _array("signal", signal, 1)
    _array("noise", noise, 1)
    if signal.shape != noise.shape:
        raise ValueError(f"signal has shape {signal.shape}, noise has shape {noise.shape}: they must be equal")
    if array_module(t) is np and t.size:
        low, high = extremes(t)
        if not (low >= 0 and high < signal.shape[0]):
            raise ValueError(f"t must be in 0..{signal.shape[0] - 1}, not {low}..{high}")
    _optional("eps", eps, "x0", x0)
    _optional("out", out, "x0", x0)
    _optional("eps_out", eps_out, "x0", x0)
    if eps_out is not None and not eps_out.flags.c_contiguous:
        raise ValueError("eps_out must be C-contiguous")
    counter(seed, step, stream, first_sample)


def _ordered(clip: Any) -> bool:
    try:
        low, high = clip
        return bool(low <= high)
    except (TypeError, ValueError):
        return False


def step(
    x: Array,
    m: Array,
    rows: Array,
    i: int,
    history: tuple,
    guidance: Any,
    noise: Any,
    clip: Any,
    seed: int,
    stream: int,
    first_sample: int,
    out: Any,
    store: Any,
) -> None:
    _array("x", x)
    if x.ndim < 1:
        raise ValueError("x must have a batch axis, not shape ()")
    _same("m", m, "x", x)
    _array("rows", rows, 2)
    if rows.shape[1] != len(ROW):
        raise ValueError(f"rows must have {len(ROW)} columns ({', '.join(ROW)}), not {rows.shape[1]}")
    _integer("i", i, 0, rows.shape[0])
    if not isinstance(history, tuple):
        raise TypeError(f"history must be a tuple of arrays, not {type(history).__name__}")
    if len(history) > 3:
        raise ValueError(f"history must hold at most 3 arrays, not {len(history)}")
    for k, past in enumerate(history):
        _same(f"history[{k}]", past, "x", x)
    _optional("guidance", guidance, "x", x)
    if noise is not True and noise is not None:
        _same("noise", noise, "x", x)
    if clip is not None and not _ordered(clip):
        raise ValueError(f"clip must be (low, high) with low <= high, not {clip}")
    _optional("out", out, "x", x)
    _optional("store", store, "x", x)
    counter(seed, i, stream, first_sample)


def _norm(x: Array, gamma: Array, beta: Array, groups: int, scale: Any, shift: Any, tail: Any) -> tuple[int, ...]:
    """The shape of the result."""
    _array("x", x, low=True)
    if x.ndim < 3:
        raise ValueError(f"x must be (B, ..., C) with at least 3 dimensions, not shape {x.shape}")
    channels, of = x.shape[-1], "x"
    if tail is not None:
        _array("tail", tail, x.ndim, low=True)
        _same("tail", tail, "x", x, (*x.shape[:-1], tail.shape[-1]))
        if not (channels and tail.shape[-1]):
            raise ValueError(f"x and tail must each have channels, not {channels} and {tail.shape[-1]}")
        channels, of = channels + tail.shape[-1], "x and tail"
    _integer("groups", groups, 1, channels + 1)
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels of {of}, not {groups}")
    _beside("gamma", gamma, "x", x, (channels,))
    _beside("beta", beta, "x", x, (channels,))
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together or not at all")
    _perhaps("scale", scale, "x", x, (x.shape[0], channels))
    _perhaps("shift", shift, "x", x, (x.shape[0], channels))
    return (*x.shape[:-1], channels)


def group_norm_silu(
    x: Array, gamma: Array, beta: Array, groups: int, eps: float, scale: Any, shift: Any, silu: bool, out: Any, tail: Any
) -> None:
    shape = _norm(x, gamma, beta, groups, scale, shift, tail)
    if not eps > 0:
        raise ValueError(f"eps must be positive, not {eps}")
    _optional("out", out, "x", x, shape)


def group_norm_silu_backward(
    dy: Array,
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    mean: Array,
    rstd: Array,
    scale: Any,
    shift: Any,
    silu: bool,
    out: Any,
    tail: Any,
    tail_out: Any,
) -> None:
    shape = _norm(x, gamma, beta, groups, scale, shift, tail)
    if (tail is None) != (tail_out is None):
        raise ValueError("tail and tail_out come together or not at all")
    _optional("tail_out", tail_out, "tail", tail)
    _same("dy", dy, "x", x, shape)
    _beside("mean", mean, "x", x, (x.shape[0], groups))
    _beside("rstd", rstd, "x", x, (x.shape[0], groups))
    _optional("out", out, "x", x)


def _conv(shape: tuple[int, ...], kernel: int, stride: int, upsample: bool, pad: Any) -> tuple[int, int]:
    for name, value in (("kernel", kernel), ("stride", stride)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if kernel not in (1, 3):
        raise ValueError(f"the kernel must be 1x1 or 3x3, not {kernel}x{kernel}")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, not {stride}")
    if upsample and stride != 1:
        raise ValueError("upsample goes with stride 1")
    inside = isinstance(pad, tuple) and all(isinstance(p, (int, np.integer)) and 0 <= p < max(kernel, 2) for p in pad)
    if pad is not None and not (inside and len(pad) == 2):
        raise ValueError(f"pad must be (before, after), each smaller than the kernel, not {pad}")
    rows, cols = (conv_output_size(n, kernel, stride, upsample, pad) for n in shape[1:3])
    if rows < 1 or cols < 1:
        raise ValueError(f"an image of {shape[1]}x{shape[2]} is too small for this convolution")
    return rows, cols


def conv2d(
    x: Array,
    w: Array,
    bias: Any,
    stride: int,
    upsample: bool,
    pad: Any,
    out: Any,
    shift: Any,
    residual: Any,
    precision: Any,
) -> None:
    check_precision(precision)
    _array("x", x, 4, low=True)
    _array("w", w, 4, low=True)
    _same("w", w, "x", x, (w.shape[0], w.shape[0], x.shape[3], w.shape[3]))
    rows, cols = _conv(x.shape, w.shape[0], stride, upsample, pad)
    _perhaps("bias", bias, "w", w, (w.shape[3],))
    _perhaps("shift", shift, "x", x, (x.shape[0], w.shape[3]))
    shape = x.shape[0], rows, cols, w.shape[3]
    _optional("residual", residual, "x", x, shape)
    if is_native(out) and out.dtype == np.float32:  # of bfloat16 too
        _beside("out", out, "x", x, shape)
    else:
        _optional("out", out, "x", x, shape)


def conv2d_backward_input(
    dy: Array, w: Array, input_shape: tuple[int, ...], stride: int, upsample: bool, pad: Any, out: Any, precision: Any
) -> None:
    check_precision(precision)
    _array("dy", dy, 4, low=True)
    _array("w", w, 4, low=True)
    if not isinstance(input_shape, tuple) or len(input_shape) != 4 or input_shape[3] != w.shape[2]:
        raise ValueError(f"input_shape must be (B, H, W, {w.shape[2]}), not {input_shape}")
    _same("w", w, "dy", dy, (w.shape[0], w.shape[0], w.shape[2], dy.shape[3]))
    rows, cols = _conv(tuple(input_shape), w.shape[0], stride, upsample, pad)
    _same("dy", dy, "input_shape", dy, (input_shape[0], rows, cols, w.shape[3]))
    _optional("out", out, "dy", dy, tuple(input_shape))


def conv2d_backward_weight(
    x: Array, dy: Array, kernel: int, stride: int, upsample: bool, pad: Any, out: Any, precision: Any
) -> None:
    check_precision(precision)
    _array("x", x, 4, low=True)
    _array("dy", dy, 4, low=True)
    rows, cols = _conv(x.shape, kernel, stride, upsample, pad)
    _same("dy", dy, "x", x, (x.shape[0], rows, cols, dy.shape[3]))
    _perhaps("out", out, "x", x, (kernel, kernel, x.shape[3], dy.shape[3]))


def attention(q: Array, k: Array, v: Array, scale: Any, out: Any) -> None:
    _array("q", q, 4, low=True)
    if 0 in q.shape[1:]:
        raise ValueError(f"q must be (B, T, heads, d) with T, heads and d at least 1, not shape {q.shape}")
    _same("k", k, "q", q)
    _same("v", v, "q", q)
    _optional("out", out, "q", q)


def attention_backward(do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, scale: Any) -> None:
    attention(q, k, v, scale, None)
    _same("o", o, "q", q)
    _same("do", do, "q", q)
    _beside("lse", lse, "q", q, (q.shape[0], q.shape[2], q.shape[1]))


def categorical(log_weights: Array, seed: int, step: int, stream: int, first_sample: int, out: Any) -> None:
    _logits("log_weights", log_weights)
    _drawn(out, log_weights.shape[:-1], "log_weights", log_weights)
    counter(seed, step, stream, first_sample)


def categorical_posterior(
    logits: Array,
    x_t: Array,
    rows: Array,
    index: int,
    mask: int,
    seed: int,
    step: Any,
    stream: int,
    first_sample: int,
    out: Any,
) -> None:
    _logits("logits", logits)
    _mask(mask)
    _states("x_t", x_t, logits.shape[:-1], "logits", max(logits.shape[-1] - 1, int(mask)))
    if array_module(x_t) is not array_module(logits):
        raise TypeError("x_t and logits are arrays of different libraries")
    _array("rows", rows, 2)
    if rows.shape[1] != 4:
        raise ValueError(f"rows must have 4 columns (keep, spread, C, D), not {rows.shape[1]}")
    _integer("index", index, 0, rows.shape[0])
    if array_module(rows) is np and not all(0 <= k < np.inf for k in rows[index]):
        raise ValueError(f"rows must be finite and at least 0, not {rows[index].tolist()} at {index}")
    _drawn(out, x_t.shape, "x_t", logits)
    counter(seed, index if step is None else step, stream, first_sample)


def categorical_q_sample(
    x0: Array,
    t: Array,
    keep: Array,
    states: int,
    mask: int,
    seed: int,
    step: int,
    stream: int,
    first_sample: int,
    out: Any,
) -> None:
    _array("x0", x0, float_=False)
    if x0.ndim < 1:
        raise ValueError("x0 must have a batch axis, not shape ()")
    _mask(mask)
    _integer("states", states, 1, 2**31)
    _states("x0", x0, x0.shape, "x0", max(int(states) - 1, int(mask)))
    _array("keep", keep, 1)
    _states("t", t, x0.shape[:1], "x0", keep.shape[0] - 1)
    _drawn(out, x0.shape, "x0", x0)
    counter(seed, step, stream, first_sample)


def silu(x: Array, out: Any) -> None:
    _array("x", x)
    _optional("out", out, "x", x)


def silu_backward(dy: Array, x: Array, out: Any) -> None:
    _array("x", x)
    _same("dy", dy, "x", x)
    _optional("out", out, "x", x)


def _tokens(name: str, x: Array) -> None:
    _array(name, x, 3)
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must be (B, T, C) with T and C at least 1, not shape {x.shape}")


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float, scale: Any, shift: Any, out: Any) -> None:
    _tokens("x", x)
    batch, _, channels = x.shape
    _same("gamma", gamma, "x", x, (channels,))
    _same("beta", beta, "x", x, (channels,))
    if not eps > 0:
        raise ValueError(f"eps must be positive, not {eps}")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together or not at all")
    _optional("scale", scale, "x", x, (batch, channels))
    _optional("shift", shift, "x", x, (batch, channels))
    _optional("out", out, "x", x)


def layer_norm_backward(dy: Array, x: Array, gamma: Array, beta: Array, mean: Array, rstd: Array, scale: Any, out: Any) -> None:
    layer_norm(x, gamma, beta, 1.0, scale, scale, out)
    _same("dy", dy, "x", x)
    _same("mean", mean, "x", x, x.shape[:2])
    _same("rstd", rstd, "x", x, x.shape[:2])


def add_gated(x: Array, h: Array, gate: Array, out: Any) -> None:
    _tokens("x", x)
    _same("h", h, "x", x)
    _same("gate", gate, "x", x, (x.shape[0], x.shape[2]))
    _optional("out", out, "x", x)


def add_gated_backward(dy: Array, h: Array, gate: Array, out: Any) -> None:
    _tokens("dy", dy)
    _same("h", h, "dy", dy)
    _same("gate", gate, "dy", dy, (dy.shape[0], dy.shape[2]))
    _optional("out", out, "dy", dy)


def rotary(x: Array, cos: Array, sin: Array, out: Any) -> None:
    _array("x", x, 4)
    if x.shape[3] % 2 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (B, T, heads, d) with T, heads and d at least 1 and d even, not shape {x.shape}")
    _same("cos", cos, "x", x, (x.shape[1], x.shape[3] // 2))
    _same("sin", sin, "x", x, (x.shape[1], x.shape[3] // 2))
    _optional("out", out, "x", x)


def softmax(x: Array, out: Any) -> None:
    _array("x", x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must be (..., K) with K at least 1, not shape {x.shape}")
    _optional("out", out, "x", x)


def softmax_backward(dy: Array, y: Array, out: Any) -> None:
    _array("y", y)
    if y.ndim < 1 or y.shape[-1] < 1:
        raise ValueError(f"y must be (..., K) with K at least 1, not shape {y.shape}")
    _same("dy", dy, "y", y)
    _optional("out", out, "y", y)


def squared_error(output: Array, target: Array, weight: Any, out: Any) -> None:
    _array("output", output)
    if output.ndim < 1 or 0 in output.shape[1:]:
        raise ValueError(f"output must be (B, ...) with at least 1 element a sample, not shape {output.shape}")
    _same("target", target, "output", output)
    _optional("weight", weight, "output", output, output.shape[:1])
    _optional("out", out, "output", output)


def cross_entropy(logits: Array, labels: Array, out: Any) -> None:
    _array("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., K) with K at least 1, not shape {logits.shape}")
    _states("labels", labels, logits.shape[:-1], "logits", logits.shape[-1] - 1)
    if array_module(labels) is not array_module(logits):
        raise TypeError("labels and logits are arrays of different libraries")
    _optional("out", out, "logits", logits)


def sum_squares(x: Array) -> None:
    _array("x", x)


def adamw_ema(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    ema: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float,
    norm_sq: Any,
    max_norm: float,
) -> None:
    _array("param", param, 1)
    for name, a in (("grad", grad), ("m", m), ("v", v), ("ema", ema)):
        _same(name, a, "param", param)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), not {value}")
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"ema_decay must be in [0, 1], not {ema_decay}")
    _integer("step", step, 1, 2**63)
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, not {max_norm}")
    if norm_sq is not None:
        _array("norm_sq", norm_sq, 1)
        if norm_sq.shape != (1,):
            raise ValueError(f"norm_sq must be an array of one element, not shape {norm_sq.shape}")
