"""Images as whole numbers: the 8-bit values of a data set as the fewest equally spaced levels that hold them, and back."""

from typing import Any

import numpy as np

from alphabar.kernels.arrays import array_module

Array = Any
BLOCK = 4096  # images read at a time


def levels_of(images: Any) -> int:
    """The smallest number of equally spaced levels of 0..255 that holds every value of images uint8 (N, …) exactly: 2..256."""
    there = np.zeros(256, bool)
    for start in range(0, len(images), BLOCK):
        there[images[start : start + BLOCK]] = True
    values = np.flatnonzero(there).astype(np.uint8)
    return next(K for K in range(2, 257) if np.array_equal(to_images(to_states(values, K), K), values))


def to_states(images: Array, K: int) -> Array:
    """uint8 0..255 to the nearest of K levels, int32 0..K−1."""
    if images.dtype.name != "uint8":
        raise TypeError(f"images must be uint8, not {images.dtype}")
    if not 2 <= K <= 256:
        raise ValueError(f"K must be in 2..256, not {K}")
    xp = array_module(images)
    return xp.rint(images.astype(xp.float64) * ((K - 1) / 255)).astype(xp.int32)


def to_images(states: Array, K: int) -> Array:
    """Levels 0..K−1 to uint8: 0 is black, K−1 is 255."""
    xp = array_module(states)
    return xp.rint(states.astype(xp.float64) * (255 / (K - 1))).astype(xp.uint8)
