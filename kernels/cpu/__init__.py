"""The kernels in Numba: the same names and arguments as the definitions, for C-contiguous float32 arrays in host memory."""

from .attend import attention, attention_backward
from .conv import conv2d, conv2d_backward_input, conv2d_backward_weight
from .diffusion import q_sample, step
from .norm import group_norm_silu, group_norm_silu_backward
from .optim import adamw_ema, sum_squares
from .random import normals

__all__ = [
    "adamw_ema",
    "attention",
    "attention_backward",
    "conv2d",
    "conv2d_backward_input",
    "conv2d_backward_weight",
    "group_norm_silu",
    "group_norm_silu_backward",
    "normals",
    "q_sample",
    "step",
    "sum_squares",
]
