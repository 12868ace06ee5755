"""The status of a run: one value that describes it at a moment, for whoever watches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from edge_ssm.io.messages import Decision
from edge_ssm.runtime.counters import PUBLISHED
from edge_ssm.text import encodable

VERSION = 2
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
MAX_TEXT = 200
"""Characters of a text that is published: time stamps and names come from frames and files, which allow far more."""
Measurement = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
"""Degrees Celsius, or watts; a rail may feed power back."""


class StatusFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of ``Status`` that are not counters."""

    version: int
    pid: Count
    model: str
    """Path of the model."""
    model_digest: str
    engine: str
    profile: str | None
    """Name of the firmware profile."""
    source: str
    source_state: str
    """waiting (for the first sample), flowing, stale (silent for too long) or lost (not connected)."""
    started: Amount
    """Seconds since the epoch, as ``updated``."""
    updated: Amount
    sample_rate_hz: Amount | None
    samples_per_s: Amount
    """Over the last interval."""
    decisions_per_s: Amount
    """Over the last minute, or since the start."""
    labels: dict[str, Count]
    """Decisions by label."""
    last: str
    """The last decision, in words."""
    queue: Count
    """Lines that wait for a slow reader of decisions."""
    queue_size: Count
    """Lines that may wait; 0 if none ever does."""
    output_problem: str
    """Why decisions are not delivered; empty while they are."""
    snapshot_age_s: Amount | None
    power_w: Measurement | None
    temperature_c: Measurement | None
    """Temperature of the hottest zone."""
    resident_mb: Amount
    step_p50_us: Amount
    step_p99_us: Amount
    step_max_us: Amount
    loop_age_s: Amount
    """Time since the pipeline last ticked; it is stuck if this grows."""
    ready: bool
    events: list[str]
    """The last events, oldest first."""
    step_p99_recent_us: float = 0.0
    """Over the last interval; 0 if it had no step."""
    process_started: Count = 0
    """Start of process ``pid``, in clock ticks since the machine's start, because a process number is used again one
    day; 0 if unknown."""


if TYPE_CHECKING:

    class Status(StatusFacts, frozen=True):
        """``StatusFacts``, and one field for each counter in ``PUBLISHED``: an int, or a dict of counts by reason."""

        def __getattr__(self, counter: str) -> Any:
            """Return the value of a declared counter."""

else:
    # 0 if a status file of another version lacks a counter.
    Status = msgspec.defstruct(
        "Status",
        [
            (each.name, Count, 0)
            if each.reasons is None
            else (each.name, dict[str, Count], msgspec.field(default_factory=dict))
            for each in PUBLISHED
        ],
        bases=(StatusFacts,),
        frozen=True,
        kw_only=True,
        module=__name__,
    )


@dataclass(frozen=True)
class Point:
    """Rates and measurements of one interval of the past."""

    time: float
    """Seconds since the epoch."""
    samples_per_s: float
    power_w: float | None
    temperature_c: float | None
    step_p99_us: float
    """99th percentile of this interval's steps. That of the whole run would hardly change after an hour."""


def describe_decision(decision: Decision | None) -> str:
    """Return a decision in words: its label and score, or its values."""
    if decision is None:
        return ""
    if decision.label is not None:
        return f"{decision.label} ({decision.score:.3f})"
    return ", ".join(f"{value:.4g}" for value in decision.outputs)


def shorten(value: Any) -> Any:
    """Return a JSON value whose texts have at most MAX_TEXT characters, all of which UTF-8 can encode."""
    if isinstance(value, str):
        text = value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]}..."
        return encodable(text)
    if isinstance(value, dict):
        return {shorten(key): shorten(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shorten(item) for item in value]
    return value
