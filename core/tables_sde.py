"""Sampler tables of the reverse SDE and, by Euler's method in t, of its probability flow."""

import numpy as np

from . import grids
from .grids import RHO, Grid
from .levels import Levels, step_variance
from .table import Table, table
from .tables_ancestral import down


def euler_maruyama(
    s: Levels,
    steps: int | None = None,
    spacing: str = "trailing",
    grid: Grid = None,
    prediction: str = "eps",
    probability_flow: bool = False,
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """Euler–Maruyama on the reverse SDE dx = (f·x − g²·score) dt + g dw̄, dt < 0. Eq: S4-E66, S4-E69, S4-C18.

        x' = (1 − F)·x + G·score + √G·z,    F = ∫f, G = ∫g² over the step (s.increments)

    For an SDE the integrals are step × the value at t, the textbook scheme; for a schedule F = −B/2 and G = B = ln(ᾱ_to/ᾱ_t);
    for a ladder F = 0 and G = σ_t² − σ_to². ``probability_flow`` takes half the score and no noise: Euler's method for
    dx = (f·x − ½g²·score) dt in t. ``steps`` defaults to T, 1000 for an SDE. The rows carry the marginals only to second order in
    the step, so the laws are not asserted (``exact`` is False). No noise in the last step. Source: Song et al. 2021 (score SDE),
    Eq. 6 and 13.
    """
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho, whole=True)
    t, t_to, a, n = down(s, times)
    grids.refuse_pure_noise(a[0], "euler_maruyama")
    F, G = s.increments(t, t_to)
    return _reverse("euler_maruyama", how, prediction, probability_flow, t, t_to, a, n, 1 - F, G)


def reverse_diffusion(
    s: Levels,
    steps: int | None = None,
    spacing: str = "trailing",
    grid: Grid = None,
    prediction: str = "eps",
    probability_flow: bool = False,
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """The forward step x_t = k·x_to + √v·z turned round: x' = (2 − k)·x + v·score + √v·z. Eq: S4-E66, S4-C18.

    k = a_t/a_to and v = n_t² − k²·n_to² are exact: (√α, β) for a schedule, (1, σ_t² − σ_to²) for a ladder. ``probability_flow``,
    ``steps`` and the last step as in :func:`euler_maruyama`; the laws hold to second order in the step. Source: Song et al. 2021
    (score SDE), appendix E. Its ancestral sampling (appendix F) is :func:`ddpm`.
    """
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho, whole=True)
    t, t_to, a, n = down(s, times)
    grids.refuse_pure_noise(a[0], "reverse_diffusion")
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
