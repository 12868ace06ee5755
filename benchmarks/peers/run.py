"""One sample a step, float32, one core: the CPU engine beside PyTorch, ONNX Runtime, OpenVINO, LiteRT, JAX and NumPy.

    python benchmarks/peers/run.py [--rounds 31] [--shapes small,ecg,...] [--output benchmarks/peers/results.json]

Needs the ``bench`` extra; who is not installed is left out and named. Every shape has a process of its own, pinned to
one core, every library set to one thread. After a warm-up the entries take turns, in another order each round, a batch
of steps each; ``ratio`` is the median over rounds of an entry's time over the CPU engine's in the same round, p99 that
of steps timed one by one. Before that each entry streams 1,000 samples, and is refused if an output is off by more than
BOUND from the float64 reference. ``floor_us`` is the time in which the core reads as many bytes as a step's weights and
states have, taken in turn with the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
SINGLE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
OURS, FLOOR = "edge-ssm", "floor"
BOUND, CHECKED = 1e-3, 1000
BATCH_US = 4000
PACKAGES = ("numpy", "torch", "onnxruntime", "openvino", "ai-edge-litert", "jax")


def steps_of(shape: str) -> dict[str, Any]:
    """Entry -> (its step, its largest error, steps that a call stands for); the floor makes no error."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
    from floor import PASSES, read_bytes, reader
    from support.networks import samples_for

    from edge_ssm.engines.registry import create
    from peers import entries
    from peers.parts import network_of, parts_of

    network = network_of(shape)
    parts, samples = parts_of(network), samples_for(network, 1, CHECKED)
    exact = create("reference", network).chunk(samples)
    found: dict[str, Any] = {}
    for name in [OURS, *entries.REQUIRES]:
        absent = [] if name == OURS else entries.missing(name)
        if absent:
            print(f"{name}: left out, {', '.join(absent)} not installed", file=sys.stderr)
            continue
        step = create("cpu", network).step if name == OURS else entries.make(name, parts)
        error = max(float(np.abs(step(x) - y).max()) for x, y in zip(samples, exact, strict=True))
        if not error <= BOUND:
            raise SystemExit(f"{shape}, {name}: an output is off by {error:.1e}, more than {BOUND:g}")
        found[name] = step, error, 1
    read = reader(read_bytes(network))
    found[FLOOR] = (lambda _: read()), None, PASSES
    return found


def measure(shape: str, rounds: int) -> list[dict[str, Any]]:
    found = steps_of(shape)
    sample, clock, order = np.array([0.3]), time.perf_counter_ns, list(found)
    batches: dict[str, list[float]] = {name: [] for name in found}
    single: dict[str, list[float]] = {name: [] for name in found}
    count = {}
    for name, (step, _, _) in found.items():
        begin = clock()
        for _ in range(20):
            step(sample)
        count[name] = max(20, min(1000, int(BATCH_US * 20_000 / (clock() - begin))))
    shuffler = random.Random(0)
    for turn in range(rounds + 1):
        shuffler.shuffle(order)
        for name in order:
            step, _, stands_for = found[name]
            begin = clock()
            for _ in range(count[name]):
                step(sample)
            elapsed = (clock() - begin) / 1000 / count[name] / stands_for
            times = []
            for _ in range(count[name]):
                begin = clock()
                step(sample)
                times.append((clock() - begin) / 1000 / stands_for)
            if turn:  # The first round warms up.
                batches[name].append(elapsed)
                single[name] += times
    rows = []
    floor = round(statistics.median(batches[FLOOR]), 3)
    for name in [*(n for n in found if n != FLOOR), FLOOR]:
        pairs = zip(batches[name], batches[OURS], strict=True)
        rows.append(
            {
                "shape": shape,
                "entry": name,
                "median_us": round(statistics.median(batches[name]), 3),
                "p99_us": round(float(np.quantile(single[name], 0.99)), 3),
                "ratio": round(statistics.median(theirs / ours for theirs, ours in pairs), 3),
                "max_error": None if found[name][1] is None else float(f"{found[name][1]:.2g}"),
                "floor_us": floor,
            }
        )
    return rows


def installed(package: str) -> str | None:
    try:
        return version(package).split("+")[0]
    except ModuleNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--shapes", help="comma-separated, such as small,ecg-50  [default: all]")
    parser.add_argument("--core", type=int, help="the core that all are pinned to  [default: the last]")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.rounds)))
        return
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from peers.parts import SHAPES

    core = arguments.core if arguments.core is not None else max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes.split(",") if arguments.shapes else SHAPES:
        command = [sys.executable, __file__, "--one", shape, "--rounds", str(arguments.rounds)]
        done = subprocess.run(command, env=os.environ | SINGLE_THREAD, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
        for row in (row for row in rows if row["shape"] == shape):
            print("{shape:9} {entry:26} {median_us:9.2f} us  {ratio:7.2f} x".format(**row), flush=True)
    machine = f"{platform.machine()}, one core, Python {platform.python_version()}"
    head = {"machine": machine, "versions": {package: installed(package) for package in PACKAGES}}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    arguments.output.write_text(json.dumps(head)[:-1] + f', "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
