"""x_0 ~ q(x_0) for discrete states: text as integers, in windows whose order is a function of (seed, step) alone.

A text is folded into 27 letters: lower case, accents stripped, everything outside a–z a single space.
"""

import codecs
import hashlib
import importlib.resources
import lzma
import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from ..kernels.arrays import to_numpy
from ..kernels.counter import integers
from ..kernels.streams import ORDER
from .data import DataError, order

ALPHABET = "abcdefghijklmnopqrstuvwxyz "
MASK = "_"  # how the state after the last letter is written
BUILT_IN = {"kjv": "kjv27.txt.xz"}
SPLITS = ("train", "test", "all")
MAX_BYTES = 1 << 30
CHUNK = 1 << 20
SPACE = ALPHABET.index(" ")
CODES = np.full(256, SPACE, np.uint8)
CODES[np.frombuffer(ALPHABET.encode(), np.uint8)] = np.arange(len(ALPHABET))


@dataclass(frozen=True)
class Text:
    """A text as tokens uint8 (N,), places in ``alphabet``; one example is ``length`` of them in a row."""

    tokens: np.ndarray
    length: int
    name: str = "text"
    split: str = "all"
    alphabet: str = ALPHABET
    labels: ClassVar[None] = None
    classes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        tokens, length = self.tokens, _length(self.length)
        if not isinstance(tokens, np.ndarray) or tokens.dtype != np.uint8 or tokens.ndim != 1:
            raise TypeError("tokens must be a NumPy array uint8 (N,)")
        if not 1 <= len(set(self.alphabet)) == len(self.alphabet) <= 256 or MASK in self.alphabet:
            raise ValueError(f"alphabet must be 1 to 256 different characters without {MASK!r}, not {self.alphabet!r}")
        if len(tokens) < length:
            raise ValueError(f"tokens must be at least {length} (length), not {len(tokens)}")
        if int(tokens.max()) >= self.states:
            raise ValueError(f"tokens must be in 0..{self.states - 1}, not {int(tokens.max())}")

    def __len__(self) -> int:
        """The number of windows of an epoch."""
        return max(1, (len(self.tokens) + 1) // self.length - 1)

    @property
    def states(self) -> int:
        """K, the number of letters."""
        return len(self.alphabet)

    @property
    def shape(self) -> tuple[int]:
        """(length,), that of one window."""
        return (self.length,)

    @property
    def windows(self) -> np.ndarray:
        """The text cut from its first letter on, without overlap: uint8 (N // length, length), a view."""
        n = len(self.tokens) // self.length
        return self.tokens[: n * self.length].reshape(n, self.length)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of alphabet and tokens, as hexadecimal digits."""
        digest = hashlib.sha256(self.alphabet.encode())
        digest.update(np.ascontiguousarray(self.tokens).data)
        return digest.hexdigest()

    def batch(self, step: int, size: int, seed: int = 0, flip: bool = False) -> tuple[np.ndarray, None, np.ndarray]:
        """Batch ``step`` (from 0): tokens int32 (size, length), None for the labels, and the place where each window begins.

        An epoch is len(self) windows side by side from an offset drawn for the epoch, in shuffled order: no letter comes twice in
        it, and fewer than 2·length at the ends of the text do not come. The batch depends on (seed, step) only; batches run
        across the end of an epoch. Raises ValueError for a size below 1, a negative step, or ``flip``, which is for images.
        """
        if flip:
            raise ValueError("flip must be False: text has no mirror image")
        rows = order(len(self), size, step, seed)
        epochs = np.arange(step * size, (step + 1) * size) // len(self)
        starts = rows * self.length
        for e in np.unique(epochs):
            starts[epochs == e] += integers(1, 0, len(self.tokens) - len(self) * self.length + 1, seed, int(e), ORDER, sample=1)
        return self.tokens[starts[:, None] + np.arange(self.length)].astype(np.int32), None, starts

    def encode(self, text: str) -> np.ndarray:
        """``text`` folded into the alphabet, int32 (n,); "_" is the mask, the state after the last letter."""
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        place = {c: i for i, c in enumerate(self.alphabet)} | {MASK: self.states}
        folded = MASK.join(fold(part) for part in text.split(MASK)) if self.alphabet == ALPHABET else text
        unknown = sorted(set(folded) - set(place))
        if unknown:
            raise ValueError(f"text must hold letters of {self.alphabet!r} only, not {''.join(unknown)!r}")
        return np.array([place[c] for c in folded], np.int32)

    def decode(self, tokens: Any) -> str:
        """The letters of ``tokens``, integers (n,) in 0..states; the state after the last letter is written "_"."""
        values = np.asarray(to_numpy(tokens))
        if values.ndim != 1 or (values.dtype.kind not in "iu" and values.size):
            raise TypeError(f"tokens must be integers (n,), not {values.dtype} of shape {values.shape}")
        if values.size and not 0 <= values.min() <= values.max() <= self.states:
            raise ValueError(f"tokens must be in 0..{self.states}, not {values.min()}..{values.max()}")
        letters = self.alphabet + MASK
        return "".join(letters[i] for i in values.tolist())


def fold(text: str) -> str:
    """``text`` in the 27 letters: lower case, accents stripped, each run of other characters one space."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}")
    return "".join(ALPHABET[i] for i in _single_spaces(_codes(text)).tolist())


def load(source: str | os.PathLike[str], split: str = "train", length: int = 256) -> Text:
    """A text file in UTF-8, or one that ships with the package ("kjv"), folded into 27 letters.

    split: "train" is the first 90 % of the letters, "test" the rest, "all" both. length: of a window. Raises DataError with path
    and reason for what cannot be read, is not text, or is too short for one window.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    length, name = _length(length), os.fspath(source)
    if name in BUILT_IN:
        path, tokens = Path(name), _built_in(name)
    else:
        path = Path(name)
        tokens, name = _read(path), path.stem
    cut = len(tokens) * 9 // 10
    part = {"train": tokens[:cut], "test": tokens[cut:], "all": tokens}[split]
    if len(part) < length:
        raise DataError(path, f"its {split} split has {len(part):,} letters, too few for a window of {length:,}")
    return Text(part, length, name, split)


def _length(length: Any) -> int:
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)):
        raise TypeError(f"length must be an int, not {type(length).__name__}")
    if length < 1:
        raise ValueError(f"length must be at least 1, not {length}")
    return int(length)


@lru_cache(maxsize=1)
def _built_in(name: str) -> np.ndarray:
    resource = importlib.resources.files(__package__) / "datasets" / BUILT_IN[name]
    with resource.open("rb") as packed, lzma.open(packed) as f:
        return _tokens(Path(name), f)


def _read(path: Path) -> np.ndarray:
    try:
        status = path.stat()
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        known = "" if path.suffix else f"; the built-in texts are: {', '.join(BUILT_IN)}"
        raise DataError(path, f"{getattr(e, 'strerror', None) or e}{known}") from e
    if not stat.S_ISREG(status.st_mode):
        raise DataError(path, "not a regular file")
    if status.st_size > MAX_BYTES:
        raise DataError(path, f"has {status.st_size:,} bytes, at most {MAX_BYTES:,} are read")
    try:
        with path.open("rb") as f:
            return _tokens(path, f)
    except OSError as e:
        raise DataError(path, e.strerror or str(e)) from e


def _tokens(path: Path, f: "BinaryIO | lzma.LZMAFile") -> np.ndarray:
    """The letters of an open file, read piece by piece; no space at either end."""
    pieces = [_codes(piece) for piece in _pieces(path, f)]
    tokens = _single_spaces(np.concatenate([np.empty(0, np.uint8), *pieces]))
    tokens = tokens[int(tokens[:1].tolist() == [SPACE]) : len(tokens) - int(tokens[-1:].tolist() == [SPACE])]
    tokens.setflags(write=False)
    return tokens


def _pieces(path: Path, f: "BinaryIO | lzma.LZMAFile") -> Iterator[str]:
    """The text, a chunk at a time."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        block = f.read(CHUNK)
        waiting = len(decoder.getstate()[0])  # the bytes of a character that the last chunk cut
        if b"\0" in block:
            raise DataError(path, f"not a text file (a NUL at byte {done + block.index(0):,})")
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            raise DataError(path, f"not UTF-8 text (byte {done - waiting + e.start:,}: {e.reason})") from e
        if not block:
            return
        done += len(block)


def _codes(text: str) -> np.ndarray:
    """A letter for each character that is not an accent, uint8."""
    text = text.lower()
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return CODES[np.frombuffer(text.encode("ascii", "replace"), np.uint8)]


def _single_spaces(tokens: np.ndarray) -> np.ndarray:
    space = tokens == SPACE
    space[1:] &= space[:-1]
    space[:1] = False
    return tokens[~space]
