"""The artifact: one .safetensors file with everything that a stream needs. docs/artifact.md is its specification.

Nothing is believed before it is checked: the header's length before it is read, every tensor's name, dtype and
shape before its bytes are taken, the digest over document and tensors, then the values themselves.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from edge_ssm import files
from edge_ssm.errors import ArtifactError, NetworkError
from edge_ssm.model.network import (
    SSM,
    Array,
    Block,
    Decoder,
    Discretization,
    InputSpec,
    LinearEncoder,
    Mixing,
    MixingDtype,
    Network,
    Norm,
    Pooling,
    Task,
    TokenEncoder,
)
from edge_ssm.model.validation import check

FORMAT_VERSION = 2
METADATA_KEY = "edge_ssm"
MAX_HEADER_BYTES = 4 << 20
MAX_SIZE = 1 << 20
"""Largest d_input, d_model, N/2, ...: no network of use comes near it, and no product of two of them overflows."""

MAX_PROVENANCE_DEPTH = 64
"""Levels of objects and arrays. Python's own limit would be met later, at another depth by each that shows them."""

Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]
"""Names are printed on terminals: no control characters."""
Positive = Annotated[float, msgspec.Meta(gt=0)]


class InputDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    channels: Annotated[list[Name], msgspec.Meta(min_length=1, max_length=MAX_SIZE)]
    units: list[Annotated[str, msgspec.Meta(max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]*\Z")]]
    sample_rate_hz: Positive | None


class NormDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Literal["layer", "affine"]
    eps: Positive


class BlockDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    active: Count
    states: Count
    rank_one: bool = msgspec.field(name="low_rank")
    mixing: Literal["glu", "plain"]
    mixing_dtype: MixingDtype
    columns: Count
    rows: Count
    norm: NormDocument | None


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The JSON document under ``__metadata__.edge_ssm``. Only ``provenance`` is free in form."""

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


@dataclass(frozen=True)
class Artifact:
    network: Network
    provenance: dict[str, Any]
    digest: str
    """SHA-256, 64 hex digits, over the document and all tensors."""
    format_version: int
    file_bytes: int


_DTYPE_NAMES: dict[np.dtype[Any], str] = {
    np.dtype("<f4"): "F32",
    np.dtype("<f8"): "F64",
    np.dtype("<i8"): "I64",
    np.dtype("<f2"): "F16",
    np.dtype("i1"): "I8",
}


def expected_tensors(document: Document) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Name -> (allowed safetensors dtypes, shape) of every tensor that the document calls for."""
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
        weight_dtype = (_DTYPE_NAMES[np.dtype(block.mixing_dtype)],)
        tensors[f"blocks.{i}.mixing.weight"] = (weight_dtype, (doubled * block.rows, block.columns))
        tensors[f"blocks.{i}.mixing.bias"] = (f32, (doubled * h,))
        if block.mixing_dtype != "float32":
            tensors[f"blocks.{i}.mixing.scale"] = (f32, (doubled * block.rows,))
        if block.norm is not None:
            tensors[f"blocks.{i}.norm.weight"] = (f32, (h,))
            tensors[f"blocks.{i}.norm.bias"] = (f32, (h,))
    return tensors


def _digest(document_text: str, digest_in_text: str, tensors: dict[str, Array]) -> str:
    """SHA-256 as docs/artifact.md defines it: the document with its digest zeroed, then every tensor by name."""
    if document_text.count(digest_in_text) != 1:
        raise ArtifactError("digest: stands more than once in the document; write the file again")
    zeroed = document_text.replace(digest_in_text, "0" * 64).encode()
    digest = hashlib.sha256(struct.pack("<Q", len(zeroed)) + zeroed)
    for name in sorted(tensors):
        tensor = tensors[name]
        shape = ",".join(str(n) for n in tensor.shape)
        digest.update(f"{name}\0{_DTYPE_NAMES[tensor.dtype]}\0{shape}\0".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def _check_depth(provenance: Any) -> None:
    """Raise ArtifactError for what is nested too deeply, level by level: a recursion would meet its own limit."""
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
    raise ArtifactError(f"provenance: more than {MAX_PROVENANCE_DEPTH} levels of objects and arrays; say it flatter")


# --- writing ---------------------------------------------------------------------------------------------------


def _real_view(values: Array) -> Array:
    """(S,) complex -> (S, 2) float: float32 where that loses nothing, else float64."""
    pairs = np.stack([values.real, values.imag], axis=-1)
    return _narrowest(pairs)


def _narrowest(values: Array) -> Array:
    with np.errstate(over="ignore"):
        narrow = values.astype("<f4")
    return narrow if np.array_equal(narrow.astype("<f8"), values) else values.astype("<f8")


def _tensors_of(network: Network) -> dict[str, Array]:
    tensors: dict[str, Array] = {
        "input.mean": network.input.mean.astype("<f8"),
        "input.std": network.input.std.astype("<f8"),
        "decoder.weight": network.decoder.weight.astype("<f4"),
        "decoder.bias": network.decoder.bias.astype("<f4"),
    }
    if isinstance(network.encoder, TokenEncoder):
        tensors["encoder.embedding"] = network.encoder.embedding.astype("<f4")
    else:
        tensors["encoder.weight"] = network.encoder.weight.astype("<f4")
        tensors["encoder.bias"] = network.encoder.bias.astype("<f4")
    for i, block in enumerate(network.blocks):
        ssm = block.ssm
        tensors[f"blocks.{i}.ssm.active"] = ssm.active.astype("<i8")
        tensors[f"blocks.{i}.ssm.pairs"] = ssm.pairs.astype("<i8")
        for name in ("A", "B", "C") if ssm.P is None else ("A", "B", "C", "P"):
            tensors[f"blocks.{i}.ssm.{name}"] = _real_view(getattr(ssm, name))
        tensors[f"blocks.{i}.ssm.D"] = ssm.D.astype("<f4")
        tensors[f"blocks.{i}.ssm.dt"] = _narrowest(ssm.dt)
        mixing = block.mixing
        tensors[f"blocks.{i}.mixing.columns"] = mixing.columns.astype("<i8")
        tensors[f"blocks.{i}.mixing.rows"] = mixing.rows.astype("<i8")
        tensors[f"blocks.{i}.mixing.weight"] = mixing.weight.astype(np.dtype(mixing.dtype).newbyteorder("<"))
        tensors[f"blocks.{i}.mixing.bias"] = mixing.bias.astype("<f4")
        if mixing.scale is not None:
            tensors[f"blocks.{i}.mixing.scale"] = mixing.scale.astype("<f4")
        if block.norm is not None:
            tensors[f"blocks.{i}.norm.weight"] = block.norm.weight.astype("<f4")
            tensors[f"blocks.{i}.norm.bias"] = block.norm.bias.astype("<f4")
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _document_of(network: Network, provenance: dict[str, Any]) -> Document:
    blocks = [
        BlockDocument(
            active=len(b.ssm.active),
            states=len(b.ssm.A),
            rank_one=b.ssm.P is not None,
            mixing=b.mixing.kind,
            mixing_dtype=b.mixing.dtype,
            columns=len(b.mixing.columns),
            rows=len(b.mixing.rows),
            norm=None if b.norm is None else NormDocument(kind=b.norm.kind, eps=b.norm.eps),
        )
        for b in network.blocks
    ]
    token = isinstance(network.encoder, TokenEncoder)
    return Document(
        format_version=FORMAT_VERSION,
        digest="0" * 64,
        input=InputDocument(
            channels=list(network.input.channels),
            units=list(network.input.units),
            sample_rate_hz=network.input.sample_rate_hz,
        ),
        encoder="token" if token else "linear",
        vocabulary=network.encoder.embedding.shape[0] if isinstance(network.encoder, TokenEncoder) else None,
        d_model=network.d_model,
        d_output=network.d_output,
        blocks=blocks,
        prenorm=network.prenorm,
        discretization=network.discretization,
        pooling=network.pooling,
        window=network.window,
        task=network.task,
        labels=list(network.labels),
        provenance=provenance,
        rounding_error=network.rounding_error or None,
    )


def to_bytes(network: Network, provenance: dict[str, Any]) -> tuple[bytes, str]:
    """The artifact file's content and its digest. The same network and provenance give the same bytes.

    Raises NetworkError if the network does not pass ``network.check`` and ArtifactError if the document can't be JSON.
    """
    check(network)
    _check_depth(provenance)
    tensors = _tensors_of(network)
    try:
        text = msgspec.json.encode(_document_of(network, provenance)).decode()
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise ArtifactError(f"provenance: can't be written as JSON ({error})") from None
    digest = _digest(text, "0" * 64, tensors)
    # One metadata key only: safetensors writes several in random order, and the bytes would differ from run to run.
    content: bytes = to_safetensors(tensors, {METADATA_KEY: text.replace("0" * 64, digest)})
    (header_bytes,) = struct.unpack("<Q", content[:8])
    if header_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(f"header of {header_bytes} bytes, the limit is {MAX_HEADER_BYTES}: shorten the provenance")
    return content, digest


def save(path: str | os.PathLike[str], network: Network, provenance: dict[str, Any]) -> str:
    """Write the artifact, whole or not at all, and return its digest."""
    content, digest = to_bytes(network, provenance)
    target = Path(path)
    try:
        files.write(target, content)
    except OSError as error:
        raise ArtifactError(f"{target}: can't be written ({error.strerror})") from None
    return digest


# --- reading ---------------------------------------------------------------------------------------------------


def _check_file(path: Path) -> int:
    """Refuse what is not a plain file, or whose first eight bytes claim an impossible header. Returns its size."""
    try:
        with files.open_regular_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(8)
    except OSError as error:
        raise ArtifactError(f"{files.read_problem(error)}; expected a .safetensors artifact") from None
    if len(first) < 8:
        raise ArtifactError(f"byte 0: the file has {len(first)} bytes, expected at least 8; it is truncated")
    (header_bytes,) = struct.unpack("<Q", first)
    if header_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(
            f"byte 0: the header claims {header_bytes} bytes, the limit is {MAX_HEADER_BYTES}; not an edge-ssm artifact"
        )
    if 8 + header_bytes > size:
        raise ArtifactError(f"byte 0: the header claims {header_bytes} bytes, the file has {size}; copy it again")
    return size


def _parse_document(metadata: dict[str, str] | None) -> tuple[str, Document]:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise ArtifactError(
            f"header: no `{METADATA_KEY}` document; a plain safetensors file, expected one of edge-ssm-build export"
        )
    try:
        version = msgspec.json.decode(text, type=_Version).format_version
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"format_version {version} is unknown, expected {FORMAT_VERSION}; "
                f"{'update edge-ssm' if version > FORMAT_VERSION else 'export the model again'}"
            )
        document = msgspec.json.decode(text, type=Document)
        _check_depth(document.provenance)
        return text, document
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ArtifactError(f"document: {error}") from None


def _check_header(file: Any, document: Document) -> None:
    """Every tensor is there with an allowed dtype and the right shape, and no other: before any byte is taken."""
    expected = expected_tensors(document)
    present = set(file.keys())
    missing, surplus = sorted(expected.keys() - present), sorted(present - expected.keys())
    if missing:
        raise ArtifactError(f"tensor {missing[0]}: missing; the document calls for {len(expected)} tensors")
    if surplus:
        raise ArtifactError(f"tensor {surplus[0][:80]!r}: not called for by the document")
    for name, (dtypes, shape) in expected.items():
        view = file.get_slice(name)
        dtype, found = view.get_dtype(), tuple(view.get_shape())
        if dtype not in dtypes:
            raise ArtifactError(f"tensor {name}: dtype {dtype}, expected {' or '.join(dtypes)}")
        if found != shape:
            raise ArtifactError(f"tensor {name}: shape {found}, expected {shape}")


def _complex(tensor: Array) -> npt.NDArray[np.complex128]:
    """(S, 2) -> (S,)."""
    wide = np.ascontiguousarray(tensor, dtype=np.float64)
    return wide.view(np.complex128)[..., 0]


def _network_of(document: Document, tensors: dict[str, Array]) -> Network:
    blocks = []
    for i, described in enumerate(document.blocks):
        part = {name.removeprefix(f"blocks.{i}."): t for name, t in tensors.items() if name.startswith(f"blocks.{i}.")}
        ssm = SSM(
            active=part["ssm.active"].astype(np.int64),
            pairs=part["ssm.pairs"].astype(np.int64),
            A=_complex(part["ssm.A"]),
            B=_complex(part["ssm.B"]),
            C=_complex(part["ssm.C"]),
            D=part["ssm.D"],
            dt=part["ssm.dt"].astype(np.float64),
            P=_complex(part["ssm.P"]) if described.rank_one else None,
        )
        mixing = Mixing(
            described.mixing,
            part["mixing.weight"],
            part["mixing.bias"],
            part["mixing.columns"].astype(np.int64),
            part["mixing.rows"].astype(np.int64),
            part.get("mixing.scale"),
        )
        norm = None
        if described.norm is not None:
            norm = Norm(described.norm.kind, part["norm.weight"], part["norm.bias"], described.norm.eps)
        blocks.append(Block(ssm, mixing, norm))
    encoder: LinearEncoder | TokenEncoder
    if document.encoder == "token":
        encoder = TokenEncoder(tensors["encoder.embedding"])
    else:
        encoder = LinearEncoder(tensors["encoder.weight"], tensors["encoder.bias"])
    return Network(
        input=InputSpec(
            channels=tuple(document.input.channels),
            mean=tensors["input.mean"],
            std=tensors["input.std"],
            units=tuple(document.input.units),
            sample_rate_hz=document.input.sample_rate_hz,
        ),
        encoder=encoder,
        blocks=tuple(blocks),
        decoder=Decoder(tensors["decoder.weight"], tensors["decoder.bias"]),
        prenorm=document.prenorm,
        discretization=document.discretization,
        pooling=document.pooling,
        window=document.window,
        task=document.task,
        labels=tuple(document.labels),
        rounding_error=document.rounding_error or 0.0,
    )


def _load(path: Path) -> Artifact:
    size = _check_file(path)
    try:
        with safe_open(path, framework="np") as file:
            text, document = _parse_document(file.metadata())
            _check_header(file, document)
            tensors = {name: file.get_tensor(name) for name in expected_tensors(document)}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"header: {_plain(error)}") from None
    digest = _digest(text, document.digest, tensors)
    if digest != document.digest:
        raise ArtifactError(
            f"digest: the content gives {digest[:16]}..., the document says {document.digest[:16]}...; "
            "the file is damaged or was changed, copy it again"
        )
    network = _network_of(document, tensors)
    check(network)
    return Artifact(network, document.provenance, digest, document.format_version, size)


def _plain(error: Exception) -> str:
    """The library's message on one line, in words that say what to do where its own do not."""
    message = " ".join(str(error).split())
    if "IncompleteBuffer" in message or "incomplete" in message:
        return f"tensor bytes do not cover the file; it is truncated or has bytes appended, copy it again ({message})"
    return f"damaged ({message[:200]})"


def parse(content: bytes) -> Artifact:
    """Read and check an artifact that is in memory. Raises ArtifactError."""
    descriptor = os.memfd_create("artifact", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        return _load(Path(f"/proc/self/fd/{descriptor}"))
    except NetworkError as error:
        raise ArtifactError(str(error)) from None
    finally:
        os.close(descriptor)


def load(path: str | os.PathLike[str]) -> Artifact:
    """Read and check an artifact. Raises ArtifactError, naming file and place, for whatever is wrong with it."""
    try:
        return _load(Path(path))
    except (ArtifactError, NetworkError) as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from None
