"""The file format of the CPU kernel's machine code, and loading such a file into executable memory.

A file is a magic line, a header in JSON, and the code: position-independent, with its constants, and without references
to anything outside (``elf.link``). The header states the processor features that the code needs, the digest of the
sources that it was made from, and the digest of the code. A file that is damaged, was made from other sources or needs
another processor is refused.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import msgspec

from edge_ssm.errors import EngineUnavailable, InputRefused

MAGIC = b"edge-ssm kernel 1\n"
_SOURCES = (
    *("activations", "compiler", "denormals", "elf", "emitter", "kernel", "kernel_file", "layout", "simd", "symbols"),
)


@dataclass(frozen=True)
class Target:
    """A processor that the kernel can be compiled for."""

    machine: str
    """x86_64 or aarch64, as ``uname -m`` prints it."""
    cpu: str
    """LLVM's name of the processor."""
    features: tuple[str, ...] = ()
    """The features that ``processor_features`` must contain for the code to run."""
    llvm_features: str = ""
    """Additional features in LLVM's notation."""

    @property
    def native_half(self) -> bool:
        """Whether an instruction converts float16 to float32: F16C on x86-64; every AArch64 processor has one."""
        return self.machine == "aarch64" or "f16c" in self.features

    @property
    def triple(self) -> str:
        """LLVM's target triple."""
        return f"{self.machine}-unknown-linux-gnu"


TARGETS = {
    "aarch64-cortex-a78ae": Target(
        "aarch64", "cortex-a78ae", ("asimd", "asimddp", "asimdhp", "asimdrdm", "atomics", "fphp", "lrcpc")
    ),
    "aarch64-generic": Target("aarch64", "generic", ("asimd",)),
    "x86_64-v3": Target("x86_64", "x86-64-v3", ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")),
    "x86_64-generic": Target("x86_64", "x86-64", ("sse2",)),
}


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of a kernel file."""

    machine: str
    """x86_64 or aarch64, as ``uname -m`` prints it."""
    target: str
    """The processor that it was compiled for, for messages."""
    features: tuple[str, ...]
    """The features that ``processor_features`` must contain for the code to run."""
    sources: str
    """``sources_digest`` at the time when it was compiled."""
    digest: str
    """SHA-256 of the code."""
    entry: Annotated[int, msgspec.Meta(ge=0)]
    """Offset of the entry point in the code."""


@dataclass(frozen=True)
class KernelImage:
    """The contents of a kernel file."""

    header: Header
    code: bytes

    def encoded(self) -> bytes:
        """Return the contents of the file."""
        return MAGIC + msgspec.json.encode(self.header) + b"\n" + self.code


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """Return the SHA-256 of the source files that determine the machine code and how it is called."""
    folder = Path(__file__).parent
    content = [(folder / f"{name}.py").read_bytes() for name in _SOURCES]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


_AT_HWCAP = 16
# Names of the bits of AT_HWCAP on AArch64, from bit 0 on (Linux, arch/arm64/include/uapi/asm/hwcap.h).
_HWCAP = (
    *("fp", "asimd", "evtstrm", "aes", "pmull", "sha1", "sha2", "crc32", "atomics", "fphp", "asimdhp", "cpuid"),
    *("asimdrdm", "jscvt", "fcma", "lrcpc", "dcpop", "sha3", "sm3", "sm4", "asimddp", "sha512", "sve", "asimdfhm"),
    *("dit", "uscat", "ilrcpc", "flagm", "ssbs", "sb", "paca", "pacg"),
)


@lru_cache(maxsize=1)
def processor_features() -> frozenset[str]:
    """Return the features of this processor, as Linux names them in /proc/cpuinfo."""
    if platform.machine() == "aarch64":
        # Under an emulator, /proc/cpuinfo describes the host; AT_HWCAP describes the emulated processor.
        auxiliary = ctypes.CDLL(None).getauxval
        auxiliary.argtypes, auxiliary.restype = [ctypes.c_ulong], ctypes.c_ulong
        word = auxiliary(_AT_HWCAP)
        return frozenset(name for bit, name in enumerate(_HWCAP) if word >> bit & 1)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def decode(content: bytes, foreign: bool = False) -> KernelImage:
    """Parse the contents of a kernel file.

    Raises InputRefused if they are damaged, were made from other sources or, unless ``foreign``, if the code does not
    run on this processor.
    """
    text, separator, code = content.removeprefix(MAGIC).partition(b"\n")
    if not content.startswith(MAGIC) or not separator:
        raise InputRefused("not a compiled kernel")
    try:
        header = msgspec.json.decode(text, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputRefused(f"damaged header ({error})") from None
    if hashlib.sha256(code).hexdigest() != header.digest or header.entry >= len(code):
        raise InputRefused("damaged code (its digest differs)")
    if header.sources != sources_digest():
        raise InputRefused("made by another version of edge-ssm")
    if foreign:
        return KernelImage(header, code)
    if header.machine != platform.machine():
        raise InputRefused(f"made for {header.machine}, this machine is {platform.machine()}")
    missing = sorted(set(header.features) - processor_features())
    if missing:
        raise InputRefused(f"made for {header.target}; this processor lacks {', '.join(missing[:5])}")
    return KernelImage(header, code)


class Kernel:
    """The kernel in executable memory.

    ``run`` and ``run_briefly`` call it with the address of its argument (``layout.ARGUMENTS``). They return 0, with
    nothing changed, if a sample is not acceptable, and 1 otherwise.
    """

    def __init__(self, image: KernelImage) -> None:
        self.header = image.header
        # The code is mapped from an anonymous file. Nobody can change that file after its digest was checked, it lies
        # on no file system that is mounted noexec, and the mapping is never writable and executable at once, which
        # systemd's MemoryDenyWriteExecute= requires.
        try:
            descriptor = os.memfd_create("edge-ssm-kernel")
            try:
                os.write(descriptor, image.code)
                self._map = mmap.mmap(descriptor, len(image.code), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise EngineUnavailable(
                f"engine 'cpu': the system does not allow executable memory ({error}); use --engine reference"
            ) from None
        address = _address(self._map) + image.header.entry
        self.run: Callable[[int], int] = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address)
        """Call the kernel and let other Python threads run meanwhile."""
        self.run_briefly: Callable[[int], int] = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address)
        """Call the kernel without releasing the global interpreter lock, which takes longer than a small step."""


def _address(mapped: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(mapped, dtype=np.uint8).ctypes.data)
