"""Waiting for what must happen, however busy the machine is."""

import time
from pathlib import Path

LIMIT_S = 120.0
"""Nothing that happens at all takes so long."""


def until(condition, what="it did not happen", limit_s=LIMIT_S):
    """Return the condition's first true value."""
    end = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.01)
    return value


def catches(pid, number):
    """Return whether a process has a handler for a signal: before that, the signal would end it at once."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(mask, 16) >> (number - 1) & 1)
