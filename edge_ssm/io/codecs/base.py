"""The interface of codecs.

Bytes from outside are not trusted. A decoder bounds the memory it takes and never raises for wrong input: whatever is
not a frame becomes a ``Malformed`` that says where and why. Only a CSV header that lacks a channel raises FrameError,
since then no row can be right.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_ssm.errors import UsageError
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import Array, InputSpec


class FrameDecoder(ABC):
    """Turns bytes, in pieces of any size, into frames and reports of malformed ones."""

    def __init__(self, spec: InputSpec) -> None:
        self.channels = spec.channels

    @abstractmethod
    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        """Yield the frames that ``data`` completes."""

    @abstractmethod
    def finish(self) -> Iterator[Frame | Malformed]:
        """Yield what is left at the end of a source or of a datagram."""

    def restart(self) -> Iterator[Frame | Malformed]:
        """Start again after a discontinuity. An unfinished frame may be incomplete and is reported as malformed."""
        for item in self.finish():
            yield item if isinstance(item, Malformed) else Malformed("last row", "cut off by a lost connection")

    @property
    def pending(self) -> int:
        """Bytes that were fed and wait for the rest of their frame."""
        return 0

    def state(self) -> dict[str, Any]:
        """Return what was learnt from the stream (a header, the wraps of numbers) as JSON values, for ``resume``."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:  # noqa: B027  most codecs have no state
        """Continue in the middle of a stream with another decoder's ``state``. Ignores a state that does not fit."""


@dataclass(frozen=True)
class Codec:
    """A registered codec."""

    name: str
    """Value of ``--format``."""
    create: Callable[[InputSpec, Sequence[float]], FrameDecoder]
    """Return a decoder for an input and the scale of its numbers. Raises UsageError for a scale that does not fit."""
    suffixes: tuple[str, ...]
    """Endings of the names of files in this format."""
    is_scaled: bool
    """True if the numbers may be in a sensor's own unit, so that a scale makes sense."""


def channel_scale(spec: InputSpec, scale: Sequence[float]) -> Array:
    """Return one factor per channel, shape (d_input,), float64, from one factor or one per channel.

    Raises UsageError for another number of factors, for 0, and for a factor that is not finite.
    """
    if len(scale) not in (1, len(spec.channels)) or not all(math.isfinite(s) and s for s in scale):
        raise UsageError(f"scale: expected 1 or {len(spec.channels)} finite numbers other than 0, got {list(scale)}")
    return np.broadcast_to(np.array(scale, dtype=np.float64), len(spec.channels))
