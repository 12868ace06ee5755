"""The report of a profile: its JSON schema, how it is computed from a measurement, and a table as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from edge_ssm import files
from edge_ssm.errors import InputRefused
from edge_ssm.hardware.machine import Machine
from edge_ssm.histogram import RESOLUTION, LatencyHistogram
from edge_ssm.model.network import Array
from edge_ssm.profiler.energy import Energy, energy_per_step, mean_power, t95
from edge_ssm.profiler.protocol import BLOCK_S, ROUNDS, Measurement, Workload
from edge_ssm.profiler.sampler import Trace
from edge_ssm.text import sanitize

VERSION = 2
MAX_BYTES = 1 << 24
"""Size of the largest report that is read: about a hundred times the report of a sweep."""
NOT_MEASURED = "power: not measured (no sensor; see edge-ssm doctor)"
MAX_POINTS = 2000
"""Most points of a curve in the report."""
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1, le=1 << 53)]


class Percentiles(msgspec.Struct, frozen=True):
    """Percentiles of a latency in microseconds, each at most 1.6 % too large; the maximum is exact.

    A percentile is None if fewer than ten calls took longer (p90 needs 100 calls, p99 1,000 and p999 10,000): it would
    depend on one or two calls, or repeat the maximum.
    """

    p50: NonNegative
    p90: NonNegative | None
    p99: NonNegative | None
    p999: NonNegative | None
    max: NonNegative

    def __post_init__(self) -> None:
        """Raise ValueError unless the percentiles ascend."""
        values = [v for v in (self.p50, self.p90, self.p99, self.p999, self.max) if v is not None]
        if values != sorted(values):
            raise ValueError("the percentiles do not ascend")


class Result(msgspec.Struct, frozen=True):
    """The result of one workload. A call advances ``lanes`` streams by ``chunk`` samples each."""

    name: str
    model: str
    engine: str
    chunk: PositiveCount
    lanes: PositiveCount
    paced_hz: Positive | None
    """Sample rate at which the workload was paced; None for back to back."""
    latency_us: Percentiles
    """Latency of a call."""
    latency_low_us: NonNegative
    """Lower end of the 95 % confidence interval of the median latency."""
    latency_high_us: NonNegative
    """Upper end of the 95 % confidence interval of the median latency."""
    jitter_us: NonNegative | None
    """Difference of p99 and the median: of ``late_us`` if paced, else of ``latency_us``; None without a p99."""
    late_us: Percentiles | None
    """Time from when a paced call is due to its end."""
    deadline_us: Positive | None
    deadline_misses: Count | None
    """Number of calls that missed the deadline; None if there is no deadline."""
    samples: Count
    samples_per_s: NonNegative
    cpu_percent: NonNegative
    """Processor time of this process, in percent of one core."""
    energy_per_step_uj: Energy | None
    """Energy of a step of one lane; None if no meter could be read."""
    power_w: dict[str, float]
    """Mean power by rail and as ``total``; empty if no meter could be read."""
    histogram: list[tuple[Count, Count]]
    """Upper edge in nanoseconds, and number of calls, of each bucket that is not empty."""


class MeterInfo(msgspec.Struct, frozen=True):
    """The meter that was read."""

    name: str
    covers: str
    rails: list[str]
    resolution_w: NonNegative
    period_s: Positive


class Curves(msgspec.Struct, frozen=True):
    """Power and temperature over the time in seconds since the beginning, thinned out to ``MAX_POINTS``."""

    power_s: list[float] = []
    power_w: list[float] = []
    temperature_s: list[float] = []
    temperature_c: dict[str, list[float]] = {}
    blocks: list[tuple[str, float, float]] = []
    """Kind, begin and end of each block."""


class Model(msgspec.Struct, frozen=True):
    """A model that was measured."""

    path: str
    digest: str


class Report(msgspec.Struct, frozen=True):
    """A whole report.

    ``latency_us``, ``energy_per_step_uj``, ``power_w`` and ``engine`` repeat those of the first result.
    """

    version: int
    edge_ssm: str
    """Version of edge-ssm."""
    created: str
    """Date and time, ISO 8601."""
    valid: bool
    invalid_because: list[str]
    """Changes of the machine that make the measurement invalid."""
    quick: bool
    meter: MeterInfo | None
    notes: list[str]
    machine: Machine
    profile: str | None
    """Name of the firmware profile."""
    models: Annotated[list[Model], msgspec.Meta(min_length=1)]
    samples_from: str
    """What the samples are: a recording's path, or a description of the noise."""
    rounds: PositiveCount
    block_s: Positive
    seed: int
    timer_ns: NonNegative
    """Nanoseconds that timing adds to a call."""
    idle_w: dict[str, float]
    """Mean power of the idle machine by rail and as ``total``; empty if no meter could be read."""
    clocks_mhz: list[float]
    """Highest clock that is allowed, for each online core."""
    gpu_mhz: float | None
    fan_rpm: float | None
    resident_mib: NonNegative
    start_up_s: NonNegative | None
    """Duration of a run without samples."""
    load_percent: NonNegative
    """Load of all processors before the measurement."""
    engine: str
    latency_us: Percentiles
    energy_per_step_uj: Energy | None
    power_w: dict[str, float]
    results: Annotated[list[Result], msgspec.Meta(min_length=1)]
    curves: Curves


class _Version(msgspec.Struct):
    version: int


def percentiles(histogram: LatencyHistogram) -> Percentiles:
    """Return the percentiles that a histogram's number of calls can support."""

    def tail(per_mille: int) -> float | None:
        # With ten calls beyond a percentile, their number has a relative standard deviation of 1/sqrt(10), a third.
        if histogram.count * (1000 - per_mille) < 10 * 1000:
            return None
        return histogram.percentile_ns(per_mille / 10) / 1e3

    median, longest = histogram.percentile_ns(50) / 1e3, histogram.percentile_ns(100) / 1e3
    return Percentiles(median, tail(900), tail(990), tail(999), longest)


def latency_interval(medians_us: Sequence[float], p50_us: float) -> tuple[float, float]:
    """Return the 95 % confidence interval of the median latency in microseconds.

    It is Student's t over the medians of the rounds, widened to contain ``p50_us``, the median of all calls, and by the
    histogram's resolution: medians that fall into the same bucket agree without being equal.
    """
    n, mean = len(medians_us), float(np.mean(medians_us))
    half_width = t95(n) * float(np.std(medians_us, ddof=1)) / n**0.5 if n > 1 else mean
    low, high = min(mean - half_width, p50_us), max(mean + half_width, p50_us)
    return max(0.0, low * (1 - RESOLUTION)), high * (1 + RESOLUTION)


def make_result(workload: Workload, measurement: Measurement) -> Result:
    """Summarise what was measured of a workload."""
    latency = percentiles(workload.latency)
    late = percentiles(workload.late) if workload.rate_hz else None
    low, high = latency_interval(workload.block_p50_us, latency.p50)
    trace, lanes = measurement.trace, workload.engine.lanes
    energy = None if trace is None else energy_per_step(trace, measurement.blocks, workload.name)
    if energy is not None and lanes > 1:
        fields = ("total", "dynamic", "low", "high", "total_low", "total_high")
        energy = msgspec.structs.replace(energy, **{name: getattr(energy, name) / lanes for name in fields})
    jittered = late or latency
    has_deadline = workload.deadline_s is not None
    return Result(
        name=workload.name,
        model=workload.model,
        engine=workload.engine.name,
        chunk=workload.chunk,
        lanes=lanes,
        paced_hz=workload.rate_hz,
        latency_us=latency,
        latency_low_us=low,
        latency_high_us=high,
        jitter_us=None if jittered.p99 is None else jittered.p99 - jittered.p50,
        late_us=late,
        deadline_us=None if workload.deadline_s is None else workload.deadline_s * 1e6,
        deadline_misses=workload.misses if has_deadline else None,
        samples=workload.steps * lanes,
        samples_per_s=workload.steps * lanes / workload.seconds,
        cpu_percent=100 * workload.cpu_s / workload.seconds,
        energy_per_step_uj=energy,
        power_w={} if trace is None else mean_power(trace, measurement.blocks, workload.name),
        histogram=workload.latency.buckets(),
    )


def make_curves(measurement: Measurement) -> Curves:
    """Return power and temperature over time; a state in which a zone is off line is left out."""
    zero = measurement.states[0][0]
    zones = list(measurement.states[0][1].temperature_c)
    readings = [(at - zero, s.temperature_c) for at, s in measurement.states if set(zones) <= set(s.temperature_c)]
    power_s, power_w = ([], []) if measurement.trace is None else _thinned(measurement.trace, zero)
    return Curves(
        power_s=power_s,
        power_w=power_w,
        temperature_s=[at for at, _ in readings],
        temperature_c={zone: [celsius[zone] for _, celsius in readings] for zone in zones},
        blocks=[(b.kind, b.begin_s - zero, b.end_s - zero) for b in measurement.blocks],
    )


def _thinned(trace: Trace, zero: float) -> tuple[list[float], list[float]]:
    """Return times and total power, averaged over groups of neighbours so that at most ``MAX_POINTS`` are left."""
    size = -(-len(trace.time_s) // MAX_POINTS) or 1
    count = len(trace.time_s) // size * size

    def means(values: Array, digits: int) -> list[float]:
        return [round(float(v), digits) for v in values[:count].reshape(-1, size).mean(axis=1)]

    return means(trace.time_s - zero, 3), means(trace.total(), 4)


def as_json(report: Report) -> bytes:
    """Return a report as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"


def load(path: Path) -> Report:
    """Read a report.

    Raises InputRefused, naming the file and the field, for a report that is missing, damaged or of another version.
    """
    content = files.read_regular_file(path, MAX_BYTES, remedy="expected a report of edge-ssm profile --json")
    try:
        version = msgspec.json.decode(content, type=_Version).version
        if version != VERSION:
            raise InputRefused(f"{path}: report version {version}, expected {VERSION}; measure again")
        return msgspec.json.decode(content, type=Report)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or too many digits
        raise InputRefused(f"{path}: not a report of edge-ssm profile --json ({error})") from None


def brevity_text(report: Report) -> str:
    """Return a warning about a report of fewer or shorter rounds than the default; empty for others."""
    if report.rounds >= ROUNDS and report.block_s >= BLOCK_S:
        return ""
    return (
        f"{'quick' if report.quick else 'short'}: {report.rounds} rounds of {report.block_s:g} s, fewer or shorter "
        f"than the default of {ROUNDS} rounds of {BLOCK_S:g} s; the intervals are wide, and slow effects are missed"
    )


def energy_text(energy: Energy | None) -> str:
    """Return an energy as text, in microjoules or millijoules."""
    if energy is None:
        return "not measured"
    unit, scale = ("mJ", 1e3) if energy.total >= 1e4 else ("uJ", 1.0)
    total, dynamic, low, high = (v / scale for v in (energy.total, energy.dynamic, energy.low, energy.high))
    if energy.below_resolution:
        return f"{total:.4g} {unit} total; beyond idling below resolution (under {max(high, 0):.3g} {unit})"
    return f"{total:.4g} {unit} total, {dynamic:.4g} beyond idling ({low:.4g} to {high:.4g})"


def percentile_texts(of: Percentiles) -> list[str]:
    """Return p50, p90, p99, p99.9 and the maximum as texts; "-" for None."""
    return ["-" if v is None else f"{v:.1f}" for v in (of.p50, of.p90, of.p99, of.p999, of.max)]


def render(report: Report) -> str:
    """Return a report as text."""
    lines = [*_head_lines(report), ""]
    lines.append(f"{'':34} {'p50':>9} {'p90':>9} {'p99':>9} {'p99.9':>9} {'max':>9}  us per call")
    for result in report.results:
        lines += _result_lines(result, report.meter is not None)
    lines.append("")
    if report.meter is None:
        lines.append(NOT_MEASURED)
    else:
        lines.append(f"power by {report.meter.name}: {report.meter.covers}; idle: {_power_text(report.idle_w)}")
    start_up = "" if report.start_up_s is None else f"; a run without samples takes {report.start_up_s:.2f} s"
    lines.append(f"resident {report.resident_mib:.0f} MiB{start_up}; load before the run {report.load_percent:.0f} %")
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"INVALID: {reason}" for reason in report.invalid_because]
    return "\n".join(sanitize(line) for line in lines)


def _head_lines(report: Report) -> list[str]:
    m = report.machine
    modes = [m.jetpack, m.power_mode and f"mode {m.power_mode}", m.governor and f"governor {m.governor}"]
    mode = "".join(f"; {text}" for text in [", ".join(filter(None, modes))] if text)
    brevity = f" ({'quick' if report.quick else 'short'})" if brevity_text(report) else ""
    return [
        f"{m.board}, {m.processor}, {m.cores} cores{mode}",
        f"{report.rounds} rounds of {report.block_s:g} s blocks{brevity}; samples: {report.samples_from}; "
        f"timing adds {report.timer_ns:.0f} ns to a call",
        *(f"model {model.path} ({model.digest[:12]})" for model in report.models),
    ]


def _result_lines(r: Result, has_meter: bool) -> list[str]:
    jitter = "" if r.jitter_us is None else f", jitter {r.jitter_us:.1f} us"
    lines = [
        f"{r.name:34} {' '.join(f'{value:>9}' for value in percentile_texts(r.latency_us))}",
        f"    {r.samples_per_s:.0f} samples/s, {r.cpu_percent:.0f} % of a core{jitter}",
    ]
    if r.late_us is not None and r.deadline_us is not None:
        p99 = "" if r.late_us.p99 is None else f"p99 {r.late_us.p99:.1f}, "
        lines.append(
            f"    output after the sample was due: p50 {r.late_us.p50:.1f}, {p99}max {r.late_us.max:.1f} us; "
            f"{r.deadline_misses} later than the deadline of {r.deadline_us:.0f} us"
        )
    if has_meter:
        lines += [
            f"    energy per sample: {energy_text(r.energy_per_step_uj)}",
            f"    power: {_power_text(r.power_w)}",
        ]
    return lines


def _power_text(watts_by_rail: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {watts:.3f} W" for name, watts in watts_by_rail.items()) or "not measured"
