"""Energy of a step from repeated idle and active blocks, with an interval that holds what is not known.

A block's power is what the meter's readings say of its middle, its beginning left out: a reading tells what was a
moment before. A straight line through them carries a ramp over what was left out. Readings follow one another too
closely to be independent, so the interval is over rounds (Student's t), each of which has one idle block and one active
block beside it. To it the meter's resolution is added: a quantum that hides the same part of every reading makes rounds
agree without being right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np

from edge_ssm.model.network import Array
from edge_ssm.profiler.sampler import Trace

SETTLE_PERIODS = 3
SETTLE_S = 0.1
FEWEST = 4
"""Readings in a block."""
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Block:
    """Of a run: what was done from when to when (CLOCK_MONOTONIC seconds)."""

    round: int
    kind: str
    """idle, or the name of an activity."""
    begin_s: float
    end_s: float
    steps: int


class Energy(msgspec.Struct, frozen=True):
    """Of a step, in microjoules. ``low`` and ``high`` bound ``dynamic`` with 95 % confidence."""

    total: float
    dynamic: float
    """Beyond what the idle machine takes in the same time."""
    low: float
    high: float
    total_low: float
    total_high: float
    below_resolution: bool
    """Whether the interval of ``dynamic`` holds zero: the meter can't tell the step from idling."""
    rounds: int


def t95(n: int) -> float:
    """Of a mean of n values; the normal distribution's value grows by its first corrections beyond the table."""
    freedom = n - 1
    return T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.37 / freedom + 2.82 / freedom**2


def block_power(trace: Trace, block: Block) -> Array | None:
    """(rails + 1,) watts: of each rail, then of the whole; None if the meter said too little in the block."""
    settle = min(max(SETTLE_S, SETTLE_PERIODS * trace.meter.period_s), (block.end_s - block.begin_s) / 3)
    inside = (trace.time_s >= block.begin_s + settle) & (trace.time_s < block.end_s)
    if inside.sum() < FEWEST:
        return None
    at = trace.time_s[inside] - (block.begin_s + block.end_s) / 2
    watts = np.column_stack([trace.watts[inside], trace.total()[inside]])
    middle: Array = np.polynomial.polynomial.polyfit(at, watts, 1)[0]
    return middle


def mean_power(trace: Trace, blocks: list[Block], kind: str) -> dict[str, float]:
    """Watts by rail, and ``total``, over the blocks of a kind; empty if nothing was read."""
    found = [p for block in blocks if block.kind == kind and (p := block_power(trace, block)) is not None]
    if not found:
        return {}
    names = [rail.name for rail in trace.meter.rails] + ["total"]
    return {name: float(watts) for name, watts in zip(names, np.mean(found, axis=0), strict=True)}


def per_step(trace: Trace, blocks: list[Block], kind: str) -> Energy | None:
    """Of the activity ``kind``; None where fewer than two rounds were read whole."""
    by_round: dict[int, dict[str, Block]] = {}
    for block in blocks:
        by_round.setdefault(block.round, {})[block.kind] = block
    total, dynamic, rates = [], [], []
    for of in by_round.values():
        if "idle" not in of or kind not in of or not of[kind].steps:
            continue
        idle, active = block_power(trace, of["idle"]), block_power(trace, of[kind])
        if idle is None or active is None:
            continue
        rates.append(of[kind].steps / (of[kind].end_s - of[kind].begin_s))
        total.append(active[-1])
        dynamic.append(active[-1] - idle[-1])
    n = len(total)
    if n < 2:
        return None
    # Energy over steps, both of all rounds. How many steps there were is known; what they drew is not.
    uj_a_watt = 1e6 / float(np.mean(rates))
    # A value within its quantum is as likely anywhere: standard deviation of a quantum, 1/sqrt(12).
    quantum = 1.96 * trace.resolution_w / math.sqrt(12)

    def half(watts: list[float], quanta: float) -> float:
        spread = t95(n) * float(np.std(watts, ddof=1)) / math.sqrt(n)
        return math.hypot(spread, quantum * math.sqrt(quanta)) * uj_a_watt

    mean, mean_total = float(np.mean(dynamic)) * uj_a_watt, float(np.mean(total)) * uj_a_watt
    around, around_total = half(dynamic, 2), half(total, 1)
    low, high = mean - around, mean + around
    return Energy(
        total=mean_total,
        dynamic=mean,
        low=low,
        high=high,
        total_low=mean_total - around_total,
        total_high=mean_total + around_total,
        below_resolution=low <= 0,
        rounds=n,
    )
