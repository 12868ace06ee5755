"""Locating the metadata in an ONNX or TFLite file without either runtime. Every length is checked before it is used.

ONNX: ModelProto.metadata_props, field 14 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), in protobuf's
encoding. TFLite: Model.metadata and Model.buffers (tensorflow/compiler/mlir/lite/schema/schema.fbs), in flatbuffers'
encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal

from edge_ssm.errors import ArtifactError

GraphKind = Literal["onnx", "tflite"]
"""The format of an exported graph, which is also the name of the engine that runs it."""
Span = tuple[int, int]
"""First byte and end of a range of bytes in a file."""

TFLITE_IDENTIFIER = b"TFL3"
METADATA_PROPS = 14
LENGTH_DELIMITED = 2
MAX_ENTRIES = 4096


def metadata(content: bytes, kind: GraphKind) -> dict[str, Span]:
    """Return the position of every metadata value by key. Raises ArtifactError, naming the byte, for another file."""
    try:
        return dict(_onnx(content) if kind == "onnx" else _tflite(content))
    except struct.error:
        raise ArtifactError(f"not a valid {kind} model, truncated after {len(content)} bytes; copy it again") from None
    except (IndexError, UnicodeDecodeError) as error:
        raise ArtifactError(f"not a valid {kind} model ({error}); copy it again") from None


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a protobuf number, and the position behind it."""
    value = shift = 0
    while at < end and shift < 64:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise IndexError(f"byte {at}: a number does not end")


def _fields(content: bytes, span: Span) -> Iterator[tuple[int, int, Span]]:
    """Yield number, wire type and position of each field of a protobuf message."""
    at, end = span
    while at < end:
        tag, at = _varint(content, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            size = _varint(content, at, end)[1] - at
        elif wire == LENGTH_DELIMITED:
            size, at = _varint(content, at, end)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise IndexError(f"byte {at}: field type {wire} does not exist")
        if number == 0 or size > end - at:
            raise IndexError(f"byte {at}: a field claims {size} bytes, {end - at} are left")
        yield number, wire, (at, at + size)
        at += size


def _onnx(content: bytes) -> Iterator[tuple[str, Span]]:
    for number, wire, span in _fields(content, (0, len(content))):
        if number == METADATA_PROPS and wire == LENGTH_DELIMITED:
            entry = {field: value for field, type_, value in _fields(content, span) if type_ == LENGTH_DELIMITED}
            if 1 in entry and 2 in entry:  # key and value
                yield content[slice(*entry[1])].decode(), entry[2]


def _u32(content: bytes, at: int) -> int:
    if at < 0:
        raise IndexError(f"byte {at}: outside of the file")
    value: int = struct.unpack_from("<I", content, at)[0]
    return value


def _field(content: bytes, table: int, number: int) -> int:
    """Return the position of a field of a flatbuffer table; 0 if it is absent."""
    (back,) = struct.unpack_from("<i", content, table)
    vtable = table - back
    if not 0 <= vtable <= len(content) - 4:
        raise IndexError(f"byte {table}: a table without a vtable")
    (size,) = struct.unpack_from("<H", content, vtable)
    if 4 + 2 * number + 2 > size:
        return 0
    (offset,) = struct.unpack_from("<H", content, vtable + 4 + 2 * number)
    return table + offset if offset else 0


def _target(content: bytes, table: int, number: int) -> int:
    """Return the position of the table, vector or string that a field refers to; 0 if it is absent."""
    at = _field(content, table, number)
    return at + _u32(content, at) if at else 0


def _bytes_of(content: bytes, vector: int) -> Span:
    """Return the position of a vector's bytes."""
    size = _u32(content, vector)
    if size > len(content) - vector - 4:
        raise IndexError(f"byte {vector}: claims {size} bytes, {len(content) - vector - 4} are left")
    return vector + 4, vector + 4 + size


def _tables(content: bytes, vector: int) -> Iterator[int]:
    """Yield the positions of a vector's tables."""
    for i in range(min(_u32(content, vector), MAX_ENTRIES)) if vector else ():
        at = vector + 4 + 4 * i
        yield at + _u32(content, at)


def _tflite(content: bytes) -> Iterator[tuple[str, Span]]:
    if content[4:8] != TFLITE_IDENTIFIER:
        raise IndexError("byte 4: the identifier TFL3 is missing")
    model = _u32(content, 0)
    buffers = _target(content, model, 4)
    for entry in _tables(content, _target(content, model, 6)):
        name, index_at = _target(content, entry, 0), _field(content, entry, 1)
        index = _u32(content, index_at) if index_at else 0
        if not name or not buffers or index >= _u32(content, buffers):
            continue
        at = buffers + 4 + 4 * index
        data = _target(content, at + _u32(content, at), 0)
        if data:
            yield content[slice(*_bytes_of(content, name))].decode(), _bytes_of(content, data)
