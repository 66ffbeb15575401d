"""Sampler tables of DDPM and DDIM: steps of the posterior q(x_to|x_t, x0), and their inverse, the encoder."""

import numpy as np

from . import forward, grids
from .grids import RHO, Grid
from .levels import Levels, step_variance
from .table import Table, table


def down(s: Levels, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(t, t_to, a, n): the steps T → … → 0; a and n have one level more than there are steps."""
    path = np.r_[times[::-1], 0.0]
    a, n = s.levels(path)
    return path[:-1], path[1:], a, n


def ddpm(
    s: Levels,
    steps: int | None = None,
    variance: str = "posterior",
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """Ancestral sampling: the posterior mean at the predicted x0, plus noise. Eq: S0-E28, S0-E31, S1-A2, S1-E17, S3-E6, S4-A2.

        β = 1 − ᾱ_t/ᾱ_to,    x' = √(1−β)·(1−ᾱ_to)/(1−ᾱ_t)·x + √ᾱ_to·β/(1−ᾱ_t)·x0 + σz

    ``steps`` defaults to T, 1000 for an SDE. ``variance``: "posterior" σ² = β̃ = (1−ᾱ_to)/(1−ᾱ_t)·β, or "beta" σ² = β. On a ladder
    β = σ_t² − σ_to² and β̃ = σ_to²·β/σ_t². No noise in the last step. Source: Ho et al. 2020, Algorithm 2; Song et al. 2021 (score
    SDE), appendix F.
    """
    if variance not in ("posterior", "beta"):
        raise ValueError(f"variance must be 'posterior' or 'beta', not {variance!r}")
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho, whole=True)
    t, t_to, a, n = down(s, times)
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
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """x' = √ᾱ_to·x0 + √(1−ᾱ_to−σ²)·ε + σz, σ = η·√((1−ᾱ_to)/(1−ᾱ_t))·√(1−ᾱ_t/ᾱ_to).

    Eq: S0-E47, S0-E49, S2-A2, S2-E12, S2-E16, S4-E39, S4-E42, S4-E47, S4-E49.

    η multiplies the standard deviation; 0 is deterministic, 1 is :func:`ddpm`. ``sigma="hat"`` adds σ̂ = √(1−ᾱ_t/ᾱ_to) instead
    while the direction term keeps σ(η = 1) (Eq: S2-U5; ``eta`` is then not used). Source: Song et al. 2021 (DDIM), Eq. 12, 16.
    """
    if sigma not in ("eta", "hat"):
        raise ValueError(f"sigma must be 'eta' or 'hat', not {sigma!r}")
    eta = 1.0 if sigma == "hat" else eta
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho, whole=True)
    t, t_to, a, n = down(s, times)
    c = forward.ddim_sigma(t, t_to, s, eta)
    Be, excess = np.sqrt(n[1:] ** 2 - c**2), np.zeros_like(c)
    if sigma == "hat":
        hat = np.where(t_to > 0, forward.ddim_sigma_hat(t, t_to, s), 0.0)
        excess, c = hat**2 - c**2, hat
    name = f"ddim({how}, {'sigma=hat' if sigma == 'hat' else f'eta={eta:g}'})"
    return table(name, prediction, t, a, n, B0=a[1:], Be=Be, c=c, excess=excess)


def ddim_encode(
    s: Levels,
    steps: int = 50,
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
    label: str = "target",
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """DDIM with η = 0 run forwards, clean data to x_T: x' = √ᾱ_to·x0 + √(1−ᾱ_to)·ε. Eq: S2-E13, S2-C15, S2-C17.

    ``label`` is the time told to the model: "target" that of the level it steps to, "current" that of the level it stands at (the
    lowest time for clean data itself). "target" inverts the decoder more closely. ``prediction``: "eps", "v" or "F".
    """
    if label not in ("target", "current"):
        raise ValueError(f"label must be 'target' or 'current', not {label!r}")
    if prediction not in ("eps", "v") and prediction[:1] != "F":
        raise ValueError(f"prediction must be 'eps', 'v' or 'F' (at clean data the others leave ε open), not {prediction!r}")
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho, whole=True)
    a, n = s.levels(np.r_[0.0, times])
    t = times if label == "target" else np.r_[times[0], times[:-1]]
    return table(f"ddim_encode({how}, label={label})", prediction, t, a, n, B0=a[1:], Be=n[1:])


def euler_ancestral(
    s: Levels,
    steps: int = 50,
    eta: float = 1.0,
    spacing: str = "linspace",
    grid: Grid = None,
    prediction: str = "eps",
    sigmas: Grid = None,
    rho: float = RHO,
) -> Table:
    """Euler down to σ_down, then noise up to σ̄': x'/a' = x/a + (σ_down − σ̄)·ε + σ_up·z. Eq: S2-E12, S2-E16.

        σ_up = min(σ̄', η·√(σ̄'²(σ̄² − σ̄'²)/σ̄²)),    σ_down = √(σ̄'² − σ_up²)

    η multiplies the standard deviation, as in k-diffusion; up to 1 this is :func:`ddim` with that η, and diffusers'
    Euler-ancestral is η = 1. "linspace" may stop between whole times. Source: k-diffusion, ``sample_euler_ancestral``.
    """
    if not eta >= 0:
        raise ValueError(f"eta must be at least 0, not {eta}")
    times, how = grids.times(s, steps, spacing, grid, sigmas, rho)
    t, t_to, a, n = down(s, times)
    grids.refuse_pure_noise(a[0], "euler_ancestral")
    c = np.minimum(n[1:], forward.ddim_sigma(t, t_to, s, eta))
    Be = np.sqrt((n[1:] - c) * (n[1:] + c))
    return table(f"euler_ancestral({how}, eta={eta:g})", prediction, t, a, n, B0=a[1:], Be=Be, c=c)
