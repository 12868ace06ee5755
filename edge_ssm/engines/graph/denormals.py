"""Flush subnormals to zero around calls of another project's runtime.

A decaying state that reaches the subnormals makes a step many times slower. The bits that flush them to zero
(``engines.cpu.denormals`` explains them) are part of the C library's floating-point environment. It is changed for the
calling thread only, and restored after the call, so that the caller's own arithmetic is unchanged.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import struct
from collections.abc import Callable, Iterator
from typing import Any

LIBRARY = "libm.so.6"
SIZE = 64
"""Size of a buffer that holds any machine's fenv_t, in bytes."""
CONTROL_BITS = {"x86_64": (28, 1 << 15 | 1 << 6), "aarch64": (0, 1 << 24)}
"""Machine -> offset of the control register in glibc's fenv_t (bits/fenv.h), and its bits that flush subnormals."""


def _do_nothing(environment: Any) -> int:
    return 0


class Flushing:
    """Flushes subnormals between ``enter`` and ``leave``. Both do nothing if the C library is not glibc."""

    def __init__(self) -> None:
        self._before, self._flushed = (ctypes.create_string_buffer(SIZE) for _ in range(2))
        self._get: Callable[[Any], int] = _do_nothing
        self._set: Callable[[Any], int] = _do_nothing
        control = CONTROL_BITS.get(platform.machine())
        if control is None or platform.libc_ver()[0] != "glibc":
            return
        try:
            # PyDLL keeps the global interpreter lock: releasing it would take longer than the call.
            library = ctypes.PyDLL(LIBRARY)
            get, put = library.fegetenv, library.fesetenv
        except (OSError, AttributeError):
            return
        for function in (get, put):
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
        get(self._flushed)
        offset, bits = control
        (word,) = struct.unpack_from("<I", self._flushed, offset)
        struct.pack_into("<I", self._flushed, offset, word | bits)
        self._get, self._set = get, put

    def enter(self) -> None:
        """Save the environment, and flush subnormals from now on."""
        self._get(self._before)
        self._set(self._flushed)

    def leave(self) -> None:
        """Restore the environment that ``enter`` saved."""
        self._set(self._before)

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the environment after the block, whatever the block does to it."""
        self._get(self._before)
        try:
            yield
        finally:
            self._set(self._before)
