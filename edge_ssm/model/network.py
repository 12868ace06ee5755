"""The network: frozen dataclasses of arrays, and a fingerprint over all of them.

The notation is that of S4D (arXiv 2206.11893) and S4 (arXiv 2111.00396). A block computes, for a residual stream u of
H = d_model channels::

    v = norm(u)             if prenorm, else u
    y = SSM(v)              for every active channel; a bypassed channel yields D v
    z = mixing(gelu(y))     Linear H -> 2H and GLU, or Linear H -> H, without the removed columns and rows
    u = u + z
    u = norm(u)             if not prenorm

Arrays are read-only by convention: engines pack copies of their own, and no function changes an array in place.
``validation`` checks a network, ``cost`` counts its operations, ``transforms`` derives other networks from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Discretization = Literal["zoh", "bilinear"]
Pooling = Literal["mean", "last", "none"]
Task = Literal["classification", "regression"]
MixingDtype = Literal["float32", "float16", "int8"]
MIXING_DTYPES: tuple[MixingDtype, ...] = ("float32", "float16", "int8")
ENGINE_ERROR = 1e-4
"""Largest error of an output of ordinary size that the arithmetic of an engine may cause."""


@dataclass(frozen=True)
class InputSpec:
    """The input channels in order, and their normalisation (value - mean) / std."""

    channels: tuple[str, ...]
    """Names of the input channels, length d_input. A stream of tokens has exactly one."""
    mean: Array
    """Shape (d_input,), float64: mean of each channel, in the units of the sensor."""
    std: Array
    """Shape (d_input,), float64, positive: standard deviation of each channel, in the units of the sensor."""
    units: tuple[str, ...] = ()
    """Unit of each channel, length d_input; empty if unknown."""
    sample_rate_hz: float | None = None
    """Sample rate at which the network was trained, in Hz; None if samples have no time (text, pixels)."""


@dataclass(frozen=True)
class LinearEncoder:
    """The map from normalised samples to the residual stream: weight z + bias."""

    weight: Array
    """Shape (H, d_input), float32."""
    bias: Array
    """Shape (H,), float32."""


@dataclass(frozen=True)
class TokenEncoder:
    """The map from tokens to the residual stream: one row of the embedding for each token."""

    embedding: Array
    """Shape (vocabulary, H), float32."""


@dataclass(frozen=True)
class SSM:
    """The SSMs of one layer in continuous time: K active channels, each with its own number of conjugate pairs.

    Of every conjugate pair one state is stored; the other one is accounted for by 2 Re. An active channel is the SSM
    of S4, eq. 1, with a diagonal A::

        x' = A x + B u,    y = 2 Re(C x) + D u

    A channel some of whose P are not 0 has the diagonal-plus-low-rank matrix A - P P* of S4, of rank one::

        x' = A x - P s + B u,    s = 2 Re(P* x),    y = 2 Re(C x) + D u

    A bypassed channel is y = D u: its D is the gain.

    The states of all channels share one axis of length S = sum(pairs), channel after channel in the order of
    ``active``.
    """

    active: Array
    """Shape (K,), int64, ascending, each in [0, H): the active channels."""
    pairs: Array
    """Shape (K,), int64, 1 or more: number of conjugate pairs of each active channel, N / 2."""
    A: Array
    """Shape (S,), complex128, Re A < 0: diagonal of the state matrix, in 1/s."""
    B: Array
    """Shape (S,), complex128: input matrix."""
    C: Array
    """Shape (S,), complex128: output matrix."""
    D: Array
    """Shape (H,), float32: feed-through of an active channel, gain of a bypassed one."""
    dt: Array
    """Shape (K,), float64, positive: step size of each active channel, in the unit of 1/A."""
    P: Array | None = None
    """Shape (S,), complex128: the rank-one term. None if no channel has one."""

    @property
    def owner(self) -> Array:
        """Index of the active channel that each state belongs to, shape (S,), int64."""
        owner: Array = np.repeat(np.arange(len(self.pairs)), self.pairs)
        return owner

    @property
    def rank_one(self) -> Array:
        """Whether each active channel has a rank-one term, shape (K,), bool."""
        if self.P is None:
            return np.zeros(len(self.pairs), dtype=bool)
        mask: Array = np.bincount(self.owner, weights=self.P != 0, minlength=len(self.pairs)) > 0
        return mask


@dataclass(frozen=True)
class Norm:
    """The normalisation of a block: LayerNorm (arXiv 1607.06450), or an affine map (BatchNorm, folded)."""

    kind: Literal["layer", "affine"]
    """``layer`` is LayerNorm over the H channels; ``affine`` is u * weight + bias."""
    weight: Array
    """Shape (H,), float32."""
    bias: Array
    """Shape (H,), float32."""
    eps: float = 1e-5
    """Added to the variance by ``layer``; unused by ``affine``."""


@dataclass(frozen=True)
class Mixing:
    """The position-wise linear map after GELU, of which G columns and R rows are left after pruning.

    A column may be removed if its channel is bypassed with gain 0, so that removing it changes nothing. A removed row
    adds a constant: its bias (with GLU, its value bias times the sigmoid of its gate bias).
    """

    kind: Literal["glu", "plain"]
    """``glu``: a gated linear unit (arXiv 1612.08083), Linear H -> 2H. ``plain``: Linear H -> H."""
    weight: Array
    """Shape (2R, G) for ``glu``, value rows before gate rows, or (R, G) for ``plain``; float32, float16 or int8."""
    bias: Array
    """Shape (2H,) or (H,), float32; also of the removed rows."""
    columns: Array
    """Shape (G,), int64, ascending, each in [0, H): the columns that are left."""
    rows: Array
    """Shape (R,), int64, ascending, each in [0, H): the rows that are left."""
    scale: Array | None = None
    """Shape (2R,) or (R,), float32, positive: the weights are weight * scale, row by row. None for float32 weights."""

    @property
    def dtype(self) -> MixingDtype:
        """Type in which the weights are stored."""
        return cast("MixingDtype", self.weight.dtype.name)

    def values(self) -> Array:
        """Return the scaled weights as float64."""
        wide: Array = self.weight.astype(np.float64)
        return wide if self.scale is None else wide * self.scale.astype(np.float64)[:, None]

    def stacked_rows(self) -> Array:
        """Return the indices into ``bias`` of the rows that are left, shape (2R,) or (R,)."""
        if self.kind == "plain":
            return self.rows
        return np.concatenate([self.rows, self.rows + len(self.bias) // 2])

    def constant(self) -> Array:
        """Return what each removed row adds, and 0 for the rows that are left; shape (H,), float64."""
        wide: Array = self.bias.astype(np.float64)
        if self.kind == "glu":
            value, gate = np.split(wide, 2)
            wide = value * 0.5 * (1 + np.tanh(0.5 * gate))
        added: Array = wide.copy()
        added[self.rows] = 0
        return added


@dataclass(frozen=True)
class Block:
    """One layer of the network: SSMs, mixing and an optional norm."""

    ssm: SSM
    mixing: Mixing
    norm: Norm | None = None


@dataclass(frozen=True)
class Decoder:
    """The linear map from the residual stream to the outputs."""

    weight: Array
    """Shape (d_output, H), float32."""
    bias: Array
    """Shape (d_output,), float32."""


@dataclass(frozen=True)
class Network:
    """A whole network: encoder, blocks and decoder, and how its outputs become decisions."""

    input: InputSpec
    encoder: LinearEncoder | TokenEncoder
    blocks: tuple[Block, ...]
    decoder: Decoder
    prenorm: bool
    """Whether a block's norm comes before its SSMs instead of after the residual sum."""
    discretization: Discretization
    pooling: Pooling
    window: int
    """Number of samples that one decision pools over; 1 if pooling is "none"."""
    task: Task = "classification"
    labels: tuple[str, ...] = ()
    """Names of the classes, or of the outputs of a regression; length d_output, or empty."""
    rounding_error: float = 0.0
    """Largest error of an output caused by rounding the weights, as measured at that time; 0 if never rounded."""

    @property
    def tolerance(self) -> float:
        """Largest error of an output that an engine may cause: small compared with ``rounding_error``."""
        return max(ENGINE_ERROR, self.rounding_error / 10)

    @property
    def d_input(self) -> int:
        """Number of input channels."""
        return len(self.input.channels)

    @property
    def d_model(self) -> int:
        """Number of channels of the residual stream, H."""
        return int(self.decoder.weight.shape[1])

    @property
    def d_output(self) -> int:
        """Number of outputs."""
        return int(self.decoder.weight.shape[0])

    @property
    def labelled(self) -> tuple[str, ...]:
        """One name per output: the labels, or "0", "1", ... if the network has none."""
        return self.labels or tuple(str(i) for i in range(self.d_output))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if is_dataclass(value):
        yield path, type(value).__name__
        for field in fields(value):
            yield from _leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, tuple):
        yield path, len(value)
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}.{i}")
    else:
        yield path, value


def fingerprint(network: Network) -> str:
    """Return the SHA-256 (hex) of every value and array of the network. Snapshots of the state are tied to it."""
    digest = hashlib.sha256()
    for path, value in _leaves(network, "network"):
        if isinstance(value, np.ndarray):
            digest.update(f"{path}={value.dtype.str}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        else:
            digest.update(f"{path}={value!r}".encode())
    return digest.hexdigest()
