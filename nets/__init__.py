"""Networks: the tape, the differentiable functions, layers, U-Net, MLP, classifier, derivatives, optimisers, checkpoints."""

from .autograd import Tensor, backward, no_grad
from .checkpoint import CheckpointError
from .classifier import Classifier, cross_entropy
from .diffusers import load_diffusers_unet, save_diffusers_unet
from .gradcheck import gradcheck
from .layers import ParameterStore, time_features
from .mlp import MLP
from .optim import AdamW, learning_rate
from .products import jvp, vjp
from .unet import UNet

__all__ = [
    "MLP",
    "AdamW",
    "CheckpointError",
    "Classifier",
    "ParameterStore",
    "Tensor",
    "UNet",
    "backward",
    "cross_entropy",
    "gradcheck",
    "jvp",
    "learning_rate",
    "load_diffusers_unet",
    "no_grad",
    "save_diffusers_unet",
    "time_features",
    "vjp",
]
