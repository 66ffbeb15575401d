"""Progress for people: a bar on a terminal, now and then a line elsewhere, nothing when quiet."""

import shutil
import sys
import time
from typing import Any

EVERY = 10.0  # seconds between two lines where there is no terminal


class Progress:
    """``with Progress("training", total) as bar: … bar.advance()``; ``note`` is what stands behind the bar."""

    def __init__(self, name: str, total: int, done: int = 0, quiet: bool = False, unit: str = "step") -> None:
        self.name, self.total, self.done, self.quiet, self.unit = name, total, done, quiet, unit
        self._bar: Any = None
        self._note = ""
        self._first = done
        self._begun: float | None = None
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> "Progress":
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            width, height = shutil.get_terminal_size((100, 24))  # where a terminal says 0×0, tqdm's own guess hides the bar
            layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]"
            self._bar = tqdm(
                desc=self.name, total=self.total, initial=self.done, bar_format=layout, smoothing=0.05, ncols=width, nrows=height
            )
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self.quiet and self._shown != self._start:
            self._line()

    def note(self, text: str) -> None:
        """Set what stands behind the bar."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def advance(self, by: int = 1) -> None:
        """Count ``by`` more as done. The first one is left out of the speed: kernels are compiled in it."""
        self.done += by
        if self._begun is None:
            self._first, self._begun = self.done, time.monotonic()
            if self._bar is not None:
                self._bar.unpause()
        if self._bar is not None:
            self._bar.update(by)
        elif not self.quiet and time.monotonic() - self._shown > EVERY:
            self._shown = time.monotonic()
            self._line()

    def _line(self) -> None:
        now, counted, left = time.monotonic(), self.done - self._first, ""
        if self._begun is not None and counted:
            left = f", {(now - self._begun) / counted * (self.total - self.done):.0f} s left"
        note = f", {self._note}" if self._note else ""
        print(
            f"{self.name} {self.done:,}/{self.total:,} {self.unit}s, {now - self._start:.0f} s{left}{note}",
            file=sys.stderr,
            flush=True,
        )
