"""Editing by way of x_T: encode and decode with the deterministic sampler, interpolate between codes, image to image."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels import counter, streams
from ..kernels.arrays import array_module, native, restore
from . import forward, samplers, tables
from .exchange import Array, check_schedule
from .grids import Grid
from .interpolate import slerp
from .levels import Levels, Tabulated, timesteps, whole_steps
from .metrics import per_dimension_mse
from .samplers import Model
from .table import Table

__all__ = ["decode", "encode", "interpolate", "psnr", "reconstruct", "sdedit", "strength_grid"]

Clip = tuple[float, float] | None


def encode(
    model: Model,
    s: Levels,
    x0: Array,
    steps: int = 50,
    label: str = "target",
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
) -> Array:
    """The code of x0: DDIM with η = 0 run from clean data to the last time of the grid. Eq: S2-E13, S2-C15, S2-C17, S4-E50.

    x0 (B, …) float; the answer, of its kind, goes to :func:`decode` with the same steps, spacing or grid. ``label`` is the time
    told to the model: "target" that of the level stepped to (diffusers' inverse scheduler), "current" that of the level stood at
    (guided-diffusion's reverse sampling); "target" inverts the decoder more closely. ``prediction`` is "eps" or "v". A model that
    is told a class must be told the same one by both, without guidance: what guidance amplifies does not come back.
    """
    return samplers.sample(model, tables.ddim_encode(s, steps, spacing, grid, prediction, label), x0)


def decode(
    model: Model,
    s: Levels,
    code: Array,
    steps: int = 50,
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
    clip: Clip = None,
) -> Array:
    """x0 from its code: DDIM with η = 0 from the last time of the grid down. Eq: S2-E12, S2-C15, S0-E49."""
    return samplers.sample(model, tables.ddim(s, steps, 0.0, spacing, grid, prediction), code, clip=clip)


def reconstruct(
    model: Model,
    s: Levels,
    x0: Array,
    steps: int = 50,
    label: str = "target",
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
    clip: Clip = None,
) -> tuple[Array, np.ndarray]:
    """(decode(encode(x0)), its per-dimension MSE (B,)), the experiment of DDIM's Table 2. Eq: S2-C17, S2-T2.

    The error falls as steps^−2 at best (Euler's method there and back); arguments as in :func:`encode`.
    """
    code = encode(model, s, x0, steps, label, spacing, grid, prediction)
    again = decode(model, s, code, steps, spacing, grid, prediction, clip)
    return again, per_dimension_mse(x0, again)


def interpolate(
    model: Model,
    s: Levels,
    xa: Array,
    xb: Array,
    n: int = 9,
    steps: int = 50,
    label: str = "target",
    spacing: str = "leading",
    grid: Grid = None,
    prediction: str = "eps",
    clip: Clip = None,
) -> Array:
    """(n, B, …): n pictures from xa to xb, decoded from the great circle between their codes, pair by pair. Eq: S2-C23, S4-C7.

    The first and the last are the reconstructions of xa and xb. Arguments as in :func:`encode`; between images of two classes the
    model should be told none.
    """
    if whole_steps(n, "n") < 2:
        raise ValueError(f"n must be at least 2, not {n}")
    a, b = (encode(model, s, x, steps, label, spacing, grid, prediction) for x in (xa, xb))
    path = [
        native(decode(model, s, slerp(a, b, weight), steps, spacing, grid, prediction, clip)) for weight in np.linspace(0, 1, n)
    ]
    return restore(array_module(path[0]).stack(path), xa)


def strength_grid(s: Levels, strength: float, steps: int = 50, convention: str = "time", spacing: str = "trailing") -> np.ndarray:
    """The ascending times of an image-to-image run of this strength; the last one is t0, where the guide is noised to. Eq: S4-M3.

    strength in (0, 1]. convention:
        "time"   t0 = strength·T (at least 1 of a table), and all ``steps`` lie in (0, t0], at most one at each time of a table:
                 the t0 of SDEdit, Meng et al. 2022
        "steps"  the lowest ⌊strength·steps⌋ of ``steps`` times spaced over (0, T]: the ``strength`` of diffusers' image-to-image
                 pipelines. ValueError where none is left.
    """
    check_schedule(s)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], not {strength}")
    if convention == "steps":
        kept = int(strength * whole_steps(steps, "steps") + 1e-9)
        if kept == 0:
            raise ValueError(f"strength {strength} of {steps} steps leaves none: it must be at least {1 / steps:.4g}")
        return s.times(steps, spacing)[:kept]
    if convention != "time":
        raise ValueError(f"convention must be 'time' or 'steps', not {convention!r}")
    if isinstance(s, Tabulated):
        t0 = max(1, round(strength * s.T))
        return timesteps(t0, min(whole_steps(steps, "steps"), t0), spacing).astype(np.float64)
    return strength * s.times(steps, spacing)


def sdedit(
    model: Model,
    s: Levels,
    guide: Array,
    strength: float = 0.5,
    steps: int = 50,
    sampler: Callable[..., Table] = tables.ddpm,
    convention: str = "time",
    repeats: int = 1,
    prediction: str = "eps",
    clip: Clip = None,
    seed: int = 0,
    first_sample: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Array:
    """Image to image: noise the guide to t0, sample down from there; again from the answer, ``repeats`` times. Eq: S4-M3.

        x_t0 = a·guide + n·ε,    x_0 = samplers.sample(model, sampler(s, grid=times up to t0), x_t0)

    guide (B, …) float. ``strength`` and ``convention`` as in :func:`strength_grid`: near 0 the guide comes back, at 1 almost
    nothing of it is left. ``sampler``: any builder of tables that takes ``grid``, functools.partial(tables.ddim, eta=0.5) too.
    Noise depends on (seed, repeat, first_sample + k). To leave a region as it is, give x_t0 and such a table to
    :func:`inpainting.replacement`. Source: Meng et al. 2022 (SDEdit), Algorithm 1.
    """
    grid = strength_grid(s, strength, steps, convention)
    table, x = sampler(s, grid=grid, prediction=prediction), guide
    t0 = int(grid[-1]) if isinstance(s, Tabulated) else np.full(np.shape(native(guide))[:1], grid[-1])
    for k in range(whole_steps(repeats, "repeats")):
        own = seed if k == 0 else int(counter.integers(1, 0, 1 << 62, seed, k, streams.EDIT)[0])
        x, _ = forward.q_sample(x, t0, s, seed=own, first_sample=first_sample)
        told = None if progress is None else _offset(progress, k, repeats)
        x = samplers.sample(model, table, x, seed=own, clip=clip, first_sample=first_sample, progress=told)
    return x


def _offset(progress: Callable[[int, int], Any], k: int, repeats: int) -> Callable[[int, int], Any]:
    return lambda done, rows: progress(k * rows + done, repeats * rows)


def psnr(x: Array, y: Array, peak: float = 2.0) -> np.ndarray:
    """10·log10(peak²/MSE) in dB, (B,); peak is the width of the range of values, 2 for [−1, 1]. Infinite where x = y."""
    if not 0 < peak < np.inf:
        raise ValueError(f"peak must be positive and finite, not {peak}")
    with np.errstate(divide="ignore"):
        return 10 * np.log10(peak**2 / per_dimension_mse(x, y))
