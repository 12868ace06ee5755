"""The work of ``edge-ssm profile``: from models and options to a report."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

import edge_ssm
from edge_ssm.engines import selection, verification
from edge_ssm.engines.options import EngineOptions
from edge_ssm.engines.registry import ENGINES, Engine, create, left_out
from edge_ssm.errors import EngineUnavailable, UsageError
from edge_ssm.formats import loading
from edge_ssm.hardware import machine
from edge_ssm.hardware.boards import NamedProfile, Runtime
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Network
from edge_ssm.profiler import protocol, report, sampler
from edge_ssm.profiler.energy import mean_power
from edge_ssm.profiler.protocol import Measurement, Workload
from edge_ssm.profiler.report import MeterInfo, Report
from edge_ssm.text import sanitize

CHUNKS, LANES = (1, 4, 16, 64), (1, 4, 16)
"""Chunk sizes and numbers of lanes of a sweep."""
SAMPLES = 1024
"""Fewest samples that are stepped over again and again."""
LANE_SHIFT = 17
"""Offset in samples between the lanes, which all read the same recording."""


@dataclass(frozen=True)
class ProfileSettings:
    """What to measure, and how."""

    models: Sequence[str]
    engines: Sequence[str] = ("auto",)
    """Names of engines, or ("all",)."""
    chunks: Sequence[int] = (1,)
    lanes: Sequence[int] = (1,)
    paced: bool = True
    """Whether to measure at the model's sample rate as well."""
    recording: str | None = None
    """Path of the recording, for the report; None for noise."""
    read: Callable[[Network], Array] = lambda network: np.empty((0, network.d_input))
    """Reads the samples of the recording that a network can take, shape (n, d_input)."""
    meter: str = "auto"
    rounds: int = protocol.ROUNDS
    block_s: float = protocol.BLOCK_S
    quick: bool = False
    seed: int = 0
    profile: NamedProfile | None = None
    threads: int | None = None
    """Number of threads of the engines that run exported graphs."""

    @property
    def runtime(self) -> Runtime | None:
        """How the firmware profile, if there is one, uses the board."""
        return None if self.profile is None else self.profile.profile.runtime


def measure(settings: ProfileSettings) -> Report:
    """Measure, and return the report.

    Raises the exceptions of loading a model, of creating an engine and of opening a named meter, and UsageError.
    """
    models = [(path, loading.load(path)) for path in settings.models]
    notes: list[str] = []
    workloads: list[Workload] = []
    for path, model in models:
        for workload in _workloads(path, model, settings, notes):
            _check_name(workload, workloads, settings)
            workloads.append(workload)
    if not workloads:
        raise EngineUnavailable("; ".join(notes))
    notes += _protocol_notes(models[0][1].network, workloads, settings)
    load_percent = protocol.load_percent()
    meter, problems = sampler.start_selected(settings.meter)
    if meter is None:
        notes += problems
    measurement = protocol.run(
        workloads, meter, settings.rounds, settings.block_s, settings.seed, lambda: sampler.start_selected("auto")[0]
    )
    return _report(settings, models, workloads, measurement, notes + measurement.notes, load_percent)


def _workloads(path: str, model: loading.Model, settings: ProfileSettings, notes: list[str]) -> Iterator[Workload]:
    """Yield the workloads of one model: every engine with every chunk size and number of lanes."""
    names = _engine_names(model, settings, notes)
    samples = _samples(model.network, settings)
    for name, chunk, lanes in product(names, settings.chunks, settings.lanes):
        try:
            engine = _create_engine(name, model, lanes, settings, is_only=len(names) == 1)
        except EngineUnavailable as error:
            if len(names) == 1:
                raise
            notes.append(f"left out: {error}")
            continue
        if model.exported is not None:
            # A graph may never end, and cannot be interrupted during the measurement.
            verification.verify_with_timeout(path, engine, model.exported.document.measured.max_error)
        _add_note(notes, f"engine {name}: {engine.where}" if engine.where else "")
        _add_note(notes, engine.warning)
        prefix = f"{sanitize(Path(path).stem)} " if len(settings.models) > 1 else ""
        for workload in _engine_workloads(engine, samples, chunk, model.network, settings):
            workload.name, workload.model = prefix + workload.name, path
            yield workload


def _add_note(notes: list[str], note: str) -> None:
    if note and note not in notes:
        notes.append(note)


def _check_name(workload: Workload, others: Sequence[Workload], settings: ProfileSettings) -> None:
    """Raise UsageError if another workload has the same name."""
    if workload.name not in [other.name for other in others]:
        return
    if "auto" in settings.engines and len(settings.engines) > 1:
        engines = ",".join(settings.engines)
        raise UsageError(f"--engine {engines}: auto chose {workload.engine.name}, which is in the list as well")
    raise UsageError(f"{workload.model}: another model has the same file name; rename one of them")


def _engine_names(model: loading.Model, settings: ProfileSettings, notes: list[str]) -> list[str]:
    names = list(dict.fromkeys(model.resolve_engine(name) for name in settings.engines))
    if names != ["all"]:
        return names
    absent = left_out(model.network, model.graph)
    for reason in absent.values():
        _add_note(notes, f"left out: {reason}")
    return [name for name in ENGINES if name not in absent]


def _create_engine(name: str, model: loading.Model, lanes: int, settings: ProfileSettings, is_only: bool) -> Engine:
    runtime = settings.runtime
    # Among several engines, --threads applies to those that take a number of threads.
    has_threads = is_only or (name in ENGINES and ENGINES[name].graphs)
    threads = settings.threads if has_threads else None
    options = EngineOptions(lanes, runtime.gpu_waits if runtime else "spin", model.graph, threads)
    if name == "auto" and settings.threads is None:
        return selection.select_engine(model.network, options, runtime.engines if runtime else None)[0]
    return create(name, model.network, options)


def _engine_workloads(
    engine: Engine, samples: Array, chunk: int, network: Network, settings: ProfileSettings
) -> list[Workload]:
    """Return the workloads of an engine: back to back, and paced if possible."""
    lanes = engine.lanes
    if lanes > 1:
        samples = np.stack([np.roll(samples, i * LANE_SHIFT, axis=0) for i in range(lanes)], axis=1)
    words = [engine.name] + ([f"chunk {chunk}"] if chunk > 1 else []) + ([f"{lanes} lanes"] if lanes > 1 else [])
    name = ", ".join(words)
    workloads = [Workload(name, engine, samples, chunk)]
    rate = network.input.sample_rate_hz
    if settings.paced and rate is not None and not _unpaced_reason(network, settings):
        deadline_periods = settings.runtime.deadline_periods if settings.runtime else 1.0
        deadline_s = deadline_periods * chunk / rate
        workloads.append(Workload(f"{name}, at {rate:g} Hz", engine, samples, chunk, rate, deadline_s))
    return workloads


def _unpaced_reason(network: Network, settings: ProfileSettings) -> str:
    """Return why the model cannot be measured at its sample rate; empty if it can."""
    rate = network.input.sample_rate_hz
    if rate is None:
        return "not paced: the model states no sample rate"
    period_s = max(settings.chunks) / rate
    if period_s * 2 > settings.block_s:
        return f"not paced: a call is due every {period_s:g} s, and a block lasts {settings.block_s:g} s"
    return ""


def _protocol_notes(network: Network, workloads: Sequence[Workload], settings: ProfileSettings) -> list[str]:
    notes = []
    if settings.paced and not any(workload.rate_hz for workload in workloads):
        notes.append(_unpaced_reason(network, settings))
    if not settings.quick and (settings.rounds < protocol.ROUNDS or settings.block_s < protocol.BLOCK_S):
        notes.append(
            f"{settings.rounds} rounds of {settings.block_s:g} s, fewer or shorter than the default of "
            f"{protocol.ROUNDS} rounds of {protocol.BLOCK_S:g} s: a first look, not a figure to publish"
        )
    return notes


def _samples(network: Network, settings: ProfileSettings) -> Array:
    """Return samples in the sensor's units, shape (n, d_input); a short recording is repeated."""
    count = max(SAMPLES, *settings.chunks)
    if settings.recording is not None:
        samples = settings.read(network)
        return np.resize(samples, (max(count, len(samples)), network.d_input))
    rng = np.random.default_rng(0)
    allowed, shape = input_range(network), (count, network.d_input)
    if allowed.whole:
        return rng.integers(0, int(allowed.high[0]) + 1, shape).astype(np.float64)
    noise: Array = network.input.mean + network.input.std * rng.standard_normal(shape)
    return noise


def _samples_from(network: Network, settings: ProfileSettings) -> str:
    """Say what the samples are."""
    if settings.recording is not None:
        return sanitize(settings.recording)
    return "random tokens" if input_range(network).whole else "noise of the training data's mean and deviation"


def _report(
    settings: ProfileSettings,
    models: Sequence[tuple[str, loading.Model]],
    workloads: Sequence[Workload],
    measurement: Measurement,
    notes: list[str],
    load_percent: float,
) -> Report:
    results = [report.make_result(workload, measurement) for workload in workloads]
    trace, last_state = measurement.trace, measurement.states[-1][1]
    meter = None
    if trace is not None:
        rails = [rail.name for rail in trace.meter.rails]
        meter = MeterInfo(trace.meter.name, trace.meter.covers, rails, trace.resolution_w, trace.meter.period_s)
    return Report(
        version=report.VERSION,
        edge_ssm=edge_ssm.__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        valid=not measurement.invalid,
        invalid_because=measurement.invalid,
        quick=settings.quick,
        meter=meter,
        notes=notes,
        machine=machine.describe(),
        profile=None if settings.profile is None else settings.profile.name,
        models=[report.Model(sanitize(path), model.digest) for path, model in models],
        samples_from=_samples_from(models[-1][1].network, settings),
        rounds=settings.rounds,
        block_s=settings.block_s,
        seed=settings.seed,
        timer_ns=measurement.timer_ns,
        idle_w={} if trace is None else mean_power(trace, measurement.blocks, "idle"),
        clocks_mhz=last_state.max_mhz,
        gpu_mhz=last_state.gpu_mhz,
        fan_rpm=last_state.fan_rpm,
        resident_mib=machine.resident_mib(),
        start_up_s=_start_up_s(settings.models[0], results[0].engine),
        load_percent=load_percent,
        engine=results[0].engine,
        latency_us=results[0].latency_us,
        energy_per_step_uj=results[0].energy_per_step_uj,
        power_w=results[0].power_w,
        results=results,
        curves=report.make_curves(measurement),
    )


def _start_up_s(model: str, engine: str) -> float | None:
    """Return the duration of a run without samples in seconds, the median of three; None if the run fails."""
    command = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "run", model]
    command += ["--engine", engine, "--input", os.devnull, "--output", os.devnull]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    seconds = []
    for _ in range(3):
        begin = time.monotonic()
        completed = subprocess.run(command, capture_output=True, env=environment, stdin=subprocess.DEVNULL)
        if completed.returncode:
            return None
        seconds.append(time.monotonic() - begin)
    return sorted(seconds)[1]
