"""Files that are whole or not there: a kill or a full disk leaves the old content or the new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, content: bytes, durable: bool = True) -> None:
    """Replace ``path`` by way of a temporary file beside it. ``durable``: on disk before this returns, and so after a
    power cut too. Raises OSError; leaves nothing behind."""
    import tempfile

    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if durable:  # the new name as well
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
