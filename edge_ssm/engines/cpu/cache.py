"""The cache of compiled CPU kernels: find the kernel for this machine in a folder, or compile it once and keep it.

A folder holds kernel files (``kernel_file``), each for one processor and one version of edge-ssm. Files that are
damaged, or that do not fit, are ignored; the kernel is then compiled, if Numba is installed. A device needs neither
Numba nor a compiler if ``edge-ssm compile --target`` made the kernel on another machine and the file was copied here.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from edge_ssm import files
from edge_ssm.engines.cpu.kernel_file import TARGETS, Kernel, KernelImage, decode, processor_features, sources_digest
from edge_ssm.errors import EngineUnavailable, InputRefused, RunFailed, UsageError

SUFFIX = ".kernel"
LISTING = b"\t."
"""First bytes of LLVM's assembly listings: a directive."""
USER_FOLDER = "~/.cache/edge-ssm"
_LIMIT = 1 << 20
"""Number of bytes that are read of a file; kernels are far smaller."""

_loaded: Kernel | None = None


def folders() -> list[Path]:
    """Return the folders that are searched for kernels.

    The first is ``folder()``. $EDGE_SSM_CACHE may name more, separated by colons: a service reads a second folder that
    only root can write.
    """
    return [folder(), *(Path(part) for part in os.environ.get("EDGE_SSM_CACHE", "").split(":")[1:] if part)]


def folder() -> Path:
    """Return the folder where kernels are kept.

    $EDGE_SSM_CACHE, else the cache directory that systemd created for the service, else the user's cache folder.
    """
    if first := os.environ.get("EDGE_SSM_CACHE", "").split(":")[0]:
        return Path(first)
    if service := os.environ.get("CACHE_DIRECTORY"):
        return Path(service.split(":")[0])
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "edge-ssm"
    return Path(os.path.expanduser(USER_FOLDER))


def load(before_compiling: Callable[[], None] = lambda: None) -> Kernel:
    """Return the kernel for this machine. The first call in a process finds or compiles it.

    ``before_compiling`` is called before the kernel is compiled, which takes some seconds.

    Raises EngineUnavailable if there is no kernel and it cannot be compiled.
    """
    global _loaded
    if _loaded is None:
        image = best()
        if image is None:
            before_compiling()
            image = build()
        _loaded = Kernel(image)
    return _loaded


def best() -> KernelImage | None:
    """Return the kernel in the folders that uses most features of this processor; None if none runs here."""
    images = []
    for place in folders():
        with suppress(OSError):
            for path in sorted(path for path in place.iterdir() if path.suffix == SUFFIX):
                with suppress(InputRefused):
                    images.append(read(path))
    return max(images, key=lambda image: len(image.header.features), default=None)


def content_of(path: Path, limit: int) -> bytes:
    """Return the first ``limit`` bytes of a file with machine code.

    Raises InputRefused if the file cannot be read, or if another user could have written it.
    """
    try:
        with files.open_regular_file(path) as file:
            status = os.fstat(file.fileno())
            content = files.read_at_most(file, limit)
    except OSError as error:
        raise InputRefused(f"{path}: {files.read_problem(error)}") from None
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002:
        raise InputRefused(
            f"{path}: belongs to another user, or anyone may write it; machine code is not loaded from such files"
        )
    return content


def read(path: Path) -> KernelImage:
    """Read a kernel file.

    Raises InputRefused, which names the file, if it does not run on this processor or if another user could have
    written it.
    """
    content = content_of(path, _LIMIT)
    try:
        return decode(content)
    except InputRefused as error:
        raise InputRefused(f"{path}: {error}; compile it anew with edge-ssm compile") from None


def build() -> KernelImage:
    """Compile the kernel for this processor, and keep it if the folder is writable."""
    return compile_and_keep("host", None, None, must_keep=False)[1]


def compile_and_keep(
    target: str, output: Path | None, assembly: Path | None, must_keep: bool = True
) -> tuple[Path, KernelImage]:
    """Compile the kernel in a separate process, and return the path of the file and its contents.

    Parameters
    ----------
    target
        "host", or a key of ``kernel_file.TARGETS``.
    output
        Where to write the kernel; None for the folder of kernels.
    assembly
        Where to write the assembly listing; None to write none.
    must_keep
        Whether it is an error if the file cannot be written. If not, only the next start is slower.

    Raises
    ------
    UsageError
        The target is unknown.
    EngineUnavailable
        The kernel cannot be compiled.
    RunFailed
        The file cannot be written.
    """
    import tempfile

    if target not in ("host", *TARGETS):
        raise UsageError(f"--target {target!r}: unknown, expected host, {', '.join(TARGETS)}")
    if find_spec("numba") is None:
        if must_keep:
            raise EngineUnavailable(f"--target {target}: compiling needs numba, which is missing; pip install numba")
        raise EngineUnavailable(
            f"engine 'cpu': no compiled kernel for this processor in {folder()}, and numba is missing; pip install "
            "numba, or make one elsewhere with edge-ssm compile --target and copy it there"
        )
    with tempfile.TemporaryDirectory(prefix="edge-ssm-") as temporary:
        kernel, text = Path(temporary) / "kernel", Path(temporary) / "assembly"
        _compile(target, kernel, text)
        content, listing = kernel.read_bytes(), text.read_bytes()
    image = decode(content, foreign=True)
    name = identity(processor_features()) if target == "host" else target
    path = output or folder() / f"{sources_digest()[:12]}-{name}{SUFFIX}"
    try:
        if output is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        if assembly is not None:
            files.write(assembly, listing)
        files.write(path, content)
    except OSError as error:
        if must_keep:
            raise RunFailed(f"{path}: cannot be written ({error.strerror})") from None
    return path, image


def check_replaced(option: str, path: Path, written: bytes, what: str) -> None:
    """Raise InputRefused if ``path`` is a file that does not begin with ``written``.

    Everything that compiling writes there begins with these bytes: a typing error must not overwrite a model.
    """
    try:
        if not path.is_file():
            return
        with files.open_regular_file(path) as file:
            start = file.read(len(written))
    except OSError as error:
        raise InputRefused(f"{option} {path}: {files.read_problem(error)}") from None
    if start and start != written:
        raise InputRefused(f"{option} {path}: exists and is not an edge-ssm {what}; name another file")


def identity(features: Iterable[str]) -> str:
    """Return a short name for a set of processor features."""
    return hashlib.sha256(" ".join(sorted(features)).encode()).hexdigest()[:12]


def _compile(target: str, output: Path, assembly: Path) -> None:
    import subprocess

    # The other process must import the same modules as this one, wherever they are.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    command = [sys.executable, "-m", "edge_ssm.engines.cpu.compiler", target, str(output), str(assembly)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    except OSError as error:
        raise EngineUnavailable(
            f"engine 'cpu': the kernel could not be compiled (Python cannot be started: {error})"
        ) from None
    if process.returncode:
        last = (process.stderr.strip() or f"status {process.returncode}").splitlines()[-1]
        raise EngineUnavailable(f"engine 'cpu': the kernel could not be compiled ({last})")
