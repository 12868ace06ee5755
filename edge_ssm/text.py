"""Somebody else's text - names in files, labels, paths - fit for a terminal and for one line."""

from __future__ import annotations

LONGEST = 1000
"""Characters; more would push what matters off the screen."""


def sanitize(text: str, longest: int = LONGEST) -> str:
    """``text`` with ``?`` for what could move the cursor, begin a line, turn the writing's direction or not be encoded
    (control and format characters, separators other than the space, lone surrogates), cut to ``longest``."""
    shown = "".join(c if c.isprintable() else "?" for c in text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 3] + "..."
