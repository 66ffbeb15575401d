"""Laws with closed forms in O(K): a state is kept with probability ᾱ_t, or else forgotten: uniform noise, or a mask."""

from typing import Any

import numpy as np

from ..kernels.arrays import array_module
from . import categorical
from .exchange import Array
from .levels import frozen
from .transition import Full, Transitions


def transition_uniform(K: int, beta: float) -> np.ndarray:
    """[Q]_ij = 1 − (K−1)/K·β for i = j, β/K for i ≠ j: (1−β)I + β/K, (K, K), symmetric and doubly stochastic. Eq: S4-E75."""
    return Uniform(K, [0.0, beta]).matrix(1)


def transition_absorbing(K: int, beta: float, mask: int | None = None) -> np.ndarray:
    """[Q]_ij = 1 for i = j = m, 1 − β for i = j ≠ m, β for j = m ≠ i, (K, K); ``mask`` m defaults to K−1. Eq: S4-E76."""
    return Absorbing(K, [0.0, beta], mask).matrix(1)


class Forgetting(Transitions):
    """q(x_t|x_s) keeps x_s with probability ᾱ_t/ᾱ_s. ``keep`` is ᾱ, float64 (T+1,); ``mask`` the absorbing state, or −1."""

    mask = -1

    def __init__(self, name: str, K: int, beta: Any) -> None:
        super().__init__(name, K, beta)
        self.keep = frozen(np.cumprod(1 - self.beta))

    def _kept(self, s: Any, t: Any, x: Array, axes: int) -> tuple[Array, Array]:
        """(ln keep, ln(1 − keep)) of s → t, float64 in the library of x, of so many axes: the first is the batch."""
        xp = np if isinstance(t, int) else array_module(t)
        keep = xp.asarray(self.keep)
        start, end = keep[s], keep[t]
        empty = start == 0  # then s = t = T
        kept = xp.where(xp.asarray(s == t), 1.0, end / xp.where(empty, 1.0, start)).reshape(-1, *(1,) * (axes - 1))
        kept = array_module(x).asarray(kept)
        return categorical.log(kept), categorical.log(1 - kept)


class Uniform(Forgetting):
    """x_t ~ C((1−β_t)x_{t−1} + β_t/K): a forgotten state becomes any of the K. Multinomial diffusion; D3PM uniform.

    Eq: S4-E25, S4-E26, S4-E75, S4-F1.

    q(x_t|x_0) = C(ᾱ_t x_0 + (1−ᾱ_t)/K); ``keep`` is ᾱ (T+1,), prior 1/K. Source: Hoogeboom et al. 2021, section 4.
    """

    def __init__(self, K: int, beta: Any) -> None:
        super().__init__("uniform", K, beta)

    def _law(self, s: int, t: int) -> Full:
        keep = self.keep[t] / self.keep[s]
        return Full(keep * np.eye(self.K) + (1 - keep) / self.K)

    def _log_rows(self, s: Any, t: Any, x: Array, dtype: np.dtype) -> Array:
        xp = array_module(x)
        log_keep, log_rest = self._kept(s, t, x, x.ndim + 1)
        other = log_rest - np.log(self.K)
        same = xp.logaddexp(log_keep, other)
        return xp.where(xp.arange(self.K) == x[..., None], same.astype(dtype), other.astype(dtype))

    def _log_columns(self, s: Any, t: Any, x_t: Array, dtype: np.dtype) -> Array:
        return self._log_rows(s, t, x_t, dtype)  # symmetric

    def _log_push(self, log_p: Array, t: Any) -> Array:
        xp, D = array_module(log_p), log_p.shape[-1]
        log_keep, log_rest = (v.astype(log_p.dtype) for v in self._kept(0, t, log_p, log_p.ndim))
        top = categorical.shift(log_p)
        p = xp.exp(log_p - top)
        spread = xp.exp(log_rest) / self.K * p.sum(axis=-1, keepdims=True)
        out = xp.empty((*log_p.shape[:-1], self.K), log_p.dtype)
        out[..., D:] = categorical.log(spread) + top
        out[..., :D] = categorical.log(xp.exp(log_keep) * p + spread) + top
        out[..., :D] = xp.maximum(out[..., :D], log_keep + log_p)  # p may underflow where nothing is spread
        return out

    def _pull(self, g: Array, t: Any, columns: int) -> Array:
        xp = array_module(g)
        keep, rest = (xp.exp(v).astype(g.dtype) for v in self._kept(0, t, g, g.ndim))
        return keep * g[..., :columns] + rest * g.mean(axis=-1, keepdims=True)


class Absorbing(Forgetting):
    """A forgotten state becomes the mask m and stays it. ``K`` counts the mask; ``mask`` defaults to K−1. Eq: S4-E76, S4-F2.

    q(x_t = x_0|x_0) = ᾱ_t, q(x_t = m|x_0) = 1 − ᾱ_t; ``keep`` is ᾱ (T+1,), prior δ_m. Source: Austin et al. 2021.
    """

    def __init__(self, K: int, beta: Any, mask: int | None = None) -> None:
        super().__init__("absorbing", K, beta)
        mask = self.K - 1 if mask is None else mask
        if isinstance(mask, bool) or not isinstance(mask, (int, np.integer)):
            raise TypeError(f"mask must be an int, not {type(mask).__name__}")
        if not 0 <= mask < self.K:
            raise ValueError(f"mask must be in 0..{self.K - 1}, not {mask}")
        self.mask = int(mask)
        self.prior = frozen(np.eye(self.K)[self.mask])

    def _law(self, s: int, t: int) -> Full:
        keep = self.keep[t] / self.keep[s]
        P = keep * np.eye(self.K)
        P[:, self.mask] += 1 - keep
        return Full(P)

    def _log_rows(self, s: Any, t: Any, x: Array, dtype: np.dtype) -> Array:
        xp = array_module(x)
        log_keep, log_rest = (v.astype(dtype) for v in self._kept(s, t, x, x.ndim))
        out = xp.where(xp.arange(self.K) == x[..., None], log_keep[..., None], dtype.type(-np.inf))
        out[..., self.mask] = xp.where(x == self.mask, dtype.type(0), log_rest)
        return out

    def _log_columns(self, s: Any, t: Any, x_t: Array, dtype: np.dtype) -> Array:
        xp = array_module(x_t)
        log_keep, log_rest = (v.astype(dtype)[..., None] for v in self._kept(s, t, x_t, x_t.ndim))
        x, state = x_t[..., None], xp.arange(self.K)
        out = xp.where(x == self.mask, log_rest, xp.where(state == x, log_keep, dtype.type(-np.inf)))
        out[..., self.mask] = xp.where(x_t == self.mask, dtype.type(0), dtype.type(-np.inf))
        return out

    def _log_push(self, log_p: Array, t: Any) -> Array:
        xp, D = array_module(log_p), log_p.shape[-1]
        log_keep, log_rest = (v.astype(log_p.dtype) for v in self._kept(0, t, log_p, log_p.ndim))
        out = xp.full((*log_p.shape[:-1], self.K), -np.inf, log_p.dtype)
        out[..., :D] = log_p + log_keep
        arrived = log_p + log_rest
        if self.mask < D:
            arrived[..., self.mask] = log_p[..., self.mask]
        out[..., self.mask] = categorical.log_sum(arrived)[..., 0]
        return out

    def _pull(self, g: Array, t: Any, columns: int) -> Array:
        xp = array_module(g)
        keep, rest = (xp.exp(v).astype(g.dtype) for v in self._kept(0, t, g, g.ndim))
        return keep * g[..., :columns] + rest * g[..., self.mask : self.mask + 1]
