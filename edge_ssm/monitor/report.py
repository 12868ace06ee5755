"""The report of a profile: a version, plain values, a table for people."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from edge_ssm import atomic
from edge_ssm.errors import InputRefused
from edge_ssm.monitor.energy import Energy, mean_power, per_step, t95
from edge_ssm.monitor.latency import LatencyHistogram
from edge_ssm.monitor.machine import Machine
from edge_ssm.monitor.protocol import Activity, Run
from edge_ssm.monitor.sampler import Trace

VERSION = 1
NOT_MEASURED = "power: not measured (no sensor; see edge-ssm doctor)"
POINTS = 2000
"""Of a curve in the report, at most."""


class Percentiles(msgspec.Struct, frozen=True):
    """Microseconds, off by at most 1.6 % (``monitor.latency``); the maximum is exact."""

    p50: float
    p90: float
    p99: float
    p999: float
    max: float


class Result(msgspec.Struct, frozen=True):
    """Of one activity. A call advances ``chunk`` samples of ``lanes`` streams."""

    name: str
    model: str
    engine: str
    chunk: int
    lanes: int
    paced_hz: float | None
    latency_us: Percentiles
    """Of a call."""
    latency_low_us: float
    latency_high_us: float
    """Of the median, with 95 % confidence over rounds."""
    jitter_us: float
    """From the median to p99: of a paced call's end after it was due, else of its latency."""
    late_us: Percentiles | None
    """Of a paced call, from when it was due to its end."""
    deadline_us: float | None
    deadline_misses: int
    samples: int
    samples_per_s: float
    cpu_percent: float
    """Of one core, this process."""
    energy_per_step_uj: Energy | None
    """Of a sample of one lane; None where no meter read."""
    power_w: dict[str, float]
    """By rail, and ``total``; empty where no meter read."""
    histogram: list[tuple[int, int]]
    """(upper edge in nanoseconds, calls)."""


class MeterInfo(msgspec.Struct, frozen=True):
    name: str
    covers: str
    rails: list[str]
    resolution_w: float
    period_s: float


class Curves(msgspec.Struct, frozen=True):
    """Over seconds from the beginning, thinned out."""

    power_s: list[float] = []
    power_w: list[float] = []
    temperature_s: list[float] = []
    temperature_c: dict[str, list[float]] = {}
    blocks: list[tuple[str, float, float]] = []


class Model(msgspec.Struct, frozen=True):
    path: str
    digest: str


class Report(msgspec.Struct, frozen=True):
    """``latency_us``, ``energy_per_step_uj``, ``power_w`` and ``engine`` are those of the first result."""

    version: Annotated[int, msgspec.Meta(ge=1)]
    edge_ssm: str
    created: str
    valid: bool
    invalid_because: list[str]
    quick: bool
    meter: MeterInfo | None
    notes: list[str]
    machine: Machine
    profile: str | None
    models: list[Model]
    samples_from: str
    rounds: int
    block_s: float
    seed: int
    timer_ns: float
    idle_w: dict[str, float]
    clocks_mhz: list[float]
    gpu_mhz: float | None
    fan_rpm: float | None
    resident_mib: float
    start_up_s: float | None
    load_percent: float
    """Of all processors, before the run."""
    engine: str
    latency_us: Percentiles
    energy_per_step_uj: Energy | None
    power_w: dict[str, float]
    results: Annotated[list[Result], msgspec.Meta(min_length=1)]
    curves: Curves


def percentiles(histogram: LatencyHistogram) -> Percentiles:
    return Percentiles(*(histogram.percentile_ns(p) / 1e3 for p in (50, 90, 99, 99.9, 100)))


def result(activity: Activity, model: str, run: Run) -> Result:
    latency, late = percentiles(activity.latency), percentiles(activity.late) if activity.rate_hz else None
    medians, lanes = activity.block_p50_us, activity.engine.lanes
    middle = float(np.mean(medians))
    around = t95(len(medians)) * float(np.std(medians, ddof=1)) / len(medians) ** 0.5 if len(medians) > 1 else middle
    energy = per_step(run.trace, run.blocks, activity.name) if run.trace is not None else None
    if energy is not None and lanes > 1:
        shares = ("total", "dynamic", "low", "high", "total_low", "total_high")
        energy = msgspec.structs.replace(energy, **{name: getattr(energy, name) / lanes for name in shares})
    of = late or latency
    return Result(
        name=activity.name,
        model=model,
        engine=activity.engine.name,
        chunk=activity.chunk,
        lanes=lanes,
        paced_hz=activity.rate_hz,
        latency_us=latency,
        latency_low_us=max(0.0, middle - around),
        latency_high_us=middle + around,
        jitter_us=of.p99 - of.p50,
        late_us=late,
        deadline_us=None if activity.deadline_s is None else activity.deadline_s * 1e6,
        deadline_misses=activity.misses,
        samples=activity.steps * lanes,
        samples_per_s=activity.steps * lanes / activity.seconds,
        cpu_percent=100 * activity.cpu_s / activity.seconds,
        energy_per_step_uj=energy,
        power_w={} if run.trace is None else mean_power(run.trace, run.blocks, activity.name),
        histogram=activity.latency.buckets(),
    )


def curves(run: Run) -> Curves:
    zero = run.states[0][0]
    shaded = [(b.kind, b.begin_s - zero, b.end_s - zero) for b in run.blocks]
    zones = list(run.states[0][1].temperature_c)
    seen = [(at - zero, s.temperature_c) for at, s in run.states if all(zone in s.temperature_c for zone in zones)]
    at, watts = ([], []) if run.trace is None else _thinned(run.trace, zero)
    return Curves(
        at, watts, [t for t, _ in seen], {zone: [celsius[zone] for _, celsius in seen] for zone in zones}, shaded
    )


def _thinned(trace: Trace, zero: float) -> tuple[list[float], list[float]]:
    """Means of neighbours, so that no more than POINTS are left."""
    count = -(-len(trace.time_s) // POINTS) if len(trace.time_s) else 1
    whole = len(trace.time_s) // count * count
    at = (trace.time_s[:whole] - zero).reshape(-1, count).mean(axis=1)
    watts = trace.total()[:whole].reshape(-1, count).mean(axis=1)
    return [round(float(t), 3) for t in at], [round(float(w), 4) for w in watts]


def save(path: Path, report: Report) -> None:
    write(path, msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")


def write(path: Path, content: bytes) -> None:
    """Raises InputRefused if the place can't be written."""
    try:
        atomic.write(path, content)
    except OSError as error:
        raise InputRefused(f"{path}: can't be written ({error.strerror})") from None


def check_place(path: Path) -> None:
    """Before minutes are spent on what goes there. Raises InputRefused."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        why = "is a folder" if path.is_dir() else "its folder is missing or can't be written to"
        raise InputRefused(f"{path}: {why}; name another file")


def load(path: Path) -> Report:
    """Raises InputRefused, naming the file, for one that is missing, damaged or of another version."""
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=Report)
    except OSError as error:
        raise InputRefused(f"{path}: can't be read ({error.strerror})") from None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InputRefused(f"{path}: not a report of edge-ssm profile --json ({error})") from None
    if found.version != VERSION:
        raise InputRefused(f"{path}: report version {found.version}, expected {VERSION}; measure again")
    return found


def energy_text(energy: Energy | None) -> str:
    if energy is None:
        return "not measured"
    unit, scale = ("mJ", 1e3) if energy.total >= 1e4 else ("uJ", 1.0)
    total, dynamic, low, high = (v / scale for v in (energy.total, energy.dynamic, energy.low, energy.high))
    if energy.below_resolution:
        return f"{total:.4g} {unit} total; beyond idling below resolution (under {max(high, 0):.3g} {unit})"
    return f"{total:.4g} {unit} total, {dynamic:.4g} beyond idling ({low:.4g} to {high:.4g})"


def render(report: Report) -> str:
    """For people."""
    m = report.machine
    modes = [
        x for x in (m.jetpack, m.power_mode and f"mode {m.power_mode}", m.governor and f"governor {m.governor}") if x
    ]
    lines = [f"{m.board}, {m.processor}, {m.cores} cores" + (f"; {', '.join(modes)}" if modes else "")]
    lines.append(
        f"{report.rounds} rounds of {report.block_s:g} s blocks{' (quick)' if report.quick else ''}; samples: "
        f"{report.samples_from}; timing adds {report.timer_ns:.0f} ns to a call"
    )
    lines += [f"model {model.path} ({model.digest[:12]})" for model in report.models]
    lines.append("")
    lines.append(f"{'':34} {'p50':>9} {'p90':>9} {'p99':>9} {'p99.9':>9} {'max':>9}  us a call")
    for r in report.results:
        values = " ".join(f"{getattr(r.latency_us, p):9.1f}" for p in ("p50", "p90", "p99", "p999", "max"))
        lines.append(f"{r.name:34} {values}")
        lines.append(
            f"{'':4}{r.samples_per_s:.0f} samples/s, {r.cpu_percent:.0f} % of a core, jitter {r.jitter_us:.1f} us"
        )
        if r.late_us is not None and r.deadline_us is not None:
            lines.append(
                f"{'':4}output after the sample was due: p50 {r.late_us.p50:.1f}, p99 {r.late_us.p99:.1f}, max "
                f"{r.late_us.max:.1f} us; {r.deadline_misses} later than the deadline of {r.deadline_us:.0f} us"
            )
        if report.meter is not None:
            lines.append(f"{'':4}energy a sample: {energy_text(r.energy_per_step_uj)}")
            lines.append(f"{'':4}power: " + _watts(r.power_w))
    lines.append("")
    if report.meter is None:
        lines.append(NOT_MEASURED)
    else:
        lines.append(f"power by {report.meter.name}: {report.meter.covers}; idle: {_watts(report.idle_w)}")
    start = "" if report.start_up_s is None else f"; start to end of an empty run {report.start_up_s:.2f} s"
    lines.append(f"resident {report.resident_mib:.0f} MiB{start}; load before the run {report.load_percent:.0f} %")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"INVALID: {why}" for why in report.invalid_because]
    return "\n".join(lines)


def _watts(by_rail: dict[str, float]) -> str:
    return ", ".join(f"{name} {watts:.3f} W" for name, watts in by_rail.items()) or "not measured"
