"""The noise-aware classifier: values and gradients against PyTorch, its loss, guidance by it, and the program that trains it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import data, forward, guidance, samplers, schedules, tables
from alphabar.core.mixture import GaussianMixture
from alphabar.nets import AdamW, Tensor, UNet, checkpoint, gradcheck, jvp, no_grad, time_features
from alphabar.nets.classifier import Classifier, cross_entropy, mean_places
from alphabar.tools import config as configs
from alphabar.tools import train_classifier
from alphabar.tools.trainer import Trainer
from tests import fake_cupy


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use(request.param):
        yield request.param


def small(dtype: str = "float64", seed: int = 3, **options: Any) -> Classifier:
    """A small network with no weight at zero and no bias."""
    config = {"channels": (8, 16), "groups": 4, "attention": (4,), "classes": 3, "zero_init": False} | options
    net = Classifier(8, dtype=dtype, seed=seed, **config)
    rng = np.random.default_rng(seed)
    for value in net.params.arrays().values():
        if value.ndim == 1:
            value += rng.standard_normal(value.shape) / 4
    return net


def batch(net: Classifier, n: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, *net.config["image_size"], net.config["in_channels"])).astype(net.config["dtype"])
    return x, rng.integers(1, 1001, n), rng.integers(0, net.config["classes"], n)


def torch_logits(net: Classifier, x: Any, t: np.ndarray, w: dict[str, Any]) -> Any:
    """The same network written in PyTorch, functionally; x NCHW."""
    import torch
    from torch.nn import functional as F

    c = net.config

    def conv(name: str, x: Any, stride: int = 1) -> Any:
        kernel = w[f"{name}.weight"].permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, w[f"{name}.bias"], stride, padding=kernel.shape[-1] // 2)

    def norm(name: str, x: Any) -> Any:
        return F.group_norm(x, c["groups"], w[f"{name}.weight"], w[f"{name}.bias"], c["norm_eps"])

    def linear(name: str, x: Any) -> Any:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    features = torch.from_numpy(time_features(t.astype(np.float64), c["channels"][0])).to(x.dtype)
    emb = linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", features)))
    columns = iter(torch.split(linear("time_emb_proj", F.silu(emb)), [n for _, _, n in net.projections.blocks], 1))

    def block(name: str, x: Any) -> Any:
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        e = next(columns)[:, :, None, None]
        if c["scale_shift"]:
            scale, shift = e.chunk(2, 1)
            h = F.silu(norm(f"{name}.norm2", h) * (1 + scale) + shift)
        else:
            h = F.silu(norm(f"{name}.norm2", h + e))
        return (conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in w else x) + conv(f"{name}.conv2", h)

    def attend(name: str, x: Any) -> Any:
        n = norm(f"{name}.group_norm", x)
        heads = 1 if c["head_dim"] is None else x.shape[1] // c["head_dim"]
        q, k, v = (
            conv(f"{name}.to_{z}", n).flatten(2).unflatten(1, (heads, x.shape[1] // heads)).transpose(-1, -2) for z in "qkv"
        )
        o = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2).reshape(x.shape)
        return x + conv(f"{name}.to_out.0", o)

    h = conv("conv_in", x)
    sides = [c["image_size"][0] >> i for i in range(len(c["channels"]))]
    for i, side in enumerate(sides):
        for j in range(c["blocks"]):
            h = block(f"down_blocks.{i}.resnets.{j}", h)
            if side in c["attention"]:
                h = attend(f"down_blocks.{i}.attentions.{j}", h)
        if i < len(sides) - 1:
            h = conv(f"down_blocks.{i}.downsamplers.0.conv", h, 2)
    if c["middle"] != "none":
        h = block("mid_block.resnets.0", h)
        h = attend("mid_block.attentions.0", h) if c["middle"] == "attention" else h
        h = block("mid_block.resnets.1", h)
    return linear("head", F.silu(norm("norm_out", h)).mean((2, 3)))


NETS: dict[str, dict[str, Any]] = {
    "plain": {"middle": "plain", "attention": ()},
    "attention": {"head_dim": 8, "blocks": 2},
    "scale_shift": {"scale_shift": True, "in_channels": 3, "middle": "none"},
}
each = pytest.mark.parametrize("name", NETS)


# ------------------------------------------------------------------------------------------------------ values and gradients


@each
def test_values_and_all_gradients_are_those_of_torch(name: str, backend: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle here")
    net = small(**NETS[name])
    x, t, y = batch(net)
    w = {k: torch.tensor(v, requires_grad=True) for k, v in net.params.arrays().items()}
    xt = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    want = torch_logits(net, xt, t, w)
    loss = torch.nn.functional.cross_entropy(want, torch.from_numpy(y), reduction="none")
    loss.mean().backward()

    start = Tensor(x, needs_grad=True)
    logits = net(start, t)
    value, gradient = cross_entropy(logits.data, y)
    np.testing.assert_allclose(logits.data, want.detach().numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-10)
    logits.backward(gradient)
    assert start.grad is not None
    np.testing.assert_allclose(start.grad, xt.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-8, atol=1e-13)
    for key, grad in net.params.gradients().items():
        np.testing.assert_allclose(grad, w[key].grad.numpy(), rtol=1e-8, atol=1e-12, err_msg=key)


@each
def test_the_gradient_of_log_p_is_that_of_torch_and_leaves_the_parameters_alone(name: str) -> None:
    torch = pytest.importorskip("torch")
    net = small(**NETS[name])
    x, t, y = batch(net)
    w = {k: torch.tensor(v) for k, v in net.params.arrays().items()}
    xt = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    torch.log_softmax(torch_logits(net, xt, t, w), 1)[range(4), y].sum().backward()
    want = xt.grad.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(net.log_prob_gradient(x, t, y), want, rtol=1e-8, atol=1e-13)
    assert not net.params.grad.any()
    foreign = net.log_prob_gradient(torch.from_numpy(x), torch.from_numpy(t), torch.from_numpy(y))
    assert isinstance(foreign, torch.Tensor)
    np.testing.assert_allclose(foreign.numpy(), want, rtol=1e-8, atol=1e-13)
    np.testing.assert_array_equal(net.log_prob_gradient(x, t, 1), net.log_prob_gradient(x, t, np.full(4, 1)))
    with no_grad():  # a sampler may run without a tape
        np.testing.assert_array_equal(net.log_prob_gradient(x, t, 1), net.log_prob_gradient(x, t, np.full(4, 1)))


def test_float32_is_near_float64() -> None:
    exact, net = small(), small("float32")
    x, t, y = batch(net)
    np.testing.assert_allclose(net.predict(x, t), exact.predict(x.astype(np.float64), t), atol=2e-5)
    wide = exact.log_prob_gradient(x.astype(np.float64), t, y)
    np.testing.assert_allclose(net.log_prob_gradient(x, t, y), wide, atol=1e-4 * np.abs(wide).max())


def test_gradients_of_the_mean_over_places_and_tangents() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 5, 4))
    np.testing.assert_allclose(mean_places(Tensor(x)).data, x.mean(axis=(1, 2)), rtol=1e-13)
    gradcheck(mean_places, x)
    net = small()
    x, t, _ = batch(net)
    v = rng.standard_normal(x.shape)
    _, product = jvp(lambda z: net(z, t), x, v)
    h = 1e-5
    np.testing.assert_allclose(product, (net.predict(x + h * v, t) - net.predict(x - h * v, t)) / (2 * h), rtol=1e-6, atol=1e-8)


def test_cross_entropy_is_that_of_torch_and_stands_large_logits() -> None:
    torch = pytest.importorskip("torch")
    logits = np.array([[1.0, 2.0, -3.0], [800.0, -800.0, 0.0], [-1e4, -1e4, -1e4]])
    y = np.array([2, 0, 1])
    z = torch.tensor(logits, requires_grad=True)
    want = torch.nn.functional.cross_entropy(z, torch.from_numpy(y), reduction="none")
    want.mean().backward()
    value, gradient = cross_entropy(logits, y)
    np.testing.assert_allclose(value, want.detach().numpy(), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=1e-12, atol=1e-15)
    assert cross_entropy(logits.astype(np.float32), y)[1].dtype == np.float32
    assert isinstance(cross_entropy(torch.from_numpy(logits), torch.from_numpy(y))[0], torch.Tensor)
    for words, error, arguments in (
        (r"y must be in 0\.\.2", ValueError, (logits, np.array([0, 1, 3]))),
        (r"y must have shape \(3,\)", ValueError, (logits, [0, 1])),
        ("y must be integers", TypeError, (logits, [0.0, 1.0, 2.0])),
        ("logits must be floats", ValueError, (logits[0], y)),
    ):
        with pytest.raises(error, match=words):
            cross_entropy(*arguments)


# -------------------------------------------------------------------------------------------------------------------- promises


def test_a_configuration_gives_the_same_network_again() -> None:
    net = Classifier((8, 16), 3, 5, (8, 16), attention=(4,), seed=11)
    again = Classifier(**json.loads(json.dumps(net.config)))
    np.testing.assert_array_equal(again.params.data, net.params.data)
    x, t, _ = batch(net)
    assert net.predict(x, t).shape == (4, 5) and not net.predict(x, t).any()  # all classes alike at first
    names = set(UNet((8, 16), 3, channels=(8, 16), blocks=1, attention=(4,)).params)
    assert {n for n in net.params if n not in names} == {"norm_out.weight", "norm_out.bias", "head.weight", "head.bias"}


def test_dropout_needs_its_step_and_only_in_training() -> None:
    net = small(dropout=0.5)
    x, t, y = batch(net)
    with pytest.raises(ValueError, match="needs step="):
        net(x, t)
    first, second = (net(x, t, step=k).data.copy() for k in (0, 1))
    assert not np.array_equal(first, second) and np.array_equal(first, net(x, t, step=0).data)
    assert np.isfinite(net.log_prob_gradient(x, t, y)).all()


def test_arguments_that_do_not_fit_are_named() -> None:
    net = small()
    x, t, _ = batch(net)
    for words, error, arguments in (
        ("x must have shape", ValueError, (x[:, :4], t)),
        ("the dtypes must be equal", TypeError, (x.astype(np.float32), t)),
        ("t must have shape", ValueError, (x, t[:2])),
        ("x must be an array", TypeError, ([1.0], t)),
    ):
        with pytest.raises(error, match=words):
            net(*arguments)
    for words, options in (
        ("classes must be an integer of at least 2", {"classes": 1}),
        ("groups must divide", {"groups": 3}),
        ("attention must name sides", {"attention": (5,)}),
    ):
        with pytest.raises(ValueError, match=words):
            small(**options)


def test_the_same_code_runs_on_arrays_that_refuse_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def run(net: Classifier) -> list[np.ndarray]:
        xp = net.params.xp
        x, t, y = batch(net)
        x, y = xp.asarray(x), xp.asarray(y)
        logits = net(x, t, step=0)
        value, gradient = cross_entropy(logits.data, y)
        logits.backward(gradient)
        arrays = [value, net.params.grad, net.predict(x, xp.asarray(t)), net.log_prob_gradient(x, xp.asarray(t), y)]
        assert all(isinstance(a, xp.ndarray) for a in arrays)
        return [a if isinstance(a, np.ndarray) else a.get() for a in arrays]

    config = small("float32", dropout=0.2).config
    with kernels.use("reference"):
        for there, here in zip(run(Classifier(**config, xp=cupy)), run(Classifier(**config)), strict=True):
            np.testing.assert_array_equal(there, here)
        with pytest.raises(TypeError, match="x is of numpy, the network of cupy"):
            Classifier(**config, xp=cupy).predict(*batch(Classifier(**config))[:2])


# -------------------------------------------------------------------------------------------------------- what it is there for


def test_a_trained_classifier_guides_to_its_class() -> None:
    """Two classes of 4×4 images, upright and level stripes in noise; the gradient found by training, the law exact."""
    s = schedules.linear(100, rescale=True)
    stripes = np.where(np.arange(4) % 2 == 0, 0.5, -0.5) * np.ones((4, 4))
    means, std = np.stack([stripes, stripes.T]).reshape(2, 16), 0.6
    law, one = GaussianMixture([0.5, 0.5], means, std**2), GaussianMixture([1.0], means[1:], std**2)
    net = Classifier(4, classes=2, channels=(16,), groups=4, middle="none", seed=1)
    optimiser = AdamW(net.params, max_norm=1.0)
    with kernels.Pool():
        for k in range(150):
            rng = np.random.default_rng(k)
            y = rng.integers(0, 2, 64)
            x0 = (means[y] + std * rng.standard_normal((64, 16))).reshape(-1, 4, 4, 1)
            t = forward.random_times(64, s, step=k)
            x_t, _ = forward.q_sample(x0.astype(np.float32), t, s, step=k)
            logits = net(x_t, t)
            _, gradient = cross_entropy(logits.data, y)
            net.params.zero_grad()
            logits.backward(gradient)
            optimiser.step(1e-2)

    def flat(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, 16)

    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return law.model(s)(flat(x), t).reshape(x.shape)

    def gradient_of(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return net.log_prob_gradient(x, t, 1)

    # near the exact gradient, which that of a classifier of clean data, asked at x_t, is far from (S0-C14)
    x, _ = forward.q_sample(law.sample(400, seed=5).reshape(-1, 4, 4, 1).astype(np.float32), 50, s, seed=6)
    a, n = s.signal[50], s.noise[50]
    exact = one.diffuse(a, n).score(flat(x)) - law.diffuse(a, n).score(flat(x))
    clean = one.score(flat(x)) - law.score(flat(x))
    got = flat(gradient_of(x, np.full(400, 50)))
    error, wrong = (np.mean((g - exact) ** 2) / np.mean(exact**2) for g in (got, clean))
    assert error < 0.6 and wrong > 100
    x_T, table = samplers.prior((400, 4, 4, 1), seed=3), tables.ddpm(s, 15)
    share, spread = [], []
    for w in (0.0, 1.0, 4.0):
        out = samplers.sample(guidance.classifier_guided(model, gradient_of, s, w), table, x_T)
        share.append(np.exp(np.log(0.5) + one.log_prob(flat(out)) - law.log_prob(flat(out))).mean())
        spread.append(flat(out).var(axis=0).sum())
    assert share[0] == pytest.approx(0.5, abs=0.1) and share[1] > 0.85 and share[2] > share[1]
    assert spread[0] > spread[1] > spread[2]


# ----------------------------------------------------------------------------------------------------------------- the program


SETTINGS = {"model": {"channels": [8, 16], "blocks": 1, "groups": 4, "attention": []}, "train": {"steps": 1, "batch": 4}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a run on the digits that has not trained yet; its network reads the state times a factor."""
    config = configs.from_dict({"method": "ncsn", **SETTINGS, "diffusion": {"sigma_max": 8.0, "levels": 30}})
    path = tmp_path_factory.mktemp("run") / "ckpt" / "step_00000000.h5"
    path.parent.mkdir()
    checkpoint.save(path, *Trainer(config, data.load("digits", "train")).state())
    return path


def test_the_program_trains_a_classifier_of_noised_digits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_classifier.main([str(run), "--steps", "60", "--batch", "64", "--lr", "1e-2", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    path = run.parent.parent / "classifier.h5"
    assert str(path) in shown and shown.count("accuracy") == 4
    noisy = train_classifier.load(path)
    digits = data.load("digits", "test")
    images, labels, _ = digits.batch(0, 200)
    x0 = data.to_unit(images)
    t = np.full(200, 5)
    logits = noisy.net.predict(noisy.process.input(x0, t), t)
    assert np.mean(logits.argmax(axis=1) == labels) > 0.3  # of ten classes
    # the gradient is that with respect to the state of the process: a small step along it raises log p by its length
    t = np.full(200, 22)  # σ is 1.3
    x, _ = forward.q_sample(x0, t, noisy.process.levels, seed=1)
    g = noisy.gradient(labels)(x, t)
    h = np.float32(1e-2) / np.sqrt((g**2).sum(axis=(1, 2, 3), keepdims=True) + 1e-12)
    before, after = (-cross_entropy(noisy.net.predict(noisy.process.input(z, t), t), labels)[0] for z in (x, x + h * g))
    np.testing.assert_allclose((after - before).mean(), (h * g**2).sum(axis=(1, 2, 3)).mean(), rtol=0.1)


def test_the_program_repeats_itself_and_names_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--steps", "3", "--batch", "8", "--device", "cpu", "--quiet"]
    with kernels.use("reference"):
        assert [train_classifier.main([*words, "--out", str(tmp_path / name)]) for name in ("a.h5", "b.h5")] == [0, 0]
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert train_classifier.main([str(tmp_path / "none"), "--quiet"]) == 2
    assert train_classifier.main([str(tmp_path / "a.h5"), "--quiet"]) == 2
    assert "alphabar-classifier" in capsys.readouterr().err
    with pytest.raises(checkpoint.CheckpointError, match="alphabar-training"):
        train_classifier.load(run)
