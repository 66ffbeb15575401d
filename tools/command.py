"""What the command-line programs share: one-line errors with exit code 2, and where a computation runs."""

import argparse
import contextlib
import errno
import functools
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Protocol

import numpy as np

from alphabar.core.data import DataError
from alphabar.kernels.compiling import told
from alphabar.kernels.device_memory import OutOfDeviceMemory, memory_told
from alphabar.nets.checkpoint import CheckpointError
from alphabar.tools.compiling import Told
from alphabar.tools.config import ConfigError
from alphabar.tools.files import replaceable

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # why a write to stdout fails, a reader gone away apart


class UserError(Exception):
    """A mistake of the user's: shown in one line, no traceback, exit code 2."""


class Failure(Exception):
    """Something that went wrong through no mistake in the arguments: shown in one line, exit code 1."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors and no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows the options)")


class Main(Protocol):
    """A program: takes its arguments (those of the process by default), returns the exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def program(name: str) -> Callable[[Main], Main]:
    """Decorates main(argv) -> exit code of ``alphabar name``: errors become one line on stderr and the exit code 2 (or 1)."""

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def guarded(argv: Sequence[str] | None = None) -> int:
            if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII terminal shows × as \xd7 rather than nothing
                sys.stdout.reconfigure(errors="backslashreplace")
            try:
                arguments = sys.argv[1:] if argv is None else argv
                with warnings.catch_warnings(), told(Told(name, quiet="--quiet" in arguments)), memory_told():
                    warnings.showwarning = functools.partial(_warn, name)
                    code = main(arguments)
                sys.stdout.flush()
                return code
            except SystemExit as e:  # --help
                return e.code if isinstance(e.code, int) else 0
            except (UserError, ConfigError, DataError, CheckpointError) as e:
                return complain(name, e, 2)
            except Failure as e:
                return complain(name, e, 1)
            except ValueError as e:
                if not from_environment(e):
                    raise
                return complain(name, e, 2)
            except OutOfDeviceMemory as e:
                return complain(name, f"{e} (a smaller --batch takes less)", 1)
            except MemoryError:
                return complain(name, "not enough memory", 1)
            except BrokenPipeError:
                sys.stderr.close()
                return 141
            except OSError as e:
                if e.errno not in FULL or e.filename is not None:
                    raise
                _silence()
                return complain(name, f"the output could not be written ({e.strerror})", 1)
            except KeyboardInterrupt:
                return complain(name, "interrupted", 130)

        return guarded

    return decorate


def _silence() -> None:
    """Stdout to nowhere, so that what is left in its buffer does not fail again when the process ends."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def from_environment(e: Exception) -> bool:
    """Whether an error is about a variable of the environment, which a kernel notices when it first runs."""
    return str(e).startswith("ALPHABAR_")


def _warn(name: str, message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"alphabar {name}: warning: {message}", file=sys.stderr)


def complain(name: str, reason: Any, code: int) -> int:
    """One line on stderr; returns ``code``."""
    text = " ".join(str(reason).split())
    shown = text.encode("utf-8", "backslashreplace").decode()
    print(f"alphabar {name}: error: {shown}", file=sys.stderr)
    return code


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number in low..high."""

    def parse(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {f'at least {low}' if high is None else f'in {low}..{high}'}, not {value}")
        return value

    parse.__name__ = "whole number"
    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number in low..high."""

    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be in {low}..{high}, not {text}")
        return value

    parse.__name__ = "number"
    return parse


def outputs(given: list[Path] | None, usual: Sequence[str], suffixes: Sequence[str] = (".h5", ".png")) -> dict[str, Path]:
    """The files that --out names, by their suffix, or the ``usual`` ones. UserError for one that cannot be."""
    found: dict[str, Path] = {}
    for path in given or map(Path, usual):
        suffix = path.suffix.lower()
        if suffix not in suffixes:
            raise UserError(f"--out must end in {' or '.join(suffixes)}, not {str(path)!r}")
        if suffix in found:
            raise UserError(f"--out names two {suffix} files")
        found[suffix] = output(path)
    return found


def output(path: Path) -> Path:
    """The file that --out names. UserError where its folder is missing, or where it is there and not a plain file."""
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}")
    if not replaceable(path):
        raise UserError(f"--out {path}: is not a regular file")
    return path


def device(text: str) -> tuple[ModuleType, str]:
    """(numpy or cupy, "cpu" or "cuda:N") for auto, cpu, cuda or cuda:N. UserError where that device is not there."""
    kind, colon, number = text.partition(":")
    if text == "cpu" or (text == "auto" and not _gpu_there()):
        return np, "cpu"
    if text != "auto" and (kind != "cuda" or (colon and not (number.isascii() and number.isdigit()))):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, not {text!r}")
    index = int(number) if number else 0
    try:
        return _gpu(index), f"cuda:{index}"
    except (ImportError, RuntimeError) as e:
        raise UserError(f"--device {text}: {e}") from e


def _gpu(index: int) -> ModuleType:
    from alphabar.kernels.compile import require_gpu

    cupy = require_gpu(index)
    cupy.cuda.Device(index).use()
    return cupy


def _gpu_there() -> bool:
    try:
        _gpu(0)
    except (ImportError, RuntimeError):
        return False
    return True
