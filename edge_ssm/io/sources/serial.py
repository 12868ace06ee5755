"""A sensor on a serial line (``serial:///dev/ttyUSB0?baud=115200``), through pyserial."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import termios
from typing import Any

from edge_ssm.errors import RunFailed, UsageError
from edge_ssm.io.address import Endpoint
from edge_ssm.io.backoff import Backoff
from edge_ssm.io.sources.base import SourceOptions
from edge_ssm.io.sources.device import DeviceSource

PARITIES = {"none": "N", "even": "E", "odd": "O", "mark": "M", "space": "S"}
STOP_BITS = (1, 1.5, 2)
FLOWS = ("none", "rtscts", "xonxoff")
_REMEDIES = {
    errno.ENOENT: "no such device; is it plugged in?",
    errno.EACCES: "no permission to open it; add the user to the group that owns it (often dialout)",
    errno.EAGAIN: "another program has it open",
    errno.EBUSY: "another program has it open",
}


class SerialSource(DeviceSource):
    """Reads a serial line, opened exclusively.

    A device that is missing is waited for. What the line had buffered before it was opened is discarded, since its age
    is unknown.

    Parameters
    ----------
    path
        Device node.
    baud
        Bits per second.
    parity, stop_bits, data_bits, flow
        One of PARITIES, STOP_BITS, 5 to 8, and one of FLOWS.

    Raises UsageError for an option that is not allowed, a path that is no serial device, or without pyserial.
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
        backoff: Backoff | None = None,
    ) -> None:
        super().__init__(path, backoff)
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
        self._port: Any = serial.Serial()  # Setting its port later keeps it closed until then.
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
        except (OSError, termios.error) as error:  # termios.error: it vanished while it was set up
            number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
            reason = _REMEDIES.get(number) or (os.strerror(number) if number else str(error))
            raise OSError(number, reason) from None
        except ValueError as error:
            raise RunFailed(f"{self.name}: the device does not take these settings ({error})") from None
        return int(self._port.fileno())

    def _close(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # the device may be gone
            self._port.close()


def open_endpoint(endpoint: Endpoint, options: SourceOptions | None = None) -> SerialSource:
    """Return the source of ``serial:///dev/DEVICE?OPTIONS``, which opens its device at the first read.

    Raises UsageError.
    """
    values = endpoint.known_options("baud", "parity", "stop_bits", "data_bits", "flow")
    if endpoint.host or len(endpoint.path) < 2:
        raise UsageError(f"{endpoint.redacted}: expected serial:///dev/DEVICE?baud=115200")
    try:
        stop_bits = float(values.get("stop_bits", "1"))
    except ValueError:
        raise UsageError(f"{endpoint.redacted}: stop_bits {values['stop_bits']!r}, expected 1, 1.5 or 2") from None
    return SerialSource(
        endpoint.path,
        endpoint.positive_int("baud", 115200),
        parity=values.get("parity", "none"),
        stop_bits=stop_bits,
        data_bits=endpoint.positive_int("data_bits", 8),
        flow=values.get("flow", "none"),
    )


def validate_endpoint(endpoint: Endpoint) -> None:
    """Raise UsageError for an option that is not allowed, a path that is no serial device, or without pyserial."""
    open_endpoint(endpoint).close()
