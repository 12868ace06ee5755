"""A device node that may vanish and come back: it is reopened with back-off."""

from __future__ import annotations

import os
import time
from abc import abstractmethod

from edge_ssm.io.backoff import Backoff
from edge_ssm.io.shutdown import ShutdownSignal
from edge_ssm.io.sources.base import MAX_BATCH, Batch, Discontinuity, Source


class DeviceSource(Source):
    """A source that reads the descriptor of a device.

    Each opening and each loss is a ``Discontinuity``; of attempts that fail for the same reason only the first is.
    """

    def __init__(self, name: str, backoff: Backoff | None = None) -> None:
        self.name = name
        self._backoff = backoff or Backoff()
        self._fd: int | None = None
        self._last_problem = ""

    @abstractmethod
    def _open(self) -> int:
        """Return a non-blocking descriptor. Raises OSError with a ``strerror`` fit for a user."""

    @abstractmethod
    def _close(self, fd: int) -> None:
        """Close the descriptor of a device that may have vanished."""

    def read(self, stop: ShutdownSignal, seconds: float | None) -> Batch | Discontinuity | None:
        """Return what the device delivers, opening it if necessary."""
        end = None if seconds is None else time.monotonic() + seconds
        while not stop.requested:
            remaining = None if end is None else end - time.monotonic()
            if self._fd is not None:
                item = self._read_device(self._fd) if stop.wait(self._fd, remaining) else None
            elif wait := self._backoff.remaining_s:
                item = None
                stop.wait(seconds=wait if remaining is None else min(wait, remaining))
            else:
                item = self._try_to_open()
            if item is not None:
                return item
            if remaining is not None and remaining <= 0:
                return None
        return None

    def _try_to_open(self) -> Discontinuity | None:
        try:
            self._fd = self._open()
        except OSError as error:
            return self._failed(error.strerror or str(error))
        self._last_problem = ""
        return Discontinuity("connected", True)

    def _read_device(self, fd: int) -> Batch | Discontinuity | None:
        try:
            content = os.read(fd, MAX_BATCH)
        except BlockingIOError:
            return None
        except OSError as error:
            return self._lost(error.strerror or str(error))
        if not content:
            return self._lost("the device is gone")
        # Not on opening: a device that opens and fails at once, again and again, must not be retried without a pause.
        self._backoff.reset()
        return Batch(content)

    def _lost(self, reason: str) -> Discontinuity | None:
        self.close()
        return self._failed(f"lost: {reason}")

    def _failed(self, reason: str) -> Discontinuity | None:
        self._backoff.record_failure()
        if reason == self._last_problem:
            return None
        self._last_problem = reason
        return Discontinuity(reason, False)

    def close(self) -> None:
        """Close the device."""
        fd, self._fd = self._fd, None
        if fd is not None:
            self._close(fd)
