"""What the text codecs share: lines, numbers, time stamps and sequence numbers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

from edge_ssm.io.codecs.base import FrameDecoder
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import InputSpec
from edge_ssm.text import encodable

MAX_LINE = 1 << 16
"""Bytes of the longest line."""
LABEL_COLUMN = "label"
TIME_COLUMNS = ("time", "timestamp", "t")
SEQUENCE_COLUMN = "seq"
_MAX_SEQUENCE = 2**63 - 1
_MISSING = {"", "nan", "na", "n/a", "null", "none"}


class LineDecoder(FrameDecoder):
    r"""Splits bytes into lines (\n or \r\n, UTF-8). Keeps at most MAX_LINE bytes of an unfinished line."""

    def __init__(self, spec: InputSpec) -> None:
        super().__init__(spec)
        self.line = 0
        """Number of the current line, from 1."""
        self._tail = b""
        self._is_discarding = False

    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        """Yield the frames of the lines that ``data`` completes."""
        *lines, tail = (self._tail + data).split(b"\n")
        self._tail = tail
        for line in lines:
            yield from self._decode_line(line)
        if len(self._tail) > MAX_LINE and not self._is_discarding:
            self._is_discarding = True
            yield self._malformed(f"longer than {MAX_LINE} bytes", self.line + 1)
        if self._is_discarding:
            self._tail = b""

    def finish(self) -> Iterator[Frame | Malformed]:
        """Yield the frame of a last line without an end."""
        tail, self._tail = self._tail, b""
        if tail.strip() or self._is_discarding:
            yield from self._decode_line(tail)

    @property
    def pending(self) -> int:
        """Bytes of the unfinished line."""
        return len(self._tail)

    def _decode_line(self, line: bytes) -> Iterator[Frame | Malformed]:
        self.line += 1
        if self._is_discarding:
            self._is_discarding = False
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
        """Decode a line that is not empty. Return None for a header."""


def parse_number(field: str) -> float | None:
    """Return a field as a number, NaN for a missing value, None for other text."""
    text = field.strip()
    if text.lower() in _MISSING:
        return math.nan
    if "_" in text:  # float() accepts 1_000, which no sensor means.
        return None
    try:
        return float(text)
    except ValueError:
        return None


def parse_time(field: str) -> float | str | None:
    """Return a time stamp as a number or else as text; None if it is empty or not finite."""
    try:
        value = float(field)
    except ValueError:
        return field.strip() or None
    return value if math.isfinite(value) else None


def json_time(value: object) -> float | str | None:
    """Return a time stamp from JSON; None if it is none or cannot be written out again (not finite, too large)."""
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


def valid_sequence(value: object) -> int | None:
    """Return a sequence number, or None for what cannot be one (a bool, a float, a number out of range)."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_SEQUENCE:
        return value
    return None
