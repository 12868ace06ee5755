"""Subnormals, around code that is not ours: a decaying state that reaches them would make a step many times slower.

The C library's floating-point environment holds the bits that flush them to zero (``flush`` says which and why). It is
set for the calling thread only, and what stood there is put back, so that the caller's own arithmetic is as it was.
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
"""More than any fenv_t has."""
WHERE = {"x86_64": (28, 1 << 15 | 1 << 6), "aarch64": (0, 1 << 24)}
"""Machine -> byte of the control register in glibc's fenv_t (bits/fenv.h), and the bits that flush."""


def _nothing(environment: Any) -> int:
    return 0


class Flushing:
    """``enter`` and ``leave`` go around a call; both do nothing where the C library is another one."""

    def __init__(self) -> None:
        self._before, self._flushed = (ctypes.create_string_buffer(SIZE) for _ in range(2))
        self._get: Callable[[Any], int] = _nothing
        self._set: Callable[[Any], int] = _nothing
        found = WHERE.get(platform.machine())
        if found is None or platform.libc_ver()[0] != "glibc":
            return
        try:
            # The interpreter's lock is kept: giving it up would take longer than the call.
            library = ctypes.PyDLL(LIBRARY)
            get, put = library.fegetenv, library.fesetenv
        except (OSError, AttributeError):
            return
        for function in (get, put):
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
        get(self._flushed)
        at, bits = found
        (word,) = struct.unpack_from("<I", self._flushed, at)
        struct.pack_into("<I", self._flushed, at, word | bits)
        self._get, self._set = get, put

    def enter(self) -> None:
        self._get(self._before)
        self._set(self._flushed)

    def leave(self) -> None:
        self._set(self._before)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is done within, the environment is afterwards as it was."""
        self._get(self._before)
        try:
            yield
        finally:
            self._set(self._before)
