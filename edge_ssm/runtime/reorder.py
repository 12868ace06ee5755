"""Frames whose sender numbers them, put back in order where the way here does not keep it.

UDP may overtake. MQTT should not, but mosquitto 2.0.11 does: once a session is taken up again, one new message comes
before all that waited. A frame that is ahead of its turn is held back for a while; then what is missing is lost.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator

from edge_ssm.io.messages import Frame

LONGEST_LOSS = 1 << 24
"""A sequence number further ahead is no gap: the sender counts anew."""
MOST_HELD = 4096


class Ordering:
    """``reorder``: how far behind a number may be and still be of the same count. ``wait_s``: how long a frame is held
    back for those before it; 0: never."""

    def __init__(self, reorder: int = 0, wait_s: float = 0.0) -> None:
        self._reorder, self._wait_s = reorder, wait_s
        self._held: list[tuple[int, int, Frame]] = []  # a heap: sequence number, tie-breaker, frame
        self._coming = 0
        self._next: int | None = None
        self._since = 0.0

    def take(self, frame: Frame) -> Iterator[Frame]:
        """What may go on with ``frame``, in order."""
        number = frame.sequence
        ahead = 0 if number is None or self._next is None else number - self._next
        if number is None or not self._wait_s or ahead <= 0 or ahead > LONGEST_LOSS:
            if number is not None and (ahead >= 0 or ahead < -self._reorder):
                if ahead:  # the sender counts anew: nothing will come that closes the old gap
                    yield from self.release()
                self._next = number + 1
            yield frame
            yield from self._ready()
            return
        if not self._held:
            self._since = time.monotonic()
        self._coming += 1
        heapq.heappush(self._held, (number, self._coming, frame))
        if len(self._held) > MOST_HELD:
            yield from self.release()

    def _ready(self) -> Iterator[Frame]:
        while self._held and self._next is not None and self._held[0][0] <= self._next:
            number, _, frame = heapq.heappop(self._held)
            self._next = max(self._next, number + 1)
            self._since = time.monotonic()
            yield frame

    def overdue(self) -> Iterator[Frame]:
        """What has been held back for too long, and all that follows it without a gap."""
        if self._held and time.monotonic() - self._since >= self._wait_s:
            self._next = self._held[0][0]
            yield from self._ready()

    def release(self) -> Iterator[Frame]:
        """All that is held back, in order."""
        held, self._held = sorted(self._held), []
        for number, _, frame in held:
            self._next = number + 1
            yield frame

    @property
    def held(self) -> list[Frame]:
        return [frame for _, _, frame in sorted(self._held)]

    def go_on(self, last: int | None, held: list[Frame]) -> None:
        """Where an earlier run was: the number of its last frame, and what it held back."""
        self._next = None if last is None else last + 1
        self._held = []
        for frame in held:
            if frame.sequence is not None:
                self._coming += 1
                heapq.heappush(self._held, (frame.sequence, self._coming, frame))
        self._since = time.monotonic()
