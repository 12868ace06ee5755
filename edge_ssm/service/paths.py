"""Check the files and folders of a run without opening them.

A function raises UsageError for what cannot work, and returns warnings about what may work by the time of the run.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from edge_ssm.errors import UsageError


def check_input(path: Path, is_followed: bool) -> list[str]:
    """Check a file that samples come from."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return [f"{path}: does not exist now ({error.strerror}); until it does, the run ends with status 2"]
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path}: cannot be read (it is a directory); expected a file, a named pipe or a device")
    if stat.S_ISSOCK(mode):
        raise UsageError(f"{path}: cannot be read (it is a socket); give unix://{path.absolute()}")
    warnings = []
    if not os.access(path, os.R_OK):
        warnings.append(f"{path}: this user may not read it; if the run may not either, it ends with status 2")
    if stat.S_ISFIFO(mode) and not is_followed:
        warnings.append("a named pipe ends with its first writer; source.follow = true waits for the next")
    return warnings


def is_terminal_device(path: Path) -> bool:
    """Return whether ``path`` is a serial line or another terminal device."""
    try:
        is_device = stat.S_ISCHR(path.stat().st_mode)
    except OSError:
        return False
    return is_device and str(path).startswith(("/dev/tty", "/dev/serial/"))


def check_output(path: str) -> list[str]:
    """Check a file that decisions go to."""
    if path.endswith("/") or os.path.isdir(path):
        raise UsageError(f"{path}: cannot be written (it is a directory); expected a file")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        folder = os.path.dirname(os.path.realpath(path))  # a link may lead to a file that does not exist yet
        if not os.path.isdir(folder):
            return [f"{folder}: does not exist now; until it does, the run ends with status 2"]
        if not can_hold_files(folder):
            raise UsageError(f"{path}: cannot be written (no new files in {folder}); give another file") from None
        return []
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None
    if stat.S_ISSOCK(mode):
        raise UsageError(f"{path}: cannot be written (it is a socket); give unix://{os.path.abspath(path)}")
    if not os.access(path, os.W_OK):
        raise UsageError(f"{path}: cannot be written (no permission); give another file")
    return []


def check_state_folder(folder: Path) -> None:
    """Check a folder for snapshots, which may not exist yet."""
    reason = "no permission, or no folder"
    try:
        folder.stat()
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise UsageError(f"{folder}: snapshots cannot be kept there ({error.strerror}); see --state") from None
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(existing) or not can_hold_files(existing):
        raise UsageError(f"{folder}: snapshots cannot be kept there ({existing}: {reason}); see --state")


def can_hold_files(folder: str | Path) -> bool:
    """Return whether this process could create a file in ``folder``, without trying.

    os.access permits everything to root, even in /proc and /sys, where nobody can create a file.
    """
    kernel = [os.stat(path).st_dev for path in ("/proc", "/sys") if os.path.ismount(path)]
    return os.access(folder, os.W_OK | os.X_OK) and os.stat(folder).st_dev not in kernel
