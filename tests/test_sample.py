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
from alphabar.core import analytic, data
from alphabar.nets import checkpoint
from alphabar.tools import gamma, sample, train, train_classifier, trained

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
    "words",
    [
        ("--sampler", "ddpm"),
        ("--eta", 1),
        ("--sampler", "dpm++"),
        ("--sampler", "ab"),
        ("--sampler", "heun"),
        ("--sampler", "dpm++sde", "--spacing", "karras"),
        ("--sampler", "unipc", "--order", 3, "--threshold", 0.9),
        ("--guidance", 3, "--rescale", 0.7, "--interval", 0.1, 50),
    ],
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


# -------------------------------------------------------------------------------------------------------------- by a classifier


@pytest.fixture(scope="module")
def classifier(run: Path) -> Path:
    """Trained a little on what the run was trained on."""
    with kernels.use("reference"):
        assert train_classifier.main([str(run), "--steps", "4", "--batch", "8", "--lr", "0.1", "--device", "cpu", "--quiet"]) == 0
    return run / "classifier.h5"


def test_a_classifier_guides_a_network_with_classes_and_one_without(run: Path, classifier: Path, tmp_path: Path) -> None:
    asked = ("--n", 4, "--class", "1,blue", "--sampler", "ddpm", "--classifier", classifier)
    plain, labels = draw(run, *asked[:-2], "--guidance", 0)
    none, same = draw(run, *asked, "--classifier-weight", 0)  # and no classifier-free guidance unless it is asked for
    assert labels == same == [1, 2, 1, 2]
    np.testing.assert_array_equal(plain, none)
    score, mean = (draw(run, *asked, "--classifier-weight", 9, "--classifier-form", form)[0] for form in ("score", "mean"))
    both, _ = draw(run, *asked, "--classifier-weight", 9, "--guidance", 2)
    assert len({a.tobytes() for a in (plain, score, mean, both)}) == 4
    with h5py.File("x.h5") as f:
        stated = dict(f.attrs)
    assert (stated["classifier"], stated["classifier_weight"], stated["classifier_form"]) == ("classifier.h5", 9, "score")
    assert stated["guidance"] == 2
    split, _ = draw(run, *asked, "--classifier-weight", 9, "--batch", 3)  # labels in step with the images
    assert np.abs(split.astype(int) - score).max() <= 1

    words = ["--data", run.parent / "tiny.h5", "--steps", 2, "--out", tmp_path, "--name", "u", "--quiet", "--device", "cpu"]
    sets = [*SETTINGS, "model.conditional=false"]
    assert train.main([*map(str, words), *(w for s in sets for w in ("--set", s))]) == 0
    left, labels = draw(tmp_path / "u", *asked, "--classifier-weight", 30)
    assert labels == [1, 2, 1, 2]
    other, _ = draw(tmp_path / "u", "--n", 4, "--class", "0", *asked[4:], "--classifier-weight", 30)
    assert not np.array_equal(left, other)
    sheet = [str(w) for w in (tmp_path / "u", *asked, "--out", "a.png", "--quiet", "--device", "cpu")]
    assert sample.main(sheet) == 0 and Path("a.png").exists()


def test_a_classifier_that_does_not_fit(run: Path, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--classifier", classifier)
    assert "not --class none" in fails(capsys, run, *where, "--class", "none")
    assert "of kind 'alphabar-training'" in fails(capsys, run, "--classifier", checkpoint.step_path(run / "ckpt", 6))
    assert "--classifier-weight goes with --classifier" in fails(capsys, run, "--classifier-weight", 3)
    assert "must have noise" in fails(capsys, run, *where, "--classifier-form", "mean")
    assert "clips x0" in fails(capsys, run, *where, "--classifier-form", "mean", "--sampler", "flow")
    wrong = ("--classifier-form", "mean", "--sampler", "ddpm", "--interval", 1, 2)
    assert "an interval goes with guidance of the form score" in fails(capsys, run, *where, *wrong)
    arrays, meta = checkpoint.load(classifier)
    path = tmp_path / "c.h5"
    meta["config"]["diffusion"]["T"] = 500
    checkpoint.save(path, arrays, meta)
    assert "it knows other noise levels than this network" in fails(capsys, run, "--classifier", path)
    meta["config"]["diffusion"]["T"], meta["data"]["classes"] = 1000, ["a", "b", "c"]
    checkpoint.save(path, arrays, meta)
    assert "it knows other classes than this network" in fails(capsys, run, "--classifier", path)


# ------------------------------------------------------------------------------------------------------------ the best variance


def test_gamma_is_measured_once_and_kept_in_the_checkpoint(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gamma, "TIMES", 20)
    measured: list[tuple[Any, ...]] = []
    measure = analytic.measure_gamma
    monkeypatch.setattr(analytic, "measure_gamma", lambda *a, **k: measured.append(a) or measure(*a, **k))
    shutil.copytree(run, tmp_path / "copy")
    path = checkpoint.step_path(tmp_path / "copy" / "ckpt", 6)
    before, stamp = checkpoint.load(path), path.stat().st_mtime_ns
    asked = ("--n", 4, "--sampler", "ddpm", "--steps", 4, "--analytic")
    first, _ = draw(tmp_path / "copy", *asked)
    with h5py.File("x.h5") as f:
        assert f.attrs["variance"] == "best, by Gamma of 30 images at 21 times"
    again, _ = draw(path, *asked)
    np.testing.assert_array_equal(first, again)
    assert len(measured) == 1 and not np.array_equal(first, draw(run, *asked[:-1])[0])
    kept, meta = checkpoint.load(path)
    assert path.stat().st_mtime_ns == stamp and meta == before[1]
    added = {name: a for name, a in kept.items() if name not in before[0]}
    assert {name.partition("/")[0] for name in added} == {"gamma"} and len(added) == 7
    assert all(np.array_equal(kept[name], a) for name, a in before[0].items())
    found = analytic.Gamma.from_arrays({name.partition("/")[2]: a for name, a in added.items()})
    assert (found.samples, found.dimensions, found.t[0], found.t[-1]) == (30, 72, 1, 1000)

    # others are measured apart, each of the network that draws, told the class of each image or none
    images, labels, _ = data.load(run.parent / "tiny.h5", "train").batch(0, 30)
    x0, t = data.to_unit(images), np.full(30, 500)
    for words in (("--class", "none"), ("--raw-weights",), ("--class", "none", "--raw-weights"), ("--spacing", "optimal")):
        draw(path, *asked, *words)
    assert len(measured) == 4
    for (model, shown, *_), raw, y in zip(measured, (0, 0, 1, 1), (labels, None, labels, None), strict=True):
        np.testing.assert_array_equal(shown, x0)
        np.testing.assert_array_equal(model(x0, t), trained.load(path, bool(raw), np).net.predict(x0, t, y))
    assert len({model(x0, t).tobytes() for model, *_ in measured}) == 4
    groups = {name.partition("/")[0] for name in checkpoint.load(path)[0]}
    assert {"gamma", "gamma_none", "gamma_raw", "gamma_none_raw"} <= groups

    # and a run goes on from such a checkpoint as from any
    shutil.copytree(run, tmp_path / "plain")
    ends = []
    for name in ("copy", "plain"):
        assert train.main(["--resume", str(tmp_path / name), "--steps", "7", "--device", "cpu", "--quiet"]) == 0
        ends.append(checkpoint.step_path(tmp_path / name / "ckpt", 7).read_bytes())
    assert ends[0] == ends[1]

    spoilt = {**checkpoint.load(path)[0], "gamma/t": np.zeros(21)}
    checkpoint.save(path, spoilt, meta)
    assert "its gamma cannot be used" in fails(capsys, path, *asked)
    meta["data"]["sha256"] = "other"
    checkpoint.save(path, before[0], meta)
    assert "other data" in fails(capsys, path, *asked)


def test_gamma_that_cannot_be_kept_is_used_all_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gamma, "TIMES", 4)
    shutil.copytree(run, tmp_path / "copy")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    draw(tmp_path / "copy", "--n", 2, "--eta", 1, "--analytic")
    assert "warning" in capsys.readouterr().err
    assert "gamma/t" not in checkpoint.load(checkpoint.step_path(tmp_path / "copy" / "ckpt", 6))[0]


# -------------------------------------------------------------------------------------------------------------------- pictures


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
        (("RUN", "--order", "3"), "sample.order goes with the samplers dpm, dpm++"),
        (("RUN", "--sampler", "unipc", "--order", "4"), "order must be 1, 2 or 3, not 4"),
        (("RUN", "--sampler", "pc", "--threshold", "0.9"), "threshold does not go with the sampler pc"),
        (("RUN", "--sampler", "learned"), "needs a network that has learned its variance"),
        (("RUN", "--interval", "3", "1"), "interval_high must be 0 or at least interval_low"),
        (("RUN", "--interval", "3"), "--interval"),
        (("RUN", "--rescale", "2"), "--rescale"),
        (("RUN", "--spacing", "optimal"), "--spacing optimal goes with --analytic"),
        (("RUN", "--sampler", "heun", "--analytic"), "--analytic goes with the samplers ddpm, ddim, euler, euler-a, not heun"),
        (("RUN", "--classifier", "/no/such"), "No such file"),
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
