"""What captured rows of samplers launch: times told by a counter, batches stacked, steps that read seed and row from memory."""

from collections.abc import Callable, Iterator

import numpy as np

from alphabar.kernels import gpu
from alphabar.kernels.gpu import launch, sampling
from tests.cuda_arrays import Place, normal

DTYPES = (np.float32, np.int32, np.float64, np.int64)


def times_told(batch: int, place: Place) -> None:
    """The time of the row; past the last one that of the last."""
    times = np.array([7.5, 3.0, -1.0])
    for row, want in ((0, 7.5), (2, -1.0), (3, -1.0), (99, -1.0)):
        t = np.full(batch, np.nan)
        sampling.tell_time(times, np.array([row], np.int32), t)
        assert (t == want).all()


def stacks(shape: tuple[int, ...], place: Place) -> None:
    """All bits of both, NaN's among them."""
    for dtype in DTYPES:
        a, b = (place(np.frombuffer(np.random.default_rng(k).bytes(8 * int(np.prod(shape))), dtype)) for k in (0, 1))
        a, b = (v[: int(np.prod(shape))].reshape(shape) for v in (a, b))
        assert sampling.stack(a, b).tobytes() == np.concatenate((a, b)).tobytes()


def seeds_and_rows(shape: tuple[int, ...], place: Place) -> None:
    """A step that reads them from memory is the step that is told them, with noise and without, past the table too."""
    x, m, rows = place(normal(0, *shape)), place(normal(1, *shape)), normal(2, 4, 13)
    words = np.array([8, 7, 5], np.uint32)
    for noise in (True, None):
        for at, row in ((0, 0), (2, 2), (3, 3), (4, 3), (2**30, 3)):
            with launch.counted(np.array([at], np.int32), words):
                ours = gpu.step(x, m, rows, 0, noise=noise, out=place(np.empty_like(x)))
            if at == row:
                want = gpu.step(x, m, rows, row, noise=noise, seed=(7 << 32) + 8, first_sample=5, out=place(np.empty_like(x)))
                assert ours.tobytes() == want.tobytes()
            elif noise is None:
                assert ours.tobytes() == gpu.step(x, m, rows, 3, out=place(np.empty_like(x))).tobytes()


def all_cases() -> Iterator[tuple[str, Callable[[Place], None]]]:
    for batch in (0, 1, 700):
        yield f"times told {batch}", lambda place, n=batch: times_told(n, place)  # type: ignore[misc]
    for shape in ((1,), (5, 7), (3, 4, 8), (0, 4)):
        yield f"stacks {shape}", lambda place, s=shape: stacks(s, place)  # type: ignore[misc]
    for shape in ((2, 64), (3, 37)):
        yield f"seeds and rows {shape}", lambda place, s=shape: seeds_and_rows(s, place)  # type: ignore[misc]


def at_sizes_of_networks(place: Place) -> None:
    """Launches as a network of CIFAR's size makes them; the numbers are not looked at."""
    x = place(np.zeros((128, 32, 32, 3), np.float32))
    sampling.stack(x, x)
    sampling.tell_time(np.zeros(50), np.zeros(1, np.int32), np.zeros(128))
