"""Every kernel's definition in plain array code, for NumPy and CuPy alike and for any float dtype.

The formula stands above the lines that compute it. The faster backends (``cpu``, ``gpu``) carry the same names and the same
argument order; ``tests/test_kernels.py`` holds them to these definitions. Layout: activations NHWC, weights HWIO, tokens
(B, T, heads, d).

On a GPU convolutions, group norms and attention take bfloat16 besides (the bits, :mod:`alphabar.kernels.bf16`): images, tokens,
their gradients and a convolution's weights. Biases, shifts, the parameters and statistics of norms, lse and the gradients of
weights are then float32, and a convolution's result is where ``out`` is.
"""

from .attend import attention, attention_backward
from .conv import conv2d, conv2d_backward_input, conv2d_backward_weight, conv_output_size, conv_padding
from .diffusion import ROW, q_sample, step
from .discrete import CHUNK, LEAST, SECOND, categorical, categorical_posterior, categorical_q_sample, exp_below_0, uniform
from .losses import cross_entropy, squared_error
from .norm import group_norm_silu, group_norm_silu_backward
from .optim import adamw_ema, sum_squares
from .random import BLOCK, RUN, cos_sin, minus_2_log, normals, philox, words
from .rows import softmax, softmax_backward
from .tokens import add_gated, add_gated_backward, layer_norm, layer_norm_backward, rotary, silu, silu_backward

__all__ = [
    "BLOCK",
    "CHUNK",
    "LEAST",
    "ROW",
    "RUN",
    "SECOND",
    "adamw_ema",
    "add_gated",
    "add_gated_backward",
    "attention",
    "attention_backward",
    "categorical",
    "categorical_posterior",
    "categorical_q_sample",
    "conv2d",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "conv_output_size",
    "conv_padding",
    "cos_sin",
    "cross_entropy",
    "exp_below_0",
    "group_norm_silu",
    "group_norm_silu_backward",
    "layer_norm",
    "layer_norm_backward",
    "minus_2_log",
    "normals",
    "philox",
    "q_sample",
    "rotary",
    "silu",
    "silu_backward",
    "softmax",
    "softmax_backward",
    "squared_error",
    "step",
    "sum_squares",
    "uniform",
    "words",
]
