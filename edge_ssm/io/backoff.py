"""Exponential back-off between attempts to reopen a source or sink."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class Backoff:
    """Waits between tries: 0.1 s, doubled up to ``longest_s``, each shortened at random by up to a half, so that many
    devices do not come back at once. Success starts anew."""

    SHORTEST_S = 0.1

    def __init__(self, longest_s: float = 30.0) -> None:
        self._longest_s = longest_s
        self._next_s = self.SHORTEST_S
        self._random = random.Random()
        self.due = 0.0
        """time.monotonic() from which the next try is allowed."""

    def failed(self) -> float:
        """Note a failed try; returns the seconds until the next one."""
        wait = self._next_s * self._random.uniform(0.5, 1.0)
        self._next_s = min(2 * self._next_s, self._longest_s)
        self.due = time.monotonic() + wait
        return wait

    def succeeded(self) -> None:
        self._next_s, self.due = self.SHORTEST_S, 0.0

    @property
    def left_s(self) -> float:
        return max(0.0, self.due - time.monotonic())
