"""The artifact: one .safetensors file that holds a network and everything a stream needs to run it.

docs/artifact.md is the specification. A reader checks everything before it uses it: the length of the header before it
is read, every tensor's name, data type and shape before its bytes are read, the digest over document and tensors, and
then the values themselves.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from edge_ssm import files
from edge_ssm.errors import ArtifactError, NetworkError
from edge_ssm.formats.document import (
    FORMAT_VERSION,
    BlockDocument,
    Document,
    InputDocument,
    NormDocument,
    check_depth,
    compute_digest,
    expected_tensors,
    parse_document,
)
from edge_ssm.model.network import (
    SSM,
    Array,
    Block,
    Decoder,
    InputSpec,
    LinearEncoder,
    Mixing,
    Network,
    Norm,
    TokenEncoder,
)
from edge_ssm.model.validation import check

METADATA_KEY = "edge_ssm"
MAX_HEADER_BYTES = 4 << 20


@dataclass(frozen=True)
class Artifact:
    """An artifact that has been read and checked."""

    network: Network
    provenance: dict[str, Any]
    """What made the network, free in form."""
    digest: str
    """SHA-256 over the document and all tensors, 64 hexadecimal digits."""
    format_version: int
    file_bytes: int
    """Size of the file."""


# --- writing ---------------------------------------------------------------------------------------------------


def _real_view(values: Array) -> Array:
    """Return complex values (S,) as real and imaginary parts (S, 2), in float32 where that is exact."""
    return _narrowest(np.stack([values.real, values.imag], axis=-1))


def _narrowest(values: Array) -> Array:
    """Return the values in float32 where that is exact, else in float64."""
    with np.errstate(over="ignore"):
        narrow = values.astype("<f4")
    return narrow if np.array_equal(narrow.astype("<f8"), values) else values.astype("<f8")


def _tensors_of(network: Network) -> dict[str, Array]:
    """Return the tensors of a network by name, little-endian and contiguous."""
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
    """Return the document of a network, with zeros as its digest."""
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
    encoder = network.encoder
    return Document(
        format_version=FORMAT_VERSION,
        digest="0" * 64,
        input=InputDocument(
            channels=list(network.input.channels),
            units=list(network.input.units),
            sample_rate_hz=network.input.sample_rate_hz,
        ),
        encoder="token" if isinstance(encoder, TokenEncoder) else "linear",
        vocabulary=encoder.embedding.shape[0] if isinstance(encoder, TokenEncoder) else None,
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
    """Return the content of a network's artifact file, and its digest.

    The same network and provenance give the same bytes.

    Raises NetworkError if the network does not pass ``edge_ssm.model.validation.check``, and ArtifactError if the
    provenance cannot be written as JSON.
    """
    check(network)
    check_depth(provenance)
    tensors = _tensors_of(network)
    try:
        text = msgspec.json.encode(_document_of(network, provenance)).decode()
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise ArtifactError(f"provenance: cannot be written as JSON ({error})") from None
    digest = compute_digest(text, "0" * 64, tensors)
    # With several metadata keys, safetensors would write them in random order and the bytes would not be reproducible.
    content: bytes = to_safetensors(tensors, {METADATA_KEY: text.replace("0" * 64, digest)})
    (header_bytes,) = struct.unpack("<Q", content[:8])
    if header_bytes > MAX_HEADER_BYTES:
        raise ArtifactError(f"header: {header_bytes} bytes, the limit is {MAX_HEADER_BYTES}; shorten the provenance")
    return content, digest


def save(path: str | os.PathLike[str], network: Network, provenance: dict[str, Any]) -> str:
    """Write a network to an artifact file.

    Parameters
    ----------
    path
        The file, which is replaced atomically: after a failure it has its old content.
    network
        The network to write.
    provenance
        What made the network, for example tool, data, seeds and scores: a JSON object, nested at most 64 levels deep.

    Returns
    -------
    The digest of the artifact, 64 hexadecimal digits.

    Raises
    ------
    NetworkError
        The parts of the network do not fit together, or a value is not finite.
    ArtifactError
        The provenance is not JSON, or the file cannot be written.
    """
    content, digest = to_bytes(network, provenance)
    target = Path(path)
    try:
        files.write(target, content)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error.strerror})") from None
    return digest


# --- reading ---------------------------------------------------------------------------------------------------


def _check_file(path: Path) -> int:
    """Refuse anything but a regular file whose first eight bytes state a possible header; return its size."""
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


def _document_text(metadata: dict[str, str] | None) -> str:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise ArtifactError(
            f"header: no `{METADATA_KEY}` document; a plain safetensors file, expected one of edge-ssm-build export"
        )
    return text


def _check_header(file: Any, document: Document) -> None:
    """Check names, data types and shapes of all tensors before any of their bytes is read."""
    expected = expected_tensors(document)
    present = set(file.keys())
    missing, surplus = sorted(expected.keys() - present), sorted(present - expected.keys())
    if missing:
        raise ArtifactError(f"tensor {missing[0]}: missing; the document calls for {len(expected)} tensors")
    if surplus:
        raise ArtifactError(f"tensor {surplus[0][:80]!r}: not called for by the document")
    for name, (dtypes, shape) in expected.items():
        view = file.get_slice(name)
        dtype, stored_shape = view.get_dtype(), tuple(view.get_shape())
        if dtype not in dtypes:
            raise ArtifactError(f"tensor {name}: dtype {dtype}, expected {' or '.join(dtypes)}")
        if stored_shape != shape:
            raise ArtifactError(f"tensor {name}: shape {stored_shape}, expected {shape}")


def _complex(tensor: Array) -> npt.NDArray[np.complex128]:
    """Return real and imaginary parts (S, 2) as complex values (S,)."""
    return np.ascontiguousarray(tensor, dtype=np.float64).view(np.complex128)[..., 0]


def _block_of(description: BlockDocument, part: dict[str, Array]) -> Block:
    """Build a block from its document and its tensors, whose names begin after ``blocks.{i}.``."""
    ssm = SSM(
        active=part["ssm.active"].astype(np.int64),
        pairs=part["ssm.pairs"].astype(np.int64),
        A=_complex(part["ssm.A"]),
        B=_complex(part["ssm.B"]),
        C=_complex(part["ssm.C"]),
        D=part["ssm.D"],
        dt=part["ssm.dt"].astype(np.float64),
        P=_complex(part["ssm.P"]) if description.rank_one else None,
    )
    mixing = Mixing(
        description.mixing,
        part["mixing.weight"],
        part["mixing.bias"],
        part["mixing.columns"].astype(np.int64),
        part["mixing.rows"].astype(np.int64),
        part.get("mixing.scale"),
    )
    norm = None
    if description.norm is not None:
        norm = Norm(description.norm.kind, part["norm.weight"], part["norm.bias"], description.norm.eps)
    return Block(ssm, mixing, norm)


def _network_of(document: Document, tensors: dict[str, Array]) -> Network:
    """Build the network from its document and its tensors."""
    blocks = []
    for i, description in enumerate(document.blocks):
        prefix = f"blocks.{i}."
        part = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        blocks.append(_block_of(description, part))
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
            text = _document_text(file.metadata())
            document = parse_document(text)
            _check_header(file, document)
            tensors = {name: file.get_tensor(name) for name in expected_tensors(document)}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"header: {_explain(error)}") from None
    digest = compute_digest(text, document.digest, tensors)
    if digest != document.digest:
        raise ArtifactError(
            f"digest: the content gives {digest[:16]}..., the document says {document.digest[:16]}...; "
            "the file is damaged or was changed, copy it again"
        )
    network = _network_of(document, tensors)
    check(network)
    return Artifact(network, document.provenance, digest, document.format_version, size)


def _explain(error: Exception) -> str:
    """Return the library's message on one line, with a remedy."""
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
    """Read and check an artifact file.

    Parameters
    ----------
    path
        A .safetensors file that ``save`` or ``edge-ssm-build export`` has written.

    Returns
    -------
    The artifact. Its ``network`` is what ``create_engine`` takes.

    Raises
    ------
    ArtifactError
        The file cannot be read, or is damaged, hostile, of another version or not an artifact. The message is one line
        that names the file and the place in it.
    """
    try:
        return _load(Path(path))
    except (ArtifactError, NetworkError) as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from None
