"""The status of a run: one value that the publisher renews every second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from edge_ssm.io.messages import Decision

VERSION = 2
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Measured = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
"""Celsius, or watts: a rail may feed back."""


class Status(msgspec.Struct, frozen=True):
    version: int
    pid: Count
    model: str
    model_digest: str
    engine: str
    profile: str | None
    source: str
    source_state: str
    """waiting (nothing came yet), flowing, stale (nothing for too long), lost (no connection)."""
    started: Amount
    """Seconds of the epoch, as ``updated``."""
    updated: Amount
    sample_rate_hz: Amount | None
    samples: Count
    samples_per_s: Amount
    """Over the last interval."""
    decisions: Count
    decisions_per_s: Amount
    """Over the last minute, or since the start."""
    labels: dict[str, Count]
    last: str
    """The last decision, in words."""
    gaps: dict[str, Count]
    """Samples that had to be filled, skipped or given up, by reason."""
    dropped: dict[str, Count]
    """What came in, or was decided, and went nowhere, by reason: malformed, repeated, late, discarded, unfinished
    windows; output_* are decisions."""
    undecided: Count
    resets: Count
    deadline_misses: Count
    reconnects: Count
    reloads: Count
    reload_failures: Count
    moves: Count
    """Between members of a family."""
    engine_losses: Count
    queue: Count
    queue_size: Count
    """Lines that wait for a slow reader of decisions, and how many may; 0 where none can wait."""
    output_problem: str
    snapshot_age_s: Amount | None
    power_w: Measured | None
    temperature_c: Measured | None
    """Of the hottest zone."""
    resident_mb: Amount
    step_p50_us: Amount
    step_p99_us: Amount
    step_max_us: Amount
    loop_age_s: Amount
    """Since the loop last went round: it is stuck where this grows."""
    ready: bool
    events: list[str]
    """The last ones, oldest first."""
    step_p99_recent_us: float = 0.0
    """Over the last interval; 0 if there was no step."""
    process_started: Count = 0
    """When ``pid`` began, in clock ticks since the machine's start: its number is given to another process one day.
    0: not known."""


@dataclass(frozen=True)
class Point:
    """One interval of the past."""

    time: float
    """Seconds of the epoch."""
    samples_per_s: float
    power_w: float | None
    temperature_c: float | None
    step_p99_us: float
    """Of this interval alone: of the whole run it would hardly move after an hour."""


def in_words(decision: Decision | None) -> str:
    if decision is None:
        return ""
    if decision.label is not None:
        return f"{decision.label} ({decision.score:.3f})"
    return ", ".join(f"{value:.4g}" for value in decision.outputs)
