"""All codecs, by name."""

from __future__ import annotations

from collections.abc import Sequence

from edge_ssm.errors import UsageError
from edge_ssm.io.codecs import binary, csv, framed, ndjson
from edge_ssm.io.codecs.base import Codec, FrameDecoder
from edge_ssm.model.network import InputSpec

CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (csv.CODEC, ndjson.CODEC, binary.F32LE, binary.I16LE, framed.CODEC)
}
FORMATS = tuple(CODECS)
"""Names of the codecs."""


def guess_format(path: str) -> str:
    """Return the format that the ending of a file's name suggests; csv if it suggests none, as for standard input."""
    suffix = path[path.rfind(".") :].lower() if "." in path else ""
    return next((codec.name for codec in CODECS.values() if suffix in codec.suffixes), "csv")


def decoder(name: str, spec: InputSpec, scale: Sequence[float] = (1.0,)) -> FrameDecoder:
    """Return a decoder for one of FORMATS. Raises UsageError for another name, or a scale that does not fit."""
    codec = CODECS.get(name)
    if codec is None:
        raise UsageError(f"format {name!r}: unknown, expected {', '.join(FORMATS)}")
    if not codec.is_scaled and any(factor != 1 for factor in scale):
        scaled = ", ".join(codec.name for codec in CODECS.values() if codec.is_scaled)
        raise UsageError(f"scale: only for numbers in a sensor's own unit ({scaled})")
    return codec.create(spec, scale)
