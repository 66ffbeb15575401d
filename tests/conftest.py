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


class ThreeStates:
    """A chain of T = 3 steps over three states with random tables, small enough to enumerate: the discrete oracle of the bound.

    q0 (3,) and Q[t][i, j] = q(x_t=j|x_{t−1}=i) make the data and the forward chain, prior (3,) and
    P[t][j, i] = p(x_{t−1}=i|x_t=j) the model. Qbar[t] = Q_1…Q_t. paths (4, 81): every (x_0, …, x_3).
    """

    T = 3

    def __init__(self) -> None:
        rng = np.random.default_rng(1)

        def rows(shape: tuple[int, ...]) -> np.ndarray:
            m = rng.random(shape) + 0.1
            return m / m.sum(axis=-1, keepdims=True)

        eye = np.eye(3)
        self.q0 = rows((3,))
        self.Q = [eye, *(rows((3, 3)) for _ in range(3))]
        self.prior = rows((3,))
        self.P = [eye, *(rows((3, 3)) for _ in range(3))]
        self.Qbar = [eye]
        for t in (1, 2, 3):
            self.Qbar.append(self.Qbar[-1] @ self.Q[t])
        self.paths = np.indices((3,) * 4).reshape(4, -1)

    def forward(self) -> np.ndarray:
        """q(x_t|x_{t−1}) along every path, t = 1..T, (3, 81)."""
        return np.stack([self.Q[t][self.paths[t - 1], self.paths[t]] for t in (1, 2, 3)])

    def reverse(self) -> np.ndarray:
        """p(x_{t−1}|x_t) along every path, t = 1..T, (3, 81)."""
        return np.stack([self.P[t][self.paths[t], self.paths[t - 1]] for t in (1, 2, 3)])

    def posterior(self, t: int) -> np.ndarray:
        """q(x_{t−1}=i|x_t=j, x_0=k) as [k, j, i], by Bayes' rule."""
        joint = self.Qbar[t - 1][:, None, :] * self.Q[t].T[None]
        return joint / joint.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="session")
def three_states() -> ThreeStates:
    return ThreeStates()


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
