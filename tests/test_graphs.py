"""Steps that are made once and then started: plans on the CPU, CUDA graphs on a stand-in for a GPU; uploads beside the work."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from alphabar import kernels
from alphabar.kernels import buffers, device_memory, elementwise, gpu
from alphabar.kernels.arrays import to_numpy
from alphabar.kernels.device_memory import OutOfDeviceMemory
from alphabar.kernels.gpu import conv, launch
from alphabar.kernels.graphs import Arena, Graph
from alphabar.kernels.recording import NotCapturable, capturing
from alphabar.kernels.uploads import Uploads
from tests import fake_cuda, fake_cupy, hosted

SHAPE = (2, 4, 4, 3)
cupy = fake_cupy.cupy


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> hosted.HostedDevice:
    if not hosted.available():
        pytest.skip("g++ is not installed")
    return hosted.pretend(monkeypatch)


@pytest.fixture(params=["numpy", "cupy"])
def xp(request: pytest.FixtureRequest) -> Any:
    if request.param == "numpy":
        return np
    request.getfixturevalue("device")
    return cupy


def ramp(xp: Any = np, start: float = 0.0) -> Any:
    return xp.asarray(np.arange(start, start + 96, dtype=np.float32).reshape(SHAPE) / 64)


def silu_thrice(x: Any, y: Any) -> None:
    """y = x + SiLU(SiLU(SiLU(x))), with work arrays that come and go."""
    elementwise.add(x, kernels.silu(kernels.silu(kernels.silu(x))), y)


class Counted:
    """A body that counts how often Python went through it."""

    def __init__(self, body: Callable[..., Any], *arrays: Any) -> None:
        self.body, self.arrays, self.calls = body, arrays, 0

    def __call__(self) -> None:
        self.calls += 1
        self.body(*self.arrays)


# ------------------------------------------------------------------------------------------------------------------------ graphs


def test_a_graph_does_what_its_body_does_each_time(xp: Any) -> None:
    x, y = ramp(xp), ramp(xp)
    body = Counted(silu_thrice, x, y)
    graph = Graph(body, x, (x, y))
    for k in range(5):
        fresh = ramp(xp, 7.0 * k)
        x[...] = fresh
        graph()
        wanted = xp.empty(SHAPE, np.float32)
        silu_thrice(fresh, wanted)
        assert to_numpy(y).tobytes() == to_numpy(wanted).tobytes()
    assert graph.kept and graph.refused is None
    assert body.calls == (1 if xp is np else 2)


def test_another_precision_is_another_graph(xp: Any) -> None:
    x, y = ramp(xp), ramp(xp)
    body = Counted(silu_thrice, x, y)
    graph = Graph(body, x, (x, y))
    calls = 1 if xp is np else 2
    for _ in range(3):
        graph()
    assert body.calls == calls
    with kernels.precision("high"):
        for _ in range(3):
            graph()
        assert body.calls == 2 * calls
    with kernels.use("reference"):
        graph()
    assert body.calls == 2 * calls + 1 and graph.refused is None
    for _ in range(3):
        graph()
    made = body.calls
    with conv.choosing("own"):
        graph()
    assert body.calls == made + (xp is not np)  # which a CPU does not ask for


def test_what_cannot_be_kept_is_done_plainly_and_rightly(xp: Any) -> None:
    x, y = ramp(xp), ramp(xp)

    def python(x: Any, y: Any) -> None:
        silu_thrice(x * 2, y)

    body = Counted(python, x, y)
    graph = Graph(body, x, (x, y))
    for k in range(4):
        fresh = ramp(xp, 3.0 * k)
        x[...] = fresh
        graph()
        wanted = xp.empty(SHAPE, np.float32)
        silu_thrice(fresh * 2, wanted)
        assert to_numpy(y).tobytes() == to_numpy(wanted).tobytes()
    assert not graph.kept and graph.refused and "\n" not in graph.refused
    assert ("memory that is not the plan's" if xp is np else "__mul__ while a graph is captured") in graph.refused
    assert body.calls == (4 if xp is np else 5)  # the capture that failed went through it too


def test_an_exception_of_the_body_comes_out_and_leaves_nothing_behind(xp: Any) -> None:
    x, y = ramp(xp), ramp(xp)
    told = [False, True, False, False, False, False]

    def sometimes(x: Any, y: Any) -> None:
        silu_thrice(x, y)
        if told.pop(0):
            raise KeyboardInterrupt

    graph = Graph(Counted(sometimes, x, y), x, (x, y))
    if xp is np:
        told.pop(0)
        with pytest.raises(KeyboardInterrupt):
            graph()
        assert not graph.kept
    else:
        graph()
        with pytest.raises(KeyboardInterrupt):
            graph()
        assert not capturing.get() and fake_cuda.current() is fake_cuda.Stream.null
        fake_cuda.refuse("this")  # no stream captures any more
    for _ in range(3):
        graph()
    assert graph.kept and graph.refused is None


def test_inside_another_one_a_graph_is_its_body(xp: Any) -> None:
    x, y, z = ramp(xp), ramp(xp), ramp(xp)
    inner = Counted(silu_thrice, x, y)
    inside = Graph(inner, x, (x, y))
    inside()
    inside()

    def outer() -> None:
        inside()
        elementwise.add(x, y, z)

    graph = Graph(outer, x, (x, y, z))
    for k in range(4):
        x[...] = ramp(xp, k)
        graph()
        wanted = xp.empty(SHAPE, np.float32)
        silu_thrice(ramp(xp, k), wanted)
        assert to_numpy(z).tobytes() == to_numpy(ramp(xp, k) + wanted).tobytes()
    assert graph.kept and graph.refused is None
    assert inner.calls == (2 if xp is np else 3)  # recorded, or captured, once more as a part of the other one


# ------------------------------------------------------------------------------------------------------------------ on a device


def test_the_capture_takes_the_memory_of_the_first_call(device: hosted.HostedDevice) -> None:
    x, y = ramp(cupy), ramp(cupy)
    arena = Arena(x)
    graph = Graph(Counted(silu_thrice, x, y), x, (x, y), arena)
    graph()
    held = arena.nbytes
    assert held >= 2 * x.nbytes
    graph()
    graph()
    assert graph.kept and arena.nbytes == held and arena.pool.used_bytes() == 0


def test_nothing_is_launched_while_a_graph_is_captured(device: hosted.HostedDevice) -> None:
    x, y = ramp(cupy), ramp(cupy)
    arena = Arena(x)
    arena.run(lambda: silu_thrice(x, y))
    device.launched.clear()
    y[...] = 0
    made = arena.capture(lambda: silu_thrice(x, y))
    assert not device.launched and not to_numpy(y).any()
    made.launch()
    assert len(device.launched) == 4 and to_numpy(y).any()


def test_graphs_of_one_arena_work_in_the_same_memory(device: hosted.HostedDevice) -> None:
    x, y, z = ramp(cupy), ramp(cupy), ramp(cupy)
    arena = Arena(x)
    first = Graph(lambda: silu_thrice(x, y), x, (x, y), arena)
    second = Graph(lambda: silu_thrice(y, z), x, (y, z), arena)
    first()
    held = arena.nbytes
    for _ in range(4):
        first()
        second()
        wanted = cupy.empty(SHAPE, np.float32)
        silu_thrice(y, wanted)
        assert to_numpy(z).tobytes() == to_numpy(wanted).tobytes()
    assert first.kept and second.kept and arena.nbytes == held


def test_a_counter_on_the_device_moves_with_every_launch(device: hosted.HostedDevice) -> None:
    z, counter = cupy.empty((2, 5), np.float32), cupy.asarray(np.zeros(1, np.int32))

    def body() -> None:
        with gpu.counted(counter):
            kernels.normals(z, seed=3)
        gpu.count(counter)

    graph = Graph(body, z, (z, counter))
    for k in range(5):
        graph()
        assert to_numpy(z).tobytes() == kernels.normals(np.empty((2, 5), np.float32), seed=3, step=k).tobytes()
    assert graph.kept


READS: dict[str, Callable[[Any, Any], Any]] = {
    "the host reads an array of the device while a graph is captured": lambda x, y: to_numpy(x),
    "a number for the host": lambda x, y: float(x[0, 0, 0, 0]),
    "a table of the host that may change is sent to the device": lambda x, y: launch.table(launch.current(), np.ones(3)),
    "an assignment": lambda x, y: y.__setitem__(0, 1.0),
    "a copy from the host": lambda x, y: cupy.asarray(np.ones(3)),
    "waiting for the device": lambda x, y: cupy.cuda.Device().synchronize(),
}


@pytest.mark.parametrize("told", READS)
def test_what_a_graph_would_not_do_again_is_refused(told: str, device: hosted.HostedDevice) -> None:
    x, y = ramp(cupy), ramp(cupy)

    def body() -> None:
        silu_thrice(x, y)
        READS[told](x, y)

    graph = Graph(body, x, (x, y))
    graph()
    graph()
    assert graph.refused is not None and told in graph.refused
    assert graph.refused.startswith(("Fault: ", "NotCapturable: "))


def test_a_table_that_stays_is_sent_before_and_not_while_a_graph_is_captured(device: hosted.HostedDevice) -> None:
    values = np.arange(3.0)
    values.setflags(write=False)
    token = capturing.set(True)
    try:
        with pytest.raises(NotCapturable, match="for the first time while a graph is captured"):
            launch.table(device, values)
    finally:
        capturing.reset(token)
    sent = launch.table(device, values)
    token = capturing.set(True)
    try:
        assert launch.table(device, values) is sent
    finally:
        capturing.reset(token)


# ------------------------------------------------------------------------------------------------- the stand-in is no kind device


def test_what_was_not_written_in_this_launch_is_not_there(device: hosted.HostedDevice) -> None:
    x, y = ramp(cupy), ramp(cupy)

    def body() -> None:
        left = cupy.empty(SHAPE, np.float32)  # where SiLU's answer was, as it happens
        elementwise.add(x, left, y)
        kernels.silu(x)

    arena = Arena(x)
    arena.run(body)
    arena.run(body)
    made = arena.capture(body)
    made.launch()
    assert np.isnan(to_numpy(y)).all()


def test_memory_that_was_given_back_is_noticed(device: hosted.HostedDevice) -> None:
    x, y = ramp(cupy), ramp(cupy)
    arena = Arena(x)
    arena.run(lambda: silu_thrice(x, y))
    made = arena.capture(lambda: silu_thrice(x, y))
    made.launch()
    del arena
    with pytest.raises(fake_cuda.Fault, match="memory that was given back"):
        made.launch()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:  # without an arena: the pool gives the memory to whoever asks
        stream.begin_capture()
        silu_thrice(x, y)
        made = stream.end_capture()
    with pytest.raises(fake_cuda.Fault, match="memory that was given back"):
        made.launch()


@pytest.mark.parametrize("order", ["late", "others first"])
def test_the_first_call_stands_between_what_was_launched_before_and_after(order: str, device: hosted.HostedDevice) -> None:
    x, y, z = (cupy.asarray(np.zeros(SHAPE, np.float32)) for _ in range(3))
    given = ramp(cupy)
    graph = Graph(lambda: elementwise.add(x, x, y), x, (x, y))
    with fake_cuda.lazily(order):
        for _ in range(4):
            elementwise.add(given, x, x)
            graph()
            elementwise.add(y, z, z)
    assert np.array_equal(to_numpy(z), to_numpy(given) * 2 * (1 + 2 + 3 + 4))


# ------------------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def little_memory(device: hosted.HostedDevice) -> Iterator[None]:
    """A device with 64 KiB to spare."""
    cupy.get_default_memory_pool().free_all_blocks()
    fake_cuda.Memory.limit = fake_cuda.Memory.used + (64 << 10)
    try:
        yield
    finally:
        fake_cuda.Memory.limit = fake_cuda.TOTAL


def test_an_arena_asks_the_default_pool_before_it_gives_up_and_keeps_what_graphs_work_in(little_memory: None) -> None:
    x, y = ramp(cupy), ramp(cupy)
    arena = Arena(x)
    graph = Graph(lambda: silu_thrice(x, y), x, (x, y), arena)
    graph()
    graph()
    held = arena.nbytes
    idle = cupy.empty(40 << 10, np.uint8)
    del idle  # now the default pool has it
    arena.run(lambda: cupy.empty(30 << 10, np.uint8))
    with pytest.raises(OutOfDeviceMemory) as caught:
        arena.run(lambda: cupy.empty(90 << 10, np.uint8))
    assert caught.value.asked == 90 << 10 and caught.value.total == fake_cuda.Memory.limit
    assert 0 < caught.value.free == fake_cuda.Memory.limit - fake_cuda.Memory.used
    assert isinstance(caught.value, MemoryError) and f"{90 << 10} bytes more were asked for" in str(caught.value)
    assert arena.nbytes == held + (30 << 10)
    x[...] = 1
    graph()
    wanted = cupy.empty(SHAPE, np.float32)
    silu_thrice(x, wanted)
    assert np.array_equal(to_numpy(y), to_numpy(wanted))


def test_want_of_memory_is_told_in_one_way(little_memory: None, device: hosted.HostedDevice, monkeypatch: Any) -> None:
    with pytest.raises(OutOfDeviceMemory) as caught:
        buffers.empty((100, 1 << 10), np.uint8, cupy)
    assert caught.value.asked == 100 << 10
    with pytest.raises(OutOfDeviceMemory, match=f"{80 << 10} bytes more were asked for"), device_memory.memory_told():
        cupy.asarray(np.zeros(80 << 10, np.uint8))
    x = ramp(cupy)

    def no_room(*args: Any, **kwargs: Any) -> None:
        raise fake_cuda.CUDARuntimeError(2, "CUDA_ERROR_OUT_OF_MEMORY: out of memory")

    monkeypatch.setattr(hosted._Kernel, "__call__", no_room)
    with pytest.raises(OutOfDeviceMemory, match="a kernel could not be started"):
        kernels.silu(x)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise fake_cuda.CUDARuntimeError(700, "an illegal memory access")

    monkeypatch.setattr(hosted._Kernel, "__call__", broken)
    with pytest.raises(fake_cuda.CUDARuntimeError, match="illegal"), device_memory.memory_told():
        kernels.silu(x)
    with pytest.raises(MemoryError, match="of the host"), device_memory.memory_told():
        raise MemoryError("of the host")


# ------------------------------------------------------------------------------------------------------------------------ uploads


def batch(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a step; every third batch is smaller."""
    n = 3 if k % 3 == 2 else 4
    return np.full((n, 5), k, np.float32), np.arange(n, dtype=np.int64) + k


def carried(xp: Any, steps: int, depth: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What each of ``steps`` steps finds in its arrays, where the host puts batches ahead and goes on without waiting."""
    uploads = Uploads(xp.empty(1, np.float32), depth)
    log = [tuple(xp.asarray(np.zeros_like(a)) for a in batch(k)) for k in range(steps)]
    ahead = 0
    into = {n: (xp.empty((n, 5), np.float32), xp.empty(n, np.int64)) for n in (3, 4)}
    zero = {n: xp.asarray(np.zeros((n, 5), np.float32)) for n in (3, 4)}
    for k in range(steps):
        while ahead < steps and len(uploads) < depth:
            arrays = batch(ahead)
            uploads.put(*arrays)
            for a in arrays:
                a[...] = 99  # the caller's again
            ahead += 1
        images, labels = into[len(batch(k)[0])]
        uploads.take(images, labels)
        elementwise.add(images, zero[len(images)], log[k][0])
        kernel_copy(labels, log[k][1])
    if xp is not np:
        cupy.cuda.Device().synchronize()
    return [(to_numpy(a), to_numpy(b)) for a, b in log]


def kernel_copy(a: Any, to: Any) -> None:
    """A copy on the device in the order of the current stream."""
    if isinstance(a, np.ndarray):
        to[...] = a
    else:
        to.data.copy_from_device_async(a.data, a.nbytes)


def right(found: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    return all(np.array_equal(a, b) for k, pair in enumerate(found) for a, b in zip(pair, batch(k), strict=True))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_step_finds_its_batch(depth: int, xp: Any) -> None:
    assert right(carried(xp, 9, depth))


@pytest.mark.parametrize("order", ["late", "others first"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_host_may_be_many_steps_ahead(depth: int, order: str, device: hosted.HostedDevice) -> None:
    with fake_cuda.lazily(order):
        found = carried(cupy, 12, depth)
    assert right(found)


def test_each_of_the_waits_is_needed(device: hosted.HostedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(order: str) -> bool:
        with fake_cuda.lazily(order):
            return right(carried(cupy, 12, 2))

    assert outcome("late") and outcome("others first")
    for cls, name in ((fake_cuda.Event, "synchronize"), (fake_cuda.Stream, "wait_event")):
        with monkeypatch.context() as patch:
            patch.setattr(cls, name, lambda self, *args: None)
            assert not (outcome("late") and outcome("others first")), name
    wait = fake_cuda.Stream.wait_event
    for default in (True, False):
        with monkeypatch.context() as patch:
            deaf = lambda self, event, default=default: None if (self.ptr == 0) == default else wait(self, event)  # noqa: E731
            patch.setattr(fake_cuda.Stream, "wait_event", deaf)
            assert not (outcome("late") and outcome("others first")), default


def test_uploads_refuse_what_they_cannot_do(xp: Any) -> None:
    uploads = Uploads(xp.empty(1, np.float32), depth=1)
    into = xp.empty((4, 5), np.float32)
    with pytest.raises(RuntimeError, match="no batch is waiting"):
        uploads.take(into)
    uploads.put(np.ones((4, 5), np.float32))
    with pytest.raises(RuntimeError, match="1 batches are waiting"):
        uploads.put(np.ones((4, 5), np.float32))
    for wrong in (xp.empty((5, 4), np.float32), xp.empty((4, 5), np.float64), xp.empty((4, 10), np.float32)[:, ::2]):
        with pytest.raises(ValueError, match="into must be contiguous arrays"):
            uploads.take(wrong)
    with pytest.raises(ValueError, match="into must be"):
        uploads.take(into, into)
    uploads.take(into)
    assert np.array_equal(to_numpy(into), np.ones((4, 5))) and len(uploads) == 0
    with pytest.raises(ValueError, match="depth must be at least 1, not 0"):
        Uploads(into, 0)


def test_the_memory_that_is_sent_from_is_pinned(device: hosted.HostedDevice) -> None:
    a = np.ones(8, np.float32)
    with pytest.raises(fake_cuda.Fault, match="pinned memory"):
        cupy.empty(8, np.float32).data.copy_from_host_async(a.ctypes.data, a.nbytes)
