"""Latency percentiles of an endless stream, in constant memory.

The histogram has 64 linear buckets in every power of two, the layout of HdrHistogram (hdrhistogram.org) with six
significant bits: a percentile is too high by at most 1/64 = 1.6 % of its value. Maximum, sum and count are exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_BITS = 6
_SUB = 1 << _BITS
RESOLUTION = 1 / _SUB
"""Largest relative error of a percentile: the relative width of a bucket."""


class LatencyHistogram:
    """A histogram of durations in nanoseconds, up to 2^40 (18 minutes). The last bucket holds all longer ones."""

    def __init__(self) -> None:
        self._counts = [0] * (_SUB * (42 - _BITS))
        self.count = 0
        self.sum_ns = 0
        self.max_ns = 0

    def record(self, ns: int) -> None:
        """Add one duration."""
        shift = max(ns.bit_length() - _BITS - 1, 0)
        self._counts[min(shift * _SUB + (ns >> shift), len(self._counts) - 1)] += 1
        self.count += 1
        self.sum_ns += ns
        if ns > self.max_ns:
            self.max_ns = ns

    def record_many(self, ns: npt.NDArray[np.int64]) -> None:
        """Add durations, shape (n,), int64."""
        if not len(ns):
            return
        # The exponent of frexp is the bit length, because durations are far below 2^53.
        shift = np.maximum(np.frexp(np.maximum(ns, 1).astype(np.float64))[1] - _BITS - 1, 0)
        buckets = np.minimum(shift * _SUB + (ns >> shift), len(self._counts) - 1)
        counts = np.bincount(buckets)
        for i in np.flatnonzero(counts):
            self._counts[i] += int(counts[i])
        self.count += len(ns)
        self.sum_ns += int(ns.sum())
        self.max_ns = max(self.max_ns, int(ns.max()))

    def add(self, other: LatencyHistogram) -> None:
        """Add the durations of another histogram."""
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self.count += other.count
        self.sum_ns += other.sum_ns
        self.max_ns = max(self.max_ns, other.max_ns)

    def buckets(self) -> list[tuple[int, int]]:
        """Return (upper edge in nanoseconds, count) of every bucket that is not empty."""
        return [(self._edge(i), n) for i, n in enumerate(self._counts) if n]

    def cumulative(self, edges_ns: Sequence[int]) -> tuple[list[int], int]:
        """Return the number of durations up to each of ``edges_ns`` (ascending), and the number of all durations.

        Both are consistent although another thread may be recording. A number is exact if its edge is the edge of a
        bucket, as 2^k - 1 and 3 * 2^k - 1 are; otherwise the bucket that contains the edge counts as longer.
        """
        counts = self._counts.copy()
        totals = [0] * (len(edges_ns) + 1)
        for i, n in enumerate(counts):
            if n:
                totals[bisect_left(edges_ns, self._edge(i))] += n
        for i in range(1, len(totals)):
            totals[i] += totals[i - 1]
        return totals[:-1], totals[-1]

    @staticmethod
    def _edge(i: int) -> int:
        shift = max(i // _SUB - 1, 0)
        return (((i - shift * _SUB) + 1) << shift) - 1

    def percentile_ns(self, percent: float) -> int:
        """Return the duration that ``percent`` of all durations do not exceed, rounded up to the edge of a bucket.

        0 if the histogram is empty.
        """
        target = self.count * percent / 100
        seen = 0
        for i, n in enumerate(self._counts):
            seen += n
            if n and seen >= target:
                return min(self._edge(i), self.max_ns)
        return 0

    def copy(self) -> LatencyHistogram:
        """Return a copy that further durations do not change."""
        copy = LatencyHistogram()
        copy.add(self)
        return copy

    def since(self, earlier: LatencyHistogram) -> LatencyHistogram:
        """Return the durations recorded since ``earlier`` was copied from this histogram.

        Their maximum is rounded up to the edge of its bucket.
        """
        difference = LatencyHistogram()
        difference._counts = [a - b for a, b in zip(self._counts, earlier._counts, strict=True)]
        difference.count = sum(difference._counts)
        difference.sum_ns = self.sum_ns - earlier.sum_ns
        difference.max_ns = max((edge for edge, _ in difference.buckets()), default=0)
        return difference
