"""Samplers as tables: one short function for each paper. Nothing here loops over an image or knows a device; see :class:`Table`.

Common arguments: ``s`` the process, a schedule, a ladder or an SDE; ``steps`` and ``spacing`` the times, as in
:func:`schedules.timesteps`, or ``grid`` the ascending times themselves, in (0, T] (between whole times the levels are
interpolated: :meth:`Schedule.levels`); ``prediction`` what the model returns: "eps", "x0", "v" or "score". Every sampler steps
down its times and from the lowest one to clean data.

The levels are a (signal) and n (noise), √ᾱ and √(1−ᾱ) for a schedule; σ̄ = n/a is the noise level of x/a, in which the
probability-flow ODE reads d(x/a) = ε dσ̄ (Eq: S2-E14).
"""

from collections.abc import Sequence

import numpy as np

from . import forward
from .exchange import check_schedule
from .levels import Levels, Tabulated, step_variance
from .table import Table, table

__all__ = [
    "Table",
    "adams_bashforth",
    "ddim",
    "ddim_encode",
    "ddpm",
    "dpm_solver_pp",
    "euler",
    "euler_maruyama",
    "heun",
    "reverse_diffusion",
    "rk4",
]

Grid = Sequence[float] | np.ndarray | None
KARRAS_RHO = 7.0
CONTINUOUS_STEPS = 1000
GAUSS_POINTS, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(4)


def _times(s: Levels, steps: int | None, spacing: str, grid: Grid) -> tuple[np.ndarray, str]:
    """(ascending times as float64, how they were made); ``steps`` None is T, 1000 for a continuous process."""
    check_schedule(s)
    if steps is None:
        steps = s.T if isinstance(s, Tabulated) else CONTINUOUS_STEPS
    if grid is None:
        return s.times(steps, spacing), f"steps={steps}, {spacing}"
    times = np.array(grid, np.float64)
    if times.ndim != 1 or times.size == 0 or not np.all(np.isfinite(times)):
        raise ValueError(f"grid must be a list of times, not an array of shape {times.shape}")
    if times[0] <= 0 or times[-1] > s.T or np.any(np.diff(times) <= 0):
        raise ValueError(f"grid must ascend strictly within (0, {s.T:g}], not {times[0]:g}..{times[-1]:g}")
    return times, f"steps={times.size}, grid"


def _ode_times(s: Levels, steps: int, spacing: str, grid: Grid) -> tuple[np.ndarray, str]:
    """As :func:`_times`, for solvers that may stop between whole times: "linspace" is not rounded and "karras" is a choice."""
    check_schedule(s)
    if grid is None and spacing in ("linspace", "karras"):
        s.times(steps, "linspace")  # checks steps
        times = np.linspace(s.t_min, s.T, steps) if steps > 1 else np.array([s.t_min])
        if spacing == "karras":  # σ̄ between the same ends, equal steps of σ̄^(1/ρ); Karras et al. 2022, Eq. 5
            low, high = s.sigma_bar_at([s.t_min, s.T])
            ramp = np.linspace(high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO), steps)[::-1] ** KARRAS_RHO
            times = s.time(np.clip(ramp, low, high))
        return times, f"steps={steps}, {spacing}"
    return _times(s, steps, spacing, grid)


def _down(s: Levels, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(t, t_to, a, n): the steps T → … → 0; a and n have one level more than there are steps."""
    path = np.r_[times[::-1], 0.0]
    a, n = s.levels(path)
    return path[:-1], path[1:], a, n


def _sigma_bar(a: np.ndarray, n: np.ndarray, name: str) -> np.ndarray:
    if a[0] == 0:
        raise ValueError(f"{name} cannot start where no signal is left (alpha_bar = 0): use ddim, or end the grid below T")
    return n / a


# --------------------------------------------------------------------------------------------------------------- DDPM and DDIM


def ddpm(
    s: Levels,
    steps: int | None = None,
    variance: str = "posterior",
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
) -> Table:
    """Ancestral sampling: the posterior mean at the predicted x0, plus noise. Eq: S0-E28, S0-E31, S1-A2, S1-E17, S3-E6, S4-A2.

        β = 1 − ᾱ_t/ᾱ_to,    x' = √(1−β)·(1−ᾱ_to)/(1−ᾱ_t)·x + √ᾱ_to·β/(1−ᾱ_t)·x0 + σz

    ``steps`` defaults to T, 1000 for an SDE. ``variance``: "posterior" σ² = β̃ = (1−ᾱ_to)/(1−ᾱ_t)·β, or "beta" σ² = β. On a ladder
    β = σ_t² − σ_to² and β̃ = σ_to²·β/σ_t². No noise in the last step. Source: Ho et al. 2020, Algorithm 2; Song et al. 2021 (score
    SDE), appendix F.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance must be 'posterior' or 'beta', not {variance!r}")
    times, how = _times(s, steps, spacing, grid)
    t, t_to, a, n = _down(s, times)
    shrink, beta = (n[1:] / n[:-1]) ** 2, step_variance(a[:-1], n[:-1], a[1:], n[1:])
    posterior = shrink * beta
    excess = np.where(t_to > 0, beta - posterior, 0.0) if variance == "beta" else np.zeros_like(beta)
    A, B0 = a[:-1] / a[1:] * shrink, a[1:] * beta / n[:-1] ** 2
    c = np.sqrt(posterior + excess)
    return table(f"ddpm({how}, variance={variance})", prediction, t, a, n, A=A, B0=B0, c=c, excess=excess)


def ddim(
    s: Levels,
    steps: int = 50,
    eta: float = 0.0,
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
    sigma: str = "eta",
) -> Table:
    """x' = √ᾱ_to·x0 + √(1−ᾱ_to−σ²)·ε + σz, σ = η·√((1−ᾱ_to)/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_to). Eq: S0-E47, S0-E49, S2-E12, S2-E16, S4-E47.

    η multiplies the standard deviation; 0 is deterministic, 1 is :func:`ddpm`. ``sigma="hat"`` adds σ̂ = √(1−ᾱ_t/ᾱ_to) instead
    while the direction term keeps σ(η = 1) (Eq: S2-U5; ``eta`` is then not used). Source: Song et al. 2021 (DDIM), Eq. 12, 16.
    """
    if sigma not in ("eta", "hat"):
        raise ValueError(f"sigma must be 'eta' or 'hat', not {sigma!r}")
    eta = 1.0 if sigma == "hat" else eta
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    times, how = _times(s, steps, spacing, grid)
    t, t_to, a, n = _down(s, times)
    c = forward.ddim_sigma(t, t_to, s, eta)
    Be, excess = np.sqrt(n[1:] ** 2 - c**2), np.zeros_like(c)
    if sigma == "hat":
        hat = np.where(t_to > 0, forward.ddim_sigma_hat(t, t_to, s), 0.0)
        excess, c = hat**2 - c**2, hat
    name = f"ddim({how}, {'sigma=hat' if sigma == 'hat' else f'eta={eta:g}'})"
    return table(name, prediction, t, a, n, B0=a[1:], Be=Be, c=c, excess=excess)


def ddim_encode(
    s: Levels, steps: int = 50, spacing: str = "leading", grid: Grid = None, prediction: str = "eps", label: str = "target"
) -> Table:
    """DDIM with η = 0 run forwards, clean data to x_T: x' = √ᾱ_to·x0 + √(1−ᾱ_to)·ε. Eq: S2-E13, S2-C15, S2-C17.

    ``label`` is the time told to the model: "target" that of the level it steps to, "current" that of the level it stands at (the
    lowest time for clean data itself). "target" inverts the decoder more closely. ``prediction``: "eps" or "v".
    """
    if label not in ("target", "current"):
        raise ValueError(f"label must be 'target' or 'current', not {label!r}")
    if prediction not in ("eps", "v"):
        raise ValueError(f"prediction must be 'eps' or 'v' (at clean data the others leave ε open), not {prediction!r}")
    times, how = _times(s, steps, spacing, grid)
    a, n = s.levels(np.r_[0.0, times])
    t = times if label == "target" else np.r_[times[0], times[:-1]]
    return table(f"ddim_encode({how}, label={label})", prediction, t, a, n, B0=a[1:], Be=n[1:])


# -------------------------------------------------------------------------------------------------- the probability-flow ODE


def euler(s: Levels, steps: int = 50, spacing: str = "linspace", grid: Grid = None, prediction: str = "eps") -> Table:
    """x'/a' = x/a + (σ̄' − σ̄)·ε, which is x' = a'·x0 + n'·ε: order 1. Eq: S2-E13, S2-E14.

    ``spacing`` may also be "karras" (steps of σ̄^(1/7)); "linspace" may stop between whole times, so the model then gets floats.
    """
    times, how = _ode_times(s, steps, spacing, grid)
    t, _, a, n = _down(s, times)
    return table(f"euler({how})", prediction, t, a, n, B0=a[1:], Be=n[1:])


def heun(s: Levels, steps: int = 25, spacing: str = "linspace", grid: Grid = None, prediction: str = "eps") -> Table:
    """Euler to σ̄', then x'/a' += ½(σ̄' − σ̄)·(ε' − ε): order 2, two rows a step, 2·steps − 1 in all (the last is Euler's).

    Spacings as in :func:`euler`. Source: Karras et al. 2022, Algorithm 1. Eq: S2-E14.
    """
    times, how = _ode_times(s, steps, spacing, grid)
    t, t_to, a, n = _down(s, times)
    sigma = _sigma_bar(a, n, "heun")
    rows = 2 * len(t) - 1
    first, second = np.arange(0, rows, 2), np.arange(1, rows, 2)
    t_all, B0, Be, A, H = np.empty(rows), np.zeros(rows), np.zeros(rows), np.zeros(rows), np.zeros((rows, 3))
    t_all[first], t_all[second] = t, t_to[:-1]
    B0[first], Be[first] = a[1:], n[1:]
    half = a[1:-1] * (sigma[1:-1] - sigma[:-2]) / 2
    A[second], Be[second], H[second, 0] = 1, half, -half
    levels = np.r_[0, np.repeat(np.arange(1, len(t)), 2), len(t)]
    return table(f"heun({how})", prediction, t_all, a[levels], n[levels], A=A, B0=B0, Be=Be, H=H)


def rk4(s: Levels, steps: int = 12, spacing: str = "linspace", grid: Grid = None, prediction: str = "eps") -> Table:
    """The classical Runge–Kutta method in σ̄: order 4, four rows a step, 4·steps − 3 in all (the last is Euler's).

        h = σ̄' − σ̄;  k1 = ε(x̄, σ̄), k2 = ε(x̄ + ½h·k1, σ̄ + ½h), k3 = ε(x̄ + ½h·k2, σ̄ + ½h), k4 = ε(x̄ + h·k3, σ̄')
        x̄' = x̄ + h/6·(k1 + 2·k2 + 2·k3 + k4),    x̄ = x/a

    Spacings as in :func:`euler`; the model is also asked halfway in σ̄ between the times. Eq: S2-E14.
    """
    times, how = _ode_times(s, steps, spacing, grid)
    ends = np.r_[times[::-1], 0.0]
    sigma_ends = _sigma_bar(*s.levels(ends), "rk4")
    halfway = s.time((sigma_ends[:-2] + sigma_ends[1:-1]) / 2)
    path = np.r_[np.stack([ends[:-2], halfway, halfway, ends[1:-1]], axis=1).ravel(), ends[-2:]]  # where rows start and end
    a, n = s.levels(path)
    sigma = n / a
    rows = 4 * len(halfway) + 1
    A, B0, Be, H = np.zeros(rows), np.zeros(rows), np.zeros(rows), np.zeros((rows, 3))
    first, second, third, fourth = (np.arange(j, rows - 1, 4) for j in range(4))
    to_middle, h = sigma[second] - sigma[first], sigma[fourth] - sigma[first]
    for euler_rows in (first, rows - 1):
        B0[euler_rows], Be[euler_rows] = a[euler_rows + 1], n[euler_rows + 1]
    A[second], Be[second], H[second, 0] = 1, a[second] * to_middle, -a[second] * to_middle
    A[third], Be[third], H[third, 0] = a[fourth] / a[third], a[fourth] * h, -a[fourth] * to_middle
    A[fourth], Be[fourth] = 1, a[fourth] * h / 6
    H[fourth] = (a[fourth] * h)[:, None] * np.array([-2 / 3, 1 / 3, 1 / 6])
    return table(f"rk4({how})", prediction, path[:-1], a, n, A=A, B0=B0, Be=Be, H=H)


def dpm_solver_pp(
    s: Levels,
    steps: int = 20,
    order: int = 2,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    drop_lowest: bool = True,
    taylor: bool = False,
) -> Table:
    """DPM-Solver++ (multistep): the exponential integrator of x0 over λ = ln(a/n). Source: Lu et al. 2022 (++), Algorithm 2.

        h = λ' − λ;  x' = n'/n·x + a'(1−e^{−h})·x0 + …    order 2: … = a'(1−e^{−h})·(x0 − x0₋₁)/(2r), r = h₋₁/h

    Orders start at 1 and rise by 1 a row; the last row, to λ' = ∞, is of order 1. ``order=3`` is the multistep form in general
    use, which counts the second derivative by half and so converges with order 2; ``taylor=True`` counts it in full, for order
    3. ``spacing`` may be "karras". With ``drop_lowest`` the times are the upper ``steps`` of steps + 1 spaced ones (the usual
    grid of this solver); a ``grid`` is taken as it is.
    """
    check_schedule(s)
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, not {order}")
    if grid is None and spacing != "karras":
        if drop_lowest and steps == s.T and isinstance(s, Tabulated):
            raise ValueError(f"steps must be below {s.T} (T) with drop_lowest, not {steps}")
        times = s.times(steps + drop_lowest, spacing)[int(drop_lowest) :]
        how = f"steps={steps}, {spacing}"
    else:
        times, how = _ode_times(s, steps, spacing, grid)
    t, _, a, n = _down(s, times)
    _sigma_bar(a, n, "dpm_solver_pp")
    lam = np.log(a[:-1] / n[:-1])
    phi1 = 1 - (n[1:] / n[:-1]) * (a[:-1] / a[1:])  # 1 − e^{−h}, 1 in the last row
    B0, H = a[1:] * phi1, np.zeros((len(t), 3))
    for i in range(1, len(t) - 1):
        h, h1 = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
        if order == 2 or (order == 3 and i == 1):
            on_d1 = a[i + 1] * phi1[i] / 2  # D1 = (x0 − x0₋₁)/r
            B0[i] += on_d1 * h / h1
            H[i, 0] = -on_d1 * h / h1
        elif order == 3:
            r0, r1 = h1 / h, (lam[i - 1] - lam[i - 2]) / h
            on_d1, on_d2 = a[i + 1] * (1 - phi1[i] / h), a[i + 1] * (phi1[i] / h**2 - 1 / h + 0.5)
            # D10 = (y0 − y1)/r0, D11 = (y1 − y2)/r1, D2 = (D10 − D11)/(r0 + r1), D1 = D10 + r0·D2; h²·y'' is 2·D2
            on_d2 = (on_d1 * r0 + (2 if taylor else 1) * on_d2) / (r0 + r1)
            on_d10, on_d11 = on_d1 + on_d2, -on_d2
            B0[i] += on_d10 / r0
            H[i, :2] = on_d11 / r1 - on_d10 / r0, -on_d11 / r1
    name = f"dpm_solver_pp({how}, order={order}{', taylor' if taylor else ''})"
    return table(name, prediction, t, a, n, A=n[1:] / n[:-1], B0=B0, H=H, history="x0")


def adams_bashforth(
    s: Levels, steps: int = 25, order: int = 2, spacing: str = "linspace", grid: Grid = None, prediction: str = "eps"
) -> Table:
    """x'/a' = x/a + Σ_j w_j·ε_{−j}, w_j = ∫ L_j dσ̄, L_j the Lagrange polynomials of the last ``order`` σ̄.

    Also known as linear multistep (LMS) and ρAB-DEIS. The first rows use what history there is, so the start-up (Euler) limits
    the order to 2 as the steps go to 0. Spacings as in :func:`euler`. Source: Zhang & Chen 2023 (DEIS). Eq: S2-E14.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, not {order}")
    times, how = _ode_times(s, steps, spacing, grid)
    t, _, a, n = _down(s, times)
    sigma = _sigma_bar(a, n, "adams_bashforth")
    H = np.zeros((len(t), 3))
    for i in range(len(t)):
        k = min(order, i + 1)
        H[i, : k - 1] = a[i + 1] * _lagrange_integrals(sigma[i - k + 1 : i + 1][::-1], sigma[i + 1])[1:]
    Be = n[1:] - H.sum(axis=1)  # the polynomials sum to 1, so a'·σ̄ + a'·w_0 is this
    return table(f"adams_bashforth({how}, order={order})", prediction, t, a, n, B0=a[1:], Be=Be, H=H)


def _lagrange_integrals(nodes: np.ndarray, stop: float) -> np.ndarray:
    """∫ of each Lagrange polynomial of the nodes, from the first node to stop (at most 4 nodes: 4-point Gauss is exact)."""
    u = (stop + nodes[0]) / 2 + (stop - nodes[0]) / 2 * GAUSS_POINTS
    others = [np.delete(nodes, j) for j in range(len(nodes))]
    basis = [np.prod((u[:, None] - o) / (node - o), axis=1) for node, o in zip(nodes, others, strict=True)]
    return (stop - nodes[0]) / 2 * (np.array(basis) @ GAUSS_WEIGHTS)


# ----------------------------------------------------------------------------------------------------------- the reverse SDE


def euler_maruyama(
    s: Levels,
    steps: int | None = None,
    spacing: str = "trailing",
    grid: Grid = None,
    prediction: str = "eps",
    probability_flow: bool = False,
) -> Table:
    """Euler–Maruyama on the reverse SDE dx = (f·x − g²·score) dt + g dw̄, dt < 0. Eq: S4-E66, S4-E69, S4-C18.

        x' = (1 − F)·x + G·score + √G·z,    F = ∫f, G = ∫g² over the step (s.increments)

    For an SDE the integrals are step × the value at t, the textbook scheme; for a schedule F = −B/2 and G = B = ln(ᾱ_to/ᾱ_t);
    for a ladder F = 0 and G = σ_t² − σ_to². ``probability_flow`` takes half the score and no noise: Euler's method for
    dx = (f·x − ½g²·score) dt in t. ``steps`` defaults to T, 1000 for an SDE. The rows carry the marginals only to second order in
    the step, so the laws are not asserted (``exact`` is False). No noise in the last step. Source: Song et al. 2021 (score SDE),
    Eq. 6 and 13.
    """
    times, how = _times(s, steps, spacing, grid)
    t, t_to, a, n = _down(s, times)
    _sigma_bar(a, n, "euler_maruyama")
    F, G = s.increments(t, t_to)
    return _reverse("euler_maruyama", how, prediction, probability_flow, t, t_to, a, n, 1 - F, G)


def reverse_diffusion(
    s: Levels,
    steps: int | None = None,
    spacing: str = "trailing",
    grid: Grid = None,
    prediction: str = "eps",
    probability_flow: bool = False,
) -> Table:
    """The forward step x_t = k·x_to + √v·z turned round: x' = (2 − k)·x + v·score + √v·z. Eq: S4-E66, S4-C18.

    k = a_t/a_to and v = n_t² − k²·n_to² are exact: (√α, β) for a schedule, (1, σ_t² − σ_to²) for a ladder. ``probability_flow``,
    ``steps`` and the last step as in :func:`euler_maruyama`; the laws hold to second order in the step. Source: Song et al. 2021
    (score SDE), appendix E. Its ancestral sampling (appendix F) is :func:`ddpm`.
    """
    times, how = _times(s, steps, spacing, grid)
    t, t_to, a, n = _down(s, times)
    _sigma_bar(a, n, "reverse_diffusion")
    v = step_variance(a[:-1], n[:-1], a[1:], n[1:])
    return _reverse("reverse_diffusion", how, prediction, probability_flow, t, t_to, a, n, 2 - a[:-1] / a[1:], v)


def _reverse(
    name: str,
    how: str,
    prediction: str,
    probability_flow: bool,
    t: np.ndarray,
    t_to: np.ndarray,
    a: np.ndarray,
    n: np.ndarray,
    A: np.ndarray,
    added: np.ndarray,
) -> Table:
    """x' = A·x + added·score + √added·z, or half of the score and no noise."""
    if probability_flow:
        return table(f"{name}({how}, probability_flow)", prediction, t, a, n, A=A, Be=-added / (2 * n[:-1]), exact=False)
    c = np.where(t_to > 0, np.sqrt(added), 0.0)
    return table(f"{name}({how})", prediction, t, a, n, A=A, Be=-added / n[:-1], c=c, exact=False)
