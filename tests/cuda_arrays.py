"""Arrays for launchers: where they begin, and what is in them."""

from collections.abc import Callable

import numpy as np

Place = Callable[[np.ndarray], np.ndarray]  # puts an array somewhere: aligned, or off its alignment


def aligned(a: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 16."""
    buffer = np.empty(a.nbytes + 16, np.uint8)
    start = -buffer.ctypes.data % 16
    copy = buffer[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
    copy[...] = a
    return copy


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normals of NumPy's, float32."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
