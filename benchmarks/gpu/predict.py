"""Predict the duration of a step on an Orin Nano's GPU from the network's shape and pruning. Nothing is measured.

    python benchmarks/gpu/predict.py

A step is one launch and a wait, and the longer of two times: reading the weights and states, and the multiply-adds at
the peak rate of the multiprocessors that work. Weights and states are read from the second-level cache if they fit into
it, otherwise from memory; each multiprocessor has its share of the cache's rate. Two barriers per layer are added if a
lane is divided among multiprocessors. ``run.py`` measures launch and bandwidth on a real GPU.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from floor import read_bytes
from support.networks import random_network

from edge_ssm.engines.cuda import layout as cuda_layout
from edge_ssm.engines.cuda.engine import make_plan
from edge_ssm.model.cost import cost
from edge_ssm.model.discretize import step_parameters
from edge_ssm.model.network import Network

SHAPES = {"small": (64, 2), "ecg": (128, 4), "large": (256, 6)}


@dataclass(frozen=True)
class Board:
    """The figures of a GPU.

    Multiprocessors, clock and memory bandwidth are from NVIDIA's data sheet of the Orin Nano, shared memory is from the
    CUDA programming guide (compute capability 8.7). The second-level cache, its rate, launch and barrier are
    assumptions.
    """

    name: str
    processors: int
    clock_ghz: float
    memory_gb_s: float
    cache_bytes: int
    cache_bytes_a_clock: int
    """Bytes per clock that one multiprocessor reads from the second-level cache."""
    shared_bytes: int
    launch_us: float
    """Duration of launching an empty kernel and waiting for it."""
    barrier_us: float
    """Duration of a barrier of several blocks through memory."""


BOARDS = (
    Board("Orin Nano 8 GB, 15 W", 8, 0.625, 68, 2 << 20, 64, 163 << 10, 12.0, 1.5),
    Board("Orin Nano 8 GB Super, MAXN", 8, 1.02, 102, 2 << 20, 64, 163 << 10, 12.0, 1.0),
)


def network_of(h: int, layers: int, share: float) -> Network:
    """Return a random network of which ``share`` of the operators and their mixing columns are pruned."""
    left = round(h * (1 - share))
    shape: dict[str, Any] = {"h": h, "pairs": 32, "layers": layers, "d_input": 1, "d_output": 5}
    return random_network(**shape, active=[left] * layers, columns=left)


def predicted_us(network: Network, board: Board) -> float:
    """Return the predicted duration of a step in microseconds."""
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
