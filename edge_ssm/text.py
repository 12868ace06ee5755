"""Make text from outside (names in files, labels, paths, answers of servers) safe to show and to pass on."""

from __future__ import annotations

MAX_CHARACTERS = 1000
"""Default limit of ``sanitize``: a longer text would push what matters off the screen."""


def sanitize(text: str, limit: int | None = MAX_CHARACTERS) -> str:
    """Return ``text`` fit for a terminal and for one line of a log.

    Control and format characters, separators other than the space, and lone surrogates become ``?``: they could move
    the cursor, begin a line, turn the direction of writing or fail to be encoded. A text of more than ``limit``
    characters is cut and ends in ``...``; None: it is never cut.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 3] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def encodable(text: str) -> str:
    """Return ``text`` with ``?`` for lone surrogates, which UTF-8 cannot encode (JSON can spell them)."""
    return text.encode("utf-8", "replace").decode()
