"""``edge-ssm profile``: from models and options to a report."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

import edge_ssm
from edge_ssm.engines import selection, verification
from edge_ssm.engines.registry import ENGINES, Engine, create, left_out
from edge_ssm.errors import EngineUnavailable, UsageError
from edge_ssm.formats import loading
from edge_ssm.hardware import machine
from edge_ssm.hardware.boards import NamedProfile
from edge_ssm.model.input_range import input_range
from edge_ssm.model.network import Array, Network
from edge_ssm.profiler import protocol, report
from edge_ssm.profiler.energy import mean_power
from edge_ssm.profiler.protocol import Activity, open_meter
from edge_ssm.profiler.report import MeterInfo, Report
from edge_ssm.profiler.sampler import Sampler
from edge_ssm.text import sanitize

CHUNKS, LANES = (1, 4, 16, 64), (1, 4, 16)
"""Of a sweep."""
SAMPLES = 1024
"""That are stepped over again and again, at least."""


@dataclass(frozen=True)
class Request:
    models: Sequence[str]
    engines: Sequence[str] = ("auto",)
    """Names, or "all"."""
    chunks: Sequence[int] = (1,)
    lanes: Sequence[int] = (1,)
    paced: bool = True
    recording: str | None = None
    """What ``read`` reads, for the report; None: noise."""
    read: Callable[[Network], Array] = lambda network: np.empty((0, network.d_input))
    """The recording's samples that a network can take, (n, d_input)."""
    meter: str = "auto"
    rounds: int = protocol.ROUNDS
    block_s: float = protocol.BLOCK_S
    quick: bool = False
    seed: int = 0
    profile: NamedProfile | None = None
    threads: int | None = None
    """Of the engines that run exported graphs."""


def measure(request: Request) -> Report:
    """Raises what loading a model, making an engine and opening a named meter raise, and UsageError."""
    runtime = None if request.profile is None else request.profile.profile.runtime
    loaded = [(path, loading.load(path)) for path in request.models]
    activities: list[Activity] = []
    model_of: dict[str, str] = {}
    notes: list[str] = []
    for path, found in loaded:
        names = list(dict.fromkeys(found.engine(name) for name in request.engines))
        if names == ["all"]:
            absent = left_out(found.network, found.graph)
            names = [name for name in ENGINES if name not in absent]
            notes += [note for why in absent.values() if (note := f"left out: {why}") not in notes]
        samples, samples_from = _samples(found.network, request.recording, request.read)
        if len(samples) < max(request.chunks):
            samples = np.resize(samples, (max(request.chunks), found.network.d_input))
        for name, chunk, lanes in product(names, request.chunks, request.lanes):
            try:
                waits, allowed = (runtime.gpu_waits, runtime.engines) if runtime else ("spin", None)
                if name == "auto" and request.threads is None:
                    engine = selection.choose(found.network, lanes, waits, allowed)[0]
                else:
                    engine = create(name, found.network, lanes, waits, found.graph, _threads(request, name, names))
            except EngineUnavailable as error:
                if len(names) == 1:
                    raise
                notes.append(f"left out: {error}")
                continue
            if found.exported is not None:
                # A graph that never ends could not be interrupted once the measurement is at it.
                verification.hold(path, engine, found.exported.document.measured.max_error)
            if engine.where and (note := f"engine {name}: {engine.where}") not in notes:
                notes.append(note)
            if engine.warning and engine.warning not in notes:
                notes.append(engine.warning)
            for activity in _activities(engine, samples, chunk, found.network, request, runtime):
                stem = f"{sanitize(Path(path).stem)} " if len(loaded) > 1 else ""
                activity.name = f"{stem}{activity.name}"
                if activity.name in model_of and "auto" in names and len(names) > 1:
                    raise UsageError(f"--engine {','.join(names)}: auto chose {engine.name}, which is there already")
                if activity.name in model_of:
                    raise UsageError(f"{path}: a model of that name is there already; give each another file name")
                model_of[activity.name] = path
                activities.append(activity)
    if not activities:
        raise EngineUnavailable("; ".join(notes))
    if request.paced and not any(a.rate_hz for a in activities):
        notes.append(_not_paced(loaded[0][1].network, request))
    if not request.quick and (request.rounds < protocol.ROUNDS or request.block_s < protocol.BLOCK_S):
        notes.append(
            f"{request.rounds} rounds of {request.block_s:g} s, fewer or shorter than the {protocol.ROUNDS} of "
            f"{protocol.BLOCK_S:g} s of a whole profile: to look, not to publish"
        )
    load = protocol.load_percent()
    meter, refused = open_meter(request.meter)
    if meter is None and request.meter != "none":
        notes += refused

    def another(why: str) -> Sampler | None:
        """After a failure: any meter, the failed one too if it is back."""
        return open_meter("auto")[0]

    described = None if meter is None else meter.meter
    run = protocol.run(activities, meter, request.rounds, request.block_s, request.seed, another)
    if run.trace is not None:
        described = run.trace.meter
    results = [report.result(activity, model_of[activity.name], run) for activity in activities]
    last = run.states[-1][1]
    info = None
    if described is not None and run.trace is not None:
        rails = [rail.name for rail in described.rails]
        info = MeterInfo(described.name, described.covers, rails, run.trace.resolution_w, described.period_s)
    return Report(
        version=report.VERSION,
        edge_ssm=edge_ssm.__version__,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        valid=not run.invalid,
        invalid_because=run.invalid,
        quick=request.quick,
        meter=info,
        notes=notes + run.notes,
        machine=machine.describe(),
        profile=None if request.profile is None else request.profile.name,
        models=[report.Model(sanitize(path), found.digest) for path, found in loaded],
        samples_from=sanitize(samples_from),
        rounds=request.rounds,
        block_s=request.block_s,
        seed=request.seed,
        timer_ns=run.timer_ns,
        idle_w={} if run.trace is None else mean_power(run.trace, run.blocks, "idle"),
        clocks_mhz=last.max_mhz,
        gpu_mhz=last.gpu_mhz,
        fan_rpm=last.fan_rpm,
        resident_mib=machine.resident_mib(),
        start_up_s=_start_up(request.models[0], results[0].engine),
        load_percent=load,
        engine=results[0].engine,
        latency_us=results[0].latency_us,
        energy_per_step_uj=results[0].energy_per_step_uj,
        power_w=results[0].power_w,
        results=results,
        curves=report.curves(run),
    )


def _threads(request: Request, name: str, names: Sequence[str]) -> int | None:
    """Among several engines the number is for those that take one."""
    return request.threads if len(names) == 1 or (name in ENGINES and ENGINES[name].graphs) else None


def _activities(
    engine: Engine, samples: Array, chunk: int, network: Network, request: Request, runtime: object
) -> list[Activity]:
    lanes = engine.lanes
    # Lanes hear the same recording, each from another place on.
    given = samples if lanes == 1 else np.stack([np.roll(samples, i * 17, axis=0) for i in range(lanes)], axis=1)
    words = [engine.name] + ([f"chunk {chunk}"] if chunk > 1 else []) + ([f"{lanes} lanes"] if lanes > 1 else [])
    name = ", ".join(words)
    found = [Activity(name, engine, given, chunk)]
    rate = network.input.sample_rate_hz
    if request.paced and rate is not None and not _not_paced(network, request):
        periods = getattr(runtime, "deadline_periods", 1.0)
        deadline = periods * chunk / rate
        found.append(Activity(f"{name}, at {rate:g} Hz", engine, given, chunk, rate, deadline))
    return found


def _not_paced(network: Network, request: Request) -> str:
    """Why a pace can't be kept or shown; empty if it can."""
    rate = network.input.sample_rate_hz
    if rate is None:
        return "not paced: the model states no sample rate"
    longest = max(request.chunks) / rate
    if longest * 2 > request.block_s:
        return f"not paced: a call falls due every {longest:g} s, a block takes {request.block_s:g} s"
    return ""


def _samples(network: Network, recording: str | None, read: Callable[[Network], Array]) -> tuple[Array, str]:
    """(n, d_input) in the sensor's units, and where they are from; a short recording over and over."""
    if recording is None:
        rng = np.random.default_rng(0)
        allowed, shape = input_range(network), (SAMPLES, network.d_input)
        if allowed.whole:
            return rng.integers(0, int(allowed.high[0]) + 1, shape).astype(np.float64), "random tokens"
        noise = network.input.mean + network.input.std * rng.standard_normal(shape)
        return noise, "noise of the training data's mean and deviation"
    found = read(network)
    return np.resize(found, (max(SAMPLES, len(found)), network.d_input)), recording


def _start_up(model: str, engine: str) -> float | None:
    """Seconds from starting the process to its end, without a sample; the median of three."""
    command = [sys.executable, "-c", "from edge_ssm.cli.app import main; main()", "run", model]
    command += ["--engine", engine, "--input", os.devnull, "--output", os.devnull]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    took = []
    for _ in range(3):
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, env=environment, stdin=subprocess.DEVNULL)
        if done.returncode:
            return None
        took.append(time.monotonic() - begin)
    return sorted(took)[1]
