"""Select the engine "auto": the one with the shortest step for a network on this machine, measured by a short trial.

Only engines whose outputs are within the network's tolerance of the float64 reference take part. The result of the
trial is kept in the folder of compiled kernels, so that later starts only read it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_ssm import files
from edge_ssm.engines.base import Engine
from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.engines.cpu.kernel_file import processor_features, sources_digest
from edge_ssm.engines.entries import ENGINES, candidates, installed, instantiate
from edge_ssm.engines.failover import FallbackEngine
from edge_ssm.engines.options import DEFAULT_OPTIONS, EngineOptions
from edge_ssm.engines.verification import exact_outputs, inaccuracy, random_samples
from edge_ssm.errors import EngineUnavailable, InputRefused
from edge_ssm.model.network import Array, Network, fingerprint

ROUNDS = 5
"""Number of rounds of a trial, after one that warms up caches and branch predictors."""
TIMED_STEPS = 20
"""Number of steps of each engine in a round."""
SUFFIX = ".trial"
"""Suffix of the files that keep the results."""
MAX_BYTES = 1 << 16
"""Largest size of such a file."""


class BenchmarkResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The outcome of a trial of all engines, as it is stored on disk."""

    step_us: dict[str, float]
    """Median duration of a step in microseconds, for each engine that loads and is accurate."""
    unavailable: dict[str, str]
    """The engines that do not load, with the reason."""
    inaccurate: dict[str, str] = {}
    """The engines that load but whose outputs are wrong, with the reason."""

    @property
    def winner(self) -> str:
        """Name of the engine with the shortest step."""
        return min(self.step_us, key=self.step_us.__getitem__)

    def why(self) -> str:
        """Return the measured steps in words, the shortest first."""
        order = sorted(self.step_us.items(), key=lambda item: item[1])
        return ", ".join(f"{name} {step_us:.4g} us" for name, step_us in order) + " a step"


def measure(engines: Sequence[Engine], samples: Sequence[Array], rounds: int) -> list[float]:
    """Return the duration of a step of each engine, in microseconds.

    The engines take turns, so that disturbances by other programs affect all of them alike. A round's figure is the
    mean over ``samples``, and the result is the median over the rounds.
    """
    import statistics  # imported here for start-up time: most starts measure nothing

    times: list[list[float]] = [[] for _ in engines]
    for _ in range(rounds + 1):
        for engine, engine_times in zip(engines, times, strict=True):
            begin = time.perf_counter_ns()
            for sample in samples:
                engine.step(sample)
            engine_times.append((time.perf_counter_ns() - begin) / 1000 / len(samples))
    # The first round warms up caches and branch predictors.
    return [statistics.median(engine_times[1:]) for engine_times in times]


def select_engine(
    network: Network, options: EngineOptions = DEFAULT_OPTIONS, allowed: Sequence[str] | None = None
) -> tuple[Engine, BenchmarkResult]:
    """Return the fastest engine for a network, with zero state, and the measurements that led to it.

    ``allowed`` restricts the engines by name (a firmware profile's ``engines``); None allows all.

    Raises EngineUnavailable if no engine loads.
    """
    path = kernel_cache.folder() / f"{_key(network, options.lanes, allowed)}{SUFFIX}"
    result = _read(path, network, allowed)
    if result is not None:
        try:
            return _create(result.winner, network, options), result
        except EngineUnavailable:
            pass  # It loaded when the trial was made; repeat the trial with those that load now.
    result = _run_trial(network, options, allowed)
    # An engine that is installed but does not load may load at the next start: the result is then not kept.
    if not any(installed(name) for name in result.unavailable):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, msgspec.json.encode(result))
        except OSError:
            pass  # The next start makes the trial again.
    return _create(result.winner, network, options), result


def _create(name: str, network: Network, options: EngineOptions) -> Engine:
    engine = instantiate(name, network, options)
    if name != "cuda":
        return engine
    return FallbackEngine(engine, lambda: instantiate("cpu", network, options))


def _key(network: Network, lanes: int, allowed: Sequence[str] | None) -> str:
    # The installed engines are part of the key: a newly installed one causes a new trial.
    names = [name for name in allowed or ENGINES if name in ENGINES and installed(name)]
    parts: list[Any] = [fingerprint(network), lanes, names, sources_digest(), *sorted(processor_features())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _read(path: Path, network: Network, allowed: Sequence[str] | None) -> BenchmarkResult | None:
    """Return the stored result; None if there is none, or if it does not cover exactly the candidates of today."""
    try:
        result = msgspec.json.decode(files.read_regular_file(path, MAX_BYTES), type=BenchmarkResult)
    except (InputRefused, msgspec.DecodeError):
        return None
    names = {*result.step_us, *result.unavailable, *result.inaccurate}
    return result if result.step_us and names == set(candidates(network, allowed)) else None


def _run_trial(network: Network, options: EngineOptions, allowed: Sequence[str] | None) -> BenchmarkResult:
    engines: dict[str, Engine] = {}
    unavailable: dict[str, str] = {}
    inaccurate: dict[str, str] = {}
    samples = random_samples(network, options.lanes)
    exact = exact_outputs(network, samples, options.lanes)
    for name in candidates(network, allowed):
        try:
            engine = _create(name, network, options)
        except EngineUnavailable as error:
            unavailable[name] = str(error)
            continue
        if problem := inaccuracy(engine, samples, exact):
            inaccurate[name] = problem
        else:
            engines[name] = engine
    if not engines:
        raise EngineUnavailable("; ".join(unavailable.values()) or "no engine that the profile allows is installed")
    steps = measure(list(engines.values()), list(samples[:TIMED_STEPS]), ROUNDS)
    return BenchmarkResult(dict(zip(engines, steps, strict=True)), unavailable, inaccurate)
