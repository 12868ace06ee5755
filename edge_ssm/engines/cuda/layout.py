"""How a network lies in a GPU's memory: what neighbouring threads read lies side by side, so the channel, or the row of
mixing, is the last index of every array. What pruning removed is not there.

Arrays: ``weights`` float32, ``half`` float16 and ``whole`` int8 (mixing weights as they are stored), ``table`` int32
(HEAD, then a row a block, then lists), ``state`` float32 (lanes, LANE). "w" is an offset into the weights, "m" into the
array of mixing weights of the block's type, "i" into the table, "x" into a lane's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_ssm.model.discretize import StepParameters
from edge_ssm.model.network import Array, Block, Mixing, Network, TokenEncoder

_HEAD = (
    "h",
    "d_input",
    "d_output",
    "vocabulary",  # 0 for a linear encoder
    "prenorm",
    "layers",
    "lane",  # float32 of a lane's state
    "encoder",  # w: [bias, then a column a channel][h], or [token][h]
    "decoder",  # w: [h][output], then the biases
)
H, D_INPUT, D_OUTPUT, VOCABULARY, PRENORM, LAYERS, LANE, ENCODER, DECODER = range(len(_HEAD))
_ROW = (
    "columns",  # of mixing: channels with a diagonal operator, with a rank-one term, bypassed
    "diagonal",  # how many of the first kind
    "rank_one",  # and of the second
    "gather",  # i: [columns], the channel of each
    "pairs",  # i: [diagonal + rank_one], states of each, in pairs
    "D",  # w: [columns]
    "diagonal_w",  # w: [pair][dr di cr ci][diagonal]
    "diagonal_x",  # x: [pair][re im][diagonal]
    "rank_one_w",  # w: beta [rank_one], then [pair][dr di cr ci pr pi rr ri][rank_one]
    "low_rank_x",
    "dtype",  # 0 float32, 1 float16, 2 int8
    "mixing",  # m: [column][values, then gates]
    "scale",  # w: [values, gates]
    "bias",  # w: [values, gates]
    "rows",  # of values
    "glu",
    "index",  # i: [rows], the channel that each adds to
    "constant",  # w: [h], what removed rows add; -1 where none does
    "norm",  # w: weight [h], bias [h], eps; -1 without
    "layer_norm",
)
(
    COLUMNS,
    DIAGONAL,
    LOW_RANK,
    GATHER,
    PAIRS,
    D,
    DIAGONAL_W,
    DIAGONAL_X,
    LOW_RANK_W,
    LOW_RANK_X,
    DTYPE,
    MIXING,
    SCALE,
    BIAS,
    ROWS,
    GLU,
    INDEX,
    CONSTANT,
    NORM,
    LAYER_NORM,
) = range(len(_ROW))
FIRST_ROW, ROW = len(_HEAD), len(_ROW)
DTYPES = ("float32", "float16", "int8")


@dataclass(frozen=True)
class Layout:
    weights: Array  # float32
    half: Array  # float16
    whole: Array  # int8
    table: Array  # int32
    lane: int
    """float32 of a lane's state."""
    slots: tuple[tuple[Array, Array], ...]
    """Of each block: where in a lane's state the real and the imaginary parts of its S states are."""
    widest: int
    """The most values that one step of a kernel works on: h, columns or rows of a block."""


class _Packer:
    def __init__(self, network: Network, parameters: Sequence[StepParameters]) -> None:
        self.parts: dict[str, list[Array]] = {"weights": [], "half": [], "whole": []}
        self.sizes = dict.fromkeys(self.parts, 0)
        self.lists: list[Array] = []
        self.lists_at = FIRST_ROW + ROW * len(network.blocks)
        self.lane, self.widest = 0, network.d_model
        self.slots: list[tuple[Array, Array]] = []
        encoder = network.encoder
        if isinstance(encoder, TokenEncoder):
            vocabulary, first = len(encoder.embedding), self._add(encoder.embedding)
        else:
            vocabulary, first = 0, self._add(encoder.bias, encoder.weight.T)
        last = self._add(network.decoder.weight.T, network.decoder.bias)
        rows = [self._block(b, s, network) for b, s in zip(network.blocks, parameters, strict=True)]
        head = [network.d_model, network.d_input, network.d_output, vocabulary, int(network.prenorm), len(rows)]
        self.table = [np.array([*head, self.lane, first, last]), *rows, *self.lists]

    def layout(self) -> Layout:
        # No array is empty: a kernel gets the address of each.
        flat = {name: np.concatenate([*arrays, np.zeros(1)]) for name, arrays in self.parts.items()}
        return Layout(
            flat["weights"].astype(np.float32),
            flat["half"].astype(np.float16),
            flat["whole"].astype(np.int8),
            np.concatenate(self.table).astype(np.int32),
            self.lane,
            tuple(self.slots),
            self.widest,
        )

    def _add(self, *arrays: Array, to: str = "weights") -> int:
        start = self.sizes[to]
        for array in arrays:
            self.parts[to].append(np.asarray(array).ravel())
            self.sizes[to] += array.size
        return start

    def _list(self, values: Array) -> int:
        start = self.lists_at
        self.lists.append(np.asarray(values))
        self.lists_at += len(values)
        return start

    def _block(self, block: Block, step: StepParameters, network: Network) -> Array:
        row = np.full(ROW, -1)
        ssm, mixing = block.ssm, block.mixing
        kinds = [np.flatnonzero(~step.rank_one), np.flatnonzero(step.rank_one)]
        # By their number of states, so that the threads of a warp have about as much to do.
        kinds = [chosen[np.argsort(-step.pairs[chosen], kind="stable")] for chosen in kinds]
        order = np.concatenate(kinds)
        bypassed = mixing.columns[~np.isin(mixing.columns, ssm.active)]
        channels = np.concatenate([ssm.active[order], bypassed])
        row[[COLUMNS, DIAGONAL, LOW_RANK]] = len(channels), len(kinds[0]), len(kinds[1])
        row[GATHER], row[PAIRS] = self._list(channels), self._list(step.pairs[order])
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
            (LOW_RANK_W, LOW_RANK_X, kinds[1], values + more),
        ):
            pairs, count = int(step.pairs[chosen].max(initial=0)), len(chosen)
            filled = np.zeros((pairs, len(packed), count))
            for place, channel in enumerate(chosen):
                left, start = int(step.pairs[channel]), int(step.first[channel])
                at = slice(start, start + left)
                filled[:left, :, place] = np.stack([value[at] for value in packed], axis=1)
                real[at] = self.lane + 2 * count * np.arange(left) + place
                imag[at] = real[at] + count
            row[x] = self.lane
            row[w] = self._add(*([step.beta[chosen]] if packed is not values else []), filled)
            self.lane += 2 * count * pairs
        self.slots.append((real, imag))

    def _mixing(self, row: Array, mixing: Mixing, channels: Array) -> None:
        row[ROWS], row[GLU], row[DTYPE] = len(mixing.rows), int(mixing.kind == "glu"), DTYPES.index(mixing.dtype)
        row[INDEX] = self._list(mixing.rows)
        weight = mixing.weight.T[np.searchsorted(mixing.columns, channels)]
        row[MIXING] = self._add(weight, to=("weights", "half", "whole")[row[DTYPE]])
        row[SCALE] = self._add(np.ones(mixing.weight.shape[0]) if mixing.scale is None else mixing.scale)
        row[BIAS] = self._add(mixing.bias[mixing.stacked_rows()])


def pack(network: Network, parameters: Sequence[StepParameters]) -> Layout:
    return _Packer(network, parameters).layout()
