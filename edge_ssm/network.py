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
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from edge_ssm.errors import NetworkError

Array = npt.NDArray[Any]
Discretization = Literal["zoh", "bilinear"]
Pooling = Literal["mean", "last", "none"]
Task = Literal["classification", "regression"]
MixingDtype = Literal["float32", "float16", "int8"]
MIXING_DTYPES: tuple[MixingDtype, ...] = ("float32", "float16", "int8")

INPUT_LIMIT = 1e9
"""Largest magnitude of a normalised input value. Past it, squares in LayerNorm could leave float32's range
and the state would never recover, so such a sample is treated like a non-finite one."""
FEW_CHANNELS = 32


ENGINE_ERROR = 1e-4
"""Largest error of an output, of ordinary size, that an engine's arithmetic may bring."""

MAX_RATE_CHANGE = 1000.0
"""Largest factor between a stream's sample rate and the trained one; past it a unit was mistaken."""


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
    def low_rank(self) -> Array:
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


def quantised(mixing: Mixing, dtype: MixingDtype) -> Mixing:
    """The same map with weights of ``dtype`` and one scale a row, so that its largest weight is the type's largest.

    float16 is scaled too, to 2^14: its subnormals, which some processors flush, are then too small to matter.
    """
    values = mixing.values()
    if dtype == "float32":
        return replace(mixing, weight=values.astype(np.float32), scale=None)
    largest = np.abs(values).max(axis=1, initial=0.0)
    top = 127.0 if dtype == "int8" else 2.0**14
    # The smallest scale keeps 1 / scale within float32.
    scale = np.maximum(largest / top, 1e-30).astype(np.float32)
    scaled = values / scale.astype(np.float64)[:, None]
    weight = np.clip(np.rint(scaled), -127, 127).astype(np.int8) if dtype == "int8" else scaled.astype(np.float16)
    return replace(mixing, weight=weight, scale=scale)


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


def _expect(condition: bool, where: str, problem: str) -> None:
    if not condition:
        raise NetworkError(f"{where}: {problem}")


def _check_array(array: Array, where: str, shape: tuple[int, ...]) -> None:
    _expect(array.shape == shape, where, f"shape {array.shape}, expected {shape}")
    _expect(bool(np.isfinite(array).all()), where, "holds a non-finite value (NaN or infinity)")


def _check_indices(indices: Array, where: str, h: int) -> None:
    _expect(indices.ndim == 1, where, f"shape {indices.shape}, expected one axis")
    if len(indices):
        low, high = int(indices.min()), int(indices.max())
        out = low if low < 0 else high
        _expect(low >= 0 and high < h, where, f"index {out} is out of range, expected 0 to {h - 1}")
        _expect(bool((np.diff(indices) > 0).all()), where, "indices are repeated or not ascending")


def _check_ssm(ssm: SSM, where: str, h: int, discretization: Discretization) -> None:
    _check_indices(ssm.active, f"{where}.active", h)
    k = len(ssm.active)
    _check_array(ssm.pairs, f"{where}.pairs", (k,))
    # Bounded before they are summed: the sum of hostile numbers could overflow to a fitting one.
    fits = bool(((ssm.pairs >= 1) & (ssm.pairs <= len(ssm.A))).all())
    _expect(fits, f"{where}.pairs", f"a number is not from 1 to {len(ssm.A)}, the states that there are")
    states = int(ssm.pairs.sum())
    for name in ("A", "B", "C"):
        _check_array(getattr(ssm, name), f"{where}.{name}", (states,))
    if ssm.P is not None:
        _check_array(ssm.P, f"{where}.P", (states,))
        _expect(discretization == "bilinear", f"{where}.P", "a rank-one term needs bilinear discretization")
    _check_array(ssm.D, f"{where}.D", (h,))
    _check_array(ssm.dt, f"{where}.dt", (k,))
    _expect(bool((ssm.dt > 0).all()), f"{where}.dt", "a step size is not positive")
    unstable = np.flatnonzero(ssm.A.real >= 0)
    if len(unstable):
        at = unstable[0]
        owner = int(ssm.owner[at])
        n = int(at - ssm.pairs[:owner].sum())
        problem = f"unstable: Re A = {ssm.A.real[at]:.3g} at channel {ssm.active[owner]}, state {n}; expected < 0"
        raise NetworkError(f"{where}.A: {problem}")


def _check_mixing(mixing: Mixing, ssm: SSM, where: str, h: int) -> None:
    _check_indices(mixing.columns, f"{where}.columns", h)
    _check_indices(mixing.rows, f"{where}.rows", h)
    doubled = 2 if mixing.kind == "glu" else 1
    _expect(mixing.weight.dtype.name in MIXING_DTYPES, f"{where}.weight", f"dtype {mixing.weight.dtype}")
    _check_array(mixing.weight, f"{where}.weight", (doubled * len(mixing.rows), len(mixing.columns)))
    _check_array(mixing.bias, f"{where}.bias", (doubled * h,))
    _expect((mixing.scale is None) == (mixing.dtype == "float32"), f"{where}.scale", "goes with float16 and int8 only")
    if mixing.scale is not None:
        _check_array(mixing.scale, f"{where}.scale", (doubled * len(mixing.rows),))
        _expect(bool((mixing.scale > 0).all()), f"{where}.scale", "a value is not positive")
    # By a mask: NumPy's set functions import its masked arrays, a twentieth of the time to the first decision.
    left = np.zeros(h, dtype=bool)
    left[mixing.columns] = True
    removed, lost = np.flatnonzero(~left), ssm.active[~left[ssm.active]]
    _expect(len(lost) == 0, f"{where}.columns", f"channel {lost[:1]} is active but does not enter the mixing")
    _expect(bool((ssm.D[removed] == 0).all()), f"{where}.columns", "a channel with a gain does not enter the mixing")


def check(network: Network) -> None:
    """Raise NetworkError, naming the part, unless all shapes fit, all values are finite and every SSM is stable."""
    h, d_input, d_output = network.d_model, network.d_input, network.d_output
    _expect(d_input >= 1 and h >= 1 and d_output >= 1, "network", "d_input, d_model and d_output must be positive")
    _expect(len(set(network.input.channels)) == d_input, "input.channels", "names are repeated")
    units = network.input.units
    _expect(len(units) in (0, d_input), "input.units", f"{len(units)} given, expected {d_input} or none")
    _check_array(network.input.mean, "input.mean", (d_input,))
    _check_array(network.input.std, "input.std", (d_input,))
    _expect(bool((network.input.std > 0).all()), "input.std", "a value is not positive")
    rate = network.input.sample_rate_hz
    _expect(rate is None or (np.isfinite(rate) and rate > 0), "input.sample_rate_hz", f"{rate}, expected positive")
    if isinstance(network.encoder, TokenEncoder):
        _expect(d_input == 1, "input.channels", f"a token encoder reads 1 channel, not {d_input}")
        vocabulary = network.encoder.embedding.shape[0]
        _expect(vocabulary >= 1, "encoder.embedding", "the vocabulary is empty")
        _check_array(network.encoder.embedding, "encoder.embedding", (vocabulary, h))
    else:
        _check_array(network.encoder.weight, "encoder.weight", (h, d_input))
        _check_array(network.encoder.bias, "encoder.bias", (h,))
    for i, block in enumerate(network.blocks):
        where = f"blocks.{i}"
        _check_ssm(block.ssm, f"{where}.ssm", h, network.discretization)
        _check_mixing(block.mixing, block.ssm, f"{where}.mixing", h)
        if block.norm is not None:
            _check_array(block.norm.weight, f"{where}.norm.weight", (h,))
            _check_array(block.norm.bias, f"{where}.norm.bias", (h,))
            _expect(block.norm.eps > 0 and np.isfinite(block.norm.eps), f"{where}.norm.eps", "not positive")
    _check_array(network.decoder.weight, "decoder.weight", (d_output, h))
    _check_array(network.decoder.bias, "decoder.bias", (d_output,))
    _expect(network.window >= 1, "window", f"{network.window} samples, expected 1 or more")
    _expect(network.pooling != "none" or network.window == 1, "window", "a network without pooling has window 1")
    n_labels = len(network.labels)
    _expect(n_labels in (0, d_output), "labels", f"{n_labels} given, expected {d_output} (one an output) or none")
    _expect(len(set(network.labels)) == n_labels, "labels", "names are repeated")
    _expect(0 <= network.rounding_error < np.inf, "rounding_error", f"{network.rounding_error}, expected 0 or more")


@dataclass(frozen=True)
class InputRange:
    """The values that may reach an engine's state; all else is a gap."""

    low: Array  # (d_input,) float64, in the sensor's units
    high: Array  # (d_input,) float64
    whole: bool
    """Whether only whole numbers are meant: tokens."""

    def bad(self, values: Array) -> Array:
        """Which of ``values`` (..., d_input) must not be stepped, as bool. NaN is always among them."""
        bad: Array = ~((values >= self.low) & (values <= self.high))
        return bad | (values != np.floor(values)) if self.whole else bad

    def takes(self, values: Array) -> bool:
        """Whether none of ``values`` (d_input,) is bad: each sample is asked, and nearly all are good.

        Of a few channels Python compares faster than NumPy makes four arrays (0.3 against 1.7 us for six).
        """
        if self.whole or len(values) > FEW_CHANNELS:
            return not self.bad(values).any()
        for low, value, high in zip(self._lows, values.tolist(), self._highs, strict=True):
            if not low <= value <= high:
                return False
        return True

    @cached_property
    def _lows(self) -> list[float]:
        return list(self.low.tolist())

    @cached_property
    def _highs(self) -> list[float]:
        return list(self.high.tolist())


def input_range(network: Network) -> InputRange:
    """Tokens of the vocabulary, or values within INPUT_LIMIT standard deviations of the mean."""
    if isinstance(network.encoder, TokenEncoder):
        last = len(network.encoder.embedding) - 1
        return InputRange(np.zeros(1), np.full(1, float(last)), True)
    spread = INPUT_LIMIT * network.input.std
    return InputRange(network.input.mean - spread, network.input.mean + spread, False)


def at_sample_rate(network: Network, hz: float) -> Network:
    """The same continuous-time network for a stream at ``hz`` samples a second: dt and window are rescaled.

    Raises NetworkError if the network has no sample rate of its own or ``hz`` is too far from it.
    """
    trained = network.input.sample_rate_hz
    if trained is None:
        raise NetworkError("sample rate: the network states none of its own, so it can't be moved to another one")
    if not trained / MAX_RATE_CHANGE <= hz <= trained * MAX_RATE_CHANGE:
        raise NetworkError(
            f"sample rate: {hz:g} Hz, expected {trained / MAX_RATE_CHANGE:g} to {trained * MAX_RATE_CHANGE:g} "
            f"(the network was trained at {trained:g} Hz)"
        )
    if hz == trained:
        return network
    ratio = trained / hz
    blocks = tuple(replace(b, ssm=replace(b.ssm, dt=b.ssm.dt * ratio)) for b in network.blocks)
    window = 1 if network.pooling == "none" else max(1, round(network.window / ratio))
    return replace(network, blocks=blocks, window=window, input=replace(network.input, sample_rate_hz=float(hz)))


@dataclass(frozen=True)
class BlockCost:
    """What one block keeps and does. Multiply-adds are real, for one sample."""

    active: int
    bypassed: int
    pairs: int
    """Conjugate pairs of all active channels together: S."""
    columns: int
    rows: int
    parameters: int
    weight_bytes: int
    """Of the parameters as a step reads them: mixing weights in their own type, all others float32."""
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    blocks: tuple[BlockCost, ...]
    parameters: int
    """Real numbers that a step reads, counting a complex one as two."""
    weight_bytes: int
    state_values: int
    """Real numbers of recurrent state a lane."""
    multiply_adds: int
    """Real multiply-adds of one sample through the whole network, without activations and norms."""


def _block_cost(block: Block, h: int) -> BlockCost:
    ssm, mixing = block.ssm, block.mixing
    pairs = int(ssm.pairs.sum())
    low_rank = int(ssm.pairs[ssm.low_rank].sum())
    columns = len(mixing.columns)
    # A step of one pair: complex times complex (4), and the real part of another such product (2). A rank-one term
    # adds an inner product (2) and its outcome times P (2).
    macs = 6 * pairs + 4 * low_rank + columns + mixing.weight.size
    # B is folded into C, so that the step reads (Abar, C): 4 numbers a pair; 4 more for a rank-one term.
    others = 4 * pairs + 4 * low_rank + columns + mixing.bias.size + (2 * h if block.norm else 0)
    others += 0 if mixing.scale is None else mixing.scale.size
    parameters = others + mixing.weight.size
    weight_bytes = 4 * others + mixing.weight.nbytes
    k = len(ssm.active)
    return BlockCost(k, h - k, pairs, columns, len(mixing.rows), parameters, weight_bytes, macs)


def cost(network: Network) -> Cost:
    h = network.d_model
    blocks = tuple(_block_cost(block, h) for block in network.blocks)
    encoder = network.encoder
    token = isinstance(encoder, TokenEncoder)
    ends = encoder.embedding.size if isinstance(encoder, TokenEncoder) else encoder.weight.size + h
    ends += network.decoder.weight.size + network.d_output
    return Cost(
        blocks=blocks,
        parameters=ends + sum(b.parameters for b in blocks),
        weight_bytes=4 * ends + sum(b.weight_bytes for b in blocks),
        state_values=sum(2 * b.pairs for b in blocks),
        multiply_adds=(0 if token else h * network.d_input)
        + network.decoder.weight.size
        + sum(b.multiply_adds for b in blocks),
    )


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
