"""Where bytes come from: standard input or a file, read as they arrive."""

from __future__ import annotations

import os
from collections.abc import Iterator

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.stream.stop import Stop

BLOCK = 1 << 16


class ByteSource:
    """Blocks of bytes from a path, or from standard input for "-". Raises UsageError if it can't be opened."""

    def __init__(self, path: str) -> None:
        self.name = "stdin" if path == "-" else path
        self._owned = path != "-"
        if path == "-":
            self._fd = 0
            return
        try:
            self._fd = os.open(path, os.O_RDONLY)
            if os.path.isdir(path):
                raise IsADirectoryError(21, "it is a directory")
        except OSError as error:
            raise UsageError(f"{path}: can't be read ({error.strerror})") from None

    def blocks(self, stop: Stop) -> Iterator[bytes]:
        """Until the end of the source or a stop; each block holds what was there, at most 64 KiB."""
        while stop.wait(self._fd):
            try:
                data = os.read(self._fd, BLOCK)
            except OSError as error:
                raise RunFailed(f"{self.name}: reading failed ({error.strerror})") from None
            if not data:
                return
            yield data

    def close(self) -> None:
        if self._owned:
            os.close(self._fd)
