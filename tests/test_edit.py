"""The editing program: every mode and method on a tiny network, what it promises of known pixels, and one line for a mistake."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from alphabar import kernels
from alphabar.core import data, operators
from alphabar.tools import edit, editor, train
from alphabar.tools.methods import Process
from alphabar.tools.trained import load

SETTINGS = ["model.channels=8", "model.blocks=1", "model.attention=4", "model.groups=4", "train.batch=8", "train.warmup=1"]
SETTINGS += ["train.lr=1e-2", "log.samples=0", "log.checkpoints=100"]


def trained(folder: Path, name: str, images: np.ndarray, labels: bool, *words: str) -> Path:
    """A run of 4 steps on images of which every third is a test image."""
    with h5py.File(folder / f"{name}.h5", "w") as f:
        f["images"], f["split"] = images, (np.arange(len(images)) % 3 == 2).astype(np.uint8)
        if labels:
            f["labels"] = np.arange(len(images)) // 3 % 3
            f.attrs["classes"] = "red,green,blue"
    all_words = ["--data", folder / f"{name}.h5", "--steps", 4, "--out", folder, "--name", name, "--quiet", "--device", "cpu"]
    with kernels.use("reference"):
        assert train.main([*map(str, all_words), *(w for s in [*SETTINGS, *words] for w in ("--set", s))]) == 0
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("editing")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Colour images of 4×8 in 3 classes."""
    return trained(folder, "colour", np.random.default_rng(0).integers(0, 256, (30, 4, 8, 3), np.uint8), True)


@pytest.fixture(scope="module")
def grey(folder: Path) -> Path:
    """Grey images of 4×4 without classes, by the variance-exploding SDE, whose network reads scaled states."""
    images = np.random.default_rng(1).integers(0, 256, (12, 4, 4), np.uint8)
    return trained(folder, "grey", images, False, "method=vesde")


@pytest.fixture(autouse=True)
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with kernels.use("reference"):
        yield


def call(mode: str, run: Path, *words: object) -> dict[str, np.ndarray]:
    """The contents of the HDF5 file that a call wrote."""
    given = [mode, run, *words, "--out", "x.h5", "--quiet", "--device", "cpu"]
    assert edit.main(list(map(str, given))) == 0
    with h5py.File("x.h5") as f:
        return {name: f[name][:] for name in f}


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    code = edit.main([*map(str, words), "--quiet", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.startswith("alphabar edit: error: ") and err.count("\n") == 1, (code, err)
    return err


def test_reconstruct_writes_a_sheet_and_tells_the_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit.main(["reconstruct", str(run), "--steps", "5", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "decoded against original: MSE" in out and "PSNR" in out and "wrote edit.png: 10 images 4×8×3, on cpu" in out
    assert min(Image.open("edit.png").size) > 50
    target, current = (call("reconstruct", run, "--steps", 5, "--label", label) for label in ("target", "current"))
    assert not np.array_equal(current["images"], target["images"])
    assert data.load("x.h5").classes == ("red", "green", "blue")


@pytest.mark.parametrize("weight", [0.0, 1.5])
@pytest.mark.parametrize("which", ["run", "grey"])
def test_the_gradient_through_the_network(which: str, weight: float, request: pytest.FixtureRequest) -> None:
    """Against differences of the prediction, guidance and the scaling of the input included."""
    network = load(request.getfixturevalue(which), False, np)
    rng, shape = np.random.default_rng(0), (2, *network.net.config["image_size"], network.net.config["in_channels"])
    labels = np.array([0, 2]) if network.classes else None
    batch = editor.Batch(Process(network.config), network.net, np.zeros(shape, np.float32), labels, weight)
    x, u, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(3))
    t, h = np.full(2, 700.0 if which == "grey" else 700), np.float32(1e-2)
    m, back = batch.vjp(x, t, lambda m: u)
    assert np.array_equal(m, batch.model(x, t))
    slope = (batch.model(x + h * v, t) - batch.model(x - h * v, t)) / (2 * h)
    assert abs(slope).max() > 1e-4
    np.testing.assert_allclose((back * v).sum(axis=(1, 2, 3)), (u * slope).sum(axis=(1, 2, 3)), rtol=0.02, atol=2e-3)


def test_the_images_chosen(run: Path, folder: Path) -> None:
    test = data.load(folder / "colour.h5", "test")
    found = call("reconstruct", run, "--steps", 2)
    assert np.array_equal(found["labels"], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]), "each class in turn"
    assert np.array_equal(found["original"][:4], test.images[:4])
    found = call("reconstruct", run, "--steps", 2, "--index", "7,0,7")
    assert np.array_equal(found["original"], test.images[[7, 0, 7]]) and np.array_equal(found["images"][0], found["images"][2])
    train_images = data.load(folder / "colour.h5", "train").images
    found = call("reconstruct", run, "--steps", 2, "--split", "train", "--n", 3)
    assert all(any(np.array_equal(image, t) for t in train_images) for image in found["original"])
    assert (
        len(call("reconstruct", run, "--steps", 2, "--data", folder / "colour.h5", "--split", "all", "--n", 30)["images"]) == 30
    )


def test_interpolate_begins_and_ends_at_the_reconstructions(run: Path) -> None:
    path = call("interpolate", run, "--index", "0,1,2,3", "--frames", 3, "--steps", 4)
    assert path["images"].shape == (6, 4, 8, 3) and set(path["row"]) == {b"frame 0", b"frame 1", b"frame 2"}
    ends = call("reconstruct", run, "--index", "0,1,2,3", "--steps", 4, "--class", "none")["images"]
    frames = path["images"].reshape(3, 2, 4, 8, 3)
    assert np.array_equal(frames[0], ends[::2]) and np.array_equal(frames[2], ends[1::2])
    assert np.array_equal(path["a"], call("reconstruct", run, "--index", "0,2", "--steps", 2)["original"])


def test_vary_goes_further_with_strength(run: Path) -> None:
    found = call("vary", run, "--strength", "0.01,0.2,1", "--steps", 6)
    assert set(found["row"]) == {b"strength 0.01", b"strength 0.2", b"strength 1"}
    away = np.abs(found["images"].reshape(3, -1).astype(float) - found["original"].reshape(-1)).mean(axis=1)
    assert away[0] < away[1] < away[2]
    for words in (("--repeats", 2), ("--eta", 0), ("--convention", "steps"), ("--class", "2"), ("--seed", 1), ("--guidance", 2)):
        other = call("vary", run, "--strength", "0.5", "--steps", 6, *words)["images"]
        assert not np.array_equal(other, call("vary", run, "--strength", "0.5", "--steps", 6)["images"]), words


@pytest.mark.parametrize("method", ["repaint", "replacement", "ddrm", "pigdm", "moment", "dps"])
def test_known_pixels_come_out_as_given(run: Path, method: str) -> None:
    found = call("inpaint", run, "--mask", "left", "--method", method, "--steps", 4)
    assert np.array_equal(found["images"][:, :, 4:], found["original"][:, :, 4:])
    assert not np.array_equal(found["images"][:, :, :4], found["original"][:, :, :4])
    whole = call("inpaint", run, "--mask", "random:0", "--method", method, "--steps", 2)
    assert np.array_equal(whole["images"], whole["original"])


def test_masks(run: Path, folder: Path) -> None:
    shape = (4, 8, 3)
    known = {name: edit._mask(name, shape, 0)[..., 0] for name in edit.MASKS}
    assert known["top"].sum() == known["bottom"].sum() == known["left"].sum() == 16 and not np.any(known["top"] & known["bottom"])
    assert (~known["centre"]).sum() == 2 * 4 and np.array_equal(known["border"], ~known["centre"])
    assert (~edit._mask("random:0.25", shape, 3)).sum() == 8
    assert not np.array_equal(edit._mask("random:0.25", shape, 3), edit._mask("random:0.25", shape, 4))
    Image.fromarray(np.where(known["left"], 255, 0).astype(np.uint8)).save("hole.png")
    assert np.array_equal(edit._mask("hole.png", shape, 0)[..., 0], known["left"])


@pytest.mark.parametrize("method", ["ddrm", "pigdm", "moment", "dps"])
@pytest.mark.parametrize("mode", ["super-resolve", "deblur", "colourise"])
def test_restoration_agrees_with_the_measurement(run: Path, mode: str, method: str) -> None:
    found = call(mode, run, "--method", method, "--steps", 6, "--noise", 0)
    shape = (4, 8, 3)
    op = {"super-resolve": operators.box(shape, 2), "deblur": operators.blur(shape, 1.0), "colourise": operators.grey(shape)}[
        mode
    ]
    x, original = (data.to_unit(found[name]) for name in ("images", "original"))
    own, others = (float(np.mean((op(x) - op(y)) ** 2)) for y in (original, np.roll(original, 1, axis=0)))
    assert found["measured"].shape == found["original"].shape
    assert own < (0.01 if method == "ddrm" and mode != "deblur" else others), "nearer to its own image than to the next"


def test_settings_of_methods_matter(run: Path) -> None:
    def one(*words: object) -> bytes:
        return call("inpaint", run, "--steps", 6, "--n", 1, "--mask", "left", *words)["images"].tobytes()

    assert one() == one("--jump", 5, "--resample", 5) and one() != one("--resample", 2)
    assert one("--jump", 2) != one()
    for method, option, value in (
        ("ddrm", "--eta", 0.1),
        ("dps", "--zeta", 0.1),
        ("pigdm", "--data-std", 2),
        ("moment", "--iterations", 3),
        ("moment", "--guidance", 2),
        ("dps", "--noise", 0.5),
    ):
        assert one("--method", method) != one("--method", method, option, value), (method, option)


@pytest.mark.parametrize(
    "words",
    [
        ("vary", "--steps", 5),
        ("interpolate", "--steps", 3, "--frames", 2),
        ("inpaint", "--steps", 4),
        ("inpaint", "--method", "moment", "--steps", 3, "--noise", 0.1),
        ("super-resolve", "--steps", 4),
        ("deblur", "--method", "dps", "--steps", 4),
    ],
)
def test_image_k_follows_from_seed_and_k(run: Path, words: tuple[object, ...]) -> None:
    mode, *rest = words
    whole = call(str(mode), run, *rest, "--n", 8)["images"].astype(int)
    assert np.abs(call(str(mode), run, *rest, "--n", 8, "--batch", 3)["images"] - whole).max() <= 1


def test_image_files_and_measured_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (4, 8, 3), np.uint8)
    Image.fromarray(pixels).save("own.png")
    found = call("inpaint", run, "--image", "own.png", "--mask", "top", "--steps", 4)
    assert np.array_equal(found["original"][0], pixels) and np.array_equal(found["images"][0, 2:], pixels[2:])
    assert "labels" not in found
    Image.fromarray(rng.integers(0, 256, (2, 4, 3), np.uint8)).save("small.png")
    found = call("super-resolve", run, "--image", "small.png", "--measured", "--steps", 4, "--class", "red")
    assert found["images"].shape == (1, 4, 8, 3) and "original" not in found and list(found["labels"]) == [0]
    Image.fromarray(rng.integers(0, 256, (4, 8), np.uint8)).save("grey.png")
    assert call("colourise", run, "--image", "grey.png", "--measured", "--steps", 4)["images"].shape == (1, 4, 8, 3)
    assert "is 2×4, want 4×8 here (images are not resized)" in fails(capsys, "vary", run, "--image", "small.png")
    assert "is 4×8, want 2×4" in fails(capsys, "super-resolve", run, "--image", "own.png", "--measured")


def test_a_network_without_classes_of_another_process(grey: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ("reconstruct", "--steps", 4),
        ("vary", "--steps", 4),
        ("inpaint", "--steps", 4),
        ("inpaint", "--steps", 4, "--method", "dps"),
        ("super-resolve", "--steps", 4, "--method", "moment"),
        ("deblur", "--steps", 4),
    ):
        mode, *rest = words
        found = call(str(mode), grey, *rest)
        assert found["images"].shape[1:] == (4, 4, 1) and "labels" not in found
    assert "this one's have 1 channel" in fails(capsys, "colourise", grey)
    assert "this network has no classes" in fails(capsys, "vary", grey, "--class", "1")
    assert "--guidance needs classes" in fails(capsys, "vary", grey, "--guidance", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: MODE"),
        (("undo", "RUN"), "invalid choice: 'undo'"),
        (("vary",), "the following arguments are required: CKPT"),
        (("vary", "/no/such"), "No such file"),
        (("vary", "RUN", "--strength", "0"), "must be numbers in (0, 1]"),
        (("vary", "RUN", "--strength", "0.5,0.5"), "must not hold a number twice"),
        (("vary", "RUN", "--strength", "x"), "must be numbers in (0, 1]"),
        (("vary", "RUN", "--strength", "0.01", "--convention", "steps"), "strength 0.01 of 50 steps leaves none"),
        (("vary", "RUN", "--repeats", "0"), "--repeats"),
        (("reconstruct", "RUN", "--steps", "1001"), "steps must be in 1..1000"),
        (("reconstruct", "RUN", "--strength", "0.5"), "unrecognized arguments"),
        (("reconstruct", "RUN", "--label", "next"), "--label"),
        (("interpolate", "RUN", "--index", "1,2,3"), "pairs of images, not 3"),
        (("interpolate", "RUN", "--frames", "1"), "--frames"),
        (("inpaint", "RUN", "--mask", "middle"), "--mask must be one of left"),
        (("inpaint", "RUN", "--mask", "none.png"), "No such file"),
        (("inpaint", "RUN", "--mask", "random:2"), "a number in 0..1, not '2'"),
        (("inpaint", "RUN", "--zeta", "1"), "--zeta goes with the method dps"),
        (("inpaint", "RUN", "--method", "ddrm", "--jump", "3"), "--jump goes with the method repaint"),
        (("inpaint", "RUN", "--noise", "0.1"), "--noise goes with the methods ddrm"),
        (("inpaint", "RUN", "--noise", "2"), "--noise"),
        (("super-resolve", "RUN", "--factor", "3"), "factor must divide both sides"),
        (("super-resolve", "RUN", "--jump", "3"), "unrecognized arguments"),
        (("deblur", "RUN", "--sigma", "0"), "--sigma"),
        (("vary", "RUN", "--index", "0,x"), "must be whole numbers"),
        (("vary", "RUN", "--index", "10"), "--index must be in 0..9, not 10"),
        (("vary", "RUN", "--n", "11"), "--n must be in 1..10"),
        (("vary", "RUN", "--n", "1", "--index", "1"), "--n does not go with --index"),
        (("vary", "RUN", "--image", "x.png", "--data", "digits"), "--data does not go with --image"),
        (("vary", "RUN", "--image", "x.png"), "x.png: No such file"),
        (("vary", "RUN", "--data", "digits"), "its images are 8×8×1, want 4×8×3"),
        (("vary", "RUN", "--data", "/no/such.h5"), "No such file"),
        (("vary", "RUN", "--class", "purple"), "not 'purple'"),
        (("vary", "RUN", "--class", "none", "--guidance", "1"), "--guidance needs classes"),
        (("vary", "RUN", "--out", "x.jpg"), "must end in .h5 or .png"),
        (("vary", "RUN", "--out", "no/such/a.png"), "there is no folder"),
        (("vary", "RUN", "--device", "tpu"), "--device must be auto"),
    ],
)
def test_mistakes_end_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    capsys.readouterr()
    assert edit.main([str(run if w == "RUN" else w) for w in words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("alphabar edit: error: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())
