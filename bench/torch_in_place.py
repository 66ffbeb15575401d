"""PyTorch without allocations: the kernels that ``out=`` and in-place operations can express, into buffers made once."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]


def timed(name: str, args: tuple, kwargs: dict[str, Any]) -> Call | None:
    """A call to be timed that allocates nothing of the size of its arguments; None where PyTorch has no such form."""
    make = MAKERS.get(name)
    if make is None:
        return None
    work = make(*args, **kwargs)

    def call() -> object:
        with torch.no_grad():
            return work()

    return call


def _normals(out: Tensor, *rest: Any, **options: Any) -> Call:
    return out.normal_


def _q_sample(x0: Tensor, t: Tensor, signal: Tensor, noise: Tensor, eps: Tensor | None = None, **options: Any) -> Call:
    column = (-1,) + (1,) * (x0.ndim - 1)
    y, z = torch.empty_like(x0), torch.empty_like(x0) if eps is None else eps

    def work() -> Tensor:
        if eps is None:
            z.normal_()
        torch.mul(x0, signal[t].to(x0.dtype).view(column), out=y)
        return y.addcmul_(z, noise[t].to(x0.dtype).view(column))

    return work


def _step(
    x: Tensor,
    m: Tensor,
    rows: Tensor,
    i: int,
    history: tuple[Tensor, ...] = (),
    noise: Any = None,
    clip: tuple[float, float] | None = None,
    store: Tensor | None = None,
    **options: Any,
) -> Call:
    p, q, a, b, e, h1, h2, h3, _, c, u, w, r = rows[i].tolist()
    y, x0 = torch.empty_like(x), torch.empty_like(x)
    z = torch.empty_like(x) if noise is True else noise
    if clip is None:  # x0 is not formed
        a, e, u, r, b, w = a + b * p, e + b * q, u + w * p, r + w * q, 0.0, 0.0

    def work() -> Tensor:
        if clip is not None:
            torch.mul(x, p, out=x0).add_(m, alpha=q).clamp_(*clip)
        torch.mul(x, a, out=y).add_(m, alpha=e)
        if b:
            y.add_(x0, alpha=b)
        for h, past in zip((h1, h2, h3), history, strict=False):
            y.add_(past, alpha=h)
        if noise is True:
            z.normal_()
        if noise is not None:
            y.add_(z, alpha=c)
        if store is not None:
            torch.mul(x, u, out=store).add_(m, alpha=r)
            if w:
                store.add_(x0, alpha=w)
        return y

    return work


def _silu(x: Tensor, **options: Any) -> Call:
    y = torch.empty_like(x)
    return lambda: torch.ops.aten.silu.out(x, out=y)


def _silu_backward(dy: Tensor, x: Tensor, **options: Any) -> Call:
    dx = torch.empty_like(x)
    return lambda: torch.ops.aten.silu_backward.grad_input(dy, x, grad_input=dx)


def _add_gated(x: Tensor, h: Tensor, gate: Tensor, **options: Any) -> Call:
    y = torch.empty_like(x)
    return lambda: torch.addcmul(x, gate[:, None], h, out=y)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> Call:
    y, c, s = torch.empty_like(x), cos[:, None], sin[:, None]
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)

    def work() -> Tensor:
        torch.mul(a, c, out=to_a).addcmul_(b, s, value=-1)
        torch.mul(b, c, out=to_b).addcmul_(a, s)
        return y

    return work


def _sum_squares(x: Tensor) -> Call:
    norm = x.new_empty(())
    return lambda: torch.linalg.vector_norm(x, out=norm)


def _adamw_ema(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    ema: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float,
    norm_sq: Tensor | None = None,
    max_norm: float = math.inf,
) -> Call:
    clipped, count = torch.empty_like(grad), [torch.tensor(float(step))]
    rates: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}

    def work() -> Tensor:
        used = grad
        if norm_sq is not None and math.isfinite(max_norm):
            factor = (max_norm / (norm_sq.sqrt() + 1e-6)).clamp(max=1).to(grad.dtype)
            used = torch.mul(grad, factor, out=clipped)
        torch._fused_adamw_([param], [used], [m], [v], [], count, **rates, amsgrad=False, maximize=False)
        return ema.lerp_(param, 1 - ema_decay)

    return work


MAKERS: dict[str, Callable[..., Call]] = {
    "normals": _normals,
    "q_sample": _q_sample,
    "step": _step,
    "silu": _silu,
    "silu_backward": _silu_backward,
    "add_gated": _add_gated,
    "rotary": _rotary,
    "sum_squares": _sum_squares,
    "adamw_ema": _adamw_ema,
}
