"""A sampler as data: the record, the laws that its rows obey, and its compilation to the columns of the step kernel."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..kernels.reference import ROW
from .convert import check_prediction, coefficients

TOLERANCE = 2e-14  # of the laws, relative to the sum of the terms and the levels: a stray noise of c = 1e-6 shows as 1e-12
STORED = 3  # stored outputs that a row can read
COLUMNS = ("t", "signal", "noise", "signal_to", "noise_to", "A", "B0", "Be", "c", "excess")


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """The rows of a sampler, at most one evaluation of the model each. Eq: S0-E31, S0-E47, S0-E49.

    With x = signal·x0 + noise·ε at the row's level, x0 and ε as the model predicts them at time t, and y_{−k} what the model
    predicted k rows before:

        x' = A·x + B0·x0 + Be·ε + Σ_j H_j·y_{−back_j} + c·z,    z ~ N(0, I)

    Columns are float64 of length R (H is (R, 3)); ``history`` says whether y is "x0" or "eps"; ``back``, (R, 3) integers, which
    rows it reads, 1, 2 and 3 before unless given. A row without a use for its prediction does not ask the model (``asks``). The
    constructor checks that values are finite, that each row starts where the one before ends, that levels move one way — but for
    a row that only adds noise, x' = A·x + c·z, the forward process — and, where ``exact``, that a sampler ends at clean data
    without noise (or, with ``stops``, at the noise level it names) and the laws of a correct step: true x0 and ε give
    signal_to·x0 and variance noise_to²,

        A·signal + B0 [+ ΣH if history is x0] = signal_to,    (A·noise + Be [+ ΣH if history is eps])² + c² = noise_to² + excess.

    ``excess`` is variance added on purpose (DDPM with σ² = β, DDIM's σ̂). Raises ValueError naming the row and the law.
    """

    name: str
    prediction: str
    history: str
    t: np.ndarray  # the time the model is told
    signal: np.ndarray
    noise: np.ndarray
    signal_to: np.ndarray
    noise_to: np.ndarray
    A: np.ndarray
    B0: np.ndarray
    Be: np.ndarray
    H: np.ndarray
    c: np.ndarray
    excess: np.ndarray
    exact: np.ndarray
    back: np.ndarray
    stops: bool = False

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        if self.history not in ("x0", "eps"):
            raise ValueError(f"history must be 'x0' or 'eps', not {self.history!r}")
        rows = np.size(self.t)
        kinds: dict[str, type] = {"exact": bool, "back": np.int64}
        for f in fields(self)[3:-1]:
            value: np.ndarray = np.array(getattr(self, f.name), kinds.get(f.name, np.float64))
            shape = (rows, STORED) if f.name in ("H", "back") else (rows,)
            if value.shape != shape or rows == 0:
                raise ValueError(f"{f.name} must have shape {shape} with at least one row, not {value.shape}")
            value.setflags(write=False)
            object.__setattr__(self, f.name, value)
        self._check()

    def _check(self) -> None:
        for name in (*COLUMNS, "H"):
            self._refuse(~np.isfinite(getattr(self, name)).reshape(len(self), -1).all(axis=1), f"{name} must be finite")
        for name in ("signal", "noise", "signal_to", "noise_to", "c"):
            self._refuse(getattr(self, name) < 0, f"{name} must not be negative")
        reach = np.where(np.arange(STORED) < self.past[:, None], self.back, 1).max(axis=1)
        self._refuse((self.past > 0) & (reach > np.arange(len(self))), "H must be 0 before the first stored output")
        self._refuse(self.back.min(axis=1) < 1, "back must be at least 1")
        apart = (self.signal_to[:-1] != self.signal[1:]) | (self.noise_to[:-1] != self.noise[1:])
        self._refuse(np.r_[False, apart], "a row must start at the level where the one before ends")
        way = -1 if self.descends else 1
        turn = self.noise_to * self.signal - self.noise * self.signal_to  # the sign of the change of noise/signal
        bare = (self.B0 == 0) & (self.Be == 0) & (self.H == 0).all(axis=1)
        added = bare & (self.c > 0) & (turn > 0)
        stays = (self.signal == self.signal_to) & (self.noise == self.noise_to)
        self._refuse(~stays & ~added & (turn * way <= 0), "the noise-to-signal level must move one way")
        backwards = (np.diff(self.t) * way < 0) & ~added[:-1]
        self._refuse(np.r_[False, backwards], f"t must {'descend' if self.descends else 'ascend'}")
        if self.descends:
            ends = (self.signal_to[-1], self.noise_to[-1], self.c[-1]) == (1, 0, 0)
            last = np.arange(len(self)) == len(self) - 1
            if self.stops:
                self._refuse(last & (self.noise_to == 0), "a table that stops early must end at a noise level above 0")
            else:
                self._refuse(last & self.exact & (not ends), "the last row must end at clean data (1, 0) with c = 0")
        past, on_x0 = self.H.sum(axis=1), self.history == "x0"
        size = np.abs(self.H).sum(axis=1) + np.abs(self.A) + np.abs(self.B0) + np.abs(self.Be) + 1
        square = np.maximum(1, np.maximum(self.noise, self.noise_to) ** 2)
        mean = self.A * self.signal + self.B0 + on_x0 * past - self.signal_to
        self._refuse(self.exact & (np.abs(mean) > TOLERANCE * size), "the signal law fails: A·signal + B0 (+ ΣH) = signal_to")
        spread = (self.A * self.noise + self.Be + (not on_x0) * past) ** 2 + self.c**2 - self.noise_to**2 - self.excess
        law = "the noise law fails: (A·noise + Be (+ ΣH))² + c² = noise_to² + excess"
        self._refuse(self.exact & (np.abs(spread) > TOLERANCE * size * square), law)

    def _refuse(self, bad: np.ndarray, law: str) -> None:
        if bad.any():
            raise ValueError(f"{self.name}: row {int(np.flatnonzero(bad)[0])}: {law}")

    def __len__(self) -> int:
        return self.t.size

    def __repr__(self) -> str:
        return f"Table({self.name}, {len(self)} rows, model predicts {self.prediction})"

    @property
    def descends(self) -> bool:
        """True for a sampler, False for an encoder (data to noise)."""
        return bool(self.noise_to[-1] * self.signal[0] < self.noise[0] * self.signal_to[-1])

    @property
    def past(self) -> np.ndarray:
        """How many stored outputs each row reads, 0..3."""
        return np.where(self.H != 0, np.arange(1, STORED + 1), 0).max(axis=1)

    @property
    def last_read(self) -> np.ndarray:
        """The last row that reads the output of each row; the row itself where none does."""
        last = np.arange(len(self))
        for i, (past, back) in enumerate(zip(self.past, self.back, strict=True)):
            last[i - back[:past]] = i
        return last

    @property
    def asks(self) -> np.ndarray:
        """Whether each row asks the model: it uses the prediction, or a later row does."""
        return (self.B0 != 0) | (self.Be != 0) | (self.last_read > np.arange(len(self)))

    @property
    def evaluations(self) -> int:
        """How often the model is asked in all."""
        return int(self.asks.sum())

    @property
    def times(self) -> np.ndarray:
        """t as the model gets it: int64 where every time is whole, else float64."""
        whole = np.rint(self.t)
        return whole.astype(np.int64) if np.array_equal(whole, self.t) else self.t

    def guidance_on_output(self) -> np.ndarray:
        """k (R,) such that output + k·G is the output of a model whose score is larger by G."""
        _, q = coefficients(self.prediction, "eps", self.signal, self.noise)
        return np.divide(-self.noise, q, out=np.zeros(len(self)), where=q != 0)

    def rows(self, clip: bool = False, rederive_eps: bool = True) -> np.ndarray:
        """The (R, 13) columns of :func:`alphabar.kernels.step` for the model's prediction m.

        Without ``clip``, x0 and ε are eliminated: x' = a·x + e·m + …. With it x0 is bounded, and ε = (x − signal·x0)/noise
        follows the bounded x0, or stays the model's own where ``rederive_eps`` is False.
        """
        p, q = coefficients(self.prediction, "x0", self.signal, self.noise)
        if clip and rederive_eps:  # ε on (x, clipped x0, m)
            ex, e0 = coefficients("x0", "eps", self.signal, self.noise)
            em = np.zeros(len(self))
        else:
            ex, em = coefficients(self.prediction, "eps", self.signal, self.noise)
            e0 = np.zeros(len(self))
        out = dict.fromkeys(ROW, np.zeros(len(self)))
        keep_x0 = self.history == "x0"
        if clip:
            out |= {"p": p, "q": q, "a": self.A + self.Be * ex, "b": self.B0 + self.Be * e0, "e": self.Be * em}
            out |= {"w": np.ones(len(self))} if keep_x0 else {"u": ex, "w": e0, "r": em}
        else:
            out |= {"a": self.A + self.B0 * p + self.Be * ex, "e": self.B0 * q + self.Be * em}
            out |= {"u": p, "r": q} if keep_x0 else {"u": ex, "r": em}
        out |= {"h1": self.H[:, 0], "h2": self.H[:, 1], "h3": self.H[:, 2], "c": self.c}
        on_x0 = np.divide(self.noise**2, self.signal, out=np.zeros(len(self)), where=self.signal != 0)
        out["g"] = self.B0 * on_x0 - self.Be * self.noise
        rows = np.stack([out[name] for name in ROW], axis=1)
        rows.setflags(write=False)  # so that a GPU may keep a copy for as long as the rows live
        return rows


def table(
    name: str,
    prediction: str,
    t: np.ndarray,
    signal: np.ndarray,
    noise: np.ndarray,
    *,
    A: Any = 0.0,
    B0: Any = 0.0,
    Be: Any = 0.0,
    H: Sequence[np.ndarray] | np.ndarray | None = None,
    c: Any = 0.0,
    excess: Any = 0.0,
    history: str = "eps",
    exact: Any = True,
    back: np.ndarray | None = None,
    stops: bool = False,
) -> Table:
    """A Table of rows that run through R + 1 levels (signal, noise); columns not given are zero.

    The shortest way to a new sampler of one row a step; :class:`alphabar.core.rows.Rows` is that to one of several stages.
    """
    rows = len(t)
    past = np.zeros((rows, STORED)) if H is None else np.asarray(H, np.float64)
    if back is None:
        back = np.tile(np.arange(1, STORED + 1), (rows, 1))
    given = {"A": A, "B0": B0, "Be": Be, "c": c, "excess": excess, "exact": exact}
    full = {k: np.broadcast_to(v, rows) for k, v in given.items()}
    levels = signal[:-1], noise[:-1], signal[1:], noise[1:]
    return Table(name, prediction, history, t, *levels, H=past, back=back, stops=stops, **full)
