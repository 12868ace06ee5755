"""Gaps: how time stamps show them, and what stands in for a sample that must not reach the engine."""

from __future__ import annotations

from typing import Literal

import numpy as np

from edge_ssm.model.network import Array
from edge_ssm.runtime.reordering import LONGEST_LOSS

GapPolicy = Literal["hold", "skip", "reset"]
"""hold: repeat the last good values. skip: let the state decay. reset: give the open windows up."""
GAP_POLICIES: tuple[GapPolicy, ...] = ("hold", "skip", "reset")


class TimeStamps:
    """The frames' own time stamps, in seconds, of a source that samples at ``rate_hz``."""

    def __init__(self, rate_hz: float) -> None:
        self.last: float | None = None
        """The last time stamp."""
        self._rate_hz = rate_hz
        self._was_behind = False

    def advance(self, stamp: float) -> int:
        """Return how many samples are missing between the last time stamp and this one.

        A single time stamp that goes back is ignored; a second one in a row is a clock that was set back.
        """
        last = self.last
        if last is not None and stamp < last and not self._was_behind:
            self._was_behind = True
            return 0
        self.last, self._was_behind = stamp, False
        if last is None:
            return 0
        missing = round((stamp - last) * self._rate_hz) - 1
        return missing if 0 < missing < LONGEST_LOSS else 0

    def restore(self, last: float | None) -> None:
        """Continue after the last time stamp of an earlier run."""
        self.last = last


class GapFiller:
    """The gap that the stream is in, if any, and the values that fill it."""

    def __init__(self, policy: GapPolicy, d_input: int) -> None:
        self.policy = policy
        self.values: Array = np.full(d_input, np.nan)
        """Shape (d_input,): the last good value of each channel; NaN before the first."""
        self.length = 0
        """Samples of the gap that have been seen; 0 outside a gap."""
        self.has_reset = False
        """Whether this gap has reset the stream, which now waits for the next good sample."""

    def close(self, values: Array) -> None:
        """End the gap, if there is one, with a good sample."""
        self.values = values
        self.length = 0
        self.has_reset = False

    def extend(self, max_length: int) -> bool:
        """Lengthen the gap by one sample; return whether it must reset the stream now.

        It must if the policy is reset, or if it is longer than ``max_length`` samples; but only once.
        """
        self.length += 1
        if self.has_reset or (self.policy != "reset" and self.length <= max_length):
            return False
        self.has_reset = True
        return True

    def extend_after_reset(self, samples: int) -> None:
        """Lengthen a gap that has reset the stream by any number of samples."""
        self.length += samples

    def fill(self, values: Array, bad: Array) -> Array | None:
        """Return what stands in for ``values``, of which the ``bad`` channels are unusable; None to skip the sample."""
        self.values = np.where(bad, self.values, values)
        if self.policy == "hold" and not np.isnan(self.values).any():
            return self.values
        return None  # also before the first good sample, when there is nothing to hold

    def restore(self, values: Array, length: int, has_reset: bool) -> None:
        """Continue in the gap, if any, of an earlier run."""
        self.values, self.length, self.has_reset = values, length, has_reset
