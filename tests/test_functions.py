"""Each differentiable function against PyTorch and finite differences in float64, and its float32 error against PyTorch's own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from alphabar import kernels
from alphabar.nets import Tensor, gradcheck
from alphabar.nets import functions as f
from alphabar.nets import token_functions as tf

torch = pytest.importorskip("torch", reason="PyTorch is the oracle here")
F = torch.nn.functional


def nchw(x):
    return x.permute(0, *range(x.ndim - 1, 0, -1)) if x.ndim == 3 else x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def torch_conv(stride=1, upsample=False, pad=None):
    def conv(x, w, b=None):
        x = nchw(x)
        if upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        before, after = (w.shape[0] // 2,) * 2 if pad is None else pad
        return nhwc(F.conv2d(F.pad(x, (before, after, before, after)), w.permute(3, 2, 0, 1), b, stride))

    return conv


def torch_norm(groups, silu, at=None):
    def norm(x, gamma, beta, emb=None):
        n = F.group_norm(x.movedim(-1, 1), groups, gamma, beta, 1e-5).movedim(1, -1)
        if emb is not None:
            c = x.shape[-1]
            scale, shift = (emb[:, k : k + c].reshape(len(x), *(1,) * (x.ndim - 2), c) for k in (at, at + c))
            n = n * (1 + scale) + shift
        return F.silu(n) if silu else n

    return norm


def torch_layer_norm(at=None):
    def norm(x, gamma, beta, emb=None):
        # by its definition: third derivatives of F.layer_norm are wrong (PyTorch 2.13, gradient through a tangent)
        n = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + 1e-5) * gamma + beta
        if emb is None:
            return n
        scale, shift = (emb[:, None, k : k + x.shape[-1]] for k in (at, at + x.shape[-1]))
        return n * (1 + scale) + shift

    return norm


def torch_rotary(heads):
    def rotary(x):
        a, b = x.reshape(*x.shape[:2], heads, -1).chunk(2, -1)
        c, s = (torch.as_tensor(v).to(x.dtype)[:, None] for v in (COS, SIN))
        return torch.cat([a * c - b * s, a * s + b * c], -1).reshape(x.shape)

    return rotary


def torch_attention(heads, scale=None):
    def attention(q, k, v):
        b, *places, c = q.shape
        qh, kh, vh = (z.reshape(b, -1, heads, c // heads).transpose(1, 2) for z in (q, k, v))
        s = qh @ kh.transpose(2, 3) * ((c // heads) ** -0.5 if scale is None else scale)
        return (torch.softmax(s, -1) @ vh).transpose(1, 2).reshape(b, *places, c)

    return attention


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable[..., Tensor]
    theirs: Callable
    shapes: tuple[tuple[int, ...], ...]


def conv_case(name: str, shape, w, bias=True, **options) -> Case:
    shapes = (shape, w, w[-1:]) if bias else (shape, w)
    return Case(f"conv2d {name}", lambda *a: f.conv2d(*a, **options), torch_conv(**options), shapes)


INDEX = np.array([2, 0, 2, 2, 4])
WORDS = np.array([[2, 0, 2], [2, 4, 1]])
ANGLES = np.random.default_rng(9).uniform(0, 7, (7, 3))
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
SIGNAL, NOISE = np.array([0.9, -0.3, 0.1]), np.random.default_rng(8).standard_normal((3, 7, 12))
CASES = [
    conv_case("3x3", (2, 8, 8, 16), (3, 3, 16, 24)),
    conv_case("odd sizes", (2, 5, 7, 3), (3, 3, 3, 5)),
    conv_case("1x1", (3, 4, 4, 16), (1, 1, 16, 32)),
    conv_case("without bias", (2, 6, 6, 8), (3, 3, 8, 8), bias=False),
    conv_case("stride 2", (2, 8, 8, 8), (3, 3, 8, 8), stride=2),
    conv_case("stride 2 pad (0, 1)", (2, 8, 8, 8), (3, 3, 8, 8), stride=2, pad=(0, 1)),
    conv_case("upsample", (2, 4, 4, 8), (3, 3, 8, 8), upsample=True),
    Case("linear", f.linear, lambda x, w, b: x @ w + b, ((5, 12), (12, 33), (33,))),
    Case("silu", f.silu, F.silu, ((5, 33),)),
    Case(
        "group norm",
        lambda *a: f.group_norm_silu(*a, 4, 1e-5, silu=False),
        torch_norm(4, False),
        ((3, 4, 6, 16), (16,), (16,)),
    ),
    Case("group norm silu", lambda *a: f.group_norm_silu(*a, 8, 1e-5), torch_norm(8, True), ((3, 8, 8, 32), (32,), (32,))),
    Case("group norm of tokens", lambda *a: f.group_norm_silu(*a, 3, 1e-5), torch_norm(3, True), ((2, 7, 12), (12,), (12,))),
    Case(
        "group norm modulated",
        lambda x, g, b, emb: f.group_norm_silu(x, g, b, 2, 1e-5, True, emb, 5),
        torch_norm(2, True, 5),
        ((3, 4, 4, 8), (8,), (8,), (3, 25)),
    ),
    Case(
        "group norm of two",
        lambda x, tail, g, b: f.group_norm_silu(x, g, b, 4, 1e-5, tail=tail),
        lambda x, tail, g, b: torch_norm(4, True)(torch.cat([x, tail], -1), g, b),
        ((3, 4, 6, 5), (3, 4, 6, 7), (12,), (12,)),
    ),
    Case(
        "group norm of two modulated",
        lambda x, tail, g, b, emb: f.group_norm_silu(x, g, b, 2, 1e-5, True, emb, 5, tail),
        lambda x, tail, g, b, emb: torch_norm(2, True, 5)(torch.cat([x, tail], -1), g, b, emb),
        ((3, 4, 4, 16), (3, 4, 4, 2), (18,), (18,), (3, 41)),
    ),
    Case(
        "conv 1x1 of two",
        f.conv1x1,
        lambda x, tail, w, b: torch_conv()(torch.cat([x, tail], -1), w, b),
        ((2, 4, 4, 5), (2, 4, 4, 7), (1, 1, 12, 9), (9,)),
    ),
    Case("attention", lambda *a: f.attention(*a, heads=2), torch_attention(2), ((2, 4, 4, 16),) * 3),
    Case("attention with scale", lambda *a: f.attention(*a, heads=1, scale=0.3), torch_attention(1, 0.3), ((2, 9, 8),) * 3),
    Case("add", f.add, lambda a, b: a + b, ((3, 4, 5), (3, 4, 5))),
    Case(
        "add columns",
        lambda x, e: f.add_columns(x, e, 3),
        lambda x, e: x + e[:, None, None, 3:11],
        ((3, 4, 4, 8), (3, 20)),
    ),
    Case("concat", f.concat, lambda a, b: torch.cat([a, b], -1), ((2, 3, 4, 5), (2, 3, 4, 7))),
    Case("embedding", lambda e: f.embedding(e, INDEX), lambda e: e[torch.as_tensor(INDEX)], ((6, 9),)),
    Case("embedding of sequences", lambda e: f.embedding(e, WORDS), lambda e: e[torch.as_tensor(WORDS)], ((6, 9),)),
    Case("linear on tokens", f.linear, lambda x, w, b: x @ w + b, ((2, 5, 12), (12, 7), (7,))),
    Case("layer norm", lambda *a: tf.layer_norm(*a, 1e-5), torch_layer_norm(), ((3, 7, 12), (12,), (12,))),
    Case(
        "layer norm modulated",
        lambda x, g, b, emb: tf.layer_norm(x, g, b, 1e-5, emb, 4),
        torch_layer_norm(4),
        ((3, 7, 12), (12,), (12,), (3, 30)),
    ),
    Case(
        "add gated",
        lambda x, h, emb: tf.add_gated(x, h, emb, 4),
        lambda x, h, emb: x + emb[:, None, 4:16] * h,
        ((3, 7, 12), (3, 7, 12), (3, 17)),
    ),
    Case("rotary", lambda x: tf.rotary(x, 2, COS.astype(x.data.dtype), SIN.astype(x.data.dtype)), torch_rotary(2), ((3, 7, 12),)),
    Case("add rows", tf.add_rows, lambda x, r: x + r, ((3, 7, 12), (7, 12))),
    Case("transpose", tf.transpose, lambda x: x.T, ((5, 7),)),
    Case(
        "noised",
        lambda x: tf.noised(x, SIGNAL, NOISE.astype(x.data.dtype)),
        lambda x: torch.as_tensor(SIGNAL).to(x.dtype)[:, None, None] * x + torch.as_tensor(NOISE).to(x.dtype),
        ((3, 7, 12),),
    ),
]
each = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use(request.param):
        yield request.param


def inputs(case: Case) -> tuple[list[np.ndarray], np.random.Generator]:
    rng = np.random.default_rng(len(case.name))
    return [rng.standard_normal(s) / np.sqrt(s[-2] if len(s) == 4 and s[0] == s[1] else 1) for s in case.shapes], rng


def run_ours(case: Case, arrays: list[np.ndarray], dout: np.ndarray | None, dtype: type) -> list[np.ndarray]:
    tensors = [Tensor(a.astype(dtype), needs_grad=True) for a in arrays]
    y = case.ours(*tensors)
    assert y.data.dtype == dtype
    if dout is None:
        return [y.data]
    y.backward(dout.astype(dtype))
    return [y.data, *(t.grad for t in tensors)]


def run_theirs(case: Case, arrays: list[np.ndarray], dout: np.ndarray, dtype) -> list[np.ndarray]:
    tensors = [torch.tensor(a, dtype=dtype, requires_grad=True) for a in arrays]
    y = case.theirs(*tensors)
    y.backward(torch.tensor(dout, dtype=dtype))
    return [y.detach().numpy(), *(t.grad.numpy() for t in tensors)]


@each
def test_values_and_gradients_are_pytorchs_in_float64(case: Case) -> None:
    arrays, rng = inputs(case)
    dout = rng.standard_normal(run_ours(case, arrays, None, np.float64)[0].shape)
    for ours, theirs in zip(run_ours(case, arrays, dout, np.float64), run_theirs(case, arrays, dout, torch.float64), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10 * np.abs(theirs).max())


@each
def test_the_float32_error_is_at_most_twice_pytorchs(case: Case, backend: str) -> None:
    arrays, rng = inputs(case)
    arrays = [a.astype(np.float32).astype(np.float64) for a in arrays]
    dout = rng.standard_normal(run_ours(case, arrays, None, np.float64)[0].shape).astype(np.float32)
    exact = run_theirs(case, arrays, dout, torch.float64)
    ours, theirs = run_ours(case, arrays, dout, np.float32), run_theirs(case, arrays, dout, torch.float32)
    for e, a, b in zip(exact, ours, theirs, strict=True):
        assert a.dtype == np.float32
        error, budget = np.linalg.norm(a - e), 2 * np.linalg.norm(b - e)
        assert error <= budget + np.finfo(np.float32).eps * np.linalg.norm(e)


@each
def test_gradients_are_those_of_differences(case: Case) -> None:
    gradcheck(case.ours, *inputs(case)[0])


def test_dropout_is_linear_with_its_mask() -> None:
    x = np.random.default_rng(1).standard_normal((3, 4, 4, 8))
    gradcheck(lambda t: f.dropout(t, 0.3, seed=5, step=2, layer=1), x)
    y = f.dropout(Tensor(x), 0.3, seed=5, step=2, layer=1).data
    kept = y != 0
    np.testing.assert_allclose(y[kept], x[kept] / 0.7, rtol=1e-15)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share(rate: float) -> None:
    n = 1 << 18
    ones = Tensor(np.ones((4, n // 4), np.float32))
    kept = (f.dropout(ones, rate, seed=7, step=0, layer=0).data != 0).mean()
    assert abs(kept - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / n)


def test_dropout_masks_depend_on_seed_step_layer_and_sample_alone(backend: str) -> None:
    ones = np.ones((4, 6, 6, 8), np.float32)

    def mask(x: np.ndarray = ones, seed: int = 3, step: int = 9, layer: int = 2, first_sample: int = 0) -> np.ndarray:
        return f.dropout(Tensor(x), 0.5, seed, step, layer, first_sample).data != 0

    base = mask()
    np.testing.assert_array_equal(base, mask())
    np.testing.assert_array_equal(base[2:], mask(ones[2:], first_sample=2))
    for other in (mask(seed=4), mask(step=10), mask(layer=3), mask(first_sample=4)):
        assert 0.4 < (base != other).mean() < 0.6
    with kernels.use("reference"):
        np.testing.assert_array_equal(base, mask())


def test_inplace_sums_reuse_the_memory_that_they_say() -> None:
    a, b = (np.random.default_rng(k).standard_normal((2, 3, 3, 4)) for k in range(2))
    want = a + b
    y = f.add(Tensor(a), Tensor(b), inplace=True)
    assert y.data is b
    np.testing.assert_array_equal(b, want)
    emb = np.arange(10.0).reshape(2, 5)
    want = a + emb[:, None, None, 1:]
    y = f.add_columns(Tensor(a), Tensor(emb), 1, inplace=True)
    assert y.data is a
    np.testing.assert_array_equal(a, want)


def test_silu_is_right_far_out() -> None:
    x = np.array([-1e4, -100, -80, 0, 80, 1e4], np.float32)
    y = Tensor(x, needs_grad=True)
    out = f.silu(y)
    out.backward(np.ones_like(x))
    np.testing.assert_allclose(out.data, [0, 0, 0, 0, 80, 1e4], atol=1e-30)
    np.testing.assert_allclose(y.grad, [0, 0, 0, 0.5, 1, 1], atol=1e-30)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    x, w, b = Tensor(np.ones((batch, 4, 4, 2)), needs_grad=True), Tensor(np.ones((3, 3, 2, 2)), True), Tensor(np.ones(2), True)
    y = f.conv2d(x, w, b)
    y.backward(np.ones_like(y.data))
    assert x.grad.shape == x.shape and b.grad.tolist() == [16.0 * batch] * 2
