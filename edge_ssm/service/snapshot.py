"""Snapshots: the state of a run as a file, which is written whole or not at all, and checked when it is read.

8 bytes    "EDGESSM" and the version
32 bytes   SHA-256 of all that follows
8 bytes    length n of the document, unsigned little-endian
n bytes    the document, JSON (``Document``)
the rest   the engine's states, complex128 little-endian, one (lanes, S) array per block, back to back
"""

from __future__ import annotations

import hashlib
import math
import struct
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from edge_ssm import files
from edge_ssm.engines.registry import Snapshot
from edge_ssm.errors import SnapshotError
from edge_ssm.runtime.state import PipelineState

MAGIC = b"EDGESSM\x01"
MAX_BYTES = 1 << 28
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything in a snapshot but the engine's states."""

    artifact: str
    """Digest of the artifact that ran."""
    fingerprint: str
    """Fingerprint of its network at this run's sample rate."""
    shapes: list[tuple[Size, Size]]
    """Shapes of the engine's states, (lanes, S) each."""
    loop: PipelineState
    source: str
    """Name of the source; ``position`` and ``decoder`` are meaningful only for it."""
    position: dict[str, int]
    """``Source.position``."""
    decoder: dict[str, Any]
    """``FrameDecoder.state``."""
    saved_at: float
    """Seconds since the epoch."""


def to_bytes(document: Document, state: Snapshot) -> bytes:
    """Return the content of a snapshot file."""
    head = msgspec.json.encode(document)
    arrays = [np.ascontiguousarray(x, dtype="<c16").tobytes() for x in state.state]
    body = struct.pack("<Q", len(head)) + head + b"".join(arrays)
    return MAGIC + hashlib.sha256(body).digest() + body


def from_bytes(content: bytes) -> tuple[Document, Snapshot]:
    """Return document and engine state of a snapshot file. Raises SnapshotError unless ``to_bytes`` made it."""
    if len(content) < 48 or content[:8] != MAGIC:
        raise SnapshotError("snapshot: not a snapshot of this version; start without it")
    body = content[40:]
    if hashlib.sha256(body).digest() != content[8:40]:
        raise SnapshotError("snapshot: damaged (its checksum differs); start without it")
    (length,) = struct.unpack_from("<Q", body)
    if length > len(body) - 8:
        raise SnapshotError("snapshot: its document is longer than the file; start without it")
    try:
        document = msgspec.json.decode(body[8 : 8 + length], type=Document)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise SnapshotError(f"snapshot: {' '.join(str(error).split())[:120]}; start without it") from None
    rest = body[8 + length :]
    if sum(16 * math.prod(shape) for shape in document.shapes) != len(rest):
        raise SnapshotError("snapshot: its states do not have the sizes that it states; start without it")
    arrays, first = [], 0
    for shape in document.shapes:
        size = math.prod(shape)
        arrays.append(np.frombuffer(rest, dtype="<c16", count=size, offset=16 * first).reshape(shape).copy())
        first += size
    return document, Snapshot(document.fingerprint, tuple(arrays))


def read(path: Path) -> tuple[Document, Snapshot] | None:
    """Read a snapshot file; None if it does not exist. Raises SnapshotError."""
    try:
        with files.open_regular_file(path) as file:
            content = files.read_at_most(file, MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SnapshotError(f"{path}: {files.read_problem(error)}; start without it") from None
    return from_bytes(content)
