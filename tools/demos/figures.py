"""The manner of all demonstrations' pictures: size, colours, letters. Drawn by matplotlib without a screen."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alphabar.tools.command import UserError
from alphabar.tools.files import replacing

WIDTH, DPI = 9.0, 130  # inches
INK, GREY, PALE, BLUE, ORANGE, GREEN = "#1e1e1e", "#8a8a8a", "#dcdcdc", "#1f5ea8", "#d9632b", "#3b8e5a"
DENSITY = "Blues"
STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.titlesize": 11.5,
    "figure.titleweight": "bold",
    "axes.unicode_minus": True,
}


def require() -> None:
    """UserError, saying what to install, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as e:
        raise UserError("the pictures are drawn by matplotlib, which is missing: pip install 'alphabar[plots]'") from e


@contextmanager
def style() -> Iterator[None]:
    """What is drawn in the block has the manner of the house."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def figure(title: str, height: float) -> Any:
    """An empty figure with its title, ``height`` in inches."""
    from matplotlib.figure import Figure

    page = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    page.suptitle(title, x=0.01, ha="left")
    return page


def write(page: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG of at most 256 colours, by a temporary file."""
    import io

    from PIL import Image

    path, raw = Path(path), io.BytesIO()
    page.savefig(raw, format="png")
    with Image.open(raw) as image, replacing(path) as temporary:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)
    return path


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows, header first, as lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]).rstrip() for r in rows]
