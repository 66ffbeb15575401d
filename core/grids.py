"""The times at which a sampler stops: a spacing of t, of σ̄ = n/a, or a list of either."""

from collections.abc import Sequence

import numpy as np

from .exchange import check_schedule
from .levels import SPACINGS, Levels, Tabulated, whole_steps

__all__ = ["RHO", "SIGMA_SPACINGS", "Grid", "at_sigmas", "refuse_pure_noise", "sigma_times", "times"]

Grid = Sequence[float] | np.ndarray | None
SIGMA_SPACINGS = ("karras", "logsnr", "exponential")  # spaced in σ̄; the last two are two names of one
RHO = 7.0
CONTINUOUS_STEPS = 1000


def times(
    s: Levels,
    steps: int | None,
    spacing: str = "linspace",
    grid: Grid = None,
    sigmas: Grid = None,
    rho: float = RHO,
    whole: bool = False,
) -> tuple[np.ndarray, str]:
    """(ascending times in (0, T] as float64, how they were made), clean data not among them.

    ``grid`` are the times themselves, ``sigmas`` the levels σ̄ in either order (a 0 at their end is clean data); else ``steps``
    times by ``spacing``: one of :data:`levels.SPACINGS`, or of :data:`SIGMA_SPACINGS` as in :func:`sigma_times`. "linspace" is
    rounded to whole times only where ``whole``. ``steps`` None is T, 1000 for a continuous process.
    """
    check_schedule(s)
    if grid is not None and sigmas is not None:
        raise ValueError("give grid or sigmas, not both")
    if sigmas is not None:
        found = at_sigmas(s, sigmas)
        return found, f"steps={found.size}, sigmas"
    if grid is not None:
        return _given(s, grid), f"steps={np.size(grid)}, grid"
    if steps is None:
        steps = int(s.T) if isinstance(s, Tabulated) else CONTINUOUS_STEPS
    how = f"steps={steps}, {spacing}"
    if spacing in SIGMA_SPACINGS:
        return sigma_times(s, steps, spacing, rho), how if rho == RHO or spacing != "karras" else f"{how}, rho={rho:g}"
    if spacing == "linspace" and not whole:
        s.times(steps, "linspace")  # checks steps
        return np.linspace(s.t_min, s.T, steps) if steps > 1 else np.array([s.t_min]), how
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {SPACINGS + SIGMA_SPACINGS}, not {spacing!r}")
    return s.times(steps, spacing), how


def sigma_times(s: Levels, steps: int, spacing: str = "karras", rho: float = RHO) -> np.ndarray:
    """``steps`` ascending times whose σ̄ run from that of s.t_min to that of T in equal steps of some function of σ̄.

    karras       of σ̄^(1/ρ): Karras et al. 2022, Eq. 5, ρ = 7 there; ρ = 1 is uniform in σ̄, ρ → ∞ tends to "logsnr"
    logsnr       of ln σ̄ = −½ ln SNR; "exponential" is the same
    """
    check_schedule(s)
    steps = whole_steps(steps, "steps")
    if spacing not in SIGMA_SPACINGS:
        raise ValueError(f"spacing must be one of {SIGMA_SPACINGS}, not {spacing!r}")
    if not 0 < rho < np.inf:
        raise ValueError(f"rho must be positive and finite, not {rho}")
    low, high = (float(v) for v in s.sigma_bar_at([s.t_min, s.T]))
    if not np.isfinite(high):
        raise ValueError(
            f"spacing {spacing} cannot start where no signal is left (alpha_bar = 0): use another, or a grid below T"
        )
    if spacing == "karras":
        path = np.linspace(high ** (1 / rho), low ** (1 / rho), steps)[::-1] ** rho
    else:
        path = np.geomspace(high, low, steps)[::-1]
    return s.time(np.clip(path, low, high))


def refuse_pure_noise(signal: float, name: str) -> None:
    """ValueError where a sampler that divides by the signal would start where none is left."""
    if signal == 0:
        raise ValueError(f"{name} cannot start where no signal is left (alpha_bar = 0): use ddim, or end the grid below T")


def at_sigmas(s: Levels, sigmas: Grid) -> np.ndarray:
    """The ascending times at which σ̄ is each of ``sigmas``, given in either order; a 0 at the end is left out."""
    values = np.array(sigmas, np.float64)
    if values.ndim != 1 or values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError(f"sigmas must be a list of numbers, not {sigmas!r}")
    values = values if values[0] <= values[-1] else values[::-1]
    values = values[1:] if values[0] == 0 and values.size > 1 else values
    if values[0] <= 0 or np.any(np.diff(values) <= 0):
        raise ValueError(f"sigmas must be positive and run one way strictly, not {values[0]:g}..{values[-1]:g}")
    return s.time(values)


def _given(s: Levels, grid: Grid) -> np.ndarray:
    found = np.array(grid, np.float64)
    if found.ndim != 1 or found.size == 0 or not np.all(np.isfinite(found)):
        raise ValueError(f"grid must be a list of times, not an array of shape {found.shape}")
    if found[0] <= 0 or found[-1] > s.T or np.any(np.diff(found) <= 0):
        raise ValueError(f"grid must ascend strictly within (0, {s.T:g}], not {found[0]:g}..{found[-1]:g}")
    return found
