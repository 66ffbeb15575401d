"""What is noted while calls of compiled functions are recorded, whatever library compiled them, or launches of a GPU captured."""

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


capturing: ContextVar[bool] = ContextVar("capturing", default=False)  # whether launches are being captured as a CUDA graph


class NotCapturable(RuntimeError):
    """Something was asked for that a CUDA graph cannot hold."""


def refuse_in_capture(what: str) -> None:
    """NotCapturable where launches are being captured: ``what`` would be done once and not again with the graph."""
    if capturing.get():
        raise NotCapturable(f"{what} while a graph is captured")
