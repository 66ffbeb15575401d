"""Sampler tables of the probability-flow ODE by methods that keep ε from step to step: Adams–Bashforth, DEIS, PNDM."""

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np

from . import grids
from .exchange import check_schedule
from .grids import RHO, Grid
from .levels import Levels, Tabulated
from .rows import Affine, Level, Rows, flow, levels_at
from .table import Table
from .tables_flow import heun_step, path_of, rk4_step, runge_kutta_step

GAUSS_POINTS, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(24)
START_STEPS = (0, 0, 1, 2)  # by Runge–Kutta ahead of Adams–Bashforth of order 1..4, for a start of full order
FEW_STEPS = 15  # below, the last steps are of lower order


def adams_bashforth(
    s: Levels,
    steps: int = 25,
    order: int = 2,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
    full_order_start: bool = False,
) -> Table:
    """x'/a' = x/a + Σ_j w_j·ε_{−j}, w_j = ∫ L_j dσ̄, L_j the Lagrange polynomials of the last ``order`` σ̄, order 1..4.

    Also known as linear multistep (LMS) and ρAB-DEIS. The first rows use what history there is, so the start-up (Euler) limits
    the order to 2 as the steps go to 0. ``full_order_start`` makes the first step Heun's for order 3, and the first two steps
    Runge–Kutta's for order 4: 1 and 6 rows more. Source: Zhang & Chen 2023 (DEIS). Eq: S2-E14.
    """
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho)
    return _multistep("adams_bashforth", how, s, path_of(s, times, "adams_bashforth"), order, prediction, full_order_start)


def lms(
    s: Levels,
    steps: int = 25,
    order: int = 4,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """:func:`adams_bashforth` under the name and with the order of k-diffusion's ``sample_lms``. Eq: S2-E14."""
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho)
    return _multistep("lms", how, s, path_of(s, times, "lms"), order, prediction, False)


def deis(
    s: Levels,
    steps: int = 20,
    order: int = 2,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
    full_order_start: bool = False,
    final: str = "data",
    drop_lowest: bool = True,
    lower_order_final: bool = True,
) -> Table:
    """Exponential Adams–Bashforth (tAB-DEIS with t = ln σ̄): as :func:`adams_bashforth`, ε a polynomial in ln σ̄. Order 1..4.

        x'/a' = x/a + Σ_j w_j·ε_{−j},    w_j = ∫ L_j(ln σ̄) dσ̄

    The step to clean data, where ln σ̄ ends, is of order 1; ``final="lowest"`` stops at the lowest time instead, as diffusers
    does. ``drop_lowest`` and ``lower_order_final`` as in :func:`dpm_solver_pp`. Source: Zhang & Chen 2023, section 4. Eq: S2-E14.
    """
    times, how, last = multistep_times(s, steps, spacing, grid, sigmas, rho, final, drop_lowest)
    path = path_of(s, times, "deis", last)
    return _multistep("deis", how, s, path, order, prediction, full_order_start, True, lower_order_final)


def _multistep(
    name: str,
    how: str,
    s: Levels,
    path: list[Level],
    order: int,
    prediction: str,
    full_order_start: bool,
    logarithmic: bool = False,
    lower_order_final: bool = False,
) -> Table:
    """Adams–Bashforth along ``path``, in σ̄ or in ln σ̄, whose last step to clean data is of order 1."""
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4, not {order}")
    steps = len(path) - 1
    used = rising_orders(steps, order, path[-1].n == 0, lower_order_final) if logarithmic else [order] * steps
    rows = Rows(path[0])
    nodes: list[Level] = []  # where ε is known, latest first
    known: list[Affine] = []
    for i, (now, to) in enumerate(pairwise(path)):
        nodes = [now, *nodes][:order]
        if full_order_start and i < START_STEPS[order - 1] and to.n > 0:
            known = [heun_step(rows, to) if order == 3 else rk4_step(s, rows, to), *known]
            continue
        known = [rows.ask(), *known][:order]
        weights = lagrange_integrals([level.sigma for level in nodes[: used[i]]], to.sigma, logarithmic and used[i] > 1)
        rows.go(to, (to.a / now.a) * rows.x + to.a * weighted(weights, known))
    start = ", full-order start" if full_order_start else ""
    return rows.table(f"{name}({how}, order={order}{start})", prediction, stops=path[-1].n > 0)


def weighted(weights: Sequence[float] | np.ndarray, outputs: Sequence[Affine]) -> Affine:
    """Σ w_j·y_j, over the shorter of the two."""
    return reduce(add, (float(w) * y for w, y in zip(weights, outputs, strict=False)))


def rising_orders(steps: int, order: int, to_data: bool, lower_order_final: bool) -> list[int]:
    """The order of each step: 1, 2, … up to ``order``; 1 to clean data; with few steps 2 and 1 at the end."""
    few = lower_order_final and steps < FEW_STEPS
    orders = [min(order, i + 1) for i in range(steps)]
    if few:
        orders[-2:] = [min(2, o) for o in orders[-2:]]
    if few or to_data:
        orders[-1] = 1
    return orders


def lagrange_integrals(nodes: Sequence[float], stop: float, logarithmic: bool = False) -> np.ndarray:
    """∫ dσ̄ of each Lagrange polynomial of the nodes, in σ̄ or in ln σ̄, from the first node to ``stop``."""
    sigma = np.asarray(nodes, np.float64)
    if logarithmic:  # σ̄ = σ̄_0·e^u, dσ̄ = σ̄ du
        places, end = np.log(sigma / sigma[0]), np.log(stop / sigma[0])
    else:
        places, end = sigma - sigma[0], stop - sigma[0]
    u = end / 2 * (1 + GAUSS_POINTS)
    measure = end / 2 * GAUSS_WEIGHTS * (sigma[0] * np.exp(u) if logarithmic else 1.0)
    others = [np.delete(places, j) for j in range(len(places))]
    return np.array([np.prod((u[:, None] - o) / (p - o), axis=1) @ measure for p, o in zip(places, others, strict=True)])


def multistep_times(
    s: Levels, steps: int, spacing: str, grid: Grid, sigmas: Grid, rho: float, final: str, drop_lowest: bool
) -> tuple[np.ndarray, str, float]:
    """(times, how, the time at the end) of the solvers in λ: of steps + 1 spaced times the upper ones, where ``drop_lowest``."""
    check_schedule(s)
    if final not in ("data", "lowest"):
        raise ValueError(f"final must be 'data' or 'lowest', not {final!r}")
    if grid is None and sigmas is None and drop_lowest and spacing in ("leading", "linspace", "quadratic"):
        if isinstance(s, Tabulated) and steps == s.T:
            raise ValueError(f"steps must be below {s.T} (T) with drop_lowest, not {steps}")
        times, _ = grids.times(s, steps + 1, spacing, whole=True)
        times, how = times[1:], f"steps={steps}, {spacing}"
    else:
        times, how = grids.times(s, steps, spacing, grid, sigmas, rho)
    if final == "data":
        return times, how, 0.0
    if times[0] <= s.t_min:
        times = times[1:]  # the lowest time is the end itself
    if times.size == 0:
        raise ValueError(f"final='lowest' needs times above the lowest, {s.t_min:g}")
    return times, f"{how}, to t={s.t_min:g}", s.t_min


# ------------------------------------------------------------------------------------------------------ pseudo numerical methods

PSEUDO = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm(
    s: Levels,
    steps: int = 50,
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """Pseudo numerical methods: three pseudo Runge–Kutta steps, then pseudo linear multistep; steps + 9 rows, steps ≥ 4.

    Each step is DDIM's x' = a'·x0 + n'·ε with, in place of ε, the slope of a classical method for equal steps:

        Runge–Kutta   (k1 + 2·k2 + 2·k3 + k4)/6, with middles halfway in t (rounded down between whole times)
        multistep     (55·ε − 59·ε₋₁ + 37·ε₋₂ − 9·ε₋₃)/24

    Source: Liu et al. 2022 (PNDM), Algorithm 2 (F-PNDM). Eq: S2-E13.
    """
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho, whole=True)
    if times.size < 4:
        raise ValueError(f"steps must be at least 4 for pndm, not {times.size}")
    path = path_of(s, times, "pndm")
    rows = Rows(path[0])
    known: list[Affine] = []
    for i, (now, to) in enumerate(pairwise(path)):
        if i < 3:
            halfway = (now.t - to.t) / 2
            middle = levels_at(s, [to.t + (np.floor(halfway) if np.all(times == np.rint(times)) else halfway)])[0]
            known = [runge_kutta_step(rows, middle, to), *known]
        else:
            known = [rows.ask(), *known][:4]
            rows.go(to, flow(rows.x, now, to, weighted(PSEUDO[len(known) - 1], known)))
    return rows.table(f"pndm({how})", prediction)


def plms(
    s: Levels,
    steps: int = 50,
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """Pseudo linear multistep from the start: DDIM's step with the slopes of Adams–Bashforth for equal steps; steps + 1 rows.

    The first step is done twice, the second time with the mean of the slopes at its ends; then orders 2, 3, 4 as in :func:`pndm`.
    Source: Liu et al. 2022 (S-PNDM's start), as in latent diffusion's ``PLMSSampler``. Eq: S2-E13.
    """
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho, whole=True)
    path = path_of(s, times, "plms")
    rows = Rows(path[0])
    known: list[Affine] = []
    for i, (now, to) in enumerate(pairwise(path)):
        if i == 0:
            known = [heun_step(rows, to)]
        else:
            known = [rows.ask(), *known][:4]
            rows.go(to, flow(rows.x, now, to, weighted(PSEUDO[len(known) - 1], known)))
    return rows.table(f"plms({how})", prediction)
