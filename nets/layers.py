"""Layers: parameters and the function that uses them. All parameters of a network are views into one flat buffer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from math import prod, sqrt
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import elementwise, streams
from ..kernels.arrays import array_module
from ..kernels.bf16 import BF16
from . import functions as f
from . import token_functions
from .autograd import Tensor

Array = Any
ALIGN = 16  # elements: each parameter starts on a 64-byte boundary of the float32 buffer


class Parameter(Tensor):
    """A leaf of a store. It counts the changes of its attributes (not of what its arrays hold).

    ``low``: its values in bfloat16, where the store keeps them and they are those of ``data``.
    """

    __slots__ = ("_changes", "low")
    _changes: list[int]
    low: Array

    def __init__(self, changes: list[int]) -> None:
        object.__setattr__(self, "_changes", changes)
        super().__init__(None, needs_grad=True)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "data":
            super().__setattr__("low", None)
        self._changes[0] += 1


class ParameterStore:
    """The parameters of a network: one flat contiguous buffer ``data``, one ``grad``, and named views of them in order.

    Layers declare parameters, ``build`` allocates and fills them. Initial values are mean + std·z with z from the engine's
    normals, counter stream INIT and step = index of the parameter: the same on every backend, and float32 weights are the rounded
    float64 ones. Between parameters there may be a few unused elements, which stay zero.

    ``low`` is None or, on a GPU, a flat copy of the weights in bfloat16 (see :meth:`keep_low`). :meth:`load`, :meth:`using` and
    the optimiser keep it up to date; who writes into ``data`` himself calls :meth:`refresh`.
    """

    def __init__(self, seed: int = 0, xp: Any = np, dtype: Any = "float32") -> None:
        self.xp, self.dtype, self.seed = xp, np.dtype(dtype), seed
        if self.dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype must be float32 or float64, not {dtype}")
        self.data: Array = None
        self.grad: Array = None
        self.low: Array = None
        self._declared: dict[str, tuple[Parameter, tuple[int, ...], float, float]] = {}
        self._offsets: list[int] = []
        self._changes, self._seen = [0], -1  # of attributes of parameters: so far, and when _form was made
        self._form: tuple | None = None
        self._own: list[tuple[Array, Array]] = []  # the views that parameters have as data and grad

    def declare(self, name: str, shape: tuple[int, ...], std: float = 0.0, mean: float = 0.0) -> Tensor:
        """A parameter of this name and shape, to be filled by :meth:`build`."""
        if name in self._declared or self.data is not None:
            raise ValueError(f"parameter {name!r} is declared twice or after build")
        parameter = Parameter(self._changes)
        self._declared[name] = (parameter, shape, std, mean)
        return parameter

    def build(self) -> None:
        """Allocate the buffers and fill them with the initial values."""
        total = 0
        for _, shape, _, _ in self._declared.values():
            self._offsets.append(total)
            total += -(-prod(shape) // ALIGN) * ALIGN
        host = np.zeros(total, self.dtype)
        for index, (offset, (_, shape, std, mean)) in enumerate(zip(self._offsets, self._declared.values(), strict=True)):
            part = host[offset : offset + prod(shape)]
            part[...] = mean
            if std:
                z = kernels.normals(np.empty((1, part.size), np.float32), self.seed, step=index, stream=streams.INIT)
                part[...] = mean + std * z[0].astype(np.float64)
        self.grad = self.xp.zeros(total, self.dtype)
        for (parameter, *_), view in zip(self._declared.values(), self._views(self.grad), strict=True):
            parameter.grad, parameter._own = view, True
        self._point_at(self.xp.asarray(host))

    def _views(self, flat: Array) -> Iterator[Array]:
        for offset, (_, shape, _, _) in zip(self._offsets, self._declared.values(), strict=True):
            yield flat[offset : offset + prod(shape)].reshape(shape)

    def _point_at(self, flat: Array) -> None:
        self.data = flat
        for (parameter, *_), view in zip(self._declared.values(), self._views(flat), strict=True):
            parameter.data = view
        self._own = [(parameter.data, parameter.grad) for parameter, *_ in self._declared.values()]
        if self.low is not None:
            self._point_at_low()

    def _point_at_low(self) -> None:
        for (parameter, *_), view in zip(self._declared.values(), self._views(self.low), strict=True):
            parameter.low = view
        self.refresh()

    def keep_low(self, keep: bool) -> None:
        """Keep a copy of the weights in bfloat16 from now on, at one place, or no longer. TypeError unless they are on a GPU."""
        if keep == (self.low is not None):
            return
        if keep and (self.xp is np or self.dtype != np.float32):
            raise TypeError(f"a copy in bfloat16 is kept of float32 weights on a GPU, not of {self.xp.__name__}'s {self.dtype}")
        if keep:
            self.low = self.xp.empty(self.data.shape, BF16)
            self._point_at_low()
            return
        self.low = None
        for parameter, *_ in self._declared.values():
            parameter.low = None

    def refresh(self) -> None:
        """Round the weights as they are now into ``low``, where there is one."""
        if self.low is not None:
            elementwise.cast(self.data, BF16, self.low)

    def form(self) -> tuple | None:
        """What a run depends on besides the values: where they lie and which want gradients. A few bytes to compare.

        None for CuPy, for float64, and where a parameter carries a tangent or arrays that are not the store's.
        """
        if self._seen != self._changes[0]:
            self._seen, parameters = self._changes[0], [p for p, *_ in self._declared.values()]
            plain = self.xp is np and self.dtype == np.float32 and self.data.flags.c_contiguous
            for p, (data, grad) in zip(parameters, self._own, strict=True):
                plain = plain and p.data is data and p.grad is grad and p._tangent is None
            self._form = (id(self.data), id(self.grad), bytes(p._needs_grad for p in parameters)) if plain else None
        return self._form

    def leaf(self) -> Tensor | None:
        """A parameter that wants its gradient."""
        return next((p for p, *_ in self._declared.values() if p.needs_grad), None)

    @contextmanager
    def using(self, flat: Array) -> Iterator[None]:
        """Within the block the network runs on this flat buffer (the running average, say) instead of its own."""
        own = self.data
        if flat.shape != own.shape or flat.dtype != own.dtype or type(flat) is not type(own):
            raise ValueError(f"flat is {flat.dtype} {flat.shape}, want {own.dtype} {own.shape} of the same library")
        self._point_at(flat)
        try:
            yield
        finally:
            self._point_at(own)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within the block, forward and backward passes give no gradients to parameters: for gradients of an input alone."""
        parameters = [self[name] for name in self]
        before = [p.needs_grad for p in parameters]
        for p in parameters:
            p.needs_grad = False
        try:
            yield
        finally:
            for p, needed in zip(parameters, before, strict=True):
                p.needs_grad = needed

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        elementwise.fill(self.grad, 0)

    def __getitem__(self, name: str) -> Tensor:
        return self._declared[name][0]

    def __contains__(self, name: object) -> bool:
        return name in self._declared

    def __iter__(self) -> Iterator[str]:
        return iter(self._declared)

    def __len__(self) -> int:
        return len(self._declared)

    @property
    def count(self) -> int:
        """The number of weights."""
        return sum(prod(shape) for _, shape, _, _ in self._declared.values())

    def arrays(self) -> dict[str, Array]:
        """Name -> view of the values."""
        return {name: self[name].data for name in self}

    def gradients(self) -> dict[str, Array]:
        """Name -> view of the gradient."""
        return {name: self[name].grad for name in self}

    def load(self, arrays: Mapping[str, Any]) -> None:
        """Copy values by name; every parameter must be given, in its shape, and nothing else."""
        missing, extra = [n for n in self if n not in arrays], [n for n in arrays if n not in self]
        if missing or extra:
            raise ValueError(f"weights do not fit: missing {missing[:5] or 'none'}, not used {extra[:5] or 'none'}")
        for name, value in arrays.items():
            view = self[name].data
            if tuple(value.shape) != view.shape:
                raise ValueError(f"weight {name!r} has shape {tuple(value.shape)}, want {view.shape}")
            view[...] = self.xp.asarray(value, self.dtype)
        self.refresh()


def _glorot(fan_in: int, fan_out: int) -> float:
    """Standard deviation √(2/(fan_in + fan_out)) (Glorot & Bengio 2010), as in DDPM's code."""
    return sqrt(2 / (fan_in + fan_out))


class Linear:
    """y = x w + b; x (…, n_in). ``zero`` starts it at zero."""

    def __init__(self, store: ParameterStore, name: str, n_in: int, n_out: int, zero: bool = False) -> None:
        self.weight = store.declare(f"{name}.weight", (n_in, n_out), 0.0 if zero else _glorot(n_in, n_out))
        self.bias = store.declare(f"{name}.bias", (n_out,))

    def __call__(self, x: Tensor) -> Tensor:
        return f.linear(x, self.weight, self.bias)


class Conv2d:
    """A convolution with bias, 3×3 or 1×1; ``zero`` starts it at zero, ``upsample`` doubles the image first.

    A call may add columns of ``emb`` to every place, and a ``residual`` of the result's shape, and say the result's ``dtype``.
    """

    def __init__(
        self,
        store: ParameterStore,
        name: str,
        n_in: int,
        n_out: int,
        kernel: int = 3,
        stride: int = 1,
        upsample: bool = False,
        pad: tuple[int, int] | None = None,
        zero: bool = False,
    ) -> None:
        std = 0.0 if zero else _glorot(kernel**2 * n_in, kernel**2 * n_out)
        self.weight = store.declare(f"{name}.weight", (kernel, kernel, n_in, n_out), std)
        self.bias = store.declare(f"{name}.bias", (n_out,))
        self.stride, self.upsample, self.pad = stride, upsample, pad

    def __call__(
        self, x: Tensor, emb: Tensor | None = None, at: int = 0, residual: Tensor | None = None, dtype: Any = None
    ) -> Tensor:
        return f.conv2d(x, self.weight, self.bias, self.stride, self.upsample, self.pad, emb, at, residual, dtype)


class GroupNorm:
    """Group normalisation and, with ``silu``, the activation after it; scale and shift come from columns of ``emb``.

    Of [x, tail] where a call gives a ``tail``.
    """

    def __init__(self, store: ParameterStore, name: str, channels: int, groups: int, eps: float, silu: bool = True) -> None:
        self.gamma = store.declare(f"{name}.weight", (channels,), mean=1.0)
        self.beta = store.declare(f"{name}.bias", (channels,))
        self.groups, self.eps, self.silu = groups, eps, silu

    def __call__(self, x: Tensor, emb: Tensor | None = None, at: int = 0, tail: Tensor | None = None) -> Tensor:
        return f.group_norm_silu(x, self.gamma, self.beta, self.groups, self.eps, self.silu, emb, at, tail)


def norm_conv(
    norm: GroupNorm,
    conv: Conv2d,
    x: Tensor,
    scaled: tuple[Tensor, int] | None = None,
    tail: Tensor | None = None,
    added: tuple[Tensor, int] | None = None,
    residual: Tensor | None = None,
    dtype: Any = None,
) -> Tensor:
    """A convolution of stride 1 of the normalised x: one after the other, or in one; ``scaled`` and ``added``: (emb, at)."""
    w, b = conv.weight, conv.bias
    return f.norm_conv2d(x, norm.gamma, norm.beta, norm.groups, norm.eps, w, b, norm.silu, scaled, tail, added, residual, dtype)


class SelfAttention:
    """out(attention(turn(q(x)), turn(k(x)), v(x))) over all places of x (B, …, channels).

    ``linear(store, name, n_in, n_out, zero=…)`` makes the four linear maps. ``turn`` tells queries and keys their places.
    """

    def __init__(
        self,
        store: ParameterStore,
        name: str,
        channels: int,
        heads: int,
        linear: Callable[..., Any],
        turn: Callable[[Tensor, int], Tensor] | None = None,
        zero: bool = False,
    ) -> None:
        self.heads, self.turn = heads, turn
        self.query, self.key, self.value = (linear(store, f"{name}.to_{z}", channels, channels) for z in "qkv")
        self.out = linear(store, f"{name}.to_out.0", channels, channels, zero=zero)

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.turn is not None:
            q, k = self.turn(q, self.heads), self.turn(k, self.heads)
        return self.out(f.attention(q, k, v, self.heads))


class Attention:
    """x + self-attention over all places of an image, of the normalised x; ``groups`` None leaves the normalisation out."""

    def __init__(
        self, store: ParameterStore, name: str, channels: int, heads: int, groups: int | None, eps: float, zero: bool = False
    ) -> None:
        self.norm = None if groups is None else GroupNorm(store, f"{name}.group_norm", channels, groups, eps, silu=False)
        self.attend = SelfAttention(store, name, channels, heads, partial(Conv2d, kernel=1), zero=zero)

    def __call__(self, x: Tensor) -> Tensor:
        return f.add(x, self.attend(x if self.norm is None else self.norm(x)), inplace=True)


class LayerNorm:
    """Normalisation of each token over its features; scale and shift come from columns of ``emb``."""

    def __init__(self, store: ParameterStore, name: str, channels: int, eps: float = 1e-5) -> None:
        self.gamma = store.declare(f"{name}.weight", (channels,), mean=1.0)
        self.beta = store.declare(f"{name}.bias", (channels,))
        self.eps = eps

    def __call__(self, x: Tensor, emb: Tensor | None = None, at: int = 0) -> Tensor:
        return token_functions.layer_norm(x, self.gamma, self.beta, self.eps, emb, at)


class Embedding:
    """One learned vector for each of ``rows`` labels or states; ``std`` of its initial entries."""

    def __init__(self, store: ParameterStore, name: str, rows: int, size: int, std: float = 1.0) -> None:
        self.table = store.declare(f"{name}.weight", (rows, size), std)

    def __call__(self, index: Array) -> Tensor:
        return f.embedding(self.table, index)


def time_features(t: Array, channels: int, cos_first: bool = False, freq_shift: float = 0.0, dtype: str = "float64") -> Array:
    """[sin(ω_i t), cos(ω_i t)], ω_i = 10000^(−i/(h − freq_shift)), i = 0..h−1, h = channels/2. Eq: S1-C8.

    t (B,) integers or floats; returns (B, channels) float64. ``dtype`` "float32" rounds frequency, angle, sine and cosine to
    float32, each correctly: so do the published networks that were trained with such features, up to last bits.
    Source: Vaswani et al. 2017, section 3.5.
    """
    xp, omega = array_module(t), _frequencies(channels // 2, freq_shift, dtype)
    angle = (t.astype(omega.dtype)[:, None] * xp.asarray(omega)).astype(np.float64)
    pair = (xp.cos(angle), xp.sin(angle)) if cos_first else (xp.sin(angle), xp.cos(angle))
    return xp.concatenate(pair, axis=1).astype(omega.dtype).astype(np.float64)


@lru_cache(maxsize=64)
def _frequencies(half: int, freq_shift: float, dtype: str) -> Array:
    real = np.dtype(dtype).type
    exponent = real(-np.log(10000.0)) * np.arange(half, dtype=real) / real(half - freq_shift)
    omega = np.exp(exponent.astype(np.float64)).astype(real)
    omega.setflags(write=False)
    return omega


class TimeEmbedding:
    """linear(silu(linear(features of t))): (B,) times to (B, size). ``origin`` is what is subtracted from t first."""

    def __init__(
        self,
        store: ParameterStore,
        name: str,
        channels: int,
        size: int,
        cos_first: bool = False,
        freq_shift: float = 0.0,
        dtype: str = "float64",
        origin: int = 0,
    ) -> None:
        self.first = Linear(store, f"{name}.linear_1", channels, size)
        self.second = Linear(store, f"{name}.linear_2", size, size)
        self.store, self.channels, self.origin = store, channels, origin
        self.options: dict[str, Any] = {"cos_first": cos_first, "freq_shift": freq_shift, "dtype": dtype}

    def features(self, t: Array) -> Array:
        """(B,) float times to (B, channels) float64."""
        return time_features(t - self.origin, self.channels, **self.options)

    def __call__(self, t: Array) -> Tensor:
        c, y = self.options, None
        if self.store.dtype == np.float32:
            omega = _frequencies(self.channels // 2, c["freq_shift"], c["dtype"])
            y = elementwise.time_features(t, self.origin, omega, c["cos_first"])
        if y is None:
            y = self.features(t).astype(self.store.dtype)
        return self.second(f.silu(self.first(Tensor(y))))
