"""The pictures that people look at: sheets of samples and the curve of the loss, as PNG."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.tools.files import replacing

PAPER, INK, GREY, BLUE = (255, 255, 255), (30, 30, 30), (200, 200, 200), (31, 94, 168)
TILE = 56  # pixels that a small image is enlarged to, about


def sheet(images: np.ndarray, columns: int, rows: Sequence[str] = (), title: str = "") -> Any:
    """A picture of images uint8 (N, H, W, C), row by row, each row with its name at the left. Returns a PIL image.

    Small images are enlarged by a whole factor, without smoothing. Of C channels 1 is shown as grey, the first 3 as RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"images must be uint8 (N, H, W, C), N at least 1, not {images.dtype} of shape {images.shape}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    n, height, width, channels = images.shape
    factor = max(1, round(TILE / max(height, width)))
    shown = images[..., :3] if channels >= 3 else np.repeat(images[..., :1], 3, axis=-1)
    shown = shown.repeat(factor, axis=1).repeat(factor, axis=2)
    gap, font = 4, ImageFont.load_default(14)
    left = gap + (max(math.ceil(font.getlength(name)) for name in rows) + 8 if rows else 0)
    top = gap + (24 if title else 0)
    tall, wide = height * factor + gap, width * factor + gap
    lines = -(-n // columns)
    wanted = math.ceil(font.getlength(title)) + 2 * gap if title else 0
    page = Image.new("RGB", (max(left + columns * wide, wanted), top + lines * tall), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((gap, gap), title, INK, font)
    for k, tile in enumerate(shown):
        page.paste(Image.fromarray(np.ascontiguousarray(tile)), (left + k % columns * wide, top + k // columns * tall))
    for k, name in enumerate(rows[:lines]):
        draw.text((gap, top + k * tall + (tall - gap) // 2), name, INK, font, anchor="lm")
    return page


def curve(steps: Sequence[int], values: Sequence[float], title: str) -> Any:
    """A picture of a curve: the values thin, their moving geometric mean thick, on a logarithmic axis. Returns a PIL image."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, right, top, bottom = 800, 400, 64, 24, 40, 36
    page = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    draw.text((left, 12), title, INK, font)
    points = np.array([(s, math.log10(v)) for s, v in zip(steps, values, strict=True) if math.isfinite(v) and v > 0])
    if not len(points):
        return page
    low, high, last = points[:, 1].min() - 0.03, points[:, 1].max() + 0.03, max(points[-1, 0], 1.0)

    def place(step: float, log: float) -> tuple[float, float]:
        return left + step / last * (width - left - right), top + (high - log) / (high - low) * (height - top - bottom)

    digits = (1, 2, 3, 4, 5, 6, 8) if high - low < 1.6 else (1, 2, 5) if high - low < 3 else (1,)
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for log in (exponent + math.log10(d) for d in digits):
            if low <= log <= high:
                y = place(0, log)[1]
                draw.line([(left, y), (width - right, y)], GREY)
                draw.text((left - 6, y), f"{10**log:.3g}", INK, font, anchor="rm")
    unit = 10 ** math.floor(math.log10(last))
    every = unit * next(k for k in (0.1, 0.2, 0.5, 1, 2) if last / (k * unit) <= 10)
    for k in range(int(last / every) + 1):
        draw.text((place(k * every, low)[0], height - bottom + 8), f"{k * every:g}", INK, font, anchor="ma")
    if len(points) > 1:
        draw.line([place(*p) for p in points], GREY, 1)
        reach = [min(k, len(points) - 1 - k, len(points) // 40 + 1) for k in range(len(points))]
        means = [points[k - r : k + r + 1, 1].mean() for k, r in enumerate(reach)]
        draw.line([place(s, m) for s, m in zip(points[:, 0], means, strict=True)], BLUE, 2)
    return page


def write(page: Any, path: str | os.PathLike[str]) -> Path:
    """Write a PIL image as PNG, by a temporary file, so that a viewer never meets half a picture."""
    path = Path(path)
    with replacing(path) as temporary:
        page.save(temporary, format="PNG")
    return path
