"""What is noted while calls of compiled functions are recorded, whatever library compiled them."""

from contextvars import ContextVar
from typing import Any, Protocol


class Recorder(Protocol):
    """Takes note of the calls of a run that is to be repeated."""

    def note(self, entry: Any, arguments: tuple) -> None:
        """A compiled function was called with these arguments."""

    def refuse(self, why: str) -> None:
        """Something was done that cannot be repeated."""


active: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def refuse(why: str) -> None:
    """Tell the recorder, if there is one, that something was computed which is not a call of a compiled function."""
    recorder = active.get()
    if recorder is not None:
        recorder.refuse(why)
