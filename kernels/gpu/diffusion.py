"""Launchers of the random numbers, the noising of clean data and the sampler rows."""

from math import prod
from typing import Any

import numpy as np

from ..buffers import empty
from ..reference import BLOCK, RUN
from ..streams import FORWARD, SAMPLER
from .launch import THREADS, aligned, blocks, counter, current, draw, i32, table, u32, words

Array = Any


def in_fours(samples: int, size: int, *arrays: Array | None) -> tuple[tuple[int], tuple, str] | None:
    """(grid, (items, lanes, size), suffix of the kernel) of a walk over (samples, size) in fours; None where nothing is to do."""
    if samples * size == 0:
        return None
    lanes = RUN // 4 * (size // BLOCK) + min(RUN // 4, -(-(size % BLOCK) // 4))
    suffix = "wide" if size % 4 == 0 and aligned(*arrays) else "any"
    return blocks(samples * lanes), (i32(samples * lanes), i32(lanes), i32(size)), suffix


def normals(out: Array, seed: int, step: int = 0, stream: int = SAMPLER, first_sample: int = 0) -> Array:
    walk = in_fours(out.shape[0], prod(out.shape[1:]), out)
    if walk:
        grid, sizes, suffix = walk
        drawn = draw(seed, step, stream, first_sample)
        current().launch("random", f"normals_{suffix}", grid, (THREADS,), (out, *sizes, *drawn, counter()))
    return out


def q_sample(
    x0: Array,
    t: Array,
    signal: Array,
    noise: Array,
    eps: Array | None = None,
    seed: int = 0,
    step: int = 0,
    stream: int = FORWARD,
    first_sample: int = 0,
    out: Array | None = None,
    eps_out: Array | None = None,
) -> tuple[Array, Array]:
    device = current()
    made = eps is None
    out = empty(x0.shape, x0.dtype, device.xp) if out is None else out
    if made and eps_out is None:
        eps_out = empty(x0.shape, x0.dtype, device.xp)
    walk = in_fours(x0.shape[0], prod(x0.shape[1:]), x0, eps, out, eps_out)
    if walk:
        grid, sizes, suffix = walk
        levels = (
            device.xp.asarray(t, dtype=np.int64),
            table(device, signal),
            table(device, noise),
            i32(len(signal)),
        )
        drawn = draw(seed, step, stream, first_sample)
        name = f"q_sample_{'made' if made else 'given'}_{suffix}"
        device.launch("forward", name, grid, (THREADS,), (x0, *levels, eps, out, eps_out, *sizes, *drawn, counter()))
    return out, eps if eps_out is None else eps_out


def step(
    x: Array,
    m: Array,
    rows: Array,
    i: int,
    history: tuple = (),
    guidance: Array | None = None,
    noise: Any = None,
    clip: tuple[float, float] | None = None,
    seed: int = 0,
    stream: int = SAMPLER,
    first_sample: int = 0,
    out: Array | None = None,
    store: Array | None = None,
) -> Array:
    device = current()
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    made, given = noise is True, None if noise is True else noise
    past = (*history, None, None, None)[:3]
    # only noise that is made here needs to know where a sample begins
    samples = x.shape[0] if made or x.size >= 2**31 else 1
    walk = in_fours(samples, x.size // max(samples, 1), x, m, *past, guidance, given, out, store)
    if walk:
        grid, sizes, suffix = walk
        low, high = clip or (-np.inf, np.inf)
        moved = counter()
        whole = moved is not None or not isinstance(rows, np.ndarray) or not rows.flags.writeable
        coefficients, row = (table(device, rows), i) if whole else (table(device, rows[i : i + 1]), 0)
        ends = (u32(seed), u32(seed >> 32), u32(stream), u32(first_sample))
        name = f"step_{'made' if made else 'none' if noise is None else 'given'}_{suffix}"
        args = (x, m, coefficients, np.int32(row), i32(len(coefficients) - 1), u32(i), moved, words(), *past, guidance, given)
        args = (*args, np.float32(low), np.float32(high), out, store, *sizes, *ends)
        device.launch("step", name, grid, (THREADS,), args)
    return out
