"""Every kernel's definition in plain array code, for NumPy and CuPy alike and for any float dtype.

The formula stands above the lines that compute it. The faster backends (``cpu``, ``gpu``) carry the same names and the same
argument order; ``tests/test_kernels.py`` holds them to these definitions. Layout: activations NHWC, weights HWIO, tokens
(B, T, heads, d).
"""

from typing import Any

import numpy as np

from . import buffers
from .arrays import array_module
from .streams import FORWARD, SAMPLER

Array = Any

# The columns of one sampler row, in the order in which every backend reads them:
#   x0 = clip(p·x + q·m)
#   x' = a·x + b·x0 + e·m + h1·y_-1 + h2·y_-2 + h3·y_-3 + g·guidance + c·z
#   y  = u·x + w·x0 + r·m                       (what the history keeps of this row)
ROW = ("p", "q", "a", "b", "e", "h1", "h2", "h3", "g", "c", "u", "w", "r")

RUN = 256  # elements of one counter word that lie side by side
BLOCK = 4 * RUN  # elements made by RUN counters


# --------------------------------------------------------------------------------------------------------------- random numbers


def philox(counter: tuple, key: tuple[int, int]) -> tuple:
    """Philox4x32-10 (Salmon et al. 2011): four uint32 words from a counter of four uint32 words and a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = int(key[0]), int(key[1])
    xp = array_module(c0)
    for _ in range(10):
        p0 = c0.astype(xp.uint64) * xp.uint64(0xD2511F53)
        p1 = c2.astype(xp.uint64) * xp.uint64(0xCD9E8D57)
        h0, l0 = (p0 >> xp.uint64(32)).astype(xp.uint32), p0.astype(xp.uint32)
        h1, l1 = (p1 >> xp.uint64(32)).astype(xp.uint32), p1.astype(xp.uint32)
        c0, c1, c2, c3 = h1 ^ c1 ^ xp.uint32(k0), l1, h0 ^ c3 ^ xp.uint32(k1), l0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def minus_2_log(r: Array) -> Array:
    """−2 ln u with u = (⌊r/2⁸⌋ + 1)·2⁻²⁴ ∈ (0, 1], in float32 operations that are each rounded once: the same bits everywhere."""
    xp = array_module(r)
    f32 = xp.float32
    f = ((r >> xp.uint32(8)) + xp.uint32(1)).astype(f32)  # exact, at most 2^24
    bits = f.view(xp.uint32) - xp.uint32(0x3F3504F3)
    e = (bits >> xp.uint32(23)).astype(f32)
    x = ((bits & xp.uint32(0x007FFFFF)) + xp.uint32(0x3F3504F3)).view(f32) - f32(1)  # f = 2^e (1 + x), √½ ≤ 1 + x < √2
    y = f32(7.0376836292e-2) * x + f32(-1.1514610310e-1)
    for k in (
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        y = y * x + f32(k)
    z = x * x
    y = (y * x) * z
    q = e - f32(24)
    y = y + q * f32(-2.12194440e-4)
    y = y + f32(-0.5) * z
    return f32(-2) * ((x + y) + q * f32(0.693359375))


def cos_sin(r: Array) -> tuple[Array, Array]:
    """(cos θ, sin θ) of a uniform angle: octant from the top 3 bits of r, angle in it from the next 24; single roundings."""
    xp = array_module(r)
    f32 = xp.float32
    octant = r >> xp.uint32(29)
    t = ((r >> xp.uint32(5)) & xp.uint32(0xFFFFFF)).astype(f32) * f32(4.6813379e-8)  # π/4·2⁻²⁴: [0, π/4)
    z = t * t
    s = f32(-1.9515295891e-4) * z + f32(8.3321608736e-3)
    s = s * z + f32(-1.6666654611e-1)
    s = (s * z) * t + t
    c = f32(2.443315711809948e-5) * z + f32(-1.388731625493765e-3)
    c = c * z + f32(4.166664568298827e-2)
    c = ((c * z) * z + f32(-0.5) * z) + f32(1)
    odd = (octant & xp.uint32(1)) != 0
    a, b = xp.where(odd, s, c), xp.where(odd, c, s)
    return xp.where((octant & xp.uint32(2)) != 0, -a, a), xp.where((octant & xp.uint32(4)) != 0, -b, b)


def normals(out: Array, seed: int, step: int = 0, stream: int = SAMPLER, first_sample: int = 0) -> Array:
    """Fill ``out`` (B, …) with standard normals that depend on (seed, sample, step, stream, element) and on nothing else.

    Element e of a sample takes word ⌊e/256⌋ mod 4 of the counter (256·⌊e/1024⌋ + e mod 256, sample, step, stream): both 256
    neighbouring counters on a CPU and four neighbouring counters of a GPU thread write contiguous runs. Words 0, 1 make one
    Box–Muller pair, words 2, 3 the other. The values are float32 bits also where ``out`` is float64.
    """
    xp = array_module(out)
    batch, size = out.shape[0], int(np.prod(out.shape[1:]))
    if batch == 0 or size == 0:
        return out
    blocks = -(-size // BLOCK)
    lanes = min(RUN, size)
    c0 = (xp.arange(blocks, dtype=xp.uint32)[:, None] * xp.uint32(RUN) + xp.arange(lanes, dtype=xp.uint32)[None, :])[None]
    c0 = xp.broadcast_to(c0, (batch, blocks, lanes))
    c1 = xp.broadcast_to(
        ((np.uint64(first_sample) + xp.arange(batch, dtype=xp.uint64)) & xp.uint64(0xFFFFFFFF)).astype(xp.uint32)[:, None, None],
        c0.shape,
    )
    r0, r1, r2, r3 = philox((c0, c1, xp.full_like(c0, step), xp.full_like(c0, stream)), (seed & 0xFFFFFFFF, seed >> 32))
    radius0, radius1 = xp.sqrt(minus_2_log(r0)), xp.sqrt(minus_2_log(r2))
    (cos0, sin0), (cos1, sin1) = cos_sin(r1), cos_sin(r3)
    z = xp.stack([radius0 * cos0, radius0 * sin0, radius1 * cos1, radius1 * sin1], axis=2)  # (B, blocks, 4, lanes)
    out.reshape(batch, size)[...] = z.reshape(batch, -1)[:, :size]
    return out


# -------------------------------------------------------------------------------------------------------------------- diffusion


def q_sample(
    x0: Array,
    t: Array,
    signal: Array,
    noise: Array,
    eps: Array | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = FORWARD,
    first_sample: int = 0,
    out: Array | None = None,
    eps_out: Array | None = None,
) -> tuple[Array, Array]:
    """x_t = √ᾱ_t·x0 + √(1−ᾱ_t)·ε, with the gather of (√ᾱ_t, √(1−ᾱ_t)) = (signal[t], noise[t]) by t. Eq: S0-U2.

    x0 (B, …); t (B,) integers; signal, noise (T+1,). ε is drawn with (seed, step, stream) unless given. Returns (x_t, ε).
    """
    xp = array_module(x0)
    if eps is None:
        eps = normals(buffers.empty(x0.shape, x0.dtype, xp) if eps_out is None else eps_out, seed, step, stream, first_sample)
    elif eps_out is not None:
        eps_out[...] = eps
        eps = eps_out
    column = (x0.shape[0],) + (1,) * (x0.ndim - 1)
    a = signal[t].astype(x0.dtype).reshape(column)
    s = noise[t].astype(x0.dtype).reshape(column)
    x_t = a * x0 + s * eps
    if out is not None:
        out[...] = x_t
        x_t = out
    return x_t, eps


def step(
    x: Array,
    m: Array,
    rows: Array,
    i: int,
    history: tuple = (),
    guidance: Array | None = None,
    noise: Any = None,
    clip: tuple[float, float] | None = None,
    seed: int = 0,
    stream: int = SAMPLER,
    first_sample: int = 0,
    out: Array | None = None,
    store: Array | None = None,
) -> Array:
    """One row of a sampler table: the only update there is. Columns as in ``ROW``; rows (R, 13).

        x0 = clip(p·x + q·m)
        x' = a·x + b·x0 + e·m + Σ_k h_k·y_{-k} + g·guidance + c·z
        y  = u·x + w·x0 + r·m

    x, m (B, …); ``history`` (y_{-1}, y_{-2}, y_{-3}), at most three. ``noise`` is None (c·z is left out), True (z is made with
    (seed, step = i, stream)) or an array. y goes to ``store`` where that is given. ``out`` may be x itself.
    """
    xp = array_module(x)
    p, q, a, b, e, h1, h2, h3, g, c, u, w, r = (float(k) for k in rows[i])
    x0 = p * x + q * m
    if clip is not None:
        x0 = xp.clip(x0, x.dtype.type(clip[0]), x.dtype.type(clip[1]))
    y = a * x + b * x0 + e * m
    for h, past in zip((h1, h2, h3), history, strict=False):
        y = y + h * past
    if guidance is not None:
        y = y + g * guidance
    if noise is True:
        y = y + c * normals(buffers.empty(x.shape, x.dtype, xp), seed, i, stream, first_sample)
    elif noise is not None:
        y = y + c * noise
    if store is not None:
        store[...] = u * x + w * x0 + r * m
    if out is None:
        return y
    out[...] = y
    return out


# ----------------------------------------------------------------------------------------------------------------- normalisation


def _grouped(x: Array, groups: int) -> Array:
    return x.reshape(x.shape[0], int(np.prod(x.shape[1:-1])), groups, x.shape[-1] // groups)


def _per_sample(v: Array, ndim: int) -> Array:
    return v.reshape(v.shape[0], *(1,) * (ndim - 2), v.shape[-1])


def _modulated(
    x: Array, gamma: Array, beta: Array, groups: int, mean: Array, rstd: Array, scale: Array | None, shift: Array | None
) -> tuple[Array, Array]:
    """(x̂, v): x̂ = (x − mean)·rstd per group, v = (x̂·γ + β)·(1 + scale) + shift."""
    x_hat = ((_grouped(x, groups) - mean[:, None, :, None]) * rstd[:, None, :, None]).reshape(x.shape)
    v = x_hat * gamma + beta
    if scale is not None:
        v = v * (1 + _per_sample(scale, x.ndim)) + _per_sample(shift, x.ndim)
    return x_hat, v


def _sigmoid(v: Array) -> Array:
    xp = array_module(v)
    return 1 / (1 + xp.exp(-xp.clip(v, -80, None)))


def group_norm_silu(
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    eps: float = 1e-5,
    scale: Array | None = None,
    shift: Array | None = None,
    silu: bool = True,
    out: Array | None = None,
) -> tuple[Array, Array, Array]:
    """y = silu((x̂·γ + β)·(1 + scale) + shift), x̂ = (x − mean)/√(var + eps) over each group of channels and all places.

    x (B, …, C); gamma, beta (C,); scale, shift (B, C) or both None; without ``silu`` the activation is the identity.
    Returns (y, mean (B, groups), rstd (B, groups)).
    """
    xg = _grouped(x, groups)
    mean = xg.mean(axis=(1, 3))
    var = ((xg - mean[:, None, :, None]) ** 2).mean(axis=(1, 3))
    rstd = 1 / array_module(x).sqrt(var + x.dtype.type(eps))
    _, v = _modulated(x, gamma, beta, groups, mean, rstd, scale, shift)
    y = v * _sigmoid(v) if silu else v
    if out is not None:
        out[...] = y
        y = out
    return y, mean, rstd


def group_norm_silu_backward(
    dy: Array,
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    mean: Array,
    rstd: Array,
    scale: Array | None = None,
    shift: Array | None = None,
    silu: bool = True,
    out: Array | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """Gradients of :func:`group_norm_silu`: (dx, dgamma, dbeta, dscale, dshift); the last two are None without scale and shift.

    With v the argument of the activation: dv = dy·σ(v)(1 + v(1 − σ(v)));
    n = x̂γ + β: dn = dv(1 + scale), dscale = Σ dv·n, dshift = Σ dv;
    dγ = Σ dn·x̂, dβ = Σ dn; and with g = dn·γ, ⟨·⟩ the mean over a group: dx = rstd·(g − ⟨g⟩ − x̂⟨g·x̂⟩).
    """
    x_hat, v = _modulated(x, gamma, beta, groups, mean, rstd, scale, shift)
    dv = dy
    if silu:
        sig = _sigmoid(v)
        dv = dy * (sig * (1 + v * (1 - sig)))
    places = tuple(range(1, x.ndim - 1))
    dscale = dshift = None
    dn = dv
    if scale is not None:
        dscale = (dv * (x_hat * gamma + beta)).sum(axis=places)
        dshift = dv.sum(axis=places)
        dn = dv * (1 + _per_sample(scale, x.ndim))
    every = tuple(range(x.ndim - 1))
    dgamma, dbeta = (dn * x_hat).sum(axis=every), dn.sum(axis=every)
    g, h = _grouped(dn * gamma, groups), _grouped(x_hat, groups)
    g_mean = g.mean(axis=(1, 3), keepdims=True)
    gh_mean = (g * h).mean(axis=(1, 3), keepdims=True)
    dx = (rstd[:, None, :, None] * (g - g_mean - h * gh_mean)).reshape(x.shape)
    if out is not None:
        out[...] = dx
        dx = out
    return dx, dgamma, dbeta, dscale, dshift


# ------------------------------------------------------------------------------------------------------------------ convolution


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
) -> Array:
    """y[n,i,j,k] = bias[k] + Σ_{u,v,c} x̃[n, i·stride+u, j·stride+v, c]·w[u,v,c,k]; x̃ is x padded.

    With ``upsample`` x is first doubled by nearest neighbour. x (B, H, W, Cin); w (k, k, Cin, Cout) with k = 1 or 3; stride 1 or
    2; ``pad`` (before, after), by default ((k−1)//2, k//2).
    """
    kernel = w.shape[0]
    xt = _padded(x, kernel, upsample, pad)
    rows, cols = (conv_output_size(n, kernel, stride, upsample, pad) for n in x.shape[1:3])
    y: Array = 0
    for u in range(kernel):
        for v in range(kernel):
            y = y + xt[:, u : u + stride * (rows - 1) + 1 : stride, v : v + stride * (cols - 1) + 1 : stride] @ w[u, v]
    if bias is not None:
        y = y + bias
    if out is not None:
        out[...] = y
        y = out
    return y


def conv2d_backward_input(
    dy: Array,
    w: Array,
    input_shape: tuple[int, ...],
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
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
    if out is None:
        return xp.ascontiguousarray(dx)
    out[...] = dx
    return out


def conv2d_backward_weight(
    x: Array,
    dy: Array,
    kernel: int,
    stride: int = 1,
    upsample: bool = False,
    pad: tuple[int, int] | None = None,
    out: Array | None = None,
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


# -------------------------------------------------------------------------------------------------------------------- attention


def attention(q: Array, k: Array, v: Array, scale: float | None = None, out: Array | None = None) -> tuple[Array, Array]:
    """o = softmax(scale·q kᵀ) v for each head; lse = log Σ exp(scale·q kᵀ). q, k, v (B, T, heads, d); scale defaults to 1/√d.

    Returns (o (B, T, heads, d), lse (B, heads, T)); lse is all that the backward pass needs besides its inputs.
    """
    xp = array_module(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    qh, kh, vh = (z.transpose(0, 2, 1, 3) for z in (q, k, v))
    s = (qh @ kh.swapaxes(-1, -2)) * q.dtype.type(scale)
    top = s.max(axis=-1, keepdims=True)
    p = xp.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    o = ((p / total) @ vh).transpose(0, 2, 1, 3)
    if out is None:
        out = xp.ascontiguousarray(o)
    else:
        out[...] = o
    return out, (top + xp.log(total))[..., 0]


def attention_backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, scale: float | None = None
) -> tuple[Array, Array, Array]:
    """(dq, dk, dv): with P = exp(scale·q kᵀ − lse), dS = P∘(do vᵀ − Σ_d do∘o): dv = Pᵀdo, dq = scale·dS k, dk = scale·dSᵀ q."""
    xp = array_module(q)
    scale = q.dtype.type(q.shape[-1] ** -0.5 if scale is None else scale)
    doh, qh, kh, vh, oh = (z.transpose(0, 2, 1, 3) for z in (do, q, k, v, o))
    p = xp.exp((qh @ kh.swapaxes(-1, -2)) * scale - lse[..., None])
    dv = p.swapaxes(-1, -2) @ doh
    ds = p * (doh @ vh.swapaxes(-1, -2) - (doh * oh).sum(axis=-1, keepdims=True))
    dq, dk = (ds @ kh) * scale, (ds.swapaxes(-1, -2) @ qh) * scale
    dq, dk, dv = (xp.ascontiguousarray(z.transpose(0, 2, 1, 3)) for z in (dq, dk, dv))
    return dq, dk, dv


# -------------------------------------------------------------------------------------------------------------------- optimiser


def sum_squares(x: Array) -> Array:
    """Σ x², in float64, as an array of one element (so that on a GPU nothing waits for the host)."""
    return array_module(x).square(x.ravel().astype(np.float64)).sum(keepdims=True)


def adamw_ema(
    param: Array,
    grad: Array,
    m: Array,
    v: Array,
    ema: Array,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    ema_decay: float,
    norm_sq: Array | None = None,
    max_norm: float = float("inf"),
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019), global-norm clipping and the running average, in place over flat buffers.

        g = grad·min(1, max_norm/(√norm_sq + 1e-6));  m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²
        param = (1 − lr·weight_decay)·param − lr/(1−β1^step)·m / (√(v/(1−β2^step)) + eps);  ema = decay·ema + (1−decay)·param

    ``step`` counts from 1. ``norm_sq`` is Σ grad² as from :func:`sum_squares`, or None for no clipping.
    """
    xp = array_module(param)
    if norm_sq is not None and np.isfinite(max_norm):
        grad = grad * xp.minimum(1.0, max_norm / (xp.sqrt(norm_sq) + 1e-6)).astype(param.dtype)
    m[...] = beta1 * m + (1 - beta1) * grad
    v[...] = beta2 * v + (1 - beta2) * grad * grad
    denominator = xp.sqrt(v / (1 - beta2**step)) + eps
    param[...] = (1 - lr * weight_decay) * param - (lr / (1 - beta1**step)) * (m / denominator)
    ema[...] = ema_decay * ema + (1 - ema_decay) * param
