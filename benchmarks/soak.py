"""Send twenty million samples through one run: memory must not grow, steps must not slow down, nothing may be lost.

    python benchmarks/soak.py [--samples 20000000] [--rate 0] [--source tcp-listen] [--engine cpu]
                              [--output benchmarks/soak.json]

A sender in a process of its own repeats examples/demo.csv (f32le, 64 samples per send), as fast as the run accepts them
or at ``--rate``. The run keeps snapshots, as a service does. Once a second, its memory is read from /proc (VmRSS, Pss,
private pages), and the 99th percentile of that second's steps from its status. The first tenth of the samples is
warm-up. The exit status is 1 if memory varies by more than 1 MB afterwards, or if a sample or a decision is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import load
import streams
from streams import Run, Sender

FRAMES = 64
FLAT_KB = 1024
TENTHS = 10


def watch(run: Run, samples: int) -> list[dict[str, Any]]:
    """Return one reading per second until all samples are processed, or nothing happens for a while."""
    readings: list[dict[str, Any]] = []
    last, moved = -1, time.monotonic()
    while last < samples and time.monotonic() - moved < streams.END_S:
        time.sleep(0.25)  # the status is renewed once a second
        status = run.status()
        if status.get("samples", last) == last:
            continue
        last, moved = status["samples"], time.monotonic()
        readings.append(
            {
                "samples": last,
                "samples_per_s": round(status["samples_per_s"]),
                "p99_us": status["step_p99_recent_us"],
                **run.memory_kb(),
            }
        )
        if len(readings) % 30 == 0:
            print(json.dumps(readings[-1]), flush=True)
    return readings


def tenth(reading: dict[str, Any], samples: int) -> int:
    return min(TENTHS - 1, TENTHS * (int(reading["samples"]) - 1) // samples)


def memory(readings: list[dict[str, Any]], samples: int) -> dict[str, dict[str, int]]:
    """Return the memory after the warm-up in kB; growth is the last tenth's median minus the second tenth's."""
    result = {}
    for kind in ("rss", "pss", "private_dirty"):
        values: list[list[int]] = [[] for _ in range(TENTHS)]
        for reading in readings:
            values[tenth(reading, samples)].append(reading[kind])
        after = [value for part in values[1:] for value in part]
        growth = round(statistics.median(values[-1]) - statistics.median(values[1])) if values[1] else 0
        result[kind] = {"min": min(after), "max": max(after), "range": max(after) - min(after), "growth": growth}
    return result


def by_tenth(readings: list[dict[str, Any]], samples: int) -> list[dict[str, float | None]]:
    """Return median and maximum of the 99th percentiles of single seconds, by tenth; None for a tenth without any."""
    rows: list[dict[str, float | None]] = []
    for i in range(TENTHS):
        p99s = [reading["p99_us"] for reading in readings if tenth(reading, samples) == i]
        median = round(statistics.median(p99s), 3) if p99s else None
        rows.append({"p99_us_median": median, "p99_us_max": max(p99s, default=None)})
    return rows


def soak(source: str, engine: str, rate: float, samples: int, expected: list[str]) -> dict[str, Any]:
    count = -(-samples // FRAMES)
    reader, writer = os.pipe()
    with (
        tempfile.TemporaryDirectory() as state,
        load.place(source) as (given, to, event),
        open(reader, "rb") as piped,
        open(writer, "wb") as pipe,
    ):
        run = Run("--engine", engine, "--input", given, "--format", "f32le", "--state", state, stdin=piped)
        try:
            run.ready(event)
            sender, began = Sender(to, rate, FRAMES, count, "f32le", pipe), time.monotonic()
            readings = watch(run, count * FRAMES)
            seconds = time.monotonic() - began
            sent = sender.result()["sent"]
            status = run.wait_for_samples(sent)
            time.sleep(0.1)
        finally:
            pipe.close()
            account = run.end()
        sender.end()
    samples = count * FRAMES
    missing = abs(samples // streams.WINDOW - len(run.decisions)) + streams.out_of_order(run, expected)
    used, p99s = memory(readings, samples), by_tenth(readings, samples)
    second, last = p99s[1]["p99_us_median"], p99s[-1]["p99_us_median"]
    return {
        "source": source,
        "engine": engine,
        "seconds": round(seconds, 1),
        "samples_per_s": round(samples / seconds),
        "sent": sent,
        "account": account,
        "lost": dict(status["gaps"]) | dict(status["dropped"]),
        "decisions_missing_or_wrong": missing,
        "memory_kb": used,
        "memory_flat": max(kind["range"] for kind in used.values()) <= FLAT_KB,
        "complete": account["samples"] == sent and not missing,
        "p99_by_tenth": p99s,
        "p99_last_over_second_tenth": last and second and round(last / second, 3),
        "readings": len(readings),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=20_000_000)
    parser.add_argument("--rate", type=float, default=0)
    parser.add_argument("--source", default="tcp-listen")
    parser.add_argument("--engine", default="cpu")
    parser.add_argument("--output", type=Path, default=streams.ROOT / "benchmarks" / "soak.json")
    arguments = parser.parse_args()
    expected = streams.labels()
    result = soak(arguments.source, arguments.engine, arguments.rate, arguments.samples, expected)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    arguments.output.write_text(json.dumps({"machine": machine, **result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["memory_flat"] and result["complete"] else 1)


if __name__ == "__main__":
    main()
