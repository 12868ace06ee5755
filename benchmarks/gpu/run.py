"""Measure the CUDA engine on this machine's GPU, in single steps, chunks and lanes, and PyTorch and ONNX Runtime.

    python benchmarks/gpu/run.py [--rounds 31] [--output benchmarks/gpu/results.json]

It needs a GPU and the ``cuda`` extra; for the comparison, a torch with CUDA, and onnxruntime-gpu with onnx. What is
missing is left out and named.

Entries take turns. A time is measured on the host, from the sample to its output, as the median over the rounds.
``ratio`` is relative to the engine's single step of the same shape. ``gpu_us_a_sample`` is measured on the GPU, between
two events around a launch. ``read_us_a_sample`` is the time in which the GPU's measured memory bandwidth transfers the
weights and states of all lanes. The entry ``persistent`` is the persistent kernel. ``empty`` launches a kernel that
does no steps and waits for it: the floor of any launch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from floor import read_bytes
from support.networks import random_network, samples_for

from edge_ssm.engines.cuda.driver import Device
from edge_ssm.engines.cuda.engine import THREADS, CudaEngine
from edge_ssm.engines.cuda.persistent import PersistentCudaEngine
from edge_ssm.engines.registry import EngineOptions, create
from edge_ssm.errors import EngineUnavailable
from edge_ssm.model.cost import cost
from edge_ssm.model.network import Network

SHAPES = {"small": (64, 2), "ecg": (128, 4), "large": (256, 6)}
CHUNK = 64
LANES = (16, 256, 4096)
Call = Callable[[], Any]


def empty(device: Device, engine: CudaEngine) -> Call:
    """Return a launch of the engine's kernel without any step."""
    arguments = engine._arguments(0)
    return lambda: device.run(engine._kernel, 1, THREADS, engine._plan.shared_bytes, arguments)


def gpu_us(device: Device, engine: CudaEngine, steps: int, repeats: int = 21) -> float:
    """Return the median duration of a launch of ``steps`` steps between two CUDA events, in microseconds."""
    first, second = (device.call("cuEventCreate", 0) for _ in range(2))
    plan, arguments, times = engine._plan, engine._arguments(steps), []
    for _ in range(repeats):
        device.call("cuEventRecord", first, device.stream)
        device.start(engine._kernel, plan.grid, THREADS, plan.shared_bytes, arguments)
        device.call("cuEventRecord", second, device.stream)
        device.wait()
        times.append(device.call("cuEventElapsedTime", first, second) * 1e3)
    return statistics.median(times)


def onnx_steps(network: Network) -> dict[str, Call]:
    from peers.parts import parts_of

    try:
        from peers.graph import onnxruntime_step

        step = onnxruntime_step(parts_of(network), "cuda")
    except (ImportError, LookupError) as error:
        print(f"ONNX Runtime: left out, {error}", file=sys.stderr)
        return {}
    sample = np.full((1, network.d_input), 0.3, dtype=np.float32)
    return {"ONNX Runtime CUDA": lambda: step(sample)}


def torch_steps(network: Network) -> dict[str, Call]:
    try:
        import torch
    except ImportError:
        print("PyTorch: left out, not installed", file=sys.stderr)
        return {}
    if not torch.cuda.is_available():
        print("PyTorch: left out, its build has no CUDA or sees no GPU", file=sys.stderr)
        return {}
    from peers.parts import parts_of
    from peers.pytorch import Step

    parts = parts_of(network)
    module = Step(parts, real=False).eval().cuda()
    shapes = [layer.delta[0].shape for layer in parts.layers]
    states = [torch.zeros(1, *shape, dtype=torch.complex64, device="cuda") for shape in shapes]
    sample = torch.zeros(1, len(parts.mean), device="cuda")

    def eager() -> Any:
        nonlocal states
        with torch.inference_mode():
            outputs, states = module(sample.fill_(0.3), states)
        return outputs.cpu()

    fixed_states = [state.clone() for state in states]
    with torch.inference_mode():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                module(sample, fixed_states)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs_now, new = module(sample, fixed_states)
            for old, state in zip(fixed_states, new, strict=True):
                old.copy_(state)

    def replayed() -> Any:
        sample.fill_(0.3)
        graph.replay()
        return outputs_now.cpu()

    return {"PyTorch eager": eager, "PyTorch CUDA graph": replayed}


def bandwidth_gb_s(device: Device) -> float:
    """Return the bandwidth of the GPU's memory, measured by copies within it: each byte is read and written."""
    size = 256 << 20
    one, two = (device.upload(np.zeros(size // 4, dtype=np.float32)) for _ in range(2))
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        device.call("cuMemcpyDtoD", two.address, one.address, size)
        device.call("cuCtxSynchronize")
        best = max(best, 2 * size / (time.perf_counter() - begin) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results.json")
    arguments = parser.parse_args()
    try:
        device = Device()
    except EngineUnavailable as error:
        raise SystemExit(str(error)) from None
    read_rate = bandwidth_gb_s(device)
    rows = []
    for shape, (h, layers) in SHAPES.items():
        network = random_network(h=h, pairs=32, layers=layers, d_input=1, d_output=5)
        engine = CudaEngine(network, device=device)
        samples = samples_for(network, 0, 1000)
        error = float(np.abs(engine.chunk(samples) - create("reference", network).chunk(samples)).max())
        calls: dict[str, tuple[Call, int]] = {"step": (lambda e=engine, x=samples[0]: e.step(x), 1)}
        calls["empty"] = empty(device, engine), 1
        calls[f"chunk of {CHUNK}"] = (lambda e=engine, x=samples[:CHUNK]: e.chunk(x)), CHUNK
        persistent = PersistentCudaEngine(network, device=device)
        calls["persistent"] = (lambda e=persistent, x=samples[0]: e.step(x)), 1
        measured: dict[str, tuple[CudaEngine, int]] = {"step": (engine, 1), f"chunk of {CHUNK}": (engine, CHUNK)}
        for lanes in LANES:
            many = CudaEngine(network, EngineOptions(lanes), device)
            few = samples_for(network, 0, 16, lanes)
            measured[f"{lanes} lanes"] = many, lanes
            calls[f"{lanes} lanes"] = (lambda e=many, x=few[0]: e.step(x)), lanes
            calls[f"{lanes} lanes, chunk of 16"] = (lambda e=many, x=few: e.chunk(x)), 16 * lanes
        calls |= {name: (call, 1) for name, call in (torch_steps(network) | onnx_steps(network)).items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(arguments.rounds + 1):
            for name, (call, count) in calls.items():
                repeats = max(3, 200 // count)
                begin = time.perf_counter_ns()
                for _ in range(repeats):
                    call()
                took = time.perf_counter_ns() - begin
                if name == "persistent":
                    # The other entries need the GPU. The next round launches the kernel again, once for 200 calls.
                    persistent.end()
                if turn:  # The first round warms up.
                    times[name].append(took / 1000 / repeats / count)
        total = cost(network)
        for name in calls:
            lanes = int(name.split()[0]) if "lanes" in name else 1
            read_us = (total.weight_bytes + 4 * lanes * total.state_values) / lanes / read_rate / 1e3
            own_us = None
            if name in measured:
                of, count = measured[name]
                own_us = gpu_us(device, of, count if of.lanes == 1 else 1) / count
            rows.append(
                {
                    "shape": shape,
                    "entry": name,
                    "us_a_sample": round(statistics.median(times[name]), 4),
                    "ratio": round(
                        statistics.median(a / b for a, b in zip(times[name], times["step"], strict=True)), 4
                    ),
                    "gpu_us_a_sample": own_us and round(own_us, 4),
                    "read_us_a_sample": round(read_us, 4),
                    "max_error": float(f"{error:.2g}") if name == "step" else None,
                }
            )
            print("{shape:6} {entry:24} {us_a_sample:10.3f} us a sample, {ratio:8.3f} x a step".format(**rows[-1]))
        print(f"{shape}: a step reads {read_bytes(network)} bytes")
    head = {"gpu": device.name, "driver": device.driver_version, "memory_gb_s": round(read_rate, 1)}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    arguments.output.write_text(json.dumps(head)[:-1] + f', "rows": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
