"""The JSON document behind ``/status.json``."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_ssm.io.messages import Decision
from edge_ssm.telemetry.health import _fit, unhealthy, unready
from edge_ssm.telemetry.publisher import StatusPublisher

VALUES = 64
"""Most outputs of a decision that are shown."""


def document(live: StatusPublisher, stuck_after_s: float, since: float = 0.0) -> bytes:
    """JSON of all that the status page shows. ``since``, seconds of the epoch: history from there on only."""
    status = live.status()
    latency = live.latency()
    return msgspec.json.encode(
        {
            "status": _fit(msgspec.structs.asdict(status)),
            "unhealthy": unhealthy(status, stuck_after_s),
            "unready": unready(status),
            "decisions": [_decision(decision) for decision in live.recent()],
            "events": [(at, _fit(text)) for at, text in live.events()],
            "history": [
                (p.time, p.samples_per_s, p.power_w, p.temperature_c, p.step_p99_us)
                for p in live.history()
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
    shown: dict[str, Any] = {"index": d.index, "start": d.start, "end": d.end, "gaps": d.gaps, "time": _fit(d.time)}
    if d.label is None:
        return shown | {"value": [float(v) for v in d.outputs[:VALUES]]}
    return shown | {"label": _fit(d.label), "score": d.score}
