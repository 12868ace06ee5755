"""The JSON document behind ``/status.json``: everything that the status page shows."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_ssm.io.messages import Decision
from edge_ssm.telemetry import health
from edge_ssm.telemetry.publisher import StatusPublisher
from edge_ssm.telemetry.status import shorten

MAX_VALUES = 64
"""Outputs shown of one decision of a regression."""


def encode(publisher: StatusPublisher, stuck_after_s: float, since: float = 0.0) -> bytes:
    """Return the document as JSON, with the history after ``since`` (seconds since the epoch)."""
    decisions, events = publisher.decisions(), publisher.events()  # before the status, which then counts them all
    status, latency = publisher.status(), publisher.latency()
    return msgspec.json.encode(
        {
            "status": shorten(msgspec.structs.asdict(status)),
            "unhealthy": health.why_unhealthy(status, stuck_after_s),
            "unready": health.why_unready(status),
            "decisions": [_decision(decision) for decision in decisions],
            "events": [(time, shorten(text)) for time, text in events],
            "history": [
                (p.time, p.samples_per_s, p.power_w, p.temperature_c, p.step_p99_us)
                for p in publisher.history()
                if p.time > since
            ],
            "latency": {
                "count": latency.count,
                "sum_ns": latency.sum_ns,
                "max_ns": latency.max_ns,
                "buckets": latency.buckets(),
            },
        }
    )


def _decision(d: Decision) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": d.index, "start": d.start, "end": d.end, "gaps": d.gaps, "time": shorten(d.time)}
    if d.label is None:
        return shown | {"value": [float(v) for v in d.outputs[:MAX_VALUES]]}
    return shown | {"label": shorten(d.label), "score": d.score}
