"""Diffusion-LM on text: letters as learned embeddings under Gaussian noise, which are rounded back to letters."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from alphabar import kernels
from alphabar.core import diffusion_lm, diffusion_lm_sampler, samplers, schedules, tables
from alphabar.core.diffusion_lm_sampler import Control
from alphabar.core.discrete_losses import stratified_times
from alphabar.core.levels import Schedule
from alphabar.kernels import streams
from alphabar.kernels.arrays import array_module, native, restore
from alphabar.nets.autograd import Tensor, no_grad
from alphabar.nets.token_functions import noised
from alphabar.nets.word_diffusion import WordDiffusion
from alphabar.tools import config as configs
from alphabar.tools import networks
from alphabar.tools.config import Config, ConfigError, Sample
from alphabar.tools.learner import Attempt, Learner
from alphabar.tools.methods import Predict
from alphabar.tools.sampling import Guide, Model, Sampler

Array = Any
STEPS = 200  # of a sampler where none are given
PREDICTION = "x0"
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "sqrt": schedules.sqrt,
    "cosine": schedules.cosine,
    "linear": partial(schedules.linear, rescale=True),
}
TABLES: dict[str, Callable[..., tables.Table]] = {"ddpm": tables.ddpm, "ddim": tables.ddim}


class Embedded:
    """The schedule that noises the embeddings of words, σ_0, and the samplers that end in words.

    shape: (length,), that of one sample. ConfigError for settings that make no schedule.
    """

    kind = "text"

    def __init__(self, config: Config, shape: tuple[int, ...], arrays: Mapping[str, Any] | None = None) -> None:
        config = configs.completed(config)
        d = config.diffusion
        self.name, self.shape, self.features, self.sigma0 = config.method, tuple(shape), d.features, d.sigma0
        try:
            self.levels = SCHEDULES[d.schedule](d.T)
        except ValueError as e:
            raise ConfigError(f"[diffusion]: {e}") from e

    # --------------------------------------------------------------------------------------------------------------- the training

    def noised(self, net: WordDiffusion, words: Array, seed: int, step: int) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        """(times, Emb(w), x_0, x_t) of a training step, tensors of one tape, from (seed, step) alone. Eq: L7, S4-E17.

        The times are spread evenly.
        """
        times = stratified_times(len(words), self.levels.T, seed, step)
        mean = net.embed(words)
        xp, dtype = array_module(mean.data), mean.data.dtype
        z, eps = (
            kernels.normals(xp.empty_like(mean.data), seed, step=step, stream=stream)
            for stream in (streams.EMBED, streams.FORWARD)
        )
        x0 = noised(mean, 1, dtype.type(self.sigma0) * z)
        signal, noise = (xp.asarray(v[times].astype(dtype)) for v in (self.levels.signal, self.levels.noise))
        return times, mean, x0, noised(x0, signal, noise[:, None, None] * eps)

    # --------------------------------------------------------------------------------------------------------------- the samples

    def predict(self, predict: Predict) -> Predict:
        """A network's ``predict(x, t, y)``. ValueError where an answer is not a number."""

        def of(x: Array, t: Any, y: Any = None) -> Array:
            answer = native(predict(x, t, y))
            if not bool(array_module(answer).isfinite(answer).all()):
                raise ValueError("some of the network's answers are not numbers")
            return restore(answer, x)

        return of

    def sampler(self, settings: Sample, spacing: str | None = None, gamma: Any = None) -> Sampler:
        """The sampler that ``settings`` ask for. ValueError for steps or spacing that it cannot take."""
        if gamma is not None:
            raise ValueError("the best variance goes with samplers of images")
        name = configs.SAMPLERS[self.name][0] if settings.sampler == "auto" else settings.sampler
        options: dict[str, Any] = {"eta": settings.eta} if name == "ddim" else {}
        steps = settings.steps or own_steps(self.levels.T)
        table = TABLES[name](self.levels, steps, prediction=PREDICTION, spacing=spacing or "trailing", **options)
        words = [f"{name} {steps} steps", *(f"{k} = {v:g}" for k, v in options.items() if v)]
        part = f" at t <= {settings.clamp * self.levels.T:g}" if settings.clamp < 1 else ""
        words.append(f"clamped{part}" if settings.clamp else "not clamped")
        words += [f"resampled {settings.resample} times"] * (settings.resample > 1)
        return Sampler(", ".join(words), len(table), partial(self._run, table, settings))

    def _run(
        self,
        table: tables.Table,
        settings: Sample,
        model: Model,
        x_T: Array,
        net: WordDiffusion,
        gradient: Model | None = None,
        **options: Any,
    ) -> Array:
        def logits(x: Array) -> Array:
            with no_grad():
                return net.logits(x).data

        control = None
        if gradient is not None:
            s = settings
            control = Control(gradient, s.fluency, s.control_steps, s.control_rate, s.control_method)
        known = options.get("known")
        return diffusion_lm_sampler.sample(
            model,
            table,
            x_T,
            net.table.data,
            control,
            resample=1 if known is None else settings.resample,
            clamp_below=settings.clamp * self.levels.T,
            logits=logits,
            **options,
        )[0]

    def guided(self, net: Any, chosen: Sampler, y: Array | None, how: Guide) -> tuple[Model, dict[str, Any]]:
        """(model(x, t), options of the sampler's run): the network, and the gradient of a classifier where there is one."""
        options: dict[str, Any] = {"net": net}
        if how.gradient is not None:
            of_class, weight = how.gradient(y), how.classifier_weight
            options["gradient"] = lambda x, t: of_class(x, t) * weight
        return self.predict(net.predict), options

    def prior(self, net: Any, n: int, seed: int, first_sample: int) -> Array:
        """x_T of ``n`` samples, numbered from ``first_sample``."""
        return samplers.prior((n, *self.shape, self.features), seed, first_sample, net.params.dtype, net.params.xp)

    def decoded(self, net: Any, x: Array) -> Array:
        """Words as tokens uint8."""
        return x.astype(np.uint8)


def own_steps(T: int) -> int:
    """The number of steps of a sampler where none is given."""
    return min(STEPS, T)


def resolved(config: Config, data: Any) -> Config:
    """``config`` with what it leaves to its method: the schedule, network, sampler and steps."""
    config = configs.completed(config)
    s = config.sample
    return dataclasses.replace(config, sample=dataclasses.replace(s, steps=s.steps or own_steps(config.diffusion.T)))


class EmbeddedLearner(Learner):
    """Text: embeddings, their denoiser and the rounding learn together."""

    process: Embedded
    net: Any

    def __init__(self, config: Config, data: Any, xp: ModuleType = np) -> None:
        m, length = config.model, math.prod(data.shape)
        options = {
            "length": length,
            "states": data.states,
            "features": config.diffusion.features,
            **{name: getattr(m, name) for name in ("width", "layers", "heads", "positions", "dropout")},
            "seed": config.train.seed,
        }
        process = Embedded(config, data.shape)
        super().__init__(config, data, xp, process, networks.made("word-diffusion", options, xp, f"text of {length}"))

    def attempt(self, k: int) -> Attempt:
        """Words from the data, their noised embeddings, the network's x̂_0 and the rounding, and the end-to-end loss. Eq: L7."""
        words, _, rows = self.batch(k)
        times, mean, x0, x_t = self.process.noised(self.net, words, self.config.train.seed, k)
        output, logits = self.net(x_t, times, step=k), self.net.logits(x0)
        loss = diffusion_lm.end_to_end_loss(
            output.data, x0.data, mean.data, logits.data, words, self.xp.asarray(times), self.process.levels
        )
        roots = (output, loss.output), (logits, loss.logits), (x0, loss.x0), (mean, loss.mean)
        arrays = {"x0": x0.data, "logits": logits.data, "output": output.data, "loss": loss.value}
        return Attempt(loss.value, roots, rows, times, {"x_t": x_t.data}, arrays)
