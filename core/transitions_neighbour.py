"""Nearest-neighbour transitions: a state moves to neighbours of its embedding, by a Markov jump process run for a time β_t."""

from typing import Any

import numpy as np

from .levels import frozen
from .transition import Factored, Full, Transitions

TERMS = 32  # of the exponential series of a jump rate times a time below 1/2: the rest is below 1e-45
TOLERANCE = 1e-10  # of every entry, relative, where eigenvectors are left out
SMALLEST = 1e-4  # times 1/K: smaller entries suffer from the rounding of the eigenvectors


def neighbour_rates(embedding: Any, neighbours: int) -> np.ndarray:
    """The jump rates R (K, K) of an embedding (K, features): R_ij = ([j near i] + [i near j])/2k for i ≠ j, rows that sum to 0.

    "j near i": j is one of the k = ``neighbours`` nearest to i by Euclidean distance, ties to the lower index. The mean rate of
    leaving a state is 1. Raises ValueError unless 1 <= k < K. Source: Austin et al. 2021, appendix A.2.4.
    """
    e = np.asarray(embedding, np.float64)
    if e.ndim != 2 or len(e) < 2 or not np.isfinite(e).all():
        raise ValueError(f"embedding must be K >= 2 finite rows of features, not an array of shape {e.shape}")
    K = len(e)
    if isinstance(neighbours, bool) or not isinstance(neighbours, (int, np.integer)):
        raise TypeError(f"neighbours must be an int, not {type(neighbours).__name__}")
    if not 1 <= neighbours < K:
        raise ValueError(f"neighbours must be in 1..{K - 1}, not {neighbours}")
    distance = np.square(e[:, None] - e).sum(axis=2)
    np.fill_diagonal(distance, np.inf)
    near = np.zeros((K, K))
    np.put_along_axis(near, np.argsort(distance, axis=1, kind="stable")[:, :neighbours], 1.0, axis=1)
    R = (near + near.T) / (2 * neighbours)
    np.fill_diagonal(R, -R.sum(axis=1))
    return R


class NearestNeighbour(Transitions):
    """Q_t = exp(β_t R), Q_{s+1}…Q_t = exp((b_t − b_s)R), b_t = Σ_{u≤t} β_u, of symmetric jump rates R (K, K). Eq: S4-C5.

    ``rates``: R_ij >= 0 for i ≠ j, rows that sum to 0, a connected graph (:func:`neighbour_rates`); so every Q_t is doubly
    stochastic and the limit uniform. ``beta`` may be any table of finite β_t >= 0. No table grows with T: exp(bR) is made when it
    is asked for, from a few eigenvectors of R where b is so large that they give every entry to about 1e-9, relative, and before
    from a series of non-negative terms, in which nothing cancels. Source: Austin et al. 2021, appendix A.2.4.
    """

    def __init__(self, rates: Any, beta: Any) -> None:
        R = np.array(rates, np.float64)
        if R.ndim != 2 or R.shape[0] != R.shape[1] or len(R) < 2:
            raise ValueError(f"rates must have shape (K, K), K >= 2, not {R.shape}")
        leave = -R.diagonal()
        jumps = R + np.diag(leave)
        if not (np.all(jumps >= 0) and np.all(R == R.T) and np.allclose(R.sum(axis=1), 0, rtol=0, atol=1e-12 * leave.max())):
            raise ValueError("rates must be symmetric and not negative off the diagonal, with rows that sum to 0")
        if not _connected(jumps > 0):
            raise ValueError("rates must connect all states: take more neighbours")
        super().__init__("nearest_neighbour", len(R), beta, probability=False)
        self._elapsed = frozen(np.cumsum(self.beta))
        self._rate = float(leave.max())
        # P = I + R/rate is stochastic, and exp(bR) = Σ_n Poisson(n; rate·b)·P^n.
        P = jumps / self._rate + np.diag(1 - leave / self._rate)
        powers = [np.eye(self.K)]
        for n in range(1, TERMS):
            powers.append(powers[-1] @ P / n)
        self._powers = frozen(np.stack(powers))
        eigenvalues, eigenvectors = np.linalg.eigh(R)
        eigenvalues[-1] = 0.0  # of a connected graph exactly, and the others are below
        self._eigenvalues, self._eigenvectors = frozen(np.minimum(eigenvalues, 0.0)), frozen(eigenvectors)
        self._far, self._least = self._spread()

    def _spread(self) -> tuple[float, float]:
        """(b, the least entry of exp(bR)) from which on no entry is below ``SMALLEST``/K; it does not fall as b grows."""
        b = 0.5 / self._rate
        P = self._series(b)
        while P.min() * self.K < SMALLEST:
            P, b = P @ P, 2 * b
        return b, float(P.min())

    def _law(self, s: int, t: int) -> Full:
        b = float(self.beta[t] if t == s + 1 else self._elapsed[t] - self._elapsed[s])
        if b < self._far:
            return Full(self._series(b))
        # |Σ_k e^{λ_k b} v_ik v_jk| over the k left out is at most the largest of their e^{λ_k b}.
        with np.errstate(over="ignore"):
            weights = np.exp(self._eigenvalues * b)
        kept = weights > TOLERANCE * self._least
        V = self._eigenvectors[:, kept]
        return Factored(V * weights[kept], V.T)

    def _series(self, b: float) -> np.ndarray:
        """exp(bR): the series at b/2^m, squared m times."""
        x = b * self._rate
        m = max(0, int(np.ceil(np.log2(2 * x)))) if x > 0 else 0
        x /= 2.0**m
        P = np.tensordot(np.exp(-x) * x ** np.arange(TERMS), self._powers, 1)
        for _ in range(m):
            P = P @ P
        return P


def _connected(graph: np.ndarray) -> bool:
    reached = np.arange(len(graph)) == 0
    while True:
        more = reached | graph[reached].any(axis=0)
        if (more == reached).all():
            return bool(reached.all())
        reached = more
