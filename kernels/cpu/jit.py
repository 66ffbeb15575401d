"""The two decorators of this package: ``jit`` for a function, ``loops`` for one with parallel loops. Compiled code is kept."""

import contextlib
import functools
from pathlib import Path

from . import threads  # noqa: F401  sets the number of threads before Numba is imported

# isort: split
import numba


def _forget_stale() -> None:
    """Numba looks at the age of a function's own file only; what it took from other files here may have changed since."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError):
        newest = max(p.stat().st_mtime for p in here.glob("*.py"))
        for index in (here / "__pycache__").glob("*.nbi"):
            if index.stat().st_mtime < newest:
                index.unlink(missing_ok=True)


def _can_cache() -> bool:
    """Whether there is a place to keep compiled code: NUMBA_CACHE_DIR, beside the source, or the user's cache folder."""
    try:
        numba.njit(cache=True)(lambda: None)
    except RuntimeError:
        return False
    return True


_forget_stale()
jit = functools.partial(numba.njit, cache=_can_cache(), error_model="numpy")
loops = functools.partial(jit, parallel=True)
