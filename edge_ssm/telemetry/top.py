"""``edge-ssm top``: the runs on this machine, its power and its temperature, as a page of text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from edge_ssm.errors import MeterLost
from edge_ssm.hardware import machine
from edge_ssm.hardware.boards import power_mode
from edge_ssm.hardware.meters.base import Meter
from edge_ssm.telemetry.publisher import EVENTS
from edge_ssm.telemetry.status import Status
from edge_ssm.text import sanitize

STALE_S = 5.0
BAR = 30


def power_line(meter: Meter | None) -> str:
    if meter is None:
        return "power        not measured (no sensor; see edge-ssm doctor)"
    try:
        reading = meter.read()
    except MeterLost as error:
        return f"power        {error}"
    if reading is None:
        return "power        ..."
    by_rail = {rail.name: watts for rail, watts in zip(meter.rails, reading.watts, strict=True)}
    total = sum(by_rail[name] for name in meter.total)
    rails = ", ".join(f"{name} {watts:.2f}" for name, watts in by_rail.items())
    return f"power        {total:.2f} W, {meter.covers} ({rails})"


def page(statuses: Sequence[Status], meter: Meter | None, now: Callable[[], float] = time.time) -> str:
    zones = machine.temperatures()
    mode = power_mode()
    lines = [power_line(meter)]
    celsius = ", ".join(f"{zone} {value:.1f} C" for zone, value in zones.items())
    lines.append(f"temperature  {celsius or 'no thermometer'}")
    if mode:
        lines.append(f"power mode   {mode}")
    if not statuses:
        lines += ["", "nothing runs here that could be seen; start edge-ssm run MODEL --stream"]
    for s in statuses:
        age = max(0.0, now() - s.updated)
        stale = f"   NOTHING NEW for {age:.0f} s" if age > STALE_S else ""
        lines += ["", f"{s.model}   pid {s.pid}, engine {s.engine}, up {_span(max(0.0, now() - s.started))}{stale}"]
        rate = "" if s.sample_rate_hz is None else f" of {s.sample_rate_hz:g}"
        lines.append(f"  samples    {s.samples} ({s.samples_per_s:.0f}{rate} a second), {sum(s.gaps.values())} gaps")
        lines.append(f"  decisions  {s.decisions} ({_rate(s)} a second), last {s.last or '-'}")
        lines.append(f"  step       p50 {s.step_p50_us:.1f} us, p99 {s.step_p99_us:.1f} us, max {s.step_max_us:.1f} us")
        dropped = ", ".join(f"{n} {reason}" for reason, n in sorted(s.dropped.items()))
        lines.append(f"  dropped    {dropped or 'nothing'}; resets {s.resets}, late decisions {s.deadline_misses}")
        lines.append(f"  source     {s.source} ({s.source_state})" + (f", waiting {s.queue}" if s.queue else ""))
        most = max([1, *s.labels.values()])
        for label, count in sorted(s.labels.items(), key=lambda item: -item[1])[:8]:
            lines.append(f"  {sanitize(label, 20):20} {count:8} {'#' * round(BAR * count / most)}")
        lines += [f"  event      {event}" for event in s.events[-EVENTS:]]
    # Names and events are other people's text: a newline in one must not make a line of its own.
    return "\n".join(sanitize(line) for line in lines)


def _rate(s: Status) -> str:
    """Decisions a second: over the last minute, or of the whole run where none fell into that."""
    since_start = s.decisions / max(s.updated - s.started, 1.0)
    return f"{s.decisions_per_s or since_start:.2g}"


def _span(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
