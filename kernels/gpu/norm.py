"""Launchers of group normalisation.

Arrays of activations and their gradients are all float32 or all bfloat16; parameters and statistics are float32.
"""

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np

from .. import reference
from ..bf16 import BF16, pack, unpack
from ..buffers import empty, into
from .launch import Device, aligned, current, i32

Array = Any

SECTOR = 8  # floats in the 32 bytes that memory gives at once; of bfloat16 twice as many
TWO_RESIDENT = 72 << 10  # bytes of shared memory of which an SM has room for two blocks
MOST_KEPT = 160 << 10  # bytes that every data-centre GPU since Ampere gives a block: the same plans, and bits, on all of them
ENOUGH = 128  # blocks that keep a large GPU busy
LONG = 16384  # elements that are worth a second kernel, where so many would go to one of too few blocks
MOST_PARTS = 64
LARGEST_GROUP = 8192  # channels; larger groups go to the definition
CACHED = 6 << 20  # floats, or so many bytes, that are still in the GPU's second cache when they are read again


@cache
def _of_gpu(runtime: Any, index: int) -> int:
    return runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index)


def _most_shared(device: Device) -> int:
    """Bytes of shared memory that a block may take."""
    if device.xp is np:
        return MOST_KEPT
    runtime = device.xp.cuda.runtime
    return min(MOST_KEPT, _of_gpu(runtime, runtime.getDevice()))


@dataclass(frozen=True)
class Plan:
    """Slabs of ``span`` groups; with ``parts`` > 1 two kernels, for ``samples`` at a time."""

    span: int
    lanes: int
    threads: int
    parts: int
    samples: int
    stash: int  # floats of shared memory before what is kept
    shared: int  # bytes


@cache
def _plan(samples: int, places: int, channels: int, groups: int, width: int, arrays: int, most: int, item: int = 4) -> Plan:
    """How to cut x (samples, places, channels) into slabs, ``arrays`` · ``item`` bytes of each element kept in ``most``.

    Rows of a slab fill whole sectors, better 64 or 128 bytes where blocks stay many and small. A slab that no block can keep, or
    a long one where blocks are few, is cut into parts, for as many samples at a time as stay in the cache between the kernels.
    """
    size, sector = channels // groups, SECTOR * 4 // item
    spans = [s for s in range(1, groups + 1) if groups % s == 0 and s * size % width == 0]
    whole = [s for s in spans if s * size % sector == 0 and size < 8 * sector] or spans

    def slab(elements: int, among: list[int] = whole, parts: int = 1, at_once: int = samples) -> Plan:
        span = next((s for s in among if s * size >= elements), groups)
        columns, rows, blocks = span * size // width, -(-places // parts), at_once * groups // span * parts
        few = blocks < 3 * ENOUGH  # more threads, then, and a thread has all its accesses under way at once
        big = parts == 1 and item * arrays * columns * rows * width > TWO_RESIDENT
        threads = next((n for n in (64, 128, 256) if columns * rows <= (4 if few else 8) * n), 512 if few or big else 256)
        lanes = min(threads, 1 << (columns - 1).bit_length())
        teams = threads // max(lanes, 32)
        tables = -(-(2 * teams * span * size + 2 * span + teams) // 4) * 4
        kept = arrays * -(-columns // lanes) * -(-rows // (threads // lanes)) * threads * width
        return Plan(span, lanes, threads, parts, at_once, tables, 4 * tables + item * kept * (parts == 1))

    for elements in (4 * sector, 2 * sector, sector):
        plan = slab(elements)
        if plan.shared <= min(TWO_RESIDENT, most) and samples * groups // plan.span >= ENOUGH:
            return plan
    for among in (whole, spans):
        plan = slab(sector, among)
        blocks, work = samples * groups // plan.span, plan.span * size * places
        if plan.shared <= most and (blocks >= ENOUGH // 2 or work <= LONG):
            return plan
    fit = max(1, CACHED * 4 // (places * channels * arrays * item))
    at_once = -(-samples // -(-samples // fit))
    for elements in (4 * sector, 2 * sector):
        plan = slab(elements)
        blocks, work = at_once * groups // plan.span, plan.span * size * places
        parts = max(-(-work // LONG), min(3 * ENOUGH // blocks, work // (LONG // 8)))
        parts = -(-places // -(-places // max(2, min(parts, MOST_PARTS))))  # none without a place
        if blocks * parts >= 2 * ENOUGH:
            break
    return slab(elements, whole, parts, at_once)


def _launch(
    kernels: tuple[str, ...],
    x: Array,
    tail: Array | None,
    groups: int,
    arrays: int,
    of_samples: list[Array | None],
    of_all: list[Array],
    sums: int,
    options: tuple,
) -> None:
    """Launch the first of ``kernels``, which does it all, or the other two, with ``sums`` floats of each sample and part between.

    A slab keeps ``arrays`` numbers of each element. ``of_samples`` have a sample axis like x and tail, ``of_all`` have none.
    """
    device = current()
    samples, places, head = x.shape[0], prod(x.shape[1:-1]), x.shape[-1]
    channels = head if tail is None else head + tail.shape[-1]
    every, item = [x, tail, *of_samples], x.dtype.itemsize
    fours = all(a is None or aligned(a, bytes_=4 * a.dtype.itemsize) for a in (*every, *of_all))
    wide = head % 4 == channels % 4 == 0 and fours
    suffix = ("wide" if wide else "any") + ("_bf16" if x.dtype == BF16 else "")
    plan = _plan(samples, places, channels, groups, 4 if wide else 1, arrays, _most_shared(device), item)
    sizes = [i32(n) for n in (places, head, channels, groups, plan.span, plan.lanes, plan.stash)]
    for first in range(0, samples, plan.samples):
        now = min(plan.samples, samples - first)
        some = every if now == samples else [None if a is None else a[first : first + now] for a in every]
        between = None if plan.parts == 1 else empty((now, plan.parts, sums), np.float32, device.xp)
        grid = now * groups // plan.span, plan.parts
        for name in kernels[:1] if plan.parts == 1 else kernels[1:]:
            args = (*some, between, *of_all, *sizes, *options)
            device.launch("norm", f"{name}_{suffix}", grid, (plan.threads,), args, plan.shared)


def group_norm_silu(
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    eps: float = 1e-5,
    scale: Array | None = None,
    shift: Array | None = None,
    silu: bool = True,
    out: Array | None = None,
    tail: Array | None = None,
) -> tuple[Array, Array, Array]:
    if x.size == 0 or gamma.shape[0] > LARGEST_GROUP * groups:
        if x.dtype != BF16:
            return reference.group_norm_silu(x, gamma, beta, groups, eps, scale, shift, silu, out, tail)
        exact = unpack(x), gamma, beta, groups, eps, scale, shift, silu, None, tail if tail is None else unpack(tail)
        y, mean, rstd = reference.group_norm_silu(*exact)
        return into(out, pack(y)), mean, rstd
    xp = current().xp
    shape = (*x.shape[:-1], gamma.shape[0])
    out = empty(shape, x.dtype, xp) if out is None else out
    mean, rstd = (empty((x.shape[0], groups), np.float32, xp) for _ in range(2))
    arrays = [scale, shift, out, mean, rstd]
    kernels = "norm_forward", "norm_moments", "norm_apply"
    _launch(kernels, x, tail, groups, 1, arrays, [gamma, beta], 2 * groups, (np.float32(eps), np.int32(silu)))
    return out, mean, rstd


def group_norm_silu_backward(
    dy: Array,
    x: Array,
    gamma: Array,
    beta: Array,
    groups: int,
    mean: Array,
    rstd: Array,
    scale: Array | None = None,
    shift: Array | None = None,
    silu: bool = True,
    out: Array | None = None,
    tail: Array | None = None,
    tail_out: Array | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None]:
    if x.size == 0 or gamma.shape[0] > LARGEST_GROUP * groups:
        given = gamma, beta, groups, mean, rstd, scale, shift, silu
        if x.dtype != BF16:
            return reference.group_norm_silu_backward(dy, x, *given, out, tail, tail_out)
        if tail is None:
            dx, *sums = reference.group_norm_silu_backward(unpack(dy), unpack(x), *given)
        else:
            dtail = unpack(tail)
            dx, *sums = reference.group_norm_silu_backward(unpack(dy), unpack(x), *given, None, unpack(tail), dtail)
            into(tail_out, pack(dtail))
        return into(out, pack(dx)), *sums
    device = current()
    samples, channels = x.shape[0], gamma.shape[0]
    out = empty(x.shape, x.dtype, device.xp) if out is None else out
    shares = empty((samples, 2, channels), np.float32, device.xp)
    dscale, dshift = (None if scale is None else empty((samples, channels), np.float32, device.xp) for _ in range(2))
    arrays = [dy, mean, rstd, scale, shift, out, tail_out, shares, dscale, dshift]
    kernels = "norm_backward", "norm_sums", "norm_gradient"
    _launch(kernels, x, tail, groups, 2, arrays, [gamma, beta], 2 * channels, (np.int32(silu),))
    sums = empty((2, channels), np.float32, device.xp)
    args = (shares, sums, i32(samples), i32(2 * channels))
    device.launch("norm", "norm_sum", (-(-2 * channels // 32),), (32, 16), args)
    return out, sums[0], sums[1], dscale, dshift
