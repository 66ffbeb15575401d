"""Checkpoints: a plain HDF5 image with a SHA-256 trailer, written so that a crash at any instant leaves a whole file.

    file = HDF5 image (contiguous arrays in the groups, the meta data as JSON bytes) + SHA-256 of it (32 bytes) + magic (8 bytes)

The trailer is checked before HDF5 parses a byte. It proves that the file is as written, not who wrote it. h5py opens the file
as it is. Nothing is pickled.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..kernels.arrays import to_numpy

MAGIC = b"ALPHABAR"
TRAILER = hashlib.sha256().digest_size + len(MAGIC)
VERSION = 1
META = "meta"
MAX_META = 1 << 24
PATTERN = re.compile(r"step_(\d{1,12})\.h5")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message holds its path and the reason."""

    def __init__(self, path: Any, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


def image(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    """The bytes of a checkpoint: the same arrays and meta data give the same bytes.

    arrays: names "group/name" to arrays of numbers (NumPy or CuPy). meta: what JSON can hold, no NaN; "version" is added.
    """
    import h5py

    text = json.dumps({**meta, "version": VERSION}, allow_nan=False, ensure_ascii=True).encode()
    with h5py.File("image", "w", driver="core", backing_store=False, libver="v110") as f:
        f.create_dataset(META, data=np.frombuffer(text, np.uint8), track_times=False)
        for name, value in arrays.items():
            group, _, key = name.partition("/")
            if not group or not key or "/" in key or "." in (group, key):
                raise ValueError(f"the name of an array must be 'group/name', not {name!r}")
            a = np.asarray(to_numpy(value), order="C")
            if a.dtype.kind not in "fiu":
                raise TypeError(f"array {name} is {a.dtype}, want float or integer")
            if not a.size:
                raise ValueError(f"array {name} must not be empty, its shape is {a.shape}")
            f.require_group(group).create_dataset(key, data=a, track_times=False)
        f.flush()
        body = f.id.get_file_image()
    return body + hashlib.sha256(body).digest() + MAGIC


def save(path: str | os.PathLike[str], arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint; the file named ``path`` is at every instant the old one or the new one, whole.

    The image is built in memory, written to a temporary file beside it, synced, renamed, and the directory synced. An OSError
    (disk full, no permission, a folder or a device of that name) leaves what is there and no temporary file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    data = image(arrays, meta)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return path


def load(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, meta) of a checkpoint. CheckpointError with path and reason for anything but a whole, plain file."""
    path = Path(path)
    body = _verified(path)
    import h5py

    try:
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_fapl_core(1 << 16, False)
        access.set_file_image(body)
        with h5py.File(h5py.h5f.open(b"image", h5py.h5f.ACC_RDONLY, fapl=access)) as f:
            arrays, left = {}, len(body)
            for name, d in _plain(path, f):
                arrays[name] = _read(path, name, d, left)
                left -= arrays[name].nbytes  # links to one array must not fill the memory
    except CheckpointError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError, UnicodeDecodeError) as e:
        raise CheckpointError(path, f"not a valid checkpoint ({e})") from e
    return arrays, _meta(path, arrays.pop(META, None))


def _verified(path: Path) -> bytes:
    """The HDF5 image of a file whose trailer fits it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(path, "not a regular file")
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise CheckpointError(path, e.strerror or str(e)) from e
    if len(data) <= TRAILER or not data.endswith(MAGIC):
        raise CheckpointError(path, "not a checkpoint of this program, or cut short (its end mark is missing)")
    body, digest = data[:-TRAILER], data[-TRAILER : -len(MAGIC)]
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError(path, "damaged (its SHA-256 does not fit its contents)")
    return body


def _plain(path: Path, f: Any) -> Iterator[tuple[str, Any]]:
    """The data sets of an image, at most one group deep; links to elsewhere are refused."""
    import h5py

    def children(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key in group:
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise CheckpointError(path, f"{prefix}{key} is a link to elsewhere, refused")
            yield prefix + key, group[key]

    for name, item in children(f, ""):
        if name == META:
            yield name, item
        elif isinstance(item, h5py.Group):
            yield from children(item, f"{name}/")
        else:
            raise CheckpointError(path, f"{name} stands outside the groups, refused")


def _read(path: Path, name: str, d: Any, limit: int) -> np.ndarray:
    """One array: stored whole and contiguous in this file, of plain numbers; anything else is refused before it is read."""
    import h5py

    if not isinstance(d, h5py.Dataset):
        raise CheckpointError(path, f"{name} is not an array, refused")
    plan = d.id.get_create_plist()
    if plan.get_layout() != h5py.h5d.CONTIGUOUS or plan.get_external_count():
        raise CheckpointError(path, f"{name} is not stored contiguously in this file, refused")
    if d.dtype.kind not in "fiu" or d.shape is None:
        raise CheckpointError(path, f"{name} has dtype {d.dtype}, want float or integer")
    size = math.prod(d.shape) * d.dtype.itemsize
    if not 0 < size <= limit or d.id.get_storage_size() != size:
        raise CheckpointError(path, f"{name} claims {size:,} bytes but stores {d.id.get_storage_size():,}, refused")
    return d[()].astype(d.dtype.newbyteorder("="), copy=False)


def _meta(path: Path, raw: np.ndarray | None) -> dict[str, Any]:
    if raw is None or raw.dtype != np.uint8 or raw.ndim != 1 or raw.size > MAX_META:
        raise CheckpointError(path, "holds no meta data")
    try:
        meta = json.loads(raw.tobytes())
    except (ValueError, RecursionError) as e:
        raise CheckpointError(path, f"its meta data are no JSON ({e})") from e
    if not isinstance(meta, dict) or meta.get("version") != VERSION:
        found = meta.get("version") if isinstance(meta, dict) else None
        raise CheckpointError(path, f"is of version {found!r}, this program reads version {VERSION}")
    return meta


# -------------------------------------------------------------------------------------------------- a directory of checkpoints


def step_path(directory: str | os.PathLike[str], step: int) -> Path:
    """The file of training step ``step``."""
    return Path(directory) / f"step_{step:08d}.h5"


def listing(directory: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoint files in a directory, newest first."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    found = [(int(m.group(1)), Path(directory) / n) for n in names if (m := PATTERN.fullmatch(n))]
    return sorted(found, reverse=True)


def newest(directory: str | os.PathLike[str]) -> tuple[Path, dict[str, np.ndarray], dict[str, Any]]:
    """(path, arrays, meta) of the newest valid checkpoint of a directory; each damaged newer one gives a warning."""
    for _, path in listing(directory):
        try:
            return path, *load(path)
        except CheckpointError as e:
            warnings.warn(f"skipped a bad checkpoint: {e}", stacklevel=2)
    raise CheckpointError(directory, "holds no valid checkpoint (step_*.h5)")


def prune(directory: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints of a directory."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    for _, path in listing(directory)[keep:]:
        with contextlib.suppress(OSError):
            path.unlink()


def sweep(directory: str | os.PathLike[str]) -> list[Path]:
    """Delete the temporary files that killed writers left; only for a directory that no one else writes to. Returns them."""
    stale = sorted(Path(directory).glob(".*.h5.*.tmp"))
    for path in stale:
        with contextlib.suppress(OSError):
            path.unlink()
    return stale
