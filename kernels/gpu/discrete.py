"""Launchers of the draws of categorical laws."""

from typing import Any

import numpy as np

from ..buffers import empty
from ..reference import BLOCK, RUN
from ..streams import FORWARD, SAMPLER
from .launch import THREADS, blocks, counter, current, draw, i32, table

Array = Any

ENOUGH_WARPS = 8192  # that fill the largest GPU; beyond them a warp takes several elements


def _walk(shape: tuple[int, ...], count: int, columns: int) -> tuple[tuple[int], tuple]:
    """(grid, (elements, elements of a sample, columns, elements of a warp))."""
    span = 1 << min(5, max(0, (count // ENOUGH_WARPS).bit_length() - 1))
    return blocks(32 * -(-count // span)), (i32(count), i32(count // shape[0]), i32(columns), np.int32(span))


def categorical(
    log_weights: Array, seed: int, step: int = 0, stream: int = SAMPLER, first_sample: int = 0, out: Array | None = None
) -> Array:
    device = current()
    out = empty(log_weights.shape[:-1], np.int32, device.xp) if out is None else out
    if out.size:
        grid, sizes = _walk(out.shape, out.size, log_weights.shape[-1])
        args = (log_weights, out, *sizes, *draw(seed, step, stream, first_sample), counter())
        device.launch("discrete", "categorical", grid, (THREADS,), args)
    return out


def categorical_posterior(
    logits: Array,
    x_t: Array,
    rows: Array,
    index: int,
    mask: int = -1,
    seed: int = 0,
    step: int | None = None,
    stream: int = SAMPLER,
    first_sample: int = 0,
    out: Array | None = None,
) -> Array:
    device = current()
    out = empty(x_t.shape, np.int32, device.xp) if out is None else out
    if out.size:
        grid, sizes = _walk(out.shape, out.size, logits.shape[-1])
        states = device.xp.asarray(x_t, dtype=np.int32)
        words = draw(seed, index if step is None else step, stream, first_sample)
        args = (logits, states, table(device, rows), np.int32(index), np.int32(mask), out, *sizes, *words, counter())
        device.launch("discrete", "categorical_posterior", grid, (THREADS,), args)
    return out


def categorical_q_sample(
    x0: Array,
    t: Array,
    keep: Array,
    states: int,
    mask: int = -1,
    seed: int = 0,
    step: int = 0,
    stream: int = FORWARD,
    first_sample: int = 0,
    out: Array | None = None,
) -> Array:
    device = current()
    out = empty(x0.shape, np.int32, device.xp) if out is None else out
    if out.size:
        size = out.size // out.shape[0]
        counters = RUN * (size // BLOCK) + min(RUN, size % BLOCK)
        given = device.xp.asarray(x0, dtype=np.int32), device.xp.asarray(t, dtype=np.int64), table(device, keep)
        law = i32(len(keep)), np.int32(states), np.int32(mask)
        sizes = i32(out.shape[0] * counters), i32(counters), i32(size)
        words = draw(seed, step, stream, first_sample)
        args = (*given, *law, out, *sizes, *words, counter())
        device.launch("discrete", "categorical_q_sample", blocks(out.shape[0] * counters), (THREADS,), args)
    return out
