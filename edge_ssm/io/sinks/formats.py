"""Formatters: decisions as NDJSON for programs, CSV for tables, or text for people. No line is held back."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from edge_ssm.errors import RunFailed, SinkClosed
from edge_ssm.io.messages import Decision, Event
from edge_ssm.io.sinks.base import Sink
from edge_ssm.model.network import Network
from edge_ssm.text import sanitize


def discard(file: TextIO) -> None:
    """Redirect a broken file to /dev/null, so that what Python still buffers for it does not fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class Formatter(ABC):
    """Formats decisions and events as lines, and writes them to a file or sink.

    Parameters
    ----------
    file
        Destination of the lines.
    network
        The model that decides: it provides the labels.
    logits
        Write the logits too.
    truth
        Write the true labels too.
    """

    def __init__(self, file: TextIO | Sink, network: Network, logits: bool, truth: bool) -> None:
        self._file = file
        self._logits = logits
        self._truth = truth
        self.adopt(network)

    @property
    def sink(self) -> Sink | None:
        """The destination, if it is a sink and not a plain file."""
        return self._file if isinstance(self._file, Sink) else None

    def adopt(self, network: Network) -> None:
        """Format the decisions of another network from now on."""
        self._names = network.labelled
        self._is_regression = network.task == "regression"

    def decision(self, decision: Decision) -> None:
        """Write a decision. Raises SinkClosed if the reader is gone, RunFailed if it cannot be written."""
        self._write(self._format_decision(decision))

    def event(self, event: Event) -> None:
        """Write an event. Raises as ``decision`` does."""
        self._write(self._format_event(event))

    @abstractmethod
    def _format_decision(self, decision: Decision) -> str:
        """Return the decision as lines, each with its newline."""

    @abstractmethod
    def _format_event(self, event: Event) -> str:
        """Return the event as a line with its newline; empty if it is not part of the output."""

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            if not isinstance(self._file, Sink):
                discard(self._file)
            if isinstance(error, BrokenPipeError):
                raise SinkClosed from None
            raise RunFailed(f"output: cannot be written ({error.strerror}); the run ends here") from None

    def close(self) -> None:
        """Close the destination, unless it is standard output."""
        if self._file is not sys.stdout:
            self._file.close()


class NdjsonFormatter(Formatter):
    """Writes one JSON object per line."""

    def _format_decision(self, d: Decision) -> str:
        document: dict[str, Any] = {"index": d.index, "start": d.start, "end": d.end}
        if d.time is not None:
            document["time"] = d.time
        if self._is_regression:
            document["value"] = [float(v) for v in d.outputs]
        else:
            document |= {"label": d.label, "score": d.score}
        if d.gaps:
            document["gaps"] = d.gaps
        if self._truth:
            document["truth"] = d.truth
        if self._logits and not self._is_regression:
            document["logits"] = [float(v) for v in d.outputs]
        return json.dumps(document, separators=(",", ":")) + "\n"

    def _format_event(self, e: Event) -> str:
        return json.dumps({"event": e.event, "sample": e.sample, **e.details}, separators=(",", ":")) + "\n"


class CsvFormatter(Formatter):
    """Writes a table. The header is repeated when the columns change; events go to standard error."""

    _columns: Sequence[str] = ()

    def _format_decision(self, d: Decision) -> str:
        row: dict[str, Any] = {"index": d.index, "start": d.start, "end": d.end, "time": d.time}
        if not self._is_regression:
            row |= {"label": d.label, "score": d.score}
        row["gaps"] = d.gaps
        if self._truth:
            row["truth"] = d.truth
        if self._logits or self._is_regression:
            prefix = "" if self._is_regression else "logit_"
            row |= {f"{prefix}{name}": float(v) for name, v in zip(self._names, d.outputs, strict=True)}
        line, columns = _csv_line(row.values()), list(row)
        if columns == self._columns:
            return line
        is_first, self._columns = not self._columns, columns
        header, sink = _csv_line(columns), self.sink
        if sink is None or not sink.has_file_header:
            return header + line
        sink.set_file_header(header)
        return line if is_first else header + line

    def _format_event(self, e: Event) -> str:
        print(_event_text(e), file=sys.stderr)
        return ""


def _csv_line(fields: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue()


class TextFormatter(Formatter):
    """Writes aligned columns for people."""

    _is_header_written = False

    def _format_decision(self, d: Decision) -> str:
        width = max(5, *(len(name) for name in self._names))
        line = f"{d.index:>6}  {d.start:>9} - {d.end:<9}"
        header = f"{'#':>6}  {'samples':^21}"
        if self._is_regression:
            header += "  " + "  ".join(f"{name:>10}" for name in self._names)
            line += "  " + "  ".join(f"{v:>10.4g}" for v in d.outputs)
        else:
            header += f"  {'label':<{width}}  score"
            line += f"  {d.label:<{width}}  {d.score:.3f}"
        if d.truth is not None:
            header += f"  {'truth':<{width}}"
            line += f"  {sanitize(d.truth):<{width}}"
            if d.label is not None:
                line += "  ok" if d.label == d.truth else "  wrong"
        if d.gaps:
            line += f"  ({d.gaps} gap samples)"
        if self._logits and not self._is_regression:
            line += "  [" + " ".join(f"{v:.4f}" for v in d.outputs) + "]"
        if not self._is_header_written:
            self._is_header_written = True
            line = f"{header.rstrip()}\n{line}"
        return line.rstrip() + "\n"

    def _format_event(self, e: Event) -> str:
        return f"-- {_event_text(e)}\n"


def _event_text(e: Event) -> str:
    details = ", ".join(f"{name} {value}" for name, value in e.details.items())
    return f"{e.event.replace('_', ' ')} at sample {e.sample}" + (f" ({details})" if details else "")


_FORMATTERS: dict[str, type[Formatter]] = {"ndjson": NdjsonFormatter, "csv": CsvFormatter, "text": TextFormatter}
FORMATS = tuple(_FORMATTERS)


def stdout() -> TextIO:
    """Return standard output, set to escape characters that its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return sys.stdout


def stdout_format() -> str:
    """Return the format that suits standard output: text on a terminal, else ndjson."""
    return "text" if sys.stdout is not None and sys.stdout.isatty() else "ndjson"


def make(name: str, file: TextIO | Sink, network: Network, logits: bool, truth: bool) -> Formatter:
    """Return a formatter of one of FORMATS that writes to ``file``."""
    return _FORMATTERS[name](file, network, logits, truth)
