"""Notifications to systemd (sd_notify(3)): ready, reloading, alive, stopping."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress


class Notifier:
    """Sends notifications where systemd expects them, and nothing elsewhere.

    systemd sets NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID for a service of Type=notify.
    """

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
        with suppress(OSError):  # The manager is busy or gone: the next ping may reach it.
            self._socket.sendto(text.encode(), self._address)

    def ready(self, status: str) -> None:
        """Report that the service runs, or runs again after ``reloading``."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def reloading(self) -> None:
        """Report that the service reloads its model."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def status(self, status: str) -> None:
        """Set the line that ``systemctl status`` shows."""
        self._send(f"STATUS={_line(status)}")

    def stopping(self) -> None:
        """Report that the service is about to end."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Ping the watchdog, four times within its limit.

        Only the pipeline's thread may call this: the pings must stop when it is stuck.
        """
        if self._alive_every_s and time.monotonic() - self._alive_at >= self._alive_every_s:
            self._alive_at = time.monotonic()
            self._send("WATCHDOG=1")


def _line(text: str) -> str:
    return " ".join(text.split())
