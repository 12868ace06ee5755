"""The CUDA kernels, in Numba.

``run`` takes T samples of all lanes through the whole network in one launch; the loop over time is inside. ``serve`` is
launched once and then waits for samples.

Lanes form groups of LANES lanes. A group is computed by ``blocks`` thread blocks, each of which computes some of the
columns and rows of every layer. The blocks exchange their results through ``scratch``, with two barriers per layer. If
a group has one block only, everything stays in its shared memory.

Within a block, the states of a channel and the columns of a row are divided among the threads. Their partial sums are
reduced in a fixed order. A chunk therefore gives the same bits as its single steps, and no lane affects another.

Everything is float32. Constants are NumPy scalars, because Numba computes a float32 and a Python float in float64.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda as numba_cuda
from numba import float32

from edge_ssm.engines.cuda import layout
from edge_ssm.engines.cuda.layout import ADDERS, LAST_NUMBER
from edge_ssm.engines.cuda.tagged_words import float_of, load_word, store_word, word_of

cuda: Any = numba_cuda
_ZERO, _HALF, _ONE, _ROOT_HALF = np.float32(0), np.float32(0.5), np.float32(1), np.float32(0.5**0.5)


@cuda.jit(device=True, inline="always")
def group_barrier(counters: Any, group: Any, blocks: Any) -> None:
    """Wait until all blocks of a group have arrived. All of them must be resident on the GPU.

    The counter has 64 bits and only grows, so that it never overflows.
    """
    cuda.syncthreads()
    if blocks > 1:
        if cuda.threadIdx.x == 0:
            cuda.threadfence()
            arrived = cuda.atomic.add(counters, group, 1)
            goal = (arrived // blocks + 1) * blocks
            while cuda.atomic.add(counters, group, 0) < goal:
                pass
            cuda.threadfence()
        cuda.syncthreads()


@cache
def kernels(lanes_per_group: int) -> tuple[Any, Any]:
    """Return (run, serve) for groups of ``lanes_per_group`` lanes. A group reads the weights once for all its lanes."""
    LANES = lanes_per_group

    @cuda.jit(device=True, inline="always")
    def all_gather(shared: Any, start: Any, stride: Any, first: Any, last: Any, count: Any, scratch: Any, counters: Any,
                   group: Any, blocks: Any) -> None:  # fmt: skip
        """Complete shared[start + lane stride + i], i < count, of which this block has computed i in [first, last)."""
        if blocks > 1:
            cuda.syncthreads()
            own = last - first
            for i in range(cuda.threadIdx.x, LANES * own, cuda.blockDim.x):
                lane, k = i // own, first + i % own
                scratch[(group * LANES + lane) * stride + k] = shared[start + lane * stride + k]
        group_barrier(counters, group, blocks)
        if blocks > 1:
            for i in range(cuda.threadIdx.x, LANES * count, cuda.blockDim.x):
                lane, k = i // count, i % count
                if k < first or k >= last:
                    shared[start + lane * stride + k] = scratch[(group * LANES + lane) * stride + k]
            cuda.syncthreads()

    @cuda.jit(device=True, inline="always")
    def normalise(shared: Any, source: Any, target: Any, stride: Any, partial: Any, w: Any, norm: Any, layer: Any,
                  h: Any) -> None:  # fmt: skip
        """Compute shared[target + ...] = norm(shared[source + ...]) for each lane."""
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        if layer == 0:
            for i in range(tid, LANES * h, threads):
                lane, c = i // h, i % h
                shared[target + lane * stride + c] = shared[source + lane * stride + c] * w[norm + c] + w[norm + h + c]
        else:
            share = _ONE / float32(h)
            for i in range(tid, LANES * ADDERS, threads):
                lane, j = i // ADDERS, i % ADDERS
                total = _ZERO
                for c in range(j, h, ADDERS):
                    total += shared[source + lane * stride + c]
                shared[partial + i] = total
            cuda.syncthreads()
            for i in range(tid, LANES * ADDERS, threads):
                lane, j = i // ADDERS, i % ADDERS
                mean = _ZERO
                for k in range(ADDERS):
                    mean += shared[partial + lane * ADDERS + k]
                mean *= share
                total = _ZERO
                for c in range(j, h, ADDERS):
                    deviation = shared[source + lane * stride + c] - mean
                    total += deviation * deviation
                shared[partial + LANES * ADDERS + i] = total
            cuda.syncthreads()
            for i in range(tid, LANES * h, threads):
                lane, c = i // h, i % h
                mean, variance = _ZERO, _ZERO
                for k in range(ADDERS):
                    mean += shared[partial + lane * ADDERS + k]
                    variance += shared[partial + (LANES + lane) * ADDERS + k]
                mean *= share
                scale = _ONE / math.sqrt(variance * share + w[norm + 2 * h])
                deviation = shared[source + lane * stride + c] - mean
                shared[target + lane * stride + c] = deviation * scale * w[norm + c] + w[norm + h + c]
        cuda.syncthreads()

    @cuda.jit(device=True, inline="always")
    def reduce(shared: Any, partial: Any, total: Any, share: Any, width: Any, slot: Any, is_root: Any,
               target: Any) -> None:  # fmt: skip
        """Compute shared[target], the sum of ``total`` over the ``share`` threads of a slot, in the root thread."""
        shared[partial + cuda.threadIdx.x] = total
        cuda.syncthreads()
        if is_root:
            whole_sum = _ZERO
            for j in range(share):
                whole_sum += shared[partial + j * width + slot]
            shared[target] = whole_sum
        cuda.syncthreads()

    @cuda.jit(device=True, inline="always")
    def diagonal(shared: Any, v: Any, y: Any, stride: Any, partial: Any, w: Any, weights: Any, table: Any, row: Any,
                 state: Any, x: Any, lane_size: Any, lanes: Any, first: Any, last: Any) -> None:  # fmt: skip
        """Step channels [first, last): x += delta x + v, y = Re(C x). The factor 2 is in C.

        An item is one channel of one lane. ``width`` items are computed at a time; ``share`` threads divide the states
        of an item among themselves, and ``reduce`` adds up their sums.
        """
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        count, own = table[row + layout.DIAGONAL], last - first
        items = LANES * own
        width = min(items, threads)
        share = threads // max(width, 1)
        base = 0
        while base < items:
            slot, s = tid % width, tid // width
            i = base + slot
            total = _ZERO
            if s < share and i < items:
                lane, k = i // own, first + i % own
                if lane < lanes:
                    u = shared[v + lane * stride + table[table[row + layout.GATHER] + k]]
                    for p in range(s, table[table[row + layout.PAIRS] + k], share):
                        place, here = weights + 4 * p * count + k, x + lane * lane_size + 2 * p * count + k
                        re, im = state[here], state[here + count]
                        dr, di = w[place], w[place + count]
                        new_re = re + (dr * re - di * im + u)
                        new_im = im + (dr * im + di * re)
                        state[here], state[here + count] = new_re, new_im
                        total += w[place + 2 * count] * new_re + w[place + 3 * count] * new_im
            target = y + (i // own) * stride + first + i % own
            reduce(shared, partial, total, share, width, slot, s == 0 and i < items, target)
            base += width

    @cuda.jit(device=True, inline="always")
    def rank_one(shared: Any, v: Any, y: Any, stride: Any, partial: Any, w: Any, weights: Any, table: Any, row: Any,
                 state: Any, x: Any, lane_size: Any, lanes: Any, first: Any, last: Any) -> None:  # fmt: skip
        """Step channels with a rank-one term: q = Re(r x) + beta v, x += delta x + v + p q, y = Re(C x)."""
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        count, before, own = table[row + layout.RANK_ONE], table[row + layout.DIAGONAL], last - first
        items = LANES * own
        width = min(items, threads)
        share = threads // max(width, 1)
        base = 0
        while base < items:
            slot, s = tid % width, tid // width
            i = base + slot
            busy = s < share and i < items
            lane, k = i // max(own, 1), first + i % max(own, 1)
            busy = busy and lane < lanes
            u, pairs, total = _ZERO, 0, _ZERO
            if busy:
                u = shared[v + lane * stride + table[table[row + layout.GATHER] + before + k]]
                pairs = table[table[row + layout.PAIRS] + before + k]
                for p in range(s, pairs, share):
                    place = weights + count + 8 * p * count + k
                    here = x + lane * lane_size + 2 * p * count + k
                    total += w[place + 6 * count] * state[here] + w[place + 7 * count] * state[here + count]
            shared[partial + tid] = total
            cuda.syncthreads()
            q = _ZERO
            if busy:
                q = w[weights + k] * u
                for j in range(share):
                    q += shared[partial + j * width + slot]
            cuda.syncthreads()
            total = _ZERO
            if busy:
                for p in range(s, pairs, share):
                    place = weights + count + 8 * p * count + k
                    here = x + lane * lane_size + 2 * p * count + k
                    re, im = state[here], state[here + count]
                    dr, di = w[place], w[place + count]
                    new_re = re + (dr * re - di * im + (u + w[place + 4 * count] * q))
                    new_im = im + (dr * im + di * re + w[place + 5 * count] * q)
                    state[here], state[here + count] = new_re, new_im
                    total += w[place + 2 * count] * new_re + w[place + 3 * count] * new_im
            reduce(shared, partial, total, share, width, slot, s == 0 and i < items, y + lane * stride + before + k)
            base += width

    @cuda.jit(device=True, inline="always")
    def mix(shared: Any, y: Any, z: Any, stride: Any, partial: Any, w: Any, half: Any, whole: Any, table: Any, row: Any,
            first: Any, last: Any) -> None:  # fmt: skip
        """Compute shared[z + lane stride + j], rows [first, last) of W y + bias: their values, then their gates."""
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        rows, columns, dtype = table[row + layout.ROWS], table[row + layout.COLUMNS], table[row + layout.DTYPE]
        own, mixing = last - first, table[row + layout.MIXING]
        glu = table[row + layout.GLU]
        items, both = own * (1 + glu), rows * (1 + glu)
        width = min(items, threads)
        share = threads // max(width, 1)
        sums = cuda.local.array(LANES, float32)
        base = 0
        while base < items:
            slot, s = tid % width, tid // width
            j = base + slot
            r = first + j if j < own else rows + first + j - own
            for lane in range(LANES):
                sums[lane] = _ZERO
            if s < share and j < items:
                if dtype == 0:
                    for k in range(s, columns, share):
                        weight = w[mixing + k * both + r]
                        for lane in range(LANES):
                            sums[lane] += weight * shared[y + lane * stride + k]
                elif dtype == 1:
                    for k in range(s, columns, share):
                        weight = float32(half[mixing + k * both + r])
                        for lane in range(LANES):
                            sums[lane] += weight * shared[y + lane * stride + k]
                else:
                    for k in range(s, columns, share):
                        weight = float32(whole[mixing + k * both + r])
                        for lane in range(LANES):
                            sums[lane] += weight * shared[y + lane * stride + k]
            for lane in range(LANES):
                shared[partial + lane * threads + tid] = sums[lane]
            cuda.syncthreads()
            if s == 0 and j < items:
                for lane in range(LANES):
                    total = _ZERO
                    for i in range(share):
                        total += shared[partial + lane * threads + i * width + slot]
                    scale, bias = w[table[row + layout.SCALE] + r], w[table[row + layout.BIAS] + r]
                    shared[z + lane * stride + j] = total * scale + bias
            cuda.syncthreads()
            base += width

    @cuda.jit(device=True, inline="always")
    def forward(weights: Any, half: Any, whole: Any, table: Any, state: Any, samples: Any, sample: Any, outputs: Any,
                output: Any, lanes: Any, stride: Any, blocks: Any, scratch: Any, counters: Any) -> None:  # fmt: skip
        """Take one sample of a group's lanes through the network, from samples[sample ...] to outputs[output ...]."""
        shared = cuda.shared.array(0, float32)
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        group = cuda.blockIdx.x // blocks
        part = cuda.blockIdx.x - group * blocks
        first_lane = group * LANES
        here = min(LANES, lanes - first_lane)
        u, y, z, partial = 0, LANES * stride, 2 * LANES * stride, 3 * LANES * stride
        h, d_input, d_output = table[layout.H], table[layout.D_INPUT], table[layout.D_OUTPUT]
        encoder, decoder, prenorm = table[layout.ENCODER], table[layout.DECODER], table[layout.PRENORM]
        lane_size = table[layout.LANE_SIZE]
        for i in range(tid, LANES * h, threads):
            lane, c = i // h, i % h
            value = _ZERO
            if lane < here:
                start = sample + lane * d_input
                if table[layout.VOCABULARY] > 0:
                    value = weights[encoder + int(samples[start]) * h + c]
                else:
                    value = weights[encoder + c]
                    for j in range(d_input):
                        value += samples[start + j] * weights[encoder + (1 + j) * h + c]
            shared[u + lane * stride + c] = value
        cuda.syncthreads()
        for layer in range(table[layout.LAYERS]):
            row = layout.FIRST_ROW + layer * layout.ROW_SIZE
            norm, layer_norm = table[row + layout.NORM], table[row + layout.LAYER_NORM]
            v = u
            if prenorm and norm >= 0:
                normalise(shared, u, z, stride, partial, weights, norm, layer_norm, h)
                v = z
            columns, diagonals = table[row + layout.COLUMNS], table[row + layout.DIAGONAL]
            rank_ones = table[row + layout.RANK_ONE]
            first, last = columns * part // blocks, columns * (part + 1) // blocks
            x = first_lane * lane_size
            diagonal(shared, v, y, stride, partial, weights, table[row + layout.DIAGONAL_W], table, row, state,
                     x + table[row + layout.DIAGONAL_X], lane_size, here, min(first, diagonals),
                     min(last, diagonals))  # fmt: skip
            rank_one(shared, v, y, stride, partial, weights, table[row + layout.RANK_ONE_W], table, row, state,
                     x + table[row + layout.RANK_ONE_X], lane_size, here,
                     min(max(first - diagonals, 0), rank_ones),
                     min(max(last - diagonals, 0), rank_ones))  # fmt: skip
            own = last - first
            for i in range(tid, LANES * own, threads):
                lane, k = i // own, first + i % own
                channel = table[table[row + layout.GATHER] + k]
                value = weights[table[row + layout.D] + k] * shared[v + lane * stride + channel]
                if k < diagonals + rank_ones:
                    value += shared[y + lane * stride + k]
                half_value = _HALF * value
                shared[y + lane * stride + k] = half_value + half_value * math.erf(value * _ROOT_HALF)
            all_gather(shared, y, stride, first, last, columns, scratch, counters, group, blocks)
            rows, glu = table[row + layout.ROWS], table[row + layout.GLU]
            first, last = rows * part // blocks, rows * (part + 1) // blocks
            mix(shared, y, z, stride, partial, weights, half, whole, table, row, first, last)
            own = last - first
            for i in range(tid, LANES * own, threads):
                lane, j = i // own, i % own
                value = shared[z + lane * stride + j]
                if glu:
                    value /= _ONE + math.exp(-shared[z + lane * stride + own + j])
                shared[y + lane * stride + first + j] = value
            all_gather(shared, y, stride, first, last, rows, scratch, counters, group, blocks)
            for i in range(tid, LANES * rows, threads):
                lane, r = i // rows, i % rows
                shared[u + lane * stride + table[table[row + layout.INDEX] + r]] += shared[y + lane * stride + r]
            cuda.syncthreads()
            constant = table[row + layout.CONSTANT]
            if constant >= 0:
                for i in range(tid, LANES * h, threads):
                    shared[u + (i // h) * stride + i % h] += weights[constant + i % h]
                cuda.syncthreads()
            if prenorm == 0 and norm >= 0:
                normalise(shared, u, u, stride, partial, weights, norm, layer_norm, h)
        if part == 0:
            items = LANES * d_output * ADDERS
            base = 0
            while base < items:
                i = base + tid
                lane, o, j = i // (d_output * ADDERS), i // ADDERS % d_output, i % ADDERS
                total = _ZERO
                if i < items and lane < here:
                    for c in range(j, h, ADDERS):
                        total += weights[decoder + c * d_output + o] * shared[u + lane * stride + c]
                shared[partial + tid] = total
                cuda.syncthreads()
                if i < items and lane < here and j == 0:
                    total = weights[decoder + h * d_output + o]
                    for k in range(ADDERS):
                        total += shared[partial + tid + k]
                    outputs[output + lane * d_output + o] = total
                cuda.syncthreads()
                base += threads
        cuda.syncthreads()

    def run(weights: Any, half: Any, whole: Any, table: Any, state: Any, samples: Any, outputs: Any, steps: Any,
            lanes: Any, stride: Any, blocks: Any, scratch: Any, counters: Any) -> None:  # fmt: skip
        """Step samples (steps, lanes, d_input) into outputs (steps, lanes, d_output), both flat float32.

        The samples are normalised.
        """
        first_lane = cuda.blockIdx.x // blocks * LANES
        for t in range(steps):
            forward(weights, half, whole, table, state, samples, (t * lanes + first_lane) * table[layout.D_INPUT],
                    outputs, (t * lanes + first_lane) * table[layout.D_OUTPUT], lanes, stride, blocks, scratch,
                    counters)  # fmt: skip

    def serve(weights: Any, half: Any, whole: Any, table: Any, state: Any, inbox: Any, outbox: Any, requests: Any,
              replies: Any, slots: Any, lanes: Any, stride: Any, blocks: Any, scratch: Any,
              counters: Any) -> None:  # fmt: skip
        """Step samples until the host ends it. A group has one lane.

        ``requests`` (slots, lanes, d_input) and ``replies`` (slots, lanes, d_output), int64, are rings in memory that
        the host sees too. A word holds the number of its step in the upper half and a float32 in the lower half. Both
        arrive in one access, so that no order between accesses is needed. A negative word ends the kernel.

        ``inbox`` (blocks, d_input) and ``outbox`` (lanes, d_output), float32, are buffers of the kernel.
        """
        shared = cuda.shared.array(0, float32)
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        group = cuda.blockIdx.x // blocks
        part = cuda.blockIdx.x - group * blocks
        d_input, d_output = table[layout.D_INPUT], table[layout.D_OUTPUT]
        own = cuda.blockIdx.x * d_input
        ended = 3 * stride
        number = 0
        while True:
            number = number % LAST_NUMBER + 1
            slot = (number % slots) * lanes + group
            if tid == 0:
                shared[ended] = _ZERO
            cuda.syncthreads()
            for i in range(tid, d_input, threads):
                word = load_word(requests, slot * d_input + i)
                while word >= 0 and word >> 32 != number:
                    word = load_word(requests, slot * d_input + i)
                if word < 0:
                    shared[ended] = _ONE
                inbox[own + i] = float_of(word)
            cuda.syncthreads()
            stop = shared[ended] > _ZERO
            cuda.syncthreads()
            if stop:
                break
            forward(weights, half, whole, table, state, inbox, own, outbox, group * d_output, lanes, stride, blocks,
                    scratch, counters)  # fmt: skip
            if part == 0:
                for o in range(tid, d_output, threads):
                    store_word(replies, slot * d_output + o, word_of(number, outbox[group * d_output + o]))

    return run, serve
