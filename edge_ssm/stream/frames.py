"""Codecs: bytes to frames. A decoder is fed whatever bytes there are and yields frames and reports of malformed ones.

Bytes from outside are not trusted: a line has a longest length, numbers are parsed by float() alone, and whatever
can't be a frame becomes a ``Malformed`` that says where and why; a decoder never raises for it. It raises FrameError
only for a CSV header that lacks a channel, since then no row can be right.
"""

from __future__ import annotations

import csv
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import numpy as np

from edge_ssm.errors import FrameError, UsageError
from edge_ssm.network import Array, InputSpec

MAX_LINE = 1 << 16
LABEL_COLUMN = "label"
TIME_COLUMNS = ("time", "timestamp", "t")
SEQUENCE_COLUMN = "seq"
_LARGEST_SEQUENCE = 2**63 - 1
_MISSING = {"", "nan", "na", "n/a", "null", "none"}


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


class CsvDecoder(_LineDecoder):
    """Comma-separated values, with a header (columns in any order, others ignored) or without (channels in order).

    A field in quotes may hold commas, not line breaks. A row before the first sample is a header if it has text and no
    number.
    """

    def __init__(self, spec: InputSpec) -> None:
        super().__init__(spec)
        self._columns: list[int] | None = None
        self._beginning = True
        self._width = len(self.channels)
        self._label: int | None = None
        self._time: int | None = None
        self._sequence: int | None = None

    def _parse(self, text: str) -> Frame | Malformed | None:
        try:
            row = next(csv.reader([text])) if '"' in text else text.split(",")
        except (csv.Error, StopIteration):
            return self._malformed("not a CSV row")
        if self._beginning:
            numbers = [_number(field) for field in row]
            if None in numbers and all(n is None or math.isnan(n) for n in numbers):
                return self._read_header(text, [field.strip() for field in row])
            self._beginning = False
        if self._columns is None:
            self._columns = list(range(self._width))
        if len(row) != self._width:
            return self._malformed(f"{len(row)} fields, expected {self._width}")
        values = np.empty(len(self._columns))
        for i, column in enumerate(self._columns):
            value = _number(row[column])
            if value is None:
                return self._malformed(f"channel {self.channels[i]!r}: {row[column].strip()[:40]!r} is not a number")
            values[i] = value
        time = None if self._time is None else _time_stamp(row[self._time])
        label = None if self._label is None else row[self._label].strip() or None
        number = "" if self._sequence is None else row[self._sequence].strip()
        digits = number.isascii() and number.isdigit() and len(number) < 20  # int() reads 1_000, and long ones slowly
        return Frame(values, time, label, _sequence(int(number)) if digits else None)

    def restart(self) -> Iterator[Frame | Malformed]:
        yield from super().restart()
        self._beginning = True  # a new connection may send its header again

    def state(self) -> dict[str, Any]:
        if self._columns is None:
            return {}
        places = {"label": self._label, "time": self._time, "sequence": self._sequence}
        return {"columns": self._columns, "width": self._width, **places}

    def resume(self, state: dict[str, Any]) -> None:
        columns, width = state.get("columns"), state.get("width")
        if not isinstance(columns, list) or len(columns) != len(self.channels) or not isinstance(width, int):
            return
        spare = [state.get(name) for name in ("label", "time", "sequence")]
        if all(isinstance(place, int) and 0 <= place < width for place in [*columns, *spare] if place is not None):
            self._columns, self._width = columns, width
            self._label, self._time, self._sequence = spare

    def _read_header(self, text: str, header: list[str]) -> Malformed | None:
        named = set(re.split(r"[,;\s]+", text)) & set(self.channels)
        if not named and len(header) < len(self.channels):
            return self._malformed(f"{text[:40]!r} is neither a header nor a row")  # a device's greeting, say
        for name in self.channels:
            if header.count(name) != 1:
                found = "no column" if name not in header else "more than one column"
                raise FrameError(
                    f"line {self.line}: {found} for channel {name!r}; expected a header with "
                    f"{', '.join(self.channels)} (found {', '.join(header)[:200]!r})"
                )
        self._columns = [header.index(name) for name in self.channels]
        self._width = len(header)
        spare = {name: i for i, name in enumerate(header) if name not in self.channels}
        self._label = spare.get(LABEL_COLUMN)
        self._time = next((spare[name] for name in TIME_COLUMNS if name in spare), None)
        self._sequence = spare.get(SEQUENCE_COLUMN)
        return None


class NdjsonDecoder(_LineDecoder):
    """One JSON value a line: an array of the channels in order, or an object with a member a channel (or ``values``).

    ``null`` and an absent channel are missing values; ``time``, ``label`` and ``seq`` are read from an object.
    """

    def _parse(self, text: str) -> Frame | Malformed | None:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            return self._malformed(f"not JSON ({' '.join(str(error).split())[:80]})")
        time = label = sequence = None
        if isinstance(document, dict):
            if not any(name in document for name in self.channels):
                document.setdefault("values", None)
                items = document["values"]
            else:
                items = [document.get(name) for name in self.channels]
            time, label, sequence = document.get("time"), document.get("label"), document.get(SEQUENCE_COLUMN)
        else:
            items = document
        if not isinstance(items, list) or len(items) != len(self.channels):
            return self._malformed(
                f"expected an array of {len(self.channels)} numbers or an object with {', '.join(self.channels)}"
            )
        values = np.empty(len(items))
        for i, item in enumerate(items):
            if item is None:
                values[i] = math.nan
            elif isinstance(item, (int, float)) and not isinstance(item, bool):
                try:
                    values[i] = item
                except OverflowError:
                    values[i] = math.inf
            else:
                return self._malformed(f"channel {self.channels[i]!r}: {str(item)[:40]!r} is not a number")
        return Frame(
            values,
            _writable_time(time),
            _writable(str(label)) if isinstance(label, (str, int, float)) else None,
            _sequence(sequence),
        )


def channel_scale(spec: InputSpec, scale: Sequence[float]) -> Array:
    """One factor a channel, (d_input,) float64. Raises UsageError for another count, 0, or what is not finite."""
    if len(scale) not in (1, len(spec.channels)) or not all(math.isfinite(s) and s for s in scale):
        raise UsageError(f"scale: expected 1 or {len(spec.channels)} finite numbers other than 0, got {list(scale)}")
    return np.broadcast_to(np.array(scale, dtype=np.float64), len(spec.channels))


def _writable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no character and can't be written out again."""
    return text.encode(errors="replace").decode()


def _writable_time(value: object) -> float | str | None:
    """A time stamp of JSON, None where it is none or could not be passed on: not finite, or beyond any number."""
    if isinstance(value, str):
        return _writable(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return value
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


class BinaryDecoder(FrameDecoder):
    """Frames of d_input numbers, back to back, little-endian: float32 as they are, int16 times a scale a channel."""

    dtypes: ClassVar[dict[str, str]] = {"f32le": "<f4", "i16le": "<i2"}

    def __init__(self, spec: InputSpec, codec: str, scale: Sequence[float] = (1.0,)) -> None:
        super().__init__(spec)
        self._dtype = np.dtype(self.dtypes[codec])
        self._scale = channel_scale(spec, scale)
        self._scaled = bool((self._scale != 1).any())
        self._size = self._dtype.itemsize * len(self.channels)
        self._tail = b""
        self._offset = 0

    def feed(self, data: bytes) -> Iterator[Frame | Malformed]:
        data = self._tail + data
        whole = len(data) - len(data) % self._size
        self._tail = data[whole:]
        self._offset += whole
        rows = np.frombuffer(data[:whole], dtype=self._dtype).reshape(-1, len(self.channels))
        with np.errstate(invalid="ignore", over="ignore"):
            values = rows.astype(np.float64)
            if self._scaled:
                values *= self._scale
        for row in values:
            yield Frame(row)

    @property
    def pending(self) -> int:
        return len(self._tail)

    def finish(self) -> Iterator[Frame | Malformed]:
        if self._tail:
            yield Malformed(f"byte {self._offset}", f"{len(self._tail)} bytes at the end, a frame has {self._size}")
            self._tail = b""


FORMATS = ("csv", "ndjson", *BinaryDecoder.dtypes, "framed")
_SUFFIXES = {
    ".csv": "csv",
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".f32": "f32le",
    ".i16": "i16le",
    ".framed": "framed",
}


def guess_format(path: str) -> str:
    """The format that a file's name ends in; csv where it tells nothing, as for stdin."""
    suffix = path[path.rfind(".") :].lower() if "." in path else ""
    return _SUFFIXES.get(suffix, "csv")


def decoder(codec: str, spec: InputSpec, scale: Sequence[float] = (1.0,)) -> FrameDecoder:
    """The decoder for one of FORMATS. Raises UsageError for another, or a scale that does not fit."""
    if codec in ("csv", "ndjson") and any(factor != 1 for factor in scale):
        raise UsageError(f"scale: only for numbers of a sensor's own unit ({', '.join(BinaryDecoder.dtypes)}, framed)")
    if codec == "csv":
        return CsvDecoder(spec)
    if codec == "ndjson":
        return NdjsonDecoder(spec)
    if codec in BinaryDecoder.dtypes:
        return BinaryDecoder(spec, codec, scale)
    if codec == "framed":
        from edge_ssm.stream.framed import FramedDecoder  # it builds on this module

        return FramedDecoder(spec, scale)
    raise UsageError(f"format {codec!r}: unknown, expected {', '.join(FORMATS)}")
