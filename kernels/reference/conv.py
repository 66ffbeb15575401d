"""Convolution by its definition."""

from typing import Any

from ..arrays import array_module
from ..buffers import into

Array = Any


def conv_padding(kernel: int, pad: tuple[int, int] | None) -> tuple[int, int]:
    """(before, after) padding of both image axes; the default keeps the size at stride 1."""
    return ((kernel - 1) // 2, kernel // 2) if pad is None else pad


def conv_output_size(size: int, kernel: int, stride: int, upsample: bool, pad: tuple[int, int] | None) -> int:
    before, after = conv_padding(kernel, pad)
    return ((2 * size if upsample else size) + before + after - kernel) // stride + 1


def _padded(x: Array, kernel: int, upsample: bool, pad: tuple[int, int] | None) -> Array:
    xp = array_module(x)
    if upsample:  # nearest neighbour
        x = x.repeat(2, axis=1).repeat(2, axis=2)
    p = conv_padding(kernel, pad)
    return xp.pad(x, ((0, 0), p, p, (0, 0))) if p != (0, 0) else x


def conv2d(
    x: Array,
    w: Array,
    bias: Array | None = None,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    shift: Array | None = None,
    residual: Array | None = None,
    precision: str | None = None,
) -> Array:
    """y[n,i,j,k] = Σ_{u,v,c} x̃[n, i·stride+u, j·stride+v, c]·w[u,v,c,k] + bias[k] + shift[n,k] + residual[n,i,j,k].

    x̃ is x padded. With ``upsample`` x is first doubled by nearest neighbour. x (B, H, W, Cin); w (k, k, Cin, Cout) with k = 1 or
    3; stride 1 or 2; ``pad`` (before, after), by default ((k−1)//2, k//2). ``precision`` is that of
    :mod:`alphabar.kernels.precisions`; None: the one in force.
    """
    kernel = w.shape[0]
    xt = _padded(x, kernel, upsample, pad)
    rows, cols = (conv_output_size(n, kernel, stride, upsample, pad) for n in x.shape[1:3])
    y: Array = 0
    for u in range(kernel):
        for v in range(kernel):
            y = y + xt[:, u : u + stride * (rows - 1) + 1 : stride, v : v + stride * (cols - 1) + 1 : stride] @ w[u, v]
    for term in (bias, None if shift is None else shift[:, None, None], residual):
        if term is not None:
            y = y + term
    return into(out, y)


def conv2d_backward_input(
    dy: Array,
    w: Array,
    input_shape: tuple[int, ...],
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    precision: str | None = None,
) -> Array:
    """dx[n,i',j',c] = Σ dy[n,i,j,k]·w[u,v,c,k] over all (i,j,u,v) that read x̃[n,i',j',c]; doubled places add up."""
    xp = array_module(dy)
    kernel, (batch, height, width, channels) = w.shape[0], input_shape
    before, after = conv_padding(kernel, pad)
    factor = 2 if upsample else 1
    dxt = xp.zeros((batch, height * factor + before + after, width * factor + before + after, channels), dy.dtype)
    rows, cols = dy.shape[1:3]
    for u in range(kernel):
        for v in range(kernel):
            dxt[:, u : u + stride * (rows - 1) + 1 : stride, v : v + stride * (cols - 1) + 1 : stride] += dy @ w[u, v].T
    dx = dxt[:, before : before + height * factor, before : before + width * factor]
    if upsample:
        dx = dx.reshape(batch, height, 2, width, 2, channels).sum(axis=(2, 4))
    return into(out, xp.ascontiguousarray(dx))


def conv2d_backward_weight(
    x: Array,
    dy: Array,
    kernel: int,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
    precision: str | None = None,
) -> tuple[Array, Array]:
    """(dw, dbias): dw[u,v,c,k] = Σ_{n,i,j} x̃[n, i·stride+u, j·stride+v, c]·dy[n,i,j,k], dbias[k] = Σ_{n,i,j} dy[n,i,j,k]."""
    xp = array_module(x)
    xt = _padded(x, kernel, upsample, pad)
    rows, cols = dy.shape[1:3]
    flat = dy.reshape(-1, dy.shape[-1])
    dw = xp.empty((kernel, kernel, x.shape[-1], dy.shape[-1]), dy.dtype) if out is None else out
    for u in range(kernel):
        for v in range(kernel):
            patch = xt[:, u : u + stride * (rows - 1) + 1 : stride, v : v + stride * (cols - 1) + 1 : stride]
            dw[u, v] = patch.reshape(-1, x.shape[-1]).T @ flat
    return dw, flat.sum(axis=0)
