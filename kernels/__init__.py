"""The hot loops. Each kernel has a definition in array code, a Numba twin and a CUDA twin; the public functions choose.

``TABLE`` is the registry. Every function takes NumPy or CuPy arrays, or arrays of any library that speaks DLPack, and answers
in kind.
"""

from . import streams
from .buffers import Pool
from .dispatch import backend_for, kernel, use
from .precisions import precision
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
categorical = kernel("categorical")
categorical_posterior = kernel("categorical_posterior")
categorical_q_sample = kernel("categorical_q_sample")
silu = kernel("silu")
silu_backward = kernel("silu_backward")
layer_norm = kernel("layer_norm")
layer_norm_backward = kernel("layer_norm_backward")
add_gated = kernel("add_gated")
add_gated_backward = kernel("add_gated_backward")
rotary = kernel("rotary")
softmax = kernel("softmax")
softmax_backward = kernel("softmax_backward")
squared_error = kernel("squared_error")
cross_entropy = kernel("cross_entropy")
sum_squares = kernel("sum_squares")
adamw_ema = kernel("adamw_ema")

__all__ = [
    "TABLE",
    "Kernel",
    "Pool",
    "adamw_ema",
    "add_gated",
    "add_gated_backward",
    "attention",
    "attention_backward",
    "backend_for",
    "categorical",
    "categorical_posterior",
    "categorical_q_sample",
    "conv2d",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "cross_entropy",
    "group_norm_silu",
    "group_norm_silu_backward",
    "kernel",
    "layer_norm",
    "layer_norm_backward",
    "normals",
    "precision",
    "q_sample",
    "rotary",
    "silu",
    "silu_backward",
    "softmax",
    "softmax_backward",
    "squared_error",
    "step",
    "streams",
    "sum_squares",
    "use",
]
