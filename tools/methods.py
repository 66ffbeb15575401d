"""The methods of training: which process noises the data, what the network reads and answers, and how its errors are weighed.

All of them are x_t = a(t)·x0 + n(t)·ε with a network F that predicts ε (for "ddpm" also x0 or v):

    ddpm       a schedule of T steps, a² + n² = 1
    ncsn       a ladder of noise levels σ_1 < … < σ_T, a = 1; the score is −F/σ
    vpsde      the continuous limit of ddpm       vesde   that of ncsn       subvpsde   less noise on the way than vpsde

F reads x_t/√(a² + n²), which has unit variance where the data have: x_t itself for ddpm and vpsde, x_t/√(1 + σ²) where noise is
only added.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphabar.core import forward, langevin, losses, samplers, schedules, variance
from alphabar.core.data import Dataset, to_uint8, to_unit
from alphabar.core.exchange import lift
from alphabar.core.levels import Ladder, Levels, Schedule, Tabulated
from alphabar.core.sde import SDE, VESDE, VPSDE, SubVPSDE
from alphabar.kernels import counter, streams
from alphabar.kernels.arrays import array_module, native, restore, to_numpy
from alphabar.nets.descent import Loss
from alphabar.tools import config as configs
from alphabar.tools.config import Config, ConfigError, Diffusion

Array = Any
Predict = Callable[..., Array]
CLIP = (-1.0, 1.0)  # of the predicted x0: the range of the data
T = 1000.0  # the time that networks of the SDEs are told at the end
BELOW_T = ("dpm", "dpm++", "dpm++sde", "deis", "unipc")  # samplers that take fewer steps than there are levels
PAIRED = 1000  # images among which the largest distance is sought


@dataclass(frozen=True)
class Example:
    """What one step of training works on: the noised images, their times, the answer wanted, and the weight of its error."""

    x_t: Array
    times: np.ndarray
    target: Array
    weight: Any
    x0: Array
    share: Any = None  # 1/(T·p_t) where the times are not drawn uniformly


@dataclass(frozen=True)
class Method:
    """A way to train: how a configuration makes its levels, and the weightings of the loss that it takes."""

    levels: Callable[[Diffusion], Levels]
    weightings: tuple[str, ...]


class Process:
    """A method with its settings: all that the trainer and the samplers know of it. ConfigError where the settings do not fit."""

    def __init__(self, config: Config) -> None:
        if config.method not in METHODS:
            known = ", ".join(METHODS)
            raise ConfigError(f"this needs a network that takes Gaussian noise off images ({known}), not method {config.method}")
        method, self.name = METHODS[config.method], config.method
        try:
            self.levels = method.levels(config.diffusion)
        except ValueError as e:
            raise ConfigError(f"[diffusion]: {e}") from e
        self.prediction = config.diffusion.prediction
        self.weighting, self.importance = config.train.weighting, config.train.importance != "false"
        self.learned = config.train.loss == "hybrid"  # the network answers with the prediction and v, of the variance
        self.history: variance.ImportanceTimes | None = None
        if self.name == "ddpm" and config.train.importance == "true":
            self.history = variance.ImportanceTimes(int(self.levels.T))
        if self.weighting not in method.weightings:
            allowed = ", ".join(method.weightings)
            raise ConfigError(f"train.weighting must be one of {allowed} for method {self.name}, not {self.weighting!r}")

    def example(self, x0: Array, seed: int, step: int) -> Example:
        """Noised images for training step ``step``: x_t = a·x0 + n·ε, ε and t drawn from (seed, step) alone. Eq: S1-A1, S4-A1.

        ncsn: Eq: S0-E9, S0-E15; the SDEs: Eq: S4-E68. With importance for ddpm t depends on the losses so far too.
        """
        share = None
        if self.history is None:
            times, weight = self.times(len(x0), seed, step)
        else:
            times, share = self.history.times(len(x0), seed, step)
            weight = self.weight(times)
        x_t, eps = forward.q_sample(x0, times, self.levels, seed=seed, step=step)
        target = forward.training_target(x0, eps, times, self.levels, self.prediction)
        on_device = array_module(x0).asarray
        weight, share = (None if w is None else on_device(w) for w in (weight, share))
        return Example(x_t, times, target, weight, x0, share)

    def times(self, n: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(t, weight) of n images: the weight on mean(F − target)², None for 1 everywhere.

        simple      the score's error times λ = n², so that ‖F − ε‖² counts alike at all levels. Eq: S0-C8, S0-E44, S4-E68
        min_snr     :func:`alphabar.core.losses.min_snr_weight`; p2: :func:`alphabar.core.losses.p2_weight`
        likelihood  ½∫g²·(the score's error)² dt of the bound on the likelihood, in nats per dimension.
                    In terms of ε the weight is ½·g²/n² = d ln σ̄/dt, σ̄ = n/a. With ``importance`` t is drawn so that ln σ̄ is
                    uniform, and the weight is ln σ̄(T) − ln σ̄(t_min) for every image (Song et al. 2021, maximum likelihood
                    training, section 5). Eq: S4-E68
        """
        s = self.levels
        if self.weighting != "likelihood":
            times = forward.random_times(n, s, seed, step)
            return times, self.weight(times)
        assert isinstance(s, SDE)
        if not self.importance:
            times = forward.random_times(n, s, seed, step)
            return times, 0.5 * (s.T - s.t_min) * s.diffusion(times) ** 2 / s.levels(times)[1] ** 2
        low, high = np.log(s.sigma_bar_at([s.t_min, s.T]))
        part = counter.uniform(n, seed, step, streams.TIMES)
        times = np.clip(s.time(np.exp(low + (high - low) * part)), s.t_min, s.T)
        return times, np.full(n, high - low)

    def weight(self, times: np.ndarray) -> np.ndarray | None:
        """The weight of a weighting that depends on the level alone: None, min-SNR or P2."""
        if self.weighting == "simple":
            return None
        s = self.levels
        assert isinstance(s, Tabulated)
        if self.weighting == "p2":
            return losses.p2_weight(times, s, prediction=self.prediction)
        return losses.min_snr_weight(times, s, prediction=self.prediction)

    def loss(self, output: Array, example: Example) -> tuple[Array, Array]:
        """(value of every image, gradient of their mean): w·‖F − target‖² per element. Eq: S1-E22, S0-E14, S4-E68.

        With a learned variance that of :func:`alphabar.core.variance.hybrid_loss`, the decoder's 8-bit cells at t = 1.
        """
        loss, wanted = self.criterion(example)
        return loss(output, *(wanted or ()))

    def criterion(self, example: Example) -> tuple[Loss, tuple[Array | None, ...] | None]:
        """:meth:`loss` of an example as :func:`alphabar.nets.descent.descend` takes it: a function, and the arrays it wants."""
        e, s = example, self.levels
        if self.learned:
            assert isinstance(s, Tabulated)
            whole = (e.target, e.times, s, self.prediction, e.x0, e.share, e.weight)
            return lambda output: variance.hybrid_loss(output, *whole), None
        weight = e.weight if e.share is None else e.share if e.weight is None else e.share * e.weight
        return losses.weighted_loss, (e.target, None if weight is None else weight.astype(e.target.dtype))

    def learn(self, example: Example, value: Array) -> None:
        """Take the losses of a step into the history that importance draws the times by."""
        if self.history is not None:
            self.history.update(example.times, to_numpy(value) / to_numpy(example.share))

    def input(self, x: Array, t: Any) -> Array:
        """What the network reads in the place of x: x/√(a² + n²)."""
        if isinstance(self.levels, (Schedule, VPSDE)):
            return x
        return x * lift(1 / np.hypot(*self.levels.levels(to_numpy(t))), x)

    def prior(self, net: Any, n: int, seed: int, first_sample: int) -> Array:
        """x_T of ``n`` images of a network's size, numbered from ``first_sample``."""
        shape = (n, *net.config["image_size"], net.config["in_channels"])
        return samplers.prior(shape, seed, first_sample, xp=net.params.xp, std=self.levels.prior_std)

    def decoded(self, net: Any, x: Array) -> Array:
        """Images as uint8. ValueError where one is not a number."""
        return to_uint8(x)

    def predict(self, predict: Predict, whole: bool = False) -> Predict:
        """A network's ``predict(x, t, y)`` for states x of the process; of (prediction, v) the prediction unless ``whole``."""

        def of(x: Array, t: Any, y: Any = None) -> Array:
            answer = predict(self.input(x, t), t, y)
            if not self.learned or whole:
                return answer
            answer = native(answer)
            return restore(array_module(answer).ascontiguousarray(variance.split(answer)[0]), x)

        return of

    def of_answer(self, direction: Array) -> Array:
        """A direction in the space of the prediction as one in that of the network's whole answer."""
        if not self.learned:
            return direction
        return array_module(direction).concatenate([direction, 0 * direction], axis=-1)


def _schedule(d: Diffusion) -> Schedule:
    name = "linear" if d.schedule == "auto" else d.schedule
    if name == "cosine":
        if d.rescale:
            raise ValueError("rescale does nothing for the cosine schedule: set it to false")
        return schedules.cosine(d.T)
    return getattr(schedules, name)(d.T, rescale=d.rescale)


def _ladder(d: Diffusion) -> Ladder:
    if d.levels == 1:
        raise ValueError("levels must be 0 or at least 2, not 1")
    return schedules.geometric(d.sigma_min, d.sigma_max, d.levels)


_SDE_WEIGHTINGS = ("simple", "likelihood")
METHODS = {
    "ddpm": Method(_schedule, ("simple", "min_snr", "p2")),
    "ncsn": Method(_ladder, ("simple",)),
    "vpsde": Method(lambda d: VPSDE(d.beta_min, d.beta_max, T), _SDE_WEIGHTINGS),
    "vesde": Method(lambda d: VESDE(d.sigma_min, d.sigma_max, T), _SDE_WEIGHTINGS),
    "subvpsde": Method(lambda d: SubVPSDE(d.beta_min, d.beta_max, T), _SDE_WEIGHTINGS),
}


def resolved(config: Config, data: Dataset) -> Config:
    """``config`` with the numbers that it leaves to the data and to its method: σ_max, the levels, the sampler and its steps.

    σ_max is the largest distance between two images (of at most 1000, three digits), the levels overlap as they should:
    techniques 1 and 2 of Song & Ermon 2020. Eq: S4-C16.
    """
    config = configs.completed(config)
    d, s = config.diffusion, config.sample
    if not d.sigma_max and configs.belongs(config, "diffusion.sigma_max"):
        images, _, _ = data.batch(0, min(len(data), PAIRED))
        if len(images) < 2:
            raise ConfigError("diffusion.sigma_max must be given where there is only one image")
        d = dataclasses.replace(d, sigma_max=float(f"{langevin.max_pairwise_distance(to_unit(images)):.3g}"))
    if not d.levels and configs.belongs(config, "diffusion.levels"):
        try:
            found = langevin.ncsnv2_settings(max_distance=d.sigma_max, dim=math.prod(data.shape), sigma_min=d.sigma_min)
        except ValueError as e:
            raise ConfigError(f"[diffusion]: {e}") from e
        d = dataclasses.replace(d, levels=found.ladder.T)
    config = dataclasses.replace(config, diffusion=d)
    steps = s.steps or own_steps(Process(config).levels, s.sampler)
    return dataclasses.replace(config, sample=dataclasses.replace(s, steps=steps))


def own_steps(s: Levels, sampler: str) -> int:
    """The number of steps of a sampler where none is given: at most as many as a table of levels has."""
    if not isinstance(s, Tabulated) or sampler == "langevin":
        return configs.STEPS[sampler]
    return min(configs.STEPS[sampler], max(1, s.T - (sampler in BELOW_T)))
