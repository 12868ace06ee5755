"""Exponential back-off between attempts to reopen a source or sink."""

from __future__ import annotations

import random
import time


class Backoff:
    """The time to wait between attempts.

    0.1 s, doubled after each failure up to ``longest_s``. Each wait is shortened at random by up to a half, so that
    many devices do not come back at the same moment.
    """

    SHORTEST_S = 0.1

    def __init__(self, longest_s: float = 30.0) -> None:
        self._longest_s = longest_s
        self._next_s = self.SHORTEST_S
        self._random = random.Random()
        self._due = 0.0  # time.monotonic() from which the next attempt is allowed

    def record_failure(self) -> float:
        """Note a failed attempt and return the seconds until the next one."""
        wait = self._next_s * self._random.uniform(0.5, 1.0)
        self._next_s = min(2 * self._next_s, self._longest_s)
        self._due = time.monotonic() + wait
        return wait

    def reset(self) -> None:
        """Note a success: the next attempt may be made at once."""
        self._next_s, self._due = self.SHORTEST_S, 0.0

    @property
    def remaining_s(self) -> float:
        """Seconds until the next attempt is allowed."""
        return max(0.0, self._due - time.monotonic())
