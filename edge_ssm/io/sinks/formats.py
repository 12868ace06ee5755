"""Where decisions go: NDJSON for programs, CSV for tables, text for people. Every line is written out at once."""

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
    """Let a dead file swallow what Python still holds for it, which would fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class Formatter(ABC):
    def __init__(self, file: TextIO | Sink, network: Network, logits: bool, truth: bool) -> None:
        self._file = file
        self._logits = logits
        self._truth = truth
        self.adopt(network)

    @property
    def sink(self) -> Sink | None:
        """Where the lines go, if it is more than a file."""
        return self._file if isinstance(self._file, Sink) else None

    def adopt(self, network: Network) -> None:
        """Write decisions of another network from now on."""
        self._names = network.labelled
        self._regression = network.task == "regression"

    def decision(self, decision: Decision) -> None:
        self._write(self._decision(decision))

    def event(self, event: Event) -> None:
        self._write(self._event(event))

    @abstractmethod
    def _decision(self, decision: Decision) -> str:
        """The decision as lines, each with its newline."""

    @abstractmethod
    def _event(self, event: Event) -> str: ...

    def _write(self, text: str) -> None:
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            if not isinstance(self._file, Sink):
                discard(self._file)
            if isinstance(error, BrokenPipeError):
                raise SinkClosed from None
            raise RunFailed(f"output: can't be written ({error.strerror}); the run ends here") from None

    def close(self) -> None:
        if self._file is not sys.stdout:
            self._file.close()


class NdjsonFormatter(Formatter):
    def _decision(self, d: Decision) -> str:
        document: dict[str, Any] = {"index": d.index, "start": d.start, "end": d.end}
        if d.time is not None:
            document["time"] = d.time
        if self._regression:
            document["value"] = [float(v) for v in d.outputs]
        else:
            document |= {"label": d.label, "score": d.score}
        if d.gaps:
            document["gaps"] = d.gaps
        if self._truth:
            document["truth"] = d.truth
        if self._logits and not self._regression:
            document["logits"] = [float(v) for v in d.outputs]
        return json.dumps(document, separators=(",", ":")) + "\n"

    def _event(self, e: Event) -> str:
        return json.dumps({"event": e.event, "sample": e.sample, **e.details}, separators=(",", ":")) + "\n"


class CsvFormatter(Formatter):
    """Events have no place in a table of decisions and go to stderr. The header comes again where columns change."""

    _columns: Sequence[str] = ()

    def _decision(self, d: Decision) -> str:
        row: dict[str, Any] = {"index": d.index, "start": d.start, "end": d.end, "time": d.time}
        if not self._regression:
            row |= {"label": d.label, "score": d.score}
        row["gaps"] = d.gaps
        if self._truth:
            row["truth"] = d.truth
        if self._logits or self._regression:
            prefix = "" if self._regression else "logit_"
            row |= {f"{prefix}{name}": float(v) for name, v in zip(self._names, d.outputs, strict=True)}
        line, columns = _csv_line(row.values()), list(row)
        if columns == self._columns:
            return line
        first, self._columns = not self._columns, columns
        header, sink = _csv_line(columns), self.sink
        if sink is None or not sink.heads_files:
            return header + line
        sink.header = header
        return line if first else header + line

    def _event(self, e: Event) -> str:
        print(_in_words(e), file=sys.stderr)
        return ""


def _csv_line(fields: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue()


class TextFormatter(Formatter):
    _header_written = False

    def _decision(self, d: Decision) -> str:
        width = max(5, *(len(name) for name in self._names))
        line = f"{d.index:>6}  {d.start:>9} - {d.end:<9}"
        header = f"{'#':>6}  {'samples':^21}"
        if self._regression:
            header += "  " + "  ".join(f"{name:>10}" for name in self._names)
            line += "  " + "  ".join(f"{v:>10.4g}" for v in d.outputs)
        else:
            header += f"  {'label':<{width}}  score"
            line += f"  {d.label:<{width}}  {d.score:.3f}"
        if d.truth is not None:
            header += f"  {'truth':<{width}}"
            # A recording's labels are somebody else's text: no control characters for the terminal.
            line += f"  {sanitize(d.truth):<{width}}"
            if d.label is not None:
                line += "  ok" if d.label == d.truth else "  wrong"
        if d.gaps:
            line += f"  ({d.gaps} gap samples)"
        if self._logits and not self._regression:
            line += "  [" + " ".join(f"{v:.4f}" for v in d.outputs) + "]"
        if not self._header_written:
            self._header_written = True
            line = f"{header.rstrip()}\n{line}"
        return line.rstrip() + "\n"

    def _event(self, e: Event) -> str:
        return f"-- {_in_words(e)}\n"


def _in_words(e: Event) -> str:
    details = ", ".join(f"{name} {value}" for name, value in e.details.items())
    return f"{e.event.replace('_', ' ')} at sample {e.sample}" + (f" ({details})" if details else "")


_FORMATTERS: dict[str, type[Formatter]] = {"ndjson": NdjsonFormatter, "csv": CsvFormatter, "text": TextFormatter}
FORMATS = tuple(_FORMATTERS)


def stdout() -> TextIO:
    """Standard output, which takes a label that its encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return sys.stdout


def stdout_format() -> str:
    """What suits standard output: text on a terminal."""
    return "text" if sys.stdout is not None and sys.stdout.isatty() else "ndjson"


def make(form: str, file: TextIO | Sink, network: Network, logits: bool, truth: bool) -> Formatter:
    """A sink that writes ``form``, one of FORMATS, to ``file``."""
    return _FORMATTERS[form](file, network, logits, truth)
