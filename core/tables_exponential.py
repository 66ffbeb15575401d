"""Sampler tables that integrate the linear part exactly, over λ = ln(a/n): DPM-Solver, DPM-Solver++, their SDE forms, UniPC.

With h = λ' − λ and φ_1(z) = e^z − 1, φ_{k+1}(z) = φ_k(z)/z − 1/k!, a Taylor expansion of the model's output over λ gives

    ε-form    x' = a'/a·x − n'·(φ_1·ε + φ_2·h·dε/dλ + φ_3·h²·d²ε/dλ² + …),                     z = h
    x0-form   x' = n'/n·e^{−ηh}·x − a'·(φ_1·x0 + φ_2·h·dx0/dλ + φ_3·h²·d²x0/dλ² + …) + c·z,    z = −(1+η)h

with c = n'·√(1 − e^{−2ηh}): η = 0 is the ODE, η = 1 the reverse SDE.
"""

from itertools import pairwise

import numpy as np

from .grids import RHO, Grid
from .levels import Levels
from .rows import Affine, Level, Rows
from .table import Table
from .tables_flow import path_of
from .tables_multistep import multistep_times, rising_orders, weighted

METHODS = ("multistep", "singlestep")
SOLVER_TYPES = ("midpoint", "heun")
MOST_ORDER = 3


class Exponential:
    """The exponential steps of one form: ``history`` "eps" or "x0", with η of the SDE for the latter."""

    def __init__(self, history: str, solver_type: str, eta: float = 0.0, taylor: bool = False) -> None:
        if solver_type not in SOLVER_TYPES:
            raise ValueError(f"solver_type must be one of {SOLVER_TYPES}, not {solver_type!r}")
        if not 0 <= eta < np.inf:
            raise ValueError(f"eta must be at least 0 and finite, not {eta}")
        self.data, self.midpoint, self.eta, self.curvature = history == "x0", solver_type == "midpoint", eta, 2 if taylor else 1

    def first(self, x: Affine, start: Level, to: Level, y: Affine) -> Affine:
        """The step of order 1."""
        if not self.data:
            return (to.a / start.a) * x + (to.n - to.a * start.sigma) * y
        if to.n == 0:
            return to.a * y
        h = to.lam - start.lam
        return (to.n / start.n * np.exp(-self.eta * h)) * x - (to.a * np.expm1(-(1 + self.eta) * h)) * y

    def phis(self, start: Level, to: Level) -> tuple[float, float, float, float]:
        """(h, φ_1, φ_2, φ_3), the φ times −a' or −n'."""
        h = to.lam - start.lam
        z = -(1 + self.eta) * h if self.data else h
        one = np.expm1(z)
        two = one / z - 1
        k = -to.a if self.data else -to.n
        return h, k * one, k * two, k * (two / z - 0.5)

    def noise(self, start: Level, to: Level) -> float:
        """c of the step; clean data gets no noise."""
        return float(to.n * np.sqrt(-np.expm1(-2 * self.eta * (to.lam - start.lam)))) if to.n > 0 and self.eta else 0.0

    def multistep(self, x: Affine, nodes: list[Level], to: Level, y: list[Affine], order: int) -> Affine:
        """The step from nodes[0] with the outputs y at ``nodes``, latest first."""
        base = self.first(x, nodes[0], to, y[0])
        if order == 1:
            return base
        h, one, two, three = self.phis(nodes[0], to)
        r0 = (nodes[0].lam - nodes[1].lam) / h
        slope = (y[0] - y[1]) / r0
        if order == 2:
            return base + (one / 2 if self.midpoint else two) * slope
        r1 = (nodes[1].lam - nodes[2].lam) / h
        bend = (slope - (y[1] - y[2]) / r1) / (r0 + r1)
        return base + two * (slope + r0 * bend) + self.curvature * three * bend

    def singlestep(self, x: Affine, nodes: list[Level], to: Level, y: list[Affine]) -> Affine:
        """The step from nodes[0], the first of its block, with the outputs y at all ``nodes`` of it."""
        start = nodes[0]
        base = self.first(x, start, to, y[0])
        if len(nodes) == 1:
            return base
        h, one, two, three = self.phis(start, to)
        r = [(node.lam - start.lam) / h for node in nodes[1:]]
        slopes = [(later - y[0]) / k for later, k in zip(y[1:], r, strict=True)]
        if len(nodes) == 2:
            return base + (one / 2 if self.midpoint else two) * slopes[0]
        if self.midpoint:
            return base + two * slopes[1]
        slope = (r[1] * slopes[0] - r[0] * slopes[1]) / (r[1] - r[0])
        return base + two * slope + three * (2 * (slopes[1] - slopes[0]) / (r[1] - r[0]))


def _block_orders(steps: int, order: int, to_data: bool) -> list[int]:
    """The orders 1, 2, …, ``order`` of the rows of each block of a singlestep solver; whole blocks fall short by lower ones."""
    if order == 1:
        return [1] * steps
    whole, rest = divmod(steps, order)
    blocks = list(range(1, order + 1))
    if rest == 0 and not to_data:
        return blocks * whole
    if rest == 0:
        return blocks * (whole - 1) + ([1, 2, 1] if order == 3 else [1, 1])
    return blocks * whole + list(range(1, rest + 1))[: rest - 1] + [1 if to_data else rest]


def _solver(
    name: str,
    form: Exponential,
    s: Levels,
    steps: int,
    order: int,
    method: str,
    where: tuple[str, Grid, Grid, float],
    prediction: str,
    final: str,
    drop_lowest: bool,
    lower_order_final: bool,
    extra: str,
) -> Table:
    if order not in range(1, MOST_ORDER + 1):
        raise ValueError(f"order must be 1, 2 or 3, not {order}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")
    if form.eta and method == "singlestep":
        raise ValueError("eta goes with method 'multistep': a singlestep solver cannot go back behind the noise of a row")
    times, how, last = multistep_times(s, steps, *where, final, drop_lowest)
    path = path_of(s, times, name, last)
    rows = Rows(path[0], "x0" if form.data else "eps")
    count, to_data = len(path) - 1, path[-1].n == 0
    single = method == "singlestep"
    orders = _block_orders(count, order, to_data) if single else rising_orders(count, order, to_data, lower_order_final)
    x = rows.x  # at the start of a block
    nodes: list[Level] = []
    known: list[Affine] = []
    for (now, to), used in zip(pairwise(path), orders, strict=True):
        y = rows.ask()
        if single:
            if used == 1:
                x, nodes, known = rows.x, [], []
            nodes, known = [*nodes, now], [*known, y]
            rows.go(to, form.singlestep(x, nodes, to, known))
        else:
            nodes, known = [now, *nodes][:order], [y, *known][:order]
            rows.go(to, form.multistep(rows.x, nodes, to, known, used), form.noise(now, to))
    kind = f", {method}" if single else ""
    return rows.table(f"{name}({how}, order={order}{kind}{extra})", prediction, stops=last > 0)


def dpm_solver(
    s: Levels,
    steps: int = 20,
    order: int = 2,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    method: str = "multistep",
    solver_type: str = "midpoint",
    final: str = "lowest",
    drop_lowest: bool = True,
    lower_order_final: bool = True,
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """DPM-Solver 1, 2, 3: the exponential integrator of ε over λ = ln(a/n), one evaluation a row. Source: Lu et al. 2022.

        order 1: x' = a'/a·x − n'(e^h − 1)·ε  (DDIM);    order 2 adds −½n'(e^h − 1)·D, D = (ε − ε₋₁)/r

    ``method`` "singlestep" takes the times in blocks of ``order``: each block starts at its first time and uses the outputs
    inside it alone (DPM-Solver-2 and -3 of the paper, r = ½ and ⅓, ⅔ where λ is uniform: ``spacing="logsnr"``); "multistep"
    uses those of the rows before. ``solver_type`` weighs D by ½φ_1 ("midpoint") or by φ_2 ("heun"). ``final`` and the rest as in
    :func:`dpm_solver_pp`; in this form λ' = ∞ is an order-1 step, so the end at the "lowest" time is the usual one.
    """
    form = Exponential("eps", solver_type)
    where = (spacing, grid, sigmas, rho)
    kind = ", heun" if solver_type == "heun" else ""
    return _solver("dpm_solver", form, s, steps, order, method, where, prediction, final, drop_lowest, lower_order_final, kind)


def dpm_solver_pp(
    s: Levels,
    steps: int = 20,
    order: int = 2,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    drop_lowest: bool = True,
    taylor: bool = False,
    method: str = "multistep",
    solver_type: str = "midpoint",
    eta: float = 0.0,
    final: str = "data",
    lower_order_final: bool = True,
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """DPM-Solver++ 1, 2, 3: the exponential integrator of x0 over λ = ln(a/n). Source: Lu et al. 2022 (++), Algorithms 1 and 2.

        h = λ' − λ;  x' = n'/n·x + a'(1−e^{−h})·x0 + …    order 2: … = a'(1−e^{−h})·(x0 − x0₋₁)/(2r), r = h₋₁/h

    Orders start at 1 and rise by 1 a row; the last row, to λ' = ∞, is of order 1, and with fewer than 15 steps the last but one
    at most of order 2 unless ``lower_order_final`` is False. ``order=3`` is the multistep form in general use, which counts the
    second derivative by half and so converges with order 2; ``taylor=True`` counts it in full, for order 3. ``method`` and
    ``solver_type`` as in :func:`dpm_solver` ("singlestep" of order 2 and 3: DPM-Solver++ 2S and 3S).

    ``eta`` = 1 is SDE-DPM-Solver++ (multistep), noise n'·√(1 − e^{−2ηh})·z in every row but the last; η between is k-diffusion's.
    With ``drop_lowest`` the times are the upper ``steps`` of steps + 1 spaced ones (the usual grid of this solver; not for
    "trailing" and spacings of σ̄); a ``grid`` is taken as it is. ``final="lowest"`` ends at the lowest time, not at clean data.
    """
    form = Exponential("x0", solver_type, eta, taylor)
    where = (spacing, grid, sigmas, rho)
    kind = f"{', taylor' if taylor else ''}{', heun' if solver_type == 'heun' else ''}{f', eta={eta:g}' if eta else ''}"
    return _solver("dpm_solver_pp", form, s, steps, order, method, where, prediction, final, drop_lowest, lower_order_final, kind)


def sde_dpm_solver_pp(s: Levels, steps: int = 20, order: int = 2, spacing: str = "linspace", **options: object) -> Table:
    """SDE-DPM-Solver++ 1M, 2M, 3M: :func:`dpm_solver_pp` with ``eta`` = 1, which takes the other options.

        x' = n'/n·e^{−h}·x + a'(1−e^{−2h})·(x0 + (x0 − x0₋₁)/(2r)) + n'·√(1−e^{−2h})·z

    Source: Lu et al. 2022 (++), appendix.
    """
    return dpm_solver_pp(s, steps, order, spacing, **({"eta": 1.0} | options))  # type: ignore[arg-type]


def unipc(
    s: Levels,
    steps: int = 20,
    order: int = 2,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    variant: str = "bh2",
    corrector: bool = True,
    final: str = "data",
    drop_lowest: bool = True,
    lower_order_final: bool = True,
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """UniPC 1, 2, 3 in the x0-form: a multistep predictor, corrected with the output that the next row asks for anyway.

        x'_p = n'/n·x_c − a'·(φ_1·x0 + B·Σ_k ρ_k·D_k),             D_k = (x0₋ₖ − x0)/r_k, r_k = (λ₋ₖ − λ)/h
        x'_c = n'/n·x_c − a'·(φ_1·x0 + B·(Σ_k ρ_k·D_k + ρ·D')),    D' = x0(x'_p, λ') − x0

    with the ρ of each that make it exact for x0 a polynomial in λ, B = −h ("bh1") or e^{−h} − 1 ("bh2"); for UniP-2 and UniC-1
    ρ = ½ as published. The state of a row is x_p; x_c is found from it by its own output, so that a step is one row and one
    evaluation and order 3 reads three stored outputs. The last state stays as predicted; orders rise at the start and
    fall at the end with ``lower_order_final``. Grids and ``final`` as in :func:`dpm_solver_pp`. Source: Zhao et al. 2023.
    """
    if order not in range(1, MOST_ORDER + 1):
        raise ValueError(f"order must be 1, 2 or 3, not {order}")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant must be 'bh1' or 'bh2', not {variant!r}")
    times, how, last = multistep_times(s, steps, spacing, grid, sigmas, rho, final, drop_lowest)
    path = path_of(s, times, "unipc", last)
    rows = Rows(path[0], "x0")
    steps = len(path) - 1
    base = rows.x  # x_c at the node before
    nodes: list[Level] = []  # latest first, with the outputs there
    known: list[Affine] = []
    used = 0
    for i, (now, to) in enumerate(pairwise(path)):
        y = rows.ask()
        x = rows.x
        if corrector and used:
            x = _unified(base, nodes, now, known, used, variant, y)
        nodes, known, base = [now, *nodes][:order], [y, *known][:order], x
        used = min(order, i + 1, steps - i) if lower_order_final else min(order, i + 1)
        used = 1 if to.n == 0 else used
        rows.go(to, _unified(x, nodes, to, known, used, variant))
    name = f"unipc({how}, order={order}, {variant}{'' if corrector else ', no corrector'})"
    return rows.table(name, prediction, stops=last > 0)


def _unified(
    x: Affine, nodes: list[Level], to: Level, y: list[Affine], order: int, variant: str, found: Affine | None = None
) -> Affine:
    """UniP of this order from nodes[0] to ``to``, or UniC where the output ``found`` at ``to`` is given."""
    start = Exponential("x0", "midpoint").first(x, nodes[0], to, y[0])
    unknowns = order - 1 if found is None else order
    if unknowns == 0:
        return start
    h = to.lam - nodes[0].lam
    z = -h
    B = z if variant == "bh1" else np.expm1(z)
    r = [(node.lam - nodes[0].lam) / h for node in nodes[1:order]]
    D = [(later - y[0]) / k for later, k in zip(y[1:order], r, strict=True)]
    if found is not None:
        r, D = [*r, 1.0], [*D, found - y[0]]
    if unknowns == 1:
        weights = np.array([0.5])
    else:
        phi, factorial, b = np.expm1(z) / z - 1, 1, []
        for k in range(1, unknowns + 1):
            b.append(phi * factorial / B)
            factorial *= k + 1
            phi = phi / z - 1 / factorial
        weights = np.linalg.solve(np.vander(r, unknowns, increasing=True).T, np.array(b))
    return start - (to.a * B) * weighted(weights, D)
