"""The likelihood of data under the probability-flow ODE, exactly or with Hutchinson's estimate; dequantisation of 8-bit data.

The ODE of any process is d(x/a) = ε dσ̄ with σ̄ = n/a (Eq: S2-E14). It is integrated in λ = ln σ̄ for u = x/r, r² = a² + n², which
neither grows nor shrinks and stands still for N(0, I) data:

    du/dλ = n/r²·(r·ε(r·u, t) − n·u),    its divergence n·tr(∂ε/∂x) − d·n²/r².

λ → −∞ is clean data, so the integral starts at t_min > 0: what is computed is the log-density at x of x0 + σ̄(t_min)·ε under the
model, x being taken as it is, without noise. It differs from log p_0(x) by ½σ̄²·Δp_0/p_0 where p_0 is smooth on that scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels import counter, streams
from ..kernels.arrays import array_module, restore, to_numpy
from . import traces
from .chain import Model
from .convert import coefficients
from .decoder import gaussian_log_prob
from .exchange import Array, check_schedule, flat, float_batch
from .levels import Levels
from .mixture import GaussianMixture

JacobianProduct = Callable[[Array, Array, Array], Array]
METHODS = ("RK45", "DOP853", "RK23")
CELL = 1 / 128  # the width of a dequantised value in [−1, 1)
OFFSET = 7.0  # −log2 CELL


@dataclass(frozen=True, eq=False, repr=False)
class FlowLikelihood:
    """log p(x) of B samples of d elements, nats.

    ``estimates`` (K, B): one for each of K directions, (1, B) by the exact trace. ``x_T``: where the flow ends, the code of x.
    ``evaluations``: model calls, each for the whole batch. ``t_min``: where the integral starts.
    """

    estimates: np.ndarray
    exact: bool
    x_T: np.ndarray
    evaluations: int
    t_min: float
    dimensions: int

    def __repr__(self) -> str:
        kind = "exact trace" if self.exact else f"{len(self.estimates)} directions"
        return f"FlowLikelihood({self.estimates.shape[1]} samples, {kind}, {self.evaluations} evaluations)"

    @property
    def log_prob(self) -> np.ndarray:
        """log p(x) (B,): the mean over the directions."""
        return self.estimates.mean(axis=0)

    @property
    def error(self) -> np.ndarray:
        """The standard error of ``log_prob`` over the directions (B,); 0 for the exact trace, NaN for one direction."""
        K = len(self.estimates)
        if self.exact:
            return np.zeros(self.estimates.shape[1])
        return self.estimates.std(axis=0, ddof=1) / np.sqrt(K) if K > 1 else np.full(self.estimates.shape[1], np.nan)

    def bits(self, offset: float = 0.0) -> np.ndarray:
        """Bits per dimension (B,), see :func:`bits_per_dimension`."""
        return bits_per_dimension(self.log_prob, self.dimensions, offset)


def log_likelihood(
    model: Model,
    x: Array,
    s: Levels,
    jvp: JacobianProduct,
    prediction: str = "eps",
    trace: str = "exact",
    projections: int = 1,
    law: str = "rademacher",
    seed: int = 0,
    draw: int = 0,
    first_sample: int = 0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    t_min: float | None = None,
    progress: Callable[[int], Any] | None = None,
) -> FlowLikelihood:
    """log p_0(x) = log p_T(x_T) + ∫ ∇·f̃ dt along the probability-flow ODE from x. Eq: S4-E68, S2-E14.

    model(x, t) answers a ``prediction`` and jvp(x, t, v) the product J·v of its Jacobian in x; t is (B,) float64. x (B, …) is a
    float array; the state is float64 inside and the model sees the library and dtype of x.

    trace: "exact" by d products an evaluation, or "hutchinson" E[vᵀJv] by ``projections`` of them, with directions of the ``law``
        "rademacher" or "normal" that stay the same along the path: each direction's integral is an unbiased estimate, and their
        spread is the error. Direction j of sample k depends on (seed, draw·projections + j, first_sample + k) alone.
    rtol, atol, method: of scipy.integrate.solve_ivp; steps are chosen for the batch as a whole, by the root mean square of its
        errors, so the last digits of a sample depend on its batch.
    t_min: where the integral starts, by default the process's; the module says what that leaves out.

    Raises ImportError without scipy, ValueError where signal is 0 at T, or the model or the solver fails.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as e:
        raise ImportError("the probability-flow likelihood needs scipy: pip install scipy") from e
    check_schedule(s)
    here = float_batch(x, "x", axes=2)
    if here.size == 0:
        raise ValueError(f"x must hold at least one sample, but has shape {here.shape}")
    if trace not in ("exact", "hutchinson"):
        raise ValueError(f"trace must be 'exact' or 'hutchinson', not {trace!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")
    if projections < 1:
        raise ValueError(f"projections must be at least 1, not {projections}")
    start = s.t_min if t_min is None else t_min
    if not 0 < start < s.T:
        raise ValueError(f"t_min must be in (0, {s.T:g}), not {start}")
    last = float(s.sigma_bar_at(s.T))
    if not np.isfinite(last):
        raise ValueError("the flow cannot end where no signal is left (alpha_bar = 0): use a schedule that keeps some")
    xp, shape, batch = array_module(here), here.shape, here.shape[0]
    d, cells = int(np.prod(shape[1:])), here.size
    K = 1 if trace == "exact" else projections
    calls = 0
    directions = []
    if trace == "hutchinson":
        directions = [traces.projections(shape, seed, draw * K + k, law, first_sample, here.dtype, xp) for k in range(K)]

    def host(value: Any, name: str) -> np.ndarray:
        out = np.asarray(to_numpy(value), np.float64)
        if out.shape != shape:
            raise ValueError(f"{name} must return an array of shape {shape} like x, not {out.shape}")
        return out

    def rate(log_sigma: float, state: np.ndarray) -> np.ndarray:
        nonlocal calls
        t = float(s.time(np.clip(np.exp(log_sigma), 0, last)))
        a, n = (float(v) for v in s.levels(t))
        r2 = a * a + n * n
        u = state[:cells].reshape(shape)
        point = np.sqrt(r2) * u
        at, times = restore(xp.asarray(point, here.dtype), x), restore(xp.full(batch, t), x)
        P, Q = (float(v) for v in coefficients(prediction, "eps", a, n))
        eps = P * point + Q * host(model(at, times), "model")
        calls += 1
        if not np.isfinite(eps).all():
            raise ValueError(f"the model's answer at t = {t:g} is not finite")

        def product(x: Array, v: Array) -> Array:
            return jvp(x, times, v)

        if trace == "exact":
            rows = [np.asarray(to_numpy(traces.jacobian_trace(product, at)), np.float64)]
            square = [float(d)]
        else:
            pairs = [(to_numpy(v).astype(np.float64), host(jvp(at, times, restore(v, x)), "jvp")) for v in directions]
            rows = [flat(v * Jv).sum(axis=1) for v, Jv in pairs]
            square = [flat(v * v).sum(axis=1) for v, _ in pairs]  # vᵀv, d for Rademacher directions
        div = np.concatenate([n * (P * vv + Q * row) - n * n / r2 * vv for row, vv in zip(rows, square, strict=True)])
        if not np.isfinite(div).all():
            raise ValueError(f"the Jacobian of the model at t = {t:g} is not finite")
        if progress is not None:
            progress(calls)
        return np.concatenate([(n / r2 * (np.sqrt(r2) * eps - n * u)).ravel(), div])

    a, n = (float(v) for v in s.levels(start))
    shrink = a / np.hypot(a, n)  # the data stand for x/a at t_min
    begin = np.concatenate([to_numpy(here).astype(np.float64).ravel() * shrink, np.zeros(K * batch)])
    span = (np.log(n / a), np.log(last))
    answer = solve_ivp(rate, span, begin, method=method, rtol=rtol, atol=atol, t_eval=span[1:])
    if not answer.success:
        raise ValueError(f"the probability-flow ODE could not be solved: {answer.message}")
    end = answer.y[:, -1]
    a, n = (float(v) for v in s.levels(s.T))
    r = np.hypot(a, n)
    x_T = r * end[:cells].reshape(shape)
    outside = gaussian_log_prob(x_T, 0.0, s.prior_std**2) + d * (np.log(r) + np.log(shrink))
    return FlowLikelihood(outside + end[cells:].reshape(K, batch), trace == "exact", x_T, calls, float(start), d)


def mixture_jvp(density: GaussianMixture, s: Levels, prediction: str = "eps") -> JacobianProduct:
    """jvp(x, t, v) of ``density.model(s, prediction)`` in closed form, for one time t a batch. Eq: S4-E58, S4-E78."""

    def product(x: Array, t: Array, v: Array) -> Array:
        a, n = (float(level) for level in s.levels(np.unique(to_numpy(t)).item()))
        P, Q = (float(c) for c in coefficients("score", prediction, a, n))
        return P * to_numpy(v) + Q * density.diffuse(a, n).score_jvp(x, v)

    return product


# ---------------------------------------------------------------------------------------------------------------- 8-bit data


def dequantize(images: Array, seed: int = 0, draw: int = 0, first_sample: int = 0) -> np.ndarray:
    """x = (u + U)/128 − 1 in [−1, 1), U ~ U[0, 1), from uint8 u (B, …), float64 on the host. Source: Theis et al. 2016.

    Each value owns a cell of width 1/128, so −log2 P(u) ≤ E[−log2 p(x)] + 7 for each element: the :data:`OFFSET` of
    :func:`bits_per_dimension`. U of sample k depends on (seed, draw, first_sample + k) alone.
    """
    u = to_numpy(images)
    if u.dtype != np.uint8 or u.ndim < 1:
        raise TypeError(f"images must be a uint8 array (B, …), not {u.dtype} of shape {u.shape}")
    inside = counter.uniforms(len(u), int(np.prod(u.shape[1:])), seed, draw, streams.DEQUANTIZE, first_sample)
    return (u + inside.reshape(u.shape)) * CELL - 1


def bits_per_dimension(log_prob: Any, d: int, offset: float = 0.0) -> Any:
    """−log_prob/(d·ln 2) + offset; :data:`OFFSET` for the bits of 8-bit values whose dequantised density is given."""
    return -np.asarray(log_prob) / (d * np.log(2)) + offset
