"""Guidance: classifier-free and by a classifier, in its score form and in its mean form.

Conventions of the weight. w is that of Ho & Salimans 2022: ε̃ = (1+w)·ε_c − w·ε_u, so w = 0 is the conditional model and w = −1
the unconditional one; the target is p(x|c)·p(c|x)^w. The scale s of much code (diffusers' ``guidance_scale``, latent diffusion)
is s = 1 + w: ε̃ = ε_u + s·(ε_c − ε_u). A classifier has the weight w on the conditional model, or w + 1 on the unconditional one:
the gradient scale s of Dhariwal & Nichol 2021. Noise levels of an interval are σ̄ = n/a, √((1−ᾱ)/ᾱ) for a schedule.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels import counter, dispatch, elementwise, streams
from ..kernels.arrays import array_module, is_cupy, native, restore, to_numpy
from .convert import coefficients, score_from_eps
from .exchange import Array, check_schedule, exchanged, flat, level_columns, lift
from .levels import Levels
from .table import Table

Model = Callable[[Array, Array], Array]
Predict = Callable[[Array, Array, Array], Array]
Gradient = Callable[[Array, Array], Array]  # gradient(x, t) = ∇_x log p(c|x_t)
Interval = tuple[float, float] | None
PLACES = ("x_t", "mean")


# ---------------------------------------------------------------------------------------------------------------- classifier-free


def classifier_free_eps(eps_cond: Array, eps_uncond: Array, w: float) -> Array:
    """ε̃ = (1+w)·ε_c − w·ε_u = ε_c + w·(ε_c − ε_u): the noise of p(x|c)·p(c|x)^w. Eq: S0-E37, S0-E35, S0-C15, S3-E14.

    The scale of much code is s = 1 + w.
    """
    return (1 + w) * eps_cond - w * eps_uncond


@exchanged
def rescale_guidance(guided: Array, cond: Array, phi: float) -> Array:
    """φ·(std(cond)/std(guided))·guided + (1−φ)·guided, std over the elements of each sample: against over-exposure at large w.

    guided, cond (B, …) of at least two elements a sample; the paper has them predict v, common code ε too. Raises ValueError
    unless 0 ≤ φ ≤ 1. Source: Lin et al. 2024 (common diffusion noise schedules are flawed), section 3.4.
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi must be in [0, 1], not {phi}")
    if guided.shape != cond.shape or guided.ndim < 2 or np.prod(guided.shape[1:]) < 2:
        raise ValueError(
            f"guided and cond must have one shape (B, …) of at least 2 elements each, not {guided.shape}, {cond.shape}"
        )
    xp = array_module(guided)
    wanted, had = (flat(v).std(axis=1) for v in (cond, guided))
    level = had == 0  # a constant image has no deviation to rescale
    factor = phi * xp.where(level, 1, wanted / xp.where(level, 1, had)) + (1 - phi)
    return guided * factor.reshape(-1, *(1,) * (guided.ndim - 1))


def classifier_free(
    predict: Predict, y: Any, w: float, null: Any, rescale: float = 0.0, interval: Interval = None, s: Levels | None = None
) -> Model:
    """A model(x, t): (1+w)·predict(x, t, y) − w·predict(x, t, null), both in one batch of 2B. Eq: S0-E37, S0-E32, S3-E14, S3-C11.

    y: an int or (B, …), the conditions of the samples; ``null``: the condition that stands for none, a number or an array that
        broadcasts to y.
    w: 0 is the conditional model and −1 the unconditional one (only that half of the batch then runs); the scale of much code is
        s = 1 + w.
    rescale: φ of :func:`rescale_guidance`.
    interval: (lo, hi), guide only where lo ≤ σ̄ ≤ hi, with the conditional model alone outside; σ̄ = n/a at t of the process ``s``.
        It costs one read of t by the host at each call. Source: Kynkäänniemi et al. 2024.

    Any linear prediction (ε, x0, v, score) may be guided so. Raises ValueError where y does not match the batch, TypeError
    for an interval without ``s``.
    """
    _check_interval(interval, s)
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be in [0, 1], not {rescale}")
    conditions = _Conditions(y, null)

    def model(x: Array, t: Array) -> Array:
        inside = _inside(interval, s, t)
        if w == 0 or not inside.any():
            return predict(x, t, conditions(x)[0])
        if w == -1 and not rescale and inside.all():
            return predict(x, t, conditions(x)[1])
        both, cond, uncond = _branches(predict, x, t, conditions)
        if inside.all() and is_cupy(cond):
            out = elementwise.weighted_sum(1 + w, cond, -w, uncond)
        else:
            weight = w if inside.all() else lift(np.where(np.broadcast_to(inside, len(cond)), w, 0.0), cond)
            out = classifier_free_eps(cond, uncond, weight)
        return restore(rescale_guidance(out, cond, rescale) if rescale else out, both)

    return model


class _Conditions:
    """(y, null) as arrays (B, …) of the kind of x. What is not on a GPU is sent there once, so that a graph may hold the rest."""

    def __init__(self, y: Any, null: Any) -> None:
        self._y, self._null = y, null
        self._sent: dict[tuple, Array] = {}  # by name, shape and dtype

    def __call__(self, x: Array) -> tuple[Array, Array]:
        xn = native(x)
        xp, batch = array_module(xn), xn.shape[0]
        y = native(self._y)
        cond = y if is_cupy(y) else self._kept(("y", batch), xp, lambda: xp.asarray(y))
        if cond.ndim == 0:
            cond = self._kept(("one y", batch), xp, lambda: xp.full(batch, int(cond), np.int64))
        if cond.shape[0] != batch:
            raise ValueError(f"y must be one condition or {batch} of them (the batch), not shape {cond.shape}")

        def nulls() -> Array:
            uncond = xp.empty_like(cond)
            uncond[...] = xp.asarray(native(self._null))
            return uncond

        uncond = nulls() if is_cupy(self._null) else self._kept(("null", cond.shape, cond.dtype), xp, nulls)
        return restore(cond, x), restore(uncond, x)

    def _kept(self, key: tuple, xp: Any, make: Callable[[], Array]) -> Array:
        if xp is np:
            return make()
        if key not in self._sent:
            self._sent[key] = make()
        return self._sent[key]


def _stacked(a: Array, b: Array) -> Array:
    """[a, b] along the first axis; on a GPU by a kernel, which a graph can hold."""
    xp = array_module(a)
    plain = xp is np or a.dtype != b.dtype or a.dtype.itemsize % 4 or dispatch.chosen() != "auto"
    if plain or not (a.flags.c_contiguous and b.flags.c_contiguous):
        return xp.concatenate((a, b))
    from ..kernels.gpu import sampling

    return sampling.stack(a, b)


def _branches(predict: Predict, x: Array, t: Array, conditions: _Conditions) -> tuple[Array, Array, Array]:
    """(the answer to the doubled batch, its conditional half, its unconditional half); the halves are native arrays."""
    xn, tn = native(x), native(t)
    batch = xn.shape[0]
    pairs = ((xn, xn), (tn, tn), tuple(map(native, conditions(x))))
    both = predict(*(restore(_stacked(*pair), x) for pair in pairs))
    out = native(both)
    if np.shape(out)[:1] != (2 * batch,):
        raise ValueError(f"predict must return {2 * batch} samples for the doubled batch, not shape {np.shape(out)}")
    return both, out[:batch], out[batch:]


def _check_interval(interval: Interval, s: Levels | None) -> None:
    if interval is None:
        return
    check_schedule(s)
    lo, hi = interval
    if not 0 <= lo <= hi:
        raise ValueError(f"interval must be two noise levels 0 <= lo <= hi, not {interval}")


def _inside(interval: Interval, s: Levels | None, t: Array) -> np.ndarray:
    """Whether the noise level of each t lies in the interval."""
    if interval is None or s is None:
        return np.array(True)
    sigma = s.sigma_bar_at(to_numpy(t))
    return (interval[0] <= sigma) & (sigma <= interval[1])


@exchanged
def drop_condition(y: Array, null: Any, p: float, seed: int = 0, step: int = 0) -> Array:
    """``y`` (B, …) with each condition replaced by ``null`` with probability p, for classifier-free training. Eq: S3-C11.

    Which are dropped depends on (seed, step, place in the batch) alone. Raises ValueError unless 0 ≤ p ≤ 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], not {p}")
    xp = array_module(y)
    dropped = xp.asarray(counter.uniform(y.shape[0], seed, step, streams.DROP) < p)
    return xp.where(dropped.reshape(-1, *(1,) * (y.ndim - 1)), xp.asarray(null, dtype=y.dtype), y)


# -------------------------------------------------------------------------------------------------------------- by a classifier


@exchanged
def conditional_score(score: Array, gradient: Array, w: float = 1.0) -> Array:
    """∇ log[p(x)·p(c|x)^w] = ∇ log p(x) + w·∇ log p(c|x), up to a constant factor of the density. Eq: S4-E23, S0-E36, S0-E35.

    With w = 1 it is Bayes' rule. For a step of the reverse chain p(x) is p(x_{t−1}|x_t): ∇ log p(x_{t−1}|x_t, c) is
    ∇ log p(x_{t−1}|x_t) + ∇ log p(c|x_{t−1}), because c and x_t are independent given x_{t−1}. With ∇ log p(x|c) as the
    score the law is p(x|c)·p(c|x)^w, that of classifier-free guidance with weight w.
    """
    return score + w * gradient


@exchanged
def classifier_guided_eps(eps: Array, gradient: Array, t: Any, s: Levels, w: float = 1.0) -> Array:
    """ε̃ = ε − w·√(1−ᾱ_t)·∇_x log p(c|x_t), t an int or (B,) in 0..T. Eq: S0-E33, S3-C10.

    ``gradient`` is that of a classifier trained on noisy x_t. With the conditional ε, w is w + 1 with the unconditional
    (Dhariwal & Nichol 2021, Algorithm 2, whose s is that).
    """
    return eps - w * level_columns(s, t, eps)[1] * gradient


@exchanged
def implicit_classifier_score(eps_cond: Array, eps_uncond: Array, t: Any, s: Levels) -> Array:
    """∇_x log p(c|x_t) = ∇ log p(x_t|c) − ∇ log p(x_t) = −(ε_c − ε_u)/√(1−ᾱ_t), t in 1..T. Eq: S0-E34, S0-E36."""
    return score_from_eps(eps_cond - eps_uncond, t, s)


def implicit_classifier(predict: Predict, y: Any, null: Any, s: Levels, prediction: str = "eps") -> Gradient:
    """gradient(x, t) = ∇_x log p(y|x_t) of the classifier that a conditional network holds. Eq: S0-E34, S0-E36.

    predict, y and null as for :func:`classifier_free`; ``prediction`` what it returns. Guiding the unconditional model by it with
    weight w + 1 is classifier-free guidance with weight w.
    """

    conditions = _Conditions(y, null)

    def gradient(x: Array, t: Array) -> Array:
        both, cond, uncond = _branches(predict, x, t, conditions)
        return restore((cond - uncond) / _on_output(prediction, s, t, cond), both)

    return gradient


def _on_output(prediction: str, s: Levels, t: Array, like: Array) -> Any:
    """k such that output + k·g is the output of a model whose score is larger by g, as a factor of ``like``."""
    signal, noise = s.levels(to_numpy(t))
    return lift(-noise / coefficients(prediction, "eps", signal, noise)[1], like)


def classifier_guided(
    model: Model, gradient: Gradient, s: Levels, w: float = 1.0, prediction: str = "eps", interval: Interval = None
) -> Model:
    """A model(x, t) in the score form: its score is that of ``model`` plus w·∇_x log p(c|x_t). Eq: S0-E33, S3-C10, S0-E36.

    gradient(x, t) is that of a classifier of noisy x_t (``nets.classifier.Classifier.log_prob_gradient``). In terms of ε it is
    ε − w·n·∇ log p(c|x_t) (Dhariwal & Nichol 2021, Algorithm 2); ``prediction`` says what the model returns. Any sampler may use
    it, noise or not. A conditional model with w equals an unconditional one with w + 1, which is their s. ``interval`` as for
    :func:`classifier_free`; outside it the classifier is not asked.
    """
    check_schedule(s)
    _check_interval(interval, s)

    def guided(x: Array, t: Array) -> Array:
        m = model(x, t)
        inside = _inside(interval, s, t)
        if w == 0 or not inside.any():
            return m
        out, g = native(m), native(gradient(x, t))
        weight: Any = w if inside.all() else lift(np.where(np.broadcast_to(inside, len(out)), w, 0.0), out)
        return restore(out + weight * _on_output(prediction, s, t, out) * g, m)

    return guided


def mean_guided(
    model: Model,
    gradient: Gradient,
    table: Table,
    w: float = 1.0,
    at: str = "x_t",
    clip: tuple[float, float] | None = None,
    rederive_eps: bool = True,
) -> Model:
    """A model(x, t) in the mean form, for sampling by ``table``: x' ~ N(μ + w·Σ·∇ log p(c|·), Σ). Eq: S4-E23.

    Σ = c² is the variance of the table's row, so the last row, which has no noise, is not guided. Dhariwal & Nichol 2021,
    Algorithm 1; w is its s where the model is unconditional.

    at: where the classifier is asked: "x_t" at the state and its time t, as their code and their algorithm do, or "mean" at μ and
        the time stepped to, where their derivation, which expands log p(c|x') at x' = μ, has it.
    clip: bounds of the predicted x0, as in :func:`samplers.sample`, which must then not be given any: here they bound μ and leave
        the shift alone. ``rederive_eps`` as there.

    Where Σ = β = 1 − ᾱ_t/ᾱ_to the shift is √(1−β) times that of the score form with the same w; where it is β̃, less by β̃/β too.
    Raises ValueError for a table that holds rows with history, two rows of one time, or no noise at all.
    """
    if at not in PLACES:
        raise ValueError(f"at must be one of {PLACES}, not {at!r}")
    if not isinstance(table, Table):
        raise TypeError(f"table must be a Table (tables.ddpm(s) for one), not {type(table).__name__}")
    if table.H.any() or np.any(np.diff(table.t) >= 0):
        raise ValueError(f"table must take its steps one evaluation each, down the times; {table.name} does not")
    if not table.c.any():
        raise ValueError(f"table must have noise, the mean form shifts by w·Σ·∇ log p(c|x); {table.name} has none")
    if at == "mean" and table.noise_to[-1] > 0:
        raise ValueError(f"at 'mean' needs the times of all levels stepped to, and {table.name} stops at one that has none")
    p, q = coefficients(table.prediction, "x0", table.signal, table.noise)
    ex, em = coefficients(table.prediction, "eps", table.signal, table.noise)
    on_x, on_m = table.A + table.B0 * p + table.Be * ex, table.B0 * q + table.Be * em
    on_clipped = table.B0 - table.Be * table.signal / table.noise * rederive_eps
    t_to = np.r_[table.t[1:], 0.0]
    times = table.times[::-1]

    def guided(x: Array, t: Array) -> Array:
        told = to_numpy(t)
        row = len(table) - 1 - np.searchsorted(times, told)
        if np.any(row < 0) or np.any(table.times[row] != told):
            raise ValueError(f"t must be times of {table.name}, not {told}")
        m, state = model(x, t), native(x)
        out = native(m)
        shift = 0.0
        if clip is not None:
            x0 = lift(p[row], state) * state + lift(q[row], state) * out
            shift = lift(on_clipped[row], state) * (array_module(x0).clip(x0, *clip) - x0)
        if w != 0 and table.c[row].any():
            place, when = x, t
            if at == "mean":
                place = restore(lift(on_x[row], state) * state + lift(on_m[row], state) * out + shift, x)
                when = restore(array_module(state).asarray(t_to[row].astype(told.dtype)), x)
            shift = shift + lift(w * table.c[row] ** 2, state) * native(gradient(place, when))
        return restore(out + shift / lift(on_m[row], state), m)

    return guided
