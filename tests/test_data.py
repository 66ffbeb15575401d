"""Data sets: what is read, in which order it comes, and what is refused."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from alphabar.core import data
from alphabar.core.data import DataError, Dataset


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def write(path: Path, **columns: Any) -> Path:
    with h5py.File(path, "w") as f:
        for name, values in columns.items():
            if name == "classes":
                f.attrs["classes"] = values
            else:
                f.create_dataset(name, data=values)
    return path


# ------------------------------------------------------------------------------------------------------------ what is read


def test_digits_are_those_of_the_source() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    source, ours = load_digits(), data.load("digits", "all")
    np.testing.assert_array_equal(ours.images[..., 0], np.rint(source.images * 255 / 16).astype(np.uint8))
    np.testing.assert_array_equal(ours.labels, source.target)
    assert ours.classes == tuple("0123456789") and ours.shape == (8, 8, 1)


def test_splits_of_the_digits_part_them() -> None:
    train, test, everything = (data.load("digits", s) for s in ("train", "test", "all"))
    assert len(train) + len(test) == len(everything) == 1797
    assert test.labels is not None and np.bincount(test.labels).min() >= 34
    rows = {a.tobytes() for a in train.images} & {a.tobytes() for a in test.images}
    assert not rows, "an image is in both splits"


def test_gray_without_channel_axis_and_rgb(tmp_path: Path, rng: np.random.Generator) -> None:
    gray = rng.integers(0, 256, (5, 4, 6), np.uint8)
    rgb = rng.integers(0, 256, (5, 4, 6, 3), np.uint8)
    assert data.load(write(tmp_path / "g.h5", images=gray)).shape == (4, 6, 1)
    loaded = data.load(write(tmp_path / "c.h5", images=rgb, labels=[0, 2, 1, 1, 0], classes="a,b,c"))
    np.testing.assert_array_equal(loaded.images, rgb)
    assert loaded.labels is not None and loaded.labels.dtype == np.int64
    assert loaded.classes == ("a", "b", "c") and loaded.name == "c"


def test_class_names_as_array_or_missing(tmp_path: Path) -> None:
    images, labels = np.zeros((3, 2, 2), np.uint8), np.array([0, 1, 2])
    assert data.load(write(tmp_path / "a.h5", images=images, labels=labels)).classes == ("0", "1", "2")
    assert data.load(write(tmp_path / "b.h5", images=images, labels=labels, classes=[b"x, y", b"z", b"w"])).classes[0] == "x, y"


@pytest.mark.parametrize("contiguous_split", [True, False])
def test_in_memory_and_from_the_file_are_the_same(tmp_path: Path, rng: np.random.Generator, contiguous_split: bool) -> None:
    n = 50
    split = np.arange(n) >= 30 if contiguous_split else rng.random(n) < 0.4
    path = write(
        tmp_path / "x.h5",
        images=rng.integers(0, 256, (n, 3, 3, 2), np.uint8),
        labels=np.arange(n) % 4,
        split=split.astype(np.uint8),
    )
    for part in ("train", "test", "all"):
        ram, lazy = data.load(path, part), data.load(path, part, memory=0)
        assert isinstance(ram.images, np.ndarray) and isinstance(lazy.images, data.Slices)
        assert ram.sha256 == lazy.sha256 and len(ram) == len(lazy)
        for step in range(12):
            for a, b in zip(ram.batch(step, 7, 3, flip=True), lazy.batch(step, 7, 3, flip=True), strict=True):
                np.testing.assert_array_equal(a, b)


def test_hash_sees_pixels_labels_and_names(rng: np.random.Generator) -> None:
    images, labels = rng.integers(0, 256, (4, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1])
    other = images.copy()
    other[3, 1, 1, 0] ^= 1
    sets = [
        Dataset(images, labels, ("a", "b")),
        Dataset(other, labels, ("a", "b")),
        Dataset(images, labels[::-1].copy(), ("a", "b")),
        Dataset(images, labels, ("a", "c")),
        Dataset(images),
    ]
    assert len({s.sha256 for s in sets}) == len(sets)
    assert Dataset(images.copy(), labels, ("a", "b"), name="else").sha256 == sets[0].sha256


# ---------------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize(("n", "size"), [(10, 3), (7, 7), (5, 12), (1, 4), (64, 16)])
def test_every_epoch_takes_every_row_once(n: int, size: int) -> None:
    stream = np.concatenate([data.order(n, size, k, seed=5) for k in range(3 * n)])
    for epoch in range(len(stream) // n):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_depends_on_seed_and_step_alone() -> None:
    late = data.order(100, 32, 40, seed=1)
    for k in range(40):
        data.order(100, 32, k, seed=1)
    data._epoch.cache_clear()
    np.testing.assert_array_equal(late, data.order(100, 32, 40, seed=1))
    assert not np.array_equal(late, data.order(100, 32, 40, seed=2))
    first, second = (np.concatenate([data.order(100, 50, k + e, seed=1) for k in (0, 1)]) for e in (0, 2))
    assert not np.array_equal(first, second), "two epochs in one order"


def test_flip_mirrors_about_half_and_leaves_the_data() -> None:
    images = np.arange(200, dtype=np.uint8).repeat(2).reshape(200, 1, 2, 1)
    images[:, :, 1] = 255
    kept = images.copy()
    batch, _, rows = Dataset(images).batch(0, 200, seed=9, flip=True)
    mirrored = batch[:, 0, 0, 0] == 255
    assert 70 < mirrored.sum() < 130
    np.testing.assert_array_equal(images, kept)
    np.testing.assert_array_equal(np.where(mirrored, batch[:, 0, 1, 0], batch[:, 0, 0, 0]), images[rows, 0, 0, 0])


# -------------------------------------------------------------------------------------------------------------------- values


def test_pixels_survive_the_way_to_the_unit_interval_and_back() -> None:
    u = np.arange(256, dtype=np.uint8)
    x = data.to_unit(u)
    assert x.dtype == np.float32 and x[0] == -1 and x[255] == 1
    np.testing.assert_array_equal(data.to_uint8(x), u)
    np.testing.assert_array_equal(data.to_uint8(x.astype(np.float64)), u)


def test_values_outside_are_clipped_and_nan_refused() -> None:
    np.testing.assert_array_equal(data.to_uint8(np.array([-9.0, 9.0, np.inf, -np.inf, 0.004])), [0, 255, 255, 0, 128])
    with pytest.raises(ValueError, match="NaN"):
        data.to_uint8(np.array([0.0, np.nan]))
    with pytest.raises(TypeError, match="uint8"):
        data.to_unit(np.zeros(3))


@pytest.mark.parametrize(
    ("images", "labels", "classes"),
    [
        (np.zeros((2, 2, 2), np.uint8), None, ()),
        (np.zeros((0, 2, 2, 1), np.uint8), None, ()),
        (np.zeros((2, 2, 2, 1), np.uint8), np.array([0, 5]), ("a", "b")),
        (np.zeros((2, 2, 2, 1), np.uint8), np.array([-1, 0]), ("a", "b")),
        (np.zeros((2, 2, 2, 1), np.uint8), np.array([0]), ("a",)),
        (np.zeros((2, 2, 2, 1), np.uint8), np.array([0.0, 1.0]), ("a", "b")),
    ],
)
def test_bad_arrays_are_refused(images: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError):
        Dataset(images, labels, classes)


@pytest.mark.parametrize(("n", "size", "step"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_bad_orders_are_refused(n: int, size: int, step: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        data.order(n, size, step)


# ---------------------------------------------------------------------------------------------------------- what is refused


def refused(path: Path, *words: str, split: str = "train") -> None:
    with pytest.raises(DataError) as e:
        data.load(path, split)
    assert str(path) in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


ZEROS = np.zeros((4, 2, 2), np.uint8)


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({"pictures": ZEROS}, "no data set 'images'"),
        ({"images": ZEROS.astype(np.float32)}, "want uint8"),
        ({"images": ZEROS.astype(np.int8)}, "want uint8"),
        ({"images": np.zeros((4, 4), np.uint8)}, "shape"),
        ({"images": np.zeros((2, 2, 2, 2, 2), np.uint8)}, "shape"),
        ({"images": np.zeros((0, 2, 2), np.uint8)}, "shape"),
        ({"images": np.zeros((2, 2, 2, 17), np.uint8)}, "channels"),
        ({"images": ZEROS, "labels": np.zeros(3, np.uint8)}, "want (4,)"),
        ({"images": ZEROS, "labels": np.zeros(4)}, "want integers"),
        ({"images": ZEROS, "labels": np.array([0, 1, -1, 0])}, "labels lie in -1..1"),
        ({"images": ZEROS, "labels": np.array([0, 1, 2, 2**62])}, "labels lie in"),
        ({"images": ZEROS, "labels": np.array([0, 1, 2, 3]), "classes": "a,b"}, "want 0..1"),
        ({"images": ZEROS, "split": np.array([0, 1, 2, 0])}, "split must be"),
        ({"images": ZEROS, "split": np.ones(4, np.uint8)}, "train split is empty"),
        ({"images": np.bytes_(b"text")}, "uint8"),
    ],
)
def test_wrong_contents(tmp_path: Path, columns: dict[str, Any], word: str) -> None:
    refused(write(tmp_path / "bad.h5", **columns), word)


def test_no_test_split(tmp_path: Path) -> None:
    refused(write(tmp_path / "x.h5", images=ZEROS), "no test images", split="test")
    with pytest.raises(ValueError, match="split must be one of"):
        data.load("digits", "valid")


def external_link(path: Path, good: Path) -> None:
    with h5py.File(path, "w") as f:
        f["images"] = h5py.ExternalLink(str(good), "/images")


def soft_link(path: Path, good: Path) -> None:
    with h5py.File(path, "w") as f:
        f["other"] = ZEROS
        f["images"] = h5py.SoftLink("/other")


def external_storage(path: Path, good: Path) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(bytes(1000))
    with h5py.File(path, "w") as f:
        f.create_dataset("images", (4, 2, 2), np.uint8, external=[(str(raw), 0, 1000)])


def virtual(path: Path, good: Path) -> None:
    layout = h5py.VirtualLayout((4, 2, 2), np.uint8)
    layout[:] = h5py.VirtualSource(str(good), "images", (4, 2, 2))
    with h5py.File(path, "w") as f:
        f.create_virtual_dataset("images", layout)


def shape_bomb(path: Path, good: Path) -> None:
    with h5py.File(path, "w") as f:
        f.create_dataset("images", (1 << 30, 64, 64), np.uint8)


def gzip_bomb(path: Path, good: Path) -> None:
    with h5py.File(path, "w") as f:
        f.create_dataset("images", data=np.zeros((64, 1024, 1024), np.uint8), chunks=(1, 1024, 1024), compression="gzip")


def group(path: Path, good: Path) -> None:
    with h5py.File(path, "w") as f:
        f.create_group("images")


def null_space(path: Path, good: Path) -> None:
    with h5py.File(path, "w") as f:
        f["images"] = h5py.Empty(np.uint8)


def linked_labels(path: Path, good: Path) -> None:
    with h5py.File(path, "w") as f:
        f["images"] = ZEROS
        f["labels"] = h5py.ExternalLink(str(good), "/labels")


HOSTILE = [external_link, soft_link, external_storage, virtual, shape_bomb, gzip_bomb, group, null_space, linked_labels]


@pytest.mark.parametrize("make", HOSTILE, ids=lambda f: f.__name__)
def test_hostile_files_are_refused_before_they_are_read(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    good = write(tmp_path / "good.h5", images=ZEROS, labels=np.zeros(4, np.uint8))
    make(tmp_path / "bad.h5", good)
    refused(tmp_path / "bad.h5")


def foreign(folder: Path) -> list[Path]:
    """Files that are no data set."""
    (folder / "empty.h5").touch()
    (folder / "text.h5").write_text("images")
    (folder / "png.h5").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (folder / "pickle.h5").write_bytes(pickle.dumps({"images": [1, 2]}))
    with zipfile.ZipFile(folder / "zip.h5", "w") as z:
        z.writestr("images", "x")
    np.savez(folder / "npz.npz", images=ZEROS)
    (folder / "folder.h5").mkdir()
    os.mkfifo(folder / "fifo.h5")
    whole = write(folder / "whole.h5", images=ZEROS).read_bytes()
    (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "whole.h5").unlink()
    return [*sorted(folder.iterdir()), folder / "missing.h5"]


def test_foreign_files_are_named(tmp_path: Path) -> None:
    paths = foreign(tmp_path)
    assert len(paths) == 10
    for path in paths:
        refused(path)


def test_a_file_that_vanishes_under_lazy_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "x.h5", images=ZEROS)
    lazy = data.load(path, memory=0)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        lazy.batch(0, 2)
