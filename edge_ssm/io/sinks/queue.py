"""A bounded queue between the pipeline and a slow, missing or broken reader: sampling never waits for it."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Literal

from edge_ssm.io.backoff import Backoff
from edge_ssm.io.sinks.base import Sink, Transport, Waiting, keep_waiting

Overflow = Literal["drop-oldest", "drop-newest", "wait"]
OVERFLOWS: tuple[Overflow, ...] = ("drop-oldest", "drop-newest", "wait")
MAX_BATCH = 64
"""Lines per ``Transport.send``."""
WAIT_S = 0.1
"""Seconds between two calls of ``while_waiting``."""
CLOSE_S = 5.0
"""Seconds for which the end of a run waits for the lines in the queue."""


class QueuedSink(Sink):
    """Queues lines for a transport.

    When ``size`` lines wait, ``overflow`` says whether the oldest or the newest is dropped (and counted), or the
    pipeline waits. A transport that fails is reconnected with back-off and given the same lines again.
    """

    def __init__(
        self,
        transport: Transport,
        size: int = 1024,
        overflow: Overflow = "drop-oldest",
        while_waiting: Waiting = keep_waiting,
    ) -> None:
        super().__init__(transport.name, while_waiting)
        self.size = size
        self._transport, self._overflow = transport, overflow
        self.has_file_header = transport.has_file_header
        self._lines: deque[tuple[int, str]] = deque()
        self._sending: list[tuple[int, str]] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._give_up_at = float("inf")
        self._is_reader_gone = False
        self._thread = threading.Thread(target=self._run, name="sink", daemon=True)
        self._thread.start()

    def set_file_header(self, header: str) -> None:
        """Set the line that begins each new file."""
        self._transport.set_file_header(header)

    def write(self, text: str) -> None:
        """Queue one line. Raises BrokenPipeError if the reader is gone for good."""
        with self._changed:
            if self._is_reader_gone:
                raise BrokenPipeError(32, "the reader went away")
            if len(self._lines) >= self.size:
                self._make_room()
            # The decisions of the last batch of a run that ends are kept beyond the size: they are few.
            if len(self._lines) < self.size or self._overflow == "wait":
                self._lines.append((self.accepted, text))
            else:
                self.dropped["overflow"] += 1
            self.accepted += 1
            self._update_counts()
            self._changed.notify_all()

    def _make_room(self) -> None:
        if self._overflow == "drop-oldest":
            self._lines.popleft()
            self.dropped["overflow"] += 1
        elif self._overflow == "wait":
            while not self._is_reader_gone and len(self._lines) >= self.size and self._while_waiting():
                self._changed.wait(WAIT_S)

    def _update_counts(self) -> None:
        self.depth = len(self._lines) + len(self._sending)
        oldest = self._sending[0] if self._sending else self._lines[0] if self._lines else None
        self.acknowledged = self.accepted if oldest is None else oldest[0]

    def _run(self) -> None:
        backoff, is_connected = Backoff(), False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._is_closing)
                if not self._lines:
                    break
                while self._lines and len(self._sending) < MAX_BATCH:
                    self._sending.append(self._lines.popleft())
                self._update_counts()
                self._changed.notify_all()
            lines = [text for _, text in self._sending]
            while True:
                try:
                    if not is_connected:
                        self._transport.connect()
                        is_connected = True
                    self._transport.send(lines)
                    break
                except OSError as error:
                    if not self._wait_after_failure(error, backoff):
                        return
                    is_connected = False
            backoff.reset()
            with self._changed:
                self.problem = ""
                self._sending = []
                self._update_counts()
                self._changed.notify_all()
        self._transport.close()

    def _wait_after_failure(self, error: OSError, backoff: Backoff) -> bool:
        """Report the problem and wait. Return False to give up: the run ends, or nobody will ever read."""
        self._transport.close()
        self.problem = f"{self.name}: {error.strerror or error}"
        wait = backoff.record_failure()
        with self._changed:
            if isinstance(error, BrokenPipeError) and self._transport.is_final:
                self._is_reader_gone = True
                self._changed.notify_all()
                return False
            if self._is_closing:
                self._changed.wait(min(wait, 0.2))
            else:
                self._changed.wait_for(lambda: self._is_closing, wait)
            return not (self._is_closing and self._give_up_at < time.monotonic())

    def close(self) -> None:
        """Wait at most CLOSE_S for the lines in the queue, and count the rest as unsent."""
        with self._changed:
            self._is_closing = True
            self._give_up_at = time.monotonic() + CLOSE_S
            self._changed.notify_all()
        self._thread.join(CLOSE_S + 1)
        with self._changed:
            if self.depth:
                self.dropped["unsent"] += self.depth
                self._lines.clear()
