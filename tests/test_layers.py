"""Layers and the store of their parameters."""

import numpy as np
import pytest

from alphabar import kernels
from alphabar.nets import ParameterStore, Tensor, layers, time_features

rng = np.random.default_rng(0)


def store(*shapes: tuple[int, ...], dtype: str = "float32", seed: int = 0, std: float = 0.5) -> ParameterStore:
    s = ParameterStore(seed, dtype=dtype)
    for i, shape in enumerate(shapes):
        s.declare(f"p{i}", shape, std)
    s.build()
    return s


def test_parameters_are_aligned_views_of_one_buffer_in_order() -> None:
    s = store((3, 5), (7,), (1, 1, 4, 4))
    assert list(s) == ["p0", "p1", "p2"] and len(s) == 3 and s.count == 15 + 7 + 16 and "p1" in s
    assert s.data.flags.c_contiguous and s.data.shape == s.grad.shape == (16 + 16 + 16,)
    for i, (name, view) in enumerate(s.arrays().items()):
        assert view.base is s.data and s[name].data is view
        assert (view.ctypes.data - s.data.ctypes.data) == 64 * i
    s.gradients()["p1"][...] = 2.0
    assert s.grad.sum() == 14.0
    s.zero_grad()
    assert not s.grad.any()


def test_gaps_between_parameters_are_zero() -> None:
    s = store((3, 5), (7,))
    assert s.data[15] == 0 and not s.data[23:].any() and s.data[:15].all()


def test_gradients_arrive_in_the_buffer_and_add_up() -> None:
    s = ParameterStore(dtype="float64")
    layer = layers.Linear(s, "l", 4, 3)
    s.build()
    x = rng.standard_normal((5, 4))
    for n in (1, 2):
        layer(Tensor(x)).backward(np.ones((5, 3)))
        np.testing.assert_allclose(s["l.bias"].grad, [5.0 * n] * 3)
        np.testing.assert_allclose(s["l.weight"].grad, n * np.repeat(x.sum(0)[:, None], 3, 1))
    assert s["l.weight"].grad.base is s.grad


def test_initial_values_depend_on_seed_and_place_and_not_on_dtype_or_backend() -> None:
    a, b = store((64, 64), (64, 64)), store((64, 64), (64, 64), dtype="float64")
    np.testing.assert_array_equal(a.data, b.data.astype(np.float32))
    with kernels.use("reference"):
        np.testing.assert_array_equal(a.data, store((64, 64), (64, 64)).data)
    assert (a["p0"].data != a["p1"].data).mean() > 0.99
    assert (a.data != store((64, 64), (64, 64), seed=1).data).mean() > 0.99
    n = a.data.size
    assert abs(a.data.std() - 0.5) < 5 * 0.5 / np.sqrt(2 * n) and abs(a.data.mean()) < 5 * 0.5 / np.sqrt(n)


def test_layers_start_with_the_variances_of_glorot() -> None:
    s = ParameterStore()
    layers.Conv2d(s, "conv", 32, 64)
    layers.Linear(s, "linear", 128, 64)
    layers.Conv2d(s, "zero", 8, 8, zero=True)
    layers.GroupNorm(s, "norm", 8, 2, 1e-5)
    s.build()
    a = s.arrays()
    for name, variance in (("conv.weight", 2 / (9 * 32 + 9 * 64)), ("linear.weight", 2 / (128 + 64))):
        assert abs(a[name].var() / variance - 1) < 5 * np.sqrt(2 / a[name].size)
    for name in ("conv.bias", "linear.bias", "zero.weight", "zero.bias", "norm.bias"):
        assert not a[name].any()
    assert (a["norm.weight"] == 1).all()


def test_using_another_buffer_for_a_while() -> None:
    s = store((2, 2))
    own, other = s.data, np.full_like(s.data, 3.0)
    with s.using(other):
        assert (s["p0"].data == 3).all() and s.data is other
    assert s.data is own and s["p0"].data.base is own
    with pytest.raises(KeyError), s.using(other):
        raise KeyError
    assert s.data is own
    for wrong in (other[:-1], other.astype(np.float64)):
        with pytest.raises(ValueError, match="flat is"), s.using(wrong):
            pass


def test_load_takes_every_weight_once_and_no_other() -> None:
    s = store((2, 3), (4,))
    good = {"p0": np.ones((2, 3)), "p1": np.zeros(4)}
    s.load(good)
    assert (s["p0"].data == 1).all() and s["p0"].data.dtype == np.float32
    for wrong, words in (
        ({"p0": good["p0"]}, "missing.*p1"),
        (good | {"p2": good["p1"]}, "not used.*p2"),
        (good | {"p1": np.zeros(5)}, "p1.*shape"),
    ):
        with pytest.raises(ValueError, match=words):
            s.load(wrong)


def test_a_name_is_declared_once_and_before_build() -> None:
    s = ParameterStore()
    s.declare("a", (1,))
    with pytest.raises(ValueError, match="twice or after"):
        s.declare("a", (1,))
    s.build()
    with pytest.raises(ValueError, match="twice or after"):
        s.declare("b", (1,))
    with pytest.raises(ValueError, match="dtype must be"):
        ParameterStore(dtype="float16")


def test_time_features_are_the_closed_form() -> None:
    t = np.array([1, 2, 500, 999.25, 1000])
    y = time_features(t, 32)
    for i in range(16):
        np.testing.assert_allclose(y[:, i], np.sin(t * 10000 ** (-2 * i / 32)), atol=1e-12)
        np.testing.assert_allclose(y[:, 16 + i], np.cos(t * 10000 ** (-2 * i / 32)), atol=1e-12)
    np.testing.assert_array_equal(time_features(t, 32, cos_first=True), np.roll(y, 16, axis=1))
    np.testing.assert_allclose(time_features(t, 32, freq_shift=1)[:, 15], np.sin(t * 1e-4), atol=1e-12)


def test_times_have_distinct_features() -> None:
    y = time_features(np.arange(1.0, 1001), 32)
    distances = np.linalg.norm(y[:, None] - y[None], axis=2) + 10 * np.eye(1000)
    assert distances.min() > 0.1
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 4.0)  # sin² + cos² = 1 for each of 16 frequencies


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cos_first", [False, True])
def test_float32_time_features_are_those_of_published_networks(cos_first: bool, shift: int) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is the oracle here")
    torch = pytest.importorskip("torch")
    theirs = embeddings.get_timestep_embedding(torch.arange(1000), 64, cos_first, shift).numpy()
    ours = time_features(np.arange(1000.0), 64, cos_first, shift, "float32")
    difference, angle = np.abs(ours - theirs), np.tile(np.outer(np.arange(1000), 10000 ** (-np.arange(32) / (32 - shift))), 2)
    assert (difference <= 6e-8 + 2.0**-22 * angle).all()  # the last bits of sine and frequency: ours are rounded correctly
    assert (difference <= 6e-8).mean() > 0.95


def test_time_embedding_subtracts_its_origin() -> None:
    s = ParameterStore(dtype="float64")
    zero, one = (layers.TimeEmbedding(s, f"t{k}", 8, 16, origin=k) for k in (0, 1))
    s.build()
    np.testing.assert_array_equal(zero.features(np.arange(5.0)), one.features(np.arange(1.0, 6)))
    assert zero(np.arange(5.0)).shape == (5, 16)


def test_attention_without_norm_and_with_zero_output_is_the_identity() -> None:
    s = ParameterStore(dtype="float64")
    layer = layers.Attention(s, "a", 8, heads=2, groups=None, eps=1e-5, zero=True)
    s.build()
    assert not any("group_norm" in name for name in s)
    x = rng.standard_normal((2, 3, 3, 8))
    np.testing.assert_array_equal(layer(Tensor(x)).data, x)


def test_attention_does_not_care_for_the_order_of_places() -> None:
    s = ParameterStore(dtype="float64")
    layer = layers.Attention(s, "a", 8, heads=2, groups=4, eps=1e-5)
    s.build()
    x = rng.standard_normal((2, 4, 4, 8))
    order = rng.permutation(16)
    shuffled = x.reshape(2, 16, 8)[:, order].reshape(x.shape)
    y = layer(Tensor(x)).data.reshape(2, 16, 8)[:, order]
    np.testing.assert_allclose(layer(Tensor(shuffled)).data.reshape(2, 16, 8), y, atol=1e-13)


def test_embedding_reads_rows() -> None:
    s = ParameterStore()
    layer = layers.Embedding(s, "e", 5, 3)
    s.build()
    np.testing.assert_array_equal(layer(np.array([4, 0, 4])).data, s["e.weight"].data[[4, 0, 4]])
