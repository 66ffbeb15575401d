"""What a GPU's tensor cores do in one kernel: a group norm and the 3×3 convolution behind it; a 1×1 convolution of two images.

The convolution normalises what it reads, and so does the gradient of its weights: the normalised image is never in memory. Like
:mod:`.elementwise` these check nothing.
"""

from typing import Any, NamedTuple

import numpy as np

from . import dispatch, precisions
from .arrays import is_cupy
from .bf16 import BF16

Array = Any

LEAST = 8 << 20  # bytes of an image: of a smaller one the second cache still has what a norm wrote, and a launch less is made


class Affine(NamedTuple):
    """The norm as a x + b, a and b (B, C), with the statistics (B, groups) that it was made of."""

    a: Array
    b: Array
    mean: Array
    rstd: Array


def taken(x: Array, w: Array, tail: Array | None = None) -> bool:
    """Whether a norm of x (B, H, W, C), or of [x, tail], and the convolution by w (k, k, C, Cout), of stride 1, should be one.

    Where x is bfloat16, or float32 whose products may be of TF32; large, of channels by 16 bytes; the kernel 3×3; and where our
    own kernels make the convolution and the gradient of its weights, with a tile's pixels brought once for all nine taps. Before
    a tail the channels of x must come by the slabs in which the kernel takes them.
    """
    if type(x) is np.ndarray or w.shape[0] != 3 or x.size * x.dtype.itemsize < max(LEAST, 1) or not is_cupy(x):
        return False
    if not _by_tensor_cores(x) or x.shape[-1] * x.dtype.itemsize % 16 or not x.flags.c_contiguous:
        return False
    from .gpu import conv, conv_mma
    from .gpu.conv_shape import Shape

    batch, height, width, own = x.shape
    channels = w.shape[2]
    if tail is not None and (
        own * x.dtype.itemsize % conv_mma.SLAB or channels * x.dtype.itemsize % 16 or not tail.flags.c_contiguous
    ):
        return False
    shape = Shape.of((*x.shape[:3], channels), w.shape[3], 3, 1, False, None)
    if any(conv.how(kind, shape, x.dtype) != "mma" for kind in ("forward", "weight")):
        return False
    slabs = -(-channels * x.dtype.itemsize // conv_mma.SLAB)
    return conv_mma.plan(batch * height * width, w.shape[3], slabs, width, True).way == "run"


def _by_tensor_cores(x: Array) -> bool:
    return dispatch.chosen() == "auto" and (x.dtype == BF16 or (x.dtype == np.float32 and precisions.tf32()))


def norm_conv2d(
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    eps: float,
    scale: Array | None,
    shift: Array | None,
    silu: bool,
    w: Array,
    bias: Array | None,
    out: Array | None,
    added: Array | None,
    residual: Array | None,
    tail: Array | None,
) -> tuple[Array, Affine]:
    """(y, the norm): y = conv2d(group_norm_silu([x, tail])); w, bias, out, added and residual are those of the convolution."""
    from .gpu import conv_mma, norm_affine

    norm = Affine(*norm_affine.group_affine(x, gamma, beta, groups, eps, scale, shift, tail))
    y = conv_mma.forward(x, w, bias, out=out, shift=added, residual=residual, norm=(norm.a, norm.b, silu), tail=tail)
    return y, norm


def backward_weight(x: Array, dy: Array, norm: Affine, silu: bool, tail: Array | None) -> tuple[Array, Array]:
    """(dw, dbias) of the convolution."""
    from .gpu import conv_mma_weight

    return conv_mma_weight.backward_weight(x, dy, 3, norm=(norm.a, norm.b, silu), tail=tail)


def joins(x: Array, tail: Array, w: Array) -> bool:
    """Whether the 1×1 convolution of [x, tail] should be one, not one added to the other: where our kernel makes it anyway.

    Channels must come by 16 bytes, those of x by the slabs in which the kernel takes them.
    """
    if type(x) is np.ndarray or not x.size or not is_cupy(x) or not _by_tensor_cores(x):
        return False
    from .gpu import conv, conv_mma
    from .gpu.conv_shape import Shape

    own, all_ = (channels * x.dtype.itemsize for channels in (x.shape[-1], w.shape[2]))
    if own % conv_mma.SLAB or all_ % 16 or not (x.flags.c_contiguous and tail.flags.c_contiguous):
        return False
    shape = Shape.of((*x.shape[:3], w.shape[2]), w.shape[3], 1, 1, False, None)
    return conv.how("forward", shape, x.dtype) == "mma"


def conv1x1(x: Array, tail: Array, w: Array, bias: Array) -> Array:
    """w * [x, tail] + bias."""
    from .gpu import conv_mma

    return conv_mma.forward(x, w, bias, tail=tail)
