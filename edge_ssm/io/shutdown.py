"""SIGINT and SIGTERM as a flag and a file descriptor.

No wait outlives a signal, and no exception interrupts the processing of a sample.
"""

from __future__ import annotations

import os
import select
import signal
from types import FrameType, TracebackType
from typing import Any


class ShutdownSignal:
    """A context in which SIGINT and SIGTERM set ``requested`` instead of ending the process.

    A second signal ends the process. Use it in the main thread only.
    """

    def __init__(self, hangups: bool = False) -> None:
        self.requested = False
        """True once a signal asked for a shutdown."""
        self.hangups = 0
        """Number of SIGHUPs received, with ``hangups``; without it SIGHUP ends the process, as usual."""
        self._counts_hangups = hangups
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        os.set_blocking(self._reader, False)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        self._polled: int | None = None
        """The other descriptor that ``_poll`` watches; it rarely changes."""
        self._previous: dict[int, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> ShutdownSignal:
        """Install the signal handlers."""
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        if self._counts_hangups:
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._on_hangup)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:  # the second request: something is stuck, so let the signal end the process
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        self.hangups += 1

    def wait(self, fd: int | None = None, seconds: float | None = None) -> bool:
        """Wait until ``fd`` can be read or has ended, at most ``seconds`` (None: for ever).

        Return False if a shutdown was requested or the time ran out.
        """
        if fd != self._polled:
            if self._polled is not None:
                self._poll.unregister(self._polled)
            if fd is not None:
                self._poll.register(fd, select.POLLIN)
            self._polled = fd
        if self.requested:
            return False
        ready = [descriptor for descriptor, _ in self._poll.poll(None if seconds is None else max(0.0, seconds) * 1000)]
        if self._reader in ready and not self.requested:
            os.read(self._reader, 512)  # A signal that requests no shutdown must not keep the descriptor ready.
        return not self.requested and fd in ready
