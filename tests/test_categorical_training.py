"""Multinomial diffusion and D3PM from the command line, on images of few levels and on text: every law trains, resumes bit for
bit, samples and is evaluated; an exact network draws the law of its data."""

import json
import os
import signal
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import data, discrete, discrete_bound, discrete_losses, ngram, text
from alphabar.core.transitions import Absorbing, NearestNeighbour, Uniform
from alphabar.nets import checkpoint
from alphabar.tools import (
    categorical,
    cli,
    discrete_images,
    evaluate,
    families,
    info,
    sample,
    sampling,
    sheets,
    train,
    trained,
    trainer,
)
from alphabar.tools import config as configs
from alphabar.tools.config import ConfigError, Sample
from tests import fake_cupy

TINY = ["model.channels=8", "model.blocks=1", "model.attention=4", "model.groups=4", "train.batch=6", "train.warmup=1"]
TOKENS = ["model.width=16", "model.layers=1", "model.heads=2", "data.length=12", "train.batch=6", "train.warmup=1"]
PIXELS = [s for s in TOKENS if not s.startswith("data")]
SHORT = ["diffusion.T=12", "log.every=1", "log.samples=0", "sample.columns=2", "sample.steps=3"]
LAWS = {
    "multinomial": ["method=multinomial"],
    **{name: ["method=d3pm", f"diffusion.transition={name}"] for name in configs.TRANSITIONS},
}


@pytest.fixture(autouse=True)
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with kernels.use("reference"):
        yield


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """24 images of 4×4 in 5 levels and 3 classes, the last 6 for testing."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "tiny.h5", "w") as f:
        f["images"], f["labels"] = discrete_images.to_images(rng.integers(0, 5, (24, 4, 4)), 5), np.arange(24) % 3
        f["split"] = np.r_[np.zeros(18, np.uint8), np.ones(6, np.uint8)]
        f.attrs["classes"] = "red,green,blue"
    return tmp_path / "tiny.h5"


def words(path: Path, *more: str, name: str = "r", steps: int = 4) -> list[str]:
    tiny = TOKENS if path.suffix == ".txt" else TINY
    sets = [w for s in [*tiny, *SHORT, *more] for w in ("--set", s)]
    where = ["--out", "runs", "--name", name, "--device", "cpu", "--quiet"]
    return ["--data", str(path), "--steps", str(steps), *where, *sets]


def resolved(*settings: str, of: Any = None) -> configs.Config:
    of = data.load("digits") if of is None else of
    config = configs.load(None, settings)
    return families.of(config).resolved(config, of)


def made(settings: list[str], of: Any, xp: Any = np) -> trainer.Trainer:
    return trainer.Trainer(resolved(*settings, of=of), of, xp)


def last(name: str = "r") -> Path:
    return checkpoint.listing(Path("runs") / name / "ckpt")[0][1]


# ------------------------------------------------------------------------------------------------------------ images as states


def test_the_levels_of_images_are_the_fewest_that_hold_them() -> None:
    assert discrete_images.levels_of(data.load("digits").images) == 17
    u = np.arange(256, dtype=np.uint8)
    for K in (2, 3, 4, 16, 18, 52, 86, 256):  # K − 1 divides 255
        levels = np.round(np.linspace(0, 255, K)).astype(np.uint8)
        assert discrete_images.levels_of(levels.reshape(-1, 1, 1, 1)) <= K
        np.testing.assert_array_equal(discrete_images.to_images(discrete_images.to_states(levels, K), K), levels)
        assert (
            np.abs(discrete_images.to_images(discrete_images.to_states(u, K), K).astype(int) - u).max() <= 127.5 / (K - 1) + 0.5
        )
    assert discrete_images.levels_of(np.array([[0], [255]], np.uint8)) == 2
    assert discrete_images.levels_of(np.array([[0], [85]], np.uint8)) == 4
    assert discrete_images.levels_of(u[:, None]) == 256
    with pytest.raises(TypeError, match="images must be uint8, not float64"):
        discrete_images.to_states(np.zeros(3), 4)
    with pytest.raises(ValueError, match=r"K must be in 2\.\.256, not 257"):
        discrete_images.to_states(u, 257)


# -------------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "schedule", "law"),
    [
        (["method=multinomial"], "cosine", "uniform"),
        (["method=d3pm"], "reciprocal", "absorbing"),
        (["method=d3pm", "diffusion.transition=uniform"], "cosine", "uniform"),
        (["method=d3pm", "diffusion.transition=gaussian"], "linear", "discretized_gaussian"),
        (["method=d3pm", "diffusion.transition=nearest"], "cosine", "nearest_neighbour"),
        (["method=d3pm", "diffusion.schedule=linear"], "linear", "absorbing"),
    ],
)
def test_what_is_left_open_is_completed_and_written_down(settings: list[str], schedule: str, law: str) -> None:
    c = resolved(*settings)
    d, t = c.diffusion, c.train
    assert (d.schedule, d.states, d.T, c.model.network) == (schedule, 17, 1000, "unet")
    assert (c.sample.sampler, c.sample.steps) == ("ancestral", 100)
    assert t.hybrid == (0.001 if c.method == "d3pm" else 0.0)
    assert configs.from_dict(tomllib.loads(configs.to_toml(c))) == c and resolved(*configs_words(c)) == c
    jumps = None if law != "nearest_neighbour" else categorical.jump_rates(c, None)
    assert categorical.law(c, jumps).name == law


def configs_words(c: configs.Config) -> list[str]:
    """A configuration as the words that set it."""
    plain = configs.to_dict(c)
    flat = {k: v for k, v in plain.items() if not isinstance(v, dict)}
    flat |= {f"{s}.{k}": v for s, values in plain.items() if isinstance(values, dict) for k, v in values.items()}
    return [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in flat.items()]


def test_text_has_its_own_states_network_and_weight(story: Path) -> None:
    of = text.load(story, "train", 12)
    c = resolved(f"data.path={story}", "data.length=12", "method=d3pm", of=of)
    assert (c.diffusion.states, c.model.network, c.train.hybrid) == (27, "transformer", 0.01)
    assert resolved(f"data.path={story}", "method=multinomial", of=of).train.hybrid == 0
    assert resolved(f"data.path={story}", "method=d3pm", "diffusion.transition=uniform", of=of).train.hybrid == 0
    assert resolved(f"data.path={story}", "method=d3pm", "train.hybrid=0", of=of).train.hybrid == 0
    written = tomllib.loads(configs.to_toml(c))
    assert written["data"]["length"] == 12 and "flip" not in written["data"] and "channels" not in written["model"]


def test_gaussian_methods_keep_their_defaults() -> None:
    c = resolved()
    assert (c.method, c.diffusion.schedule, c.model.network) == ("ddpm", "linear", "unet")
    written = tomllib.loads(configs.to_toml(c))
    assert "states" not in written["diffusion"] and "hybrid" not in written["train"] and "temperature" not in written["sample"]
    assert "length" not in written["data"] and "width" not in written["model"]


def test_the_linear_rates_forget_as_much_in_any_number_of_steps() -> None:
    for T in (50, 200, 1000):
        rule = categorical.law(resolved("method=multinomial", "diffusion.schedule=linear", f"diffusion.T={T}"))
        assert isinstance(rule, Uniform) and abs(np.log(rule.keep[-1]) / -10.1 - 1) < 0.25
        assert abs(np.log(rule.keep[T // 2]) / np.log(rule.keep[-1]) - 0.25) < 0.03
    assert rule.beta[1] == 1e-4 and rule.beta[-1] == 0.02  # of T = 1000


@pytest.mark.parametrize("schedule", ["cosine", "reciprocal"])
def test_nearest_neighbours_stay_as_often_as_under_the_uniform_law(schedule: str) -> None:
    settings = [f"diffusion.schedule={schedule}", "diffusion.T=20", "method=d3pm"]
    c = resolved(*settings, "diffusion.transition=nearest")
    jumps = categorical.jump_rates(c, None)
    assert all(abs(i - j) <= 3 for i, j in zip(*np.nonzero(jumps), strict=True))
    law, uniform = categorical.law(c, jumps), categorical.law(resolved(*settings, "diffusion.transition=uniform"))
    assert isinstance(law, NearestNeighbour)
    for t in range(0, 20, 3):
        assert law.cumulative(t).trace() == pytest.approx(uniform.cumulative(t).trace(), rel=1e-6)
    np.testing.assert_allclose(law.cumulative(20), 1 / 17, atol=0.02)


def test_letters_are_near_where_the_same_letters_stand_beside_them() -> None:
    tokens = np.array([0, 2, 1, 2, 0, 2, 1, 2, 0, 3, 1, 3], np.uint8)
    e = categorical.letter_embedding(tokens, 4)
    np.testing.assert_allclose(e[2], [2 / 4, 2 / 4, 0, 0, 2 / 4, 2 / 4, 0, 0])
    np.testing.assert_allclose(e.sum(axis=1), 2)
    assert np.square(e[0] - e[1]).sum() < np.square(e[0] - e[2]).sum()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["method=multinomial", "diffusion.transition=gaussian"],
            "diffusion.transition goes with the method d3pm, not with multinomial",
        ),
        (["diffusion.states=4"], "diffusion.states goes with the methods multinomial, d3pm, not with ddpm"),
        (["method=d3pm", "diffusion.prediction=v"], "diffusion.prediction goes with the method ddpm, not with d3pm"),
        (
            ["method=d3pm", "train.weighting=p2"],
            "train.weighting goes with the methods ddpm, ncsn, vpsde, vesde, subvpsde, not with d3pm",
        ),
        (
            ["method=d3pm", "diffusion.schedule=sigmoid"],
            "must be one of cosine, linear, reciprocal for method d3pm, not 'sigmoid'",
        ),
        (["diffusion.schedule=reciprocal"], "must be one of linear, scaled_linear, cosine, sigmoid for method ddpm"),
        (["method=d3pm", "sample.sampler=ddim"], "sample.sampler must be one of ancestral for method d3pm, not 'ddim'"),
        (["method=d3pm", "sample.eta=0.5"], "sample.eta goes with the sampler ddim, not with ancestral"),
        (["method=d3pm", "sample.threshold=0.9"], "sample.threshold goes with the samplers ddim, "),
        (["sample.temperature=0.5"], "sample.temperature goes with the sampler ancestral, not with ddim"),
        (["method=d3pm", "sample.steps=1001"], "[sample]: steps must be in 1..1000, not 1001"),
        (["method=d3pm", "diffusion.states=1"], "diffusion.states must be 0 or in 2..256, not 1"),
        (["method=d3pm", "diffusion.transition=nearest", "diffusion.neighbours=17"], "neighbours must be in 1..16, not 17"),
        (
            ["data.path=kjv", "method=d3pm", "diffusion.transition=nearest", "diffusion.neighbours=1"],
            "diffusion.neighbours: rates must connect all states: take more neighbours",
        ),
        (["model.network=transformer"], "model.network must be unet for method ddpm"),
        (["model.width=32"], "model.width goes with the network transformer, not with unet"),
        (["data.length=32"], "data.length goes with the data text, not with images"),
        (["data.path=kjv"], "method ddpm is for images, not for text"),
        (["data.path=kjv", "method=d3pm", "model.network=unet"], "model.network must be transformer for text, not 'unet'"),
        (["data.path=kjv", "method=d3pm", "model.channels=8"], "model.channels goes with the network unet, not with transformer"),
        (["data.path=kjv", "method=d3pm", "data.flip=true"], "data.flip goes with the data images, not with text"),
        (["data.path=kjv", "method=d3pm", "diffusion.states=20"], "diffusion.states must be 0 or 27 for this text, not 20"),
        (["data.path=kjv", "method=d3pm", "model.heads=7"], "these settings make no network for text of 128: width must be"),
    ],
)
def test_settings_that_do_not_go_together(capsys: pytest.CaptureFixture[str], sets: list[str], message: str) -> None:
    where = ["--device", "cpu", "--quiet", "--dry-run"]
    assert train.main([*where, *(w for s in sets for w in ("--set", s))]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


# ------------------------------------------------------------------------------------------------------- what a step works on


def test_a_unet_reads_scaled_levels_and_where_the_mask_is(images: Path) -> None:
    uniform, absorbing = (made([*TINY, *SHORT, *LAWS[k]], data.load(images)).process for k in ("uniform", "absorbing"))
    x = np.array([0, 2, 4, 5], np.int32).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(uniform.input(x[:, :1]).ravel(), [-1, 0])
    seen = absorbing.input(x)
    assert absorbing.mask == 5 and seen.dtype == np.float32 and seen.shape == (1, 2, 2, 2)
    np.testing.assert_array_equal(seen[0, ..., 0].ravel(), [-1, 0, 1, 0])
    np.testing.assert_array_equal(seen[0, ..., 1].ravel(), [0, 0, 0, 1])


@pytest.mark.parametrize("kind", ["images", "text", "images by a transformer"])
@pytest.mark.parametrize("name", ["multinomial", "absorbing", "gaussian"])
def test_the_gradient_of_a_step_is_that_of_the_hybrid_loss(images: Path, story: Path, kind: str, name: str) -> None:
    """Against differences of the loss that the core computes from the network's own answers."""
    if kind == "text":
        of, tiny = text.load(story, "train", 12), [*TOKENS, f"data.path={story}"]
    else:
        of, tiny = (
            data.load(images),
            TINY if kind == "images" else [*PIXELS, "model.network=transformer"],
        )
    t = made([*tiny, *SHORT, *LAWS[name], "train.hybrid=0.3"], of)
    rng = np.random.default_rng(1)
    for layer in ("conv_out.weight", "linear_out.weight"):
        if layer in t.net.params.arrays():
            t.net.params[layer].data[...] = 0.3 * rng.standard_normal(t.net.params[layer].shape)
    attempt = t.learner.attempt(0)
    samples, labels, rows = of.batch(0, 6, 0)
    np.testing.assert_array_equal(attempt.rows, rows)
    np.testing.assert_array_equal(attempt.times, discrete_losses.stratified_times(6, 12, 0, 0))
    x0 = samples if kind == "text" else discrete_images.to_states(samples, 5)
    x_t = discrete.q_sample(x0, attempt.times, t.process.law, seed=0, step=0)
    np.testing.assert_array_equal(attempt.inputs["x_t"], x_t)
    told = t.learner.told(labels, 0)

    def loss() -> float:
        logits = t.process.predict(t.net.predict)(x_t, attempt.times, told).astype(np.float64)
        assert logits.shape == (*x0.shape, 27 if kind == "text" else 5)
        return float(discrete_losses.hybrid_loss(logits, x0, x_t, attempt.times, t.process.law, 0.3)[0].mean())

    assert attempt.value.mean() == pytest.approx(loss(), rel=1e-4)
    ((output, gradient),) = attempt.roots
    t.net.params.zero_grad()
    output.backward(gradient)
    found, direction = t.net.params.grad.astype(np.float64), rng.standard_normal(t.net.params.data.shape)
    flat, h = t.net.params.data, 1e-3
    before = flat.copy()
    flat[...] = before + h * direction
    up = loss()
    flat[...] = before - h * direction
    assert (up - loss()) / (2 * h) == pytest.approx(found @ direction, rel=2e-2, abs=2e-2)


class Exact:
    """In the place of a network, for data whose elements are independent with the probabilities ``p``.

    p_θ(x_s|x_t) ∝ q(x_t|x_s)·Σ q(x_s|x̃0)·p̃(x̃0|x_t) is exact where p̃ is p itself; at t = 1, where p̃ is what is drawn from, it
    must be p(x_0|x_1).
    """

    xp = np

    def __init__(self, process: categorical.Categorical, p: np.ndarray) -> None:
        self.process, self.p, self.params, self.config = process, p, self, {"classes": None}

    def predict(self, x: Any, t: Any, y: Any = None) -> Any:
        t = np.broadcast_to(t, len(x))
        back = self.process.law.log_columns(0, t.astype(int), x)[..., : len(self.p)]
        return np.log(self.p) + np.where(t.reshape(-1, 1, 1, 1, 1) == 1, np.maximum(back, -1e30), 0)


@pytest.mark.parametrize("name", LAWS)
def test_an_exact_network_draws_its_data_and_knows_their_entropy(
    images: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law, prior, steps, posterior and the way back to images fit together; the bound of the exact chain is the entropy."""
    process = made([*TINY, *LAWS[name], "diffusion.T=30", "diffusion.states=5"], data.load(images)).process
    monkeypatch.setattr(process, "input", lambda x: x)
    monkeypatch.setattr(process, "logits", lambda answer: answer)
    p = np.array([0.5, 0.02, 0.2, 0.08, 0.2])
    net, chosen = Exact(process, p), sampling.sampler(process, Sample("ancestral", 30))
    (drawn,) = sampling.draw(process, net, chosen, None, 400, seed=1, batch=400)  # type: ignore[arg-type]
    assert drawn.dtype == np.uint8 and drawn.shape == (400, 4, 4, 1)
    counts = np.bincount(discrete_images.to_states(drawn, 5).ravel(), minlength=5)
    np.testing.assert_allclose(counts / counts.sum(), p, atol=0.025)
    x0 = discrete_images.to_states(drawn, 5)[:60]
    found = discrete_bound.vlb_terms(process.predict(net.predict), x0, process.law)
    want = -np.log2(p)[x0].mean()
    assert abs(found.bits - want) < 5 * found.error and abs(found.bits - want) < 0.15


# ------------------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("kind", ["images", "text"])
@pytest.mark.parametrize("name", LAWS)
def test_every_law_trains_resumes_bit_for_bit_and_samples(
    images: Path, story: Path, stopped_after: Any, capsys: pytest.CaptureFixture[str], kind: str, name: str
) -> None:
    path = images if kind == "images" else story
    more = [*LAWS[name], "model.dropout=0.1", "log.samples=2", *(["data.flip=true"] if kind == "images" else [])]
    if name == "nearest" and kind == "text":
        more.append("diffusion.neighbours=8")
    assert train.main(words(path, *more, name="whole")) == 0, capsys.readouterr().err
    assert stopped_after(2, lambda: train.main(words(path, *more))) == 128 + signal.SIGTERM
    assert train.main(["--resume", "runs/r", "--device", "cpu", "--quiet"]) == 0
    assert last().read_bytes() == last("whole").read_bytes()
    suffix = {"images": ".png", "text": ".txt"}[kind]
    assert sorted(p.name for p in Path("runs/whole/samples").iterdir()) == [f"final_00000004{suffix}", f"step_00000002{suffix}"]
    arrays, meta = checkpoint.load(last())
    assert meta["network"] == {"images": "unet", "text": "transformer"}[kind] and ("law/rates" in arrays) == (name == "nearest")
    lines = [json.loads(line) for line in Path("runs/r/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(m["loss"]) and m[f"{'images' if kind == 'images' else 'windows'}_per_s"] > 0 for m in lines)
    drawn = {}
    for size in (5, 2):
        out = Path(f"{size}.h5")
        where = ["--n", "5", "--batch", str(size), "--out", str(out), "--quiet", "--device", "cpu"]
        assert sample.main(["runs/r", *where]) == 0, capsys.readouterr().err
        with h5py.File(out) as f:
            drawn[size] = f["images" if kind == "images" else "tokens"][:]
            assert (f.attrs["method"], f.attrs["sampler"], f.attrs["steps"]) == (meta["config"]["method"], "ancestral", 3)
    assert (drawn[5] != drawn[2]).mean() < 0.02  # the products of matrices of another batch are the same bits nearly
    if kind == "images":
        assert set(np.unique(drawn[5])) <= set(discrete_images.to_images(np.arange(5), 5).tolist())
    else:
        assert drawn[5].shape == (5, 12) and drawn[5].max() < 27
    assert evaluate.main(["runs/r", "--bits", "--n", "4", "--out", "e.json", "--quiet", "--device", "cpu"]) == 0
    found = json.loads(Path("e.json").read_text())
    t = trained.load(Path("runs/r"), False, np)
    of = data.load(path, "test") if kind == "images" else text.load(path, "test", 12)
    rows = data.order(len(of) if kind == "images" else len(of.windows), 4, 0, 0)
    x0 = discrete_images.to_states(of.images[rows], 5) if kind == "images" else of.windows[rows].astype(np.int32)
    model = partial(t.process.predict(t.net.predict), y=of.labels[rows] if kind == "images" else None)
    want = discrete_bound.vlb_terms(model, x0, t.process.law)
    assert found["bits_per_dimension" if kind == "images" else "bits_per_character"] == pytest.approx(want.bits, rel=1e-6)
    assert found["standard_error"] == pytest.approx(want.error, rel=1e-5) and found["steps"] == 12


def test_classes_and_guidance_of_labelled_images(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(images, *LAWS["absorbing"], "train.lr=0.01", steps=6)) == 0

    def one(*more: str) -> np.ndarray:
        assert sample.main(["runs/r", "--n", "6", "--class", "1", *more, "--out", "x.h5", "--quiet", "--device", "cpu"]) == 0
        with h5py.File("x.h5") as f:
            assert f["labels"][:].tolist() == [1] * 6
            return f["images"][:]

    plain, guided = one("--guidance", "0"), one("--guidance", "40")
    assert not np.array_equal(plain, guided) and not np.array_equal(plain, one("--guidance", "0", "--temperature", "0.05"))
    none = ["--n", "6", "--class", "none", "--out", "y.h5", "--quiet", "--device", "cpu"]
    assert sample.main(["runs/r", *none]) == 0
    with h5py.File("y.h5") as f:
        np.testing.assert_array_equal(f["images"][:], one("--guidance", "-1"))
    assert sample.main(["runs/r", "--class", "all", "--n", "6", "--out", "s.png", "--quiet", "--device", "cpu"]) == 0
    assert Path("s.png").exists()


def test_a_text_in_the_run_folder_and_its_blanks_filled_in(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([w for w in words(story, *LAWS["absorbing"]) if w != "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "samples     runs/r/samples/final_00000004.txt" in out and "91 windows 12" in err and "no labels" not in err
    paragraphs = Path("runs/r/samples/final_00000004.txt").read_text().split("\n\n")
    assert paragraphs[0] == "r, step 4: ancestral 3 steps" and len(paragraphs) == 3
    asked = ["--infill", "A ___ sat", "--n", "3", "--out", "i.txt", "--out", "i.h5", "--device", "cpu"]
    assert sample.main(["runs/r", *asked]) == 0
    out = capsys.readouterr().out
    with h5py.File("i.h5") as f:
        tokens, alphabet = f["tokens"][:], f.attrs["alphabet"]
        assert f.attrs["infill"] == "a ___ sat" and f.attrs["temperature"] == 1
    texts = ["".join(alphabet[k] for k in row) for row in tokens]
    assert len(texts) == 3 and all(len(s) == 12 and s[:2] == "a " and s[5:9] == " sat" for s in texts)
    assert len({s[2:5] for s in texts}) > 1
    written = Path("i.txt").read_text().split("\n\n")
    assert written[1] == "a ___ sat" and written[2].strip() == texts[0][:9].strip() and all(s[:9].strip() in out for s in texts)


@pytest.mark.parametrize("name", ["uniform", "gaussian"])
def test_what_is_given_stays_under_every_law(story: Path, name: str) -> None:
    assert train.main(words(story, *LAWS[name], steps=2)) == 0
    assert sample.main(["runs/r", "--infill", "the _at", "--n", "2", "--out", "i.h5", "--quiet", "--device", "cpu"]) == 0
    with h5py.File("i.h5") as f:
        texts = ["".join(f.attrs["alphabet"][k] for k in row) for row in f["tokens"][:]]
    assert all(s[:4] == "the " and s[5:7] == "at" for s in texts)


def test_a_transformer_learns_images_too(images: Path) -> None:
    sets = [*PIXELS, "model.network=transformer", "model.positions=learned", *SHORT, *LAWS["absorbing"]]
    command = ["--data", str(images), "--steps", "3", "--out", "runs", "--name", "r", "--device", "cpu", "--quiet"]
    assert train.main([*command, *(w for s in sets for w in ("--set", s))]) == 0
    assert sample.main(["runs/r", "--n", "3", "--out", "x.h5", "--quiet", "--device", "cpu"]) == 0
    loaded = data.load("x.h5")
    assert loaded.shape == (4, 4, 1) and checkpoint.load(last())[1]["model"]["classes"] == 3
    assert evaluate.main(["runs/r", "--bits", "--n", "2", "--terms", "3", "--quiet", "--device", "cpu"]) == 0


def test_the_entropies_stand_beside_the_bound_of_a_text(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(story, *LAWS["absorbing"])) == 0
    asked = ["evaluate", "runs/r", "--bits", "--n", "5", "--terms", "4", "--draws", "2", "--device", "cpu", "--out", "e.json"]
    assert cli.main(asked) == 0
    out, found = capsys.readouterr().out, json.loads(Path("e.json").read_text())
    of = text.load(story, "test", 12)
    assert found["entropies"] == [ngram.entropy(of.tokens, n, 27) for n in (1, 2, 3)] and found["windows"] == 5
    for n, entropy in enumerate(found["entropies"]):
        assert f"letter given {n} before it" in out and f"{entropy:.4f}" in out
    assert "bits/char" in out and "12 steps, 4 of the terms for each, law absorbing of 28 states" in out
    assert found["terms_for_each_sample"] == 4 and 3 < found["bits_per_character"] < 7


def test_what_a_text_is_and_what_its_run_holds(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main([str(story)]) == 0
    out = capsys.readouterr().out
    assert "begins   the cat sat on the mat" in out and "1,111 train" in out
    assert train.main([*words(story, *LAWS["absorbing"]), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "data              91 windows 12" in out and "windows/s" in out and not Path("runs").exists()
    assert train.main(words(story, *LAWS["absorbing"], steps=2)) == 0
    assert info.main(["runs/r"]) == 0
    out = capsys.readouterr().out
    assert "config.method" in out and "transformer" in out and "story" in out


def test_paragraphs_are_whole_words_in_lines() -> None:
    lines = sheets.paragraph(" " + "abcdefghi " * 30).splitlines()
    assert all(len(line) <= 100 for line in lines) and " ".join(lines).split() == ["abcdefghi"] * 30


def test_what_other_programs_and_options_say(images: Path, story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(images, *LAWS["absorbing"], steps=2, name="i")) == 0
    assert train.main(words(story, *LAWS["absorbing"], steps=2, name="t")) == 0
    (Path("c.toml")).write_text("")
    os.mkfifo("pipe.txt")
    capsys.readouterr()
    for command, message in (
        (["sample", "runs/i", "--sampler", "ddim"], "sample.sampler must be one of ancestral for method d3pm, not 'ddim'"),
        (["sample", "runs/i", "--eta", "1"], "sample.eta goes with the sampler ddim, not with ancestral"),
        (["sample", "runs/i", "--steps", "13"], "steps must be in 1..12, not 13"),
        (["sample", "runs/i", "--spacing", "karras"], "spacing does not go with the sampler ancestral"),
        (["sample", "runs/i", "--analytic"], "--analytic goes with the samplers ddpm, ddim, euler, euler-a, not ancestral"),
        (["sample", "runs/i", "--interval", "1", "2"], "sample.interval_low goes with the samplers"),
        (["sample", "runs/i", "--classifier", "c.h5"], "--classifier goes with networks that take Gaussian noise off images"),
        (["sample", "runs/i", "--infill", "a_"], "--infill goes with networks of text, not of images"),
        (["sample", "runs/i", "--out", "x.txt"], "--out must end in .h5 or .png"),
        (["sample", "runs/t", "--out", "x.png"], "--out must end in .txt or .h5"),
        (["sample", "runs/t", "--out", "pipe.txt"], "--out pipe.txt: is not a regular file"),
        (["sample", "runs/t", "--class", "1"], "--class goes with networks of images, not of text"),
        (["sample", "runs/t", "--guidance", "1"], "--guidance goes with networks of images, not of text"),
        (["sample", "runs/t", "--infill", "no blanks"], "--infill takes a text with blanks"),
        (["sample", "runs/t", "--infill", "too long for it _"], "at most 12 letters, those of a window, not 17"),
        (["edit", "vary", "runs/i"], "this needs a network that takes Gaussian noise off images (ddpm, ncsn,"),
        (["edit", "vary", "runs/t"], "not method d3pm"),
        (["train-classifier", "runs/i"], "not method d3pm"),
        (["train-classifier", "runs/t"], "not method d3pm"),
        (["train-classifier", "runs/i", "--out", "no/such/c.h5"], "there is no folder"),
        (["train-classifier", "runs/i", "--out", "pipe.txt"], "is not a regular file"),
        (["train", "--set", "method=d3pm", "--set", "train.loss=hybrid"], "train.loss goes with the method ddpm, not with d3pm"),
        (["evaluate", "runs/i", "--bits", "--method", "flow"], "--method goes with methods of Gaussian noise, not with d3pm"),
        (["evaluate", "runs/t", "--bits", "--eta", "0.5"], "--eta goes with methods of Gaussian noise, not with d3pm"),
        (["evaluate", "runs/i", "--bits", "--steps", "13"], "--steps must be in 1..12, not 13"),
        (["evaluate", "runs/t", "--bits", "--n", "99"], "--n must be at most 10, the windows of the split test, not 99"),
        (["evaluate", "runs/t", "--bits", "--class", "1"], "this network has no classes"),
        (["evaluate", "runs/t", "--bits", "--data", str(images)], "not a text file"),
        (["evaluate", "runs/i", "--bits", "--data", "digits"], "digits holds images of 8×8×1, the network is for 4×4×1"),
        (["train", "--resume", "runs/t", "--set", "data.length=10"], "cannot change data.length: its checkpoint has 12"),
        (
            ["train", "--resume", "runs/i", "--set", "diffusion.transition=gaussian"],
            "cannot change diffusion.transition",
        ),
        (["train", "--resume", "runs/i", "--set", "method=multinomial"], "cannot change method: its checkpoint has d3pm"),
    ):
        assert cli.main([*command, "--device", "cpu"]) == 2, command
        err = capsys.readouterr().err
        assert message in err and err.count("error") == 1 and err.splitlines()[-1].startswith("alphabar "), (command, err)


def test_answers_that_are_not_numbers_end_in_one_line(images: Path, story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, layer in ((images, "conv_in.bias"), (story, "linear_out.bias")):
        assert train.main(words(path, *LAWS["multinomial"], steps=2, name=path.stem)) == 0
        arrays, meta = checkpoint.load(last(path.stem))
        arrays[f"ema/{layer}"] = np.full_like(arrays[f"ema/{layer}"], np.nan)
        checkpoint.save("x.h5", arrays, meta)
        with np.errstate(all="ignore"):
            assert sample.main(["x.h5", "--quiet", "--device", "cpu"]) == 1
            assert "no samples could be drawn: some of the network's answers are not numbers" in capsys.readouterr().err
            assert evaluate.main(["x.h5", "--bits", "--quiet", "--device", "cpu"]) == 1
            assert "the likelihood could not be computed" in capsys.readouterr().err
    assert not list(Path().glob("samples.*"))


def test_checkpoints_that_are_no_model(story: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [*LAWS["nearest"], "diffusion.neighbours=8"]
    assert train.main(words(story, *more, steps=2)) == 0
    arrays, meta = checkpoint.load(last())
    d, config = meta["data"], meta["config"]
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"network": "perceptron"}, {}, "network must be one of unet, transformer"),
        ({"network": "unet"}, {}, "cannot be built"),
        ({"data": {**d, "shape": ["x"]}}, {}, "cannot be built"),
        (
            {"config": {**config, "diffusion": {**config["diffusion"], "states": 26}}},
            {},
            "needs the rates of 26 states, not (27, 27)",
        ),
        ({}, {"law/rates": np.ones((27, 27))}, "cannot be built"),
    ]
    for changed, other, message in wrong:
        checkpoint.save("x.h5", {**arrays, **other}, {**meta, **changed})
        assert sample.main(["x.h5", "--quiet", "--device", "cpu"]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("name", ["multinomial", "absorbing"])
def test_text_on_arrays_that_refuse_numpy(story: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The code that runs on a GPU, on a CuPy that is as strict as the real one: the same bits as on NumPy."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.cupy)
    of = text.load(story, "train", 12)

    def run(xp: Any) -> tuple[Any, ...]:
        t = made([*TOKENS, f"data.path={story}", *SHORT, *LAWS[name]], of, xp)
        losses = [t.step().loss for _ in range(2)]
        chosen = sampling.sampler(t.process, Sample("ancestral", 3))
        given = np.arange(12, dtype=np.int32), np.arange(12) % 2 == 0
        with t.averaged() as net:
            return np.array(losses), *sampling.draw(t.process, net, chosen, None, 3, seed=1, batch=2, known=given)

    for there, here in zip(run(fake_cupy.cupy), run(np), strict=True):
        np.testing.assert_array_equal(there, here)


def test_the_law_of_text_is_masked_by_one_state_more(story: Path) -> None:
    process = made([*TOKENS, f"data.path={story}", *SHORT, *LAWS["absorbing"]], text.load(story, "train", 12)).process
    assert isinstance(process.law, Absorbing) and (process.law.K, process.K, process.mask) == (28, 27, 27)
    with pytest.raises(ConfigError, match=r"\[diffusion\]: the transition nearest needs the rates of 27 states"):
        config = resolved(f"data.path={story}", *LAWS["nearest"], of=text.load(story, "train", 12))
        categorical.Categorical(config, (12,))


def test_a_text_of_few_letters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    for letters, said in (("ab", "0.000 bits a letter, given 0 letters"), ("abcdefghijkl", "given 0, 1, 2 letters")):
        short.write_text(letters)
        assert cli.main(["info", str(short)]) == 0 and said in capsys.readouterr().out
    assert train.main(words(short, *LAWS["absorbing"], "data.length=1", steps=2, name="s")) == 0
    assert evaluate.main(["runs/s", "--bits", "--n", "1", "--device", "cpu"]) == 0
    assert "letter given 1 before it" in capsys.readouterr().out
