"""Codecs: bytes to frames. A decoder is fed whatever bytes there are and yields frames and reports of malformed ones.

Bytes from outside are not trusted: a line has a longest length, numbers are parsed by float() alone, and whatever
can't be a frame becomes a ``Malformed`` that says where and why; a decoder never raises for it. It raises FrameError
only for a CSV header that lacks a channel, since then no row can be right.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_ssm.errors import UsageError
from edge_ssm.io.codecs.base import FrameDecoder
from edge_ssm.io.codecs.binary import BinaryDecoder
from edge_ssm.io.codecs.csv import CsvDecoder
from edge_ssm.io.codecs.ndjson import NdjsonDecoder
from edge_ssm.model.network import InputSpec

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
        from edge_ssm.io.codecs.framed import FramedDecoder

        return FramedDecoder(spec, scale)
    raise UsageError(f"format {codec!r}: unknown, expected {', '.join(FORMATS)}")
