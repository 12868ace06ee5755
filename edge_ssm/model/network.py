"""What a network is: plain frozen dataclasses of arrays, and the checks that make one runnable.

The words are those of the S4D paper (arXiv 2206.11893). A block computes, for a residual stream ``u`` of
``H = d_model`` channels::

    v = norm(u)             if prenorm, else u
    y = SSM(v)              every active channel; a bypassed channel yields D * v
    z = mixing(gelu(y))     Linear H -> 2H and GLU, or Linear H -> H; of the columns and rows that are left
    u = u + z
    u = norm(u)             if not prenorm

Arrays are read-only by convention: an engine packs its own copy, and nothing here is changed in place.
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
"""Largest error of an output, of ordinary size, that an engine's arithmetic may bring."""


@dataclass(frozen=True)
class InputSpec:
    """The sensor's side of the network: channels in order, and the normalisation (value - mean) / std."""

    channels: tuple[str, ...]
    """Names of the input channels, length d_input. A token stream has exactly one."""
    mean: Array
    """(d_input,) float64, in the sensor's units."""
    std: Array
    """(d_input,) float64, positive, in the sensor's units."""
    units: tuple[str, ...] = ()
    """Unit of every channel, length d_input, or empty when unknown."""
    sample_rate_hz: float | None = None
    """Samples a second at which the network was trained; None when there is no clock (text, pixels)."""


@dataclass(frozen=True)
class LinearEncoder:
    weight: Array  # (H, d_input) float32
    bias: Array  # (H,) float32


@dataclass(frozen=True)
class TokenEncoder:
    embedding: Array  # (vocabulary, H) float32


@dataclass(frozen=True)
class SSM:
    """The SSMs of one layer in continuous time: K active channels, channel k with its own number of conjugate pairs.

    x' = A x + B u,  y = 2 Re(C x) + D u  for an active channel (S4D, eq. 2 with conjugate pairs folded);
    x' = A x - P s + B u,  s = 2 Re(P* x)  for one with a rank-one term (S4, DPLR), where some P is not 0;
    y = D u for a bypassed one, so that D holds its gain g.

    The states of all channels lie in one axis of S = sum(pairs), channel after channel in ``active`` order.
    """

    active: Array  # (K,) int64, ascending, each in [0, H)
    pairs: Array  # (K,) int64, 1 or more: N / 2 of each channel
    A: Array  # (S,) complex128, Re A < 0, 1/s
    B: Array  # (S,) complex128
    C: Array  # (S,) complex128
    D: Array  # (H,) float32: feed-through of an active channel, gain of a bypassed one
    dt: Array  # (K,) float64, positive, the step size in the unit of 1/A
    P: Array | None = None  # (S,) complex128, the rank-one term

    @property
    def owner(self) -> Array:
        """(S,) int64: to which of the K channels each state belongs."""
        owner: Array = np.repeat(np.arange(len(self.pairs)), self.pairs)
        return owner

    @property
    def rank_one(self) -> Array:
        """(K,) bool: which channels have a rank-one term."""
        if self.P is None:
            return np.zeros(len(self.pairs), dtype=bool)
        found: Array = np.bincount(self.owner, weights=self.P != 0, minlength=len(self.pairs)) > 0
        return found


@dataclass(frozen=True)
class Norm:
    """``layer``: LayerNorm over the H channels. ``affine``: u * weight + bias (BatchNorm, folded)."""

    kind: Literal["layer", "affine"]
    weight: Array  # (H,) float32
    bias: Array  # (H,) float32
    eps: float = 1e-5
    """Added to the variance of ``layer``; unused by ``affine``."""


@dataclass(frozen=True)
class Mixing:
    """The position-wise linear map after GELU: G columns and R rows of H are left.

    A removed column's channel has no operator and gain 0, so that nothing is lost with it. A removed row adds a
    constant: its bias, through the gate for ``glu``.
    """

    kind: Literal["glu", "plain"]
    weight: Array
    """(2R, G) for glu, value rows first, gate rows second; (R, G) for plain. float32, float16 or int8."""
    bias: Array  # (2H,) or (H,) float32
    columns: Array  # (G,) int64, ascending, each in [0, H)
    rows: Array  # (R,) int64, ascending, each in [0, H)
    scale: Array | None = None
    """(2R,) or (R,) float32, positive: a row's weights are weight * scale. None for float32 weights."""

    @property
    def dtype(self) -> MixingDtype:
        return cast("MixingDtype", self.weight.dtype.name)

    def values(self) -> Array:
        """The weights as float64, scaled."""
        wide: Array = self.weight.astype(np.float64)
        return wide if self.scale is None else wide * self.scale.astype(np.float64)[:, None]

    def stacked_rows(self) -> Array:
        """Places of the rows that are left in ``bias``: (2R,) or (R,)."""
        if self.kind == "plain":
            return self.rows
        return np.concatenate([self.rows, self.rows + len(self.bias) // 2])

    def constant(self) -> Array:
        """(H,) float64: what each removed row adds; 0 where a row is left."""
        wide: Array = self.bias.astype(np.float64)
        if self.kind == "glu":
            value, gate = np.split(wide, 2)
            wide = value * 0.5 * (1 + np.tanh(0.5 * gate))
        added: Array = wide.copy()
        added[self.rows] = 0
        return added


@dataclass(frozen=True)
class Block:
    ssm: SSM
    mixing: Mixing
    norm: Norm | None = None


@dataclass(frozen=True)
class Decoder:
    weight: Array  # (d_output, H) float32
    bias: Array  # (d_output,) float32


@dataclass(frozen=True)
class Network:
    input: InputSpec
    encoder: LinearEncoder | TokenEncoder
    blocks: tuple[Block, ...]
    decoder: Decoder
    prenorm: bool
    discretization: Discretization
    pooling: Pooling
    window: int
    """Samples that one decision pools over; 1 when pooling is "none"."""
    task: Task = "classification"
    labels: tuple[str, ...] = ()
    """Names of the classes, or of the regression outputs; length d_output, or empty."""
    rounding_error: float = 0.0
    """Largest error of an output that rounding the weights brought, as it was measured when they were; 0 if never."""

    @property
    def tolerance(self) -> float:
        """Largest error of an output that an engine may bring: little beside what the rounded weights brought."""
        return max(ENGINE_ERROR, self.rounding_error / 10)

    @property
    def d_input(self) -> int:
        return len(self.input.channels)

    @property
    def d_model(self) -> int:
        return int(self.decoder.weight.shape[1])

    @property
    def d_output(self) -> int:
        return int(self.decoder.weight.shape[0])

    @property
    def labelled(self) -> tuple[str, ...]:
        """One name an output: the labels, or "0", "1", ... where the network has none."""
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
    """SHA-256 (hex) of every value and array of the network: what a state snapshot is tied to."""
    digest = hashlib.sha256()
    for path, value in _leaves(network, "network"):
        if isinstance(value, np.ndarray):
            digest.update(f"{path}={value.dtype.str}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        else:
            digest.update(f"{path}={value!r}".encode())
    return digest.hexdigest()
