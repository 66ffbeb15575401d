"""Linear measurements y = A x of samples, each with its transpose, pseudo-inverse and singular value decomposition A = U Σ Vᵀ.

Spectral coordinates Vᵀx have the shape of x, so ``singular`` holds one singular value for each, 0 where the measurement tells
nothing. No matrix of all elements is ever made: a :class:`Product` acts axis by axis, a :class:`Mask` element by element.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np

from ..kernels.arrays import array_module, restore, to_numpy
from .exchange import Array, float_array

CUTOFF = 1e-6  # singular values below this part of the largest one count as 0 in A⁺ and in the spectrum


class Operator(ABC):
    """y = A x for samples x (B, *shape), y (B, *shape_out). Eq: S4-M3.

    Arrays of NumPy, CuPy or any library with ``__dlpack__``, of any float dtype, each answer of the kind of its argument. No
    sample depends on the others of its batch. Raises TypeError or ValueError for an argument that is no such array.
    """

    shape: tuple[int, ...]
    shape_out: tuple[int, ...]
    singular: np.ndarray  # float64 of ``shape``: the singular value of each spectral coordinate

    def __call__(self, x: Array) -> Array:
        """A x."""
        return restore(self._apply(self._checked("x", x, self.shape)), x)

    def adjoint(self, y: Array) -> Array:
        """Aᵀy."""
        return restore(self._adjoint(self._checked("y", y, self.shape_out)), y)

    def pinv(self, y: Array) -> Array:
        """A⁺y = V Σ⁺Uᵀy: the shortest x with A x closest to y."""
        return restore(self._back(self._observed(self._checked("y", y, self.shape_out))), y)

    def to_spectrum(self, x: Array) -> Array:
        """Vᵀx."""
        return restore(self._turn(self._checked("x", x, self.shape)), x)

    def from_spectrum(self, v: Array) -> Array:
        """V v."""
        return restore(self._back(self._checked("v", v, self.shape)), v)

    def observed(self, y: Array) -> Array:
        """Σ⁺Uᵀy: what y says of Vᵀx, 0 where it says nothing."""
        return restore(self._observed(self._checked("y", y, self.shape_out)), y)

    @abstractmethod
    def _apply(self, x: Array) -> Array: ...

    @abstractmethod
    def _adjoint(self, y: Array) -> Array: ...

    @abstractmethod
    def _turn(self, x: Array) -> Array: ...

    @abstractmethod
    def _back(self, v: Array) -> Array: ...

    @abstractmethod
    def _observed(self, y: Array) -> Array: ...

    @staticmethod
    def _checked(name: str, x: Any, shape: tuple[int, ...]) -> Array:
        a = float_array(x, name)
        if a.shape[1:] != shape or a.ndim < 1:
            raise ValueError(f"{name} must have shape (B, {', '.join(map(str, shape))}), not {a.shape}")
        return a


class Mask(Operator):
    """Keeps the elements where ``keep`` is true; y has the shape of x, with 0 elsewhere (what stands there is never read).

    keep: booleans, or numbers 0 and 1, that broadcast to ``shape``, that of one sample.
    """

    def __init__(self, keep: Any, shape: Sequence[int]) -> None:
        self.shape = self.shape_out = tuple(shape)
        self._keep = _booleans(keep, self.shape)
        self.singular = self._keep.astype(np.float64)

    def _apply(self, x: Array) -> Array:
        xp = array_module(x)
        return xp.where(xp.asarray(self._keep), x, xp.zeros((), x.dtype))

    def _adjoint(self, y: Array) -> Array:
        return self._apply(y)

    def _observed(self, y: Array) -> Array:
        return self._apply(y)

    def _turn(self, x: Array) -> Array:
        return x

    def _back(self, v: Array) -> Array:
        return v


def _booleans(keep: Any, shape: tuple[int, ...]) -> np.ndarray:
    k = to_numpy(keep)
    if k.dtype != bool and not np.isin(k, (0, 1)).all():
        raise ValueError("keep must hold booleans, or the numbers 0 and 1 alone")
    try:
        return np.broadcast_to(k != 0, shape)
    except ValueError:
        raise ValueError(f"keep must broadcast to {shape}, that of one sample, but has shape {k.shape}") from None


class Product(Operator):
    """A = M₁ ⊗ M₂ ⊗ …: one matrix (m, n) for each axis of a sample, None for no change along it.

    shape: that of one sample x; the k-th matrix has shape[k] columns. Its singular values are the products of those of the
    matrices; values below ``cutoff`` times the largest count as 0 in A⁺ and in the spectrum, not in A itself.
    """

    def __init__(self, shape: Sequence[int], matrices: Sequence[Any], cutoff: float = CUTOFF) -> None:
        self.shape = tuple(shape)
        if len(matrices) != len(self.shape):
            raise ValueError(f"matrices must be {len(self.shape)}, one for each axis of {self.shape}, not {len(matrices)}")
        if not 0 <= cutoff < 1:
            raise ValueError(f"cutoff must be in [0, 1), not {cutoff}")
        self._matrices = [None if m is None else np.array(to_numpy(m), np.float64) for m in matrices]
        for k, m in enumerate(self._matrices):
            if m is not None and (m.ndim != 2 or m.shape[1] != self.shape[k] or not len(m) or not np.isfinite(m).all()):
                raise ValueError(f"matrix {k} must be finite and of shape (m, {self.shape[k]}), not of shape {m.shape}")
        self.shape_out = tuple(n if m is None else len(m) for n, m in zip(self.shape, self._matrices, strict=True))
        self._cutoff = cutoff
        self._lent: dict[tuple[ModuleType, str], list[dict[str, Array] | None]] = {}

    @cached_property
    def _factors(self) -> list[dict[str, np.ndarray] | None]:
        """Of each axis: A, Aᵀ, Vᵀ, V, the first rows of Uᵀ and the singular values."""
        found: list[dict[str, np.ndarray] | None] = []
        for m in self._matrices:
            if m is None:
                found.append(None)
                continue
            u, singular, vt = np.linalg.svd(m)
            rank = len(singular)
            ut = np.zeros((m.shape[1], len(m)))
            ut[:rank] = u.T[:rank]
            values = np.r_[singular, np.zeros(m.shape[1] - rank)]
            found.append({"apply": m, "adjoint": m.T, "turn": vt, "back": vt.T, "observed": ut, "values": values})
        return found

    @cached_property
    def singular(self) -> np.ndarray:  # type: ignore[override]
        values = np.ones(self.shape)
        for k, f in enumerate(self._factors):
            if f is not None:
                values = values * f["values"].reshape(-1, *(1,) * (len(self.shape) - 1 - k))
        return np.where(values > self._cutoff * values.max(), values, 0.0)

    @cached_property
    def _inverse(self) -> np.ndarray:
        return np.divide(1, self.singular, out=np.zeros(self.shape), where=self.singular > 0)

    def _along(self, x: Array, name: str) -> Array:
        """x times the matrix called ``name`` of each axis: stacks of products of one sample's size, whatever the batch."""
        xp = array_module(x)
        key = (xp, x.dtype.name)
        if key not in self._lent:
            self._lent[key] = [
                None if f is None else {k: xp.asarray(v).astype(x.dtype) for k, v in f.items()} for f in self._factors
            ]
        for k, f in enumerate(self._lent[key]):
            if f is not None:
                m, shape = f[name], x.shape
                before, after = int(np.prod(shape[1 : k + 1])), int(np.prod(shape[k + 2 :]))
                if after == 1:
                    x = xp.matmul(x.reshape(shape[0], before, shape[k + 1]), m.T)
                else:
                    x = xp.matmul(m, x.reshape(shape[0], before, shape[k + 1], after))
                x = x.reshape(*shape[: k + 1], len(m), *shape[k + 2 :])
        return x

    def _apply(self, x: Array) -> Array:
        return self._along(x, "apply")

    def _adjoint(self, y: Array) -> Array:
        return self._along(y, "adjoint")

    def _turn(self, x: Array) -> Array:
        return self._along(x, "turn")

    def _back(self, v: Array) -> Array:
        return self._along(v, "back")

    def _observed(self, y: Array) -> Array:
        return self._along(y, "observed") * array_module(y).asarray(self._inverse).astype(y.dtype)


# -------------------------------------------------------------------------------------------------------- the usual measurements


def matrix(values: Any, cutoff: float = CUTOFF) -> Product:
    """y = A x of samples that are vectors: x (B, n), A (m, n)."""
    a = np.asarray(to_numpy(values), np.float64)
    if a.ndim != 2:
        raise ValueError(f"values must be a matrix (m, n), not of shape {a.shape}")
    return Product(a.shape[1:], [a], cutoff)


def box(shape: Sequence[int], factor: int) -> Product:
    """Images (H, W, C) made smaller by ``factor``: each new element is the mean of factor × factor old ones (super-resolution).

    Raises ValueError unless both sides are multiples of the factor.
    """
    height, width, _ = _image(shape)
    if isinstance(factor, bool) or not isinstance(factor, (int, np.integer)) or factor < 1:
        raise ValueError(f"factor must be a whole number of at least 1, not {factor!r}")
    if height % factor or width % factor:
        raise ValueError(f"factor must divide both sides, {height} and {width}, not {factor}")
    rows, columns = (np.kron(np.eye(n // factor), np.full((1, factor), 1 / factor)) for n in (height, width))
    return Product(shape, [rows, columns, None])


def blur(shape: Sequence[int], sigma: float, cutoff: float = CUTOFF) -> Product:
    """Images (H, W, C) under a Gaussian of deviation ``sigma`` elements, cut off at 4σ, mirrored at the borders (deblurring)."""
    height, width, _ = _image(shape)
    if not 0 < sigma < np.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    return Product(shape, [_gaussian(height, sigma), _gaussian(width, sigma), None], cutoff)


def _gaussian(n: int, sigma: float) -> np.ndarray:
    reach = int(np.ceil(4 * sigma))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights /= weights.sum()
    place = (np.arange(n)[:, None] + offsets) % (2 * n)  # the image and its mirror image, over and over
    place = np.where(place < n, place, 2 * n - 1 - place)
    m = np.zeros((n, n))
    np.add.at(m, (np.repeat(np.arange(n), len(offsets)), place.ravel()), np.tile(weights, n))
    return m


def grey(shape: Sequence[int], weights: Sequence[float] | None = None) -> Product:
    """Images (H, W, C) to one channel Σ w_c·x_c, by default their mean (colourisation)."""
    _, _, channels = _image(shape)
    w = np.full(channels, 1 / channels) if weights is None else np.array(weights, np.float64)
    if w.shape != (channels,) or not np.isfinite(w).all() or not np.any(w):
        raise ValueError(f"weights must be {channels} finite numbers, one for each channel, not all 0, not {weights}")
    return Product(shape, [None, None, w[None]])


def _image(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (H, W, C), not {tuple(shape)}")
    height, width, channels = shape
    return height, width, channels
