"""The values that travel through a stream: frames, malformed input, decisions and events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from edge_ssm.model.network import Array


class Frame(msgspec.Struct, frozen=True, eq=False):
    """One sample of all channels. A struct, since one is made a sample: a frozen dataclass takes seven times longer."""

    values: Array
    """(d_input,) float64 in the sensor's units, NaN where a value is missing."""
    time: float | str | None = None
    """The source's own time stamp, as it stands there."""
    label: str | None = None
    """The true label, where a recording carries one. Never shown to the model."""
    sequence: int | None = None
    """The sender's own number of the sample, one more for each, where it has one."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Input that is no frame: what was wrong, and where (a line or a byte offset)."""

    where: str
    problem: str


@dataclass(frozen=True, slots=True)
class Decision:
    index: int
    start: int
    end: int
    """Samples [start, end) of the stream."""
    outputs: Array
    """(d_output,) float64: logits, or the regression's values."""
    label: str | None
    """None for a regression."""
    score: float | None
    """Softmax probability of the label; None for a regression."""
    time: float | str | None = None
    """Time stamp of the last sample, where the source has one."""
    truth: str | None = None
    gaps: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a reader of decisions must know: a reset, a window without a decision."""

    event: str
    sample: int
    details: dict[str, Any] = field(default_factory=dict)
