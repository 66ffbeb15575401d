"""What a configuration of the U-Net must hold."""

from typing import Any

import numpy as np


def integers(name: str, value: Any) -> list[Any]:
    """``value`` as a list of plain integers (bools stay bools). TypeError where it is no sequence of them."""
    try:
        given = list(value)
    except TypeError:
        given = [None]
    if any(not isinstance(n, (int, np.integer, np.bool_)) for n in given):
        raise TypeError(f"{name} must be a sequence of integers, not {value!r}")
    return [bool(n) if isinstance(n, (bool, np.bool_)) else int(n) for n in given]


def attention_levels(c: dict[str, Any], key: str) -> list[bool]:
    """Which levels have attention: from bools as they are, from sides of images by the levels' heights."""
    wanted, n = c[key], len(c["channels"])
    if wanted is None:
        return attention_levels(c, "attention")
    if wanted and all(isinstance(a, (bool, np.bool_)) for a in wanted):
        if len(wanted) != n:
            raise ValueError(f"{key} must have one bool for each of the {n} levels, not {wanted}")
        return [bool(a) for a in wanted]
    sides = [c["image_size"][0] >> i for i in range(n)]
    if any(a not in sides for a in wanted):
        raise ValueError(f"{key} must name sides of images among {sides}, not {wanted}")
    return [side in wanted for side in sides]


def check(c: dict[str, Any]) -> None:
    """Raise ValueError for a configuration that makes no network."""
    size, channels = c["image_size"], c["channels"]
    halvings = len(channels) - 1
    if not channels or min(channels) < 1:
        raise ValueError(f"channels must be positive, one for each level, not {channels}")
    for key in ("in_channels", "out_channels", "blocks", "groups", "embedding_size"):
        if not isinstance(c[key], (int, np.integer)) or c[key] < 1:
            raise ValueError(f"{key} must be an integer of at least 1, not {c[key]!r}")
    for key, low in (("classes", 1), ("head_dim", 1), ("middle_groups", 0)):
        if c[key] is not None and (not isinstance(c[key], (int, np.integer)) or c[key] < low):
            raise ValueError(f"{key} must be an integer of at least {low} or None, not {c[key]!r}")
    for key in ("dropout", "norm_eps", "freq_shift"):
        if not isinstance(c[key], (int, float, np.number)):
            raise TypeError(f"{key} must be a number, not {c[key]!r}")
    if len(size) != 2 or min(size) < 1 or any(n % 2**halvings for n in size):
        raise ValueError(
            f"image_size must be (height, width), both multiples of {2**halvings} for {halvings + 1} levels, not {size}"
        )
    if channels[0] % 2 or channels[0] / 2 <= c["freq_shift"]:
        raise ValueError(f"channels[0] must be even and more than 2·freq_shift, not {channels[0]}")
    if any(n % c["groups"] for n in channels):
        raise ValueError(f"groups must divide all channels {channels}, not {c['groups']}")
    attended = [
        n
        for n, a, b in zip(channels, attention_levels(c, "attention"), attention_levels(c, "attention_up"), strict=True)
        if a or b
    ]
    if c["middle"] not in ("attention", "plain", "none"):
        raise ValueError(f"middle must be 'attention', 'plain' or 'none', not {c['middle']!r}")
    if c["middle"] == "attention":
        attended.append(channels[-1])
        if c["middle_groups"] and channels[-1] % c["middle_groups"]:
            raise ValueError(f"middle_groups must divide {channels[-1]} channels, not {c['middle_groups']}")
    if c["head_dim"] is not None and any(n % c["head_dim"] for n in attended):
        raise ValueError(f"head_dim must divide the channels {attended} of all attentions, not {c['head_dim']}")
    if not 0 <= c["dropout"] < 1:
        raise ValueError(f"dropout must be in [0, 1), not {c['dropout']}")
    if not c["norm_eps"] > 0:
        raise ValueError(f"norm_eps must be positive, not {c['norm_eps']}")
    if c["downsample_pad"] not in ([1, 1], [0, 1]):
        raise ValueError(f"downsample_pad must be (1, 1) or (0, 1), not {c['downsample_pad']}")
    for key in ("dtype", "time_dtype"):
        if c[key] not in ("float32", "float64"):
            raise ValueError(f"{key} must be 'float32' or 'float64', not {c[key]!r}")
