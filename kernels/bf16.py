"""bfloat16: arrays of its 16 bits. NumPy has no such dtype; the GPU's kernels read and write the bits, and compute in float32.

A bfloat16 is the upper half of a float32: its sign, its 8 bits of exponent, the first 7 of its significand.
"""

from typing import Any

import numpy as np

from .arrays import array_module

Array = Any

BF16 = np.dtype(np.uint16)
_QUIET = 0x0040  # a bit of the significand that keeps a NaN one


def pack(x: Array) -> Array:
    """float32 as bfloat16, rounded to nearest, ties to even; a NaN stays one."""
    if x.dtype != np.float32:
        raise TypeError(f"x must be float32, not {x.dtype}")
    xp = array_module(x)
    word = xp.ascontiguousarray(x).view(np.uint32)
    upper = word >> np.uint32(16)
    rounded = (word + (np.uint32(0x7FFF) + (upper & np.uint32(1)))) >> np.uint32(16)
    return xp.where(xp.isnan(x), upper | np.uint32(_QUIET), rounded).astype(BF16)


def unpack(bits: Array) -> Array:
    """bfloat16 as float32, exactly."""
    if bits.dtype != BF16:
        raise TypeError(f"bits must be {BF16} (bfloat16), not {bits.dtype}")
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
