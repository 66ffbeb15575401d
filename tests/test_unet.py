"""The U-Net against stored outputs of diffusers, diffusers itself, a functional PyTorch U-Net, and its own promises."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.nets import (
    AdamW,
    CheckpointError,
    Tensor,
    UNet,
    gradcheck,
    load_diffusers_unet,
    no_grad,
    save_diffusers_unet,
)
from tests import fake_cupy

DATA = Path(__file__).parent / "data"
JSON, WEIGHTS = DATA / "unet_default.json", DATA / "unet_default.safetensors"


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use(request.param):
        yield request.param


def small(dtype: str = "float32", size: Any = 8, seed: int = 3, **options: Any) -> UNet:
    """A small network with no weight at zero."""
    config: dict[str, Any] = {"channels": (8, 16), "blocks": 1, "groups": 4, "attention": (4,), "zero_init": False} | options
    net = UNet(size, dtype=dtype, seed=seed, **config)
    rng = np.random.default_rng(seed)
    for name, value in net.params.arrays().items():
        if value.ndim == 1:  # norms and biases away from one and zero
            value += rng.standard_normal(value.shape) / 4
        if name == "conv_out.weight":
            value *= 3
    return net


def arguments(net: UNet, batch: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    c = net.config
    x = rng.standard_normal((batch, *c["image_size"], c["in_channels"])).astype(c["dtype"])
    y = None if c["classes"] is None else rng.integers(0, c["classes"] + c["null_class"], batch)
    return x, rng.integers(1, 1001, batch), y


# ------------------------------------------------------------------------------------------------------- diffusers, stored


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    pytest.importorskip("safetensors", reason="the weights are a .safetensors file")
    return dict(np.load(DATA / "unet_default.npz"))


def of_stored(net: UNet, stored: dict[str, np.ndarray]) -> np.ndarray:
    x = stored["x"].astype(net.config["dtype"]).transpose(0, 2, 3, 1)
    return net.predict(x, stored["t"] + 1).transpose(0, 3, 1, 2)  # diffusers counts from 0


def test_stored_outputs_in_float64(stored: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    net = load_diffusers_unet(JSON, WEIGHTS, dtype="float64")
    # the library makes sines in float32 for float64 networks too, and not correctly rounded: three differ in the last bit
    np.testing.assert_allclose(of_stored(net, stored), stored["y64"], rtol=0, atol=1e-8)
    monkeypatch.setattr(net.time, "features", lambda t: stored["features"].astype(np.float64))
    np.testing.assert_allclose(of_stored(net, stored), stored["y64"], rtol=0, atol=1e-12)


def test_stored_outputs_in_float32(stored: dict[str, np.ndarray], backend: str) -> None:
    np.testing.assert_allclose(of_stored(load_diffusers_unet(JSON, WEIGHTS), stored), stored["y32"], rtol=0, atol=5e-6)


def test_files_that_do_not_fit(tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
    config = json.loads(JSON.read_text())

    def refused(words: str, weights: Path = WEIGHTS, text: str | None = None, **changes: Any) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config | changes) if text is None else text)
        with pytest.raises(CheckpointError, match=words):
            load_diffusers_unet(path, weights)

    refused("act_fn = 'gelu' is not supported", act_fn="gelu")
    refused("down_block_types holds 'SkipDownBlock2D'", down_block_types=["SkipDownBlock2D", "DownBlock2D"])
    refused("one entry for each", down_block_types=["DownBlock2D"])
    refused("sample_size", sample_size=None)
    refused("shape", block_out_channels=[32, 96])
    refused("groups must divide", norm_num_groups=7)
    refused("missing", layers_per_block=2)
    refused("not used", add_attention=False)
    refused("config.json", text="{")
    refused("config.json", text="[1]")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(WEIGHTS.read_bytes()[:1000])
    refused("broken.safetensors", broken)
    with pytest.raises(FileNotFoundError):
        load_diffusers_unet(JSON, tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        load_diffusers_unet(tmp_path)
    with pytest.raises(ValueError, match="weights must be given"):
        load_diffusers_unet(JSON)


def test_a_saved_network_comes_back(tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
    net = load_diffusers_unet(JSON, WEIGHTS)
    save_diffusers_unet(net, tmp_path)
    again = load_diffusers_unet(tmp_path)
    np.testing.assert_array_equal(again.params.data, net.params.data)
    from safetensors.numpy import load_file

    before, after = load_file(WEIGHTS), load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])


@pytest.mark.parametrize("cos_first", [False, True])
def test_saving_turns_the_times_to_the_count_from_0(tmp_path: Path, cos_first: bool, stored: dict[str, np.ndarray]) -> None:
    net = small("float64", classes=5, flip_sin_to_cos=cos_first, size=(8, 16), middle="plain", head_dim=4)
    save_diffusers_unet(net, tmp_path)
    again = load_diffusers_unet(tmp_path, dtype="float64", null_class=True)
    assert (again.config["time_origin"], again.null, again.config["image_size"]) == (1, 5, [8, 16])
    again.time.options["dtype"] = "float64"
    x, t, y = arguments(net)
    np.testing.assert_allclose(again.predict(x, t, y), net.predict(x, t, y), atol=1e-12)


def test_what_diffusers_cannot_express_is_not_saved(tmp_path: Path, stored: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="middle_groups"):
        save_diffusers_unet(small(middle_groups=0), tmp_path)


def test_without_safetensors_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_diffusers_unet(JSON, WEIGHTS)


# --------------------------------------------------------------------------------------------------------- diffusers, live

PLAIN, ATTN = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
MODELS: dict[str, dict[str, Any]] = {
    "ddpm": {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
        "levels": (PLAIN, ATTN, PLAIN),
        "layers_per_block": 2,
    },
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "levels": (ATTN, ATTN), "num_class_embeds": 7},
    "scale_shift with norm in the middle": {
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 2,
        "levels": (ATTN, PLAIN),
        "time_embedding_dim": 24,
    },
    "no attention in the middle": {"add_attention": False, "levels": (PLAIN, PLAIN), "sample_size": (8, 16)},
    "one level": {"levels": (ATTN,), "attention_head_dim": 4, "in_channels": 1, "out_channels": 2},
    "no middle": {"mid_block_type": None, "levels": (PLAIN, ATTN)},
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_diffusers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle here")
    torch = pytest.importorskip("torch")
    options = dict(MODELS[name])
    levels = options.pop("levels")
    options = {
        "sample_size": 8,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "block_out_channels": (16, 32, 32)[: len(levels)],
        "down_block_types": tuple(down for down, _ in levels),
        "up_block_types": tuple(up for _, up in levels[::-1]),
    } | options
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    net = load_diffusers_unet(tmp_path, dtype="float64")
    assert net.params.count == sum(p.numel() for p in model.parameters())

    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, *net.config["image_size"], net.config["in_channels"]))
    t = np.array([0, 500, 999])
    y = None if net.config["classes"] is None else rng.integers(0, 7, 3)
    labels = None if y is None else torch.as_tensor(y)
    features = model.time_proj(torch.as_tensor(t)).double().numpy()
    monkeypatch.setattr(net.time, "features", lambda t: features)
    with torch.no_grad():
        theirs = model.double()(torch.as_tensor(x).permute(0, 3, 1, 2), torch.as_tensor(t), labels).sample
    np.testing.assert_allclose(net.predict(x, t + 1, y), theirs.permute(0, 2, 3, 1).numpy(), atol=1e-11)

    save_diffusers_unet(net, tmp_path / "ours")  # and the library reads what we write
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours", torch_dtype=torch.float64)
    with torch.no_grad():
        back = again(torch.as_tensor(x).permute(0, 3, 1, 2), torch.as_tensor(t), labels).sample
    np.testing.assert_array_equal(back.numpy(), theirs.numpy())


# ------------------------------------------------------------------------------------------------- gradients of the whole


@pytest.fixture(scope="module")
def torch_unet() -> ModuleType:
    pytest.importorskip("torch", reason="PyTorch is the oracle here")
    return importlib.import_module("tests.torch_unet")


NETS: dict[str, dict[str, Any]] = {
    "plain": {"attention": (False, False), "middle": "plain"},
    "attention and classes": {"attention": (True, True), "classes": 4, "head_dim": 4, "blocks": 2},
    "scale_shift": {"attention": (False, True), "scale_shift": True, "middle_groups": 0, "in_channels": 2, "out_channels": 3},
    "three levels": {
        "channels": (8, 8, 16),
        "attention": (False, True, False),
        "attention_up": (False, False, True),
        "downsample_pad": (0, 1),
        "flip_sin_to_cos": True,
        "freq_shift": 1.0,
        "time_origin": 1,
        "size": (16, 8),
        "norm_eps": 1e-3,
        "embedding_size": 20,
        "middle": "none",
    },
}


def run_ours(net: UNet, x: np.ndarray, t: np.ndarray, y: np.ndarray | None, dout: np.ndarray) -> dict[str, np.ndarray]:
    image = Tensor(x, needs_grad=True)
    net.params.zero_grad()
    out = net(image, t, y)
    out.backward(dout)
    return {"output": out.data, "input": image.grad} | net.params.gradients()


def run_theirs(module: ModuleType, net: UNet, x, t, y, dout, dtype: str) -> dict[str, np.ndarray]:
    import torch

    kind = getattr(torch, dtype)
    weights = {k: torch.tensor(v, dtype=kind, requires_grad=True) for k, v in net.params.arrays().items()}
    image = torch.tensor(x, dtype=kind, requires_grad=True)
    out = module.unet(net.config, weights, image, torch.as_tensor(t), None if y is None else torch.as_tensor(y))
    out.backward(torch.tensor(dout, dtype=kind))
    return {"output": out.detach().numpy(), "input": image.grad.numpy()} | {k: v.grad.numpy() for k, v in weights.items()}


@pytest.mark.parametrize("name", NETS)
def test_all_gradients_are_pytorchs_in_float64(name: str, torch_unet: ModuleType) -> None:
    net = small("float64", **NETS[name])
    x, t, y = arguments(net)
    dout = np.random.default_rng(1).standard_normal((*x.shape[:3], net.config["out_channels"]))
    ours, theirs = run_ours(net, x, t, y, dout), run_theirs(torch_unet, net, x, t, y, dout, "float64")
    assert ours.keys() == theirs.keys()
    for key in ours:
        scale = np.abs(theirs[key]).max()
        # a key's bias shifts all scores of a query alike: its true gradient is zero
        assert scale > 1e-6 or key.endswith("to_k.bias")
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-10 * max(scale, 1), err_msg=key)


DRAWS = range(1, 5)  # of the gradient at the output: an error of one draw may be small by chance


def draws(net: UNet, x: np.ndarray) -> Iterator[np.ndarray]:
    for seed in DRAWS:
        yield np.random.default_rng(seed).standard_normal((*x.shape[:3], net.config["out_channels"])).astype(np.float32)


def check_errors(net: UNet, batch: int, module: ModuleType, factor: float) -> float:
    """The errors of output and gradients are at most ``factor`` times PyTorch's, each and together; returns the output's."""
    x, t, y = arguments(net, batch)
    squares: dict[str, np.ndarray] = {}  # of our error, PyTorch's, and the values, over all draws
    for dout in draws(net, x):
        net.params.zero_grad()
        exact = run_theirs(module, net, x, t, y, dout, "float64")
        ours, theirs = run_ours(net, x, t, y, dout), run_theirs(module, net, x, t, y, dout, "float32")
        for key, e in exact.items():
            assert ours[key].dtype == np.float32
            squares[key] = squares.get(key, 0) + np.array([np.sum((v - e) ** 2) for v in (ours[key], theirs[key], 0 * e)])
    weights = np.sum([v for k, v in squares.items() if k not in ("output", "input")], axis=0)
    for key, (error, budget, size) in squares.items():
        if key in ("output", "input"):
            assert error**0.5 <= factor * budget**0.5 + 1e-7 * size**0.5, key
        else:  # of a single small gradient, the floor is a share of all gradients
            assert error**0.5 <= factor * budget**0.5 + 1e-6 * size**0.5 + 1e-8 * weights[2] ** 0.5, key
    assert weights[0] <= factor**2 * weights[1]
    return float((squares["output"][0] / squares["output"][2]) ** 0.5)


@pytest.mark.parametrize("name", NETS)
def test_the_float32_error_of_all_gradients_is_at_most_twice_pytorchs(name: str, torch_unet: ModuleType, backend: str) -> None:
    check_errors(small("float32", **NETS[name]), 8, torch_unet, 2)


@pytest.mark.parametrize(("precision", "factor"), [("high", 2), ("default", 15)])
def test_precision_of_a_network_of_some_size(precision: str, factor: float, torch_unet: ModuleType) -> None:
    net = small("float32", 16, channels=(32, 64), attention=(False, True))
    with kernels.precision(precision):
        assert check_errors(net, 12, torch_unet, factor) <= 1e-5
        if precision == "default":  # by Winograd's convolution
            with pytest.raises(AssertionError):
                check_errors(net, 12, torch_unet, 2)


def test_gradients_are_those_of_differences() -> None:
    net = small("float64", classes=3)
    x, t, y = arguments(net)
    gradcheck(lambda image: net(image, t, y), x)


def test_gradients_of_two_passes_add_up(backend: str) -> None:
    net = small(classes=3)
    x, t, y = arguments(net, batch=4)
    dout = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    net.params.zero_grad()
    net(x, t, y).backward(dout)
    whole = net.params.grad.copy()
    net.params.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        net(x[half], t[half], y[half]).backward(dout[half])
    np.testing.assert_allclose(net.params.grad, whole, rtol=0, atol=2e-6 * np.abs(whole).max())


# --------------------------------------------------------------------------------------------------------------- promises


def test_the_gradient_of_an_input_alone(backend: str) -> None:
    net = small(classes=3, dropout=0.2)
    x, t, y = arguments(net)
    dout = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    sure = UNet(**net.config | {"dropout": 0.0})
    sure.params.data[...] = net.params.data
    want = run_ours(sure, x, t, y, dout)["input"]
    image = Tensor(x, needs_grad=True)
    net.params.zero_grad()
    with net.params.frozen():
        net(image, t, y).backward(dout)
    np.testing.assert_array_equal(image.grad, want)
    assert not net.params.grad.any() and net.params["conv_in.weight"].needs_grad
    with pytest.raises(RuntimeError, match="nothing was recorded"), net.params.frozen():
        net(x, t, y).backward(dout)


def test_a_new_network_answers_zero_and_a_seed_is_one_network() -> None:
    net = UNet(8, attention=(4,), classes=10, seed=5)
    x, t, y = arguments(net)
    assert not net.predict(x, t, y).any()
    np.testing.assert_array_equal(UNet(**net.config).params.data, net.params.data)
    assert (UNet(**net.config | {"seed": 6}).params.data != net.params.data).mean() > 0.5


def test_the_config_survives_json() -> None:
    net = small(size=(8, 16), classes=4, attention=(True, False), attention_up=(4,), head_dim=4, scale_shift=True)
    again = UNet(**json.loads(json.dumps(net.config)))
    assert again.config == net.config and list(again.params) == list(net.params)
    again.params.data[...] = net.params.data
    x, t, y = arguments(net)
    np.testing.assert_array_equal(again.predict(x, t, y), net.predict(x, t, y))


def test_predict_is_the_call_and_is_safe_to_keep(backend: str) -> None:
    net = small(classes=4)
    x, t, y = arguments(net)
    recorded = net(x, t, y).data.copy()
    first = net.predict(x, t, y)
    np.testing.assert_array_equal(first, recorded)
    pool = kernels.Pool()
    with pool:
        kept = net.predict(x, t, y)
    with pool:
        net.predict(-x, t, y)
    np.testing.assert_array_equal(kept, recorded)


def test_predict_answers_in_the_callers_kind() -> None:
    torch = pytest.importorskip("torch", reason="a torch tensor is the foreign array here")
    net = small(classes=4)
    x, t, y = arguments(net)
    out = net.predict(torch.as_tensor(x), torch.as_tensor(t), torch.as_tensor(y))
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), net.predict(x, t, y))


def test_the_same_values_in_a_pool_over_and_over() -> None:
    net = small(classes=4, dropout=0.1)
    x, t, y = arguments(net)
    dout = np.ones_like(x)
    seen = []
    pool = kernels.Pool()
    for _ in range(3):
        with pool:
            net.params.zero_grad()
            net(x, t, y, step=3).backward(dout)
            seen.append(net.params.grad.copy())
    size = pool.nbytes
    net.params.zero_grad()
    net(x, t, y, step=3).backward(dout)
    for grad in seen:
        np.testing.assert_array_equal(grad, net.params.grad)
    assert pool.nbytes == size


def test_samples_of_a_batch_do_not_touch_each_other() -> None:
    net = small("float64", classes=4)
    x, t, y = arguments(net, batch=4)
    whole = net.predict(x, t, y)
    for i in range(4):
        np.testing.assert_allclose(net.predict(x[i : i + 1], t[i : i + 1], y[i : i + 1]), whole[i : i + 1], atol=1e-13)


def test_the_way_up_makes_no_array_of_both_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block reads its input and the stored activation where they are; only tangents are taken of both together."""
    net, joined, concat = small(), [], kernels.elementwise.concat
    monkeypatch.setattr(kernels.elementwise, "concat", lambda a, b: joined.append(a.shape) or concat(a, b))
    x, t, _ = arguments(net)
    y = net(Tensor(x, needs_grad=True), t)
    y.backward(np.ones_like(y.data))
    net(x, t).backward(np.ones_like(x))
    assert not joined
    net(Tensor(x, tangent=np.ones_like(x)), t)
    assert joined


def test_no_label_is_the_null_label() -> None:
    net = small(classes=4)
    x, t, _ = arguments(net)
    np.testing.assert_array_equal(net.predict(x, t), net.predict(x, t, np.full(3, net.null)))
    assert (net.predict(x, t, np.zeros(3, int)) != net.predict(x, t)).any()
    with pytest.raises(ValueError, match="no null class"):
        _ = small(classes=4, null_class=False).null
    with pytest.raises(ValueError, match="y must be given"):
        small(classes=4, null_class=False).predict(x, t)


def test_times_may_be_floats_and_one_for_all() -> None:
    net = small()
    x, _, _ = arguments(net)
    want = net.predict(x, np.full(3, 7))
    for t in (7, 7.0, np.float32(7), np.full(3, 7.0), np.full(3, 7, np.uint8)):
        np.testing.assert_array_equal(net.predict(x, t), want)
    assert (net.predict(x, 7.5) != want).any()
    shifted = UNet(**net.config | {"time_origin": 1})
    shifted.params.data[...] = net.params.data
    np.testing.assert_array_equal(shifted.predict(x, np.full(3, 8, np.uint8)), want)


def test_dropout_acts_in_training_steps_alone() -> None:
    net, sure = small(dropout=0.3), small()
    x, t, _ = arguments(net, batch=4)
    np.testing.assert_array_equal(net.predict(x, t), sure.predict(x, t))
    with no_grad():
        np.testing.assert_array_equal(net(x, t).data, sure.predict(x, t))
        one = net(x, t, step=1).data
        np.testing.assert_array_equal(one, net(x, t, step=1).data)
        assert (one != net(x, t, step=2).data).any() and (one != sure.predict(x, t)).any()
        split = [net(x[k : k + 2], t[k : k + 2], step=1, first_sample=k).data for k in (0, 2)]
    np.testing.assert_allclose(np.concatenate(split), one, atol=1e-5)
    with pytest.raises(ValueError, match="step="):
        net(x, t)


def test_the_running_average_as_the_network() -> None:
    net = small()
    x, t, _ = arguments(net)
    before, ema = net.predict(x, t), AdamW(net.params).ema
    net.params.data[...] *= 2
    with net.params.using(ema):
        np.testing.assert_array_equal(net.predict(x, t), before)
    assert (net.predict(x, t) != before).any()


def test_training_fits_a_batch(backend: str) -> None:
    net = UNet(4, channels=(8, 16), blocks=1, groups=4, classes=2)
    x, t, y = arguments(net, batch=8)
    target = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    optimiser, losses = AdamW(net.params, max_norm=1.0), []
    for _ in range(60):
        net.params.zero_grad()
        out = net(x, t, y)
        losses.append(float(np.mean((out.data - target) ** 2)))
        out.backward(2 * (out.data - target) / target.size)
        optimiser.step(1e-2)
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("multiples of 2", {"size": 7}),
        ("image_size", {"size": (8, 8, 8)}),
        ("groups must divide", {"groups": 3}),
        ("attention must name sides", {"attention": (16,)}),
        ("one bool for each", {"attention": (True,)}),
        ("head_dim must divide", {"head_dim": 5}),
        ("middle must be", {"middle": "cross"}),
        ("middle_groups must divide", {"middle_groups": 3}),
        ("classes must be", {"classes": 0}),
        ("dropout must be", {"dropout": 1.0}),
        ("norm_eps must be", {"norm_eps": 0.0}),
        ("downsample_pad must be", {"downsample_pad": (1, 0)}),
        ("blocks must be", {"blocks": 0}),
        ("in_channels must be", {"in_channels": 1.5}),
        ("channels must be", {"channels": ()}),
        ("even", {"channels": (9, 16), "groups": 1}),
        ("time_dtype must be", {"time_dtype": "float16"}),
        ("classes must be", {"classes": 2.5}),
        ("head_dim must be", {"head_dim": 2.0}),
        ("middle_groups must be", {"middle_groups": -1}),
    ],
)
def test_options_out_of_range(words: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=words):
        small(**options)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("image_size must be a sequence of integers, not 8.0", {"size": 8.0}),
        ("channels must be a sequence of integers, not 32", {"channels": 32}),
        ("channels must be a sequence of integers", {"channels": (8.5, 16)}),
        ("attention must be a sequence of integers, not 4", {"attention": 4}),
        ("attention_up must be a sequence of integers", {"attention_up": "no"}),
        ("dropout must be a number, not 'x'", {"dropout": "x"}),
    ],
)
def test_options_of_a_wrong_type(words: str, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=words):
        small(**options)


def test_arguments_out_of_range() -> None:
    net = small(classes=4)
    x, t, y = arguments(net)
    for words, error, wrong in (
        ("x must have shape", ValueError, (x[..., 0], t, y)),
        ("x must have shape", ValueError, (x[:, :4], t, y)),
        ("x is float64", TypeError, (x.astype(np.float64), t, y)),
        ("x must be an array", TypeError, (x.tolist(), t, y)),
        ("t must have shape", ValueError, (x, t[:2], y)),
        ("t must be integers or floats", TypeError, (x, t.astype(bool), y)),
        ("y must have shape", ValueError, (x, t, y[:2])),
        ("y must be integers", TypeError, (x, t, y.astype(float))),
        ("y must be in 0..4", ValueError, (x, t, y + 5)),
        ("y must be in 0..4", ValueError, (x, t, y - 5)),
    ):
        with pytest.raises(error, match=words):
            net.predict(*wrong)
    with pytest.raises(ValueError, match="no classes"):
        small().predict(x, t, y)


def test_an_empty_batch() -> None:
    net = small(classes=4)
    x, t, y = arguments(net)
    assert net.predict(x[:0], t[:0], y[:0]).shape == (0, 8, 8, 1)


@pytest.mark.parametrize("options", [{}, {"scale_shift": True, "dropout": 0.2}])
def test_the_same_code_runs_on_arrays_that_refuse_numpy(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def train(net: UNet) -> list[np.ndarray]:
        xp = net.params.xp
        x, t, y = arguments(net)
        device, optimiser = xp.asarray(x), AdamW(net.params, max_norm=1.0)
        for step in range(2):
            net.params.zero_grad()
            out = net(device, t, y, step=step)
            out.backward(out.data - device)
            optimiser.step(1e-2)
        with net.params.using(optimiser.ema):
            predicted = net.predict(device, xp.asarray(t), xp.asarray(y))
        arrays = [predicted, net.params.data, *optimiser.state().values()]
        assert all(isinstance(a, xp.ndarray) for a in arrays)
        return [a if isinstance(a, np.ndarray) else a.get() for a in arrays]

    config = small(classes=4, **options).config
    with kernels.use("reference"):
        for there, here in zip(train(UNet(**config, xp=cupy)), train(UNet(**config)), strict=True):
            np.testing.assert_array_equal(there, here)
        with pytest.raises(TypeError, match="x is of numpy, the network of cupy"):
            UNet(**config, xp=cupy).predict(*arguments(UNet(**config)))
