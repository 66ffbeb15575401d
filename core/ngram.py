"""The statistics of letters: conditional entropies of a text, and an n-gram model that scores samples."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels.arrays import to_numpy

MAX_KEY = 1 << 62


def entropy(tokens: Any, n: int = 1, states: int | None = None) -> float:
    """H(X_n|X_1…X_{n−1}) of the n-grams that stand in a text, bits per letter; n = 1 is the entropy of the letters.

        H = −Σ_{h,w} c(hw)/N·log₂(c(hw)/c(h)),    c(h) = Σ_w c(hw)

    tokens: integers (N,), 0..states−1; ``states`` by default one more than the largest. For a long text of a Markov chain of
    order n − 1 it tends to the entropy rate, and it falls with n; where the n-grams that are possible are more than those in the
    text it comes out too low. Raises ValueError for a text shorter than n.
    """
    tokens, states = _checked(tokens, states, n)
    keys, counts = np.unique(_keys(tokens, n, states), return_counts=True)
    _, place = np.unique(keys // states, return_inverse=True)
    return float(-np.sum(counts * np.log2(counts / np.bincount(place, counts)[place])) / counts.sum()) + 0.0


@dataclass(frozen=True, eq=False)
class NGram:
    """Interpolated n-gram model of letters, Witten–Bell. Made by :func:`fit`.

        P_k(w|h) = (c(hw) + D(h)·P_{k−1}(w|h′))/(c(h) + D(h)),  k = 1..order,    P_0 = 1/K

    h: the k − 1 letters before, h′ all of them but the first; c counts in the training text, D(h) is how many different letters
    follow h there. Source: Bell, Cleary & Witten 1990 (method C); Chen & Goodman 1999.
    """

    states: int
    order: int
    grams: tuple[tuple[np.ndarray, np.ndarray], ...]  # of k = 1..order: k-grams as ascending numbers, c(hw)
    contexts: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]  # of k = 1..order: h as ascending numbers, c(h), D(h)

    def __repr__(self) -> str:
        return f"NGram(order={self.order}, states={self.states}, {len(self.grams[-1][0]):,} {self.order}-grams)"

    def letter_probabilities(self, tokens: Any) -> np.ndarray:
        """P(x_i|x_1…x_{i−1}) of every letter, float64 like ``tokens``, integers (…, L); the first have less before them.

        Raises TypeError or ValueError for other tokens than 0..K−1.
        """
        x = _integers(tokens)
        if x.ndim < 1 or (x.size and not 0 <= x.min() <= x.max() < self.states):
            raise ValueError(f"tokens must be (…, L) in 0..{self.states - 1}, not shape {x.shape} or beyond")
        p = np.full(x.shape, 1 / self.states)
        for k in range(1, min(self.order, x.shape[-1]) + 1):
            key = _keys(x, k, self.states)
            (grams, count), (contexts, total, kinds) = self.grams[k - 1], self.contexts[k - 1]
            c, (n, d) = _found(grams, key, count), _found(contexts, key // self.states, total, kinds)
            known = n > 0
            shorter = p[..., k - 1 :]
            shorter[known] = (c[0][known] + d[known] * shorter[known]) / (n[known] + d[known])
        return p

    def log_prob(self, tokens: Any) -> np.ndarray:
        """log P(x) of each sample, nats, float64 (B,) for tokens (B, L)."""
        return np.log(self.letter_probabilities(tokens)).sum(axis=-1)

    def bits(self, tokens: Any) -> np.ndarray:
        """−log₂ P(x)/L of each sample, bits per letter, float64 (B,) for tokens (B, L)."""
        p = self.letter_probabilities(tokens)
        if p.shape[-1] == 0:
            raise ValueError("tokens must hold at least one letter a sample")
        return -np.log2(p).mean(axis=-1)


def fit(tokens: Any, order: int = 6, states: int | None = None) -> NGram:
    """The n-gram model of a text, integers (N,) in 0..states−1 (by default one more than the largest).

    Raises ValueError for a text shorter than ``order``, or states^order beyond 2^62.
    """
    tokens, states = _checked(tokens, states, order)
    grams, contexts = [], []
    for k in range(1, order + 1):
        keys, counts = np.unique(_keys(tokens, k, states), return_counts=True)
        heads, place, kinds = np.unique(keys // states, return_inverse=True, return_counts=True)
        grams.append((keys, counts))
        contexts.append((heads, np.bincount(place, counts).astype(np.int64), kinds))
    return NGram(states, order, tuple(grams), tuple(contexts))


def _checked(tokens: Any, states: int | None, n: int) -> tuple[np.ndarray, int]:
    x = _integers(tokens)
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
        raise TypeError(f"the order must be an int, not {type(n).__name__}")
    if x.ndim != 1 or not 1 <= n <= x.size:
        raise ValueError(f"tokens must be (N,) and the order in 1..N, not shape {x.shape} and order {n}")
    high = int(x.max()) + 1 if states is None else int(states)
    if not 0 <= x.min() <= x.max() < high:
        raise ValueError(f"tokens must be in 0..{high - 1}, not {x.min()}..{x.max()}")
    if high**n > MAX_KEY:
        raise ValueError(f"states**order must be at most 2**62, not {high}**{n}")
    return x, high


def _integers(tokens: Any) -> np.ndarray:
    x = np.asarray(to_numpy(tokens))
    if x.dtype.kind not in "iu":
        raise TypeError(f"tokens must be integers, not {x.dtype}")
    return x


def _keys(x: np.ndarray, n: int, states: int) -> np.ndarray:
    """The n-grams of the last axis as numbers in base ``states``, (…, L − n + 1); the first letter counts most."""
    length = x.shape[-1] - n + 1
    key = x[..., :length].astype(np.int64)
    for j in range(1, n):
        key = key * states + x[..., j : j + length]
    return key


def _found(table: np.ndarray, keys: np.ndarray, *values: np.ndarray) -> tuple[np.ndarray, ...]:
    """``values`` at the places of ``keys`` in the ascending ``table``, 0 where it has none."""
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    there = table[place] == keys
    return tuple(np.where(there, v[place], 0) for v in values)
