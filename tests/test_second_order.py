"""Tangents, and gradients through them, against PyTorch (forward mode and double backward), differences and themselves."""

import importlib
import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.nets import Tensor, UNet, backward, gradcheck, jvp, no_grad, vjp
from alphabar.nets import functions as f
from alphabar.nets.autograd import record
from tests import fake_cupy

torch = pytest.importorskip("torch", reason="PyTorch is the oracle here")
functions = importlib.import_module("tests.test_functions")
unets = importlib.import_module("tests.test_unet")
Case = functions.Case

Arrays = list[np.ndarray]
MASK = f.dropout(Tensor(np.ones((3, 4, 4, 8))), 0.3, seed=5, step=2, layer=1).data
CASES = [
    *functions.CASES,
    functions.conv_case("upsample pad (0, 1)", (2, 3, 4, 5), (3, 3, 5, 8), upsample=True, pad=(0, 1)),
    Case("linear without bias", f.linear, lambda x, w: x @ w, ((5, 12), (12, 7))),
    Case("tanh", f.tanh, torch.tanh, ((5, 33),)),
    Case(
        "group norm modulated without silu",
        lambda x, g, b, emb: f.group_norm_silu(x, g, b, 4, 1e-5, False, emb, 2),
        functions.torch_norm(4, False, 2),
        ((3, 4, 4, 8), (8,), (8,), (3, 19)),
    ),
    Case(
        "dropout",
        lambda x: f.dropout(x, 0.3, seed=5, step=2, layer=1),
        lambda x: x * torch.as_tensor(MASK).to(x.dtype),
        ((3, 4, 4, 8),),
    ),
]
# which inputs carry a tangent: all of them, or one alone
SUBSETS = [(case, subset) for case in CASES for subset in ("all", *range(len(case.shapes)))]
each = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
every = pytest.mark.parametrize(("case", "subset"), SUBSETS, ids=lambda p: getattr(p, "name", str(p)))


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use(request.param):
        yield request.param


def directions(case: Any, arrays: Arrays, subset: Any = "all") -> tuple[Arrays, np.ndarray, np.ndarray]:
    """A tangent for each input (zero for those outside the subset) and gradients of output and output's tangent."""
    rng = np.random.default_rng(len(case.name) + 1)
    dots = [rng.standard_normal(a.shape) * (subset in ("all", i)) for i, a in enumerate(arrays)]
    shape = case.ours(*map(Tensor, arrays)).shape
    return dots, rng.standard_normal(shape), rng.standard_normal(shape)


def ours(case: Any, arrays: Arrays, dots: Arrays, dy: np.ndarray, dv: np.ndarray, dtype: type) -> Arrays:
    """[y, ẏ, gradients of ⟨y, dy⟩ + ⟨ẏ, dv⟩ to the inputs, and to their tangents]."""
    tangents = [Tensor(d.astype(dtype), needs_grad=True) if d.any() else None for d in dots]
    tensors = [Tensor(a.astype(dtype), needs_grad=True, tangent=d) for a, d in zip(arrays, tangents, strict=True)]
    y = case.ours(*tensors)
    value, dot = y.data.copy(), y.tangent.data.copy()
    backward((y, dy.astype(dtype)), (y.tangent, dv.astype(dtype)))
    return [value, dot, *(t.grad for t in tensors), *(np.zeros(1) if d is None else d.grad for d in tangents)]


def theirs(case: Any, arrays: Arrays, dots: Arrays, dy: np.ndarray, dv: np.ndarray, dtype: Any) -> Arrays:
    tensors, tangents = ([torch.tensor(a, dtype=dtype, requires_grad=True) for a in v] for v in (arrays, dots))
    y, dot = torch.autograd.functional.jvp(case.theirs, tuple(tensors), tuple(tangents), create_graph=True)
    loss = (y * torch.tensor(dy, dtype=dtype)).sum() + (dot * torch.tensor(dv, dtype=dtype)).sum()
    grads = torch.autograd.grad(loss, tensors + tangents, allow_unused=True, materialize_grads=True)
    of_tangents = [g.numpy() if d.any() else np.zeros(1) for g, d in zip(grads[len(arrays) :], dots, strict=True)]
    return [y.detach().numpy(), dot.detach().numpy(), *(g.numpy() for g in grads[: len(arrays)]), *of_tangents]


# ------------------------------------------------------------------------------------------------------------ each function


@every
def test_the_tangent_is_that_of_pytorchs_forward_mode(case: Any, subset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    group_norm = torch.nn.functional.group_norm  # in forward mode it takes contiguous images alone
    monkeypatch.setattr(torch.nn.functional, "group_norm", lambda x, *options: group_norm(x.contiguous(), *options))
    arrays, _ = functions.inputs(case)
    dots, dy, dv = directions(case, arrays, subset)
    primals, tangents = (tuple(map(torch.tensor, v)) for v in (arrays, dots))
    want = torch.func.jvp(case.theirs, primals, tangents)[1].numpy()
    got = ours(case, arrays, dots, dy, dv, np.float64)[1]
    assert np.abs(want).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10 * np.abs(want).max())


@every
def test_gradients_through_the_tangent_are_those_of_pytorchs_double_backward(case: Any, subset: Any) -> None:
    arrays, _ = functions.inputs(case)
    dots, dy, dv = directions(case, arrays, subset)
    got, want = ours(case, arrays, dots, dy, dv, np.float64), theirs(case, arrays, dots, dy, dv, torch.float64)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(b).max())


@each
def test_gradients_through_the_tangent_are_those_of_differences(case: Any) -> None:
    n = len(case.shapes)

    def product(*tensors: Tensor) -> Tensor:
        for x, dot in zip(tensors[:n], tensors[n:], strict=True):
            x.tangent = dot
        return case.ours(*tensors[:n]).tangent

    arrays, rng = functions.inputs(case)
    gradcheck(product, *arrays, *(rng.standard_normal(a.shape) for a in arrays))


@each
def test_the_float32_error_is_at_most_twice_pytorchs(case: Any, backend: str) -> None:
    arrays, _ = functions.inputs(case)
    arrays = [a.astype(np.float32).astype(np.float64) for a in arrays]
    dots, dy, dv = directions(case, arrays)
    dots, (dy, dv) = ([a.astype(np.float32).astype(np.float64) for a in v] for v in (dots, (dy, dv)))
    exact = theirs(case, arrays, dots, dy, dv, torch.float64)
    mine, others = ours(case, arrays, dots, dy, dv, np.float32), theirs(case, arrays, dots, dy, dv, torch.float32)
    for e, a, b in zip(exact, mine, others, strict=True):
        assert a.dtype == np.float32
        error, budget = np.linalg.norm(a - e), 2 * np.linalg.norm(b - e)
        assert error <= budget + 2 * np.finfo(np.float32).eps * np.linalg.norm(e)


# -------------------------------------------------------------------------------------------------------- the whole network

NETS = {k: unets.NETS[k] for k in ("attention and classes", "scale_shift", "three levels")}


def sliced(net: UNet, x: np.ndarray, t: np.ndarray, y: Any, v: np.ndarray) -> dict[str, np.ndarray]:
    """The gradients of the mean over the batch of vᵀJv + ½‖s‖², J the Jacobian of the network s."""
    net.params.zero_grad()
    image, direction = Tensor(x, needs_grad=True), Tensor(v, needs_grad=True)
    image.tangent = direction
    s = net(image, t, y)
    product = s.tangent.data.copy()
    batch = x.dtype.type(len(x))
    direction.receive(product / batch)  # v stands before J as well
    backward((s, s.data / batch), (s.tangent, v / batch))
    return {"product": product, "input": image.grad, "v": direction.grad} | net.params.gradients()


def torch_sliced(
    module: ModuleType, net: UNet, x: np.ndarray, t: np.ndarray, y: Any, v: np.ndarray, dtype: str
) -> dict[str, Any]:
    kind = getattr(torch, dtype)
    weights = {k: torch.tensor(w, dtype=kind, requires_grad=True) for k, w in net.params.arrays().items()}
    image, direction = (torch.tensor(a, dtype=kind, requires_grad=True) for a in (x, v))
    labels = None if y is None else torch.as_tensor(y)

    def network(image: Any) -> Any:
        return module.unet(net.config, weights, image, torch.as_tensor(t), labels)

    s, product = torch.autograd.functional.jvp(network, image, direction, create_graph=True)
    loss = ((direction * product).sum() + (s * s).sum() / 2) / len(x)
    loss.backward()
    arrays = {"product": product.detach(), "input": image.grad, "v": direction.grad} | {k: w.grad for k, w in weights.items()}
    return {k: a.numpy() for k, a in arrays.items()}


def network(name: str, dtype: str, batch: int) -> tuple[UNet, np.ndarray, np.ndarray, Any, np.ndarray]:
    net = unets.small(dtype, **NETS[name] | {"out_channels": None})
    x, t, y = unets.arguments(net, batch)
    return net, x, t, y, np.random.default_rng(1).choice([-1, 1], x.shape).astype(dtype)


@pytest.fixture(scope="module")
def torch_unet() -> ModuleType:
    return importlib.import_module("tests.torch_unet")


@pytest.mark.parametrize("name", NETS)
def test_gradients_of_sliced_score_matching_are_pytorchs(name: str, torch_unet: ModuleType) -> None:
    given = network(name, "float64", 3)
    got, want = sliced(*given), torch_sliced(torch_unet, *given, "float64")
    assert got.keys() == want.keys()
    for key, e in want.items():
        scale = np.abs(e).max()
        assert scale > 1e-6 or key.endswith("to_k.bias")  # which shifts all scores of a query alike
        np.testing.assert_allclose(got[key], e, rtol=0, atol=1e-10 * max(scale, 1), err_msg=key)


@pytest.mark.parametrize("name", NETS)
def test_their_float32_error_is_at_most_twice_pytorchs(name: str, torch_unet: ModuleType) -> None:
    given = network(name, "float32", 8)
    exact, theirs = (torch_sliced(torch_unet, *given, dtype) for dtype in ("float64", "float32"))
    got = sliced(*given)
    whole = np.linalg.norm([np.linalg.norm(e) for k, e in exact.items() if k not in ("product", "input", "v")])
    total = {"ours": 0.0, "theirs": 0.0}
    for key, e in exact.items():
        assert got[key].dtype == np.float32
        error, budget = np.linalg.norm(got[key] - e), np.linalg.norm(theirs[key] - e)
        if key in ("product", "input", "v"):
            assert error <= 2 * budget + 1e-7 * np.linalg.norm(e), key
        else:
            # of a single small gradient, PyTorch's error is one draw: the floor is a share of all gradients
            assert error <= 2 * budget + 1e-6 * np.linalg.norm(e) + 1e-8 * whole, key
            total["ours"] += error**2
            total["theirs"] += budget**2
    assert total["ours"] <= 4 * total["theirs"]


def test_tangents_of_all_parameters_are_honoured() -> None:
    net = unets.small("float64", classes=4, scale_shift=True)
    x, t, y = unets.arguments(net)
    flat = np.random.default_rng(2).standard_normal(net.params.data.shape)
    for name, view in zip(net.params, net.params._views(flat), strict=True):
        net.params[name].tangent = view
    value = net.params.data.copy()
    with no_grad():
        dot = net(x, t, y).tangent.data.copy()

    def at(h: float) -> np.ndarray:
        with net.params.using(value + h * flat):
            return net.predict(x, t, y)

    h = 1e-4
    numeric = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    np.testing.assert_allclose(dot, numeric, atol=1e-8 * np.abs(dot).max())


# --------------------------------------------------------------------------------------------------------------- products


def test_products_from_both_sides_agree_and_leave_nothing_behind(backend: str) -> None:
    net = unets.small(classes=4, dropout=0.3)
    x, t, y = unets.arguments(net)
    u, v = np.random.default_rng(1).standard_normal((2, *x.shape)).astype(np.float32)
    net.params.grad[...] = 7
    given = [a.copy() for a in (x, u, v)]

    def network(z: Tensor) -> Tensor:
        return net(z, t, y)

    value, right = jvp(network, x, v)
    again, left = vjp(network, x, u)
    np.testing.assert_array_equal(value, net.predict(x, t, y))
    np.testing.assert_array_equal(again, value)
    one, two = np.vdot(u.astype(float), right), np.vdot(left.astype(float), v)
    assert abs(one) > 1 and abs(one - two) < 1e-5 * np.linalg.norm(u) * np.linalg.norm(right)
    np.testing.assert_array_equal(net.params.grad, 7)
    for kept, array in zip(given, (x, u, v), strict=True):
        np.testing.assert_array_equal(array, kept)


def test_products_of_a_function_in_closed_form() -> None:
    rng = np.random.default_rng(0)
    x, v, u = rng.standard_normal((3, 5, 4))
    w = Tensor(rng.standard_normal((4, 4)), needs_grad=True)

    def squash(z: Tensor) -> Tensor:
        return f.tanh(f.linear(z, w))

    slope = 1 - np.tanh(x @ w.data) ** 2
    np.testing.assert_allclose(jvp(squash, x, v)[1], slope * (v @ w.data), rtol=1e-13)
    np.testing.assert_allclose(vjp(squash, x, u)[1], (slope * u) @ w.data.T, rtol=1e-13)
    assert w.grad is None
    w.tangent = np.ones((4, 4))  # of another forward pass: J is with respect to x alone
    np.testing.assert_allclose(jvp(squash, x, v)[1], slope * (v @ w.data), rtol=1e-13)


def test_products_of_constants_and_of_the_identity() -> None:
    x, v = np.random.default_rng(0).standard_normal((2, 3, 4))
    constant = Tensor(np.ones((3, 2)), needs_grad=True)
    assert not jvp(lambda z: constant, x, v)[1].any()
    assert not vjp(lambda z: constant, x, np.ones((3, 2)))[1].any() and constant.grad is None
    np.testing.assert_array_equal(jvp(lambda z: z, x, v)[1], v)
    value, left = vjp(lambda z: z, x, v)
    np.testing.assert_array_equal(left, v)
    assert not np.shares_memory(left, v) and not np.shares_memory(value, x)


def test_a_products_tape_is_its_own() -> None:
    x = Tensor(np.random.default_rng(0).standard_normal((3, 4)), needs_grad=True)
    h = f.silu(x)
    with no_grad():  # and it records where the caller does not
        left = vjp(lambda z: f.add(f.tanh(z), h), x.data, np.ones((3, 4)))[1]
    np.testing.assert_allclose(left, 1 - np.tanh(x.data) ** 2, rtol=1e-14)
    assert x.grad is None
    h.backward(np.ones((3, 4)))  # is still there
    assert x.grad is not None


def test_products_answer_in_the_callers_kind_and_are_safe_to_keep() -> None:
    net = unets.small()
    x, t, _ = unets.arguments(net)
    v = np.ones_like(x)
    for product in (jvp, vjp):
        value, want = product(lambda z: net(z, t), x, v)
        out, result = product(lambda z: net(z, t), torch.as_tensor(x), torch.as_tensor(v))
        assert isinstance(out, torch.Tensor) and isinstance(result, torch.Tensor)
        np.testing.assert_array_equal(result.numpy(), want)
        pool = kernels.Pool()
        with pool:
            kept = product(lambda z: net(z, t), x, v)
        with pool:
            product(lambda z: net(z, t), -x, v)
        np.testing.assert_array_equal(kept, (value, want))


def test_arguments_of_products_that_do_not_fit() -> None:
    x = np.ones((3, 4))
    for product, name in ((jvp, "v"), (vjp, "u")):
        for error, words, arguments in (
            (ValueError, f"{name} is float64", (f.silu, x, x[:2])),
            (ValueError, f"{name} is float32", (f.silu, x, x.astype(np.float32))),
            (TypeError, f"{name} must be an array", (f.silu, x, x.tolist())),
            (TypeError, "x must be an array", (f.silu, x.tolist(), x)),
            (TypeError, "x must be of a float dtype", (f.silu, x.astype(int), x)),
            (TypeError, "f must return a Tensor", (lambda z: z.data, x, x)),
        ):
            with pytest.raises(error, match=words):
                product(*arguments)


# --------------------------------------------------------------------------------------------------------------- promises


def test_without_tangents_no_rule_for_them_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Tensor:
        raise AssertionError

    x = Tensor(np.ones(3), needs_grad=True)
    assert record(x.data, (x,), fail, fail).tangent is None
    for name in dir(f.tangents):
        if isinstance(getattr(f.tangents, name), type(fail)) and name not in ("sigmoid", "array_module"):
            monkeypatch.setattr(f.tangents, name, fail)
    for name in ("total", "zero_or"):
        monkeypatch.setattr(f, name, fail)
    net = unets.small(scale_shift=True, classes=3, dropout=0.1)
    image, t, y = unets.arguments(net)
    out = net(image, t, y, step=0)
    out.backward(out.data)
    with pytest.raises(AssertionError):
        net(Tensor(image, tangent=image), t, y, step=0)


def test_a_function_without_a_rule_refuses_tangents() -> None:
    x = Tensor(np.ones(3), tangent=np.ones(3))
    with pytest.raises(NotImplementedError, match="no rule for tangents"):
        record(2 * x.data, (x,), lambda dy: x.receive(2 * dy))


def test_tangents_that_do_not_fit() -> None:
    x = np.ones((2, 3))
    for error, words, tangent in (
        (ValueError, r"tangent is float64 \(2, 2\), want float64 \(2, 3\)", np.ones((2, 2))),
        (ValueError, "tangent is float32", np.ones((2, 3), np.float32)),
        (TypeError, "tangent must be an array of numpy, not list", [[1.0]]),
        (ValueError, "first order", Tensor(x, tangent=x)),
    ):
        with pytest.raises(error, match=words):
            Tensor(x, tangent=tangent)
    y = Tensor(x, tangent=x)
    y.tangent = None
    assert f.silu(y).tangent is None


def test_sums_in_place_write_over_no_tangent() -> None:
    rng = np.random.default_rng(0)
    w, x, v = Tensor(rng.standard_normal((1, 1, 4, 4)), needs_grad=True), *rng.standard_normal((2, 2, 3, 3, 4))
    emb, dot = rng.standard_normal((2, 2, 5))

    def run(inplace: bool) -> Arrays:
        image, columns = Tensor(x.copy(), True, Tensor(v.copy(), True)), Tensor(emb.copy(), True, Tensor(dot.copy(), True))
        h = f.add_columns(f.conv2d(image, w), columns, 1, inplace=inplace)
        shifted = f.add(Tensor(np.ones_like(x)), image)  # its tangent is the image's own
        y = f.add(f.conv2d(f.silu(f.add(image, h, inplace=inplace)), w), shifted, inplace=inplace)
        w.grad = None
        out = [y.data.copy(), y.tangent.data.copy()]
        backward((y, y.data.copy()), (y.tangent, y.tangent.data.copy()))
        leaves = (image, image.tangent, columns, columns.tangent)
        np.testing.assert_array_equal(image.tangent.data, v)
        np.testing.assert_array_equal(columns.tangent.data, dot)
        return [*out, w.grad, *(leaf.grad for leaf in leaves)]

    for a, b in zip(run(True), run(False), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_same_numbers_in_a_pool_over_and_over(backend: str) -> None:
    net = unets.small(classes=4, dropout=0.1, scale_shift=True)
    x, t, y = unets.arguments(net)
    v = np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)

    def step() -> np.ndarray:
        net.params.zero_grad()
        out = net(Tensor(x, tangent=v), t, y, step=3)
        backward((out, out.data), (out.tangent, v))
        return net.params.grad.copy()

    want, pool, sizes = step(), kernels.Pool(), []
    for _ in range(3):
        with pool:
            np.testing.assert_array_equal(step(), want)
        sizes.append(pool.nbytes)
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_no_grad_carries_tangents_and_keeps_nothing() -> None:
    x = Tensor(np.ones((2, 3)), needs_grad=True, tangent=np.ones((2, 3)))
    with no_grad():
        h = f.silu(x)
        held = weakref.ref(h.tangent.data)
        y = f.tanh(h)
    del h
    assert held() is None
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        y.tangent.backward(np.ones((2, 3)))


def test_several_roots_are_one_pass() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 4))

    def run(*order: int, factory: Callable[[Tensor], Tensor] = f.silu) -> np.ndarray:
        x = Tensor(a, needs_grad=True)
        h = factory(x)
        y = f.tanh(h)
        roots = [(h, b), (y, c), (h, c), (x, b)]
        backward(*(roots[i] for i in order))
        return x.grad

    parts = [run(i) for i in range(4)]
    np.testing.assert_allclose(run(0, 1, 2, 3), sum(parts), rtol=1e-13)
    np.testing.assert_allclose(run(3, 2, 1, 0), sum(parts), rtol=1e-13)
    assert np.shape(b) == (4,) and not np.array_equal(parts[0], parts[1])


def test_roots_that_do_not_fit_leave_everything_as_it_was() -> None:
    x = Tensor(np.ones(3), needs_grad=True)
    y, z = f.silu(x), f.tanh(x)
    one = np.ones(3)
    for error, words, root in (
        (TypeError, "not NoneType", (y.tangent, one)),
        (ValueError, "dout is float32", (z, one.astype(np.float32))),
        (RuntimeError, "nothing was recorded", (Tensor(one), one)),
    ):
        with pytest.raises(error, match=words):
            backward((y, one), root)
    assert x.grad is None
    backward((y, one))
    with pytest.raises(RuntimeError, match="already gone"):
        backward((z, one), (y, one))


def test_empty_batches_have_empty_tangents() -> None:
    net = unets.small(classes=4, scale_shift=True)
    x, t, y = unets.arguments(net)
    for product in (jvp, vjp):
        assert product(lambda z: net(z, t[:0], y[:0]), x[:0], x[:0])[1].shape == (0, 8, 8, 1)
    image = Tensor(x[:0], tangent=x[:0])
    net.params.zero_grad()
    out = net(image, t[:0], y[:0])
    backward((out, out.data), (out.tangent, x[:0]))
    assert not net.params.grad.any()


@pytest.mark.parametrize("options", [{}, {"scale_shift": True, "dropout": 0.2}])
def test_the_same_code_runs_on_arrays_that_refuse_numpy(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy.cupy
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def run(net: UNet) -> Arrays:
        xp = net.params.xp
        x, t, y = unets.arguments(net)
        device, v = xp.asarray(x), xp.asarray(np.random.default_rng(1).standard_normal(x.shape).astype(np.float32))
        out = net(Tensor(device, tangent=v), t, y, step=1)
        backward((out, out.data), (out.tangent, v))
        products = [product(lambda z: net(z, t, y), device, v)[1] for product in (jvp, vjp)]
        arrays = [out.data, out.tangent.data, net.params.grad, *products]
        for name in net.params:
            net.params[name].tangent = net.params[name].data.copy()
        arrays.append(net(device, t, y, step=1).tangent.data)
        assert all(isinstance(a, xp.ndarray) for a in arrays)
        return [a if isinstance(a, np.ndarray) else a.get() for a in arrays]

    config = unets.small(classes=4, **options).config
    with kernels.use("reference"):
        for there, here in zip(run(UNet(**config, xp=cupy)), run(UNet(**config)), strict=True):
            np.testing.assert_array_equal(there, here)
        with pytest.raises(TypeError, match="tangent must be an array of cupy"):
            Tensor(cupy.ones(3), tangent=np.ones(3))
        with pytest.raises(TypeError, match="v must be an array of cupy like x"):
            jvp(f.silu, cupy.ones(3), np.ones(3))
