"""A GPU that has no memory left, told in one way whoever asked for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NO_MEMORY = 2  # cudaErrorMemoryAllocation, and the driver's CUDA_ERROR_OUT_OF_MEMORY


class OutOfDeviceMemory(MemoryError):
    """A GPU has not the memory that was asked for.

    asked: bytes of the request that failed, 0 where a launch failed for want of memory; free, total: bytes of the device then.
    """

    def __init__(self, asked: int, free: int, total: int) -> None:
        wanted = f"{asked} bytes more were asked for" if asked else "a kernel could not be started"
        super().__init__(f"the GPU has no memory left: {wanted}, {free} of its {total} bytes are free")
        self.asked, self.free, self.total = asked, free, total


def out_of_memory(error: BaseException) -> OutOfDeviceMemory | None:
    """``error`` as an OutOfDeviceMemory, where it is CuPy's word for that; else None."""
    if isinstance(error, OutOfDeviceMemory):
        return error
    library = type(error).__module__.partition(".")[0]
    if library not in ("cupy", "cupy_backends"):
        return None
    if not isinstance(error, MemoryError) and getattr(error, "status", None) != NO_MEMORY:
        return None
    import cupy

    return OutOfDeviceMemory(int(getattr(error, "_size", 0)), *cupy.cuda.runtime.memGetInfo())


@contextmanager
def memory_told() -> Iterator[None]:
    """Within the block want of memory on a GPU is an :class:`OutOfDeviceMemory`."""
    try:
        yield
    except Exception as e:
        found = out_of_memory(e)
        if found is None or found is e:
            raise
        raise found from e


def lasting_blocks(xp: Any) -> Callable[[int], Any]:
    """What a CuPy memory pool is to take its blocks from where it must never give one back, as one that graphs work in.

    Where memory ends a pool gives up its own free blocks, and a graph that works in them would go on writing there. Here the
    blocks of the default pool are given up instead; then it is an OutOfDeviceMemory, which the pool does not catch.
    """

    def block(size: int) -> Any:
        for last in (False, True):
            try:
                return xp.cuda.MemoryPointer(xp.cuda.Memory(size), 0)
            except Exception as e:
                found = out_of_memory(e)
                if found is None:
                    raise
                if last:
                    raise OutOfDeviceMemory(size, found.free, found.total) from e
                xp.get_default_memory_pool().free_all_blocks()
        raise AssertionError("unreachable")

    return block
