"""AdamW with clipping and a running average of the weights, on flat buffers, and the course of the learning rate."""

from math import cos, inf, isfinite, pi, sqrt
from typing import Any

from .. import kernels
from .layers import ParameterStore

Array = Any


class AdamW:
    """AdamW (Loshchilov & Hutter 2019), clipping by global norm, and an exponential moving average, in one pass over the weights.

        g = grad·min(1, max_norm/(‖grad‖ + 1e-6));  m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²
        w = (1 − lr·weight_decay)·w − lr·m̂/(√v̂ + eps);  ema = d·ema + (1 − d)·w,  d = min(ema_decay, (1+n)/(10+n))

    n is the number of updates before this one. ``m``, ``v`` and ``ema`` are flat like ``store.data``; ``count`` is the number of
    updates made, ``skipped`` the number refused because the gradient was not finite. max_norm inf: no clipping.
    Raises ValueError for a negative weight_decay, betas or ema_decay out of [0, 1), eps or max_norm not positive.
    """

    def __init__(
        self,
        store: ParameterStore,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float = inf,
        ema_decay: float = 0.9999,
    ) -> None:
        for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("ema_decay", ema_decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), not {value}")
        for name, value in (("eps", eps), ("max_norm", max_norm)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        if not 0 <= weight_decay < inf:
            raise ValueError(f"weight_decay must be finite and not negative, not {weight_decay}")
        self.store, self.betas, self.eps, self.weight_decay = store, betas, eps, weight_decay
        self.max_norm, self.ema_decay = max_norm, ema_decay
        self.m, self.v = (store.xp.zeros_like(store.data) for _ in range(2))
        self.ema = store.data.copy()
        self.count = self.skipped = 0

    def decay(self, count: int) -> float:
        """That of the running average in the update after ``count`` others: it follows the weights closely at first."""
        return min(self.ema_decay, (1 + count) / (10 + count))

    def step(self, lr: float) -> float:
        """Update weights and running average from ``store.grad``; returns ‖grad‖ before clipping.

        Where that is not finite nothing is changed but ``skipped``. Raises ValueError for a negative or infinite ``lr``.
        """
        if not 0 <= lr < inf:
            raise ValueError(f"lr must be finite and not negative, not {lr}")
        store = self.store
        norm_sq = kernels.sum_squares(store.grad)
        norm = sqrt(float(norm_sq[0]))
        if not isfinite(norm):
            self.skipped += 1
            return norm
        decay = self.decay(self.count)
        self.count += 1
        kernels.adamw_ema(
            store.data,
            store.grad,
            self.m,
            self.v,
            self.ema,
            lr,
            *self.betas,
            self.eps,
            self.weight_decay,
            self.count,
            decay,
            norm_sq,
            self.max_norm,
        )
        store.refresh()
        return norm

    def state(self) -> dict[str, Array]:
        """The arrays of the state, to be saved; ``count`` and ``skipped`` are the numbers beside them."""
        return {"m": self.m, "v": self.v, "ema": self.ema}

    def load_state(self, arrays: dict[str, Any], count: int, skipped: int = 0) -> None:
        """Take up a saved state. Raises ValueError where an array does not fit."""
        own = self.state()
        for name, array in own.items():
            given = arrays[name]
            if tuple(given.shape) != array.shape or given.dtype != array.dtype:
                raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}, want {array.dtype} {array.shape}")
        for name, array in own.items():
            array[...] = self.store.xp.asarray(arrays[name])
        self.count, self.skipped = count, skipped


def learning_rate(step: int, base: float, warmup: int = 0, total: int | None = None, decay: str = "constant") -> float:
    """base·(step + 1)/warmup, and after the warm-up base times 1, 1 − p or ½(1 + cos πp), p = (step − warmup)/(total − warmup).

    ``step`` is the number of updates made before this one. decay: "constant", "linear" or "cosine"; the last two need ``total``,
    the number of updates of the run. Past ``total`` the rate stays 0. Raises ValueError for arguments out of range.
    """
    if step < 0 or warmup < 0:
        raise ValueError(f"step and warmup must not be negative, not {step} and {warmup}")
    if decay not in ("constant", "linear", "cosine"):
        raise ValueError(f"decay must be 'constant', 'linear' or 'cosine', not {decay!r}")
    if step < warmup:
        return base * (step + 1) / warmup
    if decay == "constant":
        return base
    if total is None or total <= warmup:
        raise ValueError(f"total must be more than warmup = {warmup} for {decay} decay, not {total}")
    p = min(1.0, (step - warmup) / (total - warmup))
    return base * (1 - p if decay == "linear" else (1 + cos(pi * p)) / 2)
