"""What ``/status.json`` holds, and what healthy and ready mean."""

from __future__ import annotations

from typing import Any

from edge_ssm.telemetry.status import Status
from edge_ssm.text import encodable

LONGEST = 200
"""Characters of any text: time stamps and names come from frames and files, and may be as long as those allow."""


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


def _fit(value: Any) -> Any:
    """Texts cut to LONGEST, without what UTF-8 can't hold."""
    if isinstance(value, str):
        text = value if len(value) <= LONGEST else f"{value[:LONGEST]}..."
        return encodable(text)
    if isinstance(value, dict):
        return {_fit(key): _fit(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_fit(item) for item in value]
    return value
