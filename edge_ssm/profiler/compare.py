"""Two reports side by side, with a verdict that says no more than two runs at different times can.

A report's interval is over the rounds of one run. What all its rounds share - where memory came to lie, how warm the
room was, what else ran - is in none of it, and differs the next time. So two things are asked of a difference before
it is called one: the intervals do not meet, and it is larger than ``RUN_TO_RUN``.
"""

from __future__ import annotations

from edge_ssm.histogram import RESOLUTION
from edge_ssm.profiler.energy import Energy
from edge_ssm.profiler.report import Report, Result, short
from edge_ssm.text import sanitize

RUN_TO_RUN = 0.1
"""Share that medians of the same work differ by from run to run (docs/profile.md has the measurement)."""
Interval = tuple[float, float, float]
"""A value, and what bounds it with 95 % confidence."""


def compare(a: Report, b: Report) -> str:
    """For people. Results are matched by what they did; the second is said against the first."""
    lines = []
    for report, name in ((a, "A"), (b, "B")):
        m = report.machine
        mode = f", mode {m.power_mode}" if m.power_mode else ""
        lines.append(f"{name}: {m.board}{mode}, {', '.join(x.path for x in report.models)}, {report.created}")
        lines += [f"   INVALID: {why}" for why in _why_invalid(report)]
        if cut := short(report):
            lines.append(f"   {cut}")
    lines += _differences(a, b)
    invalid = [f"{name} ({'; '.join(why)})" for name, why in (("A", _why_invalid(a)), ("B", _why_invalid(b))) if why]
    pairs = _pairs(a, b)
    for ours, theirs in pairs:
        lines += ["", ours.name if ours.name == theirs.name else f"{ours.name} / {theirs.name}"]
        lines.append("  latency " + _latency(ours, theirs, not invalid))
        lines.append("  energy  " + _energy(ours.energy_per_step_uj, theirs.energy_per_step_uj, not invalid))
    if not pairs:
        lines += ["", "nothing to compare: no result of A has its like in B"]
    if invalid:
        lines += ["", f"verdict: none, for a run that is invalid: {' and '.join(invalid)}"]
    return "\n".join(sanitize(line) for line in lines)


def _why_invalid(report: Report) -> list[str]:
    return [] if report.valid else report.invalid_because or ["no reason given"]


def _differences(a: Report, b: Report) -> list[str]:
    """Besides what is compared."""
    lines = []
    if a.machine != b.machine:
        lines.append("the machines differ, or what runs on them")
    if a.edge_ssm != b.edge_ssm:
        lines.append(f"the versions of edge-ssm differ: {a.edge_ssm}, {b.edge_ssm}")
    models = [", ".join(f"{x.path} ({x.digest[:12]})" for x in report.models) for report in (a, b)]
    if [x.digest for x in a.models] != [x.digest for x in b.models]:
        lines.append(f"the models differ: A {models[0]}, B {models[1]}")
    if a.samples_from != b.samples_from:
        lines.append(f"the inputs differ: A {a.samples_from}, B {b.samples_from}")
    if (a.rounds, a.block_s) != (b.rounds, b.block_s):
        lines.append(f"the rounds differ: A {a.rounds} of {a.block_s:g} s, B {b.rounds} of {b.block_s:g} s")
    if a.meter and b.meter and (a.meter.name, a.meter.covers) != (b.meter.name, b.meter.covers):
        lines.append(f"the meters differ: {a.meter.name} ({a.meter.covers}), {b.meter.name} ({b.meter.covers})")
    return lines


def _pairs(a: Report, b: Report) -> list[tuple[Result, Result]]:
    by_name = {result.name: result for result in b.results}
    found = [(result, by_name[result.name]) for result in a.results if result.name in by_name]
    if not found and len(a.results) == len(b.results):
        # Other engines or models, in the same order of activities.
        like = [(x, y) for x, y in zip(a.results, b.results, strict=True)]
        found = [(x, y) for x, y in like if (x.chunk, x.lanes, x.paced_hz) == (y.chunk, y.lanes, y.paced_hz)]
    return found


def _verdict(a: Interval, b: Interval, better: str) -> str:
    """A difference is one where the intervals do not meet and runs of the same work do not differ by as much."""
    if b[1] <= a[2] and a[1] <= b[2]:
        return "no difference that these runs can tell"
    if a[0] <= 0 or b[0] <= 0:
        return f"B is {better if b[0] < a[0] else 'worse'}"
    ratio = b[0] / a[0]
    if max(ratio, 1 / ratio) <= 1 + RUN_TO_RUN:
        return (
            f"B is {ratio:.3g} of A: runs at different times differ by that much (up to {100 * RUN_TO_RUN:.0f} %) "
            "without a cause; measure both in one run to tell"
        )
    return f"B is {ratio:.3g} of A: {better if ratio < 1 else 'worse'}"


def _latency(a: Result, b: Result, judge: bool) -> str:
    def interval(r: Result) -> Interval:
        """At least as wide as the histogram's resolution, which reports of version 1 left out."""
        p50 = r.latency_us.p50
        return (
            p50,
            min(r.latency_low_us, p50 * (1 - RESOLUTION)),
            max(r.latency_high_us, p50 * (1 + RESOLUTION)),
        )

    x, y = interval(a), interval(b)
    shown = f"A {x[0]:.2f} us ({x[1]:.2f} to {x[2]:.2f}), B {y[0]:.2f} us ({y[1]:.2f} to {y[2]:.2f})"
    return f"{shown}: {_verdict(x, y, 'faster')}" if judge else shown


def _energy(a: Energy | None, b: Energy | None, judge: bool) -> str:
    if a is None or b is None:
        return "not measured in " + ("both" if a is b else "A" if a is None else "B")
    if a.below_resolution and b.below_resolution:
        return "below resolution in both"
    shown = ", ".join(f"{n} {e.dynamic:.4g} uJ ({e.low:.4g} to {e.high:.4g})" for n, e in (("A", a), ("B", b)))
    x, y = (a.dynamic, a.low, a.high), (b.dynamic, b.low, b.high)
    return f"beyond idling: {shown}" + (f": {_verdict(x, y, 'thriftier')}" if judge else "")
