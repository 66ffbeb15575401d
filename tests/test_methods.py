"""The methods of training: losses as the formulas say, settings checked, and every one trains, resumes and samples."""

import signal
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import analytic, data, guidance, losses, score_matching, variance
from alphabar.nets import checkpoint
from alphabar.nets.unet import UNet
from alphabar.tools import config as configs
from alphabar.tools import families, methods, sample, sampling, train, trainer
from alphabar.tools.config import GAUSSIAN, METHODS, SAMPLERS, SDES, Config, ConfigError, Sample
from alphabar.tools.methods import Process

SMALL = ["model.channels=8", "model.blocks=1", "model.attention=4", "model.groups=4", "train.batch=6", "train.warmup=1"]
SMALL += ["log.every=1", "log.samples=0", "sample.columns=2"]
VE = ["diffusion.sigma_max=6"]
LEVELS = [*VE, "diffusion.levels=9"]
WORDS: dict[str, list[str]] = {"ddpm": [], "ncsn": LEVELS, "vpsde": [], "vesde": VE, "subvpsde": []}
FEW = {"langevin": 2, "flow": 0, "rk4": 3}  # steps for a quick sample; others take 4


@pytest.fixture(autouse=True)
def reference() -> Iterator[None]:
    with kernels.use("reference"):
        yield


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """20 images of 4×4 in 3 classes."""
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "tiny.h5", "w") as f:
        f["images"], f["labels"] = rng.integers(0, 256, (20, 4, 4), np.uint8), np.arange(20) % 3
        f.attrs["classes"] = "red,green,blue"
    return tmp_path / "tiny.h5"


def config(method: str, *words: str) -> Config:
    return configs.load(None, [f"method={method}", *WORDS[method], *words])


def words(images: Path, method: str, *more: str, name: str = "r", steps: int = 4) -> list[str]:
    sets = [w for s in [*SMALL, f"method={method}", *WORDS[method], *more] for w in ("--set", s)]
    where = ["--out", str(images.parent / "runs"), "--name", name, "--device", "cpu", "--quiet"]
    return ["--data", str(images), "--steps", str(steps), *where, *sets]


def run_of(images: Path, name: str = "r") -> Path:
    return images.parent / "runs" / name


def last(run: Path) -> Path:
    return checkpoint.listing(run / "ckpt")[0][1]


# -------------------------------------------------------------------------------------------------------------------- losses


def batch(n: int = 64) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, 4, 4, 1), np.float32)


def test_the_loss_of_ncsn_is_denoising_score_matching_with_lambda_sigma_squared() -> None:
    """With score = −F/σ, σ²·½‖s − (x0 − x̃)/σ²‖² summed is d/2 times the mean of (F − ε)²: values and gradients."""
    process, x0 = Process(config("ncsn")), batch()
    example, F = process.example(x0, seed=3, step=5), batch()[::-1].copy()
    sigma = process.levels.levels(example.times)[1]
    np.testing.assert_allclose(sigma, process.levels.sigma[example.times])
    assert len(set(example.times)) == process.levels.T == 9
    score = -F / sigma.astype(np.float32).reshape(-1, 1, 1, 1)
    value, gradient = process.loss(F, example)
    want, on_score = score_matching.ncsn(score, x0, example.x_t, sigma)
    np.testing.assert_allclose(value, want * 2 / 16, rtol=2e-3)  # x̃ − x0 is taken in float32, where σ = 0.01
    np.testing.assert_allclose(gradient, -on_score / sigma.reshape(-1, 1, 1, 1) * 2 / 16, rtol=2e-2, atol=2e-6)


@pytest.mark.parametrize("method", SDES)
@pytest.mark.parametrize("importance", ["true", "false"])
def test_likelihood_weighting_is_g_squared_on_the_error_of_the_score(method: str, importance: str) -> None:
    """½g²‖s_θ − ∇log q(x_t|x_0)‖²/d over the density that t is drawn from."""
    process = Process(config(method, "train.weighting=likelihood", f"train.importance={importance}"))
    s: Any = process.levels
    example, F = process.example(batch(), seed=3, step=5), batch()[::-1].copy()
    noise, g = s.levels(example.times)[1], s.diffusion(example.times)
    error = ((F - example.target).reshape(64, -1).astype(np.float64) / noise[:, None]) ** 2
    if importance == "true":  # ln σ̄ is uniform, so the density of t is ½g²/n² over its integral
        density = 0.5 * g**2 / noise**2 / np.log(s.sigma_bar_at(s.T) / s.sigma_bar_at(s.t_min))
    else:
        density = np.full(64, 1 / (s.T - s.t_min))
    np.testing.assert_allclose(process.loss(F, example)[0], 0.5 * g**2 / density * error.mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize("method", SDES)
def test_times_drawn_by_importance_have_the_same_expectation_and_less_variance(method: str) -> None:
    n, estimates = 40_000, []
    for importance in ("true", "false"):
        process = Process(config(method, "train.weighting=likelihood", f"train.importance={importance}"))
        times, weight = process.times(n, seed=1, step=0)
        assert weight is not None and process.levels.t_min <= times.min() and times.max() <= process.levels.T
        value = weight * process.levels.levels(times)[1]  # an error that grows with the noise
        estimates.append((value.mean(), value.std() / n**0.5, weight.std()))
    (a, da, flat), (b, db, steep) = estimates
    assert abs(a - b) < 4 * (da**2 + db**2) ** 0.5 and flat < 1e-12 and steep > 1


def test_simple_weighting_counts_every_level_alike() -> None:
    """A network that answers 0 has the loss E ε² = 1 at small and at large noise. Eq: S0-C8."""
    for method in GAUSSIAN:
        process = Process(config(method))
        example = process.example(batch(4000), seed=0, step=0)
        value = process.loss(np.zeros_like(example.x_t), example)[0]
        low = example.times < np.median(example.times)
        assert abs(value[low].mean() - 1) < 0.03 and abs(value[~low].mean() - 1) < 0.03


# ------------------------------------------------------------------------------------------------------- what the network sees


@pytest.mark.parametrize("method", GAUSSIAN)
def test_the_network_reads_inputs_of_unit_variance(images: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """x_t/√(a² + n²) of data with unit variance, at the level that it is told; for ddpm and vpsde that is x_t itself."""
    process = Process(config(method))
    example = process.example(batch(4000), seed=0, step=0)
    seen = process.input(example.x_t, example.times)
    assert abs(seen.std() - 1) < 0.02 and (example.x_t.std() > 1.5) == (method in ("ncsn", "vesde"))
    assert np.array_equal(seen, example.x_t) == (method in ("ddpm", "vpsde"))

    made = trainer.Trainer(configs.from_words([*SMALL, f"data.path={images}"], config(method)), data.load(images))
    read: list[Any] = []
    call = UNet.__call__
    monkeypatch.setattr(UNet, "__call__", lambda self, x, *a, **k: (read.append((x.copy(), a[0])), call(self, x, *a, **k))[1])
    made.step()
    x0 = data.to_unit(made.data.batch(0, 6)[0])
    want = made.process.example(x0, 0, 0)
    np.testing.assert_array_equal(read[0][0], made.process.input(want.x_t, want.times))
    np.testing.assert_array_equal(read[0][1], want.times)


class Exact:
    """In the place of a network: the perfect answer for data N(mean, std²), from the input that a network would get."""

    config, null = {"image_size": [4, 4], "in_channels": 1, "classes": None}, 3
    mean, std = 0.2, 0.15

    def __init__(self, process: Process) -> None:
        self.s, self.params, self.learned = process.levels, self, process.learned
        self.xp = np

    def predict(self, x: Any, t: Any, y: Any = None) -> Any:
        a, n = (v.reshape(-1, 1, 1, 1) for v in self.s.levels(t))
        state = x * np.sqrt(a**2 + n**2)
        answer = (n * (state - a * self.mean) / (a**2 * self.std**2 + n**2)).astype(x.dtype)
        return np.concatenate([answer, 0 * answer], axis=-1) if self.learned else answer  # v = 0: the lower end of the range

    def gradient(self, k: float) -> Any:
        """∇ log E[exp(k·Σx0)|x_t]: that of a classifier with log p(c|x0) = k·Σx0 + …, which moves the mean by k·std²."""

        def of(x: Any, t: Any) -> Any:
            a, n = (v.reshape(-1, 1, 1, 1) for v in self.s.levels(t))
            return np.broadcast_to(k * a * self.std**2 / (a**2 * self.std**2 + n**2), x.shape).astype(x.dtype)

        return lambda y: of


@pytest.mark.parametrize("method", GAUSSIAN)
def test_every_sampler_of_every_method_draws_the_data_of_an_exact_network(method: str) -> None:
    """Levels, times, input, prior and sampler fit together: images come out with the mean and deviation of the data."""
    process = Process(config(method, *(["diffusion.levels=60"] if method == "ncsn" else [])))
    counts = {"em": 200, "rd": 200, "pc": 60, "ddpm": 100, "euler-a": 100, "flow": 0, "langevin": 5, "rk4": 12, "learned": 100}
    for name in SAMPLERS[method]:
        if name == "learned":
            process = Process(config(method, "train.loss=hybrid"))
        count = counts.get(name, 40)
        if method == "ncsn" and name in ("em", "rd", "ddpm", "euler-a", "pc"):
            count = 60
        chosen = sampling.sampler(process, Sample(name, count))
        (drawn,) = sampling.draw(process, Exact(process), chosen, None, 200, seed=1, batch=200)  # type: ignore[arg-type]
        x = data.to_unit(drawn).astype(np.float64)
        assert abs(x.mean() - Exact.mean) < 0.03 and abs(x.std() - Exact.std) < 0.035, (name, x.mean(), x.std())


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("heun", {"churn": 20.0}, "churn = 20"),
        ("deis", {"order": 4}, "order 4"),
        ("unipc", {"order": 3, "steps": 10}, "order 3"),
        ("ddim", {"threshold": 0.9}, "ddim"),
    ],
)
def test_settings_of_a_sampler_reach_it(name: str, more: dict[str, Any], words: str) -> None:
    process = Process(config("ddpm"))
    settings = Sample(name, **{"steps": 40, **more})
    chosen = sampling.sampler(process, settings, "karras" if name != "ddim" else None)
    assert words in chosen.name
    (drawn,) = sampling.draw(process, Exact(process), chosen, None, 200, seed=1, batch=200)  # type: ignore[arg-type]
    x = data.to_unit(drawn).astype(np.float64)
    assert abs(x.mean() - Exact.mean) < 0.03 and abs(x.std() - Exact.std) < 0.035


def test_the_best_variance_gives_gaussian_data_their_deviation_in_few_steps() -> None:
    """Ten steps of DDPM or DDIM with Γ of the network, along its best path or another; without it they miss by far."""
    process = Process(config("ddpm"))
    exact, rng = Exact(process), np.random.default_rng(0)
    x0 = (Exact.mean + Exact.std * rng.standard_normal((300, 4, 4, 1))).astype(np.float32)
    times = np.unique(np.r_[1, process.levels.times(200, "quadratic")])
    gamma = analytic.measure_gamma(exact.predict, x0, process.levels, times)

    def miss(name: str, spacing: str | None, gamma: analytic.Gamma | None, eta: float = 0.0) -> float:
        chosen = sampling.sampler(process, Sample(name, 10, eta=eta), spacing, gamma)
        assert ("best variance" in chosen.name) == (gamma is not None)
        (drawn,) = sampling.draw(process, exact, chosen, None, 400, seed=1, batch=400)  # type: ignore[arg-type]
        return abs(data.to_unit(drawn).std() / Exact.std - 1)

    for name, eta in (("ddpm", 0.0), ("ddim", 0.5), ("ddim", 0.0), ("euler-a", 0.0)):
        assert miss(name, "logsnr", gamma, eta) < 0.02 and miss(name, "optimal", gamma, eta) < 0.04
        assert miss(name, "logsnr", None, eta) > 0.2
    with pytest.raises(ValueError, match="spacing optimal needs"):
        sampling.sampler(process, Sample("ddpm", 10), "optimal")
    for name in ("pc", "flow", "heun", "dpm++"):
        with pytest.raises(ValueError, match=f"ddpm, ddim, euler, euler-a, not with {name}"):
            sampling.sampler(process, Sample(name), None, gamma)


# -------------------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("form", ["score", "mean"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "learned", "heun", "pc"])
def test_a_classifier_tilts_the_law_of_an_exact_network(form: str, name: str) -> None:
    """N(m, s²)·exp(w·k·x) is N(m + w·k·s², s²)."""
    process = Process(config("ddpm", *(["train.loss=hybrid"] if name == "learned" else [])))
    exact, shift = Exact(process), 0.2
    k = shift / (2 * Exact.std**2)
    chosen = sampling.sampler(process, Sample(name, 100 if form == "score" or name in ("heun", "pc") else 500))
    how = sampling.Guide(gradient=exact.gradient(k), classifier_weight=2.0, form=form)
    if form == "mean" and name in ("ddim", "heun", "pc"):
        with pytest.raises(ValueError, match=r"mean|one evaluation each"):
            sampling.guided(process, exact, chosen, None, how)  # type: ignore[arg-type]
        return
    (drawn,) = sampling.draw(process, exact, chosen, None, 150, seed=1, batch=150, how=how)  # type: ignore[arg-type]
    x = data.to_unit(drawn).astype(np.float64)
    assert abs(x.mean() - Exact.mean - shift) < 0.03 and abs(x.std() - Exact.std) < 0.035, (x.mean(), x.std())


def test_the_mean_form_moves_a_mean_whose_x0_is_clipped() -> None:
    process = Process(config("ddpm"))
    exact, chosen = Exact(process), sampling.sampler(process, Sample("ddpm", 50))
    gradient = exact.gradient(1.0)
    model, options = sampling.guided(process, exact, chosen, None, sampling.Guide(gradient=gradient, form="mean"))  # type: ignore[arg-type]
    assert options == {"clip": None}
    x, t = np.full((2, 4, 4, 1), 3.0, np.float32), np.array([21, 21])  # x0 is 2.4 there
    clipped, free = (guidance.mean_guided(exact.predict, gradient(None), chosen.table, clip=c)(x, t) for c in ((-1, 1), None))
    np.testing.assert_array_equal(model(x, t), clipped)
    assert np.abs(clipped - free).max() > 0.1


class Classes:
    """A network of two classes, the null class and a variance: ε is class + 1 times a fixed image, v the class."""

    config, null = {"image_size": [4, 4], "in_channels": 1, "classes": 2}, 2
    image = np.random.default_rng(0).standard_normal((1, 4, 4, 1)).astype(np.float32)

    def predict(self, x: Any, t: Any, y: Any) -> Any:
        c = np.asarray(y, np.float32).reshape(-1, 1, 1, 1)
        return np.concatenate([(c + 1) * self.image, c + 0 * self.image], axis=-1)


def test_the_variance_is_not_guided_and_the_settings_of_guidance_reach_it() -> None:
    process = Process(config("ddpm", "train.loss=hybrid"))
    net, x, y, w = Classes(), np.zeros((2, 4, 4, 1), np.float32), np.array([0, 1]), 1.5
    t = np.array([900, 900])  # n/a is 60 at 900, and 0.08 at 20

    def answer(settings: Sample, name: str, t: Any = t) -> Any:
        chosen = sampling.sampler(process, Sample(name))
        model, _ = sampling.guided(process, net, chosen, y, sampling.guide(settings))  # type: ignore[arg-type]
        return model(x, t)

    eps = (y + 1).reshape(2, 1, 1, 1) * net.image
    wanted = (1 + w) * eps - w * 3 * net.image
    plain = answer(Sample(guidance=w), "learned")
    np.testing.assert_allclose(plain[..., :1], wanted, rtol=1e-5)
    np.testing.assert_array_equal(plain[..., 1], np.broadcast_to(y.reshape(2, 1, 1), (2, 4, 4)))
    np.testing.assert_array_equal(answer(Sample(guidance=w), "ddim"), plain[..., :1])  # which takes the mean alone
    rescaled = answer(Sample(guidance=w, rescale=1.0), "ddim")
    np.testing.assert_allclose(rescaled.std(axis=(1, 2, 3)), eps.std(axis=(1, 2, 3)), rtol=1e-5)
    for low, high, inside in ((0.0, 5.0, False), (5.0, 0.0, True), (50.0, 70.0, True), (70.0, 90.0, False)):
        got = answer(Sample(guidance=w, interval_low=low, interval_high=high), "ddim")
        np.testing.assert_allclose(got, wanted if inside else eps, rtol=1e-5)
    low_time = answer(Sample(guidance=w, interval_low=5.0), "ddim", np.array([20, 20]))
    np.testing.assert_allclose(low_time, eps, rtol=1e-6)
    with pytest.raises(ValueError, match="interval_high must be 0 or at least"):
        sampling.sampler(process, Sample("ddim", interval_low=2.0, interval_high=1.0))


# ------------------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("ncsn", []),
        ("vpsde", ["train.weighting=likelihood"]),
        ("vesde", ["train.weighting=likelihood", "train.importance=false"]),
        ("subvpsde", []),
    ],
)
def test_every_method_trains_resumes_bit_for_bit_and_samples(
    images: Path, stopped_after: Any, capsys: pytest.CaptureFixture[str], method: str, more: list[str]
) -> None:
    own = SAMPLERS[method][0]
    more = [*more, f"sample.steps={FEW.get(own, 4)}", "log.samples=2", "model.dropout=0.1", "data.flip=true"]
    assert train.main(words(images, method, *more, name="whole")) == 0
    assert stopped_after(2, lambda: train.main(words(images, method, *more))) == 128 + signal.SIGTERM
    assert train.main(["--resume", str(run_of(images)), "--device", "cpu", "--quiet"]) == 0
    assert last(run_of(images)).read_bytes() == last(run_of(images, "whole")).read_bytes()
    assert (run_of(images, "whole") / "samples" / "step_00000002.png").exists()

    written = configs.from_dict(tomllib.loads((run_of(images) / "config.toml").read_text()))
    assert (written.method, written.sample.sampler) == (method, own)
    assert train.main(["--config", str(run_of(images) / "config.toml"), *words(images, method, name="again")[4:10]]) == 0
    assert last(run_of(images, "again")).read_bytes() == last(run_of(images)).read_bytes()

    for name in {own, "pc", "ddpm", "flow"}:
        steps = ["--steps", str(FEW.get(name, 4))] if name != "flow" else ["--set", "sample.tolerance=0.1"]
        drawn = {}
        for size in (5, 2):
            out = images.parent / f"{size}.h5"
            where = ["--n", "5", "--batch", str(size), "--out", str(out), "--quiet", "--device", "cpu"]
            assert sample.main([str(run_of(images)), "--sampler", name, *steps, *where]) == 0, capsys.readouterr().err
            with h5py.File(out) as f:
                drawn[size] = f["images"][:].astype(int)
                assert (f.attrs["method"], f.attrs["sampler"]) == (method, name)
        if name != "flow":  # its steps are those of the whole batch
            assert np.abs(drawn[5] - drawn[2]).max() <= 1, name
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("own", [["train.loss=hybrid"], ["train.weighting=p2", "diffusion.prediction=v"]])
def test_times_drawn_by_their_losses_go_on_bit_for_bit(
    images: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: Any, capsys: pytest.CaptureFixture[str], own: list[str]
) -> None:
    """Their history is in the checkpoint: stopped before and after it is full, and resumed, the run is the unbroken one."""
    monkeypatch.setattr(methods.variance, "ImportanceTimes", partial(variance.ImportanceTimes, history=2))
    more = [*own, "train.importance=true", "diffusion.T=5", "diffusion.schedule=cosine", "sample.steps=3"]
    assert train.main(words(images, "ddpm", *more, name="whole", steps=12)) == 0
    warm: list[bool] = []
    for k in (1, 10):
        given = words(images, "ddpm", *more, name=f"r{k}", steps=12)
        seen = stopped_after(k + 1, partial(train.main, given), lambda t: warm.append(t.process.history.warm))
        assert seen == 128 + signal.SIGTERM
        assert train.main(["--resume", str(run_of(images, f"r{k}")), "--device", "cpu", "--quiet"]) == 0
        assert last(run_of(images, f"r{k}")).read_bytes() == last(run_of(images, "whole")).read_bytes()
    assert warm == [False, True]
    arrays, meta = checkpoint.load(last(run_of(images, "whole")))
    assert arrays["importance/counts"].tolist() == [2] * 5 and meta["config"]["train"]["importance"] == "true"
    assert train.main(words(images, "ddpm", *own, *more[-3:], name="uniform", steps=12)) == 0
    other, _ = checkpoint.load(last(run_of(images, "uniform")))
    assert not np.array_equal(other["weights/conv_in.weight"], arrays["weights/conv_in.weight"])
    assert "importance/counts" not in other

    learned = own == ["train.loss=hybrid"]
    assert meta["model"]["out_channels"] == 1 + learned
    for name in ("learned", "ddim") if learned else ("ddim",):
        out = images.parent / f"{name}.h5"
        asked = [] if name == "learned" else ["--sampler", name]  # learned is the run's own
        where = ["--n", "4", "--out", str(out), "--quiet", "--device", "cpu"]
        assert sample.main([str(run_of(images, "whole")), *asked, *where]) == 0
        with h5py.File(out) as f:
            assert f["images"].shape[:3] == (4, 4, 4) and f.attrs["sampler"] == name
    capsys.readouterr()
    if learned:
        again = ["--resume", str(run_of(images, "whole")), "--set", "train.loss=simple", "--set", "sample.sampler=ddim"]
        assert train.main([*again, "--device", "cpu", "--quiet"]) == 2
        assert "a resumed run cannot change train.loss: its checkpoint has hybrid" in capsys.readouterr().err


def test_importance_weighs_the_loss_and_remembers_it_without_its_weight() -> None:
    process = Process(config("ddpm", "train.importance=true", "diffusion.T=6", "diffusion.schedule=cosine"))
    history = process.history
    assert history is not None and Process(config("ddpm")).history is None
    history.losses[:], history.counts[:] = np.arange(1, 7)[:, None], 10
    example = process.example(batch(), seed=3, step=5)
    p = np.arange(1, 7) / 21 * 0.999 + 0.001 / 6
    np.testing.assert_allclose(example.share, 1 / (6 * p[example.times - 1]), rtol=1e-9)
    F = batch()[::-1].copy()
    value, gradient = process.loss(F, example)
    plain, slope = losses.weighted_loss(F, example.target)
    np.testing.assert_allclose(value, example.share * plain, rtol=1e-5)
    np.testing.assert_allclose(gradient, example.share.reshape(-1, 1, 1, 1) * slope, rtol=1e-5)
    process.learn(example, value)
    last_at = {int(t): v for t, v in zip(example.times, plain, strict=True)}
    for t, v in last_at.items():
        assert history.losses[t - 1, -1] == pytest.approx(v, rel=1e-5)


def test_the_hybrid_loss_is_that_of_core_and_its_weights_are_p2() -> None:
    process = Process(config("ddpm", "train.loss=hybrid", "train.weighting=p2"))
    example = process.example(batch(), seed=3, step=5)
    output = np.random.default_rng(1).standard_normal((64, 4, 4, 2), np.float32)
    s: Any = process.levels
    simple = losses.p2_weight(example.times, s)
    want = variance.hybrid_loss(output, example.target, example.times, s, x0=example.x0, simple_weight=simple)
    for a, b in zip(process.loss(output, example), want, strict=True):
        np.testing.assert_array_equal(a, b)
    assert abs(want[0].mean() - losses.weighted_loss(output[..., :1], example.target, simple)[0].mean()) > 1e-4


@pytest.mark.parametrize("method", ["ncsn", "vpsde"])
def test_digits_from_one_command(tmp_path: Path, method: str) -> None:
    """Nothing given but the method: σ_max and the levels come from the images, and the sheet from the method's own sampler."""
    few = ["sample.steps=1", "sample.columns=1", "model.channels=8,8", "model.blocks=1", "train.batch=16"]
    sets = [w for s in [f"method={method}", *few] for w in ("--set", s)]
    where = ["--steps", "3", "--out", str(tmp_path), "--name", "d", "--device", "cpu", "--quiet"]
    assert train.main([*where, *sets]) == 0
    written = tomllib.loads((tmp_path / "d" / "config.toml").read_text())
    assert written["sample"]["sampler"] == SAMPLERS[method][0] and "schedule" not in written["diffusion"]
    assert (tmp_path / "d" / "samples" / "final_00000003.png").exists()
    if method == "ncsn":
        x = data.to_unit(data.load("digits").batch(0, 1000)[0]).reshape(1000, 64).astype(np.float64)
        far = max(np.sqrt(((x - row) ** 2).sum(axis=1).max()) for row in x)
        assert abs(written["diffusion"]["sigma_max"] - far) < 0.01 and 15 < written["diffusion"]["levels"] < 40
    assert sample.main([str(tmp_path / "d"), "--n", "2", "--out", str(tmp_path / "x.png"), "--quiet", "--device", "cpu"]) == 0


def test_a_checkpoint_from_before_there_were_methods_is_ddpm(images: Path) -> None:
    more = ["sample.steps=4"]
    assert train.main(words(images, "ddpm", *more)) == 0
    arrays, meta = checkpoint.load(last(run_of(images)))
    assert meta["config"].pop("method") == "ddpm"
    meta["config"]["sample"] |= {"sampler": "ddim", "steps": 4, "eta": 0.0}
    old = images.parent / "old.h5"
    checkpoint.save(old, arrays, meta)
    drawn = []
    for path in (old, run_of(images)):
        assert sample.main([str(path), "--n", "3", "--out", str(images.parent / "x.h5"), "--quiet", "--device", "cpu"]) == 0
        with h5py.File(images.parent / "x.h5") as f:
            drawn.append(f["images"][:])
    np.testing.assert_array_equal(*drawn)
    where = ["--out", str(images.parent / "runs"), "--name", "b", "--steps", "6", "--device", "cpu", "--quiet"]
    assert train.main(["--resume", str(old), *where]) == 0
    assert train.main(words(images, "ddpm", *more, name="whole", steps=6)) == 0
    assert checkpoint.load(last(run_of(images, "b")))[1]["config"]["method"] == "ddpm"


# ------------------------------------------------------------------------------------------------------------------- mistakes


def test_names_are_the_same_everywhere() -> None:
    assert tuple(methods.METHODS) == GAUSSIAN and tuple(families.FAMILIES) == METHODS == tuple(SAMPLERS)
    assert {name for names in SAMPLERS.values() for name in names} == set(configs.STEPS)
    assert set(sampling.TABLES) | {"flow", "langevin"} == set(configs.CONTINUOUS)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["method=nscn"],
            "not 'nscn'; the nearest is 'ncsn'",
        ),
        (["diffusion.levels=9"], "diffusion.levels goes with the method ncsn, not with ddpm"),
        (["method=ncsn", "diffusion.T=1000"], "diffusion.T goes with the methods ddpm, multinomial, d3pm"),
        (["method=vpsde", "diffusion.sigma_max=9"], "diffusion.sigma_max goes with the methods ncsn, vesde, not with vpsde"),
        (["method=vesde", "diffusion.beta_max=9"], "diffusion.beta_max goes with the methods vpsde, subvpsde, not with vesde"),
        (["method=ncsn", "train.importance=false"], "goes with the methods ddpm, vpsde, vesde, subvpsde, not with ncsn"),
        (["method=ncsn", "sample.sampler=ddpm", "train.loss=hybrid"], "train.loss goes with the method ddpm, not with ncsn"),
        (["sample.sampler=learned"], "learned needs a network that has learned its variance (train.loss=hybrid)"),
        (
            ["sample.sampler=heun", "sample.order=3"],
            "goes with the samplers dpm, dpm++, dpm++sde, ab, deis, unipc, not with heun",
        ),
        (["sample.sampler=pc", "sample.threshold=0.9"], "[sample]: threshold does not go with the sampler pc"),
        (["sample.sampler=pndm", "sample.steps=3"], "[sample]: steps must be at least 4 for pndm"),
        (["method=ncsn", "train.weighting=likelihood"], "train.weighting must be one of simple for method ncsn"),
        (["train.weighting=likelihood"], "train.weighting must be one of simple, min_snr, p2 for method ddpm"),
        (["method=vpsde", "train.weighting=min_snr"], "one of simple, likelihood for method vpsde"),
        (["method=vpsde", "sample.sampler=langevin"], "for method vpsde, not 'langevin'"),
        (["sample.snr=0.2"], "sample.snr goes with the sampler pc, not with ddim"),
        (["method=vpsde", "sample.epsilon=1e-5"], "sample.epsilon goes with the sampler langevin, not with pc"),
        (["method=ncsn", "diffusion.sigma_min=20"], "sigma_min must be in (0, 9."),
        (["method=vesde", "diffusion.sigma_min=3", "diffusion.sigma_max=2"], "[diffusion]: sigma_min and sigma_max must satisfy"),
        (["method=subvpsde", "diffusion.beta_min=30"], "[diffusion]: beta_min and beta_max must satisfy"),
        (["method=ncsn", "diffusion.levels=1"], "[diffusion]: levels must be 0 or at least 2"),
        (["method=ncsn", "sample.epsilon=0.5"], "[sample]: epsilon must be in (0, 0.0004)"),
        (["method=ncsn", "sample.sampler=ddim", "sample.steps=50"], "[sample]: steps must be in 1..24"),
        (["method=vpsde", "sample.sampler=flow", "sample.steps=50"], "[sample]: steps do not go with the sampler flow"),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sets: list[str], message: str
) -> None:
    where = ["--out", str(tmp_path), "--device", "cpu", "--quiet", "--dry-run"]
    assert train.main([*where, *(w for s in sets for w in ("--set", s))]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not list(tmp_path.iterdir()), err


def test_a_resumed_run_keeps_its_method(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(images, "vesde", "sample.steps=2", steps=2)) == 0
    for change, message in (
        ("method=ncsn", "cannot change method: its checkpoint has vesde"),
        ("diffusion.sigma_max=9", "cannot change diffusion.sigma_max: its checkpoint has"),
    ):
        more = ["--set", change, *(["--set", "sample.sampler=ddim"] if "method" in change else [])]
        assert train.main(["--resume", str(run_of(images)), "--device", "cpu", "--quiet", *more]) == 2
        assert message in capsys.readouterr().err


def test_sampling_says_what_does_not_go(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words(images, "vpsde", "sample.steps=2", steps=2)) == 0
    for more, message in (
        (["--sampler", "langevin"], "must be one of pc, ddim, ddpm"),
        (["--sampler", "flow", "--steps", "5"], "steps do not go with the sampler flow"),
        (["--sampler", "flow", "--spacing", "trailing"], "spacing does not go with the sampler flow"),
        (["--sampler", "heun", "--set", "sample.snr=0.1"], "sample.snr goes with the sampler pc, not with heun"),
        (["--set", "train.lr=1"], "--set takes settings of [sample]"),
        (["--set", "sample.snr=x"], "sample.snr must be a number"),
        (["--set", "sample.snr=0"], "sample.snr must be in 0.0001..10.0"),
    ):
        assert sample.main([str(run_of(images)), *more, "--device", "cpu", "--quiet", "--out", str(images.parent / "x.h5")]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("method", ["ncsn", "vesde"])
def test_added_noise_is_taken_away_from_its_largest_level_on(method: str) -> None:
    with pytest.raises(ValueError, match="must start at its largest noise level"):
        sampling.sampler(Process(config(method)), Sample("ddim", 5), "leading")


def test_one_image_has_no_largest_distance(images: Path) -> None:
    few = data.Dataset(np.zeros((1, 4, 4, 1), np.uint8))
    with pytest.raises(ConfigError, match="sigma_max must be given"):
        methods.resolved(configs.from_words(["method=vesde"]), few)
