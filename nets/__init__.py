"""Networks: the tape, the differentiable functions, layers, the U-Net, optimisers, checkpoints."""

from .autograd import Tensor, no_grad
from .checkpoint import CheckpointError
from .diffusers import load_diffusers_unet, save_diffusers_unet
from .gradcheck import gradcheck
from .layers import ParameterStore, time_features
from .optim import AdamW, learning_rate
from .unet import UNet

__all__ = [
    "AdamW",
    "CheckpointError",
    "ParameterStore",
    "Tensor",
    "UNet",
    "gradcheck",
    "learning_rate",
    "load_diffusers_unet",
    "no_grad",
    "save_diffusers_unet",
    "time_features",
]
