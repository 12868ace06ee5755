"""Safe file access: bounded reads of regular files, and writes that replace a file completely or not at all.

Reading never blocks (a named pipe in a file's place would keep its reader waiting for ever) and never takes more memory
than the caller's limit.

Writing keeps the old content or brings the new one, never a part of it, whatever a kill or a full disk interrupts. A
symbolic link stays a link: its target is replaced. An existing file that is not a regular file (a terminal, a pipe,
/dev/null), or that is one of this process's own open files (/dev/stdout), is written to directly.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from edge_ssm.errors import EdgeSSMError, InputRefused

MAX_LINKS = 40
"""Symbolic links followed in one path, as in the kernel (path_resolution(7))."""
MAX_SECRET_BYTES = 1 << 16
"""Largest file that ``read_first_line`` reads."""
NOT_REGULAR = "not a regular file"


def open_regular_file(path: str | os.PathLike[str], follow_symlinks: bool = True) -> BinaryIO:
    """Open a regular file for reading, without blocking.

    Raises OSError, with a ``strerror`` fit for a message, for anything else; without ``follow_symlinks`` also for a
    symbolic link.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_symlinks else os.O_NOFOLLOW)
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except IsADirectoryError:
        raise OSError(errno.EISDIR, NOT_REGULAR) from None
    except ValueError as error:  # a path with a zero byte
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, NOT_REGULAR)
    return file


def read_at_most(file: BinaryIO, limit_bytes: int) -> bytes:
    """Return the content of an open regular file. Raises OSError if it is longer than ``limit_bytes``."""
    size = os.fstat(file.fileno()).st_size
    content = b"" if size > limit_bytes else file.read(size + 1)
    if len(content) > size:  # It grew, or it is a file of /proc or /sys, whose size is unknown.
        content += file.read(limit_bytes + 1 - len(content))
    if max(size, len(content)) > limit_bytes:
        raise OSError(errno.EFBIG, f"larger than {limit_bytes} bytes")
    return content


def read_regular_file(
    path: str | os.PathLike[str],
    limit_bytes: int,
    *,
    error: type[EdgeSSMError] = InputRefused,
    remedy: str = "",
) -> bytes:
    """Return the content of a regular file of at most ``limit_bytes``.

    Raises ``error`` with one line that names the path, the problem, and ``remedy``: what the file should be, or what
    to do about it.
    """
    try:
        with open_regular_file(path) as file:
            return read_at_most(file, limit_bytes)
    except OSError as failure:
        raise error(f"{os.fspath(path)}: {read_problem(failure)}{remedy and f'; {remedy}'}") from None


def read_problem(failure: OSError) -> str:
    """Return in words why a file could not be read, from an error of the functions above."""
    problem = failure.strerror or str(failure)
    is_complete = problem == NOT_REGULAR or failure.errno == errno.EFBIG
    return problem if is_complete else f"cannot be read ({problem})"


def read_first_line(path: str | os.PathLike[str]) -> str:
    """Return the first line of a UTF-8 text file, such as a password or a token, without its end.

    Raises OSError with a readable ``strerror``.
    """
    with open_regular_file(path) as file:
        content = read_at_most(file, MAX_SECRET_BYTES)
    try:
        return content.decode().partition("\n")[0].removesuffix("\r")
    except UnicodeDecodeError:
        raise OSError(errno.EILSEQ, "not UTF-8 text") from None


def write(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace ``path`` atomically, by renaming a temporary file beside it.

    With ``durable`` the content is on disk before this returns, so that it survives a power cut too. Raises OSError
    and then leaves nothing behind.
    """
    import tempfile

    descriptor = _open_for_direct_write(path)
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
    if durable:  # The new name has to reach the disk as well.
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_writable(path: Path) -> None:
    """Check that ``write`` will be able to write ``path``, before minutes are spent on its content.

    Raises OSError whose text says what is wrong.
    """
    import tempfile

    if own_descriptor(path) is not None:
        return
    if (status := _stat(path)) is not None and not stat.S_ISREG(status.st_mode):
        _refuse_kind(status)
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return
    # Only an attempt is conclusive: os.access grants root what /proc or a read-only file system denies to everybody.
    descriptor, temporary = tempfile.mkstemp(dir=Path(os.path.realpath(path)).parent, prefix=".edge-ssm-check.")
    os.close(descriptor)
    os.unlink(temporary)


def own_descriptor(path: Path) -> int | None:
    """Return the number of this process's open file that ``path`` names (1 for /dev/stdout); None if there is none."""
    for _ in range(MAX_LINKS):
        if path.name.isdecimal() and os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd":
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _refuse_kind(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EISDIR, "is a folder")
    if stat.S_ISBLK(status.st_mode):  # A slip of the finger must not cost a disk its partition table.
        raise OSError(errno.EINVAL, "is a block device")


def _open_for_direct_write(path: Path) -> int | None:
    """Return a descriptor to write to where the file must not be replaced; None where it may be."""
    if (own := own_descriptor(path)) is not None:
        return os.dup(own)
    status = _stat(path)
    if status is None or stat.S_ISREG(status.st_mode):
        return None
    _refuse_kind(status)
    return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)


def _write_all(descriptor: int, content: bytes) -> None:
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]
