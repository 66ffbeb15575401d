"""Closed-form data whose exact predictions are known at every noise level: the oracles of the sampler tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphabar.core import schedules

Levels = Callable[[Any], tuple[Any, Any]]


class Gaussian:
    """x0 ~ N(mean, std²), elementwise: x = a·x0 + n·ε has the exact ε(x) = n·(x − a·mean)/(a²·std² + n²)."""

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = mean, std

    def eps(self, x: Any, a: Any, n: Any) -> Any:
        return n * (x - a * self.mean) / (a**2 * self.std**2 + n**2)

    def x0(self, x: Any, a: Any, n: Any) -> Any:
        return self.mean + a * self.std**2 * (x - a * self.mean) / (a**2 * self.std**2 + n**2)

    def flow(self, x: Any, a: Any, n: Any, a_to: Any = 1.0, n_to: Any = 0.0) -> Any:
        """Where the probability-flow ODE carries x from one level to another: x/a − mean scales as √(std² + (n/a)²)."""
        scale = np.sqrt((self.std**2 + (n_to / a_to) ** 2) / (self.std**2 + (n / a) ** 2))
        return a_to * (self.mean + (x / a - self.mean) * scale)

    def model(self, s: schedules.Schedule, prediction: str = "eps") -> Callable[[Any, Any], Any]:
        """The perfect network of this data under the schedule."""

        def predict(x: Any, t: Any) -> Any:
            a, n = (v.reshape(-1, *(1,) * (x.ndim - 1)) for v in s.levels(t))
            kinds = {
                "eps": lambda: self.eps(x, a, n),
                "x0": lambda: self.x0(x, a, n),
                "v": lambda: a * self.eps(x, a, n) - n * self.x0(x, a, n),
                "score": lambda: -self.eps(x, a, n) / n,
            }
            return kinds[prediction]().astype(x.dtype)

        return predict


class Mixture(Gaussian):
    """A one-dimensional mixture of normals, with density, score and the exact ε."""

    def __init__(self, weights: Any, means: Any, stds: Any) -> None:
        self.weights, self.means, self.stds = (np.asarray(v, np.float64) for v in (weights, means, stds))

    def _parts(self, x: Any, a: Any, n: Any) -> tuple[Any, Any, Any]:
        d = x[..., None] - np.asarray(a)[..., None] * self.means
        var = np.asarray(a)[..., None] ** 2 * self.stds**2 + np.asarray(n)[..., None] ** 2
        return self.weights * np.exp(-(d**2) / (2 * var)) / np.sqrt(2 * np.pi * var), d, var

    def density(self, x: Any, a: Any = 1.0, n: Any = 0.0) -> Any:
        return self._parts(x, a, n)[0].sum(axis=-1)

    def score(self, x: Any, a: Any = 1.0, n: Any = 0.0) -> Any:
        p, d, var = self._parts(x, a, n)
        return (p * -d / var).sum(axis=-1) / np.maximum(p.sum(axis=-1), 1e-300)

    def eps(self, x: Any, a: Any, n: Any) -> Any:
        return -n * self.score(x, a, n)

    def x0(self, x: Any, a: Any, n: Any) -> Any:
        return (x - n * self.eps(x, a, n)) / a

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        k = rng.choice(len(self.weights), n, p=self.weights)
        return self.means[k] + self.stds[k] * rng.standard_normal(n)


@pytest.fixture(scope="session")
def linear() -> schedules.Schedule:
    return schedules.linear()


@pytest.fixture(scope="session")
def gaussian() -> type[Gaussian]:
    return Gaussian


@pytest.fixture(scope="session")
def mixture() -> type[Mixture]:
    return Mixture


@pytest.fixture(scope="session")
def vectors() -> Any:
    """Sampler trajectories of the diffusers library, and their float64 recomputation (``…/ref64``)."""
    with np.load(Path(__file__).parent / "data" / "sampler_trajectories.npz") as stored:
        return {k: stored[k] for k in stored.files}
