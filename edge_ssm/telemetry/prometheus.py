"""Prometheus metrics of a run, collected when they are scraped, so that they cost the pipeline nothing.

Names follow prometheus.io/docs/practices/naming; ``docs/observing.md`` lists them. The counters' metrics are derived
from their declarations (``runtime.counters``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from edge_ssm import __version__
from edge_ssm.errors import UsageError
from edge_ssm.histogram import LatencyHistogram
from edge_ssm.runtime.counters import PUBLISHED
from edge_ssm.telemetry.publisher import StatusPublisher
from edge_ssm.telemetry.status import Status

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EDGES_NS = (
    *(edge for k in range(10, 20) for edge in ((1 << k) - 1, (3 << k - 1) - 1)),
    *((1 << k) - 1 for k in range(20, 31)),
)
"""Bucket edges of the step histogram, from 1 us to 1 s: two per power of two up to 1 ms, then one. They are edges of
``LatencyHistogram`` too, so that every count is exact."""


def require() -> None:
    """Raise UsageError if prometheus-client is not installed."""
    if find_spec("prometheus_client") is None:
        raise UsageError("metrics: package prometheus-client is missing; pip install 'edge-ssm[metrics]'")


class Metrics:
    """The content of ``/metrics`` for one run. Raises UsageError if prometheus-client is not installed."""

    def __init__(self, publisher: StatusPublisher) -> None:
        require()
        from prometheus_client import CollectorRegistry, ProcessCollector

        self._publisher = publisher
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """Return one scrape in Prometheus' text format 0.0.4. May be called from any thread."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Return nothing, so that registration does not scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics but those of the process (the interface of prometheus-client's collectors)."""
        status = self._publisher.status()
        yield from self._counters(status)
        yield _histogram(self._publisher.latency())
        yield from _gauges(status)
        yield _info("build_info", "The program that runs.", {"version": __version__})
        labels = {
            "model": status.model,
            "digest": status.model_digest,
            "engine": status.engine,
            "profile": status.profile or "",
        }
        yield _info("model_info", "What runs.", labels)

    def _counters(self, status: Status) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily

        for declaration in PUBLISHED:
            name, value = f"edge_ssm_{declaration.name}", getattr(status, declaration.name)
            label = "reason"
            if declaration.name == "decisions":
                label, value = "label", self._by_label(status)
            elif declaration.reasons is not None:
                value = dict.fromkeys(declaration.reasons, 0) | value
            if not isinstance(value, dict):
                yield CounterMetricFamily(name, declaration.help, value=value)
                continue
            family = CounterMetricFamily(name, declaration.help, labels=[label])
            for part, n in sorted(value.items()):
                family.add_metric([_utf8(part)], n)
            yield family

    def _by_label(self, status: Status) -> dict[str, int]:
        """Return the decisions by label; those of a regression, which have values instead, under the empty label."""
        decisions = self._publisher.decisions()
        if decisions and decisions[-1].label is None:
            return {"": status.decisions}
        return status.labels


def _histogram(latency: LatencyHistogram) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    within, count = latency.cumulative(EDGES_NS)
    return HistogramMetricFamily(
        "edge_ssm_step_seconds",
        "Time of the engine's calls: a step, or a chunk of samples.",
        buckets=[*((repr(edge / 1e9), n) for edge, n in zip(EDGES_NS, within, strict=True)), ("+Inf", count)],
        sum_value=latency.sum_ns / 1e9,
    )


def _gauges(status: Status) -> Iterator[Metric]:
    """Yield the gauges; one that was not measured is absent, never 0."""
    from prometheus_client.core import GaugeMetricFamily

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
        (
            "source_up",
            "1 while samples come; 0: none came yet, or none for too long.",
            int(status.source_state == "flowing"),
        ),
        ("ready", "1 once model and source are there.", int(status.ready)),
        ("loop_age_seconds", "Since the loop last went round: it is stuck where this grows.", status.loop_age_s),
    ):
        if value is not None:
            yield GaugeMetricFamily(f"edge_ssm_{name}", text, value=value)


def _info(name: str, text: str, labels: Mapping[str, str]) -> Metric:
    """Return a gauge that is always 1 and whose labels carry the information."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"edge_ssm_{name}", text, labels=list(labels))
    family.add_metric([_utf8(value) for value in labels.values()], 1)
    return family


def _utf8(text: str) -> str:
    """Return ``text`` as UTF-8 can encode it. Bytes in a file name that are not text are lone surrogates in Python."""
    return text.encode("utf-8", "replace").decode()
