"""The CSV codec."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from edge_ssm.errors import FrameError
from edge_ssm.io.codecs.base import (
    LABEL_COLUMN,
    SEQUENCE_COLUMN,
    TIME_COLUMNS,
    _LineDecoder,
    _number,
    _sequence,
    _time_stamp,
)
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import InputSpec


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
