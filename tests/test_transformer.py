"""The Transformer against PyTorch, against differences, and its promises."""

import importlib
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.nets import Tensor, Transformer, gradcheck, jvp, no_grad, vjp
from alphabar.nets import token_functions as tf
from tests import fake_cupy

NETS: dict[str, dict[str, Any]] = {
    "states": {"states": 5},
    "learned positions": {"states": 5, "positions": "learned", "out": 7},
    "vectors": {"features_in": 3, "expansion": 2},
    "classes": {"states": 4, "classes": 3, "layers": 1, "heads": 1},
}
each = pytest.mark.parametrize("name", NETS)


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use(request.param):
        yield request.param


def stirred(net: Any, size: float = 0.3) -> Any:
    """The network with every weight moved: gates and the last layer start at zero."""
    z = np.random.default_rng(1).standard_normal(net.params.data.shape)
    net.params.data[...] += net.params.xp.asarray((size * z).astype(net.params.dtype))
    return net


def small(name: str = "states", **more: Any) -> Transformer:
    return stirred(Transformer(**{"length": 6, "width": 16, "layers": 2, "heads": 2, "dtype": "float64"} | NETS[name] | more))


def batch(net: Any, n: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rng, c = np.random.default_rng(2), net.config
    if c.get("states") is not None:
        x = rng.integers(0, c["states"], (n, c["length"]))
    else:
        x = rng.standard_normal((n, c["length"], c["features_in"])).astype(c["dtype"])
    return x, rng.uniform(0, 1000, n), None if c.get("classes") is None else np.arange(n) % (c["classes"] + 1)


@pytest.fixture(scope="module")
def torch_transformer() -> ModuleType:
    pytest.importorskip("torch", reason="PyTorch is the oracle here")
    return importlib.import_module("tests.torch_transformer")


# ------------------------------------------------------------------------------------------------------ values and gradients


def run_ours(net: Transformer, dout: np.ndarray) -> dict[str, np.ndarray]:
    x, t, y = batch(net)
    net.params.zero_grad()
    out = net(x, t, y)
    out.backward(dout.astype(net.params.dtype))
    return {"out": out.data} | {k: g.copy() for k, g in net.params.gradients().items()}


def run_theirs(module: ModuleType, net: Transformer, dout: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    import torch

    kind = getattr(torch, dtype)
    x, t, y = batch(net)
    theirs = module.TorchTransformer(net, kind)
    out = theirs(torch.tensor(x, dtype=None if x.dtype.kind == "i" else kind), t, y)
    out.backward(torch.tensor(dout, dtype=kind))
    return {"out": out.detach().numpy()} | {k: w.grad.numpy() for k, w in theirs.w.items()}


def direction(net: Transformer) -> np.ndarray:
    c = net.config
    return np.random.default_rng(3).standard_normal((3, c["length"], c["out"]))


@each
def test_values_and_gradients_are_pytorchs_in_float64(name: str, torch_transformer: ModuleType) -> None:
    net = small(name)
    dout = direction(net)
    ours, theirs = run_ours(net, dout), run_theirs(torch_transformer, net, dout, "float64")
    assert ours.keys() == theirs.keys()
    for k, e in theirs.items():  # without turns the keys' bias has no effect, and its gradient is rounding alone
        np.testing.assert_allclose(ours[k], e, rtol=1e-9, atol=1e-11 * max(np.abs(e).max(), 1), err_msg=k)


@each
def test_in_float32_they_are_as_near_as_pytorchs(name: str, torch_transformer: ModuleType, backend: str) -> None:
    net = stirred(small(name, dtype="float32", width=32, length=20), -0.2)  # 0.3 − 0.2
    dout = direction(net).astype(np.float32)
    exact, theirs = (run_theirs(torch_transformer, net, dout, dtype) for dtype in ("float64", "float32"))
    ours = run_ours(net, dout)
    assert all(a.dtype == np.float32 for a in ours.values())

    def errors(given: dict[str, np.ndarray]) -> np.ndarray:
        return np.array([np.linalg.norm(a - exact[k]) / max(np.linalg.norm(exact[k]), 1) for k, a in given.items()])

    assert errors(ours).max() <= 1e-5
    assert np.linalg.norm(errors(ours)) <= 2 * np.linalg.norm(errors(theirs))


@each
def test_gradients_are_those_of_differences(name: str) -> None:
    net = small(name)
    x, t, y = batch(net)
    u = direction(net)
    net.params.zero_grad()
    net(x, t, y).backward(u)
    flat = net.params.data.copy()
    v = np.random.default_rng(4).standard_normal(flat.shape) / np.sqrt(flat.size)

    def value(h: float) -> float:
        with net.params.using(flat + h * v):
            return float((u * net.predict(x, t, y)).sum())

    h = 1e-3
    numeric = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert numeric == pytest.approx(float(net.params.grad @ v), rel=1e-7)


def test_gradients_of_vectors_and_of_their_tangents_are_those_of_differences() -> None:
    net = small("vectors")
    x, t, _ = batch(net)
    gradcheck(lambda z: net(z, t), x)

    def product(z: Tensor, dot: Tensor) -> Tensor:
        z.tangent = dot
        return net(z, t).tangent

    gradcheck(product, x, np.random.default_rng(5).standard_normal(x.shape), h=1e-4, tolerance=1e-6)


def test_products_with_the_jacobian_agree_from_both_sides() -> None:
    net = small("vectors", positions="learned")
    x, t, _ = batch(net)
    u, v = np.random.default_rng(5).standard_normal((2, *x.shape))
    right, left = jvp(lambda z: net(z, t), x, v)[1], vjp(lambda z: net(z, t), x, u)[1]
    np.testing.assert_allclose((u * right).sum(axis=(1, 2)), (left * v).sum(axis=(1, 2)), rtol=1e-10)


# ------------------------------------------------------------------------------------------------------------------ places


def test_turned_products_depend_on_distances_alone() -> None:
    q, k = np.random.default_rng(0).standard_normal((2, 16))
    turn = importlib.import_module("alphabar.nets.transformer").Rotary(9, 8, np, "float64")
    qs, ks = (turn(Tensor(np.tile(v, (1, 9, 1))), 2).data.reshape(9, 2, 8) for v in (q, k))
    scores = np.einsum("ihd,jhd->hij", qs, ks)
    for distance in range(-8, 9):
        for head in scores:
            diagonal = np.diagonal(head, distance)
            np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-12)
    np.testing.assert_allclose((qs**2).sum(axis=-1), np.tile((q.reshape(2, 8) ** 2).sum(axis=-1), (9, 1)), rtol=1e-13)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_network_knows_the_order_of_its_tokens(positions: str) -> None:
    net = small("states", positions=positions)
    x, t, _ = batch(net)
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = net.predict(x[:, order], t)
    assert np.abs(moved - net.predict(x, t)[:, order]).max() > 1e-2


def test_a_head_of_even_depth_can_be_turned() -> None:
    with pytest.raises(ValueError, match="multiple of 2·heads = 12, not 18"):
        Transformer(4, states=3, width=18, heads=6)
    assert Transformer(4, states=3, width=18, heads=6, positions="learned").config["width"] == 18


# --------------------------------------------------------------------------------------------------------------- promises


@each
def test_it_starts_at_zero_and_as_the_identity(name: str) -> None:
    net = Transformer(**{"length": 6, "width": 16, "heads": 2} | NETS[name])
    x, t, y = batch(net)
    assert not net.predict(x, t, y).any()
    net.params["linear_out.weight"].data[...] = np.eye(16)[:, : net.config["out"]]
    with no_grad():
        h = net.enter(Tensor(x)) if net.enter is not None else net.embed(x)
        if net.trunk.places is not None:
            h = tf.add_rows(h, net.trunk.places)
        n = (h.data - h.data.mean(-1, keepdims=True)) / np.sqrt(h.data.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(net.predict(x, t, y), n[..., : net.config["out"]], rtol=1e-5, atol=1e-5)


def test_the_config_survives_json_and_a_seed_is_one_network() -> None:
    for options in NETS.values():
        net = Transformer(**{"length": np.int64(6), "width": np.int32(16), "heads": 2, "seed": 5, "dropout": 0.1} | options)
        again = Transformer(**json.loads(json.dumps(net.config)))
        assert again.config == net.config and list(again.params) == list(net.params)
        np.testing.assert_array_equal(again.params.data, net.params.data)
        assert (Transformer(**net.config | {"seed": 6}).params.data != net.params.data).mean() > 0.5


def test_a_sample_does_not_depend_on_its_batch() -> None:
    net = small("states", dtype="float32")
    x, t, _ = batch(net, 5)
    np.testing.assert_array_equal(net.predict(x, t)[2:], net.predict(x[2:], t[2:]))
    assert net.predict(x[:0], t[:0]).shape == (0, 6, 5)
    np.testing.assert_array_equal(net.predict(x, 7), net.predict(x, np.full(5, 7)))


def test_predict_is_the_call_and_is_safe_to_keep(backend: str) -> None:
    net = small("states", dtype="float32")
    x, t, _ = batch(net)
    recorded = net(x, t).data.copy()
    pool = kernels.Pool()
    with pool:
        kept = net.predict(x, t)
    with pool:
        net.predict((x + 1) % 5, t)
    np.testing.assert_array_equal(kept, recorded)


def test_the_null_class() -> None:
    net = small("classes")
    x, t, _ = batch(net)
    assert net.null == 3
    np.testing.assert_array_equal(net.predict(x, t), net.predict(x, t, np.full(3, 3)))
    assert np.abs(net.predict(x, t, np.zeros(3, int)) - net.predict(x, t)).max() > 1e-3
    with pytest.raises(ValueError, match="no null class"):
        _ = small("classes", null_class=False).null
    with pytest.raises(ValueError, match="y must be given"):
        small("classes", null_class=False).predict(x, t)


def test_dropout_is_on_in_training_alone_and_repeats() -> None:
    net = small("states", dropout=0.4)
    x, t, _ = batch(net)
    with pytest.raises(ValueError, match="needs step="):
        net(x, t)
    one, again, other = (net(x, t, step=k).data.copy() for k in (3, 3, 4))
    np.testing.assert_array_equal(one, again)
    assert (one != other).all(axis=-1).mean() > 0.9
    np.testing.assert_array_equal(net(x[1:], t[1:], step=3, first_sample=1).data, one[1:])
    np.testing.assert_array_equal(net.predict(x, t), small("states").predict(x, t))


def test_memory_grows_with_the_length_not_with_its_square() -> None:
    sizes = []
    for length in (256, 512):
        net, pool = small("states", dtype="float32", length=length), kernels.Pool()
        x, t, _ = batch(net)
        with pool:
            out = net(x, t)
            out.backward(out.data)
        sizes.append(pool.nbytes)
    assert sizes[1] < 2.1 * sizes[0]


def test_inputs_are_left_alone() -> None:
    net = small("vectors")
    x, t, _ = batch(net)
    kept = x.copy()
    out = net(Tensor(x, needs_grad=True), t)
    out.backward(out.data)
    np.testing.assert_array_equal(x, kept)


def test_foreign_arrays_are_answered_in_kind() -> None:
    torch = pytest.importorskip("torch", reason="a torch tensor is the foreign array here")
    net = small("states")
    x, t, _ = batch(net)
    out = net.predict(torch.as_tensor(x), torch.as_tensor(t))
    assert isinstance(out, torch.Tensor)
    np.testing.assert_array_equal(out.numpy(), net.predict(x, t))


@pytest.mark.parametrize(
    ("error", "words", "options"),
    [
        (ValueError, "one of states and features_in must be given, not None and None", {"states": None}),
        (ValueError, "one of states and features_in must be given, not 3 and 2", {"features_in": 2}),
        (ValueError, "length must be at least 1", {"length": 0}),
        (TypeError, "length must be an integer", {"length": 4.0}),
        (ValueError, "states must be at least 1", {"states": 0}),
        (ValueError, "out must be at least 1", {"out": 0}),
        (ValueError, "layers must be at least 1", {"layers": 0}),
        (TypeError, "heads must be an integer", {"heads": "6"}),
        (ValueError, "width must be even and a multiple of 2·heads = 12, not 32", {"width": 32}),
        (ValueError, "expansion must be at least 1", {"expansion": 0}),
        (ValueError, r"positions must be one of \('rotary', 'learned'\), not 'none'", {"positions": "none"}),
        (ValueError, "classes must be at least 1", {"classes": 0}),
        (ValueError, r"dropout must be in \[0, 1\), not 1", {"dropout": 1}),
        (TypeError, "dropout must be a number", {"dropout": "a"}),
        (TypeError, "seed must be an integer", {"seed": 0.5}),
        (ValueError, "dtype must be", {"dtype": "float16"}),
    ],
)
def test_options_out_of_range(error: type[Exception], words: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        Transformer(**{"length": 4, "states": 3} | options)


def test_arguments_out_of_range() -> None:
    net, vectors = small("states"), small("vectors")
    x, t, _ = batch(net)
    z, _, _ = batch(vectors)
    for who, words, error, wrong in (
        (net, r"x must have shape \(B, 6\), not \(3, 5\)", ValueError, (x[:, :5], t)),
        (net, r"x must have shape \(B, 6\), not \(\)", ValueError, (np.int64(1), t)),
        (net, "x must be integers", TypeError, (x.astype(float), t)),
        (net, r"x must be in 0..4, not 0..5", ValueError, (np.minimum(x * 5, 5), t)),
        (net, "t must have shape", ValueError, (x, t[:2])),
        (net, "y is given, but the network has no classes", ValueError, (x, t, np.zeros(3, int))),
        (vectors, r"x must have shape \(B, 6, 3\)", ValueError, (z[..., :2], t)),
        (vectors, "x is float32, the network float64", TypeError, (z.astype(np.float32), t)),
        (small("classes"), r"y must be in 0..3, not 4..4", ValueError, (x % 4, t, np.full(3, 4))),
    ):
        with pytest.raises(error, match=words):
            who.predict(*wrong)


def test_the_same_code_runs_on_arrays_that_refuse_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def run(net: Transformer) -> list[np.ndarray]:
        xp = net.params.xp
        x, t, y = (None if a is None else xp.asarray(a) for a in batch(net))
        drop = {"step": 1} if net.config["dropout"] else {}
        out = net(x, t, y, **drop)
        out.backward(out.data)
        arrays = [net.predict(x, t, y), net.params.grad]
        assert all(isinstance(a, xp.ndarray) for a in arrays)
        return [a if isinstance(a, np.ndarray) else a.get() for a in arrays]

    for name in NETS:
        config = small(name, dtype="float32", dropout=0.2).config
        with kernels.use("reference"):
            for there, here in zip(
                run(stirred(Transformer(**config, xp=cupy))), run(stirred(Transformer(**config))), strict=True
            ):
                np.testing.assert_array_equal(there, here)
