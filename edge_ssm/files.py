"""Files that are whole or not there: a kill or a full disk leaves the old content or the new one, never a part.

A symbolic link stays a link: what it leads to is replaced. What is there and is no regular file (a terminal, a pipe,
/dev/null), or is one of this process's own open files (/dev/stdout), is written into as it stands.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MOST_LINKS = 40
"""Of a path, as in the kernel (path_resolution(7))."""


def write(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace ``path`` by way of a temporary file beside it. ``durable``: on disk before this returns, and so after a
    power cut too. Raises OSError; leaves nothing behind."""
    import tempfile

    descriptor = _as_it_stands(path)
    if descriptor is not None:
        with os.fdopen(descriptor, "wb", buffering=0) as stream:
            _write_all(stream.fileno(), content)
        return
    target = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    if durable:  # the new name as well
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check(path: Path) -> None:
    """Before minutes are spent on what ``write`` shall put there. Raises OSError, whose text says what is wrong."""
    import tempfile

    if own_descriptor(path) is not None:
        return
    if (found := _found(path)) is not None and not stat.S_ISREG(found.st_mode):
        _refuse_kind(found)
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return
    # Only trying tells: root is let by os.access where /proc or a read-only file system lets nobody.
    descriptor, temporary = tempfile.mkstemp(dir=Path(os.path.realpath(path)).parent, prefix=".edge-ssm-check.")
    os.close(descriptor)
    os.unlink(temporary)


def own_descriptor(path: Path) -> int | None:
    """The number of this process's open file that ``path`` is a name of, as /dev/stdout is of 1; else None."""
    for _ in range(MOST_LINKS):
        if path.name.isdecimal() and os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd":
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def _found(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _refuse_kind(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, "is a folder")
    if stat.S_ISBLK(found.st_mode):  # A slip of the finger must not cost a disk its partition table.
        raise OSError(errno.EINVAL, "is a block device")


def _as_it_stands(path: Path) -> int | None:
    """A descriptor to write into where the file must not be replaced; None where it may."""
    if (own := own_descriptor(path)) is not None:
        return os.dup(own)
    found = _found(path)
    if found is None or stat.S_ISREG(found.st_mode):
        return None
    _refuse_kind(found)
    return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
