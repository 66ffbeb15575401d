"""Writing an HDF5 file of images, block by block, or of tokens."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.tools.files import replacing


def write(
    path: str | os.PathLike[str],
    shape: tuple[int, int, int, int],
    blocks: Iterable[np.ndarray],
    columns: Mapping[str, np.ndarray],
    classes: Sequence[str] = (),
    attributes: Mapping[str, Any] | None = None,
) -> Path:
    """Write `images` uint8 ``shape`` from blocks (n, H, W, C) that follow each other, and columns such as labels (N,).

    The images lie contiguously and are written past HDF5, which may crash where a disk is full: an OSError leaves no file. The
    file appears under its name when it is whole.
    """
    import h5py

    path = Path(path)
    try:
        with replacing(path) as temporary:
            with h5py.File(temporary, "w", libver="v110") as f:
                for name, values in columns.items():
                    f.create_dataset(name, data=values, track_times=False)
                for key, value in (attributes or {}).items():
                    f.attrs[key] = value
                if classes:
                    plain = not any("," in name for name in classes)
                    f.attrs["classes"] = ",".join(classes) if plain else [name.encode() for name in classes]
                plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
                plan.set_layout(h5py.h5d.CONTIGUOUS)
                plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
                plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
                plan.set_obj_track_times(False)
                images = h5py.h5d.create(f.id, b"images", h5py.h5t.STD_U8LE, h5py.h5s.create_simple(shape), plan)
                offset, size = images.get_offset(), images.get_storage_size()
            written = 0
            with open(temporary, "r+b") as raw:
                raw.seek(offset)
                for block in blocks:
                    if block.dtype != np.uint8 or block.shape[1:] != shape[1:]:
                        raise ValueError(f"a block must be uint8 (n, {shape[1:]}), not {block.dtype} of shape {block.shape}")
                    written += raw.write(np.ascontiguousarray(block).data)
                if written != size:
                    raise ValueError(f"the blocks hold {written} bytes, want {size}")
                raw.flush()
                os.fsync(raw.fileno())
    except RuntimeError as e:  # so h5py names an error of the disk where it closes a file
        raise OSError(str(e)) from e
    return path


def write_tokens(path: Path, tokens: np.ndarray, alphabet: str, attributes: Mapping[str, Any]) -> Path:
    """Write `tokens` uint8 (N, L), places in the attribute `alphabet`. The file appears under its name when it is whole."""
    import h5py

    try:
        with replacing(path) as temporary, h5py.File(temporary, "w", libver="v110") as f:
            f.create_dataset("tokens", data=tokens, track_times=False)
            f.attrs["alphabet"] = alphabet
            for key, value in attributes.items():
                f.attrs[key] = value
    except RuntimeError as e:  # so h5py names an error of the disk where it closes a file
        raise OSError(str(e)) from e
    return path
