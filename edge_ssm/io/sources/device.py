"""A device node that may vanish and come back: read through its descriptor, opened anew with back-off."""

from __future__ import annotations

import os
import time
from abc import abstractmethod

from edge_ssm.io.backoff import Backoff
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import BLOCK, Batch, Discontinuity, Source


class DeviceSource(Source):
    """Every opening and every loss is a ``Discontinuity``; of tries that fail for the same reason only the first."""

    def __init__(self, name: str, back_off: Backoff | None = None) -> None:
        self.name = name
        self._back_off = back_off or Backoff()
        self._fd: int | None = None
        self._said = ""

    @abstractmethod
    def _open(self) -> int:
        """A descriptor that does not block. Raises OSError, its ``strerror`` in words for a user."""

    @abstractmethod
    def _close(self, fd: int) -> None: ...

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
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

    def _try(self) -> Discontinuity | None:
        try:
            self._fd = self._open()
        except OSError as error:
            return self._failed(error.strerror or str(error))
        self._said = ""
        return Discontinuity("connected", True)

    def _take(self, fd: int) -> Batch | Discontinuity | None:
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
        return Batch(content)

    def _lost(self, reason: str) -> Discontinuity | None:
        self.close()
        return self._failed(f"lost: {reason}")

    def _failed(self, reason: str) -> Discontinuity | None:
        self._back_off.failed()
        if reason == self._said:
            return None
        self._said = reason
        return Discontinuity(reason, False)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            self._close(fd)
