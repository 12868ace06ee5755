"""The layout of a network in memory for the CPU kernel.

There are four arrays: the weights, in the order in which a step reads them; a table of integers that says where each
part begins; the scale of the samples; and one array of states, followed by the kernel's scratch memory.

Rows are padded to whole vectors of WIDTH float32. What pruning removed is left out: mixing has only the remaining
columns and rows, in the type in which they are stored. Channels are sorted by their number of states, so that the WIDTH
channels that share a vector have about as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_ssm.model.discretize import StepParameters
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import MIXING_DTYPES, Array, Block, Mixing, Network, Norm, TokenEncoder

WIDTH = 8
"""Number of float32 in a vector: one AVX register, or two NEON registers."""
TILE = 16
"""Number of items (pairs of a sample and a lane) of a chunk that pass through the network together, so that weights
are read once for all of them."""
ITEMS = 4
"""Number of items whose sums of one vector of mixing rows are kept in registers together."""
SLAB = 2
"""Number of vectors of mixing rows whose weights are stored together, column by column. In a chunk, a slab stays in the
first-level cache while all items of a tile use it."""
LARGEST_INTEGER, LARGEST_SUM = 2**15 - 2, (2**31 - 1) // 127
"""Largest magnitude of an integer that int8 weights are multiplied with, and of the sum of all of them, so that sums of
products fit into int32."""
_ALIGN = 16
"""Packed arrays begin at a multiple of this number of float32: a cache line of 64 bytes."""

ARGUMENTS = ("weights", "table", "scale", "memory", "samples", "outputs", "steps")
"""The kernel's argument, an array of int64: the addresses of six arrays, and the number of steps."""
(
    ARGUMENT_WEIGHTS,
    ARGUMENT_TABLE,
    ARGUMENT_SCALE,
    ARGUMENT_MEMORY,
    ARGUMENT_SAMPLES,
    ARGUMENT_OUTPUTS,
    ARGUMENT_STEPS,
) = range(len(ARGUMENTS))

# The table consists of a head, one row per block, and lists. In the comments, "w" is an offset into the weights in
# float32, "i" an offset into the table, and "x" an offset into the memory; the shape of what lies there follows.
(
    LANES,
    D_INPUT,
    D_OUTPUT,
    PADDED_WIDTH,  # H, padded to whole vectors
    PRENORM,
    VOCABULARY,  # 0 for a linear encoder
    ENCODER,  # w: [bias, then one column per channel][PADDED_WIDTH], or [token][PADDED_WIDTH]
    MASK,  # w: [PADDED_WIDTH], 1 for a channel, 0 for padding
    DECODER,  # w: [output][PADDED_WIDTH], then the biases
    BLOCKS,
    SCRATCH,  # x: the first buffer of the scratch memory
    STRIDE,  # distance of two items in a buffer, in float32
) = range(12)
FIRST_BLOCK = 12
"""Length of the head, and therefore the offset of the first block's row."""

# The row of a block.
(
    COLUMNS,  # number of columns of mixing, with the padding between two kinds of channels
    PADDED_COLUMNS,  # the same, padded to whole vectors
    GATHER,  # i: [PADDED_COLUMNS], the channel of each column; -1 if column k is channel k for all k
    D,  # w: [PADDED_COLUMNS]
    DIAGONAL,  # number of vectors of diagonal channels, which are the first columns
    DIAGONAL_PAIRS,  # i: [DIAGONAL], number of conjugate pairs of each vector
    DIAGONAL_W,  # w: for each vector [pair][dr, di, cr, ci][WIDTH]; d is delta, r and i are real and imaginary part
    DIAGONAL_X,  # x: for each vector [lane][pair][re, im][WIDTH]
    RANK_ONE,  # number of vectors of channels with a rank-one term, which follow the diagonal ones
    RANK_ONE_PAIRS,  # as DIAGONAL_PAIRS
    RANK_ONE_W,  # w: for each vector beta [WIDTH], then [pair][dr, di, cr, ci, pr, pi, rr, ri][WIDTH]
    RANK_ONE_X,  # as DIAGONAL_X
    DTYPE,  # type of the mixing weights, an index into MIXING_DTYPES
    MIXING,  # w: slabs of SLAB vectors of rows, [column][rows] in DTYPE; int8: [pair of columns][rows][2]
    SUMS,  # w: [values, gates], sum of each row's weights; int8 only
    SCALE,  # w: [values, gates]; 1 for float32
    BIAS,  # w: [values, gates]
    ROWS,  # number of value rows, padded; with GLU, as many gate rows follow
    GLU,
    ROW_INDEX,  # i: [R], the channel that each row adds to; -1 if row i is channel i for all i
    R,  # number of value rows
    CONSTANT,  # w: [PADDED_WIDTH], what the removed rows add; -1 if nothing
    NORM,  # w: 1 / H and eps, then weight [PADDED_WIDTH] and bias [PADDED_WIDTH]; -1 without a norm
    LAYER_NORM,  # 1 for LayerNorm, 0 for an affine map
) = range(24)
BLOCK_SIZE = 24
"""Length of a block's row."""
BUFFERS = 5
"""Number of buffers of TILE items in the scratch memory: u, normalised u, gathered columns, y and z."""
NORM_HEAD = _ALIGN
"""Offset of a norm's weight from 1 / H and eps."""


def round_up(n: int, multiple: int = WIDTH) -> int:
    """Return the smallest multiple that is at least ``n``."""
    return -(-n // multiple) * multiple


def aligned(flat: Array) -> Array:
    """Return a float32 copy of a flat array that begins on a cache line."""
    buffer = np.empty(flat.size + _ALIGN, dtype=np.float32)
    start = (-buffer.ctypes.data // 4) % _ALIGN
    copy = buffer[start : start + flat.size]
    copy[:] = flat
    return copy


class _Weights:
    """Appends arrays to one flat array of float32, and returns the offset of each."""

    def __init__(self) -> None:
        self.parts: list[Array] = []
        self.size = 0

    def add(self, *arrays: Array) -> int:
        return self.add_raw(*(np.asarray(array).astype(np.float32) for array in arrays))

    def add_raw(self, *arrays: Array) -> int:
        """Append the bytes of arrays, padded to whole cache lines."""
        start = self.size
        raw = np.concatenate([np.ascontiguousarray(array).view(np.uint8).ravel() for array in arrays])
        padded = np.zeros(round_up(-(-raw.size // 4), _ALIGN) * 4, dtype=np.uint8)
        padded[: raw.size] = raw
        self.parts.append(padded.view(np.float32))
        self.size += padded.size // 4
        return start

    def packed(self) -> Array:
        return aligned(np.concatenate([*self.parts, np.zeros(_ALIGN, dtype=np.float32)]))


@dataclass(frozen=True)
class Layout:
    """A network, packed for the kernel."""

    weights: Array
    """float32, beginning on a cache line."""
    table: Array
    """int64: head, one row per block, lists."""
    scale: Array
    """Shape (4, d_input), float64: mean, 1 / std, and the lowest and highest value that may reach the state."""
    memory: Array
    """float32: all states, then the scratch memory."""
    state_indices: tuple[tuple[Array, Array], ...]
    """For each block, the indices into ``memory`` of the real and the imaginary parts of its states, shape (L, S)."""


class _Packer:
    """Packs a network, block by block."""

    def __init__(self, network: Network, parameters: Sequence[StepParameters], lanes: int, widen: bool) -> None:
        self.network, self.lanes, self.widen = network, lanes, widen
        self.weights = _Weights()
        self.h, self.padded_width = network.d_model, round_up(network.d_model)
        self.rows = np.full((len(network.blocks), BLOCK_SIZE), -1, dtype=np.int64)
        self.lists: list[Array] = []
        self.lists_at = FIRST_BLOCK + self.rows.size
        self.state_size = 0
        self.state_indices: list[tuple[Array, Array]] = []
        # One vector more than the channels need. It is always zero: columns of padding gather their value from it.
        self.stride = self.padded_width + WIDTH
        encoder = network.encoder
        if isinstance(encoder, TokenEncoder):
            vocabulary, encoder_at = len(encoder.embedding), self.weights.add(self._pad_rows(encoder.embedding))
        else:
            vocabulary = 0
            encoder_at = self.weights.add(self._pad_rows(encoder.bias[None]), self._pad_rows(encoder.weight.T))
        mask = self.weights.add(self._pad_rows(np.ones((1, self.h))))
        for row, block, step in zip(self.rows, network.blocks, parameters, strict=True):
            self._block(row, block, step)
        decoder = self.weights.add(self._pad_rows(network.decoder.weight), network.decoder.bias)
        self.head = np.zeros(FIRST_BLOCK, dtype=np.int64)
        self.head[[LANES, D_INPUT, D_OUTPUT]] = lanes, network.d_input, network.d_output
        self.head[[PADDED_WIDTH, PRENORM, VOCABULARY]] = self.padded_width, network.prenorm, vocabulary
        self.head[[ENCODER, MASK, DECODER, BLOCKS]] = encoder_at, mask, decoder, len(self.rows)
        self.head[[SCRATCH, STRIDE]] = round_up(self.state_size, _ALIGN), round_up(self.stride, _ALIGN)

    def layout(self) -> Layout:
        """Return the packed arrays."""
        network = self.network
        limits = input_range(network)
        scratch, stride = (int(self.head[i]) for i in (SCRATCH, STRIDE))
        memory = aligned(np.zeros(scratch + BUFFERS * TILE * stride, dtype=np.float32))
        return Layout(
            self.weights.packed(),
            np.concatenate([self.head, self.rows.ravel(), *self.lists]).astype(np.int64),
            np.stack([network.input.mean, 1 / network.input.std, limits.low, limits.high]),
            memory,
            tuple(self.state_indices),
        )

    def _pad_rows(self, rows: Array) -> Array:
        """(n, H) -> (n, PADDED_WIDTH)."""
        padded = np.zeros((len(rows), self.padded_width), dtype=np.float32)
        padded[:, : self.h] = rows
        return padded

    def _add_list(self, values: Array) -> int:
        """Append a list to the table, and return its offset."""
        start = self.lists_at
        self.lists.append(np.asarray(values, dtype=np.int64))
        self.lists_at += len(values)
        return start

    def _block(self, row: Array, block: Block, step: StepParameters) -> None:
        ssm, mixing = block.ssm, block.mixing
        kinds = [np.flatnonzero(~step.rank_one), np.flatnonzero(step.rank_one)]
        kinds = [chosen[np.argsort(-step.pairs[chosen], kind="stable")] for chosen in kinds]
        channels = self._order(ssm.active, kinds, mixing.columns)
        present = channels >= 0
        row[COLUMNS], row[PADDED_COLUMNS] = np.flatnonzero(present)[-1] + 1 if present.any() else 0, len(channels)
        if len(channels) != self.padded_width or not np.array_equal(channels[: self.h], np.arange(self.h)):
            row[GATHER] = self._add_list(np.where(present, channels, self.padded_width))
        gains = np.zeros(len(channels))
        gains[present] = ssm.D[channels[present]]
        row[D] = self.weights.add(gains)
        self._recurrences(row, step, kinds)
        self._mixing(row, mixing, channels)
        row[LAYER_NORM] = 0
        if block.norm is not None:
            row[NORM] = self._norm(block.norm)
            row[LAYER_NORM] = int(block.norm.kind == "layer")
        # The last two values of an item's stride hold the scale of its integers.
        self.stride = max(self.stride, len(channels) + WIDTH, (1 + int(row[GLU])) * int(row[ROWS]))

    def _order(self, active: Array, kinds: list[Array], columns: Array) -> Array:
        """Return the channel of each column, -1 for padding: diagonal, with a rank-one term, bypassed.

        The first two kinds begin at whole vectors. Bypassed channels fill the vectors that these leave incomplete.
        """
        bypassed = list(columns[~np.isin(columns, active)])
        order: list[int] = []
        for chosen in kinds:
            order += list(active[chosen])
            if len(chosen):
                free = round_up(len(order)) - len(order)
                filling, bypassed = bypassed[:free], bypassed[free:]
                order += filling + [-1] * (free - len(filling))
        order += bypassed
        return np.array(order + [-1] * (round_up(len(order)) - len(order)), dtype=np.int64)

    def _recurrences(self, row: Array, step: StepParameters, kinds: list[Array]) -> None:
        real = np.zeros((self.lanes, len(step.delta)), dtype=np.int64)
        values = [step.delta.real, step.delta.imag, 2 * step.C.real, -2 * step.C.imag]
        more = [step.p.real, step.p.imag, 2 * step.r.real, -2 * step.r.imag]
        for first, chosen, packed in ((DIAGONAL, kinds[0], values), (RANK_ONE, kinds[1], values + more)):
            vectors = [chosen[i : i + WIDTH] for i in range(0, len(chosen), WIDTH)]
            deepest = [int(step.pairs[vector].max()) for vector in vectors]
            row[first], row[first + 1] = len(vectors), self._add_list(np.array(deepest))
            row[first + 3] = self.state_size
            parts = []
            for vector, pairs in zip(vectors, deepest, strict=True):
                # A state of padding has delta = -1: it forgets everything, so that it stays finite. Its C is zero.
                block = np.zeros((pairs, len(packed), WIDTH))
                block[:, 0] = -1
                for element, channel in enumerate(vector):
                    count, start = int(step.pairs[channel]), int(step.first[channel])
                    for i, value in enumerate(packed):
                        block[:count, i, element] = value[start : start + count]
                    states = self.state_size + 2 * WIDTH * np.arange(count) + element
                    real[:, start : start + count] = states + 2 * WIDTH * pairs * np.arange(self.lanes)[:, None]
                if packed is not values:
                    beta = np.zeros(WIDTH)
                    beta[: len(vector)] = step.beta[vector]
                    parts.append(beta)
                parts.append(block.ravel())
                self.state_size += 2 * WIDTH * pairs * self.lanes
            row[first + 2] = self.weights.add(*parts) if parts else 0
        self.state_indices.append((real, real + WIDTH))

    def _mixing(self, row: Array, mixing: Mixing, channels: Array) -> None:
        parts = 2 if mixing.kind == "glu" else 1
        left, rows = len(mixing.rows), round_up(len(mixing.rows))

        def pad(values: Array) -> Array:
            """(parts * R, ...) -> (parts * rows, ...)."""
            padded = np.zeros((parts, rows, *values.shape[1:]), dtype=values.dtype)
            padded[:, :left] = values.reshape(parts, left, *values.shape[1:])
            return padded.reshape(parts * rows, *values.shape[1:])

        weight = mixing.weight.astype(np.float32) if self.widen else mixing.weight
        row[ROWS], row[R], row[GLU], row[DTYPE] = rows, left, parts - 1, MIXING_DTYPES.index(weight.dtype.name)
        if left != self.h:
            row[ROW_INDEX] = self._add_list(mixing.rows)
        group = 2 if weight.dtype == np.int8 else 1
        transposed = np.zeros((round_up(int(row[COLUMNS]), group), parts * rows), dtype=weight.dtype)
        present = np.flatnonzero(channels >= 0)
        transposed[present] = pad(weight).T[np.searchsorted(mixing.columns, channels[present])]
        # [group of columns, column in the group, row] -> [group of columns, row, column in the group]
        grouped = transposed.reshape(len(transposed) // group, group, parts * rows).transpose(0, 2, 1)
        slabs = [grouped[:, a : a + SLAB * WIDTH].ravel() for a in range(0, parts * rows, SLAB * WIDTH)]
        row[MIXING] = self.weights.add_raw(*slabs) if slabs else 0
        if weight.dtype == np.int8:
            row[SUMS] = self.weights.add(pad(weight.sum(axis=1, dtype=np.float64)))
        scale = np.ones(parts * left) if mixing.scale is None else mixing.scale
        row[SCALE] = self.weights.add(pad(scale))
        row[BIAS] = self.weights.add(pad(mixing.bias[mixing.stacked_rows()]))
        constant = mixing.constant()
        if constant.any():
            row[CONSTANT] = self.weights.add(self._pad_rows(constant[None]))

    def _norm(self, norm: Norm) -> int:
        head = np.zeros(NORM_HEAD)
        head[:2] = 1 / self.h, norm.eps
        return self.weights.add(head, self._pad_rows(norm.weight[None]), self._pad_rows(norm.bias[None]))


def pack(network: Network, parameters: Sequence[StepParameters], lanes: int, widen: bool) -> Layout:
    """Pack a network for the kernel, with all states zero.

    With ``widen``, float16 and int8 mixing weights are packed as float32, which is exact.
    """
    return _Packer(network, parameters, lanes, widen).layout()
