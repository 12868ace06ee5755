"""The engines onnx and tflite compared with the CPU engine: microseconds per step, and the error.

    OMP_NUM_THREADS=1 python benchmarks/exported.py [--rounds 101] [--core N] [--output benchmarks/exported.json]

It needs the `host` and `export` extras. Everything runs on one pinned core, with one thread for each engine.

`steps`: random S4D networks of the sizes small (H = 64, N = 64, 2 layers), ecg (128, 64, 4) and large (256, 64, 6),
whole, and with 50 and 90 % of the operators and their mixing columns removed. The engines of a network take turns, with
ten steps each after three that warm the caches. A figure is the median over rounds, and `ratio` the median of the
rounds' own ratios to the CPU engine.
`chunks`: the same per sample, for 16 samples in one call.
`errors`: 20,000 steps of S4D and S4 networks as they are before training (H = 32, N = 64, 2 layers; S4 is HiPPO-LegS),
with operators bypassed; int8 ONNX graphs are calibrated on other samples of the same kind.
`demo`: the demo on its recording, in windows, as `edge-ssm-build export --input` tests it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from support.networks import random_network, samples_for

from edge_ssm import load
from edge_ssm.engines.registry import EngineOptions, create
from edge_ssm.formats import exported
from edge_ssm.model.network import MIXING_DTYPES, InputSpec
from edge_ssm_build.export import graphs

SHAPES = {"small": (64, 2), "ecg": (128, 4), "large": (256, 6)}
PRUNED = (0, 50, 90)
KINDS: tuple[exported.GraphKind, ...] = ("onnx", "tflite")
WARM, STEPS, CHUNK, LONG = 3, 10, 16, 20_000


def graph_engine(
    network: Any, kind: exported.GraphKind, weights: Any, calibration: Any, chunk: int = 1
) -> tuple[Any, int]:
    """Return an engine, and the size of its graph in bytes."""
    input_maxima = graphs.input_ranges(network, calibration) if weights == "int8" else []
    graph = exported.build(kind, network, weights, input_maxima, chunk)
    return create(kind, network, EngineOptions(graph=graph)), len(graph.content)


def turns(calls: dict[str, Any], warms: dict[str, Any], per_call: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median microseconds per sample and the ratio to the first entry, by name.

    The entries take turns; before its turn, each warms the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            warms[name]()
            begin = time.perf_counter_ns()
            call()
            times[name].append((time.perf_counter_ns() - begin) / 1000 / per_call)
    base = times[next(iter(calls))][1:]
    return {
        name: {
            "median_us": round(statistics.median(own[1:]), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(own[1:], base, strict=True)), 2),
        }
        for name, own in times.items()
    }


def stepper(engine: Any, samples: list[Any]) -> Any:
    """Return a function that steps the engine over the samples."""
    return lambda: [engine.step(x) for x in samples]


def steps(rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of the tables `steps` and `chunks`."""
    singles, chunked = [], []
    for shape, (h, layers) in SHAPES.items():
        for percent in PRUNED:
            kept = round(h * (1 - percent / 100))
            network = random_network(
                h=h, pairs=32, layers=layers, d_input=1, d_output=5, active=[kept] * layers, columns=kept
            )
            samples = samples_for(network, 0, CHUNK)
            engines = {"cpu": (create("cpu", network), 0)}
            for kind in KINDS:
                for weights in MIXING_DTYPES:
                    engines[f"{kind} {weights}"] = graph_engine(network, kind, weights, samples)

            calls, warms = (
                {name: stepper(engine, list(samples[:count])) for name, (engine, _) in engines.items()}
                for count in (STEPS, WARM)
            )
            medians = turns(calls, warms, STEPS, rounds)
            for name, row in medians.items():
                singles.append(
                    {"shape": shape, "pruned": percent, "engine": name, **row, "graph_bytes": engines[name][1] or None}
                )
                print("{shape:6} {pruned:2} % {engine:16} {median_us:8.2f} us {ratio:6.2f} x".format(**singles[-1]))
            if percent == 0:
                chunked += [{"shape": shape, **row} for row in chunks(network, samples, rounds)]
    return singles, chunked


def chunks(network: Any, samples: Any, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of the table `chunks` for one network."""
    engines = {"cpu": create("cpu", network)}
    for kind, chunk, method in (("onnx", exported.ANY_LENGTH, "Scan"), ("tflite", 16, "16 unrolled")):
        engines[f"{kind}, steps"] = graph_engine(network, kind, "float32", samples)[0]
        engines[f"{kind}, {method}"] = graph_engine(network, kind, "float32", samples, chunk)[0]

    def caller(engine: Any, xs: Any) -> Any:
        return lambda: engine.chunk(xs)

    calls = {name: caller(engine, samples) for name, engine in engines.items()}
    medians = turns(calls, calls, CHUNK, rounds)
    for name, row in medians.items():
        print(f"chunk of {CHUNK}: {name:20} {row['median_us']:8.2f} us per sample")
    return [{"engine": name, **row} for name, row in medians.items()]


def initial(kernel: Any, percent: int) -> Any:
    """Return a network as it is before training, with some of its operators bypassed."""
    import torch

    from edge_ssm_build.export.convert import to_network
    from edge_ssm_build.training.network import Config, LayerShape, SSMNetwork

    torch.manual_seed(0)
    rng = np.random.default_rng(percent)
    h, d_state, window = 32, 64, 200
    kept = round(h * (1 - percent / 100))
    channels = tuple(range(h))
    options = {"discretization": "bilinear", "init": "legs", "l_kernel": window} if kernel == "s4" else {}
    shapes = tuple(
        LayerShape(
            tuple(sorted(rng.choice(h, kept, replace=False).tolist())), (d_state // 2,) * kept, channels, channels
        )
        for _ in range(2)
    )
    config = Config(d_input=2, d_output=5, d_model=h, d_state=d_state, kernel=kernel, layers=shapes, **options)  # type: ignore[arg-type]
    spec = InputSpec(("a", "b"), np.zeros(2), np.ones(2))
    return to_network(SSMNetwork(config).eval(), spec, window, ())


def error_rows(name: str, network: Any, samples: Any, calibration: Any) -> list[dict[str, Any]]:
    """Return the rows of the table `errors` for one network."""
    exact = create("reference", network).chunk(samples)
    engines = {("cpu", "float32"): (create("cpu", network), None)}
    for kind in KINDS:
        for weights in MIXING_DTYPES:
            engines[kind, weights] = graph_engine(network, kind, weights, calibration)
    rows = []
    for (engine_name, weights), (engine, size) in engines.items():
        error = float(np.abs(engine.chunk(samples) - exact).max())
        row = {"network": name, "engine": engine_name, "weights": weights, "samples": len(samples)}
        row |= {"max_error": float(f"{error:.2g}"), "largest_output": round(float(np.abs(exact).max()), 2)}
        rows.append(row | {"graph_bytes": size})
        print("{network:14} {engine:6} {weights:8} largest error {max_error:.1e}".format(**row))
    return rows


def errors() -> list[dict[str, Any]]:
    """Return the rows of the table `errors`."""
    rows = []
    for kernel in ("s4d", "s4"):
        for percent in PRUNED:
            network = initial(kernel, percent)
            rows += error_rows(
                f"{kernel}, {percent} %", network, samples_for(network, 1, LONG), samples_for(network, 2, 2048)
            )
    return rows


def demo_labels() -> list[dict[str, Any]]:
    """Return the rows of the table `demo`: whole windows of its recording, as `edge-ssm-build export` counts them."""
    rows = []
    source = ROOT / "examples" / "demo.safetensors"
    heard = graphs.comparison_samples(load(source).network, str(ROOT / "examples" / "demo.csv"))
    for kind in KINDS:
        for weights in MIXING_DTYPES:
            result = graphs.export_graph(source, kind, weights, samples=heard)
            row = {"engine": kind, "weights": weights, "windows": result.windows}
            row |= {"samples": result.measured.samples, "max_error": float(f"{result.measured.max_error:.2g}")}
            row |= {"window_error": float(f"{result.window_error:.2g}")}
            row |= {"labels_differing": result.labels_differing, "file_bytes": len(result.content)}
            rows.append(row)
            print(f"demo, {kind} {result.summary()}, {len(result.content):,} bytes")
    return rows


def main() -> None:
    """Run the benchmark and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--core", type=int, help="Core to which everything is pinned.  [default: the last one]")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "exported.json")
    arguments = parser.parse_args()
    core = arguments.core if arguments.core is not None else max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    singles, chunked = steps(arguments.rounds)
    tables = {"steps": singles, "chunks": chunked, "errors": errors(), "demo": demo_labels()}
    packages = ("numpy", "onnx", "onnxruntime", "ai-edge-litert")
    head = {
        "machine": f"{platform.machine()}, one core, Python {platform.python_version()}",
        "versions": {package: version(package) for package in packages},
    }
    lines = [
        f'"{name}": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n]" for name, rows in tables.items()
    ]
    arguments.output.write_text(json.dumps(head)[:-1] + ",\n" + ",\n".join(lines) + "}\n")
    worst = max(row["max_error"] for row in tables["errors"] + tables["demo"] if row["weights"] == "float32")
    if worst > 1e-4:
        raise SystemExit(f"a float32 graph is off by {worst:.1e}, more than 1e-4")


if __name__ == "__main__":
    main()
