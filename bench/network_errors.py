"""How far a network's float32 outputs and gradients are from float64: alphabar's and PyTorch's beside PyTorch's in double."""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from alphabar.core.losses import simple_loss
from alphabar.nets import load_diffusers_unet
from alphabar.nets.diffusers import CONFIG
from bench import peers
from bench.peers import Example


@dataclass(frozen=True)
class Error:
    """Relative L2 distances: of the output, of all gradients together, and of the parameter that is worst."""

    output: float
    gradient: float
    worst: float


def _ours(folder: Path, e: Example) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    net = peers.ours(folder)
    output = net(e.x_t, e.t, e.y)
    _, gradient = simple_loss(output.data, e.eps)
    output.backward(gradient)
    return output.data.copy(), dict(net.params.gradients())


def _theirs(folder: Path, e: Example, form: torch.memory_format, dtype: torch.dtype) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    model = peers.theirs(folder).to(dtype=dtype, memory_format=form)
    x_t, eps = (torch.from_numpy(a).to(dtype).movedim(-1, 1).contiguous(memory_format=form) for a in (e.x_t, e.eps))
    labels = None if e.y is None else torch.from_numpy(e.y)
    output = model(x_t, torch.from_numpy(e.t - 1), class_labels=labels, return_dict=False)[0]
    torch.nn.functional.mse_loss(output, eps).backward()
    gradients = {name: p.grad.contiguous().numpy() for name, p in model.named_parameters() if p.grad is not None}
    return output.detach().movedim(1, -1).numpy(), _in_our_layout(folder, gradients, e)


def _in_our_layout(folder: Path, gradients: dict[str, np.ndarray], e: Example) -> dict[str, np.ndarray]:
    """Gradients, written and read as if they were weights: layouts and names change, values do not."""
    from safetensors.numpy import save_file

    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "gradients.safetensors"
        save_file({name: np.ascontiguousarray(a) for name, a in gradients.items()}, path)
        dtype = str(next(iter(gradients.values())).dtype)
        net = load_diffusers_unet(folder / CONFIG, path, dtype=dtype, null_class=e.y is not None)
    return dict(net.params.arrays())


def _relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.ravel(a) - np.ravel(b)) / np.linalg.norm(np.ravel(b)))


def _error(found: tuple[np.ndarray, dict[str, np.ndarray]], truth: tuple[np.ndarray, dict[str, np.ndarray]]) -> Error:
    (output, gradients), (exact, wanted) = found, truth
    together = [np.concatenate([g[name].ravel() for name in wanted]) for g in (gradients, wanted)]
    scale = max(float(np.linalg.norm(g)) for g in wanted.values())  # gradients that are zero but for rounding say nothing
    worst = max(_relative(gradients[k], w) for k, w in wanted.items() if np.linalg.norm(w) > 1e-6 * scale)
    return Error(_relative(output, exact), _relative(*together), worst)


def errors(folder: Path, batch: int) -> dict[str, dict[str, float]]:
    """The errors of alphabar and of PyTorch in both memory formats."""
    e = peers.example(folder, batch)
    truth = _theirs(folder, e, torch.contiguous_format, torch.float64)
    found = {
        "alphabar": _ours(folder, e),
        "torch contiguous": _theirs(folder, e, torch.contiguous_format, torch.float32),
        "torch channels last": _theirs(folder, e, torch.channels_last, torch.float32),
    }
    return {name: asdict(_error(f, truth)) for name, f in found.items()}
