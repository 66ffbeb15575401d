"""Forward pass, loss and backward pass in one call, as a step of training makes them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .inputs import check_times

Array = Any
Loss = Callable[..., tuple[Array, Array]]


def descend(
    net: Any,
    loss: Loss,
    wanted: tuple[Array | None, ...] | None,
    x: Array,
    t: Array,
    y: Array | None = None,
    step: int | None = None,
) -> tuple[Array, Array]:
    """(value (B,), the network's output) for ``loss(output, *wanted)`` = (value, gradient of the mean value in the output).

    ``net.params.grad`` then holds the gradient of that loss alone. Arguments x, t, y and step as for a call of the network.
    ``wanted``: arrays (or None) that the loss reads besides the output. It computes by kernels alone, so that a network with
    plans records the whole and makes it again; a loss that does not takes what it wants itself and has None here. Raises
    what the network and the loss raise.
    """

    def body(x: Array, t: Array, y: Array | None, *wanted: Array | None) -> tuple[Array, Array]:
        net.params.zero_grad()
        output = net(x, t, y, step)
        value, gradient = loss(output.data, *wanted)
        output.backward(gradient)
        return value, output.data

    plans = getattr(net, "plans", None)
    if plans is None or wanted is None or type(x) is not np.ndarray or not x.ndim or net.config["dropout"]:
        return body(x, t, y, *(wanted or ()))
    labels = net.labels(y, len(x))
    return plans.arrays(
        loss,
        body,
        x,
        check_times(t, len(x), net.params.xp),
        None if labels is None else labels.astype("int64", copy=False),
        *wanted,
    )
