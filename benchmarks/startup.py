"""From process start to the first decision, and peak resident memory, for each way to start; interleaved rounds.

    python benchmarks/startup.py [--rounds 7] [--output benchmarks/startup.json]

cold: the CPU engine with an empty compile cache. warm: with the cache of an earlier start. reference: NumPy alone.
The stream is the first window of examples/demo.csv; the time ends when the decision's line has been read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
WINDOW = 200


def start(engine: str, cache: Path, stream: Path) -> tuple[float, float]:
    """(seconds to the first decision, peak resident MB) of one process."""
    command = [
        sys.executable,
        "-c",
        "from edge_ssm.cli.app import main; main()",
        "run",
        str(ROOT / "examples/demo.safetensors"),
    ]
    command += ["--stream", "--engine", engine, "--input", str(stream)]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "EDGE_SSM_CACHE": str(cache)}
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    seconds = time.perf_counter() - began
    assert json.loads(line)["end"] == WINDOW
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "startup.json")
    arguments = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": [], "reference": []}
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "window.csv"
        lines = (ROOT / "examples/demo.csv").read_text().splitlines(keepends=True)
        stream.write_text("".join(lines[: WINDOW + 1]))
        start("reference", Path(folder), stream)  # the files' own cache and .pyc
        for i in range(arguments.rounds):
            cache = Path(folder) / str(i)
            measured["cold"].append(start("cpu", cache, stream))
            measured["warm"].append(start("cpu", cache, stream))
            measured["reference"].append(start("reference", cache, stream))
    rows = []
    for way, values in measured.items():
        seconds, memory = (sorted(column) for column in zip(*values, strict=True))
        rows.append(
            {
                "way": way,
                "rounds": arguments.rounds,
                "seconds_median": round(statistics.median(seconds), 3),
                "seconds_min": round(seconds[0], 3),
                "seconds_max": round(seconds[-1], 3),
                "peak_mb_median": round(statistics.median(memory), 1),
            }
        )
        print(
            "{way:<10} {seconds_median:6.2f} s ({seconds_min} to {seconds_max}), peak {peak_mb_median} MB".format(
                **rows[-1]
            )
        )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    arguments.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
