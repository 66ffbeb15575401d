"""Compiled code on disk: one file for each signature of a function, in a folder named by the content of the sources.

Numba's own cache looks at the file of a function only, not at those of the functions that it calls, and keeps an index which
two processes at work at once can spoil: each numbers its files from 1, so that an entry may lead to the code of another. Here
the name of the folder is a digest of all sources and of the compiler, the name of a file one of the signature and of the
processor. Nothing is ever stale, two processes write the same or write apart, and other versions may lie beside this one.
"""

import contextlib
import hashlib
import itertools
import os
import pickle
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import binding
from numba.core import bytecode, config, serialize, types
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult

_HERE = Path(__file__).parent
_VERSIONS = 8  # folders of other sources that stay beside this one's
_DIGEST = 32

# Names of symbols end in the number of the function in its process. Code from many processes meets in one: let no two be equal.
bytecode.FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(5), "big"))


def _setting(name: str) -> Any:
    return getattr(config, name)  # which Numba makes when it reads its environment


@cache
def version() -> str:
    """The name of the folder: a digest of all that code is made from and by."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__} {sys.implementation.cache_tag}".encode())
    for path in sorted([*_HERE.glob("*.py"), *_HERE.parent.glob("reference/*.py"), _HERE.parent / "streams.py"]):
        with contextlib.suppress(OSError):  # the source of a frozen program need not be there
            digest.update(path.name.encode() + path.read_bytes())
    return f"alphabar-{digest.hexdigest()[:16]}"


def _user() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if given else Path.home() / (".cache" if platform.system() != "Darwin" else "Library/Caches")


@cache
def folders() -> tuple[Path, ...]:
    """Where compiled code is looked for; the first is where it is kept. Nothing, where nothing can be written.

    It is NUMBA_CACHE_DIR, else ``__pycache__`` beside the sources, else the user's folder for caches. In the last case what
    an administrator compiled beside the sources is still read.
    """
    beside, given = _HERE / "__pycache__", _setting("CACHE_DIR")
    for place in [Path(given)] if given else [beside, _user()]:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
            with contextlib.suppress(OSError):
                os.utime(place / version())
            return tuple(p / version() for p in dict.fromkeys((place, *([] if given else [beside]))))
    return ()


def _sweep(place: Path) -> None:
    """Drop the folders of sources that were not used for longest."""
    with contextlib.suppress(OSError):
        others = sorted(place.glob("alphabar-*"), key=lambda p: p.stat().st_mtime, reverse=True)
        for old in others[_VERSIONS:]:
            shutil.rmtree(old, ignore_errors=True)


def _digest(*parts: bytes) -> bytes:
    return hashlib.sha256(b"\0".join(parts)).digest()


def _identity(value: Any) -> str:
    """What tells a function that a factory made, or a value that it closed over, from another. TypeError where nothing does."""
    f = getattr(value, "py_func", None) or getattr(value, "_defn", None) or value  # of a dispatcher, of an intrinsic
    if isinstance(f, FunctionType):
        cells = ",".join(_identity(c.cell_contents) for c in f.__closure__ or ())
        return f"{f.__module__}.{f.__qualname__}:{f.__code__.co_firstlineno}:{f.__code__.co_code.hex()}({cells})"
    if isinstance(value, tuple):
        return f"({','.join(map(_identity, value))})"
    if value is None or isinstance(value, (bool, int, float, str, np.generic, types.Type)):
        return repr(value)
    raise TypeError(f"{value!r}, closed over by a kernel, has no name that another process knows")


class Kept(_Cache):
    """The cache of one function of this package, as Numba's dispatchers use one."""

    def __init__(self, f: Callable[..., Any], places: tuple[Path, ...]) -> None:
        self._folders = places
        self._name = f"{f.__module__.rpartition('.')[2]}.{f.__qualname__}-{f.__code__.co_firstlineno}"
        self._source = _identity(f).encode()
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(self._folders[0])

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        for path in self._folders[0].glob(f"{self._name}-*"):
            path.unlink(missing_ok=True)

    def _file(self, signature: Any, codegen: Any) -> str:
        key = _digest(repr(signature).encode(), repr(codegen.magic_tuple()).encode(), self._source)
        return f"{self._name}-{key.hex()[:24]}.bin"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        name = self._file(sig, target_context.codegen())
        for folder in self._folders if self._enabled else ():
            with contextlib.suppress(OSError):
                stored = (folder / name).read_bytes()
                if _digest(stored[_DIGEST:]) == stored[:_DIGEST]:  # a file cut short by a crash would end the process
                    return CompileResult._rebuild(target_context, *pickle.loads(stored[_DIGEST:]))
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        if not self._enabled or data.library.has_dynamic_globals:  # those hold addresses of this process
            return
        made = serialize.dumps(data._reduce())
        folder, name = self._folders[0], self._file(sig, data.codegen)
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                _sweep(folder.parent)
            temporary = folder / f".{name}.{os.urandom(6).hex()}"
            try:
                temporary.write_bytes(_digest(made) + made)
                temporary.replace(folder / name)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as e:
            warnings.warn(f"compiled kernels are not kept in {folder}: {e.strerror or e}", stacklevel=2)


def _marker(name: str) -> str:
    host = _setting("CPU_NAME"), _setting("CPU_FEATURES"), binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    return f"{name}-{_digest(repr(host).encode()).hex()[:24]}.ready"


def forget() -> None:
    """Drop all code that is kept of these sources."""
    for folder in folders()[:1]:
        shutil.rmtree(folder, ignore_errors=True)


def mark(name: str) -> None:
    """Note that all code of the kernel ``name`` is kept."""
    for folder in folders()[:1]:
        with contextlib.suppress(OSError):
            (folder / _marker(name)).touch()


def marked(name: str) -> bool:
    """Whether that was noted, or cannot be."""
    return not folders() or any((folder / _marker(name)).exists() for folder in folders())


def keep(dispatcher: Any) -> Any:
    """Let Numba's ``dispatcher`` keep its code in :func:`folders`; returns it."""
    if folders():
        with contextlib.suppress(TypeError):
            dispatcher._cache = Kept(dispatcher.py_func, folders())
    return dispatcher
