"""Paths between latent codes x_T."""

from typing import Any

import numpy as np

from ..kernels.arrays import array_module
from .exchange import Array, exchanged, flat, lift

PARALLEL = 1e-6  # sin θ below which the great circle has no direction


@exchanged
def slerp(x: Array, y: Array, weight: Any) -> Array:
    """sin((1−λ)θ)/sin θ·x + sin(λθ)/sin θ·y, θ the angle between x and y, sample by sample. Eq: S2-C23, S4-C7.

    x, y (B, …); ``weight`` λ a number or (B,). Where the two are parallel or opposite, or one is zero, it is (1−λ)x + λy. Ends of
    equal norm keep it all along. Source: Shoemake 1985; DDIM appendix D.5.
    """
    if x.shape != y.shape or x.ndim < 1:
        raise ValueError(f"x and y must be (B, …) of one shape, not {x.shape} and {y.shape}")
    xp = array_module(x)
    lam = xp.asarray(weight, dtype=np.float64)
    if lam.ndim > 1 or (lam.ndim == 1 and lam.shape[0] != x.shape[0]):
        raise ValueError(f"weight must be a number or have shape ({x.shape[0]},), not {lam.shape}")
    lam = xp.broadcast_to(lam, x.shape[:1])
    u, v = (flat(z).astype(np.float64) for z in (x, y))
    length = xp.sqrt((u * u).sum(axis=1) * (v * v).sum(axis=1))
    theta = xp.arccos(xp.clip((u * v).sum(axis=1) / xp.where(length > 0, length, 1), -1, 1))
    curved = (xp.sin(theta) > PARALLEL) & (length > 0)
    sine = xp.where(curved, xp.sin(theta), 1)
    on_x = xp.where(curved, xp.sin((1 - lam) * theta) / sine, 1 - lam)
    on_y = xp.where(curved, xp.sin(lam * theta) / sine, lam)
    return lift(on_x, x) * x + lift(on_y, y) * y
