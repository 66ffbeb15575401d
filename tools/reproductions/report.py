"""What the parts of the report have in common: settings in, sections of Markdown with pictures out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from alphabar.tools.demos import figures
from alphabar.tools.reproductions.network import Network

Value = TypeVar("Value")
NONE = "–"


@dataclass(frozen=True)
class Settings:
    """What the parts are told: whether to be short, the seed, and the trained network where there is one."""

    quick: bool = False
    seed: int = 0
    network: Network | None = None

    def size(self, full: Value, quick: Value) -> Value:
        """``quick`` in a short run, else ``full``."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Check:
    """A claim, what was published of it, what is found here, and whether the claim has that shape here."""

    claim: str
    found: str
    holds: bool
    published: str = NONE


@dataclass(frozen=True)
class Picture:
    """A figure of matplotlib or an image of PIL with its name, the end of the file's, and what it shows."""

    name: str
    page: Any
    caption: str


@dataclass(frozen=True)
class Section:
    """One part: the documents' claim, paragraphs and tables of Markdown, checks and pictures."""

    claim: str
    body: list[str]
    checks: list[Check]
    pictures: list[Picture] = field(default_factory=list)


def number(value: float) -> str:
    """Three digits, four from 100 up."""
    return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown: header first, the first column to the left, the others to the right."""
    line = "|:--" + "|--:" * (len(rows[0]) - 1) + "|"
    header, *others = map(_row, rows)
    return "\n".join([header, line, *others])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def checks(found: Sequence[Check]) -> str:
    """The checks as a table of Markdown."""
    rows = [["claim", "published", "here", "shape holds"]]
    rows += [[c.claim, c.published, c.found, "yes" if c.holds else "**no**"] for c in found]
    line, header, *others = "|:--|:--|:--|:--|", *map(_row, rows)
    return "\n".join([header, line, *others])


def steps_axis(ax: Any, steps: Sequence[int], label: str = "steps S") -> None:
    """A logarithmic axis of step counts, with those counts for ticks."""
    from matplotlib.ticker import NullFormatter, NullLocator

    ax.set_xscale("log")
    ax.set_xticks(steps, [str(n) for n in steps])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)
    ax.grid(axis="y", color=figures.PALE, lw=0.6)
    ax.set_axisbelow(True)
