"""x_0 ~ q(x_0): images from HDF5 files, as batches whose order is a function of (seed, step) alone.

A file holds `images` uint8 (N, H, W) or (N, H, W, C) and, where there are classes, `labels` (N,) integers and the attribute
`classes` (names, comma-separated); `split` (N,) says 0 train, 1 test. Values lie in [−1, 1] inside the engine.
"""

import hashlib
import importlib.resources
import os
import stat
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.arrays import array_module
from ..kernels.counter import permutation, uniform
from ..kernels.streams import ORDER

Array = Any
BUILT_IN = {"digits": "digits8.h5"}
SPLITS = {"train": 0, "test": 1, "all": None}
MAX_SIDE, MAX_CHANNELS, MAX_CLASSES = 8192, 16, 65536
MAX_RATIO, HARMLESS = 500, 1 << 24  # decoded bytes for one stored byte: more, beyond 16 MiB, is a decompression bomb


class DataError(ValueError):
    """A data set that cannot be used: the message holds its path and the reason."""

    def __init__(self, path: Any, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


@dataclass(frozen=True)
class Slices:
    """Images that stay in their file: `images[rows]` reads them, by a handle that each process opens on first use."""

    path: str
    rows: np.ndarray  # ascending row numbers in the file
    image_shape: tuple[int, int, int]
    stamp: int = 0  # the file's time of change: a file that was replaced is opened anew

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.rows), *self.image_shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = np.atleast_1d(self.rows[index])
        ascending, inverse = np.unique(rows, return_inverse=True)  # what h5py wants: increasing, no duplicates
        try:
            block = _handle(self.path, self.stamp, os.getpid())["images"][ascending]
        except (OSError, RuntimeError, KeyError, ValueError) as e:
            raise DataError(self.path, f"its images cannot be read ({e})") from e
        return block.reshape(len(ascending), *self.image_shape)[inverse]


@lru_cache(maxsize=8)
def _handle(path: str, stamp: int, process: int) -> Any:
    import h5py

    return h5py.File(path, "r")


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, H, W, C), class labels int64 (N,) or None, and the names of the classes."""

    images: Any  # numpy.ndarray, or Slices where they do not fit into memory
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    name: str = "data"
    split: str = "all"

    def __post_init__(self) -> None:
        shape = self.images.shape
        if isinstance(self.images, np.ndarray) and self.images.dtype != np.uint8:
            raise TypeError(f"images must be uint8, not {self.images.dtype}")
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"images must be (N, H, W, C) with no empty axis, not shape {shape}")
        if self.labels is not None:
            if self.labels.shape != shape[:1] or self.labels.dtype.kind not in "iu":
                raise ValueError(f"labels must be {shape[0]} integers, not {self.labels.dtype} of shape {self.labels.shape}")
            low, high = int(self.labels.min()), int(self.labels.max())
            if not 0 <= low <= high < len(self.classes):
                raise ValueError(f"labels must be in 0..{len(self.classes) - 1}, not {low}..{high}")

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.images.shape[1:]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of shape, pixels, labels and class names, as hexadecimal digits."""
        digest = hashlib.sha256(repr((self.images.shape, self.classes)).encode())
        for start in range(0, len(self), 4096):
            digest.update(np.ascontiguousarray(self.images[start : start + 4096]).data)
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").data)
        return digest.hexdigest()

    def batch(self, step: int, size: int, seed: int = 0, flip: bool = False) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Batch ``step`` (from 0): images uint8 (size, H, W, C), labels (size,) or None, and the rows taken.

        With ``flip`` each image is mirrored left to right with probability ½. The batch depends on (seed, step) only.
        """
        rows = order(len(self), size, step, seed)
        images = self.images[rows]
        if flip:
            mirrored = uniform(size, seed, step, ORDER, sample=1) < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
        return images, None if self.labels is None else self.labels[rows], rows


@lru_cache(maxsize=4)
def _epoch(n: int, seed: int, epoch: int) -> np.ndarray:
    return permutation(n, seed, epoch, ORDER)


def order(n: int, size: int, step: int, seed: int = 0) -> np.ndarray:
    """Rows of batch ``step`` (from 0): places step·size … of the endless list of epochs, each a permutation of 0..n−1.

    Batches run across the end of an epoch, so in every epoch every row is taken exactly once. Nothing is remembered: the answer
    depends on (n, size, step, seed) only.
    """
    for name, value, low in (("n", n, 1), ("size", size, 1), ("step", step, 0)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, not {value}")
    epoch, at = divmod(step * size, n)
    if at + size <= n:
        return _epoch(n, seed, epoch)[at : at + size].copy()
    places = np.arange(step * size, (step + 1) * size)
    epochs = places // n
    return np.concatenate([_epoch(n, seed, int(e))[places[epochs == e] % n] for e in np.unique(epochs)])


def to_unit(images: Array) -> Array:
    """uint8 0..255 to float32 in [−1, 1]: x = u/127.5 − 1."""
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    xp = array_module(images)
    x = xp.multiply(images, xp.float32(1 / 127.5), dtype=xp.float32)
    x -= xp.float32(1)
    return x


def to_uint8(x: Array) -> Array:
    """[−1, 1] to uint8 0..255: u = round(127.5·(x + 1)), values outside are clipped, a NaN is a ValueError."""
    xp = array_module(x)
    if bool(xp.isnan(x).any()):
        raise ValueError("x must hold no NaN")
    return xp.rint(xp.clip((x + 1) * 127.5, 0, 255)).astype(xp.uint8)


def load(source: str | os.PathLike[str], split: str = "train", memory: int | None = None) -> Dataset:
    """The data set in an HDF5 file, or one that ships with the package ("digits").

    split: "train", "test" or "all"; a file without `split` has training images only. memory: bytes that the images may take in
    RAM, half of what is free by default; a larger set stays in its file. Raises DataError with path and reason.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    name = os.fspath(source)
    if name in BUILT_IN:
        with importlib.resources.as_file(importlib.resources.files(__package__) / "datasets" / BUILT_IN[name]) as path:
            return _read(path, name, split, memory)
    return _read(Path(name), Path(name).stem, split, memory)


def _read(path: Path, name: str, split: str, memory: int | None) -> Dataset:
    import h5py

    try:
        mode = path.stat().st_mode
    except OSError as e:
        known = "" if path.suffix else f"; the built-in data sets are: {', '.join(BUILT_IN)}"
        raise DataError(path, f"{e.strerror or e}{known}") from e
    if not stat.S_ISREG(mode):
        raise DataError(path, "not a regular file")
    try:
        with path.open("rb"):  # a plain reason where it may not be read
            pass
        with h5py.File(path, "r") as f:
            images, labels, classes, kept = _contents(path, f, split)
            image_shape = (*images.shape[1:], *(() if images.ndim == 4 else (1,)))
            limit = _free_memory() // 2 if memory is None else memory
            if len(kept) * int(np.prod(image_shape)) <= limit:
                first, last = int(kept[0]), int(kept[-1])
                stored: Any = images[first : last + 1].reshape(-1, *image_shape)
                if len(stored) != len(kept):
                    stored = stored[kept - first]
            else:
                stored = Slices(str(path.resolve()), kept, image_shape, path.stat().st_mtime_ns)
    except DataError:
        raise
    except OSError as e:
        raise DataError(path, e.strerror if e.errno and e.strerror else f"not a readable HDF5 file ({e})") from e
    except (RuntimeError, KeyError, ValueError, TypeError, UnicodeDecodeError) as e:
        raise DataError(path, f"not a valid data set ({e})") from e
    return Dataset(stored, labels, classes, name, split)


def _contents(path: Path, f: Any, split: str) -> tuple[Any, np.ndarray | None, tuple[str, ...], np.ndarray]:
    """The data set `images`, checked but not read, the labels and class names, and the rows of the split."""
    images = _plain(path, f, "images")
    if images is None:
        raise DataError(path, f"holds no data set 'images' (it has: {', '.join(sorted(f)) or 'nothing'})")
    if images.dtype != np.uint8:
        raise DataError(path, f"images are {images.dtype}, want uint8")
    if images.ndim not in (3, 4):
        raise DataError(path, f"images have shape {images.shape}, want (N, H, W) or (N, H, W, C)")
    n, height, width, channels = (*images.shape, 1)[:4]
    if n < 1 or not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and 1 <= channels <= MAX_CHANNELS):
        raise DataError(path, f"images have shape {images.shape}: sides must be in 1..{MAX_SIDE}, channels in 1..{MAX_CHANNELS}")

    def column(name: str) -> np.ndarray | None:
        d = _plain(path, f, name)
        if d is None:
            return None
        if d.dtype.kind not in "iu" or d.dtype.itemsize > 8:
            raise DataError(path, f"{name} are {d.dtype}, want integers")
        if d.shape != (n,):
            raise DataError(path, f"{name} have shape {d.shape}, want ({n},) for {n} images")
        return d[:]

    part = column("split")
    if part is None:
        if split == "test":
            raise DataError(path, "has no 'split', so it has no test images")
        kept = np.arange(n)
    else:
        if not np.isin(part, (0, 1)).all():
            raise DataError(path, "split must be 0 (train) or 1 (test) for every image")
        kept = np.arange(n) if SPLITS[split] is None else np.flatnonzero(part == SPLITS[split])
        if not len(kept):
            raise DataError(path, f"the {split} split is empty")
    labels, classes = column("labels"), _class_names(path, f)
    if labels is None:
        return images, None, (), kept
    low, high = int(labels.min()), int(labels.max())
    if not classes:
        classes = tuple(str(k) for k in range(min(high, MAX_CLASSES) + 1))
    if not 0 <= low <= high < len(classes):
        raise DataError(path, f"labels lie in {low}..{high}, want 0..{len(classes) - 1}")
    return images, labels[kept].astype(np.int64), classes, kept


def _class_names(path: Path, f: Any) -> tuple[str, ...]:
    if "classes" not in f.attrs:
        return ()
    if int(np.prod(f.attrs.get_id("classes").shape)) > MAX_CLASSES:
        raise DataError(path, "the attribute 'classes' is too long")
    value = f.attrs["classes"]
    if isinstance(value, bytes):
        value = value.decode()
    names = value.split(",") if isinstance(value, str) else [v.decode() if isinstance(v, bytes) else str(v) for v in value]
    return tuple(names)


def _plain(path: Path, f: Any, name: str) -> Any:
    """Data set ``name`` of an open file, or None; refused where reading it would reach into another file or fill the memory."""
    import h5py

    link = f.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise DataError(path, f"{name} is a link to elsewhere, refused")
    d = f[name]
    if not isinstance(d, h5py.Dataset):
        raise DataError(path, f"{name} is a group, want a data set")
    plan = d.id.get_create_plist()
    if plan.get_layout() not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED, h5py.h5d.COMPACT) or plan.get_external_count():
        raise DataError(path, f"{name} is a virtual data set or lies in another file, refused")
    own = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF)
    if any(plan.get_filter(i)[0] not in own for i in range(plan.get_nfilters())):
        raise DataError(path, f"{name} is packed by a filter other than gzip and lzf, refused")
    if d.shape is None:
        raise DataError(path, f"{name} is empty")
    size, stored = int(np.prod(d.shape, dtype=object)) * d.dtype.itemsize, d.id.get_storage_size()
    if size > max(MAX_RATIO * stored, HARMLESS) or stored > path.stat().st_size:
        raise DataError(path, f"{name} claims {size:,} bytes but stores {stored:,}, refused")
    return d


def _free_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 << 30
