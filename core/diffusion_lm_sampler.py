"""Sampling Diffusion-LM: clamping to embeddings, control by gradient steps, infilling; each a hook of the one sampler loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import streams
from ..kernels.arrays import array_module, is_native, native, restore
from . import inpainting, samplers
from .diffusion_lm import clamp, embedding_of, nearest_words
from .exchange import Array, float_array, float_batch
from .inpainting import single_step
from .levels import whole_steps
from .samplers import Model, answer_of
from .table import Table

Before = Callable[[Array, int], Array]
METHODS = ("adagrad", "sgd")
TINY = 1e-10  # Adagrad's, beside the root of the squares


@dataclass(frozen=True)
class Control:
    """A property asked of the sample, as gradient(x, t) = ∇_x log p(c|x_t) of a classifier of noised embeddings, and how.

    fluency: λ, the weight of log p_θ(x_{t−1}|x_t), which keeps the text likely. steps: gradient steps at each level. rate,
    method: see :func:`control_step`. t_min: at times below it the sample is left alone.
    """

    gradient: Callable[[Array, Array], Array]
    fluency: float = 0.01
    steps: int = 3
    rate: float = 0.1
    method: str = "adagrad"
    t_min: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, not {self.method!r}")
        for name in ("fluency", "rate"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be 0 or positive, not {getattr(self, name)}")
        if self.steps != 0:
            whole_steps(self.steps, "steps")


def control_step(
    x: Array,
    mean: Array,
    variance: float,
    gradient: Callable[[Array], Array],
    fluency: float = 0.01,
    steps: int = 3,
    rate: float = 0.1,
    method: str = "adagrad",
) -> Array:
    """x = x_{t−1} after gradient steps up λ·log p(x_{t−1}|x_t) + log p(c|x_{t−1}). Eq: S4-E23, L7, S4-M2.

        g = λ·(mean − x)/variance + ∇_x log p(c|x);    "adagrad" x ← x + rate·g/√Σg²,    "sgd" x ← x + rate·variance·g

    p(x_{t−1}|x_t) = N(mean, variance·I), variance > 0; gradient(x) is that of the classifier at t − 1; λ = ``fluency``. x, mean
    (B, …) float. Adagrad, the paper's, sums the squares g² over the steps of this call. With one step of "sgd", λ = 0 and rate 1
    it is the mean form of classifier guidance. Source: Li et al. 2022, section 5.1.
    """
    control = Control(lambda y, _: gradient(y), fluency, steps, rate, method)
    if not 0 < variance < np.inf:
        raise ValueError(f"variance must be positive and finite, not {variance}")
    state, center = float_batch(x, "x"), float_batch(mean, "mean")
    if center.shape != state.shape or center.dtype != state.dtype:
        raise ValueError(f"mean is {center.dtype} {center.shape}, want {state.dtype} {state.shape} like x")
    return restore(_controlled(control, state, center, float(variance), None, x), x)


def _controlled(control: Control, x: Array, mean: Array, variance: float, t: Any, like: Any) -> Array:
    """The gradient steps on native arrays; the classifier gets arrays of the kind of ``like``."""
    xp = array_module(x)
    squares = xp.zeros_like(x)
    for _ in range(control.steps):
        g = answer_of(control.gradient(restore(x, like), t), x, "gradient") + (control.fluency / variance) * (mean - x)
        if control.method == "sgd":
            x = x + (control.rate * variance) * g
        else:
            squares += g * g
            x = x + control.rate * g / (xp.sqrt(squares) + TINY)
    return x


def controlling(control: Control, table: Table, seed: int = 0, first_sample: int = 0) -> Before:
    """A ``before`` of :func:`samplers.sample` that steers every state which ``table`` drew with noise. Eq: S4-E23, L7, S4-M2.

    The mean of the step that made x_{t−1} is x_{t−1} − c·z, with z made anew from its key: seed and first_sample must be those of
    the sampler, which must not be given noise. Raises ValueError for a table that stores outputs or adds no noise.
    """
    single_step(table)
    if not table.c.any():
        raise ValueError(f"table must have noise, control goes by p(x_(t-1)|x_t); {table.name} has none")
    times = table.times

    def before(x: Array, i: int) -> Array:
        if i == 0 or table.c[i - 1] == 0 or times[i] < control.t_min or control.steps == 0:
            return x
        state, c = native(x), float(table.c[i - 1])
        xp = array_module(state)
        z = kernels.normals(xp.empty_like(state), seed, step=i - 1, stream=streams.SAMPLER, first_sample=first_sample)
        t = restore(xp.full(len(state), times[i]), x)
        return restore(_controlled(control, state.copy(), state - c * z, c**2, t, x), x)

    return before


def infilling(known: Array, mask: Array, embedding: Array, table: Table, seed: int = 0, first_sample: int = 0) -> Before:
    """A ``before`` of :func:`samplers.sample` that puts √ᾱ_t·Emb(known) + √(1−ᾱ_t)·z where ``mask`` is true. Eq: S4-M2, L12.

    known (B, L) words, read where the boolean mask (B, L) or (L,) is true. z is drawn anew at each row, from (seed, row,
    first_sample + k). An approximation, as :func:`inpainting.replacement`: what is free follows what is known less closely than
    it should. Raises ValueError for a table that stores outputs.
    """
    single_step(table)
    clean, place = _known(known, mask, embedding)

    def before(x: Array, i: int) -> Array:
        state = native(x)
        if state.shape != clean.shape:
            raise ValueError(f"known must be the words of x_T, shape {state.shape[:-1]}, not {clean.shape[:-1]}")
        z = kernels.normals(array_module(state).empty_like(state), seed, step=i, stream=streams.KNOWN, first_sample=first_sample)
        noised = float(table.signal[i]) * clean + float(table.noise[i]) * z
        return restore(array_module(state).where(place, noised.astype(state.dtype), state), x)

    return before


def _known(known: Any, mask: Any, embedding: Any) -> tuple[Array, Array]:
    """(the embeddings of what is known (B, L, d), where they count (B, L, 1)), native arrays."""
    keep, given = native(mask), native(known)
    if not (is_native(keep) and is_native(given)) or keep.dtype != bool or keep.shape not in (given.shape, given.shape[-1:]):
        raise ValueError("known must be words (B, L), and mask booleans (B, L) or (L,)")
    xp = array_module(keep)
    keep = xp.broadcast_to(keep, given.shape)
    words, vectors = embedding_of(xp.where(keep, given, 0), embedding)
    return vectors[words], keep[..., None]


def clamping(embedding: Array, t_max: float = np.inf) -> Callable[[Array, Array], Array]:
    """An ``x0`` of :func:`samplers.sample`: the predicted x0 replaced by the nearest embeddings at times t ≤ t_max. Eq: L7.

    Far from the data the nearest embedding is that of a frequent word, whatever stands beside it: with few words t_max
    below T keeps the variety. Source: Li et al. 2022, section 4.3.
    """

    def x0(prediction: Array, t: Array) -> Array:
        return clamp(prediction, embedding) if t_max == np.inf or float(native(t)[0]) <= t_max else prediction

    return x0


def sample(
    model: Model,
    table: Table,
    x_T: Array,
    embedding: Array,
    control: Control | None = None,
    known: tuple[Array, Array] | None = None,
    resample: int = 1,
    jump: int = 10,
    clamp_below: float = 0.0,
    logits: Callable[[Array], Array] | None = None,
    seed: int = 0,
    first_sample: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> tuple[Array, Array]:
    """(words int32 (B, L), x_0 (B, L, d)): ``table`` run from x_T (B, L, d), then rounding. Eq: L7, S4-M2, S4-E23.

    model(x, t): the network, of the kind ``table.prediction``; embedding (K, d), of the library and dtype of x_T.
    control: a property to steer to; with ``tables.ddpm`` it is the paper's method.
    known: (words (B, L), booleans): what is given where true. It comes out as it went in.
    resample, jump: above 1 the free words are made to agree with the known ones by :func:`inpainting.repaint`, at so many times
        the cost. It goes without control, and with clamping only where the model predicts x0.
    clamp_below: x̂_0 is clamped to the nearest embeddings at times t ≤ this; 0 never, math.inf always.
    logits: logits(x_0) (B, L, K), the rounding layer, of which the largest counts; by default the nearest embedding.
    seed, first_sample, progress: as in :func:`samplers.sample`.
    """
    whole_steps(resample, "resample")
    options: dict[str, Any] = {"seed": seed, "first_sample": first_sample, "progress": progress}
    clamped = clamping(embedding, clamp_below) if clamp_below > 0 else None
    if known is not None and resample > 1:
        x0 = _resampled(model, table, x_T, _known(*known, embedding), jump, resample, control, clamped, options)
        return _rounded(x0, embedding, known, logits), x0
    hooks: list[Before] = [] if control is None else [controlling(control, table, seed, first_sample)]
    if known is not None:
        hooks.append(infilling(*known, embedding, table, seed, first_sample))
    before = _together(hooks) if hooks else None
    x0 = samplers.sample(model, table, x_T, before=before, x0=clamped, **options)
    return _rounded(x0, embedding, known, logits), x0


def _resampled(
    model: Model,
    table: Table,
    x_T: Array,
    known: tuple[Array, Array],
    jump: int,
    resample: int,
    control: Control | None,
    clamped: Callable[[Array, Array], Array] | None,
    options: dict[str, Any],
) -> Array:
    if control is not None:
        raise ValueError("resample must be 1 with a control")
    if clamped is not None and table.prediction != "x0":
        raise ValueError(f"resample must be 1 where clamping is asked and the model predicts {table.prediction}, not x0")
    asked = model if clamped is None else lambda x, t: clamped(model(x, t), t)
    clean, place = known
    return inpainting.repaint(asked, table, x_T, restore(clean, x_T), restore(place, x_T), jump, resample, **options)


def _rounded(x0: Array, embedding: Array, known: tuple[Array, Array] | None, logits: Callable[[Array], Array] | None) -> Array:
    """The words of x_0, int32, with those that are known in their places."""
    if logits is None:
        words = native(nearest_words(x0, embedding))
    else:
        scores = float_array(logits(x0), "what logits returns")
        if scores.shape[:-1] != x0.shape[:-1]:
            raise ValueError(f"logits must return shape {(*x0.shape[:-1], 'K')}, not {scores.shape}")
        words = scores.argmax(axis=-1).astype(np.int32)
    if known is not None:
        given, keep = map(native, known)
        words = array_module(words).where(keep, given, words).astype(np.int32)
    return restore(words, x0)


def _together(hooks: Sequence[Before]) -> Before:
    def before(x: Array, i: int) -> Array:
        for hook in hooks:
            x = hook(x, i)
        return x

    return before
