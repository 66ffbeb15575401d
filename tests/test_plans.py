"""Plans: whatever happens between the calls, the answer and the gradients are those of the plain run, bit for bit."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.core.losses import weighted_loss
from alphabar.kernels import buffers, elementwise
from alphabar.kernels.plan import Plan
from alphabar.nets import AdamW, Tensor, UNet, backward, no_grad, plans
from alphabar.nets.autograd import fresh_tape
from alphabar.nets.descent import descend

numba = pytest.importorskip("numba")
cpu = pytest.importorskip("alphabar.kernels.cpu")
jit = pytest.importorskip("alphabar.kernels.cpu.jit")

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "attention": {"attention": (4,), "head_dim": 8},
    "classes": {"classes": 4},
    "classes, no null": {"classes": 4, "null_class": False},
    "scale and shift": {"scale_shift": True, "classes": 2},
    "no middle": {"middle": "none", "attention": (8,)},
    "plain middle": {"middle": "plain"},
    "middle without norm": {"middle_groups": 0},
    "three levels": {"image_size": (12, 8), "channels": (8, 12, 16), "attention": (3,)},
    "odd sizes": {"image_size": (14, 10), "in_channels": 3, "out_channels": 5, "channels": (12, 20), "groups": 4},
    "wide": {"image_size": 16, "channels": (32, 64), "groups": 8, "attention": (8,)},
    "one level": {"channels": (16,), "image_size": 7},
    "three blocks": {"blocks": 3},
    "diffusers": {"flip_sin_to_cos": True, "freq_shift": 1.0, "time_dtype": "float32", "downsample_pad": (0, 1)},
}


def network(seed: int = 3, **options: Any) -> UNet:
    return UNet(**{"image_size": 8, "channels": (8, 16), "blocks": 1, "groups": 4, "zero_init": False, "seed": seed, **options})


def arguments(net: UNet, batch: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rng, c = np.random.default_rng(seed), net.config
    x = rng.standard_normal((batch, *c["image_size"], c["in_channels"])).astype(np.float32)
    y = None if c["classes"] is None else rng.integers(0, net.label_rows, batch)
    return x, rng.integers(1, 1001, batch), y


@contextmanager
def plainly() -> Iterator[None]:
    """Within the block no plan is made or used."""
    kept, plans.circumstances = plans.circumstances, lambda: None
    try:
        yield
    finally:
        plans.circumstances = kept


def plain(net: UNet, *args: Any) -> np.ndarray:
    with plainly():
        return net.predict(*args)


def spoil(net: UNet) -> None:
    """Overwrite all memory of the network's plans: a result must not depend on what a former run left there."""
    for run in net.plans._runs.values():
        for block in run.plan.memory.blocks:
            block.view(np.float32)[:] = np.nan
        if run.plan.weights is not None:
            run.plan.weights._seen = b""  # their other forms are gone too


def complete(net: UNet) -> list[bool]:
    """Which of the network's plans can be made again, the last used one last."""
    assert not net.plans.refusals()
    return [run.forward is not None for run in net.plans._runs.values()]


def step(net: UNet, *args: Any) -> np.ndarray:
    """The gradients of one step, whose loss is half the square of the output."""
    net.params.zero_grad()
    out = net(*args)
    out.backward(out.data / len(out.data))
    return net.params.grad.copy()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_predictions_are_those_of_the_plain_run(options: dict[str, Any], batch: int) -> None:
    net = network(**options)
    for seed in range(4):
        args = arguments(net, batch, seed)
        spoil(net)
        np.testing.assert_array_equal(net.predict(*args), plain(net, *args))
    assert complete(net) == [True]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_forward_loss_and_backward_as_one_are_those_of_the_plain_run(options: dict[str, Any], weighted: bool) -> None:
    net = network(**options)
    shape = (3, *net.config["image_size"], net.config["out_channels"])
    for seed in range(4):
        x, t, y = arguments(net, seed=seed)
        target = np.random.default_rng(seed + 9).standard_normal(shape).astype(np.float32)
        weight = np.float32([0.5, seed, 2]) if weighted else None
        spoil(net)
        net.params.grad[:] = seed  # which is not added to
        value, output = descend(net, weighted_loss, (target, weight), x, t, y)
        found = net.params.grad.copy()
        with plainly():
            net.params.zero_grad()
            plain = net(x, t, y)
            want, gradient = weighted_loss(plain.data, target, weight)
            plain.backward(gradient)
        for a, b in ((value, want), (output, plain.data), (found, net.params.grad)):
            np.testing.assert_array_equal(a, b)
        spoil(net)
        np.testing.assert_array_equal(value, want)  # it is the caller's
    assert complete(net) == [True]


def test_one_pass_with_arguments_that_do_not_fit_or_a_loss_that_cannot_be_repeated() -> None:
    net = network(classes=3)
    x, t, y = arguments(net)

    def of_numpy(output: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = output - target
        return np.square(d).mean(axis=(1, 2, 3)), d * np.float32(2 / d.size)

    for _ in range(3):
        descend(net, weighted_loss, (x, None), x, t, y)
        with pytest.raises(ValueError, match="y must be in 0"):
            descend(net, weighted_loss, (x, None), x, t, y + 3)
        with pytest.raises(TypeError, match="t must be"):
            descend(net, weighted_loss, (x, None), x, t.astype(bool), y)
        with pytest.raises(ValueError, match="output has shape"):
            descend(net, weighted_loss, (x[:2], None), x, t, y)
        with pytest.raises(TypeError, match="x is float64"):
            descend(net, weighted_loss, (x, None), x.astype(np.float64), t, y)
        with net.params.frozen(), pytest.raises(RuntimeError, match="nothing was recorded"):
            descend(net, weighted_loss, (x, None), x, t, y)
    assert complete(net) == [True]
    for k in range(3):
        np.testing.assert_allclose(
            descend(net, of_numpy, (x + k,), x, t, y)[0], descend(net, weighted_loss, (x + k, None), x, t, y)[0], rtol=1e-5
        )
        own, _ = descend(net, lambda output, k=k: of_numpy(output, x + k), None, x, t, y)
        np.testing.assert_array_equal(own, descend(net, of_numpy, (x + k,), x, t, y)[0])
    assert len(net.plans.refusals()) == 1


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_training_is_that_of_the_plain_run(options: dict[str, Any], batch: int) -> None:
    trained = []
    for planned in (True, False):
        net = network(**options)
        optimiser = AdamW(net.params, max_norm=1.0)
        for k in range(20 if options == CONFIGS["attention"] else 4):
            if planned:
                spoil(net)
                step(net, *arguments(net, batch, k))
                assert complete(net) == [True]
            else:
                with plainly():
                    step(net, *arguments(net, batch, k))
            optimiser.step(1e-2)
        trained.append(net.params.data.copy())
    np.testing.assert_array_equal(*trained)


def test_gradients_add_up_over_calls() -> None:
    net = network()
    first, second = arguments(net, seed=1), arguments(net, seed=2)
    totals = []
    for planned in (True, True, False):
        net.params.zero_grad()
        for args in (first, second):
            if planned:
                out = net(*args)
                out.backward(out.data)
            else:
                with plainly():
                    out = net(*args)
                    out.backward(out.data)
        totals.append(net.params.grad.copy())
    np.testing.assert_array_equal(totals[0], totals[2])
    np.testing.assert_array_equal(totals[1], totals[2])


def test_weights_may_be_written_in_every_way_between_calls() -> None:
    wide: dict[str, Any] = {"classes": 3, "image_size": 16, "channels": (64,), "attention": (), "middle": "none"}
    net, other = network(**wide), network(seed=4, **wide)
    args, rng = arguments(net, 4), np.random.default_rng(0)
    average = rng.standard_normal(net.params.data.shape).astype(np.float32) / 8
    held = net.params["conv_in.weight"].data[1:]

    def flat() -> None:
        net.params.data[::3] *= 1.5

    def named() -> None:
        net.params["conv_out.weight"].data[0, 1] += 1

    def view() -> None:
        held[...] = -held

    def loaded() -> None:
        net.params.load(other.params.arrays())

    def updated() -> None:
        step(net, *args)
        AdamW(net.params).step(0.1)

    seen = [net.predict(*args)]
    for change in (flat, named, view, loaded, updated, flat, view):
        change()
        for _ in range(2):
            seen.append(net.predict(*args))
            np.testing.assert_array_equal(seen[-1], plain(net, *args))
        with net.params.using(average):
            of_average = net.predict(*args)
            np.testing.assert_array_equal(of_average, plain(net, *args))
        np.testing.assert_array_equal(step(net, *args), step(net, *args))
    assert len({a.tobytes() for a in seen}) == 8
    assert all(complete(net))
    kept = [run.plan.weights for run in net.plans._runs.values() if run.plan.weights is not None]
    assert len(kept) == 2 and all(w._calls for w in kept)  # other forms of the weights were kept, and made anew


def test_one_bit_of_a_weight_makes_its_other_form_anew() -> None:
    values = np.zeros(1024, np.float32)
    plan = Plan((values,), values)
    with plan.recorded() as stretch:
        weights = values[64:960]
        elementwise.add(plan.memory.empty((896,), np.float32), weights)  # memory that is used before, and free again
        form = buffers.for_weights(weights.shape, np.float32)
        entry = jit.Entry(cpu.elementwise._add.dispatcher, prepares=True)
        entry(weights, weights, form)
        y = elementwise.add(form, form)
    stretch()
    for place in (64, 65, 500, 959):
        for bit in (0, 22, 31):
            values.view(np.uint32)[place] ^= np.uint32(1 << bit)
            stretch()
            np.testing.assert_array_equal(y, 4 * weights)
    form[...] = 7  # nothing has changed: it is not made
    values[:64] = values[960:] = 3
    stretch()
    np.testing.assert_array_equal(y, 14)
    values[100], values[101] = -values[101], -values[100] - 1
    stretch()
    np.testing.assert_array_equal(y, 4 * weights)


def test_parameters_that_are_pointed_elsewhere_are_seen() -> None:
    net = network()
    args = arguments(net)
    for _ in range(3):
        net.predict(*args)
    net.params["conv_in.weight"].data = 2 * net.params["conv_in.weight"].data
    np.testing.assert_array_equal(net.predict(*args), plain(net, *args))
    net.params["conv_in.weight"].data[...] = 0
    np.testing.assert_array_equal(net.predict(*args), plain(net, *args))


def test_weights_that_do_not_lie_side_by_side_or_cannot_be_written() -> None:
    net = network()
    args = arguments(net)
    apart = np.repeat(net.params.data, 2)[::2]
    fixed = net.params.data.copy()
    fixed.setflags(write=False)
    want = plain(net, *args)
    for flat in (apart, fixed, fixed):
        with net.params.using(flat):
            for _ in range(3):
                np.testing.assert_array_equal(net.predict(*args), want)


def test_shapes_may_change_and_networks_may_take_turns() -> None:
    nets = [network(), network(seed=5), network(classes=3)]
    wanted = {}
    for turn in range(3):
        for batch in (1, 2, 3, 2):
            for i, net in enumerate(nets):
                args = arguments(net, batch)
                spoil(net)
                results = net.predict(*args), step(net, *args), net(*args).data
                if turn == 0:
                    with plainly():
                        wanted[batch, i] = net.predict(*args), step(net, *args), net(*args).data
                for result, want in zip(results, wanted[batch, i], strict=True):
                    np.testing.assert_array_equal(result, want)
    assert all(len(complete(net)) == plans.KEPT for net in nets)


def test_several_forward_passes_before_their_backward_passes() -> None:
    net = network()
    first, second = arguments(net, seed=1), arguments(net, seed=2)
    totals = []
    for planned in (True, True, True, False):
        net.params.zero_grad()
        if planned:
            a, b, c = net(*first), net(*second), net(*first)
            spoiled = net.predict(*second)
        else:
            with plainly():
                a, b, c = net(*first), net(*second), net(*first)
            np.testing.assert_array_equal(spoiled, b.data)
        backward((a, a.data), (b, b.data))
        backward((c, a.data))
        totals.append(net.params.grad.copy())
    for total in totals[:-1]:
        np.testing.assert_array_equal(total, totals[-1])
    with pytest.raises(RuntimeError, match="already gone"):
        a.backward(a.data)


def test_an_output_stays_what_it_was() -> None:
    net = network()
    args = arguments(net)
    outputs, kept = [], []
    for k in range(4):
        outputs.append(net(*arguments(net, seed=k)))
        outputs[-1].backward(outputs[-1].data)
        kept.append(outputs[-1].data.copy())
        outputs[-1].data[...] += 0  # it is the caller's
    spoil(net)
    net.predict(*args)
    for out, want in zip(outputs, kept, strict=True):
        np.testing.assert_array_equal(out.data, want)


def test_a_forward_pass_without_a_backward_pass_is_not_waited_for() -> None:
    net = network()
    args = arguments(net)
    want = plain(net, *args)
    for _ in range(9):
        np.testing.assert_array_equal(net(*args).data, want)
    with plainly():
        gradients = step(net, *args)
    for _ in range(9):  # it is recorded again when a call comes whose number is a power of two
        np.testing.assert_array_equal(step(net, *args), gradients)
    (run,) = net.plans._runs.values()
    assert run.backward is not None


def test_what_is_around_a_call_may_change() -> None:
    net = network(image_size=16, channels=(32,), groups=8)
    args = arguments(net)
    own = numba.get_num_threads()
    for turn in range(3):
        for threads in range(1, own + 1):
            numba.set_num_threads(threads)
            np.testing.assert_array_equal(net.predict(*args), plain(net, *args))
            assert numba.get_num_threads() == threads
        numba.set_num_threads(own)
        for precision in kernels.precisions.PRECISIONS:
            with kernels.precision(precision):
                np.testing.assert_array_equal(net.predict(*args), plain(net, *args))
        with kernels.use("reference"):
            defined = net.predict(*args)
            np.testing.assert_array_equal(defined, plain(net, *args))
        assert turn == 0 or (defined != net.predict(*args)).any()


def test_circumstances_may_change_between_forward_and_backward_pass() -> None:
    net = network()
    args = arguments(net)
    want = step(net, *args)
    step(net, *args)
    for _ in range(2):
        net.params.zero_grad()
        out = net(*args)
        with kernels.use("reference"):
            out.backward(out.data / 3)
        np.testing.assert_allclose(net.params.grad, want, atol=1e-4 * np.abs(want).max())
        net.params.zero_grad()
        out = net(*args)
        with net.params.frozen():
            out.backward(out.data / 3)
        assert not net.params.grad.any()
        np.testing.assert_array_equal(step(net, *args), want)


def test_exceptions_leave_nothing_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    args = arguments(net)
    want, gradients = plain(net, *args), None
    with plainly():
        gradients = step(net, *args)
    calls = iter(range(100))

    def failing(*_: Any, **__: Any) -> Any:
        if next(calls) == 2:
            raise KeyError("in the middle")
        return original(*_, **__)

    original = kernels.group_norm_silu
    monkeypatch.setattr(kernels, "group_norm_silu", failing)
    with pytest.raises(KeyError):
        net.predict(*args)
    monkeypatch.undo()
    for _ in range(3):
        np.testing.assert_array_equal(net.predict(*args), want)
    assert complete(net) == [True]
    original, calls = kernels.conv2d_backward_weight, iter(range(100))
    monkeypatch.setattr(kernels, "conv2d_backward_weight", failing)
    out = net(*args)
    with pytest.raises(KeyError):
        out.backward(out.data)
    monkeypatch.undo()
    for _ in range(3):
        np.testing.assert_array_equal(step(net, *args), gradients)
    assert complete(net) == [True, True]


def test_calls_that_cannot_be_planned_are_run_plainly() -> None:
    net = network()
    x, t, _ = arguments(net)
    start = Tensor(x, needs_grad=True)
    net(start, t).backward(x)
    assert start.grad is not None
    net(Tensor(x, tangent=x), t)
    with fresh_tape():
        assert not net(x, t).needs_grad
    with kernels.use("reference"):
        net.predict(x, t)
    net.params["conv_in.bias"].tangent = np.ones(8, np.float32)
    assert net(x, t).tangent is not None
    net.params["conv_in.bias"].tangent = None
    assert net.predict(x[:0], t[:0]).shape == (0, 8, 8, 1)
    assert not net.plans._runs
    for other, step_of in ((network(dtype="float64"), None), (network(dropout=0.1), 0)):
        args = arguments(other)
        other(args[0].astype(other.config["dtype"]), args[1], step=step_of)
        assert not other.plans._runs
    with net.params.frozen():
        assert not net(x, t).needs_grad
    assert complete(net) == [True]
    with fresh_tape():
        net.params["conv_in.bias"].needs_grad = True  # looked at here first
        net.predict(x, t)
        assert not net(x, t).needs_grad
    assert net(x, t).needs_grad


@pytest.mark.parametrize("kind", ["uint8", "int32", ">i8"])
def test_labels_and_times_of_any_kind_of_integer(kind: str) -> None:
    net = network(classes=3)
    x, t, y = arguments(net)
    want = plain(net, x, t, y)
    for _ in range(3):
        np.testing.assert_array_equal(net.predict(x, t.astype(kind.replace("uint8", "uint16")), y.astype(kind)), want)
        np.testing.assert_array_equal(net.predict(x[::-1][::-1], t.astype(float), y), want)
    assert complete(net) == [True]


def test_a_frozen_parameter_gets_no_gradient() -> None:
    net = network()
    args, weight = arguments(net), net.params["conv_in.weight"]
    want = step(net, *args)
    assert weight.grad.any()
    step(net, *args)
    weight.needs_grad = False
    for _ in range(3):
        grads = step(net, *args)
        assert not weight.grad.any()
        np.testing.assert_array_equal(grads[grads != 0], want[grads != 0])
    weight.needs_grad = True
    np.testing.assert_array_equal(step(net, *args), want)


def test_memory_of_plans_is_bounded_and_goes_with_the_network() -> None:
    net = network()
    sizes = []
    gc.collect()
    gc.disable()
    try:
        for k in range(12):
            args = arguments(net, 1 + k % 6)
            step(net, *args), net.predict(*args)
            sizes.append(net.plans.nbytes)
        assert len(net.plans._runs) == plans.KEPT and max(sizes[6:]) == max(sizes[:6])
        for _ in range(3):
            step(net, *args), net.predict(*args)
        assert net.plans.nbytes == sizes[-1]
        blocks = [weakref.ref(b) for run in net.plans._runs.values() for b in run.plan.memory.blocks]
        del net
        assert blocks and all(b() is None for b in blocks)
    finally:
        gc.enable()


def test_threads_may_share_a_network() -> None:
    net = network(image_size=16, channels=(32,), groups=8)
    wanted = [plain(net, *arguments(net, seed=k)) for k in range(4)]
    wrong = []

    def work(k: int) -> None:
        args = arguments(net, seed=k)
        for _ in range(30):
            if not np.array_equal(net.predict(*args), wanted[k]):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


def test_results_do_not_depend_on_the_number_of_threads_a_plan_was_made_with() -> None:
    net, own = network(image_size=16, channels=(32,), groups=8), numba.get_num_threads()
    args, results = arguments(net), []
    for threads in {1, own}:
        numba.set_num_threads(threads)
        for _ in range(3):
            results.append((net.predict(*args), step(net, *args)))
    numba.set_num_threads(own)
    for prediction, gradients in results:
        np.testing.assert_array_equal(prediction, results[0][0])
        np.testing.assert_array_equal(gradients, results[0][1])


# -------------------------------------------------------------------------------------------------------------- the recorder


def test_a_plan_is_refused_where_a_call_works_on_other_memory() -> None:
    a = np.ones(8, np.float32)
    for lasting, refused in (((), True), ((a,), False)):
        plan = Plan(lasting)
        with plan.recorded() as stretch:
            y = elementwise.add(a, a)
        assert (plan.refused is not None) == refused
    a[...] = 3
    stretch()
    np.testing.assert_array_equal(y, 6)


def test_a_plan_keeps_constants() -> None:
    constant = np.full(8, 2, np.float32)
    constant.setflags(write=False)
    plan = Plan()
    with plan.recorded() as stretch:
        x = plan.memory.empty((8,), np.float32)
        y = plan.memory.empty((8,), np.float32)
        x[...] = 1
        cpu.elementwise._add(x, constant, y)
    del constant
    x[...] = 5
    stretch()
    assert plan.refused is None
    np.testing.assert_array_equal(y, 7)


def test_a_plan_is_refused_where_something_was_not_compiled() -> None:
    plan = Plan()
    with plan.recorded():
        x = plan.memory.empty((8,), np.float32)
        elementwise.add(x.astype(np.float64), x)
    assert "elementwise" in str(plan.refused)
    plan = Plan()
    with plan.recorded(), kernels.use("reference"):
        kernels.silu(plan.memory.empty((8,), np.float32))
    assert "definition" in str(plan.refused)
    plan = Plan()
    with pytest.raises(KeyError), plan.recorded():
        raise KeyError
    assert "exception" in str(plan.refused)


def test_no_grad_and_a_tape_have_plans_of_their_own() -> None:
    net = network()
    args = arguments(net)
    for _ in range(3):
        with no_grad():
            assert not net(*args).needs_grad
        assert net(*args).needs_grad
    assert len(net.plans._runs) == 2
