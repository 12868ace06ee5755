"""Compare the CPU engine's chunks, lanes, small weights and pruned shapes with its single step, and with the floor.

    OMP_NUM_THREADS=1 python benchmarks/engine.py [--rounds 31] [--output benchmarks/engine.json]

The networks are random, with GLU mixing: small (H = 64, N = 64, 2 layers), ecg (128, 64, 4) and large (256, 64, 6). All
entries of a shape take turns. A figure is the median over the rounds, in microseconds per sample. A ratio is the median
of the rounds' own ratios to the single float32 step. The floor is the time in which one core reads as many bytes as a
step does (`floor.py`). Errors are relative to the float64 reference over 1,000 samples.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from floor import PASSES, read_bytes, reader
from support.networks import random_network, samples_for

from edge_ssm.engines.registry import create

SHAPES = {"small": (64, 2), "ecg": (128, 4), "large": (256, 6)}
CHUNK, LANES = 64, 16


def entries(h: int, layers: int) -> dict[str, tuple[Callable[[], Any], int, Any]]:
    """Return, by name, a call, the number of samples that it steps, and its network."""
    shape: dict[str, Any] = {"h": h, "pairs": 32, "layers": layers, "d_input": 1, "d_output": 5}
    calls: dict[str, tuple[Callable[[], Any], int, Any]] = {}

    def add(name: str, network: Any, samples: Any, lanes: int = 1) -> None:
        engine = create("cpu", network, lanes=lanes)
        if samples.ndim == 1 + (lanes > 1):
            calls[name] = (lambda: engine.step(samples), lanes, network)
        else:
            calls[name] = (lambda: engine.chunk(samples), len(samples), network)

    whole = random_network(**shape)
    x = samples_for(whole, 0, CHUNK)
    add("float32", whole, x[0])
    add(f"chunk of {CHUNK}", whole, x)
    add(f"{LANES} lanes", whole, samples_for(whole, 0, LANES), LANES)
    for dtype in ("float16", "int8"):
        add(dtype, random_network(**shape, mixing_dtype=dtype), x[0])
    for share in (0.5, 0.7):
        left = round(h * (1 - share))
        add(f"{share:.0%} bypassed", random_network(**shape, active=[left] * layers, columns=h), x[0])
        add(f"{share:.0%} pruned, columns too", random_network(**shape, active=[left] * layers, columns=left), x[0])
        both = {"active": [left] * layers, "columns": left, "rows": left}
        add(f"{share:.0%} pruned, columns and rows too", random_network(**shape, **both), x[0])
    return calls


def error(network: Any) -> float:
    """Return the largest error of an output over 1,000 samples."""
    x = samples_for(network, 1, 1000)
    return float(np.abs(create("cpu", network).chunk(x) - create("reference", network).chunk(x)).max())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "engine.json")
    arguments = parser.parse_args()
    rows = []
    for shape, (h, layers) in SHAPES.items():
        chosen = entries(h, layers)
        calls = {name: (call, count) for name, (call, count, _) in chosen.items()}
        calls["floor"] = reader(read_bytes(chosen["float32"][2])), PASSES
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(arguments.rounds + 1):
            for name, (call, count) in calls.items():
                repeats = max(10, 200 // count)
                begin = time.perf_counter_ns()
                for _ in range(repeats):
                    call()
                times[name].append((time.perf_counter_ns() - begin) / 1000 / repeats / count)
        for name in calls:
            pairs = zip(times["float32"][1:], times[name][1:], strict=True)
            row = {
                "shape": shape,
                "entry": name,
                "us_a_sample": round(statistics.median(times[name][1:]), 3),
                "slowest_round_us": round(max(times[name][1:]), 3),
                "float32_over_it": round(statistics.median(base / it for base, it in pairs), 2),
            }
            if name in chosen:
                row["max_error"] = float(f"{error(chosen[name][2]):.2g}")
            rows.append(row)
            print("{shape:6} {entry:34} {us_a_sample:8.2f} us, {float32_over_it:5.2f} times faster".format(**row))
    machine = f"{platform.machine()}, one core, Python {platform.python_version()}"
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    arguments.output.write_text(f'{{"machine": "{machine}", "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
