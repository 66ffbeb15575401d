"""Predictor–corrector sampling: Langevin steps, scaled to a signal-to-noise ratio, between the steps of any table.

The step size of the corrector depends on the state, so it is no row of a table; the predictor is one.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, is_native, native, restore
from . import samplers
from .convert import coefficients, combined
from .exchange import Array, check_schedule, flat
from .levels import Levels, Tabulated, whole_steps
from .samplers import Model, answer_of
from .sde import SDE
from .table import Table

__all__ = ["NORMS", "corrector_alpha", "sample", "step_size"]

NORMS = ("sample", "batch", "level")
UNIT = 1000  # the steps of the published schedules, whose α_i scales the corrector's step


def step_size(score: Array, z: Array, snr: float = 0.16, norm: str = "sample", alpha: float = 1.0, noise: float = 1.0) -> Any:
    """ε = 2α·(r·‖z‖/‖score‖)²: the drift ‖ε·score‖ is then r (= ``snr``) times the noise ‖√(2ε)·z‖, at α = 1. Eq: S4-C18.

    score, z (B, …), NumPy or CuPy. ``norm``: "sample" takes the norms of each sample, (B, 1, …), so that none depends on the rest
    of its batch; "batch" the mean norms of the batch, as the published code does; "level" the norms that a sample of q(x_t|x_0)
    has on average, ‖z‖/‖score‖ = ``noise``, a step size that depends on the time alone. With few elements a sample the norms are
    themselves noise, and "sample" then biases what is sampled: take one of the others. A sample whose score is 0 gets 0.
    """
    if norm == "level":
        return 2 * alpha * (snr * noise) ** 2
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, not {norm!r}")
    z_norm, score_norm = _norms(z), _norms(score)
    if norm == "batch":
        z_norm, score_norm = z_norm.mean(), score_norm.mean()
    xp = array_module(score)
    ratio = xp.where(score_norm > 0, z_norm / xp.where(score_norm > 0, score_norm, 1), 0)
    size = 2 * alpha * (snr * ratio) ** 2
    return size if norm == "batch" else size.reshape(-1, *(1,) * (score.ndim - 1))


def _norms(x: Array) -> Array:
    xp = array_module(x)
    x = flat(x).astype(xp.float64, copy=False)
    return xp.sqrt((x * x).sum(axis=1))


def corrector_alpha(s: Levels, t: Any) -> np.ndarray:
    """The α of the step size at times t: α_t of a schedule, 1 of a ladder, 1 − β/1000 of an SDE with 1/1000 of T as unit."""
    if isinstance(s, Tabulated):
        return s.alpha[np.maximum(np.rint(t).astype(np.int64), 1)]
    if isinstance(s, SDE):
        return 1 + 2 * s.drift_factor(t) * (s.T / UNIT)
    raise TypeError(f"s must be a Schedule, a Ladder or an SDE, not {type(s).__name__}")


def sample(
    model: Model,
    table: Table,
    x_T: Array,
    s: Levels,
    snr: float = 0.16,
    corrections: int = 1,
    norm: str = "sample",
    seed: int = 0,
    noise: Array | None = None,
    corrector_noise: Array | None = None,
    clip: tuple[float, float] | None = None,
    rederive_eps: bool = True,
    trajectory: bool = False,
    first_sample: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Array:
    """Run ``table`` from x_T with ``corrections`` Langevin steps x + ε·score + √(2ε)·z ahead of each step. Eq: S4-C18, S4-E62.

    table: the predictor, e.g. tables.reverse_diffusion(s), of the process ``s``; its ``prediction`` is the model's. The rows of
        one step that read stored outputs (Heun, Runge–Kutta) stay together. As in the published code the corrector acts at the
        level that a step starts from; nothing is corrected after the last step, to clean data.
    snr, norm: the step ε = 2α(r‖z‖/‖score‖)², see :func:`step_size`; α is :func:`corrector_alpha`.
    seed, first_sample: correction j ahead of row i draws from (seed, i·corrections + j, first_sample + k) in a stream of its own.
    corrector_noise: (rows, corrections, *x_T.shape) to use instead. The other arguments as in :func:`samplers.sample`.

    The model is called rows + corrected steps × corrections times. Raises ValueError for a multistep table, whose stored outputs
    a correction would put out of date, and for one of another process than ``s``. Source: Song et al. 2021 (score SDE),
    appendix G.
    """
    if not isinstance(table, Table):
        raise TypeError(f"table must be a Table (tables.reverse_diffusion(s) for one), not {type(table).__name__}")
    check_schedule(s)
    if not 0 < snr < np.inf:
        raise ValueError(f"snr must be positive and finite, not {snr}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, not {norm!r}")
    corrections = 0 if corrections == 0 else whole_steps(corrections, "corrections")
    starts = np.flatnonzero(table.past == 0)
    if np.diff(np.r_[starts, len(table)]).max() > 4:  # the stages of one step are at most four
        raise ValueError(f"table must not keep outputs from step to step, but {table.name} does")
    corrected = set(starts.tolist())
    on_x, on_m = coefficients(table.prediction, "score", table.signal, table.noise)
    if not np.allclose(s.levels(table.t), (table.signal, table.noise), rtol=1e-6, atol=1e-9):
        raise ValueError(f"s must be the process of the table, and {table.name} has other levels than {s!r}")
    alpha, times = corrector_alpha(s, table.t), table.times
    x0 = native(x_T)
    given = None if corrector_noise is None else native(corrector_noise)
    if given is not None and (not is_native(given) or given.dtype.kind != "f"):
        raise TypeError("corrector_noise must be a float array")
    if given is not None and given.shape != (len(table), corrections, *x0.shape):
        raise ValueError(f"corrector_noise must have shape {(len(table), corrections, *x0.shape)}, not {given.shape}")

    def correct(state: Array, i: int) -> Array:
        x = native(state)
        if i not in corrected or x.size == 0:
            return state
        xp = array_module(x)
        t = restore(xp.full(x.shape[0], times[i]), x_T)
        for j in range(corrections):
            m = answer_of(model(restore(x, x_T), t), x, "model")
            score = combined(on_x[i], x, on_m[i], m)
            if given is None:
                step = i * corrections + j
                z = kernels.normals(xp.empty_like(x), seed, step=step, stream=streams.CORRECTOR, first_sample=first_sample)
            else:
                z = given[i, j].astype(x.dtype, copy=False)
            size = xp.asarray(step_size(score, z, snr, norm, float(alpha[i]), float(table.noise[i])))
            x = x + size.astype(x.dtype) * score + xp.sqrt(2 * size).astype(x.dtype) * z
        return restore(x, x_T)

    return samplers.sample(
        model,
        table,
        x_T,
        seed=seed,
        noise=noise,
        clip=clip,
        rederive_eps=rederive_eps,
        trajectory=trajectory,
        first_sample=first_sample,
        progress=progress,
        before=correct if corrections else None,
    )
