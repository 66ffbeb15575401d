"""Products with the Jacobian J = ∂f/∂x of a function of tensors: J v by forward mode, uᵀJ by a backward pass."""

from collections.abc import Callable
from typing import Any

from ..kernels.arrays import array_module, is_native, native, restore
from .autograd import Tensor, backward, fresh_tape, no_grad

Array = Any


def _like(name: str, a: Array, like: str, b: Array) -> Array:
    """``a`` (named) as a native array of the library, shape and dtype of ``b``."""
    a = native(a)
    if not is_native(a) or array_module(a) is not array_module(b):
        raise TypeError(f"{name} must be an array of {array_module(b).__name__} like {like}, not {type(a).__name__}")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"{name} is {a.dtype} {a.shape}, want {b.dtype} {b.shape} to go with {like}")
    return a


def _input(x: Array) -> Array:
    x = native(x)
    if not is_native(x):
        raise TypeError(f"x must be an array, not {type(x).__name__}")
    if x.dtype.kind != "f":
        raise TypeError(f"x must be of a float dtype, not {x.dtype}")
    return x


def _call(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = f(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"f must return a Tensor (call the network itself, not its predict), not {type(y).__name__}")
    return y


def jvp(f: Callable[[Tensor], Tensor], x: Array, v: Array) -> tuple[Array, Array]:
    """(f(x), J v), with J the Jacobian of ``f`` at ``x``: one pass in forward mode, no tape.

    x, v: arrays of one shape and float dtype, of any library that speaks DLPack; the answers are of x's kind and the caller's to
    keep. Raises TypeError or ValueError for arguments that do not fit.
    """
    at = _input(x)
    with fresh_tape(), no_grad():
        y = _call(f, Tensor(at, tangent=_like("v", v, "x", at)))
        dot = array_module(y.data).zeros_like(y.data) if y.tangent is None else y.tangent.data.copy()
    return restore(y.data.copy(), x), restore(dot, x)


def vjp(f: Callable[[Tensor], Tensor], x: Array, u: Array) -> tuple[Array, Array]:
    """(f(x), uᵀJ), with J the Jacobian of ``f`` at ``x``: one backward pass that leaves all other gradients as they are.

    x: array of a float dtype, of any library that speaks DLPack; u: of the shape and dtype of f(x). The answers are of x's kind
    and the caller's to keep. Raises TypeError or ValueError for arguments that do not fit.
    """
    at = _input(x)
    with fresh_tape():
        start = Tensor(at, needs_grad=True)
        y = _call(f, start)
        u = _like("u", u, "f(x)", y.data)
        value = y.data.copy()
        if y.needs_grad:
            backward((y, u))
    gradient = array_module(at).zeros_like(at) if start.grad is None else start.grad.copy()
    return restore(value, x), restore(gradient, x)
