"""The cache of compiled CUDA kernels: PTX files beside the CPU engine's kernels.

The first line of a file is a header that states what the PTX was made from. Files that are damaged, of another version
or for another GPU are ignored; the kernels are then compiled, if numba-cuda is installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import msgspec

from edge_ssm import files
from edge_ssm.engines.cpu import cache as kernel_cache
from edge_ssm.errors import EngineUnavailable, InputRefused, RunFailed, UsageError

SUFFIX = ".ptx"
TARGETS = ("sm_72", "sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
"""Compute capabilities that can be compiled for. sm_87 is Orin, sm_72 is Xavier."""
_MARK = b"// edge-ssm "
_SOURCES = ("compiler", "kernels", "layout", "tagged_words")
_LIMIT = 16 << 20
ADVICE = (
    "pip install 'edge-ssm[cuda]', or make the kernels elsewhere with edge-ssm compile --target and copy them there"
)


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of a kernel file."""

    target: str
    """One of TARGETS."""
    kernel: str
    """One of ``compiler.KERNELS``."""
    entry: str
    """Name of the kernel in the PTX."""
    sources: str
    """``sources_digest`` at the time when it was compiled."""
    digest: str
    """SHA-256 of the PTX."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is stored in a file."""

    header: Header
    ptx: bytes


def sources_digest() -> str:
    """Return the SHA-256 of the source files that determine the kernels and how they are called."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"\0".join((folder / f"{name}.py").read_bytes() for name in _SOURCES)).hexdigest()


def encode(ptx: bytes, target: str, kernel: str, entry: str) -> bytes:
    """Return the contents of a kernel file."""
    header = Header(target, kernel, entry, sources_digest(), hashlib.sha256(ptx).hexdigest())
    return _MARK + msgspec.json.encode(header) + b"\n" + ptx


def decode(content: bytes) -> Kernel:
    """Parse the contents of a kernel file. Raises InputRefused if they are damaged or made from other sources."""
    first, _, ptx = content.partition(b"\n")
    if not first.startswith(_MARK):
        raise InputRefused("not a CUDA kernel of edge-ssm")
    try:
        header = msgspec.json.decode(first[len(_MARK) :], type=Header)
    except msgspec.DecodeError as error:
        raise InputRefused(f"damaged header ({error})") from None
    if hashlib.sha256(ptx).hexdigest() != header.digest:
        raise InputRefused("damaged: its digest does not fit")
    if header.sources != sources_digest():
        raise InputRefused("made by another version of edge-ssm")
    return Kernel(header, ptx)


def kept(target: str) -> dict[str, Kernel]:
    """Return the kernels for ``target`` that are in the folders, by name."""
    kernels = {}
    places = [place for place in kernel_cache.folders() if os.access(place, os.R_OK | os.X_OK)]
    for path in [path for place in places for path in sorted(place.glob(f"*{SUFFIX}"))]:
        try:
            kernel = decode(kernel_cache.content_of(path, _LIMIT))
        except InputRefused:
            continue
        if kernel.header.target == target:
            kernels[kernel.header.kernel] = kernel
    return kernels


def load(target: str) -> dict[str, Kernel]:
    """Return the kernels for ``target``, compiled if necessary. Raises EngineUnavailable if that is not possible."""
    return kept(target) or compile_and_keep(target, None, must_keep=False)[1]


def compile_and_keep(target: str, output: Path | None, must_keep: bool = True) -> tuple[Path, dict[str, Kernel]]:
    """Compile all kernels in a separate process, and return the folder and the kernels by name. No GPU is needed.

    Parameters
    ----------
    target
        One of TARGETS.
    output
        Folder to write to; None for the folder of kernels.
    must_keep
        Whether it is an error if the files cannot be written. If not, only the next start is slower.

    Raises
    ------
    UsageError
        The target is unknown.
    EngineUnavailable
        numba-cuda or its compiler is missing or fails.
    RunFailed
        The files cannot be written.
    """
    if target not in TARGETS:
        raise UsageError(f"--target {target!r}: unknown, expected {', '.join(TARGETS)}")
    if find_spec("numba_cuda") is None:
        missing = f"no kernels for {target} in {kernel_cache.folder()}, and numba-cuda is missing"
        raise EngineUnavailable(f"engine 'cuda': {missing}; {ADVICE}")
    folder = output or kernel_cache.folder()
    contents: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="edge-ssm-") as temporary:
        environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
        environment["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        command = [sys.executable, "-m", "edge_ssm.engines.cuda.compiler", target, temporary]
        process = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
        if process.returncode:
            last = (process.stderr.strip() or f"status {process.returncode}").splitlines()[-1]
            raise EngineUnavailable(f"engine 'cuda': the kernels could not be compiled ({last}); {ADVICE}")
        for path in Path(temporary).iterdir():
            contents[path.stem] = path.read_bytes()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            files.write(folder / f"{sources_digest()[:12]}-{target}-{name}{SUFFIX}", content)
    except OSError as error:
        if must_keep:
            raise RunFailed(f"{folder}: cannot be written ({error.strerror})") from None
    return folder, {name: decode(content) for name, content in contents.items()}
