"""The codec ``csv``: comma-separated values, with or without a header."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from edge_ssm.errors import FrameError
from edge_ssm.io.codecs.base import Codec
from edge_ssm.io.codecs.lines import (
    LABEL_COLUMN,
    SEQUENCE_COLUMN,
    TIME_COLUMNS,
    LineDecoder,
    parse_number,
    parse_time,
    valid_sequence,
)
from edge_ssm.io.messages import Frame, Malformed
from edge_ssm.model.network import InputSpec


class CsvDecoder(LineDecoder):
    """Decodes rows of comma-separated values.

    With a header, columns may be in any order and others are ignored; without one, the fields are the channels in
    order. A row before the first sample is a header if it contains text and no number. A quoted field may contain
    commas, but no line breaks.
    """

    def __init__(self, spec: InputSpec) -> None:
        super().__init__(spec)
        self._columns: list[int] | None = None
        self._may_be_header = True
        self._width = len(self.channels)
        self._label_column: int | None = None
        self._time_column: int | None = None
        self._sequence_column: int | None = None

    def _parse(self, text: str) -> Frame | Malformed | None:
        try:
            row = next(csv.reader([text])) if '"' in text else text.split(",")
        except (csv.Error, StopIteration):
            return self._malformed("not a CSV row")
        if self._may_be_header:
            numbers = [parse_number(field) for field in row]
            if None in numbers and all(n is None or math.isnan(n) for n in numbers):
                return self._read_header(text, [field.strip() for field in row])
            self._may_be_header = False
        if self._columns is None:
            self._columns = list(range(self._width))
        if len(row) != self._width:
            return self._malformed(f"{len(row)} fields, expected {self._width}")
        values = np.empty(len(self._columns))
        for i, column in enumerate(self._columns):
            value = parse_number(row[column])
            if value is None:
                return self._malformed(f"channel {self.channels[i]!r}: {row[column].strip()[:40]!r} is not a number")
            values[i] = value
        time = None if self._time_column is None else parse_time(row[self._time_column])
        label = None if self._label_column is None else row[self._label_column].strip() or None
        number = "" if self._sequence_column is None else row[self._sequence_column].strip()
        # int() accepts 1_000, and is slow for long numbers.
        is_number = number.isascii() and number.isdigit() and len(number) < 20
        return Frame(values, time, label, valid_sequence(int(number)) if is_number else None)

    def restart(self) -> Iterator[Frame | Malformed]:
        """Start again; a new connection may send its header again."""
        yield from super().restart()
        self._may_be_header = True

    def state(self) -> dict[str, Any]:
        """Return the columns that the header assigned."""
        if self._columns is None:
            return {}
        optional = {"label": self._label_column, "time": self._time_column, "sequence": self._sequence_column}
        return {"columns": self._columns, "width": self._width, **optional}

    def resume(self, state: dict[str, Any]) -> None:
        """Take the columns from another decoder's ``state``."""
        columns, width = state.get("columns"), state.get("width")
        if not isinstance(columns, list) or len(columns) != len(self.channels) or not isinstance(width, int):
            return
        optional = [state.get(name) for name in ("label", "time", "sequence")]
        if all(isinstance(i, int) and 0 <= i < width for i in [*columns, *optional] if i is not None):
            self._columns, self._width = columns, width
            self._label_column, self._time_column, self._sequence_column = optional

    def _read_header(self, text: str, header: list[str]) -> Malformed | None:
        known = set(re.split(r"[,;\s]+", text)) & set(self.channels)
        if not known and len(header) < len(self.channels):
            return self._malformed(f"{text[:40]!r} is neither a header nor a row")  # such as a device's greeting
        for name in self.channels:
            if header.count(name) != 1:
                problem = "no column" if name not in header else "more than one column"
                raise FrameError(
                    f"line {self.line}: {problem} for channel {name!r}; expected a header with "
                    f"{', '.join(self.channels)} (found {', '.join(header)[:200]!r})"
                )
        self._columns = [header.index(name) for name in self.channels]
        self._width = len(header)
        others = {name: i for i, name in enumerate(header) if name not in self.channels}
        self._label_column = others.get(LABEL_COLUMN)
        self._time_column = next((others[name] for name in TIME_COLUMNS if name in others), None)
        self._sequence_column = others.get(SEQUENCE_COLUMN)
        return None


CODEC = Codec("csv", lambda spec, scale: CsvDecoder(spec), (".csv",), is_scaled=False)
