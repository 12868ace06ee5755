"""What systemd is told: ready, reloading, alive, stopping (sd_notify(3)). Nothing where no one listens."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress


class Notifier:
    """Of NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID, which systemd sets for a service of Type=notify."""

    def __init__(self) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) if path else None
        self._alive_every_s = 0.0
        if self._socket and os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            microseconds = os.environ.get("WATCHDOG_USEC", "")
            self._alive_every_s = int(microseconds) / 4e6 if microseconds.isdigit() else 0.0
        self._alive_at = 0.0

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        with suppress(OSError):  # The manager is busy or gone: one more ping will tell.
            self._socket.sendto(text.encode(), self._address)

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def reloading(self) -> None:
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={_line(status)}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        """From the loop itself, four times within the watchdog's limit: a loop that is stuck does not say it."""
        if self._alive_every_s and time.monotonic() - self._alive_at >= self._alive_every_s:
            self._alive_at = time.monotonic()
            self._send("WATCHDOG=1")


def _line(text: str) -> str:
    return " ".join(text.split())
