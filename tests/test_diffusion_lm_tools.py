"""Diffusion-LM from the command line: it trains, resumes bit for bit, samples, fills in, is steered, judged and evaluated."""

import json
import re
import signal
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import diffusion_lm as core_lm
from alphabar.core import forward, ngram, text
from alphabar.nets import checkpoint
from alphabar.nets.autograd import backward
from alphabar.nets.word_diffusion import WordDiffusion
from alphabar.tools import (
    cli,
    diffusion_lm,
    evaluate,
    evaluate_words,
    families,
    info,
    properties,
    sample,
    sampling,
    train,
    train_classifier,
    trained,
    trainer,
    word_classifier,
)
from alphabar.tools import config as configs
from alphabar.tools.command import UserError
from alphabar.tools.config import Sample
from alphabar.tools.properties import Windows
from tests import fake_cupy

TINY = [
    "method=diffusion-lm",
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "data.length=12",
    "diffusion.features=4",
    "diffusion.T=20",
    "train.batch=6",
    "train.warmup=1",
]
SHORT = ["log.every=1", "log.samples=0", "sample.columns=2", "sample.steps=5"]
CPU = ["--device", "cpu", "--quiet"]


@pytest.fixture(autouse=True)
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with kernels.use("reference"):
        yield


def words(path: Path, *more: str, name: str = "r", steps: int = 4) -> list[str]:
    sets = [w for s in [*TINY, *SHORT, *more] for w in ("--set", s)]
    return ["--data", str(path), "--steps", str(steps), "--out", "runs", "--name", name, *CPU, *sets]


def made(path: Path, *more: str, xp: Any = np) -> trainer.Trainer:
    of = text.load(path, "train", 12)
    config = configs.load(None, [*TINY, *SHORT, f"data.path={path}", *more])
    return trainer.Trainer(families.of(config).resolved(config, of), of, xp)


def last(name: str = "r") -> Path:
    return checkpoint.listing(Path("runs") / name / "ckpt")[0][1]


def drawn(*more: str, run: str = "runs/r") -> list[str]:
    assert sample.main([run, "--out", "drawn.h5", *CPU, *more]) == 0
    with h5py.File("drawn.h5") as f:
        return ["".join(f.attrs["alphabet"][k] for k in row) for row in f["tokens"][:]]


# -------------------------------------------------------------------------------------------------------------------- settings


def test_what_is_left_open_is_completed_and_written_down() -> None:
    config = configs.load(None, ["method=diffusion-lm", "data.path=kjv"])
    c = families.of(config).resolved(config, None)
    assert (c.diffusion.schedule, c.diffusion.T, c.diffusion.features, c.diffusion.sigma0) == ("sqrt", 1000, 16, 1e-4)
    assert (c.sample.sampler, c.sample.steps, c.model.network) == ("ddpm", 200, "transformer") and c.sample.clamp > 0
    written = tomllib.loads(configs.to_toml(c))
    assert configs.from_dict(written) == c and configs.check(c) == c
    assert {"clamp", "fluency", "control_steps", "control_rate", "control_method", "resample"} < set(written["sample"])
    assert not {"guidance", "threshold", "rescale", "interval_low", "temperature"} & set(written["sample"])
    assert "features" not in tomllib.loads(configs.to_toml(configs.Config()))["diffusion"]
    process = diffusion_lm.Embedded(c, (128,))
    assert process.levels.name == "sqrt" and process.levels.T == 1000
    assert sampling.sampler(process, Sample()).rows == 200 and sampling.sampler(process, Sample("ddim", 7)).rows == 7
    for share, said in ((0, "not clamped"), (0.5, "clamped at t <= 500"), (1, "clamped")):
        assert sampling.sampler(process, Sample(clamp=share)).name == f"ddpm 200 steps, {said}"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["method=diffusion-lm"], "method diffusion-lm is for text, not for images: data.path=kjv, or a file .txt"),
        (["diffusion.features=8"], "diffusion.features goes with the method diffusion-lm, not with ddpm"),
        (["sample.clamp=0.1"], "sample.clamp goes with the method diffusion-lm, not with ddpm"),
        (["data.path=kjv", *TINY, "sample.threshold=0.9"], "sample.threshold goes with the methods ddpm, ncsn, vpsde, vesde"),
        (["data.path=kjv", *TINY, "sample.guidance=1"], "sample.guidance goes with the methods ddpm"),
        (["data.path=kjv", *TINY, "sample.sampler=heun"], "must be one of ddpm, ddim for method diffusion-lm, not 'heun'"),
        (["data.path=kjv", *TINY, "sample.eta=0.5"], "sample.eta goes with the sampler ddim, not with ddpm"),
        (
            ["data.path=kjv", *TINY, "diffusion.schedule=reciprocal"],
            "must be one of sqrt, cosine, linear for method",
        ),
        (["data.path=kjv", *TINY, "diffusion.transition=uniform"], "diffusion.transition goes with the method d3pm"),
        (["data.path=kjv", *TINY, "train.hybrid=1"], "train.hybrid goes with the methods multinomial, d3pm"),
        (["data.path=kjv", *TINY, "model.heads=5"], "these settings make no network for text of 12: width must be"),
        (["data.path=kjv", *TINY, "sample.steps=21"], "[sample]: steps"),
        (["data.path=kjv", *TINY, "diffusion.sigma0=0"], "diffusion.sigma0 must be in 1e-09..1.0, not 0.0"),
    ],
)
def test_settings_that_do_not_go_together(capsys: pytest.CaptureFixture[str], sets: list[str], message: str) -> None:
    assert train.main([*CPU, "--dry-run", *(w for s in sets for w in ("--set", s))]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


# -------------------------------------------------------------------------------------------------------------------- training


def test_the_gradient_of_a_step_is_that_of_the_end_to_end_loss(story: Path) -> None:
    """Through x_t, x_0, Emb(w) and the rounding, to embeddings and all other weights: by differences in double precision."""
    t = made(story, "diffusion.T=3")  # t = 1 among the times of a batch
    t.learner.net = net = WordDiffusion(**{**t.net.config, "dtype": "float64"})
    rng = np.random.default_rng(0)
    net.params.data += 0.3 * rng.standard_normal(net.params.data.shape)
    attempt = t.learner.attempt(5)
    assert 1 in attempt.times and len(attempt.roots) == 4
    net.params.zero_grad()
    backward(*attempt.roots)
    for name in net.params:
        direction = np.zeros_like(net.params.data)
        with net.params.using(direction):
            net.params[name].data[...] = rng.standard_normal(net.params[name].shape)
        start, h = net.params.data.copy(), 1e-6
        ends = []
        for side in (h, -h):
            net.params.data[...] = start + side * direction
            ends.append(float(t.learner.attempt(5).value.mean()))
        net.params.data[...] = start
        want = (ends[0] - ends[1]) / (2 * h)
        assert float(net.params.grad @ direction) == pytest.approx(want, rel=2e-5, abs=2e-8), name


def test_a_step_noises_as_the_definitions_do(story: Path) -> None:
    t = made(story)
    tokens = t.data.batch(0, 6)[0]
    times, mean, x0, x_t = t.process.noised(t.net, tokens, seed=3, step=7)
    want_x0, want_mean = core_lm.embed(tokens, t.net.table.data, 1e-4, seed=3, step=7)
    np.testing.assert_array_equal(mean.data, want_mean)
    np.testing.assert_array_equal(x0.data, want_x0)
    want, _ = forward.q_sample(want_x0, times, t.process.levels, seed=3, step=7)
    np.testing.assert_allclose(x_t.data, want, atol=1e-6)
    assert set(np.diff(np.sort(times))) <= {3, 4}  # spread evenly


def test_it_trains_resumes_bit_for_bit_and_samples(story: Path, stopped_after: Any, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["model.dropout=0.1", "log.samples=2"]
    assert train.main(words(story, *more, name="whole")) == 0, capsys.readouterr().err
    assert stopped_after(2, lambda: train.main(words(story, *more))) == 128 + signal.SIGTERM
    assert train.main(["--resume", "runs/r", *CPU]) == 0
    assert last().read_bytes() == last("whole").read_bytes()
    assert sorted(p.name for p in Path("runs/whole/samples").iterdir()) == ["final_00000004.txt", "step_00000002.txt"]
    shown = Path("runs/r/samples/final_00000004.txt").read_text().split("\n\n")
    assert shown[0] == "r, step 4: ddpm 5 steps, clamped" and len(shown) == 3
    meta = checkpoint.load(last())[1]
    assert meta["network"] == "word-diffusion" and meta["config"]["diffusion"]["features"] == 4
    five = ["--n", "5", "--set", "sample.clamp=0"]
    plain, ddim = drawn(*five), drawn(*five, "--sampler", "ddim")
    assert plain == drawn(*five, "--batch", "2") and {len(s) for s in plain} == {12}
    assert plain != ddim != drawn(*five, "--sampler", "ddim", "--eta", "1")
    assert plain != drawn("--n", "5")
    assert info.main(["runs/r"]) == 0
    assert "diffusion-lm" in capsys.readouterr().out
    assert train.main([*words(story), "--dry-run"]) == 0
    assert re.search(r"one step +[\d.]+ ms on cpu, [\d,]+ windows/s", capsys.readouterr().out)


def test_it_learns_the_letters_of_a_text(story: Path) -> None:
    """After some seconds the rounding is sure of every letter and the samples have the letters' frequencies."""
    with kernels.use("auto"):
        t = made(story, "train.steps=200", "train.lr=0.01", "train.batch=32", "model.width=32", "diffusion.features=8")
        losses = [t.step().loss for _ in range(200)]
        assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
        tokens = t.data.batch(0, 32)[0]
        x0, _ = core_lm.embed(tokens, t.net.table.data)
        logits = t.net.logits(x0).data
        assert np.exp(-core_lm.rounding_loss(logits, tokens)[0]).mean() > 0.9
        with t.averaged() as net:
            chosen = sampling.sampler(t.process, Sample("ddpm", 20))
            found = np.concatenate(list(sampling.draw(t.process, net, chosen, None, 40)))
    a, b = (np.bincount(v.reshape(-1), minlength=27) / v.size for v in (found, t.data.tokens))
    assert np.abs(a - b).sum() / 2 < 0.25 and 26 in found


def test_on_arrays_that_refuse_numpy(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that runs on a GPU, on a CuPy that is as strict as the real one: the same bits as on NumPy."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.cupy)

    def run(xp: Any) -> tuple[Any, ...]:
        t = made(story, xp=xp)
        losses = [t.step().loss for _ in range(2)]
        given = np.arange(12, dtype=np.int32), np.arange(12) % 2 == 0
        with t.averaged() as net:
            chosen = sampling.sampler(t.process, Sample("ddpm", 3))
            return np.array(losses), *sampling.draw(t.process, net, chosen, None, 3, seed=1, batch=2, known=given)

    for there, here in zip(run(fake_cupy.cupy), run(np), strict=True):
        np.testing.assert_array_equal(there, here)


# -------------------------------------------------------------------------------------------------------------------- sampling


def test_blanks_are_filled_in(story: Path) -> None:
    assert train.main(words(story)) == 0
    for more in ((), ("--set", "sample.resample=3"), ("--set", "sample.clamp=0")):
        texts = drawn("--infill", "A ___ sat", "--n", "3", *more)
        assert len(texts) == 3 and all(s[:2] == "a " and s[5:9] == " sat" for s in texts)
    assert sample.main(["runs/r", "--infill", "A ___ sat", "--n", "2", "--out", "i.txt", *CPU]) == 0
    assert Path("i.txt").read_text().split("\n\n")[1] == "a ___ sat"


def test_a_classifier_steers_samples_to_a_property(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with kernels.use("auto"):
        sets = ["model.width=32", "diffusion.features=8", "train.batch=32", "train.lr=0.01", "sample.steps=20"]
        assert train.main(words(story, *sets, steps=200)) == 0
        command = ["runs/r", "--property", "letter:o", "--steps", "120", "--batch", "32", "--device", "cpu"]
        assert train_classifier.main(command) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        shares = [float(v) for v in re.findall(r"accuracy +([\d.]+)%", out)]
        assert len(shares) == 4 and shares[0] > 75 and shares[0] > shares[3] and "windows of the split test" in out
        assert "property    letter:o, which" in out and "classifier  runs/r/classifier.h5" in out
        assert info.main(["runs/r/classifier.h5"]) == 0
        assert "letter:o" in capsys.readouterr().out
        by = ["--classifier", "runs/r/classifier.h5", "--n", "40"]
        papers = "control_method=adagrad", "control_steps=3", "control_rate=0.1", "fluency=0.01"
        as_printed = [word for s in papers for word in ("--set", f"sample.{s}")]
        plain = drawn("--n", "40")
        yes, no = (drawn(*by, "--class", name, "--classifier-weight", "5") for name in ("yes", "no"))
        with h5py.File("drawn.h5") as f:
            assert f.attrs["control"] == "letter:o no × 5" and f.attrs["classifier"] == "classifier.h5"
        asked = properties.parse("letter:o")
        of = [properties.share(s, asked) for s in (no, plain, yes)]
        assert of[0] < of[1] - 0.2 and of[2] > of[1] + 0.2, of
        printed = [properties.share(drawn(*by, *as_printed, "--class", name), asked) for name in ("no", "yes")]
        assert printed[0] < 0.2 < of[1] < 0.8 < printed[1], printed
        assert drawn(*by, "--class", "1", "--set", "sample.control_steps=0") == plain
        assert drawn(*by, "--class", "yes", "--classifier-weight", "0") == plain
        assert drawn(*by, "--class", "yes", "--classifier-weight", "5", "--batch", "7")[:3] == yes[:3]
        filled = drawn(*by, "--class", "yes", "--infill", "the _")
        assert all(s.startswith("the ") for s in filled)


def test_the_gradient_of_the_classifier_is_that_of_its_log_probability(story: Path) -> None:
    assert train.main(words(story, steps=2)) == 0
    assert train_classifier.main(["runs/r", "--property", "word:the", "--steps", "3", "--out", "c.h5", *CPU]) == 0
    network = trained.load(Path("runs/r"), False, np)
    by = word_classifier.load("c.h5", network)
    assert by.property == "word:the"
    rng = np.random.default_rng(1)
    x, d = (rng.standard_normal((3, 12, 4)).astype(np.float32) for _ in range(2))
    t, y = np.array([3.0, 9.0, 20.0]), np.array([0, 1, 1])

    def log_p(at: np.ndarray) -> np.ndarray:
        z = by.net.predict(at.astype(np.float32), t).astype(np.float64)
        return (z - np.log(np.exp(z).sum(axis=1, keepdims=True)))[np.arange(3), y]

    want = (log_p(x + 1e-2 * d) - log_p(x - 1e-2 * d)) / 2e-2
    np.testing.assert_allclose((by.gradient(y)(x, t) * d).sum(axis=(1, 2)), want, rtol=0.02, atol=1e-5)


def test_what_the_programs_say_of_mistakes(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(story, steps=2)) == 0
    assert train.main(words(story, "data.length=10", steps=2, name="other")) == 0
    assert train.main(words(story, "train.seed=1", steps=2, name="seed")) == 0
    fit = ["--steps", "2", *CPU]
    assert train_classifier.main(["runs/r", "--property", "word:cat", "--out", "c.h5", *fit]) == 0
    assert train_classifier.main(["runs/other", "--property", "word:cat", "--out", "o.h5", *fit]) == 0
    assert train_classifier.main(["runs/seed", "--property", "word:cat", *fit]) == 0
    capsys.readouterr()
    for command, message in (
        (["sample", "runs/r", "--class", "yes"], "--class goes with --classifier"),
        (["sample", "runs/r", "--classifier-weight", "2"], "--classifier-weight goes with --classifier"),
        (
            ["sample", "runs/r", "--classifier", "c.h5"],
            "needs --class no or yes, whether the text shall have word:cat",
        ),
        (["sample", "runs/r", "--classifier", "c.h5", "--class", "2"], "--classifier needs --class no or yes"),
        (["sample", "runs/r", "--classifier", "o.h5", "--class", "1"], "it knows windows of 10 letters, not of 12"),
        (["sample", "runs/r", "--classifier", "runs/seed/classifier.h5", "--class", "1"], "trained on the embeddings of another"),
        (["sample", "runs/r", "--raw-weights", "--classifier", "c.h5", "--class", "1"], "or of its other weights"),
        (["sample", "runs/r", "--classifier", str(last()), "--class", "1"], "want 'alphabar-classifier'"),
        (
            ["sample", "runs/r", "--classifier", "c.h5", "--class", "1", "--sampler", "ddim"],
            "adds noise: ddpm, or ddim",
        ),
        (["sample", "runs/r", "--classifier-form", "mean"], "--classifier-form goes with networks of images, not of text"),
        (["sample", "runs/r", "--guidance", "1"], "--guidance goes with networks of images, not of text"),
        (["sample", "runs/r", "--temperature", "0.5"], "sample.temperature goes with the sampler ancestral, not with ddpm"),
        (["sample", "runs/r", "--threshold", "0.9"], "sample.threshold goes with the methods"),
        (["sample", "runs/r", "--sampler", "heun"], "must be one of ddpm, ddim for method diffusion-lm, not 'heun'"),
        (["sample", "runs/r", "--steps", "21"], "21"),
        (["sample", "runs/r", "--set", "sample.clamp=2"], "sample.clamp must be in 0.0..1.0, not 2.0"),
        (
            "sample runs/r --classifier c.h5 --class 1 --infill a_ --set sample.resample=2".split(),
            "sample.resample must be 1 with --classifier",
        ),
        (["train-classifier", "runs/r"], "--property must say what to look for in the text: word:WORD, letter:LETTER"),
        (["train-classifier", "runs/r", "--property", "word:two words"], "--property must be word:WORD"),
        (["train-classifier", "runs/r", "--property", "letter:zz"], "not 'letter:zz'"),
        (["train-classifier", "runs/r", "--property", "words:9-3"], "not 'words:9-3'"),
        (
            ["train-classifier", "runs/r", "--property", "word:zebra"],
            "12 letters of story (train) is with word:zebra",
        ),
        (["train-classifier", "runs/r", "--property", "words:0-20"], "is without words:0-20"),
        (["evaluate", "runs/r", "--bits", "--method", "flow"], "--method does not go with method diffusion-lm"),
        (["evaluate", "runs/r", "--bits", "--steps", "21"], "--steps must be in 1..20, not 21"),
        (["edit", "vary", "runs/r"], "not method diffusion-lm"),
        (
            ["train", "--resume", "runs/r", "--set", "diffusion.features=5"],
            "cannot change diffusion.features",
        ),
    ):
        assert cli.main([*command, "--device", "cpu"]) == 2, command
        err = capsys.readouterr().err
        assert message in err and err.count("error") == 1 and err.splitlines()[-1].startswith("alphabar "), (command, err)


def test_a_classifier_of_images_is_none_of_text(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = "model.channels=4 model.blocks=1 model.groups=2 log.samples=0 train.batch=4 sample.columns=1 sample.steps=2"
    sets = [w for s in digits.split() for w in ("--set", s)]
    assert train.main(["--steps", "1", "--out", "runs", "--name", "d", *CPU, *sets]) == 0
    assert train_classifier.main(["runs/d", "--steps", "1", "--batch", "4", *CPU]) == 0
    assert train.main(words(story, steps=1)) == 0
    assert train_classifier.main(["runs/r", "--property", "word:cat", "--steps", "1", *CPU]) == 0
    capsys.readouterr()
    for command, message in (
        (["sample", "runs/r", "--classifier", "runs/d/classifier.h5", "--class", "1"], "is a classifier of images, not of text"),
        (["sample", "runs/d", "--classifier", "runs/r/classifier.h5"], "is a classifier of text (word:cat), not of images"),
        (["train-classifier", "runs/d", "--property", "word:cat"], "--property goes with networks of method diffusion-lm"),
    ):
        assert cli.main([*command, "--device", "cpu"]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


def test_answers_that_are_not_numbers_end_in_one_line(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(story, steps=1)) == 0
    arrays, meta = checkpoint.load(last())
    arrays["ema/linear_out.bias"] = np.full_like(arrays["ema/linear_out.bias"], np.nan)
    checkpoint.save("x.h5", arrays, meta)
    with np.errstate(all="ignore"):
        assert sample.main(["x.h5", *CPU]) == 1
        assert "no samples could be drawn: some of the network's answers are not numbers" in capsys.readouterr().err
        assert evaluate.main(["x.h5", "--bits", *CPU]) == 1
        assert "the likelihood could not be computed: some of the network's answers" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- the likelihood


class Exact:
    """The network that is right for independent letters of the law p: x̂_0 = E[Emb(w)|x_t], and sure of its rounding."""

    def __init__(self, net: Any, p: np.ndarray, s: Any) -> None:
        self.config, self.params, self.table, self.p, self.s = net.config, net.params, net.table, p, s

    def predict(self, x: np.ndarray, t: Any, y: Any = None) -> np.ndarray:
        a, n = (np.asarray(v)[..., None, None] * np.ones((len(x), 1, 1)) for v in self.s.levels(np.asarray(t)))
        e = self.table.data.astype(np.float64)
        with np.errstate(divide="ignore"):
            z = np.log(self.p) + (a * (x.astype(np.float64) @ e.T) - a**2 * (e**2).sum(axis=1) / 2) / n**2
        w = np.exp(z - z.max(axis=-1, keepdims=True))
        return ((w / w.sum(axis=-1, keepdims=True)) @ e).astype(x.dtype)

    def logits(self, x: np.ndarray) -> Any:
        return SimpleNamespace(data=core_lm.rounding_logits(x, self.table.data, sigma=1e-2))


@pytest.mark.parametrize("terms", [None, 100])
def test_the_bound_of_an_exact_network_is_the_entropy(story: Path, terms: int | None) -> None:
    """Independent letters: the bound is above their entropy, and near it where the steps are many."""
    p = np.zeros(27)
    p[:5] = 0.4, 0.3, 0.15, 0.1, 0.05
    rng = np.random.default_rng(0)
    samples = text.Text(rng.choice(27, 64 * 12, p=p).astype(np.uint8), 12)
    crossed = -np.log2(p[samples.tokens]).mean()
    for T, excess in ((1000, 0.04), (100, 0.12)):
        t = made(story, f"diffusion.T={T}", "diffusion.features=24")
        network = SimpleNamespace(
            process=t.process, net=Exact(t.net, p, t.process.levels), config=t.config, shape=(12,), path=Path("x")
        )
        o = SimpleNamespace(**evaluate_words_options(terms=terms))
        found, lines = evaluate_words.bound_of_text(network, samples, np.arange(64), None, o)
        bits, error = found["bits_per_character"], found["standard_error"]
        assert crossed - 0.03 < bits < crossed + excess, (T, bits, crossed, error)
        assert error < 0.1 and abs(found["bits_of_rounding"]) < 1e-6 and 0 <= found["nearest_until"] < T
    assert any("bound on -log2 P" in line for line in lines)


def evaluate_words_options(**own: Any) -> dict[str, Any]:
    usual = {"method": "bound", "t_min": None, "eta": 1.0, "variance": "posterior", "decoder_variance": "step"}
    usual |= {"trace": "hutchinson", "projections": 1, "tolerance": 1e-5}
    return {**usual, "steps": None, "draws": 1, "batch": 40, "seed": 0, "quiet": True, **own}


def test_evaluate_tells_bits_per_character(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(story)) == 0
    command = ["runs/r", "--bits", "--n", "5", "--draws", "2", "--out", "e.json", "--device", "cpu"]
    assert evaluate.main(command) == 0
    out, found = capsys.readouterr().out, json.loads(Path("e.json").read_text())
    of = text.load(story, "test", 12)
    assert found["entropies"] == [ngram.entropy(of.tokens, n, 27) for n in (1, 2, 3)] and found["windows"] == 5
    assert "bits/char" in out and "of which rounding, in L_0" in out and "20 steps, x0 the embedding nearest to x_t" in out
    assert sum(term["bits"] for term in found["terms"]) == pytest.approx(found["bits_per_character"])
    assert found["bits_per_character"] > 0 and found["sigma0"] == 1e-4
    assert evaluate.main([*command, "--batch", "2", "--terms", "19", "--quiet"]) == 0
    again = json.loads(Path("e.json").read_text())
    assert again["bits_of_rounding"] == pytest.approx(found["bits_of_rounding"], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------ properties


def test_properties_of_windows() -> None:
    window = " od and the lord go"
    for name, has in (
        ("word:lord", True),
        ("word:or", False),
        ("word:go", True),
        ("letter:z", False),
        ("letter:h", True),
        ("words:5-5", True),
        ("words:1-4", False),
        ("words:0-9", True),
    ):
        assert properties.parse(name)(window) is has, name
    for name in ("word:", "word:God", "word:a b", "letter:", "letter: ", "words:3", "words:a-b", "words:-1-3", "length:3", ""):
        with pytest.raises(UserError, match="--property must be word:WORD, letter:LETTER or words:LOW-HIGH"):
            properties.parse(name)


def test_windows_of_both_classes_come_alike(story: Path) -> None:
    of, asked = text.load(story, "train", 12), properties.parse("word:cat")
    windows = Windows(of, asked, seed=0)
    there = [properties.letters(of)[s : s + 12] for s in range(len(of.tokens) - 11)]
    assert windows.share == pytest.approx(properties.share(there, asked)) and 0 < windows.share < 0.2
    tokens, labels = windows.batch(3, 9)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert [asked(of.decode(row)) for row in tokens] == [bool(v) for v in labels]
    np.testing.assert_array_equal(windows.batch(3, 9)[0], tokens)
    assert not np.array_equal(windows.batch(4, 9)[0], tokens)
