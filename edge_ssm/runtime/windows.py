"""Windows over a stream of outputs: which lane runs which window, what is pooled, and when a decision is due.

Tumbling windows need one lane, which is reset at the start of each window, so that a decision equals the offline result
of its window. Overlapping windows (hop < window) are exact too: each of ceil(window / hop) lanes gets every sample, and
is reset at the start of its own windows. With ``carry``, the only lane is never reset, and each window pools its own
span of the outputs.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import msgspec
import numpy as np

from edge_ssm.errors import SnapshotError, UsageError
from edge_ssm.model.network import Array, Network

UNPOOLED_GAP = 100
"""Default longest gap, in samples, of a network without pooling, whose window says nothing about it."""

MAX_OVERLAP = 4096
"""Limit of windows that are open at a time: each needs the state of a lane."""


@dataclass(frozen=True, slots=True)
class ClosedWindow:
    """A window that has ended: samples [start, end) of the stream."""

    start: int
    end: int
    outputs: Array | None
    """Shape (d_output,), float64: pooled outputs. None if every sample of the window was skipped."""
    gaps: int
    """Samples of the window that were filled or skipped."""
    truth: str | None
    """The most frequent true label within the window, if the source has labels."""


Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class WindowsState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Open windows, as a snapshot keeps them. A slot is a place for one open window."""

    sample: Number
    """Number of the next sample."""
    origin: Number
    """Sample at which the first window after the last reset began; windows begin at multiples of the hop from there."""
    opened: Number
    """Windows that were opened since then."""
    starts: list[tuple[Number, Number]]
    """(start, slot) of each open window, oldest first."""
    sums: list[list[float]]
    """Shape (slots, d_output): sum of the outputs."""
    pooled: list[Number]
    """Samples in the sum of each slot."""
    gaps: list[Number]
    """Samples of each slot that were filled or skipped."""
    truth: list[dict[str, Number]]
    """How often each true label occurred, by slot."""


class Windows:
    """The open windows of a stream.

    ``hop`` is the number of samples between two windows (None for the window's length). With ``carry`` the state is
    kept across windows; without pooling it always is, and ``hop`` only thins the outputs. Raises UsageError for a hop
    that is too small or longer than the window.
    """

    def __init__(self, network: Network, hop: int | None = None, carry: bool = False) -> None:
        self.window = network.window
        self.hop = network.window if hop is None else hop
        self.longest_gap = network.window
        """Samples of a gap after which a stream resets, unless a setting says otherwise."""
        self._every = 1
        if network.pooling == "none":
            self.longest_gap = UNPOOLED_GAP
            # There is one output per sample.
            self._every, self.hop, carry = self.hop, 1, True
        if self._every < 1 or not 1 <= self.hop <= self.window:
            raise UsageError(f"hop: {hop} samples, expected 1 to the window's {self.window}")
        self.carry = carry
        self._mean = network.pooling == "mean"
        slots = -(-self.window // self.hop)
        if slots > MAX_OVERLAP:
            raise UsageError(f"hop: {self.hop} samples make {slots} windows overlap, expected {MAX_OVERLAP} at most")
        self.lanes = 1 if carry else slots
        self._sums = np.zeros((slots, network.d_output))
        self._output = np.zeros((slots, network.d_output))
        self._seen = 0
        self._pooled_from = [0] * slots
        """Value of ``_seen``, the number of samples with outputs, when the window of a slot began."""
        self._gaps = np.zeros(slots, dtype=np.int64)
        self._starts: deque[tuple[int, int]] = deque()  # (start, slot), oldest first
        self._truth: list[Counter[str]] = [Counter() for _ in range(slots)]
        self.sample = 0
        """Number of the next sample; skipped samples are numbered too."""
        self._origin = 0
        self._opened = 0

    def until_boundary(self) -> int:
        """Return how many samples may be stepped in one chunk: up to where a window begins or ends."""
        until_begin = self.hop - (self.sample - self._origin) % self.hop
        if not self._starts:
            return min(until_begin, self.window)
        return min(until_begin, self._starts[0][0] + self.window - self.sample)

    def begin(self) -> int | None:
        """Open the window that starts with the next sample, if one does; return the lane to reset, if any."""
        if (self.sample - self._origin) % self.hop:
            return None
        slot = self._opened % len(self._sums)
        self._opened += 1
        self._starts.append((self.sample, slot))
        self._sums[slot] = 0
        self._pooled_from[slot] = self._seen
        self._gaps[slot] = 0
        self._truth[slot].clear()
        return None if self.carry else slot

    def end(self, outputs: Array | None, gap: bool = False, truth: str | None = None) -> ClosedWindow | None:
        """Pool the outputs of a sample; return the window that ends with it, if one does.

        ``outputs`` has shape (lanes, d_output) and is None for a skipped sample. ``gap`` tells that the sample was
        filled or skipped, ``truth`` is its true label.
        """
        if outputs is not None:
            self._seen += 1
            if self._mean:
                self._output[:] = outputs  # adding float32 to float64 takes NumPy twice as long as these two steps
                self._sums += self._output
            else:
                self._sums[:] = outputs
        if gap:
            self._gaps += 1
        if truth is not None:
            for _, open_slot in self._starts:
                self._truth[open_slot][truth] += 1
        self.sample += 1
        if not self._starts or self.sample - self._starts[0][0] < self.window:
            return None
        start, slot = self._starts.popleft()
        if (start - self._origin + 1) % self._every:
            return None
        pooled = self._pooled(slot)
        return ClosedWindow(
            start,
            self.sample,
            self._sums[slot] / pooled if pooled else None,
            int(self._gaps[slot]),
            self._truth[slot].most_common(1)[0][0] if self._truth[slot] else None,
        )

    def _pooled(self, slot: int) -> int:
        """Return how many samples the sum of a slot contains."""
        pooled = self._seen - self._pooled_from[slot]
        return pooled if self._mean else min(pooled, 1)

    def skip(self, samples: int = 1) -> None:
        """Pass over samples between a reset and the next good one: they are numbered, but belong to no window."""
        self.sample += samples
        self._origin = self.sample

    def state(self) -> WindowsState:
        """Return the open windows, for ``restore`` after a restart."""
        return WindowsState(
            self.sample,
            self._origin,
            self._opened,
            list(self._starts),
            self._sums.tolist(),
            [self._pooled(slot) for slot in range(len(self._sums))],
            self._gaps.tolist(),
            [dict(counter) for counter in self._truth],
        )

    def restore(self, state: WindowsState) -> None:
        """Continue with the windows of ``state``. Raises SnapshotError, and changes nothing, if they do not fit."""
        slots, outputs = self._sums.shape
        is_valid = (
            all(len(part) == slots for part in (state.sums, state.pooled, state.gaps, state.truth))
            and all(len(row) == outputs and all(map(math.isfinite, row)) for row in state.sums)
            and len(state.starts) <= slots
            and all(0 <= slot < slots and start <= state.sample for start, slot in state.starts)
            and all(a[0] < b[0] for a, b in pairwise(state.starts))
            and state.origin <= state.sample
        )
        if not is_valid:
            raise SnapshotError("snapshot: its windows are not those of this run (hop, window); start without it")
        self.sample, self._origin, self._opened = state.sample, state.origin, state.opened
        self._starts = deque(state.starts)
        self._sums[:] = state.sums
        self._seen, self._pooled_from = 0, [-pooled for pooled in state.pooled]
        self._gaps[:] = state.gaps
        self._truth = [Counter(counts) for counts in state.truth]

    @property
    def is_idle(self) -> bool:
        """Whether no window is open."""
        return not self._starts

    def restart(self) -> int:
        """Give all open windows up; the next one starts with the next sample. Return how many samples that discards."""
        discarded = self.unfinished
        self._starts.clear()
        self._origin = self.sample
        self._opened = 0
        return discarded

    @property
    def unfinished(self) -> int:
        """Samples since the start of the oldest open window."""
        return self.sample - self._starts[0][0] if self._starts else 0
