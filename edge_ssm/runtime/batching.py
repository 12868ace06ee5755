"""How many samples to step in one chunk: the more, the cheaper each is, and the longer a decision waits for them."""

from __future__ import annotations

import statistics
import time

import numpy as np

from edge_ssm.engines.registry import Engine
from edge_ssm.errors import UsageError

MAX_CHUNK = 1024
ROUNDS = 5


def largest_chunk(engine: Engine, limit: int, budget_s: float, wait_s: float) -> int:
    """Measure ``engine``, reset it, and return the largest chunk that takes at most ``budget_s`` seconds.

    The result is a power of two of at most ``limit`` samples. ``wait_s`` is the time between two samples if each has an
    output of its own, which then waits for the rest of its chunk; otherwise 0, because a chunk ends where a window
    ends. Raises UsageError if a single step takes longer than the budget.
    """
    network = engine.network
    chosen = 0
    size = 1
    while size <= min(MAX_CHUNK, limit):
        samples = np.tile(network.input.mean, (size, engine.lanes, 1))
        times = []
        for _ in range(ROUNDS + 1):  # the first is warm-up
            began = time.perf_counter()
            engine.chunk(samples)
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times[1:]) + (size - 1) * wait_s
        if seconds > budget_s:
            break
        chosen, size = size, 2 * size
    engine.reset()
    if not chosen:
        raise UsageError(
            f"--latency-budget: {1e3 * budget_s:g} ms, but a single step takes {1e3 * seconds:.3g} ms here"
        )
    return chosen
