"""SIGINT and SIGTERM as a flag and a file descriptor: no wait outlives them, no sample is torn by an exception."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType, TracebackType
from typing import Any


class ShutdownSignal:
    """While entered, the two signals set ``requested`` instead of ending the process; a second one ends it.

    For the main thread only.
    """

    def __init__(self, hangups: bool = False) -> None:
        self.requested = False
        self.hangups = 0
        """How often SIGHUP came; without ``hangups`` it ends the process, as ever."""
        self._counts_hangups = hangups
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        os.set_blocking(self._reader, False)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        self._polled: int | None = None
        """The other descriptor that ``_poll`` looks at; it is the same one nearly always."""
        self._previous: dict[int, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> ShutdownSignal:
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        if self._counts_hangups:
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._on_hangup)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:  # asked twice: something is stuck, let the signal do what it does
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.requested = True

    def _on_hangup(self, number: int, frame: FrameType | None) -> None:
        self.hangups += 1

    def wait(self, fd: int | None = None, seconds: float | None = None) -> bool:
        """Wait until ``fd`` can be read (or has ended), at most ``seconds``. False: stopped, or time ran out."""
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
            os.read(self._reader, 512)  # A signal that asks for no stop must not keep the descriptor ready.
        return not self.requested and fd in ready
