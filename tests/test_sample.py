"""The sampling program: what is asked for is what comes, and image k follows from (seed, k, class) alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from alphabar import kernels
from alphabar.core import data
from alphabar.nets import checkpoint
from alphabar.tools import sample, train

SETTINGS = ["model.channels=8", "model.blocks=1", "model.attention=4", "model.groups=4", "train.batch=8", "train.warmup=1"]
SETTINGS += ["train.lr=1e-2", "log.samples=0", "log.checkpoints=2", "sample.steps=4", "sample.columns=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps on 30 images of 4×6 in 3 classes."""
    folder, rng = tmp_path_factory.mktemp("sampling"), np.random.default_rng(0)
    with h5py.File(folder / "tiny.h5", "w") as f:
        f["images"], f["labels"] = rng.integers(0, 256, (30, 4, 6, 3), np.uint8), np.arange(30) % 3
        f.attrs["classes"] = "red,green,blue"
    words = ["--data", folder / "tiny.h5", "--steps", 6, "--out", folder, "--name", "run", "--quiet", "--device", "cpu"]
    with kernels.use("reference"):
        assert train.main([*map(str, words), *(w for s in SETTINGS for w in ("--set", s))]) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with kernels.use("reference"):
        yield


def draw(run: Path, *words: object, out: str = "x.h5") -> tuple[np.ndarray, list[int]]:
    """(images, labels) that a call wrote."""
    assert sample.main([*map(str, [run, *words]), "--out", out, "--quiet", "--device", "cpu"]) == 0
    with h5py.File(out) as f:
        return f["images"][:], list(f["labels"][:]) if "labels" in f else []


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    code = sample.main([*map(str, words), "--quiet", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.startswith("alphabar sample: error: ") and err.count("\n") == 1, (code, err)
    return err


def test_without_options_both_files_come(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.main([str(run), "--device", "cpu"]) == 0
    assert "wrote samples.h5: 64 images 4×6×3" in capsys.readouterr().out
    loaded = data.load("samples.h5")
    assert len(loaded) == 64 and loaded.shape == (4, 6, 3) and loaded.classes == ("red", "green", "blue")
    assert min(Image.open("samples.png").size) > 100
    with h5py.File("samples.h5") as f:
        stated = dict(f.attrs)
    assert stated["sampler"] == "ddim" and stated["steps"] == 4 and stated["guidance"] == 0.5 and stated["step"] == 6
    assert stated["checkpoint"] == "step_00000006.h5" and stated["weights"] == "average" and stated["seed"] == 0


@pytest.mark.parametrize(
    ("asked", "labels"),
    [
        ("all", [0, 1, 2, 0, 1, 2, 0]),
        ("1", [1] * 7),
        ("2,0", [2, 0, 2, 0, 2, 0, 2]),
        ("blue, red", [2, 0, 2, 0, 2, 0, 2]),
        ("none", []),
    ],
)
def test_the_classes_asked_for_in_turn(run: Path, asked: str, labels: list[int]) -> None:
    images, found = draw(run, "--n", 7, "--class", asked)
    assert images.shape == (7, 4, 6, 3) and images.dtype == np.uint8 and found == labels


def test_a_class_is_known_by_its_name_before_its_number() -> None:
    def asked(text: str, *classes: str) -> list[int]:
        labels = sample._labels(text, classes, 3)
        assert labels is not None
        return labels.tolist()

    assert asked("1", "1", "2", "5") == [0, 0, 0] and asked("5,2", "1", "2", "5") == [2, 1, 2]
    assert asked("0", "1", "2", "5") == [0, 0, 0]  # no such name
    assert asked("a,b", "x", "a,b") == [1, 1, 1]


@pytest.mark.parametrize(
    "words", [("--sampler", "ddpm"), ("--eta", 1), ("--sampler", "dpm++"), ("--sampler", "ab"), ("--sampler", "heun")]
)
def test_image_k_follows_from_seed_and_k(run: Path, words: tuple[object, ...]) -> None:
    """Not from the batch size, and not from how many are drawn: the noise is the same bits, the products of matrices nearly."""
    whole, labels = draw(run, "--n", 20, "--batch", 64, *words)
    for batch in (1, 7):
        split, same = draw(run, "--n", 20, "--batch", batch, *words)
        assert same == labels and np.abs(split.astype(int) - whole).max() <= 1
    fewer, _ = draw(run, "--n", 5, *words)
    assert np.abs(fewer.astype(int) - whole[:5]).max() <= 1
    other, _ = draw(run, "--n", 20, "--seed", 1, *words)
    assert np.abs(other.astype(int) - whole).mean() > 5


def test_images_of_a_run_differ_from_each_other(run: Path) -> None:
    images, _ = draw(run, "--n", 9, "--class", 1)
    assert len({image.tobytes() for image in images}) == 9


def test_guidance_class_and_weights_matter(run: Path) -> None:
    def one(*words: object) -> bytes:
        return draw(run, "--n", 4, "--class", 1, "--seed", 3, *words)[0].tobytes()

    plain = one("--guidance", 0)
    assert plain == one("--guidance", 0)
    assert len({plain, one("--guidance", 3), one("--raw-weights", "--guidance", 0), one("--steps", 3, "--guidance", 0)}) == 4
    assert one("--guidance", -1) == draw(run, "--n", 4, "--class", "none", "--seed", 3)[0].tobytes(), (
        "w = -1 is the model without a class"
    )


def test_sheet_has_a_row_for_each_class(run: Path) -> None:
    assert sample.main([str(run), "--n", "12", "--out", "a.png", "--quiet", "--device", "cpu"]) == 0
    tall = Image.open("a.png").size[1]
    assert sample.main([str(run), "--n", "12", "--class", "1", "--out", "b.png", "--quiet", "--device", "cpu"]) == 0
    assert tall > 2 * Image.open("b.png").size[1] and not Path("samples.h5").exists()


def test_a_checkpoint_file_its_run_and_the_folder_of_runs_are_the_same(run: Path) -> None:
    a, _ = draw(run, "--n", 3)
    b, _ = draw(checkpoint.step_path(run / "ckpt", 6), "--n", 3)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, draw(run / "ckpt", "--n", 3)[0])
    np.testing.assert_array_equal(a, draw(run.parent, "--n", 3)[0])  # the latest of the runs there
    older, _ = draw(checkpoint.step_path(run / "ckpt", 2), "--n", 3)
    assert not np.array_equal(a, older)


def test_a_run_with_a_damaged_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "copy")
    newest = checkpoint.step_path(tmp_path / "copy" / "ckpt", 6)
    newest.write_bytes(newest.read_bytes()[:-1])
    images, _ = draw(tmp_path / "copy", "--n", 3)
    assert capsys.readouterr().err.count("warning: skipped a bad checkpoint") == 1
    np.testing.assert_array_equal(images, draw(checkpoint.step_path(run / "ckpt", 4), "--n", 3)[0])
    assert "end mark is missing" in fails(capsys, newest)


def test_checkpoints_that_are_no_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, meta = checkpoint.load(checkpoint.step_path(run / "ckpt", 6))
    path = tmp_path / "x.h5"
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"kind": "else"}, {}, "of kind 'else'"),
        ({"model": None}, {}, "lack 'model'"),
        ({"model": {}}, {}, "cannot be built"),
        ({"model": {**meta["model"], "channels": [7]}}, {}, "cannot be built"),
        ({"model": {**meta["model"], "colour": 3}}, {}, "cannot be built"),
        ({"model": {**meta["model"], "channels": [16]}}, {}, "do not fit the network"),
        ({"config": {"train": {"lr": "x"}}}, {}, "cannot be built"),
        ({"data": {}}, {}, "cannot be built"),
        ({"data": {"classes": ["a"]}}, {}, "names 1 classes, its network has 3"),
        ({}, {"ema/conv_in.bias": np.ones(3, np.float32)}, "do not fit the network"),
    ]
    for changed, other, message in wrong:
        checkpoint.save(path, {**arrays, **other}, {**meta, **changed})
        assert message in fails(capsys, path)
    checkpoint.save(path, {n: a for n, a in arrays.items() if not n.startswith("ema/conv_in")}, meta)
    assert "missing ['conv_in.weight', 'conv_in.bias']" in fails(capsys, path)


def test_weights_that_are_not_finite(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, meta = checkpoint.load(checkpoint.step_path(run / "ckpt", 6))
    arrays["ema/conv_in.bias"] = np.full_like(arrays["ema/conv_in.bias"], np.nan)
    checkpoint.save(tmp_path / "x.h5", arrays, meta)
    assert sample.main([str(tmp_path / "x.h5"), "--quiet", "--device", "cpu"]) == 1
    assert "no samples could be drawn" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.h5"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: CKPT"),
        (("/no/such",), "No such file"),
        (("RUN", "--sampler", "dimm"), "invalid choice"),
        (("RUN", "--steps", "1001"), "steps must be in 1..1000"),
        (("RUN", "--steps", "0"), "--steps"),
        (("RUN", "--eta", "2"), "--eta"),
        (("RUN", "--eta", "nan"), "--eta"),
        (("RUN", "--sampler", "euler", "--eta", "1"), "eta goes with the sampler ddim"),
        (("RUN", "--guidance", "inf"), "--guidance"),
        (("RUN", "--class", "none", "--guidance", "1"), "--guidance needs classes"),
        (("RUN", "--class", "3"), "numbers in 0..2"),
        (("RUN", "--class", "-1"), "numbers in 0..2"),
        (("RUN", "--class", ""), "numbers in 0..2"),
        (("RUN", "--class", "1,,2"), "numbers in 0..2"),
        (("RUN", "--class", "purple"), "not 'purple'"),
        (("RUN", "--n", "0"), "--n"),
        (("RUN", "--n", "x"), "--n"),
        (("RUN", "--batch", "0"), "--batch"),
        (("RUN", "--seed", str(2**64)), "--seed"),
        (("RUN", "--out", "x.jpg"), "must end in .h5 or .png"),
        (("RUN", "--out", "a.h5", "--out", "b.h5"), "two .h5 files"),
        (("RUN", "--out", "no/such/a.h5"), "there is no folder"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in fails(capsys, *(run if w == "RUN" else w for w in words))
    assert not list(tmp_path.iterdir())
