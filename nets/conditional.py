"""What networks ε(x, t, y) with or without labels share."""

from typing import Any

from ..kernels.arrays import native, restore
from .autograd import Tensor, no_grad
from .computing import Computing
from .inputs import check_labels
from .layers import ParameterStore

Array = Any


class Conditional(Computing):
    """A network of x, t and, where its ``config`` has ``classes``, labels y; ``classes`` itself is the null class."""

    config: dict[str, Any]
    params: ParameterStore

    @property
    def null(self) -> int:
        """The label that stands for no condition."""
        if self.config["classes"] is None or not self.config["null_class"]:
            raise ValueError("this network has no null class")
        return self.config["classes"]

    @property
    def label_rows(self) -> int:
        """The number of labels, with the null class; 0 without classes."""
        c = self.config
        return 0 if c["classes"] is None else c["classes"] + c["null_class"]

    def __call__(
        self, x: Array | Tensor, t: Array, y: Array | None = None, step: int | None = None, first_sample: int = 0
    ) -> Tensor:
        """The network's output, recorded for a backward pass unless under ``no_grad``."""
        raise NotImplementedError

    def labels(self, y: Any, batch: int) -> Array | None:
        """y (B,) checked, the null class for None; None where the network has no classes."""
        c = self.config
        if c["classes"] is not None:
            return check_labels(y, batch, c["classes"], c["null_class"], self.params.xp)
        if y is not None:
            raise ValueError("y is given, but the network has no classes")
        return None

    def predict(self, x: Array, t: Array, y: Array | None = None) -> Array:
        """The network's output as an array that is the caller's to keep, without a tape and without dropout.

        Arguments as for a call; x may be of any library that speaks DLPack, and the answer is of the same kind.
        """
        with no_grad():
            out = self(native(x), native(t), native(y)).data
        return restore(out, x)
