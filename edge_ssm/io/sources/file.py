"""Standard input, a file (which may grow), a named pipe or a device node, read as bytes arrive."""

from __future__ import annotations

import os
import stat
import zlib
from contextlib import suppress

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.address import Endpoint
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import MAX_BATCH, Batch, Discontinuity, Source, SourceOptions

FOLLOW_S = 0.2
"""Seconds between two looks at a followed file."""
IDENTIFYING_BYTES = 4096
"""A file is recognised by this many bytes before the position: another file may get the same inode."""
PACED_BATCH = 1 << 10
"""Bytes per read of a recording that is played back slowly: snapshots are taken between two reads."""


class FileSource(Source):
    """Reads a file until its end.

    With ``follow`` reading continues past the end, as the file grows, is cut short, or is replaced by another file of
    its name (a rotated log); for a named pipe, past the end of each writer.

    Raises UsageError if the file cannot be opened.
    """

    live = False

    def __init__(self, path: str, follow: bool = False, max_batch: int = MAX_BATCH) -> None:
        self.name = "stdin" if path == "-" else path
        self._path, self._follow, self._max_batch = path, follow, max_batch
        self._fd = 0
        if path != "-":
            self._fd = self._open()
        kind = os.fstat(self._fd).st_mode
        self._is_regular = stat.S_ISREG(kind)
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
            # A pipe that this process could write to itself never ends. Non-blocking, since a signal must end the wait
            # for a writer, and poll handles a pipe that nobody has written to yet.
            return os.open(self._path, (os.O_RDWR if self._follow else os.O_RDONLY) | os.O_NONBLOCK)
        except OSError as error:
            raise UsageError(f"{self._path}: cannot be read ({error.strerror})") from None

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        """Return the next bytes."""
        if not stop.wait(self._fd, seconds):
            return None
        try:
            content = os.read(self._fd, self._max_batch)
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
        return self._check_followed_file(stop, seconds)

    def _check_followed_file(self, stop: ShutdownSignal, seconds: float | None) -> Discontinuity | None:
        """Wait a little at the end of a followed file, then check whether it is still the file of that name."""
        stop.wait(seconds=FOLLOW_S if seconds is None else min(seconds, FOLLOW_S))
        try:
            current = os.stat(self._path)
        except OSError:
            return None  # between a rename and the next file of that name
        opened = os.fstat(self._fd)
        if self._is_regular and (current.st_ino, current.st_dev) != (opened.st_ino, opened.st_dev):
            if opened.st_size > self._offset:
                return None  # The rest of the old file comes first.
            try:
                replaced = os.open(self._path, os.O_RDONLY)
            except OSError:
                return None
            os.close(self._fd)
            self._fd, self._offset = replaced, 0
            return Discontinuity("the file was replaced", True)
        if self._is_regular and opened.st_size < self._offset:
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._offset = 0
            return Discontinuity("the file was cut short", True)
        return None

    def position(self) -> dict[str, int]:
        """Return the offset of the next byte, and what the file is recognised by."""
        if not self._is_regular:
            return {}
        inode, before = os.fstat(self._fd).st_ino, _checksum_before(self._fd, self._offset)
        return {"offset": self._offset, "inode": inode, "read": self._offset, "before": before}

    def seek(self, position: dict[str, int]) -> bool:
        """Go to a ``position`` of an earlier run. Return False if the file is another one or shorter."""
        offset, inode, read, before = (position.get(name, -1) for name in ("offset", "inode", "read", "before"))
        if not self._is_regular or not 0 <= offset <= read or before < 0:
            return False
        if inode != os.fstat(self._fd).st_ino:
            if not self._follow or not self._open_rotated(inode, read, before):
                return False
        elif _checksum_before(self._fd, read) != before:
            return False
        os.lseek(self._fd, offset, os.SEEK_SET)
        self._offset = offset
        return True

    def _open_rotated(self, inode: int, read: int, before: int) -> bool:
        """Open the file under the name that a rotation gave it while nobody read: its rest comes first."""
        folder, name = os.path.split(os.path.abspath(self._path))
        with suppress(OSError):
            for entry in os.scandir(folder):
                if entry.inode() == inode and entry.name.startswith(name) and entry.is_file(follow_symlinks=False):
                    old = os.open(entry.path, os.O_RDONLY)
                    if _checksum_before(old, read) != before:
                        os.close(old)
                        return False
                    os.close(self._fd)
                    self._fd = old
                    return True
        return False

    def close(self) -> None:
        """Close the file, but not standard input."""
        if self._fd:
            os.close(self._fd)


def _checksum_before(fd: int, end: int) -> int:
    """Return a checksum of the bytes before byte ``end``; -1 if the file is shorter."""
    if end > os.fstat(fd).st_size:
        return -1
    begin = max(0, end - IDENTIFYING_BYTES)
    return zlib.crc32(os.pread(fd, end - begin, begin))


def open_endpoint(endpoint: Endpoint, options: SourceOptions) -> FileSource:
    """Open standard input or a file. Raises UsageError."""
    return FileSource(endpoint.text, options.follow, PACED_BATCH if options.is_paced else MAX_BATCH)


def validate_endpoint(endpoint: Endpoint) -> None:
    """Accept any path: the file may appear later."""
