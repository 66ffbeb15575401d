"""Closed-form data whose exact predictions are known at every noise level: the oracles of the sampler tests."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphabar.core import schedules
from alphabar.kernels import gpu
from alphabar.tools import trainer
from tests import cusim
from tests.cusim.probes import unwritten_is_nan

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


def shares(w: np.ndarray) -> np.ndarray:
    """Weights (…, K) over their sum; 0 where all are 0, in states that never occur."""
    total = w.sum(axis=-1, keepdims=True)
    return w / np.where(total > 0, total, 1)


class Words:
    """A law of words of L letters among D, few enough to enumerate: the oracle of discrete diffusion by a law on K >= D states.

    p (D, …, D): one axis a letter. words (Dᴸ, L) and states (Kᴸ, L): every clean and every noisy word.
    """

    def __init__(self, p: Any, law: Any) -> None:
        self.p = np.asarray(p, np.float64)
        self.D, self.L, self.law = self.p.shape[0], self.p.ndim, law
        self.words = np.indices(self.p.shape).reshape(self.L, -1).T.astype(np.int32)
        self.states = np.indices((law.K,) * self.L).reshape(self.L, -1).T.astype(np.int32)
        self.p = self.p.reshape(-1)
        self.entropy = float(-(self.p * np.log(self.p)).sum())

    def product(self, Q: np.ndarray, x: np.ndarray, to: np.ndarray) -> np.ndarray:
        """∏ over the letters of Q[x, to], every row of x with every row of to."""
        return Q[x[:, None], to[None]].prod(axis=2)

    def noised(self, t: int) -> np.ndarray:
        """q(x_t|x_0), (words, states)."""
        return self.product(self.law.cumulative(t), self.words, self.states)

    def x0_law(self, x: np.ndarray, t: int) -> np.ndarray:
        """The p̃ (N, L, D) that is exact: a letter's law given the other letters of x_t, and at t = 1 given x_t itself."""
        Q = self.law.cumulative(1 if self.law.name == "absorbing" else t)  # where letters are masked, no matter when
        chances = np.stack([Q[self.words[:, i]][:, x[:, i]] for i in range(self.L)])  # (L, words, N)
        out = np.zeros((len(x), self.L, self.D))
        for i in range(self.L):
            others = chances.prod(axis=0) if t == 1 else np.delete(chances, i, axis=0).prod(axis=0)
            for k in range(self.D):
                out[:, i, k] = (self.p[:, None] * others)[self.words[:, i] == k].sum(axis=0)
        return shares(out)

    def model(self, x: Any, t: Any) -> np.ndarray:
        """The perfect network: logits (N, L, D)."""
        out = np.empty((*x.shape, self.D))
        for time in np.unique(t):
            out[t == time] = self.x0_law(x[t == time], int(time))
        with np.errstate(divide="ignore"):
            return np.log(out)

    def reverse(self, t: int, s: int, model: Any = None) -> np.ndarray:
        """p_θ(x_s|x_t), (states, states), by its definition."""
        if model is None:
            p = self.x0_law(self.states, t)
        else:
            p = shares(np.exp(model(self.states, np.full(len(self.states), float(t)))))
        to, step = self.law.cumulative(s)[: self.D], self.law.between(s, t)
        onto = step.T[self.states]  # q(x_t|x_s = ·), (states, L, K)
        w = shares((p @ to) * (onto > 0 if t == 1 else onto))
        return np.stack([w[:, i, self.states[:, i]] for i in range(self.L)]).prod(axis=0)

    def chain(self, grid: Any, start: np.ndarray, model: Any = None) -> np.ndarray:
        """The law of the words (Dᴸ,) where the reverse chain over the ascending times ``grid`` ends, from x_T ~ start (Kᴸ,)."""
        times = [0, *grid]
        for t, s in zip(times[:0:-1], times[-2::-1], strict=True):
            start = start @ self.reverse(t, s, model)
        return start[np.ravel_multi_index(tuple(self.words.T), (self.law.K,) * self.L)]

    def prior(self) -> np.ndarray:
        """The law of x_T (Kᴸ,) from which samplers start."""
        return self.law.prior[self.states].prod(axis=1)


@pytest.fixture(scope="session")
def words() -> type[Words]:
    return Words


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


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """A text short enough to train on in a test."""
    sentence = "the cat sat on the mat and the dog ran after a quick brown fox that jumps over the lazy dog in the sun "
    (tmp_path / "story.txt").write_text(sentence * 12)
    return tmp_path / "story.txt"


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """stopped_after(k, run): what ``run()`` returns where SIGTERM arrives while training step k is under way."""

    def call(k: int, run: Callable[[], int], look: Callable[[trainer.Trainer], None] = lambda t: None) -> int:
        step = trainer.Trainer.step
        with monkeypatch.context() as patch:

            def stopped(self: trainer.Trainer) -> trainer.Step:
                if self.done == k - 1:
                    signal.raise_signal(signal.SIGTERM)
                    look(self)
                return step(self)

            patch.setattr(trainer.Trainer, "step", stopped)
            return run()

    return call


@pytest.fixture
def host() -> Iterator[cusim.Host]:
    """A GPU's launch code runs on the host inside."""
    with gpu.on(cusim.Host()) as device:
        yield device


@pytest.fixture
def nothing_is_left_unwritten() -> Iterator[None]:
    with unwritten_is_nan():
        yield
