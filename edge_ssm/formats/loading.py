"""A model file of any kind that runs: an artifact (.safetensors), or what was exported from one (.onnx, .tflite)."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

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
    try:
        exported = formats_exported.read(_content(Path(path)), kind)
    except ArtifactError as error:
        raise ArtifactError(f"{os.fspath(path)}: {error}") from None
    return Model(exported.source, exported)


def kind_of(path: Path) -> Kind | None:
    """By what it begins with, whatever its name; by the name where that tells nothing. None: an artifact."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
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


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ArtifactError("not a regular file")
            if not status.st_size:
                raise ArtifactError("is empty; copy it again")
            if status.st_size > MAX_BYTES:
                raise ArtifactError(f"{status.st_size} bytes, the limit is {MAX_BYTES}")
            return file.read()
    except OSError as error:
        raise ArtifactError(f"can't be read ({error.strerror})") from None
