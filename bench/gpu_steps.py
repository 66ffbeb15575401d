"""Whole training and sampling steps of a U-Net as a user of PyTorch writes them for a GPU: eager, or by torch.compile.

Images are channels-last. bf16 is autocast with float32 weights in training, and weights cast to bf16 in sampling. Nothing waits
for the host within a step; AdamW is the fused one, clipping and the running average go over lists of tensors.
"""

from typing import Any

import numpy as np
import torch

from bench.torch_unet import UNet

MODE = "max-autotune"
T = 1000


def set_precision(precision: str) -> None:
    """TF32 for all products of float32, or for none."""
    allowed = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


class Steps:
    """PyTorch's steps for one network of ours, on ``images`` (B, H, W, C) uint8.

    signal, noise: (T + 1,) levels, of which x_t = signal·x0 + noise·ε. precision: "fp32", "tf32" or "bf16".
    """

    def __init__(
        self,
        net: Any,
        images: np.ndarray,
        signal: np.ndarray,
        noise: np.ndarray,
        precision: str,
        device: str = "cuda",
        compiled: bool = False,
        training: bool = True,
        lr: float = 1e-4,
        ema: float = 0.9999,
        clip: float = 1.0,
    ) -> None:
        self.precision, self.device, self.clip, self.decay = precision, device, clip, ema
        set_precision(precision)
        model: Any = UNet(net.config).load(net)
        self.model = model.to(device=device, memory_format=torch.channels_last)
        half = precision == "bf16" and not training
        if half:
            self.model = self.model.to(torch.bfloat16)
        self.cast = torch.bfloat16 if half else torch.float32
        self.images = torch.from_numpy(images).to(device)
        self.signal, self.noise = (torch.from_numpy(np.asarray(v, np.float32)).to(device) for v in (signal, noise))
        if compiled:
            torch.compiler.reset()
        self.call = torch.compile(self.model, mode=MODE, dynamic=False) if compiled else self.model
        if training:
            self.parameters = list(self.model.parameters())
            self.ema = [p.detach().clone() for p in self.parameters]
            self.optimiser = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=device != "cpu")

    def predict(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """ε of NCHW images."""
        return self.call(x, t)

    def train(self) -> torch.Tensor:
        """One training step; the loss stays on the device."""
        set_precision(self.precision)
        x0 = self.images.permute(0, 3, 1, 2).float() / 127.5 - 1
        t = torch.randint(1, len(self.signal), (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        x_t = self.signal[t][:, None, None, None] * x0 + self.noise[t][:, None, None, None] * eps
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            predicted = self.predict(x_t, t)
        loss = torch.nn.functional.mse_loss(predicted.float(), eps)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, 1 - self.decay)
        return loss.detach()

    @torch.inference_mode()
    def sample(self, times: np.ndarray) -> torch.Tensor:
        """DDIM from noise over descending ``times``, to 0; (B, C, H, W)."""
        set_precision(self.precision)
        shape = self.images.permute(0, 3, 1, 2).shape
        x = torch.randn(shape, device=self.device).contiguous(memory_format=torch.channels_last)
        signal, noise = self.signal.tolist(), self.noise.tolist()
        for now, to in zip(times, [*times[1:], 0], strict=True):
            t = torch.full(shape[:1], int(now), device=self.device)
            eps = self.predict(x.to(self.cast), t).float()
            x0 = ((x - noise[now] * eps) / signal[now]).clamp(-1, 1)
            eps = (x - signal[now] * x0) / noise[now]
            x = signal[to] * x0 + noise[to] * eps
        return x
