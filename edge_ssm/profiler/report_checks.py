"""Whether a report that was read can be what a measurement gave: an edited or damaged one must not win a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from edge_ssm.profiler.energy import Energy
from edge_ssm.profiler.report import Percentiles, Report, Result

LARGEST = 1e15
"""Of any figure, whatever its unit: a call of thirty years, samples of a hundred days at a million lanes a second."""
OUTSIDE = 2.0
"""How far, as a factor, a median of all calls may lie from the interval over rounds: version 1 did not hold it within,
and where rounds fall into two groups it can be outside."""
TOLERANCE = 1e-9
Find = Iterator[tuple[str, str]]
"""(field, what is wrong with it)."""


def shown(number: float) -> str:
    """Short, for a whole number of any length too, which no float need hold."""
    try:
        return f"{number:g}"
    except OverflowError:
        return f"a number of {len(str(number).lstrip('-'))} digits"


def problem(report: Report) -> str:
    """The first field that can't be, and why; empty if there is none."""
    for check in _CHECKS:
        for field, why in check(report):
            return f"{field}: {why}"
    return ""


def _numbers(report: Report) -> Find:
    def walk(value: object, at: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(inner, f"{at}.{key}" if at else str(key))
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                yield from walk(inner, f"{at}[{i}]")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield at, value

    for at, number in walk(msgspec.to_builtins(report), ""):
        if at != "seed" and not abs(number) <= LARGEST:
            yield at, f"{shown(number)} is beyond any machine"


def _head(report: Report) -> Find:
    if not report.models:
        yield "models", "empty"
    for name in ("rounds", "block_s"):
        if getattr(report, name) <= 0:
            yield name, f"{getattr(report, name):g}, expected more than 0"
    for name in ("timer_ns", "resident_mib", "load_percent", "start_up_s", "gpu_mhz", "fan_rpm"):
        if (value := getattr(report, name)) is not None and value < 0:
            yield name, f"{value:g} is negative"
    if report.valid and report.invalid_because:
        yield "valid", "true, but invalid_because says why not"
    yield from _percentiles(report.latency_us, "latency_us")
    if (meter := report.meter) is not None:
        if meter.resolution_w < 0:
            yield "meter.resolution_w", f"{meter.resolution_w:g} is negative"
        if meter.period_s <= 0:
            yield "meter.period_s", f"{meter.period_s:g}, expected more than 0"


def _results(report: Report) -> Find:
    seen: set[str] = set()
    for i, result in enumerate(report.results):
        at = f"results[{i}]"
        if result.name in seen:
            yield f"{at}.name", f"{result.name!r} is there twice"
        seen.add(result.name)
        yield from ((f"{at}.{field}", why) for field, why in _result(result))
        if result.energy_per_step_uj is not None:
            yield from _energy(result.energy_per_step_uj, f"{at}.energy_per_step_uj")


def _result(r: Result) -> Find:
    for name in ("chunk", "lanes", "samples", "samples_per_s", "paced_hz", "deadline_us"):
        if (value := getattr(r, name)) is not None and value <= 0:
            yield name, f"{value:g}, expected more than 0"
    yield from _percentiles(r.latency_us, "latency_us")
    if r.late_us is not None:
        yield from _percentiles(r.late_us, "late_us", may_be_zero=True)
    if r.latency_low_us < 0:
        yield "latency_low_us", f"{r.latency_low_us:g} is negative"
    if r.latency_low_us > r.latency_high_us:
        yield "latency_low_us", f"{r.latency_low_us:g} is above latency_high_us, {r.latency_high_us:g}"
    if not r.latency_low_us / OUTSIDE <= r.latency_us.p50 <= r.latency_high_us * OUTSIDE:
        interval = f"{r.latency_low_us:g} to {r.latency_high_us:g}"
        yield "latency_us.p50", f"{r.latency_us.p50:g} is far outside its interval, {interval}"
    for name in ("jitter_us", "cpu_percent", "deadline_misses"):
        if (value := getattr(r, name)) is not None and value < 0:
            yield name, f"{value:g} is negative"
    if (r.deadline_us is None) != (r.deadline_misses is None):
        yield "deadline_misses", "goes with deadline_us: both or neither"
    calls = sum(count for _, count in r.histogram)
    if calls * r.chunk * r.lanes != r.samples or any(count < 1 for _, count in r.histogram):
        yield "histogram", f"holds {calls} calls, which make other than the {r.samples} samples"
    if r.deadline_misses is not None and r.deadline_misses > calls:
        yield "deadline_misses", f"{r.deadline_misses} of {calls} calls"


def _percentiles(of: Percentiles, at: str, may_be_zero: bool = False) -> Find:
    before, below = "", 0.0
    for name in ("p50", "p90", "p99", "p999", "max"):
        value = getattr(of, name)
        if value is None:
            continue
        if value < 0 or (value == 0 and not may_be_zero):
            yield f"{at}.{name}", f"{value:g}, expected more than 0"
        if value < below:
            yield f"{at}.{name}", f"{value:g} is below {before}, {below:g}"
        before, below = name, value


def _energy(e: Energy, at: str) -> Find:
    for low, value, high in (("low", "dynamic", "high"), ("total_low", "total", "total_high")):
        bounds = getattr(e, low), getattr(e, value), getattr(e, high)
        slack = TOLERANCE * max(map(abs, bounds))
        if bounds[0] > bounds[2]:
            yield f"{at}.{low}", f"{bounds[0]:g} is above {high}, {bounds[2]:g}"
        if not bounds[0] - slack <= bounds[1] <= bounds[2] + slack:
            yield f"{at}.{value}", f"{bounds[1]:g} is outside its interval, {bounds[0]:g} to {bounds[2]:g}"
    if e.total < 0:
        yield f"{at}.total", f"{e.total:g} is negative"
    if e.below_resolution != (e.low <= 0):
        yield f"{at}.below_resolution", f"{str(e.below_resolution).lower()}, but low is {e.low:g}"
    if e.rounds < 2:
        yield f"{at}.rounds", f"{e.rounds}, an interval needs 2"


_CHECKS: tuple[Callable[[Report], Find], ...] = (_numbers, _head, _results)
