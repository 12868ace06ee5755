"""The page of text that ``edge-ssm top`` shows: this machine's power and temperature, and the runs on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from edge_ssm.errors import MeterLost
from edge_ssm.hardware import machine
from edge_ssm.hardware.boards import power_mode
from edge_ssm.hardware.meters.base import Meter
from edge_ssm.runtime.counters import PUBLISHED
from edge_ssm.telemetry.publisher import MAX_EVENTS
from edge_ssm.telemetry.status import Status
from edge_ssm.text import sanitize

STALE_S = 5.0
"""Age of a status from which on the page points it out."""
MAX_LABELS = 8
BAR = 30
"""Characters of the longest bar."""


def page(statuses: Sequence[Status], meter: Meter | None, now: Callable[[], float] = time.time) -> str:
    """Return the page; ``now`` returns seconds since the epoch."""
    celsius = ", ".join(f"{zone} {value:.1f} C" for zone, value in machine.temperatures().items())
    lines = [f"power        {_power(meter)}", f"temperature  {celsius or 'no thermometer'}"]
    if mode := power_mode():
        lines.append(f"power mode   {mode}")
    if not statuses:
        lines += ["", "no run is visible here; start one with edge-ssm run MODEL --stream"]
    for status in statuses:
        lines += ["", *_run(status, now())]
    # Names and events come from elsewhere: a line break in one must not start a line of its own.
    return "\n".join(sanitize(line) for line in lines)


def _power(meter: Meter | None) -> str:
    if meter is None:
        return "not measured (no sensor; see edge-ssm doctor)"
    try:
        reading = meter.read()
    except MeterLost as error:
        return str(error)
    if reading is None:
        return "..."
    rails = ", ".join(f"{rail.name} {watts:.2f}" for rail, watts in zip(meter.rails, reading.watts, strict=True))
    return f"{meter.total_w(reading):.2f} W, {meter.covers} ({rails})"


def _run(status: Status, now: float) -> Iterator[str]:
    """Yield the lines about one run."""
    age = max(0.0, now - status.updated)
    stale = f"   NOT UPDATED for {age:.0f} s" if age > STALE_S else ""
    uptime = _duration(max(0.0, now - status.started))
    yield f"{status.model}   pid {status.pid}, engine {status.engine}, up {uptime}{stale}"
    rate = "" if status.sample_rate_hz is None else f" of {status.sample_rate_hz:g}"
    gaps = sum(status.gaps.values())
    yield f"  samples    {status.samples} ({status.samples_per_s:.0f}{rate} a second), {gaps} gaps"
    yield f"  decisions  {status.decisions} ({_decision_rate(status)} a second), last {status.last or '-'}"
    times = f"p50 {status.step_p50_us:.1f} us, p99 {status.step_p99_us:.1f} us, max {status.step_max_us:.1f} us"
    yield f"  step       {times}"
    dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(status.dropped.items()))
    yield f"  dropped    {dropped or 'nothing'}"
    if incidents := _incidents(status):
        yield f"  incidents  {incidents}"
    yield f"  source     {status.source} ({status.source_state})" + (
        f", waiting {status.queue}" if status.queue else ""
    )
    most = max([1, *status.labels.values()])
    for label, count in sorted(status.labels.items(), key=lambda item: -item[1])[:MAX_LABELS]:
        yield f"  {sanitize(label, 20):20} {count:8} {'#' * round(BAR * count / most)}"
    for event in status.events[-MAX_EVENTS:]:
        yield f"  event      {event}"


def _incidents(status: Status) -> str:
    """Return the counters that have a row on the status page and are not 0."""
    counts = {each.row: getattr(status, each.name) for each in PUBLISHED if each.row and each.reasons is None}
    return ", ".join(f"{row} {n}" for row, n in counts.items() if n)


def _decision_rate(status: Status) -> str:
    """Return decisions per second over the last minute, or over the whole run if there was none in that minute."""
    since_start = status.decisions / max(status.updated - status.started, 1.0)
    return f"{status.decisions_per_s or since_start:.2g}"


def _duration(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
