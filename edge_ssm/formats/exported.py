"""Exported files: an ONNX or TFLite model with all in its metadata that a stream needs. docs/exported.md specifies it.

Two entries: ``edge_ssm``, a JSON document, and ``edge_ssm.artifact``, the source artifact as it was (base64 in ONNX,
whose metadata is text). Nothing is believed before the digest over the whole file was checked.
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
from edge_ssm.formats.containers import Kind
from edge_ssm.formats.graph.parts import Parts, parts_of
from edge_ssm.model.network import Array, MixingDtype, Network, Pooling, Task, TokenEncoder, fingerprint
from edge_ssm.text import sanitize

VERSION = 1
DOCUMENT, SOURCE = "edge_ssm", "edge_ssm.artifact"
ANY = 0
"""``Form.chunk`` of a graph that takes any number of samples a call."""
ZEROS = "0" * 64
LONGEST_NAME = 200

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Number = Annotated[int, msgspec.Meta(ge=0, le=artifact.MAX_SIZE)]


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A state of the graph: two tensors (k, n) float32 of k channels with up to n pairs each."""

    re: str
    """Input's name; the output with the new value is ``new.`` and this."""
    im: str
    channels: list[Number]
    """Places among the layer's active channels, in the order of rows. A row holds its channel's pairs, then padding."""
    pairs: Number
    """n"""


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine must know of a graph."""

    fingerprint: Digest
    """``network.fingerprint`` of the network that it steps."""
    weights: MixingDtype
    """Of the mixing in the graph."""
    reach: list[float]
    """Largest size of each layer's mixing input, by which an int8 ONNX graph quantises it; else empty."""
    chunk: Annotated[int, msgspec.Meta(ge=0, le=4096)]
    """Samples of a call: 1; T: 1 or T; 0: any number."""
    states: list[list[State]]
    """Of each layer."""


class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The graph's input is (value - mean) / std of each channel in float32; a token is taken as it is."""

    channels: list[str]
    mean: list[float]
    std: list[float]
    units: list[str]
    sample_rate_hz: float | None
    vocabulary: int | None


class Stream(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream needs beside the graph."""

    input: Input
    window: int
    pooling: Pooling
    task: Task
    labels: list[str]
    d_output: int


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far the graph's outputs were from the float64 reference engine's when it was exported."""

    max_error: Annotated[float, msgspec.Meta(ge=0)]
    samples: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
    samples_from: Annotated[str, msgspec.Meta(max_length=LONGEST_NAME)]
    """On one line: it is shown."""


class Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format_version: int
    digest: Digest
    """SHA-256 of the file with this digest as 64 zeros."""
    source_digest: Digest
    """Of the source artifact."""
    stream: Stream
    form: Form
    measured: Measured


class _Version(msgspec.Struct):
    format_version: int


@dataclass(frozen=True)
class Graph:
    kind: Kind
    content: bytes
    """Of the file."""
    form: Form


@dataclass(frozen=True)
class Exported:
    """An exported file, read."""

    graph: Graph
    document: Document
    source: Artifact


def stream_of(network: Network) -> Stream:
    spec, encoder = network.input, network.encoder
    return Stream(
        Input(
            list(spec.channels),
            spec.mean.tolist(),
            spec.std.tolist(),
            list(spec.units),
            spec.sample_rate_hz,
            len(encoder.embedding) if isinstance(encoder, TokenEncoder) else None,
        ),
        network.window,
        network.pooling,
        network.task,
        list(network.labels),
        network.d_output,
    )


def build(
    kind: Kind,
    network: Network,
    weights: MixingDtype = "float32",
    reach: Sequence[float] = (),
    chunk: int = 1,
    metadata: dict[str, bytes] | None = None,
    instead: str = "",
) -> Graph:
    """Write the graph of ``network``'s step.

    Raises EngineUnavailable if the package for it is missing; ``instead`` is what could be done without.
    """
    if kind == "onnx" and weights == "int8":
        fits = len(reach) == len(network.blocks) and all(0 < size < float("inf") for size in reach)
        _expect(fits, "form.reach: an int8 onnx graph needs a positive number a layer")
    parts = parts_of(network, weights)
    found = metadata or {}
    try:
        if kind == "onnx":
            from edge_ssm.formats.graph import onnx_writer

            content = onnx_writer.write(parts, reach, chunk == ANY, {key: _text(key, v) for key, v in found.items()})
        else:
            from edge_ssm.formats.graph import tflite_writer

            content = tflite_writer.write(parts, reach, chunk, found)
    except ImportError as error:
        raise EngineUnavailable(
            f"engine {kind!r}: a graph must be made here, which needs the package {error.name or error}; pip install "
            f"'edge-ssm[export]'{instead}"
        ) from None
    return Graph(kind, content, Form(fingerprint(network), weights, list(reach), chunk, _states(parts)))


def _text(key: str, value: bytes) -> str:
    return value.decode() if key == DOCUMENT else base64.b64encode(value).decode()


def _states(parts: Parts) -> list[list[State]]:
    return [
        [
            State(f"blocks.{i}.re{j}", f"blocks.{i}.im{j}", group.channels.tolist(), group.shape[1])
            for j, group in enumerate(layer.groups)
        ]
        for i, layer in enumerate(parts.layers)
    ]


def seal(graph: Graph, network: Network, source: bytes, source_digest: str, measured: Measured) -> bytes:
    """The graph's file with its metadata; ``source``: the content of the artifact that ``network`` was read from."""
    document = Document(VERSION, ZEROS, source_digest, stream_of(network), graph.form, measured)
    text = msgspec.json.encode(document)
    form = graph.form
    metadata = {DOCUMENT: text, SOURCE: source}
    content = build(graph.kind, network, form.weights, form.reach, form.chunk, metadata).content
    at = content.index(ZEROS.encode(), containers.metadata(content, graph.kind)[DOCUMENT][0])
    return content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at + len(ZEROS) :]


def read(content: bytes, kind: Kind) -> Exported:
    """Check and read an exported file. Raises ArtifactError for a foreign or damaged one."""
    found = containers.metadata(content, kind)
    if DOCUMENT not in found or SOURCE not in found:
        raise ArtifactError(
            f"no `{DOCUMENT}` metadata; a foreign {kind} model, expected one of edge-ssm-build export --to {kind}"
        )
    document = _document(content, found[DOCUMENT])
    _check_digest(content, found[DOCUMENT], document.digest)
    embedded = content[slice(*found[SOURCE])]
    if kind == "onnx":
        try:
            embedded = base64.b64decode(embedded, validate=True)
        except binascii.Error as error:
            raise ArtifactError(f"{SOURCE}: {error}; export it again") from None
    try:
        source = artifact.parse(embedded)
    except ArtifactError as error:
        raise ArtifactError(f"{SOURCE}: {error}") from None
    network = source.network
    _expect(document.source_digest == source.digest, "source_digest: is not the digest of the artifact in the file")
    _expect(
        document.form.fingerprint == fingerprint(network), "form.fingerprint: is not that of the artifact's network"
    )
    _expect(document.stream == stream_of(network), "stream: says something else than the artifact in the file")
    _check_form(document.form, network)
    measured = document.measured
    _expect(np.isfinite(measured.max_error), "measured.max_error: is not finite")
    _expect(sanitize(measured.samples_from) == measured.samples_from, "measured.samples_from: is not one line of text")
    return Exported(Graph(kind, content, document.form), document, source)


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise ArtifactError(f"{problem}; export it again")


def _document(content: bytes, span: containers.Span) -> Document:
    text = content[slice(*span)]
    try:
        version = msgspec.json.decode(text, type=_Version).format_version
        if version != VERSION:
            what = "update edge-ssm" if version > VERSION else "export the model again"
            raise ArtifactError(f"format_version {version} of an exported file is unknown, expected {VERSION}; {what}")
        return msgspec.json.decode(text, type=Document)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ArtifactError(f"{DOCUMENT}: {error}") from None


def _check_digest(content: bytes, span: containers.Span, digest: str) -> None:
    begin, end = span
    at = content.find(digest.encode(), begin, end)
    hashed = hashlib.sha256(content[:at])
    hashed.update(ZEROS.encode())
    hashed.update(content[at + len(ZEROS) :])
    if at < 0 or hashed.hexdigest() != digest:
        raise ArtifactError(
            f"digest: the content gives {hashed.hexdigest()[:16]}..., the document says {digest[:16]}...; "
            "the file is damaged or was changed, copy it again"
        )


def _check_form(form: Form, network: Network) -> None:
    blocks: Sequence[list[State]] = form.states
    _expect(len(blocks) == len(network.blocks), f"form.states: {len(blocks)} layers, expected {len(network.blocks)}")
    _expect(len(form.reach) in (0, len(network.blocks)), "form.reach: not one number a layer")
    for i, (states, block) in enumerate(zip(blocks, network.blocks, strict=True)):
        pairs: Array = block.ssm.pairs
        channels = sorted(channel for state in states for channel in state.channels)
        where = f"form.states.{i}"
        _expect(channels == list(range(len(pairs))), f"{where}: each of the {len(pairs)} channels must be there once")
        for state in states:
            _expect(bool(state.channels), f"{where}: a state without channels")
            most = int(pairs[np.array(state.channels)].max())
            _expect(most <= state.pairs <= artifact.MAX_SIZE, f"{where}: {state.pairs} pairs, expected {most} or more")
