"""Energy of a step, estimated from repeated idle and active blocks, with a 95 % confidence interval.

The power of a block is the value in its middle of a straight line through the meter's readings; the line carries a ramp
across the beginning of the block, which is left out because a sensor reports the recent past.

Consecutive readings are not independent, so the interval is Student's t over rounds, each of which has one idle and one
active block. The meter's resolution is added in quadrature: a quantum that hides the same part of every reading makes
rounds agree without making them right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from edge_ssm.model.network import Array
from edge_ssm.profiler.sampler import Trace

SETTLE_PERIODS = 3
SETTLE_S = 0.1
"""What is left out at the beginning of a block: so many of the meter's periods, and at least this time in seconds."""
MIN_READINGS = 4
"""Fewest readings from which the power of a block is estimated."""
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Block:
    """A block of a run: what was executed, and when. Times are in seconds of CLOCK_MONOTONIC."""

    round: int
    kind: str
    """Either "idle" or the name of a workload."""
    begin_s: float
    end_s: float
    steps: int


class Energy(msgspec.Struct, frozen=True):
    """Energy of a step in microjoules."""

    total: float
    """Energy of the whole board during a step."""
    dynamic: float
    """Energy beyond that of the idle machine in the same time."""
    low: float
    """Lower end of the 95 % confidence interval of ``dynamic``."""
    high: float
    """Upper end of the 95 % confidence interval of ``dynamic``."""
    total_low: float
    total_high: float
    below_resolution: bool
    """Whether the interval of ``dynamic`` contains zero: the meter cannot tell the step from idling."""
    rounds: int
    """Number of rounds that the estimate is based on."""


def t95(n: int) -> float:
    """Return the two-sided 95 % point of Student's t for a mean of ``n`` values, at least 2.

    Beyond the table it is the normal distribution's value with its first two corrections in 1 / (n - 1).
    """
    freedom = n - 1
    return T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.37 / freedom + 2.82 / freedom**2


def block_power(trace: Trace, block: Block) -> Array | None:
    """Return the mean power of a block, shape (rails + 1,), in watts: that of each rail, then the total.

    The result is None if there are fewer than ``MIN_READINGS`` readings in the block.
    """
    settle = min(max(SETTLE_S, SETTLE_PERIODS * trace.meter.period_s), (block.end_s - block.begin_s) / 3)
    inside = (trace.time_s >= block.begin_s + settle) & (trace.time_s < block.end_s)
    if inside.sum() < MIN_READINGS:
        return None
    from_middle = trace.time_s[inside] - (block.begin_s + block.end_s) / 2
    watts = np.column_stack([trace.watts[inside], trace.total()[inside]])
    middle: Array = np.polynomial.polynomial.polyfit(from_middle, watts, 1)[0]
    return middle


def mean_power(trace: Trace, blocks: Sequence[Block], kind: str) -> dict[str, float]:
    """Return the mean power over all blocks of a kind, in watts by rail and as ``total``; empty without readings."""
    powers = [p for block in blocks if block.kind == kind and (p := block_power(trace, block)) is not None]
    if not powers:
        return {}
    names = [rail.name for rail in trace.meter.rails] + ["total"]
    return {name: float(watts) for name, watts in zip(names, np.mean(powers, axis=0), strict=True)}


def energy_per_step(trace: Trace, blocks: Sequence[Block], kind: str) -> Energy | None:
    """Return the energy of a step of the workload ``kind``; None if the meter covers fewer than two rounds."""
    by_round: dict[int, dict[str, Block]] = {}
    for block in blocks:
        by_round.setdefault(block.round, {})[block.kind] = block
    total_w, dynamic_w, steps_per_s = [], [], []
    for of_kind in by_round.values():
        if "idle" not in of_kind or kind not in of_kind or not of_kind[kind].steps:
            continue
        idle, active = block_power(trace, of_kind["idle"]), block_power(trace, of_kind[kind])
        if idle is None or active is None:
            continue
        steps_per_s.append(of_kind[kind].steps / (of_kind[kind].end_s - of_kind[kind].begin_s))
        total_w.append(active[-1])
        dynamic_w.append(active[-1] - idle[-1])
    n = len(total_w)
    if n < 2:
        return None
    # The number of steps is known exactly, so that only the power contributes to the uncertainty.
    uj_per_w = 1e6 / float(np.mean(steps_per_s))
    # A value is uniformly distributed within its quantum; the standard deviation of that is quantum / sqrt(12).
    quantum_w = 1.96 * trace.resolution_w / math.sqrt(12)

    def half_width(watts: list[float], readings: int) -> float:
        """Half the interval's width in microjoules for a power that is a sum of so many independent readings."""
        spread_w = t95(n) * float(np.std(watts, ddof=1)) / math.sqrt(n)
        return math.hypot(spread_w, quantum_w * math.sqrt(readings)) * uj_per_w

    dynamic, total = float(np.mean(dynamic_w)) * uj_per_w, float(np.mean(total_w)) * uj_per_w
    around, around_total = half_width(dynamic_w, 2), half_width(total_w, 1)
    return Energy(
        total=total,
        dynamic=dynamic,
        low=dynamic - around,
        high=dynamic + around,
        total_low=total - around_total,
        total_high=total + around_total,
        below_resolution=dynamic - around <= 0,
        rounds=n,
    )
