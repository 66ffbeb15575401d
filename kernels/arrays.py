"""Which library an array belongs to, and the way in and out for arrays of other libraries (DLPack).

Inside the engine an array is a ``numpy.ndarray`` or a ``cupy.ndarray``. At the public doors any object with ``__dlpack__`` (a
torch tensor, a JAX array) is taken without a copy and the answer is given back as the caller's kind.
"""

import sys
from types import ModuleType
from typing import Any

import numpy as np

from .recording import refuse_in_capture

_OURS = frozenset((np.ndarray, int, float, bool, str, tuple, type(None)))  # which need no further question
FEW = 64  # integers that Python compares sooner than NumPy


def is_cupy(x: Any) -> bool:
    """True for a CuPy array; CuPy itself is never imported by the question."""
    return type(x).__module__.partition(".")[0] == "cupy"


def is_native(x: Any) -> bool:
    """True for the two kinds the kernels work on: NumPy and CuPy arrays."""
    return isinstance(x, np.ndarray) or is_cupy(x)


def is_foreign(x: Any) -> bool:
    """True for an array of another library that can be exchanged through DLPack."""
    return type(x) not in _OURS and hasattr(x, "__dlpack__") and not is_native(x) and not isinstance(x, np.generic)


def extremes(a: np.ndarray) -> tuple[Any, Any]:
    """The least and the largest of integers, of which there is at least one."""
    if a.size > FEW:
        return a.min(), a.max()
    some = a.reshape(-1).tolist()
    return min(some), max(some)


def array_module(x: Any) -> ModuleType:
    """``numpy`` or ``cupy``, whichever ``x`` belongs to."""
    return sys.modules["cupy"] if is_cupy(x) else np


def native(x: Any) -> Any:
    """``x`` as a NumPy or CuPy array that shares memory with it; native arrays and everything else pass through."""
    if not is_foreign(x):
        return x
    if getattr(x, "requires_grad", False):
        raise TypeError("an array that requires a gradient cannot be exchanged: pass x.detach()")
    if x.__dlpack_device__()[0] in (2, 13):  # kDLCUDA, kDLCUDAManaged
        import cupy

        return cupy.from_dlpack(x)
    try:
        return np.from_dlpack(x)
    except (RuntimeError, BufferError) as e:  # NumPy has no bfloat16, for instance
        raise TypeError(f"an array of {getattr(x, 'dtype', 'this kind')} cannot be exchanged with NumPy: {e}") from e


def restore(a: Any, kind: Any) -> Any:
    """The native array ``a`` as an array of the library that ``kind`` belongs to (no copy)."""
    if not is_foreign(kind) or not is_native(a):
        return a
    library = sys.modules[type(kind).__module__.partition(".")[0]]
    from_dlpack = getattr(library, "from_dlpack", None)
    if from_dlpack is None:  # JAX keeps it in a submodule
        library = sys.modules.get(f"{library.__name__.removesuffix('lib')}.dlpack", library)
        from_dlpack = library.from_dlpack
    return from_dlpack(a)


def to_numpy(x: Any) -> np.ndarray:
    """``x`` on the host as a NumPy array."""
    x = native(x)
    if not is_cupy(x):
        return np.asarray(x)
    refuse_in_capture("the host reads an array of the device")
    return x.get()
