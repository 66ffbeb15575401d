"""What networks compute in: float32, TF32 or bfloat16; on a GPU's stand-in with the host runner behind it, and on the CPU."""

import contextlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alphabar import kernels, nets
from alphabar.kernels import bf16, checks, fused, precisions
from alphabar.kernels.arrays import to_numpy
from alphabar.kernels.gpu import conv
from alphabar.kernels.graphs import Graph
from alphabar.nets import functions as f
from alphabar.nets.autograd import Tensor, record
from alphabar.nets.layers import ParameterStore
from alphabar.nets.unet_config import attention_levels
from alphabar.tools import config as configs
from alphabar.tools import runs, sample, train, trained
from tests import fake_cupy, hosted
from tests.hosted import HostedDevice

SIZES: dict[str, Any] = {
    "image_size": 8,
    "in_channels": 3,
    "channels": (16, 32),
    "blocks": 1,
    "attention": (4,),
    "head_dim": 8,
    "groups": 4,
    "classes": 3,
    "zero_init": False,
}
cupy: Any = fake_cupy.cupy


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> HostedDevice:
    """A machine that seems to have a GPU."""
    if not hosted.available():
        pytest.skip("g++ is not installed")
    return hosted.pretend(monkeypatch)


@pytest.fixture
def arrays_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's stand-in alone: what is checked before a kernel is launched."""
    monkeypatch.setitem(sys.modules, "cupy", cupy)


def apart(a: Any, b: Any) -> float:
    """‖a − b‖/‖b‖."""
    a, b = (np.asarray(to_numpy(z), np.float64) for z in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def drawn(batch: int = 2, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Images, times, labels, and a gradient of the output."""
    rng = np.random.default_rng(seed)
    x, d = (rng.standard_normal((batch, 8, 8, 3)).astype(np.float32) for _ in range(2))
    return x, rng.integers(1, 1000, batch), np.arange(batch) % 4, d


# ------------------------------------------------------------------------------------------------------------- names and contexts


def test_names_of_precisions() -> None:
    assert precisions.PRECISIONS == ("default", "high", "tf32")
    assert not precisions.tf32() and precisions.tf32("tf32") and not precisions.tf32("high") and precisions.high("high")
    with kernels.precision("tf32"):
        assert precisions.tf32() and not precisions.high() and precisions.asked() == "tf32" and not precisions.tf32("default")
        with kernels.precision("high"):
            assert precisions.high() and not precisions.tf32()
    with (
        pytest.raises(ValueError, match=r"precision must be one of \('default', 'high', 'tf32'\), not 'bf16'"),
        kernels.precision("bf16"),
    ):
        pass


def test_tf32_is_the_default_on_the_cpu() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 9, 8, 16), np.float32), rng.standard_normal((3, 3, 16, 16), np.float32)
    with kernels.precision("tf32"):
        y = kernels.conv2d(x, w)
    np.testing.assert_array_equal(y, kernels.conv2d(x, w))
    np.testing.assert_array_equal(kernels.conv2d(x, w, precision="tf32"), y)


def test_a_backward_pass_is_as_exact_as_its_forward_pass() -> None:
    seen: list[str] = []

    def doubled(x: Tensor) -> Tensor:
        def pull(dy: Any) -> None:
            seen.append(precisions.asked())
            x.receive(2 * dy)

        return record(2 * x.data, (x,), pull)

    x = Tensor(np.ones(3), needs_grad=True)
    with kernels.precision("tf32"):
        y = doubled(x)
    doubled(y).backward(np.ones(3))
    assert seen == ["default", "tf32"] and precisions.asked() == "default"
    np.testing.assert_array_equal(x.grad, 4)


# ------------------------------------------------------------------------------------------------------------- arrays of bfloat16


def halves(*shape: int) -> Any:
    """A bfloat16 array on the device."""
    return cupy.asarray(bf16.pack(np.random.default_rng(1).standard_normal(shape).astype(np.float32)))


def singles(*shape: int) -> Any:
    return cupy.asarray(np.random.default_rng(2).standard_normal(shape).astype(np.float32))


def test_bfloat16_of_the_host_is_refused(arrays_of_a_gpu: None) -> None:
    x, w, v = (to_numpy(halves(*s)) for s in ((2, 4, 4, 8), (3, 3, 8, 8), (8,)))
    q = to_numpy(halves(1, 4, 2, 8))
    for call in (
        lambda: kernels.conv2d(x, w),
        lambda: kernels.conv2d_backward_input(x, w, (2, 4, 4, 8)),
        lambda: kernels.conv2d_backward_weight(x, x, 3),
        lambda: kernels.group_norm_silu(x, v, v, 2),
        lambda: kernels.attention(q, q, q),
    ):
        with pytest.raises(
            TypeError, match="must be of a float dtype, not uint16: the bits of bfloat16 are computed with on a GPU alone"
        ):
            call()
    with pytest.raises(TypeError, match=r"x must be of a float dtype, not uint16$"):
        kernels.silu(halves(4))


def test_definitions_take_no_bfloat16(arrays_of_a_gpu: None) -> None:
    with kernels.use("reference"), pytest.raises(TypeError, match=r"conv2d by its definition takes no bfloat16 \(x\)"):
        kernels.conv2d(halves(2, 4, 4, 8), halves(3, 3, 8, 8))
    with pytest.raises(TypeError, match="by its definition"):  # a result that no kernel writes to
        kernels.conv2d(halves(1, 4, 4, 8), halves(3, 3, 8, 8), out=halves(1, 4, 4, 16)[..., ::2])


def test_what_stands_beside_bfloat16_is_float32(arrays_of_a_gpu: None) -> None:
    x, w, y = halves(2, 4, 4, 8), halves(3, 3, 8, 6), (2, 4, 4, 6)
    plain = (1, False, None)
    checks.conv2d(x, w, singles(6), *plain, halves(*y), singles(2, 6), halves(*y), None)
    checks.conv2d(x, w, None, *plain, singles(*y), None, None, "tf32")
    checks.conv2d_backward_input(halves(*y), w, (2, 4, 4, 8), *plain, halves(2, 4, 4, 8), None)
    checks.conv2d_backward_weight(x, halves(*y), 3, *plain, singles(3, 3, 8, 6), None)
    norm = singles(8), singles(8), 2
    checks.group_norm_silu(x, *norm, 1e-5, singles(2, 8), singles(2, 8), True, halves(2, 4, 4, 8), None)
    checks.group_norm_silu(x, singles(11), singles(11), 11, 1e-5, None, None, True, None, halves(2, 4, 4, 3))
    stats = singles(2, 2), singles(2, 2)
    checks.group_norm_silu_backward(x, x, *norm, *stats, None, None, True, halves(2, 4, 4, 8), None, None)
    q = halves(2, 5, 2, 8)
    checks.attention(q, q, q, None, halves(2, 5, 2, 8))
    checks.attention_backward(q, q, q, q, q, singles(2, 2, 5), None)
    for call, message in (
        (lambda: checks.conv2d(x, singles(3, 3, 8, 6), None, *plain, None, None, None, None), "w is float32, x is bfloat16"),
        (lambda: checks.conv2d(x, w, halves(6), *plain, None, None, None, None), "bias must be of a float dtype, not uint16"),
        (lambda: checks.conv2d(x, w, None, *plain, None, None, singles(*y), None), "residual is float32, x is bfloat16"),
        (lambda: checks.conv2d(singles(2, 4, 4, 8), w, None, *plain, None, None, None, None), "w must be of a float dtype"),
        (
            lambda: checks.conv2d(x, w, singles(6).astype("f8"), *plain, None, None, None, None),
            "beside that bias must be float32",
        ),
        (lambda: checks.conv2d(x, w, to_numpy(singles(6)), *plain, None, None, None, None), "arrays of different libraries"),
        (lambda: checks.conv2d_backward_input(singles(*y), w, (2, 4, 4, 8), *plain, None, None), "w must be of a float dtype"),
        (lambda: checks.conv2d_backward_weight(x, singles(*y), 3, *plain, None, None), "dy is float32, x is bfloat16"),
        (
            lambda: checks.conv2d_backward_weight(x, halves(*y), 3, *plain, halves(3, 3, 8, 6), None),
            "out must be of a float dtype",
        ),
        (
            lambda: checks.group_norm_silu(x, halves(8), singles(8), 2, 1e-5, None, None, True, None, None),
            "gamma must be of a float",
        ),
        (
            lambda: checks.group_norm_silu(x, *norm, 1e-5, None, None, True, singles(2, 4, 4, 8), None),
            "out is float32, x is bfloat16",
        ),
        (lambda: checks.attention(q, singles(2, 5, 2, 8), q, None, None), "k is float32, q is bfloat16"),
        (lambda: checks.attention_backward(q, q, q, q, q, halves(2, 2, 5), None), "lse must be of a float dtype"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(ValueError, match=r"bias has shape \(8,\), want \(6,\) to go with w"):
        checks.conv2d(x, w, singles(8), *plain, None, None, None, None)


# -------------------------------------------------------------------------------------------------- what a network is asked to do


def test_the_option_of_a_network() -> None:
    net = nets.UNet(**SIZES)
    assert net.compute == net.computes == "fp32" and "compute" not in net.config
    with pytest.raises(ValueError, match=r"compute must be one of \('fp32', 'tf32', 'bf16'\), not 'fp16'"):
        net.compute = "fp16"
    for name in ("tf32", "bf16"):
        with pytest.raises(ValueError, match="compute must be 'fp32' for weights of float64"):
            nets.UNet(**SIZES, dtype="float64").compute = name
    with pytest.raises(TypeError, match="kept of float32 weights on a GPU, not of numpy's float32"):
        net.params.keep_low(True)


def test_the_option_changes_nothing_on_the_cpu() -> None:
    net = nets.UNet(**SIZES)
    x, t, y, d = drawn()
    want = net.predict(x, t, y)
    for name in ("tf32", "bf16"):
        net.compute = name
        assert (net.compute, net.computes, net.params.low) == (name, "fp32", None)
        np.testing.assert_array_equal(net.predict(x, t, y), want)
        net(x, t, y).backward(d)


def test_networks_of_other_kinds_compute_in_tf32(arrays_of_a_gpu: None) -> None:
    for net in (
        nets.Transformer(4, states=5, width=8, layers=1, heads=2, xp=cupy),
        nets.WordDiffusion(4, 5, width=8, layers=1, heads=2, xp=cupy),
        nets.SequenceClassifier(4, 3, 2, width=8, layers=1, heads=2, xp=cupy),
        nets.Classifier(8, channels=(8,), groups=4, xp=cupy),
        nets.MLP(3, xp=cupy),
    ):
        net.compute = "bf16"
        assert (net.compute, net.computes, net.params.low) == ("bf16", "tf32", None)
        net.compute = "fp32"
        assert net.computes == "fp32"


# -------------------------------------------------------------------------------------------------------- the copy of the weights


def test_the_copy_of_the_weights_follows_them(device: HostedDevice) -> None:
    net = nets.UNet(**SIZES, xp=cupy)
    store = net.params

    def same(flat: Any) -> bool:
        return bool((store.low.get() == bf16.pack(flat.get())).all())

    net.compute = "bf16"
    place = store.low
    assert same(store.data) and store["conv_in.weight"].low.shape == (3, 3, 3, 16)
    store.load({name: 2 * a for name, a in store.arrays().items()})
    assert same(store.data)
    optimiser = nets.AdamW(store)
    cupy.copyto(store.grad, cupy.asarray(np.random.default_rng(0).standard_normal(store.grad.shape).astype(np.float32)))
    before = store.low.get()
    optimiser.step(1e-2)
    assert same(store.data) and (before != store.low.get()).any()
    with store.using(optimiser.ema):
        assert same(optimiser.ema) and store["conv_in.weight"].low is not None
    assert same(store.data) and store.low is place  # a graph that was captured reads it there
    store.data *= cupy.asarray(np.float32(2))
    assert not same(store.data)
    store.refresh()
    assert same(store.data)
    store["conv_in.weight"].data = store["conv_in.weight"].data.copy()  # no longer the store's
    assert store["conv_in.weight"].low is None
    net.compute = "tf32"
    assert store.low is None and store["conv_out.weight"].low is None


# --------------------------------------------------------------------------------------------------------------- the U-Net itself


def by_torch(x: np.ndarray, t: np.ndarray, y: np.ndarray, d: np.ndarray, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(output, gradients by name) of the twin under autocast to bfloat16."""
    torch = pytest.importorskip("torch")
    from tests import torch_unet

    net = nets.UNet(**options)
    weights = {name: torch.tensor(a, requires_grad=True) for name, a in net.params.arrays().items()}
    c = {**net.config, "attention": attention_levels(net.config, "attention")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch_unet.unet(c, weights, torch.tensor(x), torch.tensor(t), torch.tensor(y))
    out.float().backward(torch.tensor(d))
    return out.detach().float().numpy(), {name: w.grad.numpy() for name, w in weights.items()}


def exact(x: np.ndarray, t: np.ndarray, y: np.ndarray, d: np.ndarray, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same in float64."""
    net = nets.UNet(**options, dtype="float64")
    out = net(x.astype(np.float64), t, y)
    out.backward(d.astype(np.float64))
    return out.data, net.params.gradients()


@pytest.mark.parametrize(
    "options", [{}, {"scale_shift": True, "attention": (8, 4), "downsample_pad": (0, 1)}], ids=["added", "scaled"]
)
def test_a_bfloat16_network_is_as_near_as_the_twin(device: HostedDevice, options: dict[str, Any]) -> None:
    options, given = SIZES | options, drawn()
    want, slopes = exact(*given, options)
    twin, twins = by_torch(*given, options)
    net = nets.UNet(**options, xp=cupy)
    net.compute = "bf16"
    assert net.computes == "bf16"
    x, t, y, d = map(cupy.asarray, given)
    device.launched.clear()
    out = net(x, t, y)
    assert out.data.dtype == np.float32 and precisions.asked() == "default"
    assert 1e-4 < apart(out.data, want) < 2 * apart(twin, want)
    out.backward(d)
    casts = [name for name in device.launched if name.startswith("to_")]
    assert len(casts) == 2  # of the input, and of the output's gradient: the weights are there in bfloat16
    found = {name: g.get() for name, g in net.params.gradients().items()}
    whole = math.sqrt(sum(float(np.sum(g**2)) for g in slopes.values()))

    def error(gradients: dict[str, Any]) -> dict[str, float]:
        return {name: float(np.linalg.norm(gradients[name] - g)) / whole for name, g in slopes.items()}

    mine, theirs = error(found), error(twins)
    assert math.hypot(*mine.values()) < 2 * math.hypot(*theirs.values())
    for name in slopes:
        assert mine[name] < 2 * theirs[name] + 1e-3, name
    np.testing.assert_array_equal(net.predict(x, t, y).get(), out.data.get())


def test_a_norm_goes_with_the_convolution_behind_it_where_that_is_worth_it(arrays_of_a_gpu: None) -> None:
    def taken(shape: tuple[int, ...], cout: int = 128, kernel: int = 3, make: Any = bf16.BF16) -> bool:
        return fused.taken(cupy.empty(shape, make), cupy.empty((kernel, kernel, shape[3], cout), make))

    large = (64, 32, 32, 128)
    assert taken(large) and taken(large, cout=3) and taken((32, 64, 64, 32))
    for own, more, yes in ((128, 64, True), (48, 16, False), (64, 12, False)):
        x, tail = (cupy.empty((256, 32, 32, n), bf16.BF16) for n in (own, more))
        assert fused.taken(x, cupy.empty((3, 3, own + more, 128), bf16.BF16), tail) is yes
    assert not taken((16, 32, 32, 128)) and not taken((0, 32, 32, 128))  # small enough for the second cache
    assert not taken(large, kernel=1) and not taken((100, 32, 32, 124)) and not taken((4, 512, 256, 128))
    for precision, yes in (("default", False), ("tf32", True), ("high", False)):
        with kernels.precision(precision):
            assert taken(large, make=np.float32) is yes and taken(large)
    with kernels.use("reference"):
        assert not taken(large)
    assert not fused.taken(np.empty(large, np.float32), np.empty((3, 3, 128, 128), np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "how", lambda kind, *_: "cudnn" if kind == "forward" else "mma")
        assert not taken(large)


@pytest.mark.parametrize("more", [0, 8])
@pytest.mark.parametrize(("make", "silu"), [(np.float32, True), (bf16.BF16, False), (bf16.BF16, True)])
def test_a_norm_in_one_with_its_convolution(
    device: HostedDevice, monkeypatch: pytest.MonkeyPatch, make: Any, silu: bool, more: int
) -> None:
    own = 32 if more else 16
    n = own + more
    shapes = {
        "x": (2, 6, 5, own),
        "gamma": (n,),
        "beta": (n,),
        "w": (3, 3, n, 8),
        "b": (8,),
        "emb": (2, 2 * n + 8),
        "residual": (2, 6, 5, 8),
        **({"tail": (2, 6, 5, more)} if more else {}),
    }
    rng = np.random.default_rng(4)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    d = cupy.asarray(rng.standard_normal((2, 6, 5, 8)).astype(np.float32))
    found = []
    for least in (fused.LEAST, 0):
        monkeypatch.setattr(fused, "LEAST", least)
        device.launched.clear()
        z = {name: Tensor(cupy.asarray(value), needs_grad=True) for name, value in values.items()}
        x, residual = f.cast(z["x"], make), f.cast(z["residual"], make)
        options = {"scaled": (z["emb"], 0), "added": (z["emb"], 2 * n), "residual": residual, "dtype": np.float32}
        tail = f.cast(z["tail"], make) if more else None
        with kernels.precision("tf32"):
            y = f.norm_conv2d(x, z["gamma"], z["beta"], 4, 1e-5, z["w"], z["b"], silu, tail=tail, **options)
        assert y.data.dtype == np.float32 and device.launched.count("norm_affine") == (least == 0)
        y.backward(d)
        with kernels.precision("tf32"):
            w = Tensor(z["w"].data, tangent=z["w"].data)  # f.norm_conv2d is linear in w
            if make == np.float32:
                b = Tensor(z["b"].data)
                dot = f.norm_conv2d(x, z["gamma"], z["beta"], 4, 1e-5, w, b, silu, options["scaled"], tail).tangent
                assert dot is not None and device.launched.count("norm_affine") == (least == 0)
        gradients = {name: tensor.grad.get() for name, tensor in z.items()}
        for part, columns in (("scale", slice(n)), ("shift", slice(n, 2 * n)), ("added", slice(2 * n, 2 * n + 8))):
            gradients[part] = gradients["emb"][:, columns]
        found.append({"y": y.data.get()} | gradients)
    for name, want in found[0].items():
        assert apart(found[1][name], want) < (5e-3 if make == bf16.BF16 else 1e-3), name


def test_a_network_with_norms_in_one_with_convolutions(device: HostedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, y, _ = map(cupy.asarray, drawn())
    for dropout in (0.0, 0.25):
        net = nets.UNet(**SIZES, dropout=dropout, xp=cupy)
        net.compute = "bf16"
        found = []
        for least in (fused.LEAST, 0):
            monkeypatch.setattr(fused, "LEAST", least)
            device.launched.clear()
            with nets.no_grad():
                found.append(net(x, t, y, step=5).data.get())
            made = device.launched.count("norm_affine"), sum(name.startswith("norm_forward") for name in device.launched)
            # 8 blocks with two norms each and the output's; one of 16 channels before a tail, less than a slab; after dropout no
            # second ones; attention has 4
            fitting = (17 - 1 - (8 if dropout else 0)) * (least == 0)
            assert made == (fitting, 21 - fitting)
        assert apart(*found) < 5e-3


@pytest.mark.parametrize(("make", "channels", "in_one"), [(bf16.BF16, 32, 1), (np.float32, 16, 1), (bf16.BF16, 24, 0)])
def test_a_convolution_of_two_images_in_one(device: HostedDevice, make: Any, channels: int, in_one: int) -> None:
    x, tail, w, b, d = (
        singles(2, 5, 3, channels),
        singles(2, 5, 3, 8),
        singles(1, 1, channels + 8, 12),
        singles(12),
        singles(2, 5, 3, 12),
    )
    z = [Tensor(a, needs_grad=True) for a in (x, tail, w, b)]
    with kernels.use("reference"):
        want = f.conv1x1(*z)
        want.backward(d)
    expected = [want.data.get(), *(a.grad.get() for a in z)]
    z = [Tensor(a, needs_grad=True) for a in (x, tail, w, b)]
    device.launched.clear()
    with kernels.precision("tf32"):
        y = f.cast(f.conv1x1(f.cast(z[0], make), f.cast(z[1], make), *z[2:]), np.float32)
    assert sum(name.startswith("conv_forward") for name in device.launched) == 2 - in_one
    y.backward(d)
    for found, of_definition in zip([y.data.get(), *(a.grad.get() for a in z)], expected, strict=True):
        assert apart(found, of_definition) < (2e-2 if make == bf16.BF16 else 2e-3)


def test_a_bfloat16_step_is_captured(device: HostedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "LEAST", 0)
    x, t, y, d = map(cupy.asarray, drawn())
    t = t.astype(np.float64)  # as check_times would make it
    net = nets.UNet(**SIZES | {"channels": (16,), "attention": (8,)}, xp=cupy)
    net.compute = "bf16"
    store = net.params

    def body() -> None:
        store.zero_grad()
        net(x, t, y).backward(d)

    body()
    want = store.grad.get()
    graph = Graph(body, x, (x, t, y, d, store.data, store.grad, store.low))
    for _ in range(3):
        store.zero_grad()
        graph()
        np.testing.assert_array_equal(store.grad.get(), want)
    assert graph.refused is None
    store.load({name: 0.5 * a for name, a in store.arrays().items()})
    graph()
    found = store.grad.get()
    body()
    np.testing.assert_array_equal(store.grad.get(), found)
    assert (found != want).any()


def test_a_tf32_network_is_a_hundred_times_nearer(device: HostedDevice) -> None:
    given = drawn()
    want, slopes = exact(*given, SIZES)
    net, x, t, y, d = nets.UNet(**SIZES, xp=cupy), *map(cupy.asarray, given)
    plain = net.predict(x, t, y).get()
    net.compute = "tf32"
    out = net(x, t, y)
    out.backward(d)
    whole = np.concatenate([g.ravel() for g in slopes.values()])
    found = np.concatenate([g.get().ravel() for g in net.params.gradients().values()])
    assert apart(plain, want) < 1e-5 < apart(out.data, want) < 2e-3
    assert 1e-5 < apart(found, whole) < 2e-3
    with kernels.precision("high"):
        np.testing.assert_array_equal(net.predict(x, t, y).get(), plain)
    with kernels.use("reference"):
        assert apart(net.predict(x, t, y), want) < 1e-5


def test_definitions_and_tangents_stay_float32(device: HostedDevice) -> None:
    given = drawn()
    x, t, y, d = map(cupy.asarray, given)
    net = nets.UNet(**SIZES, xp=cupy)
    plain, along = nets.jvp(lambda z: net(z, t, y), x, d)
    net.compute = "bf16"
    with kernels.use("reference"):
        assert apart(net.predict(x, t, y), plain) < 1e-5
    value, tangent = nets.jvp(lambda z: net(z, t, y), x, d)
    assert apart(value, plain) < 2e-3 and apart(tangent, along) < 5e-3
    net.params["conv_in.weight"].tangent = Tensor(cupy.asarray(np.ones((3, 3, 3, 16), np.float32)))
    with pytest.raises(NotImplementedError, match="bfloat16 has none: compute in float32"):
        net(x, t, y)


def test_the_gradient_of_the_input_goes_through_the_cast(device: HostedDevice) -> None:
    given = drawn()
    x, t, y, d = map(cupy.asarray, given)
    net = nets.UNet(**SIZES, xp=cupy)
    _, plain = nets.vjp(lambda z: net(z, t, y), x, d)
    net.compute = "bf16"
    _, found = nets.vjp(lambda z: net(z, t, y), x, d)
    assert found.dtype == np.float32 and 1e-4 < apart(found, plain) < 0.05


def test_casts(device: HostedDevice) -> None:
    x = Tensor(singles(2, 3, 3, 5), needs_grad=True)
    low = f.cast(x, bf16.BF16)
    assert f.cast(x, np.float32) is x
    np.testing.assert_array_equal(low.data.get(), bf16.pack(x.data.get()))
    back = f.cast(low, np.float32)
    np.testing.assert_array_equal(back.data.get(), bf16.unpack(low.data.get()))
    d = singles(2, 3, 3, 5)
    back.backward(d)
    np.testing.assert_array_equal(x.grad.get(), bf16.unpack(bf16.pack(d.get())))


def test_dropout_of_bfloat16_has_the_mask_of_float32(device: HostedDevice) -> None:
    options = (0.5, 3, 7, 1)
    x = Tensor(singles(2, 4, 4, 8), needs_grad=True)
    want = f.dropout(x, *options).data.get()
    low = f.dropout(f.cast(x, bf16.BF16), *options)
    found = bf16.unpack(low.data.get())
    np.testing.assert_array_equal(found == 0, want == 0)
    assert 0 < apart(found, want) < 1e-2
    low.backward(halves(2, 4, 4, 8))
    np.testing.assert_array_equal(x.grad.get() == 0, want == 0)


# ---------------------------------------------------------------------------------------------------------------------- the tools


def test_the_setting_survives_and_has_three_values() -> None:
    c = configs.from_words(["train.precision=bf16"])
    assert configs.from_dict(configs.to_dict(c)) == c and 'precision = "bf16"' in configs.to_toml(c)
    assert configs.Config().train.precision == "fp32"
    assert configs.from_dict({"train": {"steps": 3}}).train.precision == "fp32"  # a checkpoint that knows nothing of it
    with pytest.raises(
        configs.ConfigError, match=r"train\.precision must be one of fp32, tf32, bf16, not 'fp16'; the nearest is"
    ):
        configs.from_words(["train.precision=fp16"])


SMALL = ["--set", "model.channels=8", "--set", "model.groups=4", "--set", "model.blocks=1", "--set", "model.attention=[]"]
SMALL += ["--set", "train.batch=4", "--set", "log.samples=0", "--set", "sample.steps=2", "--set", "sample.columns=1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with contextlib.chdir(tmp_path):
        yield tmp_path


def said(capsys: pytest.CaptureFixture) -> str:
    return capsys.readouterr().err


def test_a_bfloat16_run_goes_on_on_the_cpu(folder: Path, capsys: pytest.CaptureFixture) -> None:
    def trained_in(name: str, first: str, then: str) -> tuple[dict[str, Any], dict[str, Any], str]:
        """(arrays, meta) of three steps in one precision and two in another, and what was said."""
        short = ["--device", "cpu", "--name", name, "--steps", "3", *SMALL]
        assert train.main([*short, "--set", f"train.precision={first}"]) == 0
        path, _, meta = runs.read(folder / "runs" / name)
        assert meta["config"]["train"]["precision"] == first and "precision" not in meta["model"]
        network = trained.load(path, False, np)
        assert network.config.train.precision == first and network.net.params.data.dtype == np.float32
        resumed = ["--device", "cpu", "--resume", f"runs/{name}", "--steps", "5", "--set", f"train.precision={then}"]
        assert train.main(resumed) == 0
        return *runs.read(folder / "runs" / name)[1:], said(capsys)

    arrays, meta, told = trained_in("r", "bf16", "tf32")
    assert meta["config"]["train"]["precision"] == "tf32" and meta["step"] == 5
    for line in ("float32, not bf16: that is for a GPU", "tf32, bf16 before", "float32, not tf32: that is for a GPU"):
        assert told.count(f"precision   {line}\n") == 1
    plain, _, told = trained_in("s", "fp32", "fp32")
    assert "precision" not in told
    for name, a in plain.items():
        np.testing.assert_array_equal(arrays[name], a)


def test_a_bfloat16_run_of_a_gpu_moves_to_the_cpu(device: HostedDevice, folder: Path, capsys: pytest.CaptureFixture) -> None:
    for name, where in (("r", "cuda"), ("s", "cpu")):
        new = ["--device", where, "--name", name, "--steps", "3", *SMALL, "--set", "model.conditional=false"]
        assert train.main([*new, "--set", f"train.precision={'bf16' if where == 'cuda' else 'fp32'}"]) == 0
    assert "precision" not in said(capsys)
    assert any(name.startswith("conv_forward_bf16") for name in device.launched)
    _, arrays, _ = runs.read(folder / "runs/r")
    whole = np.concatenate([a.ravel() for name, a in arrays.items() if name.startswith("weights/")])
    assert whole.dtype == np.float32 and (bf16.unpack(bf16.pack(whole)) != whole).mean() > 0.5
    for name in "rs":
        assert train.main(["--device", "cpu", "--resume", f"runs/{name}", "--steps", "5"]) == 0
    assert "precision   float32, not bf16" in said(capsys)
    (_, ours, meta), (_, theirs, _) = (runs.read(folder / "runs" / name) for name in "rs")
    assert meta["step"] == 5 and meta["config"]["train"]["precision"] == "bf16"
    losses = [[line["loss"] for line in runs.metrics(folder / "runs" / name)] for name in "rs"]
    np.testing.assert_allclose(*losses, rtol=0.02)
    weights = [np.concatenate([a.ravel() for n, a in z.items() if n.startswith("weights/")]) for z in (ours, theirs)]
    assert 0 < apart(*weights) < 0.01


def test_samples_are_drawn_in_the_precision_of_the_run(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert train.main(["--device", "cpu", "--name", "r", "--steps", "1", *SMALL, "--set", "train.precision=tf32"]) == 0
    said(capsys)
    draw = ["runs/r", "--device", "cpu", "--n", "2", "--steps", "2", "--out", "s.h5"]
    assert sample.main(draw) == 0
    assert "precision   float32, not tf32: that is for a GPU" in said(capsys)
    assert sample.main([*draw, "--precision", "bf16"]) == 0
    assert "precision   float32, not bf16: that is for a GPU" in said(capsys)
    assert sample.main([*draw, "--precision", "fp32", "--quiet"]) == 0
    assert "precision" not in said(capsys)
    assert sample.main([*draw, "--precision", "fp16"]) == 2
    assert "argument --precision: invalid choice: 'fp16' (choose from" in said(capsys)


def test_a_store_without_a_copy_has_nothing_to_refresh() -> None:
    store = ParameterStore()
    weight = store.declare("w", (3,), std=1.0)
    store.build()
    store.refresh()
    assert store.low is None and weight.low is None  # type: ignore[attr-defined]
