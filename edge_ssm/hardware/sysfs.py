"""Reading the small text files of sysfs and procfs."""

from __future__ import annotations

from pathlib import Path

SYS = Path("/sys")


def read_text(path: Path) -> str:
    """Return the text of a file without surrounding blanks, newlines and NUL bytes. Raises OSError."""
    return path.read_bytes().decode(errors="replace").strip("\0\n ")


def read_number(path: Path) -> float:
    """Return the number in a file. Raises OSError, or ValueError if the text is not a number."""
    return float(read_text(path))


def find_text(path: Path) -> str | None:
    """Return the text of a file, or None if it is empty or cannot be read."""
    try:
        return read_text(path) or None
    except OSError:
        return None


def find_number(path: Path) -> float | None:
    """Return the number in a file, or None if it cannot be read or is not a number."""
    try:
        return read_number(path)
    except (OSError, ValueError):
        return None
