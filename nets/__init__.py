"""Networks: the tape, the differentiable functions, layers, U-Net, Transformer, MLP, classifiers, derivatives, optimisers."""

from .autograd import Tensor, backward, no_grad
from .checkpoint import CheckpointError
from .classifier import Classifier, cross_entropy
from .diffusers import load_diffusers_unet, save_diffusers_unet
from .gradcheck import gradcheck
from .layers import ParameterStore, time_features
from .mlp import MLP
from .optim import AdamW, learning_rate
from .products import jvp, vjp
from .sequence_classifier import SequenceClassifier
from .transformer import Transformer
from .unet import UNet
from .word_diffusion import WordDiffusion

__all__ = [
    "MLP",
    "AdamW",
    "CheckpointError",
    "Classifier",
    "ParameterStore",
    "SequenceClassifier",
    "Tensor",
    "Transformer",
    "UNet",
    "WordDiffusion",
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
