"""The kernels on a GPU: for each one a launcher with the name and the parameters of its definition in :mod:`..reference`.

A launcher turns shapes into a grid, wraps each scalar in the NumPy type of the kernel's parameter, and starts kernels of
``cuda/*.cu``. It meets the GPU only through a *device*: an object with ``xp``, an array library, and ``launch(file, kernel, grid,
block, args, shared)``. So the same launchers run on the host where a test puts another device in its place (:func:`on`).

Sums are made in a fixed order without atomics: the same call gives the same bits.
"""

from ..compile import require_gpu
from .attend import attention, attention_backward
from .conv import conv2d, conv2d_backward_input, conv2d_backward_weight
from .diffusion import normals, q_sample, step
from .discrete import categorical, categorical_posterior, categorical_q_sample
from .launch import on
from .norm import group_norm_silu, group_norm_silu_backward
from .optim import adamw_ema, sum_squares
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
    "group_norm_silu",
    "group_norm_silu_backward",
    "layer_norm",
    "layer_norm_backward",
    "normals",
    "on",
    "q_sample",
    "require_gpu",
    "rotary",
    "silu",
    "silu_backward",
    "step",
    "sum_squares",
]
