"""Comparison of two reports, with a verdict that claims no more than two runs at different times can show.

The interval in a report is over the rounds of one run. It cannot contain what all of these rounds have in common, such
as where memory was allocated, the room temperature and other processes, and what differs the next time. A difference
must therefore meet two conditions: the intervals do not overlap, and it is larger than ``RUN_TO_RUN``.
"""

from __future__ import annotations

from edge_ssm.profiler.energy import Energy
from edge_ssm.profiler.report import Report, Result, brevity_text
from edge_ssm.text import sanitize

RUN_TO_RUN = 0.1
"""Relative difference of medians between runs of the same work (measured in docs/profile.md)."""
Interval = tuple[float, float, float]
"""A value, and the ends of its 95 % confidence interval."""


def compare(a: Report, b: Report) -> str:
    """Return a comparison of two reports as text. Results are matched by name; B is stated relative to A."""
    lines = []
    for report, name in ((a, "A"), (b, "B")):
        m = report.machine
        mode = f", mode {m.power_mode}" if m.power_mode else ""
        lines.append(f"{name}: {m.board}{mode}, {', '.join(x.path for x in report.models)}, {report.created}")
        lines += [f"   INVALID: {reason}" for reason in _reasons(report)]
        if brevity := brevity_text(report):
            lines.append(f"   {brevity}")
    lines += _differences(a, b)
    invalid = [f"{name} ({'; '.join(_reasons(r))})" for name, r in (("A", a), ("B", b)) if _reasons(r)]
    pairs = _pairs(a, b)
    for x, y in pairs:
        lines += ["", x.name if x.name == y.name else f"{x.name} / {y.name}"]
        lines.append("  latency " + _latency(x, y, not invalid))
        lines.append("  energy  " + _energy(x.energy_per_step_uj, y.energy_per_step_uj, not invalid))
    if not pairs:
        lines += ["", "nothing to compare: no result of A matches a result of B"]
    if invalid:
        lines += ["", f"verdict: none, because a run is invalid: {' and '.join(invalid)}"]
    return "\n".join(sanitize(line) for line in lines)


def _reasons(report: Report) -> list[str]:
    """Return why a report is invalid; empty if it is valid."""
    return [] if report.valid else report.invalid_because or ["no reason given"]


def _differences(a: Report, b: Report) -> list[str]:
    """Describe the differences in the conditions of the two measurements."""
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
    """Match the results by name; if no name matches, by position, since the engines or models may differ."""
    by_name = {result.name: result for result in b.results}
    pairs = [(result, by_name[result.name]) for result in a.results if result.name in by_name]
    if not pairs and len(a.results) == len(b.results):
        same_position = zip(a.results, b.results, strict=True)
        pairs = [(x, y) for x, y in same_position if (x.chunk, x.lanes, x.paced_hz) == (y.chunk, y.lanes, y.paced_hz)]
    return pairs


def _verdict(a: Interval, b: Interval, better: str) -> str:
    """State whether B differs from A; ``better`` is the word for a smaller value."""
    if b[1] <= a[2] and a[1] <= b[2]:
        return "no difference that these runs can show"
    word = better if b[0] < a[0] else "worse"
    if a[0] <= 0 or b[0] <= 0:
        return f"B is {word}"
    if max(a[0], b[0]) <= (1 + RUN_TO_RUN) * min(a[0], b[0]):
        return (
            f"B is {b[0] / a[0]:.3g} of A: runs at different times differ by that much (up to {100 * RUN_TO_RUN:.0f} "
            "%) without a cause; measure both in one run to tell"
        )
    return f"B is {b[0] / a[0]:.3g} of A: {word}"


def _latency(a: Result, b: Result, has_verdict: bool) -> str:
    x, y = ((r.latency_us.p50, r.latency_low_us, r.latency_high_us) for r in (a, b))
    text = f"A {x[0]:.2f} us ({x[1]:.2f} to {x[2]:.2f}), B {y[0]:.2f} us ({y[1]:.2f} to {y[2]:.2f})"
    return f"{text}: {_verdict(x, y, 'faster')}" if has_verdict else text


def _energy(a: Energy | None, b: Energy | None, has_verdict: bool) -> str:
    if a is None or b is None:
        return "not measured in " + ("both" if a is b else "A" if a is None else "B")
    if a.below_resolution and b.below_resolution:
        return "below resolution in both"
    text = ", ".join(f"{n} {e.dynamic:.4g} uJ ({e.low:.4g} to {e.high:.4g})" for n, e in (("A", a), ("B", b)))
    x, y = (a.dynamic, a.low, a.high), (b.dynamic, b.low, b.high)
    return f"beyond idling: {text}" + (f": {_verdict(x, y, 'thriftier')}" if has_verdict else "")
