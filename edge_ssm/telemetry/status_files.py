"""Status files: where a run writes its status every second, and how other processes find and read it."""

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
MAX_BYTES = 1 << 16
TEMPORARY_S = 60.0
"""Age at which a temporary file cannot belong to a write in progress."""


def folders() -> list[Path]:
    """Return the folders that hold status files; a run writes to the first that is its own."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return [Path(folder)]
    candidates = [SYSTEM_FOLDER]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.append(Path(runtime) / "edge-ssm")
    return [*candidates, Path(gettempdir()) / f"edge-ssm-{os.getuid()}"]


def running() -> list[Status]:
    """Return the status of every run that is visible here, by process number.

    Other users may write into some of the folders: files whose contents cannot belong to the process that they name
    are skipped.
    """
    by_pid = {}
    for folder in folders():
        # The instances of a service have a folder each.
        for path in sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*/*{SUFFIX}")]):
            if (status := _read(path)) is not None:
                by_pid[status.pid] = status
    return [by_pid[pid] for pid in sorted(by_pid)]


class StatusFile:
    """The status file of this process, in the first folder that only this user can write to; none if there is none.

    Files that killed runs left in that folder are removed.
    """

    def __init__(self) -> None:
        folder = next((folder for folder in folders() if is_private(folder)), None)
        if folder is not None:
            _remove_leftovers(folder)
        self._path = folder / f"{os.getpid()}{SUFFIX}" if folder else None

    def write(self, status: Status) -> None:
        """Replace the file. If that fails, no further attempt is made: the run itself matters more."""
        if self._path is None:
            return
        try:
            files.write(self._path, msgspec.json.encode(status), durable=False)
        except (OSError, UnicodeError):  # a full disk, a removed folder, a name that is not text
            self._path = None

    def remove(self) -> None:
        """Delete the file; another run would take it for the status of a live process."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def is_private(folder: Path) -> bool:
    """Create ``folder`` if necessary; return whether only this user can write to it. Others could place links there."""
    try:
        folder.mkdir(mode=0o755, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def start_ticks(pid: int) -> int:
    """Return when a process began, in clock ticks since boot (proc_pid_stat(5), field 22); 0 if unknown."""
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    return int(line.rpartition(b")")[2].split()[19])  # the second field, a name, may hold spaces and brackets


def _read(path: Path) -> Status | None:
    """Read a status file; None if it cannot be the status of the process that its name states."""
    try:
        with files.open_regular_file(path, follow_symlinks=False) as file:
            information = os.fstat(file.fileno())
            status = msgspec.json.decode(files.read_at_most(file, MAX_BYTES), type=Status)
        if status.version != VERSION or path.name != f"{status.pid}{SUFFIX}":
            return None
        if os.stat(f"/proc/{status.pid}").st_uid != information.st_uid:  # one user's file about another's process
            return None
        if status.process_started not in (0, start_ticks(status.pid)):
            return None
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return status


def _remove_leftovers(folder: Path) -> None:
    """Remove the files of killed runs from a private folder.

    A file that belongs to a live run after all (of another version, or in another container) reappears within a second.
    """
    with suppress(OSError):
        for path in list(folder.iterdir()):
            if re.fullmatch(r"\d+" + re.escape(SUFFIX), path.name):
                is_leftover = _read(path) is None
            else:  # A run that is killed while it writes leaves its temporary file (edge_ssm.files).
                is_temporary = re.fullmatch(r"\.\d+" + re.escape(SUFFIX) + r"\..+", path.name) is not None
                is_leftover = is_temporary and path.stat().st_mtime < time.time() - TEMPORARY_S
            if is_leftover:
                path.unlink(missing_ok=True)
