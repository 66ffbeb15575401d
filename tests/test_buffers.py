"""The pool of work arrays: who owns memory and for how long, what is reused, and what a training step asks for."""

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from alphabar import kernels
from alphabar.kernels import Pool
from alphabar.nets import UNet


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Nothing in the test may wait for the collector of cycles."""
    gc.disable()
    yield
    gc.enable()


def test_an_array_of_a_pool_is_valid_as_long_as_it_or_a_view_of_it_lives(no_collector: None) -> None:
    pool = Pool()
    a = pool.empty((4, 8), np.float32)
    address, held = a.ctypes.data, pool.nbytes
    assert type(a) is np.ndarray and a.flags.writeable and address % 64 == 0 and held == 128
    view = a[1:, ::2].reshape(-1)[3:]
    part = a.base[1:]  # a view of the lease itself
    del a
    other = pool.empty((4, 8), np.float32)
    assert not np.shares_memory(view, other) and pool.nbytes == 2 * held
    del view
    third = pool.empty((4, 8), np.float32).ctypes.data
    assert third not in (address, other.ctypes.data)
    del part
    again = pool.empty((31,), np.float32)  # another shape of nearly the size
    assert again.ctypes.data == address and pool.nbytes == 3 * held
    del pool
    again[...] = other[...] = 1  # outlive the pool


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7, 11), (1000, 1001)])
def test_a_block_is_at_most_an_eighth_larger_than_its_array(shape: tuple[int, ...]) -> None:
    pool = Pool()
    a = pool.empty(shape, np.float64)
    assert a.shape == shape and a.dtype == np.float64
    assert a.nbytes <= pool.nbytes <= max(64, a.nbytes + a.nbytes // 8 + 64)


def test_a_pool_with_a_limit_gives_up_free_memory_first_and_never_holds_more() -> None:
    pool = Pool(limit=4096)
    first, second = (pool.empty((1024,), np.uint8) for _ in range(2))
    del first
    third = pool.empty((2560,), np.uint8)  # fits once the free block is given up
    assert pool.nbytes == 1024 + 2560
    assert pool.empty((1024,), np.uint8).flags.owndata and pool.empty((8192,), np.uint8).flags.owndata
    assert pool.nbytes == 1024 + 2560
    del second, third
    pool.clear()
    assert pool.nbytes == 0


def test_arrays_of_a_pool_are_handed_out_once_and_let_go_by_any_thread() -> None:
    pool = Pool()

    def work(k: int) -> bool:
        right, passed = True, []
        for i in range(2000):
            a = pool.empty((1 + i % 300,), np.int64)
            a[...] = number = k * 10000 + i
            passed.append((a, number))
            if len(passed) > 7:
                a, number = passed.pop(i % 7)
                right &= bool((a == number).all())
        return right

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
    taken = pool.nbytes
    pool.clear()
    assert pool.nbytes == 0 < taken


@pytest.mark.parametrize("options", [{}, {"attention": (4,), "scale_shift": True, "classes": 3}, {"dropout": 0.1}])
def test_a_training_step_allocates_nothing_after_the_first_two(no_collector: None, options: dict) -> None:
    net, pool, held = UNet(8, channels=(8, 16), blocks=1, groups=4, **options), Pool(), []
    x, t = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32), np.array([1, 7])
    for k in range(6):
        with pool:
            out = net(x, t, step=k)
            out.backward(out.data)
            del out
        held.append(pool.nbytes)
    assert len(set(held[1:])) == 1


def test_what_a_kernel_needs_while_it_runs_is_there_for_the_next() -> None:
    x, w = np.ones((2, 16, 16, 8), np.float32), np.ones((3, 3, 8, 8), np.float32)
    pool = Pool()
    with pool:
        kernels.conv2d(x, w)
        once = pool.nbytes
        kept = [kernels.conv2d(x, w) for _ in range(5)]
    assert pool.nbytes == once + 4 * kept[0].nbytes
