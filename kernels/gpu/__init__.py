"""The kernels on a GPU: for each one a launcher with the name and the parameters of its definition in :mod:`..reference`.

A launcher turns shapes into a grid, wraps each scalar in the NumPy type of the kernel's parameter, and starts kernels of
``cuda/*.cu``. It meets the GPU only through a *device*: an object with ``xp``, an array library, and ``launch(file, kernel, grid,
block, args, shared)``. So the same launchers run on the host where a test puts another device in its place (:func:`on`).

Sums are made in a fixed order without atomics: the same call gives the same bits.

For steps captured as graphs there are :func:`counted`, which makes rows and noise follow a counter on the device, :func:`count`,
which moves it, and :func:`adamw_ema_by_table`.
"""

from ..compile import require_gpu
from .attend import attention, attention_backward
from .conv import conv2d, conv2d_backward_input, conv2d_backward_weight
from .diffusion import normals, q_sample, step
from .discrete import categorical, categorical_posterior, categorical_q_sample
from .launch import counted, on
from .losses import cross_entropy, squared_error
from .norm import group_norm_silu, group_norm_silu_backward
from .optim import adamw_ema, adamw_ema_by_table, adamw_row, count, sum_squares
from .rows import softmax, softmax_backward
from .tokens import add_gated, add_gated_backward, layer_norm, layer_norm_backward, rotary, silu, silu_backward

__all__ = [
    "adamw_ema",
    "adamw_ema_by_table",
    "adamw_row",
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
    "count",
    "counted",
    "cross_entropy",
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
    "softmax",
    "softmax_backward",
    "squared_error",
    "step",
    "sum_squares",
]
