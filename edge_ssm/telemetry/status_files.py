"""Status files: where a run publishes its status, and how other processes read it."""

from __future__ import annotations

import os
import re
import stat
import time
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir

import msgspec

from edge_ssm import files
from edge_ssm.telemetry.status import VERSION, Status

FOLDER_VARIABLE = "EDGE_SSM_RUN"
SYSTEM_FOLDER = Path("/run/edge-ssm")
SUFFIX = ".status"
LARGEST = 1 << 16
TEMPORARY_S = 60.0
"""No renewal takes so long."""


def folders() -> list[Path]:
    """Where runs may tell of themselves, the first that can be written to being taken."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return [Path(given)]
    found = [SYSTEM_FOLDER]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        found.append(Path(runtime) / "edge-ssm")
    return [*found, Path(gettempdir()) / f"edge-ssm-{os.getuid()}"]


def _own(folder: Path) -> bool:
    """Made, and nobody else's: others could put links there."""
    try:
        folder.mkdir(mode=0o755, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def running() -> list[Status]:
    """Of all runs that can be seen from here, by process number. What can be no status of the process that it names is
    passed over: others may write into some of the folders."""
    found = {}
    for folder in folders():
        # A service's instances have a folder each.
        for path in sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}")]):
            if (status := _read(path)) is not None:
                found[status.pid] = status
    return [found[pid] for pid in sorted(found)]


def _read(path: Path) -> Status | None:
    try:
        with files.open_regular_file(path, follow_symlinks=False) as file:
            about = os.fstat(file.fileno())
            status = msgspec.json.decode(files.read_at_most(file, LARGEST), type=Status)
        if status.version != VERSION or path.name != f"{status.pid}{SUFFIX}":
            return None
        if os.stat(f"/proc/{status.pid}").st_uid != about.st_uid:  # Nobody speaks for another's process.
            return None
        if status.process_started not in (0, _ticks(status.pid)):
            return None
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return status


def _ticks(pid: int) -> int:
    """When a process began: field 22 of proc_pid_stat(5); 0 where that can't be known."""
    try:
        told = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(told.rpartition(b")")[2].split()[19])  # the second field, a name, may hold spaces and brackets


def _clear(folder: Path) -> None:
    """Away with what killed runs left in a folder of our own. What is taken from a run that lives, one of another
    version or in another container, is there again with its next renewal."""
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if re.fullmatch(r"\d+" + re.escape(SUFFIX), path.name):
                left = _read(path) is None
            else:  # A kill in the midst of a renewal leaves its temporary file (edge_ssm.files).
                half_written = re.fullmatch(r"\.\d+" + re.escape(SUFFIX) + r"\..+", path.name)
                left = half_written is not None and path.stat().st_mtime < time.time() - TEMPORARY_S
            if left:
                path.unlink(missing_ok=True)
