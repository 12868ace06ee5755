"""Output files of a command: checked before minutes of work, and written whole."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from edge_ssm import files
from edge_ssm.errors import InputRefused, RunFailed


def write(path: Path, content: bytes) -> None:
    """Write an output file. Raises RunFailed if it cannot be written, although ``check_places`` accepted it."""
    try:
        files.write(path, content)
    except OSError as error:
        raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None


def check_place(path: Path) -> None:
    """Check, before minutes of work, that an output file can be written. Raises InputRefused."""
    try:
        files.check_writable(path)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        if path.is_dir():
            problem = "is a folder"
        elif not path.exists() and not os.access(Path(os.path.realpath(path)).parent, os.W_OK):
            problem = "its folder is missing or cannot be written to"
        raise InputRefused(f"{path}: {problem}; name another file") from None


def check_places(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    """Check all output files, and that none of them overwrites an input or another output.

    Parameters
    ----------
    outputs, inputs
        Paths by the option that names them. Two paths that lead to the same file count as one.

    Raises InputRefused.
    """
    others = list(inputs.items())
    for option, path in outputs.items():
        check_place(path)
        for other, other_path in others:
            if _is_same_file(path, other_path):
                raise InputRefused(f"{option} {path}: is {other} too, which would be lost; name another file")
        if files.own_descriptor(path) is None and _is_standard_output(path):
            raise InputRefused(f"{option} {path}: standard output goes there; name another file, or /dev/stdout")
        others.append((option, path))


def _is_same_file(a: Path, b: Path) -> bool:
    try:
        status = a.stat()
        # Several outputs may go to one terminal or to /dev/null.
        return os.path.samestat(status, b.stat()) and not stat.S_ISCHR(status.st_mode)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def _is_standard_output(path: Path) -> bool:
    try:
        status = path.stat()
        return stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.fstat(1))
    except OSError:
        return False
