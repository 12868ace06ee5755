"""Sinks for complete lines: a file, with rotation, or standard output."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import sys
import time
from dataclasses import dataclass
from typing import Literal

from edge_ssm.errors import UsageError
from edge_ssm.io.sinks.base import Sink, Transport, Waiting, keep_waiting

CLOSE_S = 5.0
"""Seconds for which a run that ends waits for a reader of standard output that does not read."""


@dataclass(frozen=True)
class FileOptions:
    """How a file is written."""

    append: bool = False
    """True to append to an existing file instead of replacing it."""
    torn: Literal["cut", "end"] = "cut"
    """Treatment of a last line without an end.

    "cut" removes it, for a run that will repeat its decision; "end" adds the newline, if nobody will repeat it or it is
    somebody else's line.
    """
    rotate_bytes: int = 0
    """Size at which the file is renamed to FILE.1, FILE.1 to FILE.2 and so on; 0: never."""
    keep: int = 5
    """Number of renamed files that are kept."""


REPLACED = FileOptions()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


class _LineFile:
    """An open file that always ends with a complete line: a part of a line, on a full disk, is removed again."""

    def __init__(self, path: str, options: FileOptions) -> None:
        self._path, self._rotate_bytes, self._keep = path, options.rotate_bytes, options.keep
        # It is truncated only once it is locked. A pipe without a reader fails with ENXIO instead of blocking.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
        os.set_blocking(self._fd, True)
        self._is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        if self._is_regular:
            self._lock()
            if not options.append:
                os.ftruncate(self._fd, 0)
        self._size = 0
        if self._is_regular:
            self._size = os.lseek(self._fd, 0, os.SEEK_END)
            self._repair_last_line(options.torn)

    def _lock(self) -> None:
        """Lock the file, so that two runs cannot write into each other's lines. Raises OSError."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise OSError(errno.EBUSY, "another run is writing it") from None
        except OSError:
            pass  # a file system without locks

    def _repair_last_line(self, how: Literal["cut", "end"]) -> None:
        """Cut or end an incomplete last line, which a power cut leaves and which the next line would be joined to."""
        with open(self._path, "rb") as file:
            file.seek(max(0, self._size - (1 << 20)))
            tail = file.read()
        if not tail or tail.endswith(b"\n"):
            return
        if how == "end":
            self.write(b"\n")
        else:
            self._size -= len(tail) - (tail.rfind(b"\n") + 1)
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)

    def write(self, content: bytes, header: str = "") -> None:
        """Write complete lines, preceded by the header if the file is empty. Raises OSError."""
        if self._is_regular and self._rotate_bytes and self._size and self._size + len(content) > self._rotate_bytes:
            self._rotate()
        if not self._size:
            content = _encode(header) + content
        written = 0
        try:
            while written < len(content):
                written += os.write(self._fd, content[written:])
        except OSError:
            if self._is_regular and written:
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)
            raise
        self._size += len(content)

    def _rotate(self) -> None:
        """Rename FILE to FILE.1, FILE.1 to FILE.2 and so on, replacing the last one, and begin a new file."""
        for i in range(self._keep - 1, 0, -1):
            if os.path.exists(f"{self._path}.{i}"):
                os.replace(f"{self._path}.{i}", f"{self._path}.{i + 1}")
        if self._keep:
            os.replace(self._path, f"{self._path}.1")
        new = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.close(self._fd)
        self._fd, self._size = new, 0
        self._lock()

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class FileSink(Sink):
    """Writes each line before ``write`` returns. Raises UsageError if the file cannot be written."""

    has_file_header = True

    def __init__(self, path: str, options: FileOptions = REPLACED, while_waiting: Waiting = keep_waiting) -> None:
        super().__init__(path, while_waiting)
        self._arguments = (path, options)
        self._header = ""
        self._file: _LineFile | None = None
        try:
            self._file = _LineFile(*self._arguments)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise UsageError(f"{path}: cannot be written ({error.strerror})") from None

    def set_file_header(self, header: str) -> None:
        """Set the line that begins each new file."""
        self._header = header

    def _open(self) -> _LineFile:
        """Return the file, waiting for the reader of a pipe. Raises BrokenPipeError if the run ends meanwhile."""
        while self._file is None:
            try:
                self._file = _LineFile(*self._arguments)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                time.sleep(0.05)
                if not self._while_waiting():
                    raise BrokenPipeError(errno.EPIPE, "nobody reads it") from None
        return self._file

    def write(self, text: str) -> None:
        """Write one line. Raises OSError."""
        file = self._open()
        file.write(_encode(text), self._header)
        self.accepted += 1
        self.acknowledged += 1

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class FileTransport(Transport):
    """Writes a file from a queue's thread, which waits while the disk is full."""

    has_file_header = True

    def __init__(self, path: str, options: FileOptions) -> None:
        self.name = path
        self._header = ""
        self._arguments = (path, options)
        self._file: _LineFile | None = None
        try:
            self.connect()
        except OSError as error:
            if error.errno == errno.ENXIO:  # a pipe whose reader may come later
                return
            raise UsageError(f"{path}: cannot be written ({error.strerror})") from None

    def set_file_header(self, header: str) -> None:
        """Set the line that begins each new file."""
        self._header = header

    def connect(self) -> None:
        """Open the file if it is not open."""
        if self._file is None:
            self._file = _LineFile(*self._arguments)

    def send(self, lines: list[str]) -> None:
        """Write the lines."""
        assert self._file is not None
        self._file.write(_encode("".join(lines)), self._header)

    def close(self) -> None:
        """Do nothing: the file stays open while the disk is full, and is closed with the process."""


class StandardSink(Sink):
    """Writes each line to standard output before ``write`` returns, even if the descriptor is non-blocking."""

    def __init__(self, fd: int, encoding: str, while_waiting: Waiting = keep_waiting) -> None:
        super().__init__("stdout", while_waiting)
        self._fd, self._encoding = fd, encoding
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, text: str) -> None:
        """Write one line. Raises BrokenPipeError if nobody reads while the run ends."""
        content = text.encode(self._encoding, "backslashreplace")
        end = float("inf")
        while content:
            if self._poll.poll(100):
                try:
                    # A pipe that poll reports as writable takes PIPE_BUF bytes without blocking.
                    content = content[os.write(self._fd, content[: select.PIPE_BUF]) :]
                except BlockingIOError:
                    time.sleep(0.01)
            elif not self._while_waiting():
                end = min(end, time.monotonic() + CLOSE_S)
                if time.monotonic() >= end:
                    raise BrokenPipeError(errno.EPIPE, "nobody reads it")
        self.accepted += 1
        self.acknowledged += 1

    def close(self) -> None:
        """Do nothing: standard output belongs to the process."""


def standard_output(while_waiting: Waiting = keep_waiting) -> StandardSink | None:
    """Return a sink for standard output; None if it exists in Python only, as in a program that captures it."""
    try:
        return StandardSink(sys.stdout.fileno(), sys.stdout.encoding, while_waiting)
    except (AttributeError, OSError, ValueError):
        return None


class DescriptorTransport(Transport):
    """Writes standard output from a queue's thread. A reader that is gone does not come back."""

    is_final = True

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._sink = StandardSink(fd, "utf-8")

    def connect(self) -> None:
        """Do nothing: it is open."""

    def send(self, lines: list[str]) -> None:
        """Write the lines."""
        self._sink.write("".join(lines))

    def close(self) -> None:
        """Do nothing: standard output belongs to the process."""
