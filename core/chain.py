"""The two chains over chosen times 0 < τ_1 < … < τ_S: inference q_σ, which keeps q(x_t|x_0), and p_θ, which shares its form.

Paths are arrays (S+1, B, …), x_0 first. Densities are float64 nats on the host. S2's α is ᾱ here, and any levels do: √ᾱ is the
signal a and √(1−ᾱ) the noise n.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, native, restore, to_numpy
from .convert import coefficients
from .decoder import gaussian_log_prob
from .exchange import Array, check_schedule, float_batch
from .levels import Levels, Tabulated, frozen, whole_steps

Model = Callable[[Array, Array], Array]
CONTINUOUS_STEPS = 1000


@dataclass(frozen=True, eq=False, repr=False)
class Chain:
    """The kernels of q_σ and p_θ. Eq: S0-E41, S0-E43, S2-E6, S2-E7, S2-E8, S2-E10, S1-E9, S1-E10. Made by :func:`chain`.

        q_σ(x_{i−1}|x_i, x_0) = N(on_x0[i]·x_0 + on_x[i]·x_i, q_variance[i]),  i = 2..S,    q_σ(x_S|x_0) = N(a_S·x_0, n_S²)
        p_θ(x_{i−1}|x_i) = N(on_x0[i]·x̂_0(x_i) + on_x[i]·x_i, p_variance[i]),  i = 1..S,    p(x_S) = N(0, prior_std²)

    Arrays have length S+1 and index 0 is clean data: ``t``, ``signal``, ``noise``, ``step_variance`` (what q adds from i−1 to i),
    ``on_x0``, ``on_x``, ``q_variance`` (0 at i = 1, where x_0 is known) and ``p_variance``.
    """

    levels: Levels
    t: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    step_variance: np.ndarray
    on_x0: np.ndarray
    on_x: np.ndarray
    q_variance: np.ndarray
    p_variance: np.ndarray
    eta: float
    variance: str
    prediction: str
    clip: tuple[float, float] | None

    def __len__(self) -> int:
        return self.t.size - 1

    def __repr__(self) -> str:
        return f"Chain({self.levels!r}, S={len(self)}, eta={self.eta:g}, variance={self.variance})"

    @property
    def gamma(self) -> np.ndarray:
        """γ_i (S+1,) with KL(q_σ‖p_θ) = γ_i·‖ε − ε_θ‖² + C_i, exact for every σ. Eq: S0-P11, S0-E46, S0-E30, S2-C9.

            γ_i = (on_x0·n_i/a_i)²/(2σ²)

        For i = 1 it belongs to −log p_θ(x_0|x_1). C_i is 0 where the two variances are equal. Not for a ``clip``
        that acts.
        """
        with np.errstate(divide="ignore"):
            on_eps = self.on_x0[1:] * self.noise[1:] / self.signal[1:]
        return np.r_[0.0, on_eps**2 / (2 * self.p_variance[1:])]

    def predicted_x0(self, output: Array, x: Array, i: Any) -> np.ndarray:
        """x̂_0, float64, from the model's answer at x_i; i an int or (B,) integers in 1..S. Eq: S2-E9, S4-E40."""
        x = np.asarray(to_numpy(x), np.float64)
        P, Q = (_column(v, x) for v in coefficients(self.prediction, "x0", self.signal[i], self.noise[i]))
        x0 = P * x + Q * np.asarray(to_numpy(output), np.float64)
        return x0 if self.clip is None else np.clip(x0, *self.clip)

    def mean(self, x0: np.ndarray, x: np.ndarray, i: Any) -> np.ndarray:
        """The mean of x_{i−1} given x_0 (or its prediction) and x_i. Eq: S0-E28, S0-E41, S1-E12, S1-E16, S2-E7."""
        return _column(self.on_x0[i], x) * x0 + _column(self.on_x[i], x) * x

    def ask(self, model: Model, x: Array, i: Any) -> Array:
        """The model's answer at x = x_i; it is told t as a (B,) array, int64 where a table's times are whole."""
        here = native(x)
        xp, t = array_module(here), np.broadcast_to(self.t[i], here.shape[0])
        whole = isinstance(self.levels, Tabulated) and np.array_equal(np.rint(self.t), self.t)
        answer = model(x, restore(xp.asarray(t.astype(np.int64) if whole else t), x))
        shape = getattr(native(answer), "shape", None)
        if shape != here.shape:
            raise ValueError(f"model must return an array of shape {here.shape} like x, not {shape or type(answer).__name__}")
        return answer

    # ---------------------------------------------------------------------------------------------------------------- q_σ

    def noised(self, x0: Array, i: Any, seed: int = 0, draw: int = 0, first_sample: int = 0) -> Array:
        """x_i ~ q(x_i|x_0) = N(a_i·x_0, n_i²), like x0. Eq: S0-E18, S0-E42, S2-U2.

        Sample k depends on (seed, draw, i, first_sample + k) alone where i is an int, else on (seed, draw, first_sample + k).
        """
        here = float_batch(x0, "x0")
        xp = array_module(here)
        step = draw * len(self.t) + (i if isinstance(i, int) else 0)
        eps = kernels.normals(xp.empty(here.shape, here.dtype), seed, step, streams.PATH, first_sample)
        a, n = (xp.asarray(_column(v[i], here)).astype(here.dtype) for v in (self.signal, self.noise))
        return restore(a * here + n * eps, x0)

    def sample_path(self, x0: Array, seed: int = 0, draw: int = 0, first_sample: int = 0) -> np.ndarray:
        """x_{0:S} ~ q_σ(·|x_0), float64 (S+1, B, …): x_S, then down by the posteriors.

        Eq: S2-E6, S0-E40, S2-C11, S4-E35, S4-E36, S4-E37, S4-E44.
        """
        x0 = np.asarray(to_numpy(x0), np.float64)
        path = np.empty((len(self.t), *x0.shape))
        path[0] = x0
        path[-1] = self.noised(x0, len(self), seed, draw, first_sample)
        for i in range(len(self), 1, -1):
            z = kernels.normals(np.empty(x0.shape), seed, draw * len(self.t) + i - 1, streams.PATH, first_sample)
            path[i - 1] = self.mean(x0, path[i], i) + np.sqrt(self.q_variance[i]) * z
        return path

    def forward_kernel(self, x0: np.ndarray, x: np.ndarray, i: int) -> tuple[np.ndarray, float]:
        """(mean, variance) of q_σ(x_i|x_{i−1} = x, x_0), i in 1..S, by Bayes' rule. Eq: S2-E8, S2-C13.

            mean = a_i·x_0 + g·(x − a_{i−1}·x_0),    g = on_x[i]·n_i²/n_{i−1}²,    variance = n_i²·q_variance[i]/n_{i−1}²

        At η = 1 it does not depend on x_0 and is q(x_i|x_{i−1}) (Eq: S0-E17); from clean data it is q(x_1|x_0).
        """
        if i == 1:
            return self.signal[1] * x0, float(self.noise[1] ** 2)
        ratio = (self.noise[i] / self.noise[i - 1]) ** 2
        gain = self.on_x[i] * ratio
        return self.signal[i] * x0 + gain * (x - self.signal[i - 1] * x0), float(self.q_variance[i] * ratio)

    def forward_log_probs(self, path: np.ndarray) -> np.ndarray:
        """log q_σ(x_i|x_{i−1}, x_0), i = 1..S, (S, B); their sum is log q_σ(x_{1:S}|x_0). Eq: S1-E1, S4-E1, S2-E8, S2-C6."""
        path = self._path(path)
        kernels_ = (self.forward_kernel(path[0], path[i - 1], i) for i in range(1, len(self) + 1))
        return np.stack([gaussian_log_prob(x, mean, var) for x, (mean, var) in zip(path[1:], kernels_, strict=True)])

    def posterior_log_probs(self, path: np.ndarray) -> np.ndarray:
        """log q_σ(x_{i−1}|x_i, x_0), i = 2..S, (S−1, B). Eq: S0-E28, S0-E41, S1-E10, S2-E7."""
        path = self._path(path)
        rows = [
            gaussian_log_prob(path[i - 1], self.mean(path[0], path[i], i), self.q_variance[i]) for i in range(2, len(self) + 1)
        ]
        return np.array(rows).reshape(len(self) - 1, path.shape[1])

    def end_log_prob(self, path: np.ndarray) -> np.ndarray:
        """log q(x_S|x_0) (B,). Eq: S0-E40, S2-E6."""
        path = self._path(path)
        return gaussian_log_prob(path[-1], self.signal[-1] * path[0], self.noise[-1] ** 2)

    # ---------------------------------------------------------------------------------------------------------------- p_θ

    def prior_log_prob(self, path: np.ndarray) -> np.ndarray:
        """log p(x_S) = log N(x_S; 0, prior_std²) (B,). Eq: S0-C12, S4-E7, S4-E65."""
        return gaussian_log_prob(self._path(path)[-1], 0.0, self.levels.prior_std**2)

    def reverse_log_probs(self, path: np.ndarray, model: Model) -> np.ndarray:
        """log p_θ(x_{i−1}|x_i), i = 1..S, (S, B). Eq: S0-E19, S1-E2, S1-E9, S2-E10, S4-E5."""
        path = self._path(path)
        rows = []
        for i in range(1, len(self) + 1):
            x0 = self.predicted_x0(self.ask(model, path[i], i), path[i], i)
            rows.append(gaussian_log_prob(path[i - 1], self.mean(x0, path[i], i), self.p_variance[i]))
        return np.stack(rows)

    def _path(self, path: np.ndarray) -> np.ndarray:
        path = np.asarray(to_numpy(path), np.float64)
        if path.ndim < 2 or path.shape[0] != len(self.t):
            raise ValueError(f"path must have shape ({len(self.t)}, B, …), x_0 first, not {path.shape}")
        return path


def chain(
    s: Levels,
    steps: int | None = None,
    eta: float = 1.0,
    variance: str | np.ndarray = "posterior",
    decoder_variance: str | float = "step",
    prediction: str = "eps",
    clip: tuple[float, float] | None = None,
    spacing: str | None = None,
    t_min: float | None = None,
    grid: Any = None,
) -> Chain:
    """The chains over a sub-sequence of the times of ``s``. Eq: S0-E41, S0-E43, S0-U1, S2-E16, S0-C20, S1-E11.

    steps: S, by default T of a table and 1000 for a continuous process. spacing: as for samplers, or "log", equal steps of ln σ̄
        from ``t_min`` (by default the process's) to T; by default "linspace" for a table and "log" for a continuous process,
        whose first steps are else far too long for a good bound. grid: the ascending times themselves, in (0, T].
    eta: in (0, 1], the deviation of q_σ in units of ddim_sigma(1); 1 is the Markov chain of DDPM.
    variance: of p_θ(x_{i−1}|x_i), i = 2..S: "posterior" that of q_σ, "beta" what the process adds in a step, or S−1 positive
        values, lowest time first.
    decoder_variance: of p_θ(x_0|x_1), for which q_σ gives none: "step" n_1², right for data that are smooth at that noise level;
        "clipped" q_σ's of the step before (i = 2), as published code clips β̃ at t = 1; or a positive number.
    clip: (low, high) bounds of the predicted x0. Raises ValueError for values out of range.
    """
    check_schedule(s)
    if not 0 < eta <= 1:
        raise ValueError(f"eta must be in (0, 1], not {eta}: without noise the bound is infinite")
    if grid is None:
        S = steps if steps is not None else int(s.T) if isinstance(s, Tabulated) else CONTINUOUS_STEPS
        times = _times(s, S, spacing or ("linspace" if isinstance(s, Tabulated) else "log"), t_min)
    else:
        times = np.array(grid, np.float64)
        if times.ndim != 1 or times.size == 0 or not (0 < times[0] and times[-1] <= s.T and np.all(np.diff(times) > 0)):
            raise ValueError(f"grid must ascend strictly within (0, {s.T:g}], not {grid}")
    t = np.r_[0.0, times]
    a, n = s.levels(t)
    added = np.r_[0.0, s.step_variance(t[1:], t[:-1])]
    new = added[1:] / n[1:] ** 2  # the share of x_i's noise that step i brings
    old = a[1:] * n[:-1] / (a[:-1] * n[1:])  # 1 − new = old²
    kept = np.sqrt((1 - eta**2) + (eta * old) ** 2)
    on_x = np.r_[0.0, n[:-1] / n[1:] * kept]
    on_x0 = np.r_[0.0, a[:-1] * new * (1 + (eta * old) ** 2) / (1 + old * kept)]  # a_to − on_x·a_t without cancellation
    q = np.r_[0.0, (eta * n[:-1]) ** 2 * new]
    p = _p_variance(variance, decoder_variance, added, q)
    coefficients(prediction, "x0", a[1:], n[1:])  # names the level where x0 does not follow
    t, a, n, added, on_x0, on_x, q, p = map(frozen, (t, a, n, added, on_x0, on_x, q, p))
    name = variance if isinstance(variance, str) else "given"
    return Chain(s, t, a, n, added, on_x0, on_x, q, p, float(eta), name, prediction, clip)


def _times(s: Levels, S: int, spacing: str, t_min: float | None) -> np.ndarray:
    if spacing != "log":
        if t_min is not None:
            raise ValueError(f"t_min goes with the spacing 'log', not with {spacing!r}")
        return np.asarray(s.times(S, spacing), np.float64)
    start = s.t_min if t_min is None else t_min
    if not 0 < start < s.T:
        raise ValueError(f"t_min must be in (0, {s.T:g}), not {start}")
    low, high = s.sigma_bar_at([start, s.T])
    if not np.isfinite(high):
        raise ValueError("spacing 'log' needs a process that keeps some signal to the end (alpha_bar > 0)")
    times = s.time(np.clip(np.geomspace(low, high, whole_steps(S, "steps")), low, high))
    times[-1] = s.T
    return times


def _p_variance(variance: str | np.ndarray, decoder_variance: str | float, added: np.ndarray, q: np.ndarray) -> np.ndarray:
    if isinstance(variance, str):
        if variance not in ("posterior", "beta"):
            raise ValueError(f"variance must be 'posterior', 'beta' or an array, not {variance!r}")
        above = (q if variance == "posterior" else added)[2:]
    else:
        above = np.asarray(variance, np.float64)
        if above.shape != (len(q) - 2,) or not np.all((above > 0) & np.isfinite(above)):
            raise ValueError(f"variance must hold {len(q) - 2} positive numbers, one for each step but the one to clean data")
    if decoder_variance == "step":
        return np.r_[0.0, added[1], above]
    if decoder_variance == "clipped":
        if len(q) == 2:
            raise ValueError("decoder_variance 'clipped' needs a chain of at least two steps")
        return np.r_[0.0, q[2], above]
    if isinstance(decoder_variance, str) or not 0 < decoder_variance < np.inf:
        raise ValueError(f"decoder_variance must be 'step', 'clipped' or a positive number, not {decoder_variance!r}")
    return np.r_[0.0, decoder_variance, above]


def _column(values: Any, x: Any) -> Any:
    """Per-sample values as factors of ``x``: a number as it is, (B,) as (B, 1, …)."""
    return values if np.ndim(values) == 0 else np.asarray(values).reshape(-1, *(1,) * (x.ndim - 1))
