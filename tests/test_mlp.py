"""The MLP against closed forms and PyTorch, its losses through gradients of gradients, and its promises."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.nets import MLP, AdamW, Tensor, backward, gradcheck, jvp, no_grad, time_features, vjp
from tests import fake_cupy


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use(request.param):
        yield request.param


def small(features: int = 3, dtype: str = "float64", seed: int = 3, **options: Any) -> MLP:
    """A small network with no bias at zero."""
    net = MLP(features, dtype=dtype, seed=seed, **{"hidden": (8, 6)} | options)
    rng = np.random.default_rng(seed)
    for value in net.params.arrays().values():
        value += rng.standard_normal(value.shape) / 4
    return net


def batch(net: MLP, n: int = 5) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(x, t, v)"""
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((2, n, net.config["features_in"])).astype(net.config["dtype"])
    return x, rng.random(n) if net.config["times"] else None, v


def torch_mlp(net: MLP, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The same network in PyTorch: (a function of x and t, its weights)."""
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle here")
    c = net.config
    kind = getattr(torch, dtype)
    w = {k: torch.tensor(v, dtype=kind, requires_grad=True) for k, v in net.params.arrays().items()}
    activation = torch.tanh if c["activation"] == "tanh" else torch.nn.functional.silu

    def call(x: Any, t: np.ndarray | None = None) -> Any:
        if t is not None:
            half = c["time_channels"] // 2
            angle = torch.as_tensor(t * c["time_scale"])[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
            x = torch.cat([x, torch.sin(angle).to(kind), torch.cos(angle).to(kind)], 1)
        for i in range(len(c["hidden"]) + 1):
            x = (x if i == 0 else activation(x)) @ w[f"layers.{i}.weight"] + w[f"layers.{i}.bias"]
        return x

    return call, w


NETS: dict[str, dict[str, Any]] = {
    "silu": {},
    "tanh": {"activation": "tanh", "features_out": 2},
    "times": {"times": True, "time_scale": 1000.0, "time_channels": 8},
    "one layer": {"hidden": ()},
}
each = pytest.mark.parametrize("name", NETS)


# ------------------------------------------------------------------------------------------------------ values and gradients


@each
def test_values_and_gradients_are_pytorchs(name: str) -> None:
    net = small(**NETS[name])
    theirs, weights = torch_mlp(net, "float64")
    import torch

    x, t, _ = batch(net)
    image, z = torch.tensor(x, requires_grad=True), Tensor(x, needs_grad=True)
    want, out = theirs(image, t), net(z, t)
    dout = np.random.default_rng(1).standard_normal(out.shape)
    want.backward(torch.tensor(dout))
    out.backward(dout)
    np.testing.assert_allclose(out.data, want.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(z.grad, image.grad.numpy(), rtol=1e-10, atol=1e-12)
    for k, gradient in net.params.gradients().items():
        np.testing.assert_allclose(gradient, weights[k].grad.numpy(), rtol=1e-10, atol=1e-12, err_msg=k)


def sliced(net: MLP, x: np.ndarray, t: Any, v: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients of the mean over the batch of vᵀJv + ½‖s‖²."""
    net.params.zero_grad()
    image = Tensor(x, needs_grad=True, tangent=v)
    s = net(image, t)
    n = x.dtype.type(len(x))
    product = s.tangent.data.copy()
    backward((s, s.data / n), (s.tangent, v / n))
    return {"product": product, "input": image.grad} | net.params.gradients()


def torch_sliced(net: MLP, x: np.ndarray, t: Any, v: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    call, weights = torch_mlp(net, dtype)
    import torch

    image, direction = (torch.tensor(a, dtype=getattr(torch, dtype), requires_grad=True) for a in (x, v))
    s, product = torch.autograd.functional.jvp(lambda z: call(z, t), image, direction, create_graph=True)
    (((direction * product).sum() + (s * s).sum() / 2) / len(x)).backward()
    grads = {"product": product.detach(), "input": image.grad} | {k: w.grad for k, w in weights.items()}
    return {k: g.numpy() for k, g in grads.items()}


@pytest.mark.parametrize("name", [k for k in NETS if k != "tanh"])
def test_gradients_of_sliced_score_matching_are_pytorchs(name: str) -> None:
    net = small(**NETS[name])
    x, t, v = batch(net)
    got, want = sliced(net, x, t, v), torch_sliced(net, x, t, v, "float64")
    for k, e in want.items():
        np.testing.assert_allclose(got[k], e, rtol=0, atol=1e-11 * max(np.abs(e).max(), 1), err_msg=k)


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_their_float32_error_is_at_most_twice_pytorchs(activation: str, backend: str) -> None:
    net = small(dtype="float32", hidden=(32, 32), activation=activation)
    x, t, v = batch(net, 64)
    exact, theirs = (torch_sliced(net, x, t, v, dtype) for dtype in ("float64", "float32"))
    for k, a in sliced(net, x, t, v).items():
        error, budget = np.linalg.norm(a - exact[k]), 2 * np.linalg.norm(theirs[k] - exact[k])
        assert a.dtype == np.float32
        assert error <= budget + 2 * np.finfo(np.float32).eps * np.linalg.norm(exact[k]), k


# ------------------------------------------------------------------------------------------------------------ closed forms


def test_the_jacobian_of_one_layer_is_its_matrix() -> None:
    net = small(hidden=())
    x, _, _ = batch(net)
    w = net.params["layers.0.weight"].data
    basis = np.eye(3)
    jacobian = np.stack([jvp(net, x, np.tile(e, (5, 1)))[1] for e in basis], axis=1)  # (B, in, out)
    np.testing.assert_allclose(jacobian, np.tile(w, (5, 1, 1)), rtol=1e-14)
    np.testing.assert_allclose(np.trace(jacobian, axis1=1, axis2=2), np.trace(w), rtol=1e-14)


def test_implicit_score_matching_of_one_layer_in_closed_form() -> None:
    # s = xW + b: the mean of tr J + ½‖s‖² is tr W + ½⟨‖xW + b‖²⟩, with the gradients I + ⟨xᵀs⟩ and ⟨s⟩
    net = small(hidden=())
    x, _, _ = batch(net, 7)
    s = net.predict(x)
    net.params.zero_grad()
    for i in range(3):
        out = net(Tensor(x, tangent=np.tile(np.eye(3)[i], (7, 1))))
        du = np.zeros_like(x)
        du[:, i] = 1 / 7
        backward((out.tangent, du), (out, out.data / 7 if i == 0 else 0 * out.data))
    np.testing.assert_allclose(net.params["layers.0.weight"].grad, np.eye(3) + x.T @ s / 7, rtol=1e-13)
    np.testing.assert_allclose(net.params["layers.0.bias"].grad, s.mean(axis=0), rtol=1e-13)


def test_the_jacobian_of_one_hidden_layer_in_closed_form() -> None:
    net = small(hidden=(6,), activation="tanh")
    x, _, v = batch(net)
    w1, b1, w2 = (net.params[k].data for k in ("layers.0.weight", "layers.0.bias", "layers.1.weight"))
    slope = 1 - np.tanh(x @ w1 + b1) ** 2
    np.testing.assert_allclose(jvp(net, x, v)[1], ((v @ w1) * slope) @ w2, rtol=1e-12)
    np.testing.assert_allclose(vjp(net, x, v)[1], ((v @ w2.T) * slope) @ w1.T, rtol=1e-12)


@pytest.mark.parametrize("name", [k for k in NETS if k != "tanh"])
def test_products_from_both_sides_agree(name: str) -> None:
    net = small(**NETS[name])
    x, t, v = batch(net)
    u = np.random.default_rng(5).standard_normal(x.shape)
    right, left = jvp(lambda z: net(z, t), x, v)[1], vjp(lambda z: net(z, t), x, u)[1]
    np.testing.assert_allclose((u * right).sum(axis=1), (left * v).sum(axis=1), rtol=1e-11, atol=1e-13)


@each
def test_gradients_through_the_tangent_are_those_of_differences(name: str) -> None:
    net = small(**NETS[name])
    x, t, v = batch(net)

    def product(image: Tensor, dot: Tensor) -> Tensor:
        image.tangent = dot
        return net(image, t).tangent

    if NETS[name].get("hidden") != ():
        gradcheck(product, x, v)
    # and with respect to the weights
    u = np.random.default_rng(2).standard_normal(net(x, t).shape)
    net.params.zero_grad()
    net(Tensor(x, tangent=v), t).tangent.backward(u)
    flat = net.params.data.copy()
    direction = np.random.default_rng(3).standard_normal(flat.shape) / np.sqrt(flat.size)

    def value(h: float) -> float:
        with net.params.using(flat + h * direction):
            return float((u * jvp(lambda z: net(z, t), x, v)[1]).sum())

    h = 1e-3
    numeric = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert numeric == pytest.approx(float(net.params.grad @ direction), rel=1e-8)


# ---------------------------------------------------------------------------------------------------------- as an energy


def energy_loss(net: MLP, x: np.ndarray, noise: np.ndarray, sigma: float) -> float:
    """Denoising score matching ½‖s + ε/σ‖² of the score s = −∇E at x + σ·ε, the mean over the batch; adds its gradient.

    Its derivative is u·∂s/∂θ with u = (s + ε/σ)/B held fixed, which is that of the tangent of −E along u.
    """
    noisy, ones = x + x.dtype.type(sigma) * noise, np.ones((len(x), 1), x.dtype)
    residual = noise / x.dtype.type(sigma) - vjp(net, noisy, ones)[1]
    energy = net(Tensor(noisy, tangent=-residual / x.dtype.type(len(x))))
    backward((energy.tangent, ones))
    return float((residual**2).sum() / 2 / len(x))


@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_the_loss_of_an_energy_is_trained_through_its_score(activation: str) -> None:
    net = small(features_out=1, activation=activation)
    theirs, weights = torch_mlp(net, "float64")
    import torch

    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 6, 3))
    net.params.zero_grad()
    loss = energy_loss(net, x, noise, 0.5)

    noisy = torch.tensor(x + 0.5 * noise, requires_grad=True)
    (slope,) = torch.autograd.grad(theirs(noisy).sum(), noisy, create_graph=True)
    want = ((torch.tensor(noise) / 0.5 - slope) ** 2).sum() / 2 / 6
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-13)
    for k, gradient in net.params.gradients().items():
        if k == "layers.2.bias":  # a constant of the energy
            assert weights[k].grad is None and not gradient.any()
        else:
            np.testing.assert_allclose(gradient, weights[k].grad.numpy(), rtol=1e-10, atol=1e-12, err_msg=k)


def test_an_energy_learns_a_normals_score(backend: str) -> None:
    # of N(0, 1) with noise σ the score is −x/(1 + σ²)
    net = MLP(1, hidden=(24,), features_out=1, seed=1)
    optimiser = AdamW(net.params)
    rng = np.random.default_rng(0)
    for _ in range(300):
        x, noise = rng.standard_normal((2, 256, 1)).astype(np.float32)
        net.params.zero_grad()
        energy_loss(net, x, noise, 0.7)
        optimiser.step(1e-2)
    grid = np.linspace(-2, 2, 41, dtype=np.float32)[:, None]
    score = -vjp(net, grid, np.ones_like(grid))[1]
    np.testing.assert_allclose(score, -grid / 1.49, atol=0.15)


# --------------------------------------------------------------------------------------------------------------- promises


def test_the_features_of_time_are_those_of_the_layers() -> None:
    net = small(hidden=(), times=True, time_channels=6, time_scale=10.0)
    x, t, _ = batch(net)
    w, b = net.params["layers.0.weight"].data, net.params["layers.0.bias"].data
    want = x @ w[:3] + time_features(10.0 * t, 6) @ w[3:] + b
    np.testing.assert_allclose(net.predict(x, t), want, rtol=1e-12)
    np.testing.assert_allclose(net.predict(x, 0.25), net.predict(x, np.full(5, 0.25)), rtol=0, atol=0)


def test_the_config_survives_json_and_a_seed_is_one_network() -> None:
    net = MLP(np.int64(3), hidden=np.array([8, 6]), times=True, time_scale=1000, activation="tanh", zero_init=True, seed=5)
    again = MLP(**json.loads(json.dumps(net.config)))
    assert again.config == net.config and list(again.params) == list(net.params)
    np.testing.assert_array_equal(again.params.data, net.params.data)
    assert (MLP(**net.config | {"seed": 6}).params.data != net.params.data).mean() > 0.5
    assert not net.predict(np.ones((2, 3), np.float32), 0.5).any()
    assert MLP(3).predict(np.ones((2, 3), np.float32)).any()


def test_predict_is_the_call_and_is_safe_to_keep(backend: str) -> None:
    net = small(dtype="float32", times=True)
    x, t, _ = batch(net)
    recorded = net(x, t).data.copy()
    pool = kernels.Pool()
    with pool:
        kept = net.predict(x, t)
    with pool:
        net.predict(-x, t)
    np.testing.assert_array_equal(kept, recorded)
    with no_grad():
        np.testing.assert_array_equal(net(x, t).data, recorded)


def test_predict_answers_in_the_callers_kind() -> None:
    torch = pytest.importorskip("torch", reason="a torch tensor is the foreign array here")
    net = small(times=True)
    x, t, _ = batch(net)
    out = net.predict(torch.as_tensor(x), torch.as_tensor(t))
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), net.predict(x, t))


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "features_in must be at least 1", {"features_in": 0}),
        (TypeError, "features_in must be an integer", {"features_in": 2.0}),
        (ValueError, "features_out must be at least 1", {"features_out": 0}),
        (TypeError, "hidden must be a sequence of integers, not 64", {"hidden": 64}),
        (ValueError, r"hidden\[1\] must be at least 1", {"hidden": (8, 0)}),
        (ValueError, "time_channels must be even", {"time_channels": 7}),
        (ValueError, "time_scale must be positive", {"time_scale": 0}),
        (TypeError, "time_scale must be a number", {"time_scale": "x"}),
        (ValueError, r"activation must be one of \['silu', 'tanh'\], not 'relu'", {"activation": "relu"}),
        (TypeError, "seed must be an integer", {"seed": 0.5}),
        (ValueError, "dtype must be", {"dtype": "float16"}),
    ],
)
def test_options_out_of_range(error: type[Exception], words: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        MLP(**{"features_in": 3} | options)


def test_arguments_out_of_range() -> None:
    net = small(times=True)
    x, t, _ = batch(net)
    for words, error, wrong in (
        ("x must have shape", ValueError, (x[:, :2], t)),
        ("x must have shape", ValueError, (x[0], t)),
        ("x is float32", TypeError, (x.astype(np.float32), t)),
        ("x must be an array", TypeError, (x.tolist(), t)),
        ("t must have shape", ValueError, (x, t[:2])),
        ("t must be integers or floats", TypeError, (x, t > 0)),
        ("t must be given", ValueError, (x,)),
    ):
        with pytest.raises(error, match=words):
            net.predict(*wrong)
    with pytest.raises(ValueError, match="no times"):
        small().predict(x, t)


def test_an_empty_batch() -> None:
    net = small(times=True)
    x, t, _ = batch(net)
    assert net.predict(x[:0], t[:0]).shape == (0, 3)
    assert jvp(lambda z: net(z, t[:0]), x[:0], x[:0])[1].shape == (0, 3)


def test_the_same_code_runs_on_arrays_that_refuse_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def run(net: MLP) -> list[np.ndarray]:
        xp = net.params.xp
        x, t, v = batch(net)
        x, v = xp.asarray(x), xp.asarray(v)
        out = net(Tensor(x, tangent=v), t)
        backward((out, out.data), (out.tangent, v))
        arrays = [net.predict(x, xp.asarray(t)), net.params.grad, out.tangent.data, vjp(lambda z: net(z, t), x, v)[1]]
        assert all(isinstance(a, xp.ndarray) for a in arrays)
        return [a if isinstance(a, np.ndarray) else a.get() for a in arrays]

    for activation in ("silu", "tanh"):
        config = MLP(3, hidden=(8,), times=True, activation=activation).config
        with kernels.use("reference"):
            for there, here in zip(run(MLP(**config, xp=cupy)), run(MLP(**config)), strict=True):
                np.testing.assert_array_equal(there, here)
            with pytest.raises(TypeError, match="x is of numpy, the network of cupy"):
                MLP(**config, xp=cupy).predict(np.ones((2, 3), np.float32), 0.5)
