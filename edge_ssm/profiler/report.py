"""The report of a profile: a version, plain values, a table for people."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from edge_ssm import files
from edge_ssm.errors import InputRefused, RunFailed
from edge_ssm.hardware.machine import Machine
from edge_ssm.histogram import RESOLUTION, LatencyHistogram
from edge_ssm.profiler.energy import Energy, mean_power, per_step, t95
from edge_ssm.profiler.protocol import BLOCK_S, ROUNDS, Activity, Run
from edge_ssm.profiler.sampler import Trace
from edge_ssm.text import sanitize

VERSION = 2
"""1 had a number for every percentile, and 0 misses where there was no deadline; it is read still."""
LARGEST = 1 << 24
"""Bytes of a report that is read: some hundred times what one of a sweep has."""
NOT_MEASURED = "power: not measured (no sensor; see edge-ssm doctor)"
POINTS = 2000
"""Of a curve in the report, at most."""


class Percentiles(msgspec.Struct, frozen=True):
    """Microseconds, off by at most 1.6 % (``monitor.latency``); the maximum is exact. None where so few calls were made
    that less than ten were longer (100, 1000, 10000 calls are needed): it would be a matter of one or two, or the
    maximum by another name."""

    p50: float
    p90: float | None
    p99: float | None
    p999: float | None
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
    """Of the median, with 95 % confidence over rounds, and the histogram's resolution on top; ``p50`` is within."""
    jitter_us: float | None
    """From the median to p99: of a paced call's end after it was due, else of its latency; None without a p99."""
    late_us: Percentiles | None
    """Of a paced call, from when it was due to its end."""
    deadline_us: float | None
    deadline_misses: int | None
    """None where there is no deadline."""
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
    def tail(per_mille: int) -> float | None:
        """With ten calls beyond it, their number is known to a third (1/sqrt(10)); with fewer it says little."""
        if histogram.count * (1000 - per_mille) < 10 * 1000:
            return None
        return histogram.percentile_ns(per_mille / 10) / 1e3

    median, longest = histogram.percentile_ns(50) / 1e3, histogram.percentile_ns(100) / 1e3
    return Percentiles(median, tail(900), tail(990), tail(999), longest)


def latency_interval(medians_us: list[float], p50: float) -> tuple[float, float]:
    """Of the median call, microseconds: Student's t over the rounds' medians, and the histogram's resolution on top,
    for medians that all fall into one bucket agree without being equal. ``p50``, of all calls, is held within."""
    n, middle = len(medians_us), float(np.mean(medians_us))
    around = t95(n) * float(np.std(medians_us, ddof=1)) / n**0.5 if n > 1 else middle
    low, high = min(middle - around, p50), max(middle + around, p50)
    return max(0.0, low * (1 - RESOLUTION)), high * (1 + RESOLUTION)


def result(activity: Activity, model: str, run: Run) -> Result:
    latency, late = percentiles(activity.latency), percentiles(activity.late) if activity.rate_hz else None
    lanes = activity.engine.lanes
    low, high = latency_interval(activity.block_p50_us, latency.p50)
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
        latency_low_us=low,
        latency_high_us=high,
        jitter_us=None if of.p99 is None else of.p99 - of.p50,
        late_us=late,
        deadline_us=None if activity.deadline_s is None else activity.deadline_s * 1e6,
        deadline_misses=None if activity.deadline_s is None else activity.misses,
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


def as_json(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def write(path: Path, content: bytes) -> None:
    """Raises RunFailed if the place can't be written; ``check_places`` has seen before that it could."""
    try:
        files.write(path, content)
    except OSError as error:
        raise RunFailed(f"{path}: can't be written ({error.strerror})") from None


def check_place(path: Path) -> None:
    """Before minutes are spent on what goes there. Raises InputRefused."""
    try:
        files.check_writable(path)
    except OSError as error:
        why = f"can't be written ({error.strerror})"
        if path.is_dir():
            why = "is a folder"
        elif not path.exists() and not os.access(Path(os.path.realpath(path)).parent, os.W_OK):
            why = "its folder is missing or can't be written to"
        raise InputRefused(f"{path}: {why}; name another file") from None


def check_places(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """The same for all ``outputs``, by option; and that none is one of ``inputs`` or another output, under whatever
    name, which would be lost. Raises InputRefused."""
    taken = list(inputs.items())
    for option, path in outputs.items():
        check_place(path)
        for other, theirs in taken:
            if _same(path, theirs):
                raise InputRefused(f"{option} {path}: is {other} too, which would be lost; name another file")
        if files.own_descriptor(path) is None and _is_standard_output(path):
            raise InputRefused(f"{option} {path}: standard output goes there; name another file, or /dev/stdout")
        taken.append((option, path))


def _same(a: Path, b: Path) -> bool:
    try:
        found = a.stat()
        # Any number may write to a terminal or to /dev/null.
        return os.path.samestat(found, b.stat()) and not stat.S_ISCHR(found.st_mode)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def _is_standard_output(path: Path) -> bool:
    try:
        found = path.stat()
        return stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.fstat(1))
    except OSError:
        return False


def load(path: Path) -> Report:
    """Raises InputRefused, naming the file and the field, for one that is missing, damaged, of another version, or that
    no measurement can have given."""
    from edge_ssm.profiler import report_checks

    content = files.read_regular_file(path, LARGEST, remedy="expected a report of edge-ssm profile --json")
    try:
        found = msgspec.json.decode(content, type=Report)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise InputRefused(f"{path}: not a report of edge-ssm profile --json ({error})") from None
    if found.version not in (1, VERSION):
        version = report_checks.shown(found.version)
        raise InputRefused(f"{path}: report version {version}, expected {VERSION}; measure again")
    if found.version == 1:
        found = _of_version_1(found)
    if problem := report_checks.problem(found):
        raise InputRefused(f"{path}: {problem}; no measurement gives that")
    return found


def _of_version_1(found: Report) -> Report:
    def renewed(r: Result) -> Result:
        misses = None if r.deadline_us is None else r.deadline_misses
        return msgspec.structs.replace(r, deadline_misses=misses)

    return msgspec.structs.replace(found, results=[renewed(r) for r in found.results])


def short(report: Report) -> str:
    """In words, where the rounds are fewer or shorter than of a profile that was not cut short; else empty."""
    if report.rounds >= ROUNDS and report.block_s >= BLOCK_S:
        return ""
    return (
        f"{'quick' if report.quick else 'short'}: {report.rounds} rounds of {report.block_s:g} s, fewer or shorter "
        f"than the {ROUNDS} of {BLOCK_S:g} s of a whole profile; intervals are wide, or miss what is slow"
    )


def energy_text(energy: Energy | None) -> str:
    if energy is None:
        return "not measured"
    unit, scale = ("mJ", 1e3) if energy.total >= 1e4 else ("uJ", 1.0)
    total, dynamic, low, high = (v / scale for v in (energy.total, energy.dynamic, energy.low, energy.high))
    if energy.below_resolution:
        return f"{total:.4g} {unit} total; beyond idling below resolution (under {max(high, 0):.3g} {unit})"
    return f"{total:.4g} {unit} total, {dynamic:.4g} beyond idling ({low:.4g} to {high:.4g})"


def percentile_texts(of: Percentiles) -> list[str]:
    """p50, p90, p99, p99.9, the maximum; "-" for what the number of calls can't carry."""
    return ["-" if v is None else f"{v:.1f}" for v in (of.p50, of.p90, of.p99, of.p999, of.max)]


def render(report: Report) -> str:
    """For people."""
    m = report.machine
    modes = [
        x for x in (m.jetpack, m.power_mode and f"mode {m.power_mode}", m.governor and f"governor {m.governor}") if x
    ]
    lines = [f"{m.board}, {m.processor}, {m.cores} cores" + (f"; {', '.join(modes)}" if modes else "")]
    cut = f" ({'quick' if report.quick else 'short'})" if short(report) else ""
    lines.append(
        f"{report.rounds} rounds of {report.block_s:g} s blocks{cut}; samples: "
        f"{report.samples_from}; timing adds {report.timer_ns:.0f} ns to a call"
    )
    lines += [f"model {model.path} ({model.digest[:12]})" for model in report.models]
    lines.append("")
    lines.append(f"{'':34} {'p50':>9} {'p90':>9} {'p99':>9} {'p99.9':>9} {'max':>9}  us a call")
    for r in report.results:
        lines.append(f"{r.name:34} {' '.join(f'{value:>9}' for value in percentile_texts(r.latency_us))}")
        jitter = "" if r.jitter_us is None else f", jitter {r.jitter_us:.1f} us"
        lines.append(f"{'':4}{r.samples_per_s:.0f} samples/s, {r.cpu_percent:.0f} % of a core{jitter}")
        if r.late_us is not None and r.deadline_us is not None:
            p99 = "" if r.late_us.p99 is None else f"p99 {r.late_us.p99:.1f}, "
            lines.append(
                f"{'':4}output after the sample was due: p50 {r.late_us.p50:.1f}, {p99}max "
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
    return "\n".join(sanitize(line) for line in lines)


def _watts(by_rail: dict[str, float]) -> str:
    return ", ".join(f"{name} {watts:.3f} W" for name, watts in by_rail.items()) or "not measured"
