"""Latent diffusion's first stage: vector quantisation with its gradients, and the scaled latent space that diffusion runs in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..kernels.arrays import array_module
from .exchange import Array, exchanged, float_array

BLOCK = 1 << 22  # the most distances that are held at once


def _checked(z: Array, codebook: Array) -> None:
    float_array(codebook, "codebook")
    if z.ndim < 2 or codebook.ndim != 2 or len(codebook) == 0 or z.shape[-1] != codebook.shape[1]:
        raise ValueError(f"z must be (B, …, d) and codebook (K, d) of one d, not {z.shape} and {codebook.shape}")
    if z.dtype != codebook.dtype or z.dtype.kind != "f":
        raise TypeError(f"z is {z.dtype}, codebook is {codebook.dtype}: want one float dtype")


@exchanged
def vector_quantize(z: Array, codebook: Array) -> tuple[Array, Array]:
    """(z_q, k*): the nearest code e_k* of each vector, k* = argmin_k ‖z − e_k‖², and which it is. Eq: S3-C8, L3.

    z (B, …, d), codebook (K, d); z_q is like z, k* int64 (B, …), the smallest where several are as near. z_q stands for
    z + sg[e_k* − z]: what follows sees e_k*, and its gradient goes to z unchanged (straight through). Raises ValueError or
    TypeError where shapes or dtypes do not match.
    """
    _checked(z, codebook)
    xp, flat = array_module(z), z.reshape(-1, z.shape[-1])
    half = (codebook * codebook).sum(axis=1) / 2
    codes = xp.empty(len(flat), np.int64)
    rows = max(1, BLOCK // len(codebook))
    for start in range(0, len(flat), rows):  # ½‖z − e‖² less ½‖z‖²
        codes[start : start + rows] = xp.argmin(half - flat[start : start + rows] @ codebook.T, axis=1)
    return codebook[codes].reshape(z.shape), codes.reshape(z.shape[:-1])


@exchanged
def vq_loss(z: Array, codebook: Array, codes: Array, beta: float = 0.25) -> tuple[Array, Array, Array]:
    """(‖sg[z] − e‖² + β‖z − sg[e]‖² per sample (B,), gradient for z, gradient for the codebook), e = e_k*. Eq: S3-C8, L3.

    Norms are means over the elements of a sample; gradients are those of the batch mean. The first term moves the codes to the
    vectors that chose them, the second (commitment) the encoder's vectors to their codes. ``codes`` (B, …) from
    :func:`vector_quantize`. Raises ValueError or TypeError where arguments do not match, or β is negative.
    """
    _checked(z, codebook)
    if codes.shape != z.shape[:-1] or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers of shape {z.shape[:-1]}, not {codes.dtype} of shape {codes.shape}")
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, not {beta}")
    if z.size == 0:
        raise ValueError(f"z must not be empty, but has shape {z.shape}")
    xp, batch = array_module(z), z.shape[0]
    difference = z - codebook[codes]
    value = (1 + beta) * xp.square(difference).reshape(batch, -1).mean(axis=1)
    gradient = difference * (2 / z.size)
    on_codes = xp.zeros_like(codebook)
    xp.subtract.at(on_codes, codes.reshape(-1), gradient.reshape(-1, z.shape[-1]))
    return value, beta * gradient, on_codes


@dataclass(frozen=True)
class LatentSpace:
    """Where latent diffusion runs: z = E(x)/scale, x = D(scale·z). Eq: S3-C8, S3-C9, L3.

    ``encode`` and ``decode`` map images (B, H, W, C) to latents (B, H/f, W/f, c) and back; ``scale`` (the deviation of E(x) over
    the data) gives z unit variance, for which noise schedules are made. Raises ValueError unless scale is positive.
    """

    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale < np.inf:
            raise ValueError(f"scale must be a positive number, not {self.scale}")

    def to_latent(self, x: Array) -> Array:
        """z = E(x)/scale, to diffuse."""
        return self.encode(x) / self.scale

    def to_image(self, z: Array) -> Array:
        """D(scale·z), of a sampled z_0."""
        return self.decode(self.scale * z)


def latent_shape(image: tuple[int, int, int], factor: int = 8, channels: int = 4) -> tuple[int, int, int]:
    """(H/f, W/f, c) of an image (H, W, C): 512×512×3 gives 64×64×4. Eq: S3-C8.

    Raises ValueError unless the factor divides both sides.
    """
    height, width, _ = image
    if factor < 1 or channels < 1 or height % factor or width % factor:
        raise ValueError(f"factor must divide {height} and {width} and channels be at least 1, not {factor} and {channels}")
    return height // factor, width // factor, channels


class Compression(NamedTuple):
    """How many times smaller a latent is: in numbers, in places (the cost of a convolution), in pairs of places (attention)."""

    numbers: float
    places: float
    pairs: float


def compression(image: tuple[int, ...], latent: tuple[int, ...]) -> Compression:
    """The saving of a latent (H/f, W/f, c) over its image (H, W, C). Eq: S3-C9."""
    places = math.prod(image[:-1]) / math.prod(latent[:-1])
    return Compression(math.prod(image) / math.prod(latent), places, places**2)
