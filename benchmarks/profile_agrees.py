"""Agreement of ``edge-ssm profile`` with the benchmark of the engines, and the cost of timing each step.

    OMP_NUM_THREADS=1 python benchmarks/profile_agrees.py

Rounds of both take turns: the benchmark reads the clock once for twenty steps, the profiler after every step.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests")]
from support.networks import random_network, samples_for

from edge_ssm.engines import selection
from edge_ssm.engines.registry import create
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.profiler import protocol

SHAPES = {"small": (64, 2), "ecg": (128, 4), "large": (256, 6)}
ROUNDS, ROUND_S = 21, 0.1


def main() -> None:
    """Measure, and print the ratios."""
    overhead = protocol.timer_ns()
    print(f"timing adds {overhead:.0f} ns to a call that does nothing")
    for shape, (h, layers) in SHAPES.items():
        network = random_network(h=h, pairs=32, layers=layers, d_input=1, d_output=5)
        samples = samples_for(network, 0, 256)
        engine = create("cpu", network)
        calls = protocol.Workload("cpu", engine, samples).calls()
        ratios, profiler_us, benchmark_us = [], [], []
        for turn in range(ROUNDS + 1):
            (benchmark,) = selection.measure([engine], list(samples[:20]), 5)
            histogram = LatencyHistogram()
            protocol.run_back_to_back(calls, time.perf_counter_ns() + int(ROUND_S * 1e9), histogram)
            profiled = histogram.percentile_ns(50) / 1e3
            if turn:
                ratios.append(profiled / benchmark)
                profiler_us.append(profiled)
                benchmark_us.append(benchmark)
        print(
            f"{shape:6} profile p50 {statistics.median(profiler_us):7.2f} us, "
            f"benchmark {statistics.median(benchmark_us):7.2f} us, "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
