"""Mixtures of normal laws in closed form: density, score and their noised versions, the exact network of any noise schedule.

Everything is float64 on the host. A covariance is kept as eigenvalues and eigenvectors, for noising leaves the basis: the law
of a·x0 + n·ε has the eigenvalues a²λ + n². So the laws of a whole batch of noise levels cost what one costs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import kernels
from ..kernels import counter, streams
from ..kernels.arrays import array_module, native, restore, to_numpy
from .convert import PREDICTIONS
from .exchange import Array

BLOCK = 1 << 21  # the most numbers (component, sample, element) that are worked on at once


@dataclass(frozen=True)
class _Laws:
    """Gaussian components, one set for all samples (n = 1) or one for each (n = B)."""

    log_weights: np.ndarray  # (K, n)
    means: np.ndarray  # (K, n, d)
    spectrum: np.ndarray  # (K, n, d) eigenvalues of the covariances; (K, n, 1) where they are multiples of I
    basis: np.ndarray | None  # (K, d, d) eigenvectors in columns; None where the covariances are multiples of I

    def rows(self, at: slice) -> "_Laws":
        weights, means, spectrum = (v if v.shape[1] == 1 else v[:, at] for v in (self.log_weights, self.means, self.spectrum))
        return _Laws(weights, means, spectrum, self.basis)

    def turn(self, y: np.ndarray) -> np.ndarray:
        return y if self.basis is None else y @ self.basis

    def back(self, y: np.ndarray) -> np.ndarray:
        return y if self.basis is None else y @ self.basis.swapaxes(1, 2)

    def noised(self, signal: np.ndarray, noise: np.ndarray) -> "_Laws":
        """The law of signal·x + noise·ε; levels (1, n, 1)."""
        return _Laws(self.log_weights, signal * self.means, signal**2 * self.spectrum + noise**2, self.basis)

    def terms(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log w_k N_k(x), residuals x − m_k in the eigenbasis) for x (B, d)."""
        if not np.all(self.spectrum > 0):
            raise ValueError("a component has a singular covariance, so the law has no density: add noise (convolve, diffuse)")
        d = x.shape[1]
        y = self.turn(x - self.means)
        log_det = np.log(self.spectrum).sum(-1) * (d // self.spectrum.shape[-1])
        return self.log_weights - 0.5 * ((y**2 / self.spectrum).sum(-1) + log_det + d * np.log(2 * np.pi)), y

    def pulls(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(responsibilities (K, B), the components' scores (K, B, d))."""
        log_joint, y = self.terms(x)
        return _softmax(log_joint), self.back(-y / self.spectrum)

    def mean(self) -> np.ndarray:
        return _average(np.exp(self.log_weights), self.means)

    def covariance(self) -> np.ndarray:
        w, apart = np.exp(self.log_weights), self.means - self.mean()
        if self.basis is None:
            within = (w * self.spectrum[..., 0]).sum(axis=0)[:, None, None] * np.eye(self.means.shape[2])
        else:
            within = np.einsum("kn,knij->nij", w, self.covariances())
        return within + (w[..., None] * apart).transpose(1, 2, 0) @ apart.swapaxes(0, 1)

    def covariances(self) -> np.ndarray:
        """(K, n, d, d)."""
        basis = np.eye(self.means.shape[2])[None] if self.basis is None else self.basis
        return (basis[:, None] * self.spectrum[:, :, None, :]) @ basis.swapaxes(1, 2)[:, None]

    def sample(self, n: int, seed: int, step: int, first_sample: int) -> np.ndarray:
        if n == 0:
            return np.empty((0, self.means.shape[2]))
        total = np.cumsum(np.exp(self.log_weights), axis=0)
        u = counter.uniforms(n, 1, seed, 2 * step, streams.DENSITY, first_sample)[:, 0]
        if total.shape[1] == 1:
            k = np.searchsorted(total[:, 0] / total[-1, 0], u, side="right")
        else:
            k = (total / total[-1] <= u).sum(axis=0)
        row = np.arange(n) if total.shape[1] > 1 else np.zeros(n, np.int64)
        z = kernels.normals(np.empty((n, self.means.shape[2])), seed, 2 * step + 1, streams.DENSITY, first_sample)
        z *= np.sqrt(self.spectrum[k, row if self.spectrum.shape[1] > 1 else 0])
        if self.basis is not None:
            own, turned = self.basis, np.zeros_like(z)
            for e in range(z.shape[1]):  # not a matrix product, whose digits would depend on how the batch is split
                turned += own[k, :, e] * z[:, e : e + 1]
            z = turned
        return self.means[k, row] + z


def _softmax(log_joint: np.ndarray) -> np.ndarray:
    p = np.exp(log_joint - log_joint.max(axis=0))
    return p / p.sum(axis=0)


def _average(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.einsum("kb,kbd->bd", weights, values)


def _log_sum(log_joint: np.ndarray) -> np.ndarray:
    top = log_joint.max(axis=0)
    return top + np.log(np.exp(log_joint - top).sum(axis=0))


def _log_prob(laws: _Laws, x: np.ndarray) -> np.ndarray:
    return _log_sum(laws.terms(x)[0])


def _responsibilities(laws: _Laws, x: np.ndarray) -> np.ndarray:
    return _softmax(laws.terms(x)[0]).T


def _score(laws: _Laws, x: np.ndarray) -> np.ndarray:
    return _average(*laws.pulls(x))


def _score_jvp(laws: _Laws, x: np.ndarray, v: np.ndarray) -> np.ndarray:
    r, pull = laws.pulls(x)
    apart = pull - _average(r, pull)
    bent = laws.back(laws.turn(np.broadcast_to(v, pull.shape)) / laws.spectrum)
    return _average(r, apart * (apart * v).sum(-1, keepdims=True) - bent)


def _score_divergence(laws: _Laws, x: np.ndarray) -> np.ndarray:
    r, pull = laws.pulls(x)
    apart = pull - _average(r, pull)
    trace = (1 / laws.spectrum).sum(-1) * (x.shape[1] // laws.spectrum.shape[-1])
    return (r * ((apart**2).sum(-1) - trace)).sum(axis=0)


def _predict(kind: str, clean: _Laws, laws: _Laws, x: np.ndarray, signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Σ_k p(k|x)·E[z|x, k] for z = ε, x0 or another; ``laws`` are the ``clean`` ones noised to the levels (B,)."""
    log_joint, y = laws.terms(x)
    a, n, var = signal[:, None], noise[:, None], laws.spectrum
    on_mean: Any = {"eps": 0.0, "x0": 1.0, "v": -n, "score": 0.0}[kind]
    gain = {"eps": n, "x0": a * clean.spectrum, "v": a * n * (1 - clean.spectrum), "score": -1.0}[kind] / var
    return _average(_softmax(log_joint), on_mean * clean.means + laws.back(gain * y))


def _blocked(f: Callable[..., np.ndarray], laws: _Laws, x: np.ndarray, *more: np.ndarray) -> np.ndarray:
    """f(laws, x, …) of a few samples at a time."""
    rows = max(1, BLOCK // (laws.means.shape[0] * laws.means.shape[2]))
    starts = range(0, max(len(x), 1), rows)
    return np.concatenate([f(laws.rows(slice(i, i + rows)), *(v[i : i + rows] for v in (x, *more))) for i in starts])


def _level(name: str, value: Any, batch: int | None = None) -> np.ndarray:
    """A level as (1, n, 1): n = 1 for a number or for equal values, else the batch."""
    v = np.asarray(to_numpy(value), np.float64)
    if not (v.ndim == 0 or (batch is not None and v.shape == (batch,))):
        want = "be a number" if batch is None else f"be a number or have shape ({batch},)"
        raise ValueError(f"{name} must {want}, but has shape {v.shape}")
    if not np.all((v >= 0) & np.isfinite(v)):
        raise ValueError(f"{name} must be finite and not negative, not {value}")
    if v.ndim and v.size and np.all(v == v[0]):
        v = v[0]
    return v.reshape(1, -1, 1)


class GaussianMixture:
    """The law Σ_k w_k N(m_k, Σ_k) on ℝ^d. Eq: S0-E6, S0-C5, S4-E61.

    weights (K,): not negative; they are divided by their sum. means (K, d). covariances: a number (Σ_k = c·I for all), (K,)
    numbers or (K, d, d) symmetric matrices without negative eigenvalues. Zero covariances are points: such a law (an empirical
    distribution, ``GaussianMixture(np.ones(n), points, 0)``) can be sampled, convolved, diffused and denoised, and has no density
    of its own.

    Points x are (B, d) arrays of any library; the answers are float64 NumPy arrays, right also where every component's density
    underflows. Raises ValueError for shapes and values that make no law.
    """

    def __init__(self, weights: Any, means: Any, covariances: Any) -> None:
        w, m = np.array(to_numpy(weights), np.float64), np.array(to_numpy(means), np.float64)
        c = np.array(to_numpy(covariances), np.float64)
        if m.ndim != 2 or m.size == 0 or not np.isfinite(m).all():
            raise ValueError(f"means must be finite and of shape (K, d), not of shape {m.shape}")
        K, d = m.shape
        if w.shape != (K,) or not np.all((w >= 0) & np.isfinite(w)) or not w.sum() > 0:
            raise ValueError(f"weights must be {K} numbers that are not negative and not all 0, not {weights}")
        if c.shape not in ((), (K,), (K, d, d)) or not np.isfinite(c).all():
            raise ValueError(f"covariances must be finite: a number, ({K},) or {(K, d, d)}, not of shape {c.shape}")
        basis = None
        if c.ndim == 3:
            largest = np.abs(c).max(axis=(1, 2), keepdims=True)
            if np.any(np.abs(c - c.swapaxes(1, 2)) > 1e-12 * largest):
                raise ValueError("covariances must be symmetric")
            spectrum, basis = np.linalg.eigh(c)
            spectrum[(spectrum < 0) & (spectrum > -1e-13 * d * largest[:, 0])] = 0
        else:
            spectrum = np.broadcast_to(c, K)[:, None].copy()
        if np.any(spectrum < 0):
            raise ValueError(f"covariances must have no negative eigenvalue, but one is {spectrum.min():.6g}")
        with np.errstate(divide="ignore"):
            self._laws = _Laws(np.log(w / w.sum())[:, None], m[:, None], spectrum[:, None], basis)

    @classmethod
    def _of(cls, laws: _Laws) -> "GaussianMixture":
        self = cls.__new__(cls)
        self._laws = laws
        return self

    @property
    def weights(self) -> np.ndarray:
        """(K,), sum 1."""
        return np.exp(self._laws.log_weights[:, 0])

    @property
    def means(self) -> np.ndarray:
        """(K, d)."""
        return self._laws.means[:, 0].copy()

    @property
    def covariances(self) -> np.ndarray:
        """(K, d, d)."""
        return self._laws.covariances()[:, 0]

    @property
    def dim(self) -> int:
        """d."""
        return self._laws.means.shape[2]

    @property
    def mean(self) -> np.ndarray:
        """E[x] (d,)."""
        return self._laws.mean()[0]

    @property
    def covariance(self) -> np.ndarray:
        """Cov[x] (d, d)."""
        return self._laws.covariance()[0]

    def __repr__(self) -> str:
        return f"GaussianMixture(K={len(self._laws.means)}, d={self.dim})"

    def _points(self, x: Any, name: str = "x") -> np.ndarray:
        p = np.asarray(to_numpy(x), np.float64)
        if p.ndim != 2 or p.shape[1] != self.dim:
            raise ValueError(f"{name} must have shape (B, {self.dim}), not {p.shape}")
        return p

    def log_prob(self, x: Any) -> np.ndarray:
        """log p(x) (B,), nats. Eq: S0-E6, S0-E7."""
        return _blocked(_log_prob, self._laws, self._points(x))

    def responsibilities(self, x: Any) -> np.ndarray:
        """p(k|x) = w_k N_k(x)/p(x) (B, K). Eq: S0-E7."""
        return _blocked(_responsibilities, self._laws, self._points(x))

    def score(self, x: Any) -> np.ndarray:
        """∇ log p(x) = Σ_k p(k|x)·∇ log N_k(x) (B, d). Eq: S0-E1, S0-E8, S4-E61."""
        return _blocked(_score, self._laws, self._points(x))

    def score_jvp(self, x: Any, v: Any) -> np.ndarray:
        """(∇s(x))·v (B, d), s the score: the Hessian of log p times v (B, d). Eq: S4-E58, S4-E78.

        With g_k the components' scores and P_k = Σ_k⁻¹: ∇s = Σ_k p(k|x)·((g_k − s)(g_k − s)ᵀ − P_k).
        """
        points, direction = self._points(x), self._points(v, "v")
        if points.shape != direction.shape:
            raise ValueError(f"v must have the shape of x, {points.shape}, not {direction.shape}")
        return _blocked(_score_jvp, self._laws, points, direction)

    def score_divergence(self, x: Any) -> np.ndarray:
        """tr ∇s(x) (B,), the Laplacian of log p. Eq: S0-E4, S4-E79."""
        return _blocked(_score_divergence, self._laws, self._points(x))

    def sample(self, n: int, seed: int = 0, first_sample: int = 0, step: int = 0) -> np.ndarray:
        """n samples (n, d); sample i depends on (seed, step, first_sample + i) alone. Eq: S0-C7.

        Another ``step`` draws anew. The normals underneath are float32 numbers.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, not {n}")
        return self._laws.sample(n, seed, step, first_sample)

    def diffuse(self, signal: float, noise: float) -> "GaussianMixture":
        """The law of signal·x0 + noise·ε, ε ~ N(0, I). Eq: S0-E10, S0-E18, S0-E48."""
        return self._of(self._laws.noised(_level("signal", signal), _level("noise", noise)))

    def convolve(self, sigma: float) -> "GaussianMixture":
        """q_σ(x̃) = ∫ N(x̃; x, σ²I) p(x) dx, the law of x + σε. Eq: S0-E10, S0-C6."""
        return self.diffuse(1.0, sigma)

    def predict(self, x_t: Any, signal: Any, noise: Any, prediction: str = "eps") -> np.ndarray:
        """What the perfect network answers at x_t = signal·x0 + noise·ε (B, d). Eq: S0-P9, S0-E11.

        prediction: "eps" E[ε|x_t] = −noise·score, "x0" E[x0|x_t], "v" = signal·ε − noise·x0, or "score" ∇ log q(x_t).
        Levels: numbers or (B,). Raises ValueError where x_t has no density.
        """
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")
        x = self._points(x_t)
        a, n = _level("signal", signal, len(x)), _level("noise", noise, len(x))
        levels = (np.broadcast_to(v.reshape(-1), len(x)) for v in (a, n))
        return _blocked(partial(_predict, prediction, self._laws), self._laws.noised(a, n), x, *levels)

    def denoise(self, x_t: Any, signal: Any, noise: Any) -> np.ndarray:
        """E[x0|x_t] (B, d) for x_t = signal·x0 + noise·ε; levels are numbers or (B,). Eq: S0-P9, S0-E14."""
        return self.predict(x_t, signal, noise, "x0")

    def reverse_conditional(
        self, x_t: Any, signal: Any, noise: Any, signal_to: Any = 1.0, noise_to: Any = 0.0, step_variance: Any = None
    ) -> "ConditionalMixture":
        """The exact q(x_to|x_t), one law for each sample of x_t (B, d). Eq: S4-E3, S1-C3, S3-C2.

        x_to = signal_to·x0 + noise_to·ε and x_t = (signal/signal_to)·x_to + √step_variance·z, step_variance by default
        noise² − (signal/signal_to)²·noise_to². Given x_t each component stays normal and its weight becomes p(k|x_t): for an
        empirical law the softmax over all of its points. Without signal_to and noise_to it is q(x_0|x_t). Levels: numbers or
        (B,). Raises ValueError where signal_to is 0 or the step's variance negative.
        """
        x = self._points(x_t)
        a, n, a_to, n_to = (
            _level(name, value, len(x))
            for name, value in (("signal", signal), ("noise", noise), ("signal_to", signal_to), ("noise_to", noise_to))
        )
        if np.any(a_to == 0):
            raise ValueError("signal_to must be positive")
        c = a / a_to
        if step_variance is None:
            beta = n**2 - (c * n_to) ** 2
            if np.any(beta < 0):
                raise ValueError(f"noise_to must be at most noise·signal_to/signal, for x_to comes before x_t, not {noise_to}")
        else:
            beta = _level("step_variance", step_variance, len(x))
        to = self._laws.noised(a_to, n_to)
        var = c**2 * to.spectrum + beta
        now = _Laws(to.log_weights, c * to.means, var, to.basis)
        log_joint, y = now.terms(x)
        means = to.means + to.back(c * to.spectrum / var * y)
        return ConditionalMixture(_Laws(log_joint - _log_sum(log_joint), means, to.spectrum * (beta / var), to.basis))

    def model(self, levels: Any, prediction: str = "eps") -> Callable[[Array, Array], Array]:
        """The perfect network model(x, t) of this data for anything with ``levels(t) -> (signal, noise)``. Eq: S0-P9, S0-E11.

        x (B, d), t a number or (B,); the answer has the library and the float dtype of x. A model for :func:`samplers.sample`.
        """
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")
        if not callable(getattr(levels, "levels", None)):
            raise TypeError(f"levels must be a process with levels(t) (a Schedule for one), not {type(levels).__name__}")

        def predict(x: Array, t: Array) -> Array:
            here = native(x)
            signal, noise = levels.levels(to_numpy(t))
            answer = self.predict(x, signal, noise, prediction)
            return restore(array_module(here).asarray(answer.astype(here.dtype)), x)

        return predict


class ConditionalMixture:
    """B mixtures of normal laws, one for each sample of a batch (:meth:`GaussianMixture.reverse_conditional`). Eq: S4-E3.

    ``len`` is B, and ``laws[i]`` the :class:`GaussianMixture` of sample i.
    """

    def __init__(self, laws: _Laws) -> None:
        self._laws = laws

    def __len__(self) -> int:
        return self._laws.means.shape[1]

    def __getitem__(self, i: int) -> GaussianMixture:
        at = range(len(self))[i]
        return GaussianMixture._of(self._laws.rows(slice(at, at + 1)))

    @property
    def weights(self) -> np.ndarray:
        """(B, K)."""
        return np.exp(self._laws.log_weights).T

    @property
    def mean(self) -> np.ndarray:
        """(B, d)."""
        return self._laws.mean()

    @property
    def covariance(self) -> np.ndarray:
        """(B, d, d)."""
        return self._laws.covariance()

    def log_prob(self, x: Any) -> np.ndarray:
        """The log density of law i at x[i] (B,), for x (B, d)."""
        p = np.asarray(to_numpy(x), np.float64)
        want = self._laws.means.shape[1:]
        if p.shape != want:
            raise ValueError(f"x must have shape {want}, not {p.shape}")
        return _blocked(_log_prob, self._laws, p)

    def sample(self, seed: int = 0, first_sample: int = 0, step: int = 1) -> np.ndarray:
        """One sample of each law (B, d), from (seed, step, first_sample + i) alone; step 0 is that of GaussianMixture.sample."""
        return self._laws.sample(len(self), seed, step, first_sample)
