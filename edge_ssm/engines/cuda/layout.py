"""The layout of a network in the memory of a GPU.

What neighbouring threads read is adjacent: the channel, or the row of mixing, is the last index of every array. What
pruning removed is left out.

Arrays: ``weights`` float32; ``half`` float16 and ``whole`` int8, the mixing weights in the type in which they are
stored; ``table`` int32, a head, one row per block, and lists; ``state`` float32, shape (lanes, LANE_SIZE).

This module imports neither Numba nor CUDA. It also holds the constants that kernels and engines share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_ssm.model.discretize import StepParameters
from edge_ssm.model.network import MIXING_DTYPES, Array, Block, Mixing, Network, TokenEncoder

ADDERS = 32
"""Number of threads that add up a vector. Each thread reads the partial sums of all of them."""
LAST_NUMBER = 1 << 30
"""Number of the last step that the persistent kernel serves before it counts from one again. It is a multiple of the
number of slots of any ring."""

# Comments: "w" is an offset into the weights, "m" into the array of mixing weights of the block's type, "i" into the
# table, "x" into a lane's state. The shape of what lies there follows.
(
    H,
    D_INPUT,
    D_OUTPUT,
    VOCABULARY,  # 0 for a linear encoder
    PRENORM,
    LAYERS,
    LANE_SIZE,  # number of float32 of a lane's state
    ENCODER,  # w: [bias, then one column per channel][H], or [token][H]
    DECODER,  # w: [H][output], then the biases
) = range(9)
FIRST_ROW = 9
"""Length of the head, and therefore the offset of the first block's row."""
(
    COLUMNS,  # number of columns of mixing: of diagonal channels, channels with a rank-one term, bypassed channels
    DIAGONAL,  # number of diagonal channels
    RANK_ONE,  # number of channels with a rank-one term
    GATHER,  # i: [COLUMNS], the channel of each column
    PAIRS,  # i: [DIAGONAL + RANK_ONE], number of conjugate pairs of each active channel
    D,  # w: [COLUMNS]
    DIAGONAL_W,  # w: [pair][dr, di, cr, ci][DIAGONAL]; d is delta, r and i are real and imaginary part
    DIAGONAL_X,  # x: [pair][re, im][DIAGONAL]
    RANK_ONE_W,  # w: beta [RANK_ONE], then [pair][dr, di, cr, ci, pr, pi, rr, ri][RANK_ONE]
    RANK_ONE_X,  # x: [pair][re, im][RANK_ONE]
    DTYPE,  # type of the mixing weights, an index into MIXING_DTYPES
    MIXING,  # m: [column][values, then gates]
    SCALE,  # w: [values, gates]
    BIAS,  # w: [values, gates]
    ROWS,  # number of value rows
    GLU,
    INDEX,  # i: [ROWS], the channel that each row adds to
    CONSTANT,  # w: [H], what the removed rows add; -1 if nothing
    NORM,  # w: weight [H], bias [H], eps; -1 without a norm
    LAYER_NORM,  # 1 for LayerNorm, 0 for an affine map
) = range(20)
ROW_SIZE = 20
"""Length of a block's row."""


@dataclass(frozen=True)
class Layout:
    """A network, packed for the kernels."""

    weights: Array
    """float32."""
    half: Array
    """float16: mixing weights of that type."""
    whole: Array
    """int8: mixing weights of that type."""
    table: Array
    """int32: head, one row per block, lists."""
    lane_size: int
    """Number of float32 of a lane's state."""
    state_indices: tuple[tuple[Array, Array], ...]
    """For each block, the indices into a lane's state of the real and the imaginary parts of its S states."""
    widest: int
    """Largest number of values that one phase of a step works on: H, or the columns or rows of a block."""


class _Packer:
    """Packs a network, block by block."""

    def __init__(self, network: Network, parameters: Sequence[StepParameters]) -> None:
        self.parts: dict[str, list[Array]] = {"weights": [], "half": [], "whole": []}
        self.sizes = dict.fromkeys(self.parts, 0)
        self.lists: list[Array] = []
        self.lists_at = FIRST_ROW + ROW_SIZE * len(network.blocks)
        self.lane_size, self.widest = 0, network.d_model
        self.state_indices: list[tuple[Array, Array]] = []
        encoder = network.encoder
        if isinstance(encoder, TokenEncoder):
            vocabulary, first = len(encoder.embedding), self._add(encoder.embedding)
        else:
            vocabulary, first = 0, self._add(encoder.bias, encoder.weight.T)
        last = self._add(network.decoder.weight.T, network.decoder.bias)
        rows = [self._block(b, s, network) for b, s in zip(network.blocks, parameters, strict=True)]
        head = [network.d_model, network.d_input, network.d_output, vocabulary, int(network.prenorm), len(rows)]
        self.table = [np.array([*head, self.lane_size, first, last]), *rows, *self.lists]

    def layout(self) -> Layout:
        """Return the packed arrays."""
        # Every array gets one element more, because a kernel needs a valid address of each.
        flat = {name: np.concatenate([*arrays, np.zeros(1)]) for name, arrays in self.parts.items()}
        return Layout(
            flat["weights"].astype(np.float32),
            flat["half"].astype(np.float16),
            flat["whole"].astype(np.int8),
            np.concatenate(self.table).astype(np.int32),
            self.lane_size,
            tuple(self.state_indices),
            self.widest,
        )

    def _add(self, *arrays: Array, to: str = "weights") -> int:
        start = self.sizes[to]
        for array in arrays:
            self.parts[to].append(np.asarray(array).ravel())
            self.sizes[to] += array.size
        return start

    def _add_list(self, values: Array) -> int:
        start = self.lists_at
        self.lists.append(np.asarray(values))
        self.lists_at += len(values)
        return start

    def _block(self, block: Block, step: StepParameters, network: Network) -> Array:
        row = np.full(ROW_SIZE, -1)
        ssm, mixing = block.ssm, block.mixing
        kinds = [np.flatnonzero(~step.rank_one), np.flatnonzero(step.rank_one)]
        # Sorted by their number of states, so that the threads of a warp have about equal work.
        kinds = [chosen[np.argsort(-step.pairs[chosen], kind="stable")] for chosen in kinds]
        order = np.concatenate(kinds)
        bypassed = mixing.columns[~np.isin(mixing.columns, ssm.active)]
        channels = np.concatenate([ssm.active[order], bypassed])
        row[[COLUMNS, DIAGONAL, RANK_ONE]] = len(channels), len(kinds[0]), len(kinds[1])
        row[GATHER], row[PAIRS] = self._add_list(channels), self._add_list(step.pairs[order])
        row[D] = self._add(ssm.D[channels])
        self._states(row, step, kinds)
        self._mixing(row, mixing, channels)
        constant = mixing.constant()
        if constant.any():
            row[CONSTANT] = self._add(constant)
        row[LAYER_NORM] = 0
        if block.norm is not None:
            row[NORM] = self._add(block.norm.weight, block.norm.bias, np.array([block.norm.eps]))
            row[LAYER_NORM] = int(block.norm.kind == "layer")
        self.widest = max(self.widest, len(channels), (1 + int(row[GLU])) * int(row[ROWS]))
        return row

    def _states(self, row: Array, step: StepParameters, kinds: list[Array]) -> None:
        real, imag = np.zeros(len(step.delta), dtype=np.int64), np.zeros(len(step.delta), dtype=np.int64)
        values = [step.delta.real, step.delta.imag, 2 * step.C.real, -2 * step.C.imag]
        more = [step.p.real, step.p.imag, 2 * step.r.real, -2 * step.r.imag]
        for w, x, chosen, packed in (
            (DIAGONAL_W, DIAGONAL_X, kinds[0], values),
            (RANK_ONE_W, RANK_ONE_X, kinds[1], values + more),
        ):
            pairs, count = int(step.pairs[chosen].max(initial=0)), len(chosen)
            block = np.zeros((pairs, len(packed), count))
            for k, channel in enumerate(chosen):
                states = slice(int(step.first[channel]), int(step.first[channel] + step.pairs[channel]))
                own = int(step.pairs[channel])
                block[:own, :, k] = np.stack([value[states] for value in packed], axis=1)
                real[states] = self.lane_size + 2 * count * np.arange(own) + k
                imag[states] = real[states] + count
            row[x] = self.lane_size
            row[w] = self._add(*([step.beta[chosen]] if packed is not values else []), block)
            self.lane_size += 2 * count * pairs
        self.state_indices.append((real, imag))

    def _mixing(self, row: Array, mixing: Mixing, channels: Array) -> None:
        row[ROWS], row[GLU], row[DTYPE] = len(mixing.rows), int(mixing.kind == "glu"), MIXING_DTYPES.index(mixing.dtype)
        row[INDEX] = self._add_list(mixing.rows)
        weight = mixing.weight.T[np.searchsorted(mixing.columns, channels)]
        row[MIXING] = self._add(weight, to=("weights", "half", "whole")[row[DTYPE]])
        row[SCALE] = self._add(np.ones(mixing.weight.shape[0]) if mixing.scale is None else mixing.scale)
        row[BIAS] = self._add(mixing.bias[mixing.stacked_rows()])


def shared_floats(lanes: int, widest: int, threads: int) -> int:
    """Return the number of float32 of shared memory that a block needs for a group of ``lanes`` lanes.

    These are u, y and z, and a partial sum of each thread.
    """
    return 3 * lanes * widest + max(lanes * threads, 2 * lanes * ADDERS)


def pack(network: Network, parameters: Sequence[StepParameters]) -> Layout:
    """Pack a network for the kernels."""
    return _Packer(network, parameters).layout()
