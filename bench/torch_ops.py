"""What PyTorch says and how fast: each kernel of the registry as a PyTorch function with our signature and layouts.

Tensors in, tensors out, any float dtype. Gradients come from autograd. NHWC images are handed on as channels-last views, no copy.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def normals(out: Tensor, seed: int, step: int = 0, stream: int = 0, first_sample: int = 0) -> Tensor:
    """Normals of PyTorch's own generator: other bits, the same law."""
    return out.normal_(generator=torch.Generator(out.device).manual_seed((seed + step + stream + first_sample) % 2**63))


def q_sample(
    x0: Tensor,
    t: Tensor,
    signal: Tensor,
    noise: Tensor,
    eps: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = 1,
    first_sample: int = 0,
    out: Tensor | None = None,
    eps_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    column = (-1,) + (1,) * (x0.ndim - 1)
    if eps is None:
        eps = torch.randn_like(x0)
    return signal[t].to(x0.dtype).view(column) * x0 + noise[t].to(x0.dtype).view(column) * eps, eps


def step(
    x: Tensor,
    m: Tensor,
    rows: Tensor,
    i: int,
    history: tuple[Tensor, ...] = (),
    guidance: Tensor | None = None,
    noise: Any = None,
    clip: tuple[float, float] | None = None,
    seed: int = 0,
    stream: int = 0,
    first_sample: int = 0,
    out: Tensor | None = None,
    store: Tensor | None = None,
) -> Tensor:
    p, q, a, b, e, h1, h2, h3, g, c, u, w, r = rows[i].tolist()
    x0 = p * x + q * m
    if clip is not None:
        x0 = x0.clamp(*clip)
    y = a * x + b * x0 + e * m
    for h, past in zip((h1, h2, h3), history, strict=False):
        y = y + h * past
    if guidance is not None:
        y = y + g * guidance
    if noise is True:
        y = y + c * torch.randn_like(x)
    elif noise is not None:
        y = y + c * noise
    if store is not None:
        store.copy_(u * x + w * x0 + r * m)
    return y


def categorical(
    log_weights: Tensor, seed: int, step: int = 0, stream: int = 0, first_sample: int = 0, out: Tensor | None = None
) -> Tensor:
    """States drawn by PyTorch's own generator, as in the kernels that follow."""
    return _multinomial(log_weights.softmax(-1))


def _multinomial(weights: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # the largest of w/e with e exponential: what torch.multinomial does, and can be fused
        return (weights / torch.empty_like(weights).exponential_()).argmax(-1).to(torch.int32)
    return torch.multinomial(weights.flatten(0, -2), 1).to(torch.int32).view(weights.shape[:-1])


def categorical_posterior(
    logits: Tensor,
    x_t: Tensor,
    rows: Tensor,
    index: int,
    mask: int = -1,
    seed: int = 0,
    step: int | None = None,
    stream: int = 0,
    first_sample: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """The mask is the state after the last column of the logits, as in the registry's cases."""
    return _posterior(logits, x_t, rows[index].tolist(), mask)


def _posterior(logits: Tensor, x_t: Tensor, row: list[float], mask: int = -1, **rest: Any) -> Tensor:
    keep, spread, c, d = row
    p = logits.softmax(-1)
    if mask >= 0:
        weights = torch.cat((c * p, p.new_full((*p.shape[:-1], 1), d)), dim=-1)
        return torch.where(x_t == mask, _multinomial(weights), x_t)
    weights = spread * (c * p + d)
    here = x_t[..., None].long()
    return _multinomial(weights.scatter_add(-1, here, keep * (c * p.gather(-1, here) + d)))


def categorical_q_sample(
    x0: Tensor,
    t: Tensor,
    keep: Tensor,
    states: int,
    mask: int = -1,
    seed: int = 0,
    step: int = 0,
    stream: int = 1,
    first_sample: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    stays = torch.rand(x0.shape, device=x0.device) < keep[t].float().view((-1,) + (1,) * (x0.ndim - 1))
    return torch.where(stays, x0, mask if mask >= 0 else torch.randint_like(x0, states))


def _first(x: Tensor) -> Tensor:
    """(B, ..., C) as (B, C, ...), a view."""
    return x.movedim(-1, 1)


def _last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


class Graph(NamedTuple):
    """A forward pass that has run, and what its backward pass starts from."""

    f: Callable[..., Tensor]
    y: Tensor
    leaves: tuple[Tensor, ...]
    dy: Tensor

    def gradients(self, keep: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.y, self.leaves, self.dy, retain_graph=keep, allow_unused=True, materialize_grads=True)


def _graph(f: Callable[..., Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> Graph:
    leaves = tuple(a.detach().requires_grad_() for a in leaves)
    with torch.enable_grad():
        return Graph(f, f(*leaves), leaves, dy)


def _gradient(outputs: int) -> Callable[[Callable[..., Graph]], Callable[..., Any]]:
    """Makes ``outputs`` gradients (None for those that do not exist) from the maker of a graph, which is kept as ``graph``."""

    def decorate(build: Callable[..., Graph]) -> Callable[..., Any]:
        @functools.wraps(build)
        def call(*args: Any, **kwargs: Any) -> Any:
            made = build(*args, **kwargs).gradients()
            if (tail_out := kwargs.get("tail_out")) is not None:
                tail_out.copy_(made[-1])
                made = made[:-1]
            return made[0] if outputs == 1 else made + (None,) * (outputs - len(made))

        call.graph = build  # type: ignore[attr-defined]
        return call

    return decorate


IMAGES = ("conv2d", "group_norm_silu")  # what the names of kernels on images start with


def contiguous(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments with PyTorch's other memory format inside: images NCHW, weights OIHW. None for a kernel without images."""
    if not name.startswith(IMAGES):
        return None

    def image(a: Any) -> Any:
        return _last(_first(a).contiguous()) if isinstance(a, Tensor) and a.ndim == 4 else a

    return _weights_as(torch.contiguous_format, name, tuple(map(image, args))), {k: image(v) for k, v in kwargs.items()}


def channels_last(name: str, args: tuple) -> tuple:
    """``args`` with images as they are, NHWC, and weights as PyTorch keeps them beside such images, OHWI."""
    return _weights_as(torch.channels_last, name, args)


def _weights_as(form: torch.memory_format, name: str, args: tuple) -> tuple:
    if name not in ("conv2d", "conv2d_backward_input"):
        return args
    return (args[0], _weight_as(form, args[1]), *args[2:])


def _weight_as(form: torch.memory_format, w: Tensor) -> Tensor:
    return w.permute(3, 2, 0, 1).contiguous(memory_format=form).permute(2, 3, 1, 0)


def timed(name: str, args: tuple, kwargs: dict[str, Any], compiled: bool = False, backend: str = "inductor") -> Callable[[], Any]:
    """A call to be timed: only what a user of PyTorch would run, as it stands or through torch.compile.

    Of a gradient that is the backward pass, over a graph that is built here once; norm and attention keep their statistics to
    themselves; the coefficients of a sampler step are folded; the norm of a gradient is summed in float32. PyTorch allocates its
    results (``out`` is left aside): what it does without is in ``torch_in_place``. Compiled, what PyTorch has as one call that no
    compiler looks into (WRITTEN_OUT) is written out, so that it can be fused.
    """
    if name in LOSSES:
        loss, leaf = LOSSES[name], args[0].detach().requires_grad_()
        if compiled:
            loss = torch.compile(loss, dynamic=False, backend=backend)
        return lambda: torch.autograd.grad(loss(leaf, *args[1:]), leaf)
    op = OPS[name]
    kwargs = {k: v for k, v in kwargs.items() if k != "out"}
    if hasattr(op, "graph"):
        graph = op.graph(*args, **kwargs)
        if compiled:
            torch._functorch.config.donated_buffer = False  # the graph is gone through more than once
            graph = _graph(torch.compile(graph.f, dynamic=False, backend=backend), graph.leaves, graph.dy)
        return lambda: graph.gradients(keep=True)
    bare = {
        "group_norm_silu": _normed,
        "layer_norm": _layer_normed,
        "attention": _attended,
        "sum_squares": torch.linalg.vector_norm,
    }
    op = bare.get(name, op)
    if name in ("step", "categorical_posterior"):
        op, args = _stepped if name == "step" else _posterior, (*args[:2], args[2][args[3]].tolist())
    if compiled:
        whole: Callable[..., Any] = WRITTEN_OUT.get(name, op)
        op = torch.compile(whole, dynamic=False, backend=backend)

    def call() -> Any:
        with torch.no_grad():
            return op(*args, **kwargs)

    return call


def _stepped(
    x: Tensor,
    m: Tensor,
    row: list[float],
    history: tuple[Tensor, ...] = (),
    noise: Any = None,
    clip: tuple[float, float] | None = None,
    store: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """:func:`step` without guidance as a user would write it: x0 is not formed where nothing needs it."""
    p, q, a, b, e, h1, h2, h3, _, c, u, w, r = row
    if clip is None:
        y = (a + b * p) * x + (e + b * q) * m
    else:
        x0 = (p * x + q * m).clamp(*clip)
        y = a * x + b * x0 + e * m
    for h, past in zip((h1, h2, h3), history, strict=False):
        y = y + h * past
    if noise is not None:
        y = y + c * (torch.randn_like(x) if noise is True else noise)
    if store is not None:
        store.copy_((u + w * p) * x + (r + w * q) * m if clip is None else u * x + w * x0 + r * m)
    return y


def _normed(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    tail: Tensor | None = None,
) -> Tensor:
    y = _last(torch.group_norm(_first(x if tail is None else torch.cat((x, tail), dim=-1)), groups, gamma, beta, eps))
    if scale is not None and shift is not None:
        places = (x.shape[0],) + (1,) * (x.ndim - 2) + (-1,)
        y = y * (1 + scale.view(places)) + shift.view(places)
    return F.silu(y) if silu else y


def group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
    tail: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x if tail is None else torch.cat((x, tail), dim=-1)
    grouped = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), groups, x.shape[-1] // groups)
    mean = grouped.mean(dim=(1, 3))
    var = (grouped - mean[:, None, :, None]).square().mean(dim=(1, 3))
    return _normed(x, gamma, beta, groups, eps, scale, shift, silu), mean, torch.rsqrt(var + eps)


@_gradient(5)
def group_norm_silu_backward(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    groups: int,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    out: Tensor | None = None,
    tail: Tensor | None = None,
    tail_out: Tensor | None = None,
    eps: float = 1e-5,
) -> Graph:
    """The statistics are made again from x, with ``eps``. The gradient of a tail is the last one."""
    modulated = scale is not None and shift is not None

    def normed(x: Tensor, gamma: Tensor, beta: Tensor, *rest: Tensor) -> Tensor:
        scale, shift = rest[:2] if modulated else (None, None)
        return _normed(x, gamma, beta, groups, eps, scale, shift, silu, None if tail is None else rest[-1])

    return _graph(normed, tuple(z for z in (x, gamma, beta, scale, shift, tail) if z is not None), dy)


def _convolved(x: Tensor, w: Tensor, bias: Tensor | None, stride: int, upsample: bool, pad: tuple[int, int] | None) -> Tensor:
    kernel = w.shape[0]
    before, after = ((kernel - 1) // 2, kernel // 2) if pad is None else pad
    h = _first(x)
    if upsample:
        h = (
            F.interpolate(h, scale_factor=2, mode="nearest")
            if h.numel()
            else h.new_empty(0, h.shape[1], 2 * h.shape[2], 2 * h.shape[3])
        )
    if before != after:
        h, before = F.pad(h, (before, after, before, after)), 0
    return _last(F.conv2d(h, w.permute(3, 2, 0, 1), bias, stride, before))


def conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    y = _convolved(x, w, bias, stride, upsample, pad)
    y = y if shift is None else y + shift[:, None, None]
    return y if residual is None else y + residual


@_gradient(1)
def conv2d_backward_input(
    dy: Tensor,
    w: Tensor,
    input_shape: tuple[int, ...],
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Tensor | None = None,
    precision: str | None = None,
) -> Graph:
    x = dy.new_zeros(input_shape)
    x = x if dy.is_contiguous() else _last(_first(x).contiguous())
    return _graph(lambda x: _convolved(x, w, None, stride, upsample, pad), (x,), dy)


@_gradient(2)
def conv2d_backward_weight(
    x: Tensor,
    dy: Tensor,
    kernel: int,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Tensor | None = None,
    precision: str | None = None,
) -> Graph:
    form = torch.channels_last if x.is_contiguous() else torch.contiguous_format
    w, bias = x.new_zeros(kernel, kernel, x.shape[-1], dy.shape[-1]), x.new_zeros(dy.shape[-1])
    leaves = _weight_as(form, w), bias
    return _graph(lambda w, bias: _convolved(x, w, bias, stride, upsample, pad), leaves, dy)


def _heads(z: Tensor) -> Tensor:
    return z.transpose(1, 2)


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    return _heads(F.scaled_dot_product_attention(_heads(q), _heads(k), _heads(v), scale=scale))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    s = _heads(q) @ _heads(k).transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return _attended(q, k, v, scale), torch.logsumexp(s, dim=-1)


@_gradient(3)
def attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float | None = None) -> Graph:
    return _graph(lambda q, k, v: _attended(q, k, v, scale), (q, k, v), do)


def silu(x: Tensor, out: Tensor | None = None) -> Tensor:
    return F.silu(x)


@_gradient(1)
def silu_backward(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Graph:
    return _graph(F.silu, (x,), dy)


def _layer_normed(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    y = F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    return y if scale is None or shift is None else y * (1 + scale[:, None]) + shift[:, None]


def layer_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(dim=-1)
    var = (x - mean[..., None]).square().mean(dim=-1)
    return _layer_normed(x, gamma, beta, eps, scale, shift), mean, torch.rsqrt(var + eps)


@_gradient(5)
def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    eps: float = 1e-5,
) -> Graph:
    """The statistics are made again from x, with ``eps``; the gradients do not depend on the shift."""
    if scale is None:
        return _graph(lambda x, gamma, beta: _layer_normed(x, gamma, beta, eps), (x, gamma, beta), dy)
    leaves = (x, gamma, beta, scale, torch.zeros_like(scale))
    return _graph(lambda x, gamma, beta, scale, shift: _layer_normed(x, gamma, beta, eps, scale, shift), leaves, dy)


def add_gated(x: Tensor, h: Tensor, gate: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.addcmul(x, gate[:, None], h)


@_gradient(2)
def add_gated_backward(dy: Tensor, h: Tensor, gate: Tensor, out: Tensor | None = None) -> Graph:
    return _graph(lambda h, gate: gate[:, None] * h, (h, gate), dy)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def _squared_errors(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    value = (output - target).reshape(output.shape[0], math.prod(output.shape[1:])).square().mean(dim=1)
    return value if weight is None else weight * value


def _mean_squared_error(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.mse_loss(output, target) if weight is None else _squared_errors(output, target, weight).mean()


def squared_error(
    output: Tensor, target: Tensor, weight: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _squared_errors(output, target, weight), _loss_gradient(_mean_squared_error, output, target, weight)


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long())


def cross_entropy(logits: Tensor, labels: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    value = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long(), reduction="none")
    return value.reshape(labels.shape), _loss_gradient(_mean_cross_entropy, logits, labels)


def _loss_gradient(loss: Callable[..., Tensor], output: Tensor, *args: Any) -> Tensor:
    if not output.numel():
        return torch.zeros_like(output)
    leaf = output.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(loss(leaf, *args), leaf)[0]


LOSSES: dict[str, Callable[..., Tensor]] = {"squared_error": _mean_squared_error, "cross_entropy": _mean_cross_entropy}


def softmax(x: Tensor, out: Tensor | None = None) -> Tensor:
    return F.softmax(x, dim=-1)


@_gradient(1)
def softmax_backward(dy: Tensor, y: Tensor, out: Tensor | None = None) -> Graph:
    return _graph(lambda x: F.softmax(x, dim=-1), (y.log(),), dy)


def sum_squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64).square().reshape(1)


def _clipped(grad: Tensor, norm_sq: Tensor | None, max_norm: float) -> Tensor:
    if norm_sq is None or not math.isfinite(max_norm):
        return grad
    return grad * (max_norm / (norm_sq.sqrt() + 1e-6)).clamp(max=1).to(grad.dtype)


def adamw_ema(
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
) -> None:
    """PyTorch's fused AdamW, clipping and running average, in place."""
    grad = _clipped(grad, norm_sq, max_norm)
    count = [torch.tensor(float(step), device=param.device)]
    rates: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
    torch._fused_adamw_([param], [grad], [m], [v], [], count, **rates, amsgrad=False, maximize=False)
    ema.lerp_(param, 1 - ema_decay)


def _drawn(out: Tensor, *rest: Any, **options: Any) -> Tensor:
    return torch.randn_like(out)


def _adamw_written_out(
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
) -> None:
    grad = _clipped(grad, norm_sq, max_norm)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (v / (1 - beta2**step)).sqrt() + eps
    param.mul_(1 - lr * weight_decay).addcdiv_(m, root, value=-lr / (1 - beta1**step))
    ema.lerp_(param, 1 - ema_decay)


WRITTEN_OUT: dict[str, Callable[..., Any]] = {"normals": _drawn, "adamw_ema": _adamw_written_out}
OPS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        normals,
        q_sample,
        step,
        group_norm_silu,
        group_norm_silu_backward,
        conv2d,
        conv2d_backward_input,
        conv2d_backward_weight,
        attention,
        attention_backward,
        categorical,
        categorical_posterior,
        categorical_q_sample,
        silu,
        silu_backward,
        layer_norm,
        layer_norm_backward,
        add_gated,
        add_gated_backward,
        rotary,
        squared_error,
        cross_entropy,
        softmax,
        softmax_backward,
        sum_squares,
        adamw_ema,
    )
}
