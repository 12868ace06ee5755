"""The CPU kernel: takes T samples of all lanes through the whole network, in float32, in one call.

Numba translates this module to LLVM IR, and ``compiler`` makes machine code of that. The machine code must stand alone:
the functions use pointers instead of arrays, and nothing that could raise an exception.

An item is one sample of one lane. Items pass through the network in tiles of up to ``layout.TILE``, block by block, so
that a chunk reads the weights once per tile. A single sample of a single lane is a tile of one item.

The recurrence is in delta form (``model.discretize``), which float32 needs for slow states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from edge_ssm.engines.cpu import layout, simd
from edge_ssm.engines.cpu.layout import ITEMS, SLAB, TILE, WIDTH
from edge_ssm.engines.cpu.simd import offset
from edge_ssm.model.network import MIXING_DTYPES


@njit(error_model="numpy")
def _normalise(w: Any, table: Any, row: Any, norm: int, mask: Any, source: Any, target: Any, padded_width: int) -> None:
    """Compute target = norm(source) for one item."""
    weight = offset(w, norm + layout.NORM_HEAD)
    bias = offset(weight, padded_width)
    if table[row + layout.LAYER_NORM]:
        simd.layer_norm(offset(w, norm), weight, bias, mask, source, target, padded_width)
    else:
        simd.affine(weight, bias, source, target, padded_width)


def _recurrence(step: Any, head: int, values: int) -> Any:
    """Return a function that steps all channels of one kind: x += delta x + u, then y += 2 Re(C x).

    ``step`` advances one vector of channels by one item. The vector has ``head`` weights, and ``values`` for each pair;
    the factor 2 is in the packed C. A vector steps through all items of the tile while its weights are in the
    first-level cache.
    """

    @njit(error_model="numpy")
    def run(
        w: Any, x: Any, pairs: Any, vectors: int, lanes: Any, items: int, gathered: Any, y: Any, stride: int
    ) -> None:
        first_lane, lanes_now, all_lanes = lanes
        for v in range(vectors):
            size = 2 * WIDTH * pairs[v]
            for k in range(lanes_now):
                item = k
                while item < items:
                    column = item * stride + v * WIDTH
                    state = offset(x, (first_lane + k) * size)
                    step(w, state, pairs[v], offset(gathered, column), offset(y, column))
                    item += lanes_now
            w = offset(w, (head + values * pairs[v]) * WIDTH)
            x = offset(x, all_lanes * size)

    return run


_diagonal, _rank_one = _recurrence(simd.diagonal, 0, 4), _recurrence(simd.rank_one, 1, 8)


def _mixer(kind: str) -> Any:
    """Return a function that computes z = W y for weights of one type.

    ``count`` is the number of columns. For int8 weights it is the number of pairs of columns, and ``sums`` are the sums
    of each row's weights.
    """
    one8, one4, one2, one1 = (simd.MULTIPLY_ONE[kind][v] for v in (8, 4, 2, 1))
    several2, several1 = simd.MULTIPLY_SEVERAL[kind][2], simd.MULTIPLY_SEVERAL[kind][1]
    values = 2 if kind == "int8" else 1

    @njit(error_model="numpy")
    def mix(w: Any, weights: int, sums: Any, count: int, rows: int, items: int, y: Any, z: Any, stride: int) -> None:
        done = 0
        # With several items, all of them use a slab's weights before the next slab. A single item has the sums of four
        # slabs in registers together.
        size = (SLAB if items >= ITEMS else 8) * WIDTH
        while done < rows:
            while size > rows - done:
                size //= 2
            item = 0
            while item + ITEMS <= items:
                inputs, outputs = offset(y, item * stride), offset(z, item * stride + done)
                if size == WIDTH:
                    several1(w, weights, offset(sums, done), count, inputs, outputs, stride)
                else:
                    several2(w, weights, offset(sums, done), count, inputs, outputs, stride)
                item += ITEMS
            while item < items:
                inputs, outputs = offset(y, item * stride), offset(z, item * stride + done)
                if size == 8 * WIDTH:
                    one8(w, weights, offset(sums, done), count, inputs, outputs, stride)
                elif size == 4 * WIDTH:
                    one4(w, weights, offset(sums, done), count, inputs, outputs, stride)
                elif size == 2 * WIDTH:
                    one2(w, weights, offset(sums, done), count, inputs, outputs, stride)
                else:
                    one1(w, weights, offset(sums, done), count, inputs, outputs, stride)
                item += 1
            weights += count * size * values
            done += size

    return mix


_mix_float32, _mix_float16, _mix_int8 = (_mixer(kind) for kind in MIXING_DTYPES)


@njit(error_model="numpy")
def _block(
    w: Any, table: Any, row: Any, memory: Any, lanes: Any, items: int, scratch: Any, stride: int, mask: Any
) -> None:
    """One block for all items of a tile (``model.network`` states the equations), in place on u.

    u, the residual stream, is the first buffer of the scratch memory.
    """
    padded_width, prenorm, norm = table[layout.PADDED_WIDTH], table[layout.PRENORM], table[row + layout.NORM]
    width, columns, gather = table[row + layout.PADDED_COLUMNS], table[row + layout.COLUMNS], table[row + layout.GATHER]
    rows, left = table[row + layout.ROWS], table[row + layout.R]
    u, v, gathered = scratch, offset(scratch, TILE * stride), offset(scratch, 2 * TILE * stride)
    y, z = offset(scratch, 3 * TILE * stride), offset(scratch, 4 * TILE * stride)
    # v = norm(u) if prenorm, else u.
    if prenorm and norm >= 0:
        for item in range(items):
            _normalise(w, table, row, norm, mask, offset(u, item * stride), offset(v, item * stride), padded_width)
    else:
        v = u
    # Gather the channels of v in the order of the columns of mixing.
    if gather >= 0:
        for item in range(items):
            for k in range(width):
                gathered[item * stride + k] = v[item * stride + table[gather + k]]
    else:
        gathered = v
    # y = SSM(v): D v for all channels, then the recurrences of the active ones.
    for item in range(items):
        start = item * stride
        simd.multiply(offset(w, table[row + layout.D]), offset(gathered, start), offset(y, start), width)
    vectors, pairs = table[row + layout.DIAGONAL], offset(table, table[row + layout.DIAGONAL_PAIRS])
    weights, state = offset(w, table[row + layout.DIAGONAL_W]), offset(memory, table[row + layout.DIAGONAL_X])
    _diagonal(weights, state, pairs, vectors, lanes, items, gathered, y, stride)
    first = vectors * WIDTH
    vectors, pairs = table[row + layout.RANK_ONE], offset(table, table[row + layout.RANK_ONE_PAIRS])
    weights, state = offset(w, table[row + layout.RANK_ONE_W]), offset(memory, table[row + layout.RANK_ONE_X])
    _rank_one(weights, state, pairs, vectors, lanes, items, offset(gathered, first), offset(y, first), stride)
    # z = W gelu(y), with the weights as stored.
    for item in range(items):
        simd.gelu(offset(y, item * stride), width)
    glu = table[row + layout.GLU]
    both = 2 * rows if glu else rows
    dtype, mixing = table[row + layout.DTYPE], table[row + layout.MIXING]
    if dtype == 0:
        _mix_float32(w, mixing, w, columns, both, items, y, z, stride)
    elif dtype == 1:
        _mix_float16(w, 2 * mixing, w, columns, both, items, y, z, stride)
    else:
        largest = np.float32(min(layout.LARGEST_INTEGER, layout.LARGEST_SUM // max(columns, 1)))
        for item in range(items):
            values = offset(y, item * stride)
            simd.to_integers(values, offset(values, stride - 2), largest, width)
        sums = offset(w, table[row + layout.SUMS])
        _mix_int8(w, 4 * mixing, sums, (columns + 1) // 2, both, items, y, z, stride)
    # u += scale z + bias, through the gate with GLU; then the constant of the removed rows, and the norm.
    scale, bias = offset(w, table[row + layout.SCALE]), offset(w, table[row + layout.BIAS])
    index, constant = table[row + layout.ROW_INDEX], table[row + layout.CONSTANT]
    for item in range(items):
        values, channels = offset(z, item * stride), offset(u, item * stride)
        simd.affine(scale, bias, values, values, both)
        if glu:
            simd.gate(values, offset(values, rows), rows)
        if index < 0:
            simd.add(values, channels, padded_width)
        else:
            for i in range(left):
                channels[table[index + i]] += values[i]
        if constant >= 0:
            simd.add(offset(w, constant), channels, padded_width)
        if not prenorm and norm >= 0:
            _normalise(w, table, row, norm, mask, channels, channels, padded_width)


@njit(error_model="numpy")
def _acceptable(samples: Any, count: int, scale: Any, d_input: int, tokens: int) -> bool:
    """Return whether all values of all samples may reach the state, as ``InputRange.bad`` defines it."""
    for t in range(count):
        for c in range(d_input):
            value = samples[t * d_input + c]
            # Comparisons with NaN are false, so that NaN is refused.
            if not (value >= scale[2 * d_input + c] and value <= scale[3 * d_input + c]):
                return False
            if tokens and value != np.float64(np.int64(value)):
                return False
    return True


def run(arguments: Any) -> int:
    """Step samples (steps, lanes, d_input), float64, into outputs (steps, lanes, d_output), float32.

    ``arguments`` is the array ``layout.ARGUMENTS``. Returns 0, with nothing changed, if a sample is not acceptable, and
    1 otherwise.
    """
    w = simd.float32_at(arguments[layout.ARGUMENT_WEIGHTS])
    table = simd.int64_at(arguments[layout.ARGUMENT_TABLE])
    scale = simd.float64_at(arguments[layout.ARGUMENT_SCALE])
    memory = simd.float32_at(arguments[layout.ARGUMENT_MEMORY])
    samples = simd.float64_at(arguments[layout.ARGUMENT_SAMPLES])
    outputs = simd.float32_at(arguments[layout.ARGUMENT_OUTPUTS])
    lanes, padded_width, stride = table[layout.LANES], table[layout.PADDED_WIDTH], table[layout.STRIDE]
    d_input, d_output, tokens = table[layout.D_INPUT], table[layout.D_OUTPUT], table[layout.VOCABULARY]
    steps = arguments[layout.ARGUMENT_STEPS]
    if not _acceptable(samples, steps * lanes, scale, d_input, tokens):
        return 0
    encoder, decoder = offset(w, table[layout.ENCODER]), offset(w, table[layout.DECODER])
    mask, scratch = offset(w, table[layout.MASK]), offset(memory, table[layout.SCRATCH])
    biases = offset(decoder, d_output * padded_width)
    lanes_per_tile = TILE if lanes > TILE else lanes
    steps_per_tile = TILE // lanes_per_tile
    begin = 0
    # A while loop, because a range whose step may be zero can raise an exception.
    while begin < steps:
        first = 0
        while first < lanes:
            lanes_now = lanes_per_tile if first + lanes_per_tile <= lanes else lanes - first
            steps_now = steps_per_tile if begin + steps_per_tile <= steps else steps - begin
            for t in range(steps_now):
                for k in range(lanes_now):
                    sample = offset(samples, ((begin + t) * lanes + first + k) * d_input)
                    u = offset(scratch, (t * lanes_now + k) * stride)
                    if tokens:
                        simd.copy(offset(encoder, np.int64(sample[0]) * padded_width), u, padded_width)
                    else:
                        simd.copy(encoder, u, padded_width)
                        for c in range(d_input):
                            z = np.float32((sample[c] - scale[c]) * scale[d_input + c])
                            simd.add_multiple(offset(encoder, (c + 1) * padded_width), z, u, padded_width)
            for b in range(table[layout.BLOCKS]):
                row = layout.FIRST_BLOCK + b * layout.BLOCK_SIZE
                _block(w, table, row, memory, (first, lanes_now, lanes), steps_now * lanes_now, scratch, stride, mask)
            for t in range(steps_now):
                for k in range(lanes_now):
                    output = offset(outputs, ((begin + t) * lanes + first + k) * d_output)
                    u = offset(scratch, (t * lanes_now + k) * stride)
                    for o in range(d_output):
                        output[o] = simd.dot(offset(decoder, o * padded_width), u, padded_width) + biases[o]
            first += lanes_per_tile
        begin += steps_per_tile
    return 1
