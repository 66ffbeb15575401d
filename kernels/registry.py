"""The registry: one record for each kernel. Tests and benchmarks iterate over it: one entry, and a kernel is tested and timed.

A record names the kernel (the same name in ``reference``, ``cpu`` and ``gpu``), the ids of its equation (`alphabar equations`),
the dtypes its fast backends take, small cases for the tests, large cases for the benchmarks, a maker of arguments, and what one
call moves and computes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from . import reference
from .reference import ROW

Case = Mapping[str, Any]
Arguments = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Kernel:
    """One kernel: name, ids of its equations, cases, and how to make its arguments and count its work."""

    name: str
    equations: tuple[str, ...]
    make: Callable[[np.random.Generator, Case, Any], Arguments]  # (rng, case, dtype) -> (args, kwargs)
    tests: tuple[Case, ...]
    benches: tuple[Case, ...]
    moved: Callable[[Case], int]  # bytes read and written in float32, each operand once
    flops: Callable[[Case], int]  # multiplications and additions
    dtypes: tuple[str, ...] = ("float32",)  # what cpu and gpu take; anything else goes to the reference
    bits: bool = False  # the float32 result is defined bit by bit
    slack: float = 0.0  # error allowed in place of the plain sum's, of the largest value, where precision is not "high"


def _n(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


# -- random numbers and diffusion

IMAGES = (
    {"shape": (3, 8, 8, 1)},
    {"shape": (2, 7, 5, 3)},
    {"shape": (1, 1)},
    {"shape": (0, 4, 4, 1)},
    {"shape": (2, 2053)},
    {"shape": (5, 1024)},
)
BIG_IMAGES = ({"shape": (64, 32, 32, 3)}, {"shape": (64, 64, 64, 3)}, {"shape": (16, 256, 256, 3)})


def _make_normals(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    return (np.empty(case["shape"], dtype), 2**40 + 7), {"step": 3, "stream": 2, "first_sample": 5}


def _make_q_sample(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    x0 = _n(rng, case["shape"], dtype)
    abar = np.cumprod(1 - np.r_[0, np.linspace(1e-4, 0.02, 1000)])
    t = rng.integers(1, 1001, case["shape"][0])
    eps = _n(rng, case["shape"], dtype) if case.get("given") else None
    return (x0, t, np.sqrt(abar), np.sqrt(1 - abar)), {"eps": eps, "seed": 11, "step": 4, "first_sample": 2}


def _make_step(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    shape = case["shape"]
    rows = rng.uniform(-1, 1, (4, len(ROW)))
    history = tuple(_n(rng, shape, dtype) for _ in range(case.get("history", 0)))
    noise = {"none": None, "made": True, "given": _n(rng, shape, dtype)}[case.get("noise", "none")]
    options: dict[str, Any] = {"history": history, "noise": noise, "seed": 5, "first_sample": 3}
    if case.get("guidance"):
        options["guidance"] = _n(rng, shape, dtype)
    if case.get("clip"):
        options["clip"] = (-0.5, 0.75)
    if case.get("store"):
        options["store"] = np.full(shape, np.nan, dtype)  # to be written
    return (_n(rng, shape, dtype), _n(rng, shape, dtype), rows, 2), options


STEP_VARIANTS: tuple[Case, ...] = (
    {},
    {"noise": "made"},
    {"noise": "given", "clip": True},
    {"noise": "made", "clip": True, "store": True, "history": 3, "guidance": True},
    {"history": 1, "store": True, "clip": True},
    {"history": 2},
)


def _arrays_of_step(case: Case) -> int:
    return 3 + case.get("history", 0) + bool(case.get("guidance")) + bool(case.get("store")) + (case.get("noise") == "given")


# -- normalisation

NORMS: tuple[Case, ...] = (
    {"shape": (2, 5, 3, 12), "groups": 4},
    {"shape": (3, 8, 8, 32), "groups": 8, "modulated": True},
    {"shape": (1, 1, 1, 6), "groups": 6, "silu": False},
    {"shape": (2, 9, 16), "groups": 1, "silu": False, "modulated": True},
    {"shape": (0, 4, 4, 8), "groups": 2},
    {"shape": (2, 33, 31, 40), "groups": 8},
    {"shape": (2, 5, 3, 12), "groups": 4, "tail": 5},
    {"shape": (3, 8, 8, 48), "groups": 8, "modulated": True, "tail": 16},
    {"shape": (2, 300, 40), "groups": 4, "silu": False, "tail": 37},
    {"shape": (0, 4, 4, 8), "groups": 2, "tail": 4},
)
BIG_NORMS: tuple[Case, ...] = (
    {"shape": (32, 32, 32, 64), "groups": 32},
    {"shape": (32, 16, 16, 128), "groups": 32},
    {"shape": (32, 8, 8, 256), "groups": 32},
    {"shape": (32, 16, 16, 256), "groups": 32, "tail": 128},
)


def _make_norm(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    shape = case["shape"]
    x = 2 * _n(rng, shape, dtype) + dtype(0.5)
    args = (x, 1 + _n(rng, shape[-1:], dtype) / 4, _n(rng, shape[-1:], dtype), case["groups"])
    options: dict[str, Any] = {"eps": 1e-5, "silu": case.get("silu", True)}
    if case.get("modulated"):
        options |= {"scale": _n(rng, (shape[0], shape[-1]), dtype) / 4, "shift": _n(rng, (shape[0], shape[-1]), dtype)}
    if "tail" in case:  # so many of the channels
        own = shape[-1] - case["tail"]
        args, options["tail"] = (x[..., :own].copy(), *args[1:]), x[..., own:].copy()
    return args, options


def _make_norm_backward(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    (x, gamma, beta, groups), options = _make_norm(rng, case, dtype)
    _, mean, rstd = reference.group_norm_silu(x, gamma, beta, groups, **options)
    del options["eps"]
    if "tail" in case:
        options["tail_out"] = np.zeros_like(options["tail"])
    return (_n(rng, case["shape"], dtype), x, gamma, beta, groups, mean, rstd), options


# -- convolution

CONVS = (
    {"shape": (2, 5, 7, 3), "kernel": 3, "cout": 4},
    {"shape": (3, 8, 8, 16), "kernel": 3, "cout": 32},
    {"shape": (2, 8, 6, 5), "kernel": 3, "cout": 7, "stride": 2},
    {"shape": (2, 8, 8, 5), "kernel": 3, "cout": 7, "stride": 2, "pad": (0, 1)},
    {"shape": (2, 7, 7, 6), "kernel": 3, "cout": 9, "stride": 2},
    {"shape": (2, 3, 4, 6), "kernel": 3, "cout": 5, "upsample": True},
    {"shape": (2, 4, 5, 6), "kernel": 1, "cout": 10},
    {"shape": (1, 1, 1, 2), "kernel": 3, "cout": 2},
    {"shape": (0, 4, 4, 2), "kernel": 3, "cout": 3},
    {"shape": (2, 8, 8, 8), "kernel": 3, "cout": 8, "bias": False},
    {"shape": (4, 13, 10, 32), "kernel": 3, "cout": 64, "shift": True, "residual": True},
    {"shape": (4, 13, 10, 32), "kernel": 3, "cout": 64, "precision": "high", "bias": False},
    {"shape": (65, 4, 4, 48), "kernel": 3, "cout": 32, "residual": True},
    {"shape": (5, 9, 7, 32), "kernel": 3, "cout": 48, "upsample": True, "shift": True},
    {"shape": (2, 3, 4, 16), "kernel": 3, "cout": 16, "upsample": True, "residual": True},
    {"shape": (2, 4, 5, 6), "kernel": 3, "cout": 5, "stride": 2, "shift": True, "residual": True},
    {"shape": (2, 3, 4, 6), "kernel": 3, "cout": 5, "upsample": True, "shift": True},
    {"shape": (2, 9, 15, 3), "kernel": 3, "cout": 64},
    {"shape": (1, 1, 1, 40), "kernel": 1, "cout": 72},
    {"shape": (1, 1, 1, 17), "kernel": 1, "cout": 37, "bias": False},
)
WINOGRAD = 2e-5  # of the largest value; 1e-5 in relative L2 norm
BIG_CONVS: tuple[Case, ...] = (
    *(
        {"shape": (batch if side == 32 else 32, side, side, width), "kernel": 3, "cout": width}
        for side in (32, 16, 8, 4)
        for width, batch in ((64, 32), (128, 16), (256, 8))
    ),
    {"shape": (1, 32, 32, 64), "kernel": 3, "cout": 64},
    {"shape": (1, 8, 8, 128), "kernel": 3, "cout": 128},
    {"shape": (32, 16, 16, 256), "kernel": 3, "cout": 128},
    {"shape": (32, 32, 32, 3), "kernel": 3, "cout": 64},
    {"shape": (32, 32, 32, 64), "kernel": 3, "cout": 3},
    {"shape": (32, 32, 32, 64), "kernel": 3, "cout": 64, "stride": 2},
    {"shape": (32, 16, 16, 128), "kernel": 3, "cout": 128, "stride": 2},
    {"shape": (32, 8, 8, 128), "kernel": 3, "cout": 128, "stride": 2},
    {"shape": (32, 16, 16, 64), "kernel": 3, "cout": 64, "upsample": True},
    {"shape": (32, 8, 8, 128), "kernel": 3, "cout": 128, "upsample": True},
    {"shape": (32, 32, 32, 128), "kernel": 1, "cout": 64},
    {"shape": (32, 16, 16, 128), "kernel": 1, "cout": 128},
    {"shape": (32, 8, 8, 256), "kernel": 1, "cout": 128},
    {"shape": (32, 32, 32, 64), "kernel": 3, "cout": 64, "precision": "high"},
    {"shape": (32, 8, 8, 256), "kernel": 3, "cout": 256, "precision": "high"},
)
FUSED_CONVS: tuple[Case, ...] = (
    {"shape": (32, 32, 32, 64), "kernel": 3, "cout": 64, "shift": True},
    {"shape": (32, 16, 16, 128), "kernel": 3, "cout": 128, "residual": True},
)


def _conv_geometry(case: Case) -> dict[str, Any]:
    return {"stride": case.get("stride", 1), "upsample": case.get("upsample", False), "pad": case.get("pad")}


def _conv_options(case: Case) -> dict[str, Any]:
    return _conv_geometry(case) | ({"precision": case["precision"]} if "precision" in case else {})


def _conv_output(case: Case) -> tuple[int, ...]:
    b, h, w, _ = case["shape"]
    rows, cols = (reference.conv_output_size(n, case["kernel"], **_conv_geometry(case)) for n in (h, w))
    return b, rows, cols, case["cout"]


def _conv_weight(rng: np.random.Generator, case: Case, dtype: Any) -> np.ndarray:
    k, cin = case["kernel"], case["shape"][-1]
    return _n(rng, (k, k, cin, case["cout"]), dtype) / dtype(k * cin**0.5)


def _make_conv(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    bias = _n(rng, (case["cout"],), dtype) if case.get("bias", True) else None
    output = _conv_output(case)
    extra = {k: _n(rng, s, dtype) for k, s in (("shift", (output[0], output[3])), ("residual", output)) if case.get(k)}
    return (_n(rng, case["shape"], dtype), _conv_weight(rng, case, dtype)), {"bias": bias, **_conv_options(case), **extra}


def _make_conv_input(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    return (_n(rng, _conv_output(case), dtype), _conv_weight(rng, case, dtype), case["shape"]), _conv_options(case)


def _make_conv_weight(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    return (_n(rng, case["shape"], dtype), _n(rng, _conv_output(case), dtype), case["kernel"]), _conv_options(case)


def _conv_flops(case: Case) -> int:
    return 2 * prod(_conv_output(case)) * case["kernel"] ** 2 * case["shape"][-1]


def _conv_moved(case: Case) -> int:
    return 4 * (prod(case["shape"]) + prod(_conv_output(case)) + case["kernel"] ** 2 * case["shape"][-1] * case["cout"])


# -- attention

ATTENTIONS = (
    {"shape": (2, 9, 3, 8)},
    {"shape": (1, 64, 4, 16)},
    {"shape": (2, 1, 1, 4)},
    {"shape": (0, 5, 2, 4)},
    {"shape": (2, 70, 2, 5), "scale": 0.3},
)
BIG_ATTENTIONS = (
    {"shape": (32, 256, 4, 32)},
    {"shape": (32, 256, 16, 8)},
    {"shape": (32, 256, 1, 128)},
    {"shape": (32, 64, 1, 128)},
    {"shape": (4, 1024, 4, 64)},
)


def _make_attention(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    q, k, v = (_n(rng, case["shape"], dtype) for _ in range(3))
    return (q, k, v), {"scale": case.get("scale")}


def _make_attention_backward(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    (q, k, v), options = _make_attention(rng, case, dtype)
    o, lse = reference.attention(q, k, v, **options)
    return (_n(rng, case["shape"], dtype), q, k, v, o, lse), options


def _attention_flops(products: int) -> Callable[[Case], int]:
    """``products`` matrix products of (T, d) by (d, T) for each head."""
    return lambda case: 2 * products * case["shape"][0] * case["shape"][1] ** 2 * case["shape"][2] * case["shape"][3]


# -- tokens

TOKENS: tuple[Case, ...] = (
    {"shape": (2, 5, 12)},
    {"shape": (3, 70, 32), "modulated": True},
    {"shape": (1, 1, 6), "modulated": True},
    {"shape": (2, 3, 37)},
    {"shape": (0, 4, 8)},
    {"shape": (2, 33, 130), "modulated": True},
)
BIG_TOKENS: tuple[Case, ...] = ({"shape": (64, 128, 256), "modulated": True}, {"shape": (16, 256, 512), "modulated": True})
ACTIVATIONS = ({"shape": (1,)}, {"shape": (3, 7, 11)}, {"shape": (0, 4)}, {"shape": (2, 20, 1024)})
BIG_ACTIVATIONS = ({"shape": (64, 128, 1024)}, {"shape": (16, 256, 2048)})
HEADS = ({"shape": (2, 5, 3, 8)}, {"shape": (1, 1, 1, 2)}, {"shape": (0, 4, 2, 4)}, {"shape": (3, 40, 2, 32)})
BIG_HEADS = ({"shape": (64, 128, 8, 32)}, {"shape": (16, 256, 8, 64)})


def _make_silu(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    return (3 * _n(rng, case["shape"], dtype),), {}


def _make_silu_backward(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    return (_n(rng, case["shape"], dtype), 3 * _n(rng, case["shape"], dtype)), {}


def _make_layer_norm(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    batch, _, channels = shape = case["shape"]
    x = 2 * _n(rng, shape, dtype) + dtype(0.5)
    args = (x, 1 + _n(rng, (channels,), dtype) / 4, _n(rng, (channels,), dtype))
    options: dict[str, Any] = {"eps": 1e-5}
    if case.get("modulated"):
        options |= {"scale": _n(rng, (batch, channels), dtype) / 4, "shift": _n(rng, (batch, channels), dtype)}
    return args, options


def _make_layer_norm_backward(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    (x, gamma, beta), options = _make_layer_norm(rng, case, dtype)
    _, mean, rstd = reference.layer_norm(x, gamma, beta, **options)
    return (_n(rng, case["shape"], dtype), x, gamma, beta, mean, rstd), {"scale": options.get("scale")}


def _make_add_gated(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    shape = case["shape"]
    return (_n(rng, shape, dtype), _n(rng, shape, dtype), _n(rng, (shape[0], shape[-1]), dtype)), {}


def _make_rotary(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    _, tokens, _, d = case["shape"]
    angle = rng.uniform(0, 100, (tokens, d // 2))
    return (_n(rng, case["shape"], dtype), np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)), {}


# -- optimiser

FLATS = ({"shape": (1,)}, {"shape": (1000,)}, {"shape": (70001,)})
BIG_FLATS = ({"shape": (1 << 20,)}, {"shape": (9_000_000,)})


def _make_flat(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    return (_n(rng, case["shape"], dtype),), {}


def _make_adamw(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    p, g, m, ema = (_n(rng, case["shape"], dtype) for _ in range(4))
    v = np.abs(_n(rng, case["shape"], dtype))
    return (p, g, m / 10, v, ema, 1e-3, 0.9, 0.999, 1e-8, 0.01, 7, 0.99), {"norm_sq": reference.sum_squares(g), "max_norm": 1.0}


# -- losses and softmax: the last axis of logits holds the weights

ERRORS: tuple[Case, ...] = (
    {"shape": (3, 8, 8, 1)},
    {"shape": (2, 7, 5, 3), "weighted": True},
    {"shape": (4,), "weighted": True},
    {"shape": (0, 4, 4, 1)},
    {"shape": (37, 2)},
    {"shape": (2, 20_000), "weighted": True},
)
BIG_ERRORS: tuple[Case, ...] = (
    {"shape": (128, 28, 28, 1)},
    {"shape": (32, 32, 32, 3)},
    *BIG_IMAGES[1:],
)
ROWS: tuple[Case, ...] = (
    {"shape": (2, 7, 3)},
    {"shape": (3, 1)},
    {"shape": (20, 2), "holes": 0.3},
    {"shape": (0, 4, 5)},
    {"shape": (2, 40, 27), "holes": 0.3},
    {"shape": (17,)},
    {"shape": (5, 5, 28), "holes": 0.9},
    {"shape": (2, 5, 3, 256)},
    {"shape": (3, 7, 1000), "holes": 0.5},
    {"shape": (2, 4100)},
)
BIG_ROWS: tuple[Case, ...] = (
    {"shape": (128, 10)},
    {"shape": (64, 128, 27)},
    {"shape": (16, 32, 32, 3, 256)},
    {"shape": (8, 64, 8192)},
)


def _make_squared_error(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    shape = case["shape"]
    weight = rng.uniform(0, 2, shape[0]).astype(dtype) if case.get("weighted") else None
    return (_n(rng, shape, dtype), _n(rng, shape, dtype)), {"weight": weight}


def _make_softmax(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    x = 3 * _n(rng, case["shape"], dtype)
    if "holes" in case:  # states of probability 0, but never all
        x[..., 1:][rng.random(x[..., 1:].shape) < case["holes"]] = -np.inf
    return (x,), {}


def _make_softmax_backward(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    (x,), options = _make_softmax(rng, case, dtype)
    return (_n(rng, case["shape"], dtype), reference.softmax(x)), options


def _make_cross_entropy(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    (x,), options = _make_softmax(rng, case, dtype)
    labels = np.asarray(rng.integers(0, case["shape"][-1], case["shape"][:-1]))
    possible = np.isfinite(np.take_along_axis(x, labels[..., None], axis=-1)[..., 0])
    return (x, np.where(possible, labels, 0)), options


# -- categorical draws: the last axis of a shape holds the weights


CATEGORICALS: tuple[Case, ...] = (
    {"shape": (2, 7, 3)},
    {"shape": (3, 1)},
    {"shape": (5, 2)},
    {"shape": (0, 4, 5)},
    {"shape": (2, 40, 27), "holes": 0.3},
    {"shape": (1, 2060, 17)},
    {"shape": (3, 300, 28), "holes": 0.95},
    {"shape": (2, 5, 3, 3, 256)},
    {"shape": (2, 21, 1000), "holes": 0.5},
)
BIG_CATEGORICALS: tuple[Case, ...] = ({"shape": (64, 128, 27)}, {"shape": (16, 32, 32, 3, 256)}, {"shape": (128, 64, 17)})
_ABSORBING = {"law": "absorbing"}
_POSTERIORS: tuple[Case, ...] = (*CATEGORICALS, *({**c, **_ABSORBING} for c in CATEGORICALS))


def _make_categorical(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    weights = 3 * _n(rng, case["shape"], dtype)
    if "holes" in case:  # weights that are zero, and rows without any other
        weights[rng.random(case["shape"]) < case["holes"]] = -np.inf
    return (weights, 2**40 + 7), {"step": 3, "stream": 2, "first_sample": 5}


def _make_categorical_posterior(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    (logits, seed), options = _make_categorical(rng, case, dtype)
    *places, columns = case["shape"]
    keep, now, before = 0.9, 0.3, 1 / 3
    absorbing = case.get("law") == "absorbing"
    x_t = rng.integers(0, columns + absorbing, places).astype(np.int32)
    row = (0, 0, before - now, 1 - before) if absorbing else (keep, (1 - keep) / columns, before, (1 - before) / columns)
    rows = np.array([(0, 0, 0, 0), row, (1, 0, 1, 0)])
    return (logits, x_t, rows, 1), {"mask": columns if absorbing else -1, "seed": seed, **options}


def _make_categorical_q_sample(rng: np.random.Generator, case: Case, dtype: Any) -> Arguments:
    *places, states = case["shape"]
    x0 = rng.integers(0, states, places).astype(np.int32)
    options = {"mask": states if case.get("law") == "absorbing" else -1, "seed": 11, "step": 4, "first_sample": 2}
    return (x0, rng.integers(0, 101, places[0]), 1 - np.linspace(0, 1, 101) ** 2, states), options


def _read_and_drawn(case: Case) -> int:
    return 4 * (prod(case["shape"]) + prod(case["shape"][:-1]))


def _per_element(count: int) -> Callable[[Case], int]:
    return lambda case: count * prod(case["shape"])


_STEP_BENCHES: tuple[Case, ...] = (
    {},
    {"noise": "made"},
    {"noise": "made", "clip": True},
    {"clip": True, "history": 1, "store": True},
)

_KERNELS = (
    Kernel("normals", ("S0-U2",), _make_normals, IMAGES, BIG_IMAGES, _per_element(4), _per_element(40), bits=True),
    Kernel(
        "q_sample",
        ("S0-E18", "S0-U2", "S0-E39", "S0-E48", "S1-E7", "S4-E17"),
        _make_q_sample,
        (*IMAGES, *({**c, "given": True} for c in IMAGES)),
        BIG_IMAGES,
        _per_element(12),
        _per_element(43),
    ),
    Kernel(
        "step",
        ("S0-E31", "S0-E47", "S0-E49"),
        _make_step,
        tuple({**c, **v} for c in IMAGES for v in STEP_VARIANTS),
        tuple({**c, **v} for c in BIG_IMAGES for v in _STEP_BENCHES),
        lambda c: 4 * _arrays_of_step(c) * prod(c["shape"]),
        lambda c: (2 * _arrays_of_step(c) + (40 if c.get("noise") == "made" else 0)) * prod(c["shape"]),
    ),
    Kernel("group_norm_silu", (), _make_norm, NORMS, BIG_NORMS, _per_element(8), _per_element(12)),
    Kernel("group_norm_silu_backward", (), _make_norm_backward, NORMS, BIG_NORMS, _per_element(12), _per_element(25)),
    Kernel("conv2d", (), _make_conv, CONVS, (*BIG_CONVS, *FUSED_CONVS), _conv_moved, _conv_flops, slack=WINOGRAD),
    Kernel("conv2d_backward_input", (), _make_conv_input, CONVS, BIG_CONVS, _conv_moved, _conv_flops, slack=WINOGRAD),
    Kernel("conv2d_backward_weight", (), _make_conv_weight, CONVS, BIG_CONVS, _conv_moved, _conv_flops, slack=WINOGRAD),
    Kernel("attention", (), _make_attention, ATTENTIONS, BIG_ATTENTIONS, _per_element(16), _attention_flops(2)),
    Kernel("attention_backward", (), _make_attention_backward, ATTENTIONS, BIG_ATTENTIONS, _per_element(32), _attention_flops(5)),
    Kernel("silu", (), _make_silu, ACTIVATIONS, BIG_ACTIVATIONS, _per_element(8), _per_element(10)),
    Kernel("silu_backward", (), _make_silu_backward, ACTIVATIONS, BIG_ACTIVATIONS, _per_element(12), _per_element(14)),
    Kernel("layer_norm", (), _make_layer_norm, TOKENS, BIG_TOKENS, _per_element(8), _per_element(8)),
    Kernel("layer_norm_backward", (), _make_layer_norm_backward, TOKENS, BIG_TOKENS, _per_element(12), _per_element(16)),
    Kernel("add_gated", (), _make_add_gated, TOKENS, BIG_TOKENS, _per_element(12), _per_element(2)),
    Kernel("add_gated_backward", (), _make_add_gated, TOKENS, BIG_TOKENS, _per_element(12), _per_element(3)),
    Kernel("rotary", (), _make_rotary, HEADS, BIG_HEADS, _per_element(8), _per_element(3)),
    Kernel(
        "categorical",
        ("S4-E24",),
        _make_categorical,
        CATEGORICALS,
        BIG_CATEGORICALS,
        _read_and_drawn,
        _per_element(22),
        bits=True,
    ),
    Kernel(
        "categorical_posterior",
        ("S4-E28",),
        _make_categorical_posterior,
        _POSTERIORS,
        (*BIG_CATEGORICALS, *({**c, **_ABSORBING} for c in BIG_CATEGORICALS)),
        _read_and_drawn,
        _per_element(22),
        bits=True,
    ),
    Kernel(
        "categorical_q_sample",
        ("S4-E26",),
        _make_categorical_q_sample,
        _POSTERIORS,
        (*BIG_CATEGORICALS, *({**c, **_ABSORBING} for c in BIG_CATEGORICALS)),
        lambda c: 8 * prod(c["shape"][:-1]),
        lambda c: 2 * prod(c["shape"][:-1]),
        bits=True,
    ),
    Kernel(
        "squared_error",
        ("S0-E30", "S0-E45", "S1-E21", "S2-E5"),
        _make_squared_error,
        ERRORS,
        BIG_ERRORS,
        _per_element(12),
        _per_element(4),
    ),
    Kernel("cross_entropy", ("L7", "L9"), _make_cross_entropy, ROWS, BIG_ROWS, _per_element(8), _per_element(20)),
    Kernel("softmax", (), _make_softmax, ROWS, BIG_ROWS, _per_element(8), _per_element(19)),
    Kernel("softmax_backward", (), _make_softmax_backward, ROWS, BIG_ROWS, _per_element(12), _per_element(4)),
    Kernel("sum_squares", (), _make_flat, FLATS, BIG_FLATS, _per_element(4), _per_element(2)),
    Kernel("adamw_ema", (), _make_adamw, FLATS, BIG_FLATS, _per_element(36), _per_element(16)),
)

TABLE: dict[str, Kernel] = {k.name: k for k in _KERNELS}
