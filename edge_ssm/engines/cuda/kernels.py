"""The CUDA kernels: T samples of all lanes through the whole network in one launch, the loop over time inside; and
one that is launched once and stays.

``blocks`` blocks of threads share a group of LANES lanes. Each has some of the columns and rows of every layer, and
they hand each other what they found through ``scratch`` (two barriers a layer); with one block everything stays in its
shared memory. Within a block a channel's states, and a row's columns, are shared out among as many threads as there
are, and their sums joined in one order, so that a chunk is as many steps, bit for bit, and no lane sees another.

Float32 throughout: Numba makes float64 of a float32 and a Python float.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda as numba_cuda
from numba import float32

from edge_ssm.engines.cuda import layout as at
from edge_ssm.engines.cuda.tagged_words import float_of, load_word, store_word, word_of

cuda: Any = numba_cuda
_ZERO, _HALF, _ONE, _ROOT_HALF = np.float32(0), np.float32(0.5), np.float32(1), np.float32(0.5**0.5)
ADDERS = 32
"""Threads that sum a vector up: what each finds is read by all."""


LAST_NUMBER = 1 << 30
"""Of the steps that a kernel serves; then it counts from one again. A multiple of any ring's slots."""


@cuda.jit(device=True, inline="always")
def _together(counters: Any, group: Any, blocks: Any) -> None:
    """All blocks of a group wait for each other; all must be resident. Counts in 64 bits, so that it never ends."""
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
def kernels(lanes_together: int) -> tuple[Any, Any]:
    """(run, serve) for groups of ``lanes_together`` lanes, whose weights are read once for all of them."""
    LANES = lanes_together

    @cuda.jit(device=True, inline="always")
    def exchanged(shared: Any, start: Any, wide: Any, first: Any, last: Any, count: Any, scratch: Any, counters: Any,
                  group: Any, part: Any, blocks: Any) -> None:  # fmt: skip
        """Of shared[start + lane wide + i] this block has i in [first, last); it gets the rest of the ``count``."""
        if blocks > 1:
            cuda.syncthreads()
            own = last - first
            for i in range(cuda.threadIdx.x, LANES * own, cuda.blockDim.x):
                lane, place = i // own, first + i % own
                scratch[(group * LANES + lane) * wide + place] = shared[start + lane * wide + place]
        _together(counters, group, blocks)
        if blocks > 1:
            for i in range(cuda.threadIdx.x, LANES * count, cuda.blockDim.x):
                lane, place = i // count, i % count
                if place < first or place >= last:
                    shared[start + lane * wide + place] = scratch[(group * LANES + lane) * wide + place]
            cuda.syncthreads()

    @cuda.jit(device=True, inline="always")
    def normed(shared: Any, source: Any, target: Any, wide: Any, partial: Any, w: Any, norm: Any, layer: Any,
               h: Any) -> None:  # fmt: skip
        """shared[target + ...] = norm of shared[source + ...], for each lane."""
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        if layer == 0:
            for i in range(tid, LANES * h, threads):
                lane, c = i // h, i % h
                shared[target + lane * wide + c] = shared[source + lane * wide + c] * w[norm + c] + w[norm + h + c]
        else:
            share = _ONE / float32(h)
            for i in range(tid, LANES * ADDERS, threads):
                lane, j = i // ADDERS, i % ADDERS
                total = _ZERO
                for c in range(j, h, ADDERS):
                    total += shared[source + lane * wide + c]
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
                    apart = shared[source + lane * wide + c] - mean
                    total += apart * apart
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
                apart = shared[source + lane * wide + c] - mean
                shared[target + lane * wide + c] = apart * scale * w[norm + c] + w[norm + h + c]
        cuda.syncthreads()

    @cuda.jit(device=True, inline="always")
    def joined(shared: Any, partial: Any, total: Any, share: Any, width: Any, slot: Any, chosen: Any,
               target: Any) -> None:  # fmt: skip
        """shared[target] = the sum of what the ``share`` threads of a slot have, by the one that is chosen."""
        shared[partial + cuda.threadIdx.x] = total
        cuda.syncthreads()
        if chosen:
            whole_sum = _ZERO
            for j in range(share):
                whole_sum += shared[partial + j * width + slot]
            shared[target] = whole_sum
        cuda.syncthreads()

    @cuda.jit(device=True, inline="always")
    def diagonal(shared: Any, v: Any, y: Any, wide: Any, partial: Any, w: Any, weights: Any, table: Any, row: Any,
                 state: Any, x: Any, lane_size: Any, lanes: Any, first: Any, last: Any) -> None:  # fmt: skip
        """y of channels [first, last): x += delta x + v, y = Re(C x) (the factor 2 is in C)."""
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        count, own = table[row + at.DIAGONAL], last - first
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
                    u = shared[v + lane * wide + table[table[row + at.GATHER] + k]]
                    for p in range(s, table[table[row + at.PAIRS] + k], share):
                        place, here = weights + 4 * p * count + k, x + lane * lane_size + 2 * p * count + k
                        re, im = state[here], state[here + count]
                        dr, di = w[place], w[place + count]
                        new_re = re + (dr * re - di * im + u)
                        new_im = im + (dr * im + di * re)
                        state[here], state[here + count] = new_re, new_im
                        total += w[place + 2 * count] * new_re + w[place + 3 * count] * new_im
            target = y + (i // own) * wide + first + i % own
            joined(shared, partial, total, share, width, slot, s == 0 and i < items, target)
            base += width

    @cuda.jit(device=True, inline="always")
    def rank_one(shared: Any, v: Any, y: Any, wide: Any, partial: Any, w: Any, weights: Any, table: Any, row: Any,
                 state: Any, x: Any, lane_size: Any, lanes: Any, first: Any, last: Any) -> None:  # fmt: skip
        """The same with a rank-one term: q = Re(r x) + beta v, x += delta x + v + p q; channels behind the diagonal."""
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        count, before, own = table[row + at.LOW_RANK], table[row + at.DIAGONAL], last - first
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
                u = shared[v + lane * wide + table[table[row + at.GATHER] + before + k]]
                pairs = table[table[row + at.PAIRS] + before + k]
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
            joined(shared, partial, total, share, width, slot, s == 0 and i < items, y + lane * wide + before + k)
            base += width

    @cuda.jit(device=True, inline="always")
    def mixed(shared: Any, y: Any, z: Any, wide: Any, partial: Any, w: Any, half: Any, whole: Any, table: Any, row: Any,
              first: Any, last: Any) -> None:  # fmt: skip
        """shared[z + lane wide + j] = rows [first, last) of W y + bias: their values, then their gates."""
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        rows, columns, dtype = table[row + at.ROWS], table[row + at.COLUMNS], table[row + at.DTYPE]
        own, mixing = last - first, table[row + at.MIXING]
        glu = table[row + at.GLU]
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
                            sums[lane] += weight * shared[y + lane * wide + k]
                elif dtype == 1:
                    for k in range(s, columns, share):
                        weight = float32(half[mixing + k * both + r])
                        for lane in range(LANES):
                            sums[lane] += weight * shared[y + lane * wide + k]
                else:
                    for k in range(s, columns, share):
                        weight = float32(whole[mixing + k * both + r])
                        for lane in range(LANES):
                            sums[lane] += weight * shared[y + lane * wide + k]
            for lane in range(LANES):
                shared[partial + lane * threads + tid] = sums[lane]
            cuda.syncthreads()
            if s == 0 and j < items:
                for lane in range(LANES):
                    total = _ZERO
                    for i in range(share):
                        total += shared[partial + lane * threads + i * width + slot]
                    scale, bias = w[table[row + at.SCALE] + r], w[table[row + at.BIAS] + r]
                    shared[z + lane * wide + j] = total * scale + bias
            cuda.syncthreads()
            base += width

    @cuda.jit(device=True, inline="always")
    def forward(weights: Any, half: Any, whole: Any, table: Any, state: Any, samples: Any, sample: Any, outputs: Any,
                output: Any, lanes: Any, wide: Any, blocks: Any, scratch: Any, counters: Any) -> None:  # fmt: skip
        """One sample of a group's lanes, from samples[sample ...] to outputs[output ...]."""
        shared = cuda.shared.array(0, float32)
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        group = cuda.blockIdx.x // blocks
        part = cuda.blockIdx.x - group * blocks
        first_lane = group * LANES
        here = min(LANES, lanes - first_lane)
        u, y, z, partial = 0, LANES * wide, 2 * LANES * wide, 3 * LANES * wide
        h, d_input, d_output = table[at.H], table[at.D_INPUT], table[at.D_OUTPUT]
        encoder, decoder, prenorm, lane_size = table[at.ENCODER], table[at.DECODER], table[at.PRENORM], table[at.LANE]
        for i in range(tid, LANES * h, threads):
            lane, c = i // h, i % h
            value = _ZERO
            if lane < here:
                at_sample = sample + lane * d_input
                if table[at.VOCABULARY] > 0:
                    value = weights[encoder + int(samples[at_sample]) * h + c]
                else:
                    value = weights[encoder + c]
                    for j in range(d_input):
                        value += samples[at_sample + j] * weights[encoder + (1 + j) * h + c]
            shared[u + lane * wide + c] = value
        cuda.syncthreads()
        for layer in range(table[at.LAYERS]):
            row = at.FIRST_ROW + layer * at.ROW
            norm, layer_norm = table[row + at.NORM], table[row + at.LAYER_NORM]
            v = u
            if prenorm and norm >= 0:
                normed(shared, u, z, wide, partial, weights, norm, layer_norm, h)
                v = z
            columns, diagonals, low_ranks = (
                table[row + at.COLUMNS],
                table[row + at.DIAGONAL],
                table[row + at.LOW_RANK],
            )
            first, last = columns * part // blocks, columns * (part + 1) // blocks
            x = first_lane * lane_size
            diagonal(shared, v, y, wide, partial, weights, table[row + at.DIAGONAL_W], table, row, state,
                     x + table[row + at.DIAGONAL_X], lane_size, here, min(first, diagonals),
                     min(last, diagonals))  # fmt: skip
            rank_one(shared, v, y, wide, partial, weights, table[row + at.LOW_RANK_W], table, row, state,
                     x + table[row + at.LOW_RANK_X], lane_size, here,
                     min(max(first - diagonals, 0), low_ranks),
                     min(max(last - diagonals, 0), low_ranks))  # fmt: skip
            own = last - first
            for i in range(tid, LANES * own, threads):
                lane, k = i // own, first + i % own
                value = weights[table[row + at.D] + k] * shared[v + lane * wide + table[table[row + at.GATHER] + k]]
                if k < diagonals + low_ranks:
                    value += shared[y + lane * wide + k]
                half_value = _HALF * value
                shared[y + lane * wide + k] = half_value + half_value * math.erf(value * _ROOT_HALF)
            exchanged(shared, y, wide, first, last, columns, scratch, counters, group, part, blocks)
            rows, glu = table[row + at.ROWS], table[row + at.GLU]
            first, last = rows * part // blocks, rows * (part + 1) // blocks
            mixed(shared, y, z, wide, partial, weights, half, whole, table, row, first, last)
            own = last - first
            for i in range(tid, LANES * own, threads):
                lane, j = i // own, i % own
                value = shared[z + lane * wide + j]
                if glu:
                    value /= _ONE + math.exp(-shared[z + lane * wide + own + j])
                shared[y + lane * wide + first + j] = value
            exchanged(shared, y, wide, first, last, rows, scratch, counters, group, part, blocks)
            for i in range(tid, LANES * rows, threads):
                lane, r = i // rows, i % rows
                shared[u + lane * wide + table[table[row + at.INDEX] + r]] += shared[y + lane * wide + r]
            cuda.syncthreads()
            constant = table[row + at.CONSTANT]
            if constant >= 0:
                for i in range(tid, LANES * h, threads):
                    shared[u + (i // h) * wide + i % h] += weights[constant + i % h]
                cuda.syncthreads()
            if prenorm == 0 and norm >= 0:
                normed(shared, u, u, wide, partial, weights, norm, layer_norm, h)
        if part == 0:
            items = LANES * d_output * ADDERS
            base = 0
            while base < items:
                i = base + tid
                lane, o, j = i // (d_output * ADDERS), i // ADDERS % d_output, i % ADDERS
                total = _ZERO
                if i < items and lane < here:
                    for c in range(j, h, ADDERS):
                        total += weights[decoder + c * d_output + o] * shared[u + lane * wide + c]
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
            lanes: Any, wide: Any, blocks: Any, scratch: Any, counters: Any) -> None:  # fmt: skip
        """samples (steps, lanes, d_input) float32, normalised -> outputs (steps, lanes, d_output) float32, flat."""
        first_lane = cuda.blockIdx.x // blocks * LANES
        for t in range(steps):
            forward(weights, half, whole, table, state, samples, (t * lanes + first_lane) * table[at.D_INPUT], outputs,
                    (t * lanes + first_lane) * table[at.D_OUTPUT], lanes, wide, blocks, scratch,
                    counters)  # fmt: skip

    def serve(weights: Any, half: Any, whole: Any, table: Any, state: Any, inbox: Any, outbox: Any, given: Any,
              found: Any, slots: Any, lanes: Any, wide: Any, blocks: Any, scratch: Any,
              counters: Any) -> None:  # fmt: skip
        """Steps until told to stop; one lane a group.

        ``given`` (slots, lanes, d_input) and ``found`` (slots, lanes, d_output) int64 are rings in memory that the
        host sees. A word is a float32 below the number of its step: both arrive in one access, so that no order
        between accesses is needed. A negative word is the end. ``inbox`` (blocks, d_input) and ``outbox`` (lanes,
        d_output) float32 are the kernel's own.
        """
        shared = cuda.shared.array(0, float32)
        tid, threads = cuda.threadIdx.x, cuda.blockDim.x
        group = cuda.blockIdx.x // blocks
        part = cuda.blockIdx.x - group * blocks
        d_input, d_output = table[at.D_INPUT], table[at.D_OUTPUT]
        own = cuda.blockIdx.x * d_input
        ended = 3 * wide
        number = 0
        while True:
            number = number % LAST_NUMBER + 1
            slot = (number % slots) * lanes + group
            if tid == 0:
                shared[ended] = _ZERO
            cuda.syncthreads()
            for i in range(tid, d_input, threads):
                word = load_word(given, slot * d_input + i)
                while word >= 0 and word >> 32 != number:
                    word = load_word(given, slot * d_input + i)
                if word < 0:
                    shared[ended] = _ONE
                inbox[own + i] = float_of(word)
            cuda.syncthreads()
            stop = shared[ended] > _ZERO
            cuda.syncthreads()
            if stop:
                break
            forward(weights, half, whole, table, state, inbox, own, outbox, group * d_output, lanes, wide, blocks,
                    scratch, counters)  # fmt: skip
            if part == 0:
                for o in range(tid, d_output, threads):
                    store_word(found, slot * d_output + o, word_of(number, outbox[group * d_output + o]))

    return run, serve


def shared_floats(lanes_together: int, wide: int, threads: int) -> int:
    """Of the dynamic shared memory: u, y and z, and a place for each thread's partial sums."""
    return 3 * lanes_together * wide + max(lanes_together * threads, 2 * lanes_together * ADDERS)
