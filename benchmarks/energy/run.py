"""The accuracy of the stated energy of a step: runs of the profiler with an emulated board of known power.

    python benchmarks/energy/run.py [--runs 100] [--meters hwmon,jtop] [--output benchmarks/energy/results.json]

The board is a tree of files under /sys in separate namespaces, with 8 mA quanta at 5 V; jtop is the real service with
its real socket (pip install 'edge-ssm[jetson]'). The power of a run is a step, a ramp or noisy
(``emulated_board.models``). A run in which the emulated board itself got no processor time for 50 ms is repeated.
``covered`` is the number of runs whose stated 95 % interval contains the true energy of a step beyond idling.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests")]
from support import emulated_board


def main() -> None:
    """Run the benchmark and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=float, default=0.6)
    parser.add_argument("--meters", default="hwmon,jtop")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.json")
    arguments = parser.parse_args()
    if problem := emulated_board.namespace_problem():
        raise SystemExit(problem)
    rows = []
    for meter in arguments.meters.split(","):
        sizes = ["--runs", arguments.runs, "--rounds", arguments.rounds, "--block", arguments.block]
        command = [sys.executable, emulated_board.__file__, "measure", meter, *sizes]
        limit = 60 + 4 * arguments.runs * arguments.rounds * arguments.block * 4
        runs = [json.loads(line) for line in emulated_board.enter(command, meter == "jtop", limit).splitlines()]
        for kind in ("step", "ramp", "noise", "all"):
            selected = [run for run in runs if kind in (run["kind"], "all")]
            dynamic = [run["dynamic"] / run["true_dynamic"] - 1 for run in selected]
            total = [run["total"] / run["true_total"] - 1 for run in selected]
            rows.append(
                {
                    "meter": meter,
                    "power": kind,
                    "runs": len(selected),
                    "repeated": max(run["repeated"] for run in selected),
                    "covered": sum(run["low"] <= run["true_dynamic"] <= run["high"] for run in selected),
                    "covered_total": sum(
                        run["total_low"] <= run["true_total"] <= run["total_high"] for run in selected
                    ),
                    "total_within_2_percent": sum(abs(error) <= 0.02 for error in total),
                    "dynamic_within_2_percent": sum(abs(error) <= 0.02 for error in dynamic),
                    "largest_total_error": round(max(map(abs, total)), 4),
                    "median_dynamic_error": round(statistics.median(map(abs, dynamic)), 4),
                    "largest_dynamic_error": round(max(map(abs, dynamic)), 4),
                    "median_half_width": round(
                        statistics.median((run["high"] - run["low"]) / 2 / run["dynamic"] for run in selected), 4
                    ),
                }
            )
            print(rows[-1])
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = {"rounds": arguments.rounds, "block_s": arguments.block}
    arguments.output.write_text(json.dumps(head)[:-1] + f', "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
