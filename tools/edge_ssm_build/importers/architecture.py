"""What an imported checkpoint holds: the architecture that its owner states, and its layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge_ssm import files
from edge_ssm.errors import InputRefused
from edge_ssm.model.network import Array

Transform = Literal["none", "exp", "relu", "sigmoid", "softplus"]
MAX_ARCH_BYTES = 1 << 20
Size = Annotated[int, msgspec.Meta(ge=1)]


class Architecture(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Contents of ARCH.toml: what the keys of a checkpoint cannot express.

    Fields that follow from the keys are optional, and are checked if present (docs/import.md).
    """

    d_input: Size | None = None
    d_model: Size | None = None
    d_state: Size | None = None
    n_layers: Size | None = None
    d_output: Size | None = None
    norm: Literal["layer", "batch"] | None = None
    prenorm: bool | None = None
    kernel: Literal["diag", "dplr"] | None = None
    discretization: Literal["zoh", "bilinear"] | None = None
    pooling: Literal["mean", "last"] | None = None
    window: Size | None = None
    sample_rate_hz: Annotated[float, msgspec.Meta(gt=0)] | None = None
    labels: list[str] = []
    channels: list[str] = []
    mean: list[float] = []
    std: list[float] = []
    dt_transform: Transform = "exp"
    real_transform: Transform = "exp"
    imag_transform: Transform = "none"


def read_architecture(path: Path) -> Architecture:
    """Read ARCH.toml. Raise InputRefused, naming the file and the field, if it is wrong."""
    content = files.read_regular_file(path, MAX_ARCH_BYTES, remedy="expected a TOML file; see docs/import.md")
    try:
        return msgspec.toml.decode(content, type=Architecture)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InputRefused(f"{path}: {error}; docs/import.md lists the fields") from None


@dataclass(frozen=True)
class Layer:
    """One block with the checkpoint's own parameters, all float64: K active channels of M conjugate pairs."""

    active: Array
    """Shape (K,), int64: active channels, ascending."""
    A: Array
    """Shape (K, M), complex; the same for B, C and P."""
    B: Array
    C: Array
    """Truncated to ``l_kernel`` samples (S4 paper, appendix C.3) if that is not 0."""
    P: Array | None
    """None for a diagonal layer."""
    dt: Array
    """Shape (K, 1), or (K, M) if each state has its own step."""
    l_kernel: int
    D: Array
    """Shape (K,)."""
    weight: Array
    """Weight of the mixing, shape (2H, H) with a gate (GLU), else (H, H)."""
    bias: Array
    norm_weight: Array
    """Shape (H,); the same for ``norm_bias``."""
    norm_bias: Array
    running: tuple[Array, Array] | None
    """Running mean and variance of BatchNorm, each (H,); None for LayerNorm."""


@dataclass(frozen=True)
class ImportedCheckpoint:
    """A checkpoint of another project."""

    format_name: str
    encoder: tuple[Array, Array] | None
    """Weight (H, d_input) and bias (H,); None for a network of tokens."""
    embedding: Array | None
    """Shape (V, H): embedding of V tokens; None if there is an encoder."""
    layers: tuple[Layer, ...]
    decoder: tuple[Array, Array]
    """Weight (d_output, H) and bias (d_output,)."""
    discretization: Literal["zoh", "bilinear"]
    prenorm: bool
    pooling: Literal["mean", "last"]
    window: int
    """Samples per window."""
    arch: Architecture

    @property
    def d_model(self) -> int:
        """Number of channels H."""
        return int(self.decoder[0].shape[1])
