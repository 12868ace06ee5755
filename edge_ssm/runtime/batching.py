"""How many samples to step in one go: the more, the cheaper each, and the longer a decision waits for them."""

from __future__ import annotations

import statistics
import time

import numpy as np

from edge_ssm.engines.registry import Engine
from edge_ssm.errors import UsageError

LARGEST = 1024
ROUNDS = 5


def largest(engine: Engine, together: int, budget_s: float, wait_s: float) -> int:
    """The largest power of two of samples whose chunk, measured here, takes at most ``budget_s``; its state is reset.

    ``together`` bounds it (``Windows.together``). ``wait_s`` is the time between two samples where each has an output
    of its own, which then waits for the others of its chunk; else 0, since a chunk ends where a window does. Raises
    UsageError if a single step takes longer than the budget.
    """
    network = engine.network
    chosen = 0
    size = 1
    while size <= min(LARGEST, together):
        samples = np.tile(network.input.mean, (size, engine.lanes, 1))
        times = []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            engine.chunk(samples)
            times.append(time.perf_counter() - began)
        took = statistics.median(times[1:]) + (size - 1) * wait_s
        if took > budget_s:
            break
        chosen, size = size, 2 * size
    engine.reset()
    if not chosen:
        raise UsageError(f"--latency-budget: {1e3 * budget_s:g} ms, but a single step takes {1e3 * took:.3g} ms here")
    return chosen
