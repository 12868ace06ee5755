"""A prediction, not a measurement: how long a step takes on an Orin Nano's GPU, by the network's shape and pruning.

    python benchmarks/gpu/predict.py

One launch and a wait; the time to read the step's weights and states, from the second cache where they fit into it,
else from memory, one multiprocessor at its share of the cache's rate, or the multiply-adds at the peak rate of those
that work, whichever is more; two barriers a layer where a lane is shared out among multiprocessors. ``run.py`` measures
launch and bandwidth on the GPU that it runs on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from floor import read_bytes
from networks import random_network

from edge_ssm.engines.cuda import layout as cuda_layout
from edge_ssm.engines.cuda.engine import make_plan
from edge_ssm.model.cost import cost
from edge_ssm.model.discretize import step_parameters
from edge_ssm.model.network import Network

SHAPES = {"small": (64, 2), "ecg": (128, 4), "large": (256, 6)}


@dataclass(frozen=True)
class Board:
    """A GPU in figures: multiprocessors, clock and memory bandwidth from NVIDIA's data sheet of the Orin Nano, shared
    memory from the CUDA programming guide (compute capability 8.7). The second cache, its rate, launch and barrier are
    assumptions."""

    name: str
    processors: int
    clock_ghz: float
    memory_gb_s: float
    cache_bytes: int
    cache_bytes_a_clock: int
    """Of one multiprocessor from the second cache."""
    shared_bytes: int
    launch_us: float
    """To launch an empty kernel and wait for it."""
    barrier_us: float
    """For blocks to wait for each other through memory."""


BOARDS = (
    Board("Orin Nano 8 GB, 15 W", 8, 0.625, 68, 2 << 20, 64, 163 << 10, 12.0, 1.5),
    Board("Orin Nano 8 GB Super, MAXN", 8, 1.02, 102, 2 << 20, 64, 163 << 10, 12.0, 1.0),
)


def network_of(h: int, layers: int, share: float) -> Network:
    left = round(h * (1 - share))
    shape: dict[str, Any] = {"h": h, "pairs": 32, "layers": layers, "d_input": 1, "d_output": 5}
    return random_network(**shape, active=[left] * layers, columns=left)


def predicted_us(network: Network, board: Board) -> float:
    layout = cuda_layout.pack(network, [step_parameters(b.ssm, network.discretization) for b in network.blocks])
    division = make_plan(1, layout, board.processors, board.shared_bytes)
    size = read_bytes(network)
    cache = board.cache_bytes_a_clock * board.clock_ghz * division.blocks
    rate = cache if size <= board.cache_bytes else min(cache, board.memory_gb_s)
    arithmetic = cost(network).multiply_adds / (128 * board.clock_ghz * division.blocks * 1e3)
    barriers = 2 * len(network.blocks) * board.barrier_us if division.blocks > 1 else 0.0
    return board.launch_us + max(size / rate / 1e3, arithmetic) + barriers


def main() -> None:
    for board in BOARDS:
        for shape, (h, layers) in SHAPES.items():
            for share in (0.0, 0.5, 0.7):
                step_us = predicted_us(network_of(h, layers, share), board)
                print(f"{board.name:28} {shape:6} {share:4.0%} pruned  {step_us:6.1f} us (predicted)")


if __name__ == "__main__":
    main()
