"""How exact the fast kernels must be: "default", or "high", where no faster sum is taken that rounds more than the plain one.

On the CPU "default" lets 3×3 convolutions go by Winograd's F(4×4, 3×3): a relative error (L2) of 1e-6 to 4e-6, where the plain
float32 sum has some 3e-7. ``ALPHABAR_PRECISION=high`` in the environment, ``with precision("high"):`` around some calls, or the
argument ``precision`` of one call asks for the plain sum.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PRECISIONS = ("default", "high")
_DEFAULT: str = os.environ.get("ALPHABAR_PRECISION", "default")
_precision: ContextVar[str] = ContextVar("precision", default=_DEFAULT)


def check(value: object) -> None:
    """ValueError unless ``value`` is None or one of PRECISIONS."""
    if value is not None and value not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, not {value!r}")


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Run the block with this precision: "default" or "high"."""
    check(name)
    token = _precision.set(name)
    try:
        yield
    finally:
        _precision.reset(token)


def high(value: str | None = None) -> bool:
    """Whether a call with this argument ``precision`` must not round more than the plain sum."""
    chosen = _precision.get() if value is None else value
    if chosen not in PRECISIONS:
        raise ValueError(f"ALPHABAR_PRECISION must be one of {PRECISIONS}, not {chosen!r}")
    return chosen == "high"
