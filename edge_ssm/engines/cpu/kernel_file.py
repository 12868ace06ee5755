"""Machine code of the CPU kernel as a file, and calls into it, without a compiler and without a linker.

An image is the code and the constants of one relocatable ELF object, laid out and relocated: position-independent, and
without a symbol from outside. A header before it says which processor it needs, which sources it was made from, and
the digest of the code; an image that is damaged, of other sources or for another processor is refused.

Sources: System V ABI, chapter 4, "Object Files"; x86-64 psABI 4.4 and "ELF for the Arm 64-bit Architecture" 5.7 for
the relocations.
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
ENTRY = "edge_ssm_run"
_SOURCES = ("activations", "compiler", "denormals", "elf", "kernel", "kernel_file", "layout", "simd")


@dataclass(frozen=True)
class Target:
    machine: str
    cpu: str
    """As LLVM calls it."""
    features: tuple[str, ...] = ()
    """What ``processor_features`` must name for the code to run."""
    llvm_features: str = ""

    @property
    def native_half(self) -> bool:
        """Whether it has an instruction that widens float16: F16C of x86-64, part of every AArch64."""
        return self.machine == "aarch64" or "f16c" in self.features

    @property
    def triple(self) -> str:
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
    machine: str
    """x86_64 or aarch64, as the kernel (uname) calls it."""
    target: str
    """What it was compiled for, in words."""
    features: tuple[str, ...]
    """What ``processor_features`` must name."""
    sources: str
    """``sources_digest`` of the code that it was made from."""
    digest: str
    """SHA-256 of the code."""
    entry: Annotated[int, msgspec.Meta(ge=0)]
    """Where in the code the kernel begins."""


@dataclass(frozen=True)
class KernelImage:
    header: Header
    code: bytes

    def encoded(self) -> bytes:
        return MAGIC + msgspec.json.encode(self.header) + b"\n" + self.code


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """SHA-256 over the files that decide what the machine code is and how it is called."""
    folder = Path(__file__).parent
    content = [(folder / f"{name}.py").read_bytes() for name in _SOURCES]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


_AT_HWCAP = 16


# Bits of AT_HWCAP on AArch64, from 0 (Linux, arch/arm64/include/uapi/asm/hwcap.h).
_HWCAP = (
    *("fp", "asimd", "evtstrm", "aes", "pmull", "sha1", "sha2", "crc32", "atomics", "fphp", "asimdhp", "cpuid"),
    *("asimdrdm", "jscvt", "fcma", "lrcpc", "dcpop", "sha3", "sm3", "sm4", "asimddp", "sha512", "sve", "asimdfhm"),
    *("dit", "uscat", "ilrcpc", "flagm", "ssbs", "sb", "paca", "pacg"),
)


@lru_cache(maxsize=1)
def processor_features() -> frozenset[str]:
    """What the processor can, as Linux names it (/proc/cpuinfo)."""
    if platform.machine() == "aarch64":
        # An emulator's /proc/cpuinfo is that of its host; AT_HWCAP is what programs are told.
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
    """Raises InputRefused where the content is not a whole image of these sources, and for this machine unless
    ``foreign``."""
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
    """An image in memory, ready to be called with the address of ``layout.CALL_COLUMNS``."""

    def __init__(self, image: KernelImage) -> None:
        self.header = image.header
        # A file without a name: nobody can change it after the digest was checked, it lies on no "noexec" file system,
        # and memory that is never writable and executable at once is also what systemd's MemoryDenyWriteExecute wants.
        try:
            descriptor = os.memfd_create("edge-ssm-kernel")
            try:
                os.write(descriptor, image.code)
                self._map = mmap.mmap(descriptor, len(image.code), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise EngineUnavailable(
                f"engine 'cpu': this system allows no executable memory ({error}); use --engine reference"
            ) from None
        address = _address(self._map) + image.header.entry
        self.run: Callable[[int], int] = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address)
        """Other threads of Python go on meanwhile."""
        self.run_briefly: Callable[[int], int] = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(address)
        """Without letting go of the interpreter, which costs more than a small network's step."""


def _address(mapped: mmap.mmap) -> int:
    import numpy as np

    return int(np.frombuffer(mapped, dtype=np.uint8).ctypes.data)
