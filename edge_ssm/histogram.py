"""Latency percentiles of a stream that never ends, in constant memory.

A histogram with 64 linear buckets in every power of two: a percentile is off by at most 1/64 = 1.6 % of its value
(the layout of HdrHistogram, hdrhistogram.org, with six significant bits). Maximum, sum and count are exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from edge_ssm.model.network import Array

_BITS = 6
_SUB = 1 << _BITS
RESOLUTION = 1 / _SUB
"""Of a percentile, as a part of it: how wide a bucket may be."""


class LatencyHistogram:
    """Durations in nanoseconds, up to 2^40 (18 minutes; longer ones count in the last bucket)."""

    def __init__(self) -> None:
        self._counts = [0] * (_SUB * (42 - _BITS))
        self.count = 0
        self.sum_ns = 0
        self.max_ns = 0

    def record(self, ns: int) -> None:
        shift = max(ns.bit_length() - _BITS - 1, 0)
        self._counts[min(shift * _SUB + (ns >> shift), len(self._counts) - 1)] += 1
        self.count += 1
        self.sum_ns += ns
        if ns > self.max_ns:
            self.max_ns = ns

    def record_many(self, ns: Array) -> None:
        """(n,) int64."""
        if not len(ns):
            return
        # frexp's exponent is the bit length: durations lie far below 2^53.
        shift = np.maximum(np.frexp(np.maximum(ns, 1).astype(np.float64))[1] - _BITS - 1, 0)
        buckets = np.minimum(shift * _SUB + (ns >> shift), len(self._counts) - 1)
        found = np.bincount(buckets)
        for i in np.flatnonzero(found):
            self._counts[i] += int(found[i])
        self.count += len(ns)
        self.sum_ns += int(ns.sum())
        self.max_ns = max(self.max_ns, int(ns.max()))

    def add(self, other: LatencyHistogram) -> None:
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self.count += other.count
        self.sum_ns += other.sum_ns
        self.max_ns = max(self.max_ns, other.max_ns)

    def buckets(self) -> list[tuple[int, int]]:
        """(upper edge in nanoseconds, count) of each that is not empty."""
        return [(self._edge(i), n) for i, n in enumerate(self._counts) if n]

    def cumulative(self, edges_ns: Sequence[int]) -> tuple[list[int], int]:
        """How many took at most each of ``edges_ns`` (ascending), and how many there are; of one moment, although
        another thread may record. Exact where an edge is a bucket's (2^k - 1 and 3 * 2^k - 1 are); elsewhere the bucket
        that it lies in counts as longer."""
        counts = self._counts.copy()
        found = [0] * (len(edges_ns) + 1)
        for i, n in enumerate(counts):
            if n:
                found[bisect_left(edges_ns, self._edge(i))] += n
        for i in range(1, len(found)):
            found[i] += found[i - 1]
        return found[:-1], found[-1]

    @staticmethod
    def _edge(i: int) -> int:
        shift = max(i // _SUB - 1, 0)
        return (((i - shift * _SUB) + 1) << shift) - 1

    def percentile_ns(self, percent: float) -> int:
        """The duration that ``percent`` of all stay at or under, rounded up to a bucket's edge; 0 if there is none."""
        due = self.count * percent / 100
        seen = 0
        for i, n in enumerate(self._counts):
            seen += n
            if n and seen >= due:
                return min(self._edge(i), self.max_ns)
        return 0

    def copy(self) -> LatencyHistogram:
        made = LatencyHistogram()
        made.add(self)
        return made

    def since(self, earlier: LatencyHistogram) -> LatencyHistogram:
        """What was recorded after ``earlier`` was copied from this one; of its maximum only the bucket is known."""
        made = LatencyHistogram()
        made._counts = [a - b for a, b in zip(self._counts, earlier._counts, strict=True)]
        made.count = sum(made._counts)
        made.sum_ns = self.sum_ns - earlier.sum_ns
        made.max_ns = max((edge for edge, _ in made.buckets()), default=0)
        return made
