"""Linear inverse problems y = A x0 + σ_y·n solved with a model of x0 that was never told of them. Eq: S4-M3.

:func:`ddrm` works in the spectrum of A and needs the model alone. The others steer by the gradient of log p(y|x_t) through the
model, for which they take ``vjp(x, t, u) -> (m, uᵀ∂m/∂x)``: m is the model's prediction, and u a function of m that returns an
array like it. What each assumes of p(x0|x_t), of mean x̂0(x_t):

    dps              a point at x̂0, with a step size of its own: a heuristic
    pigdm            N(x̂0, r²I): exact for data N(0, std²·I)
    moment_matching  N(x̂0, (n²/a)·∂x̂0/∂x), its true covariance: exact for any Gaussian data

A is an :class:`alphabar.core.operators.Operator`, y a batch of its answers, σ_y the deviation of the noise in y.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, native, restore, to_numpy
from . import samplers, tables
from .convert import coefficients, combined
from .exchange import Array, check_schedule, flat, lift
from .grids import Grid
from .inpainting import single_step
from .levels import Levels
from .operators import Operator
from .samplers import Model, answer_of, start_of
from .table import Table

__all__ = ["Vjp", "ddrm", "dps", "moment_matching", "pigdm"]

Vjp = Callable[[Array, Array, Callable[[Array], Array]], tuple[Array, Array]]


def ddrm(
    model: Model,
    s: Levels,
    operator: Operator,
    y: Array,
    x_T: Array,
    sigma_y: float = 0.0,
    steps: int = 20,
    eta: float = 0.85,
    eta_b: float = 1.0,
    spacing: str = "trailing",
    grid: Grid = None,
    prediction: str = "eps",
    clip: tuple[float, float] | None = None,
    seed: int = 0,
    first_sample: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Array:
    """DDRM: DDIM on each spectral coordinate, in which y is a noisy copy of x0 of deviation σ_y/s. Eq: S4-M3.

    With v = Vᵀx/a, w = Σ⁺Uᵀy, σ the level stepped to and σ⁺ the level stood at (n/a both), the next v is, by coordinate,

        s = 0            v̂0 + √(1−η²)·σ·(v − v̂0)/σ⁺ + η·σ·z
        σ < σ_y/s        v̂0 + √(1−η²)·σ·(w − v̂0)·s/σ_y + η·σ·z
        σ ≥ σ_y/s        (1−η_b)·v̂0 + η_b·w + √(σ² − η_b²·σ_y²/s²)·z

    x_T ~ N(0, prior_std²·I) as from :func:`samplers.prior`; the start is w + √(σ_T² − σ_y²/s²)·z there, σ_T·z where that is not
    possible. With σ_y = 0 and η_b = 1 the answer agrees with y exactly. Exact as steps grow for η = 0, σ_y = 0 and data whose
    spectral coordinates are independent; else an approximation (a coordinate that y measures is noised anew at each step, and
    below σ_y/s the model is not told of y). Noise from (seed, row, first_sample + k). ``clip`` bounds x̂0. Source: Kawar et al.
    2022, Eq. 7 and 8; its defaults are η = 0.85, η_b = 1.
    """
    check_schedule(s)
    for name, value in (("eta", eta), ("eta_b", eta_b)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {value}")
    _noise_level(sigma_y)
    levels = tables.ddim(s, steps, 0.0, spacing, grid, prediction)  # for its levels and times
    if levels.signal[0] == 0:
        raise ValueError("ddrm cannot start where no signal is left (alpha_bar = 0): end the grid below T")
    z = start_of(x_T)
    xp = array_module(z)
    measured = _measured(operator, y, z)
    w = operator.observed(measured)
    sigma, sigma_to = levels.noise / levels.signal, levels.noise_to / levels.signal_to
    P, Q = coefficients(prediction, "x0", levels.signal, levels.noise)
    own = np.divide(sigma_y, operator.singular, out=np.full(operator.shape, np.inf), where=operator.singular > 0)  # σ_y/s

    def column(values: Any) -> Array:
        return xp.asarray(values).astype(z.dtype)

    seen = own <= sigma[0]
    spread = np.sqrt(sigma[0] ** 2 - np.where(seen, own, 0) ** 2) / s.prior_std
    v = column(spread) * operator.to_spectrum(z) + column(seen) * w
    x = float(levels.signal[0]) * operator.from_spectrum(v)
    for i in range(len(levels)):
        t = restore(xp.full(x.shape[0], levels.times[i]), x_T)
        x0 = combined(P[i], x, Q[i], answer_of(model(restore(x, x_T), t), x, "model"))
        if clip is not None:
            x0 = xp.clip(x0, *clip)
        on_v, on_w, on_z = _ddrm_row(own, sigma[i], sigma_to[i], eta, eta_b)
        v0 = operator.to_spectrum(x0)
        v = column(1 - on_v - on_w) * v0 + column(on_v) * operator.to_spectrum(x / float(levels.signal[i])) + column(on_w) * w
        if np.any(on_z):
            noise = kernels.normals(xp.empty(x.shape, x.dtype), seed, step=i, stream=streams.SAMPLER, first_sample=first_sample)
            v = v + column(on_z) * noise
        x = float(levels.signal_to[i]) * operator.from_spectrum(v)
        if progress is not None:
            progress(i + 1, len(levels))
    return restore(x, x_T)


def _ddrm_row(own: np.ndarray, sigma: float, sigma_to: float, eta: float, eta_b: float) -> tuple[np.ndarray, ...]:
    """The factors of v, w and z by coordinate; that of v̂0 is 1 less the first two."""
    blind, late = np.isinf(own), own > sigma_to
    keep = np.sqrt(1 - eta**2) * sigma_to
    on_v = np.where(blind, keep / sigma, 0.0)
    on_w = np.where(blind, 0.0, np.where(late, keep / np.where(late, own, 1), eta_b))
    known = np.where(late, 0.0, own)
    return on_v, on_w, np.where(late, eta * sigma_to, np.sqrt(np.maximum(sigma_to**2 - (eta_b * known) ** 2, 0)))


def dps(
    vjp: Vjp,
    table: Table,
    x_T: Array,
    operator: Operator,
    y: Array,
    zeta: float = 1.0,
    clip: tuple[float, float] | None = None,
    rederive_eps: bool = True,
    seed: int = 0,
    first_sample: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Array:
    """DPS: each row of ``table``, then a step of length ζ against ∇_x ‖y − A x̂0(x)‖, sample by sample. Eq: S4-M3.

        x' = row(x) − ζ·∇_x ‖y − A x̂0(x)‖ = row(x) + ζ·(∂x̂0/∂x)ᵀAᵀr/‖r‖,    r = y − A x̂0(x)

    ζ is the ``scale`` of the authors' code; the paper's ζ', on the gradient of the square over the norm, is half of it. The
    sampler of the paper is tables.ddpm(s); for tables with fewer rows ζ wants to grow. The law that comes out is not the
    posterior: ζ is set by eye. Not for tables that store outputs. Other arguments as in :func:`samplers.sample`; ``clip`` bounds
    the x̂0 of the row, not the one of the gradient. Source: Chung et al. 2023, Algorithm 1 and section 3.3.
    """
    single_step(table)
    if not 0 <= zeta < np.inf:
        raise ValueError(f"zeta must be finite and not negative, not {zeta}")
    x = start_of(x_T)
    measured = _measured(operator, y, x)
    P, Q = coefficients(table.prediction, "x0", table.signal, table.noise)
    at, pending = 0, None

    def correct(state: Array, i: int) -> Array:
        nonlocal at
        at = i
        return state if pending is None else restore(native(state) + pending, x_T)

    def model(state: Array, t: Array) -> Array:
        nonlocal pending
        here, p, q = native(state), float(P[at]), float(Q[at])

        def pull(m: Array) -> Array:
            rest = measured - operator(combined(p, here, q, answer_of(m, here, "vjp")))
            length = _lengths(rest)
            return restore(operator.adjoint(rest / _shaped(length, rest)), x_T)

        m, back, u = _pulled(vjp, state, t, pull)
        pending = combined(zeta * p, u, zeta * q, back)
        return restore(m, x_T)

    options: dict[str, Any] = {"seed": seed, "first_sample": first_sample, "clip": clip, "rederive_eps": rederive_eps}
    last = samplers.sample(model, table, x_T, progress=progress, before=correct, **options)
    return restore(native(last) + pending, x_T)


def pigdm(
    vjp: Vjp, s: Levels, operator: Operator, y: Array, sigma_y: float = 0.0, prediction: str = "eps", data_std: float = 1.0
) -> Model:
    """ΠGDM: the model(x, t) whose score has ∇ log N(y; A x̂0, r²AAᵀ + σ_y²I) added, for any table. Eq: S4-M3.

        r² = n²·std²/(a²·std² + n²),    score += (∂x̂0/∂x)ᵀ·V·Σ²/(r²Σ² + σ_y²)·(Σ⁺Uᵀy − Vᵀx̂0)

    ``data_std`` is the deviation of one element of the data; at 1 (the paper's) r² is 1 − ᾱ for a schedule. Exact for data N(0,
    std²·I) and any A, so that a solver of enough steps then draws from the posterior. Source: Song et al. 2023 (ΠGDM), Eq. 7 and
    section 3.2; its algorithm multiplies the gradient by r² once more, which is left out here.
    """
    _noise_level(sigma_y)
    check_schedule(s)
    if not 0 < data_std < np.inf:
        raise ValueError(f"data_std must be positive and finite, not {data_std}")

    def gradient(x: Array, t: Array, level: "_Level") -> tuple[Array, Array]:
        xp, here = array_module(native(x)), native(x)
        measured = _measured(operator, y, here)
        measured = operator.observed(measured)
        r2 = (level.noise * data_std) ** 2 / ((level.signal * data_std) ** 2 + level.noise**2)
        square = operator.singular**2
        below = np.multiply.outer(r2, square) + sigma_y**2
        weight = xp.asarray(np.where(square > 0, square / np.where(below > 0, below, 1), 0)).astype(here.dtype)

        def pull(m: Array) -> Array:
            x0 = level.x0(here, answer_of(m, here, "vjp"))
            return restore(operator.from_spectrum(weight * (measured - operator.to_spectrum(x0))), x)

        m, back, u = _pulled(vjp, x, t, pull)
        return m, level.x0(u, back)

    return _guided(gradient, s, prediction)


def moment_matching(
    vjp: Vjp, s: Levels, operator: Operator, y: Array, sigma_y: float = 0.0, prediction: str = "eps", iterations: int = 5
) -> Model:
    """The model(x, t) whose score has ∇ log N(y; A x̂0, A C Aᵀ + σ_y²I) added, C = (n²/a)·∂x̂0/∂x = Cov[x0|x_t]. Eq: S4-M3.

        (A C Aᵀ + σ_y²I)·w = y − A x̂0,    score += (a/n²)·C·Aᵀw

    The equation is solved by ``iterations`` conjugate-gradient steps of one vjp each.
    Exact for Gaussian data of any covariance once the iterations reach the number of elements of y (sooner in practice). C is
    symmetric for a perfect model and taken to be so; where an imperfect one makes A C Aᵀ negative along a direction, a sample
    stays with what it has. Source: Rozet et al. 2024 (MMPS), section 3.
    """
    _noise_level(sigma_y)
    check_schedule(s)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")

    def gradient(x: Array, t: Array, level: "_Level") -> tuple[Array, Array]:
        here = native(x)
        xp, measured = array_module(here), _measured(operator, y, here)
        spread = lift(level.noise**2 / level.signal, here)
        rest: Array = None

        def pull(m: Array) -> Array:
            nonlocal rest
            rest = measured - operator(level.x0(here, answer_of(m, here, "vjp")))
            return restore(operator.adjoint(rest), x)

        m, back, u = _pulled(vjp, x, t, pull)
        total, p, square = xp.zeros_like(here), rest, _dot(rest, rest)
        least = 1e-20 * square
        for k in range(iterations):
            if k > 0:
                u = operator.adjoint(p)
                back = answer_of(vjp(x, t, _constant(restore(u, x)))[1], here, "vjp")
            moved = level.x0(u, back)  # (∂x̂0/∂x)ᵀAᵀp
            image = operator(spread * moved) + sigma_y**2 * p
            curve = _dot(p, image)
            good = (curve > 0) & (square > least)
            size = xp.where(good, square / xp.where(good, curve, 1), 0)
            total, rest = total + _shaped(size, here) * moved, rest - _shaped(size, rest) * image
            fresh = _dot(rest, rest)
            p = rest + _shaped(xp.where(good, fresh / xp.where(good, square, 1), 0), p) * p
            square = fresh
        return m, total

    return _guided(gradient, s, prediction)


class _Level:
    """Levels (B,) of the times of a call, and x̂0 = P·x + Q·m at them."""

    def __init__(self, s: Levels, t: Array, prediction: str) -> None:
        self.signal, self.noise = s.levels(to_numpy(t))
        self.P, self.Q = coefficients(prediction, "x0", self.signal, self.noise)
        _, self.on_eps = coefficients(prediction, "eps", self.signal, self.noise)

    def x0(self, x: Array, m: Array) -> Array:
        return lift(self.P, x) * x + lift(self.Q, x) * m


def _guided(gradient: Callable[[Array, Array, _Level], tuple[Array, Array]], s: Levels, prediction: str) -> Model:
    """The model whose ε is less by n·G, where gradient(x, t, level) gives (m, G), in terms of its prediction."""

    def model(x: Array, t: Array) -> Array:
        level = _Level(s, t, prediction)
        m, g = gradient(x, t, level)
        return restore(m + lift(-level.noise / level.on_eps, g) * g, x)

    return model


def _pulled(vjp: Vjp, x: Array, t: Array, pull: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """(m, uᵀJ, u) with u = pull(m)."""
    kept: list[Array] = []

    def remember(m: Array) -> Array:
        kept.append(pull(m))
        return kept[-1]

    m, back = vjp(x, t, remember)
    here = native(x)
    return answer_of(m, here, "vjp"), answer_of(back, here, "vjp"), native(kept[-1])


def _constant(u: Array) -> Callable[[Array], Array]:
    return lambda m: u


def _measured(operator: Operator, y: Any, x: Array) -> Array:
    """y as an array of the library and dtype of x, checked against the operator."""
    if not isinstance(operator, Operator):
        raise TypeError(f"operator must be an Operator (operators.box(shape, 2) for one), not {type(operator).__name__}")
    want = (x.shape[0], *operator.shape_out)
    a = native(y)
    if np.shape(a) != want:
        raise ValueError(f"y must have shape {want}, not {np.shape(a)}")
    if x.shape[1:] != operator.shape:
        raise ValueError(f"the operator takes samples of shape {operator.shape}, not {x.shape[1:]}")
    return array_module(x).asarray(a).astype(x.dtype, copy=False)


def _noise_level(sigma_y: float) -> None:
    if not 0 <= sigma_y < np.inf:
        raise ValueError(f"sigma_y must be finite and not negative, not {sigma_y}")


def _dot(a: Array, b: Array) -> Array:
    """The inner product of each sample (B,), float64."""
    xp = array_module(a)
    return flat(a * b).sum(axis=1, dtype=xp.float64)


def _lengths(a: Array) -> Array:
    """The norm of each sample (B,), float64; 1 where it is 0."""
    xp = array_module(a)
    length = xp.sqrt(_dot(a, a))
    return xp.where(length > 0, length, 1)


def _shaped(values: Array, like: Array) -> Array:
    """Values (B,) as factors of ``like``."""
    return values.astype(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))
