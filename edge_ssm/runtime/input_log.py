"""Log lines about the input, of which only the first ones appear: a babbling sensor must not fill a log."""

from __future__ import annotations

import logging
import time

from edge_ssm.log import NOTICE

logger = logging.getLogger(__name__)

MAX_LINES = 20
PERIOD_S = 600.0
"""After this time, the next MAX_LINES lines appear again. The counters count every problem."""


class InputLog:
    """Logs what happens to one source, which ``source`` names."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines, self._since = 0, 0.0

    def log(self, text: str, level: int = logging.WARNING) -> None:
        """Log what happened, unless there were too many lines lately."""
        now = time.monotonic()
        if now - self._since > PERIOD_S:
            self._lines, self._since = 0, now
        self._lines += 1
        if self._lines <= MAX_LINES:
            logger.log(level, "%s, %s", self._source, text)
        if self._lines == MAX_LINES:
            logger.log(NOTICE, "further malformed rows are counted, not shown")
