"""The CPU kernel's machine code on this device: found in a folder, or compiled once and kept there.

A folder holds images (``image``), each for one processor and one version of edge-ssm; whatever does not fit, or is
damaged, is passed over, and compiled anew where Numba is installed. The device needs neither Numba nor a compiler when
``edge-ssm compile --target`` made the image elsewhere and it was copied here.
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
"""What an assembly of LLVM begins with, its first directive."""
USER_FOLDER = "~/.cache/edge-ssm"
_LIMIT = 1 << 20
"""No image comes near this size."""

_loaded: Kernel | None = None


def folders() -> list[Path]:
    """Where compiled kernels are looked for. The first is ``folder``; $EDGE_SSM_CACHE may name more, with colons
    between them: a service reads those that only root can write."""
    return [folder(), *(Path(part) for part in os.environ.get("EDGE_SSM_CACHE", "").split(":")[1:] if part)]


def folder() -> Path:
    """Where they are kept: $EDGE_SSM_CACHE, else the folder that systemd made for the service, else the user's cache
    folder."""
    if named := os.environ.get("EDGE_SSM_CACHE", "").split(":")[0]:
        return Path(named)
    if service := os.environ.get("CACHE_DIRECTORY"):
        return Path(service.split(":")[0])
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "edge-ssm"
    return Path(os.path.expanduser(USER_FOLDER))


def load(before_compiling: Callable[[], None] = lambda: None) -> Kernel:
    """The kernel for this machine, the first call of a process finds or compiles it. Raises EngineUnavailable."""
    global _loaded
    if _loaded is None:
        found = best()
        if found is None:
            before_compiling()
            found = build()
        _loaded = Kernel(found)
    return _loaded


def best() -> KernelImage | None:
    """The kept image that ``load`` takes: of those that run here, the one that makes most of the processor."""
    found = []
    for place in folders():
        with suppress(OSError):
            for path in sorted(path for path in place.iterdir() if path.suffix == SUFFIX):
                with suppress(InputRefused):
                    found.append(read(path))
    return max(found, key=lambda made: len(made.header.features), default=None)


def content_of(path: Path, limit: int) -> bytes:
    """Of a file with machine code. Raises InputRefused, which names it, where anyone could have written it."""
    try:
        with files.open_regular_file(path) as file:
            status = os.fstat(file.fileno())
            content = files.read_at_most(file, limit)
    except OSError as error:
        raise InputRefused(f"{path}: {files.read_problem(error)}") from None
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o002:
        raise InputRefused(f"{path}: belongs to another user, or anyone may write it; machine code must not")
    return content


def read(path: Path) -> KernelImage:
    """Raises InputRefused, which names the file, where it does not run here or anyone could have written it."""
    content = content_of(path, _LIMIT)
    try:
        return decode(content)
    except InputRefused as error:
        raise InputRefused(f"{path}: {error}; compile it anew with edge-ssm compile") from None


def build() -> KernelImage:
    """Compile for this processor and keep the image where the folder can be written."""
    return compile_and_keep("host", None, None, must_keep=False)[1]


def compile_and_keep(
    target: str, output: Path | None, assembly: Path | None, must_keep: bool = True
) -> tuple[Path, KernelImage]:
    """Compile for "host" or one of ``image.TARGETS``, in a process of its own; (where it is kept, the image).

    Without ``output`` it is kept in the folder. Raises UsageError for an unknown target, EngineUnavailable where it
    can't be compiled, RunFailed where it can't be kept, unless it need not be: slower to start the next time, not a
    reason to fail.
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
        made, text = Path(temporary) / "image", Path(temporary) / "assembly"
        _compile(target, made, text)
        content, listing = made.read_bytes(), text.read_bytes()
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
    """Raises InputRefused where ``path`` holds what does not begin with ``written``, as all that compiling writes there
    does: a slip of the finger must not cost a model."""
    try:
        if not path.is_file():
            return
        with files.open_regular_file(path) as file:
            start = file.read(len(written))
    except OSError as error:
        raise InputRefused(f"{option} {path}: {files.read_problem(error)}") from None
    if start and start != written:
        raise InputRefused(f"{option} {path}: is there and is no {what}, it would be lost; name another file")


def identity(features: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(sorted(features)).encode()).hexdigest()[:12]


def _compile(target: str, output: Path, assembly: Path) -> None:
    import subprocess

    # This process's own modules must be the ones that the other one sees, however they got on the path.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    command = [sys.executable, "-m", "edge_ssm.engines.cpu.compiler", target, str(output), str(assembly)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    except OSError as error:
        raise EngineUnavailable(f"engine 'cpu': the kernel could not be compiled (no Python to run: {error})") from None
    if done.returncode:
        last = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise EngineUnavailable(f"engine 'cpu': the kernel could not be compiled ({last})")
