"""A bounded queue between the loop and whatever is slow, absent or broken: sampling never waits for a reader."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Literal

from edge_ssm.io.backoff import Backoff
from edge_ssm.io.sinks.base import Sink, Transport

Overflow = Literal["drop-oldest", "drop-newest", "wait"]
OVERFLOWS: tuple[Overflow, ...] = ("drop-oldest", "drop-newest", "wait")
BATCH = 64
"""Lines that one ``Transport.send`` is given at most."""
WAIT_S = 0.1
"""Between two calls of ``while_waiting``."""
CLOSE_S = 5.0
"""How long the end of a run waits for what is queued."""


class QueuedSink(Sink):
    """Lines wait for ``wire`` here, ``size`` at most; then ``overflow`` says which goes (counted), or that the loop
    waits after all. A wire that fails is connected anew with back-off and given the same lines again."""

    def __init__(self, transport: Transport, size: int = 1024, overflow: Overflow = "drop-oldest") -> None:
        super().__init__(transport.name)
        self.size = size
        self._transport, self._overflow = transport, overflow
        self.heads_files = transport.heads_files
        self._lines: deque[tuple[int, str]] = deque()
        self._sending: list[tuple[int, str]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._gone = False
        self._thread = threading.Thread(target=self._deliver, name="outlet", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        with self._changed:
            if self._gone:
                raise BrokenPipeError(32, "the reader went away")
            if len(self._lines) >= self.size:
                self._make_room()
            # What the last block of a run that ends decides is kept beyond the size: it is not much.
            if len(self._lines) < self.size or self._overflow == "wait":
                self._lines.append((self.accepted, text))
            else:
                self.dropped["overflow"] += 1
            self.accepted += 1
            self._account()
            self._changed.notify_all()

    def _make_room(self) -> None:
        if self._overflow == "drop-oldest":
            self._lines.popleft()
            self.dropped["overflow"] += 1
        elif self._overflow == "wait":
            while not self._gone and len(self._lines) >= self.size and self.while_waiting():
                self._changed.wait(WAIT_S)

    def _account(self) -> None:
        self.depth = len(self._lines) + len(self._sending)
        first = self._sending[0] if self._sending else self._lines[0] if self._lines else None
        self.acknowledged = self.accepted if first is None else first[0]

    def _deliver(self) -> None:
        back_off, connected = Backoff(), False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines or self._closing)
                if not self._lines:
                    break
                while self._lines and len(self._sending) < BATCH:
                    self._sending.append(self._lines.popleft())
                self._account()
                self._changed.notify_all()
            lines = [text for _, text in self._sending]
            while True:
                try:
                    if not connected:
                        self._transport.connect()
                        connected = True
                    self._transport.header = self.header
                    self._transport.send(lines)
                    break
                except OSError as error:
                    if not self._failed(error, back_off):
                        return
                    connected = False
            back_off.succeeded()
            with self._changed:
                self.problem = ""
                self._sending = []
                self._account()
                self._changed.notify_all()
        self._transport.close()

    def _failed(self, error: OSError, back_off: Backoff) -> bool:
        """Note it, wait; False: give up, since the run ends or nobody will ever read."""
        self._transport.close()
        self.problem = f"{self.name}: {error.strerror or error}"
        wait = back_off.failed()
        with self._changed:
            if isinstance(error, BrokenPipeError) and self._transport.final:
                self._gone = True
                self._changed.notify_all()
                return False
            if self._closing:
                self._changed.wait(min(wait, 0.2))
            else:
                self._changed.wait_for(lambda: self._closing, wait)
            return not (self._closing and self._give_up_at < time.monotonic())

    _give_up_at = float("inf")

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._give_up_at = time.monotonic() + CLOSE_S
            self._changed.notify_all()
        self._thread.join(CLOSE_S + 1)
        with self._changed:
            if self.depth:
                self.dropped["unsent"] += self.depth
                self._lines.clear()
