"""What belongs to each method of training: its process, its learner, how its settings are completed. All methods meet here."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alphabar.tools import categorical, diffusion_lm, methods
from alphabar.tools.config import DISCRETE, EMBEDDED, GAUSSIAN, Config
from alphabar.tools.learner import GaussianLearner, Learner


class Family(NamedTuple):
    """Methods that share a kind of process.

    resolved(config, data): the configuration with the numbers that it leaves to the data and to the method.
    process(config, shape, arrays): the process, of samples of that shape, with what a checkpoint keeps of it besides. It has the
    methods ``prior`` and ``decoded``, and, unless it is a :class:`~alphabar.tools.methods.Process`, ``sampler`` and ``guided``
    as in :mod:`alphabar.tools.sampling`.
    learner(config, data, xp): what a training step works on, see :mod:`alphabar.tools.learner`.
    """

    resolved: Callable[[Config, Any], Config]
    process: Callable[[Config, tuple[int, ...], Mapping[str, Any]], Any]
    learner: Callable[..., Learner]


FAMILIES = {
    **dict.fromkeys(GAUSSIAN, Family(methods.resolved, lambda config, shape, arrays: methods.Process(config), GaussianLearner)),
    **dict.fromkeys(DISCRETE, Family(categorical.resolved, categorical.Categorical, categorical.CategoricalLearner)),
    **dict.fromkeys(EMBEDDED, Family(diffusion_lm.resolved, diffusion_lm.Embedded, diffusion_lm.EmbeddedLearner)),
}


def of(config: Config) -> Family:
    """The family of a configuration's method."""
    return FAMILIES[config.method]
