"""Attention on the tensor cores: what it is compared with, and calls that reach all of its kernels.

The oracle is the definition in float64. The budget is the error of the definition computed in float64 too, but from operands that
are rounded where tensor cores take them rounded (inputs, softmax weights and their slopes), and a tenth more.
"""

from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from alphabar.kernels import gpu, precision, reference
from alphabar.kernels.bf16 import BF16, pack, unpack
from alphabar.kernels.gpu import attend_mma
from tests.cuda_arrays import Place

Round = Callable[[np.ndarray], np.ndarray]
KINDS = ("bf16", "tf32")
SHAPES = {  # every size of a kernel; tokens of less than a warp, of one tile, of some; heads that fill their kernel or do not
    "one": (1, 1, 1, 1),
    "alone": (2, 1, 1, 16),
    "short": (2, 9, 3, 8),
    "odd": (1, 70, 2, 5),
    "half full": (2, 40, 1, 24),
    "far below": (1, 37, 1, 16),
    "full": (1, 130, 1, 64),
    "long": (1, 70, 1, 104),
    "longer": (1, 33, 1, 131),
    "longest": (1, 70, 1, 256),
    "empty": (0, 4, 2, 8),
}


def to_bf16(x: np.ndarray) -> np.ndarray:
    return unpack(pack(x.astype(np.float32))).astype(np.float64)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """To 10 bits after the point, ties away from zero."""
    word = x.astype(np.float32).view(np.uint32)
    return ((word + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def inputs(shape: tuple[int, ...], kind: str, seed: int = 0, size: float = 1.0) -> list[np.ndarray]:
    """q, k, v and the slope of the result, as the kernels take them."""
    rng = np.random.default_rng(seed)
    made = [(size * rng.standard_normal(shape)).astype(np.float32) for _ in range(4)]
    return [pack(a) for a in made] if kind == "bf16" else made


def numbers(a: np.ndarray) -> np.ndarray:
    return (unpack(a) if a.dtype == BF16 else a).astype(np.float64)


def exact(arrays: list[np.ndarray], scale: float | None) -> list[np.ndarray]:
    """o, lse, dq, dk, dv by the definition in float64."""
    q, k, v, do = map(numbers, arrays)
    o, lse = reference.attention(q, k, v, scale)
    return [o, lse, *reference.attention_backward(do, q, k, v, o, lse, scale)]


def rounded(arrays: list[np.ndarray], scale: float | None, kind: str) -> list[np.ndarray]:
    """The same from operands that are rounded; of bfloat16 the results too."""
    factor: Round = to_bf16 if kind == "bf16" else to_tf32
    result: Round = to_bf16 if kind == "bf16" else lambda x: x
    q, k, v, do = (factor(numbers(a)).transpose(0, 2, 1, 3) for a in arrays)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = (q @ k.swapaxes(-1, -2)) * scale
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(axis=-1, keepdims=True)
    o = result(factor(p) @ v / total)
    p = p / total
    ds = factor(p * (do @ v.swapaxes(-1, -2) - (do * o).sum(axis=-1, keepdims=True)))
    dq, dk, dv = result(ds @ k * scale), result(ds.swapaxes(-1, -2) @ q * scale), result(factor(p).swapaxes(-1, -2) @ do)
    o, dq, dk, dv = (z.transpose(0, 2, 1, 3) for z in (o, dq, dk, dv))
    return [o, (top + np.log(total))[..., 0], dq, dk, dv]


def computed(arrays: list[np.ndarray], scale: float | None, place: Place, enough: int = attend_mma.ENOUGH) -> list[np.ndarray]:
    """o, lse, dq, dk, dv by the kernels. With ``enough`` 1 few blocks have warps that share tiles, as where there are many."""
    q, k, v, do = map(place, arrays)
    with precision("tf32"), mock.patch.object(attend_mma, "ENOUGH", enough):
        out = place(np.zeros_like(q))
        o, lse = gpu.attention(q, k, v, scale, out)
        assert o is out
        return [o, lse, *gpu.attention_backward(do, q, k, v, o, lse, scale)]


def budget(want: np.ndarray, plain: np.ndarray) -> float:
    """The error of rounded operands (root of the sum of squares) and a tenth more, and what float32 rounds."""
    return 1.1 * float(np.linalg.norm(plain - want)) + 2.0**-20 * float(np.linalg.norm(want) + np.sqrt(want.size))


def case(shape: tuple[int, ...], kind: str, scale: float | None, place: Place, seed: int = 0, size: float = 1.0) -> None:
    arrays = inputs(shape, kind, seed, size)
    if scale is not None and scale < -1:  # products that are positive, and so scores that are all far below 0
        arrays[:2] = [pack(np.abs(unpack(a))) if kind == "bf16" else np.abs(a) for a in arrays[:2]]
    made = computed(arrays, scale, place, enough=1)
    assert [a.dtype for a in made] == [np.float32 if i == 1 else arrays[0].dtype for i in range(5)]
    if not shape[0]:
        return
    for i, (got, want, plain) in enumerate(zip(made, exact(arrays, scale), rounded(arrays, scale, kind), strict=True)):
        assert got.shape == want.shape
        off = float(np.linalg.norm(numbers(got) - want))
        assert off <= budget(want, plain), (shape, kind, i, off, budget(want, plain))


def all_cases() -> Iterator[tuple[str, Callable[[Place], None]]]:
    for kind in KINDS:
        for name, shape in SHAPES.items():
            scale = {"odd": 0.3, "far below": -30.0}.get(name)
            yield f"attention {kind} {name}", lambda place, a=(shape, kind, scale): case(*a, place)  # type: ignore[misc]


def at_sizes_of_networks(place: Place) -> None:
    """Calls of the size of training steps, for a device that only writes down what is launched."""
    for kind in KINDS:
        for shape in ((128, 256, 1, 256), (64, 256, 1, 128), (64, 256, 2, 64), (64, 256, 4, 32)):
            zero = place(np.zeros(shape, BF16 if kind == "bf16" else np.float32))
            computed([zero] * 4, None, lambda a: a)
