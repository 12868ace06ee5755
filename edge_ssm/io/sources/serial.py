"""A sensor on a serial line, by pyserial."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import termios
from typing import Any

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.sources.device import DeviceSource

PARITIES = {"none": "N", "even": "E", "odd": "O", "mark": "M", "space": "S"}
STOP_BITS = (1, 1.5, 2)
FLOWS = ("none", "rtscts", "xonxoff")
_WORDS = {
    errno.ENOENT: "no such device; is it plugged in?",
    errno.EACCES: "no permission to open it; add the user to the group that owns it (often dialout)",
    errno.EAGAIN: "another program has it open",
    errno.EBUSY: "another program has it open",
}


class SerialSource(DeviceSource):
    """Bytes of a serial line, 8N1 unless told otherwise, opened for this process alone.

    baud: bits a second. parity: one of PARITIES. flow: one of FLOWS. A device that is not there yet, or goes away, is
    waited for; what the line had buffered before it was opened is thrown away, since nobody knows how old it is.

    Raises UsageError for an option that can't be, a path that is no device, or without pyserial.
    """

    def __init__(
        self,
        path: str,
        baud: int,
        *,
        parity: str = "none",
        stop_bits: float = 1,
        data_bits: int = 8,
        flow: str = "none",
        back_off: Backoff | None = None,
    ) -> None:
        super().__init__(path, back_off)
        try:
            import serial
        except ImportError:
            raise UsageError(
                f"{path}: a serial line needs pyserial; install it: pip install 'edge-ssm[serial]'"
            ) from None
        for name, value, allowed in (
            ("parity", parity, tuple(PARITIES)),
            ("stop_bits", stop_bits, STOP_BITS),
            ("data_bits", data_bits, (5, 6, 7, 8)),
            ("flow", flow, FLOWS),
        ):
            if value not in allowed:
                raise UsageError(f"{path}: {name} {value!r}: expected one of {', '.join(map(str, allowed))}")
        if isinstance(baud, bool) or not isinstance(baud, int) or not 0 < baud < 1 << 31:
            raise UsageError(f"{path}: baud {baud!r}: expected a positive whole number, such as 115200")
        with contextlib.suppress(OSError):
            if not stat.S_ISCHR(os.stat(path).st_mode):
                raise UsageError(f"{path}: not a serial device; for a file or pipe give its path as a file")
        self._port: Any = serial.Serial()  # not opened before its port is set
        self._port.baudrate = baud
        self._port.parity = PARITIES[parity]
        self._port.stopbits = stop_bits
        self._port.bytesize = data_bits
        self._port.rtscts = flow == "rtscts"
        self._port.xonxoff = flow == "xonxoff"
        self._port.exclusive = True

    def _open(self) -> int:
        self._port.port = self.name
        try:
            self._port.open()  # discards what the line had buffered
        except (OSError, termios.error) as error:  # the latter where the device vanishes while it is set up
            number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
            words = _WORDS.get(number) or (os.strerror(number) if number else str(error))
            raise OSError(number, words) from None
        except ValueError as error:
            raise RunFailed(f"{self.name}: the device does not take these settings ({error})") from None
        return int(self._port.fileno())

    def _close(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # the device may be gone
            self._port.close()
