"""A model file of any kind that runs: an artifact (.safetensors), or what was exported from one (.onnx, .tflite)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from edge_ssm import files
from edge_ssm.errors import ArtifactError
from edge_ssm.formats import artifact, containers
from edge_ssm.formats import exported as formats_exported
from edge_ssm.formats.artifact import Artifact
from edge_ssm.formats.containers import Kind
from edge_ssm.formats.exported import Exported, Graph
from edge_ssm.model.network import Network

MAX_BYTES = 1 << 31
"""Of an exported file: neither format reaches further in one file."""


@dataclass(frozen=True)
class Model:
    artifact: Artifact
    """For an exported file the one that it was exported from."""
    exported: Exported | None = None

    @property
    def network(self) -> Network:
        return self.artifact.network

    @property
    def digest(self) -> str:
        return self.exported.document.digest if self.exported else self.artifact.digest

    @property
    def graph(self) -> Graph | None:
        return self.exported.graph if self.exported else None

    def engine(self, asked: str) -> str:
        """The engine's name: an exported file is for its own runtime, unless another one was asked for."""
        return self.exported.graph.kind if self.exported and asked == "auto" else asked


def load(path: str | os.PathLike[str]) -> Model:
    """Read and check a model. Raises ArtifactError, naming file and place, for whatever is wrong with it."""
    kind = kind_of(Path(path))
    if kind is None:
        return Model(artifact.load(path))
    content = files.read_regular_file(path, MAX_BYTES, error=ArtifactError, remedy=f"expected a .{kind} model")
    try:
        if not content:
            raise ArtifactError("is empty; copy it again")
        exported = formats_exported.read(content, kind)
    except ArtifactError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from None
    return Model(exported.source, exported)


def kind_of(path: Path) -> Kind | None:
    """By what it begins with, whatever its name; by the name where that tells nothing. None: an artifact."""
    try:
        with files.open_regular_file(path) as file:
            start = file.read(9)
    except OSError:
        return None  # said by whoever reads it
    if start[4:8] == containers.TFLITE_IDENTIFIER:
        return "tflite"
    # An artifact: the length of its header, and that header. An ONNX file: its first field, ir_version.
    if start[:1] == b"\x08" and start[8:] != b"{":
        return "onnx"
    suffixes: dict[str, Kind] = {".onnx": "onnx", ".tflite": "tflite"}
    return None if start[8:] == b"{" else suffixes.get(path.suffix.lower())
