"""Launchers of the training losses with their gradients."""

from typing import Any

import numpy as np

from ..buffers import empty
from .launch import THREADS, access, current, i32
from .rows import team

Array = Any

STEPS = 4  # accesses of one thread to each operand, as in the kernel


def squared_error(output: Array, target: Array, weight: Array | None = None, out: Array | None = None) -> tuple[Array, Array]:
    device = current()
    samples = output.shape[0]
    gradient = empty(output.shape, output.dtype, device.xp) if out is None else out
    value = empty((samples,), output.dtype, device.xp)
    if samples:
        size = output.size // samples
        suffix, width = ("wide", 4) if access(size, output, target, gradient) == 4 else ("any", 1)
        threads = min(THREADS, -(-size // (32 * width * STEPS)) * 32)
        runs = -(-size // (threads * width * STEPS))
        parts = None if runs == 1 else empty((samples, runs), output.dtype, device.xp)
        share = np.float32(1 / size)
        sizes = i32(size), i32(runs), np.float32(2 / output.size), share
        args = (output, target, weight, gradient, value, parts, *sizes)
        device.launch("losses", f"squared_error_{suffix}", (int(i32(samples * runs)),), (threads,), args)
        if parts is not None:
            grid = (-(-int(i32(32 * samples)) // THREADS),)
            device.launch(
                "losses", "squared_error_fold", grid, (THREADS,), (parts, weight, value, i32(samples), i32(runs), share)
            )
    return value, gradient


def cross_entropy(logits: Array, labels: Array, out: Array | None = None) -> tuple[Array, Array]:
    device = current()
    gradient = empty(logits.shape, logits.dtype, device.xp) if out is None else out
    value = empty(labels.shape, logits.dtype, device.xp)
    if value.size:
        rows, columns = value.size, logits.shape[-1]
        places = device.xp.asarray(labels, dtype=np.int64)
        name, grid, block = team(rows, columns, logits, gradient)
        args = (logits, places, gradient, value, np.int64(rows), i32(columns), np.float32(1 / rows))
        device.launch("losses", f"cross_entropy_{name}", grid, block, args)
    return value, gradient
