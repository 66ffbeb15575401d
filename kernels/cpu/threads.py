"""One policy for threads: how many there are, which library runs them, and that only one pool works at a time.

- ALPHABAR_THREADS says how many, 1 to 1024; otherwise there are as many as CPUs that this process may use. More than those are
  granted, with a warning: they take turns. Where Numba was imported before with fewer (NUMBA_NUM_THREADS), those are all.
- Numba's OpenMP pool does the work. The BLAS libraries of NumPy and SciPy, OpenBLAS, MKL or another, are held to one thread.
- PyTorch in the same process keeps its own threads: each pool sleeps soon after its work, so that neither slows the other when
  they take turns, whichever is imported first. An OMP_WAIT_POLICY in the environment is left as it is.
- The bits of results do not depend on any of this.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

# Measured on the kernels of a small U-Net (8x8 and 4x4 maps, batch 128) with two cores, 2.7 ms a round:
# - The kernels carry their own matrix products, so Numba's OpenMP pool does all the heavy work. An OpenBLAS worker spins for some
#   20 ms after each product and takes the core that the OpenMP worker needs (8.6 ms a round): BLAS is held to one thread.
# - libgomp spins for about 6 ms at the end of a loop before it sleeps. Where another process holds a core, the spinning thread
#   keeps its partner from running (16 to 160 ms a round). Spinning for 60 microseconds avoids most of that (8.5 ms) and costs
#   nothing on idle cores; not to spin at all costs a third there.
SPIN = 3000
MOST = 1024


def available() -> int:
    """The CPUs that this process may use: its affinity mask, cut by a container's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as f:
            quota, period = f.read().split()
        return max(1, min(cpus, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup of version 2, or no quota ("max")
        return cpus


def wanted() -> int:
    """ALPHABAR_THREADS, or every CPU that this process may use."""
    given = os.environ.get("ALPHABAR_THREADS", "").strip()
    if not given:
        return available()
    if not (given.isascii() and given.isdecimal() and 1 <= int(given[:9]) <= MOST):
        raise ValueError(f"ALPHABAR_THREADS must be a positive integer up to {MOST}, not {given!r}")
    return int(given)


_wanted = wanted()
if "numba" not in sys.modules:
    os.environ.setdefault("NUMBA_NUM_THREADS", str(_wanted))
    os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN))

import numba  # noqa: E402
import threadpoolctl  # noqa: E402
from numba.np.ufunc import parallel  # noqa: E402
from scipy.linalg import cython_blas  # noqa: E402, F401  Numba loads it at the first call: loaded now, it is limited below

_there = numba.get_num_threads()
if os.environ.get("ALPHABAR_THREADS", "").strip() and _wanted > min(_there, available()):
    _why = (
        f"Numba was loaded with {_there}" if _there < _wanted else f"this process may use {available()} CPUs, so they take turns"
    )
    warnings.warn(f"ALPHABAR_THREADS={_wanted}: {_why}", stacklevel=2)
numba.set_num_threads(min(_wanted, _there))
threadpoolctl.threadpool_limits(1, user_api="blas")

numba.get_num_threads()  # starts the pool, so that its own functions are there: they take a fifth of the time of Numba's
threads: Callable[[], int] = vars(parallel)["_get_num_threads"]  # how many workers the next parallel loop has
_set_threads: Callable[[int], None] = vars(parallel)["_set_num_threads"]

# Waking the pool costs some 5 microseconds on idle cores and up to 1 ms where another process holds one (a small MLP ran 13 times
# slower on two workers than on one there), so work of less than about 30 microseconds stays on the calling thread.
ELEMENTS = 1 << 15  # of an elementwise kernel
PRODUCTS = 1 << 21  # multiplications of a matrix product


def alone_below(limit: int, work: Callable[..., int]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a kernel: a call whose ``work`` (a function of the same arguments) is less than ``limit`` takes one worker."""

    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            workers = threads()
            if workers == 1 or work(*args, **kwargs) >= limit:
                return f(*args, **kwargs)
            _set_threads(1)
            try:
                return f(*args, **kwargs)
            finally:
                _set_threads(workers)

        return call

    return decorate
