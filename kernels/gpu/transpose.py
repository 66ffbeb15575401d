"""Launcher of the transpose: the weights of a convolution in the order of NVIDIA's libraries, and back."""

from math import prod
from typing import Any

from ..bf16 import BF16
from ..buffers import empty
from .launch import THREADS, aligned, current, i32

Array = Any

TILE = 32


def transpose(x: Array, rows: int, shape: tuple[int, ...], out: Array | None = None) -> Array:
    """x, taken as a matrix of ``rows`` rows, transposed: its columns one after another in an array of ``shape``."""
    out = empty(shape, x.dtype, current().xp) if out is None else out
    columns = prod(shape) // max(rows, 1)
    if out.size:
        wide = rows % 4 == 0 and columns % 4 == 0 and aligned(x, out, bytes_=4 * x.dtype.itemsize)
        name = f"transpose{'_bf16' if x.dtype == BF16 else ''}_{'wide' if wide else 'any'}"
        grid = (-(-rows // TILE) * -(-columns // TILE),)
        current().launch("transpose", name, grid, (THREADS,), (x, out, i32(rows), i32(columns)))
    return out
