"""Exported files: an ONNX or TFLite model whose metadata holds everything a stream needs.

docs/exported.md is the specification. There are two metadata entries: ``edge_ssm``, a JSON document, and
``edge_ssm.artifact``, the artifact that the file was exported from (in base64 in ONNX, whose metadata is text). Nothing
is used before the digest over the whole file has been checked.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np

from edge_ssm.errors import ArtifactError, EngineUnavailable
from edge_ssm.formats import artifact, containers
from edge_ssm.formats.artifact import Artifact
from edge_ssm.formats.containers import GraphKind
from edge_ssm.formats.document import MAX_SIZE, Count, check_version
from edge_ssm.formats.graph.parts import Parts, parts_of
from edge_ssm.model.network import Array, MixingDtype, Network, Pooling, Task, TokenEncoder, fingerprint
from edge_ssm.text import sanitize

VERSION = 1
DOCUMENT_KEY, ARTIFACT_KEY = "edge_ssm", "edge_ssm.artifact"
ANY_LENGTH = 0
"""``GraphSpec.chunk`` of a graph that takes any number of samples in a call."""
ZEROS = "0" * 64
"""The digest in a file while it is hashed."""
MAX_NAME_LENGTH = 200

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class StateSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A state of the graph: two float32 tensors of shape (k, n) for k channels with up to n conjugate pairs each."""

    re: str
    """Name of the input with the real parts; the output with the new values has the prefix ``new.``."""
    im: str
    """Name of the input with the imaginary parts."""
    channels: list[Count]
    """Positions among the layer's active channels, in the order of the rows; a row is padded to n pairs."""
    pairs: Count
    """The number of columns, n."""


class GraphSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine must know about a graph."""

    fingerprint: Digest
    """Fingerprint of the network that the graph steps."""
    weights: MixingDtype
    """Type of the mixing weights in the graph."""
    input_maxima: list[float] = msgspec.field(name="reach")
    """Largest magnitude of each layer's mixing input, by which an int8 ONNX graph quantises it; empty for others."""
    chunk: Annotated[int, msgspec.Meta(ge=0, le=4096)]
    """Samples per call: 1, or T for 1 and T, or 0 for any number."""
    states: list[list[StateSpec]]
    """The states of each layer."""


class InputSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The input channels. The graph takes (value - mean) / std in float32, or a token as it is."""

    channels: list[str]
    mean: list[float]
    std: list[float]
    units: list[str]
    sample_rate_hz: float | None
    vocabulary: int | None


class StreamSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream needs beside the graph."""

    input: InputSpec
    window: int
    pooling: Pooling
    task: Task
    labels: list[str]
    d_output: int


class MeasuredError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The error of the graph's outputs against the float64 reference engine, measured at the export."""

    max_error: Annotated[float, msgspec.Meta(ge=0)]
    samples: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    samples_from: Annotated[str, msgspec.Meta(max_length=MAX_NAME_LENGTH)]
    """What the samples were, on one line."""


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON document under the metadata key ``edge_ssm``."""

    format_version: int
    digest: Digest
    """SHA-256 of the file with this digest replaced by zeros."""
    source_digest: Digest
    """Digest of the artifact in the file."""
    stream: StreamSpec
    graph: GraphSpec = msgspec.field(name="form")
    measured: MeasuredError


class _Version(msgspec.Struct):
    format_version: int


@dataclass(frozen=True)
class Graph:
    """A graph, and what an engine must know about it."""

    kind: GraphKind
    content: bytes
    """The model file, with or without metadata."""
    spec: GraphSpec


@dataclass(frozen=True)
class Exported:
    """An exported file that has been read and checked."""

    graph: Graph
    document: Document
    source: Artifact
    """The artifact that the file was exported from."""


def stream_spec(network: Network) -> StreamSpec:
    """Return what a stream needs to know of a network."""
    spec, encoder = network.input, network.encoder
    return StreamSpec(
        input=InputSpec(
            channels=list(spec.channels),
            mean=spec.mean.tolist(),
            std=spec.std.tolist(),
            units=list(spec.units),
            sample_rate_hz=spec.sample_rate_hz,
            vocabulary=len(encoder.embedding) if isinstance(encoder, TokenEncoder) else None,
        ),
        window=network.window,
        pooling=network.pooling,
        task=network.task,
        labels=list(network.labels),
        d_output=network.d_output,
    )


def build(
    kind: GraphKind,
    network: Network,
    weights: MixingDtype = "float32",
    input_maxima: Sequence[float] = (),
    chunk: int = 1,
    metadata: dict[str, bytes] | None = None,
    alternative: str = "",
) -> Graph:
    """Write the graph of a network's step.

    Parameters
    ----------
    kind, network
        The format, and the network.
    weights
        Type of the mixing weights in the graph.
    input_maxima
        Largest magnitude of each layer's mixing input; an int8 ONNX graph needs them.
    chunk
        Samples per call: 1, or T for 1 and T (TFLite), or ``ANY_LENGTH`` (ONNX).
    metadata
        Metadata by key.
    alternative
        What to do without the package that writes the graph; it ends the error message.

    Raises
    ------
    EngineUnavailable
        The package that writes the graph is missing.
    ArtifactError
        ``input_maxima`` does not fit an int8 ONNX graph.
    """
    if kind == "onnx" and weights == "int8":
        fits = len(input_maxima) == len(network.blocks) and all(0 < size < float("inf") for size in input_maxima)
        _expect(fits, "form.reach: an int8 onnx graph needs a positive number for each layer")
    parts = parts_of(network, weights)
    entries = metadata or {}
    try:
        if kind == "onnx":
            from edge_ssm.formats.graph import onnx_writer

            texts = {key: _as_text(key, value) for key, value in entries.items()}
            content = onnx_writer.write(parts, input_maxima, chunk == ANY_LENGTH, texts)
        else:
            from edge_ssm.formats.graph import tflite_writer

            content = tflite_writer.write(parts, input_maxima, chunk, entries)
    except ImportError as error:
        raise EngineUnavailable(
            f"engine {kind!r}: writing a graph needs the package {error.name or error}; pip install "
            f"'edge-ssm[export]'{alternative}"
        ) from None
    return Graph(kind, content, GraphSpec(fingerprint(network), weights, list(input_maxima), chunk, _states(parts)))


def _as_text(key: str, value: bytes) -> str:
    return value.decode() if key == DOCUMENT_KEY else base64.b64encode(value).decode()


def _states(parts: Parts) -> list[list[StateSpec]]:
    return [
        [
            StateSpec(f"blocks.{i}.re{j}", f"blocks.{i}.im{j}", group.channels.tolist(), group.shape[1])
            for j, group in enumerate(layer.groups)
        ]
        for i, layer in enumerate(parts.layers)
    ]


def to_bytes(graph: Graph, network: Network, source: bytes, source_digest: str, measured: MeasuredError) -> bytes:
    """Return the content of an exported file: the graph with its metadata.

    Parameters
    ----------
    graph, network
        The result of ``build``, and its network.
    source, source_digest
        Content and digest of the artifact that ``network`` was read from.
    measured
        The error of the graph.
    """
    spec = graph.spec
    document = msgspec.json.encode(Document(VERSION, ZEROS, source_digest, stream_spec(network), spec, measured))
    metadata = {DOCUMENT_KEY: document, ARTIFACT_KEY: source}
    content = build(graph.kind, network, spec.weights, spec.input_maxima, spec.chunk, metadata).content
    at = content.index(ZEROS.encode(), containers.metadata(content, graph.kind)[DOCUMENT_KEY][0])
    return content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + len(ZEROS) :]


def parse(content: bytes, kind: GraphKind) -> Exported:
    """Read and check an exported file that is in memory. Raises ArtifactError for a foreign or damaged one."""
    entries = containers.metadata(content, kind)
    if DOCUMENT_KEY not in entries or ARTIFACT_KEY not in entries:
        raise ArtifactError(
            f"no `{DOCUMENT_KEY}` metadata; a foreign {kind} model, expected one of edge-ssm-build export --to {kind}"
        )
    document = _document(content, entries[DOCUMENT_KEY])
    _check_digest(content, entries[DOCUMENT_KEY], document.digest)
    embedded = content[slice(*entries[ARTIFACT_KEY])]
    if kind == "onnx":
        try:
            embedded = base64.b64decode(embedded, validate=True)
        except binascii.Error as error:
            raise ArtifactError(f"{ARTIFACT_KEY}: {error}; export it again") from None
    try:
        source = artifact.parse(embedded)
    except ArtifactError as error:
        raise ArtifactError(f"{ARTIFACT_KEY}: {error}") from None
    _check_document(document, source)
    return Exported(Graph(kind, content, document.graph), document, source)


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise ArtifactError(f"{problem}; export it again")


def _document(content: bytes, span: containers.Span) -> Document:
    text = content[slice(*span)]
    try:
        check_version(msgspec.json.decode(text, type=_Version).format_version, VERSION)
        return msgspec.json.decode(text, type=Document)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ArtifactError(f"{DOCUMENT_KEY}: {error}") from None


def _check_digest(content: bytes, span: containers.Span, digest: str) -> None:
    begin, end = span
    at = content.find(digest.encode(), begin, end)
    actual = hashlib.sha256(content[:at])
    actual.update(ZEROS.encode())
    actual.update(content[at + len(ZEROS) :])
    if at < 0 or actual.hexdigest() != digest:
        raise ArtifactError(
            f"digest: the content gives {actual.hexdigest()[:16]}..., the document says {digest[:16]}...; "
            "the file is damaged or was changed, copy it again"
        )


def _check_document(document: Document, source: Artifact) -> None:
    """Raise ArtifactError unless the document agrees with the artifact in the file."""
    network, measured = source.network, document.measured
    _expect(document.source_digest == source.digest, "source_digest: is not the digest of the artifact in the file")
    _expect(
        document.graph.fingerprint == fingerprint(network), "form.fingerprint: is not that of the artifact's network"
    )
    _expect(document.stream == stream_spec(network), "stream: contradicts the artifact in the file")
    _check_graph_spec(document.graph, network)
    _expect(np.isfinite(measured.max_error), "measured.max_error: is not finite")
    _expect(sanitize(measured.samples_from) == measured.samples_from, "measured.samples_from: is not one line of text")


def _check_graph_spec(spec: GraphSpec, network: Network) -> None:
    n = len(network.blocks)
    _expect(len(spec.states) == n, f"form.states: {len(spec.states)} layers, expected {n}")
    _expect(len(spec.input_maxima) in (0, n), "form.reach: not one number for each layer")
    for i, (states, block) in enumerate(zip(spec.states, network.blocks, strict=True)):
        pairs: Array = block.ssm.pairs
        channels = sorted(channel for state in states for channel in state.channels)
        field = f"form.states.{i}"
        _expect(channels == list(range(len(pairs))), f"{field}: expected each of the {len(pairs)} channels once")
        for state in states:
            _expect(bool(state.channels), f"{field}: a state without channels")
            needed = int(pairs[np.array(state.channels)].max())
            _expect(needed <= state.pairs <= MAX_SIZE, f"{field}: {state.pairs} pairs, expected {needed} or more")
