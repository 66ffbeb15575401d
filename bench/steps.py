"""One training step and one sampling step of a network, as a user of alphabar and as a user of PyTorch would write them.

Training: forward, mean squared error against the noise, backward, clipping by the global norm, AdamW, running average.
Sampling: prediction of the noise and the ancestral step x ← (x − c·ε)/√α + σ·z with new noise z.
"""

from pathlib import Path
from typing import Any

import numpy as np

from alphabar import kernels
from alphabar.core import schedules
from alphabar.core.losses import simple_loss
from alphabar.core.tables import ddpm
from alphabar.nets import AdamW
from bench import peers
from bench.peers import Example

CLIP, EMA = 1.0, 0.999
ROW = 500  # of the table of all 1000 steps


class Ours:
    """alphabar's steps: its network, its optimiser and a pool, as in tools/trainer.py."""

    def __init__(self, folder: Path, example: Example, lr: float = 1e-5) -> None:
        self.net = peers.ours(folder)
        self.optimiser = AdamW(self.net.params, max_norm=CLIP, ema_decay=EMA)
        self.pool, self.lr = kernels.Pool(), lr
        self.rows = ddpm(schedules.linear(peers.T)).rows(False, True)
        self.load(example)

    def load(self, example: Example) -> None:
        """Take the batch of the next steps."""
        self.e, self.x = example, example.x_t.copy()

    def train(self) -> float:
        """One training step; returns the loss."""
        e = self.e
        with self.pool:
            output = self.net(e.x_t, e.t, e.y)
            value, gradient = simple_loss(output.data, e.eps)
            self.net.params.zero_grad()
            output.backward(gradient)
            self.optimiser.step(self.lr)
            return float(value.mean())

    def sample(self) -> np.ndarray:
        """One sampling step; returns the new state."""
        e = self.e
        with self.pool:
            eps = self.net.predict(e.x_t, e.t, e.y)
            return kernels.step(e.x_t, eps, self.rows, ROW, noise=True, seed=1, out=self.x)


class Theirs:
    """The same with diffusers' network in one memory format: fused AdamW, multi-tensor clipping and running average."""

    def __init__(self, folder: Path, example: Example, form: str, lr: float = 1e-5, compiled: bool = False) -> None:
        import torch

        self.torch, self.form = torch, getattr(torch, form)
        self.model = peers.theirs(folder).to(memory_format=self.form)
        self.parameters = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=True)
        self.call = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.count = 0
        s, t = schedules.linear(peers.T), peers.T - ROW
        signal = float(s.alpha[t]) ** 0.5
        self.a, self.b, self.c = 1 / signal, -float(s.beta[t] / s.noise[t]) / signal, float(s.beta_tilde[t]) ** 0.5
        self.load(example)

    def load(self, example: Example) -> None:
        """Take the batch of the next steps."""
        torch = self.torch

        def image(a: np.ndarray) -> Any:
            return torch.from_numpy(a.copy()).movedim(-1, 1).contiguous(memory_format=self.form)

        self.x_t, self.eps = image(example.x_t), image(example.eps)
        self.t = torch.from_numpy(example.t - 1)  # diffusers counts from 0
        self.y = None if example.y is None else torch.from_numpy(example.y.copy())

    def predict(self) -> Any:
        """The network's output, NCHW."""
        return self.call(self.x_t, self.t, class_labels=self.y, return_dict=False)[0]

    def train(self) -> float:
        """One training step; returns the loss."""
        torch = self.torch
        self.optimiser.zero_grad(set_to_none=True)
        loss = torch.nn.functional.mse_loss(self.predict(), self.eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=True)
        self.optimiser.step()
        decay = min(EMA, (1 + self.count) / (10 + self.count))
        self.count += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - decay)
        return loss.item()

    def sample(self) -> Any:
        """One sampling step; returns the new state."""
        with self.torch.inference_mode():
            eps = self.predict()
            return self.a * self.x_t + self.b * eps + self.c * self.torch.randn_like(self.x_t)
