"""The kernels in Numba: the same names and arguments as the definitions, for C-contiguous float32 arrays in host memory."""

from . import threads  # noqa: F401  before any of the others: it says how many threads Numba, which they import, has

# isort: split
from .attend import attention, attention_backward
from .conv import conv2d, conv2d_backward_input, conv2d_backward_weight
from .diffusion import q_sample, step, step_directly
from .discrete import categorical, categorical_posterior, categorical_q_sample
from .losses import cross_entropy, squared_error
from .norm import group_norm_silu
from .norm_backward import group_norm_silu_backward
from .optim import adamw_ema, sum_squares
from .random import normals
from .rows import softmax, softmax_backward
from .tokens import add_gated, add_gated_backward, layer_norm, layer_norm_backward, rotary, silu, silu_backward

__all__ = [
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
    "cross_entropy",
    "group_norm_silu",
    "group_norm_silu_backward",
    "layer_norm",
    "layer_norm_backward",
    "normals",
    "q_sample",
    "rotary",
    "silu",
    "silu_backward",
    "softmax",
    "softmax_backward",
    "squared_error",
    "step",
    "step_directly",
    "sum_squares",
]
