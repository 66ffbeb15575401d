"""Inpainting with a model that knows nothing of it: the known part of the state is drawn from q(x_t|known), the rest sampled.

Both methods are one loop over the rows of any table without history: replacement goes down once, RePaint goes up again and again,
so that the two parts may agree. Both are approximations: the model sees a noisy copy of the known part, not that part itself.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, native, restore
from .exchange import Array
from .levels import step_variance, whole_steps
from .samplers import Model, answer_of, start_of
from .table import Table

__all__ = ["repaint", "repaint_path", "replacement"]


def repaint_path(rows: int, jump: int = 10, resample: int = 10) -> np.ndarray:
    """The levels that RePaint visits, as row counts from clean data: rows, rows − 1, …, 0 with jumps upwards between.

    From each of the levels k = 1, 1 + jump, 1 + 2·jump, … with k + jump ≤ rows it goes up by ``jump``, ``resample`` − 1 times:
    never from clean data, and never above the start. resample = 1 only goes down. Source: Lugmayr et al. 2022, section 4.2 and
    appendix (its levels count from 0 at our 1, and −1 is clean data).
    """
    whole_steps(rows, "rows")
    whole_steps(jump, "jump")
    whole_steps(resample, "resample")
    left = {k: resample - 1 for k in range(1, rows - jump + 1, jump)}
    path = [rows]
    while path[-1] > 0:
        path.append(path[-1] - 1)
        if left.get(path[-1], 0) > 0:
            left[path[-1]] -= 1
            path.append(path[-1] + jump)
    return np.array(path)


def replacement(
    model: Model,
    table: Table,
    x_T: Array,
    known: Array,
    mask: Any,
    seed: int = 0,
    clip: tuple[float, float] | None = None,
    rederive_eps: bool = True,
    first_sample: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Array:
    """Run ``table`` from x_T with the known part replaced by q(x_t|known) ahead of every row. Eq: S4-M3.

        x_t ← mask·(a·known + n·z) + (1 − mask)·x_t,    at the end x_0 ← mask·known + (1 − mask)·x_0

    known: what is given, of the shape of x_T; where the mask is false it is not read (NaN may stand there). It comes out bit for
        bit where the mask is true. mask: booleans or the numbers 0 and 1, broadcast to x_T (1, the batch or nothing ahead).
    z is drawn anew at each level, from (seed, level, first_sample + k). The table may start below T (image to image with a
    region left alone). The other arguments as in :func:`samplers.sample`. Raises ValueError for a table that stores outputs
    (multistep, Heun) or does not end at clean data. Source: Song et al. 2021 (score SDE), appendix I.2.
    """
    return repaint(model, table, x_T, known, mask, 1, 1, seed, clip, rederive_eps, first_sample, progress)


def repaint(
    model: Model,
    table: Table,
    x_T: Array,
    known: Array,
    mask: Any,
    jump: int = 10,
    resample: int = 10,
    seed: int = 0,
    clip: tuple[float, float] | None = None,
    rederive_eps: bool = True,
    first_sample: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> Array:
    """Replacement that returns: up ``jump`` levels by the forward process and down again, ``resample`` times over. Eq: S4-M3.

        up: x_t = (a_t/a_to)·x_to + √(n_t² − (a_t/a_to)²·n_to²)·z, all jump levels in one draw;  down: :func:`replacement`

    The model is called rows + (resample − 1)·jump·(number of jump levels) times, see :func:`repaint_path`. A stochastic table
    (DDPM, DDIM with η = 1) is the one meant; of a deterministic one only the jumps mix. Other arguments as in
    :func:`replacement`. Source: Lugmayr et al. 2022, Algorithm 1, with the variance of the step back up being that of the step
    t − 1 → t (the algorithm prints β_{t−1}).
    """
    state = _State(table, x_T, known, mask, seed, first_sample)
    path = repaint_path(len(table), jump, resample)
    rows, times, x = table.rows(clip is not None, rederive_eps), table.times, state.x
    x = state.mixed(x, len(table), 0)
    for visit, (k, k_to) in enumerate(pairwise(path.tolist())):
        if k_to > k:
            x = state.up(x, k, k_to, visit)
        else:
            i = len(table) - k
            t = restore(array_module(x).full(x.shape[0], times[i]), x_T)
            m = answer_of(model(restore(x, x_T), t), x, "model")
            z = state.normals(visit, streams.SAMPLER) if table.c[i] else None
            x = state.mixed(kernels.step(x, m, rows, i, noise=z, clip=clip), k_to, visit + 1)
        if progress is not None:
            progress(visit + 1, len(path) - 1)
    return restore(x, x_T)


class _State:
    """The levels of a table counted from clean data, what is known, and the noise of each visit."""

    def __init__(self, table: Table, x_T: Any, known: Any, mask: Any, seed: int, first_sample: int) -> None:
        single_step(table)
        if (table.signal_to[-1], table.noise_to[-1]) != (1, 0):
            raise ValueError(f"table must end at clean data, but {table.name} does not")
        self.x = start_of(x_T)
        xp = array_module(self.x)
        given, keep = native(known), xp.asarray(native(mask))
        if np.shape(given) != self.x.shape:
            raise ValueError(f"known must have the shape of x_T, {self.x.shape}, not {np.shape(given)}")
        self.known = xp.asarray(given).astype(self.x.dtype, copy=False)
        if keep.dtype != bool and not bool(((keep == 0) | (keep == 1)).all()):
            raise ValueError("mask must hold booleans, or the numbers 0 and 1 alone")
        try:
            self.mask = xp.broadcast_to(keep != 0, self.x.shape)
        except ValueError:
            raise ValueError(f"mask must broadcast to x_T, {self.x.shape}, but has shape {keep.shape}") from None
        self.signal = np.r_[1.0, table.signal[::-1]]
        self.noise = np.r_[0.0, table.noise[::-1]]
        self.seed, self.first_sample = seed, first_sample

    def normals(self, visit: int, stream: int) -> Array:
        z = array_module(self.x).empty_like(self.x)
        return kernels.normals(z, self.seed, step=visit, stream=stream, first_sample=self.first_sample)

    def mixed(self, x: Array, k: int, visit: int) -> Array:
        xp = array_module(x)
        given = self.known
        if k > 0:
            given = float(self.signal[k]) * given + float(self.noise[k]) * self.normals(visit, streams.KNOWN)
        return xp.where(self.mask, given, x)

    def up(self, x: Array, k: int, k_to: int, visit: int) -> Array:
        added = step_variance(self.signal[k_to], self.noise[k_to], self.signal[k], self.noise[k])
        z = self.normals(visit, streams.RETURN)
        return float(self.signal[k_to] / self.signal[k]) * x + float(np.sqrt(added)) * z


def single_step(table: Any) -> None:
    """TypeError unless ``table`` is a Table, ValueError where it stores outputs from row to row."""
    if not isinstance(table, Table):
        raise TypeError(f"table must be a Table (tables.ddpm(s) for one), not {type(table).__name__}")
    if table.past.any():
        raise ValueError(
            f"table must not store outputs from row to row, which a change of the state puts out of date: {table.name}"
        )
