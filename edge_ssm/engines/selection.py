"""Which engine "auto" is: the one whose steps of this network are the shortest on this machine, by a short trial, of
those whose outputs are within the network's tolerance of the float64 reference.

The trial's figures are kept in the folder of compiled kernels, so that later starts only read them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from edge_ssm import files
from edge_ssm.engines.base import Engine
from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.engines.cpu.kernel_file import processor_features, sources_digest
from edge_ssm.errors import EngineUnavailable, InputRefused
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, MixingDtype, Network, fingerprint

ROUNDS = 5
STEPS, CHECKED = 20, 100
"""Samples that are timed, and those whose outputs are compared with the reference's."""
ORDINARY = 10.0
"""Size of an output up to which a network's tolerance is meant."""
OTHER_SAMPLES = 4.0
"""The self-test's samples are not the exporter's."""
SMALLER_WEIGHTS: dict[MixingDtype, float] = {"float32": 0.0, "float16": 0.01, "int8": 0.25}
"""Share of the largest output that a graph's weights may cost: of 42 random networks of up to 6 layers float16 cost
0.0004 at most, int8 in ONNX, which quantises the mixing's inputs too, 0.10; of the demo 0.0002 and 0.05."""
SUFFIX = ".trial"
LARGEST = 1 << 16
"""Bytes of a kept trial that are read."""


class BenchmarkResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    step_us: dict[str, float]
    """Of each engine that loads here."""
    unavailable: dict[str, str]
    """Why the others do not."""
    inaccurate: dict[str, str] = {}
    """What keeps those from being used that load but are off by too much."""

    @property
    def winner(self) -> str:
        return min(self.step_us, key=self.step_us.__getitem__)

    def why(self) -> str:
        """The figures in words, the winner's first."""
        order = sorted(self.step_us.items(), key=lambda item: item[1])
        return ", ".join(f"{name} {step_us:.4g} us" for name, step_us in order) + " a step"


def measure(engines: Sequence[Engine], samples: Sequence[Array], rounds: int) -> list[float]:
    """Median microseconds of a step of each engine.

    The engines take turns, so that what else the machine does meets all of them; a round's figure is the mean of its
    steps over ``samples``, the result the median of rounds.
    """
    import statistics

    found: list[list[float]] = [[] for _ in engines]
    for _ in range(rounds + 1):
        for engine, times in zip(engines, found, strict=True):
            begin = time.perf_counter_ns()
            for sample in samples:
                engine.step(sample)
            times.append((time.perf_counter_ns() - begin) / 1000 / len(samples))
    # The first round warms caches and branch predictors.
    return [statistics.median(times[1:]) for times in found]


def choose(
    network: Network, lanes: int, gpu_waits: str = "spin", allowed: Sequence[str] | None = None
) -> tuple[Engine, BenchmarkResult]:
    """The fastest engine for ``lanes`` streams, of those ``allowed`` (None: any), and the trial that says so.

    Raises EngineUnavailable if none loads."""
    from edge_ssm.engines.registry import installed

    path = kernel_cache.folder() / f"{_key(network, lanes, allowed)}{SUFFIX}"
    trial = _kept(path, network, allowed)
    if trial is not None:
        try:
            return _create(trial.winner, network, lanes, gpu_waits), trial
        except EngineUnavailable:
            pass  # It was there once; try again what is.
    trial = _tried(network, lanes, gpu_waits, allowed)
    if any(installed(name) for name in trial.unavailable):
        # What should load and does not may do so at the next start.
        return _create(trial.winner, network, lanes, gpu_waits), trial
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, msgspec.json.encode(trial))
    except OSError:
        pass  # Tried again at the next start.
    return _create(trial.winner, network, lanes, gpu_waits), trial


def _create(name: str, network: Network, lanes: int, gpu_waits: str) -> Engine:
    from edge_ssm.engines.registry import create

    made = create(name, network, lanes, gpu_waits)
    if name != "cuda":
        return made
    from edge_ssm.engines.failover import FallbackEngine

    return FallbackEngine(made, lambda: create("cpu", network, lanes))


def _key(network: Network, lanes: int, allowed: Sequence[str] | None) -> str:
    from edge_ssm.engines.registry import ENGINES, installed

    # An engine whose package was installed since deserves its trial.
    there = [name for name in allowed or ENGINES if name in ENGINES and installed(name)]
    parts: list[Any] = [fingerprint(network), lanes, there, sources_digest(), *sorted(processor_features())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _kept(path: Any, network: Network, allowed: Sequence[str] | None) -> BenchmarkResult | None:
    from edge_ssm.engines.registry import candidates

    try:
        trial = msgspec.json.decode(files.read_regular_file(path, LARGEST), type=BenchmarkResult)
    except (InputRefused, msgspec.DecodeError):
        return None
    named = {*trial.step_us, *trial.unavailable, *trial.inaccurate}
    return trial if trial.step_us and named == set(candidates(network, allowed)) else None


def _samples(network: Network, lanes: int) -> Array:
    """(CHECKED, lanes, d_input), or without lanes for one, of the size that the sensor's samples have."""
    rng = np.random.default_rng(0)
    allowed, shape = input_range(network), (CHECKED, *((lanes,) if lanes > 1 else ()), network.d_input)
    samples: Array
    if allowed.whole:
        samples = rng.integers(0, int(allowed.high[0]) + 1, shape).astype(np.float64)
    else:
        samples = network.input.mean + network.input.std * rng.standard_normal(shape)
    return samples


def _inaccuracy(engine: Engine, samples: Array, exact: Array, allowed: float = 0.0) -> str:
    """What is wrong with an engine's outputs; empty if nothing is.

    They may be off by the network's tolerance, or by ``allowed``, an absolute error, where that is more.
    """
    found, tolerance = engine.chunk(samples), engine.network.tolerance
    error = float(np.abs(found - exact).max())
    # Outputs of a network that blows its input up are held to their own size.
    bound = max(tolerance * max(1.0, float(np.abs(exact).max()) / ORDINARY), allowed)
    if error <= bound:
        return ""
    return f"its outputs are off by {error:.1e}, more than {bound:.1e}"


def self_test(engine: Engine, off_by: float = 0.0) -> str:
    """What is wrong with an engine, by some samples beside the reference; empty if nothing is. Its state is reset.

    ``off_by``: what the exporter of its graph says that its outputs were off by. Anybody can write that into a file:
    it counts for a graph of smaller weights only, and up to what such weights can cost.
    """
    from edge_ssm.engines.reference import ReferenceEngine

    samples = _samples(engine.network, engine.lanes)
    exact = ReferenceEngine(engine.network, engine.lanes).chunk(samples)
    size = float(np.abs(exact).max())
    claimed = OTHER_SAMPLES * off_by * max(1.0, size / ORDINARY)
    problem = _inaccuracy(engine, samples, exact, min(claimed, SMALLER_WEIGHTS[_graph_weights(engine)] * size))
    engine.reset()
    return problem


def _graph_weights(engine: Engine) -> MixingDtype:
    """Of the graph that an engine runs; float32 where it runs none, but the artifact as it is."""
    from edge_ssm.engines.graph.engine import ExportedEngine

    return engine.graph.spec.weights if isinstance(engine, ExportedEngine) else "float32"


def _tried(network: Network, lanes: int, gpu_waits: str, allowed: Sequence[str] | None) -> BenchmarkResult:
    from edge_ssm.engines.reference import ReferenceEngine
    from edge_ssm.engines.registry import candidates

    made: dict[str, Engine] = {}
    unavailable: dict[str, str] = {}
    inaccurate: dict[str, str] = {}
    samples = _samples(network, lanes)
    exact = ReferenceEngine(network, lanes).chunk(samples)
    for name in candidates(network, allowed):
        try:
            engine = _create(name, network, lanes, gpu_waits)
        except EngineUnavailable as error:
            unavailable[name] = str(error)
            continue
        if problem := _inaccuracy(engine, samples, exact):
            inaccurate[name] = problem
        else:
            made[name] = engine
    if not made:
        raise EngineUnavailable("; ".join(unavailable.values()) or "no engine that the profile allows is here")
    timed = list(samples[:STEPS])
    steps = measure(list(made.values()), timed, ROUNDS)
    return BenchmarkResult(dict(zip(made, steps, strict=True)), unavailable, inaccurate)
