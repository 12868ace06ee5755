"""The CPU engine: one compiled call runs T samples of all lanes through the whole network, in float32.

What makes it fast: everything of a step lies in one packed array, in the order in which it is read; the SSM loops
run over channels innermost and mixing adds four columns at a time, so both become vector code on AVX and NEON; the
recurrence is in delta form (``discretize``), which float32 needs for slow states; subnormals are flushed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from edge_ssm.discretize import gap_power, step_parameters
from edge_ssm.engines import flush
from edge_ssm.engines.base import Engine, refusal
from edge_ssm.engines.rational import gelu, sigmoid
from edge_ssm.network import Array, Network, Norm, TokenEncoder, input_range

_FLAGS = {"contract", "reassoc", "nsz", "arcp"}
_VECTOR = 16
"""Rows are padded to this many float32, one AVX-512 register or four NEON ones, so that loops have no remainder."""

# Columns of the layout table, one row a block; offsets count float32 from the start of the packed weights.
_BLOCK_COLUMNS = (
    "channels",  # K padded to whole vectors
    "pairs",  # M
    "state",  # offset into a lane's state: [M][re, im][K]
    "ssm",  # [M][dr, di, cr, ci][K]
    "gather",  # offset into the index array: [K], channel of each active operator
    "active",  # K
    "D",  # [H]
    "mixing",  # [H][rows]: W transposed, one column of W after another
    "bias",  # [rows]
    "rows",  # 2H for GLU, H for plain
    "norm",  # weight [H], bias [H]; -1 without
    "layer_norm",  # 1: LayerNorm, 0: affine
    "eps",  # offset of one float32
)
_CHANNELS, _PAIRS, _STATE, _SSM, _GATHER, _ACTIVE, _D, _MIXING, _BIAS, _ROWS, _NORM, _LAYER, _EPS = range(13)


@njit(inline="always", fastmath=_FLAGS)
def _norm(u: Array, v: Array, w: Array, row: Array, h: int) -> None:
    """v = norm(u); the two may be the same array."""
    weight, bias = row[_NORM], row[_NORM] + h
    if row[_LAYER]:
        total = np.float32(0)
        for i in range(h):
            total += u[i]
        mean = total / np.float32(h)
        squares = np.float32(0)
        for i in range(h):
            squares += (u[i] - mean) * (u[i] - mean)
        scale = np.float32(1) / np.sqrt(squares / np.float32(h) + w[row[_EPS]])
        for i in range(h):
            v[i] = (u[i] - mean) * scale * w[weight + i] + w[bias + i]
    else:
        for i in range(h):
            v[i] = u[i] * w[weight + i] + w[bias + i]


@njit(inline="always", fastmath=_FLAGS)
def _ssm(
    v: Array, y: Array, x: Array, w: Array, index: Array, row: Array, gathered: Array, summed: Array, h: int
) -> None:
    """y = D v + 2 Re(C x) after x += delta x + v, for the active channels; the factor 2 is in the packed C."""
    k, offset, state, channels = row[_ACTIVE], row[_SSM], row[_STATE], row[_CHANNELS]
    for i in range(h):
        y[i] = w[row[_D] + i] * v[i]
    if k == 0:
        return
    for j in range(k):
        gathered[j] = v[index[row[_GATHER] + j]]
    for j in range(k, channels):
        gathered[j] = np.float32(0)
    for j in range(channels):
        summed[j] = np.float32(0)
    for n in range(row[_PAIRS]):
        a = w[offset + 4 * n * channels : offset + 4 * (n + 1) * channels]
        s = x[state + 2 * n * channels : state + 2 * (n + 1) * channels]
        for j in range(channels):
            re, im = s[j], s[channels + j]
            dr, di = a[j], a[channels + j]
            new_re = (re + gathered[j]) + dr * re - di * im
            new_im = im + di * re + dr * im
            s[j] = new_re
            s[channels + j] = new_im
            summed[j] += a[2 * channels + j] * new_re + a[3 * channels + j] * new_im
    for j in range(k):
        y[index[row[_GATHER] + j]] += summed[j]


@njit(inline="always", fastmath=_FLAGS)
def _mix(g: Array, z: Array, w: Array, row: Array, h: int) -> None:
    """z = W g + bias, as a sum of columns."""
    rows, mixing = row[_ROWS], row[_MIXING]
    for i in range(rows):
        z[i] = w[row[_BIAS] + i]
    k = 0
    while k + 4 <= h:
        columns = w[mixing + k * rows : mixing + (k + 4) * rows]
        a, b, c, d = g[k], g[k + 1], g[k + 2], g[k + 3]
        for i in range(rows):
            z[i] += columns[i] * a + columns[rows + i] * b + columns[2 * rows + i] * c + columns[3 * rows + i] * d
        k += 4
    while k < h:
        column = w[mixing + k * rows : mixing + (k + 1) * rows]
        for i in range(rows):
            z[i] += column[i] * g[k]
        k += 1


@njit(inline="always", fastmath=_FLAGS)
def _block(u: Array, x: Array, w: Array, index: Array, row: Array, scratch: Array, h: int, prenorm: int) -> None:
    """One block of one lane, in place on u (network.py states the equations)."""
    v, y, z = scratch[h : 2 * h], scratch[2 * h : 3 * h], scratch[3 * h : 5 * h]
    gathered = scratch[5 * h : 5 * h + row[_CHANNELS]]
    summed = scratch[5 * h + row[_CHANNELS] : 5 * h + 2 * row[_CHANNELS]]
    if prenorm and row[_NORM] >= 0:
        _norm(u, v, w, row, h)
    else:
        for i in range(h):
            v[i] = u[i]
    _ssm(v, y, x, w, index, row, gathered, summed, h)
    for i in range(h):
        y[i] = gelu(y[i])
    _mix(y, z, w, row, h)
    if row[_ROWS] == 2 * h:
        for i in range(h):
            u[i] += z[i] * sigmoid(z[h + i])
    else:
        for i in range(h):
            u[i] += z[i]
    if not prenorm and row[_NORM] >= 0:
        _norm(u, u, w, row, h)


@njit(inline="always")
def _acceptable(samples: Array, scale: Array, whole: int) -> bool:
    """Whether every value may reach the state (network.InputRange.bad, over all samples)."""
    for t in range(samples.shape[0]):
        for lane in range(samples.shape[1]):
            for c in range(samples.shape[2]):
                value = samples[t, lane, c]
                # Comparisons with NaN are false, so it is refused.
                if not (value >= scale[2, c] and value <= scale[3, c]):
                    return False
                if whole and value != np.floor(value):
                    return False
    return True


_SIGNATURE = "b1(f4[::1], i8[::1], i8[:,::1], i8[::1], f8[:,::1], f4[:,::1], f4[::1], f8[:,:,::1], f4[:,:,::1])"


def _run(
    w: Array,
    index: Array,
    blocks: Array,
    head: Array,
    scale: Array,
    state: Array,
    scratch: Array,
    samples: Array,
    outputs: Array,
) -> bool:
    """T samples of all lanes. False, with nothing changed, if a sample is not acceptable."""
    h, d_output, prenorm, vocabulary, encoder, decoder = head[0], head[1], head[2], head[3], head[4], head[5]
    if not _acceptable(samples, scale, vocabulary):
        return False
    d_input = samples.shape[2]
    u = scratch[0:h]
    word: Any = flush.enable()  # type: ignore[call-arg]  # intrinsics take their context from Numba
    for t in range(samples.shape[0]):
        for lane in range(samples.shape[1]):
            if vocabulary:
                row = encoder + int(samples[t, lane, 0]) * h
                for i in range(h):
                    u[i] = w[row + i]
            else:
                for i in range(h):
                    u[i] = w[encoder + i]
                for c in range(d_input):
                    z = np.float32((samples[t, lane, c] - scale[0, c]) * scale[1, c])
                    column = encoder + (c + 1) * h
                    for i in range(h):
                        u[i] += w[column + i] * z
            for b in range(blocks.shape[0]):
                _block(u, state[lane], w, index, blocks[b], scratch, h, prenorm)
            for o in range(d_output):
                total = np.float32(0)
                for i in range(h):
                    total += w[decoder + o * h + i] * u[i]
                outputs[t, lane, o] = total + w[decoder + d_output * h + o]
    flush.restore(word)
    return True


def _compile() -> Any:
    """The kernel, compiled for this machine; kept on disk where Numba finds a writable place, else in memory."""
    try:
        return njit(_SIGNATURE, fastmath=_FLAGS, cache=True, error_model="numpy")(_run)
    except Exception:
        # No writable cache folder, or a damaged cache file: slower to start, not a reason to fail.
        return njit(_SIGNATURE, fastmath=_FLAGS, error_model="numpy")(_run)


_kernel: Any = None


def _padded(n: int) -> int:
    return -(-n // _VECTOR) * _VECTOR


class _Packer:
    """Appends float32 arrays to one flat array and says where each begins."""

    def __init__(self) -> None:
        self.parts: list[Array] = []
        self.size = 0

    def add(self, *arrays: Array) -> int:
        start = self.size
        for array in arrays:
            flat = np.ascontiguousarray(array, dtype=np.float32).ravel()
            self.parts.append(flat)
            self.size += flat.size
        fill = _padded(self.size) - self.size
        self.parts.append(np.zeros(fill, dtype=np.float32))
        self.size += fill
        return start

    def packed(self) -> Array:
        """The flat array, on a 64-byte boundary."""
        flat = np.concatenate([*self.parts, np.zeros(_VECTOR, dtype=np.float32)])
        buffer = np.empty(flat.size + _VECTOR, dtype=np.float32)
        start = (-buffer.ctypes.data // 4) % _VECTOR
        aligned = buffer[start : start + flat.size]
        aligned[:] = flat
        return aligned


def _pack_ssm(delta: Array, C: Array, channels: int) -> Array:
    """(K, M) complex -> [M][dr, di, cr, ci][channels] with y = cr re + ci im, zero past K."""
    k, m = delta.shape
    packed = np.zeros((m, 4, channels), dtype=np.float32)
    for slot, values in enumerate((delta.real, delta.imag, 2 * C.real, -2 * C.imag)):
        packed[:, slot, :k] = values.T
    return packed


class CpuEngine(Engine):
    name: ClassVar[str] = "cpu"
    dtype: ClassVar[npt.DTypeLike] = np.dtype(np.float32)

    def __init__(self, network: Network, lanes: int = 1) -> None:
        super().__init__(network, lanes)
        global _kernel
        if _kernel is None:
            _kernel = _compile()
        self._kernel = _kernel
        self._step_parameters = [step_parameters(b.ssm, network.discretization) for b in network.blocks]
        self._pack(network)
        self._step_shapes = (
            ((lanes, network.d_input), (network.d_input,)) if lanes == 1 else ((lanes, network.d_input),)
        )

    def _pack(self, network: Network) -> None:
        h = network.d_model
        packer = _Packer()
        encoder = network.encoder
        if isinstance(encoder, TokenEncoder):
            vocabulary, encoder_at = len(encoder.embedding), packer.add(encoder.embedding)
        else:
            vocabulary, encoder_at = 0, packer.add(encoder.bias, encoder.weight.T)
        rows: list[list[int]] = []
        index: list[Array] = []
        state_size = 0
        for block, step in zip(network.blocks, self._step_parameters, strict=True):
            k, m = step.delta.shape
            channels = _padded(k)
            norm = block.norm or Norm("affine", np.ones(h), np.zeros(h))
            rows.append(
                [
                    channels,
                    m,
                    state_size,
                    packer.add(_pack_ssm(step.delta, step.C, channels)),
                    sum(len(i) for i in index),
                    k,
                    packer.add(block.ssm.D),
                    packer.add(block.mixing.weight.T),
                    packer.add(block.mixing.bias),
                    block.mixing.weight.shape[0],
                    packer.add(norm.weight, norm.bias) if block.norm else -1,
                    int(norm.kind == "layer"),
                    packer.add(np.array([norm.eps])),
                ]
            )
            index.append(block.ssm.active)
            state_size += 2 * m * channels
        decoder_at = packer.add(network.decoder.weight, network.decoder.bias)
        self._w = packer.packed()
        self._index = np.concatenate([*index, np.zeros(1, dtype=np.int64)]).astype(np.int64)
        self._blocks = np.array(rows, dtype=np.int64).reshape(len(rows), len(_BLOCK_COLUMNS))
        head = [h, network.d_output, int(network.prenorm), vocabulary, encoder_at, decoder_at]
        self._head = np.array(head, dtype=np.int64)
        allowed = input_range(network)
        self._scale = np.stack([network.input.mean, 1 / network.input.std, allowed.low, allowed.high])
        self._x = np.zeros((self.lanes, max(state_size, 1)), dtype=np.float32)
        self._scratch = np.zeros(5 * h + 2 * _padded(h), dtype=np.float32)

    def step(self, sample: npt.ArrayLike, out: Array | None = None) -> Array:
        x = np.ascontiguousarray(sample, dtype=np.float64)
        if out is not None or x.shape not in self._step_shapes:
            return super().step(x, out)
        result = np.empty((*x.shape[:-1], self.network.d_output), dtype=np.float32)
        shape = (1, self.lanes, -1)
        self._run(x.reshape(shape), result.reshape(shape))
        return result

    def _run(self, samples: Array, outputs: Array) -> None:
        accepted = self._kernel(
            self._w,
            self._index,
            self._blocks,
            self._head,
            self._scale,
            self._x,
            self._scratch,
            samples,
            outputs,
        )
        if not accepted:
            raise refusal(self.network, samples)

    def reset(self, lane: int | None = None) -> None:
        self._x[slice(None) if lane is None else lane] = 0

    def _views(self) -> list[Array]:
        """One (lanes, M, 2, channels) view of the state a block."""
        views = []
        for row in self._blocks:
            size = 2 * row[_PAIRS] * row[_CHANNELS]
            part = self._x[:, row[_STATE] : row[_STATE] + size]
            views.append(part.reshape(self.lanes, row[_PAIRS], 2, row[_CHANNELS]))
        return views

    def skip(self, k: int = 1, lane: int | None = None) -> None:
        decayed = [x.astype(np.complex128) for x in self._state()]
        lanes = slice(None) if lane is None else lane
        for x, step in zip(decayed, self._step_parameters, strict=True):
            x[lanes] *= gap_power(step.delta, k)
        self._set_state(tuple(decayed))

    def _state(self) -> tuple[Array, ...]:
        state = []
        for view, row in zip(self._views(), self._blocks, strict=True):
            pairs = view[..., : row[_ACTIVE]].transpose(0, 3, 1, 2)
            state.append(np.ascontiguousarray(pairs).view(np.complex64)[..., 0])
        return tuple(state)

    def _set_state(self, state: tuple[Array, ...]) -> None:
        for view, row, new in zip(self._views(), self._blocks, state, strict=True):
            k = row[_ACTIVE]
            view[:, :, 0, :k] = new.real.transpose(0, 2, 1)
            view[:, :, 1, :k] = new.imag.transpose(0, 2, 1)
