"""Who is told that a kernel is being compiled: nobody, unless a program asks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Listener(Protocol):
    """What wants to know. Calls come in pairs and may be nested: a kernel may have others compiled that it is made of."""

    def begin(self, name: str) -> None: ...

    def end(self, name: str) -> None: ...


_listeners: list[Listener] = []


@contextmanager
def told(listener: Listener) -> Iterator[None]:
    """Within the block ``listener`` is told of every kernel that is compiled in this process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def begin(name: str) -> None:
    """Kernel ``name`` is going to be compiled."""
    for listener in tuple(_listeners):
        listener.begin(name)


def end(name: str) -> None:
    """Kernel ``name`` is ready, or cannot be compiled."""
    for listener in tuple(_listeners):
        listener.end(name)


@contextmanager
def compiling(name: str) -> Iterator[None]:
    """The block compiles kernel ``name``, or finds it compiled already."""
    begin(name)
    try:
        yield
    finally:
        end(name)
