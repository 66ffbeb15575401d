"""The hot loops. Each kernel has a definition in array code, a Numba twin and a CUDA twin; the public functions choose.

``TABLE`` is the registry. Every function takes NumPy or CuPy arrays, or arrays of any library that speaks DLPack, and answers
in kind.
"""

from . import streams
from .buffers import Pool
from .dispatch import backend_for, kernel, use
from .registry import TABLE, Kernel

normals = kernel("normals")
q_sample = kernel("q_sample")
step = kernel("step")
group_norm_silu = kernel("group_norm_silu")
group_norm_silu_backward = kernel("group_norm_silu_backward")
conv2d = kernel("conv2d")
conv2d_backward_input = kernel("conv2d_backward_input")
conv2d_backward_weight = kernel("conv2d_backward_weight")
attention = kernel("attention")
attention_backward = kernel("attention_backward")
sum_squares = kernel("sum_squares")
adamw_ema = kernel("adamw_ema")

__all__ = [
    "TABLE",
    "Kernel",
    "Pool",
    "adamw_ema",
    "attention",
    "attention_backward",
    "backend_for",
    "conv2d",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "group_norm_silu",
    "group_norm_silu_backward",
    "kernel",
    "normals",
    "q_sample",
    "step",
    "streams",
    "sum_squares",
    "use",
]
