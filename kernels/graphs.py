"""Steps that are made many times with the same arrays: done once, and then only started.

On the CPU the calls of compiled functions that a step makes are recorded as a plan; on a GPU its launches are captured as a CUDA
graph. Either way Python's share of all later steps is one call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from . import dispatch, plan, precisions
from .arrays import array_module, is_cupy
from .device_memory import lasting_blocks
from .recording import capturing

Array = Any
Body = Callable[[], Any]


class Arena:
    """The memory and the stream that graphs on a GPU work in; several graphs that run one after another may share one.

    Its memory is given back when the arena and all arrays in it are gone, and not before: a graph writes to the same places each
    time that it is launched. What one graph leaves there is the next one's to overwrite.
    """

    def __init__(self, like: Array) -> None:
        xp = array_module(like)
        self.xp: Any = xp
        self.pool = xp.cuda.MemoryPool(lasting_blocks(xp))
        self.stream = xp.cuda.Stream(non_blocking=True)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.pool.total_bytes()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Within the block arrays come from this memory, and launches go to this stream."""
        with self.xp.cuda.using_allocator(self.pool.malloc), self.stream:
            yield

    def run(self, body: Body) -> None:
        """Run ``body`` inside, after what the current stream has been given and before what it is given next."""
        before = self.xp.cuda.get_current_stream()
        self.stream.wait_event(before.record())
        try:
            with self.inside():
                body()
        finally:
            before.wait_event(self.stream.record())

    def capture(self, body: Body) -> Any:
        """The launches of ``body`` as a CUDA graph; none of them is made. It raises what went wrong, with the capture ended."""
        token = capturing.set(True)
        try:
            with self.inside():
                self.stream.begin_capture()
                try:
                    body()
                except BaseException:
                    self._abandon()
                    raise
                return self.stream.end_capture()
        finally:
            capturing.reset(token)

    def _abandon(self) -> None:
        """End a capture that is of no use."""
        try:
            self.stream.end_capture()
        except Exception:  # what broke it is being raised
            pass


class Graph:
    """``graph()`` does what ``body()`` does, each time.

    The body makes calls of kernels only, always the same ones with the same arrays: what changes from step to step it reads from
    arrays, counters among them. Inputs and results lie in arrays that outlive the graph, ``lasting``, which the caller writes and
    reads between the calls; what else it makes is gone when it ends. It returns nothing.

    like: an array of the library that the body computes with. On the CPU the first call is recorded, and later ones repeat it.
    On a GPU the first call runs in ``arena`` (one of its own, unless given), the second one is captured and launched, later ones
    are launched. Where that cannot be done every call is ``body()`` and ``refused`` says why. Where the kernels are chosen
    otherwise (:func:`kernels.use`, the precision, the number of threads, ``ALPHABAR_CONV``) than in the call that was kept, it is
    made anew.
    """

    def __init__(self, body: Body, like: Array, lasting: Sequence[Array] = (), arena: Arena | None = None) -> None:
        self.refused: str | None = None
        self._body, self._like, self._lasting, self._arena = body, like, tuple(lasting), arena
        self._on_gpu = is_cupy(like)
        self._state: tuple | None = None  # what the kept call depends on besides its arrays
        self._again: Callable[[], Any] | None = None
        self._plan: plan.Plan | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that its steps work in, in memory of its own."""
        if self._arena is not None:
            return self._arena.nbytes
        return 0 if self._plan is None else self._plan.memory.nbytes

    @property
    def kept(self) -> bool:
        """Whether a call repeats what was kept, if the kernels are chosen as then."""
        return self._again is not None

    def __call__(self) -> None:
        state = self._circumstances()
        if state is None or self.refused is not None:
            self._body()
        elif state != self._state:
            self._state = self._again = self._plan = None
            if self._on_gpu:
                self._warm_up()
            else:
                self._record()
            self._state = state
        elif self._again is not None:
            self._again()
        else:
            self._capture()

    def _circumstances(self) -> tuple | None:
        """None where nothing can be kept: inside another recording or capture, or where the definitions are asked for."""
        if not self._on_gpu:
            return plan.circumstances()
        if dispatch.chosen() != "auto" or capturing.get():
            return None
        from .gpu import conv

        return precisions.asked(), conv.chosen()

    def _record(self) -> None:
        made = plan.Plan(tuple(a for a in self._lasting if isinstance(a, np.ndarray)))
        with made.recorded() as stretch:
            self._body()
        if made.refused is None:
            self._again, self._plan = stretch, made
        else:
            self.refused = made.refused

    def _warm_up(self) -> None:
        if self._arena is None:
            self._arena = Arena(self._like)
        self._arena.run(self._body)

    def _capture(self) -> None:
        assert self._arena is not None
        try:
            made = self._arena.capture(self._body)
        except Exception as e:
            self.refused, self._arena = f"{type(e).__name__}: {str(e).strip() or 'capture failed'}".splitlines()[0], None
            self._body()
            return
        self._again = made.launch
        made.launch()
