"""The CPU engine: one compiled call runs T samples of all lanes through the whole network, in float32.

What makes it fast: everything of a step lies in one packed array, in the order in which it is read; the inner loops
run over channels, or over the rows of the mixing, as explicit vectors (``vector``); the recurrence is in delta form
(``discretize``), which float32 needs for slow states; subnormals are flushed.

What pruning removed is not there: channels are sorted by their number of states, so that those which still have an
n-th one are the first of the row; mixing has only the columns and rows that are left, in the type they are stored in.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numba import njit

from edge_ssm.discretize import StepParameters, decayed, step_parameters
from edge_ssm.engines import flush, vector
from edge_ssm.engines.base import Engine, refusal
from edge_ssm.network import Array, Mixing, Network, Norm, TokenEncoder, input_range

_FLAGS = {"contract", "reassoc", "nsz", "arcp"}
_ALIGN = 16
"""Packed arrays begin at a multiple of this many float32: a cache line."""

# The layout table: one array of integers, first the head, then a row a block, then index lists.
# "w" is an offset into the packed weights in float32, "i" an offset into the table, "x" one into a lane's state.
# "room": scratch for one value a channel, whole vectors.
_HEAD_COLUMNS = (
    "lanes",
    "lane",
    "h",
    "d_output",
    "prenorm",
    "vocabulary",
    "encoder",
    "decoder",
    "blocks",
    "scratch",
    "room",
)
_LANES, _LANE, _H, _D_OUTPUT, _PRENORM, _VOCABULARY, _ENCODER, _DECODER, _BLOCKS, _SCRATCH, _ROOM = range(11)
_BLOCK_COLUMNS = (
    "diagonal",  # i: the group of diagonal channels, or -1
    "low_rank",  # i: the group of those with a rank-one term, or -1
    "D",  # w: [G]
    "columns",  # G
    "column_index",  # i: [G], channel of each column
    "mixing",  # w: [G, padded to fours][rows] in the weights' own type: W transposed, one column of W after another
    "dtype",  # 0: float32, 1: float16, 2: int8
    "scale",  # w: [rows]
    "bias",  # w: [rows]
    "rows",  # of values, padded; as many gates follow for GLU
    "glu",
    "row_index",  # i: [R], channel of each row
    "R",
    "constant",  # w: [H], what removed rows add; -1 where none does
    "norm",  # w: weight [H], bias [H]; -1 without
    "layer_norm",  # 1: LayerNorm, 0: affine
    "eps",  # w: one float32
)
(
    _DIAGONAL,
    _LOW_RANK,
    _D,
    _COLUMNS,
    _COLUMN_INDEX,
    _MIXING,
    _DTYPE,
    _SCALE,
    _BIAS,
    _ROWS,
    _GLU,
    _ROW_INDEX,
    _R,
    _CONSTANT,
    _NORM,
    _LAYER,
    _EPS,
) = range(len(_BLOCK_COLUMNS))
# A group of channels: its head, then the channels left at each pair index, then two index lists.
_GROUP_COLUMNS = (
    "count",  # channels
    "pairs",  # of the channel that has most
    "weights",  # w: for n in pairs: [dr, di, cr, ci][channels left]; 8 of them for a rank-one term
    "state",  # x: for n in pairs: [re, im][channels left]
    "beta",  # w: [channels]
)
_COUNT, _PAIRS, _WEIGHTS, _STATE, _BETA, _LEFT = range(len(_GROUP_COLUMNS) + 1)
_FIRST_BLOCK, _BLOCK_SIZE = len(_HEAD_COLUMNS), len(_BLOCK_COLUMNS)
_DTYPES = ("float32", "float16", "int8")


@njit(inline="always", fastmath=_FLAGS)
def _norm(u: Array, v: Array, w: Array, weight: int, layer: int, eps: int, h: int) -> None:
    """v = norm(u); the two may be the same array."""
    bias = weight + h
    if layer:
        total = np.float32(0)
        for i in range(h):
            total += u[i]
        mean = total / np.float32(h)
        squares = np.float32(0)
        for i in range(h):
            squares += (u[i] - mean) * (u[i] - mean)
        scale = np.float32(1) / np.sqrt(squares / np.float32(h) + w[eps])
        for i in range(h):
            v[i] = (u[i] - mean) * scale * w[weight + i] + w[bias + i]
    else:
        for i in range(h):
            v[i] = u[i] * w[weight + i] + w[bias + i]


@njit(inline="always")
def _gather(scratch: Array, v: int, work: int, table: Array, group: int) -> None:
    """The group's inputs at ``work``, zero where padded, and zeros behind them for the outputs."""
    count, left = table[group + _COUNT], group + _LEFT
    channels, width = left + table[group + _PAIRS], table[left]
    for j in range(count):
        scratch[work + j] = scratch[v + table[channels + j]]
    for j in range(count, 2 * width):
        scratch[work + j] = np.float32(0)


@njit(inline="always")
def _scatter(scratch: Array, y: int, summed: int, table: Array, group: int) -> None:
    """Add the group's outputs to the columns of their channels."""
    count = table[group + _COUNT]
    places = group + _LEFT + table[group + _PAIRS] + count
    for j in range(count):
        scratch[y + table[places + j]] += scratch[summed + j]


@njit(inline="always")
def _diagonal(v: int, y: int, x: Array, w: Array, table: Array, group: int, scratch: Array, work: int) -> None:
    """y += 2 Re(C x) after x += delta x + v, for a group of diagonal channels; the factor 2 is in the packed C."""
    at, place, left = table[group + _WEIGHTS], table[group + _STATE], group + _LEFT
    summed = work + table[left]
    _gather(scratch, v, work, table, group)
    for n in range(table[group + _PAIRS]):
        k = table[left + n]
        vector.diagonal_row(w, at, x, place, scratch, work, summed, k)  # type: ignore[call-arg]
        at += 4 * k
        place += 2 * k
    _scatter(scratch, y, summed, table, group)


@njit(inline="always", fastmath=_FLAGS)
def _low_rank(v: int, y: int, x: Array, w: Array, table: Array, group: int, scratch: Array, work: int) -> None:
    """The same for channels with a rank-one term: q = 2 Re(r x) + beta v first, the factor 2 in the packed r."""
    at, place, left, beta = table[group + _WEIGHTS], table[group + _STATE], group + _LEFT, table[group + _BETA]
    width = table[left]
    summed, q = work + width, work + 2 * width
    _gather(scratch, v, work, table, group)
    for j in range(width):
        scratch[q + j] = w[beta + j] * scratch[work + j]
    behind, far = at, place
    for n in range(table[group + _PAIRS]):
        k = table[left + n]
        vector.inner_row(w, behind, x, far, scratch, q, k)  # type: ignore[call-arg]
        behind += 8 * k
        far += 2 * k
    for n in range(table[group + _PAIRS]):
        k = table[left + n]
        vector.low_rank_row(w, at, x, place, scratch, work, summed, q, k)  # type: ignore[call-arg]
        at += 8 * k
        place += 2 * k
    _scatter(scratch, y, summed, table, group)


@njit(inline="always", fastmath=_FLAGS)
def _mixing(g: int, z: int, w: Array, table: Array, row: int, both: int, scratch: Array) -> None:
    """z = W g + bias, (rows) values and, for GLU, (rows) gates behind them; four columns of W at a time."""
    columns, at, dtype, bias = table[row + _COLUMNS], table[row + _MIXING], table[row + _DTYPE], table[row + _BIAS]
    if dtype == 0:
        for i in range(both):
            scratch[z + i] = w[bias + i]
        for k in range(0, columns, 4):
            vector.four_columns_float32(w, at + k * both, scratch, g + k, z, both)
        return
    for i in range(both):
        scratch[z + i] = np.float32(0)
    if dtype == 1:
        halves = w.view(np.uint16)
        for k in range(0, columns, 4):
            vector.four_columns_float16(halves, 2 * at + k * both, scratch, g + k, z, both)
    else:
        bytes_ = w.view(np.int8)
        for k in range(0, columns, 4):
            vector.four_columns_int8(bytes_, 4 * at + k * both, scratch, g + k, z, both)
    scale = table[row + _SCALE]
    for i in range(both):
        scratch[z + i] = scratch[z + i] * w[scale + i] + w[bias + i]


@njit(inline="always", fastmath=_FLAGS)
def _block(x: Array, w: Array, table: Array, row: int, scratch: Array, h: int, prenorm: int) -> None:
    """One block of one lane, in place on u, the first h of scratch (network.py states the equations)."""
    columns, rows, norm = table[row + _COLUMNS], table[row + _ROWS], table[row + _NORM]
    index, D = table[row + _COLUMN_INDEX], table[row + _D]
    room = table[_ROOM]
    v, y, z, work = 0, 2 * room, 3 * room, 3 * room + 2 * rows
    u = scratch[0:h]
    if prenorm and norm >= 0:
        v = room
        _norm(u, scratch[v : v + h], w, norm, table[row + _LAYER], table[row + _EPS], h)
    # y has an entry a column; a group knows at which of them each of its channels stands.
    for j in range(columns):
        scratch[y + j] = w[D + j] * scratch[v + table[index + j]]
    filled = (columns + vector.WIDTH - 1) // vector.WIDTH * vector.WIDTH
    for j in range(columns, filled):
        scratch[y + j] = np.float32(0)
    if table[row + _DIAGONAL] >= 0:
        _diagonal(v, y, x, w, table, table[row + _DIAGONAL], scratch, work)
    if table[row + _LOW_RANK] >= 0:
        _low_rank(v, y, x, w, table, table[row + _LOW_RANK], scratch, work)
    vector.gelu(scratch, y, filled)  # type: ignore[call-arg]
    both = 2 * rows if table[row + _GLU] else rows
    _mixing(y, z, w, table, row, both, scratch)
    if table[row + _GLU]:
        vector.gate(scratch, z, z + rows, rows)
    if table[row + _R] == h:
        for i in range(h):
            u[i] += scratch[z + i]
    else:
        index = table[row + _ROW_INDEX]
        for i in range(table[row + _R]):
            u[table[index + i]] += scratch[z + i]
        constant = table[row + _CONSTANT]
        if constant >= 0:
            for i in range(h):
                u[i] += w[constant + i]
    if not prenorm and norm >= 0:
        _norm(u, u, w, norm, table[row + _LAYER], table[row + _EPS], h)


@njit(inline="always")
def _acceptable(samples: Array, scale: Array, whole: int) -> bool:
    """Whether every value may reach the state (network.InputRange.bad, over all samples)."""
    d_input = scale.shape[1]
    for t in range(samples.shape[0] // d_input):
        for c in range(d_input):
            value = samples[t * d_input + c]
            # Comparisons with NaN are false, so it is refused.
            if not (value >= scale[2, c] and value <= scale[3, c]):
                return False
            if whole and value != np.floor(value):
                return False
    return True


_SIGNATURE = "b1(f4[::1], i8[::1], f8[:,::1], f4[::1], f8[::1], f4[::1])"


def _run(w: Array, table: Array, scale: Array, state: Array, samples: Array, outputs: Array) -> bool:
    """T samples of all lanes, each flattened in C order. False, with nothing changed, if one is not acceptable.

    Six arrays and no more: every argument of a compiled call costs a tenth of a microsecond.
    """
    lanes, lane_size, h, d_output = table[_LANES], table[_LANE], table[_H], table[_D_OUTPUT]
    vocabulary, encoder, decoder = table[_VOCABULARY], table[_ENCODER], table[_DECODER]
    if not _acceptable(samples, scale, vocabulary):
        return False
    d_input = scale.shape[1]
    scratch = state[table[_SCRATCH] :]
    u = scratch[0:h]
    word: Any = flush.enable()  # type: ignore[call-arg]  # intrinsics take their context from Numba
    for step in range(samples.shape[0] // d_input):
        sample, output = step * d_input, step * d_output
        x = state[(step % lanes) * lane_size : (step % lanes + 1) * lane_size]
        if vocabulary:
            row = encoder + int(samples[sample]) * h
            for i in range(h):
                u[i] = w[row + i]
        else:
            for i in range(h):
                u[i] = w[encoder + i]
            for c in range(d_input):
                z = np.float32((samples[sample + c] - scale[0, c]) * scale[1, c])
                column = encoder + (c + 1) * h
                for i in range(h):
                    u[i] += w[column + i] * z
        for b in range(table[_BLOCKS]):
            _block(x, w, table, _FIRST_BLOCK + b * _BLOCK_SIZE, scratch, h, table[_PRENORM])
        for o in range(d_output):
            total = np.float32(0)
            for i in range(h):
                total += w[decoder + o * h + i] * u[i]
            outputs[output + o] = total + w[decoder + d_output * h + o]
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


def _padded(n: int, to: int = vector.WIDTH) -> int:
    return -(-n // to) * to


class _Packer:
    """Appends arrays to one flat array of float32 and says where each begins."""

    def __init__(self) -> None:
        self.parts: list[Array] = []
        self.size = 0

    def add(self, *arrays: Array) -> int:
        return self.add_raw(np.concatenate([np.ravel(array) for array in arrays]).astype(np.float32))

    def add_raw(self, array: Array) -> int:
        """The bytes of any contiguous array, as so many float32."""
        start = self.size
        raw = np.ascontiguousarray(array).view(np.uint8).ravel()
        filled = np.zeros(_padded(-(-raw.size // 4), _ALIGN) * 4, dtype=np.uint8)
        filled[: raw.size] = raw
        self.parts.append(filled.view(np.float32))
        self.size += filled.size // 4
        return start

    def packed(self) -> Array:
        """The flat array, on a 64-byte boundary."""
        return _aligned(np.concatenate([*self.parts, np.zeros(_ALIGN, dtype=np.float32)]))


def _aligned(flat: Array) -> Array:
    buffer = np.empty(flat.size + _ALIGN, dtype=np.float32)
    start = (-buffer.ctypes.data // 4) % _ALIGN
    aligned = buffer[start : start + flat.size]
    aligned[:] = flat
    return aligned


class _Group:
    """Channels of one layer and form, those with most states first, as the kernel's loops take them."""

    def __init__(self, step: StepParameters, chosen: Array, columns: int) -> None:
        self.order = chosen[np.argsort(-step.pairs[chosen], kind="stable")]
        pairs = step.pairs[self.order]
        self.deepest = int(pairs[0])
        left = [_padded(int((pairs > n).sum())) for n in range(self.deepest)]
        self.left = np.array(left, dtype=np.int64)
        first = step.first[self.order]
        # Where state n of each channel stands: in the layer's states, and in the rows of this group.
        self.states = np.concatenate([first[pairs > n] + n for n in range(self.deepest)])
        starts = np.cumsum(self.left) - self.left
        self.slots = np.concatenate([columns * starts[n] + np.arange((pairs > n).sum()) for n in range(self.deepest)])
        self.spread = np.concatenate([np.full((pairs > n).sum(), left[n]) for n in range(self.deepest)])
        self.size = int(self.left.sum())

    def rows(self, *values: Array) -> Array:
        """(S,) arrays -> for every n: [values][channels left], flat, zero where padded."""
        flat = np.zeros(len(values) * self.size)
        for i, value in enumerate(values):
            flat[self.slots + i * self.spread] = value[self.states]
        return flat


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
        self._step_shape = (network.d_input,) if lanes == 1 else (lanes, network.d_input)
        self._blank = np.empty((*self._step_shape[:-1], network.d_output), dtype=np.float32)

    def _pack(self, network: Network) -> None:
        h = network.d_model
        packer = _Packer()
        encoder = network.encoder
        if isinstance(encoder, TokenEncoder):
            vocabulary, encoder_at = len(encoder.embedding), packer.add(encoder.embedding)
        else:
            vocabulary, encoder_at = 0, packer.add(encoder.bias, encoder.weight.T)
        rows = np.full((len(network.blocks), _BLOCK_SIZE), -1, dtype=np.int64)
        lists: list[Array] = []
        self._lists_at = _FIRST_BLOCK + rows.size
        self._state_size = 0
        # Of each block: where every state's real part stands in a lane's state, and how far behind its imaginary one.
        self._slots: list[tuple[Array, Array]] = []
        scratch = 0
        for row, block, step in zip(rows, network.blocks, self._step_parameters, strict=True):
            norm = block.norm or Norm("affine", np.ones(h), np.zeros(h))
            row[_D] = packer.add(block.ssm.D[block.mixing.columns])
            row[_COLUMN_INDEX] = self._add_list(lists, block.mixing.columns)
            self._pack_mixing(row, block.mixing, packer, lists)
            row[_NORM] = packer.add(norm.weight, norm.bias) if block.norm else -1
            row[_LAYER], row[_EPS] = int(norm.kind == "layer"), packer.add(np.array([norm.eps]))
            places = np.searchsorted(block.mixing.columns, block.ssm.active)
            widest = self._pack_groups(row, step, block.ssm.active, places, packer, lists)
            scratch = max(scratch, 3 * _padded(h) + 2 * int(row[_ROWS]) + 3 * widest)
        decoder_at = packer.add(network.decoder.weight, network.decoder.bias)
        self._w = packer.packed()
        lane = _padded(self._state_size, _ALIGN)
        head = [self.lanes, lane, h, network.d_output, int(network.prenorm), vocabulary, encoder_at, decoder_at]
        head += [len(rows), self.lanes * lane, _padded(h)]
        self._table = np.concatenate([np.array(head), rows.ravel(), *lists]).astype(np.int64)
        allowed = input_range(network)
        self._scale = np.stack([network.input.mean, 1 / network.input.std, allowed.low, allowed.high])
        self._memory = _aligned(np.zeros(self.lanes * lane + scratch, dtype=np.float32))
        self._x = self._memory[: self.lanes * lane].reshape(self.lanes, lane)

    def _add_list(self, lists: list[Array], values: Array) -> int:
        at = self._lists_at
        lists.append(np.asarray(values, dtype=np.int64))
        self._lists_at += len(values)
        return at

    def _pack_mixing(self, row: Array, mixing: Mixing, packer: _Packer, lists: list[Array]) -> None:
        parts = 2 if mixing.kind == "glu" else 1
        left, columns = len(mixing.rows), len(mixing.columns)
        rows = _padded(left)

        def padded(values: Array) -> Array:
            """(parts * R, ...) -> (parts * rows, ...)."""
            whole = np.zeros((parts, rows, *values.shape[1:]), dtype=values.dtype)
            whole[:, :left] = values.reshape(parts, left, *values.shape[1:])
            return whole.reshape(parts * rows, *values.shape[1:])

        row[_COLUMNS], row[_ROWS], row[_R], row[_GLU] = columns, rows, left, parts - 1
        row[_ROW_INDEX] = self._add_list(lists, mixing.rows)
        row[_DTYPE] = _DTYPES.index(mixing.dtype)
        whole = np.zeros((_padded(columns, 4), parts * rows), dtype=mixing.weight.dtype)
        whole[:columns] = padded(mixing.weight).T
        row[_MIXING] = packer.add_raw(whole)
        row[_BIAS] = packer.add(padded(mixing.bias[mixing.stacked_rows()]))
        if mixing.scale is not None:
            row[_SCALE] = packer.add(padded(mixing.scale))
        constant = mixing.constant()
        if constant.any():
            row[_CONSTANT] = packer.add(constant)

    def _pack_groups(
        self, row: Array, step: StepParameters, active: Array, places: Array, packer: _Packer, lists: list[Array]
    ) -> int:
        """``places``: at which column of mixing each active channel stands. Returns the widest group's channels."""
        real, apart = np.zeros(len(step.delta), dtype=np.int64), np.zeros(len(step.delta), dtype=np.int64)
        widest = 0
        values = [step.delta.real, step.delta.imag, 2 * step.C.real, -2 * step.C.imag]
        more = [step.p.real, step.p.imag, 2 * step.r.real, -2 * step.r.imag]
        for column, chosen, packed in (
            (_DIAGONAL, np.flatnonzero(~step.low_rank), values),
            (_LOW_RANK, np.flatnonzero(step.low_rank), values + more),
        ):
            if not len(chosen):
                continue
            group = _Group(step, chosen, len(packed))
            beta = np.zeros(int(group.left[0]))
            beta[: len(chosen)] = step.beta[group.order]
            head = [len(chosen), group.deepest, packer.add(group.rows(*packed)), self._state_size, packer.add(beta)]
            indices = [group.left, active[group.order], places[group.order]]
            row[column] = self._add_list(lists, np.concatenate([np.array(head), *indices]))
            within = _Group(step, chosen, 2)
            real[group.states] = self._state_size + within.slots
            apart[group.states] = within.spread
            self._state_size += 2 * group.size
            widest = max(widest, int(group.left[0]))
        self._slots.append((real, real + apart))
        return widest

    def step(self, sample: npt.ArrayLike, out: Array | None = None) -> Array:
        # Of a small network's step the call is the most: one lane's arrays are flat already.
        x = np.ascontiguousarray(sample, dtype=np.float64)
        if out is not None or x.shape != self._step_shape:
            return super().step(x, out)
        result: Array = self._blank.copy()
        if self.lanes == 1:
            accepted = self._kernel(self._w, self._table, self._scale, self._memory, x, result)
        else:
            flat = x.reshape(-1), result.reshape(-1)
            accepted = self._kernel(self._w, self._table, self._scale, self._memory, *flat)
        if not accepted:
            raise refusal(self.network, x.reshape(1, self.lanes, -1))
        return result

    def _run(self, samples: Array, outputs: Array) -> None:
        flat = samples.reshape(-1), outputs.reshape(-1)
        if not self._kernel(self._w, self._table, self._scale, self._memory, *flat):
            raise refusal(self.network, samples)

    def reset(self, lane: int | None = None) -> None:
        self._x[slice(None) if lane is None else lane] = 0

    def skip(self, k: int = 1, lane: int | None = None) -> None:
        state = self._state()
        lanes = slice(None) if lane is None else lane
        for x, step in zip(state, self._step_parameters, strict=True):
            x[lanes] = decayed(step, x[lanes].astype(np.complex128), k)
        self._set_state(state)

    def _state(self) -> tuple[Array, ...]:
        return tuple((self._x[:, real] + 1j * self._x[:, imag]).astype(np.complex64) for real, imag in self._slots)

    def _set_state(self, state: tuple[Array, ...]) -> None:
        for (real, imag), new in zip(self._slots, state, strict=True):
            self._x[:, real] = new.real
            self._x[:, imag] = new.imag
