"""The CPU engine: one compiled call runs T samples of all lanes through the whole network, in float32.

What makes it fast: everything of a step lies in one packed array, in the order in which it is read; the SSM loops
run over channels innermost and mixing adds four columns at a time, so both become vector code on AVX and NEON; the
recurrence is in delta form (``discretize``), which float32 needs for slow states; subnormals are flushed.

What pruning removed is not there: channels are sorted by their number of states, so that those which still have an
n-th one are the first of the row; mixing has only the columns and rows that are left, in the type they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from edge_ssm.discretize import StepParameters, decayed, step_parameters
from edge_ssm.engines import flush
from edge_ssm.engines.base import Engine, refusal
from edge_ssm.engines.rational import gelu, sigmoid
from edge_ssm.network import Array, Mixing, Network, Norm, TokenEncoder, input_range

_FLAGS = {"contract", "reassoc", "nsz", "arcp"}
_VECTOR = 8
"""Rows are padded to this many float32, one AVX register or two NEON ones, so that loops have no remainder."""
_ALIGN = 16
"""Packed arrays begin at a multiple of this many float32: a cache line."""

# The layout table: one array of integers, first the head, then a row a block, then index lists.
# "w" is an offset into the packed weights in float32, "i" an offset into the table, "x" one into a lane's state.
_HEAD_COLUMNS = ("lanes", "lane", "h", "d_output", "prenorm", "vocabulary", "encoder", "decoder", "blocks", "scratch")
_LANES, _LANE, _H, _D_OUTPUT, _PRENORM, _VOCABULARY, _ENCODER, _DECODER, _BLOCKS, _SCRATCH = range(len(_HEAD_COLUMNS))
_BLOCK_COLUMNS = (
    "diagonal",  # i: the group of diagonal channels, or -1
    "low_rank",  # i: the group of those with a rank-one term, or -1
    "D",  # w: [G]
    "columns",  # G
    "column_index",  # i: [G], channel of each column
    "mixing",  # w: [G][rows] in the weights' own type: W transposed, one column of W after another
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


@intrinsic
def _half(typingctx: Any, bits: Any) -> Any:
    """The value of a finite float16 given by its bits (IEEE 754-2019, 3.4).

    By integer arithmetic: LLVM's own conversion calls a library function that is not there on a processor without
    F16C, and float32 arithmetic on the bits of a half subnormal would be flushed.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32, f32 = ir.IntType(32), ir.FloatType()
        wide = builder.zext(arguments[0], i32)
        size = builder.and_(wide, ir.Constant(i32, 0x7FFF))
        # Ten bits of fraction become 23, and the exponent's bias 15 becomes 127.
        normal = builder.add(builder.shl(size, ir.Constant(i32, 13)), ir.Constant(i32, 112 << 23))
        subnormal = builder.fmul(builder.uitofp(size, f32), ir.Constant(f32, 2.0**-24))
        is_normal = builder.icmp_unsigned(">=", size, ir.Constant(i32, 0x400))
        magnitude = builder.select(is_normal, normal, builder.bitcast(subnormal, i32))
        sign = builder.shl(builder.and_(wide, ir.Constant(i32, 0x8000)), ir.Constant(i32, 16))
        return builder.bitcast(builder.or_(magnitude, sign), f32)

    return types.float32(types.uint16), codegen


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


@njit(inline="always", fastmath=_FLAGS)
def _diagonal(v: Array, y: Array, x: Array, w: Array, table: Array, group: int, work: Array) -> None:
    """y += 2 Re(C x) after x += delta x + v, for a group of diagonal channels; the factor 2 is in the packed C."""
    count, weights, state = table[group + _COUNT], table[group + _WEIGHTS], table[group + _STATE]
    left = group + _LEFT
    channels = left + table[group + _PAIRS]
    places = channels + count
    width = table[left]
    gathered, summed = work[:width], work[width : 2 * width]
    for j in range(count):
        gathered[j] = v[table[channels + j]]
    for j in range(count, width):
        gathered[j] = np.float32(0)
    for j in range(width):
        summed[j] = np.float32(0)
    for n in range(table[group + _PAIRS]):
        k = table[left + n]
        a = w[weights : weights + 4 * k]
        s = x[state : state + 2 * k]
        for j in range(k):
            re, im = s[j], s[k + j]
            dr, di = a[j], a[k + j]
            new_re = (re + gathered[j]) + dr * re - di * im
            new_im = im + di * re + dr * im
            s[j] = new_re
            s[k + j] = new_im
            summed[j] += a[2 * k + j] * new_re + a[3 * k + j] * new_im
        weights += 4 * k
        state += 2 * k
    for j in range(count):
        y[table[places + j]] += summed[j]


@njit(inline="always", fastmath=_FLAGS)
def _low_rank(v: Array, y: Array, x: Array, w: Array, table: Array, group: int, work: Array) -> None:
    """The same for channels with a rank-one term: q = 2 Re(r x) + beta v first, the factor 2 in the packed r."""
    count, weights, state = table[group + _COUNT], table[group + _WEIGHTS], table[group + _STATE]
    left = group + _LEFT
    channels = left + table[group + _PAIRS]
    places = channels + count
    width = table[left]
    gathered, summed, q = work[:width], work[width : 2 * width], work[2 * width : 3 * width]
    beta = table[group + _BETA]
    for j in range(count):
        gathered[j] = v[table[channels + j]]
    for j in range(count, width):
        gathered[j] = np.float32(0)
    for j in range(width):
        summed[j] = np.float32(0)
        q[j] = w[beta + j] * gathered[j]
    at, place = weights, state
    for n in range(table[group + _PAIRS]):
        k = table[left + n]
        r = w[at + 6 * k : at + 8 * k]
        s = x[place : place + 2 * k]
        for j in range(k):
            q[j] += r[j] * s[j] + r[k + j] * s[k + j]
        at += 8 * k
        place += 2 * k
    for n in range(table[group + _PAIRS]):
        k = table[left + n]
        a = w[weights : weights + 6 * k]
        s = x[state : state + 2 * k]
        for j in range(k):
            re, im = s[j], s[k + j]
            dr, di = a[j], a[k + j]
            new_re = re + ((dr * re - di * im) + (a[4 * k + j] * q[j] + gathered[j]))
            new_im = im + ((di * re + dr * im) + a[5 * k + j] * q[j])
            s[j] = new_re
            s[k + j] = new_im
            summed[j] += a[2 * k + j] * new_re + a[3 * k + j] * new_im
        weights += 8 * k
        state += 2 * k
    for j in range(count):
        y[table[places + j]] += summed[j]


def _mixer(value: Callable[[Any], Any]) -> Any:
    """Adds W g to z, as a sum of columns of weights that ``value`` turns into float32."""

    @njit(inline="always", fastmath=_FLAGS)
    def mix(g: Array, z: Array, w: Array, count: int, rows: int) -> None:
        k = 0
        while k + 4 <= count:
            columns = w[k * rows : (k + 4) * rows]
            a, b, c, d = g[k], g[k + 1], g[k + 2], g[k + 3]
            for i in range(rows):
                z[i] += (value(columns[i]) * a + value(columns[rows + i]) * b) + (
                    value(columns[2 * rows + i]) * c + value(columns[3 * rows + i]) * d
                )
            k += 4
        while k < count:
            column = w[k * rows : (k + 1) * rows]
            for i in range(rows):
                z[i] += value(column[i]) * g[k]
            k += 1

    return mix


@njit(inline="always")
def _as_it_is(value: Any) -> Any:
    return value


@njit(inline="always")
def _from_half(bits: Any) -> Any:
    return _half(bits)  # type: ignore[call-arg]  # intrinsics take their context from Numba


@njit(inline="always")
def _from_int(value: Any) -> Any:
    return np.float32(value)


_mix_float32, _mix_float16, _mix_int8 = _mixer(_as_it_is), _mixer(_from_half), _mixer(_from_int)


@njit(inline="always", fastmath=_FLAGS)
def _mixing(g: Array, z: Array, w: Array, table: Array, row: int, both: int) -> None:
    """z = W g + bias, (rows) values and, for GLU, (rows) gates behind them."""
    columns, at, dtype, bias = table[row + _COLUMNS], table[row + _MIXING], table[row + _DTYPE], table[row + _BIAS]
    if dtype == 0:
        for i in range(both):
            z[i] = w[bias + i]
        _mix_float32(g, z, w[at : at + columns * both], columns, both)
        return
    for i in range(both):
        z[i] = np.float32(0)
    if dtype == 1:
        _mix_float16(g, z, w[at:].view(np.uint16), columns, both)
    else:
        _mix_int8(g, z, w[at:].view(np.int8), columns, both)
    scale = table[row + _SCALE]
    for i in range(both):
        z[i] = z[i] * w[scale + i] + w[bias + i]


@njit(inline="always", fastmath=_FLAGS)
def _block(u: Array, x: Array, w: Array, table: Array, row: int, scratch: Array, h: int, prenorm: int) -> None:
    """One block of one lane, in place on u (network.py states the equations)."""
    columns, rows, norm = table[row + _COLUMNS], table[row + _ROWS], table[row + _NORM]
    index, D = table[row + _COLUMN_INDEX], table[row + _D]
    v, y, z, work = scratch[h : 2 * h], scratch[2 * h : 3 * h], scratch[3 * h :], scratch[3 * h + 2 * rows :]
    if prenorm and norm >= 0:
        _norm(u, v, w, norm, table[row + _LAYER], table[row + _EPS], h)
    else:
        v = u
    # y has an entry a column; a group knows at which of them each of its channels stands.
    for j in range(columns):
        y[j] = w[D + j] * v[table[index + j]]
    if table[row + _DIAGONAL] >= 0:
        _diagonal(v, y, x, w, table, table[row + _DIAGONAL], work)
    if table[row + _LOW_RANK] >= 0:
        _low_rank(v, y, x, w, table, table[row + _LOW_RANK], work)
    for j in range(columns):
        y[j] = gelu(y[j])
    both = 2 * rows if table[row + _GLU] else rows
    _mixing(y, z, w, table, row, both)
    if table[row + _GLU]:
        for i in range(rows):
            z[i] = z[i] * sigmoid(z[rows + i])
    if table[row + _R] == h:
        for i in range(h):
            u[i] += z[i]
    else:
        index = table[row + _ROW_INDEX]
        for i in range(table[row + _R]):
            u[table[index + i]] += z[i]
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
            _block(u, x, w, table, _FIRST_BLOCK + b * _BLOCK_SIZE, scratch, h, table[_PRENORM])
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


def _padded(n: int, to: int = _VECTOR) -> int:
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
            scratch = max(scratch, 3 * h + 2 * int(row[_ROWS]) + 3 * widest)
        decoder_at = packer.add(network.decoder.weight, network.decoder.bias)
        self._w = packer.packed()
        lane = _padded(self._state_size, _ALIGN)
        head = [self.lanes, lane, h, network.d_output, int(network.prenorm), vocabulary, encoder_at, decoder_at]
        head += [len(rows), self.lanes * lane]
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
        row[_MIXING] = packer.add_raw(np.ascontiguousarray(padded(mixing.weight).T))
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
