"""Two reports side by side, with a verdict that says no more than their intervals do."""

from __future__ import annotations

from edge_ssm.monitor.energy import Energy
from edge_ssm.monitor.report import Report, Result


def compare(a: Report, b: Report) -> str:
    """For people. Results are matched by what they did; the second is said against the first."""
    lines = []
    for report, name in ((a, "A"), (b, "B")):
        m = report.machine
        mode = f", mode {m.power_mode}" if m.power_mode else ""
        lines.append(f"{name}: {m.board}{mode}, {', '.join(x.path for x in report.models)}, {report.created}")
        lines += [f"   INVALID: {why}" for why in report.invalid_because]
        if report.quick:
            lines.append("   quick: intervals of few, short rounds")
    if a.machine != b.machine:
        lines.append("the machines differ, or what runs on them")
    if a.meter and b.meter and (a.meter.name, a.meter.covers) != (b.meter.name, b.meter.covers):
        lines.append(f"the meters differ: {a.meter.name} ({a.meter.covers}), {b.meter.name} ({b.meter.covers})")
    pairs = _pairs(a, b)
    for ours, theirs in pairs:
        lines += ["", ours.name if ours.name == theirs.name else f"{ours.name} / {theirs.name}"]
        lines.append("  latency " + _latency(ours, theirs))
        lines.append("  energy  " + _energy(ours.energy_per_step_uj, theirs.energy_per_step_uj))
    if not pairs:
        lines += ["", "nothing to compare: no result of A has its like in B"]
    if not (a.valid and b.valid):
        lines += ["", "verdict: none, for a run that is invalid"]
    return "\n".join(lines)


def _pairs(a: Report, b: Report) -> list[tuple[Result, Result]]:
    by_name = {result.name: result for result in b.results}
    found = [(result, by_name[result.name]) for result in a.results if result.name in by_name]
    if not found and len(a.results) == len(b.results):
        # Other engines or models, in the same order of activities.
        like = [(x, y) for x, y in zip(a.results, b.results, strict=True)]
        found = [(x, y) for x, y in like if (x.chunk, x.lanes, x.paced_hz) == (y.chunk, y.lanes, y.paced_hz)]
    return found


def _verdict(a: tuple[float, float, float], b: tuple[float, float, float], better: str) -> str:
    """Of (value, low, high) each: a difference is one where the intervals do not meet."""
    if a[2] < b[1] or b[2] < a[1]:
        ratio = b[0] / a[0] if a[0] else float("inf")
        return f"B is {ratio:.3g} of A: {better if b[0] < a[0] else 'worse'}"
    return "no difference that these runs can tell"


def _latency(a: Result, b: Result) -> str:
    x = a.latency_us.p50, a.latency_low_us, a.latency_high_us
    y = b.latency_us.p50, b.latency_low_us, b.latency_high_us
    return f"A {x[0]:.2f} us ({x[1]:.2f} to {x[2]:.2f}), B {y[0]:.2f} us ({y[1]:.2f} to {y[2]:.2f}): " + _verdict(
        x, y, "faster"
    )


def _energy(a: Energy | None, b: Energy | None) -> str:
    if a is None or b is None:
        return "not measured in " + ("both" if a is b else "A" if a is None else "B")
    if a.below_resolution and b.below_resolution:
        return "below resolution in both"
    shown = ", ".join(f"{n} {e.dynamic:.4g} uJ ({e.low:.4g} to {e.high:.4g})" for n, e in (("A", a), ("B", b)))
    x, y = (a.dynamic, a.low, a.high), (b.dynamic, b.low, b.high)
    return f"beyond idling: {shown}: " + _verdict(x, y, "thriftier")
