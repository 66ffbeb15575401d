"""Methods of discrete states: multinomial diffusion and D3PM, on images of few levels and on text."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from alphabar.core import discrete, discrete_losses, discrete_sampler, guidance, rates
from alphabar.core.transitions import Absorbing, DiscretizedGaussian, NearestNeighbour, Transitions, Uniform, neighbour_rates
from alphabar.kernels.arrays import array_module, native, restore
from alphabar.tools import config as configs
from alphabar.tools import discrete_images, networks, sources
from alphabar.tools.config import Config, ConfigError
from alphabar.tools.learner import Attempt, Learner
from alphabar.tools.methods import Predict
from alphabar.tools.sampling import Guide, Model, Sampler

Array = Any
# λ of D3PM; the loss of multinomial diffusion is the bound alone. The cross-entropy asks for the law of x_0 given all of x_t, the
# bound for that given the other elements: under a mask they are one, under other laws a large λ spoils the bound.
HYBRID = {("images", True): 0.001, ("images", False): 0.001, ("text", True): 0.01, ("text", False): 0.0}
LEFT = 1e-6  # of the information, at the least, where the rates of the transition nearest are slowed
LINEAR = (1e-4, 0.02)  # the ends of the linear schedule at T = 1000


class Categorical:
    """A law that noises discrete states, and how a network reads them and answers with logits of p̃(x_0|x_t).

    shape: that of one sample. A U-Net reads the states scaled to [−1, 1]; under an absorbing law masked ones are 0 there, and
    as many channels again say which are masked. A transformer reads them one after the other as they are, and so answers.
    arrays: what the law needs besides its configuration, "rates" of the transition nearest. ConfigError where they do not fit.
    """

    def __init__(self, config: Config, shape: tuple[int, ...], arrays: Mapping[str, Any] | None = None) -> None:
        config = configs.completed(config)
        self.name, self.shape, self.K = config.method, tuple(shape), config.diffusion.states
        self.kind, self.network, self.hybrid = configs.data_kind(config), config.model.network, config.train.hybrid
        try:
            self.law = law(config, None if arrays is None else arrays.get("rates"))
        except ValueError as e:
            raise ConfigError(f"[diffusion]: {e}") from e

    @property
    def mask(self) -> int | None:
        """The state that stands for a masked element, under an absorbing law."""
        return self.law.mask if isinstance(self.law, Absorbing) else None

    # --------------------------------------------------------------------------------------------------------------- the network

    def input(self, x: Array) -> Array:
        """What the network reads for states (B, …)."""
        if self.network == "transformer":
            return x.reshape(len(x), -1)
        xp = array_module(x)
        scaled = x.astype(xp.float32) * xp.float32(2 / (self.K - 1)) - xp.float32(1)
        if self.mask is None:
            return scaled
        masked = x == self.mask
        return xp.concatenate([xp.where(masked, xp.float32(0), scaled), masked.astype(xp.float32)], axis=-1)

    def logits(self, answer: Array) -> Array:
        """A network's answer as logits (B, …, K)."""
        return answer.reshape(len(answer), *self.shape, self.K)

    def predict(self, predict: Predict) -> Predict:
        """A network's ``predict(x, t, y)`` for states, answering with logits. ValueError where one is not a number."""

        def of(x: Array, t: Any, y: Any = None) -> Array:
            answer = native(predict(self.input(native(x)), t, y))
            if not bool(array_module(answer).isfinite(answer).all()):
                raise ValueError("some of the network's answers are not numbers")
            return restore(self.logits(answer), x)

        return of

    # --------------------------------------------------------------------------------------------------------------- the training

    def states(self, samples: Array) -> Array:
        """Samples of a data set as states (B, …) int32."""
        return discrete_images.to_states(samples, self.K) if self.kind == "images" else samples

    def noised(self, x0: Array, seed: int, step: int) -> tuple[np.ndarray, Array]:
        """(times, x_t) of a training step, from (seed, step) alone; the times are spread evenly. Eq: S4-E26, S4-E31."""
        times = discrete_losses.stratified_times(len(x0), self.law.T, seed, step)
        return times, discrete.q_sample(x0, array_module(x0).asarray(times), self.law, seed=seed, step=step)

    def loss(self, logits: Array, x0: Array, x_t: Array, times: np.ndarray) -> tuple[Array, Array]:
        """(value of every sample, gradient of their mean): T times the bound's term at t, and λ times the cross-entropy."""
        return discrete_losses.hybrid_loss(logits, x0, x_t, times, self.law, cross_entropy=self.hybrid)

    # --------------------------------------------------------------------------------------------------------------- the sampling

    def sampler(self, settings: configs.Sample, spacing: str | None = None, gamma: Any = None) -> Sampler:
        """The sampler that ``settings`` ask for. ValueError for what it cannot take."""
        if spacing is not None:
            raise ValueError("spacing does not go with the sampler ancestral")
        steps = settings.steps or own_steps(self.law.T)
        if steps > self.law.T:
            raise ValueError(f"steps must be in 1..{self.law.T}, not {steps}")
        warm = f", temperature {settings.temperature:g}" if settings.temperature != 1 else ""
        run = partial(self._run, steps=steps, temperature=settings.temperature)
        return Sampler(f"ancestral {steps} steps{warm}", steps, run)

    def _run(self, model: Model, x_T: Array, **options: Any) -> Array:
        return discrete_sampler.sample(model, self.law, x_T, **options)

    def guided(self, net: Any, chosen: Sampler, y: Array | None, how: Guide) -> tuple[Model, dict[str, Any]]:
        """(model(x, t) of samples with labels y, no options): (1 + w)·logits_c − w·logits_u where there are classes."""
        predict = self.predict(net.predict)
        if how.gradient is not None:
            raise ValueError("a classifier guides networks that take Gaussian noise off images")
        if y is None or net.config.get("classes") is None:
            return predict, {}
        return guidance.classifier_free(predict, y, how.weight, net.null), {}

    def prior(self, net: Any, n: int, seed: int, first_sample: int) -> Array:
        """x_T of ``n`` samples, numbered from ``first_sample``."""
        return discrete.prior((n, *self.shape), self.law, seed, first_sample, net.params.xp)

    def decoded(self, net: Any, x: Array) -> Array:
        """States as uint8: images, or tokens."""
        return discrete_images.to_images(x, self.K) if self.kind == "images" else x.astype(np.uint8)


def law(config: Config, jumps: np.ndarray | None = None) -> Transitions:
    """The transition matrices of a completed configuration; ``jumps``: the rates of the transition nearest."""
    d, K = config.diffusion, config.diffusion.states
    beta = {"cosine": rates.cosine, "linear": _linear, "reciprocal": rates.reciprocal}[d.schedule](d.T)
    name = "uniform" if config.method == "multinomial" else d.transition
    if name == "nearest":
        if jumps is None or jumps.shape != (K, K):
            found = "none" if jumps is None else jumps.shape
            raise ValueError(f"the transition nearest needs the rates of {K} states, not {found}")
        return NearestNeighbour(jumps, _jump_times(jumps, beta))
    return Absorbing(K + 1, beta) if name == "absorbing" else {"uniform": Uniform, "gaussian": DiscretizedGaussian}[name](K, beta)


def _linear(T: int) -> np.ndarray:
    """Rates that forget as much by the end for every T."""
    start, end = (min(rate * 1000 / T, 0.999) for rate in LINEAR)
    return rates.linear(T, start, end)


def _jump_times(jumps: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """Times β_t for which exp(β_tR) lets a state stay as likely, in the mean over all, as the uniform law does with ``beta``."""
    modes = np.linalg.eigvalsh(jumps)[:-1]  # but for the last one, 0, of what stays for ever
    kept = np.maximum(np.cumprod(1 - beta), LEFT)
    low, high = np.zeros(len(kept)), np.full(len(kept), np.log(LEFT) / modes[-1])
    for _ in range(64):
        middle = (low + high) / 2
        more = np.exp(modes * middle[:, None]).mean(axis=1) > kept
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    high[0] = 0.0
    return np.maximum(np.diff(high, prepend=0.0), 0.0)


def jump_rates(config: Config, data: Any) -> np.ndarray:
    """The rates of the transition nearest: among levels of an image by their value, among letters by what stands beside them."""
    K = config.diffusion.states
    embedding = letter_embedding(data.tokens, K) if sources.kind(data) == "text" else np.arange(K, dtype=np.float64)[:, None]
    try:
        found = neighbour_rates(embedding, config.diffusion.neighbours)
        NearestNeighbour(found, [0.0, 1.0])
    except ValueError as e:
        raise ConfigError(f"diffusion.neighbours: {e}") from e
    return found


def letter_embedding(tokens: np.ndarray, K: int) -> np.ndarray:
    """(K, 2K): the frequencies of the letters after each letter, and of those before it."""
    pairs = np.bincount(tokens[:-1].astype(np.int64) * K + tokens[1:], minlength=K * K).reshape(K, K)
    both = np.concatenate([pairs, pairs.T], axis=1).reshape(K, 2, K)
    return (both / np.maximum(both.sum(axis=2, keepdims=True), 1)).reshape(K, 2 * K)


def own_steps(T: int) -> int:
    """The number of steps of the sampler where none is given."""
    return min(configs.STEPS["ancestral"], T)


def resolved(config: Config, data: Any) -> Config:
    """``config`` with what it leaves to the data and to its method: the states, λ, the schedule, network, sampler and steps."""
    config = configs.completed(config)
    d, t, s, kind = config.diffusion, config.train, config.sample, sources.kind(data)
    if kind == "text" and d.states not in (0, data.states):
        raise ConfigError(f"diffusion.states must be 0 or {data.states} for this text, not {d.states}")
    states = data.states if kind == "text" else d.states or discrete_images.levels_of(data.images)
    if states < 2:
        raise ConfigError(f"diffusion.states must be 0 or in 2..256, not {states}")
    if t.hybrid < 0:
        masked = config.diffusion.transition == "absorbing"
        t = dataclasses.replace(t, hybrid=HYBRID[kind, masked] if config.method == "d3pm" else 0.0)
    s = dataclasses.replace(s, steps=s.steps or own_steps(d.T))
    return dataclasses.replace(config, diffusion=dataclasses.replace(d, states=states), train=t, sample=s)


class CategoricalLearner(Learner):
    """Discrete states: a U-Net or a transformer learns the logits of p̃(x_0|x_t)."""

    process: Categorical

    def __init__(self, config: Config, data: Any, xp: ModuleType = np) -> None:
        nearest = config.method == "d3pm" and config.diffusion.transition == "nearest"
        self.rates = {"rates": jump_rates(config, data)} if nearest else {}
        process = Categorical(config, data.shape, self.rates)
        super().__init__(config, data, xp, process, network(process, config, data, xp))

    def attempt(self, k: int) -> Attempt:
        """x0 from the data, its states at low-discrepancy times, and the hybrid loss of the logits. Eq: S4-E28, S4-E29."""
        samples, labels, rows = self.batch(k)
        x0 = self.process.states(samples)
        times, x_t = self.process.noised(x0, self.config.train.seed, k)
        output = self.net(self.process.input(x_t), times, self.told(labels, k), step=k)
        value, gradient = self.process.loss(self.process.logits(output.data), x0, x_t, times)
        arrays = {"output": output.data, "loss": value}
        return Attempt(value, ((output, gradient.reshape(output.shape)),), rows, times, {"x_t": x_t}, arrays)

    def state(self) -> dict[str, dict[str, Array]]:
        """The rates of the transition nearest, which samples are drawn with too."""
        return {networks.LAW: self.rates} if self.rates else {}

    def load_state(self, group: str, saved: Mapping[str, Any]) -> None:
        """Take up the rates that the run began with."""
        self.rates = {"rates": saved["rates"]}
        self.process = Categorical(self.config, self.data.shape, self.rates)


def network(process: Categorical, config: Config, data: Any, xp: Any) -> Any:
    """The network of a configuration for these data."""
    if process.network == "unet":
        channels = data.shape[-1]
        inside = channels * (1 if process.mask is None else 2)
        options = networks.unet_options(config, data, inside, channels * process.K)
    else:
        options = networks.transformer_options(config, data, math.prod(data.shape), process.law.K, process.K)
    return networks.made(process.network, options, xp, f"{process.kind} of {'×'.join(map(str, data.shape))}")
