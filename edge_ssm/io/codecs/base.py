"""The interface of a codec, and what the text codecs share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edge_ssm.errors import UsageError
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import Array, InputSpec
from edge_ssm.text import encodable

MAX_LINE = 1 << 16
LABEL_COLUMN = "label"
TIME_COLUMNS = ("time", "timestamp", "t")
SEQUENCE_COLUMN = "seq"
_LARGEST_SEQUENCE = 2**63 - 1
_MISSING = {"", "nan", "na", "n/a", "null", "none"}


class FrameDecoder(ABC):
    def __init__(self, spec: InputSpec) -> None:
        self.channels = spec.channels

    @abstractmethod
    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        """Frames that are complete with ``data``."""

    @abstractmethod
    def finish(self) -> Iterator[Frame | Malformed]:
        """What is left when the source, a datagram or a connection has ended."""

    def restart(self) -> Iterator[Frame | Malformed]:
        """Begin anew after a seam (a lost connection): what is unfinished may be cut short and is no frame."""
        for item in self.finish():
            yield item if isinstance(item, Malformed) else Malformed("last row", "cut off by a lost connection")

    @property
    def pending(self) -> int:
        """Bytes that were fed and wait for the rest of their frame."""
        return 0

    def state(self) -> dict[str, Any]:
        """What was learnt so far (a header, wraps of numbers), for JSON; ``resume`` takes it after a restart."""
        return {}

    def resume(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Read on in the middle of a stream, with what another decoder learnt. Ignores what does not fit."""


class _LineDecoder(FrameDecoder):
    """Splits bytes into lines (\\n or \\r\\n, UTF-8) and keeps no more than MAX_LINE bytes of an unfinished one."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__(spec)
        self.line = 0
        self._tail = b""
        self._discarding = False

    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        *lines, tail = (self._tail + data).split(b"\n")
        self._tail = tail
        for line in lines:
            yield from self._one(line)
        if len(self._tail) > MAX_LINE and not self._discarding:
            self._discarding = True
            yield self._malformed(f"longer than {MAX_LINE} bytes", self.line + 1)
        if self._discarding:
            self._tail = b""

    def finish(self) -> Iterator[Frame | Malformed]:
        tail, self._tail = self._tail, b""
        if tail.strip() or self._discarding:
            yield from self._one(tail)

    @property
    def pending(self) -> int:
        return len(self._tail)

    def _one(self, line: bytes) -> Iterator[Frame | Malformed]:
        self.line += 1
        if self._discarding:
            self._discarding = False
            return
        if len(line) > MAX_LINE:
            yield self._malformed(f"longer than {MAX_LINE} bytes")
            return
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            yield self._malformed("not UTF-8 text")
            return
        if self.line == 1:
            text = text.removeprefix("\ufeff")
        if text:
            item = self._parse(text)
            if item is not None:
                yield item

    def _malformed(self, problem: str, line: int | None = None) -> Malformed:
        return Malformed(f"line {self.line if line is None else line}", problem)

    @abstractmethod
    def _parse(self, text: str) -> Frame | Malformed | None:
        """One line that is not empty; None for a header."""


def _number(field: str) -> float | None:
    """A CSV field as a number, NaN for a missing value, None for neither."""
    text = field.strip()
    if text.lower() in _MISSING:
        return math.nan
    if "_" in text:  # float() reads 1_000, which no sensor means
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _time_stamp(field: str) -> float | str | None:
    try:
        value = float(field)
    except ValueError:
        return field.strip() or None
    return value if math.isfinite(value) else None


def _sequence(value: object) -> int | None:
    """A sender's number of a sample; None for what can't be one (a bool, a float, a number out of range)."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_SEQUENCE:
        return value
    return None


def channel_scale(spec: InputSpec, scale: Sequence[float]) -> Array:
    """One factor a channel, (d_input,) float64. Raises UsageError for another count, 0, or what is not finite."""
    if len(scale) not in (1, len(spec.channels)) or not all(math.isfinite(s) and s for s in scale):
        raise UsageError(f"scale: expected 1 or {len(spec.channels)} finite numbers other than 0, got {list(scale)}")
    return np.broadcast_to(np.array(scale, dtype=np.float64), len(spec.channels))


def _writable_time(value: object) -> float | str | None:
    """A time stamp of JSON, None where it is none or could not be passed on: not finite, or beyond any number."""
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return value
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
