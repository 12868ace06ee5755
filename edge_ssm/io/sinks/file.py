"""Lines to a file, whole ones only, with rotation; or to standard output."""

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
from edge_ssm.io.sinks.base import Sink, Transport

CLOSE_S = 5.0
"""How long a run that ends waits for a reader of standard output that does not read."""


@dataclass(frozen=True)
class FileOptions:
    """``append``: to what is there; else it is replaced. ``torn``: what becomes of a last line that has no end: "cut"
    off, where the next run makes its decision again; "end"ed, where nobody does, or it is somebody else's.
    ``rotate_bytes``: a file that would grow past it becomes FILE.1 and so on, of which ``keep`` are kept; 0: never.
    """

    append: bool = False
    torn: Literal["cut", "end"] = "cut"
    rotate_bytes: int = 0
    keep: int = 5


REPLACED = FileOptions()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


class _LineFile:
    """An open file that ends with a whole line, whatever happens: what a full disk cut off is taken back."""

    def __init__(self, path: str, options: FileOptions) -> None:
        self._path, self._rotate_bytes, self._keep = path, options.rotate_bytes, options.keep
        self.header = ""
        # Truncated only once it is ours alone. A pipe without a reader is no file to wait for: ENXIO.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
        os.set_blocking(self._fd, True)
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        if self._regular:
            self._hold()
            if not options.append:
                os.ftruncate(self._fd, 0)
        self._size = 0
        if self._regular:
            self._size = os.lseek(self._fd, 0, os.SEEK_END)
            self._mend_torn_line(options.torn)

    def _hold(self) -> None:
        """Nobody else's while we have it: two runs would write into each other's lines. Raises OSError."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise OSError(errno.EBUSY, "another run writes it") from None
        except OSError:
            pass  # a file system without locks

    def _mend_torn_line(self, how: Literal["cut", "end"]) -> None:
        """A power cut leaves half a line, which the next one would be glued to."""
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

    def write(self, content: bytes) -> None:
        if self._regular and self._rotate_bytes and self._size and self._size + len(content) > self._rotate_bytes:
            self._rotate()
        if not self._size:
            content = _encoded(self.header) + content
        sent = 0
        try:
            while sent < len(content):
                sent += os.write(self._fd, content[sent:])
        except OSError:
            if self._regular and sent:
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)
            raise
        self._size += len(content)

    def _rotate(self) -> None:
        """FILE to FILE.1, FILE.1 to FILE.2, the last one away."""
        for i in range(self._keep - 1, 0, -1):
            if os.path.exists(f"{self._path}.{i}"):
                os.replace(f"{self._path}.{i}", f"{self._path}.{i + 1}")
        if self._keep:
            os.replace(self._path, f"{self._path}.1")
        fresh = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.close(self._fd)
        self._fd, self._size = fresh, 0
        self._hold()

    def close(self) -> None:
        os.close(self._fd)


class FileSink(Sink):
    """Each line is handed to the system before ``write`` returns. Raises UsageError if the file can't be written."""

    heads_files = True

    def __init__(self, path: str, options: FileOptions = REPLACED) -> None:
        super().__init__(path)
        self._arguments = (path, options)
        self._file: _LineFile | None = None
        try:
            self._file = _LineFile(*self._arguments)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise UsageError(f"{path}: can't be written ({error.strerror})") from None

    def _opened(self) -> _LineFile:
        """Wait for the reader of a pipe. Raises BrokenPipeError where the run ends before one comes."""
        while self._file is None:
            try:
                self._file = _LineFile(*self._arguments)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                time.sleep(0.05)
                if not self.while_waiting():
                    raise BrokenPipeError(errno.EPIPE, "nobody reads it") from None
        return self._file

    def write(self, text: str) -> None:
        file = self._opened()
        file.header = self.header
        file.write(_encoded(text))
        self.accepted += 1
        self.acknowledged += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class FileTransport(Transport):
    """The same from a queue's thread: a full disk is waited out."""

    heads_files = True

    def __init__(self, path: str, options: FileOptions) -> None:
        self.name = path
        self._arguments = (path, options)
        self._file: _LineFile | None = None
        try:
            self.connect()
        except OSError as error:
            if error.errno == errno.ENXIO:  # a pipe, whose reader may come
                return
            raise UsageError(f"{path}: can't be written ({error.strerror})") from None

    def connect(self) -> None:
        if self._file is None:
            self._file = _LineFile(*self._arguments)

    def send(self, lines: list[str]) -> None:
        assert self._file is not None
        self._file.header = self.header
        self._file.write(_encoded("".join(lines)))

    def close(self) -> None:
        """Nothing: the file stays open across a full disk, and is closed with the process."""


class StandardSink(Sink):
    """Standard output, each line handed to the system before ``write`` returns. Whoever started us may have made it
    one that does not block: then we wait all the same."""

    def __init__(self, fd: int, encoding: str) -> None:
        super().__init__("stdout")
        self._fd, self._encoding = fd, encoding
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)

    def write(self, text: str) -> None:
        content = text.encode(self._encoding, "backslashreplace")
        end = float("inf")
        while content:
            if self._poll.poll(100):
                try:
                    # So much fits into a pipe that poll calls writable.
                    content = content[os.write(self._fd, content[: select.PIPE_BUF]) :]
                except BlockingIOError:
                    time.sleep(0.01)
            elif not self.while_waiting():
                end = min(end, time.monotonic() + CLOSE_S)
                if time.monotonic() >= end:
                    raise BrokenPipeError(errno.EPIPE, "nobody reads it")
        self.accepted += 1
        self.acknowledged += 1

    def close(self) -> None:
        """Nothing: it is the process's."""


def standard() -> StandardSink | None:
    """None where Python's standard output is none of the system's, as in a program that captures it."""
    try:
        return StandardSink(sys.stdout.fileno(), sys.stdout.encoding)
    except (AttributeError, OSError, ValueError):
        return None


class DescriptorTransport(Transport):
    """Standard output from a queue's thread. What a reader that went away leaves can't be delivered again."""

    final = True

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._sink = StandardSink(fd, "utf-8")

    def connect(self) -> None:
        pass

    def send(self, lines: list[str]) -> None:
        self._sink.write("".join(lines))

    def close(self) -> None:
        pass
