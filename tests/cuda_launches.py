"""What the launch code asks of a GPU for the registry's cases: threads and dynamic shared memory of each kernel. Nothing runs."""

from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import numpy as np

from alphabar.kernels import TABLE, accuracy, bf16, gpu, registry
from alphabar.kernels.gpu import elementwise, optim, stepping, transpose
from alphabar.kernels.registry import Case, Kernel
from tests import (
    cuda_attention_cases,
    cuda_bf16_cases,
    cuda_conv_mma_cases,
    cuda_conv_mma_weight_cases,
    cuda_norm_affine_cases,
    cuda_sampling_cases,
)
from tests.cuda_arrays import aligned
from tests.cusim.probes import shifted, shifted_launcher

Shape = tuple[int, int]  # threads of a block, bytes of dynamic shared memory


class Recorder:
    """A device that only writes down."""

    xp = np

    def __init__(self) -> None:
        self.launched: dict[str, dict[Shape, int]] = {}  # kernel -> shape -> most blocks

    def launch(self, file: str, name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple, shared: int = 0) -> None:
        """Keep what is asked for."""
        shapes = self.launched.setdefault(name, {})
        key = int(np.prod(block)), int(shared)
        shapes[key] = max(shapes.get(key, 0), int(np.prod(grid)))


class Zeros:
    """A generator of zeros: the shapes are what matters."""

    def standard_normal(self, shape: Any) -> np.ndarray:
        return np.zeros(shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(np.random.default_rng(0), name)


def launches() -> tuple[dict[str, dict[Shape, int]], set[str]]:
    """(kernel -> its shapes, kernels that only the small cases reach). Of a large case its shape counts, else a small one's."""
    large, small = Recorder(), Recorder()
    with gpu.on(large), mock.patch.object(registry.reference, "attention", _attention):
        _call((k, c) for k in TABLE.values() for c in k.benches)
        _others(aligned)
    with gpu.on(small):
        _others(shifted)
        _call((k, c) for k in TABLE.values() for c in accuracy.all_cases(k))
        _call(((k, c) for k in TABLE.values() for c in accuracy.all_cases(k)), shifted=True)
    return small.launched | large.launched, small.launched.keys() - large.launched.keys()


def _attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The shapes of the definition's results: at these sizes it takes seconds."""
    samples, tokens, heads, _ = q.shape
    return np.zeros_like(q), np.zeros((samples, heads, tokens), q.dtype)


def _call(cases: Iterable[tuple[Kernel, Case]], shifted: bool = False) -> None:
    for kernel, case in cases:
        args, kwargs = kernel.make(Zeros(), case, np.float32)  # type: ignore[arg-type]
        if shifted:
            shifted_launcher(kernel.name, args, kwargs)
        else:
            getattr(gpu, kernel.name)(*args, **kwargs)


def _others(place: Callable[[np.ndarray], np.ndarray]) -> None:
    """The launchers that the registry does not list, at the sizes of a network of 64 channels."""
    x, y, emb = (place(np.zeros(s, np.float32)) for s in ((32, 32, 32, 64), (32, 32, 32, 128), (32, 512)))
    flat, rows, index = x.reshape(32, 1024, 64), place(np.zeros((10, 64), np.float32)), np.zeros(32, np.int64)
    one, norm_sq = np.zeros(1, np.int32), np.zeros(1)
    elementwise.add(x, x, x)
    elementwise.fill(x, 0)
    elementwise.add_columns(flat, 0, y.reshape(32, 1024, 128))
    elementwise.concat(x, x)
    elementwise.channels(y, 0, 64)
    elementwise.add_channels(flat, emb, 0, flat)
    elementwise.sum_places(flat)
    elementwise.take_rows(rows, index)
    elementwise.sum_into_rows(place(np.zeros((32, 64), np.float32)), index, 10)
    elementwise.time_features(np.zeros(32), 0, np.zeros(32), False)
    elementwise.upsample_backward(y)
    elementwise.upsample(x)
    optim.adamw_ema_by_table(*([x.reshape(-1)] * 5), np.zeros((1, 5), np.float32), one, 0.9, 0.99, 1e-8, norm_sq)
    optim.count(one)
    weights = place(np.zeros((3, 3, 64, 128), np.float32))
    for a in (weights, weights.astype(bf16.BF16)):
        transpose.transpose(a, 576, (128, 3, 3, 64))
    images, levels = np.zeros((128, 32, 32, 3), np.uint8), np.zeros((6, 128), np.float32)
    noised = [place(np.zeros(images.shape, np.float32)) for _ in range(2)]
    stepping.draw_levels(np.zeros((1001, 6), np.float32), one, 0, np.zeros(128), levels)
    stepping.example(images, levels, one, 0, *noised)
    stepping.verdict(levels[0], norm_sq, one, np.zeros(4))
    cuda_attention_cases.at_sizes_of_networks(place)
    cuda_conv_mma_cases.at_sizes_of_networks(place)
    cuda_bf16_cases.at_sizes_of_networks(place)
    cuda_sampling_cases.at_sizes_of_networks(place)
    cuda_conv_mma_weight_cases.at_sizes_of_networks(place)
    cuda_norm_affine_cases.at_sizes_of_networks(place)
