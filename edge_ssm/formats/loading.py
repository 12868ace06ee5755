"""Loading a model file of any kind: an artifact (.safetensors), or a file exported from one (.onnx, .tflite)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edge_ssm import files
from edge_ssm.errors import ArtifactError
from edge_ssm.formats import artifact, containers, exported
from edge_ssm.formats.artifact import Artifact
from edge_ssm.formats.containers import GraphKind
from edge_ssm.formats.exported import Exported, Graph
from edge_ssm.model.network import Network

MAX_BYTES = 1 << 31
"""Size of the largest exported file: neither format allows more in one file."""


@dataclass(frozen=True)
class Model:
    """A model file that has been read and checked."""

    artifact: Artifact
    """The artifact; of an exported file, the one that it was exported from."""
    exported: Exported | None = None
    """The exported file; None for an artifact."""

    @property
    def network(self) -> Network:
        """The network."""
        return self.artifact.network

    @property
    def digest(self) -> str:
        """The digest of the file, 64 hexadecimal digits."""
        return self.exported.document.digest if self.exported else self.artifact.digest

    @property
    def graph(self) -> Graph | None:
        """The graph of an exported file; None for an artifact."""
        return self.exported.graph if self.exported else None

    def resolve_engine(self, name: str) -> str:
        """Return the engine to use: "auto" means an exported file's own runtime; other names are returned as is."""
        return self.exported.graph.kind if self.exported and name == "auto" else name


def load(path: str | os.PathLike[str]) -> Model:
    """Read and check a model file. Raises ArtifactError, in one line that names the file and the place in it."""
    kind = detect_kind(Path(path))
    if kind is None:
        return Model(artifact.load(path))
    content = files.read_regular_file(path, MAX_BYTES, error=ArtifactError, remedy=f"expected a .{kind} model")
    try:
        if not content:
            raise ArtifactError("is empty; copy it again")
        graph_file = exported.parse(content, kind)
    except ArtifactError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from None
    return Model(graph_file.source, graph_file)


def detect_kind(path: Path) -> GraphKind | None:
    """Return the kind of an exported file, or None for an artifact.

    The first bytes decide; if they are those of no format, the file's suffix does. A file that cannot be read counts
    as an artifact, whose reader reports the problem.
    """
    try:
        with files.open_regular_file(path) as file:
            start = file.read(9)
    except OSError:
        return None
    if start[4:8] == containers.TFLITE_IDENTIFIER:
        return "tflite"
    # An artifact begins with the length of its header and a brace, an ONNX file with its first field, ir_version.
    if start[:1] == b"\x08" and start[8:] != b"{":
        return "onnx"
    suffixes: dict[str, GraphKind] = {".onnx": "onnx", ".tflite": "tflite"}
    return None if start[8:] == b"{" else suffixes.get(path.suffix.lower())
