"""Reading IDX files, the format of MNIST and Fashion-MNIST, plain or packed by gzip."""

import gzip
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alphabar.core.data import DataError

UNSIGNED_BYTE = 0x08


def read(path: str | os.PathLike[str], ndim: int) -> np.ndarray:
    """The uint8 array of an IDX file: 3 dimensions for images, 1 for labels. DataError with path and reason."""
    path = Path(path)
    try:
        with open(path, "rb") as f:
            packed = f.read(2) == b"\x1f\x8b"
            f.seek(0)
            if packed:
                with gzip.GzipFile(fileobj=f) as unpacked:
                    return _parse(path, unpacked, ndim)
            return _parse(path, f, ndim)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise DataError(path, f"the gzip data are damaged or cut short ({e})") from e
    except OSError as e:
        raise DataError(path, e.strerror or str(e)) from e


def _parse(path: Path, f: BinaryIO | Any, ndim: int) -> np.ndarray:
    head = f.read(4)
    if len(head) < 4 or head[:2] != b"\0\0":
        raise DataError(path, "not an IDX file (it must begin with two zero bytes, a type and a number of dimensions)")
    if head[2] != UNSIGNED_BYTE:
        raise DataError(path, f"holds IDX type 0x{head[2]:02x}, want unsigned bytes (0x08)")
    if head[3] != ndim:
        raise DataError(path, f"has {head[3]} dimensions, want {ndim} ({'labels' if ndim == 1 else 'images'})")
    sizes = f.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(path, "cut short inside its head")
    shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
    want = int(np.prod(shape, dtype=object))
    if not want:
        raise DataError(path, f"is empty: shape {shape}")
    parts, have = [], 0
    while have <= want and (part := f.read(min(1 << 20, want + 1 - have))):  # one byte more than asked shows a longer file
        parts.append(part)
        have += len(part)
    if have != want:
        more = "more" if have > want else f"{have:,}"
        raise DataError(path, f"says it holds {want:,} bytes of shape {shape}, but holds {more}")
    return np.frombuffer(b"".join(parts), np.uint8).reshape(shape)
