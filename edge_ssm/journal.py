"""Lines for people and for journald: with a priority where standard error goes to the journal (sd-daemon(3))."""

from __future__ import annotations

import os
import sys
from typing import Literal

from edge_ssm.text import sanitize

Priority = Literal["error", "warning", "notice", "info", "debug"]
_NUMBERS: dict[Priority, int] = {"error": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7}
"""Of syslog(3)."""
LONGEST = 2000
"""Characters of a line: a peer's text must not flood the journal."""


def in_journal() -> bool:
    """Whether standard error is the journal's stream itself, and no file or pipe put in its place since."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(sys.stderr.fileno())
        return (int(device), int(inode)) == (found.st_dev, found.st_ino)
    except (OSError, ValueError, AttributeError):
        return False


def log(priority: Priority, message: str, **fields: object) -> None:
    """One line on standard error: the message, then the fields as key=value. Never raises: a full disk or a closed
    standard error ends no service."""
    words = [message, *(f"{key}={_value(value)}" for key, value in fields.items())]
    # A control character could end the line, and what follows would pass for one of ours.
    line = sanitize(" ".join(words), LONGEST)
    prefix = f"<{_NUMBERS[priority]}>" if in_journal() else "edge-ssm: "
    try:
        print(f"{prefix}{line}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        return


def _value(value: object) -> str:
    """Quoted where it would not read as one word."""
    text = str(value)
    if text and not any(c.isspace() or c in '"=' for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
