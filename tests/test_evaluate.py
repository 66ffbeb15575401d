"""The evaluating program: what it prints and writes is what the core computes, and image k follows from (seed, k) alone."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import bound, data, flow
from alphabar.core.chain import chain
from alphabar.nets import checkpoint
from alphabar.tools import cli, evaluate, train, trained
from alphabar.tools.methods import Process

SETTINGS = ["model.channels=8", "model.blocks=1", "model.attention=4", "model.groups=4", "train.batch=8", "train.warmup=1"]
SETTINGS += ["train.lr=1e-2", "log.samples=0", "log.checkpoints=4", "sample.columns=2", "sample.steps=2"]
METHODS = {
    "ddpm": ["diffusion.T=24", "diffusion.rescale=true"],
    "plain": ["diffusion.T=24", "diffusion.schedule=cosine", "diffusion.prediction=v", "model.conditional=false"],
    "vesde": ["method=vesde", "diffusion.sigma_max=8"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 4 steps on 30 images of 4×4 in 3 classes, the last 9 for testing."""
    folder, rng = tmp_path_factory.mktemp("evaluating"), np.random.default_rng(0)
    with h5py.File(folder / "tiny.h5", "w") as f:
        f["images"], f["labels"] = rng.integers(0, 256, (30, 4, 4), np.uint8), np.arange(30) % 3
        f["split"] = np.r_[np.zeros(21, np.uint8), np.ones(9, np.uint8)]
        f.attrs["classes"] = "red,green,blue"
    for name, settings in METHODS.items():
        words = ["--data", folder / "tiny.h5", "--steps", 4, "--out", folder, "--name", name, "--quiet", "--device", "cpu"]
        with kernels.use("reference"):
            assert train.main([*map(str, words), *(w for s in SETTINGS + settings for w in ("--set", s))]) == 0
    return folder


@pytest.fixture(autouse=True)
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with kernels.use("reference"):
        yield


def report(run: Path, *words: object) -> dict[str, Any]:
    """What a call wrote to its JSON file."""
    assert evaluate.main([*map(str, [run, "--bits", *words]), "--out", "x.json", "--quiet", "--device", "cpu"]) == 0
    return json.loads(Path("x.json").read_text())


def parts(run: Path, n: int = 9) -> tuple[trained.Trained, Process, np.ndarray, np.ndarray]:
    """(network, process, the images that a call takes, their labels)."""
    t = trained.load(run, False, np)
    images = data.load(t.config.data.path, "test")
    rows = data.order(len(images), n, 0, 0)
    return t, Process(t.config), images.images[rows], images.labels[rows]


def test_the_bound_is_that_of_the_core(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(folder / "ddpm"), "--bits", "--device", "cpu", "--out", "y.json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(Path("y.json").read_text())
    t, process, images, labels = parts(folder / "ddpm")
    predict = process.predict(t.net.predict)
    c = chain(process.levels, clip=(-1.0, 1.0))
    want = bound.vlb_terms(lambda x, times: predict(x, times, labels), data.to_unit(images), c, "discrete")
    assert found["bits_per_dimension"] == pytest.approx(want.bits, rel=1e-6) and 5 < want.bits < 30
    assert found["standard_error"] == pytest.approx(want.error, rel=1e-5)
    np.testing.assert_allclose(found["bits_of_terms"], want.term_bits[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found["errors_of_terms"], want.term_bits[1], rtol=1e-4, atol=1e-7)
    assert found["t"] == list(range(1, 25)) and found["steps"] == 24 and found["images"] == 9 and found["dimensions"] == 16
    assert (
        found["checkpoint"] == "step_00000004.h5" and found["weights"] == "average" and found["given"] == "each given its class"
    )
    terms = found["terms"]
    assert [term["name"] for term in terms] == ["L_0", "L_t-1, t = 2..10", "L_t-1, t = 11..24", "L_T"]
    assert sum(term["bits"] for term in terms) == pytest.approx(want.bits, rel=1e-6)
    assert terms[1]["bits"] == pytest.approx(want.term_bits[0][1:10].sum(), rel=1e-5)
    for term in terms:
        assert f"{term['bits']:.4f} ± {term['standard_error']:7.4f}" in out
    assert f"bound on -log2 P {want.bits:21.4f} ± {want.error:7.4f}" in out and "wrote y.json" in out
    assert "tiny, test: 9 of 9 images 4×4×1, each given its class" in out and "24 steps, eta 1" in out


def test_options_of_the_bound(folder: Path) -> None:
    run = folder / "ddpm"
    bits = {"plain": report(run)["bits_per_dimension"]}
    for words in [
        "--eta 0.5",
        "--variance beta",
        "--decoder-variance clipped",
        "--steps 6",
        "--raw-weights",
        "--seed 1",
        "--draws 2",
    ]:
        bits[words] = report(run, *words.split())["bits_per_dimension"]
    assert len(set(bits.values())) == len(bits)
    some = report(run, "--terms", 5, "--draws", 12)
    error = np.hypot(some["standard_error"], report(run)["standard_error"])
    assert abs(some["bits_per_dimension"] - bits["plain"]) < 4 * error and some["terms_for_each_image"] == 5
    t, process, images, labels = parts(run)
    model, c = partial(process.predict(t.net.predict), y=labels), chain(process.levels, clip=(-1.0, 1.0))
    want = bound.vlb_terms(model, data.to_unit(images), c, "discrete", 12, sampled=5, weights=c.gamma[2:])
    assert some["bits_per_dimension"] == pytest.approx(want.bits, rel=1e-6)
    one = report(run, "--n", 1, "--steps", 1)
    assert one["standard_error"] is None and one["errors_of_terms"] == [None, None] and len(one["terms"]) == 2


def test_classes(folder: Path) -> None:
    given = {c: report(folder / "ddpm", "--class", c) for c in ("labels", "none", "green", "1", "2")}
    bits = {c: r["bits_per_dimension"] for c, r in given.items()}
    assert bits["green"] == bits["1"] and len(set(bits.values())) == 4
    assert given["1"]["given"] == "given the class green" and given["none"]["given"] == "no class given"
    plain = report(folder / "plain")
    assert plain["given"] == "of a network without classes"
    assert plain["bits_per_dimension"] == report(folder / "plain", "--class", "none")["bits_per_dimension"]


@pytest.mark.parametrize("words", [(), ("--terms", 3), ("--method", "flow", "--tolerance", 1e-5, "--t-min", 12)])
def test_the_batch_size_changes_nothing(folder: Path, words: tuple[object, ...]) -> None:
    whole, split = (report(folder / "plain", "--n", 3, "--batch", b, *words) for b in (64, 2))
    assert split["bits_per_dimension"] == pytest.approx(whole["bits_per_dimension"], rel=1e-4)
    assert split["standard_error"] == pytest.approx(whole["standard_error"], rel=1e-3)


@pytest.mark.parametrize("method", ["ddpm", "vesde"])
def test_the_product_is_the_derivative_of_what_the_process_predicts(folder: Path, method: str) -> None:
    """Also where the network reads scaled states."""
    t, process, _, labels = parts(folder / method, 3)
    work = evaluate._Work(t, data.load(t.config.data.path, "test"), np.arange(3), labels, SimpleNamespace(t_min=None))
    rng = np.random.default_rng(1)
    x, v = rng.standard_normal((2, 3, 4, 4, 1)).astype(np.float32)
    times = np.full(3, 0.6 * process.levels.T)
    h = np.float32(1e-2)
    predict = partial(work.predict, y=labels)
    want = (predict(x + h * v, times) - predict(x - h * v, times)) / (2 * h)
    np.testing.assert_allclose(work._product(labels, x, times, v), want, atol=2e-3 * np.abs(want).max())


@pytest.mark.parametrize("method", ["ddpm", "vesde"])
def test_the_flow_is_that_of_the_core(folder: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    n, words = 3, ["--method", "flow", "--n", 3, "--tolerance", 1e-2, "--projections", 2]
    assert evaluate.main([str(folder / method), "--bits", *map(str, words), "--device", "cpu", "--out", "x.json"]) == 0
    out, found = capsys.readouterr().out, json.loads(Path("x.json").read_text())
    t, process, images, labels = parts(folder / method, n)
    work = evaluate._Work(t, data.load(t.config.data.path, "test"), np.arange(n), labels, SimpleNamespace(t_min=None))
    model, x = partial(process.predict(t.net.predict), y=labels), flow.dequantize(images).astype(np.float32)
    options = {"trace": "hutchinson", "projections": 2, "rtol": 1e-2, "atol": 1e-2}
    want = flow.log_likelihood(model, x, process.levels, partial(work._product, labels), **options)
    bits = want.bits(7)
    assert found["bits_per_dimension"] == pytest.approx(bits.mean(), rel=1e-6)
    assert found["evaluations"] == want.evaluations and found["projections"] == 2 and found["trace"] == "hutchinson"
    assert found["dequantisation"].startswith("x = (u + U)/128 - 1") and found["t_min"] == want.t_min
    assert found["sigma_min"] == pytest.approx(process.levels.sigma_bar_at(want.t_min))
    assert f"{bits.mean():.4f} ±" in out and "dequantised" in out and f"{want.evaluations} evaluations" in out
    assert found["standard_error"] == pytest.approx(bits.std(ddof=1) / np.sqrt(n), rel=1e-5)


def test_the_exact_trace_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(model: Any, x: np.ndarray, s: Any, jvp: Any, prediction: str, trace: str, *_: Any, **options: Any) -> Any:
        assert trace == "exact" and options["rtol"] == options["atol"] == 1e-3 and options["t_min"] == 3
        return flow.FlowLikelihood(np.full((1, len(x)), -2.0), True, x, 11, 3.0, 16)

    monkeypatch.setattr(flow, "log_likelihood", answer)
    found = report(folder / "ddpm", "--method", "flow", "--trace", "exact", "--tolerance", 1e-3, "--t-min", 3)
    assert found["trace"] == "exact" and found["projections"] is None and found["evaluations"] == 11 and found["t_min"] == 3
    assert found["bits_per_dimension"] == pytest.approx(2 / (16 * np.log(2)) + 7)
    assert found["standard_error"] == pytest.approx(0, abs=1e-9)


def test_draws_of_the_flow_are_averaged(folder: Path) -> None:
    """Each has its own dequantisation and its own directions."""
    words = ["--method", "flow", "--n", 2, "--tolerance", 1e-1, "--t-min", 20]
    one, two = (report(folder / "ddpm", *words, "--draws", k) for k in (1, 2))
    t, process, images, labels = parts(folder / "ddpm", 2)
    work = evaluate._Work(t, data.load(t.config.data.path, "test"), np.arange(2), labels, SimpleNamespace(t_min=None))
    model, x = partial(process.predict(t.net.predict), y=labels), flow.dequantize(images, draw=1).astype(np.float32)
    options = {"trace": "hutchinson", "rtol": 1e-1, "atol": 1e-1, "t_min": 20, "draw": 1}
    second = flow.log_likelihood(model, x, process.levels, partial(work._product, labels), **options).bits(7).mean()
    assert two["draws"] == 2 and two["bits_per_dimension"] == pytest.approx((one["bits_per_dimension"] + second) / 2, rel=1e-6)
    assert abs(second - one["bits_per_dimension"]) > 1e-3


def test_continuous_time(folder: Path) -> None:
    found = report(folder / "vesde", "--steps", 12, "--t-min", 20)
    assert found["t"][0] == pytest.approx(20) and found["t"][-1] == 1000 and found["trained_by"] == "vesde"
    assert [term["name"] for term in found["terms"]][0::3] == ["L_0", "L_T"]


def test_other_data_and_splits(folder: Path, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as f:
        f["images"] = np.zeros((5, 4, 4), np.uint8)
    found = report(folder / "ddpm", "--data", tmp_path / "other.h5", "--split", "train")
    assert found["data"] == "other" and found["images"] == 5 and found["given"] == "no class given"
    assert report(folder / "ddpm", "--split", "train", "--n", 4)["split"] == "train"


def test_a_network_that_answers_nan(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays, meta = checkpoint.load(checkpoint.step_path(folder / "ddpm" / "ckpt", 4))
    arrays["ema/conv_in.bias"] = np.full_like(arrays["ema/conv_in.bias"], np.nan)
    checkpoint.save(tmp_path / "x.h5", arrays, meta)
    for method in ("bound", "flow"):
        words = [str(tmp_path / "x.h5"), "--bits", "--method", method, "--out", "x.json", "--quiet", "--device", "cpu"]
        assert evaluate.main(words) == 1
        err = capsys.readouterr().err
        assert "the likelihood could not be computed" in err and err.count("\n") == 1 and not Path("x.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bits",), "the following arguments are required: CKPT"),
        (("ddpm",), "the following arguments are required: --bits"),
        (("/no/such", "--bits"), "No such file"),
        (("ddpm", "--bits", "--n", "10"), "--n must be at most 9"),
        (("ddpm", "--bits", "--n", "0"), "--n"),
        (("ddpm", "--bits", "--steps", "25"), "steps must be in 1..24"),
        (("ddpm", "--bits", "--eta", "0"), "--eta"),
        (("ddpm", "--bits", "--t-min", "2"), "t_min goes with the spacing 'log'"),
        (("ddpm", "--bits", "--t-min", "24", "--method", "flow"), "--t-min must be in (0, 24)"),
        (("ddpm", "--bits", "--steps", "1", "--decoder-variance", "clipped"), "needs a chain of at least two steps"),
        (("ddpm", "--bits", "--class", "3"), "a number in 0..2"),
        (("ddpm", "--bits", "--class", "purple"), "not 'purple'"),
        (("plain", "--bits", "--class", "1"), "this network has no classes"),
        (("ddpm", "--bits", "--data", "digits"), "digits holds images of 8×8×1, the network is for 4×4×1"),
        (("ddpm", "--bits", "--data", "no.h5"), "No such file"),
        (("ddpm", "--bits", "--data", "unsplit.h5"), "has no test images"),
        (("ddpm", "--bits", "--data", "unsplit.h5", "--split", "all"), "has other classes than the network"),
        (("ddpm", "--bits", "--out", "no/such/x.json"), "there is no folder"),
        (("ddpm", "--bits", "--out", "."), "is not a regular file"),
        (("ddpm", "--bits", "--method", "guess"), "invalid choice"),
    ],
)
def test_mistakes_end_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    with h5py.File(tmp_path / "unsplit.h5", "w") as f:
        f["images"], f["labels"] = np.zeros((5, 4, 4), np.uint8), np.zeros(5, np.int64)
    code = evaluate.main([*(str(folder / w) if w in METHODS else w for w in words), "--quiet", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.startswith("alphabar evaluate: error: ") and err.count("\n") == 1, (code, err)
    assert message in err
