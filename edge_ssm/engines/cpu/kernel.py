"""The CPU kernel: T samples of all lanes through the whole network, in float32, in one call.

Samples and lanes go through in tiles of ``layout.TILE`` items, block by block, so that a chunk reads the weights once
a tile; one sample of one lane is a tile of one. Numba turns this into LLVM's language and ``compiler`` that into
machine code. The recurrence is in delta form (``discretize``), which float32 needs for slow states. Pointers only, and
nothing that can raise: the machine code must stand alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from edge_ssm.engines.cpu import layout as at
from edge_ssm.engines.cpu import simd
from edge_ssm.engines.cpu.layout import ITEMS, SLAB, TILE, WIDTH
from edge_ssm.engines.cpu.simd import behind

_SINGLE, _SEVERAL = simd.SINGLE, simd.SEVERAL


@njit(error_model="numpy")
def _normed(w: Any, table: Any, row: Any, norm: int, mask: Any, source: Any, target: Any, room: int) -> None:
    weight = behind(w, norm + at.NORM_HEAD)
    bias = behind(weight, room)
    if table[row + at.LAYER_NORM]:
        simd.layer_norm(behind(w, norm), weight, bias, mask, source, target, room)
    else:
        simd.affine(weight, bias, source, target, room)


def _recurrence(channels: Any, head: int, values: int) -> Any:
    """y += 2 Re(C x) after x += delta x + gathered, for all channels of one form; the factor 2 is in the packed C.

    A vector of channels goes through all items at once, while its weights (``head``, and ``values`` for each pair) are
    in the first cache.
    """

    @njit(error_model="numpy")
    def run(
        w: Any, x: Any, pairs: Any, vectors: int, lanes: Any, items: int, gathered: Any, y: Any, stride: int
    ) -> None:
        first, group, all_lanes = lanes
        for v in range(vectors):
            size = 2 * WIDTH * pairs[v]
            for k in range(group):
                item = k
                while item < items:
                    column = item * stride + v * WIDTH
                    state = behind(x, (first + k) * size)
                    channels(w, state, pairs[v], behind(gathered, column), behind(y, column))
                    item += group
            w = behind(w, (head + values * pairs[v]) * WIDTH)
            x = behind(x, all_lanes * size)

    return run


_diagonal, _rank_one = _recurrence(simd.diagonal, 0, 4), _recurrence(simd.rank_one, 1, 8)


def _mixer(kind: str) -> Any:
    """z = W y for weights of one type, ``count`` columns (int8: pairs of columns, and each row's sum of weights)."""
    one8, one4, one2, one1 = (_SINGLE[kind][v] for v in (8, 4, 2, 1))
    several2, several1 = _SEVERAL[kind][2], _SEVERAL[kind][1]
    values = 2 if kind == "int8" else 1

    @njit(error_model="numpy")
    def mix(w: Any, weights: int, sums: Any, count: int, rows: int, items: int, y: Any, z: Any, stride: int) -> None:
        done = 0
        # A slab's weights serve all items before the next one's; a single item has its sums of four slabs together.
        size = (SLAB if items >= ITEMS else 8) * WIDTH
        while done < rows:
            while size > rows - done:
                size //= 2
            item = 0
            while item + ITEMS <= items:
                inputs, outputs = behind(y, item * stride), behind(z, item * stride + done)
                if size == WIDTH:
                    several1(w, weights, behind(sums, done), count, inputs, outputs, stride)
                else:
                    several2(w, weights, behind(sums, done), count, inputs, outputs, stride)
                item += ITEMS
            while item < items:
                inputs, outputs = behind(y, item * stride), behind(z, item * stride + done)
                if size == 8 * WIDTH:
                    one8(w, weights, behind(sums, done), count, inputs, outputs, stride)
                elif size == 4 * WIDTH:
                    one4(w, weights, behind(sums, done), count, inputs, outputs, stride)
                elif size == 2 * WIDTH:
                    one2(w, weights, behind(sums, done), count, inputs, outputs, stride)
                else:
                    one1(w, weights, behind(sums, done), count, inputs, outputs, stride)
                item += 1
            weights += count * size * values
            done += size

    return mix


_mix_float32, _mix_float16, _mix_int8 = (_mixer(kind) for kind in at.DTYPES)


@njit(error_model="numpy")
def _block(
    w: Any, table: Any, row: Any, memory: Any, lanes: Any, items: int, scratch: Any, stride: int, mask: Any
) -> None:
    """One block, in place on u, the first buffer of the scratch (network.py states the equations)."""
    room, prenorm, norm = table[at.ROOM], table[at.PRENORM], table[row + at.NORM]
    width, columns, gather = table[row + at.WIDE], table[row + at.COLUMNS], table[row + at.GATHER]
    rows, left = table[row + at.ROWS], table[row + at.R]
    u, v, gathered = scratch, behind(scratch, TILE * stride), behind(scratch, 2 * TILE * stride)
    y, z = behind(scratch, 3 * TILE * stride), behind(scratch, 4 * TILE * stride)
    if prenorm and norm >= 0:
        for item in range(items):
            _normed(w, table, row, norm, mask, behind(u, item * stride), behind(v, item * stride), room)
    else:
        v = u
    if gather >= 0:
        for item in range(items):
            for k in range(width):
                gathered[item * stride + k] = v[item * stride + table[gather + k]]
    else:
        gathered = v
    for item in range(items):
        start = item * stride
        simd.multiply(behind(w, table[row + at.D]), behind(gathered, start), behind(y, start), width)
    vectors, pairs = table[row + at.DIAGONAL], behind(table, table[row + at.DIAGONAL_PAIRS])
    weights, state = behind(w, table[row + at.DIAGONAL_W]), behind(memory, table[row + at.DIAGONAL_X])
    _diagonal(weights, state, pairs, vectors, lanes, items, gathered, y, stride)
    first = vectors * WIDTH
    vectors, pairs = table[row + at.LOW_RANK], behind(table, table[row + at.LOW_RANK_PAIRS])
    weights, state = behind(w, table[row + at.LOW_RANK_W]), behind(memory, table[row + at.LOW_RANK_X])
    _rank_one(weights, state, pairs, vectors, lanes, items, behind(gathered, first), behind(y, first), stride)
    for item in range(items):
        simd.gelu(behind(y, item * stride), width)
    glu = table[row + at.GLU]
    both = 2 * rows if glu else rows
    dtype, mixing = table[row + at.DTYPE], table[row + at.MIXING]
    if dtype == 0:
        _mix_float32(w, mixing, w, columns, both, items, y, z, stride)
    elif dtype == 1:
        _mix_float16(w, 2 * mixing, w, columns, both, items, y, z, stride)
    else:
        largest = np.float32(min(at.LARGEST_INTEGER, at.LARGEST_SUM // max(columns, 1)))
        for item in range(items):
            values = behind(y, item * stride)
            simd.to_integers(values, behind(values, stride - 2), largest, width)
        sums = behind(w, table[row + at.SUMS])
        _mix_int8(w, 4 * mixing, sums, (columns + 1) // 2, both, items, y, z, stride)
    scale, bias = behind(w, table[row + at.SCALE]), behind(w, table[row + at.BIAS])
    index, constant = table[row + at.ROW_INDEX], table[row + at.CONSTANT]
    for item in range(items):
        values, channels = behind(z, item * stride), behind(u, item * stride)
        simd.affine(scale, bias, values, values, both)
        if glu:
            simd.gate(values, behind(values, rows), rows)
        if index < 0:
            simd.add(values, channels, room)
        else:
            for i in range(left):
                channels[table[index + i]] += values[i]
        if constant >= 0:
            simd.add(behind(w, constant), channels, room)
        if not prenorm and norm >= 0:
            _normed(w, table, row, norm, mask, channels, channels, room)


@njit(error_model="numpy")
def _acceptable(samples: Any, count: int, scale: Any, d_input: int, tokens: int) -> bool:
    """Whether every value may reach the state (network.InputRange.bad, over all samples)."""
    for t in range(count):
        for c in range(d_input):
            value = samples[t * d_input + c]
            # Comparisons with NaN are false, so it is refused.
            if not (value >= scale[2 * d_input + c] and value <= scale[3 * d_input + c]):
                return False
            if tokens and value != np.float64(np.int64(value)):
                return False
    return True


def run(call: Any) -> int:
    """``call``: layout.CALL_COLUMNS. Samples (steps, lanes, d_input) float64 -> outputs (steps, lanes, d_output)
    float32. 0, with nothing changed, if a sample is not acceptable; else 1."""
    w, table = simd.float32_at(call[at.CALL_WEIGHTS]), simd.int64_at(call[at.CALL_TABLE])
    scale, memory = simd.float64_at(call[at.CALL_SCALE]), simd.float32_at(call[at.CALL_MEMORY])
    samples, outputs = simd.float64_at(call[at.CALL_SAMPLES]), simd.float32_at(call[at.CALL_OUTPUTS])
    lanes, room, stride = table[at.LANES], table[at.ROOM], table[at.STRIDE]
    d_input, d_output, tokens = table[at.D_INPUT], table[at.D_OUTPUT], table[at.VOCABULARY]
    steps = call[at.CALL_STEPS]
    if not _acceptable(samples, steps * lanes, scale, d_input, tokens):
        return 0
    encoder, decoder = behind(w, table[at.ENCODER]), behind(w, table[at.DECODER])
    mask, scratch = behind(w, table[at.MASK]), behind(memory, table[at.SCRATCH])
    biases = behind(decoder, d_output * room)
    abreast = TILE if lanes > TILE else lanes
    together = TILE // abreast
    begin = 0
    # A range whose step may be zero would raise.
    while begin < steps:
        first = 0
        while first < lanes:
            group = abreast if first + abreast <= lanes else lanes - first
            taken = together if begin + together <= steps else steps - begin
            for t in range(taken):
                for k in range(group):
                    sample = behind(samples, ((begin + t) * lanes + first + k) * d_input)
                    u = behind(scratch, (t * group + k) * stride)
                    if tokens:
                        simd.copy(behind(encoder, np.int64(sample[0]) * room), u, room)
                    else:
                        simd.copy(encoder, u, room)
                        for c in range(d_input):
                            z = np.float32((sample[c] - scale[c]) * scale[d_input + c])
                            simd.add_multiple(behind(encoder, (c + 1) * room), z, u, room)
            for b in range(table[at.BLOCKS]):
                row = at.FIRST_BLOCK + b * at.BLOCK_SIZE
                _block(w, table, row, memory, (first, group, lanes), taken * group, scratch, stride, mask)
            for t in range(taken):
                for k in range(group):
                    output = behind(outputs, ((begin + t) * lanes + first + k) * d_output)
                    u = behind(scratch, (t * group + k) * stride)
                    for o in range(d_output):
                        output[o] = simd.dot(behind(decoder, o * room), u, room) + biases[o]
            first += abreast
        begin += together
    return 1
