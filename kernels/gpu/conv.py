"""Launchers of the convolution: which kernels make it, and those of plain float32.

:func:`how` says what makes a convolution. ``ALPHABAR_CONV`` in the environment, or ``with choosing(...)``, may overrule it:

- "auto": as :func:`how` has it;
- "own": never a library of NVIDIA's;
- "library": a library wherever it has a way. RuntimeError where neither is installed.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from types import ModuleType
from typing import Any

import numpy as np

from .. import precisions
from ..bf16 import BF16
from ..buffers import empty
from . import cublaslt, cudnn, elementwise
from .conv_shape import Shape
from .launch import THREADS, Device, aligned, blocks, current, i32

Array = Any

CHOICES = ("auto", "own", "library")
LIBRARIES: dict[str, ModuleType] = {"cublaslt": cublaslt, "cudnn": cudnn}
LARGE = 1 << 32  # products of a pass that are worth cuDNN's kernels: some 10 µs of a large GPU
_DEFAULT: str = os.environ.get("ALPHABAR_CONV", "auto")
_choice: ContextVar[str] = ContextVar("convolutions", default=_DEFAULT)


# -- the choice


@contextmanager
def choosing(choice: str) -> Iterator[None]:
    """Run the block with "auto", "own" or "library"."""
    if choice not in CHOICES:
        raise ValueError(f"choice must be one of {CHOICES}, not {choice!r}")
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def chosen() -> str:
    """What :func:`choosing` or ALPHABAR_CONV asks for; ValueError where that is none that there is."""
    choice = _choice.get()
    if choice not in CHOICES:
        raise ValueError(f"ALPHABAR_CONV must be one of {CHOICES}, not {choice!r}")
    return choice


def _there(device: Device, choice: str) -> Collection[str]:
    """The libraries that can be used."""
    if device.xp is np:
        return ()
    there = [name for name, library in LIBRARIES.items() if library.available(device)]
    if choice == "library" and not there:
        why = "; ".join(str(library.missing) for library in LIBRARIES.values())
        raise RuntimeError(f"ALPHABAR_CONV=library, but {why} (pip install 'alphabar[cuda13]' or 'alphabar[cuda12]')")
    return there


def how(kind: str, shape: Shape, dtype: Any, precision: str | None = None, there: Collection[str] | None = None) -> str:
    """ "plain", "mma", "cudnn" or "cublaslt": what makes a convolution of arrays of this dtype.

    kind: "forward", "input" or "weight". ``there``: the libraries to choose among; None: those that are installed. Our own are
    "mma", on the tensor cores, for bfloat16 and for float32 under the precision "tf32", else "plain". What a library
    turns out not to have goes to them. In their stead:

    - 1×1 convolutions and linear layers: "cublaslt", but not forward in bfloat16, where it could add no float32 bias;
    - others, where ours is "mma", of :data:`LARGE` products and channels by 16 bytes: "cudnn", but not the weights' gradient in
      bfloat16, for which it has but one engine, its last resort, that gives float32. Nor where float32 must stay float32: cuDNN
      would bring NHWC images into another order first;
    - images that are doubled first, and what asks for ``precision="high"``: never a library.

    The choice "library" asks for cuDNN in all of the second group.
    """
    low = dtype == BF16
    own = "mma" if low or precisions.tf32(precision) else "plain"
    choice = chosen()
    if choice == "own" or shape.upsample or precisions.high(precision):
        return own
    there = _there(current(), choice) if there is None else there
    if shape.is_product and "cublaslt" in there and not (low and kind == "forward"):
        return "cublaslt"
    if "cudnn" not in there:
        return own
    channels = 8 if low else 4
    fits = own == "mma" and shape.products >= LARGE and shape.cin % channels == shape.cout % channels == 0
    return "cudnn" if choice == "library" or (fits and not (low and kind == "weight")) else own


# -- the plain kernels

TILE = 64  # lines and columns of the result that a block makes
DEPTH = 16  # and the length of the sum that it holds at a time
ENOUGH_BLOCKS = 256  # below this the sum of the weight gradient is cut into slices; fixed, so that the order of the sum is


def _sizes(s: Shape) -> tuple:
    """The eleven sizes that every kernel takes."""
    factor = 2 if s.upsample else 1
    i32(s.batch * max(s.height * s.width, s.rows * s.cols))
    i32(s.kernel * s.kernel * factor * factor * max(s.cin, s.cout) + DEPTH)
    return tuple(map(i32, (s.batch, s.height, s.width, s.cin, s.rows, s.cols, s.cout, s.kernel, s.stride, s.before, factor)))


def _tiles(n: int) -> int:
    return -(-n // TILE)


def _conv_suffix(cin: int, cout: int, *arrays: Array | None) -> str:
    return "wide" if cin % 4 == 0 and cout % 4 == 0 and aligned(*arrays) else "any"


# -- the three passes


def conv2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    shift: Array | None = None,
    residual: Array | None = None,
    precision: str | None = None,
) -> Array:
    kernel, _, _, cout = w.shape
    shape = Shape.of(x.shape, cout, kernel, stride, upsample, pad)
    out = empty((x.shape[0], shape.rows, shape.cols, cout), x.dtype, current().xp) if out is None else out
    if not out.size:
        return out
    way, tf32 = how("forward", shape, x.dtype, precision), precisions.tf32(precision)
    if way in LIBRARIES:
        made = LIBRARIES[way].forward(x, w, bias, shape, out, shift, residual, tf32)
        if made is not None:
            return made
    if x.dtype == BF16 or tf32:
        from . import conv_mma

        return conv_mma.forward(x, w, bias, stride, upsample, pad, out, shift, residual)
    return _plain(x, w, bias, shape, out, shift, residual)


def _plain(
    x: Array, w: Array, bias: Array | None, shape: Shape, out: Array, shift: Array | None, residual: Array | None
) -> Array:
    grid = (_tiles(shape.places), _tiles(shape.cout))
    name = f"conv_forward_{_conv_suffix(shape.cin, shape.cout, x, w, bias, shift, residual, out)}"
    current().launch("conv", name, grid, (THREADS,), (x, w, bias, shift, residual, out, *_sizes(shape)))
    return out


def conv2d_backward_input(
    dy: Array,
    w: Array,
    input_shape: tuple[int, ...],
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    precision: str | None = None,
) -> Array:
    device = current()
    kernel, _, cin, cout = w.shape
    shape = Shape.of(tuple(input_shape), cout, kernel, stride, upsample, pad)
    out = empty(tuple(input_shape), dy.dtype, device.xp) if out is None else out
    if not out.size:
        return out
    way, tf32 = how("input", shape, dy.dtype, precision), precisions.tf32(precision)
    if way in LIBRARIES:
        made = LIBRARIES[way].backward_input(dy, w, shape, out, tf32)
        if made is not None:
            return made
    if dy.dtype == BF16 or tf32:
        from . import conv_mma

        return conv_mma.backward_input(dy, w, tuple(input_shape), stride, upsample, pad, out)
    grid = (_tiles(prod(input_shape[:3])), _tiles(cin))
    device.launch("conv", f"conv_input_{_conv_suffix(cin, cout, dy, w, out)}", grid, (THREADS,), (dy, w, out, *_sizes(shape)))
    return out


def conv2d_backward_weight(
    x: Array,
    dy: Array,
    kernel: int,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    precision: str | None = None,
) -> tuple[Array, Array]:
    cin, cout = x.shape[3], dy.shape[3]
    shape = Shape.of(x.shape, cout, kernel, stride, upsample, pad)
    out = empty((kernel, kernel, cin, cout), np.float32, current().xp) if out is None else out
    if not shape.places:
        dbias = empty((cout,), np.float32, current().xp)
        out[...], dbias[...] = 0, 0
        return out, dbias
    way, tf32 = how("weight", shape, x.dtype, precision), precisions.tf32(precision)
    if way in LIBRARIES:
        made = LIBRARIES[way].backward_weight(x, dy, shape, out, tf32)
        if made is not None:
            return made, elementwise.sum_places(dy.reshape(1, shape.places, cout)).reshape(cout)
    if x.dtype == BF16 or tf32:
        from . import conv_mma_weight

        return conv_mma_weight.backward_weight(x, dy, kernel, stride, upsample, pad, out)
    return _plain_weight(x, dy, shape, out)


def _plain_weight(x: Array, dy: Array, shape: Shape, out: Array) -> tuple[Array, Array]:
    device, cin, cout = current(), shape.cin, shape.cout
    dbias = empty((cout,), dy.dtype, device.xp)
    places, lines = shape.places, shape.kernel**2 * cin
    tiles = _tiles(lines) * _tiles(cout)
    per_slice = -(-places // max(1, min(ENOUGH_BLOCKS // tiles, places // (4 * DEPTH))))
    per_slice = -(-per_slice // DEPTH) * DEPTH
    count = -(-places // per_slice)
    slices = empty((count, lines + 1, cout), dy.dtype, device.xp)
    name = f"conv_weight_{_conv_suffix(cin, cout, x, dy)}"
    device.launch("conv", name, (_tiles(lines), _tiles(cout), count), (THREADS,), (x, dy, slices, i32(per_slice), *_sizes(shape)))
    args = (slices, out, dbias, i32(count), np.int64(lines * cout), i32(cout))
    device.launch("conv", "conv_sum", blocks((lines + 1) * cout), (THREADS,), args)
    return out, dbias
