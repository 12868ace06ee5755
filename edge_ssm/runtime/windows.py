"""Windows over a stream of outputs: which lane runs which window, what is pooled, when a decision falls due.

Tumbling windows need one lane, reset at each window's start, and so give exactly the offline result of that window.
Overlapping ones (hop < window) are exact too: ceil(window / hop) lanes see every sample, each is reset at the start
of its own windows. With ``carry`` one lane is never reset, and each window pools its own span of the one output.
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
"""Longest gap where there is no window to measure it by."""

MAX_OVERLAP = 4096
"""Windows open at a time: each needs a lane's state."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A window that has ended: samples [start, end) of the stream."""

    start: int
    end: int
    outputs: Array | None
    """(d_output,) float64, pooled; None if every sample of the window was skipped."""
    gaps: int
    """Samples of the window that were filled or skipped."""
    truth: str | None
    """The commonest true label within the window, where the source carries labels."""


Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class WindowsState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Open windows, as a snapshot keeps them."""

    sample: Number
    origin: Number
    opened: Number
    starts: list[tuple[Number, Number]]
    """(start, slot), oldest first."""
    sums: list[list[float]]
    """(slots, d_output)"""
    pooled: list[Number]
    gaps: list[Number]
    truth: list[dict[str, Number]]


class Windows:
    def __init__(self, network: Network, hop: int | None = None, carry: bool = False) -> None:
        self.window = network.window
        self.hop = network.window if hop is None else hop
        self.longest_gap = network.window
        """Samples of a gap after which a stream resets, unless told otherwise."""
        self._every = 1
        if network.pooling == "none":
            self.longest_gap = UNPOOLED_GAP
            # An output a sample: the state is carried and hop only thins the outputs.
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
        """``_seen``, the samples with outputs so far, when a slot's window began; what came since, its sum holds."""
        self._gaps = np.zeros(slots, dtype=np.int64)
        self._starts: deque[tuple[int, int]] = deque()  # (start, slot) of the open windows, oldest first
        self._truth: list[Counter[str]] = [Counter() for _ in range(slots)]
        self.sample = 0
        """Number of the next sample; skipped ones count."""
        self._origin = 0
        self._opened = 0

    def together(self) -> int:
        """How many samples from the next one on may be stepped in one go: up to where a window begins or ends."""
        until_begin = self.hop - (self.sample - self._origin) % self.hop
        if not self._starts:
            return min(until_begin, self.window)
        return min(until_begin, self._starts[0][0] + self.window - self.sample)

    def begin(self) -> int | None:
        """Before a sample is stepped: open the window that starts with it. Returns the lane to reset, if any."""
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

    def end(self, outputs: Array | None, gap: bool = False, truth: str | None = None) -> Closed | None:
        """After a sample: pool its outputs (lanes, d_output), or None if it was skipped; the window it ends, if any."""
        if outputs is not None:
            self._seen += 1
            if self._mean:
                self._output[:] = outputs  # float32 added to float64 takes NumPy twice as long as both steps
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
        return Closed(
            start,
            self.sample,
            self._sums[slot] / pooled if pooled else None,
            int(self._gaps[slot]),
            self._truth[slot].most_common(1)[0][0] if self._truth[slot] else None,
        )

    def _pooled(self, slot: int) -> int:
        """Samples whose outputs its sum holds."""
        pooled = self._seen - self._pooled_from[slot]
        return pooled if self._mean else min(pooled, 1)

    def pass_over(self, samples: int = 1) -> None:
        """Samples between a reset and the next good one: they have numbers and belong to no window."""
        self.sample += samples
        self._origin = self.sample

    def state(self) -> WindowsState:
        """All that is open, for ``restore`` after a restart."""
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
        """Go on where ``state`` was taken. Raises SnapshotError, with nothing changed, if it is of other windows."""
        slots, outputs = self._sums.shape
        fits = (
            all(len(part) == slots for part in (state.sums, state.pooled, state.gaps, state.truth))
            and all(len(row) == outputs and all(map(math.isfinite, row)) for row in state.sums)
            and len(state.starts) <= slots
            and all(0 <= slot < slots and start <= state.sample for start, slot in state.starts)
            and all(a[0] < b[0] for a, b in pairwise(state.starts))
            and state.origin <= state.sample
        )
        if not fits:
            raise SnapshotError("snapshot: its windows are not those of this run (hop, window); start without it")
        self.sample, self._origin, self._opened = state.sample, state.origin, state.opened
        self._starts = deque(state.starts)
        self._sums[:] = state.sums
        self._seen, self._pooled_from = 0, [-pooled for pooled in state.pooled]
        self._gaps[:] = state.gaps
        self._truth = [Counter(counts) for counts in state.truth]

    @property
    def resting(self) -> bool:
        """Whether no window is open: the next sample starts one."""
        return not self._starts

    def restart(self) -> int:
        """Give up all open windows; the next one starts with the next sample. Returns how many samples that loses."""
        lost = self.unfinished
        self._starts.clear()
        self._origin = self.sample
        self._opened = 0
        return lost

    @property
    def unfinished(self) -> int:
        """Samples since the start of the oldest open window."""
        return self.sample - self._starts[0][0] if self._starts else 0
