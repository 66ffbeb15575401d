"""Launchers of what a captured training step is made of beside its network."""

from math import prod
from typing import Any

import numpy as np

from ..streams import FORWARD, TIMES
from .diffusion import in_fours
from .launch import THREADS, aligned, blocks, current, i32, u32
from .optim import adamw_ema_by_table, count

__all__ = ["adamw_ema_by_table", "count", "draw_levels", "example", "verdict"]

Array = Any


def _words(seed: int, stream: int) -> tuple[np.uint32, ...]:
    return u32(seed), u32(seed >> 32), u32(stream)


def draw_levels(rows: Array, step: Array, seed: int, t: Array, levels: Array) -> None:
    samples, (levels_known, columns) = len(t), rows.shape
    args = (rows, step, *_words(seed, TIMES), t, levels, i32(samples), i32(levels_known - 1), i32(columns))
    current().launch("stepping", "draw_levels", blocks(samples), (THREADS,), args)


def example(images: Array, levels: Array, step: Array, seed: int, x: Array, target: Array) -> None:
    walk = in_fours(images.shape[0], prod(images.shape[1:]), x, target)
    if walk:
        grid, sizes, suffix = walk
        suffix = suffix if aligned(images, bytes_=4) else "any"
        args = (images, levels, step, *_words(seed, FORWARD), x, target, i32(images.shape[0]), *sizes)
        current().launch("stepping", f"example_{suffix}", grid, (THREADS,), args)


def verdict(value: Array, norm_sq: Array, skipped: Array, tally: Array) -> None:
    current().launch("stepping", "verdict", (1,), (THREADS,), (value, norm_sq, skipped, tally, i32(len(value))))
