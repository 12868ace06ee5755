"""The values that travel through a stream: frames, malformed input, decisions and events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from edge_ssm.model.network import Array


class Frame(msgspec.Struct, frozen=True, eq=False):
    """One sample of all channels.

    A msgspec struct because one is created for every sample: a frozen dataclass takes seven times as long.
    """

    values: Array
    """Shape (d_input,), float64: the channels in the sensor's units, NaN where a value is missing."""
    time: float | str | None = None
    """The source's own time stamp, unchanged."""
    label: str | None = None
    """The true label, if a recording carries one. The model never sees it."""
    sequence: int | None = None
    """The sender's sequence number of the sample, if it has one."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """Input that is not a frame."""

    where: str
    """Position in the input: a line or a byte offset."""
    problem: str
    """What is wrong, in words."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The model's output for one window."""

    index: int
    """Number of the decision, from 0."""
    start: int
    """First sample of the window."""
    end: int
    """Sample after the last one of the window."""
    outputs: Array
    """Shape (d_output,), float64: logits, or the values of a regression."""
    label: str | None
    """The most probable label; None for a regression."""
    score: float | None
    """Softmax probability of the label; None for a regression."""
    time: float | str | None = None
    """Time stamp of the last sample, if the source has one."""
    truth: str | None = None
    """True label of the window, if the recording carries one."""
    gaps: int = 0
    """Samples of the window that were filled."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that readers of decisions need to know: a reset, a lost connection, a window without a decision."""

    event: str
    """Name, in snake case."""
    sample: int
    """Number of the sample before which it happened."""
    details: dict[str, Any] = field(default_factory=dict)
    """More about it, ready for JSON."""
