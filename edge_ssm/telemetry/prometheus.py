"""Prometheus metrics of a run (prometheus.io/docs/practices/naming), read when somebody scrapes: the loop
counts nothing twice and pays nothing. ``docs/observing.md`` is their table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from edge_ssm import __version__
from edge_ssm.errors import UsageError
from edge_ssm.telemetry.publisher import StatusPublisher
from edge_ssm.telemetry.status import Status

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EDGES_NS = (
    *(edge for k in range(10, 20) for edge in ((1 << k) - 1, (3 << k - 1) - 1)),
    *((1 << k) - 1 for k in range(20, 31)),
)
"""Of the step's histogram: 1 us to 1 s, two in every power of two up to 1 ms, then one. They are edges of
``LatencyHistogram``'s own buckets, so that every count is exact."""
GAPS = ("lost", "missing", "out_of_range", "stopped")
DROPPED = ("discarded", "late", "malformed", "repeated", "unread")
"""Reasons that are shown from the start, as 0: Prometheus does not see the first increase of a series that appears."""


def require() -> None:
    """Raises UsageError where prometheus-client is missing."""
    if find_spec("prometheus_client") is None:
        raise UsageError("metrics: package prometheus-client is missing; pip install 'edge-ssm[metrics]'")


class Metrics:
    """What ``/metrics`` answers for one run. Raises UsageError where prometheus-client is missing."""

    def __init__(self, live: StatusPublisher) -> None:
        require()
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._live = live
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """One scrape, in Prometheus' text format 0.0.4. From any thread."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: registering must not scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        status = self._live.status()

        def counters(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
            family = CounterMetricFamily(name, text, labels=[label])
            for value, n in sorted(values.items()):
                family.add_metric([_utf8(value)], n)
            return family

        yield CounterMetricFamily("edge_ssm_samples", "Samples taken in, gaps among them.", value=status.samples)
        yield counters("edge_ssm_decisions", "Decisions, by label; no label: values.", "label", self._decisions(status))
        gaps = dict.fromkeys(GAPS, 0) | status.gaps
        yield counters("edge_ssm_gaps", "Samples that had to be filled, skipped or given up.", "reason", gaps)
        dropped = dict.fromkeys(DROPPED, 0) | status.dropped
        yield counters(
            "edge_ssm_dropped", "Input that was not used, or (output_*) decisions not handed on.", "reason", dropped
        )
        for name, text, n in (
            ("deadline_misses", "Decisions later than the budget allows.", status.deadline_misses),
            ("resets", "Times the state was set to zero by a gap or by outputs that are not finite.", status.resets),
            ("undecided", "Windows that ended without a decision.", status.undecided),
            ("reconnects", "Connections of the source made anew.", status.reconnects),
            ("reloads", "Artifacts taken in while running.", status.reloads),
            ("reload_failures", "Artifacts that were refused while running.", status.reload_failures),
            ("engine_losses", "Engines that failed; another one took over.", status.engine_losses),
            ("moves", "Changes between members of a family.", status.moves),
        ):
            yield CounterMetricFamily(f"edge_ssm_{name}", text, value=n)

        latency = self._live.latency()
        within, count = latency.cumulative(EDGES_NS)
        yield HistogramMetricFamily(
            "edge_ssm_step_seconds",
            "Time of the engine's calls: a step, or a chunk of samples.",
            buckets=[*((repr(edge / 1e9), n) for edge, n in zip(EDGES_NS, within, strict=True)), ("+Inf", count)],
            sum_value=latency.sum_ns / 1e9,
        )
        for name, text, value in (
            (
                "output_queue_lines",
                "Lines that wait for a slow reader of decisions, those being sent among them.",
                status.queue,
            ),
            (
                "output_queue_limit_lines",
                "Lines that may wait, beside 64 being sent; 0: none ever does.",
                status.queue_size,
            ),
            ("sample_rate_hertz", "Samples a second that the source is said to have.", status.sample_rate_hz),
            ("power_watts", "Drawn by the board, as its meter covers it.", status.power_w),
            ("temperature_celsius", "Of the hottest zone.", status.temperature_c),
            ("snapshot_age_seconds", "Since the state was last saved.", status.snapshot_age_s),
            ("source_up", "1 while samples come; 0: none came yet, or none for too long.", _up(status)),
            ("ready", "1 once model and source are there.", int(status.ready)),
            ("loop_age_seconds", "Since the loop last went round: it is stuck where this grows.", status.loop_age_s),
        ):
            if value is not None:  # What was not measured is absent, never 0.
                yield GaugeMetricFamily(f"edge_ssm_{name}", text, value=value)
        yield _info("build_info", "The program that runs.", {"version": __version__})
        yield _info(
            "model_info",
            "What runs.",
            {
                "model": status.model,
                "digest": status.model_digest,
                "engine": status.engine,
                "profile": status.profile or "",
            },
        )

    def _decisions(self, status: Status) -> Mapping[str, int]:
        recent = self._live.recent()
        if recent and recent[-1].label is None:  # A regression has values, no labels.
            return {"": status.decisions}
        return status.labels


def _up(status: Status) -> int:
    return int(status.source_state == "flowing")


def _info(name: str, text: str, facts: Mapping[str, str]) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"edge_ssm_{name}", text, labels=list(facts))
    family.add_metric([_utf8(fact) for fact in facts.values()], 1)
    return family


def _utf8(text: str) -> str:
    """File names may hold bytes that are no text, which Python keeps as lone surrogates: they can't be sent."""
    return text.encode("utf-8", "replace").decode()
