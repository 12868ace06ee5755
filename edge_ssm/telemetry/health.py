"""When a run is healthy and when it is ready, for ``/healthz``, ``/readyz`` and the status page."""

from __future__ import annotations

from edge_ssm.telemetry.status import Status, shorten

_SOURCE_PROBLEMS = {"stale": "no samples arrive any more", "lost": "no connection"}


def why_unhealthy(status: Status, stuck_after_s: float) -> str:
    """Return why the pipeline counts as stuck; empty if it does not."""
    if status.loop_age_s <= stuck_after_s:
        return ""
    return f"the loop has not run for {status.loop_age_s:.1f} s (limit {stuck_after_s:g} s)"


def why_unready(status: Status) -> str:
    """Return why no decisions are to be expected; empty if they are."""
    if not status.ready:
        return "not ready: the model is not loaded or the source is not open yet"
    if problem := _SOURCE_PROBLEMS.get(status.source_state):
        return f"source {shorten(status.source)}: {problem}"
    return ""
