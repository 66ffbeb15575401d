"""What samples look like to people: images as a sheet, text as lines."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alphabar.tools import pictures, sources
from alphabar.tools.files import replacing

WIDTH = 100  # letters on a line
SUFFIX = {"images": ".png", "text": ".txt"}


def write(data: Any, samples: np.ndarray, columns: int, rows: Sequence[str], title: str, path: Path) -> Path:
    """Write samples of the kind of ``data``, images or tokens, to ``path`` with the suffix of that kind; returns the file."""
    kind = sources.kind(data)
    path = path.with_suffix(SUFFIX[kind])
    if kind == "images":
        return pictures.write(pictures.sheet(samples, columns, rows, title), path)
    return write_text(title, [data.decode(tokens) for tokens in samples], path)


def write_text(title: str, texts: Sequence[str], path: Path) -> Path:
    """Write texts as paragraphs under a title."""
    with replacing(path) as temporary:
        temporary.write_text("\n\n".join([title, *map(paragraph, texts)]) + "\n")
    return path


def paragraph(text: str) -> str:
    """A text in lines; its words are as they were, a space at either end apart."""
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)
