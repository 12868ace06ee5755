"""The sender's sequence numbers: what they say about lost, repeated and late samples, and about a new sender."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from edge_ssm.io.messages import Frame
from edge_ssm.io.sources.base import Source
from edge_ssm.runtime.reordering import LONGEST_LOSS, ReorderBuffer

MAX_KNOWN_LOST = 4096
"""Lost numbers that are remembered, the newest ones, to tell late samples from repeated ones."""


class Arrival(msgspec.Struct, frozen=True):
    """What a sequence number says about the sample that carries it."""

    kind: Literal["next", "gap", "repeated", "late", "restarted"]
    """next: no sample is missing. gap: ``missing`` samples are lost. repeated: taken in before. late: taken for lost
    before. restarted: the sender counts anew."""
    missing: int = 0
    previous: int | None = None
    """The last number of the old count, for ``restarted``."""


NEXT = Arrival("next")
REPEATED = Arrival("repeated")
LATE = Arrival("late")


class SequenceTracker:
    """Puts numbered frames in order, and compares each number with the one before it.

    ``reorder`` and ``wait_s`` are those of the source (``Source.reorder``, ``Source.reorder_wait_s``).
    """

    def __init__(self, reorder: int, wait_s: float) -> None:
        self.last: int | None = None
        """Number of the last sample; None if the sender does not number its samples."""
        self._reorder = reorder
        self._buffer = ReorderBuffer(reorder, wait_s)
        self._lost: set[int] = set()

    def in_order(self, frame: Frame) -> Iterator[Frame]:
        """Take a numbered frame in, and yield the frames whose turn it is."""
        return self._buffer.add(frame)

    def overdue(self) -> Iterator[Frame]:
        """Yield the frames that have waited long enough for those before them."""
        return self._buffer.overdue()

    def release(self) -> Iterator[Frame]:
        """Yield all frames that are held back."""
        return self._buffer.release()

    @property
    def buffered(self) -> list[Frame]:
        """The frames that are held back, in order."""
        return self._buffer.frames

    def restart_wait(self) -> None:
        """Let the frames that are held back wait for the whole time from now on."""
        self._buffer.restart_wait()

    def advance(self, number: int) -> Arrival:
        """Compare a number with the last one, which it becomes unless its sample is repeated or late."""
        last = self.last
        if last is None or number == last + 1:
            self.last = number
            return NEXT
        if last - self._reorder < number <= last and not self._starts_anew(number, last):
            if number not in self._lost:
                return REPEATED
            self._lost.discard(number)
            return LATE
        self.last = number
        if number <= last or number - last > LONGEST_LOSS:
            return Arrival("restarted", previous=last)
        older = self._lost if len(self._lost) < MAX_KNOWN_LOST else set()
        self._lost = older | set(range(max(last + 1, number - MAX_KNOWN_LOST), number))
        return Arrival("gap", missing=number - last - 1)

    def _starts_anew(self, number: int, last: int) -> bool:
        """Return whether a number close behind the last one belongs to a new count.

        A new count begins with 0 or 1. A source that repeats unacknowledged samples (MQTT) goes that far back too, and
        states a large ``reorder``.
        """
        return number in (0, 1) and number < last - 1 and self._reorder <= Source.reorder

    def restore(self, last: int | None, buffered: Iterable[Frame]) -> None:
        """Continue after number ``last``, with these frames held back."""
        self.last = last
        self._buffer.restore(last, buffered)
