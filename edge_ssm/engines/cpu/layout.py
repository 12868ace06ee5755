"""How a network lies in memory for the CPU kernel: one array of weights, in the order in which a step reads them, one
of integers that says where each part begins, one of states with the kernel's scratch behind them.

Rows are padded to whole vectors of WIDTH float32. What pruning removed is not there: mixing has only the columns and
rows that are left, in the type they are stored in; channels are sorted by their number of states, so that the WIDTH
that share a vector have about as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_ssm.model.discretize import StepParameters
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Block, Mixing, Network, Norm, TokenEncoder

WIDTH = 8
"""float32 in a vector: one AVX register or two NEON ones."""
TILE = 16
"""Items (samples and lanes) that go through the network together in a chunk: weights are read once for all of them."""
ITEMS = 4
"""Items whose sums of one mixing row are in registers together."""
SLAB = 2
"""Vectors of mixing rows whose weights lie together, column by column: in a chunk they stay in the first cache."""
LARGEST_INTEGER, LARGEST_SUM = 2**15 - 2, (2**31 - 1) // 127
"""Magnitudes of the integers that int8 weights are multiplied with, and of all of them together: sums fit in int32."""
_ALIGN = 16
"""Packed arrays begin at a multiple of this many float32: a cache line."""

# The kernel's one argument: addresses of the arrays, and the number of steps.
CALL_COLUMNS = ("weights", "table", "scale", "memory", "samples", "outputs", "steps")
CALL_WEIGHTS, CALL_TABLE, CALL_SCALE, CALL_MEMORY, CALL_SAMPLES, CALL_OUTPUTS, CALL_STEPS = range(len(CALL_COLUMNS))

# The table: a head, then a row a block, then lists. "w" is an offset into the weights in float32, "i" an offset into
# the table, "x" one into the memory. A room is h padded.
_HEAD_COLUMNS = (
    "lanes",
    "d_input",
    "d_output",
    "room",
    "prenorm",
    "vocabulary",  # 0 for a linear encoder
    "encoder",  # w: [bias, then a column a channel][room], or [token][room]
    "mask",  # w: [room], 1 for a channel, 0 for padding
    "decoder",  # w: [output][room], then the biases
    "blocks",
    "scratch",  # into the memory
    "stride",  # of an item in the scratch
)
(
    LANES,
    D_INPUT,
    D_OUTPUT,
    ROOM,
    PRENORM,
    VOCABULARY,
    ENCODER,
    MASK,
    DECODER,
    BLOCKS,
    SCRATCH,
    STRIDE,
) = range(len(_HEAD_COLUMNS))
_BLOCK_COLUMNS = (
    "columns",  # of mixing, with those of zeros between two groups
    "width",  # columns, padded
    "gather",  # i: [width], the channel of each column; -1 where column k is channel k
    "D",  # w: [width]
    "diagonal",  # vectors of diagonal channels: the first columns
    "diagonal_pairs",  # i: states of each vector, in pairs
    "diagonal_w",  # w: of each vector [pair][dr, di, cr, ci][WIDTH]
    "diagonal_x",  # x: of each vector [lane][pair][re, im][WIDTH]
    "rank_one",  # vectors of channels with a rank-one term, behind them
    "low_rank_pairs",
    "rank_one_w",  # w: of each vector beta [WIDTH], [pair][dr, di, cr, ci, pr, pi, rr, ri][WIDTH]
    "low_rank_x",
    "dtype",  # of mixing: 0 float32, 1 float16, 2 int8
    "mixing",  # w: slabs of SLAB vectors of rows, then one: [column][rows] in that type; int8: [column pair][rows][2]
    "sums",  # w: [both], of each row's weights; int8 only
    "scale",  # w: [both]; 1 for float32
    "bias",  # w: [both]
    "rows",  # of values, padded; for GLU as many gates behind them
    "glu",
    "row_index",  # i: [R], the channel of each row; -1 where row i is channel i
    "R",
    "constant",  # w: [room], what removed rows add; -1 where none does
    "norm",  # w: 1 / h and eps, weight [room], bias [room]; -1 without
    "layer_norm",  # 1: LayerNorm, 0: affine
)
(
    COLUMNS,
    WIDE,
    GATHER,
    D,
    DIAGONAL,
    DIAGONAL_PAIRS,
    DIAGONAL_W,
    DIAGONAL_X,
    LOW_RANK,
    LOW_RANK_PAIRS,
    LOW_RANK_W,
    LOW_RANK_X,
    DTYPE,
    MIXING,
    SUMS,
    SCALE,
    BIAS,
    ROWS,
    GLU,
    ROW_INDEX,
    R,
    CONSTANT,
    NORM,
    LAYER_NORM,
) = range(len(_BLOCK_COLUMNS))
FIRST_BLOCK, BLOCK_SIZE = len(_HEAD_COLUMNS), len(_BLOCK_COLUMNS)
BUFFERS = 5
"""Of the scratch, TILE items each: u, its norm, gathered columns, y, z."""
DTYPES = ("float32", "float16", "int8")
NORM_HEAD = _ALIGN


def padded(n: int, to: int = WIDTH) -> int:
    return -(-n // to) * to


def aligned(flat: Array) -> Array:
    buffer = np.empty(flat.size + _ALIGN, dtype=np.float32)
    start = (-buffer.ctypes.data // 4) % _ALIGN
    found = buffer[start : start + flat.size]
    found[:] = flat
    return found


class _Weights:
    """Appends arrays to one flat array of float32 and says where each begins."""

    def __init__(self) -> None:
        self.parts: list[Array] = []
        self.size = 0

    def add(self, *arrays: Array) -> int:
        return self.add_raw(*(np.asarray(array).astype(np.float32) for array in arrays))

    def add_raw(self, *arrays: Array) -> int:
        """The bytes of contiguous arrays, as so many float32."""
        start = self.size
        raw = np.concatenate([np.ascontiguousarray(array).view(np.uint8).ravel() for array in arrays])
        filled = np.zeros(padded(-(-raw.size // 4), _ALIGN) * 4, dtype=np.uint8)
        filled[: raw.size] = raw
        self.parts.append(filled.view(np.float32))
        self.size += filled.size // 4
        return start

    def packed(self) -> Array:
        return aligned(np.concatenate([*self.parts, np.zeros(_ALIGN, dtype=np.float32)]))


@dataclass(frozen=True)
class Layout:
    weights: Array
    """float32, on a cache line."""
    table: Array
    """int64."""
    scale: Array
    """(4, d_input) float64: mean, 1 / std, lowest and highest value that may reach the state."""
    memory: Array
    """float32: all states, then scratch."""
    slots: tuple[tuple[Array, Array], ...]
    """Of each block: where in ``memory`` the real and the imaginary parts of its states are, (lanes, S) each."""


class _Packer:
    def __init__(self, network: Network, parameters: Sequence[StepParameters], lanes: int, widen: bool) -> None:
        self.network, self.lanes, self.widen = network, lanes, widen
        self.weights = _Weights()
        self.h, self.room = network.d_model, padded(network.d_model)
        self.rows = np.full((len(network.blocks), BLOCK_SIZE), -1, dtype=np.int64)
        self.lists: list[Array] = []
        self.lists_at = FIRST_BLOCK + self.rows.size
        self.state_size = 0
        self.slots: list[tuple[Array, Array]] = []
        # A room more than the channels need, always zero: what a column of padding gathers.
        self.stride = self.room + WIDTH
        encoder = network.encoder
        if isinstance(encoder, TokenEncoder):
            vocabulary, encoder_at = len(encoder.embedding), self.weights.add(self._wide(encoder.embedding))
        else:
            vocabulary = 0
            encoder_at = self.weights.add(self._wide(encoder.bias[None]), self._wide(encoder.weight.T))
        mask = self.weights.add(self._wide(np.ones((1, self.h))))
        for row, block, step in zip(self.rows, network.blocks, parameters, strict=True):
            self._block(row, block, step)
        decoder = self.weights.add(self._wide(network.decoder.weight), network.decoder.bias)
        head = [lanes, network.d_input, network.d_output, self.room, int(network.prenorm), vocabulary]
        head += [
            encoder_at,
            mask,
            decoder,
            len(self.rows),
            padded(self.state_size, _ALIGN),
            padded(self.stride, _ALIGN),
        ]
        self.head = np.array(head)

    def layout(self) -> Layout:
        network = self.network
        allowed = input_range(network)
        scratch, stride = (int(self.head[i]) for i in (SCRATCH, STRIDE))
        memory = aligned(np.zeros(scratch + BUFFERS * TILE * stride, dtype=np.float32))
        return Layout(
            self.weights.packed(),
            np.concatenate([self.head, self.rows.ravel(), *self.lists]).astype(np.int64),
            np.stack([network.input.mean, 1 / network.input.std, allowed.low, allowed.high]),
            memory,
            tuple(self.slots),
        )

    def _wide(self, rows: Array) -> Array:
        """(n, h) -> (n, room)."""
        found = np.zeros((len(rows), self.room), dtype=np.float32)
        found[:, : self.h] = rows
        return found

    def _list(self, values: Array) -> int:
        at = self.lists_at
        self.lists.append(np.asarray(values, dtype=np.int64))
        self.lists_at += len(values)
        return at

    def _block(self, row: Array, block: Block, step: StepParameters) -> None:
        ssm, mixing = block.ssm, block.mixing
        kinds = [np.flatnonzero(~step.rank_one), np.flatnonzero(step.rank_one)]
        kinds = [chosen[np.argsort(-step.pairs[chosen], kind="stable")] for chosen in kinds]
        channels = self._order(ssm.active, kinds, mixing.columns)
        present = channels >= 0
        row[COLUMNS], row[WIDE] = np.flatnonzero(present)[-1] + 1 if present.any() else 0, len(channels)
        if len(channels) != self.room or not np.array_equal(channels[: self.h], np.arange(self.h)):
            row[GATHER] = self._list(np.where(present, channels, self.room))
        gains = np.zeros(len(channels))
        gains[present] = ssm.D[channels[present]]
        row[D] = self.weights.add(gains)
        self._recurrences(row, step, kinds)
        self._mixing(row, mixing, channels)
        row[LAYER_NORM] = 0
        if block.norm is not None:
            row[NORM] = self._norm(block.norm)
            row[LAYER_NORM] = int(block.norm.kind == "layer")
        # Behind an item's columns is room for the unit of its integers.
        self.stride = max(self.stride, len(channels) + WIDTH, (1 + int(row[GLU])) * int(row[ROWS]))

    def _order(self, active: Array, kinds: list[Array], columns: Array) -> Array:
        """The channel of each column, -1 for padding: diagonal ones, those with a rank-one term, bypassed ones.

        Each kind begins at a whole vector; bypassed channels fill the vectors that the kinds leave open.
        """
        bypassed = list(columns[~np.isin(columns, active)])
        found: list[int] = []
        for chosen in kinds:
            found += list(active[chosen])
            if len(chosen):
                room = padded(len(found)) - len(found)
                filling, bypassed = bypassed[:room], bypassed[room:]
                found += filling + [-1] * (room - len(filling))
        found += bypassed
        return np.array(found + [-1] * (padded(len(found)) - len(found)), dtype=np.int64)

    def _recurrences(self, row: Array, step: StepParameters, kinds: list[Array]) -> None:
        real, apart = np.zeros((self.lanes, len(step.delta)), dtype=np.int64), WIDTH
        values = [step.delta.real, step.delta.imag, 2 * step.C.real, -2 * step.C.imag]
        more = [step.p.real, step.p.imag, 2 * step.r.real, -2 * step.r.imag]
        for first, chosen, packed in ((DIAGONAL, kinds[0], values), (LOW_RANK, kinds[1], values + more)):
            vectors = [chosen[i : i + WIDTH] for i in range(0, len(chosen), WIDTH)]
            deepest = [int(step.pairs[vector].max()) for vector in vectors]
            row[first], row[first + 1] = len(vectors), self._list(np.array(deepest))
            row[first + 3] = self.state_size
            parts = []
            for vector, pairs in zip(vectors, deepest, strict=True):
                # A state that isn't there takes its input and forgets it, so that it stays finite; its C is zero.
                filled = np.zeros((pairs, len(packed), WIDTH))
                filled[:, 0] = -1
                for place, channel in enumerate(vector):
                    left, start = int(step.pairs[channel]), int(step.first[channel])
                    for i, value in enumerate(packed):
                        filled[:left, i, place] = value[start : start + left]
                    states = self.state_size + 2 * WIDTH * np.arange(left) + place
                    real[:, start : start + left] = states + 2 * WIDTH * pairs * np.arange(self.lanes)[:, None]
                if packed is not values:
                    beta = np.zeros(WIDTH)
                    beta[: len(vector)] = step.beta[vector]
                    parts.append(beta)
                parts.append(filled.ravel())
                self.state_size += 2 * WIDTH * pairs * self.lanes
            row[first + 2] = self.weights.add(*parts) if parts else 0
        self.slots.append((real, real + apart))

    def _mixing(self, row: Array, mixing: Mixing, channels: Array) -> None:
        parts = 2 if mixing.kind == "glu" else 1
        left, rows = len(mixing.rows), padded(len(mixing.rows))

        def wide(values: Array) -> Array:
            """(parts * R, ...) -> (parts * rows, ...)."""
            whole = np.zeros((parts, rows, *values.shape[1:]), dtype=values.dtype)
            whole[:, :left] = values.reshape(parts, left, *values.shape[1:])
            return whole.reshape(parts * rows, *values.shape[1:])

        weight = mixing.weight.astype(np.float32) if self.widen else mixing.weight
        row[ROWS], row[R], row[GLU], row[DTYPE] = rows, left, parts - 1, DTYPES.index(weight.dtype.name)
        if left != self.h:
            row[ROW_INDEX] = self._list(mixing.rows)
        together = 2 if weight.dtype == np.int8 else 1
        whole = np.zeros((padded(int(row[COLUMNS]), together), parts * rows), dtype=weight.dtype)
        at = np.flatnonzero(channels >= 0)
        whole[at] = wide(weight).T[np.searchsorted(mixing.columns, channels[at])]
        # [columns together, one of them, row] -> [columns together, row, one of them]
        grouped = whole.reshape(len(whole) // together, together, parts * rows).transpose(0, 2, 1)
        slabs = [grouped[:, a : a + SLAB * WIDTH].ravel() for a in range(0, parts * rows, SLAB * WIDTH)]
        row[MIXING] = self.weights.add_raw(*slabs) if slabs else 0
        if weight.dtype == np.int8:
            row[SUMS] = self.weights.add(wide(weight.sum(axis=1, dtype=np.float64)))
        scale = np.ones(parts * left) if mixing.scale is None else mixing.scale
        row[SCALE] = self.weights.add(wide(scale))
        row[BIAS] = self.weights.add(wide(mixing.bias[mixing.stacked_rows()]))
        constant = mixing.constant()
        if constant.any():
            row[CONSTANT] = self.weights.add(self._wide(constant[None]))

    def _norm(self, norm: Norm) -> int:
        head = np.zeros(NORM_HEAD)
        head[:2] = 1 / self.h, norm.eps
        return self.weights.add(head, self._wide(norm.weight[None]), self._wide(norm.bias[None]))


def pack(network: Network, parameters: Sequence[StepParameters], lanes: int, widen: bool) -> Layout:
    """``widen``: small mixing weights are packed as float32, which loses nothing."""
    return _Packer(network, parameters, lanes, widen).layout()
