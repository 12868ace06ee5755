"""A buffer that puts numbered frames back in order where the transport does not keep it.

UDP may reorder datagrams. MQTT should not, but mosquitto 2.0.11 does: when a session resumes, it sends one new message
before all that were waiting. A frame that is ahead of its turn is held back for a while; then what is missing is lost.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable, Iterator

from edge_ssm.io.messages import Frame

LONGEST_LOSS = 1 << 24
"""A sequence number further ahead than this is not a gap: the sender has started to count anew."""
MAX_BUFFERED = 4096


class ReorderBuffer:
    """Frames that are ahead of their turn.

    ``reorder`` is how far a number may lie behind the last one and still belong to the same count. ``wait_s`` is how
    long a frame is held back for those before it; 0 holds nothing back.
    """

    def __init__(self, reorder: int = 0, wait_s: float = 0.0) -> None:
        self._reorder, self._wait_s = reorder, wait_s
        self._heap: list[tuple[int, int, Frame]] = []  # sequence number, order of arrival, frame
        self._arrivals = 0
        self._next: int | None = None
        self._waiting_since = 0.0

    def add(self, frame: Frame) -> Iterator[Frame]:
        """Take a frame in, and yield in order what need not wait any longer."""
        number = frame.sequence
        ahead = 0 if number is None or self._next is None else number - self._next
        if number is None or not self._wait_s or ahead <= 0 or ahead > LONGEST_LOSS:
            if number is not None and (ahead >= 0 or ahead < -self._reorder):
                if ahead:  # The sender counts anew: nothing that comes now can close the old gap.
                    yield from self.release()
                self._next = number + 1
            yield frame
            yield from self._ready()
            return
        if not self._heap:
            self._waiting_since = time.monotonic()
        self._push(number, frame)
        if len(self._heap) > MAX_BUFFERED:
            yield from self.release()

    def overdue(self) -> Iterator[Frame]:
        """Yield the frames that have waited for too long, and all that follow them without a gap."""
        if self._heap and time.monotonic() - self._waiting_since >= self._wait_s:
            self._next = self._heap[0][0]
            yield from self._ready()

    def release(self) -> Iterator[Frame]:
        """Yield all frames, in order."""
        buffered, self._heap = sorted(self._heap), []
        for number, _, frame in buffered:
            self._next = number + 1
            yield frame

    @property
    def frames(self) -> list[Frame]:
        """The frames that are held back, in order."""
        return [frame for _, _, frame in sorted(self._heap)]

    def restore(self, last: int | None, frames: Iterable[Frame]) -> None:
        """Continue after the frame with number ``last``, with ``frames`` held back."""
        self._next = None if last is None else last + 1
        self._heap = []
        for frame in frames:
            if frame.sequence is not None:
                self._push(frame.sequence, frame)
        self.restart_wait()

    def restart_wait(self) -> None:
        """Let the frames that are held back wait for the whole time from now on."""
        self._waiting_since = time.monotonic()

    def _push(self, number: int, frame: Frame) -> None:
        self._arrivals += 1
        heapq.heappush(self._heap, (number, self._arrivals, frame))

    def _ready(self) -> Iterator[Frame]:
        while self._heap and self._next is not None and self._heap[0][0] <= self._next:
            number, _, frame = heapq.heappop(self._heap)
            self._next = max(self._next, number + 1)
            self._waiting_since = time.monotonic()
            yield frame
