"""A device node that may vanish and come back: read through its descriptor, opened anew with back-off."""

from __future__ import annotations

import os
import time
from abc import abstractmethod

from edge_ssm.io.backoff import BackOff
from edge_ssm.io.shutdown import Stop
from edge_ssm.io.sources.base import BLOCK, Data, Seam, Source


class DeviceSource(Source):
    """Every opening and every loss is a ``Seam``; of tries that fail for the same reason only the first."""

    def __init__(self, name: str, back_off: BackOff | None = None) -> None:
        self.name = name
        self._back_off = back_off or BackOff()
        self._fd: int | None = None
        self._said = ""

    @abstractmethod
    def _open(self) -> int:
        """A descriptor that does not block. Raises OSError, its ``strerror`` in words for a user."""

    @abstractmethod
    def _close(self, fd: int) -> None: ...

    def read(self, stop: Stop, seconds: float | None) -> Data | Seam | None:
        end = None if seconds is None else time.monotonic() + seconds
        while not stop.requested:
            left = None if end is None else end - time.monotonic()
            if self._fd is not None:
                item = self._take(self._fd) if stop.wait(self._fd, left) else None
            elif self._back_off.left_s:
                item = None
                stop.wait(seconds=min(self._back_off.left_s, self._back_off.left_s if left is None else left))
            else:
                item = self._try()
            if item is not None:
                return item
            if left is not None and left <= 0:
                return None
        return None

    def _try(self) -> Seam | None:
        try:
            self._fd = self._open()
        except OSError as error:
            return self._failed(error.strerror or str(error))
        self._said = ""
        return Seam("connected", True)

    def _take(self, fd: int) -> Data | Seam | None:
        try:
            content = os.read(fd, BLOCK)
        except BlockingIOError:
            return None
        except OSError as error:
            return self._lost(error.strerror or str(error))
        if not content:
            return self._lost("the device is gone")
        # Not on opening: a device that opens and fails at once, again and again, must not be tried without a pause.
        self._back_off.succeeded()
        return Data(content)

    def _lost(self, reason: str) -> Seam | None:
        self.close()
        return self._failed(f"lost: {reason}")

    def _failed(self, reason: str) -> Seam | None:
        self._back_off.failed()
        if reason == self._said:
            return None
        self._said = reason
        return Seam(reason, False)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            self._close(fd)
