"""Standard input, a file, a named pipe or a device node, read as bytes arrive; and a file that grows."""

from __future__ import annotations

import os
import stat
import zlib
from contextlib import suppress

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import BLOCK, Batch, Discontinuity, Source

FOLLOW_S = 0.2
"""How often a followed file is looked at."""
KNOWN_BY = 4096
"""A file is known again by so many bytes before the place where it was left: another one may get the same inode."""


class FileSource(Source):
    """Until its end; ``follow``: past it, as the file grows, is cut short, or is replaced by another of its name (a
    log that is rotated), and for a named pipe past the end of each writer.

    Raises UsageError if it can't be opened.
    """

    live = False

    def __init__(self, path: str, follow: bool = False, block: int = BLOCK) -> None:
        self.name = "stdin" if path == "-" else path
        self._path, self._follow, self._block = path, follow, block
        self._fd = 0
        if path != "-":
            self._fd = self._open()
        kind = os.fstat(self._fd).st_mode
        self._regular = stat.S_ISREG(kind)
        self._offset = 0
        if follow and path == "-":
            raise UsageError("--follow: standard input ends where it ends; give --input FILE")

    def _open(self) -> int:
        try:
            mode = os.stat(self._path).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(21, "it is a directory")
            if not stat.S_ISFIFO(mode):
                return os.open(self._path, os.O_RDONLY)
            # A pipe that we could write to ourselves never ends. Without blocking: a signal must end the wait for a
            # writer, and poll knows of a pipe that nobody has written to yet.
            return os.open(self._path, (os.O_RDWR if self._follow else os.O_RDONLY) | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"{self._path}: can't be read ({error.strerror})") from None

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        if not stop.wait(self._fd, seconds):
            return None
        try:
            content = os.read(self._fd, self._block)
        except BlockingIOError:
            return None
        except OSError as error:
            raise RunFailed(f"{self.name}: reading failed ({error.strerror})") from None
        if content:
            self._offset += len(content)
            return Batch(content)
        if not self._follow:
            self.ended = True
            return None
        return self._renewed(stop, seconds)

    def _renewed(self, stop: ShutdownSignal, seconds: float | None) -> Discontinuity | None:
        """At the end of a followed file: wait a little, and see whether it is still the one of that name."""
        stop.wait(seconds=FOLLOW_S if seconds is None else min(seconds, FOLLOW_S))
        try:
            named = os.stat(self._path)
        except OSError:
            return None  # Between a rename and the next file of that name.
        here = os.fstat(self._fd)
        if self._regular and (named.st_ino, named.st_dev) != (here.st_ino, here.st_dev):
            if here.st_size > self._offset:
                return None  # What the old one still got comes first.
            try:
                replaced = os.open(self._path, os.O_RDONLY)
            except OSError:
                return None
            os.close(self._fd)
            self._fd, self._offset = replaced, 0
            return Discontinuity("the file was replaced", True)
        if self._regular and here.st_size < self._offset:
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._offset = 0
            return Discontinuity("the file was cut short", True)
        return None

    def position(self) -> dict[str, int]:
        if not self._regular:
            return {}
        inode, before = os.fstat(self._fd).st_ino, _before(self._fd, self._offset)
        return {"offset": self._offset, "inode": inode, "read": self._offset, "before": before}

    def seek(self, position: dict[str, int]) -> bool:
        offset, inode, read, before = (position.get(name, -1) for name in ("offset", "inode", "read", "before"))
        if not self._regular or not 0 <= offset <= read or before < 0:
            return False
        if inode != os.fstat(self._fd).st_ino:
            if not self._follow or not self._go_back_to(inode, read, before):
                return False
        elif _before(self._fd, read) != before:
            return False
        os.lseek(self._fd, offset, os.SEEK_SET)
        self._offset = offset
        return True

    def _go_back_to(self, inode: int, read: int, before: int) -> bool:
        """The file was rotated while nobody read: its rest comes first, under whatever name it has now."""
        folder, name = os.path.split(os.path.abspath(self._path))
        with suppress(OSError):
            for entry in os.scandir(folder):
                if entry.inode() == inode and entry.name.startswith(name) and entry.is_file(follow_symlinks=False):
                    old = os.open(entry.path, os.O_RDONLY)
                    if _before(old, read) != before:
                        os.close(old)
                        return False
                    os.close(self._fd)
                    self._fd = old
                    return True
        return False

    def close(self) -> None:
        if self._fd:
            os.close(self._fd)


def _before(fd: int, end: int) -> int:
    """A checksum of what stands before byte ``end``; -1 where the file does not reach so far."""
    if end > os.fstat(fd).st_size:
        return -1
    begin = max(0, end - KNOWN_BY)
    return zlib.crc32(os.pread(fd, end - begin, begin))
