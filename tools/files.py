"""Files that appear under their name when they are whole."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replaceable(path: Path) -> bool:
    """Whether a file may take the place of what is at ``path``: nothing, or a regular file."""
    return not path.exists() or path.is_file()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to: renamed to it at the end of the block, deleted where the block fails.

    OSError where ``path`` is a folder or a device, which a rename would put an end to.
    """
    if not replaceable(path):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
