"""Lines to a file, whole ones only, with rotation; or to standard output."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

from edge_ssm.errors import UsageError
from edge_ssm.stream.outlets.base import Outlet, Wire


class _LineFile:
    """An open file that ends with a whole line, whatever happens: what a full disk cut off is taken back."""

    def __init__(self, path: str, append: bool, rotate_bytes: int, keep: int) -> None:
        self._path, self._rotate_bytes, self._keep = path, rotate_bytes, keep
        # Truncated only once it is ours alone. A pipe without a reader is no file to wait for: ENXIO.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
        os.set_blocking(self._fd, True)
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        if self._regular:
            self._hold()
            if not append:
                os.ftruncate(self._fd, 0)
        self._size = 0
        if self._regular:
            self._size = os.lseek(self._fd, 0, os.SEEK_END)
            self._cut_torn_line()

    def _hold(self) -> None:
        """Nobody else's while we have it: two runs would write into each other's lines. Raises OSError."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise OSError(errno.EBUSY, "another run writes it") from None
        except OSError:
            pass  # a file system without locks

    def _cut_torn_line(self) -> None:
        """A power cut leaves half a line, which the next one would be glued to."""
        with open(self._path, "rb") as file:
            file.seek(max(0, self._size - (1 << 20)))
            tail = file.read()
        if tail and not tail.endswith(b"\n"):
            self._size -= len(tail) - (tail.rfind(b"\n") + 1)
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)

    def write(self, content: bytes) -> None:
        if self._regular and self._rotate_bytes and self._size and self._size + len(content) > self._rotate_bytes:
            self._rotate()
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


class FileOutlet(Outlet):
    """Each line is handed to the system before ``write`` returns. ``append``: to what is there; else it is replaced.

    ``rotate_bytes``: a file that would grow past it becomes FILE.1 and so on, of which ``keep`` are kept; 0: never.
    Raises UsageError if the file can't be written.
    """

    def __init__(self, path: str, append: bool = False, rotate_bytes: int = 0, keep: int = 5) -> None:
        super().__init__(path)
        self._arguments = (path, append, rotate_bytes, keep)
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
        self._opened().write(text.encode("utf-8", "backslashreplace"))
        self.accepted += 1
        self.settled += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class FileWire(Wire):
    """The same from a queue's thread: a full disk is waited out."""

    def __init__(self, path: str, append: bool, rotate_bytes: int, keep: int) -> None:
        self.name = path
        self._arguments = (path, append, rotate_bytes, keep)
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
        self._file.write("".join(lines).encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Nothing: the file stays open across a full disk, and is closed with the process."""


class DescriptorWire(Wire):
    """Standard output from a queue's thread. What a reader that went away leaves can't be delivered again."""

    final = True

    def __init__(self, fd: int, name: str) -> None:
        self.name, self._fd = name, fd

    def connect(self) -> None:
        pass

    def send(self, lines: list[str]) -> None:
        content = "".join(lines).encode("utf-8", "backslashreplace")
        sent = 0
        while sent < len(content):
            sent += os.write(self._fd, content[sent:])

    def close(self) -> None:
        pass
