"""AdamW, clipping, the running average and the learning rate."""

from collections.abc import Iterator

import numpy as np
import pytest

from alphabar import kernels
from alphabar.nets import AdamW, ParameterStore, learning_rate

rng = np.random.default_rng(0)


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.use(request.param):
        yield request.param


def store(dtype: str = "float64", n: int = 80) -> ParameterStore:
    s = ParameterStore(dtype=dtype)
    s.declare("p", (n,), 1.0)
    s.build()
    return s


@pytest.mark.parametrize("max_norm", [float("inf"), 1.0])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_updates_are_pytorchs(dtype: str, max_norm: float, backend: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle here")
    s = store(dtype)
    p = torch.nn.Parameter(torch.tensor(s.data.astype(np.float64)))
    theirs = torch.optim.AdamW([p], betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    ours = AdamW(s, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, max_norm=max_norm)
    for i in range(10):
        g = rng.standard_normal(80) * (3.0 if i % 2 else 0.01)
        g = g.astype(dtype).astype(np.float64)
        s.grad[...] = g
        p.grad = torch.tensor(g)
        theirs.param_groups[0]["lr"] = lr = 0.01 * (i + 1)
        norm = torch.nn.utils.clip_grad_norm_([p], max_norm)
        theirs.step()
        assert ours.step(lr) == pytest.approx(float(norm), rel=1e-12 if dtype == "float64" else 1e-6)
    np.testing.assert_allclose(s.data, p.detach().numpy(), atol=1e-13 if dtype == "float64" else 1e-6)
    assert ours.count == 10


def test_the_running_average_warms_up(backend: str) -> None:
    s = store("float32")
    optimiser = AdamW(s, ema_decay=0.5)
    want = s.data.astype(np.float64)
    np.testing.assert_array_equal(optimiser.ema, s.data)
    for n in range(12):
        s.grad[...] = rng.standard_normal(80)
        optimiser.step(0.1)
        decay = min(0.5, (1 + n) / (10 + n))  # 0.1, 0.18, ..., 0.5
        want = decay * want + (1 - decay) * s.data
        np.testing.assert_allclose(optimiser.ema, want, atol=2e-6)


def test_weight_decay_alone_shrinks_by_its_factor() -> None:
    s = store()
    before = s.data.copy()
    AdamW(s, weight_decay=0.2).step(0.5)
    np.testing.assert_allclose(s.data, before * (1 - 0.5 * 0.2), rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(bad: float, backend: str) -> None:
    s = store("float32")
    optimiser = AdamW(s)
    s.grad[...] = 1
    optimiser.step(0.1)
    before = [a.copy() for a in (s.data, *optimiser.state().values())]
    s.grad[7] = bad
    assert not np.isfinite(optimiser.step(0.1))
    assert (optimiser.count, optimiser.skipped) == (1, 1)
    for a, b in zip(before, (s.data, *optimiser.state().values()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_saved_state_goes_on_bit_for_bit(backend: str) -> None:
    gradients = rng.standard_normal((6, 80)).astype(np.float32)

    def run(optimiser: AdamW, part: np.ndarray) -> None:
        for g in part:
            optimiser.store.grad[...] = g
            optimiser.step(0.05)

    whole, first, second = (AdamW(store("float32"), weight_decay=0.1, max_norm=1.0) for _ in range(3))
    run(whole, gradients)
    run(first, gradients[:3])
    second.store.data[...] = first.store.data
    second.load_state({k: v.copy() for k, v in first.state().items()}, first.count, first.skipped)
    run(second, gradients[3:])
    np.testing.assert_array_equal(second.store.data, whole.store.data)
    for k, v in whole.state().items():
        np.testing.assert_array_equal(second.state()[k], v)


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    optimiser = AdamW(store("float32"))
    good = {k: np.ones_like(v) for k, v in optimiser.state().items()}
    for wrong in (np.ones(3, np.float32), np.ones(80)):
        with pytest.raises(ValueError, match="ema is"):
            optimiser.load_state(good | {"ema": wrong}, 1)
        assert not optimiser.m.any()


@pytest.mark.parametrize(
    "options",
    [{"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": 0.0}, {"weight_decay": -1.0}, {"max_norm": 0.0}, {"ema_decay": 1.0}],
)
def test_options_out_of_range(options: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        AdamW(store(), **options)


@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf")])
def test_learning_rates_out_of_range(lr: float) -> None:
    with pytest.raises(ValueError, match="lr must be"):
        AdamW(store()).step(lr)


def test_the_learning_rate_warms_up_and_decays() -> None:
    def course(decay: str) -> list[float]:
        return [learning_rate(n, 2.0, warmup=4, total=12, decay=decay) for n in range(14)]

    for decay in ("constant", "linear", "cosine"):
        assert course(decay)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert course("constant")[5:] == [2.0] * 9
    np.testing.assert_allclose(course("linear")[4:], [2.0 * (1 - k / 8) for k in range(9)] + [0.0])
    np.testing.assert_allclose(course("cosine")[4:], [1 + np.cos(np.pi * k / 8) for k in range(9)] + [0.0], atol=1e-15)
    assert learning_rate(0, 3.0) == 3.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": -1},
        {"step": 0, "warmup": -1},
        {"step": 0, "decay": "step"},
        {"step": 5, "decay": "cosine"},
        {"step": 5, "warmup": 5, "total": 5, "decay": "linear"},
    ],
)
def test_learning_rate_arguments_out_of_range(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        learning_rate(base=1.0, **arguments)
