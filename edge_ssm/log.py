"""Logging to standard error, for people and for journald.

Modules log with ``logging.getLogger(__name__)``; a program calls ``configure`` once. A record becomes one line:

    edge-ssm: tty 1: connection lost tries=3        on a terminal, in a file or a pipe
    <4>tty 1: connection lost tries=3               where standard error is the journal's stream (sd-daemon(3))

Fields for programs come from ``extra={"fields": {"tries": 3}}``.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress

from edge_ssm.text import sanitize

NOTICE = 25
"""Level of what a user should know although nothing is wrong, between INFO and WARNING (syslog(3): notice)."""
MAX_LINE = 2000
"""Characters of a line: a peer's text must not flood the journal."""
_PRIORITIES = ((logging.ERROR, 3), (logging.WARNING, 4), (NOTICE, 5), (logging.INFO, 6))
"""Levels and the priorities of syslog(3) that they have at least; 7 below."""


def configure(level: int = logging.INFO) -> None:
    """Write the records of this package to standard error. Further calls only set the level."""
    package = logging.getLogger("edge_ssm")
    package.setLevel(level)
    if not any(isinstance(handler, StderrHandler) for handler in package.handlers):
        logging.addLevelName(NOTICE, "NOTICE")
        handler = StderrHandler()
        handler.setFormatter(LineFormatter())
        package.addHandler(handler)
        package.propagate = False


def is_journal() -> bool:
    """Return whether standard error is the journal's stream itself, not a file or pipe that replaced it."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(sys.stderr.fileno())
        return (int(device), int(inode)) == (status.st_dev, status.st_ino)
    except (OSError, ValueError, AttributeError):
        return False


class LineFormatter(logging.Formatter):
    """Formats a record as one printable line of at most MAX_LINE characters after its prefix."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without a line end."""
        fields = getattr(record, "fields", {})
        text = " ".join([record.getMessage(), *(f"{key}={_quote(str(value))}" for key, value in fields.items())])
        # A control character could end the line, and the rest would pass for a line of this program.
        return f"{_prefix(record.levelno)}{sanitize(text, MAX_LINE)}"


class StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at that time. A full disk or a closed standard error ends no service."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; never raises."""
        with suppress(Exception):  # There is nowhere left to report it.
            print(self.format(record), file=sys.stderr, flush=True)


def _prefix(level: int) -> str:
    if not is_journal():
        return "edge-ssm: "
    return f"<{next((priority for least, priority in _PRIORITIES if level >= least), 7)}>"


def _quote(text: str) -> str:
    """Quote ``text`` unless it reads as one word."""
    if text and not any(c.isspace() or c in '"=' for c in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
