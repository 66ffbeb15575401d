"""Properties of a window of text that can be asked of a sample: it contains a word, or a letter, or so many words."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from alphabar.core.text import ALPHABET, Text, fold
from alphabar.kernels import counter, streams
from alphabar.tools.command import UserError

FORMS = "word:WORD, letter:LETTER or words:LOW-HIGH"
CLASSES = ("no", "yes")
WINDOWS = 200_000  # of a text that are looked at, at most


@dataclass(frozen=True)
class Property:
    """What is asked of a window; called with its letters it says whether they have it. Words are what spaces part."""

    name: str
    word: str = ""
    letter: str = ""
    low: int = 0
    high: int = 0

    def __call__(self, window: str) -> bool:
        if self.letter:
            return self.letter in window
        words = window.split()
        return self.word in words if self.word else self.low <= len(words) <= self.high


def parse(text: str) -> Property:
    """The property that a text such as "word:god" names. UserError for another text."""
    kind, _, what = text.partition(":")
    if kind in ("word", "letter") and what and fold(what) == what and " " not in what:
        if kind == "word":
            return Property(text, word=what)
        if len(what) == 1:
            return Property(text, letter=what)
    if kind == "words":
        low, _, high = what.partition("-")
        if low.isdecimal() and high.isdecimal() and int(low) <= int(high):
            return Property(text, low=int(low), high=int(high))
    raise UserError(f"--property must be {FORMS}, in letters a to z, not {text!r}")


def letters(text: Text) -> str:
    """A whole text as a str."""
    return np.frombuffer(ALPHABET.encode(), np.uint8)[text.tokens].tobytes().decode("ascii")


class Windows:
    """Windows of a text in two classes, those without and with a property, drawn in equal numbers.

    UserError where the text has none of one class. ``share``: of the windows that have it.
    """

    def __init__(self, text: Text, asked: Property, seed: int) -> None:
        there = len(text.tokens) - text.length + 1
        if there <= WINDOWS:
            starts = np.arange(there)
        else:
            starts = counter.integers(WINDOWS, 0, there, seed, 0, streams.ORDER, sample=2)
        whole, length = letters(text), text.length
        has = np.array([asked(whole[s : s + length]) for s in starts.tolist()])
        self.text, self.seed, self.share = text, seed, float(has.mean())
        self.starts = starts[~has], starts[has]
        for found, name in zip(self.starts, ("without", "with"), strict=True):
            if not found.size:
                raise UserError(f"no window of {length} letters of {text.name} ({text.split}) is {name} {asked.name}")

    def batch(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 (size, length), classes (size,) 0, 1, 0, …) of batch ``step``, from (seed, step) alone."""
        labels = np.arange(size) % 2
        starts = np.empty(size, np.int64)
        for c in range(2):
            of_class = labels == c
            n = int(of_class.sum())
            starts[of_class] = self.starts[c][counter.integers(n, 0, len(self.starts[c]), self.seed, step, streams.ORDER, 3 + c)]
        return self.text.tokens[starts[:, None] + np.arange(self.text.length)].astype(np.int32), labels


def share(windows: Any, asked: Property) -> float:
    """The share of some texts that have a property."""
    return float(np.mean([asked(w) for w in windows]))
