"""Writing a table as a paper writes its method: states and model outputs are symbols, and every row comes out by elimination.

A method of several stages goes back to the state that its step began with, while a row knows its own state and a few stored
outputs. As each row is affine and, where no noise was added, can be solved for the state before it, :class:`Rows` turns any
combination of earlier states and outputs into a row.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .levels import Levels
from .table import STORED, Table, table

__all__ = ["Affine", "Level", "Rows", "flow", "levels_at"]

ROUNDING = 1e-12  # of the terms that make a weight
NEGLIGIBLE = 1e-13  # of the sum of a row's weights: what elimination leaves of terms that cancel


class Level(NamedTuple):
    """A time t of a process and its levels, x = a·x0 + n·ε."""

    t: float
    a: float
    n: float

    @property
    def sigma(self) -> float:
        """σ̄ = n/a."""
        return self.n / self.a

    @property
    def lam(self) -> float:
        """λ = ln(a/n), half the log-SNR."""
        return float(np.log(self.a / self.n))


def levels_at(s: Levels, times: Iterable[float] | np.ndarray) -> list[Level]:
    """The levels of ``s`` at these times."""
    t = np.asarray(times, np.float64)
    return [Level(*map(float, row)) for row in zip(t, *s.levels(t), strict=True)]


class Affine:
    """A weighted sum of states and outputs; + − and multiplication by a number. ``terms``: symbol -> weight."""

    __slots__ = ("terms",)
    __array_ufunc__ = None  # so that a NumPy number on the left leaves the product to __rmul__

    def __init__(self, terms: Mapping[tuple[str, int], float]) -> None:
        self.terms = dict(terms)

    def __add__(self, other: "Affine") -> "Affine":
        terms = dict(self.terms)
        for symbol, weight in other.terms.items():
            terms[symbol] = terms.get(symbol, 0.0) + weight
        return Affine(terms)

    def __mul__(self, k: float) -> "Affine":
        return Affine({symbol: k * weight for symbol, weight in self.terms.items()})

    __rmul__ = __mul__

    def __sub__(self, other: "Affine") -> "Affine":
        return self + other * -1.0

    def __truediv__(self, k: float) -> "Affine":
        return Affine({symbol: weight / k for symbol, weight in self.terms.items()})


def flow(x: Affine, now: Level, to: Level, eps: Affine) -> Affine:
    """x' with x'/a' = x/a + (σ̄' − σ̄)·ε: the probability-flow ODE with ε held constant, DDIM's step. Eq: S2-E13, S2-E14."""
    return (to.a / now.a) * x + to.a * (to.sigma - now.sigma) * eps


def _snapped(value: float, lawful: float, size: float) -> float:
    """``lawful`` where ``value`` is off by the rounding of terms of this size alone."""
    return lawful if abs(value - lawful) <= ROUNDING * (abs(size) + abs(value)) else value


class Rows:
    """The rows of a table, from the level ``start`` on; ``history`` says what :meth:`ask` returns, "eps" or "x0".

    ``x`` is the state, a symbol. Each row is at most one :meth:`ask` and one :meth:`go`.
    """

    def __init__(self, start: Level, history: str = "eps") -> None:
        self.history = history
        self.path = [start]
        self.told: list[float] = []
        self.asked = False
        self.weights: list[dict[tuple[str, int], float]] = []  # of each row's new state on ("x", row) and the outputs
        self.noise: list[tuple[float, float]] = []  # c and excess of each row

    @property
    def x(self) -> Affine:
        """The state now."""
        return Affine({("x", len(self.weights)): 1.0})

    @property
    def level(self) -> Level:
        """Where the state is now."""
        return self.path[-1]

    def ask(self, t: float | None = None) -> Affine:
        """The model's ε (or x0) at the state now, told the time ``t``, that of the level unless given."""
        if self.asked:
            raise ValueError("a row asks the model once")
        self.asked = True
        self.told.append(self.level.t if t is None else t)
        return Affine({("y", len(self.weights)): 1.0})

    def go(self, to: Level, x: Affine, c: float = 0.0, excess: float = 0.0) -> Affine:
        """End the row at the level ``to`` in the state ``x`` + c·z, any combination of states and outputs so far; returns it.

        ValueError where ``x`` needs a state from before a row that added noise or left that state out.
        """
        row = len(self.weights)
        terms = dict(x.terms)
        scale = sum(map(abs, terms.values()))
        for j in range(min((j for kind, j in terms if kind == "x"), default=row), row):
            weight, before = terms.pop(("x", j), 0.0), self.weights[j]
            if not weight:
                continue
            if self.noise[j][0] or not before.get(("x", j)):
                raise ValueError(f"row {row} needs the state from before row {j}, which its noise or its form has lost")
            weight /= before["x", j]
            terms["x", j + 1] = terms.get(("x", j + 1), 0.0) + weight
            for symbol, w in before.items():
                if symbol != ("x", j):
                    terms[symbol] = terms.get(symbol, 0.0) - weight * w
        kept = {k: w for k, w in terms.items() if k in (("x", row), ("y", row)) or abs(w) > NEGLIGIBLE * scale}
        self.weights.append(kept)
        self.noise.append((c, excess))
        if not self.asked:
            self.told.append(self.path[-1].t)
        self.asked = False
        self.path.append(to)
        return self.x

    def table(self, name: str, prediction: str, **options: Any) -> Table:
        """The table of these rows, its laws checked. ε-rows are written on x0 and ε alone: A·x = A·a·x0 + A·n·ε."""
        rows = len(self.weights)
        A, B0, Be, H = np.zeros(rows), np.zeros(rows), np.zeros(rows), np.zeros((rows, STORED))
        back = np.tile(np.arange(1, STORED + 1), (rows, 1))
        for i, terms in enumerate(self.weights):
            on_x, on_y = terms.get(("x", i), 0.0), terms.get(("y", i), 0.0)
            old = sorted((j for (kind, j), w in terms.items() if kind == "y" and j < i and w), reverse=True)
            if len(old) > STORED:
                raise ValueError(f"{name}: row {i} reads {len(old)} stored outputs, but a row has room for {STORED}")
            for k, j in enumerate(old):
                H[i, k], back[i, k] = terms["y", j], i - j
            (_, a, n), (_, a_to, n_to), (c, excess), past = *self.path[i : i + 2], self.noise[i], float(H[i].sum())
            spread = np.sqrt(max(n_to**2 + excess - c**2, 0))
            if not on_y:
                A[i] = on_x
            elif self.history == "x0":
                A[i] = _snapped(on_x, spread / n, on_x)
                B0[i] = _snapped(on_y, a_to - A[i] * a - past, on_y)
            else:
                B0[i] = _snapped(on_x * a, a_to, a_to)
                Be[i] = _snapped(on_x * n + on_y, spread - past, on_x * n)
        _, a, n = np.array(self.path).T
        columns: dict[str, Any] = {"A": A, "B0": B0, "Be": Be, "H": H, "back": back, "history": self.history}
        columns |= dict(zip(("c", "excess"), np.array(self.noise).T, strict=True))
        return table(name, prediction, np.array(self.told), a, n, **columns, **options)
