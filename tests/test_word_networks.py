"""The network of Diffusion-LM and the classifier of sequences: against PyTorch, against differences, and their promises."""

import importlib
import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.nets import SequenceClassifier, Tensor, WordDiffusion, backward, gradcheck, vjp
from alphabar.nets.token_functions import noised

LENGTH, STATES, FEATURES, BATCH = 5, 7, 4, 3
SIGNAL, NOISE, SIGMA0 = np.array([0.9, 0.5, 0.1]), np.array([0.4, 0.8, 1.0]), 0.3
TIMES = np.array([1.0, 40.0, 900.0])


def stirred(net: Any, size: float = 0.3) -> Any:
    net.params.data[...] += (size * np.random.default_rng(1).standard_normal(net.params.data.shape)).astype(net.params.dtype)
    return net


def words(**more: Any) -> WordDiffusion:
    return stirred(WordDiffusion(LENGTH, STATES, **{"features": FEATURES, "width": 16, "heads": 2, "dtype": "float64"} | more))


def classifier(**more: Any) -> SequenceClassifier:
    options = {"features_in": FEATURES, "classes": 3, "width": 16, "heads": 2, "dtype": "float64"}
    return stirred(SequenceClassifier(LENGTH, **options | more))


def draws(dtype: str = "float64") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(w, z, ε)."""
    rng = np.random.default_rng(2)
    z, eps = rng.standard_normal((2, BATCH, LENGTH, FEATURES)).astype(dtype)
    return rng.integers(0, STATES, (BATCH, LENGTH)), z, eps


def columns(a: np.ndarray) -> np.ndarray:
    return a[:, None, None]


@pytest.fixture(scope="module")
def torch_transformer() -> ModuleType:
    pytest.importorskip("torch", reason="PyTorch is the oracle here")
    return importlib.import_module("tests.torch_transformer")


# ------------------------------------------------------------------------------------------------------ gradients end to end


def end_to_end(net: WordDiffusion, w: np.ndarray, z: np.ndarray, eps: np.ndarray) -> float:
    """Σ (½‖x̂_0 − x_0‖² + ½‖x̂_0 − Emb(w)‖² − log p(w|x_0)) with its gradient added to the store."""
    mean = net.embed(w)
    x0 = noised(mean, 1, SIGMA0 * z)
    out = net(noised(x0, SIGNAL, columns(NOISE) * eps), TIMES)
    scores = net.logits(x0)
    e = np.exp(scores.data - scores.data.max(axis=-1, keepdims=True))
    p, chosen = e / e.sum(axis=-1, keepdims=True), np.eye(STATES)[w]
    a, b = out.data - x0.data, out.data - mean.data
    loss = ((a**2).sum() + (b**2).sum()) / 2 - np.log((p * chosen).sum(axis=-1)).sum()
    backward((out, a + b), (x0, -a), (mean, -b), (scores, p - chosen))
    return float(loss)


def test_gradients_go_through_noisy_clean_and_rounded_words_as_pytorchs(torch_transformer: ModuleType) -> None:
    import torch

    net = words()
    w, z, eps = draws()
    theirs = torch_transformer.TorchTransformer(net)
    tables = theirs.w["embedding.weight"]
    mean = tables[torch.as_tensor(w)]
    x0 = mean + SIGMA0 * torch.as_tensor(z)
    noisy = torch.as_tensor(columns(SIGNAL)) * x0 + torch.as_tensor(columns(NOISE) * eps)
    out = theirs.linear("linear_out", theirs.trunk(theirs.linear("linear_in", noisy), TIMES))
    scores = x0 @ tables.T + theirs.w["rounding.bias"]
    rounding = torch.nn.functional.cross_entropy(scores.reshape(-1, STATES), torch.as_tensor(w).reshape(-1), reduction="sum")
    want = ((out - x0) ** 2).sum() / 2 + ((out - mean) ** 2).sum() / 2 + rounding
    want.backward()

    net.params.zero_grad()
    assert end_to_end(net, w, z, eps) == pytest.approx(want.item(), rel=1e-12)
    assert net.params.gradients().keys() == theirs.w.keys()
    for k, gradient in net.params.gradients().items():
        e = theirs.w[k].grad.numpy()
        np.testing.assert_allclose(gradient, e, rtol=1e-9, atol=1e-10 * max(np.abs(e).max(), 1), err_msg=k)


def test_gradients_end_to_end_are_those_of_differences() -> None:
    net = words()
    drawn = draws()
    net.params.zero_grad()
    end_to_end(net, *drawn)
    gradient, flat = net.params.grad.copy(), net.params.data.copy()
    v = np.random.default_rng(3).standard_normal(flat.shape) / np.sqrt(flat.size)

    def value(h: float) -> float:
        with net.params.using(flat + h * v):
            return end_to_end(net, *drawn)

    h = 1e-3
    numeric = (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)
    assert numeric == pytest.approx(float(gradient @ v), rel=1e-7)


def test_the_rounding_reads_the_table_that_the_embedding_reads() -> None:
    net = words()
    w, z, _ = draws()
    table = net.table.data
    np.testing.assert_array_equal(net.embed(w).data, table[w])
    x = table[w] + z
    np.testing.assert_allclose(net.logits(x).data, x @ table.T + net.params["rounding.bias"].data, rtol=1e-12)
    table *= 30 / np.linalg.norm(table, axis=1, keepdims=True)  # far apart on a sphere: the nearest word is the likeliest
    np.testing.assert_array_equal(net.logits(net.embed(w)).data.argmax(axis=-1), w)


def test_the_words_network_is_rebuilt_from_its_config() -> None:
    net = WordDiffusion(np.int64(LENGTH), STATES, width=32, heads=4, classes=2, dropout=0.1, seed=3)
    again = WordDiffusion(**json.loads(json.dumps(net.config)))
    assert again.config == net.config and list(again.params) == list(net.params) and net.null == 2
    np.testing.assert_array_equal(again.params.data, net.params.data)
    assert 0.8 < net.table.data.std() < 1.2


def test_words_in_float32_and_float64_agree() -> None:
    double = words()
    single = WordDiffusion(**double.config | {"dtype": "float32"})
    single.params.data[...] = double.params.data
    w, z, _ = draws()
    x = double.embed(w).data + z
    near = x.astype(np.float32)
    for a, b in (
        (double.predict(x, TIMES), single.predict(near, TIMES)),
        (double.logits(x).data, single.logits(near).data),
    ):
        assert b.dtype == np.float32 and np.abs(a - b).max() < 1e-4 * np.abs(a).max()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"w must have shape \(B, 5\), not \(5,\)", lambda n, w, x: n.embed(w[0])),
        (ValueError, r"w must be in 0..6, not 0..7", lambda n, w, x: n.embed(np.clip(7 * w, 0, 7))),
        (TypeError, "w must be integers", lambda n, w, x: n.embed(x[..., 0])),
        (ValueError, r"x must have shape \(B, 5, 4\)", lambda n, w, x: n.logits(x[..., :3])),
        (TypeError, "x is float32", lambda n, w, x: n(x.astype(np.float32), TIMES)),
        (ValueError, "t must have shape", lambda n, w, x: n.predict(x, TIMES[:2])),
        (ValueError, "features must be at least 1", lambda n, w, x: WordDiffusion(5, 7, features=0)),
        (TypeError, "states must be an integer", lambda n, w, x: WordDiffusion(5, 7.0)),
    ],
)
def test_words_out_of_range(error: type[Exception], message: str, call: Any) -> None:
    w, z, _ = draws()
    with pytest.raises(error, match=message):
        call(words(), w, z)


# ------------------------------------------------------------------------------------------------------------- the classifier


def test_logits_and_the_gradient_of_the_log_probability_are_pytorchs(torch_transformer: ModuleType) -> None:
    import torch

    net = classifier()
    _, x, _ = draws()
    y = np.array([2, 0, 1])
    theirs = torch_transformer.TorchTransformer(net)
    z = torch.tensor(x, requires_grad=True)
    logits = theirs.linear("head", theirs.trunk(theirs.linear("linear_in", z), TIMES).mean(dim=1))
    torch.log_softmax(logits, -1)[torch.arange(BATCH), torch.as_tensor(y)].sum().backward()
    np.testing.assert_allclose(net.predict(x, TIMES), logits.detach().numpy(), rtol=1e-10)
    before = net.params.grad.copy()
    np.testing.assert_allclose(net.log_prob_gradient(x, TIMES, y), z.grad.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(net.params.grad, before)


def test_the_classifiers_gradients_are_those_of_differences() -> None:
    net = classifier(positions="learned")
    _, x, _ = draws()
    gradcheck(lambda z: net(z, TIMES), x)
    logits = Tensor(x, needs_grad=True)
    out = net(logits, TIMES)
    u = np.random.default_rng(4).standard_normal(out.shape)
    out.backward(u)
    np.testing.assert_allclose(vjp(lambda z: net(z, TIMES), x, u)[1], logits.grad, rtol=1e-12)


def test_guidance_raises_the_probability_of_its_class() -> None:
    net = classifier(dtype="float32")
    x = draws("float32")[1]
    y = np.array([2, 0, 1])

    def log_prob(z: np.ndarray) -> np.ndarray:
        logits = net.predict(z, TIMES).astype(np.float64)
        return (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))[np.arange(BATCH), y]

    before, moved = log_prob(x), x.copy()
    for _ in range(20):
        moved += np.float32(0.02) * net.log_prob_gradient(moved, TIMES, y)
    assert (log_prob(moved) > before).all()


def test_the_classifier_starts_undecided_and_is_rebuilt_from_its_config() -> None:
    net = SequenceClassifier(LENGTH, FEATURES, 3, width=16, heads=2, seed=4)
    assert not net.predict(draws("float32")[1], 5).any()
    again = SequenceClassifier(**json.loads(json.dumps(net.config)))
    assert again.config == net.config
    np.testing.assert_array_equal(again.params.data, net.params.data)
    with pytest.raises(ValueError, match="classes must be at least 2, not 1"):
        SequenceClassifier(LENGTH, FEATURES, 1)
    with pytest.raises(ValueError, match="needs step="):
        classifier(dropout=0.5)(draws()[1], TIMES)


def test_the_classifiers_answers_are_safe_to_keep() -> None:
    net, x = classifier(dtype="float32"), draws("float32")[1]
    pool = kernels.Pool()
    with pool:
        kept, slope = net.predict(x, TIMES), net.log_prob_gradient(x, TIMES, 1)
    with pool:
        net.predict(-x, TIMES), net.log_prob_gradient(-x, TIMES, 2)
    np.testing.assert_array_equal(kept, net.predict(x, TIMES))
    np.testing.assert_array_equal(slope, net.log_prob_gradient(x, TIMES, 1))
