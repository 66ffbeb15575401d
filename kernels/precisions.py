"""How exact the fast kernels must be: "default"; "high", no faster sum that rounds more than the plain one; or "tf32", on a GPU.

On the CPU "default" lets 3×3 convolutions go by Winograd's F(4×4, 3×3): a relative error (L2) of 1e-6 to 4e-6, where the plain
float32 sum has some 3e-7. ``ALPHABAR_PRECISION=high`` in the environment, ``with precision("high"):`` around some calls, or the
argument ``precision`` of one call asks for the plain sum.

"tf32" lets convolutions and attention of float32 arrays on a GPU round the operands of their products to TF32, which has 10 bits
after the point: a relative error of at most 2^-11 in each operand, the sums in float32. On the CPU it is "default".
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

PRECISIONS = ("default", "high", "tf32")
_DEFAULT: str = os.environ.get("ALPHABAR_PRECISION", "default")
_precision: ContextVar[str] = ContextVar("precision", default=_DEFAULT)


def check(value: object) -> None:
    """ValueError unless ``value`` is None or one of PRECISIONS."""
    if value is not None and value not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, not {value!r}")


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Run the block with this precision: "default", "high" or "tf32"."""
    check(name)
    token = _precision.set(name)
    try:
        yield
    finally:
        _precision.reset(token)


def asked(value: str | None = None) -> str:
    """The precision of a call with this argument ``precision``: the one in force where that is None."""
    chosen = _precision.get() if value is None else value
    if chosen not in PRECISIONS:
        raise ValueError(f"ALPHABAR_PRECISION must be one of {PRECISIONS}, not {chosen!r}")
    return chosen


def high(value: str | None = None) -> bool:
    """Whether a call with this argument ``precision`` must not round more than the plain sum."""
    return asked(value) == "high"


def tf32(value: str | None = None) -> bool:
    """Whether a call with this argument ``precision`` may round the operands of a GPU's matrix products to TF32."""
    return asked(value) == "tf32"
