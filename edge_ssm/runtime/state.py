"""The state of a pipeline as a snapshot keeps it, in types that JSON knows."""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np

from edge_ssm.io.messages import Frame
from edge_ssm.model.network import Array
from edge_ssm.runtime.windows import Number, WindowsState

SequenceNumber = Annotated[str, msgspec.Meta(pattern=r"^-?[0-9]{1,40}\Z")]
"""A whole number that may exceed 64 bits, as text."""
Values = list[float | None]
"""Shape (d_input,); None for a value that is missing or not finite, which JSON cannot express."""


class EarlyFrame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A frame that is held back for those before it."""

    sequence: SequenceNumber
    values: Values
    time: float | str | None
    label: str | None

    @classmethod
    def from_frame(cls, frame: Frame) -> EarlyFrame:
        """Return the frame as a snapshot keeps it."""
        return cls(str(frame.sequence), to_json(frame.values), frame.time, frame.label)

    def to_frame(self) -> Frame:
        """Return the frame."""
        return Frame(to_array(self.values), self.time, self.label, int(self.sequence))


class PipelineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a pipeline needs to continue after a restart, beside its engine's state."""

    windows: WindowsState
    held: Values
    """``GapFiller.values``."""
    in_gap: Number
    """``GapFiller.length``."""
    waiting: bool
    """``GapFiller.has_reset``."""
    sequence: SequenceNumber | None
    """``SequenceTracker.last``."""
    stamp: float | None
    """``TimeStamps.last``."""
    early: list[EarlyFrame]
    """``SequenceTracker.buffered``."""
    counts: dict[str, Number]
    """``Counters.kept``."""


def to_json(values: Array) -> Values:
    """Return an array (d_input,) as a list that JSON can express."""
    return [float(value) if np.isfinite(value) else None for value in values]


def to_array(values: Values) -> Array:
    """Return the array (d_input,) of ``to_json``'s list, with NaN for None."""
    return np.array([np.nan if value is None else value for value in values])
