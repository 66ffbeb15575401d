"""The sums and copies between the kernels, on the device and in plain NumPy: they are no part of the registry."""

from types import ModuleType
from typing import Any

import numpy as np

from alphabar.kernels import elementwise
from alphabar.kernels.arrays import to_numpy

SHAPES = ((4, 6, 5, 24), (3, 5, 2, 7), (2, 33, 31, 64))
MORE, ROWS = 8, 5  # channels beside those of the shape; rows of a table


def _given(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(shape[-1])
    batch, *_, channels = shape
    sizes = {
        "x": shape,
        "y": shape,
        "z": (*shape[:-1], channels + MORE),
        "emb": (batch, channels + MORE),
        "table": (ROWS, channels),
    }
    given = {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    return given | {"index": rng.integers(0, ROWS, batch), "times": rng.uniform(1, 1000, batch)}


OMEGA = np.exp(-np.arange(8) / 2)


def there(xp: ModuleType, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What the device makes of each function."""
    v: dict[str, Any] = {name: xp.asarray(a) for name, a in _given(shape).items()}
    x, z, channels = v["x"], v["z"], shape[-1]
    into, filled = z.copy(), xp.empty(shape, np.float32)
    elementwise.add_columns(x, 4, into)
    elementwise.fill(filled, 2.5)
    found = {
        "add": elementwise.add(x, v["y"]),
        "fill": filled,
        "zeros": elementwise.zeros(shape, np.float32, xp),
        "add_columns": into,
        "concat": elementwise.concat(x, z),
        "channels": elementwise.channels(z, MORE, channels),
        "add_channels": elementwise.add_channels(x, v["emb"], 4),
        "sum_places": elementwise.sum_places(x),
        "take_rows": elementwise.take_rows(v["table"], v["index"]),
        "sum_into_rows": elementwise.sum_into_rows(v["emb"], v["index"], ROWS),
        "time_features": elementwise.time_features(v["times"], 1, OMEGA, True),
        "upsample": elementwise.upsample(x),
        "upsample_backward": elementwise.upsample_backward(x[:, : shape[1] // 2 * 2, : shape[2] // 2 * 2].copy()),
    }
    return {name: to_numpy(a).copy() for name, a in found.items() if a is not None}


def wanted(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The same in plain NumPy, float64."""
    v: dict[str, Any] = {name: a.astype(np.float64) if a.dtype == np.float32 else a for name, a in _given(shape).items()}
    x, z, channels = v["x"], v["z"], shape[-1]
    into = z.copy()
    into[..., 4 : 4 + channels] += x
    rows, angle = np.zeros((ROWS, channels + MORE)), (v["times"] - 1)[:, None] * OMEGA
    np.add.at(rows, v["index"], v["emb"])
    even = x[:, : shape[1] // 2 * 2, : shape[2] // 2 * 2]
    return {
        "add": x + v["y"],
        "fill": np.full(shape, 2.5),
        "zeros": np.zeros(shape),
        "add_columns": into,
        "concat": np.concatenate([x, z], axis=-1),
        "channels": z[..., MORE : MORE + channels],
        "add_channels": x + v["emb"][:, None, None, 4 : 4 + channels],
        "sum_places": x.sum(axis=(1, 2)),
        "take_rows": v["table"][v["index"]],
        "sum_into_rows": rows,
        "time_features": np.concatenate([np.cos(angle), np.sin(angle)], axis=1),
        "upsample": x.repeat(2, axis=1).repeat(2, axis=2),
        "upsample_backward": sum(even[:, i::2, j::2] for i in range(2) for j in range(2)),
    }
