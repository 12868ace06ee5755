"""The contents of an artifact: its JSON document, the tensors that the document calls for, and the digest of both.

docs/artifact.md is the specification.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from edge_ssm.errors import ArtifactError
from edge_ssm.model.network import Array, Discretization, MixingDtype, Pooling, Task

FORMAT_VERSION = 2
MAX_SIZE = 1 << 20
"""Largest d_input, d_model, N/2 and so on: far beyond any useful network, and no product of two sizes overflows."""
MAX_PROVENANCE_DEPTH = 64
"""Most levels of objects and arrays. Python's own recursion limit would apply later, and differently to each reader."""

Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]
"""A name that can be printed on a terminal: it contains no control characters."""
Positive = Annotated[float, msgspec.Meta(gt=0)]


class InputDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The input channels of a network."""

    channels: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_SIZE)]
    units: list[Annotated[str, msgspec.Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]]
    sample_rate_hz: Positive | None


class NormDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The normalisation of a block."""

    kind: Literal["layer", "affine"]
    eps: Positive


class BlockDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes and types of a block."""

    active: Count
    states: Count
    rank_one: bool = msgspec.field(name="low_rank")
    mixing: Literal["glu", "plain"]
    mixing_dtype: MixingDtype
    columns: Count
    rows: Count
    norm: NormDocument | None


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The JSON document under ``__metadata__.edge_ssm``. Only the contents of ``provenance`` are free."""

    format_version: int
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    input: InputDocument
    encoder: Literal["linear", "token"]
    vocabulary: Size | None
    d_model: Size
    d_output: Size
    blocks: Annotated[list[BlockDocument], msgspec.Meta(max_length=4096)]
    prenorm: bool
    discretization: Discretization
    pooling: Pooling
    window: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    task: Task
    labels: list[Name]
    provenance: dict[str, Any]
    rounding_error: Positive | None = None


class _Version(msgspec.Struct):
    format_version: int


DTYPE_NAMES: dict[np.dtype[Any], str] = {
    np.dtype("<f4"): "F32",
    np.dtype("<f8"): "F64",
    np.dtype("<i8"): "I64",
    np.dtype("<f2"): "F16",
    np.dtype("i1"): "I8",
}
"""Names of the data types in a safetensors header."""


def parse_document(text: str) -> Document:
    """Decode and check the document of an artifact. Raises ArtifactError."""
    try:
        check_version(msgspec.json.decode(text, type=_Version).format_version, FORMAT_VERSION)
        document = msgspec.json.decode(text, type=Document)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ArtifactError(f"document: {error}") from None
    check_depth(document.provenance)
    return document


def check_version(version: int, expected: int) -> None:
    """Raise ArtifactError for another version of a format than the ``expected`` one."""
    if version != expected:
        remedy = "update edge-ssm" if version > expected else "export the model again"
        raise ArtifactError(f"format_version {version} is unknown, expected {expected}; {remedy}")


def check_depth(provenance: Any) -> None:
    """Raise ArtifactError for provenance that is nested too deeply.

    It goes level by level, because a recursion would meet Python's own limit.
    """
    level = [provenance]
    for _ in range(MAX_PROVENANCE_DEPTH + 1):
        level = [
            item
            for value in level
            if isinstance(value, (dict, list, tuple))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ArtifactError(f"provenance: more than {MAX_PROVENANCE_DEPTH} levels of objects and arrays; flatten it")


def expected_tensors(document: Document) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Return the allowed data types and the shape of every tensor that a document calls for, by name."""
    h, d_input = document.d_model, len(document.input.channels)
    f32, f64, ssm_real = ("F32",), ("F64",), ("F32", "F64")
    tensors: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "input.mean": (f64, (d_input,)),
        "input.std": (f64, (d_input,)),
        "decoder.weight": (f32, (document.d_output, h)),
        "decoder.bias": (f32, (document.d_output,)),
    }
    if document.encoder == "token":
        tensors["encoder.embedding"] = (f32, (document.vocabulary or 0, h))
    else:
        tensors["encoder.weight"] = (f32, (h, d_input))
        tensors["encoder.bias"] = (f32, (h,))
    for i, block in enumerate(document.blocks):
        k, states = block.active, block.states
        doubled = 2 if block.mixing == "glu" else 1
        tensors[f"blocks.{i}.ssm.active"] = (("I64",), (k,))
        tensors[f"blocks.{i}.ssm.pairs"] = (("I64",), (k,))
        for name in ("A", "B", "C", "P") if block.rank_one else ("A", "B", "C"):
            tensors[f"blocks.{i}.ssm.{name}"] = (ssm_real, (states, 2))
        tensors[f"blocks.{i}.ssm.D"] = (f32, (h,))
        tensors[f"blocks.{i}.ssm.dt"] = (ssm_real, (k,))
        tensors[f"blocks.{i}.mixing.columns"] = (("I64",), (block.columns,))
        tensors[f"blocks.{i}.mixing.rows"] = (("I64",), (block.rows,))
        weight_dtype = (DTYPE_NAMES[np.dtype(block.mixing_dtype)],)
        tensors[f"blocks.{i}.mixing.weight"] = (weight_dtype, (doubled * block.rows, block.columns))
        tensors[f"blocks.{i}.mixing.bias"] = (f32, (doubled * h,))
        if block.mixing_dtype != "float32":
            tensors[f"blocks.{i}.mixing.scale"] = (f32, (doubled * block.rows,))
        if block.norm is not None:
            tensors[f"blocks.{i}.norm.weight"] = (f32, (h,))
            tensors[f"blocks.{i}.norm.bias"] = (f32, (h,))
    return tensors


def compute_digest(document_text: str, digest_in_text: str, tensors: dict[str, Array]) -> str:
    """Return the SHA-256, in hexadecimal, of an artifact's document and tensors.

    The document is hashed with its own digest, ``digest_in_text``, replaced by zeros; the tensors follow by name.
    Raises ArtifactError if the digest occurs more than once in the text.
    """
    if document_text.count(digest_in_text) != 1:
        raise ArtifactError("digest: occurs more than once in the document; export the model again")
    zeroed = document_text.replace(digest_in_text, "0" * 64).encode()
    digest = hashlib.sha256(struct.pack("<Q", len(zeroed)) + zeroed)
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(str(n) for n in tensor.shape)
        digest.update(f"{name}\0{DTYPE_NAMES[tensor.dtype]}\0{shape}\0".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
