"""The probability-flow ODE: its right-hand sides, and an adaptive solver that carries noise to data and data to noise.

Solved is d(x/a) = ε dσ̄ over σ̄ = n/a: its right-hand side stays finite down to clean data, where that in t grows as 1/√t or worse.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..kernels.arrays import array_module, is_native, native, restore, to_numpy
from .convert import coefficients, combined
from .exchange import Array, check_schedule, lift, real_times
from .levels import Levels
from .samplers import Model, answer_of
from .sde import SDE

__all__ = ["Solution", "ddim_ode_prior", "ddim_ode_rhs", "decode", "encode", "probability_flow_drift"]

METHODS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")


def ddim_ode_rhs(model: Model, s: Levels, prediction: str = "eps") -> Callable[[Array, float], Array]:
    """rhs(x̄, σ̄) = ε_θ(x, t) of dx̄ = ε dσ̄, x̄ = x/a, σ̄ = n/a. Eq: S2-E14, S4-E50.

    t is the time of σ̄ and x = a·x̄, for a schedule x̄/√(σ̄² + 1): the network sees x_t itself, as in the steps of DDIM, which are
    Euler's for this equation. Of a ladder or a VE-SDE it is the probability flow as it stands. x̄ (B, …) float.
    """
    check_schedule(s)

    def rhs(xbar: Array, sigma: float) -> Array:
        here = native(xbar)
        t = s.time(sigma)
        a, n = (float(v) for v in s.levels(t))
        on_x, on_m = coefficients(prediction, "eps", a, n)
        x = a * here
        times = restore(array_module(here).full(here.shape[0], float(t)), xbar)
        m = answer_of(model(restore(x, xbar), times), x, "model")
        return restore(combined(on_x, x, on_m, m), xbar)

    return rhs


def ddim_ode_prior(s: Levels) -> float:
    """Var x̄(T) of the start x_T ~ N(0, prior_std²), x̄ = x/a: σ̄(T)² + 1 = 1/ᾱ_T for a schedule. Eq: S2-U4.

    For large σ̄(T) that is about σ̄(T)², the variance (not the deviation) of the usual approximation.
    """
    check_schedule(s)
    return float((s.prior_std / s.levels(s.T)[0]) ** 2)


def probability_flow_drift(model: Model, s: SDE, prediction: str = "eps") -> Callable[[Array, Any], Array]:
    """drift(x, t) = f(t)·x − ½g(t)²·score of dx = drift dt, whose solutions have the marginals of the SDE. Eq: S4-C18, S4-E66.

    x (B, …) float; t a number or (B,) in (0, T].
    """
    check_schedule(s)
    if not isinstance(s, SDE):
        raise TypeError(f"s must be an SDE (sde.VPSDE() for one), not {type(s).__name__}")

    def drift(x: Array, t: Any) -> Array:
        here = native(x)
        times = np.broadcast_to(real_times(t, s, here.shape[0]), here.shape[0])
        on_x, on_m = coefficients(prediction, "score", *s.levels(times))
        m = answer_of(model(x, restore(array_module(here).asarray(times), x)), here, "model")
        half = s.diffusion(times) ** 2 / 2
        return restore(lift(s.drift_factor(times) - half * on_x, here) * here - lift(half * on_m, here) * m, x)

    return drift


class Solution(NamedTuple):
    """What an adaptive solver found."""

    x: Array  # where the samples came to, like what was put in
    evaluations: int  # calls of the model


def decode(
    model: Model,
    s: Levels,
    x_T: Array,
    prediction: str = "eps",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    denoise: bool = True,
) -> Solution:
    """Noise to data: the probability flow from T to t_min by an adaptive solver, then x̄ − σ̄·ε to clean data. Eq: S2-E14, S2-C17.

    x_T (B, …): float array of any library; the answer is of its kind. The whole batch is one system in float64 on the host, so
    its steps are those that its hardest samples need, and a sample depends on its batch within the tolerances (rtol and atol
    of x/a, on the root mean square of the batch). ``method`` is one of scipy's solve_ivp. ``denoise=False`` leaves x at t_min.

    Raises ImportError without scipy, RuntimeError where the solver fails (a model that is not finite or not smooth).
    """
    flow = _Flow(model, s, x_T, "x_T", prediction)
    low, high = s.sigma_bar_at([s.t_min, s.T])
    _finite(high)
    xbar = flow.solve(flow.start / float(s.levels(s.T)[0]), high, low, rtol, atol, method)
    if not denoise:
        return flow.end(xbar * float(s.levels(s.t_min)[0]))
    return flow.end(xbar - low * flow.rhs(xbar, low))


def encode(
    model: Model,
    s: Levels,
    x0: Array,
    prediction: str = "eps",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
) -> Solution:
    """Data to noise: the way of :func:`decode` back, x0 + σ̄·ε(x0, t_min) first; its x is x_T. Eq: S2-E14, S2-C15, S2-C17."""
    flow = _Flow(model, s, x0, "x0", prediction)
    low, high = s.sigma_bar_at([s.t_min, s.T])
    _finite(high)
    start = flow.start + low * flow.rhs(flow.start, low)
    return flow.end(flow.solve(start, low, high, rtol, atol, method) * float(s.levels(s.T)[0]))


def _finite(sigma: float) -> None:
    if not np.isfinite(sigma):
        raise ValueError("the flow cannot start where no signal is left (alpha_bar = 0)")


class _Flow:
    """The equation of one batch, on flat float64 vectors of the host."""

    def __init__(self, model: Model, s: Levels, x: Array, name: str, prediction: str) -> None:
        self.given, self.like = x, native(x)
        if not is_native(self.like) or self.like.dtype.kind != "f" or self.like.ndim < 1:
            raise TypeError(f"{name} must be a float array with a batch axis, not {type(x).__name__}")
        self.model_rhs = ddim_ode_rhs(model, s, prediction)
        self.start = to_numpy(self.like).astype(np.float64)
        self.evaluations = 0

    def rhs(self, xbar: np.ndarray, sigma: float) -> np.ndarray:
        self.evaluations += 1
        state = array_module(self.like).asarray(xbar.astype(self.like.dtype))
        slope = to_numpy(self.model_rhs(restore(state, self.given), sigma)).astype(np.float64)
        if not np.isfinite(slope).all():
            raise RuntimeError(f"the model gave values that are not finite at sigma = {sigma:.6g}")
        return slope

    def solve(self, xbar: np.ndarray, sigma: float, sigma_to: float, rtol: float, atol: float, method: str) -> np.ndarray:
        try:
            from scipy.integrate import solve_ivp
        except ImportError as e:
            raise ImportError("the adaptive solver needs scipy (pip install scipy); tables.rk4 and tables.heun do not") from e
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, not {method!r}")
        if not (rtol > 0 and atol > 0):
            raise ValueError(f"rtol and atol must be positive, not {rtol} and {atol}")
        if xbar.size == 0:
            return xbar

        def flat(sigma: float, y: np.ndarray) -> np.ndarray:
            return self.rhs(y.reshape(xbar.shape), min(max(sigma, min(ends)), max(ends))).ravel()

        ends = float(sigma), float(sigma_to)
        found = solve_ivp(flat, ends, xbar.ravel(), method=method, rtol=rtol, atol=atol, t_eval=[ends[1]])
        if not found.success:
            raise RuntimeError(
                f"the probability flow could not be solved from sigma {ends[0]:.6g} to {ends[1]:.6g}: {found.message}"
            )
        return found.y[:, -1].reshape(xbar.shape)

    def end(self, x: np.ndarray) -> Solution:
        answer = array_module(self.like).asarray(x.astype(self.like.dtype))
        return Solution(restore(answer, self.given), self.evaluations)
