"""What ``/status.json`` holds, and what healthy and ready mean."""

from __future__ import annotations

from typing import Any

import msgspec

from edge_ssm.stream.decisions import Decision
from edge_ssm.stream.live import Live, Status

LONGEST = 200
"""Characters of any text: time stamps and names come from frames and files, and may be as long as those allow."""
VALUES = 64
"""Most outputs of a decision that are shown."""


def unhealthy(status: Status, stuck_after_s: float) -> str:
    """Why the loop must be taken for stuck, in words; empty where it goes round."""
    if status.loop_age_s <= stuck_after_s:
        return ""
    return f"the loop has not gone round for {status.loop_age_s:.1f} s (limit {stuck_after_s:g} s)"


def unready(status: Status) -> str:
    """Why no decisions are to be expected, in words; empty where they are."""
    if not status.ready:
        return "not ready: model or source are not there yet"
    if status.source_state in ("stale", "lost"):
        what = "nothing comes any more" if status.source_state == "stale" else "no connection"
        return f"source {_fit(status.source)}: {what}"
    return ""


def document(live: Live, stuck_after_s: float, since: float = 0.0) -> bytes:
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


def _fit(value: Any) -> Any:
    """Texts cut to LONGEST, without what UTF-8 can't hold."""
    if isinstance(value, str):
        text = value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
        return text.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_fit(key): _fit(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_fit(item) for item in value]
    return value
