"""What every law of discrete diffusion is: a Markov chain on the states 0..K−1 with transition matrices Q_1, …, Q_T."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..kernels.arrays import array_module, is_native, native, restore, to_numpy
from . import categorical, rates
from .exchange import Array, check_times
from .levels import frozen

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
PIECE = 1 << 17  # elements that are worked on at a time, about what a cache holds


class Full:
    """A stochastic matrix P (K, K) as it is."""

    def __init__(self, P: np.ndarray) -> None:
        self.P = P

    def dense(self) -> np.ndarray:
        return self.P

    def log_dense(self) -> np.ndarray:
        return categorical.log(self.dense())

    def diagonal(self) -> np.ndarray:
        return self.dense().diagonal()

    def push(self, p: Array) -> Array:
        """p P for p (N, D), D <= K: the law after the transition."""
        return p @ array_module(p).asarray(self.dense()[: p.shape[-1]])

    def pull(self, g: Array, columns: int) -> Array:
        """(P g)_k for g (N, K) and the first ``columns`` states k: the transpose of :meth:`push`."""
        return g @ array_module(g).asarray(self.dense()[:columns].T)


class Factored(Full):
    """P = U W with U (K, r) and W (r, K), whose entries are known to be positive."""

    def __init__(self, U: np.ndarray, W: np.ndarray) -> None:
        self.U, self.W = U, W

    def dense(self) -> np.ndarray:
        return self.U @ self.W

    def diagonal(self) -> np.ndarray:
        return np.einsum("kr,rk->k", self.U, self.W)

    def push(self, p: Array) -> Array:
        xp = array_module(p)
        return (p @ xp.asarray(self.U[: p.shape[-1]])) @ xp.asarray(self.W)

    def pull(self, g: Array, columns: int) -> Array:
        xp = array_module(g)
        return (g @ xp.asarray(self.W.T)) @ xp.asarray(self.U[:columns].T)


class Transitions(ABC):
    """Transition matrices [Q_t]_ij = q(x_t=j|x_{t−1}=i), t = 1..T, on K states: x_t ~ Cat(x_{t−1}Q_t). Eq: S4-E30, S4-E31, S4-C5.

    ``K``, ``T``, ``name``; ``beta`` float64 (T+1,), beta[0] = 0; ``prior`` (K,), the law that x_T tends to; ``nbytes``, the
    memory of its tables. Times are an int or (B,) integers s <= t in 0..T; states integer arrays (B, …) of values 0..K−1; arrays
    NumPy, CuPy or of any library with ``__dlpack__``, answered in kind. Log-probabilities are float64 unless ``dtype`` says
    float32, and an exact zero is −inf. Raises TypeError for a wrong kind of array, ValueError for a time or a state outside its
    range (on a GPU neither is read).
    """

    name: str
    K: int
    T: int
    beta: np.ndarray
    prior: np.ndarray

    def __init__(self, name: str, K: int, beta: Any, probability: bool = True) -> None:
        if isinstance(K, bool) or not isinstance(K, (int, np.integer)):
            raise TypeError(f"K must be an int, not {type(K).__name__}")
        if K < 2:
            raise ValueError(f"K must be at least 2, not {K}")
        self.name, self.K, self.beta = name, int(K), rates.checked(beta, probability)
        self.T = self.beta.size - 1
        self.prior = frozen(np.full(self.K, 1 / self.K))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(K={self.K}, T={self.T})"

    @property
    def nbytes(self) -> int:
        """Bytes held in tables, against K²·T·8 of all Q̄_t."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, np.ndarray))

    @abstractmethod
    def _law(self, s: int, t: int) -> Full:
        """Q_{s+1}…Q_t, s < t."""

    def matrix(self, t: int) -> np.ndarray:
        """Q_t (K, K) float64, t in 1..T. Eq: S4-E30."""
        t = self._time(t, "t", 1)
        return self.between(t - 1, t)

    def between(self, s: int, t: int) -> np.ndarray:
        """Q_{s+1}…Q_t (K, K) float64, I for s = t: [·]_ij = q(x_t=j|x_s=i). Eq: S4-E31."""
        s, t = self._time(s, "s"), self._time(t, "t")
        if s > t:
            raise ValueError(f"s must be in 0..{t} (t), not {s}")
        return np.array(self._at(s, t).dense())

    def cumulative(self, t: int) -> np.ndarray:
        """Q̄_t = Q_1Q_2…Q_t (K, K) float64; Q̄_0 = I. Eq: S4-E31."""
        return self.between(0, t)

    def log_rows(self, s: Any, x: Array, t: Any, dtype: Any = np.float64) -> Array:
        """ln q(x_t = ·|x_s = x), (B, …) -> (B, …, K): the rows x of Q_{s+1}…Q_t. Eq: S4-E30, S4-E31."""
        states, kind = categorical.states(native(x), self.K, "x", 1), x
        return restore(self._log_rows(*self._times(s, t, len(states)), states, _float(dtype)), kind)

    def log_columns(self, s: Any, t: Any, x_t: Array, dtype: Any = np.float64) -> Array:
        """ln q(x_t|x_s = ·), (B, …) -> (B, …, K): the columns x_t of Q_{s+1}…Q_t, the x_tQ_tᵀ of the posterior. Eq: S4-E32."""
        states, kind = categorical.states(native(x_t), self.K, "x_t", 1), x_t
        return restore(self._log_columns(*self._times(s, t, len(states)), states, _float(dtype)), kind)

    def log_push(self, log_p: Array, t: Any) -> Array:
        """ln Σ_k p_k·q(x_t = ·|x_0 = k), (B, …, D) -> (B, …, K), D <= K: what p(x_0) becomes; states from D on have p_k = 0.

        Linear in p, which need not sum to one. Float dtype of ``log_p``.
        """
        values = self._values(log_p, "log_p")
        return restore(self._log_push(values, self._times(0, t, len(values))[1]), log_p)

    def pull(self, g: Array, t: Any, columns: int | None = None) -> Array:
        """Σ_j q(x_t = j|x_0 = k)·g_j, (B, …, K) -> (B, …, columns): the transpose of the push, for gradients. Dtype of g."""
        values = self._values(g, "g")
        if values.shape[-1] != self.K:
            raise ValueError(f"g must have shape (B, …, {self.K}), not {values.shape}")
        columns = self.K if columns is None else columns
        if not 1 <= columns <= self.K:
            raise ValueError(f"columns must be in 1..{self.K} (K), not {columns}")
        return restore(self._pull(values, self._times(0, t, len(values))[1], columns), g)

    # ---------------------------------------------------------------------------- by matrices, one for each distinct pair (s, t)

    def _at(self, s: int, t: int) -> Full:
        return Full(np.eye(self.K)) if s == t else self._law(s, t)

    def _laws(self, s: Any, t: Any, x: Array, pieces: bool) -> Iterator[tuple[Full, Any]]:
        """(law, where): the law of every distinct (s, t) and the samples of x that it holds for, in ``pieces`` if wanted."""
        xp, batch = array_module(x), len(x)
        step = max(1, PIECE * batch // x.size if pieces and x.size else batch)
        if isinstance(s, int) and isinstance(t, int):
            law = self._at(s, t)
            yield from ((law, slice(i, i + step)) for i in range(0, batch, step))
            return
        pairs = np.stack(np.broadcast_arrays(to_numpy(s), to_numpy(t)), axis=1, dtype=np.int64, casting="unsafe")
        distinct, place = np.unique(pairs, axis=0, return_inverse=True)
        for n, (a, b) in enumerate(distinct.tolist()):
            law, where = self._at(a, b), np.flatnonzero(place.reshape(-1) == n)
            yield from ((law, xp.asarray(where[i : i + step])) for i in range(0, len(where), step))

    def _log_rows(self, s: Any, t: Any, x: Array, dtype: np.dtype) -> Array:
        return self._gathered(s, t, x, lambda law: law.log_dense(), dtype)

    def _log_columns(self, s: Any, t: Any, x_t: Array, dtype: np.dtype) -> Array:
        return self._gathered(s, t, x_t, lambda law: law.log_dense().T, dtype)

    def _gathered(self, s: Any, t: Any, x: Array, table: Callable[[Full], np.ndarray], dtype: np.dtype) -> Array:
        xp = array_module(x)
        out = xp.empty((*x.shape, self.K), dtype)
        for law, where in self._laws(s, t, x, False):
            out[where] = xp.asarray(np.ascontiguousarray(table(law), dtype))[x[where]]
        return out

    def _log_push(self, log_p: Array, t: Any) -> Array:
        xp, D = array_module(log_p), log_p.shape[-1]
        out = xp.empty((*log_p.shape[:-1], self.K), log_p.dtype)
        for law, where in self._laws(0, t, log_p, True):
            part = log_p[where]
            rows = part.reshape(-1, D)
            top = categorical.shift(rows)
            rows = xp.subtract(rows, top, dtype=np.float64)
            pushed = categorical.log(law.push(xp.exp(rows)))
            # What stays where it is: a bound from below, for rows in which all of a sum underflows.
            rows += xp.asarray(categorical.log(law.diagonal()))[:D]
            xp.maximum(pushed[:, :D], rows, out=pushed[:, :D])
            pushed += top
            out[where] = pushed.reshape(*part.shape[:-1], self.K)
        return out

    def _pull(self, g: Array, t: Any, columns: int) -> Array:
        out = array_module(g).empty((*g.shape[:-1], columns), g.dtype)
        for law, where in self._laws(0, t, g, True):
            part = g[where]
            out[where] = law.pull(part.reshape(-1, self.K).astype(np.float64), columns).reshape(*part.shape[:-1], columns)
        return out

    # ------------------------------------------------------------------------------------------------------------------- checks

    def _values(self, a: Any, name: str) -> Array:
        a = native(a)
        if not is_native(a) or a.dtype.newbyteorder("=") not in FLOATS or a.ndim < 2:
            raise TypeError(f"{name} must be a float32 or float64 array (B, …, states)")
        if not 1 <= a.shape[-1] <= self.K:
            raise ValueError(f"{name} must have 1..{self.K} (K) states, not {a.shape[-1]}")
        return a.astype(a.dtype.newbyteorder("="), copy=False)

    def _time(self, t: Any, name: str, low: int = 0) -> int:
        t = check_times(t, low, self.T)
        if not isinstance(t, int):
            raise TypeError(f"{name} must be an int, not an array of shape {t.shape}")
        return t

    def _times(self, s: Any, t: Any, batch: int) -> tuple[Any, Any]:
        """(s, t), both ints or both (B,) arrays; ValueError unless 0 <= s <= t <= T."""
        s, t = check_times(s, 0, self.T, batch), check_times(t, 0, self.T, batch)
        if not (isinstance(s, int) and isinstance(t, int)):
            xp = array_module(s if isinstance(t, int) else t)
            s, t = (xp.full(batch, v, np.int64) if isinstance(v, int) else v for v in (s, t))
        if isinstance(s, (int, np.ndarray)) and isinstance(t, (int, np.ndarray)) and np.any(np.greater(s, t)):
            raise ValueError(f"s must not be above t = {t}, not {s}")
        return s, t


def check_law(law: Any) -> None:
    """TypeError unless ``law`` is one of the laws of discrete diffusion."""
    if not isinstance(law, Transitions):
        raise TypeError(f"law must be one of core.transitions (Uniform(K, beta) for one), not {type(law).__name__}")


class Dense(Transitions):
    """Any matrices: ``matrices`` (T+1, K, K) with stochastic rows, index 0 not read. Eq: S4-E30, S4-E31.

    Keeps Q_t and all Q̄_t, for small K. ``prior`` is the mean row of Q̄_T unless given; ``beta`` is 1 − the mean diagonal of Q_t.
    """

    def __init__(self, matrices: Any, prior: Any = None, name: str = "dense") -> None:
        Q = np.array(matrices, np.float64)
        if Q.ndim != 3 or Q.shape[0] < 2 or Q.shape[1] != Q.shape[2]:
            raise ValueError(f"matrices must have shape (T + 1, K, K), not {Q.shape}")
        Q[0] = np.eye(Q.shape[1])
        if not (np.all(Q >= 0) and np.allclose(Q.sum(axis=2), 1, rtol=0, atol=1e-12)):
            raise ValueError("matrices must have rows of probabilities that sum to one")
        cumulative = [Q[0]]
        for step in Q[1:]:
            cumulative.append(cumulative[-1] @ step)
        super().__init__(name, Q.shape[1], np.zeros(len(Q)))
        self.beta = frozen(1 - Q.diagonal(axis1=1, axis2=2).mean(axis=1))
        self._Q, self._Q_bar = frozen(Q), frozen(np.stack(cumulative))
        self.prior = frozen(self._Q_bar[-1].mean(axis=0) if prior is None else np.array(prior, np.float64))
        if self.prior.shape != (self.K,) or not (np.all(self.prior >= 0) and abs(self.prior.sum() - 1) < 1e-9):
            raise ValueError(f"prior must be {self.K} (K) probabilities that sum to one, not {prior!r}")

    def _law(self, s: int, t: int) -> Full:
        if s == 0:
            return Full(self._Q_bar[t])
        P = self._Q[s + 1]
        for step in self._Q[s + 2 : t + 1]:
            P = P @ step
        return Full(P)


def _float(dtype: Any) -> np.dtype:
    if np.dtype(dtype) not in FLOATS:
        raise TypeError(f"dtype must be float32 or float64, not {np.dtype(dtype)}")
    return np.dtype(dtype)
