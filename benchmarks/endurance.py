"""Run ten million steps and ten minutes of silence, and measure drift, memory and the duration of a step.

    OMP_NUM_THREADS=1 python benchmarks/endurance.py [--steps 10000000] [--output benchmarks/endurance.json]

The demo network (examples/demo.safetensors) steps through its recording (examples/demo.csv) over and over, one sample
at a time, without a reset. The same network runs beside it in float64, in the plain loops below, which are first
compared with the reference engine. The logits of every window are compared. Resident memory is read before and after,
and tracemalloc counts what Python allocates in a step.

Then the same network without biases gets ten minutes of zeros at its sample rate. Its steps are timed in turn with
those of a network that gets the recording.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numba import njit

from edge_ssm.engines.registry import create
from edge_ssm.formats import artifact
from edge_ssm.model.discretize import step_parameters
from edge_ssm.model.network import Network

ROOT = Path(__file__).parent.parent
SILENCE_S, RATE_HZ = 600, 50


def recording() -> Any:
    """Return the samples of the demo, shape (n, 6), float64."""
    return np.loadtxt(ROOT / "examples" / "demo.csv", delimiter=",", skiprows=1, usecols=range(6))


def exact_layers(network: Network) -> Any:
    """Return the arrays of each block that ``exact`` needs, with zeros in place of pruned parts."""
    layers = []
    for block in network.blocks:
        step, h, mixing = step_parameters(block.ssm, network.discretization), network.d_model, block.mixing
        weight = np.zeros((2 * h, h))
        weight[np.ix_(mixing.stacked_rows(), mixing.columns)] = mixing.values()
        norm = np.stack([block.norm.weight, block.norm.bias]).astype(np.float64)
        owner = block.ssm.active[block.ssm.owner]
        active = np.zeros(h, dtype=np.bool_)
        active[block.ssm.active] = True
        D = block.ssm.D.astype(np.float64)
        layers.append(
            (step.delta, step.C, owner, D, weight, mixing.bias.astype(np.float64), norm, np.zeros_like(step.C))
        )
    return tuple(layers)


@njit
def exact(layers: Any, encoder: Any, decoder: Any, epsilon: float, samples: Any, outputs: Any) -> None:
    """Step blocks with GLU mixing and LayerNorm after the residual sum, in float64 (``model.network``)."""
    h = encoder.shape[0]
    for t in range(len(samples)):
        u = encoder[:, 0].copy()
        for c in range(samples.shape[1]):
            u += encoder[:, 1 + c] * samples[t, c]
        for delta, C, owner, D, weight, bias, norm, x in layers:
            y = D * u
            for s in range(len(C)):
                x[s] += delta[s] * x[s] + u[owner[s]]
                y[owner[s]] += 2 * (C[s].real * x[s].real - C[s].imag * x[s].imag)
            for k in range(h):
                y[k] = 0.5 * y[k] * (1 + math.erf(y[k] / math.sqrt(2.0)))
            for i in range(h):
                value, gate = bias[i], bias[h + i]
                for k in range(h):
                    value += weight[i, k] * y[k]
                    gate += weight[h + i, k] * y[k]
                u[i] += value / (1 + math.exp(-gate))
            mean = u.mean()
            variance = ((u - mean) ** 2).mean()
            u = (u - mean) / math.sqrt(variance + epsilon) * norm[0] + norm[1]
        for o in range(len(decoder)):
            outputs[t, o] = decoder[o, 0] + (decoder[o, 1:] * u).sum()


class Exact:
    """The float64 loops with the interface of an engine."""

    def __init__(self, network: Network) -> None:
        self.input = network.input
        self.layers = exact_layers(network)
        encoder, decoder = network.encoder, network.decoder
        self.encoder = np.column_stack([encoder.bias, encoder.weight]).astype(np.float64)
        self.decoder = np.column_stack([decoder.bias, decoder.weight]).astype(np.float64)
        self.epsilon = network.blocks[0].norm.eps

    def chunk(self, samples: Any) -> Any:
        outputs = np.empty((len(samples), len(self.decoder)))
        normalised = (samples - self.input.mean) / self.input.std
        exact(self.layers, self.encoder, self.decoder, self.epsilon, normalised, outputs)
        return outputs


def endurance(network: Network, samples: Any, steps: int) -> dict[str, Any]:
    """Return the largest error of a logit over ``steps`` steps, and by how much memory grew."""
    difference = np.abs(Exact(network).chunk(samples[:1000]) - create("reference", network).chunk(samples[:1000])).max()
    if difference > 1e-9:
        raise SystemExit(f"the float64 loops differ from the reference engine by {difference:.1e}")
    engine, truth, window = create("cpu", network), Exact(network), network.window
    outputs = np.empty((window, network.d_output), dtype=np.float32)
    rows, process = list(outputs), psutil.Process()
    repeated = np.tile(samples, (2, 1))
    worst, first, memory = 0.0, 0.0, 0
    windows = steps // window
    for i in range(windows):
        start = i * window % len(samples)
        part = repeated[start : start + window]
        for sample, out in zip(part, rows, strict=True):
            engine.step(sample, out)
        error = float(np.abs(outputs.mean(axis=0) - truth.chunk(part).mean(axis=0)).max())
        worst = max(worst, error)
        if i == windows // 100:
            first, memory = worst, process.memory_info().rss
    return {
        "steps": windows * window,
        "largest_error_of_a_logit": float(f"{worst:.2g}"),
        "of_the_first_hundredth": float(f"{first:.2g}"),
        "memory_growth_bytes": process.memory_info().rss - memory,
    }


def allocation(network: Network, samples: Any) -> int:
    """Return how many bytes more 10,000 steps allocate at their peak than one step."""
    engine, out = create("cpu", network), np.empty(network.d_output, dtype=np.float32)

    def peak(count: int) -> int:
        tracemalloc.start()
        for _ in range(count):
            engine.step(samples[0], out)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(1)
    return peak(10_000) - peak(1)


def silence(network: Network, samples: Any) -> dict[str, float]:
    """Return the median steps, in microseconds, after silence and with the recording, measured in turn."""
    bare = replace(network, encoder=replace(network.encoder, bias=np.zeros_like(network.encoder.bias)))
    quiet, lively = create("cpu", bare), create("cpu", bare)
    quiet.chunk(samples)
    zeros = np.tile(network.input.mean, (1000, 1))
    for _ in range(SILENCE_S * RATE_HZ // len(zeros)):
        quiet.chunk(zeros)
    times: dict[str, list[float]] = {"quiet": [], "lively": []}
    for _ in range(101):
        for name, engine, samples_now in (("quiet", quiet, zeros[:200]), ("lively", lively, samples[:200])):
            begin = time.perf_counter_ns()
            for sample in samples_now:
                engine.step(sample)
            times[name].append((time.perf_counter_ns() - begin) / 1000 / len(samples_now))
    ratio = statistics.median(a / b for a, b in zip(times["quiet"], times["lively"], strict=True))
    medians = {f"{name}_step_us": round(statistics.median(values), 3) for name, values in times.items()}
    return {**medians, "ratio": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "endurance.json")
    arguments = parser.parse_args()
    network, samples = artifact.load(ROOT / "examples" / "demo.safetensors").network, recording()
    report = {
        "machine": f"{platform.machine()}, one core, Python {platform.python_version()}",
        "silence": silence(network, samples),
        "peak_bytes_of_10000_steps_over_one": allocation(network, samples),
        "endurance": endurance(network, samples, arguments.steps),
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
