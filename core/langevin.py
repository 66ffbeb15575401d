"""Langevin dynamics as tables: plain, annealed over a ladder of noise levels, and the settings of NCSNv2.

Two ways to write one step are in use: x + (α/2)·score + √α·z (Song & Ermon 2019) and x + ε·score + √(2ε)·z; they are the same
with α = 2ε (Eq: S0-E16, S4-E62). ``step_size`` is ε here. ``epsilon`` is the number of the annealed sampler of the former, which
fixes α. A ladder's level t = 1 is the smallest, the paper's σ_L.
"""

from collections.abc import Callable
from math import erf, sqrt
from typing import Any, NamedTuple

import numpy as np

from ..kernels.arrays import is_native, native, restore, to_numpy
from .exchange import Array, check_schedule, column
from .levels import Ladder, Levels, whole_steps
from .schedules import geometric
from .table import Table, table

__all__ = [
    "NCSNv2",
    "annealed_langevin",
    "annealed_step_sizes",
    "langevin",
    "level_overlap",
    "level_ratio",
    "max_pairwise_distance",
    "ncsnv2_settings",
    "noise_scaled_score",
    "variance_ratio",
]

BLOCK = 1 << 22  # the most distances that are held at once


def langevin(
    step_size: float, steps: int, s: Levels | None = None, t: float | None = None, prediction: str | None = None
) -> Table:
    """Langevin dynamics x' = x + ε·score + √(2ε)·z, ε = ``step_size``, ``steps`` times over. Eq: S4-E62, S0-E16, S4-C13.

    Without ``s`` the model returns the score of the density itself and is told t = 0; the x0 that ``clip`` bounds is then the end
    of the drift, x + ε·score. With ``s`` and ``t`` it is the model of a process at its level t, of the kind ``prediction`` ("eps"
    by default, "score" without ``s``), and the chain samples q(x_t). On N(0, 1) the variance goes to 1/(1 − ε/2): the step must
    be small. Raises ValueError unless step_size > 0, steps ≥ 1 and s and t are given together.
    """
    steps = whole_steps(steps, "steps")
    if not 0 < step_size < np.inf:
        raise ValueError(f"step_size must be positive and finite, not {step_size}")
    if (s is None) != (t is None):
        raise ValueError("s and t must be given together")
    if s is None:
        if prediction not in (None, "score"):
            raise ValueError(f"prediction must be 'score' where no process s is given, not {prediction!r}")
        at, time, a, n, prediction = "", 0.0, 1.0, sqrt(step_size), "score"
    else:
        check_schedule(s)
        time = float(s.check(t))
        at, (a, n), prediction = f", t={time:g}", map(float, s.levels(time)), prediction or "eps"
        if n == 0:
            raise ValueError(f"t must be where there is noise, not {t}")
    levels = np.full(steps + 1, a), np.full(steps + 1, n)
    step = step_size / n
    name = f"langevin({steps} steps of {step_size:g}{at})"
    return table(name, prediction, np.full(steps, time), *levels, A=1.0, Be=-step, c=sqrt(2 * step_size), excess=step**2)


def annealed_step_sizes(ladder: Ladder, epsilon: float = 2e-5) -> np.ndarray:
    """α_t = ε·σ_t²/σ_1² for t = 0..T (0 at clean data), σ_1 the smallest level. Eq: S0-E16, S0-C9.

    α_t/σ_t² is one constant, so drift and noise stand in the same ratio at every level. α is twice the step size of
    :func:`langevin`. Raises ValueError unless 0 < ε < 4·σ_1², beyond which the chain diverges.
    """
    check_schedule(ladder, Ladder)
    largest = 4 * ladder.sigma[1] ** 2
    if not 0 < epsilon < largest:
        raise ValueError(f"epsilon must be in (0, {largest:.6g}), four times the smallest level squared, not {epsilon}")
    return epsilon * (ladder.sigma / ladder.sigma[1]) ** 2


def annealed_langevin(
    ladder: Ladder, steps_per_level: int = 100, epsilon: float = 2e-5, denoise: bool = True, prediction: str = "score"
) -> Table:
    """x' = x + (α_t/2)·score + √α_t·z, ``steps_per_level`` times at each level t = T..1. Eq: S0-E16, S0-C9, S4-E63.

    α_t as in :func:`annealed_step_sizes`; each level starts where the one before ended. ``denoise`` adds the step x + σ_1²·score
    to clean data. Start from samplers.prior(std=ladder.prior_std), the paper from U[0, 1]. Defaults as in Song & Ermon 2019,
    Algorithm 1; for Song & Ermon 2020 see :func:`ncsnv2_settings`.
    """
    alpha = annealed_step_sizes(ladder, epsilon)
    levels = np.repeat(np.arange(ladder.T, 0, -1), whole_steps(steps_per_level, "steps_per_level"))
    t = np.r_[levels, 1] if denoise else levels
    n = ladder.sigma[np.r_[levels, 1, 0] if denoise else np.r_[levels, 1]]
    step = np.where(np.arange(len(t)) < len(levels), alpha[t] / 2, 0.0)
    last = (step == 0).astype(np.float64)  # the denoising row
    how = f"{ladder.T} levels, {steps_per_level} steps, epsilon={epsilon:g}{'' if denoise else ', no denoising'}"
    return table(
        f"annealed_langevin({how})",
        prediction,
        t.astype(np.float64),
        np.ones_like(n),
        n,
        A=1 - last,
        B0=last,
        Be=-step / n[:-1],
        c=np.sqrt(2 * step),
        excess=(1 - last) * (n[:-1] ** 2 + (step / n[:-1]) ** 2 - n[1:] ** 2),  # a level's end is not yet the next one's law
        exact=denoise | (np.arange(len(t)) < len(t) - 1),
    )


# ------------------------------------------------------------------------------------------------------------------------ NCSNv2


def max_pairwise_distance(data: Array) -> float:
    """The largest Euclidean distance between two samples of ``data`` (N, …): what σ_T should reach. Eq: S4-C16."""
    x = np.asarray(to_numpy(data), np.float64)
    if x.ndim < 1 or len(x) < 2:
        raise ValueError(f"data must hold at least two samples, not shape {x.shape}")
    x = x.reshape(len(x), -1)
    x = x - x.mean(axis=0)
    square = np.einsum("ij,ij->i", x, x)
    best, rows = (-1.0, 0, 0), max(1, BLOCK // len(x))
    for i in range(0, len(x), rows):
        apart = square[i : i + rows, None] + square - 2 * (x[i : i + rows] @ x.T)
        at = int(np.argmax(apart))
        best = max(best, (float(apart.flat[at]), i + at // len(x), at % len(x)))
    return float(np.linalg.norm(x[best[1]] - x[best[2]]))


def level_overlap(ratio: float, dim: int) -> float:
    """Φ(√(2D)(γ−1) + 3γ) − Φ(√(2D)(γ−1) − 3γ): how much of level i lies where level i + 1 was trained, γ their ratio. Eq: S4-C16.

    0.567 in the paper's setting for CIFAR-10 (D = 3072, 232 levels from 50 to 0.01).
    """
    shift = sqrt(2 * dim) * (ratio - 1)
    high, low = (shift + 3 * ratio) / sqrt(2), (shift - 3 * ratio) / sqrt(2)
    return 0.5 * (erf(high) - erf(low))


def level_ratio(dim: int, overlap: float = 0.5) -> float:
    """The ratio γ of neighbouring levels with :func:`level_overlap` = ``overlap`` in ``dim`` dimensions. Eq: S4-C16.

    ValueError for fewer than 5 dimensions, where every ratio overlaps enough.
    """
    dim = whole_steps(dim, "dim")
    if dim < 5:
        raise ValueError(f"dim must be at least 5 for this rule (below, every ratio overlaps enough), not {dim}")
    if not 0 < overlap <= 0.99:
        raise ValueError(f"overlap must be in (0, 0.99], not {overlap}")
    root = sqrt(2 * dim)
    low, high = 1.0, 2 * root / (root - 3)
    while level_overlap(high, dim) > overlap:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if level_overlap(middle, dim) > overlap else (low, middle)
    return high


def variance_ratio(ratio: float, step: float, steps: int) -> float:
    """Var/σ_i² after ``steps`` Langevin steps of step_size ``step``·σ_i² at level i, started from σ_{i−1} = γ·σ_i. Eq: S4-C16.

        a^K·(γ² − c) + c,    a = (1 − e)², c = 2e/(1 − a),    e = step, K = steps

    for data at one point: the recursion v ← (1 − e)²·v + 2e in closed form. 1 is what the next level wants.
    """
    a = (1 - step) ** 2
    c = 2 * step / (1 - a)
    return a**steps * (ratio**2 - c) + c


class NCSNv2(NamedTuple):
    """What the five techniques give: annealed_langevin(ladder, steps_per_level, epsilon) is the sampler. Eq: S4-C16."""

    ladder: Ladder
    ratio: float  # γ of the ladder
    steps_per_level: int
    epsilon: float  # as annealed_langevin takes it: twice the ε of the paper, whose update has no ½
    variance_ratio: float  # at the end of each level, 1 at best
    ema: float = 0.999  # decay of the averaged weights to sample with


def ncsnv2_settings(
    data: Array | None = None,
    *,
    max_distance: float | None = None,
    dim: int | None = None,
    sigma_min: float = 0.01,
    steps_per_level: int = 5,
    overlap: float = 0.5,
    levels: int | None = None,
) -> NCSNv2:
    """The ladder and the step of NCSNv2 by its rules. Eq: S4-C16, S4-E63.

    1. σ_T is the largest distance between two samples of ``data`` (N, …), or ``max_distance`` with ``dim`` numbers a sample.
    2. The levels are geometric, their ratio at most that with :func:`level_overlap` = ``overlap``; or there are ``levels``.
    3. The network gives its score as s(x)/σ: :func:`noise_scaled_score`.
    4. The step size makes :func:`variance_ratio` come closest to 1 after ``steps_per_level`` steps.
    5. Samples are drawn with averaged weights, decay ``ema``, and end in a denoising step.

    Source: Song & Ermon 2020. Raises ValueError unless data or both max_distance and dim are given.
    """
    if (data is None) == (max_distance is None or dim is None):
        raise ValueError("give data, or both max_distance and dim")
    if data is not None:
        max_distance, dim = max_pairwise_distance(data), int(np.prod(np.shape(to_numpy(data))[1:]))
    assert max_distance is not None and dim is not None
    steps_per_level = whole_steps(steps_per_level, "steps_per_level")
    if not 0 < sigma_min < max_distance:
        raise ValueError(f"sigma_min must be in (0, {max_distance:.6g}), below the largest distance, not {sigma_min}")
    if levels is None:
        levels = 1 + int(np.ceil(np.log(max_distance / sigma_min) / np.log(level_ratio(dim, overlap))))
    if levels < 2:
        raise ValueError(f"levels must be at least 2, not {levels}")
    ladder = geometric(sigma_min, max_distance, levels)
    ratio = float(ladder.sigma[-1] / ladder.sigma[-2])
    steps = np.geomspace(1e-6, 1, 100_001)
    a = (1 - steps) ** 2
    c = 2 * steps / (1 - a)
    best = float(steps[np.argmin(np.abs(a**steps_per_level * (ratio**2 - c) + c - 1))])
    epsilon = 2 * best * sigma_min**2
    return NCSNv2(ladder, ratio, steps_per_level, epsilon, variance_ratio(ratio, best, steps_per_level))


def noise_scaled_score(network: Callable[[Array], Array], ladder: Ladder) -> Callable[[Array, Any], Array]:
    """The score model(x, t) = network(x)/σ_t of a network that is not told the level. Eq: S4-C16."""
    check_schedule(ladder, Ladder)

    def model(x: Array, t: Any) -> Array:
        answer = native(network(x))
        if not is_native(answer):
            raise TypeError(f"network must return an array, not {type(answer).__name__}")
        return restore(answer / column(ladder.sigma, t, answer, 1), x)

    return model
