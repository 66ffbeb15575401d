"""Samplers whose rows are captured as graphs: the plain loop's numbers, on a stand-in for a GPU that computes nothing else."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core import captured, data, guidance, samplers, schedules, tables
from alphabar.core.captured import Captured, kinds
from alphabar.core.table import Table
from alphabar.kernels import elementwise
from alphabar.kernels.arrays import to_numpy
from alphabar.nets import UNet
from alphabar.tools import config as configs
from alphabar.tools import families, sampling, trainer
from alphabar.tools.config import Sample
from alphabar.tools.methods import Process
from tests import fake_cuda, fake_cupy, hosted

cupy = fake_cupy.cupy
S = schedules.linear()
TABLES: dict[str, Callable[[], Table]] = {
    "ddim": lambda: tables.ddim(S, steps=6),
    "ddim eta": lambda: tables.ddim(S, steps=6, eta=0.5),
    "ddpm": lambda: tables.ddpm(S, steps=6),
    "euler, churned": lambda: tables.euler(S, steps=6, churn=4.0),
    "heun": lambda: tables.heun(S, steps=5),
    "rk4": lambda: tables.rk4(S, steps=4),
    "ab3": lambda: tables.adams_bashforth(S, steps=8, order=3),
    "pndm": lambda: tables.pndm(S, steps=8),
    "dpm++": lambda: tables.dpm_solver_pp(S, steps=7, order=3),
    "unipc": lambda: tables.unipc(S, steps=7),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> hosted.HostedDevice:
    if not hosted.available():
        pytest.skip("g++ is not installed")
    return hosted.pretend(monkeypatch)


class Model:
    """SiLU(x) + x + f(t): launches alone. ``calls``: how often Python went through it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Any, t: Any) -> Any:
        self.calls += 1
        features = elementwise.time_features(t, 0.0, OMEGA, False)  # (B, 2 h)
        h = elementwise.add(kernels.silu(x), x)
        return elementwise.add_channels(h, features, 0)


OMEGA = np.exp(-np.arange(3) / 2.0)
OMEGA.setflags(write=False)


def start(batch: int = 3, xp: Any = cupy, seed: int = 5) -> Any:
    return samplers.prior((batch, 4, 2, 5), seed=seed, xp=xp)


def bits(x: Any) -> bytes:
    return to_numpy(x).tobytes()


# ------------------------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("name", TABLES)
def test_rows_read_what_they_should_and_nothing_is_lost(name: str) -> None:
    table = TABLES[name]()
    rows, places = kinds(table)
    kept: dict[int, int] = {}  # what lies in each place: the output of which row
    for i, kind in enumerate(rows):
        assert [kept[k] for k in kind.reads] == [i - back for back in table.back[i, : table.past[i]]]
        assert kind.noisy == bool(table.c[i]) and kind.asks == bool(table.asks[i])
        assert (kind.keeps is not None) == (table.last_read[i] > i)
        if kind.keeps is not None:
            lost = kept.get(kind.keeps)
            assert lost is None or table.last_read[lost] <= i
            kept[kind.keeps] = i
    assert places == len(kept) <= 5 and len(set(rows)) <= 16


def test_kinds_of_rows_do_not_grow_with_the_steps() -> None:
    for name, most in {"ddim": 1, "ddpm": 2, "heun": 3, "rk4": 5, "adams_bashforth": 7}.items():
        few, many = (kinds(getattr(tables, name)(S, steps=steps))[0] for steps in (20, 80))
        assert len(set(few)) == len(set(many)) <= most


def test_the_history_takes_no_more_memory_than_it_needs() -> None:
    wanted = {"ddim": 0, "heun": 1, "ab3": 2, "dpm++": 2}  # a row's own output goes over the oldest that it reads
    assert {name: kinds(TABLES[name]())[1] for name in wanted} == wanted


@pytest.mark.parametrize("clip", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("name", TABLES)
def test_the_bits_are_those_of_the_plain_loop(name: str, clip: Any, device: hosted.HostedDevice) -> None:
    table, model, kept = TABLES[name](), Model(), Captured()
    options: dict[str, Any] = {"seed": (3 << 32) + 7, "first_sample": 2, "clip": clip}
    plain = samplers.sample(model, table, start(), trajectory=True, **options)
    assert np.isfinite(to_numpy(plain)).all()
    done: list[tuple[int, int]] = []
    model.calls = 0
    device.launched.clear()
    ours = samplers.sample(
        model, table, start(), trajectory=True, captured=kept, progress=lambda i, n: done.append((i, n)), **options
    )
    assert bits(ours) == bits(plain) and kept.refused is None
    assert done == [(i + 1, len(table)) for i in range(len(table))]
    rows = kinds(table)[0]
    assert sum(name.startswith("step_made") for name in device.launched) == np.count_nonzero(table.c)
    assert sum(name.startswith("step_") for name in device.launched) == len(table)
    asked = [sum(k == kind for k in rows if kind.asks) for kind in set(rows)]
    assert model.calls == sum(min(2, n) for n in asked)
    assert bits(samplers.sample(model, table, start(), captured=True, **options)) == bits(plain[-1])


def test_a_table_has_rows_that_do_not_ask() -> None:
    assert not all(k.asks for k in kinds(TABLES["euler, churned"]())[0])


@pytest.mark.parametrize("name", ["ddpm", "ab3"])
def test_graphs_serve_batches_of_other_seeds_and_samples(name: str, device: hosted.HostedDevice) -> None:
    table, model, kept = TABLES[name](), Model(), Captured()
    for _ in range(2):
        samplers.sample(model, table, start(), captured=kept)
    calls = model.calls
    for seed, first in ((0, 0), (0, 3), (2**63 + 5, 2**31)):
        x = start(seed=seed % 100)
        ours = samplers.sample(model, table, x, seed=seed, first_sample=first, captured=kept)
        assert model.calls == calls
        plain = samplers.sample(Model(), table, x, seed=seed, first_sample=first)
        assert bits(ours) == bits(plain)
    before = bits(ours)
    samplers.sample(model, table, start(), captured=kept)
    assert bits(ours) == before  # the answer is the caller's to keep
    assert kept.refused is None


@pytest.mark.parametrize("what", ["model", "table", "shape", "clip", "rederive_eps"])
def test_another_call_is_captured_anew(what: str, device: hosted.HostedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = Model(), Captured()
    usual: dict[str, Any] = {"model": model, "table": TABLES["ab3"](), "x_T": start(), "clip": (-1.0, 1.0), "rederive_eps": True}
    for _ in range(2):
        samplers.sample(**usual, captured=kept)
    other = Model() if what == "model" else model
    changed = {
        "model": {"model": other},
        "table": {"table": TABLES["ddim"]()},
        "shape": {"x_T": start(2)},
        "clip": {"clip": (-0.5, 0.5)},
        "rederive_eps": {"rederive_eps": False},
    }[what]
    calls = other.calls
    make = captured._Loop

    def alone(*args: Any) -> Any:
        assert kept._loop is None  # whose memory may serve the next one
        return make(*args)

    monkeypatch.setattr(captured, "_Loop", alone)
    ours = samplers.sample(**usual | changed, captured=kept)
    assert other.calls > calls
    assert bits(ours) == bits(samplers.sample(**usual | changed))
    assert bits(samplers.sample(**usual, captured=kept)) == bits(samplers.sample(**usual))


def test_what_is_no_longer_used_gives_its_memory_back_at_once(device: hosted.HostedDevice) -> None:
    kept = Captured()
    gc.collect()
    gc.disable()
    try:
        used = fake_cuda.Memory.used
        for batch in (2, 3, 2):
            for _ in range(2):
                samplers.sample(Model(), TABLES["ab3"](), start(batch), captured=kept)
        samplers.sample(lambda x, t: kernels.silu(x) * 2, TABLES["ddpm"](), start(), captured=kept)
        assert kept.refused is not None and fake_cuda.Memory.used > used
        held = [weakref.ref(kept._loop), *(weakref.ref(g) for g in kept._loop.graphs.values())]  # type: ignore[union-attr]
        del kept
        assert not any(ref() for ref in held)
    finally:
        gc.enable()


def test_the_host_does_not_wait_for_rows(device: hosted.HostedDevice) -> None:
    table, model, kept = TABLES["ddpm"](), Model(), Captured()
    for _ in range(2):
        samplers.sample(model, table, start(), captured=kept)
    plain = bits(samplers.sample(model, table, start(), seed=9))
    x = start()
    device.launched.clear()
    seen: list[int] = []
    with fake_cuda.lazily("late"):
        ours = samplers.sample(model, table, x, seed=9, captured=kept, progress=lambda i, n: seen.append(len(device.launched)))
    assert seen == [0] * len(table) and bits(ours) == plain


# ------------------------------------------------------------------------------------------------- what cannot be captured


REFUSED: dict[str, Callable[[Any, Any], Any]] = {
    "the host reads": lambda x, t: kernels.silu(x) if to_numpy(t)[0] > 500 else elementwise.add(x, x),
    "__mul__ while a graph is captured": lambda x, t: kernels.silu(x) * 2,
    "a copy from the host": lambda x, t: elementwise.add(x, cupy.asarray(np.ones(x.shape, np.float32))),
}


@pytest.mark.parametrize("why", REFUSED)
def test_where_the_model_does_more_than_launches_the_rows_run_plainly(why: str, device: hosted.HostedDevice) -> None:
    table, kept, model = TABLES["ddpm"](), Captured(), REFUSED[why]
    for seed in (1, 2):
        ours = samplers.sample(model, table, start(), seed=seed, captured=kept)
        assert bits(ours) == bits(samplers.sample(model, table, start(), seed=seed))
    assert kept.refused is not None and why in kept.refused


def test_on_numpy_nothing_changes() -> None:
    table, kept = TABLES["ab3"](), Captured()
    for asked in (True, kept):
        model = Model()
        ours = samplers.sample(model, table, start(xp=np), seed=3, captured=asked)
        assert model.calls == len(table)
        assert bits(ours) == bits(samplers.sample(Model(), table, start(xp=np), seed=3))


def test_other_arrays_and_definitions_go_through_the_plain_loop(device: hosted.HostedDevice) -> None:
    table = TABLES["ddpm"]()

    def model(x: Any, t: Any) -> Any:
        assert t.dtype == np.int64  # as the plain loop tells it
        return x * 0.5

    x = start().astype(np.float64)
    assert bits(samplers.sample(model, table, x, captured=True)) == bits(samplers.sample(model, table, x))
    with kernels.use("reference"):
        assert bits(samplers.sample(model, table, start(), captured=True)) == bits(samplers.sample(model, table, start()))
    empty = start()[:0]
    assert samplers.sample(model, table, empty, captured=True).shape == empty.shape


@pytest.mark.parametrize("xp", [np, cupy], ids=["numpy", "cupy"])
def test_captured_goes_without_what_the_host_does_between_rows(xp: Any) -> None:
    x = np.zeros((2, 3), np.float32) if xp is np else cupy.asarray(np.zeros((2, 3), np.float32))
    same = lambda a, b: a  # noqa: E731
    for options in ({"noise": x[None]}, {"guidance": same}, {"before": same}, {"threshold": 0.9}, {"x0": same}):
        with pytest.raises(ValueError, match=f"captured goes without {next(iter(options))}"):
            samplers.sample(same, TABLES["ddim"](), x, captured=True, **options)  # type: ignore[arg-type]


def test_wrong_arguments_are_told_as_by_the_plain_loop(device: hosted.HostedDevice) -> None:
    table = TABLES["ddim"]()
    for model, options in (
        (lambda x, t: x[:1], {}),
        (lambda x, t: None, {}),
        (Model(), {"seed": -1}),
        (Model(), {"first_sample": 2**32}),
        (Model(), {"clip": (1.0, -1.0)}),
    ):
        told = []
        for asked in (False, True):
            with pytest.raises((TypeError, ValueError)) as caught:
                samplers.sample(model, table, start(), captured=asked, **options)  # type: ignore[arg-type]
            told.append((type(caught.value), str(caught.value)))
        assert told[0] == told[1]
    with pytest.raises(TypeError, match="table must be a Table"):
        samplers.sample(Model(), None, start(), captured=True)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- guided networks


@pytest.mark.parametrize("w", [0.0, -1.0, 2.5])
@pytest.mark.parametrize("labels", ["device", "host", "one"])
def test_a_guided_step_of_a_network_is_launches_alone(w: float, labels: str, device: hosted.HostedDevice) -> None:
    net = UNet(8, 1, channels=(8, 16), blocks=1, attention=(4,), groups=4, classes=4, xp=cupy, zero_init=False)
    y = {"device": cupy.asarray(np.array([1, 3])), "host": np.array([1, 3]), "one": 3}[labels]
    x = samplers.prior((2, 8, 8, 1), seed=5, xp=cupy)
    table, kept = tables.ddim(S, steps=4), Captured()
    model = guidance.classifier_free(net.predict, y, w, net.null)
    plain = samplers.sample(model, table, x, clip=(-1.0, 1.0))
    assert bits(samplers.sample(model, table, x, clip=(-1.0, 1.0), captured=kept)) == bits(plain)
    assert kept.refused is None
    on_host = UNet(8, 1, channels=(8, 16), blocks=1, attention=(4,), groups=4, classes=4, zero_init=False)
    there = guidance.classifier_free(on_host.predict, to_numpy(y) if labels != "one" else 3, w, net.null)
    wanted = samplers.sample(there, table, to_numpy(x), clip=(-1.0, 1.0))
    np.testing.assert_allclose(to_numpy(plain), wanted, atol=1e-4)


@pytest.mark.parametrize("compute", ["tf32", "bf16"])
def test_it_is_launches_alone_in_every_precision(compute: str, device: hosted.HostedDevice) -> None:
    net = UNet(8, 3, channels=(16,), blocks=1, attention=(8,), groups=4, classes=4, xp=cupy, zero_init=False)
    net.compute = compute
    x = samplers.prior((2, 8, 8, 3), seed=5, xp=cupy)
    table, kept = tables.ddim(S, steps=3), Captured()
    model = guidance.classifier_free(net.predict, cupy.asarray(np.array([1, 3])), 2.0, net.null)
    plain = samplers.sample(model, table, x)
    device.launched.clear()
    assert bits(samplers.sample(model, table, x, captured=kept)) == bits(plain)
    assert kept.refused is None and any(compute in name for name in device.launched)


def test_labels_and_weights_may_change_in_place(device: hosted.HostedDevice) -> None:
    net = UNet(8, 1, channels=(8,), blocks=1, groups=4, middle="none", classes=4, xp=cupy, zero_init=False)
    y, x = cupy.asarray(np.array([1, 3])), samplers.prior((2, 8, 8, 1), seed=5, xp=cupy)
    table, kept = tables.ddim(S, steps=4), Captured()
    model = guidance.classifier_free(net.predict, y, 2.0, net.null)
    seen = set()
    for change in ("none", "labels", "weights"):
        if change == "labels":
            y[...] = cupy.asarray(np.array([2, 0]))
        if change == "weights":
            net.params.data[...] = net.params.data * np.float32(1.25)
        ours = samplers.sample(model, table, x, captured=kept)
        again = guidance.classifier_free(net.predict, y.get(), 2.0, net.null)
        assert bits(ours) == bits(samplers.sample(again, table, x))
        seen.add(bits(ours))
    assert len(seen) == 3 and kept.refused is None


# ---------------------------------------------------------------------------------------------------------------- the tools


SETTINGS = ("model.channels=8,8", "model.blocks=1", "model.groups=4", "train.batch=4", "train.steps=8", "data.flip=true")


@pytest.fixture
def made(device: hosted.HostedDevice) -> Any:
    digits = data.load("digits")
    config = configs.load(None, [*SETTINGS])
    made = trainer.Trainer(families.of(config).resolved(config, digits), digits, cupy)
    weights = made.learner.net.params.data
    weights[...] = weights + cupy.asarray(np.random.default_rng(0).normal(0, 0.1, weights.shape).astype(np.float32))
    return made


def drawn(made: Any, sampler: str, labels: Any, weight: float = 1.7, **settings: Any) -> tuple[bytes, int]:
    """(images, calls of the network by Python) of 5 images in batches of 2, which without labels are not doubled."""
    calls, chosen = 0, sampling.sampler(made.process, Sample(sampler, 5, **settings))
    predict = type(made.learner.net).predict

    def counted(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        assert labels is not None or len(args[0]) <= 2
        return predict(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(made.learner.net), "predict", counted)
        what = (made.process, made.learner.net, chosen, labels, 5)
        how = sampling.guide(Sample(sampler, 5, **settings), weight)
        blocks = list(sampling.draw(*what, seed=1, batch=2, how=how))
    assert [len(b) for b in blocks] == [2, 2, 1]
    return np.concatenate(blocks).tobytes(), calls


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize("classes", [True, False])
def test_images_are_those_of_the_plain_loop(
    sampler: str, classes: bool, made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    labels = np.arange(5) % 3 if classes else None
    graphs, calls = drawn(made, sampler, labels)
    monkeypatch.setattr(sampling, "capturable", lambda *args: False)
    plain, all_calls = drawn(made, sampler, labels)
    assert graphs == plain
    assert all_calls == 3 * 5 and calls < all_calls
    assert not capsys.readouterr().err


def test_what_is_no_table_of_plain_steps_is_not_captured(made: Any, capsys: pytest.CaptureFixture) -> None:
    labels = np.arange(5) % 3
    for settings in ({"threshold": 0.99}, {"rescale": 0.5}, {"interval_low": 1.0}):
        assert drawn(made, "ddim", labels, **settings)[1] == 3 * 5  # type: ignore[arg-type]
    chosen, how = sampling.sampler(made.process, Sample("ddim", 5)), sampling.Guide()
    assert sampling.capturable(made.process, chosen, how)
    for sampler in ("flow", "pc"):
        assert not sampling.capturable(made.process, sampling.sampler(made.process, Sample(sampler, 0)), how)
    assert not sampling.capturable(made.process, chosen, sampling.Guide(gradient=lambda y: lambda x, t: x))
    assert not sampling.capturable(object(), chosen, how)
    for own in ("train.loss=hybrid", "method=subvpsde"):
        config = configs.load(None, [*SETTINGS, own])
        process = Process(families.of(config).resolved(config, data.load("digits")))
        assert not sampling.capturable(process, sampling.sampler(process, Sample("ddpm" if "hybrid" in own else "em", 5)), how)
    assert not capsys.readouterr().err


def test_a_refused_capture_is_told_once(made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    split = type(made.learner.net).predict
    monkeypatch.setattr(type(made.learner.net), "predict", lambda self, *args: split(self, *args) * 1)
    labels = np.arange(5) % 3
    graphs, _ = drawn(made, "ddim", labels)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("alphabar: note: steps run one by one, not as graphs: ") and "__mul__" in err
    monkeypatch.setattr(sampling, "capturable", lambda *args: False)
    assert drawn(made, "ddim", labels)[0] == graphs
