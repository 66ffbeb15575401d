"""The two decorators of this package: ``jit`` for a function, ``loops`` for one with parallel loops. Compiled code is kept."""

import contextlib
import functools
from pathlib import Path

from . import threads  # noqa: F401  sets the number of threads before Numba is imported

# isort: split
import numba


def forget_stale(folder: Path) -> None:
    """Drop code compiled before a source in ``folder`` changed: Numba looks at a function's own file only."""
    with contextlib.suppress(OSError):
        newest = max((p.stat().st_mtime for p in folder.glob("*.py")), default=0)
        for index in (folder / "__pycache__").glob("*.nbi"):
            if index.stat().st_mtime < newest:
                index.unlink(missing_ok=True)


def _can_cache() -> bool:
    """Whether there is a place to keep compiled code: NUMBA_CACHE_DIR, beside the source, or the user's cache folder."""
    try:
        numba.njit(cache=True)(lambda: None)
    except RuntimeError:
        return False
    return True


forget_stale(Path(__file__).parent)
jit = functools.partial(numba.njit, cache=_can_cache(), error_model="numpy")
loops = functools.partial(jit, parallel=True)
