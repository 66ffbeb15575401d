"""`alphabar make-dataset`: folders of images and IDX files into data sets, and what is said of bad ones."""

import gzip
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from alphabar.core import data
from alphabar.tools import make_dataset

RNG = np.random.default_rng(0)


def make(*words: object) -> int:
    return make_dataset.main([*map(str, words), "--quiet"])


def failure(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of an expected failure."""
    capsys.readouterr()
    assert make(*words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("alphabar make-dataset: error: ") and err.count("\n") == 1, err
    return err


def idx(path: Path, array: np.ndarray, packed: bool = False, kind: int = 8) -> Path:
    raw = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(raw) if packed else raw)
    return path


# ------------------------------------------------------------------------------------------------------- folders of images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of grey PNGs, 3 cats and 2 dogs, 6 rows and 4 columns."""
    for name, count in (("dog", 2), ("cat", 3)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(RNG.integers(0, 256, (6, 4), np.uint8)).save(tmp_path / "set" / name / f"{k}.png")
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "set" / ".hidden").mkdir()
    return tmp_path / "set"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_folder_comes_back_pixel_by_pixel(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.h5"
    assert make(folder, "--out", out) == 0
    loaded = data.load(out)
    assert loaded.classes == ("cat", "dog") and loaded.shape == (6, 4, 1)
    np.testing.assert_array_equal(loaded.labels, [0, 0, 0, 1, 1])
    want = [pixels(p) for c in ("cat", "dog") for p in sorted((folder / c).glob("*.png"))]
    np.testing.assert_array_equal(loaded.images[..., 0], want)
    assert not list(tmp_path.glob(".*.tmp"))


def test_colours_and_sizes(folder: Path, tmp_path: Path) -> None:
    Image.fromarray(RNG.integers(0, 256, (6, 4, 3), np.uint8)).save(folder / "dog" / "rgb.png")
    for words, shape in (
        ([], (6, 4, 3)),
        (["--gray"], (6, 4, 1)),
        (["--size", "8"], (8, 8, 3)),
        (["--size", "2x3", "--rgb"], (2, 3, 3)),
    ):
        assert make(folder, "--out", tmp_path / "x.h5", "--force", *words) == 0
        assert data.load(tmp_path / "x.h5").shape == shape


def test_size_crops_from_the_centre(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    image = np.zeros((4, 8), np.uint8)
    image[:, 2:6] = 200
    Image.fromarray(image).save(tmp_path / "f" / "a.png")
    assert make(tmp_path / "f", "--out", tmp_path / "x.h5", "--size", 4) == 0
    loaded = data.load(tmp_path / "x.h5")
    assert (loaded.images == 200).all() and loaded.labels is None and loaded.classes == ()


def test_transparency_lies_on_white_and_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, :] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "f" / "a.png")
    assert make(tmp_path / "f", "--out", tmp_path / "x.h5") == 0
    np.testing.assert_array_equal(data.load(tmp_path / "x.h5").images[0], [[[10, 20, 30]] * 2, [[255] * 3] * 2])
    (tmp_path / "g").mkdir()
    Image.fromarray(np.array([[0, 257 * 100], [65535, 257]], np.uint16)).save(tmp_path / "g" / "a.png")
    assert make(tmp_path / "g", "--out", tmp_path / "y.h5") == 0
    np.testing.assert_array_equal(data.load(tmp_path / "y.h5").images[0, ..., 0], [[0, 100], [255, 1]])


def test_floating_point_pixels_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would all become black or white without a word."""
    (tmp_path / "f").mkdir()
    Image.fromarray(RNG.random((4, 4), np.float32)).save(tmp_path / "f" / "a.tiff")
    assert "a.tiff: holds floating-point numbers" in failure(capsys, tmp_path / "f", "--out", tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_split_takes_its_share_of_every_class(tmp_path: Path) -> None:
    images, labels = RNG.integers(0, 256, (100, 2, 2), np.uint8), np.repeat([0, 1], [80, 20]).astype(np.uint8)
    paths = idx(tmp_path / "i", images), idx(tmp_path / "l", labels)
    assert make("--images", paths[0], "--labels", paths[1], "--split", 0.25, "--out", tmp_path / "x.h5") == 0
    train, test = data.load(tmp_path / "x.h5", "train"), data.load(tmp_path / "x.h5", "test")
    assert test.labels is not None and train.labels is not None
    assert list(np.bincount(test.labels)) == [20, 5] and list(np.bincount(train.labels)) == [60, 15]


def test_a_class_name_with_a_comma(folder: Path, tmp_path: Path) -> None:
    (folder / "dog").rename(folder / "dog, small")
    assert make(folder, "--out", tmp_path / "x.h5") == 0
    assert data.load(tmp_path / "x.h5").classes == ("cat", "dog, small")


def test_bad_folders_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "x.h5"]
    (tmp_path / "empty").mkdir()
    assert "holds no images" in failure(capsys, tmp_path / "empty", *out)
    assert "No such file" in failure(capsys, tmp_path / "missing", *out)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folder / "dog" / "odd.png")
    assert "odd.png: is 5×5, 0.png is 6×4" in failure(capsys, folder, *out)
    (folder / "dog" / "odd.png").write_bytes(b"no image")
    assert "odd.png: not an image" in failure(capsys, folder, *out)
    whole = (folder / "dog" / "0.png").read_bytes()
    (folder / "dog" / "odd.png").write_bytes(whole[: len(whole) - 25])
    assert "odd.png: cannot be decoded" in failure(capsys, folder, *out)
    (folder / "dog" / "odd.png").rename(folder / "odd.png")
    assert "beside the class folder" in failure(capsys, folder, *out)
    assert not (tmp_path / "x.h5").exists() and not list(tmp_path.glob(".*"))


# --------------------------------------------------------------------------------------------------------------- IDX files


@pytest.mark.parametrize("packed", [False, True])
def test_idx_comes_back(tmp_path: Path, packed: bool) -> None:
    train, test = (RNG.integers(0, 256, (n, 5, 7), np.uint8) for n in (9, 4))
    labels = [np.arange(9, dtype=np.uint8) % 3, np.array([2, 1, 0, 0], np.uint8)]
    words = []
    for option, array in (("images", train), ("labels", labels[0]), ("test-images", test), ("test-labels", labels[1])):
        words += [f"--{option}", idx(tmp_path / option, array, packed)]
    assert make(*words, "--out", tmp_path / "x.h5", "--classes", "a,b,c") == 0
    for split, images, want in (("train", train, labels[0]), ("test", test, labels[1])):
        loaded = data.load(tmp_path / "x.h5", split)
        np.testing.assert_array_equal(loaded.images[..., 0], images)
        np.testing.assert_array_equal(loaded.labels, want)
        assert loaded.classes == ("a", "b", "c")


def test_padding_lies_evenly_around_the_images(folder: Path, tmp_path: Path) -> None:
    images = RNG.integers(1, 256, (3, 5, 7), np.uint8)
    for words, value in (([], 0), (["--background", 255], 255)):
        out = tmp_path / f"{value}.h5"
        assert make("--images", idx(tmp_path / "i", images), "--pad", "8x11", *words, "--out", out) == 0
        padded = data.load(out).images[..., 0]
        assert padded.shape == (3, 8, 11)
        np.testing.assert_array_equal(padded[:, 1:6, 2:9], images)  # 1 row above and 2 below, 2 columns on either side
        padded[:, 1:6, 2:9] = value
        assert (padded == value).all()
    assert make(folder, "--rgb", "--size", 4, "--pad", 6, "--background", 9, "--out", tmp_path / "f.h5") == 0
    loaded = data.load(tmp_path / "f.h5")
    assert loaded.shape == (6, 6, 3) and (loaded.images[:, 0] == 9).all() and (loaded.images[:, :, 5] == 9).all()
    assert make(folder, "--size", 4, "--out", tmp_path / "g.h5", "--rgb") == 0
    np.testing.assert_array_equal(loaded.images[:, 1:5, 1:5], data.load(tmp_path / "g.h5").images)


def test_limit_takes_the_first_of_every_class(folder: Path, tmp_path: Path) -> None:
    train, test = (RNG.integers(0, 256, (n, 2, 2), np.uint8) for n in (9, 4))
    labels = [np.array([0, 0, 1, 0, 1, 1, 1, 0, 2], np.uint8), np.array([1, 1, 1, 0], np.uint8)]
    words = []
    for option, array in (("images", train), ("labels", labels[0]), ("test-images", test), ("test-labels", labels[1])):
        words += [f"--{option}", idx(tmp_path / option, array)]
    assert make(*words, "--limit", 2, "--out", tmp_path / "x.h5") == 0
    for split, images, kept in (("train", train, [0, 1, 2, 4, 8]), ("test", test, [0, 1, 3])):
        loaded = data.load(tmp_path / "x.h5", split)
        np.testing.assert_array_equal(loaded.images[..., 0], images[kept])
        np.testing.assert_array_equal(loaded.labels, labels[split == "test"][kept])
    assert make(*words[:2], "--limit", 3, "--out", tmp_path / "y.h5") == 0
    np.testing.assert_array_equal(data.load(tmp_path / "y.h5").images[..., 0], train[:3])
    assert make(folder, "--limit", 1, "--out", tmp_path / "z.h5") == 0
    want = [pixels(folder / name / "0.png") for name in ("cat", "dog")]
    np.testing.assert_array_equal(data.load(tmp_path / "z.h5").images[..., 0], want)


def test_bad_idx_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = RNG.integers(0, 256, (4, 3, 3), np.uint8)
    good, labels = idx(tmp_path / "good", images), idx(tmp_path / "labels", np.zeros(4, np.uint8))
    raw, bad, out = good.read_bytes(), tmp_path / "bad", ["--out", tmp_path / "x.h5"]

    def says(contents: bytes) -> str:
        bad.write_bytes(contents)
        line = failure(capsys, "--images", bad, *out)
        assert str(bad) in line
        return line

    assert "says it holds 36 bytes of shape (4, 3, 3), but holds 35" in says(raw[:-1])
    assert "but holds more" in says(raw + b"\0")
    assert "cut short inside its head" in says(raw[:10])
    assert "not an IDX file" in says(b"")
    assert "not an IDX file" in says(b"\x89PNG" + raw)
    assert "type 0x0d" in says(raw[:2] + b"\x0d" + raw[3:])
    assert "has 1 dimensions, want 3" in says(labels.read_bytes())
    assert "is empty" in says(struct.pack(">BBBB3I", 0, 0, 8, 3, 0, 3, 3))
    assert "but holds 0" in says(struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1))
    assert "damaged or cut short" in says(gzip.compress(raw)[:-12])
    assert "damaged or cut short" in says(b"\x1f\x8b" + raw)
    assert "holds 3 labels for 4 images" in failure(
        capsys, "--images", good, "--labels", idx(tmp_path / "few", np.zeros(3, np.uint8)), *out
    )
    assert "want 1 (labels)" in failure(capsys, "--images", good, "--labels", good, *out)
    assert "its images are 2×3" in failure(
        capsys, "--images", good, "--test-images", idx(tmp_path / "t", images[:, :2].copy()), *out
    )
    assert "--classes names 1 classes, the labels reach 1" in failure(
        capsys, "--images", good, "--labels", idx(tmp_path / "l1", np.array([0, 1, 1, 0], np.uint8)), "--classes", "a", *out
    )
    assert not (tmp_path / "x.h5").exists()


# ----------------------------------------------------------------------------------------------------------------- arguments


def test_arguments_that_do_not_go_together(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", tmp_path / "x.h5"]
    assert "either a folder or --images" in failure(capsys, *out)
    assert "either a folder or --images" in failure(capsys, folder, "--images", folder, *out)
    assert "--out" in failure(capsys, folder)
    assert "--labels goes with --images" in failure(capsys, folder, "--labels", folder, *out)
    assert "go with a folder" in failure(capsys, "--images", folder, "--gray", *out)
    assert "not allowed with" in failure(capsys, folder, "--gray", "--rgb", *out)
    assert "--split" in failure(capsys, folder, "--split", "2", *out)
    assert "--size" in failure(capsys, folder, "--size", "0", *out)
    assert "--pad" in failure(capsys, folder, "--pad", "0", *out)
    assert "--limit" in failure(capsys, folder, "--limit", "0", *out)
    assert "--background goes with --pad" in failure(capsys, folder, "--background", "1", *out)
    assert "0.png: is 6×4, too large to be padded to 5×5" in failure(capsys, folder, "--pad", "5", *out)
    assert "too large to be padded to 2×9" in failure(
        capsys, "--images", idx(tmp_path / "i", np.zeros((1, 3, 3), np.uint8)), "--pad", "2x9", *out
    )
    assert "there is no folder" in failure(capsys, folder, "--out", tmp_path / "no" / "x.h5")
    assert make(folder, *out) == 0
    assert "exists already" in failure(capsys, folder, *out)


@pytest.mark.parametrize("room", [100, 3000, 300_000])
def test_a_full_disk_gives_one_line_and_no_file(tmp_path: Path, room: int) -> None:
    """HDF5's own writes may end in a crash here; ours end in exit code 1."""
    big = idx(tmp_path / "big", np.zeros((2000, 16, 16), np.uint8))
    words = [sys.executable, "-m", "alphabar.tools.make_dataset", "--images", str(big), "--out", str(tmp_path / "x.h5")]

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    out = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit)
    assert out.returncode == 1 and out.stderr.count("\n") == 1 and "File too large" in out.stderr, out.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["big"]


def test_the_images_lie_contiguously(folder: Path, tmp_path: Path) -> None:
    """So that a batch from a file too large for the memory reads what it needs and no more."""
    assert make(folder, "--out", tmp_path / "x.h5") == 0
    with h5py.File(tmp_path / "x.h5") as f:
        assert f["images"].chunks is None and f.attrs["source"] == "folder set"
