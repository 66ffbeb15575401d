"""What a network computes in: float32, products of operands rounded to TF32, or bfloat16."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np

from ..kernels import precisions
from .layers import ParameterStore

Call = TypeVar("Call", bound=Callable[..., Any])
COMPUTE = ("fp32", "tf32", "bf16")


class Computing:
    """A network with the option ``compute``: "fp32" (so it begins), "tf32" or "bf16".

    tf32: on a GPU, convolutions, linear layers and attention round the operands of their products to TF32.
    bf16: on a GPU, a U-Net keeps its images inside and their gradients in bfloat16 and reads its weights rounded to it. Sums,
    statistics, the embedding of time and labels, the gradients of weights and the weights themselves stay float32; products of
    float32 go by TF32, and so does all of a network of another kind.

    Input and output are float32 always. On the CPU, by the definitions (``kernels.use("reference")``) and where the input carries
    a tangent, nothing is rounded to either. ``kernels.precision("high")`` keeps products of float32 from TF32. The option is no
    part of ``config``: the same weights can be computed in all three ways.
    """

    params: ParameterStore
    takes_bf16 = False  # whether there is a bfloat16 path
    _compute = "fp32"

    @property
    def compute(self) -> str:
        """What is asked for."""
        return self._compute

    @compute.setter
    def compute(self, name: str) -> None:
        """Raises ValueError for a name that is none of COMPUTE, and for weights of float64 unless it is "fp32"."""
        if name not in COMPUTE:
            raise ValueError(f"compute must be one of {COMPUTE}, not {name!r}")
        if name != "fp32" and self.params.dtype != np.float32:
            raise ValueError(f"compute must be 'fp32' for weights of {self.params.dtype}, not {name!r}")
        self._compute = name
        self.params.keep_low(self.computes == "bf16")

    @property
    def computes(self) -> str:
        """What it comes to on the device of this network's weights."""
        if self.params.xp is np:
            return "fp32"
        return "tf32" if self._compute == "bf16" and not self.takes_bf16 else self._compute


def computed(call: Call) -> Call:
    """Decorates a method of a network that computes: float32 products go by TF32 where the option says so."""

    @wraps(call)
    def method(self: Computing, *args: Any, **options: Any) -> Any:
        if self.computes == "fp32" or precisions.asked() != "default":
            return call(self, *args, **options)
        with precisions.precision("tf32"):
            return call(self, *args, **options)

    return cast("Call", method)
