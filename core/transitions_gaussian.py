"""Discretised Gaussian transitions: a state moves to near states of an ordered scale, such as grey levels.

The matrices do not commute, so Q̄_t needs the product Q_1…Q_t; none of the K×K×T numbers of all Q̄_t is kept that can be had soon.
"""

from typing import Any

import numpy as np

from .transition import Factored, Full, Transitions

EVERY = 4  # of the early Q̄_t one in so many is kept; the others are at most EVERY − 1 products away
TOLERANCE = 1e-10  # of every entry of a low-rank Q̄_t, relative
SMALLEST = 1e-6  # times 1/K: smaller entries drown in the rounding of a singular value decomposition
RANK_SHARE = 4  # factors of rank r are worth it where r <= K/RANK_SHARE


def transition_discretized_gaussian(K: int, beta: float) -> np.ndarray:
    """[Q]_ij = e^{−4|i−j|²/((K−1)²β)}/Σ_{n=−(K−1)}^{K−1} e^{−4n²/((K−1)²β)} for i ≠ j, [Q]_ii = 1 − Σ_{l≠i} [Q]_il. Eq: S4-E77.

    (K, K), symmetric and so doubly stochastic; its limit is uniform.
    """
    return DiscretizedGaussian(K, [0.0, beta]).matrix(1)


class DiscretizedGaussian(Transitions):
    """A step adds a discretised Gaussian of variance about (K−1)²β_t/8; what would leave the scale stays where it is. Eq: S4-E77.

    ``beta`` may be any table of finite β_t >= 0. Q_t is a Toeplitz matrix but for its diagonal, made of K numbers when it is
    asked for. Q̄_t of early t is a product of non-negative matrices, in which every entry keeps its relative accuracy; every
    fourth is kept. From the first t on at which factors of rank r <= K/4 give every entry to 1e-10, relative, Q̄_t = U·W_t with
    W_t = W_{t−1}Q_t, of a rank that falls as the chain forgets. So log-probabilities are right to 1e-9, but for entries of a
    product below the smallest float64, which are −inf. Source: Austin et al. 2021, appendix A.2.3 (their code has this formula
    for K = 256 alone).
    """

    def __init__(self, K: int, beta: Any) -> None:
        super().__init__("discretized_gaussian", K, beta, probability=False)
        self._early: list[np.ndarray] = []
        self._late: list[Factored] = []
        P = np.eye(self.K)
        for t in range(self.T + 1):
            if t > 0:
                P = P @ self._step(t).dense()
            if t % EVERY == 0:
                law = _factors(P)
                if law is not None:
                    self._follow(law, t)
                    break
                self._early.append(P)

    def _follow(self, law: Factored, t: int) -> None:
        """Keep the factors of Q̄_t, which are those of ``law``, and of Q̄_{t+1}, …, Q̄_T."""
        self._late.append(law)
        for u in range(t + 1, self.T + 1):
            law = Factored(law.U, law.W @ self._step(u).dense())
            if u % EVERY == 0:
                law = _lowered(law)
            self._late.append(law)

    @property
    def nbytes(self) -> int:
        shared = {id(law.U): law.U.nbytes for law in self._late}
        tables = sum(P.nbytes for P in self._early) + sum(law.W.nbytes for law in self._late)
        return super().nbytes + tables + sum(shared.values())

    def _law(self, s: int, t: int) -> Full:
        if t == s + 1:
            return self._step(t)
        late = t - (self.T + 1 - len(self._late))
        if s == 0 and late >= 0:
            return self._late[late]
        near = t // EVERY if s == 0 else 0
        P, u = (self._early[near], near * EVERY) if near else (self._step(s + 1).dense(), s + 1)
        while u < t:
            u += 1
            P = P @ self._step(u).dense()
        return Full(P)

    def _step(self, t: int) -> Full:
        K, beta = self.K, float(self.beta[t])
        if beta == 0:
            return Full(np.eye(K))
        log_g = -4 * np.arange(K, dtype=np.float64) ** 2 / ((K - 1) ** 2 * beta)
        g = np.exp(log_g)
        log_total = np.log(g[0] + 2 * g[1:].sum())
        beyond = np.r_[np.cumsum(g[:0:-1])[::-1], 0.0]  # Σ_{n>i} g_n
        return Banded(log_g - log_total, np.log(g[0] + beyond + beyond[::-1]) - log_total)


class Banded(Full):
    """A Toeplitz matrix but for its diagonal, by logarithms: e^{off[|i−j|]} for i ≠ j, e^{diagonal_i} for i = j."""

    def __init__(self, log_off: np.ndarray, log_diagonal: np.ndarray) -> None:
        self.log_off, self.log_diagonal = log_off, log_diagonal

    def _filled(self, off: np.ndarray, diagonal: np.ndarray) -> np.ndarray:
        ends = np.r_[off[:0:-1], off]
        out = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(ends, len(off))[::-1])
        np.fill_diagonal(out, diagonal)
        return out

    def dense(self) -> np.ndarray:
        return self._filled(np.exp(self.log_off), np.exp(self.log_diagonal))

    def log_dense(self) -> np.ndarray:
        return self._filled(self.log_off, self.log_diagonal)


def _factors(P: np.ndarray) -> Factored | None:
    """P by the fewest factors that give every entry to ``TOLERANCE``; None where P is too far from its limit for it."""
    K = len(P)
    if P.min() * K < SMALLEST:
        return None
    U, singular, V = np.linalg.svd(P)
    W = singular[:, None] * V
    for rank in range(1, K // RANK_SHARE + 1):
        if _enough(U, W, rank, P):
            return Factored(U[:, :rank].copy(), W[:rank].copy())
    return None


def _lowered(law: Factored) -> Factored:
    """``law`` without the factors that it can do without."""
    A, singular, B = np.linalg.svd(law.W, full_matrices=False)
    U, W, P = law.U @ A, singular[:, None] * B, law.dense()
    rank = len(W)
    while rank > 1 and _enough(U, W, rank - 1, P):
        rank -= 1
    return law if rank == len(W) else Factored(U[:, :rank].copy(), W[:rank].copy())


def _enough(U: np.ndarray, W: np.ndarray, rank: int, P: np.ndarray) -> bool:
    return bool(np.all(np.abs(U[:, :rank] @ W[:rank] - P) <= TOLERANCE * P))
