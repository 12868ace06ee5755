"""Fuzz every reader of untrusted bytes, guided by coverage, and write what happened to results.json.

    pip install atheris
    python benchmarks/fuzz/run.py                                  # all targets, more than ten million inputs
    python benchmarks/fuzz/run.py --targets csv,ndjson --inputs 100000

A target runs in processes of its own with limits on memory and on the time of an input (fuzz_process.py). Where one
ends early, by a crash, a hang or too much memory, another goes on with the rest. Findings stay in --work, a file each;
the same folder keeps the corpus, from which a later run goes on. Exit status 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCRIPT = HERE / "fuzz_process.py"
HANG_STATUS = 70
"""Of libFuzzer, for an input that took too long. 71: out of memory; 77: a crash."""
MAX_ENDS = 20
"""Of processes that a target may bring down before it is given up."""
BATCH = 200_000
"""Inputs of one process. atheris's instrumentation keeps about half a kilobyte an input of ``artifact-content``: in one
process the memory would tell of atheris, not of us (the same inputs without it: no growth)."""


def findings(folder: Path) -> set[str]:
    """Names of the files that hold an input which did harm."""
    return {p.name for p in folder.iterdir() if p.name.startswith(("exception-", "crash-", "timeout-", "oom-"))}


def fuzz(name: str, inputs: int, seed: int, work: Path, script: Path = SCRIPT) -> dict[str, Any]:
    """One target until ``inputs`` are done; its row. ``crashes`` counts inputs that raised what they must not, and
    ends of the process."""
    from fuzz_targets import PROGRESS

    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    before = findings(folder)
    progress = folder / "progress"
    progress.write_bytes(PROGRESS.pack(0, 0, 0))
    started = ends = hangs = peak_kb = done = 0
    cpu_seconds = 0.0
    began = time.perf_counter()
    # One thread: libraries' pools would only fight for the cores that other targets use.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    while done < inputs and ends + hangs < MAX_ENDS:
        command = [sys.executable, str(script), name, str(min(BATCH, inputs - done)), str(seed + started), str(folder)]
        with open(folder / "log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=env)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        started += 1
        peak_kb = max(peak_kb, used.ru_maxrss)
        cpu_seconds += used.ru_utime + used.ru_stime
        last, (done, raised, slowest_ns) = done, PROGRESS.unpack(progress.read_bytes())
        if process.returncode and done == last and not findings(folder) - before:
            raise RuntimeError(f"{name}: the fuzzer does not start; see {folder / 'log'}")
        hangs += process.returncode == HANG_STATUS
        ends += process.returncode not in (0, HANG_STATUS)
    seconds = time.perf_counter() - began
    row = {
        "target": name,
        "inputs": done,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "crashes": raised + ends,
        "hangs": hangs,
        "peak_rss_mb": round(peak_kb / 1024, 1),
        "slowest_ms": round(slowest_ns / 1e6, 1),
    }
    new = sorted(findings(folder) - before)
    print(
        f"{name}: {done:,} inputs in {seconds:.0f} s ({done / cpu_seconds:,.0f} a CPU second), "
        f"{row['crashes']} crashes, {row['hangs']} hangs, peak {row['peak_rss_mb']} MB, slowest {row['slowest_ms']} ms"
        + (f"; findings in {folder}: {', '.join(new)}" if new else ""),
        flush=True,
    )
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", metavar="NAME,...", help="default: all")
    parser.add_argument("--inputs", type=int, metavar="N", help="of each target; default: each target's own number")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="targets at once; default: cores"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "fuzz", help="findings, corpora and logs")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    if find_spec("atheris") is None:
        print("fuzzing needs the package atheris, which is missing; pip install atheris", file=sys.stderr)
        return 2
    from fuzz_targets import TARGETS

    names = arguments.targets.split(",") if arguments.targets else list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        print(f"--targets {unknown[0]!r}: unknown, expected {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        counts = {name: arguments.inputs or TARGETS[name].inputs for name in names}
        # Backwards: the codecs, of which several take about as long, come last, and no core waits for one slow target.
        running = {n: pool.submit(fuzz, n, counts[n], arguments.seed, arguments.work) for n in reversed(names)}
        rows = [running[name].result() for name in names]
    total = sum(row["inputs"] for row in rows)
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": arguments.jobs},
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("atheris", "msgspec", "numpy", "safetensors", "cryptography")},
        "inputs": total,
        "seconds": round(time.perf_counter() - began, 1),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{total:,} inputs in {result['seconds']} s; {arguments.output}")
    return int(any(row["crashes"] or row["hangs"] for row in rows))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
