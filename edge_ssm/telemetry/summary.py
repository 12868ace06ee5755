"""The summary that ``edge-ssm run`` prints at the end of a run."""

from __future__ import annotations

from edge_ssm.model.network import Network
from edge_ssm.runtime.counters import DECLARATIONS, Counters, Phrase

ALWAYS = ("samples", "decisions")
"""Lines that are shown even if all of their counts are 0."""


def summary(counters: Counters, network: Network, engine: str, chunk: int = 1) -> str:
    """Return the summary of a run, one fact or group of facts per line.

    ``network`` is the one that ran last; ``engine`` describes the engine, and ``chunk`` is the number of samples that
    it stepped per call.
    """
    lines = [f"ended by {counters.ended_by}; engine {engine}", *_counts(counters)]
    latency = counters.latency
    if latency.count:
        p50, p99, longest = (latency.percentile_ns(p) / 1e3 for p in (50, 99, 100))
        speed = (counters.samples - counters.earlier) / counters.seconds
        hz = network.input.sample_rate_hz
        real_time = f", {speed / hz:.3g} times real time" if hz else ""
        times = f"p50 {p50:.1f} us, p99 {p99:.1f} us, max {longest:.1f} us"
        lines.append(_line("step" if chunk == 1 else f"chunk {chunk}", f"{times}; {speed:.0f} samples/s{real_time}"))
    if counters.labelled:
        share = f"{100 * counters.correct / counters.labelled:.1f} %"
        equal = f"{counters.correct} of {counters.labelled} decisions equal the true label"
        lines.append(_line("accuracy", f"{equal} ({share})"))
    return "\n".join(lines)


def _counts(counters: Counters) -> list[str]:
    """Return the lines of the declared counters (``Declaration.summary``)."""
    texts: dict[str, str] = {}
    shown = set(ALWAYS)
    for declaration in DECLARATIONS:
        if declaration.summary is None:
            continue
        line, value = declaration.summary.line, getattr(counters, declaration.name)
        texts[line] = texts.get(line, "") + _phrase(declaration.summary, value)
        if value:
            shown.add(line)
    return [_line(line, text) for line, text in texts.items() if line in shown]


def _phrase(phrase: Phrase, value: int | dict[str, int]) -> str:
    if phrase.is_optional and not value:
        return ""
    if isinstance(value, int):
        return phrase.text.format(value)
    return phrase.text.format(", ".join(f"{n} {reason}" for reason, n in sorted(value.items())) or phrase.zero)


def _line(head: str, text: str) -> str:
    return f"{head:<9} {text}"
