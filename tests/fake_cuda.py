"""What ``cupy.cuda`` is to the stand-in for CuPy: memory pools, streams, events and graphs, as unkind as a device may be.

- Memory that is given back loses its numbers (every bit is set: NaN), and so does all free memory of the pools that a graph
  worked in, each time that it is launched: what was not written in this very launch is not there.
- A graph holds launches of kernels and copies within the device. They are not made while it is captured, and anything else that
  computes then is an error; so is a launch of a graph that would touch memory which was given back.
- In ``lazily`` blocks streams do what they are given as late as they may, or as early.
"""

import ctypes
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

ROUND = 512  # bytes, as in CuPy's pools
TOTAL = 1 << 40


class Fault(RuntimeError):
    """Something that a device would not do, or would do wrongly without a word."""


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class OutOfMemoryError(MemoryError):
    def __init__(self, size: int, total: int, limit: int = 0) -> None:
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} bytes).")
        self._size = size


CUDARuntimeError.__module__ = "cupy_backends.cuda.api.runtime"
OutOfMemoryError.__module__ = "cupy.cuda.memory"


# ------------------------------------------------------------------------------------------------------------------------- memory


class Memory:
    """Memory of the device, all bits set; ``limit`` bytes of it there are."""

    limit = TOTAL
    used = 0

    def __init__(self, size: int) -> None:
        self.size = 0
        if Memory.used + size > Memory.limit:
            raise CUDARuntimeError(2, "cudaErrorMemoryAllocation: out of memory")
        Memory.used += size
        whole = np.full(size + 256, 0xFF, np.uint8)
        start = -whole.ctypes.data % 256
        self.raw, self.size = whole[start : start + size], size
        self.free, self.pool = False, None

    def __del__(self) -> None:
        Memory.used -= self.size


class PooledMemory:
    """The use of a pool's block by one array and its views; then the stream that asked for it may have it for what comes next."""

    def __init__(self, block: Memory, shelf: list[Memory]) -> None:
        self.block, self.shelf, self.raw, self.stream = block, shelf, block.raw, current()
        block.free = False

    def __del__(self) -> None:
        raw = self.raw
        self.stream.enqueue(Work("memory given back", lambda: raw.fill(0xFF)))
        self.block.free = True
        self.shelf.append(self.block)


class MemoryPointer:
    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.offset = mem, offset

    @property
    def ptr(self) -> int:
        return self.mem.raw.ctypes.data + self.offset

    def copy_from_host_async(self, mem: int, size: int, stream: "Stream | None" = None) -> None:
        if not any(start <= mem and mem + size <= start + held.nbytes for start, held in _pinned.items()):
            raise Fault("a copy beside the work of the host must be from pinned memory")
        refuse("a copy from the host")
        to = self.ptr
        (stream or current()).give(Work("copy from the host", lambda: ctypes.memmove(to, mem, size)))

    def copy_from_device_async(self, src: "MemoryPointer", size: int, stream: "Stream | None" = None) -> None:
        to, start = self.ptr, src.ptr
        work = Work("copy", lambda: ctypes.memmove(to, start, size), [self.mem, src.mem])
        (stream or current()).give(work)


class MemoryPool:
    """Free blocks by stream and size. What runs out of memory gives up all free blocks and tries again, as CuPy's does."""

    def __init__(self, allocator: Callable[[int], MemoryPointer] | None = None) -> None:
        self._allocator = allocator or (lambda size: MemoryPointer(Memory(size), 0))
        self._free: dict[tuple[int, int], list[Memory]] = {}
        self._total = 0

    def malloc(self, size: int) -> MemoryPointer:
        size = -(-size // ROUND) * ROUND
        shelf = self._free.setdefault((id(current()), size), [])
        if shelf:
            block = shelf.pop()
        else:
            block = self._new(size)
            block.pool = weakref.ref(self)
        for stream in _streams:
            if stream.captured is not None:
                stream.pools.add(self)
        return MemoryPointer(PooledMemory(block, shelf), 0)

    def _new(self, size: int) -> Memory:
        for _ in range(2):
            try:
                made = self._allocator(size).mem
                self._total += size
                return made
            except CUDARuntimeError as e:
                if e.status != 2:
                    raise
                self.free_all_blocks()
        raise OutOfMemoryError(size, self._total)

    def free_all_blocks(self, stream: Any = None) -> None:
        for shelf in self._free.values():
            self._total -= sum(block.size for block in shelf)
            for block in shelf:
                block.pool = None
            shelf.clear()

    def lose(self) -> None:
        """Overwrite all that is free."""
        for shelf in self._free.values():
            for block in shelf:
                block.raw.fill(0xFF)

    def total_bytes(self) -> int:
        return self._total

    def used_bytes(self) -> int:
        return self._total - sum(block.size for shelf in self._free.values() for block in shelf)


_default_pool = MemoryPool()
_allocators: list[Callable[[int], MemoryPointer]] = [_default_pool.malloc]
_pinned: dict[int, np.ndarray] = {}  # by address, kept for good


def alloc(size: int) -> MemoryPointer:
    return _allocators[-1](size)


@contextmanager
def using_allocator(allocator: Callable[[int], MemoryPointer]) -> Iterator[None]:
    _allocators.append(allocator)
    try:
        yield
    finally:
        _allocators.pop()


def alloc_pinned_memory(size: int) -> np.ndarray:
    made = np.zeros(size, np.uint8)
    _pinned[made.ctypes.data] = made
    return made


# ------------------------------------------------------------------------------------------------------------- streams and graphs


class Work:
    """Something for a stream to do. memories: those of the device that it touches. wait: a mark that must be reached before."""

    def __init__(self, name: str, run: Callable[[], Any], memories: Any = (), wait: "Mark | None" = None) -> None:
        self.name, self.run, self.wait = name, run, wait
        self.blocks = [getattr(m, "block", m) for m in memories if m is not None]  # not the uses: they may end


class Mark:
    """A place in the work of a stream."""

    def __init__(self, stream: "Stream") -> None:
        self.stream, self.done = stream, False

    def reach(self) -> None:
        self.done = True


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.mark: Mark | None = None

    def record(self, stream: "Stream | None" = None) -> None:
        stream = stream or current()
        self.mark = Mark(stream)
        stream.give(Work("event", self.mark.reach))

    def synchronize(self) -> None:
        refuse("waiting for an event")
        if self.mark is not None:
            self.mark.stream.finish(self.mark)


class Stream:
    null: "Stream"

    def __init__(self, null: bool = False, non_blocking: bool = False, ptds: bool = False) -> None:
        self.queue: deque[Work] = deque()
        self.captured: list[Work] | None = None
        self.pools: set[MemoryPool] = set()
        self.first = non_blocking
        self.ptr = 0 if null else id(self)
        _streams.append(self)

    def __enter__(self) -> "Stream":
        _stack.append(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        _stack.pop()

    def give(self, work: Work) -> None:
        if self.captured is not None:
            if work.name in ("event", "wait"):
                raise Fault(f"{work.name} while a graph is captured")
            self.captured.append(work)
            return
        self.enqueue(work)

    def enqueue(self, work: Work) -> None:
        """Work that is not captured."""
        self.queue.append(work)
        if _order[-1] == "at once":
            self.finish()
        elif _order[-1] == "others first":
            for stream in _streams:
                if stream.first:
                    stream.advance()

    def advance(self) -> None:
        """Do what need not wait for another stream."""
        while self.queue and (self.queue[0].wait is None or self.queue[0].wait.done):
            self.queue.popleft().run()

    def finish(self, mark: Mark | None = None) -> None:
        """Do all work, or that up to a mark."""
        while self.queue and not (mark is not None and mark.done):
            work = self.queue[0]
            if work.wait is not None and not work.wait.done:
                work.wait.stream.finish(work.wait)
            self.queue.popleft().run()

    def synchronize(self) -> None:
        refuse("waiting for a stream")
        self.finish()

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.give(Work("wait", lambda: None, wait=event.mark))

    def begin_capture(self, mode: Any = None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.captured is not None:
            raise CUDARuntimeError(1, "cudaErrorIllegalState: the stream is capturing")
        self.captured, self.pools = [], set()

    def end_capture(self) -> "Graph":
        assert self.captured is not None
        made = Graph(self.captured, self.pools)
        self.captured, self.pools = None, set()
        return made

    def is_capturing(self) -> bool:
        return self.captured is not None


class Graph:
    """Captured work. The pools that were asked for memory meanwhile must be there whenever it is launched."""

    def __init__(self, work: list[Work], pools: set[MemoryPool]) -> None:
        self.work, self._pools = work, [weakref.ref(p) for p in pools]

    def launch(self, stream: Stream | None = None) -> None:
        (stream or current()).give(Work("graph", self._run))

    def upload(self, stream: Stream | None = None) -> None:
        pass

    def _run(self) -> None:
        for pool in self._pools:
            if pool() is not None:
                pool().lose()
        for work in self.work:
            for block in work.blocks:
                if block.free and (block.pool is None or block.pool() in (None, _default_pool)):
                    raise Fault(f"{work.name}: the graph works in memory that was given back")
            work.run()


_streams: list[Stream] = []
_order = ["at once"]
Stream.null = Stream(null=True)
_stack = [Stream.null]


def current() -> Stream:
    return _stack[-1]


@contextmanager
def lazily(order: str) -> Iterator[None]:
    """Streams do their work when it is waited for, the one waited for first ("late"), or streams that are not the default one at
    once where they need not wait themselves ("others first")."""
    assert order in ("late", "others first")
    _order.append(order)
    try:
        yield
        for stream in _streams:
            stream.finish()
    finally:
        _order.pop()
        for stream in _streams:
            stream.queue.clear()


def refuse(what: str) -> None:
    """Fault where a graph is being captured."""
    if any(stream.captured is not None for stream in _streams):
        raise Fault(f"{what} while a graph is captured")


class Device:
    def __init__(self, number: int = 0) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: Any) -> None:
        pass

    def use(self) -> None:
        pass

    def synchronize(self) -> None:
        refuse("waiting for the device")
        for stream in _streams:
            stream.finish()


def _runtime() -> Any:
    properties = {"name": b"NVIDIA Host", "major": 9, "minor": 0, "multiProcessorCount": 1, "totalGlobalMem": 1, "l2CacheSize": 1}
    answers = {"getDeviceProperties": properties, "driverGetVersion": 13000, "runtimeGetVersion": 13000, "getDevice": 0}
    answers |= {"getDeviceCount": 1, "deviceGetAttribute": 227 << 10}
    runtime = types.ModuleType("runtime")
    for name, answer in answers.items():
        setattr(runtime, name, lambda *args, answer=answer: answer)
    runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin = 97  # type: ignore[attr-defined]
    runtime.memGetInfo = lambda: (Memory.limit - Memory.used, Memory.limit)  # type: ignore[attr-defined]
    runtime.CUDARuntimeError = CUDARuntimeError  # type: ignore[attr-defined]
    return runtime


cuda = types.SimpleNamespace(
    Device=Device,
    Event=Event,
    Graph=Graph,
    Memory=Memory,
    MemoryPointer=MemoryPointer,
    MemoryPool=MemoryPool,
    Stream=Stream,
    alloc=alloc,
    alloc_pinned_memory=alloc_pinned_memory,
    driver=types.SimpleNamespace(occupancyMaxActiveBlocksPerMultiprocessor=lambda pointer, threads, shared: 2),
    get_current_stream=current,
    get_elapsed_time=lambda a, b: 0.5,
    nvrtc=types.SimpleNamespace(getVersion=lambda: (13, 0)),
    runtime=_runtime(),
    set_allocator=lambda a: None,
    using_allocator=using_allocator,
)


def get_default_memory_pool() -> MemoryPool:
    return _default_pool
